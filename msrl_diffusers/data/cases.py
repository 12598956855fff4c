"""Cases: what a loader finds in a folder, before any image is opened; and the loaders by name."""

import inspect
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from nibabel.filename_parser import splitext_addext

from ..errors import InputError


logger = logging.getLogger(__name__)

LOADERS = ("brats2019", "oasis1", "bids", "nifti_folder", "datalist")  # one module each, with a function `scan`
SPLITS = {  # what tables and data lists call a split
    "training": "train", "validation": "heldout", "test": "heldout", "testing": "heldout", "train": "train",
    "heldout": "heldout", "val": "heldout", "valid": "heldout", "dev": "heldout",
}  # fmt: skip
ONE_CLASS = "unlabelled"  # the class of all volumes where there are no others
NO_CLASSES = "none"  # as label_column: whatever other columns mean, they are no classes
SUBJECT_COLUMNS = ("subject_id", "participant_id")  # the second is that of BIDS
MAX_NUMBERS = 10  # a column of more different ones is no column of grades, but was measured
LabelBins = Mapping[str, Sequence[float | None]] | Sequence[float]


@dataclass(frozen=True)
class Case:
    """One volume to be: the images of one session of one subject.

    Attributes:
        images (`dict[str, str]`): path by modality, all on one grid; `{"image": path}` where there is one unnamed kind.
        label (`str`): name of the class.
        subject_id (`str`): whose it is; splits are made by it.
        session (`str`): which of the subject's sessions; empty where there is one.
        split (`str`, *optional*): `"train"` or `"heldout"`, where the data set says so.
        seg (`str`, *optional*): path of a segmentation on the same grid.
        orientation (`str`, *optional*): where the axes of the stored array run *to*, such as `"ASL"`, for headers that
            cannot know (Analyze); it replaces the header's own.
    """

    images: dict[str, str]
    label: str
    subject_id: str
    session: str = ""
    split: str | None = None
    seg: str | None = None
    orientation: str | None = None

    @property
    def name(self) -> str:
        """Subject and session in one, for people; `("1_1", "2")` and `("1", "1_2")` share it."""
        return f"{self.subject_id}_{self.session}" if self.session else self.subject_id


@dataclass(frozen=True)
class Rejection:
    """What is left out, and why.

    Attributes:
        file (`str`): path of the file or folder, or the table's with the row.
        reason (`str`): the sentence that says why.
        subject_id (`str`, *optional*): whose it is, where that is known.
        split (`str`, *optional*): `"train"` or `"heldout"`, where the data set says so.
    """

    file: str
    reason: str
    subject_id: str | None = None
    split: str | None = None


@dataclass
class Listing:
    """The cases of a data set, the names of the classes in the order of their numbers, what was left out, the name of the
    loader (None of a listing that none made), and what a user must know of the cases."""

    cases: list[Case] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    dataset: str | None = None
    warnings: list[str] = field(default_factory=list)

    def reject(self, file: str | Path, reason: str, subject_id: str | None = None, split: str | None = None) -> None:
        """Leave `file` out."""
        self.rejected.append(Rejection(str(file), reason, subject_id, split))

    def warn_of_subjects(self, table: Path) -> None:
        """Say that `table` names none, and what follows from it."""
        self.warnings.append(without_subjects(table, len({case.subject_id for case in self.cases}), "volumes"))


def list_cases(name: str, data_dir: str | Path, **options) -> Listing:
    """The cases of the data set `name` under `data_dir`; `options` are the loader's own (None: its default). Warnings are logged.

    Raises:
        InputError: unknown name, no such folder, an option the loader does not have, or nothing that can be used: no
            case at all, or none of a class.
    """
    if name not in LOADERS:
        raise InputError(f"Unknown data set {name!r}; there are {sorted(LOADERS)}.")
    if not os.path.exists(data_dir):
        raise InputError(f"{data_dir} does not exist; give the folder the data set was unpacked to.")
    scan = import_module(f".{name}", __package__).scan
    known = list(inspect.signature(scan).parameters)[1:]
    given = {option: value for option, value in options.items() if value is not None}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(f"The data set {name!r} has no option {unknown[0]!r}; it has {known}.")
    listing = scan(Path(data_dir), **given)
    listing.dataset = name
    _reject_strays(listing)
    found = [label for label in listing.classes if any(case.label == label for case in listing.cases)]
    if not found or len(found) < len(listing.classes):
        reasons = (
            f" {len(listing.rejected)} were left out, the first: {listing.rejected[0].reason}"
            if listing.rejected
            else ""
        )
        empty = [label for label in listing.classes if label not in found]
        needed = f"{empty[0]!r} has none" if empty and found else "at least one is needed"
        raise InputError(
            f"{data_dir} gives {len(found)} classes with volumes (of {listing.classes}) as {name!r}; {needed}.{reasons}"
        )
    for warning in listing.warnings:
        logger.warning("%s", warning)
    return listing


def _reject_strays(listing: Listing) -> None:
    """Leave out second volumes of one subject and session, and cases of other modalities than the first's."""
    seen, kept = {}, []
    for case in listing.cases:
        first = next(iter(case.images.values()))
        key = (case.subject_id, case.session)
        if key in seen:
            reason = f"{first}: subject {case.name!r} was already found at {seen[key]}; keep one of the two"
            listing.reject(first, reason, case.subject_id, case.split)
        elif kept and list(case.images) != list(kept[0].images):
            reason = f"{first}: the modalities are {list(case.images)}, not {list(kept[0].images)} as before"
            listing.reject(first, reason, case.subject_id, case.split)
        else:
            seen[key] = first
            kept.append(case)
    listing.cases = kept


def distinct_names(paths: Sequence[str]) -> list[str]:
    """A name for each image: its file's, without `.nii.gz` and the like, and with its folders where several files are called so. A
    file that occurs twice has one name."""
    stems = [Path(splitext_addext(path)[0]) for path in paths]  # other dots belong to it: 1.2.840.7.nii.gz
    files = defaultdict(set)
    for path, stem in zip(paths, stems, strict=True):
        files[stem.name].add(path)
    return [
        stem.name if len(files[stem.name]) == 1 else stem.as_posix().strip("/").replace("/", "_") for stem in stems
    ]


def default_subject_column(columns: Collection[str]) -> str:
    """The column of subjects where none is named: the first that there is, else `subject_id`."""
    return next((column for column in SUBJECT_COLUMNS if column in columns), SUBJECT_COLUMNS[0])


def without_subjects(table: Path, count: int, things: str) -> str:
    """The sentence that a table of `count` volumes or images names no subjects, and what follows from it."""
    return (
        f"{table.name} names no subjects, so each of its {count} {things} counts as one: if people have several, name the column of "
        "subjects by subject_column, or a split may put them on both sides."
    )


def has_classes(label_column: str | None, label_bins: LabelBins | None, may_have: bool) -> bool:
    """Whether a table's volumes have classes: unless `none` was said, if a column or bins were named, or there is what may be one."""
    return label_column != NO_CLASSES and bool(label_column or label_bins or may_have)


def class_names(values: Sequence[str | None], label_bins: LabelBins | None, column: str) -> list[str]:
    """The classes of a column: the bins in their order, or the values that occur, sorted.

    Raises:
        InputError: there are no bins, and all values are numbers, of which there are too many for classes.
    """
    if label_bins is not None:
        return list(named_bins(label_bins, column))
    names = sorted({value for value in values if value is not None})
    numbers = _numbers(names)
    count = len(numbers)
    counted = numbers in (set(range(count)), set(range(1, count + 1)))  # codes of classes, however many
    if count > MAX_NUMBERS and not counted:
        raise InputError(
            f"Column {column!r} holds {count} different numbers: give label_bins, edges such as 40 60 or {{name: [low, high], ...}}, to "
            "make classes of them."
        )
    return names


def _numbers(values: Sequence[str]) -> set[float]:
    """The different numbers that the values are; none, if any of them is no number."""
    try:
        return {float(value) for value in values}
    except ValueError:
        return set()


def named_bins(label_bins: LabelBins, column: str) -> dict[str, tuple[float | None, float | None]]:
    """`{class: (low, high)}` of bins given so, or of edges: `[40, 60]` gives three classes.

    Raises:
        InputError: a bin without two bounds, or edges that do not rise.
    """
    if isinstance(label_bins, Mapping):
        for name, bounds in label_bins.items():
            if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
                raise InputError(f"label_bins: {name!r} needs two bounds [low, high], got {bounds!r}.")
        return {str(name): tuple(_bound(bound, name) for bound in bounds) for name, bounds in label_bins.items()}
    edges = [float(edge) for edge in label_bins]
    if not edges or sorted(set(edges)) != edges:
        raise InputError(f"label_bins: edges must rise, got {label_bins!r}.")
    return {
        f"{column} under {edges[0]:g}": (None, edges[0]),
        **{f"{column} {low:g} to {high:g}": (low, high) for low, high in pairwise(edges)},
        f"{column} from {edges[-1]:g}": (edges[-1], None),
    }


def _bound(value, name) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise InputError(f"label_bins: the bounds of {name!r} must be numbers or null, got {value!r}.") from None


def class_is_given(value) -> bool:
    """Whether a cell of a table holds anything."""
    return value is not None and str(value).strip().lower() not in ("", "n/a", "na", "nan")


def class_of(value, label_bins: LabelBins | None, column: str, place: str | Path) -> str | None:
    """The class of a value that stands at `place`; None where it is empty or in no bin.

    Raises:
        InputError: a value that is no number, though there are bins.
    """
    if not class_is_given(value):
        return None
    if label_bins is None:
        return str(value).strip()
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{place}: {value!r} is no number, but label_bins asks for one.") from None
    for name, (low, high) in named_bins(label_bins, column).items():
        if (low is None or number >= low) and (high is None or number < high):
            return name
    return None
