"""Does a generator copy its training volumes? Nearest training neighbours of what it made, judged by real volumes.

Plain distances mislead, since a blurred, mean-like sample lies close to everything. Two things remove that:

- Distances are taken around the mean training volume: with `m` that mean and `c` the cosine of `g - m` and `t - m`,
  the distance of `g` and `t` is `sqrt(1 - c)`, in [0, sqrt(2)]. What a volume shares with all brains does not count.
- The score is the ratio of the nearest distance to the k-th nearest: near 0 for a copy, near 1 for a volume that lies
  equally far from several, as in the ratio test of Lowe (2004, IJCV 60, section 7.1) for features of images.

What score is too small, real volumes say that no training saw: the null. The threshold is a one-sided tolerance bound
of their scores (Hahn & Meeker, Statistical Intervals, 1991): with stated confidence at most a stated share of honest
volumes falls below it. That latent diffusion models do copy medical volumes: Dar et al. (arXiv 2402.01054).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from scipy import stats
from torch import nn
from tqdm import tqdm

from ..errors import InputError
from .features import extract_features, hash_tensors
from .neighbours import FeatureSpace, Neighbours, VoxelSpace, shrink
from .sources import VolumeSource, check_comparable


MIN_VOLUMES = 10  # of the training set and of the null: ratios need neighbours, thresholds need scores
WORKING_EDGE = 32  # voxels; a brain is recognised at 6 mm, and 10,000 of them take 0.7 GB
DUPLICATE = 0.05  # voxel distance under which a real volume is the same image as a training volume, but for rounding
QUANTILES = (0.0, 0.01, 0.025, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Threshold:
    """Scores below `value` are too small for an honest volume.

    Attributes:
        value (`float`): the threshold, in [0, 1].
        expected_rate (`float`): share of honest volumes expected below it, or its limit where the null is small.
        rule (`str`): how it was found, in words.
    """

    value: float
    expected_rate: float
    rule: str


@dataclass(frozen=True)
class SpaceAudit:
    """What one space (`voxel` or `feature`) says."""

    generated: Neighbours
    null: Neighbours
    threshold: Threshold


@dataclass(frozen=True)
class Pair:
    """A generated volume and its nearest training volume, in the space that finds them most alike.

    Attributes:
        index, nearest_index (`int`): positions in the generated and in the training set.
        generated, nearest (`str`): their names.
        score, threshold (`float`): the score, and that space's threshold.
        distance (`float`): the distance, in [0, sqrt(2)].
        space (`str`): `voxel` or `feature`.
        flipped (`bool`): whether the generated volume's mirror image is meant.
    """

    index: int
    nearest_index: int
    generated: str
    nearest: str
    score: float
    threshold: float
    distance: float
    space: str
    flipped: bool


@dataclass(frozen=True)
class AuditResult:
    """What the audit found.

    Attributes:
        spaces (`dict[str, SpaceAudit]`): `voxel`, and `feature` if there was an extractor.
        pairs (`list[Pair]`): one per generated volume, the most copy-like (score over threshold) first.
        neighbours (`int`): k of the ratio.
        n_train (`int`): volumes of the training set.
        null (`str`): `held_out`, or `leave_one_out` of the training set.
        duplicates (`list[tuple[str, str]]`): null volumes that are themselves a training volume, and which; left out.
        fingerprints (`dict[str, str]`): hashes of the working copies of `train`, `generated` and `null`.
    """

    spaces: dict[str, SpaceAudit]
    pairs: list[Pair]
    neighbours: int
    n_train: int
    null: str
    duplicates: list[tuple[str, str]]
    fingerprints: dict[str, str]

    @property
    def copies(self) -> list[Pair]:
        """The generated volumes flagged in any space."""
        return [pair for pair in self.pairs if pair.score < pair.threshold]

    @property
    def expected_rate(self) -> float:
        """The most that is expected of the share of honest volumes that are flagged in any space."""
        return min(1.0, sum(space.threshold.expected_rate for space in self.spaces.values()))

    def interval(self, level: float = 0.95) -> list[float]:
        """Clopper-Pearson interval `[low, high]` of the share of copies."""
        share = stats.binomtest(len(self.copies), len(self.pairs)).proportion_ci(level, method="exact")
        return [float(share.low), float(share.high)]

    def summary(self) -> dict:
        """The result in plain Python, for JSON. `threshold` is the voxel space's; each space states its own."""
        n_null = len(self.spaces["voxel"].null.scores)
        return {
            "n_generated": len(self.pairs),
            "n_train": self.n_train,
            "n_copies": len(self.copies),
            "n_train_copied": len({pair.nearest_index for pair in self.copies}),
            "share": len(self.copies) / len(self.pairs),
            "interval": self.interval(),
            "threshold": self.spaces["voxel"].threshold.value,
            "expected_false_positive_rate": self.expected_rate,
            "expected_false_positives": self.expected_rate * len(self.pairs),
            "neighbours": self.neighbours,
            "null": {
                "kind": self.null,
                "n": n_null,
                "duplicates": [{"volume": volume, "nearest": nearest} for volume, nearest in self.duplicates],
            },
            "spaces": {
                name: {
                    "threshold": space.threshold.value,
                    "expected_false_positive_rate": space.threshold.expected_rate,
                    "rule": space.threshold.rule,
                    "n_flagged": int((space.generated.scores < space.threshold.value).sum()),
                    "score_quantiles": {
                        "generated": _quantiles(space.generated.scores), "null": _quantiles(space.null.scores)
                    },
                    "distance_quantiles": {
                        "generated": _quantiles(space.generated.distances), "null": _quantiles(space.null.distances)
                    },
                }
                for name, space in self.spaces.items()
            },
            "copies": [asdict(pair) for pair in self.copies],
            "fingerprints": self.fingerprints,
        }  # fmt: skip


def audit(
    train: VolumeSource,
    generated: VolumeSource,
    held_out: VolumeSource | None = None,
    extractor: nn.Module | None = None,
    **settings,
) -> AuditResult:
    """Look for copies of `train` among `generated`: an `Auditor` for one set, with its `settings`.

    Raises:
        InputError: what `Auditor` and its `audit` refuse.
    """
    _check_generated(train, generated)  # before much is read
    return Auditor(train, held_out, extractor, **settings).audit(generated)


class Auditor:
    """Looks for copies of one training set in any number of generated ones; training set and null are read once.

    In voxel space a volume and its mirror image are compared with all training volumes on a coarse grid, then with the
    best `2 * neighbours` on the working grid (the volumes averaged down to at most 32 voxels along the longest axis),
    shifted by up to `max_shift` of its voxels along every axis. Shifts wrap around, which is nothing where the border
    is background. In feature space, features are standardised by the training set's; there is no search over shifts.
    Features and the search among voxels run on the extractor's device.

    Args:
        train, held_out: sources of volumes of one shape in [-1, 1]. Without `held_out` every training volume against the
            others is the null: it knows of no gap between training and new volumes, and several scans of one subject
            among the training volumes make it miss copies.
        extractor: a network from volumes `[B, C, D, H, W]` to features `[B, P, S, F]`; none: voxel space only.
        neighbours: k of the score (one less than the training volumes, where these are fewer than that).
        max_shift: in voxels of the working grid.
        level, confidence: with this confidence at most this share of honest volumes lies below a space's threshold.
        max_null: at most so many null volumes are taken, drawn by `seed`.
        batch_size: volumes read, and sent through the extractor, at once.

    Raises:
        InputError: unequal shapes, fewer than 10 training volumes, or fewer than 10 null volumes that are not duplicates
            of training volumes.
    """

    def __init__(
        self,
        train: VolumeSource,
        held_out: VolumeSource | None = None,
        extractor: nn.Module | None = None,
        *,
        neighbours: int = 10,
        max_shift: int = 2,
        level: float = 0.025,
        confidence: float = 0.95,
        max_null: int = 1000,
        batch_size: int = 16,
        seed: int = 0,
    ):
        check_references(train, held_out)
        if neighbours < 2 or max_shift < 0 or max_null < MIN_VOLUMES:
            raise InputError(
                f"neighbours={neighbours} must be at least 2, max_shift={max_shift} at least 0 and max_null={max_null} at "
                f"least {MIN_VOLUMES}."
            )
        self.train, self.extractor, self.batch_size = train, extractor, batch_size
        self.neighbours = min(neighbours, len(train) - 1)
        self.null_name = "leave_one_out" if held_out is None else "held_out"
        reals = train if held_out is None else held_out
        rows = torch.randperm(len(reals), generator=torch.Generator().manual_seed(seed))[:max_null].sort().values
        read = _read("training", train, extractor, batch_size)
        if held_out is None:
            null, own = read[rows], rows  # a training volume is no neighbour of itself
        else:
            null, own = _read("held out", held_out.select(rows), extractor, batch_size), None
        self.fingerprints = {"train": read.fingerprint, "null": null.fingerprint}
        device = "cpu" if extractor is None else next(extractor.parameters()).device
        self._spaces = {"voxel": VoxelSpace(read.volumes.to(device), self.neighbours, max_shift)}
        if extractor is not None:
            self._spaces["feature"] = FeatureSpace(read.features, self.neighbours)
        found = self._search(null, own)
        honest = found["voxel"].distances >= DUPLICATE
        self.duplicates = [
            (reals.names[rows[row]], train.names[found["voxel"].nearest[row]])
            for row in (~honest).nonzero()[:, 0].tolist()
        ]
        if honest.sum() < MIN_VOLUMES:
            raise InputError(
                f"Only {int(honest.sum())} of {len(honest)} volumes that should set the threshold are not themselves "
                f"training volumes, {MIN_VOLUMES} are needed; give held-out volumes that no training saw."
            )
        self._null = {name: neighbours_of[honest] for name, neighbours_of in found.items()}
        self._thresholds = {
            name: tolerance_threshold(null.scores, level, confidence) for name, null in self._null.items()
        }

    def audit(self, generated: VolumeSource) -> AuditResult:
        """The nearest training volumes of `generated`, and which of them it copies.

        Raises:
            InputError: no generated volume, or volumes of another shape.
        """
        _check_generated(self.train, generated)
        read = _read("generated", generated, self.extractor, self.batch_size)
        spaces = {
            name: SpaceAudit(found, self._null[name], self._thresholds[name])
            for name, found in self._search(read).items()
        }
        fingerprints = {
            "train": self.fingerprints["train"],
            "generated": read.fingerprint,
            "null": self.fingerprints["null"],
        }
        return AuditResult(
            spaces, _pairs(spaces, generated.names, self.train.names), self.neighbours, len(self.train),
            self.null_name, self.duplicates, fingerprints,
        )  # fmt: skip

    def _search(self, read: "_Volumes", own: torch.Tensor | None = None) -> dict[str, Neighbours]:
        found = {"voxel": self._spaces["voxel"].search(read.volumes, own)}
        if "feature" in self._spaces:
            found["feature"] = self._spaces["feature"].search(read.features, read.mirrored, own)
        return found


def tolerance_threshold(scores: torch.Tensor, level: float = 0.025, confidence: float = 0.95) -> Threshold:
    """The score that, with `confidence`, at most the share `level` of volumes like those of `scores [N]` falls below.

    With enough scores (119 for the defaults) it is an order statistic, whatever their distribution: the k-th smallest
    with the largest k such that P(Binomial(N, level) >= k) >= confidence. With fewer it is the lower tolerance bound
    of a normal distribution of their logits, at most the smallest score. Scores have a longer tail below than above,
    logits less so: on phantoms the share below is on average under `level`, though over it more often than stated.
    """
    ordered, n = scores.double().sort().values, len(scores)
    k = 0
    while stats.binom.sf(k, n, level) >= confidence:
        k += 1
    meaning = f"with {confidence:.0%} confidence at most {level:.1%} of honest volumes lie under it"
    if k:
        return Threshold(ordered[k - 1].item(), k / (n + 1), f"score {k} from below of the null's {n}: {meaning}")
    logits = ordered.logit(eps=1e-3)
    factor = stats.nct.ppf(confidence, n - 1, stats.norm.ppf(1 - level) * math.sqrt(n)) / math.sqrt(n)
    bound = torch.minimum(logits.mean() - factor * logits.std(), logits[0]).sigmoid().item()
    rule = (
        f"normal tolerance bound of the logits of the null's {n} scores, too few for an order statistic: if normal, "
    )
    expected = min(level, 1 / (n + 1))  # a further score is the smallest of all as often as any other is
    return Threshold(bound, expected, rule + meaning)


@dataclass(frozen=True)
class _Volumes:
    """What is kept of a source: working copies `[N, C, *S]`, float16, and, if there is an extractor, features
    `[N, P, S, F]` of the volumes and of their mirror images."""

    volumes: torch.Tensor
    features: torch.Tensor | None
    mirrored: torch.Tensor | None

    @property
    def fingerprint(self) -> str:
        return hash_tensors([("volumes", self.volumes)])

    def __getitem__(self, rows: torch.Tensor) -> "_Volumes":
        return _Volumes(
            *(None if part is None else part[rows] for part in (self.volumes, self.features, self.mirrored))
        )


def check_references(train: VolumeSource, held_out: VolumeSource | None) -> None:
    """Raise InputError for too few training or held-out volumes, or sets that differ in kind."""
    if len(train) < MIN_VOLUMES:
        raise InputError(
            f"{train.place} holds {len(train)} training volumes, but the audit compares nearest neighbours with "
            f"further ones and needs at least {MIN_VOLUMES}."
        )
    if held_out is not None:
        check_comparable(train, held_out)
        if len(held_out) < MIN_VOLUMES:
            raise InputError(
                f"{held_out.place} holds {len(held_out)} held-out volumes, too few for a threshold; give at least "
                f"{MIN_VOLUMES}, or none to compare the training volumes with one another instead."
            )


def _check_generated(train: VolumeSource, generated: VolumeSource) -> None:
    if not len(generated):
        raise InputError(f"{generated.place} holds no generated volumes.")
    check_comparable(train, generated)


def _read(name: str, source: VolumeSource, extractor: nn.Module | None, batch_size: int) -> _Volumes:
    """One pass over a source; its volumes are let go batch by batch."""
    volumes, features, mirrored = [], [], []
    steps = math.ceil(len(source) / batch_size)
    for batch in tqdm(source.batches(batch_size), desc=f"audit: {name}", total=steps, unit="batch"):
        volumes.append(shrink(batch, WORKING_EDGE).half())
        if extractor is not None:
            features.append(extract_features(extractor, batch, batch_size).float())
            mirrored.append(extract_features(extractor, batch.flip(-1), batch_size).float())
    return _Volumes(*(torch.cat(parts) if parts else None for parts in (volumes, features, mirrored)))


def _pairs(spaces: dict[str, SpaceAudit], generated: Sequence[str], train: Sequence[str]) -> list[Pair]:
    pairs = []
    for index, name in enumerate(generated):
        candidates = [
            Pair(
                index=index,
                nearest_index=int(space.generated.nearest[index]),
                generated=name,
                nearest=train[int(space.generated.nearest[index])],
                score=space.generated.scores[index].item(),
                threshold=space.threshold.value,
                distance=space.generated.distances[index].item(),
                space=space_name,
                flipped=bool(space.generated.flipped[index]),
            )
            for space_name, space in spaces.items()
        ]
        pairs.append(min(candidates, key=_relative_score))
    return sorted(pairs, key=_relative_score)


def _relative_score(pair: Pair) -> float:
    return pair.score / max(pair.threshold, 1e-6)


def _quantiles(values: torch.Tensor) -> dict[str, float]:
    found = torch.quantile(values.double(), torch.tensor(QUANTILES, dtype=torch.float64))
    return {f"{level:g}": value for level, value in zip(QUANTILES, found.tolist(), strict=True)}
