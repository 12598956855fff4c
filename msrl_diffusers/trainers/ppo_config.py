"""DiffusionPPOConfig: settings of PPO with a KL leash."""

from dataclasses import dataclass, field

from ..errors import InputError
from .base_config import check_choice, check_not_negative, check_positive
from .online_config import OnlineConfig


@dataclass
class DiffusionPPOConfig(OnlineConfig):
    """Settings of `DiffusionPPOTrainer`. One step is one rollout; batch sizes are per process."""

    # rollouts
    eta: float = field(default=1.0, metadata={"help": "Noise of the DDIM steps; must be above 0."})
    min_std: float = field(
        default=0.01,
        metadata={"help": "Steps with a smaller standard deviation are taken as deterministic, not trained."},
    )
    sde_window: int | None = field(
        default=None,
        metadata={"help": "Noise in so many consecutive steps only, drawn anew for each rollout; the rest is an ODE."},
    )
    train_cfg: bool = field(
        default=True, metadata={"help": "Guidance in updates too; false trains the policy without guidance."}
    )
    antithetic: bool = field(
        default=False,
        metadata={"help": "Every second sample of a condition starts from the negated noise of the one before."},
    )

    # updates
    num_updates: int = field(
        default=1, metadata={"help": "Optimizer updates per rollout; more than 2 tends to collapse."}
    )
    timestep_fraction: float = field(
        default=1.0, metadata={"help": "Share of the stochastic steps trained per rollout, drawn anew for each."}
    )
    adv_clip_max: float = field(default=5.0, metadata={"help": "Advantages are clipped to this."})
    log_prob_reduction: str = field(
        default="mean",
        metadata={"help": "mean or sum over the elements of a latent, here and in the KL term of the loss."},
    )
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
    kl_gate_quantile: float | None = field(
        default=None,
        metadata={
            "help": "Hold only samples whose reward is more uncertain than this share of the rollout; all if unset."
        },
    )
    reference_update_steps: int | None = field(
        default=None,
        metadata={"help": "Hold to the weights of so many rollouts ago at most, not to the pretrained ones."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_updates", "eta", "adv_clip_max", "clip_shift", "kl_threshold", "kl_target"):
            check_positive(self, name)
        for name in ("min_std", "kl_coef", "kl_rate"):
            check_not_negative(self, name)
        for name in ("sde_window", "kl_budget", "reference_update_steps"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        check_choice(self, "log_prob_reduction", ("mean", "sum"))
        check_choice(self, "policy_loss", ("clip", "kl_mask"))
        check_choice(self, "kl_mode", ("fixed", "adaptive"))
        if self.kl_mode == "adaptive":
            check_positive(self, "kl_coef")  # which is multiplied
            if self.reference_update_steps is not None:
                raise InputError(
                    "kl_mode: adaptive follows the divergence from the pretrained policy, which a moving reference lets grow, so "
                    "kl_coef would grow with it: unset reference_update_steps, or set kl_mode: fixed."
                )
        if self.kl_gate_quantile is not None and not 0 < self.kl_gate_quantile < 1:
            raise InputError(f"kl_gate_quantile must lie between 0 and 1, got {self.kl_gate_quantile}.")
        if not 0 < self.timestep_fraction <= 1:
            raise InputError(f"timestep_fraction must lie in (0, 1], got {self.timestep_fraction}.")
        self.check_divisible(self.num_updates)

    @property
    def train_guidance_scale(self) -> float:
        """Guidance of the policy that is trained."""
        return self.guidance_scale if self.train_cfg else 1.0
