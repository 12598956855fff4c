"""Tiling: a convolutional network over a volume too large for it, in overlapping cubes that are blended."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .layers import GroupNorm


Network = Callable[[torch.Tensor], torch.Tensor]


class Span(NamedTuple):
    """A tile along one axis, `start` to `stop`, and its core, `low` to `high`: the cores of an axis are disjoint and fill it."""

    start: int
    stop: int
    low: float
    high: float


Tile = tuple[Span, Span, Span]


def run_tiled(
    network: Network, module: nn.Module, sample: torch.Tensor, tile_size: int, step: int, scale: float
) -> torch.Tensor:
    """`network(sample)`, computed on cubes.

    From one cube to the next it goes over linearly, in the middle half of what they share. The outer quarters, where
    convolutions lack neighbours, are not used; at the edges of the volume everything is, unlike in MONAI's sliding window,
    which gives every cube the same weights. GroupNorm layers normalize by the statistics of the whole volume, as they do
    without tiles: these are gathered first, which takes two to three times as long as the rest, and are constants for
    gradients. Attention sees one cube.

    Args:
        network: maps `[1, C, D, H, W]` to `[1, C', D * scale, H * scale, W * scale]`.
        module: holds the `layers.GroupNorm` of `network`.
        sample: `[1, C, D, H, W]`. Axes of at most `tile_size` are not cut; if none is, the result is `network(sample)`.
        tile_size: edge of a cube.
        step: from the start of a cube to that of the next, 1 .. `tile_size`. With a `scale` below 1, `1 / scale` divides
            `step`, `tile_size` and every axis of `sample`.
        scale: edges of the output over those of the input.
    """
    edges = sample.shape[2:]
    tiles = list(product(*(spans(edge, min(tile_size, edge), step) for edge in edges)))
    if len(tiles) == 1:
        return network(sample)
    width = max((tile_size - step) / 2, 1e-6)
    result = 0
    with _whole_volume_norm(network, module, sample, tiles):
        for tile in tiles:
            output = network(_cut(sample, tile)).float()
            for axis, (span, edge) in enumerate(zip(tile, edges, strict=True), start=2):
                weights = _weights(span, edge, output.shape[axis], width).to(output)
                output = output * weights.view(-1, *[1] * (4 - axis))
            if not torch.is_tensor(result):
                result = output.new_zeros(*output.shape[:2], *(round(edge * scale) for edge in edges))
            result[(..., *(slice(round(span.start * scale), round(span.stop * scale)) for span in tile))] += output
    return result.to(sample.dtype)


def spans(edge: int, size: int, step: int) -> list[Span]:
    """Tiles of `size` over an axis of `edge`, the last one moved back to end with it; cores meet in the middle of what two
    tiles share."""
    starts = [*range(0, edge - size, step), edge - size]
    cuts = [(start + after + size) / 2 for start, after in pairwise(starts)]
    return [Span(start, start + size, *core) for start, core in zip(starts, pairwise([0, *cuts, edge]), strict=True)]


def _cut(sample: torch.Tensor, tile: Tile) -> torch.Tensor:
    return sample[(..., *(slice(span.start, span.stop) for span in tile))]


def _weights(span: Span, edge: int, count: int, width: float) -> torch.Tensor:
    """Of the `count` voxels of a tile's output along one axis: 1 in the core, down to 0 over `width` around its ends. Those
    of all tiles of an axis add up to 1, since each is the difference of the same ramp at the two ends of its core."""
    positions = span.start + (torch.arange(count) + 0.5) * (span.stop - span.start) / count

    def passed(cut: float) -> torch.Tensor:
        return ((positions - cut) / width + 0.5).clamp(0, 1)

    begun = passed(span.low) if span.low > 0 else torch.ones(count)
    return begun - passed(span.high) if span.high < edge else begun


class _StatisticsFound(Exception):
    """A tile has come to the layer whose statistics are gathered; what follows in the network is not needed."""


@contextmanager
def _whole_volume_norm(network: Network, module: nn.Module, sample: torch.Tensor, tiles: list[Tile]) -> Iterator[None]:
    """Within it, GroupNorm layers normalize a tile by the mean and variance of the whole volume.

    What a layer sees depends only on the layers before it. So all tiles run up to the first layer, whose sums are then
    complete; with these, up to the second; and so on.
    """
    statistics, sums, current = {}, {}, {}

    def normalize(norm: GroupNorm, hidden: torch.Tensor) -> torch.Tensor:
        if norm not in statistics:
            sums[norm] = sums.get(norm, 0) + _moments(hidden, current["tile"], norm.num_groups)
            raise _StatisticsFound
        # GroupNorm with given statistics is BatchNorm in evaluation mode.
        parameters = [None if value is None else value.float() for value in (norm.weight, norm.bias)]
        return F.batch_norm(hidden.float(), *statistics[norm], *parameters, eps=norm.eps).to(hidden.dtype)

    norms = [layer for layer in module.modules() if isinstance(layer, GroupNorm)]
    for norm in norms:
        norm.normalize = partial(normalize, norm)
    try:
        for _ in norms:
            for tile in tiles:
                current["tile"] = tile
                with suppress(_StatisticsFound), torch.no_grad():
                    network(_cut(sample, tile))
            for norm in sums.keys() - statistics.keys():
                count, total, squares = sums[norm]
                mean = total / count
                variance = (squares / count - mean.square()).clamp(min=0)
                repeats = norm.num_channels // norm.num_groups
                statistics[norm] = [value.float().repeat_interleave(repeats) for value in (mean, variance)]
        yield
    finally:
        for norm in norms:
            norm.normalize = None


def _moments(hidden: torch.Tensor, tile: Tile, num_groups: int) -> torch.Tensor:
    """Number, sum and sum of squares `[3, num_groups]` of the core of a tile, `hidden [1, C, d, h, w]` at any resolution."""
    core = []
    for span, count in zip(tile, hidden.shape[2:], strict=True):
        low, high = (math.floor((end - span.start) * count / (span.stop - span.start)) for end in span[2:])
        core.append(slice(low, high))
    groups = hidden[(..., *core)].float().reshape(num_groups, -1)
    total, squares = (value.sum(dim=1, dtype=torch.float64) for value in (groups, groups.square()))
    return torch.stack([torch.full_like(total, groups.shape[1]), total, squares])
