"""ClassifierConfig: settings of the classifiers of the downstream study."""

from dataclasses import dataclass, field

from ..errors import InputError
from .base_config import TrainingConfig, check_batch_statistics, check_choice, check_positive


NETWORKS = ("resnet10", "resnet18", "resnet34", "resnet50")


@dataclass
class ClassifierConfig(TrainingConfig):
    """Settings of `ClassifierTrainer`, and of both its trainings in `run_downstream`: `pretrain_steps` on synthetic
    volumes, then `max_steps` on real ones. The number of steps is fixed; no validation figure picks anything."""

    network: str = field(default="resnet50", metadata={"help": "A 3D ResNet of MONAI: resnet10, 18, 34 or 50."})
    widen_factor: float = field(
        default=1.0, metadata={"help": "Channels relative to the published network; 0.25 suits a CPU."}
    )
    stem_stride: int = field(
        default=1,
        metadata={"help": "Stride of the first convolution; 2 saves memory from about 96 voxels an edge on."},
    )
    max_steps: int = field(default=1000, metadata={"help": "Steps on the real volumes, the same for every arm."})
    pretrain_steps: int | None = field(
        default=None, metadata={"help": "Steps on an arm's synthetic volumes before; by default as many as max_steps."}
    )
    train_batch_size: int = field(
        default=16, metadata={"help": "Volumes per process in one forward pass, as many of every class."}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate, of both trainings."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "A scheduler name of diffusers."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    mixed_precision: str = field(
        default="no", metadata={"help": "auto, no, bf16 or fp16, on an accelerator; on a CPU always no."}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Share of the target spread over all classes."})
    max_shift: int = field(
        default=4,
        metadata={
            "help": "Random crops: volumes are padded by so many voxels of background on each side, then cropped."
        },
    )
    flips: bool = field(
        default=True, metadata={"help": "Left-right flips; not for classes that differ between left and right."}
    )
    validation_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of every class' real training subjects kept out to watch; it picks nothing."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_batch_statistics(self)
        check_choice(self, "network", NETWORKS)
        check_positive(self, "stem_stride")
        if self.pretrain_steps is not None:
            check_positive(self, "pretrain_steps")
        if not 1 / 64 <= self.widen_factor < float("inf"):
            raise InputError(f"widen_factor must be 1/64 (one channel) or more, got {self.widen_factor}.")
        if self.max_shift < 0:
            raise InputError(f"max_shift must be 0 or more voxels, got {self.max_shift}.")
        for name in ("label_smoothing", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
