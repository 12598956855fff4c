"""Diversity within a prompt: how alike two images of one prompt are, by MS-SSIM."""

import torch

from ..data.image_folder import ImageDataset, to_samples
from ..evaluation.diversity import draw_pairs, ms_ssim_of_two, ms_ssim_settings, pair_interval


PIXELS_AT_ONCE = 1 << 22  # in one batch of pairs


def prompt_diversity(images: ImageDataset, pairs_per_prompt: int = 8, seed: int = 0) -> dict | None:
    """Mean MS-SSIM of random pairs of images of the same prompt; the lower, the more diverse.

    Every prompt gives as many pairs, `pairs_per_prompt` or all that the smallest has; prompts of one image none. The
    scales and the window are those of `evaluation.diversity.ms_ssim_settings`, in 2D and over RGB. Only sets of the
    same prompts may be compared.

    Returns:
        `{"value", "interval", "pairs", "by_prompt", "window", "sigma", "weights"}`; None where no prompt has two
        images.
    """
    counts = {prompt: images.prompts.count(prompt) for prompt in sorted(set(images.prompts))}
    names = [prompt for prompt, count in counts.items() if count > 1]
    if not names:
        return None
    images = images.select([row for row, prompt in enumerate(images.prompts) if prompt in names])
    labels = torch.tensor([names.index(prompt) for prompt in images.prompts])
    pairs = draw_pairs(len(images), pairs_per_prompt * len(names), seed, labels)
    values, classes = ms_ssim_2d(images.pixel_values, pairs), labels[pairs[:, 0]]
    return {
        "value": values.mean().item(),
        "interval": pair_interval(values, pairs, classes),
        "pairs": len(pairs),
        "by_prompt": {name: values[classes == number].mean().item() for number, name in enumerate(names)},
        **ms_ssim_settings(images.image_size),
    }


@torch.no_grad()
def ms_ssim_2d(pixel_values: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """MS-SSIM `[M]` (Wang, Simoncelli, Bovik 2003, eq. 7), float64, of `pairs [M, 2]` of uint8 images
    `[N, 3, H, W]`.
    """
    values = [
        ms_ssim_of_two(*(to_samples(pixel_values[rows]) for rows in batch.T))
        for batch in pairs.split(max(1, PIXELS_AT_ONCE // pixel_values[0].numel()))
    ]
    return torch.cat(values).double()
