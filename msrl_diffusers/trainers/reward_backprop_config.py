"""RewardBackpropConfig: settings of fine-tuning by the gradients of rewards."""

from dataclasses import dataclass, field

from ..errors import InputError
from .base_config import check_choice, check_not_negative, check_positive
from .online_config import OnlineConfig


@dataclass
class RewardBackpropConfig(OnlineConfig):
    """Settings of `RewardBackpropTrainer`. One step is one rollout and one update; batch sizes are per process."""

    learning_rate: float = field(
        default=1e-5, metadata={"help": "Peak learning rate of AdamW. LoRA takes ten times as much."}
    )
    num_rollout_batches: int = field(default=1, metadata={"help": "Batches of samples in one rollout."})
    min_std: float = field(
        default=0.01,
        metadata={"help": "Steps with a smaller deviation are taken without noise, and not compared as Gaussians."},
    )

    # which steps gradients pass through
    variant: str = field(
        default="draft",
        metadata={
            "help": "draft (the last gradient_steps), draft_lv (the last one, from several noise draws) or refl (a late one, "
            "whose predicted clean sample is scored)."
        },
    )
    gradient_steps: int = field(
        default=1, metadata={"help": "draft: last denoising steps that gradients pass through."}
    )
    num_noise_draws: int = field(
        default=2,
        metadata={"help": "draft_lv: how often a sample is noised to the last step again, beside its own one."},
    )
    late_fraction: float = field(
        default=0.25, metadata={"help": "refl: last share of the denoising steps, of which each rollout trains one."}
    )

    # the way from latents to rewards
    decode: str = field(
        default="straight_through",
        metadata={"help": "straight_through (the quantizer) or pre_quantization (decode without quantizing)."},
    )
    decoder_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute the decoder's layers in the backward pass: less memory."}
    )
    num_slices: int | None = field(
        default=None, metadata={"help": "A slice reward has gradients from so many random slices only; all if unset."}
    )
    reward_loss_coef: float = field(default=1.0, metadata={"help": "Weight of the standardized reward in the loss."})
    reward_grad_clip: float | None = field(
        default=None,
        metadata={
            "help": "Clip the norm of each sample's reward gradient, by its latents, to this; see its log line."
        },
    )

    # near the pretrained model
    kl_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the divergence from the pretrained model. Its gradient takes that model's steps as "
            "constants, an error that grows with gradient_steps."
        },
    )
    kl_budget: float | None = field(default=None, metadata={"help": "Stop when draft/kl passes this."})
    fuse_lora: bool = field(
        default=True,
        metadata={
            "help": "Put the adapter into the weights at the end; if not, it is saved apart and stays switchable."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("min_std", "gradient_steps", "num_noise_draws", "reward_loss_coef"):
            check_positive(self, name)
        for name in ("num_slices", "reward_grad_clip", "kl_budget"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        check_not_negative(self, "kl_coef")
        check_choice(self, "variant", ("draft", "draft_lv", "refl"))
        check_choice(self, "decode", ("straight_through", "pre_quantization"))
        if not 0 < self.late_fraction <= 1:
            raise InputError(f"RewardBackpropConfig: late_fraction must lie in (0, 1], got {self.late_fraction}.")
        if self.gradient_steps > self.num_inference_steps:
            raise InputError(
                f"RewardBackpropConfig: gradient_steps={self.gradient_steps} exceeds num_inference_steps="
                f"{self.num_inference_steps}; a rollout has no more steps."
            )
        if self.gradient_steps > 1 and self.variant != "draft":
            raise InputError(
                f"RewardBackpropConfig: {self.variant} trains one step; leave gradient_steps at 1, or take variant: draft."
            )
        if not self.fuse_lora and not self.use_lora:
            raise InputError("RewardBackpropConfig: fuse_lora: false keeps an adapter apart; set use_lora as well.")
        if not self.fuse_lora and self.push_to_hub:
            raise InputError(
                "RewardBackpropConfig: push_to_hub pushes a whole pipeline, for which the adapter must be fused: set "
                "fuse_lora, or push the adapter yourself."
            )
        self.check_divisible(1)
