"""Augmentations of volume batches, drawn from a generator so that a resumed step draws the same."""

import torch


def augment_volumes(
    volumes: torch.Tensor, generator: torch.Generator, max_shift: int = 1, noise_level: float = 0.0
) -> torch.Tensor:
    """Left-right flips, shifts of whole voxels and noise, per volume; `[B, C, D, H, W]` in [-1, 1].

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
    return volumes
