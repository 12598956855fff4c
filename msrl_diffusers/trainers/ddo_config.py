"""DDOConfig: settings of discriminative self-play."""

from dataclasses import dataclass, field

from .base_config import check_not_negative, check_positive
from .online_config import OnlineConfig


@dataclass
class DDOConfig(OnlineConfig):
    """Settings of `DDOTrainer`. One step is a round: one rollout and its updates; batch sizes are per process."""

    max_steps: int = field(
        default=6, metadata={"help": "Number of rounds of self-play, each with samples of its own."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})
    ema_decay: float | None = field(
        default=0.95, metadata={"help": "Keep an exponential average of the weights, and end with it."}
    )

    # rollouts
    num_rollout_batches: int = field(default=8, metadata={"help": "Batches of samples in one rollout."})
    num_inference_steps: int = field(default=30, metadata={"help": "Denoising steps of a rollout."})
    eta: float = field(default=0.0, metadata={"help": "Noise of the DDIM steps; 0 is the ODE."})
    sampler: str | None = field(
        default=None,
        metadata={"help": "A scheduler class of diffusers that samples the rollouts; the pipeline's own if unset."},
    )

    # updates
    num_updates: int = field(default=4, metadata={"help": "Optimizer updates in one pass over a rollout."})
    num_epochs: int = field(
        default=4, metadata={"help": "Passes over a rollout, each beside other real volumes, with other noise."}
    )
    num_train_timesteps_per_sample: int = field(
        default=1, metadata={"help": "Noise levels at which each pair of a real volume and a sample is trained."}
    )
    beta: float = field(
        default=0.02, metadata={"help": "Weight of the log-likelihood ratio in the discriminator's logit."}
    )
    alpha: float = field(default=1.0, metadata={"help": "Weight of own samples against real volumes."})
    kl_budget: float | None = field(
        default=None,
        metadata={"help": "Stop when ddo/kl, the squared difference of predictions from the pretrained, passes this."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_updates", "num_epochs", "num_train_timesteps_per_sample", "beta"):
            check_positive(self, name)
        check_not_negative(self, "alpha")
        if self.kl_budget is not None:
            check_positive(self, "kl_budget")
        self.refuse_rewards()
        self.check_divisible(self.num_updates)
