"""bids: a data set in the Brain Imaging Data Structure, with classes from `participants.tsv` or sessions files."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .cases import Case, LabelBins, Listing, class_is_given, class_names, class_of
from .folders import entries, read_table, subfolders


def scan(
    data_dir: Path,
    label_column: str = "diagnosis",
    label_bins: LabelBins | None = None,
    modality: str | Sequence[str] = "T1w",
) -> Listing:
    """The sessions of a BIDS data set that have the wanted images in `anat`.

    Of several runs or acquisitions the first in the order of names is taken. A value in `sub-x/sub-x_sessions.tsv` goes
    before the one in `participants.tsv`, where a row with a `session_id` is of that session.

    Args:
        data_dir: folder with `participants.tsv` and `sub-*`.
        label_column: column of the classes: categories, or numbers with `label_bins`.
        label_bins: edges `[40, 60]`, or `{class name: [low, high]}` with `low <= value < high` (None is no bound);
            sessions in no bin are no part of the data set.
        modality: suffix of the images, such as T1w or FLAIR, or several, which become channels in this order.

    Raises:
        InputError: no participants.tsv, one that can't be read, no column of labels or too many numbers in it, or no modality.
    """
    modalities = [modality] if isinstance(modality, str) else list(modality)
    if not modalities:
        raise InputError("A BIDS data set needs at least one modality, such as T1w.")
    table_path = data_dir / "participants.tsv"
    participants = _read_participants(table_path)
    columns = {column for rows in participants.values() for row in rows for column in row}
    listing, values, found = Listing(), [], set()
    for folder in subfolders(data_dir, listing):
        if not folder.name.startswith("sub-"):
            continue
        found.add(folder.name)
        try:
            sessions = _read_sessions(folder)
            parts = _session_folders(folder, listing)
        except InputError as error:
            listing.reject(folder, str(error), folder.name)
            continue
        columns |= {column for row in sessions.values() for column in row}
        for part in parts:
            try:
                if folder.name not in participants:
                    raise InputError(f"{folder} is not in {table_path}; add it there or drop the folder.")
                value = sessions.get(part.name, {}).get(label_column)
                if not class_is_given(value):
                    value = _value_of(participants[folder.name], part, label_column)
                if not class_is_given(value):
                    raise InputError(f"{part}: column {label_column!r} has nothing for it.")
                label = class_of(value, label_bins, label_column, part)
                if label is None:
                    continue
                images = {name: _image(part, folder.name, name) for name in modalities}
            except InputError as error:
                listing.reject(part, str(error), folder.name)
                continue
            values.append(label)
            listing.cases.append(Case(images, label, folder.name, "" if part == folder else part.name))
    if label_column not in columns:
        raise InputError(f"{table_path} has no column {label_column!r}; it has {sorted(columns)}.")
    for name in sorted(participants.keys() - found):
        listing.reject(
            data_dir / name, f"{data_dir / name} does not exist, though {table_path} has a row for it.", name
        )
    listing.classes = class_names(values, label_bins, label_column)
    return listing


def _read_participants(table_path: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of every subject: one, but some tables have one per session."""
    if not os.path.isfile(table_path):
        raise InputError(f"{table_path.parent} has no participants.tsv; give the top folder of a BIDS data set.")
    rows = read_table(table_path, "\t")
    if not rows or "participant_id" not in rows[0]:
        raise InputError(f"{table_path} needs rows with a tab-separated column participant_id.")
    participants = defaultdict(list)
    for row in rows:
        if row["participant_id"]:
            participants[f"sub-{row['participant_id'].removeprefix('sub-')}"].append(row)
    return dict(participants)


def _value_of(rows: list[dict[str, str]], part: Path, label_column: str) -> str | None:
    """What a subject's rows say of a session's folder, or of its own: its only row, whatever session that is of; of several
    those that name this session, else those that name none, else all of them where the folder is no session's.

    Raises:
        InputError: they say different things.
    """
    told = [row for row in rows if class_is_given(row.get(label_column))]
    of_session = [row for row in told if _session_of(row) == part.name]
    of_all = [row for row in told if _session_of(row) is None or not part.name.startswith("ses-")]
    values = {row[label_column] for row in (told if len(rows) == 1 else of_session or of_all)}
    if len(values) > 1:
        raise InputError(
            f"{part}: participants.tsv has several rows for it, with {label_column!r} {sorted(map(str, values))}; keep one, or move "
            "them to the subject's sessions.tsv."
        )
    return values.pop() if values else None


def _session_of(row: dict[str, str]) -> str | None:
    """The folder of the session that a row names; None if it names none (BIDS writes n/a)."""
    name = row.get("session_id")
    return f"ses-{name.removeprefix('ses-')}" if class_is_given(name) else None


def _read_sessions(folder: Path) -> dict[str | None, dict[str, str]]:
    path = folder / f"{folder.name}_sessions.tsv"
    rows = read_table(path, "\t") if os.path.isfile(path) else []
    return {_session_of(row): row for row in rows}


def _session_folders(folder: Path, listing: Listing) -> list[Path]:
    """The folders of sessions; the subject's own where it has images itself, or no sessions."""
    sessions = [part for part in subfolders(folder, listing) if part.name.startswith("ses-")]
    return sessions if sessions and not os.path.isdir(folder / "anat") else [folder, *sessions]


def _image(part: Path, subject: str, modality: str) -> str:
    suffixes = tuple(f"_{modality}.nii{ending}" for ending in ("", ".gz"))
    files = entries(part / "anat") if os.path.isdir(part / "anat") else []
    named = [file for file in files if file.name.startswith(f"{subject}_") and file.name.endswith(suffixes)]
    if not named:
        raise InputError(f"{part} has no {modality} image, anat/{subject}_*{modality}.nii.gz.")
    if not os.path.isfile(named[0]):
        raise InputError(f"{named[0]} is no file; if it is a link of DataLad, run 'datalad get'.")
    return str(named[0])
