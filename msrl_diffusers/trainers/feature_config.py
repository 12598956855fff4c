"""FeatureConfig: settings of the training of a feature extractor."""

from dataclasses import dataclass, field

from .base_config import TrainingConfig


@dataclass
class FeatureConfig(TrainingConfig):
    """Settings of `FeatureTrainer`."""

    train_batch_size: int = field(default=32, metadata={"help": "Volumes per process in one forward pass."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    max_shift: int = field(default=1, metadata={"help": "Largest random shift along each axis, in voxels."})
    noise_level: float = field(default=0.02, metadata={"help": "Standard deviation of added noise."})
