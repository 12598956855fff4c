"""VolumePolicy: class labels to 3D latents, by a MedVolumePipeline."""

from collections.abc import Sequence

import torch
from diffusers import DDIMParallelScheduler, DDIMScheduler

from ..pipelines.med_volume import MedVolumePipeline
from ..pipelines.schedulers import CLIPPING, check_unclipped
from .base import Conditioning
from .unet import UNetPolicy


class VolumePolicy(UNetPolicy):
    """The policy of a `MedVolumePipeline`; conditions are class labels or their names.

    Steps are those of DDIM over the pipeline's own noise schedule, whatever sampler it comes with; finished samples
    (`sampler`) are by that one.

    Raises:
        InputError: its scheduler clips what it predicts, as no step of a rollout does.
    """

    def __init__(self, pipeline: MedVolumePipeline):
        super().__init__(pipeline)
        check_unclipped(pipeline.scheduler)
        has_steps = isinstance(self.sampler, DDIMScheduler | DDIMParallelScheduler)
        # one for other noise than DDPM's has no such table; it stays, and is refused where it is used
        if not has_steps and hasattr(self.sampler, "alphas_cumprod"):
            self.scheduler = DDIMScheduler.from_config(self.sampler.config, **dict.fromkeys(CLIPPING, False))
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

    def check_guidance(self, guidance_scale: float) -> None:
        """Raise InputError if the denoiser can't be guided."""
        self.pipeline.check_guidance()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Volumes `[B, C, D, H, W]` in [-1, 1] of latents `[B, c, d, h, w]`."""
        return self.pipeline.decode_latents(latents)
