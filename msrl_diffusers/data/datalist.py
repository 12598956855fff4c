"""datalist: a JSON list of images, as MONAI and the Medical Segmentation Decathlon write it."""

import json
import os
from collections import Counter
from pathlib import Path

from ..errors import InputError
from .cases import (
    ONE_CLASS,
    SPLITS,
    SUBJECT_COLUMNS,
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
from .folders import entries


IMAGE_SUFFIXES = (".nii", ".nii.gz")


def scan(
    data_dir: Path,
    label_column: str | None = None,
    label_bins: LabelBins | None = None,
    subject_column: str | None = None,
) -> Listing:
    """The entries of a data list: those of `training` in the split train, of `validation` and `test` in heldout. A list of
    training entries alone does not say what is held out.

    `image` of an entry is a path, or a list of paths that become channels, named by `modality` of the list. Paths start
    at the folder of the list. A `label` that is the path of an image is the segmentation (dropped where there is no such
    file). An entry may be the path alone, as those of the Decathlon for testing are. `session` is read where
    it exists; without a subject the file's name stands for it, and for the session of a subject with several images where there is
    no `session`.

    Args:
        data_dir: the JSON file, or a folder with `dataset.json` or a single JSON file.
        label_column: key of the classes: categories, or numbers with `label_bins`; by default `label`; `none`, and the
            default where entries have no keys but those above, is one class of all images.
        label_bins: edges `[40, 60]`, or `{class name: [low, high]}` with `low <= value < high` (None is no bound);
            entries in no bin are no part of the data set.
        subject_column: key that names the subject; by default `subject_id` or `participant_id`, or each image by itself (and a
            warning) where entries have none.

    Raises:
        InputError: no JSON file, one that can't be read, one without lists, no entry with a key of that name of subjects, or too
            many numbers as labels.
    """
    path = _find_list(data_dir)
    content = _read(path)
    modalities = content.get("modality") if isinstance(content.get("modality"), dict) else {}
    given = {key for entry in _objects(content) for key, value in entry.items() if class_is_given(value)}
    if subject_column and subject_column not in given:
        raise InputError(f"No entry of {path} has the key {subject_column!r} of subjects.")
    listing, found = Listing(), []
    with_classes = has_classes(label_column, label_bins, _may_have_classes(content, subject_column))
    label_column = label_column or "label"
    listed = [
        (f"{path}, {key}[{number}]", split, {"image": entry} if isinstance(entry, str) else entry)
        for key, split in SPLITS.items()
        for number, entry in enumerate(content.get(key, []))
    ]
    names = distinct_names([os.path.relpath(path.parent / _first_image(entry), path.parent) for *_, entry in listed])
    subject_key = subject_column or default_subject_column(given)
    for (place, split, entry), name in zip(listed, names, strict=True):
        subject = _given(entry, subject_key)
        try:
            if not isinstance(entry, dict):
                raise InputError(f"{place} is {entry!r}, neither a path nor an object with keys.")
            label = _label(entry.get(label_column), label_bins, label_column, place) if with_classes else ONE_CLASS
            if label is None:
                continue
            images = _images(entry.get("image"), modalities, path.parent, place)
        except InputError as error:
            listing.reject(place, str(error), subject or name, split)
            continue
        found.append((entry, split, label, images, subject, name))
    scans = Counter(subject for *_, subject, _ in found if subject)
    for entry, split, label, images, subject, name in found:
        seg = entry.get("label")
        listing.cases.append(
            Case(
                images,
                label,
                subject_id=subject or name,
                session=_given(entry, "session") or (name if scans[subject] > 1 else ""),
                split=split,
                seg=str(path.parent / seg) if _is_image(seg) and os.path.isfile(path.parent / seg) else None,
            )
        )
    listing.classes = class_names([label for _, _, label, *_ in found], label_bins, label_column)
    if subject_key not in given:
        listing.warn_of_subjects(path)
    return listing


def files_of_datalist(data_dir: str | Path) -> list[Path]:
    """The list, and those files it names as images that exist.

    Raises:
        InputError: as `datalist_cases`, of the list.
    """
    path = _find_list(Path(data_dir).absolute())
    content = _read(path)
    images = [
        entry.get("image") if isinstance(entry, dict) else entry for key in SPLITS for entry in content.get(key, [])
    ]
    named = {
        name for image in images for name in (image if isinstance(image, list) else [image]) if isinstance(name, str)
    }
    return [path, *sorted(path.parent / name for name in named if os.path.isfile(path.parent / name))]


def _find_list(data_dir: Path) -> Path:
    if os.path.isfile(data_dir):
        return data_dir
    lists = [file for file in entries(data_dir) if file.suffix.lower() == ".json" and os.path.isfile(file)]
    named = [file for file in lists if file.name == "dataset.json"] or lists
    if len(named) != 1:
        raise InputError(
            f"{data_dir} has {len(lists)} JSON files and no dataset.json; give the path of the data list itself."
        )
    return named[0]


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} can't be read as JSON: {error}.") from error
    lists = [key for key in SPLITS if isinstance(content, dict) and key in content]
    if not lists:
        raise InputError(f"{path} is no data list; it needs an object with one or more of the keys {list(SPLITS)}.")
    for key in lists:
        if not isinstance(content[key], list):
            raise InputError(f"{path}: {key!r} must be a list of entries.")
    return content


def _objects(content: dict) -> list[dict]:
    """The entries of all lists that have keys."""
    return [entry for key in SPLITS for entry in content.get(key, []) if isinstance(entry, dict)]


def _may_have_classes(content: dict, subject_column: str | None) -> bool:
    """Whether the key `label` of any entry is a class, or there are keys that may be."""
    known = {"image", "label", *SUBJECT_COLUMNS, "session", subject_column}
    return any(
        set(entry) - known or (class_is_given(entry.get("label")) and not _is_image(entry["label"]))
        for entry in _objects(content)
    )


def _given(entry, key: str) -> str | None:
    """What an entry says under a key; None if nothing."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return str(value) if class_is_given(value) else None


def _first_image(entry) -> str:
    """The path of an entry's image, or of its first; empty if it has none."""
    image = entry.get("image") if isinstance(entry, dict) else None
    first = next(iter(image), None) if isinstance(image, list) else image
    return first if isinstance(first, str) else ""


def _label(value, label_bins: LabelBins | None, label_column: str, place: str) -> str | None:
    """The class; None for a number in no bin."""
    if _is_image(value):
        raise InputError(
            f"{place}: {label_column!r} is a segmentation, {value}; name the key of classes as label_column, or say none "
            "for one class of all."
        )
    if value is not None and not isinstance(value, str | int | float):
        raise InputError(f"{place}: {label_column!r} must be one value, it is {value!r}.")
    if not class_is_given(value):
        raise InputError(f"{place} has no {label_column!r}.")
    return class_of(value, label_bins, label_column, place)


def _images(image, names: dict, folder: Path, place: str) -> dict[str, str]:
    paths = image if isinstance(image, list) else [image]
    if not paths or not all(isinstance(path, str) for path in paths):
        raise InputError(f"{place}: 'image' must be a path or a list of paths, it is {image!r}.")
    for path in paths:
        if not os.path.isfile(folder / path):
            raise InputError(f"{place}: {folder / path} is missing.")
    if not isinstance(image, list):
        return {"image": str(folder / image)}
    keys = [str(names.get(str(channel), f"channel{channel}")) for channel in range(len(paths))]
    if len(set(keys)) < len(keys):
        raise InputError(f"{place}: two images have the same name in 'modality', {keys}.")
    return {key: str(folder / path) for key, path in zip(keys, paths, strict=True)}


def _is_image(value) -> bool:
    return isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES)
