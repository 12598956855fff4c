"""DiffusionNFTConfig: settings of reinforcement learning on the forward process."""

from dataclasses import dataclass, field

from ..errors import InputError
from .base_config import check_choice, check_not_negative, check_positive
from .online_config import OnlineConfig


@dataclass
class DiffusionNFTConfig(OnlineConfig):
    """Settings of `DiffusionNFTTrainer`. One step is one rollout; batch sizes are per process."""

    # rollouts
    eta: float = field(default=0.0, metadata={"help": "Noise of the DDIM steps; 0 is the ODE."})
    sampler: str | None = field(
        default=None,
        metadata={
            "help": "A scheduler class of diffusers that samples the rollouts; the pipeline's own if unset, with Stable Diffusion DDIM."
        },
    )

    # updates
    objective: str = field(
        default="nft",
        metadata={"help": "nft (positive and negative branches) or awm (signed advantage-weighted matching)."},
    )
    num_updates: int = field(default=1, metadata={"help": "Optimizer updates per rollout; awm takes 1."})
    num_train_timesteps_per_sample: int = field(
        default=4, metadata={"help": "Noise levels of the sampler's grid at which each sample is trained."}
    )
    noise_group_size: int = field(
        default=1, metadata={"help": "So many samples of a condition are noised alike, which lowers the variance."}
    )
    min_signal: float = field(
        default=0.05,
        metadata={"help": "Epsilon prediction: grid steps with less signal, sqrt(alpha_prod), are not trained."},
    )
    adv_clip_max: float = field(
        default=5.0, metadata={"help": "Advantages are clipped to this; the best samples are those that reach it."}
    )
    beta: float = field(
        default=1.0,
        metadata={"help": "nft: how much of the trained policy a branch holds; less is faster, less stable."},
    )
    weighting: str = field(
        default="huber",
        metadata={"help": "awm: weight of the matching error: uniform, noise (level), noise_squared or huber."},
    )
    huber_power: float = field(default=0.25, metadata={"help": "awm: power of the error under huber."})

    # the old policy: nft samples from it
    old_decay_start: int = field(
        default=0, metadata={"help": "Rollouts during which the old policy follows the trained one at once."}
    )
    old_decay_rate: float = field(
        default=0.001, metadata={"help": "By how much the old policy's decay rises with each rollout after that."}
    )
    old_decay_max: float = field(default=0.5, metadata={"help": "Highest decay of the old policy, below 1."})
    old_kl_coef: float = field(
        default=1.0, metadata={"help": "awm: weight of the divergence from the old policy; nft is held to it anyway."}
    )

    # the leash
    kl_coef: float = field(
        default=1e-4, metadata={"help": "Weight of the mean squared difference from the reference's predictions."}
    )
    kl_budget: float | None = field(
        default=None, metadata={"help": "Stop when that difference passes this; not limited if unset."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_updates", "num_train_timesteps_per_sample", "noise_group_size", "adv_clip_max", "beta"):
            check_positive(self, name)
        if self.kl_budget is not None:
            check_positive(self, "kl_budget")
        check_choice(self, "objective", ("nft", "awm"))
        check_choice(self, "weighting", ("uniform", "noise", "noise_squared", "huber"))
        for name in ("kl_coef", "old_kl_coef", "old_decay_start", "old_decay_rate"):
            check_not_negative(self, name)
        for name in ("min_signal", "old_decay_max"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        if not 0 < self.huber_power <= 1:
            raise InputError(f"huber_power must lie in (0, 1], got {self.huber_power}.")
        if self.objective == "awm" and self.num_updates > 1:
            raise InputError(
                f"awm learns from samples of the policy it updates: num_updates must be 1, got {self.num_updates}; "
                "use smaller rollouts, or nft."
            )
        if self.num_train_timesteps_per_sample > self.num_inference_steps:
            raise InputError(
                f"num_train_timesteps_per_sample={self.num_train_timesteps_per_sample} is more than the sampler has "
                f"steps; lower it, or raise num_inference_steps={self.num_inference_steps}."
            )
        self.check_divisible(self.num_updates)

    @property
    def keeps_old(self) -> bool:
        """Whether there is an old policy beside the trained one."""
        return self.objective == "nft" or self.old_kl_coef > 0
