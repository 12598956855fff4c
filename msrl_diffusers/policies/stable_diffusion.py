"""StableDiffusionPolicy: prompts to 2D latents, by diffusers' own StableDiffusionPipeline as it comes."""

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from ..errors import InputError
from .base import Conditioning
from .unet import UNetPolicy


class StableDiffusionPolicy(UNetPolicy):
    """The policy of a `StableDiffusionPipeline`; conditions are prompts.

    Steps are those of DDIM over the pipeline's own noise schedule, whatever sampler it comes with (PNDM, usually): a
    multistep sampler has no transition of its own from one state to the next. The text encoder and the autoencoder are
    not trained.
    """

    def __init__(self, pipeline: StableDiffusionPipeline):
        super().__init__(pipeline)
        self.scheduler = self.sampler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        size = pipeline.unet.config.sample_size
        self.latent_shape = (pipeline.unet.config.in_channels, size, size)
        pipeline.vae.requires_grad_(False)
        pipeline.text_encoder.requires_grad_(False)

    @torch.no_grad()
    def encode(self, conditions: Sequence[str]) -> Conditioning:
        positive, negative = self.pipeline.encode_prompt(
            list(conditions), self.pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        return Conditioning({"encoder_hidden_states": positive}, {"encoder_hidden_states": negative})

    def check_guidance(self, guidance_scale: float) -> None:
        """Raise InputError for a scale at which the pipeline would sample without guidance, as if it were 1."""
        if guidance_scale < 1:
            raise InputError(
                f"A StableDiffusionPipeline is guided by scales above 1 only, and guidance_scale is {guidance_scale}; give 1 or more."
            )

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        latents = (latents / vae.config.scaling_factor).to(vae.dtype)
        return vae.decode(latents, return_dict=False)[0].float().clamp(-1, 1)
