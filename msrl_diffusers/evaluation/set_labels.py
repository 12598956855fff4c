"""Reward targets of sets that come later than the reward data, such as a policy's own samples, on the scale of these data.

Nobody labels them: a set is worth what its Frechet distance says, and a single volume what it adds to that distance. The
distance of a set falls with its size, so a set is compared with those of the scale at its own size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..data.volumes import VolumeDataset
from ..errors import InputError
from ..functional.influence import class_influence, mixed_targets
from ..functional.targets import reward_targets
from .features import extract_features
from .fidelity import frechet_distance


@dataclass(frozen=True)
class SetLabels:
    """What a set is worth.

    Attributes:
        targets (`Tensor [N]`): of every volume, float32 in [0, 1].
        fid (`dict[str, float]`): distance to the real volumes by class name, at the size of the smaller side.
        quality (`dict[str, float]`): target of the set by class name.
    """

    targets: torch.Tensor
    fid: dict[str, float]
    quality: dict[str, float]


class SetLabeler:
    """Labels sets by their place among scored sets, class by class.

    Args:
        extractor: the label extractor, `[B, C, D, H, W] -> [B, P, S, F]`; never the judge.
        real: the training volumes.
        anchors: the scored sets of the reward data by name, which span the scale.
        target_map: `linear`, `exponential` or `rank`, as for the reward data.
        marginal_labels: share of every volume's own contribution in its target (`functional.influence.mixed_targets`).
    """

    def __init__(
        self,
        extractor: nn.Module,
        real: VolumeDataset,
        anchors: Mapping[str, VolumeDataset],
        target_map: str = "linear",
        marginal_labels: float = 0.0,
    ):
        self.extractor, self.real, self.anchors = extractor, real, dict(anchors)
        self.target_map, self.marginal_labels = target_map, marginal_labels
        self._real_features = extract_features(extractor, real.pixel_values)
        self._cache: dict[tuple, torch.Tensor] = {}

    def __call__(self, samples: torch.Tensor, labels: torch.Tensor) -> SetLabels:
        """The worth of `samples [N, C, D, H, W]` in [-1, 1] with classes `labels [N]`.

        A set worse (better) than all of the scale stands at its end: targets of the scale never change.

        Raises:
            InputError: a class with fewer than two volumes in the set or on the scale.
        """
        labels = labels.cpu()
        self.check(labels)
        features = extract_features(self.extractor, samples)
        targets, fid, quality = torch.zeros(len(labels)), {}, {}
        for label in labels.unique().tolist():
            name, rows = self.real.id2label[label], labels == label
            fid[name], quality[name] = self._place(label, features[rows])
            targets[rows] = quality[name]
        if self.marginal_labels:
            targets = marginal_targets(
                self._real_features, self.real.class_labels, features, labels, targets, self.marginal_labels
            )
        return SetLabels(targets, fid, quality)

    def check(self, labels: torch.Tensor) -> None:
        """Refuse a set with classes `labels [N]` that can't be labelled.

        Raises:
            InputError: a class with fewer than two volumes in the set or on the scale.
        """
        classes, sizes = labels.unique(return_counts=True)
        for label, size in zip(classes.tolist(), sizes.tolist(), strict=True):
            counts = {"the set to be labelled": size, **self._counts(label)}
            place = min(counts, key=counts.get)
            if counts[place] < 2:
                raise InputError(
                    f"Class {self.real.id2label.get(label, label)!r} has {counts[place]} volumes in {place}; a label needs two or more "
                    "of each class."
                )

    def _counts(self, label: int) -> dict[str, int]:
        """Volumes of a class on the scale, by set."""
        parts = {"the training set": self.real, **self.anchors}
        return {name: int((part.class_labels == label).sum()) for name, part in parts.items()}

    def _place(self, label: int, features: torch.Tensor) -> tuple[float, float]:
        """The distance of one class of a set, and its target."""
        count = min(len(features), *self._counts(label).values())
        real = self._real_features[self.real.class_labels == label][:count]
        scale = {name: frechet_distance(real, self._anchor_features(name, label, count)) for name in self.anchors}
        distance = frechet_distance(real, features[:count])
        return distance, place_on_scale(scale, distance, self.target_map)

    def _anchor_features(self, name: str, label: int, count: int) -> torch.Tensor:
        key = (name, label, count)
        if key not in self._cache:
            volumes = self.anchors[name]
            rows = (volumes.class_labels == label).nonzero()[:count, 0]
            self._cache[key] = extract_features(self.extractor, volumes.pixel_values[rows])
        return self._cache[key]


def place_on_scale(scale: Mapping[str, float], distance: float, target_map: str = "linear") -> float:
    """The target in [0, 1] of a set with this Frechet distance among scored ones, `scale` by name; beyond them, that of the
    scale's end."""
    inside = min(max(distance, min(scale.values())), max(scale.values()))
    return reward_targets({**scale, "": inside}, target_map)[""]


def marginal_targets(
    real_features: torch.Tensor,
    real_labels: torch.Tensor,
    features: torch.Tensor,
    labels: torch.Tensor,
    set_targets: torch.Tensor,
    coefficient: float,
) -> torch.Tensor:
    """Targets `[N]` in [0, 1] of one set's volumes: those of the set mixed with each volume's influence on the distance of its
    class (`functional.influence`).

    Args:
        real_features, features: `[M, P, S, F]` and `[N, P, S, F]`.
        real_labels, labels: classes `[M]` and `[N]`.
        set_targets: of the set, by volume, `[N]` in [0, 1].
        coefficient: 0 gives the set's target, 1 the single volume's alone.
    """
    influence = class_influence(real_features, real_labels, features, labels)
    return mixed_targets(set_targets, influence, coefficient, groups=labels)
