"""Nearest neighbours of volumes in a training set, of their images or their features, and how much nearer they are.

Distances are taken around the mean training volume: with `m` that mean and `c` the cosine of `g - m` and `t - m`, the
distance of `g` and `t` is `sqrt(1 - c)`, in [0, sqrt(2)].
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


LEAST_DEVIATION = 0.01  # of a feature, in the median of all that vary
QUERIES_AT_ONCE = 1024  # in a matrix of similarities


@dataclass(frozen=True)
class Neighbours:
    """The nearest training volumes of N volumes.

    Attributes:
        scores (`Tensor [N]`): distance to the nearest over distance to the k-th nearest, in [0, 1].
        distances (`Tensor [N]`): distance to the nearest, in [0, sqrt(2)].
        nearest (`Tensor [N]`): its position in the training set, int64.
        flipped (`Tensor [N]`): whether the mirror image (of the last axis) lies nearer than the volume itself, bool.
    """

    scores: torch.Tensor
    distances: torch.Tensor
    nearest: torch.Tensor
    flipped: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> "Neighbours":
        return Neighbours(self.scores[rows], self.distances[rows], self.nearest[rows], self.flipped[rows])


def shrink(volumes: torch.Tensor, longest: int) -> torch.Tensor:
    """Volumes `[N, C, *S]` averaged down to at most `longest` voxels along every axis; mirror images stay so."""
    shape = volumes.shape[2:]
    if max(shape) <= longest:
        return volumes
    return F.adaptive_avg_pool3d(volumes, [max(1, round(edge * longest / max(shape))) for edge in shape])


class VoxelSpace:
    """Search in a training set for the nearest images, over mirror images and small shifts.

    Args:
        volumes (`Tensor [N, C, *S]`): of the training set, float16 for memory's sake; kept as they are, on the device where
            the search is to run.
        neighbours (`int`): k of the scores, less than N.
        max_shift (`int`): in voxels along every axis; shifts wrap around.
    """

    def __init__(self, volumes: torch.Tensor, neighbours: int, max_shift: int):
        self.volumes, self.neighbours, self.max_shift = volumes, neighbours, max_shift
        sums = (_standardise(part.float()).sum(dim=0, keepdim=True) for part in volumes.split(256))
        self.mean = sum(sums) / len(volumes)
        coarse = torch.cat([_coarsen(part) for part in volumes.split(256)])
        self.coarse_mean = coarse.mean(dim=0, keepdim=True)
        self.coarse = coarse - self.coarse_mean

    def search(self, queries: torch.Tensor, own: torch.Tensor | None = None) -> Neighbours:
        """Neighbours of `queries [M, C, *S]`: all training volumes are ranked on a grid of half the size, the best
        `2 * neighbours` compared on their own grid. `own [M]`: for every query a position that doesn't count. All on the CPU."""
        scores, distances, nearest, flipped = [], [], [], []
        for row, query in enumerate(queries):
            query = query.to(self.volumes.device)
            both = torch.stack([query, query.flip(-1)])
            coarse_shift = (self.max_shift + 1) // 2
            ranking = _similarities(_coarsen(both), self.coarse, self.coarse_mean, coarse_shift).amax(dim=(0, 2))
            if own is not None:
                ranking[own[row]] = -torch.inf
            available = len(ranking) - (own is not None)
            candidates = ranking.topk(min(2 * self.neighbours, available)).indices
            references = _standardise(self.volumes[candidates].float()) - self.mean
            both = _standardise(both.float())
            similarity, mirrored = _best_similarities(both, references, self.mean, self.max_shift)
            ordered, order = _distance(similarity).sort(stable=True)
            scores.append(ordered[0] / ordered[self.neighbours - 1].clamp_min(1e-6))
            distances.append(ordered[0])
            nearest.append(candidates[order[0]])
            flipped.append(mirrored[order[0]])
        return Neighbours(*(torch.stack(values).cpu() for values in (scores, distances, nearest, flipped)))


class FeatureSpace:
    """Search in a training set for the nearest features, standardised by its own, over mirror images.

    Args:
        features (`Tensor [N, P, S, F]`): of the training volumes.
        neighbours (`int`): k of the scores, less than N.
    """

    def __init__(self, features: torch.Tensor, neighbours: int):
        features = features.flatten(1)
        self.neighbours, self.mean, deviation = neighbours, features.mean(dim=0), features.std(dim=0)
        # rectified features are often (nearly) constant: the least activity of one in another volume must not outweigh all others
        alive = deviation[deviation > 0]
        least = LEAST_DEVIATION * alive.median().item() if len(alive) else 1.0
        self.deviation = deviation.clamp_min(least)
        self.references = self._directions(features)

    def search(self, features: torch.Tensor, mirrored: torch.Tensor, own: torch.Tensor | None = None) -> Neighbours:
        """Neighbours of volumes with `features [M, P, S, F]` and, of their mirror images, `mirrored`. `own [M]`: for
        every volume a position that doesn't count."""
        found = []
        for start in range(0, len(features), QUERIES_AT_ONCE):
            rows = slice(start, start + QUERIES_AT_ONCE)
            plain, mirror = (
                self._directions(part[rows].flatten(1)) @ self.references.T for part in (features, mirrored)
            )
            similarities = torch.maximum(plain, mirror)
            if own is not None:
                similarities[torch.arange(len(similarities)), own[rows]] = -torch.inf
            ordered, order = _distance(similarities).topk(self.neighbours, dim=1, largest=False)
            scores = ordered[:, 0] / ordered[:, -1].clamp_min(1e-6)
            flipped = (mirror > plain).gather(1, order[:, :1])[:, 0]
            found.append((scores, ordered[:, 0], order[:, 0], flipped))
        return Neighbours(*(torch.cat(values) for values in zip(*found, strict=True)))

    def _directions(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize((features - self.mean) / self.deviation)


def _coarsen(volumes: torch.Tensor) -> torch.Tensor:
    """Standardised volumes of half as many voxels along every axis."""
    return _standardise(shrink(volumes.float(), math.ceil(max(volumes.shape[2:]) / 2)))


def _standardise(volumes: torch.Tensor) -> torch.Tensor:
    """Mean 0 and mean square 1 in every channel, so that brightness and contrast don't count."""
    centred = volumes - volumes.mean(dim=(2, 3, 4), keepdim=True)
    return centred / centred.square().mean(dim=(2, 3, 4), keepdim=True).sqrt().clamp_min(1e-6)


def _similarities(queries: torch.Tensor, references: torch.Tensor, mean: torch.Tensor, max_shift: int) -> torch.Tensor:
    """Cosines `[Q, K, shifts]` of `shift(queries [Q, C, *S]) - mean [1, C, *S]` with `references [K, C, *S]`, which
    have the mean subtracted. All shifts at once: the references are the kernels of a convolution. Right to 0.01."""
    products = F.conv3d(_padded(queries, max_shift), torch.cat([references, mean])).flatten(2)
    inner = products[:, :-1] - (references * mean).flatten(1).sum(dim=1)[:, None]
    squares = queries.flatten(1).square().sum(dim=1)[:, None, None] + mean.square().sum() - 2 * products[:, -1:]
    lengths = references.flatten(1).norm(dim=1)[:, None]
    return inner / (squares.clamp_min(0).sqrt().clamp_min(_least_length(mean)) * lengths.clamp_min(1e-6))


def _best_similarities(
    both: torch.Tensor, references: torch.Tensor, mean: torch.Tensor, max_shift: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest cosine `[K]`, right to 1e-6, of a volume or its mirror image (`both [2, C, *S]`) with each of
    `references [K, C, *S]`, and whether it is the mirror image's."""
    quick = _similarities(both, references, mean, max_shift)
    mirrored, shift = torch.unravel_index(quick.transpose(1, 2).flatten(0, 1).argmax(dim=0), (2, quick.shape[2]))
    windows = _padded(both, max_shift)
    for axis in (2, 3, 4):  # views [2, C, shifts z, shifts y, shifts x, *S]
        windows = windows.unfold(axis, both.shape[axis], 1)
    z, y, x = torch.unravel_index(shift, windows.shape[2:5])
    deviations = (windows[mirrored, :, z, y, x] - mean).flatten(1).double()
    references = references.flatten(1).double()
    lengths = deviations.norm(dim=1).clamp_min(_least_length(mean)) * references.norm(dim=1).clamp_min(1e-6)
    return ((deviations * references).sum(dim=1) / lengths).float(), mirrored.bool()


def _padded(volumes: torch.Tensor, max_shift: int) -> torch.Tensor:
    margins = [min(max_shift, edge // 2) for edge in reversed(volumes.shape[2:]) for _ in range(2)]
    return F.pad(volumes, margins, mode="circular")


def _least_length(mean: torch.Tensor) -> float:
    """A deviation shorter than 1 % of a volume has no direction: its volume is as far from every other."""
    return 0.01 * math.sqrt(mean.numel())


def _distance(similarity: torch.Tensor) -> torch.Tensor:
    return (1 - similarity).clamp_min(0).sqrt()
