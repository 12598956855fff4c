"""AttributeConfig: settings of the classifiers that read attributes off images."""

from dataclasses import dataclass, field

from ..errors import InputError
from .base_config import TrainingConfig, check_positive


@dataclass
class AttributeConfig(TrainingConfig):
    """Settings of `AttributeTrainer`. Batch, rate, decay and schedule are those of RL4Med-DDPO, which starts from pretrained
    weights; a small network that starts from random ones wants a rate of about 1e-3."""

    max_steps: int = field(default=1000, metadata={"help": "Training steps; no figure stops them early."})
    train_batch_size: int = field(default=32, metadata={"help": "Images per process in one forward pass."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "A scheduler name of diffusers."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    class_weights: bool = field(
        default=True,
        metadata={"help": "Weigh images with an attribute as much as those without it, whatever their numbers."},
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Targets are moved from 0 and 1 toward a half by this share."}
    )
    flips: bool = field(default=True, metadata={"help": "Flips left to right and upside down."})
    crop_share: float = field(
        default=0.05,
        metadata={"help": "Random crops: images are padded by this share of their edge, by reflection, then cropped."},
    )
    color_jitter: float = field(
        default=0.1, metadata={"help": "Brightness, contrast and saturation change by up to this share."}
    )
    eval_batch_size: int = field(default=64, metadata={"help": "Images in one forward pass of the evaluation."})
    threshold: float = field(
        default=0.5,
        metadata={
            "help": "An attribute is seen from this probability on, in logged figures alone (AttributeMatch has its own)."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "eval_batch_size")
        if not 0 < self.threshold < 1:
            raise InputError(f"threshold must lie between 0 and 1, got {self.threshold}.")
        for name, limit in (("label_smoothing", 1), ("crop_share", 0.5), ("color_jitter", 1)):
            if not 0 <= getattr(self, name) < limit:
                raise InputError(f"{name} must lie in [0, {limit}), got {getattr(self, name)}.")
