"""oasis1: OASIS-1, the cross-sectional one, as its discs are unpacked.

Its images are Analyze pairs, whose headers have no orientation: it is given here, from the data set's fact sheet.
"""

import os
import re
from fnmatch import fnmatch
from pathlib import Path

from ..errors import InputError
from .cases import Case, Listing
from .folders import entries, folders_holding, read_table, subfolders


# Folder within a session's, pattern of the file's name without suffix (the number of repeats is 3 or 4), axes.
KINDS = {
    "t88_masked": ("PROCESSED/MPRAGE/T88_111", "*_mpr_n*_anon_111_t88_masked_gfc", "LAS"),
    "t88": ("PROCESSED/MPRAGE/T88_111", "*_mpr_n*_anon_111_t88_gfc", "LAS"),
    "subj_111": ("PROCESSED/MPRAGE/SUBJ_111", "*_mpr_n*_anon_sbj_111", "ASL"),
    "raw": ("RAW", "*_mpr-*_anon", "ASL"),
}
SEGMENTATION = ("FSL_SEG", "*_mpr_n*_anon_111_t88_masked_gfc_fseg")
SESSION = re.compile(r"(OAS1_\d{4})_(MR\d)", re.IGNORECASE)
BLANK = ("", "n/a", "na", "nan")


def scan(
    data_dir: Path,
    kind: str = "t88_masked",
    csv: str | Path | None = None,
    include_reliability: bool = True,
) -> Listing:
    """The sessions of OASIS-1, with classes CN (CDR 0 or blank: the young were not rated) and AD (CDR above 0).

    A second session (MR2, the reliability set) has the rating of the first where its own is blank. Segmentations by
    FSL are kept for images in Talairach space.

    Args:
        data_dir: the folder of `OAS1_xxxx_MRn` folders, or up to three folders above it (`disc1` ... `disc12`).
        kind: `"t88_masked"` (Talairach space, 1 mm, brain alone), `"t88"` (with the skull), `"subj_111"` (average of the
            repeats, native space) or `"raw"` (first repeat).
        csv: the table of ratings; by default `oasis_cross-sectional*.csv` in or above `data_dir`, or two folders below.
        include_reliability: keep second sessions.

    Raises:
        InputError: unknown kind, no session folders, or no table with columns ID and CDR.
    """
    if kind not in KINDS:
        raise InputError(f"Unknown kind {kind!r} of OASIS-1 images; there are {list(KINDS)}.")
    listing = Listing(classes=["CN", "AD"])
    holders = folders_holding(data_dir, SESSION, listing)
    if not holders:
        raise InputError(
            f"{data_dir} holds nothing that looks like OASIS-1; expected disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/... as "
            "unpacked from oasis_cross-sectional_disc1.tar.gz."
        )
    table_path = _find_table(data_dir, csv)
    ratings = _read_ratings(table_path)
    for folder in (folder for sessions in holders.values() for folder in sessions):
        subject, session = SESSION.fullmatch(folder.name.upper()).groups()
        if session != "MR1" and not include_reliability:
            continue
        try:
            label = _label(ratings, subject, session, table_path)
            listing.cases.append(_case(folder, kind, label, subject, session))
        except InputError as error:
            listing.reject(folder, str(error), subject)
    return listing


def _find_table(data_dir: Path, csv: str | Path | None) -> Path:
    if csv is not None:
        for path in (Path(csv), data_dir / csv):
            if os.path.isfile(path):
                return path
        raise InputError(f"{csv} does not exist; give the path of oasis_cross-sectional.csv.")
    unnoted = Listing()  # what can't be opened was noted when sessions were searched
    below = subfolders(data_dir, unnoted)
    deeper = [folder for parent in below for folder in subfolders(parent, unnoted)]
    for folder in (data_dir, data_dir.absolute().parent, *below, *deeper):
        try:
            files = entries(folder)
        except InputError:
            continue
        for file in files:
            name = file.name.lower()
            if fnmatch(name, "oasis_cross-sectional*.csv") and "reliability" not in name and os.path.isfile(file):
                return file  # that of the second scans has no ratings
    raise InputError(
        f"{data_dir} has no oasis_cross-sectional.csv; download it from oasis-brains.org (save an .xlsx as .csv) and "
        "put it there, or name it with the option csv."
    )


def _read_ratings(path: Path) -> dict[str, str]:
    """The column CDR by the column ID."""
    rows = read_table(path)
    if not rows or not {"ID", "CDR"} <= set(rows[0]):
        raise InputError(f"{path} needs the columns ID and CDR; it has {list(rows[0]) if rows else 'no rows'}.")
    return {row["ID"].upper(): row["CDR"] for row in rows}


def _label(ratings: dict[str, str], subject: str, session: str, table_path: Path) -> str:
    own, first = (ratings.get(f"{subject}_{name}") for name in (session, "MR1"))
    if own is None and first is None:
        raise InputError(f"{table_path} has no row for {subject}_{session}; add it or drop the folder.")
    given = [value for value in (own, first) if value is not None and value.lower() not in BLANK]
    if not given:
        return "CN"
    try:
        rating = float(given[0].replace(",", "."))
    except ValueError:
        rating = -1.0
    if not 0 <= rating <= 3:
        raise InputError(f"{table_path}: {subject}_{session} has CDR {given[0]!r}, which is no number from 0 to 3.")
    return "AD" if rating > 0 else "CN"


def _case(folder: Path, kind: str, label: str, subject: str, session: str) -> Case:
    where, pattern, orientation = KINDS[kind]
    image = _image(folder / where, pattern) or _image(folder, pattern)
    if image is None:
        raise InputError(f"{folder} has no image {where}/{pattern} (.img, .nii or .nii.gz); unpack it again.")
    if not _has_analyze_header(image):
        orientation = None
    seg = _segmentation(folder, orientation) if kind.startswith("t88") else None
    return Case({"image": str(image)}, label, subject, session, seg=seg, orientation=orientation)


def _segmentation(folder: Path, orientation: str | None) -> str | None:
    """The one by FSL, if it is there, whole, and stored like the image: the orientation of a case is that of all its files."""
    try:
        seg = _image(folder / SEGMENTATION[0], SEGMENTATION[1])
        usable = seg is not None and _has_analyze_header(seg) == (orientation is not None)
    except InputError:
        return None
    return str(seg) if usable else None


def _image(folder: Path, pattern: str) -> Path | None:
    """The first image of a pattern; of a pair, the `.img`."""
    files = entries(folder) if os.path.isdir(folder) else []
    for suffix in (".img", ".nii", ".nii.gz"):
        for file in files:
            if fnmatch(file.name.lower(), pattern.lower() + suffix) and os.path.isfile(file):
                return file
    return None


def _has_analyze_header(image: Path) -> bool:
    """Whether an image is of a pair without orientation; a pair may be NIfTI too, which its header tells.

    Raises:
        InputError: a pair without header.
    """
    if image.suffix.lower() != ".img":
        return False
    header = image.with_suffix(".hdr")
    if not os.path.isfile(header):  # opening a named pipe would wait for ever
        raise InputError(f"{image} has no header {header.name} beside it; copy both.")
    try:
        with header.open("rb") as file:
            return file.read(348)[344:] != b"ni1\0"
    except OSError as error:
        raise InputError(f"{header} can't be opened: {error.strerror}; check its permissions.") from error
