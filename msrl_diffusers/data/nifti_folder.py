"""nifti_folder: any folder of `.nii` / `.nii.gz` files with a `metadata.csv`, through `datasets`' niftifolder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import torch
from tqdm import tqdm

from ..errors import InputError
from .processor import VolumeProcessor
from .volumes import VolumeDataset


def load_nifti_folder(
    data_dir: str | Path,
    processor: VolumeProcessor,
    label_column: str,
    label_bins: Mapping[str, Sequence[float | None]] | None = None,
    subject_column: str = "subject_id",
) -> VolumeDataset:
    """All labelled volumes of a folder.

    Args:
        data_dir: folder with `metadata.csv`, whose column `file_name` names the images.
        processor: brings images to one cube.
        label_column: column of the classes: categories, or numbers with `label_bins`.
        label_bins: `{class name: [low, high]}` for a numeric column: a row belongs to the class with
            `low <= value < high`; `None` (null) is no bound; rows in no bin are left out.
        subject_column: column that names the subject; the file name is the subject where it is missing.

    Raises:
        InputError: no metadata.csv, unknown column, non-numeric value in a binned column, fewer than two classes, or an
            image that can't be read; the sentence names it.
    """
    data_dir = Path(data_dir)
    table_path = data_dir / "metadata.csv"
    if not table_path.is_file():
        raise InputError(
            f"{data_dir} has no metadata.csv; write one with a column file_name (and {label_column}) beside the images."
        )
    rows = _read_table(data_dir, label_column)
    names = [_class_of(row[label_column], label_bins, table_path) for row in rows]
    classes = list(label_bins) if label_bins else sorted({name for name in names if name is not None})
    missing = [name for name in classes if name not in names]
    if missing or len(classes) < 2:
        raise InputError(
            f"{table_path}: column {label_column!r} gives {len(classes) - len(missing)} classes with volumes "
            f"(of {classes}); at least two are needed."
        )
    volumes, labels, subjects = [], [], []
    kept = [(row, name) for row, name in zip(rows, names, strict=True) if name is not None]
    for row, name in tqdm(kept, desc="prepare"):
        volumes.append(_read_volume(row["nifti"], processor))
        labels.append(classes.index(name))
        subject = row.get(subject_column)  # 0 is a subject, too
        subjects.append(Path(row["nifti"]["path"]).name.split(".")[0] if subject in (None, "") else str(subject))
    return VolumeDataset(
        torch.stack(volumes), torch.tensor(labels), subjects, dict(enumerate(classes)), processor.spacing
    )


def _read_table(data_dir: Path, label_column: str) -> list[dict]:
    try:
        table = datasets.load_dataset("niftifolder", data_dir=str(data_dir), split="train")
    except Exception as error:  # datasets wraps what went wrong in exceptions of many kinds
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"{data_dir} can't be read as a NIfTI folder: {cause}") from error
    columns = [name for name in table.column_names if name != "nifti"]
    if label_column not in columns:
        raise InputError(f"{data_dir / 'metadata.csv'} has no column {label_column!r}; it has {columns}.")
    return list(table.cast_column("nifti", datasets.Nifti(decode=False)))


def _class_of(value, label_bins: Mapping[str, Sequence[float | None]] | None, table_path: Path) -> str | None:
    if value is None or value == "":
        return None
    if label_bins is None:
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{table_path}: {value!r} is no number, but label_bins asks for one.") from None
    for name, (low, high) in label_bins.items():
        if (low is None or number >= low) and (high is None or number < high):
            return name
    return None


def _read_volume(stored: dict, processor: VolumeProcessor) -> torch.Tensor:
    path = stored["path"]
    try:
        return processor.preprocess(datasets.Nifti().decode_example(stored)).half()
    except Exception as error:  # nibabel, zlib and numpy each have their own
        raise InputError(f"{path} can't be used: {str(error).strip() or type(error).__name__}") from error
