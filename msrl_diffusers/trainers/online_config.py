"""OnlineConfig: the settings of every trainer whose data are samples of the policy it trains."""

from dataclasses import dataclass, field

from ..errors import InputError
from .base_config import TrainingConfig, check_positive


@dataclass
class OnlineConfig(TrainingConfig):
    """Fields of trainers that learn from their own rollouts. One step is one rollout; batch sizes are per process."""

    max_steps: int = field(default=100, metadata={"help": "Number of rollouts, each followed by its updates."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    logging_steps: int = field(default=1, metadata={"help": "Rollouts between log lines."})
    log_samples_steps: int = field(default=0, metadata={"help": "Rollouts between pictures of samples; 0 draws none."})

    # rollouts
    rollout_batch_size: int = field(default=32, metadata={"help": "Samples denoised at once."})
    num_rollout_batches: int = field(default=4, metadata={"help": "Batches of samples in one rollout."})
    num_inference_steps: int = field(default=25, metadata={"help": "Denoising steps of a rollout."})
    # whether an ODE will do is the trainer's to check
    eta: float = field(default=1.0, metadata={"help": "Noise of the DDIM steps; 0 is the ODE."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance in rollouts."})
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

    # what is watched, and when to stop
    watch_steps: int = field(
        default=1, metadata={"help": "Rollouts between two looks of the watchdogs that the trainer was given."}
    )
    patience: int | None = field(
        default=None, metadata={"help": "Stop when the selection figure has not improved for so many rollouts."}
    )
    watch_limits: dict | None = field(
        default=None, metadata={"help": "{figure of a watchdog: [low, high]}; stop when it leaves these limits."}
    )

    # updates
    train_batch_size: int = field(default=32, metadata={"help": "Samples in one forward pass of the update."})

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
        for name in ("rollout_batch_size", "num_rollout_batches", "num_inference_steps", "watch_steps", "lora_rank"):
            check_positive(self, name)
        for name in ("reward_batch_size", "patience"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        if (
            not 0 <= self.eta <= 1
        ):  # with more noise than DDPM adds, the variance that is left for the mean is negative
            raise InputError(f"eta is 0 to 1, got {self.eta}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay must lie between 0 and 1, got {self.ema_decay}.")
        for name, limits in (self.watch_limits or {}).items():
            pair = isinstance(limits, list) and len(limits) == 2
            if not pair or not all(isinstance(limit, int | float) for limit in limits) or not limits[0] <= limits[1]:
                raise InputError(
                    f"watch_limits: {name} needs [low, high], two numbers (.inf for no bound), got {limits!r}."
                )

    def check_divisible(self, num_updates: int) -> None:
        """Raise InputError unless a rollout makes `num_updates` equal updates of whole batches."""
        if self.gradient_accumulation_steps != 1:
            raise InputError("gradient_accumulation_steps follows from num_updates here; leave it at 1.")
        if self.samples_per_rollout % (self.train_batch_size * num_updates):
            raise InputError(
                f"{self.samples_per_rollout} samples per rollout (rollout_batch_size={self.rollout_batch_size} x "
                f"num_rollout_batches={self.num_rollout_batches}) can't be divided into {num_updates} updates of "
                f"batches of train_batch_size={self.train_batch_size}; make the product divisible."
            )

    def refuse_rewards(self) -> None:
        """Raise InputError for options of rewards, in a config whose trainer has none."""
        if self.reward_weights is not None or self.reward_batch_size is not None or self.async_rewards:
            raise InputError(
                f"{type(self).__name__}: there are no rewards; unset reward_weights, reward_batch_size, async_rewards."
            )

    @property
    def etas(self) -> list[float]:
        """Noise of the samplers that rollouts come from; of one sampler here."""
        return [self.eta]

    @property
    def samples_per_rollout(self) -> int:
        """Samples one process denoises per rollout."""
        return self.rollout_batch_size * self.num_rollout_batches
