"""brats2019: BraTS 2019 as it is downloaded, copies of it on Kaggle, and earlier or later releases with grades."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .cases import Case, Listing
from .folders import entries, folders_holding, read_table, subfolders


MODALITIES = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}  # up to 2021, and from 2023 on
GRADES = ("HGG", "LGG")
LAYOUT = (
    "MICCAI_BraTS_2019_Data_Training/{HGG,LGG}/BraTS19_x/BraTS19_x_{t1,t1ce,t2,flair,seg}.nii.gz, or folders BraTS20_x "
    "or BraTS-GLI-x-y with name_mapping.csv beside them"
)
RELEASE_ENTRY = re.compile(r"HGG|LGG|BraTS(\d\d_.+|\d{4}_\d+|-[A-Z]+-\d+-\d+)", re.IGNORECASE)
NAME_WITH_SESSION = re.compile(r"(BraTS1[789]_.+|BraTS-[A-Z]+-\d+)[_-](\d+)", re.IGNORECASE)


def scan(data_dir: Path, modality: str | Sequence[str] = "t1ce") -> Listing:
    """The cases of a BraTS release, with classes HGG and LGG.

    Grades are the names of folders, or the column `Grade` of `name_mapping.csv` where cases lie in one folder (2020;
    for 2023 such a table has to be made). The last number of a name is the session up to 2019 and from 2023 on, not in
    between. Segmentations are kept where they exist. Folders of cases without grades, such as the validation set, are
    left out.

    Args:
        data_dir: the folder that holds `HGG` and `LGG` (or the cases), or up to three folders above it.
        modality: one of t1, t1ce, t2 and flair (t1n, t1c, t2w and t2f are taken for the same), or several, which become
            channels in this order.

    Raises:
        InputError: unknown modality, nothing that looks like BraTS, no grades, or more than one release.
    """
    modalities = _known_modalities(modality)
    listing = Listing(classes=list(GRADES))
    for folder, grade in _graded_folders(data_dir, listing):
        named = NAME_WITH_SESSION.fullmatch(folder.name)
        subject, session = named.groups() if named else (folder.name, "")
        try:
            listing.cases.append(_case(folder, grade, modalities, subject, session))
        except InputError as error:
            listing.reject(folder, str(error), subject)
    return listing


def _known_modalities(modality: str | Sequence[str]) -> list[str]:
    known = {name: earlier for earlier, later in MODALITIES.items() for name in (earlier, later)}
    names = [str(name).lower() for name in ([modality] if isinstance(modality, str) else modality)]
    if not names or not set(names) <= set(known):
        raise InputError(
            f"Unknown modality {modality!r} for BraTS; there are {list(MODALITIES)}, or {list(MODALITIES.values())}."
        )
    return [known[name] for name in names]


def _graded_folders(data_dir: Path, listing: Listing) -> list[tuple[Path, str | None]]:
    """The folders of the one release that gives grades, each with its grade (None where the table lacks it)."""
    releases = folders_holding(data_dir, RELEASE_ENTRY, listing)
    if not releases:
        raise InputError(f"{data_dir} holds nothing that looks like BraTS; expected {LAYOUT}.")
    graded = {}
    for release, inside in releases.items():
        by_grade = [folder for folder in inside if folder.name.upper() in GRADES]
        grades = (
            {}
            if by_grade
            else _read_grades([release, *(above for above in release.parents if above.is_relative_to(data_dir))])
        )
        if by_grade:
            cases = [(case, folder.name.upper()) for folder in by_grade for case in subfolders(folder, listing)]
        else:
            cases = [(folder, grades.get(folder.name.lower())) for folder in inside]
        if any(grade for _, grade in cases):
            graded[release] = cases
    if not graded:
        raise InputError(f"{next(iter(releases))} holds no cases with grades; expected {LAYOUT}.")
    if len(graded) > 1:
        raise InputError(
            f"{data_dir} holds {len(graded)} releases of BraTS, which share patients: "
            f"{', '.join(str(release) for release in graded)}; give the folder of one."
        )
    for release in (release for release in releases if release not in graded):
        listing.reject(release, f"{release}: its cases have no grades (no HGG and LGG folders, no name_mapping.csv).")
    return next(iter(graded.values()))


def _read_grades(folders: Sequence[Path]) -> dict[str, str]:
    """Grade by each name that a case has in one of the tables `name_mapping*.csv`, in lower case."""
    grades = {}
    for folder in folders:
        for path in entries(folder):
            if not re.fullmatch(r"name_mapping.*\.csv", path.name) or not os.path.isfile(path):
                continue
            for row in read_table(path):
                grade = next((value.upper() for column, value in row.items() if column.lower() == "grade"), None)
                if grade in GRADES:
                    grades |= {name.lower(): grade for name in row.values()}
    return grades


def _case(folder: Path, grade: str | None, modalities: Sequence[str], subject: str, session: str) -> Case:
    if grade is None:
        raise InputError(f"{folder}: name_mapping.csv gives no grade (HGG or LGG) for it; add it or drop the folder.")
    from_2023_on = folder.name.lower().startswith("brats-")
    files = entries(folder)
    images = {}
    for modality in modalities:
        ending = f"-{MODALITIES[modality]}" if from_2023_on else f"_{modality}"
        images[modality] = _image(files, ending)
        if images[modality] is None:
            raise InputError(
                f"{folder} has no {modality} image, {folder.name}{ending}.nii.gz; download it again or drop the folder."
            )
    return Case(images, grade, subject, session, seg=_image(files, "-seg" if from_2023_on else "_seg"))


def _image(files: Sequence[Path], ending: str) -> str | None:
    """The image with this ending of its name; on Kaggle some are folders named `.nii` that hold the file."""
    for file in files:
        if not re.search(rf"{ending}\.nii(\.gz)?$", file.name, re.IGNORECASE):
            continue
        inside = entries(file) if os.path.isdir(file) else [file]
        for image in inside:
            if image.name.lower().endswith((".nii", ".nii.gz")) and os.path.isfile(image):
                return str(image)
    return None
