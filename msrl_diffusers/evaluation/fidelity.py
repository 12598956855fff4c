"""Frechet and kernel distances between sets of volumes, with bootstrap intervals.

Features are `[N, P, S, F]`: N volumes, P planes, S slices per plane, F features. Slices of a plane are pooled, planes
are averaged (as NVIDIA's 2.5D FID does); resampling is by volume, since the slices of one are no independent draws.
The distance of finite sets is biased upwards, so only sets of equal N may be compared.
"""

import warnings
from collections.abc import Collection, Mapping

import torch
from scipy.stats import linregress
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance, poly_kernel
from tqdm import tqdm

from ..errors import InputError


ROWS_AT_ONCE = 1024  # of a matrix of kernels
QUIET_SECONDS = 5  # of a bootstrap before it shows its progress


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


def frechet_infinity(
    real: torch.Tensor, fake: torch.Tensor, seed: int = 0, num_sizes: int = 10, draws: int = 3
) -> dict[str, float | list]:
    """The Frechet distance extrapolated to infinitely many volumes (Chong and Forsyth, arXiv 1911.07023).

    The bias of a finite set falls as 1 / N: a line is fitted to the distances of subsets against 1 / N, and its intercept is
    the distance without bias. Subsets are drawn without replacement, as many volumes from either side, `draws` of each
    of `num_sizes` sizes evenly spaced from a quarter of the set (or as many as give more slices than features: with fewer
    the covariance is singular, and the bias no line) to all of it.

    Args:
        real, fake: features `[N, P, S, F]`, of equal N.

    Returns:
        `value` (it may lie below 0, by its error); `standard_error`, of the intercept in this fit: subsets of one set
        overlap, so it holds how well the line is known, not how the set was drawn (that is `bootstrap_frechet`'s);
        `sizes` and `distances`, the mean distance of each size.

    Raises:
        ValueError: sets of different size.
        InputError: fewer than twice as many volumes as the smallest subset needs.
    """
    count = len(real)
    if len(fake) != count:
        raise ValueError(f"A Frechet distance compares sets of equal size, got {count} and {len(fake)} volumes.")
    smallest = smallest_subset(count, real.shape[2], real.shape[3])
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(smallest, count, num_sizes).round().long().unique().tolist()
    inverses, distances = [], []
    for size in sizes:
        for _ in range(draws):
            rows, other_rows = (torch.randperm(count, generator=generator)[:size] for _ in range(2))
            inverses.append(1 / size)
            distances.append(frechet_distance(real[rows], fake[other_rows]))
    fit = linregress(inverses, distances)
    return {
        "value": float(fit.intercept),
        "standard_error": float(fit.intercept_stderr),
        "sizes": sizes,
        "distances": torch.tensor(distances).view(len(sizes), draws).mean(dim=1).tolist(),
    }


def smallest_subset(count: int, slices: int, num_features: int) -> int:
    """The size of the smallest subset of `count` volumes that `frechet_infinity` takes the distance of.

    Raises:
        InputError: too few volumes for two such subsets.
    """
    smallest = max(2, -(-count // 4), num_features // slices + 1)
    if count < 2 * smallest:
        raise InputError(
            f"{count} volumes are too few to extrapolate the distance of {num_features} features, {slices} slices each; "
            f"give {2 * smallest} or more, or use KID."
        )
    return smallest


def bootstrap_frechet(
    real: torch.Tensor,
    arms: Mapping[str, torch.Tensor],
    draws: int = 200,
    seed: int = 0,
    labels: torch.Tensor | None = None,
    made_from_real: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """Bootstrap replicates `[draws]` of the distance of every arm to `real`.

    Every draw takes the same volumes of `real`, and the same positions of every arm: arms made from the same noise are
    thus compared as pairs, and most of the sampling noise cancels in their difference.

    Args:
        labels: class at every position `[N]`, the same for `real` and all arms. A draw has as many volumes of a class as
            the sets: how many there are is a design, no outcome.
        made_from_real: arms that hold at every position what was made from the volume of `real` there, such as
            reconstructions. They are drawn together with it.
    """
    labels = torch.zeros(len(real)) if labels is None else labels
    strata = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.cat([rows[torch.randint(len(rows), (len(rows),), generator=generator)] for rows in strata])

    few_rows = 1 < len(real) * real.shape[2] <= real.shape[3]  # so that the covariances are singular
    replicates = {name: [] for name in arms}
    for _ in tqdm(range(draws), desc="bootstrap", unit="draw", delay=QUIET_SECONDS, leave=False):
        real_rows, rows = draw(), draw()
        for name, fake in arms.items():
            its_rows = real_rows if name in made_from_real else rows
            if few_rows:
                distance = _frechet_of_few_rows(real, fake, real_rows, its_rows)
            else:
                distance = frechet_distance(real[real_rows], fake[its_rows])
            replicates[name].append(distance)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in replicates.items()}


def _frechet_of_few_rows(
    real: torch.Tensor, fake: torch.Tensor, real_drawn: torch.Tensor, fake_drawn: torch.Tensor
) -> float:
    """`frechet_distance` of the volumes drawn, at the cost of their rows: the eigenvalues for 2048 features take seconds.

    For the centred rows A and B `[R, F]` of a plane the covariances are A^T A / (R - 1) and B^T B / (R - 1). The root of their
    product has the trace |A B^T|_* / (R - 1), a sum of singular values.
    """
    distances = []
    for plane in range(real.shape[1]):
        (mean, rows), (other_mean, other_rows) = (
            _mean_and_rows(features[:, plane], drawn) for features, drawn in ((real, real_drawn), (fake, fake_drawn))
        )
        root = torch.linalg.svdvals(rows @ other_rows.T).sum()
        spread = rows.square().sum() + other_rows.square().sum() - 2 * root
        distance = (mean - other_mean).square().sum() + spread / (len(real_drawn) * real.shape[2] - 1)
        distances.append(distance.item())
    return sum(distances) / len(distances)


def _mean_and_rows(features: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `[F]` and centred rows `[R, F]` of the volumes drawn of `features [N, S, F]`. A row drawn k times stands once, sqrt(k)
    times as long: the covariance is the same, and a third of the rows less to multiply."""
    volumes, times = drawn.unique(return_counts=True)
    rows = features[volumes].flatten(0, 1).double()
    times = times.repeat_interleave(features.shape[1])[:, None].double()
    mean = (times * rows).sum(dim=0) / times.sum()
    return mean, times.sqrt() * (rows - mean)


def bootstrap_kernel(
    real: torch.Tensor, arms: Mapping[str, torch.Tensor], draws: int = 200, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Bootstrap replicates `[draws]` of every arm's KID to `real`, drawn in pairs as those of `bootstrap_frechet`; for
    `centred_interval` around a `kernel_distance`.

    A replicate is the unbiased estimate (arXiv 1801.01401) over all volumes that were drawn, where a volume drawn
    twice is never compared with itself.

    Raises:
        ValueError: sets of different size, or of fewer than two volumes.
    """
    if len(real) < 2:
        raise ValueError("A kernel distance needs two volumes or more.")
    for fake in arms.values():
        if len(fake) != len(real):
            raise ValueError(
                f"A bootstrap in pairs needs sets of equal size, got {len(real)} and {len(fake)} volumes."
            )
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        drawn = torch.randint(len(real), (len(real),), generator=generator).bincount(minlength=len(real))
        return drawn if drawn.max() < len(real) else draw()  # one volume alone makes no pair

    weights = torch.stack([draw() for _ in range(2 * draws)]).double()
    real_weights, arm_weights = weights[::2], weights[1::2]
    return {
        name: torch.stack([
            _weighted_kernel_distance(*(x[:, plane].double().mean(dim=1) for x in (real, fake)), real_weights, arm_weights)
            for plane in range(real.shape[1])
        ]).mean(dim=0)
        for name, fake in arms.items()
    }  # fmt: skip


def _weighted_kernel_distance(
    real: torch.Tensor, fake: torch.Tensor, real_weights: torch.Tensor, fake_weights: torch.Tensor
) -> torch.Tensor:
    """KID `[draws]` of features `[N, F]` of which each volume stands `weights [draws, N]` times."""

    def within(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        pairs = weights.sum(dim=1).square() - weights.square().sum(dim=1)
        return _kernel_sum(features, features, weights, weights) / pairs

    between = _kernel_sum(real, fake, real_weights, fake_weights)
    between = between / (real_weights.sum(dim=1) * fake_weights.sum(dim=1))
    return within(real, real_weights) + within(fake, fake_weights) - 2 * between


def _kernel_sum(
    one: torch.Tensor, other: torch.Tensor, weights: torch.Tensor, other_weights: torch.Tensor
) -> torch.Tensor:
    """Sum `[draws]` of the kernel over all pairs of `one [N, F]` and `other [M, F]`, each as often as the product of its weights
    says; a set with itself without the pairs of a volume and itself. Never the whole `[N, M]` at once."""
    sums = 0.0
    for start in range(0, len(one), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        kernel = poly_kernel(one[rows], other)
        if one is other:
            kernel[:, rows].fill_diagonal_(0)
        sums = sums + weights[:, rows] @ kernel
    return (sums * other_weights).sum(dim=1)


def centred_interval(value: float, replicates: torch.Tensor, level: float = 0.95) -> list[float]:
    """Interval `[low, high]` around `value` from the spread of its replicates.

    Replicates are shifted so that their mean is `value`: a resampled set holds doubles, which raises its distance.
    """
    tail = (1 - level) / 2
    low, high = torch.quantile(replicates - replicates.mean(), torch.tensor([tail, 1 - tail], dtype=replicates.dtype))
    return [value + low.item(), value + high.item()]
