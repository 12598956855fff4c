"""Splits by subject: no volume of a held-out subject reaches any training stage."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import InputError
from .cases import Rejection
from .volumes import VolumeDataset


SIDES = ("train", "heldout")

# Subjects per class in training and in the hold-out: Table 1 of arXiv 2603.06173. It prints 208 training CN of OASIS-1,
# but its totals ask for 212; which of OASIS-1's subjects they are is left open there, here the seed draws them.
TABLE_1 = {
    "brats2019": {"HGG": (229, 30), "LGG": (46, 30)},
    "oasis1": {"CN": (212, 30), "AD": (28, 30)},
}


@dataclass(frozen=True)
class SplitPlan:
    """How volumes are divided: by lists of subjects, else by counts per class, else as the data set itself says, else (it says
    nothing, or nothing of a hold-out) by a fraction of every class' subjects.

    Attributes:
        holdout_fraction (`float`): share of every class' subjects held out.
        seed (`int`): draws the subjects.
        counts (`dict`, *optional*): subjects per class in training and in the hold-out, such as `TABLE_1["brats2019"]`.
        train_subjects, heldout_subjects (`tuple[str]`, *optional*): explicit lists; give both.
    """

    holdout_fraction: float = 0.3
    seed: int = 0
    counts: Mapping[str, tuple[int, int]] | None = None
    train_subjects: tuple[str, ...] | None = None
    heldout_subjects: tuple[str, ...] | None = None

    def rule(self, own: Sequence[str | None]) -> str:
        """What divides volumes of which the data set itself says `own`: `"lists"`, `"counts"`, `"own"` or `"fraction"`."""
        if self.train_subjects is not None:
            return "lists"
        if self.counts is not None:
            return "counts"
        return "own" if set(own) == set(SIDES) else "fraction"

    def sides(
        self,
        subjects: Sequence[str],
        labels: Sequence[str],
        own: Sequence[str | None],
        rejected: Sequence[Rejection] = (),
    ) -> list[str | None]:
        """`"train"`, `"heldout"` or None (in neither) for every volume.

        Args:
            subjects: whose each volume is.
            labels: its class.
            own: where the data set itself puts it; None if it does not say.
            rejected: what else the data set has, of no use. Lists may name its subjects.

        Raises:
            InputError: classes too small for the plan, unknown subjects on a list, a subject on both sides, a data set that
                says for some volumes alone where they belong, or one of whose own training set or hold-out nothing can be used.
        """
        if (self.train_subjects is None) != (self.heldout_subjects is None):
            raise InputError("A split by lists needs both, the training subjects and the held-out ones.")
        rule = self.rule(own)
        lost = [rejection for rejection in rejected if rejection.split not in (None, *own)]
        if rule == "lists":
            known = {*subjects, *(rejection.subject_id for rejection in rejected)}
            sides = split_lists(subjects, self.train_subjects, self.heldout_subjects, known)
        elif rule == "counts":
            sides = split_counts(subjects, labels, self.counts, self.seed)
        elif rule == "own":
            sides = list(own)
        elif lost:  # none is drawn instead: it would mix what the data set keeps apart
            raise InputError(
                f"Of the data set's own split no volume for {lost[0].split!r} can be used: mend those there are, or take the split "
                f"out of the data set to have one drawn. The first: {lost[0].reason}"
            )
        elif None in own and any(own):
            raise InputError(
                f"{own.count(None)} of {len(own)} volumes have no split of their own, that of subject "
                f"{subjects[own.index(None)]!r} first: give every volume one, or none."
            )
        elif "heldout" in own:  # drawn anew, it would be trained on
            raise InputError(
                "The data set's own split holds all volumes that can be used out of training: give lists of subjects, or take the split out "
                "of the data set to have one drawn."
            )
        else:
            sides = split_fraction(subjects, labels, self.holdout_fraction, self.seed)
        by_side = {side: {s for s, its in zip(subjects, sides, strict=True) if its == side} for side in SIDES}
        check_no_leak(by_side["train"], by_side["heldout"])
        return sides


def split_by_subject(
    volumes: VolumeDataset, holdout_fraction: float, seed: int = 0
) -> tuple[VolumeDataset, VolumeDataset]:
    """Training and held-out volumes; every class gives `holdout_fraction` of its subjects, drawn by `seed`.

    A subject's class is that of its first volume; all volumes of a subject go to the same side.

    Raises:
        InputError: the fraction is not inside (0, 1), or a class has too few subjects for both sides.
    """
    names = [volumes.id2label[label] for label in volumes.class_labels.tolist()]
    sides = split_fraction(volumes.subject_ids, names, holdout_fraction, seed)
    rows = {side: torch.tensor([i for i, its in enumerate(sides) if its == side]) for side in SIDES}
    train, heldout = volumes.select(rows["train"]), volumes.select(rows["heldout"])
    check_no_leak(train.subject_ids, heldout.subject_ids)
    return train, heldout


def split_fraction(
    subjects: Sequence[str], labels: Sequence[str], holdout_fraction: float, seed: int = 0
) -> list[str | None]:
    """The side of every volume, `"train"` or `"heldout"`, with `holdout_fraction` of every class' subjects held out."""
    if not 0 < holdout_fraction < 1:
        raise InputError(f"holdout_fraction must lie between 0 and 1, got {holdout_fraction}.")
    counts = {}
    for label, members in _subjects_by_class(subjects, labels).items():
        if not members:  # volumes of this class are of subjects that count for another, and go along with these
            continue
        heldout = round(len(members) * holdout_fraction)
        if not 0 < heldout < len(members):
            raise InputError(
                f"Class {label!r} has {len(members)} subjects, too few for a hold-out of {holdout_fraction:.0%}. "
                "Give more subjects or change holdout_fraction."
            )
        counts[label] = (len(members) - heldout, heldout)
    return split_counts(subjects, labels, counts, seed)


def split_counts(
    subjects: Sequence[str], labels: Sequence[str], counts: Mapping[str, tuple[int, int]], seed: int = 0
) -> list[str | None]:
    """The side of every volume, with so many subjects of every class for training and for the hold-out, drawn by `seed`;
    None for subjects beyond these.

    Raises:
        InputError: a class has fewer subjects than asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    side: dict[str, str] = {}
    for label, members in _subjects_by_class(subjects, labels).items():
        num_train, num_heldout = counts.get(label, (0, 0))
        if num_train + num_heldout > len(members):
            raise InputError(
                f"Class {label!r} has {len(members)} subjects; the split asks for {num_train} + {num_heldout}."
            )
        order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        side.update(dict.fromkeys(order[:num_heldout], "heldout"))
        side.update(dict.fromkeys(order[num_heldout : num_heldout + num_train], "train"))
    return [side.get(subject) for subject in subjects]


def split_lists(
    subjects: Sequence[str], train: Collection[str], heldout: Collection[str], known: Collection[str]
) -> list[str | None]:
    """The side of every volume by lists of subjects; None for subjects on neither. Lists hold for all subjects `known`, also
    for those whose images can't be used.

    Raises:
        InputError: a subject on both lists, or one that the data set does not have.
    """
    check_no_leak(train, heldout)
    unknown = sorted({*train, *heldout} - set(known))
    if unknown:
        raise InputError(
            f"{len(unknown)} listed subjects are not in the data set, {unknown[0]!r} first; its subjects are called like "
            f"{min(known)!r}."
        )
    train, heldout = set(train), set(heldout)
    return ["train" if name in train else "heldout" if name in heldout else None for name in subjects]


def check_no_leak(train: Collection[str], heldout: Collection[str]) -> None:
    """Raise InputError if a subject is on both sides."""
    shared = sorted(set(train) & set(heldout))
    if shared:
        raise InputError(
            f"{len(shared)} subjects are in the training set and in the hold-out, {shared[0]!r} first: leave each on one side."
        )


def _subjects_by_class(subjects: Sequence[str], labels: Sequence[str]) -> dict[str, list[str]]:
    """Sorted subjects by class; a subject's class is that of its first volume."""
    first: dict[str, str] = {}
    for subject, label in zip(subjects, labels, strict=True):
        first.setdefault(subject, label)
    return {name: sorted(s for s, its in first.items() if its == name) for name in sorted(set(labels))}
