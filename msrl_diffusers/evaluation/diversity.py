"""Diversity: how alike the volumes of a set are, and how much of the real volumes a generated set covers.

No figure here means much alone. Show real-real beside fake-fake, at the same N, preparation and number of pairs.
"""

import math
import random
from collections.abc import Sequence

import torch
from monai.metrics import compute_ms_ssim
from scipy.stats import t

from ..errors import InputError
from ..seeding import fold_seed


MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # finest scale first, of Wang et al. 2003
VOXELS_AT_ONCE = 1 << 22  # in one batch of pairs
ROWS_AT_ONCE = 1024  # of a matrix of distances


def ms_ssim_settings(image_size: int) -> dict:
    """`{"window", "sigma", "weights"}` of MS-SSIM for cubes with that edge; sizes in voxels.

    Wang et al. take five scales and a Gaussian window of 11 voxels, sigma 1.5. That needs 176 voxels, so that the window
    still fits into the coarsest scale. Smaller cubes get a window of 7, sigma 1, and as many scales as then fit: 5 from
    112 voxels on, 4 from 63, 3 from 28, 2 from 14, else 1. The weights of the scales left are renormalised to sum to 1.

    Raises:
        InputError: an edge under 7 voxels.
    """
    full = image_size >= 11 * 2 ** (len(MS_SSIM_WEIGHTS) - 1)
    window, sigma = (11, 1.5) if full else (7, 1.0)
    # the squares are what MONAI demands, a little more than fits need at 4 scales
    fitting = [
        scales
        for scales in range(1, len(MS_SSIM_WEIGHTS) + 1)
        if image_size >= window * max(2 ** (scales - 1), (scales - 1) ** 2)
    ]
    if not fitting:
        raise InputError(f"MS-SSIM needs volumes of at least 7 voxels along every edge, got {image_size}.")
    weights = MS_SSIM_WEIGHTS[: fitting[-1]]
    return {"window": window, "sigma": sigma, "weights": [weight / sum(weights) for weight in weights]}


def draw_pairs(
    num_volumes: int, num_pairs: int, seed: int = 0, labels: torch.Tensor | Sequence[int] | None = None
) -> torch.Tensor:
    """Rows `[M, 2]` of random pairs of different volumes, no pair twice; with `labels [N]` only within classes.

    Every class gives the same number of pairs, `num_pairs` over the classes or all that the smallest class has; so M may be
    under `num_pairs`.

    Raises:
        InputError: a class of one volume, or fewer pairs than classes.
    """
    labels = torch.zeros(num_volumes, dtype=torch.long) if labels is None else torch.as_tensor(labels).cpu()
    if len(labels) != num_volumes:
        raise InputError(f"{num_volumes} volumes and {len(labels)} labels: give one label per volume.")
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    smallest = min((len(rows) for rows in members), default=0)
    if smallest < 2:
        raise InputError(f"Pairs need at least 2 volumes in every class, the smallest has {smallest}; give more.")
    share = min(num_pairs // len(members), math.comb(smallest, 2))
    if share < 1:
        raise InputError(f"{num_pairs} pairs can't be shared by {len(members)} classes; ask for at least one each.")
    pairs = []
    for number, rows in enumerate(members):
        generator = random.Random(fold_seed(seed, "pairs", number))
        for rank in generator.sample(range(math.comb(len(rows), 2)), share):
            # pairs (j, i), j < i, counted by i: those before i are the i (i - 1) / 2 of a triangle
            i = (1 + math.isqrt(1 + 8 * rank)) // 2
            pairs.append(rows[[rank - i * (i - 1) // 2, i]])
    return torch.stack(pairs)


@torch.no_grad()
def ms_ssim(volumes: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """MS-SSIM `[M]`, float64 in [0, 1] on the CPU, of the `pairs [M, 2]` of `volumes [N, C, D, H, W]` in [-1, 1].

    Wang, Simoncelli, Bovik 2003, eq. 7, in 3D, by MONAI, on intensities moved to [0, 1], with `ms_ssim_settings` of the
    shortest edge; the mean over channels. Background that both share counts as equal, so values depend on how much of it
    there is.
    """
    values = [
        ms_ssim_of_two(*(volumes[rows] for rows in batch.to(volumes.device).T))
        for batch in pairs.split(max(1, VOXELS_AT_ONCE // volumes[0].numel()))
    ]
    return torch.cat(values).double().cpu()


def ms_ssim_of_two(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """MS-SSIM `[M]` of `one` and `other`, `[M, C, *S]` in [-1, 1], with `ms_ssim_settings` of their shortest edge."""
    settings = ms_ssim_settings(min(one.shape[2:]))
    one, other = (((samples.float() + 1) / 2).clamp(0, 1) for samples in (one, other))
    return compute_ms_ssim(
        one,
        other,
        spatial_dims=one.ndim - 2,
        data_range=1.0,
        kernel_size=settings["window"],
        kernel_sigma=settings["sigma"],
        weights=settings["weights"],
    )[:, 0]


def ms_ssim_diversity(
    volumes: torch.Tensor,
    num_pairs: int = 200,
    seed: int = 0,
    labels: torch.Tensor | Sequence[int] | None = None,
    level: float = 0.95,
) -> dict:
    """`{"value", "interval", "pairs", "window", "sigma", "weights"}`: mean MS-SSIM of random pairs, its interval by
    `pair_interval` (None where it has none), how many pairs there were, and the settings."""
    pairs = draw_pairs(len(volumes), num_pairs, seed, labels)
    values = ms_ssim(volumes, pairs)
    classes = None if labels is None else torch.as_tensor(labels).cpu()[pairs[:, 0]]
    return {
        "value": values.mean().item(),
        "interval": pair_interval(values, pairs, classes, level),
        "pairs": len(pairs),
        **ms_ssim_settings(min(volumes.shape[2:])),
    }


def pair_interval(
    values: torch.Tensor, pairs: torch.Tensor, classes: torch.Tensor | None = None, level: float = 0.95
) -> list[float] | None:
    """Interval `[low, high]` for the mean of `values [M]` of `pairs [M, 2]`, whose classes are `classes [M]`; None where a class
    has one pair, which says nothing of its spread.

    From the dyadic-robust variance of Aronow, Samii and Assenova (arXiv 1312.3398), within classes, and Student's t over the
    volumes: pairs that share a volume are not independent. A bootstrap over pairs takes them so: of its 95 % intervals for
    200 pairs of 40 volumes, about one half misses the mean.
    """
    values = values.double()
    classes = torch.zeros(len(values), dtype=torch.long) if classes is None else classes
    if classes.unique(return_counts=True)[1].min() < 2:
        return None
    residuals = values.clone()
    for label in classes.unique():
        residuals[classes == label] -= values[classes == label].mean()
    by_volume = torch.zeros(int(pairs.max()) + 1, dtype=torch.float64)
    by_volume.index_add_(0, pairs.flatten(), residuals.repeat_interleave(2))
    independent = residuals.square().sum()
    # a pair meets itself at both of its volumes; the sum can turn negative by chance
    variance = torch.maximum(by_volume.square().sum() - independent, independent) / len(values) ** 2
    freedom = max(1, len(pairs.unique()) - len(classes.unique()))
    half = float(t.ppf((1 + level) / 2, freedom)) * variance.sqrt().item()
    return [values.mean().item() - half, values.mean().item() + half]


def volume_features(features: torch.Tensor) -> torch.Tensor:
    """One vector per volume, `[N, P * F]` float64: `features [N, P, S, F]` averaged over slices, planes side by side."""
    return features.double().mean(dim=2).flatten(1)


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 5) -> dict[str, float]:
    """`{"precision", "recall"}` in [0, 1] of features `[N, F]` and `[M, F]` (Kynkaanniemi et al., arXiv 1904.06991, eq. 2).

    Precision is the share of generated volumes within the real manifold, recall the share of real ones within the
    generated manifold; a manifold is the union of balls around its volumes that reach to the k-th neighbour. One outlier
    makes a large ball: read `density_coverage` beside it.

    Raises:
        InputError: features of unequal length, or not more than `k` volumes in a set.
    """
    real, fake = _checked(real, fake, k)
    return {
        "precision": (_balls_around(fake, real, k) > 0).double().mean().item(),
        "recall": (_balls_around(real, fake, k) > 0).double().mean().item(),
    }


def density_coverage(real: torch.Tensor, fake: torch.Tensor, k: int = 5) -> dict[str, float]:
    """`{"density", "coverage"}` of features `[N, F]` and `[M, F]` (Naeem et al., arXiv 2002.09797).

    Density, in [0, N / k], counts the real balls around a generated volume; 1 is expected where both sets come from one
    distribution. Coverage is the share of real balls that hold a generated volume; see `expected_coverage`.

    Raises:
        InputError: features of unequal length, or not more than `k` volumes in a set.
    """
    real, fake = _checked(real, fake, k)
    nearest = torch.cat([_distances(rows, fake).amin(dim=1) for rows in real.split(ROWS_AT_ONCE)])
    return {
        "density": _balls_around(fake, real, k).double().mean().item() / k,
        "coverage": (nearest <= _radii(real, k)).double().mean().item(),
    }


def manifold_figures(real: torch.Tensor, fake: torch.Tensor, k: int = 5) -> dict[str, float] | None:
    """`k`, `precision_recall`, `density_coverage` and `expected_coverage` of features `[N, F]` and `[M, F]`; None for sets of not
    more than `k` volumes."""
    if min(len(real), len(fake)) <= k:
        return None
    return {
        "k": k,
        **precision_recall(real, fake, k),
        **density_coverage(real, fake, k),
        "expected_coverage": expected_coverage(len(real), len(fake), k),
    }


def expected_coverage(num_real: int, num_fake: int, k: int = 5) -> float:
    """The coverage that a perfect generator has on average (Naeem et al., arXiv 2002.09797).

    A real ball stays empty if the `k` nearest of all other volumes are real ones.
    """
    return 1 - math.comb(num_real - 1, k) / math.comb(num_real - 1 + num_fake, k)


def _checked(real: torch.Tensor, fake: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise InputError(
            f"Features of shape {list(real.shape)} and {list(fake.shape)}: give [N, F] and [M, F] of one extractor."
        )
    if min(len(real), len(fake)) <= k:
        raise InputError(f"{k} neighbours need more than {k} volumes in each set, got {len(real)} and {len(fake)}.")
    return real.double(), fake.double()


def _distances(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    # through a matrix product equal vectors would be some 1e-8 apart, and outside of a ball without extent
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """Distance `[N]` to the k-th nearest of the others."""
    return torch.cat([
        _distances(rows, features).kthvalue(k + 1, dim=1).values for rows in features.split(ROWS_AT_ONCE)
    ])  # fmt: skip


def _balls_around(points: torch.Tensor, centres: torch.Tensor, k: int) -> torch.Tensor:
    """Of how many of the centres' balls `[len(points)]` a point is in."""
    radii = _radii(centres, k)
    return torch.cat([(_distances(rows, centres) <= radii).sum(dim=1) for rows in points.split(ROWS_AT_ONCE)])
