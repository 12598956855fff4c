"""Looking through folders and tables that users hand in: no link leads in circles, nothing that is closed ends the search."""

import csv
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError
from .cases import Listing


def folders_holding(data_dir: Path, name: re.Pattern, listing: Listing, depth: int = 3) -> dict[Path, list[Path]]:
    """Folders at most `depth` below `data_dir` that hold folders of a name, with these; nothing below them is searched.

    Raises:
        InputError: `data_dir` can't be opened.
    """
    entries(data_dir)
    found, seen, level = {}, set(), [data_dir]
    for _ in range(depth + 1):
        below = []
        for folder in level:
            real = os.path.realpath(folder)
            if real in seen:  # a link back up, or to a sibling
                continue
            seen.add(real)
            inside = subfolders(folder, listing)
            named = [entry for entry in inside if name.fullmatch(entry.name)]
            if named:
                found[folder] = named
            else:
                below += inside
        level = below
    return found


def subfolders(folder: Path, listing: Listing) -> list[Path]:
    """The folders in a folder; links that lead nowhere, and a folder that can't be opened, are rejected."""
    try:
        inside = entries(folder)
    except InputError as error:
        listing.reject(folder, str(error))
        return []
    for entry in inside:
        if os.path.islink(entry) and not os.path.exists(entry):
            listing.reject(entry, f"{entry} is a link that leads nowhere or in a circle; copy what it stands for.")
    return [entry for entry in inside if os.path.isdir(entry)]


def entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without hidden files (copies from a Mac have a `._name` for every name).

    Raises:
        InputError: it can't be opened.
    """
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder} can't be opened: {error.strerror}; check its permissions.") from error


def read_table(path: Path, delimiters: str = ",;\t") -> list[dict[str, str]]:
    """The rows of a table with a header, stripped; the delimiter is the one that the header has most of.

    Raises:
        InputError: it can't be read, or a row has more cells than the header: what a cell holds was split then, and it is not
            known which.
    """
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        delimiter = max(delimiters, key=text.partition("\n")[0].count)
        reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, restval="")
        for row in reader:
            surplus = row.pop(None, [])
            if any(cell.strip() for cell in surplus) and len(row) > 1:  # of one column the delimiter may be another
                raise InputError(
                    f"{path}, line {reader.line_num} has more cells than the header; quote cells that hold {delimiter!r}."
                )
            rows.append({column.strip(): value.strip() for column, value in row.items()})
    except (OSError, csv.Error) as error:
        raise InputError(f"{path} can't be read as a table: {error}.") from error
    return rows


def image_columns(columns: Iterable[str]) -> dict[str, str]:
    """Which columns of a `metadata.csv` name the images of a volume, by modality: `file_name` (`image`) and
    `<modality>_file_name`, but for that of a segmentation."""
    names = [column for column in columns if column.endswith("_file_name") and column != "seg_file_name"]
    own = {"image": "file_name"} if "file_name" in columns else {}
    return {**own, **{name.removesuffix("_file_name"): name for name in names}}
