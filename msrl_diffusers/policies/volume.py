"""VolumePolicy: class labels to 3D latents, by a MedVolumePipeline."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..pipelines.med_volume import MedVolumePipeline
from .base import Conditioning


class VolumePolicy:
    """The policy of a `MedVolumePipeline`. With full fine-tuning the reference is a frozen copy of the denoiser, made
    here; with a LoRA adapter already injected it is the denoiser with its adapter switched off."""

    def __init__(self, pipeline: MedVolumePipeline):
        self.pipeline = pipeline
        self.denoiser = pipeline.unet
        self.scheduler = pipeline.scheduler
        self.latent_shape = pipeline.latent_shape
        self._uses_adapter = bool(getattr(pipeline.unet, "peft_config", None))
        self._frozen = None if self._uses_adapter else copy.deepcopy(pipeline.unet).eval().requires_grad_(False)

    def encode(self, conditions: Sequence[int] | Sequence[str] | torch.Tensor) -> Conditioning:
        labels = self.pipeline.prepare_class_labels(conditions)
        return Conditioning(
            {"class_labels": labels}, {"class_labels": torch.full_like(labels, self.pipeline.null_class)}
        )

    def predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> torch.Tensor:
        (output,) = self.denoiser(latents, timestep, **conditioning.positive, return_dict=False)
        if guidance_scale == 1.0:
            return output
        (unconditional,) = self.denoiser(latents, timestep, **conditioning.negative, return_dict=False)
        return unconditional + guidance_scale * (output - unconditional)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pipeline.decode_latents(latents)

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self._uses_adapter:
            self.pipeline.unet.disable_adapters()
            try:
                yield
            finally:
                self.pipeline.unet.enable_adapters()
        else:
            current, self.denoiser = self.denoiser, self._frozen.to(self.pipeline.unet.device)
            try:
                yield
            finally:
                self.denoiser = current
