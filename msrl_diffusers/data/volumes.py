"""VolumeDataset: prepared volumes in memory, with their labels and subjects."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import InputError


@dataclass(frozen=True)
class VolumeDataset:
    """Volumes of one shape. All fields have one entry per volume but `id2label` and `spacing`.

    Attributes:
        pixel_values (`Tensor [N, C, D, H, W]`): intensities in [-1, 1], axes inferior-superior, posterior-anterior,
            left-right, float16 (half the memory; the rounding, 5e-4, is far under the noise of any scan).
        class_labels (`Tensor [N]`): int64.
        subject_ids (`list[str]`): whose volume it is; splits are made by these.
        id2label (`dict[int, str]`): names of the classes.
        spacing (`tuple[float, float, float]`): edge lengths of a voxel in millimetres, in the order of the axes.
    """

    pixel_values: torch.Tensor
    class_labels: torch.Tensor
    subject_ids: list[str]
    id2label: dict[int, str]
    spacing: tuple[float, float, float]

    def __post_init__(self):
        if not len(self.pixel_values) == len(self.class_labels) == len(self.subject_ids):
            raise InputError(
                f"{len(self.pixel_values)} volumes, {len(self.class_labels)} labels and {len(self.subject_ids)} "
                "subject ids: the three must be equal."
            )

    def __len__(self) -> int:
        return len(self.subject_ids)

    @property
    def image_size(self) -> int:
        """Edge of the cubes in voxels."""
        return self.pixel_values.shape[-1]

    @property
    def num_classes(self) -> int:
        return len(self.id2label)

    def batch(self, indices: Sequence[int] | torch.Tensor, device: torch.device | str = "cpu") -> dict:
        """`{"pixel_values": [B, C, D, H, W] float32, "class_labels": [B], "subject_id": list[str]}`."""
        indices = torch.as_tensor(indices)
        return {
            "pixel_values": self.pixel_values[indices].to(device, torch.float32),
            "class_labels": self.class_labels[indices].to(device),
            "subject_id": [self.subject_ids[i] for i in indices.tolist()],
        }

    def select(self, indices: Sequence[int] | torch.Tensor) -> "VolumeDataset":
        """The volumes at `indices`, in that order."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        return VolumeDataset(
            self.pixel_values[indices],
            self.class_labels[indices],
            [self.subject_ids[i] for i in indices.tolist()],
            self.id2label,
            self.spacing,
        )

    def take_per_class(self, count: int | Mapping[int, int]) -> "VolumeDataset":
        """The first `count` volumes of every class, one number for all or one per label (all, where a class has fewer)."""
        counts = count if isinstance(count, Mapping) else dict.fromkeys(self.id2label, count)
        rows = [(self.class_labels == label).nonzero()[: counts[label], 0] for label in sorted(self.id2label)]
        return self.select(torch.cat(rows))

    def class_counts(self) -> dict[str, int]:
        """Number of volumes per class name."""
        return {name: int((self.class_labels == label).sum()) for label, name in self.id2label.items()}

    def save(self, path: str | Path) -> None:
        """Write a single safetensors file, under a temporary name first."""
        path = Path(path)
        metadata = {
            "subject_ids": json.dumps(self.subject_ids),
            "id2label": json.dumps(self.id2label),
            "spacing": json.dumps(self.spacing),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        tensors = {"pixel_values": self.pixel_values.contiguous(), "class_labels": self.class_labels.contiguous()}
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> "VolumeDataset":
        """Read a file written by `save`.

        Raises:
            ValueError: the file is missing or is not such a file; the sentence names it.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                return cls(
                    file.get_tensor("pixel_values"),
                    file.get_tensor("class_labels"),
                    json.loads(metadata["subject_ids"]),
                    {int(label): name for label, name in json.loads(metadata["id2label"]).items()},
                    tuple(json.loads(metadata["spacing"])),
                )
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(
                f"{path} can't be read as prepared volumes ({error}); run the prepare stage again."
            ) from error
