"""UNetPolicy: what policies of diffusers pipelines with a `unet` have in common: guidance and the reference."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .base import Conditioning


class UNetPolicy:
    """The policy of a pipeline with a `unet`; a subclass adds `latent_shape`, `encode` and `decode`.

    With full fine-tuning the reference is a frozen copy of the denoiser, made here; with a LoRA adapter already injected it
    is the denoiser with its adapter switched off.
    """

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self.denoiser = pipeline.unet
        self.scheduler = self.sampler = pipeline.scheduler
        self._uses_adapter = bool(getattr(pipeline.unet, "peft_config", None))
        self._frozen = None if self._uses_adapter else copy.deepcopy(pipeline.unet).eval().requires_grad_(False)

    def predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> torch.Tensor:
        """The denoiser's output `[B, C, *S]` for `latents [B, C, *S]` at `timestep []` or `[B]`, with classifier-free guidance
        unless the scale is 1."""
        if guidance_scale == 1.0:
            return self.denoiser(latents, timestep, **conditioning.positive, return_dict=False)[0]
        self.check_guidance(guidance_scale)
        both = {  # one call, as the pipelines do it
            name: torch.cat([conditioning.negative[name], value]) for name, value in conditioning.positive.items()
        }
        timestep = torch.cat([timestep, timestep]) if timestep.ndim else timestep
        output = self.denoiser(torch.cat([latents, latents]), timestep, **both, return_dict=False)[0]
        unconditional, conditional = output.float().chunk(2)  # a denoiser within accelerate gives float32 by itself
        return unconditional + guidance_scale * (conditional - unconditional)

    def check_guidance(self, guidance_scale: float) -> None:
        """Raise InputError if the denoiser can't be guided so, as far as its pipeline knows."""

    def frozen_copy(self) -> torch.nn.Module:
        """A copy of the reference, in one piece."""
        return copy.deepcopy(self._frozen)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, `predict` is the pretrained model: adapter off, or the frozen copy."""
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
