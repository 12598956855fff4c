"""RealSide: the real volumes that a policy is tuned towards, and which of its conditions they belong to."""

from typing import NamedTuple

import torch

from ..errors import InputError
from .conditions import Conditions


class RealSide(NamedTuple):
    """The real side: `pixel_values [N, C, *S]`, `class_labels [N]`, the `classes` that distances are taken within (none: pooled),
    and the number of the class of each condition, `groups`."""

    pixel_values: torch.Tensor
    class_labels: torch.Tensor
    classes: list[int]
    groups: torch.Tensor

    @classmethod
    def of(cls, volumes, pipeline, conditions: Conditions, class_wise: bool) -> "RealSide":
        if isinstance(volumes, tuple | list) and len(volumes) == 2:
            pixel_values, labels = volumes
        elif hasattr(volumes, "pixel_values") and hasattr(volumes, "class_labels"):
            pixel_values, labels = volumes.pixel_values, volumes.class_labels
        else:
            raise InputError(
                f"real_volumes must be a VolumeDataset or (pixel_values, class_labels), got {type(volumes).__name__}."
            )
        labels = torch.as_tensor(labels)
        if len(pixel_values) != len(labels) or len(labels) < 2:
            raise InputError(
                f"Two real volumes or more, each with a label, are needed; got {len(pixel_values)} and {len(labels)}."
            )
        if not class_wise:
            return cls(pixel_values, labels, [], torch.zeros(len(conditions), dtype=torch.long))
        numbers = {name: label for label, name in getattr(pipeline, "id2label", {}).items()}
        wanted = [numbers.get(value, value) for value in conditions.values]
        for condition in wanted:
            if not isinstance(condition, int):
                raise InputError(f"The condition {condition!r} is no class; set class_wise: false.")
            if (labels == condition).sum() < 2:
                raise InputError(
                    f"Class {condition} has {int((labels == condition).sum())} real volumes and needs 2; give more, leave it "
                    "out of train_conditions, or set class_wise: false."
                )
        classes = sorted(set(wanted))
        return cls(pixel_values, labels, classes, torch.tensor([classes.index(label) for label in wanted]))
