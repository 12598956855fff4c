"""Diversity within a prompt: how alike two images of one prompt are, by MS-SSIM."""

import math
from collections import Counter
from collections.abc import Mapping

import torch

from ..data.image_folder import ImageDataset, to_samples
from ..evaluation.diversity import draw_pairs, ms_ssim_of_two, ms_ssim_settings, pair_interval


PIXELS_AT_ONCE = 1 << 22  # in one batch of pairs


def diversity_of_sets(
    sets: Mapping[str, ImageDataset], pairs_per_prompt: int = 8, seed: int = 0
) -> dict[str, dict | None]:
    """`prompt_diversity` of every set over the same prompts, as images of some prompts are more alike than of others.

    Of the prompts that all sets have, those are taken that give the most pairs: every prompt gives as many, and a rare one of
    two images would leave all others one. A set without two images of any prompt has None, and the others do without it.
    """
    counts = [Counter(images.prompts) for images in sets.values()]
    counts = [count for count in counts if max(count.values(), default=0) > 1]
    fewest = {prompt: min(count[prompt] for count in counts) for prompt in set().union(*counts)}

    def pairs(least: int) -> int:
        return sum(count >= least for count in fewest.values()) * min(pairs_per_prompt, math.comb(least, 2))

    least = max(sorted({2, *fewest.values()}), key=pairs)
    return {
        name: prompt_diversity(
            images.select([row for row, prompt in enumerate(images.prompts) if fewest.get(prompt, 0) >= least]),
            pairs_per_prompt,
            seed,
        )
        for name, images in sets.items()
    }


def prompt_diversity(images: ImageDataset, pairs_per_prompt: int = 8, seed: int = 0) -> dict | None:
    """Mean MS-SSIM of random pairs of images of the same prompt; the lower, the more diverse.

    Every prompt gives as many pairs, `pairs_per_prompt` or all that the smallest has; prompts of one image none. The
    scales and the window are those of `evaluation.diversity.ms_ssim_settings`, in 2D and over RGB. Only sets of the
    same prompts may be compared: `diversity_of_sets` makes them so.

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
