"""VolumeDataset: prepared volumes in memory, with their labels and subjects."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import InputError
from .processor import Geometry
from .rows import row_numbers


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
        geometries (`list[Geometry]`, *optional*): where prepared volumes came from (`VolumeProcessor.postprocess`).
    """

    pixel_values: torch.Tensor
    class_labels: torch.Tensor
    subject_ids: list[str]
    id2label: dict[int, str]
    spacing: tuple[float, float, float]
    geometries: list[Geometry] | None = None

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
    def num_channels(self) -> int:
        """Modalities of a volume."""
        return self.pixel_values.shape[1]

    @property
    def num_classes(self) -> int:
        """Classes of the data set, also those without a volume here."""
        return len(self.id2label)

    def batch(self, indices: Sequence[int] | torch.Tensor, device: torch.device | str = "cpu") -> dict:
        """`{"pixel_values": [B, C, D, H, W] float32, "class_labels": [B], "subject_id": list[str]}`."""
        indices = row_numbers(indices, len(self))
        return {
            "pixel_values": self.pixel_values[indices].to(device, torch.float32),
            "class_labels": self.class_labels[indices].to(device),
            "subject_id": [self.subject_ids[i] for i in indices.tolist()],
        }

    def select(self, indices: Sequence[int] | torch.Tensor) -> "VolumeDataset":
        """The volumes at `indices`, in that order, or where a Boolean mask of all is true."""
        indices = row_numbers(indices, len(self))
        return VolumeDataset(
            self.pixel_values[indices],
            self.class_labels[indices],
            [self.subject_ids[i] for i in indices.tolist()],
            self.id2label,
            self.spacing,
            self.geometries and [self.geometries[i] for i in indices.tolist()],
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
        if self.geometries:
            metadata["geometries"] = json.dumps([asdict(geometry) for geometry in self.geometries])
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        tensors = {"pixel_values": self.pixel_values.contiguous(), "class_labels": self.class_labels.contiguous()}
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path, per_class: int | None = None) -> "VolumeDataset":
        """Read a file written by `save` (or by `msrl prepare`): all of it, or the first `per_class` volumes of each class.

        Raises:
            ValueError: the file is missing or is not such a file; the sentence names it.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata, labels = file.metadata(), file.get_tensor("class_labels")
                subjects = json.loads(metadata["subject_ids"])
                id2label = {int(label): name for label, name in json.loads(metadata["id2label"]).items()}
                geometries = [Geometry(**fields) for fields in json.loads(metadata.get("geometries", "[]"))]
                spacing = tuple(json.loads(metadata["spacing"]))
                if per_class is None:
                    return cls(
                        file.get_tensor("pixel_values"), labels, subjects, id2label, spacing, geometries or None
                    )
                rows = [
                    row for label in sorted(id2label) for row in (labels == label).nonzero()[:per_class, 0].tolist()
                ]
                stored = file.get_slice("pixel_values")
                return cls(
                    torch.cat([stored[row : row + 1] for row in rows]),
                    labels[rows],
                    [subjects[row] for row in rows],
                    id2label,
                    spacing,
                    [geometries[row] for row in rows] if geometries else None,
                )
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(
                f"{path} can't be read as prepared volumes ({error}); run the prepare stage again."
            ) from error
