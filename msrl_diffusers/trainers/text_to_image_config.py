"""TextToImageConfig: settings of the fine-tuning of a Stable Diffusion pipeline on images and prompts."""

from dataclasses import dataclass, field

from ..errors import InputError
from .base_config import TrainingConfig, check_positive


@dataclass
class TextToImageConfig(TrainingConfig):
    """Settings of `TextToImageTrainer`."""

    train_batch_size: int = field(default=16, metadata={"help": "Latents per process in one forward pass."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    ema_decay: float | None = field(
        default=0.999, metadata={"help": "Largest decay of the averaged weights that are kept; unset: no average."}
    )
    prompt_dropout: float = field(
        default=0.1, metadata={"help": "Share of samples whose prompt is replaced by the empty one, for guidance."}
    )
    snr_gamma: float | None = field(
        default=None, metadata={"help": "Gamma of min-SNR weighting (arXiv 2303.09556); unset: plain MSE."}
    )
    flip_augmentation: bool = field(
        default=True, metadata={"help": "Train on latents of left-right flipped images too."}
    )
    encode_batch_size: int = field(default=16, metadata={"help": "Images encoded at once when latents are cached."})
    train_text_encoder: bool = field(
        default=False, metadata={"help": "Train the text encoder with the UNet; else its embeddings are cached."}
    )
    use_lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter of the UNet, not all its weights."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the LoRA adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get an adapter; the projections of attention if unset."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, a third slower."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "encode_batch_size")
        check_positive(self, "lora_rank")
        if not 0 <= self.prompt_dropout < 1:
            raise InputError(f"prompt_dropout must lie in [0, 1), got {self.prompt_dropout}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay must lie between 0 and 1, got {self.ema_decay}.")
        if self.snr_gamma is not None:
            check_positive(self, "snr_gamma")
        if self.use_lora and self.train_text_encoder:
            raise InputError("use_lora adapts the UNet alone; unset use_lora or train_text_encoder.")
