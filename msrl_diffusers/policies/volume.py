"""VolumePolicy: class labels to 3D latents, by a MedVolumePipeline."""

from collections.abc import Sequence

import torch

from ..errors import InputError
from ..pipelines.med_volume import MedVolumePipeline
from .base import Conditioning
from .unet import UNetPolicy


class VolumePolicy(UNetPolicy):
    """The policy of a `MedVolumePipeline`; conditions are class labels or their names.

    Raises:
        InputError: its scheduler clips what it predicts, as no step of a rollout does.
    """

    def __init__(self, pipeline: MedVolumePipeline):
        super().__init__(pipeline)
        clips = [name for name in ("clip_sample", "thresholding") if pipeline.scheduler.config.get(name)]
        if clips:
            raise InputError(
                f"The pipeline's scheduler has {clips[0]}, which clips latents that are not bounded: set pipe.scheduler = "
                f"{type(pipeline.scheduler).__name__}.from_config(pipe.scheduler.config, {clips[0]}=False)."
            )
        self.latent_shape = pipeline.latent_shape

    def encode(self, conditions: Sequence[int] | Sequence[str] | torch.Tensor) -> Conditioning:
        """`class_labels [B]` of labels or names, beside the null class.

        Raises:
            ValueError: a label or a name the model does not know.
        """
        labels = self.pipeline.prepare_class_labels(conditions)
        return Conditioning(
            {"class_labels": labels}, {"class_labels": torch.full_like(labels, self.pipeline.null_class)}
        )

    def check_guidance(self) -> None:
        """Raise InputError if the denoiser can't be guided."""
        self.pipeline.check_guidance()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Volumes `[B, C, D, H, W]` in [-1, 1] of latents `[B, c, d, h, w]`."""
        return self.pipeline.decode_latents(latents)
