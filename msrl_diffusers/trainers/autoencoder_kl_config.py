"""AutoencoderKLConfig: settings of the training of a small 2D autoencoder."""

from dataclasses import dataclass, field

from ..errors import InputError
from .base_config import TrainingConfig, check_not_negative


@dataclass
class AutoencoderKLConfig(TrainingConfig):
    """Settings of `AutoencoderKLTrainer`. The loss is a sum of terms with these weights."""

    train_batch_size: int = field(default=16, metadata={"help": "Images per process in one forward pass."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    l1_weight: float = field(default=1.0, metadata={"help": "Weight of the L1 reconstruction loss."})
    l2_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the squared error, which minds rare large errors such as thin hairs."},
    )
    kl_weight: float = field(
        default=1e-4,
        metadata={"help": "Weight of the KL divergence to the standard normal, per element of the latents."},
    )
    flip_augmentation: bool = field(default=True, metadata={"help": "Flip left and right at random."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("l1_weight", "l2_weight", "kl_weight"):
            check_not_negative(self, name)
        if not self.l1_weight + self.l2_weight:
            raise InputError("l1_weight and l2_weight are both 0; one of them must ask for reconstructions.")
