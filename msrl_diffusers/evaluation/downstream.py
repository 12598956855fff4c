"""Metrics of a downstream classifier, and how sure they are: several seeds per arm, few test subjects.

Two things are random, which subjects are tested and the seed of the training; intervals resample both. They do not
know of other training subjects, nor of other synthetic volumes of the same generator, and few seeds tell little of
seeds: among three, resampling finds two thirds of their variance. Arms are compared as pairs: one draw takes the same
test volumes and the same seeds of every arm.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_auroc, multiclass_f1_score

from ..errors import InputError


METRICS = ("accuracy", "f1", "auc")


def classification_metrics(probabilities: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Metrics in [0, 1] by torchmetrics, from probabilities `[N, K]` and true classes `labels [N]`.

    `accuracy` is the share of volumes whose likeliest class is right, `f1` the mean of the classes' F1, `auc`
    the mean over classes of the area under the ROC curve of one against the rest (for two classes: the usual one).

    Raises:
        InputError: a class without volumes, for which the last two are not defined.
    """
    K = probabilities.shape[1]
    missing = sorted(set(range(K)) - set(labels.tolist()))
    if missing:
        raise InputError(f"Class {missing[0]} has no volume; F1 and AUC need some of every class.")
    return {
        "accuracy": multiclass_accuracy(probabilities, labels, K, average="micro").item(),
        "f1": multiclass_f1_score(probabilities, labels, K, average="macro").item(),
        "auc": multiclass_auroc(probabilities, labels, K, average="macro").item(),
    }


def bootstrap_rows(labels: torch.Tensor, subject_ids: Sequence[str], generator: torch.Generator) -> torch.Tensor:
    """Rows of one bootstrap draw: as many subjects as there are, with replacement, each with all its volumes.

    Subjects are drawn within their class (within the same set of classes, where a subject has volumes of several), so
    that every draw holds every class: the counts of a test set are a design, not an outcome.
    """
    rows, classes = defaultdict(list), defaultdict(set)
    for row, (subject, label) in enumerate(zip(subject_ids, labels.tolist(), strict=True)):
        rows[subject].append(row)
        classes[subject].add(label)
    strata = defaultdict(list)
    for subject in rows:
        strata[tuple(sorted(classes[subject]))].append(subject)
    drawn = []
    for _, subjects in sorted(strata.items()):
        for position in torch.randint(len(subjects), (len(subjects),), generator=generator).tolist():
            drawn += rows[subjects[position]]
    return torch.tensor(drawn)


def bootstrap_metrics(
    probabilities: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    subject_ids: Sequence[str],
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, torch.Tensor]]:
    """Bootstrap replicates `[draws]` of every arm's metrics, means over seeds, by arm and metric.

    Args:
        probabilities: by arm, `[R, N, K]` of R seeds, the same ones in the same order in every arm.
        labels: true classes `[N]`.
        subject_ids: N names; volumes of one subject are drawn together.
        draws: number of replicates. Each draws subjects and seeds, independently of each other (the pigeonhole
            bootstrap of arXiv 0712.1111), the same for all arms.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    (R,) = {len(values) for values in probabilities.values()}
    replicates = {arm: {metric: [] for metric in METRICS} for arm in probabilities}
    for _ in range(draws):
        rows = bootstrap_rows(labels, subject_ids, generator)
        runs = torch.randint(R, (R,), generator=generator).tolist()
        for arm, values in probabilities.items():
            by_run = {run: classification_metrics(values[run][rows], labels[rows]) for run in set(runs)}
            for metric in METRICS:
                replicates[arm][metric].append(sum(by_run[run][metric] for run in runs) / R)
    return {
        arm: {metric: torch.tensor(values, dtype=torch.float64) for metric, values in by_metric.items()}
        for arm, by_metric in replicates.items()
    }


def compare_arms(
    probabilities: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    subject_ids: Sequence[str],
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, dict]:
    """Metrics of every arm, and paired differences of every arm to each before it.

    Arguments are those of `bootstrap_metrics`; `level` is that of the intervals.

    Returns:
        `{"arms": {arm: {metric: {"mean", "std", "interval", "by_seed"}}},
        "differences": {arm: {earlier arm: {metric: {"mean", "interval", "by_seed"}}}}}`: `std` over the R seeds (with
        R - 1; None for one), `interval` `[low, high]` the percentiles of the replicates.
    """
    replicates = bootstrap_metrics(probabilities, labels, subject_ids, draws, seed)
    by_seed = {}
    for arm, values in probabilities.items():
        runs = [classification_metrics(run, labels) for run in values]
        by_seed[arm] = {metric: [figures[metric] for figures in runs] for metric in METRICS}
    arms, differences, names = {}, {}, list(probabilities)
    for number, arm in enumerate(names):
        arms[arm] = {}
        for metric in METRICS:
            figures = _summary(by_seed[arm][metric], replicates[arm][metric], level)
            over_seeds = torch.tensor(by_seed[arm][metric], dtype=torch.float64)
            figures["std"] = over_seeds.std().item() if len(over_seeds) > 1 else None
            arms[arm][metric] = figures
        for other in names[:number]:
            pairs = {
                metric: [a - b for a, b in zip(by_seed[arm][metric], by_seed[other][metric], strict=True)]
                for metric in METRICS
            }
            differences.setdefault(arm, {})[other] = {
                metric: _summary(pairs[metric], replicates[arm][metric] - replicates[other][metric], level)
                for metric in METRICS
            }
    return {"arms": arms, "differences": differences}


def _summary(by_seed: list[float], replicates: torch.Tensor, level: float) -> dict:
    tail = (1 - level) / 2
    interval = torch.quantile(replicates, torch.tensor([tail, 1 - tail], dtype=replicates.dtype)).tolist()
    return {"mean": sum(by_seed) / len(by_seed), "interval": interval, "by_seed": by_seed}
