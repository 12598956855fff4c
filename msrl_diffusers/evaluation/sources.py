"""Sets of volumes to be evaluated, read in batches, so that memory does not grow with their number.

A set is prepared volumes (a `VolumeDataset`, or the file of one) or a folder of NIfTI images. Only headers are read when
it is opened: what is wrong with shapes and spacings is said before anything long starts.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.orientations import io_orientation
from safetensors import SafetensorError, safe_open

from ..data.folders import image_columns, read_table
from ..data.processor import VolumeProcessor, scale_on_own_grid
from ..data.reading import read_image
from ..data.rows import row_numbers
from ..data.volumes import VolumeDataset
from ..errors import InputError


SPACING_TOLERANCE = 0.01  # of a voxel's edge; headers are rounded
CLASS_COLUMNS = ("class_label", "label")  # of metadata.csv


@dataclass(frozen=True)
class VolumeSource(ABC):
    """A set of volumes of one shape and spacing.

    Attributes:
        place (`str`): what it was opened from, for sentences.
        names (`list[str]`): of every volume: its file below the folder, or its subject.
        class_names (`list[str]`, *optional*): of every volume.
        shape (`tuple[int, int, int, int]`): C, D, H, W of a volume.
        spacing (`tuple[float, float, float]`): edge lengths of a voxel in millimetres, in the order D, H, W.
        keys (`list`): by which the volumes are read: rows or paths.
    """

    place: str
    names: list[str]
    class_names: list[str] | None
    shape: tuple[int, int, int, int]
    spacing: tuple[float, float, float]
    keys: list = field(repr=False)

    @abstractmethod
    def _read(self, keys: list) -> torch.Tensor:
        """The volumes `[B, C, D, H, W]` of these keys, of any floating type."""

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """The volumes at `indices`, `[B, C, D, H, W]` float32 in [-1, 1].

        Raises:
            InputError: a volume that can't be read, or holds NaN or infinity.
        """
        indices = row_numbers(indices, len(self)).tolist()
        if not indices:
            return torch.empty(0, *self.shape)
        volumes = self._read([self.keys[index] for index in indices]).float()
        for index, volume in zip(indices, volumes, strict=True):
            if not torch.isfinite(volume).all():
                raise InputError(f"{self.names[index]} of {self.place} holds NaN or infinite values; drop it.")
        return volumes

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """All volumes in their order, `[B, C, D, H, W]` float32 in [-1, 1]; every one is read once."""
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        for start in range(0, len(self), batch_size):
            yield self.take(range(start, min(start + batch_size, len(self))))

    def select(self, indices: Sequence[int] | torch.Tensor) -> "VolumeSource":
        """The set of the volumes at `indices` (or where a Boolean mask is true), in that order; nothing is read or copied."""
        indices = row_numbers(indices, len(self)).tolist()
        return replace(
            self,
            names=[self.names[index] for index in indices],
            class_names=self.class_names and [self.class_names[index] for index in indices],
            keys=[self.keys[index] for index in indices],
        )


@dataclass(frozen=True)
class DatasetSource(VolumeSource):
    """Prepared volumes in memory; keys are rows."""

    dataset: VolumeDataset = field(repr=False)

    def _read(self, keys: list[int]) -> torch.Tensor:
        return self.dataset.pixel_values[keys]


@dataclass(frozen=True)
class FileSource(VolumeSource):
    """Prepared volumes in the file that `VolumeDataset.save` wrote; keys are rows."""

    def _read(self, keys: list[int]) -> torch.Tensor:
        try:
            with safe_open(self.place, framework="pt") as file:
                stored = file.get_slice("pixel_values")
                return torch.cat([stored[row : row + 1] for row in keys])
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.place} can't be read any more ({error}); it changed while in use.") from error


@dataclass(frozen=True)
class NiftiSource(VolumeSource):
    """Images of a folder, through `processor`, or on their own grid without; keys are the paths of a volume's channels."""

    processor: VolumeProcessor | None = None

    def _read(self, keys: list[tuple[Path, ...]]) -> torch.Tensor:
        return torch.stack([self._volume(paths) for paths in keys])

    def _volume(self, paths: tuple[Path, ...]) -> torch.Tensor:
        images = [read_image(path) for path in paths]
        try:
            if self.processor:
                return self.processor.preprocess(images)
            return torch.cat([scale_on_own_grid(image) for image in images])
        except InputError as error:  # the processor does not know the file
            raise InputError(f"{paths[0]}: {error}") from error


def open_source(
    source: VolumeDataset | str | Path, image_size: int | None = None, field_of_view: float = 192.0
) -> VolumeSource:
    """A set of volumes, opened; no voxel of a file is read yet.

    Args:
        source: a `VolumeDataset`; a `.safetensors` file of one; or a folder of `.nii` and `.nii.gz` images, at any
            depth, in the order of their names. Where the folder has a `metadata.csv` with a column `file_name`, or one
            `<modality>_file_name` for each channel, the set is what that names (masks beside the images, `seg_file_name`, are
            none of it), with the classes of a column `class_label` or `label`.
        image_size: voxels along each edge of the cubes that NIfTI images are resampled to, by `VolumeProcessor`. Without,
            they are taken on their own grid, one for all, reoriented to RAS; intensities are scaled the same way: from each
            image's own percentiles, but for what `to_nifti` wrote (`msrl generate`), whose intensities are kept.
        field_of_view: edge of these cubes in millimetres.

    Raises:
        InputError: nothing there, nothing in it, not readable, or (without `image_size`) unequal grids; or prepared
            volumes of another size than `image_size`.
    """
    if isinstance(source, VolumeDataset):
        opened = _open_dataset(source)
    elif not Path(source).exists():
        raise InputError(f"{source} does not exist; give a folder of NIfTI images or a .safetensors file.")
    elif Path(source).is_dir():
        return _open_folder(
            Path(source), VolumeProcessor(image_size, field_of_view) if image_size is not None else None
        )
    elif Path(source).suffix == ".safetensors":
        opened = _open_file(Path(source))
    else:
        raise InputError(f"{source} is neither a folder of NIfTI images nor a .safetensors file of prepared volumes.")
    if not len(opened):
        raise InputError(f"{opened.place} holds no volumes.")
    if image_size is not None and set(opened.shape[1:]) != {image_size}:
        raise InputError(
            f"{opened.place} holds prepared volumes of {_times(opened.shape[1:])} voxels, which image_size={image_size} "
            "does not resample; prepare them again at that size."
        )
    return opened


def check_comparable(real: VolumeSource, generated: VolumeSource) -> None:
    """Raise InputError where two sets differ in channels, shape or (by more than 1 %) spacing."""
    check_kind(real, generated.place, generated.shape, generated.spacing)


def check_kind(
    real: VolumeSource, place: str, shape: tuple[int, int, int, int], spacing: tuple[float, float, float] | None
) -> None:
    """The same of volumes `shape` (C, D, H, W) that `place` gives, or will give; one without `spacing` is taken to be of 1 mm."""
    places = f"{real.place} and {place}"
    remedy = "give --image_size to resample NIfTI images, or prepare both alike"
    if real.shape[0] != shape[0]:
        raise InputError(f"{places} have {real.shape[0]} and {shape[0]} channels; choose the same modalities.")
    if real.shape != tuple(shape):
        shapes = f"{_times(real.shape[1:])} and {_times(shape[1:])}"
        raise InputError(f"{places} have volumes of {shapes} voxels; {remedy}.")
    if not _same_spacing(real.spacing, spacing or (1.0, 1.0, 1.0)):
        if spacing is None:
            raise InputError(
                f"{place} does not say how large its voxels are, those of {real.place} are {_times(real.spacing)} mm; "
                'write their edges into its model_index.json, as "spacing": [.., .., ..].'
            )
        spacings = f"{_times(real.spacing)} and {_times(spacing)}"
        raise InputError(f"{places} have voxels of {spacings} mm; {remedy}.")


def _open_dataset(dataset: VolumeDataset) -> DatasetSource:
    return DatasetSource(
        "the given VolumeDataset",
        list(dataset.subject_ids),
        [dataset.id2label[label] for label in dataset.class_labels.tolist()],
        tuple(dataset.pixel_values.shape[1:]),
        tuple(dataset.spacing),
        list(range(len(dataset))),
        dataset,
    )


def _open_file(path: Path) -> FileSource:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            id2label = {int(label): name for label, name in json.loads(metadata["id2label"]).items()}
            count, *shape = file.get_slice("pixel_values").get_shape()
            names, spacing = json.loads(metadata["subject_ids"]), tuple(json.loads(metadata["spacing"]))
            class_names = [id2label[label] for label in file.get_tensor("class_labels").tolist()]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} can't be read as prepared volumes ({error}); run msrl prepare again.") from error
    if not len(shape) == 4 or not count == len(names) == len(class_names):
        raise InputError(f"{path} is no whole set of prepared volumes; run msrl prepare again.")
    return FileSource(str(path), names, class_names, tuple(shape), spacing, list(range(count)))


def _open_folder(folder: Path, processor: VolumeProcessor | None) -> NiftiSource:
    channels, class_names = _listed(folder)
    keys = [tuple(folder / name for name in names) for names in channels]
    paths = [path for key in keys for path in key]
    grids = [_grid(path) for path in paths]
    if processor:
        shape, spacing = (processor.image_size,) * 3, processor.spacing
    else:
        shape, spacing = grids[0]
        for path, (its_shape, its_spacing) in zip(paths, grids, strict=True):
            if its_shape != shape:
                unequal = f"{_times(shape)} and {_times(its_shape)} voxels (D x H x W)"
            elif not _same_spacing(its_spacing, spacing):
                unequal = f"voxels of {_times(spacing)} and {_times(its_spacing)} mm (D x H x W)"
            else:
                continue
            raise InputError(f"{paths[0]} and {path} have {unequal}; give --image_size to resample all.")
    names = [names[0] for names in channels]
    return NiftiSource(str(folder), names, class_names, (len(keys[0]), *shape), spacing, keys, processor)


def _listed(folder: Path) -> tuple[list[tuple[str, ...]], list[str] | None]:
    """Names of the images of every volume of a folder, one for each channel, in order, and their classes."""
    table = folder / "metadata.csv"
    rows = read_table(table) if table.is_file() else []
    columns = image_columns(rows[0]) if rows else {}
    if columns:
        first = next(iter(columns.values()))
        rows.sort(key=lambda row: row[first])
        for name in (row[column] for row in rows for column in columns.values()):
            if not name or not (folder / name).is_file():
                raise InputError(f"{table} names the image {name!r}, which is not there; correct the table.")
        column = next((column for column in CLASS_COLUMNS if column in rows[0]), None)
        unnamed = [row[first] for row in rows if column and not row[column]]
        if unnamed:
            raise InputError(f"{table} gives {unnamed[0]} no {column}; fill it in or take the column out.")
        names = [tuple(row[column] for column in columns.values()) for row in rows]
        return names, [row[column] for row in rows] if column else None
    found = (path for pattern in ("*.nii", "*.nii.gz") for path in folder.rglob(pattern))
    names = sorted(path.relative_to(folder).as_posix() for path in found if not path.name.startswith("."))
    if not names:
        raise InputError(f"{folder} holds no .nii or .nii.gz image.")
    return [(name,) for name in names], None


def _grid(path: Path) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Shape and spacing (mm), in the order D, H, W, that the image will have in RAS; from its header."""
    try:
        image = nib.load(path, mmap=False)
        shape, affine = image.shape, image.affine
        order = np.argsort(io_orientation(affine)[:, 0])[::-1]  # where z, y and x of RAS are stored
    except Exception as error:  # nibabel, zlib and numpy each have their own
        raise InputError(f"{path} can't be read as an image: {' '.join(str(error).split())}.") from error
    if len(shape) < 3 or any(edge != 1 for edge in shape[3:]):
        raise InputError(f"{path}: a 3D image is needed, this one has shape {shape}; extract one frame first.")
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    return tuple(int(shape[axis]) for axis in order), tuple(float(edges[axis]) for axis in order)


def _same_spacing(one: Sequence[float], other: Sequence[float]) -> bool:
    return bool(np.allclose(one, other, rtol=SPACING_TOLERANCE, atol=0))


def _times(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
