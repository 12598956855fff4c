"""Trees of files in the layouts that data sets are downloaded in, made from phantoms, with their real header quirks.

Every image carries a bright cube at the right, anterior and superior, so that a test can tell where its axes went.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from msrl_diffusers.data.phantoms import FIELD_OF_VIEW, make_phantom


SIZE = 16
EDGE = FIELD_OF_VIEW / SIZE  # millimetres
SPOT_CENTER = (11, 10, 9)  # voxel [x, y, z] of a RAS array; mirrored it would be (4, 5, 6)
SPOT = tuple(slice(center - 1, center + 2) for center in SPOT_CENTER)
GRADES = ("HGG", "LGG")
BRATS_MODALITIES = ("t1", "t1ce", "t2", "flair")
BRATS2023_MODALITIES = ("t1n", "t1c", "t2w", "t2f")  # the same four
OASIS_RATINGS = {"OAS1_0001_MR1": "", "OAS1_0002_MR1": "0", "OAS1_0003_MR1": "0.5", "OAS1_0004_MR1": "1"}


@cache
def _phantom(index: int, label: int, size: int):
    return make_phantom(index, label, size)


def marked_volume(index: int, label: int, size: int = SIZE) -> np.ndarray:
    """A phantom as RAS array `[x, y, z]` of 0 to 500, with 1000 at `spot(size)`; whole numbers, so that int16 keeps
    them."""
    volume = np.rint((_phantom(index, label, size).volume[0].transpose(2, 1, 0) + 1) * 250).astype(np.float32)
    volume[spot(size)] = 1000
    return volume


def spot(size: int = SIZE) -> tuple[slice, slice, slice]:
    """Where the bright cube of a volume of `size` voxels per edge is; `SPOT` at 16, the same place at others."""
    return tuple(slice(edge.start * size // SIZE, edge.stop * size // SIZE) for edge in SPOT)


def tumor_mask(index: int, label: int) -> np.ndarray:
    """The phantom's mask as RAS array `[x, y, z]`."""
    return np.ascontiguousarray(_phantom(index, label, SIZE).tumor_mask.transpose(2, 1, 0))


def write_nifti(path: Path, volume: np.ndarray, orientation: str = "RAS") -> None:
    """A RAS array as int16 NIfTI whose axes run to `orientation`."""
    ras = nib.Nifti1Image(volume.astype(np.int16), np.diag([EDGE, EDGE, EDGE, 1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    _reoriented(ras, orientation).to_filename(path)


def write_analyze(path: Path, volume: np.ndarray, orientation: str) -> None:
    """A RAS array as OASIS-1 has it: `.hdr` and `.img` of 16-bit big-endian Analyze 7.5, 4D with one frame."""
    ras = nib.Nifti1Image(volume.astype(np.int16), np.diag([EDGE, EDGE, EDGE, 1]))
    stored = np.asarray(_reoriented(ras, orientation).dataobj)[..., None]
    image = nib.AnalyzeImage(stored.astype(">i2"), None, nib.AnalyzeHeader(endianness=">"))
    image.set_data_dtype(">i2")
    image.header.set_zooms((EDGE, EDGE, EDGE, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.to_filename(path)


def write_brats(
    folder: Path,
    per_class: int = 2,
    suffix: str = ".nii.gz",
    doubled: bool = False,
    flat: bool = False,
    nested_files: bool = False,
    modalities: Sequence[str] = BRATS_MODALITIES,
) -> Path:
    """BraTS 2019 (or 2020, `flat`), stored as it is, running to LPS; the folder that holds the grades (or cases).

    Args:
        folder: gets `MICCAI_BraTS_2019_Data_Training`.
        per_class: cases of each grade, of sites 2013 and CBICA in turn.
        suffix: of the files; Kaggle has `.nii`.
        doubled: the top folder twice, one in the other, as on Kaggle.
        flat: cases in one folder, grades in `name_mapping.csv`.
        nested_files: `x_t1.nii/x_t1.nii` instead of `x_t1.nii`, as on Kaggle.
        modalities: what every case has beside its segmentation.
    """
    top = "MICCAI_BraTS2020_TrainingData" if flat else "MICCAI_BraTS_2019_Data_Training"
    root = folder / top / top if doubled else folder / top
    rows = [["Grade", "BraTS_2017_subject_ID", "TCGA_TCIA_subject_ID", "BraTS_2020_subject_ID"]]
    for index in range(per_class):
        for label, grade in enumerate(GRADES):
            if flat:
                name = f"BraTS20_Training_{index * 2 + label + 1:03d}"
                rows.append([grade, f"Brats17_CBICA_{name[-3:]}_1", "NA", name])
                case = root / name
            else:
                name = f"BraTS19_{('2013', 'CBICA')[index % 2]}_{grade}{index}_1"
                case = root / grade / name
            for channel, modality in enumerate([*modalities, "seg"]):
                file = case / f"{name}_{modality}{suffix}"
                volume = tumor_mask(index, label) if modality == "seg" else marked_volume(index, label) + channel
                write_nifti(file / f"{name}_{modality}.nii" if nested_files else file, volume, "LPS")
    if flat:
        write_csv(root / "name_mapping.csv", rows)
    return root


def write_brats2023(folder: Path, per_class: int = 2, sessions: Sequence[str] = ("000", "001")) -> Path:
    """BraTS 2023, stored as it is, running to LPS, with the table of grades that it lacks; the folder of the cases.

    Args:
        folder: gets `ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData`.
        per_class: subjects of each grade, HGG and LGG in turn.
        sessions: time points of every subject.
    """
    root = folder / "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData"
    rows = [["Grade", "BraTS2023"]]
    for index in range(per_class):
        for label, grade in enumerate(GRADES):
            for session in sessions:
                name = f"BraTS-GLI-{index * 2 + label:05d}-{session}"
                rows.append([grade, name])
                for channel, modality in enumerate(BRATS2023_MODALITIES):
                    write_nifti(
                        root / name / f"{name}-{modality}.nii.gz", marked_volume(index, label) + channel, "LPS"
                    )
                write_nifti(root / name / f"{name}-seg.nii.gz", tumor_mask(index, label), "LPS")
    write_csv(root / "name_mapping.csv", rows)
    return root


def write_oasis(
    folder: Path,
    ratings: Mapping[str, str | None] = OASIS_RATINGS,
    disc: str = "disc1",
    suffix: str = ".img",
    repeats: int = 4,
    kinds: Sequence[str] = ("t88_masked", "t88", "subj_111", "raw", "fseg"),
) -> Path:
    """OASIS-1: discs of sessions and `oasis_cross-sectional.csv`; the table's path.

    Args:
        folder: gets the discs and the table.
        ratings: CDR of each session, as text; None leaves it out of the table.
        disc: folder of the sessions, such as `oasis_cross-sectional_disc1/disc1`, or empty.
        suffix: `.img` for Analyze pairs, or `.nii` as on Kaggle.
        repeats: the number in `mpr_n4`.
        kinds: which images are written.
    """
    rows = [["ID", "M/F", "Hand", "Age", "Educ", "SES", "MMSE", "CDR", "eTIV", "nWBV", "ASF", "Delay"]]
    for index, (session, rating) in enumerate(ratings.items()):
        volume = marked_volume(index, int(rating not in (None, "", "0")))
        stem = f"{session}_mpr_n{repeats}_anon"
        files = {
            "t88_masked": ("PROCESSED/MPRAGE/T88_111", f"{stem}_111_t88_masked_gfc", "LAS"),
            "t88": ("PROCESSED/MPRAGE/T88_111", f"{stem}_111_t88_gfc", "LAS"),
            "subj_111": ("PROCESSED/MPRAGE/SUBJ_111", f"{stem}_sbj_111", "ASL"),
            "raw": ("RAW", f"{session}_mpr-1_anon", "ASL"),
            "fseg": ("FSL_SEG", f"{stem}_111_t88_masked_gfc_fseg", "LAS"),
        }
        for kind in kinds:
            where, name, orientation = files[kind]
            write = write_analyze if suffix == ".img" else write_nifti
            write(folder / disc / session / where / f"{name}{suffix}", volume, orientation)
        if rating is not None:
            rows.append([session, "F", "R", "74", "2", "3", "29", rating, "1344", "0.743", "1.306", "N/A"])
    return write_csv(folder / "oasis_cross-sectional.csv", rows)


def write_bids(
    folder: Path,
    diagnoses: Sequence[str] = ("control", "patient", "control", "patient"),
    sessions: Sequence[str] = (),
    modalities: Sequence[str] = ("T1w",),
    prefix: str = "sub-",
) -> None:
    """A BIDS data set: `participants.tsv`, and subjects sub-01 ... with images in `anat`, stored in odd orientations."""
    rows = [["participant_id", "age", "diagnosis"]]
    for index, diagnosis in enumerate(diagnoses):
        subject = f"sub-{index + 1:02d}"
        rows.append([f"{prefix}{index + 1:02d}", str(30 + 10 * index), diagnosis])
        for session in sessions or [""]:
            for channel, modality in enumerate(modalities):
                name = "_".join(part for part in (subject, session, f"{modality}.nii.gz") if part)
                volume = marked_volume(index, index % 2) + channel
                write_nifti(folder / subject / session / "anat" / name, volume, ("RAS", "PIR")[index % 2])
    write_csv(folder / "participants.tsv", rows, "\t")


def write_nifti_folder(folder: Path) -> Path:
    """A folder of images stored in odd orientations, with their classes in `metadata.csv`; the table's path."""
    rows = [["file_name", "subject_id", "label"]]
    for index, orientation in enumerate(("RAS", "LPS", "ASL", "PIR")):
        write_nifti(folder / f"s{index}.nii.gz", marked_volume(index, index % 2), orientation)
        rows.append([f"s{index}.nii.gz", f"s{index}", "ab"[index % 2]])
    return write_csv(folder / "metadata.csv", rows)


def write_datalist(
    folder: Path,
    per_class: int = 2,
    channels: int = 1,
    labels: Sequence = ("control", "patient"),
    modality: Mapping[str, str] | None = None,
) -> Path:
    """A data list: the first of each class for testing, the others for training; its path.

    Args:
        folder: gets `dataset.json` and `imagesTr`.
        per_class: entries of each class.
        channels: images of an entry; a path for 1, a list for more.
        labels: the value of `label` for each class.
        modality: the list's names of channels.
    """
    lists = {"training": [], "validation": []}
    for index in range(per_class):
        for label, value in enumerate(labels):
            name = f"scan_{index}{label}"
            paths = [f"./imagesTr/{name}_{channel:04d}.nii.gz" for channel in range(channels)]
            for channel, path in enumerate(paths):
                write_nifti(folder / path, marked_volume(index, label) + channel, "LPS")
            entry = {"image": paths if channels > 1 else paths[0], "label": value, "subject_id": name}
            lists["training" if index else "validation"].append(entry)
    path = folder / "dataset.json"
    path.write_text(json.dumps({"name": "phantoms", **({"modality": modality} if modality else {}), **lists}))
    return path


def write_csv(path: Path, rows: Sequence[Sequence[str]], delimiter: str = ",") -> Path:
    """A table; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return path


def lock(folder: Path, monkeypatch) -> None:
    """Make a folder one that can't be opened; permissions don't do for root."""
    iterdir = Path.iterdir

    def refuse(self):
        if self == folder:
            raise PermissionError(13, "Permission denied")
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", refuse)


def _reoriented(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    now, wanted = nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nib.orientations.ornt_transform(now, wanted))


def write_marked_folder(folder):
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["file_name,subject_id,grade"]
    for index, orientation in enumerate(("RAS", "LPS", "ASL", "PIR")):
        write_nifti(folder / f"s{index}.nii.gz", marked_volume(index, index % 2), orientation)
        rows.append(f"s{index}.nii.gz,s{index},{'ab'[index % 2]}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return {"label_column": "grade"}


SOURCES = {
    "brats2019": lambda folder: write_brats(folder) and {"modality": ["t1ce", "flair"]},
    "oasis1": lambda folder: write_oasis(folder) and {},
    "oasis1 raw": lambda folder: write_oasis(folder) and {"kind": "raw"},
    "oasis1 subj_111": lambda folder: write_oasis(folder) and {"kind": "subj_111"},
    "bids": lambda folder: write_bids(folder) or {},
    "nifti_folder": write_marked_folder,
    "datalist": lambda folder: (write_datalist(folder) and {}) or {},
}


def picture(number=0, size=(20, 24), mode="RGB"):
    """An image of noise, of (width, height) `size`."""
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)
