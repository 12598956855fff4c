"""Frechet and kernel distances between sets of volumes, with bootstrap intervals.

Features are `[N, P, S, F]`: N volumes, P planes, S slices per plane, F features. Slices of a plane are pooled, planes
are averaged (as NVIDIA's 2.5D FID does); resampling is by volume, since the slices of one are no independent draws.
The distance of finite sets is biased upwards, so only sets of equal N may be compared.
"""

import warnings
from collections.abc import Mapping

import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance


class _Identity(torch.nn.Module):
    """Hands ready-made features to torchmetrics in place of a feature network."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """FID (arXiv 1706.08500, eq. 6) of features `[N, P, S, F]`, by torchmetrics, averaged over planes; of this
    process' features alone.

    Raises:
        ValueError: sets of different size.
    """
    if len(real) != len(fake):
        raise ValueError(f"A Frechet distance compares sets of equal size, got {len(real)} and {len(fake)} volumes.")
    network = _Identity(real.shape[-1])
    metric = FrechetInceptionDistance(feature=network, sync_on_compute=False).set_dtype(torch.float64)
    distances = []
    for plane in range(real.shape[1]):
        metric.reset()
        metric.update(real[:, plane].flatten(0, 1), real=True)
        metric.update(fake[:, plane].flatten(0, 1), real=False)
        distances.append(metric.compute().item())
    return sum(distances) / len(distances)


def kernel_distance(real: torch.Tensor, fake: torch.Tensor, seed: int = 0, subsets: int = 50) -> float:
    """KID (arXiv 1801.01401), by torchmetrics, of volumes' mean features; unbiased in N, but noisier than FID."""
    distances = []
    for plane in range(real.shape[1]):
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Metric `Kernel Inception Distance` will save all"
            )  # few, small features
            metric = KernelInceptionDistance(
                feature=_Identity(real.shape[-1]),
                subsets=subsets,
                subset_size=max(2, min(len(real), len(fake)) // 2),
                sync_on_compute=False,
            ).set_dtype(torch.float64)
        metric.update(real[:, plane].mean(dim=1), real=True)
        metric.update(fake[:, plane].mean(dim=1), real=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            distances.append(metric.compute()[0].item())
    return sum(distances) / len(distances)


def bootstrap_frechet(
    real: torch.Tensor, arms: Mapping[str, torch.Tensor], draws: int = 200, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Bootstrap replicates `[draws]` of the distance of every arm to `real`.

    Every draw takes the same volumes of `real`, and the same positions of every arm: arms made from the same noise are
    thus compared as pairs, and most of the sampling noise cancels in their difference.
    """
    generator = torch.Generator().manual_seed(seed)
    replicates = {name: [] for name in arms}
    for _ in range(draws):
        real_rows = torch.randint(len(real), (len(real),), generator=generator)
        rows = torch.randint(len(real), (len(real),), generator=generator)
        for name, fake in arms.items():
            replicates[name].append(frechet_distance(real[real_rows], fake[rows]))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in replicates.items()}


def centred_interval(value: float, replicates: torch.Tensor, level: float = 0.95) -> list[float]:
    """Interval `[low, high]` around `value` from the spread of its replicates.

    Replicates are shifted so that their mean is `value`: a resampled set holds doubles, which raises its distance.
    """
    tail = (1 - level) / 2
    low, high = torch.quantile(replicates - replicates.mean(), torch.tensor([tail, 1 - tail], dtype=replicates.dtype))
    return [value + low.item(), value + high.item()]
