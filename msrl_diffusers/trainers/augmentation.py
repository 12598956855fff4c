"""Augmentations of volume batches, drawn from a generator so that a resumed step draws the same."""

import torch

from ..data.degradations import DEGRADATIONS, degrade
from ..models.reward_models import non_empty_slices


def augment_volumes(
    volumes: torch.Tensor,
    generator: torch.Generator,
    max_shift: int = 1,
    noise_level: float = 0.0,
    max_gain: float = 0.0,
) -> torch.Tensor:
    """Left-right flips, shifts of whole voxels, noise and a factor of the brightness, per volume; `[B, C, D, H, W]` in [-1, 1],
    of which -1 is black and stays so.

    Sharpness and contrast stay as they are: they are what fidelity is about.
    """
    B = len(volumes)
    flips = (torch.rand(B, generator=generator) < 0.5).to(volumes.device)
    volumes = torch.where(flips[:, None, None, None, None], volumes.flip(-1), volumes)
    if max_shift:
        shifts = torch.randint(-max_shift, max_shift + 1, (B, 3), generator=generator).tolist()
        volumes = torch.stack(
            [volume.roll(shift, dims=(1, 2, 3)) for volume, shift in zip(volumes, shifts, strict=True)]
        )
    if noise_level:
        volumes = volumes + noise_level * torch.randn(volumes.shape, generator=generator).to(volumes.device)
    if max_gain:
        gains = 1 + max_gain * (2 * torch.rand(B, 1, 1, 1, 1, generator=generator) - 1)
        volumes = (volumes + 1) * gains.to(volumes.device) - 1
    return volumes


def draw_slices(
    volumes: torch.Tensor, number: int, empty_threshold: float, generator: torch.Generator
) -> torch.Tensor:
    """`number` axial slices of each of `volumes [B, C, D, H, W]`, `[B, C, number, H, W]`, in the order in which they were drawn;
    empty ones (`models.reward_models.non_empty_slices`) only where there are no others left. All where there are no more.

    Slices of one volume resemble each other: a few of many volumes teach more than all of few.
    """
    B, C, D, H, W = volumes.shape
    ranks = torch.rand(B, D, generator=generator).to(volumes.device)
    ranks = ranks + (~non_empty_slices(volumes, empty_threshold)).float()
    chosen = ranks.argsort(dim=1)[:, :number]
    return volumes.gather(2, chosen[:, None, :, None, None].expand(B, C, chosen.shape[1], H, W))


def degrade_some(volumes: torch.Tensor, share: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Each of `volumes [B, C, D, H, W]` degraded with probability `share`, in a way and by a strength that are drawn; and the
    ways `[B]`: 0 is none, k is `DEGRADATIONS[k - 1]`."""
    B = len(volumes)
    ways = torch.randint(1, len(DEGRADATIONS) + 1, (B,), generator=generator)
    ways = torch.where(torch.rand(B, generator=generator) < share, ways, 0)
    strengths = torch.rand(B, generator=generator).tolist()
    return torch.cat(
        [
            degrade(volume[None], DEGRADATIONS[way - 1], strength, generator) if way else volume[None]
            for volume, way, strength in zip(volumes, ways.tolist(), strengths, strict=True)
        ]
    ), ways
