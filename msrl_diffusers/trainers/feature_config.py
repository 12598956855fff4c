"""FeatureConfig: settings of the training of a feature extractor."""

from dataclasses import dataclass, field

from ..errors import InputError
from .base_config import TrainingConfig, check_batch_statistics, check_not_negative


@dataclass
class FeatureConfig(TrainingConfig):
    """Settings of `FeatureTrainer`."""

    train_batch_size: int = field(default=32, metadata={"help": "Volumes per process in one forward pass."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    max_shift: int = field(default=1, metadata={"help": "Largest random shift along each axis, in voxels."})
    noise_level: float = field(default=0.02, metadata={"help": "Standard deviation of added noise."})
    degraded_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the volumes that are degraded, and the network learns to tell how. It then sees blur above all."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_batch_statistics(self)
        check_not_negative(self, "max_shift")
        if not 0 <= self.degraded_share <= 1:
            raise InputError(f"degraded_share must lie in [0, 1], got {self.degraded_share}.")
