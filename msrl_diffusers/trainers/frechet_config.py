"""FrechetConfig: settings of fine-tuning by the Frechet distance itself."""

from dataclasses import dataclass, field

from ..errors import InputError
from .base_config import check_choice, check_not_negative, check_positive
from .online_config import OnlineConfig


@dataclass
class FrechetConfig(OnlineConfig):
    """Settings of `FrechetTrainer`. One step is one rollout and one update; batch sizes are per process."""

    max_steps: int = field(
        default=60, metadata={"help": "Number of updates; this loss helps soon and harms later, so few."}
    )
    learning_rate: float = field(
        default=1e-5, metadata={"help": "Peak learning rate of AdamW; 1e-4 diverges where all weights are trained."}
    )
    ema_decay: float | None = field(
        default=0.97, metadata={"help": "Exponential average of the weights, which is judged and kept; 0.95 to 0.99."}
    )
    num_rollout_batches: int = field(default=1, metadata={"help": "Batches of samples in one rollout."})

    # the loss
    class_wise: bool = field(
        default=True,
        metadata={
            "help": "A distance per class, averaged; false pools classes, whose shares must then be the real ones."
        },
    )
    extractor_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per extractor; equal and summing to 1 if unset."}
    )
    queue_batches: int = field(
        default=12,
        metadata={"help": "Earlier rollouts whose features join the statistics, so that slices outnumber features."},
    )
    gradient_steps: int = field(default=1, metadata={"help": "Last denoising steps that gradients pass through."})
    samplers: list[float] = field(
        default_factory=lambda: [1.0, 0.0],
        metadata={"help": "Values of eta that steps take in turn; each has its queue, and all are judged."},
    )
    decoder_checkpointing: bool = field(
        default=False,
        metadata={"help": "Decode one sample at a time and recompute it in the backward pass: the memory of one."},
    )

    # near the pretrained model
    prior_weight: float = field(default=0.0, metadata={"help": "Weight of the denoising term that keeps the prior."})
    prior: str = field(
        default="reference",
        metadata={
            "help": "That term: reference (predictions as the pretrained ones) or data (real latents denoised)."
        },
    )
    kl_budget: float | None = field(
        default=None, metadata={"help": "Stop when frechet/kl, per step and element, passes this."}
    )

    # when to stop
    eval_steps: int = field(
        default=10,
        metadata={"help": "Steps between judgements of fresh samples, which pick the weights; 0 judges none."},
    )
    eval_batches: int = field(default=4, metadata={"help": "Rollouts in one judgement, per sampler."})
    patience: int | None = field(
        default=20,
        metadata={
            "help": "Stop when the selection figure (eval_steps, or select_by of the trainer; without both there is none) has not "
            "improved for so many steps."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("queue_batches", "gradient_steps", "eval_batches"):
            check_positive(self, name)
        if self.kl_budget is not None:
            check_positive(self, "kl_budget")
        for name in ("prior_weight", "eval_steps"):
            check_not_negative(self, name)
        check_choice(self, "prior", ("reference", "data"))
        if self.gradient_steps > self.num_inference_steps:
            raise InputError(
                f"FrechetConfig: gradient_steps={self.gradient_steps} exceeds num_inference_steps="
                f"{self.num_inference_steps}; a rollout has no more steps."
            )
        if self.eta != 1.0:
            raise InputError(f"FrechetConfig: samplers says it here; set samplers: [{self.eta}] and leave eta at 1.")
        if not self.samplers or not all(0 <= eta <= 1 for eta in self.samplers):
            raise InputError(f"FrechetConfig: samplers must hold values of eta from 0 to 1, got {self.samplers}.")
        if self.extractor_weights is not None and not (
            all(0 <= weight < float("inf") for weight in self.extractor_weights) and sum(self.extractor_weights) > 0
        ):
            raise InputError(
                f"FrechetConfig: extractor_weights must be 0 or more, not all 0, got {self.extractor_weights}."
            )
        self.refuse_rewards()
        self.check_divisible(1)

    @property
    def etas(self) -> list[float]:
        """The values of `samplers`, each once."""
        return list(dict.fromkeys(self.samplers))
