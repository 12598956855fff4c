"""RewardConfig: settings of the regression of a reward model."""

from dataclasses import dataclass, field

from ..errors import InputError
from .base_config import TrainingConfig, check_batch_statistics, check_not_negative, check_positive


@dataclass
class RewardConfig(TrainingConfig):
    """Settings of `RewardTrainer`."""

    max_steps: int = field(default=2000, metadata={"help": "Number of steps; the published method takes 100 epochs."})
    train_batch_size: int = field(default=32, metadata={"help": "Volumes per process in one forward pass."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    validation_fraction: float = field(
        default=0.2, metadata={"help": "Share of source subjects kept from training, to watch over-fitting."}
    )
    max_shift: int = field(default=1, metadata={"help": "Largest random shift along each axis, in voxels."})
    noise_level: float = field(
        default=0.0, metadata={"help": "Standard deviation of added noise; noise hides texture."}
    )
    max_gain: float = field(
        default=0.0,
        metadata={
            "help": "Largest random change of the brightness, as a share. Intensities of MRI have no unit, and a policy that finds "
            "brightness rewarded goes on beyond the real one."
        },
    )
    slices_per_volume: int | None = field(
        default=None,
        metadata={
            "help": "Axial slices of a volume in one step of a slice reward, drawn anew every time; all if unset."
        },
    )
    bootstrap_heads: bool = field(
        default=True,
        metadata={"help": "Draw weights of the subjects for every head of an ensemble; a single head has none."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_batch_statistics(self)
        check_not_negative(self, "max_shift")
        if not 0 <= self.max_gain < 1:
            raise InputError(f"max_gain must lie in [0, 1), got {self.max_gain}.")
        if self.slices_per_volume is not None:
            check_positive(self, "slices_per_volume")
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"validation_fraction must lie in (0, 1), got {self.validation_fraction}.")
