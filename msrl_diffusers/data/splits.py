"""Splits by subject: no volume of a held-out subject reaches any training stage."""

import torch

from ..errors import InputError
from .volumes import VolumeDataset


def split_by_subject(
    volumes: VolumeDataset, holdout_fraction: float, seed: int = 0
) -> tuple[VolumeDataset, VolumeDataset]:
    """Training and held-out volumes; every class gives `holdout_fraction` of its subjects, drawn by `seed`.

    A subject's class is that of its first volume; all volumes of a subject go to the same side.

    Raises:
        InputError: the fraction is not inside (0, 1), or a class has too few subjects for both sides.
    """
    if not 0 < holdout_fraction < 1:
        raise InputError(f"holdout_fraction must lie between 0 and 1, got {holdout_fraction}.")
    subject_label: dict[str, int] = {}
    for subject, label in zip(volumes.subject_ids, volumes.class_labels.tolist(), strict=True):
        subject_label.setdefault(subject, label)
    generator = torch.Generator().manual_seed(seed)
    heldout: set[str] = set()
    for label, name in sorted(volumes.id2label.items()):
        subjects = sorted(subject for subject, its_label in subject_label.items() if its_label == label)
        count = round(len(subjects) * holdout_fraction)
        if not 0 < count < len(subjects):
            raise InputError(
                f"Class {name!r} has {len(subjects)} subjects, too few for a hold-out of {holdout_fraction:.0%}. "
                "Give more subjects or change holdout_fraction."
            )
        order = torch.randperm(len(subjects), generator=generator).tolist()
        heldout.update(subjects[i] for i in order[:count])
    inside = torch.tensor([subject in heldout for subject in volumes.subject_ids])
    train, test = volumes.select((~inside).nonzero()[:, 0]), volumes.select(inside.nonzero()[:, 0])
    check_no_leak(train, test)
    return train, test


def check_no_leak(train: VolumeDataset, heldout: VolumeDataset) -> None:
    """Raise InputError if a subject is on both sides."""
    shared = sorted(set(train.subject_ids) & set(heldout.subject_ids))
    if shared:
        raise InputError(f"{len(shared)} subjects are in the training set and in the hold-out, {shared[0]!r} first.")
