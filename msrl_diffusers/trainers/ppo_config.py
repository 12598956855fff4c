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
    log_samples_steps: int = field(default=0, metadata={"help": "Rollouts between pictures of samples; 0 draws none."})

    # rollouts
    rollout_batch_size: int = field(default=32, metadata={"help": "Samples denoised at once."})
    num_rollout_batches: int = field(default=4, metadata={"help": "Batches of samples in one rollout."})
    num_inference_steps: int = field(default=25, metadata={"help": "Denoising steps of a rollout."})
    eta: float = field(default=1.0, metadata={"help": "Noise of the DDIM steps; must be above 0."})
    min_std: float = field(
        default=0.01,
        metadata={"help": "Steps with a smaller standard deviation are taken as deterministic, not trained."},
    )
    sde_window: int | None = field(
        default=None,
        metadata={"help": "Noise in so many consecutive steps only, drawn anew for each rollout; the rest is an ODE."},
    )
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance in rollouts."})
    train_cfg: bool = field(
        default=True, metadata={"help": "Guidance in updates too; false trains the policy without guidance."}
    )
    offload_rollouts: bool = field(default=False, metadata={"help": "Keep trajectories in main memory."})

    # rewards
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward; equal if unset."}
    )
    reward_batch_size: int | None = field(
        default=None, metadata={"help": "Samples scored at once; a rollout batch if unset."}
    )
    async_rewards: bool = field(
        default=False, metadata={"help": "Score a batch in another thread while the next one is denoised."}
    )
    adv_clip_max: float = field(default=5.0, metadata={"help": "Advantages are clipped to this."})

    # updates
    train_batch_size: int = field(default=32, metadata={"help": "Samples in one forward pass of the update."})
    num_updates: int = field(
        default=1, metadata={"help": "Optimizer updates per rollout; more than 2 tends to collapse."}
    )
    timestep_fraction: float = field(
        default=1.0, metadata={"help": "Share of the stochastic steps trained per rollout, drawn anew for each."}
    )
    log_prob_reduction: str = field(default="mean", metadata={"help": "mean or sum over the elements of a latent."})
    policy_loss: str = field(
        default="clip", metadata={"help": "clip (of the ratio) or kl_mask (closed-form trust region)."}
    )
    clip_shift: float = field(
        default=0.0128,
        metadata={"help": "Clip range as a shift of the mean in standard deviations, for any latent size."},
    )
    kl_threshold: float = field(
        default=1e-5, metadata={"help": "Trust region of kl_mask: divergence per element from the rollout's policy."}
    )

    # the leash
    kl_mode: str = field(default="fixed", metadata={"help": "fixed, or adaptive: kl_coef follows kl_target."})
    kl_coef: float = field(default=0.01, metadata={"help": "Weight of the KL divergence to the reference policy."})
    kl_target: float = field(
        default=1e-4, metadata={"help": "KL divergence per step and element that adaptive aims at."}
    )
    kl_rate: float = field(default=0.1, metadata={"help": "How fast adaptive changes kl_coef."})
    kl_budget: float | None = field(
        default=None, metadata={"help": "Stop when the KL divergence per step and element passes this."}
    )
    patience: int | None = field(
        default=None, metadata={"help": "Stop when the selection figure has not improved for so many rollouts."}
    )
    watch_limits: dict | None = field(
        default=None, metadata={"help": "{figure of a watchdog: [low, high]}; stop when it leaves these limits."}
    )

    # what is trained
    use_lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the LoRA adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get an adapter; attention and residual convolutions if unset."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Keep an exponential average of the weights, and end with it."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, a third slower."}
    )

    # the Hub
    push_to_hub: bool = field(default=False, metadata={"help": "Push the tuned pipeline to the Hub at the end."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Its repository; the name of output_dir, under your account, if unset."}
    )
    hub_private_repo: bool = field(
        default=True,
        metadata={"help": "A private repository: audit a model trained on patients before you publish it."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("rollout_batch_size", "num_rollout_batches", "num_updates", "num_inference_steps", "eta",
                     "clip_shift", "kl_threshold", "kl_target", "lora_rank"):  # fmt: skip
            check_positive(self, name)
        for name in ("sde_window", "reward_batch_size", "kl_budget", "patience"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        check_choice(self, "log_prob_reduction", ("mean", "sum"))
        check_choice(self, "policy_loss", ("clip", "kl_mask"))
        check_choice(self, "kl_mode", ("fixed", "adaptive"))
        if not 0 < self.timestep_fraction <= 1:
            raise InputError(f"timestep_fraction must lie in (0, 1], got {self.timestep_fraction}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay must lie between 0 and 1, got {self.ema_decay}.")
        for name, limits in (self.watch_limits or {}).items():
            if not (isinstance(limits, list) and len(limits) == 2):
                raise InputError(f"watch_limits: {name} needs [low, high], got {limits!r}.")
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

    @property
    def train_guidance_scale(self) -> float:
        """Guidance of the policy that is trained."""
        return self.guidance_scale if self.train_cfg else 1.0
