"""A generated set against a real one: distances with intervals and their floor, diversity, plain statistics."""

from collections.abc import Collection, Mapping, Sequence

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
MIN_OF_CLASS = 10  # of these: classes give equally many pairs, and a rarer one would leave a handful


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

    Distances compare sets of equal size: of the larger one as many volumes are drawn as the smaller has. The floor is the distance
    between real volumes: to `held_out` where it is given, else between two random halves of `real` (all volumes of a name in one), of
    no more volumes than were generated; as that may be at a smaller size, whose bias is larger, `fid_at_floor_n` is the generated
    set's distance at the size of the floor.

    Args:
        real: the reference, such as the training volumes.
        generated: the set that is judged.
        extractor: of `extractors.load_extractor`.
        held_out: real volumes no training saw; then the distance to these stands beside that to `real`, which rewards copies.
        infinity: also extrapolate to infinitely many volumes.

    Raises:
        InputError: sets that can't be compared, fewer than 4 volumes in one, or nothing to take a floor of.
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
    for name in _shared_classes((real, generated)):
        rows = {side: _rows_of(source, name) for side, source in (("real", real), ("generated", generated))}
        if min(len(part) for part in rows.values()) >= MIN_VOLUMES:
            of_class = {side: features[side][part] for side, part in rows.items()}
            content["by_class"][name] = _distances(of_class["real"], of_class["generated"], **draw)
    if held_out is not None:
        content["held_out"] = _distances(features["held_out"], features["generated"], **draw)
    return {
        **content,
        **_floor(features, real.names, **draw),
        "num_features": extractor.num_features,
        "manifold": manifold_figures(*(volume_features(features[name]) for name in ("real", "generated"))),
        "ms_ssim": ms_ssim_of_sets({"real": real, "generated": generated}, seed),
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


def _floor(features: Mapping[str, torch.Tensor], names: Sequence[str], draws: int, seed: int) -> dict:
    """The distance between real volumes, at the size it can be taken at, and that of the generated set at this size."""
    real, kind, most = features["real"], "held_out", len(features["generated"])
    other = features.get("held_out")
    if other is None:
        one, two = _halves(names, seed)
        real, other, kind = real[one], real[two], "halves"
    real, other = _equal(real, other, seed, most)
    value = frechet_distance(real, other)
    floor = _with_interval(value, bootstrap_frechet(real, {"real": other}, draws, seed)["real"])
    at_floor = frechet_distance(*_equal(features["real"], features["generated"], seed, len(real)))
    return {"fid_floor": {**floor, "n": len(real), "kind": kind}, "fid_at_floor_n": at_floor}


def _halves(names: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Rows of two random halves, as nearly as may be: all volumes of a name, which several scans of a subject share, are in one.

    Raises:
        InputError: names so few that a half would have less than two volumes.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    groups, one, two = list(rows.values()), [], []
    for place in torch.randperm(len(groups), generator=generator_for(seed, "halves")).tolist():
        (one if len(one) + len(groups[place]) <= len(names) // 2 else two).extend(groups[place])
    if len(one) < 2:
        raise InputError(
            f"The set real has volumes of {len(groups)} names only, too few to compare one half with another; give held_out."
        )
    return one, two


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


def ms_ssim_of(source: VolumeSource, seed: int) -> dict | None:
    """`ms_ssim_of_sets` of one set."""
    return ms_ssim_of_sets({"": source}, seed)[""]


def ms_ssim_of_sets(sources: Mapping[str, VolumeSource], seed: int) -> dict[str, dict | None]:
    """`ms_ssim_diversity` of at most 128 volumes of every set, by its name; None for volumes too small or too few.

    Pairs lie within classes, the same in all sets, if all name classes and share some: volumes of one class are more alike, in
    some classes more than in others. Left out are classes with fewer than 10 volumes drawn from a set where others have as many
    in all, else those with one. If none is left, or named, pairs are of all volumes; `within_classes` says which.
    """
    classes = _shared_classes(sources.values())
    if classes:
        sources = {name: _of_classes(source, classes) for name, source in sources.items()}
    drawn = {name: _drawn(source, seed) for name, source in sources.items()}
    fewest = {name: min(source.class_names.count(name) for source in drawn.values()) for name in classes}
    for least in (MIN_OF_CLASS, 2):
        classes = [name for name in fewest if fewest[name] >= least]
        if classes:
            break
    return {name: _ms_ssim(source, classes, seed) for name, source in drawn.items()}


def _shared_classes(sources: Collection[VolumeSource]) -> list[str]:
    return sorted(set.intersection(*(set(source.class_names or ()) for source in sources)))


def _of_classes(source: VolumeSource, classes: Collection[str]) -> VolumeSource:
    return source.select([row for row, name in enumerate(source.class_names) if name in classes])


def _drawn(source: VolumeSource, seed: int) -> VolumeSource:
    rows = torch.randperm(len(source), generator=generator_for(seed, "ms-ssim"))[:MAX_COMPARED].sort().values
    return source.select(rows)


def _ms_ssim(source: VolumeSource, classes: Sequence[str], seed: int) -> dict | None:
    """Of pairs within these classes, of all volumes if there is none."""
    labels = None
    if classes:
        source = _of_classes(source, classes)
        labels = [classes.index(name) for name in source.class_names]
    volumes = source.take(range(len(source)))
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
