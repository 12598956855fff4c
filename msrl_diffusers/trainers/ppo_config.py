"""DiffusionPPOConfig: settings of PPO with a KL leash."""

from dataclasses import dataclass, field

from ..errors import InputError
from .base_config import TrainingConfig, check_choice, check_positive


@dataclass
class DiffusionPPOConfig(TrainingConfig):
    """Settings of `DiffusionPPOTrainer`. One step is one rollout; batch sizes are per process."""

    max_steps: int = field(default=100, metadata={"help": "Number of rollouts, each followed by its updates."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    logging_steps: int = field(default=1, metadata={"help": "Rollouts between log lines."})
    rollout_batch_size: int = field(default=32, metadata={"help": "Samples denoised at once."})
    num_rollout_batches: int = field(default=4, metadata={"help": "Batches of samples in one rollout."})
    train_batch_size: int = field(default=32, metadata={"help": "Samples in one forward pass of the update."})
    num_updates: int = field(
        default=1, metadata={"help": "Optimizer updates per rollout; more than 2 tends to collapse."}
    )
    num_inference_steps: int = field(default=25, metadata={"help": "Denoising steps of a rollout."})
    eta: float = field(default=1.0, metadata={"help": "Noise of the DDIM steps; must be above 0."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance in rollouts and updates."})
    timestep_fraction: float = field(
        default=1.0, metadata={"help": "Share of the stochastic steps trained per rollout, drawn anew for each."}
    )
    min_std: float = field(
        default=0.01,
        metadata={"help": "Steps with a smaller standard deviation are taken as deterministic, not trained."},
    )
    log_prob_reduction: str = field(default="mean", metadata={"help": "mean or sum over the elements of a latent."})
    clip_shift: float = field(
        default=0.0128,
        metadata={"help": "Clip range as a shift of the mean in standard deviations, for any latent size."},
    )
    adv_clip_max: float = field(default=5.0, metadata={"help": "Advantages are clipped to this."})
    kl_coef: float = field(default=0.01, metadata={"help": "Weight of the KL divergence to the reference policy."})
    kl_budget: float | None = field(
        default=None, metadata={"help": "Stop when the KL divergence per step and element passes this."}
    )
    patience: int | None = field(
        default=None, metadata={"help": "Stop when the selection figure has not improved for so many rollouts."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward; equal if unset."}
    )
    use_lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the LoRA adapter."})

    def __post_init__(self):
        super().__post_init__()
        for name in (
            "rollout_batch_size",
            "num_rollout_batches",
            "num_updates",
            "num_inference_steps",
            "eta",
            "clip_shift",
        ):
            check_positive(self, name)
        check_choice(self, "log_prob_reduction", ("mean", "sum"))
        if not 0 < self.timestep_fraction <= 1:
            raise InputError(f"timestep_fraction must lie in (0, 1], got {self.timestep_fraction}.")
        if self.gradient_accumulation_steps != 1:
            raise InputError("gradient_accumulation_steps follows from num_updates here; leave it at 1.")
        if self.samples_per_rollout % (self.train_batch_size * self.num_updates):
            raise InputError(
                f"{self.samples_per_rollout} samples per rollout (rollout_batch_size={self.rollout_batch_size} x "
                f"num_rollout_batches={self.num_rollout_batches}) can't be divided into {self.num_updates} updates of "
                f"batches of train_batch_size={self.train_batch_size}; make the product divisible."
            )

    @property
    def samples_per_rollout(self) -> int:
        """Samples one process denoises per rollout."""
        return self.rollout_batch_size * self.num_rollout_batches
