"""Images of prompts by a StableDiffusionPipeline: image i depends on the seed and i, not on the batch it is in."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from tqdm import tqdm

from ..data.image_folder import ImageDataset
from ..data.prompts import PromptBuilder
from ..pipelines.schedulers import check_number_of_steps
from ..precision import autocast
from ..seeding import sample_generators


@torch.no_grad()
def sample_images(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    sampler: dict,
    seed: int,
    builder: PromptBuilder,
    batch_size: int = 32,
    mixed_precision: str = "no",
    name: str = "sample",
) -> ImageDataset:
    """One image per prompt, with the attributes that its prompt states.

    Args:
        sampler: `num_inference_steps`, `eta` and `guidance_scale` of the pipeline's call.
        seed: pipelines sampled with the same seed and prompts start from the same noise, image by image.
        builder: of the prompts.
        name: of the images; they are their own subjects.

    Raises:
        InputError: a number of steps that the pipeline's scheduler can't take.
    """
    check_number_of_steps(pipeline.scheduler, sampler["num_inference_steps"])
    vae, images = pipeline.vae, []
    shown = tqdm(total=len(prompts), desc=name, unit="image", leave=False, disable=None)
    for start in range(0, len(prompts), batch_size):
        some = list(prompts[start : start + batch_size])
        with autocast(pipeline.device, mixed_precision):
            latents = pipeline(
                some,
                generator=sample_generators(seed, "text to image", range(start, start + len(some))),
                output_type="latent",
                **sampler,
            ).images
        # out of the autocast: eight bits of mantissa would show in an image of eight bits
        images.append(
            vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0].float().cpu()
        )
        shown.update(len(some))
    shown.close()
    return ImageDataset.from_samples(torch.cat(images), prompts, builder, name)


@torch.no_grad()
def reconstruct(
    vae: AutoencoderKL, images: ImageDataset, builder: PromptBuilder, batch_size: int = 32
) -> ImageDataset:
    """What the autoencoder makes of real images: no generator over its latents can do better."""
    parts = []
    for indices in torch.arange(len(images)).split(batch_size):
        pixels = images.batch(indices, vae.device)["pixel_values"].to(vae.dtype)
        parts.append(vae(pixels, sample_posterior=False, return_dict=False)[0].float().cpu())
    return ImageDataset.from_samples(torch.cat(parts), images.prompts, builder, "reconstruction")
