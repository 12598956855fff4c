"""Is a reward worth optimizing? How well it tells good sets from bad ones, ranks them and predicts their targets, on subjects
and policies it was not trained on; and floors below which no policy should be tuned by it.

A reward that fails here is gamed, not followed: its score rises and the distance to real volumes with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import linregress
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.regression import spearman_corrcoef

from ..data.volumes import VolumeDataset
from ..errors import InputError
from ..rewards.base import Reward, checked


VALIDITY_FLOORS = {"auc": 0.7, "spearman": 0.3}
CEILINGS = ("ece",)  # figures of which less is better; their "floor" is the most that is allowed


@dataclass(frozen=True)
class ScoredSet:
    """What a reward gave to the volumes of one set, `scores [N]`, and what they are worth by their FID, `targets [N]`."""

    scores: torch.Tensor
    targets: torch.Tensor

    def __post_init__(self):
        if self.scores.ndim != 1 or self.scores.shape != self.targets.shape or not len(self.scores):
            raise InputError(
                f"A scored set needs one score and one target per volume, got the shapes {list(self.scores.shape)} and "
                f"{list(self.targets.shape)}."
            )


@torch.no_grad()
def score_set_by(reward: Reward, volumes: VolumeDataset, targets: Mapping[str, float]) -> ScoredSet:
    """The set of `volumes`, scored by a reward; `targets` of the set by class name, as `trajectories.set_targets` has them.

    Raises:
        InputError: a class without a target.
        ValueError: a reward of the wrong shape or not finite.
    """
    missing = sorted({volumes.id2label[label] for label in volumes.class_labels.tolist()} - set(targets))
    if missing:
        raise InputError(f"The set has no target for class {missing[0]!r}; its targets are of {sorted(targets)}.")
    by_volume = torch.tensor([targets[volumes.id2label[label]] for label in volumes.class_labels.tolist()])
    return ScoredSet(checked(reward, volumes.pixel_values, volumes.class_labels).cpu(), by_volume)


def reward_validity(
    sets: Mapping[str, ScoredSet],
    best: str,
    synthetic: str,
    unseen: Mapping[str, ScoredSet] | None = None,
    num_bins: int = 10,
) -> dict:
    """Figures of one reward, fit for JSON.

    Args:
        sets: trajectory sets of subjects that no training of the reward saw, by name.
        best: the set nearest to real volumes: the reconstructions of the fewest noise steps, k = 1.
        synthetic: the set it must be told from: samples from noise.
        unseen: samples of policies the reward never saw (earlier checkpoints of a tuning, fewer steps, other seeds), by
            name, with targets on the same scale; kept apart from the sets above.
        num_bins: bins of the calibration error.

    Returns:
        A dictionary of

        - `auc`: probability that a volume of `best` scores higher than one of `synthetic`;
        - `spearman`: rank correlation of scores and targets over all volumes; None where all targets are equal;
        - `set_spearman`: the same over the sets, by their means; None for fewer than three sets or equal targets;
        - `ece`: expected calibration error, the mean over bins of equally many volumes, ordered by score, of the absolute
          difference between mean score and mean target (bins as in Nixon et al., arXiv 1904.01685);
        - `slope`: of targets regressed on scores: 1 if a score means what it says, below 1 if scores exaggerate, 0 if
          they say nothing; None where all scores are equal;
        - `mean_by_set`: mean score by set; `n`: volumes of `best`;
        - `unseen`, where such sets are given: all of the above on them alone, but for `auc`, which tells `best` from all
          of them, and `n`, which counts them.

    Raises:
        InputError: `best` or `synthetic` is not among the sets, or there are no bins.
    """
    for name in (best, synthetic):
        if name not in sets:
            raise InputError(f"The validity of a reward needs the set {name!r}; there are {sorted(sets)}.")
    if num_bins < 1:
        raise InputError(f"A calibration error needs one bin or more, got {num_bins}.")
    figures = {**_figures(sets, num_bins), "auc": _auc(sets[best], [sets[synthetic]]), "n": len(sets[best].scores)}
    if unseen:
        figures["unseen"] = {
            **_figures(unseen, num_bins),
            "auc": _auc(sets[best], list(unseen.values())),
            "n": sum(len(scored.scores) for scored in unseen.values()),
        }
    return figures


def check_validity(
    figures: Mapping[str, Mapping], floors: Mapping[str, float] = VALIDITY_FLOORS, remedy: str | None = None
) -> None:
    """Refuse rewards that are not valid enough to tune a policy by.

    Args:
        figures: results of `reward_validity` by the rewards' names.
        floors: least values by figure, those of unseen policies as `"unseen.spearman"`; for `ece` the largest one. Empty
            to check nothing.
        remedy: what the sentence tells the user to do, in place of the usual advice.

    Raises:
        InputError: a figure below its floor, or one that is not there; the sentence names rewards, figures and floors.
    """
    failures = broken_floors(figures, floors)
    if failures:
        remedy = remedy or (
            "train it on more or harder sets (more steps k, degraded volumes, samples of the policies it fails on) or for "
            "longer, or lower the floors to start all the same"
        )
        sentence = "; ".join(failures)
        raise InputError(f"{sentence[0].upper()}{sentence[1:]}; a policy would game it: {remedy}.")


def broken_floors(figures: Mapping[str, Mapping], floors: Mapping[str, float] = VALIDITY_FLOORS) -> list[str]:
    """What `check_validity` refuses, a clause for each reward: "reward 'volume' has auc 0.55 (at least 0.7)".

    Raises:
        InputError: a floor of a figure that is not there.
    """
    failures = []
    for reward, found in figures.items():
        broken = []
        for name, floor in floors.items():
            value = _look_up(found, name, reward)
            ceiling = name.rsplit(".", 1)[-1] in CEILINGS
            if value is None or not (value <= floor if ceiling else value >= floor):
                shown = "no value" if value is None else f"{value:.2f}"
                broken.append(f"{name} {shown} ({'at most' if ceiling else 'at least'} {floor:g})")
        if broken:
            failures.append(f"reward {reward!r} has {', '.join(broken)}")
    return failures


def _figures(sets: Mapping[str, ScoredSet], num_bins: int) -> dict:
    scores = torch.cat([scored.scores for scored in sets.values()])
    targets = torch.cat([scored.targets for scored in sets.values()])
    means, set_targets = (
        torch.stack([getattr(scored, name).mean() for scored in sets.values()]) for name in ("scores", "targets")
    )
    return {
        "spearman": _spearman(scores, targets),
        "set_spearman": _spearman(means, set_targets) if len(sets) > 2 else None,
        "ece": _calibration_error(scores, targets, num_bins),
        "slope": _slope(scores, targets),
        "mean_by_set": {name: scored.scores.mean().item() for name, scored in sets.items()},
    }


def _auc(good: ScoredSet, others: Sequence[ScoredSet]) -> float:
    bad = torch.cat([scored.scores for scored in others])
    is_good = torch.cat([torch.ones(len(good.scores)), torch.zeros(len(bad))]).long()
    _, ranks = torch.cat([good.scores, bad]).unique(return_inverse=True)
    # it wants probabilities; a sigmoid of large scores ties them all at 1
    return binary_auroc(ranks / len(ranks), is_good).item()


def _spearman(scores: torch.Tensor, targets: torch.Tensor) -> float | None:
    return None if (targets == targets[0]).all() else spearman_corrcoef(scores, targets).item()


def _slope(scores: torch.Tensor, targets: torch.Tensor) -> float | None:
    return None if (scores == scores[0]).all() else float(linregress(scores.double(), targets.double()).slope)


def _calibration_error(scores: torch.Tensor, targets: torch.Tensor, num_bins: int) -> float:
    order = scores.argsort(stable=True)
    gaps = (scores - targets)[order].double()
    return sum(abs(gap.sum().item()) for gap in gaps.tensor_split(num_bins)) / len(gaps)


def _look_up(figures: Mapping, path: str, reward: str) -> float | None:
    value = figures
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise InputError(
                f"Reward {reward!r} has no figure {path!r} to hold against a floor; it has {sorted(figures)}"
                f"{'' if 'unseen' in figures else ', and no sets of unseen policies were given'}."
            )
        value = value[part]
    if value is not None and not isinstance(value, (int, float)):
        raise InputError(f"Figure {path!r} of reward {reward!r} is no number; a floor needs one.")
    return value
