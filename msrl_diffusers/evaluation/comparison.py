"""A generated set against a real one: distances with intervals and their floor, diversity, plain statistics."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from ..errors import InputError
from ..seeding import generator_for
from .diversity import manifold_figures, ms_ssim_diversity, volume_features
from .features import source_features
from .fidelity import (
    bootstrap_frechet,
    bootstrap_kernel,
    centred_interval,
    frechet_distance,
    frechet_infinity,
    kernel_distance,
    smallest_subset,
)
from .sources import VolumeSource, check_comparable
from .statistics import compare_statistics, set_statistics


MIN_VOLUMES = 4  # two halves of two
MAX_COMPARED = 128  # volumes of each set in pairs of MS-SSIM, which must lie in memory


def compare_sets(
    real: VolumeSource,
    generated: VolumeSource,
    extractor: nn.Module,
    held_out: VolumeSource | None = None,
    infinity: bool = False,
    bootstrap_draws: int = 200,
    batch_size: int = 16,
    seed: int = 0,
) -> dict:
    """All figures of `generated` against `real`, in plain Python.

    Distances compare sets of equal size: of the larger one as many volumes are drawn as the smaller has. The floor is the distance between real volumes: to `held_out` where it is given, else
    between two random halves of `real`, of no more volumes than were generated; as that may be at a smaller size, whose bias
    is larger, `fid_at_floor_n` is the generated set's distance at the size of the floor.

    Args:
        real: the reference, such as the training volumes.
        generated: the set that is judged.
        extractor: of `extractors.load_extractor`.
        held_out: real volumes no training saw; then the distance to these stands beside that to `real`, which rewards copies.
        infinity: also extrapolate to infinitely many volumes.

    Raises:
        InputError: sets that can't be compared, or fewer than 4 volumes in one.
    """
    references = {"real": real} if held_out is None else {"real": real, "held_out": held_out}
    for reference in references.values():
        check_comparable(reference, generated)
    counts = {name: len(source) for name, source in (*references.items(), ("generated", generated))}
    smallest = min(counts, key=counts.get)
    if counts[smallest] < MIN_VOLUMES:
        raise InputError(
            f"The set {smallest} has {counts[smallest]} volumes; a distance needs {MIN_VOLUMES} or more, and means little "
            "under a hundred."
        )
    features = {
        name: source_features(extractor, source, batch_size) for name, source in (*references.items(), ("generated", generated))
    }  # fmt: skip
    if infinity:  # before all that is slower
        smallest_subset(min(len(features["real"]), len(features["generated"])), *features["real"].shape[2:])
    draw = {"draws": bootstrap_draws, "seed": seed}
    content = {"by_class": {}, **_distances(features["real"], features["generated"], infinity=infinity, **draw)}
    for name in sorted(set(real.class_names or ()) & set(generated.class_names or ())):
        rows = {side: _rows_of(source, name) for side, source in (("real", real), ("generated", generated))}
        if min(len(part) for part in rows.values()) >= MIN_VOLUMES:
            of_class = {side: features[side][part] for side, part in rows.items()}
            content["by_class"][name] = _distances(of_class["real"], of_class["generated"], **draw)
    if held_out is not None:
        content["held_out"] = _distances(features["held_out"], features["generated"], **draw)
    by_class = bool(real.class_names and generated.class_names)  # for both alike: volumes of one class are more alike
    return {
        **content,
        **_floor(features, **draw),
        "num_features": extractor.num_features,
        "manifold": manifold_figures(*(volume_features(features[name]) for name in ("real", "generated"))),
        "ms_ssim": {
            name: ms_ssim_of(source, seed, by_class) for name, source in (("real", real), ("generated", generated))
        },
        "statistics": _statistics(real, generated, batch_size),
    }  # fmt: skip


def _distances(real: torch.Tensor, generated: torch.Tensor, draws: int, seed: int, infinity: bool = False) -> dict:
    """`{"n", "fid", "kid"}`, and `fid_infinity` if asked for, at equal N."""
    real, generated = _equal(real, generated, seed)
    fid = frechet_distance(real, generated)
    kid = kernel_distance(real, generated, seed)
    found = {
        "n": len(real),
        "fid": _with_interval(fid, bootstrap_frechet(real, {"generated": generated}, draws, seed)["generated"]),
        "kid": _with_interval(kid, bootstrap_kernel(real, {"generated": generated}, draws, seed)["generated"]),
    }
    return {**found, "fid_infinity": frechet_infinity(real, generated, seed)} if infinity else found


def _floor(features: Mapping[str, torch.Tensor], draws: int, seed: int) -> dict:
    """The distance between real volumes, at the size it can be taken at, and that of the generated set at this size."""
    real, kind, most = features["real"], "held_out", len(features["generated"])
    other = features.get("held_out")
    if other is None:
        order, kind = torch.randperm(len(real), generator=generator_for(seed, "halves")), "halves"
        half = len(real) // 2
        real, other = real[order[:half]], real[order[half : 2 * half]]
    real, other = _equal(real, other, seed, most)
    value = frechet_distance(real, other)
    floor = _with_interval(value, bootstrap_frechet(real, {"real": other}, draws, seed)["real"])
    at_floor = frechet_distance(*_equal(features["real"], features["generated"], seed, len(real)))
    return {"fid_floor": {**floor, "n": len(real), "kind": kind}, "fid_at_floor_n": at_floor}


def _equal(
    one: torch.Tensor, other: torch.Tensor, seed: int, most: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As many rows of both, at most `most`, drawn at random: volumes may be sorted by class or scanner."""
    n = min(len(one), len(other), most or len(one))
    drawn = [
        torch.randperm(len(part), generator=generator_for(seed, "equal size"))[:n].sort().values
        for part in (one, other)
    ]
    return one[drawn[0]], other[drawn[1]]


def _with_interval(value: float, replicates: torch.Tensor) -> dict[str, float]:
    low, high = centred_interval(value, replicates)
    return {"value": value, "low": low, "high": high}


def _rows_of(source: VolumeSource, class_name: str) -> list[int]:
    return [row for row, name in enumerate(source.class_names) if name == class_name]


def ms_ssim_of(source: VolumeSource, seed: int, by_class: bool = True) -> dict | None:
    """`ms_ssim_diversity` of at most 128 volumes, of pairs within classes where there are some, unless not `by_class`;
    `within_classes` says which. None for volumes too small or too few."""
    rows = torch.randperm(len(source), generator=generator_for(seed, "ms-ssim"))[:MAX_COMPARED].sort().values
    chosen, labels = source.select(rows), None
    if by_class and chosen.class_names:
        counts = Counter(chosen.class_names)
        # the only volume of a class that was drawn has no pair
        chosen = chosen.select([row for row, name in enumerate(chosen.class_names) if counts[name] > 1])
        names = sorted(set(chosen.class_names))
        labels = [names.index(name) for name in chosen.class_names]
    volumes = chosen.take(range(len(chosen)))
    try:
        found = ms_ssim_diversity(volumes, seed=seed, labels=labels)
    except InputError:
        return None
    return {**found, "within_classes": labels is not None}


def _statistics(real: VolumeSource, generated: VolumeSource, batch_size: int) -> dict:
    sets = {
        name: set_statistics(source.batches(batch_size), source.spacing)
        for name, source in (("real", real), ("generated", generated))
    }
    return {**sets, "difference": compare_statistics(sets["real"], sets["generated"])}
