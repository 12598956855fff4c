"""LatentDiffusionConfig: settings of the pretraining of the denoiser."""

from dataclasses import dataclass, field

from ..errors import InputError
from .base_config import TrainingConfig, check_positive


@dataclass
class LatentDiffusionConfig(TrainingConfig):
    """Settings of `LatentDiffusionTrainer`."""

    train_batch_size: int = field(default=32, metadata={"help": "Latents per process in one forward pass."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    ema_decay: float = field(default=0.999, metadata={"help": "Largest decay of the averaged weights that are saved."})
    class_dropout: float = field(default=0.1, metadata={"help": "Share of samples whose class is replaced by none."})
    snr_gamma: float | None = field(
        default=None, metadata={"help": "Gamma of min-SNR weighting (arXiv 2303.09556); unset: plain MSE."}
    )
    flip_augmentation: bool = field(
        default=True, metadata={"help": "Train on latents of left-right flipped volumes too."}
    )
    encode_batch_size: int = field(default=16, metadata={"help": "Volumes encoded at once when latents are cached."})

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "encode_batch_size")
        if not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay must lie between 0 and 1, got {self.ema_decay}.")
        if self.snr_gamma is not None:
            check_positive(self, "snr_gamma")
        if not 0 <= self.class_dropout < 1:
            raise InputError(f"class_dropout must lie in [0, 1), got {self.class_dropout}.")
