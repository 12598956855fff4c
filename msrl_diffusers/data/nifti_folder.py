"""nifti_folder: any folder of images with a `metadata.csv`, in the layout of `datasets`' niftifolder.

The table is read here and not by `datasets`, which gives up on the whole folder where one file is missing.
"""

from pathlib import Path

from ..errors import InputError
from .cases import (
    NO_CLASSES,
    ONE_CLASS,
    SPLITS,
    Case,
    LabelBins,
    Listing,
    class_is_given,
    class_names,
    class_of,
    default_subject_column,
    distinct_names,
    has_classes,
)
from .folders import image_columns, read_table


def scan(
    data_dir: Path,
    label_column: str | None = None,
    label_bins: LabelBins | None = None,
    subject_column: str | None = None,
) -> Listing:
    """The rows of `metadata.csv` as cases.

    A column `file_name` names the image of a row, or one column `<modality>_file_name` per modality;
    `seg_file_name` is a segmentation. `session` and `split` (train, val, test) are read where they exist; without a subject the
    file's name stands for it, without `session` for that.

    Args:
        data_dir: folder with `metadata.csv`.
        label_column: column of the classes: categories, or numbers with `label_bins`; by default `label`; `none`, and the
            default where the table has no columns but those above, is one class of all images.
        label_bins: edges `[40, 60]`, or `{class name: [low, high]}` with `low <= value < high` (None is no bound); rows
            in no bin are no part of the data set.
        subject_column: column that names the subject; by default `subject_id` or `participant_id`, or each file by itself (and
            a warning) where the table has none.

    Raises:
        InputError: no metadata.csv, one that can't be read, no column of file names, of labels or of that name of subjects, too
            many numbers as labels, or a split of another name.
    """
    table_path = data_dir / "metadata.csv"
    rows = _read_table(table_path)
    columns = list(rows[0])
    kinds = image_columns(columns)
    if not kinds:
        raise InputError(f"{table_path} has no column file_name (nor <modality>_file_name); it has {columns}.")
    if subject_column and subject_column not in columns:
        raise InputError(f"{table_path} has no column {subject_column!r} of subjects; it has {columns}.")
    subject_column = subject_column or default_subject_column(columns)
    others = set(columns) - {*kinds.values(), "seg_file_name", subject_column, "session", "split"}
    with_classes = has_classes(label_column, label_bins, bool(others))
    label_column = label_column or "label"
    if with_classes and label_column not in columns:
        raise InputError(
            f"{table_path} has no column {label_column!r}; it has {columns}: name that of the classes by label_column, or say "
            f"{NO_CLASSES} for one class of all."
        )
    names = distinct_names([next((row[column] for column in kinds.values() if row[column]), "") for row in rows])
    listing, values = Listing(), []
    for number, (row, name) in enumerate(zip(rows, names, strict=True), start=2):
        place = f"{table_path}, line {number}"
        subject, session = (
            row[column] if class_is_given(row.get(column)) else None for column in (subject_column, "session")
        )
        split = (row.get("split") or "").strip().lower()
        owner = (subject or name, SPLITS.get(split))
        try:
            label = class_of(row[label_column], label_bins, label_column, place) if with_classes else ONE_CLASS
        except InputError as error:
            listing.reject(place, str(error), *owner)
            continue
        if label is None:
            if not class_is_given(row[label_column]):
                listing.reject(place, f"{place}: column {label_column!r} is empty.", *owner)
            continue
        images = {kind: str(data_dir / row[column]) for kind, column in kinds.items() if row[column]}
        missing = [image for image in images.values() if not Path(image).is_file()]
        if missing or len(images) < len(kinds):
            absent = missing[0] if missing else f"the image of {next(kind for kind in kinds if kind not in images)!r}"
            listing.reject(place, f"{place}: {absent} is missing.", *owner)
            continue
        if split and split not in SPLITS:
            raise InputError(f"{place}: the split {split!r} is none of {list(SPLITS)}.")
        values.append(label)
        seg = row.get("seg_file_name")
        listing.cases.append(
            Case(
                images,
                label,
                subject_id=subject or name,
                session=session or (name if subject else ""),
                split=SPLITS.get(split),
                seg=str(data_dir / seg) if seg else None,
            )
        )
    listing.classes = class_names(values, label_bins, label_column)
    if not any(class_is_given(row.get(subject_column)) for row in rows):
        listing.warn_of_subjects(table_path)
    return listing


def _read_table(table_path: Path) -> list[dict[str, str]]:
    if not table_path.is_file():
        raise InputError(
            f"{table_path.parent} has no metadata.csv; write one with a column file_name (and one of classes, if there are any) "
            "beside the images."
        )
    rows = read_table(table_path)
    if not rows:
        raise InputError(f"{table_path} has no rows.")
    return rows
