"""The loaders: what lies in the trees that data sets are downloaded in, and why the rest is left out."""

import json
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from layouts import (
    BRATS_MODALITIES,
    SPOT,
    SPOT_CENTER,
    marked_volume,
    tumor_mask,
    write_bids,
    write_brats,
    write_csv,
    write_datalist,
    write_nifti,
    write_oasis,
)

from msrl_diffusers.data.cases import list_cases
from msrl_diffusers.data.reading import read_image
from msrl_diffusers.errors import InputError


def reasons(listing):
    """Each reason by the name of what was left out; sentences of one line that end."""
    for rejection in listing.rejected:
        assert "\n" not in rejection.reason
        assert rejection.reason.endswith(".")
    return {Path(rejection.file).name: rejection.reason for rejection in listing.rejected}


def labels(listing):
    return {case.name: case.label for case in listing.cases}


def ras(path, orientation=None):
    """The array `[x, y, z]` of an image, running to the right, anterior and superior."""
    return np.asarray(nib.as_closest_canonical(read_image(path, orientation)).dataobj)


def assert_spot_is_in_place(listing):
    for case in listing.cases:
        for image in case.images.values():
            data = ras(image, case.orientation)
            bright = np.argwhere(data >= 1000)
            assert len(bright) == 27
            assert tuple(bright.mean(axis=0)) == SPOT_CENTER


@pytest.fixture
def locked(monkeypatch):
    """A function that makes a folder unreadable; permissions don't do for root."""
    folders, iterdir = set(), Path.iterdir

    def refuse(self):
        if self in folders:
            raise PermissionError(13, "Permission denied")
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", refuse)
    return folders.add


# The trees themselves


def test_the_mark_is_on_one_side_only():
    volume = marked_volume(0, 0)
    assert volume.shape == (16, 16, 16)
    assert (volume[SPOT] == 1000).all()
    for axis in range(3):
        assert np.flip(volume, axis)[SPOT].max() <= 500
    assert marked_volume(0, 0, 32)[20:26, 18:24, 16:22].min() == 1000


def test_oasis_files_have_the_quirks_of_the_real_ones(tmp_path):
    write_oasis(tmp_path, {"OAS1_0001_MR1": ""}, kinds=["t88", "raw"])
    for path, codes in [
        ("PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88_gfc.hdr", "LAS"),
        ("RAW/OAS1_0001_MR1_mpr-1_anon.hdr", "LAS"),  # wrong, and all that a header without orientation can say
    ]:
        header = tmp_path / "disc1/OAS1_0001_MR1" / path
        assert header.read_bytes()[:4] == (348).to_bytes(4, "big")
        image = nib.load(header.with_suffix(".img"))
        assert image.shape == (16, 16, 16, 1)
        assert image.get_data_dtype() == ">i2"
        assert "".join(nib.aff2axcodes(image.affine)) == codes
        assert not header.with_suffix(".mat").exists()


# BraTS


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"suffix": ".nii"},
        {"doubled": True},
        {"suffix": ".nii", "nested_files": True, "doubled": True},
        {"flat": True, "suffix": ".nii"},
    ],
)
@pytest.mark.parametrize("above", [False, True])
def test_brats(tmp_path, variant, above):
    root = write_brats(tmp_path, **variant)
    listing = list_cases("brats2019", tmp_path if above else root)
    assert listing.rejected == []
    assert listing.classes == ["HGG", "LGG"]
    assert [case.label for case in listing.cases].count("HGG") == 2
    assert all(list(case.images) == ["t1ce"] and case.orientation is None for case in listing.cases)
    assert all(case.split is None for case in listing.cases)
    if variant.get("flat"):
        assert labels(listing) == {f"BraTS20_Training_{i:03d}": ("LGG", "HGG")[i % 2] for i in range(1, 5)}
        assert all(case.session == "" for case in listing.cases)
    else:
        assert {case.subject_id for case in listing.cases} == {
            "BraTS19_2013_HGG0",
            "BraTS19_CBICA_HGG1",
            "BraTS19_2013_LGG0",
            "BraTS19_CBICA_LGG1",
        }
        assert all(case.session == "1" for case in listing.cases)
    assert_spot_is_in_place(listing)


def test_brats_modalities_come_in_the_order_asked_for(tmp_path):
    write_brats(tmp_path, per_class=1)
    listing = list_cases("brats2019", tmp_path, modality=["FLAIR", "t1", "T2"])
    for case in listing.cases:
        assert list(case.images) == ["flair", "t1", "t2"]
        assert [Path(image).name.split("_")[-1] for image in case.images.values()] == [
            "flair.nii.gz",
            "t1.nii.gz",
            "t2.nii.gz",
        ]
    background = [ras(image)[0, 0, 0] for image in listing.cases[0].images.values()]
    assert background == [BRATS_MODALITIES.index(name) for name in ("flair", "t1", "t2")]


def test_brats_segmentation_is_kept_where_there_is_one(tmp_path):
    root = write_brats(tmp_path, per_class=1)
    next(root.glob("LGG/*/*_seg.nii.gz")).unlink()
    high, low = list_cases("brats2019", tmp_path).cases
    assert np.array_equal(ras(high.seg), tumor_mask(0, 0))
    assert low.seg is None


def test_brats_leaves_out_what_is_incomplete(tmp_path):
    root = write_brats(tmp_path, per_class=3)
    next((root / "HGG/BraTS19_2013_HGG0_1").glob("*_t1ce.nii.gz")).unlink()
    loop = root / "LGG/BraTS19_2013_LGG0_1/BraTS19_2013_LGG0_1_t1ce.nii.gz"
    loop.unlink()
    loop.symlink_to(loop)
    (root / "LGG/BraTS19_TCIA_9_1").symlink_to(root / "LGG/BraTS19_TCIA_9_1")
    (root / "survival_data.csv").write_text("BraTS19ID,Age\n")
    (root / "HGG/._BraTS19_CBICA_HGG1_1").mkdir()
    listing = list_cases("brats2019", tmp_path)
    assert len(listing.cases) == 4
    assert reasons(listing) == {
        "BraTS19_2013_HGG0_1": f"{root}/HGG/BraTS19_2013_HGG0_1 has no t1ce image, "
        "BraTS19_2013_HGG0_1_t1ce.nii.gz; download it again or drop the folder.",
        "BraTS19_2013_LGG0_1": f"{root}/LGG/BraTS19_2013_LGG0_1 has no t1ce image, "
        "BraTS19_2013_LGG0_1_t1ce.nii.gz; download it again or drop the folder.",
        "BraTS19_TCIA_9_1": f"{root}/LGG/BraTS19_TCIA_9_1 is a link that leads nowhere or in a circle; copy what it "
        "stands for.",
    }


def test_brats_grade_that_the_table_lacks(tmp_path):
    root = write_brats(tmp_path, flat=True)
    table = root / "name_mapping.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"LGG,Brats17_CBICA_002", b"?,Ren\xe9"))
    listing = list_cases("brats2019", tmp_path)
    assert list(labels(listing)) == ["BraTS20_Training_001", "BraTS20_Training_003", "BraTS20_Training_004"]
    assert "name_mapping.csv gives no grade (HGG or LGG) for it" in reasons(listing)["BraTS20_Training_002"]


def test_brats_table_of_grades_may_lie_above(tmp_path):
    root = write_brats(tmp_path, flat=True)
    (root / "name_mapping.csv").rename(tmp_path / "name_mapping.csv")
    assert len(list_cases("brats2019", tmp_path).cases) == 4
    with pytest.raises(InputError, match="holds no cases with grades; expected MICCAI_BraTS"):
        list_cases("brats2019", root)


def test_brats_validation_set_beside_is_left_out(tmp_path):
    write_brats(tmp_path)
    write_nifti(
        tmp_path / "MICCAI_BraTS_2019_Data_Validation/BraTS19_x_1/BraTS19_x_1_t1ce.nii.gz", marked_volume(0, 0)
    )
    listing = list_cases("brats2019", tmp_path)
    assert len(listing.cases) == 4
    assert "its cases have no grades" in reasons(listing)["MICCAI_BraTS_2019_Data_Validation"]


def test_brats_releases_share_patients(tmp_path):
    write_brats(tmp_path, per_class=1)
    write_brats(tmp_path, per_class=1, flat=True)
    with pytest.raises(InputError, match="holds 2 releases of BraTS, which share patients"):
        list_cases("brats2019", tmp_path)


def test_brats_behind_links_that_lead_back(tmp_path):
    root = write_brats(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path)
    (root.parent / "same").symlink_to(root)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    listing = list_cases("brats2019", tmp_path)
    assert len(listing.cases) == 4
    assert list(reasons(listing)) == ["circle"]


def test_brats_folders_that_cannot_be_opened(tmp_path, locked):
    root = write_brats(tmp_path)
    locked(root / "HGG/BraTS19_2013_HGG0_1")
    listing = list_cases("brats2019", root)
    assert len(listing.cases) == 3
    assert reasons(listing) == {
        "BraTS19_2013_HGG0_1": f"{root}/HGG/BraTS19_2013_HGG0_1 can't be opened: Permission denied; check its "
        "permissions."
    }
    locked(root / "LGG")
    with pytest.raises(InputError, match=r"gives 1 classes .* the first: .*LGG can't be opened: Permission denied"):
        list_cases("brats2019", root)
    locked(root)
    with pytest.raises(InputError, match="Training can't be opened: Permission denied; check its permissions"):
        list_cases("brats2019", root)


def test_brats_input_errors(tmp_path):
    with pytest.raises(
        InputError, match=r"Unknown modality 'T1w' for BraTS; there are \['t1', 't1ce', 't2', 'flair'\]"
    ):
        list_cases("brats2019", tmp_path, modality="T1w")
    with pytest.raises(InputError, match=r"Unknown modality \[\]"):
        list_cases("brats2019", tmp_path, modality=[])
    with pytest.raises(
        InputError, match=r"nothing that looks like BraTS; expected MICCAI_BraTS_2019_Data_Training/\{HG"
    ):
        list_cases("brats2019", tmp_path)


# OASIS-1


@pytest.mark.parametrize("disc", ["disc1", "oasis_cross-sectional_disc1/disc1", ""])
@pytest.mark.parametrize(
    ("kind", "orientation", "ending"),
    [
        ("t88_masked", "LAS", "PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc.img"),
        ("t88", "LAS", "PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88_gfc.img"),
        ("subj_111", "ASL", "PROCESSED/MPRAGE/SUBJ_111/OAS1_0001_MR1_mpr_n4_anon_sbj_111.img"),
        ("raw", "ASL", "RAW/OAS1_0001_MR1_mpr-1_anon.img"),
    ],
)
def test_oasis(tmp_path, disc, kind, orientation, ending):
    write_oasis(tmp_path, disc=disc)
    listing = list_cases("oasis1", tmp_path, kind=kind)
    assert listing.rejected == []
    assert listing.classes == ["CN", "AD"]
    assert labels(listing) == {
        "OAS1_0001_MR1": "CN",
        "OAS1_0002_MR1": "CN",
        "OAS1_0003_MR1": "AD",
        "OAS1_0004_MR1": "AD",
    }
    assert listing.cases[0].images == {"image": str(tmp_path / disc / "OAS1_0001_MR1" / ending)}
    assert {case.orientation for case in listing.cases} == {orientation}
    assert all((case.seg is not None) == kind.startswith("t88") for case in listing.cases)
    assert_spot_is_in_place(listing)


def test_oasis_copies_as_nifti_have_headers_to_trust(tmp_path):
    write_oasis(tmp_path, suffix=".nii", repeats=3)
    for kind in ("t88_masked", "raw"):
        listing = list_cases("oasis1", tmp_path, kind=kind)
        assert len(listing.cases) == 4
        assert {case.orientation for case in listing.cases} == {None}
        assert_spot_is_in_place(listing)


def test_oasis_nifti_pairs_have_headers_to_trust(tmp_path):
    write_oasis(tmp_path, kinds=["raw"])
    image = nib.Nifti1Image(marked_volume(0, 0), np.diag([12.0, 12.0, 12.0, 1.0]))
    nib.Nifti1Pair.from_image(image).to_filename(tmp_path / "disc1/OAS1_0001_MR1/RAW/OAS1_0001_MR1_mpr-1_anon.img")
    listing = list_cases("oasis1", tmp_path, kind="raw")
    assert [case.orientation for case in listing.cases] == [None, "ASL", "ASL", "ASL"]
    assert_spot_is_in_place(listing)


def test_oasis_files_without_their_folders(tmp_path):
    write_oasis(tmp_path, kinds=["t88_masked"])
    for file in tmp_path.glob("disc1/*/PROCESSED/MPRAGE/T88_111/*"):
        file.rename(file.parents[3] / file.name)
    assert len(list_cases("oasis1", tmp_path).cases) == 4


def test_oasis_reliability_scans_stay_with_their_subject(tmp_path):
    ratings = {
        "OAS1_0001_MR1": "",
        "OAS1_0001_MR2": "",
        "OAS1_0002_MR1": "0.5",
        "OAS1_0002_MR2": "",
        "OAS1_0003_MR1": "0",
        "OAS1_0003_MR2": None,
        "OAS1_0004_MR1": "0",
        "OAS1_0004_MR2": "1",
    }
    write_oasis(tmp_path, ratings, kinds=["t88_masked"])
    listing = list_cases("oasis1", tmp_path)
    assert labels(listing) == {
        "OAS1_0001_MR1": "CN",
        "OAS1_0001_MR2": "CN",
        "OAS1_0002_MR1": "AD",
        "OAS1_0002_MR2": "AD",
        "OAS1_0003_MR1": "CN",
        "OAS1_0003_MR2": "CN",
        "OAS1_0004_MR1": "CN",
        "OAS1_0004_MR2": "AD",
    }
    assert [(case.subject_id, case.session) for case in listing.cases[:2]] == [
        ("OAS1_0001", "MR1"),
        ("OAS1_0001", "MR2"),
    ]
    firsts = list_cases("oasis1", tmp_path, include_reliability=False)
    assert list(labels(firsts)) == [name for name in ratings if name.endswith("MR1")]
    assert firsts.rejected == []


def test_oasis_leaves_out_what_is_incomplete(tmp_path, locked):
    ratings = {f"OAS1_{i:04d}_MR1": ("0", "1")[i % 2] for i in range(1, 7)}
    write_oasis(tmp_path, {**ratings, "OAS1_0007_MR1": None, "OAS1_0008_MR1": "99"}, kinds=["t88_masked", "fseg"])
    disc = tmp_path / "disc1"
    next(disc.glob("OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/*.hdr")).unlink()
    next(disc.glob("OAS1_0002_MR1/PROCESSED/MPRAGE/T88_111/*.img")).unlink()
    next(disc.glob("OAS1_0003_MR1/FSL_SEG/*.hdr")).unlink()
    pipe = next(disc.glob("OAS1_0005_MR1/FSL_SEG/*.hdr"))
    pipe.unlink()
    os.mkfifo(pipe)
    locked(disc / "OAS1_0004_MR1/PROCESSED/MPRAGE/T88_111")
    (disc / "OAS1_0009_MR1").symlink_to(disc / "OAS1_0009_MR1")
    listing = list_cases("oasis1", tmp_path)
    assert list(labels(listing)) == ["OAS1_0003_MR1", "OAS1_0005_MR1", "OAS1_0006_MR1"]
    assert [case.seg is None for case in listing.cases] == [True, True, False]
    where = "PROCESSED/MPRAGE/T88_111"
    name = "OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc"
    assert reasons(listing) == {
        "OAS1_0001_MR1": f"{disc}/OAS1_0001_MR1/{where}/{name}.img has no header {name}.hdr beside it; copy both.",
        "OAS1_0002_MR1": f"{disc}/OAS1_0002_MR1 has no image {where}/*_mpr_n*_anon_111_t88_masked_gfc (.img, .nii or "
        ".nii.gz); unpack it again.",
        "OAS1_0004_MR1": f"{disc}/OAS1_0004_MR1/{where} can't be opened: Permission denied; check its permissions.",
        "OAS1_0007_MR1": f"{tmp_path}/oasis_cross-sectional.csv has no row for OAS1_0007_MR1; add it or drop the folder.",
        "OAS1_0008_MR1": f"{tmp_path}/oasis_cross-sectional.csv: OAS1_0008_MR1 has CDR '99', which is no number from 0 "
        "to 3.",
        "OAS1_0009_MR1": f"{disc}/OAS1_0009_MR1 is a link that leads nowhere or in a circle; copy what it stands for.",
    }


def test_oasis_unpacked_twice(tmp_path):
    write_oasis(tmp_path, kinds=["t88_masked"])
    write_oasis(tmp_path, {"OAS1_0001_MR1": "1"}, disc="copy/disc1", kinds=["t88_masked"])
    write_oasis(tmp_path)
    listing = list_cases("oasis1", tmp_path)
    assert len(listing.cases) == 4
    assert "subject 'OAS1_0001_MR1' was already found" in listing.rejected[0].reason


@pytest.mark.parametrize("place", ["../oasis_cross-sectional.csv", "disc1/OASIS_Cross-Sectional-5708aa0a98d82080.csv"])
def test_oasis_table_is_found(tmp_path, place):
    data = tmp_path / "data"
    table = write_oasis(data, kinds=["t88_masked"])
    table.rename(data / place)
    assert len(list_cases("oasis1", data).cases) == 4


def test_oasis_table_can_be_named(tmp_path, monkeypatch):
    data = tmp_path / "data"
    table = write_oasis(data, kinds=["t88_masked"])
    table.rename(data / "ratings.csv")
    with pytest.raises(InputError, match=r"data has no oasis_cross-sectional\.csv; download it from oasis-brains"):
        list_cases("oasis1", data)
    for named in (data / "ratings.csv", "ratings.csv"):
        assert len(list_cases("oasis1", data, csv=named).cases) == 4
    monkeypatch.chdir(data / "disc1")
    assert len(list_cases("oasis1", ".", csv="../ratings.csv").cases) == 4
    with pytest.raises(InputError, match=r"gone\.csv does not exist"):
        list_cases("oasis1", data, csv="gone.csv")


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfID,Name,CDR\r\nOAS1_0001_MR1,x,\r\nOAS1_0003_MR1,x,0.5\r\n",
        b"ID,Name,CDR\nOAS1_0001_MR1,Andr\xe9,0\nOAS1_0003_MR1,Zo\xeb,0.5\n",
        b"ID;Name;CDR\nOAS1_0001_MR1;x;0\nOAS1_0003_MR1;x;0,5\n",
        b' ID , Name , CDR \noas1_0001_mr1,"a, b",N/A\nOAS1_0003_MR1,x, 0.5 ,more\n\n',
    ],
)
def test_oasis_table_as_programs_write_it(tmp_path, content):
    write_oasis(tmp_path, {"OAS1_0001_MR1": "", "OAS1_0003_MR1": ""}, kinds=["t88_masked"]).write_bytes(content)
    assert labels(list_cases("oasis1", tmp_path)) == {"OAS1_0001_MR1": "CN", "OAS1_0003_MR1": "AD"}


def test_oasis_input_errors(tmp_path):
    with pytest.raises(InputError, match=r"Unknown kind 'T88'.*\['t88_masked', 't88', 'subj_111', 'raw'\]"):
        list_cases("oasis1", tmp_path, kind="T88")
    with pytest.raises(InputError, match="nothing that looks like OASIS-1; expected disc1/OAS1_0001_MR1/PROCESSED"):
        list_cases("oasis1", tmp_path)
    table = write_oasis(tmp_path, kinds=["t88_masked"])
    table.write_text("Subject,CDR\nOAS1_0001_MR1,0\n")
    with pytest.raises(InputError, match=r"needs the columns ID and CDR; it has \['Subject', 'CDR'\]"):
        list_cases("oasis1", tmp_path)
    table.write_text("")
    with pytest.raises(InputError, match="needs the columns ID and CDR; it has no rows"):
        list_cases("oasis1", tmp_path)


# BIDS


@pytest.mark.parametrize("prefix", ["sub-", ""])
def test_bids(tmp_path, prefix):
    write_bids(tmp_path, prefix=prefix)
    (tmp_path / "derivatives").mkdir()
    listing = list_cases("bids", tmp_path)
    assert listing.rejected == []
    assert listing.classes == ["control", "patient"]
    assert labels(listing) == {"sub-01": "control", "sub-02": "patient", "sub-03": "control", "sub-04": "patient"}
    assert all(case.session == "" and case.split is None for case in listing.cases)
    assert all(list(case.images) == ["T1w"] for case in listing.cases)
    assert_spot_is_in_place(listing)


def test_bids_sessions_and_modalities(tmp_path):
    write_bids(tmp_path, sessions=["ses-1", "ses-2"], modalities=["T1w", "FLAIR"])
    listing = list_cases("bids", tmp_path, modality=["FLAIR", "T1w"])
    assert len(listing.cases) == 8
    assert [(case.subject_id, case.session) for case in listing.cases[:2]] == [
        ("sub-01", "ses-1"),
        ("sub-01", "ses-2"),
    ]
    first = listing.cases[0].images
    assert list(first) == ["FLAIR", "T1w"]
    assert first["FLAIR"].endswith("sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz")


def test_bids_takes_the_first_of_several_runs(tmp_path):
    write_bids(tmp_path, diagnoses=["a", "b"])
    anat = tmp_path / "sub-01/anat"
    (anat / "sub-01_T1w.nii.gz").rename(anat / "sub-01_run-2_T1w.nii.gz")
    for name in ("sub-01_run-1_T1w.nii", "sub-01_run-1_T1w.json", "sub-01_run-1_notT1w.nii", "other_T1w.nii"):
        (anat / name).touch()
    assert list_cases("bids", tmp_path).cases[0].images == {"T1w": str(anat / "sub-01_run-1_T1w.nii")}


def test_bids_ages_in_bins(tmp_path):
    write_bids(tmp_path)  # 30, 40, 50, 60
    listing = list_cases("bids", tmp_path, label_column="age", label_bins=[35, 55])
    assert listing.classes == ["age under 35", "age 35 to 55", "age from 55"]
    assert [case.label for case in listing.cases] == ["age under 35", "age 35 to 55", "age 35 to 55", "age from 55"]
    some = list_cases("bids", tmp_path, label_column="age", label_bins={"young": [None, 35], "old": [55, None]})
    assert labels(some) == {"sub-01": "young", "sub-04": "old"}
    assert some.rejected == []
    text = tmp_path / "participants.tsv"
    text.write_text(text.read_text().replace("\t40\t", "\tforty\t"))
    odd = list_cases("bids", tmp_path, label_column="age", label_bins=[35, 55])
    assert reasons(odd) == {"sub-02": f"{tmp_path}/sub-02: 'forty' is no number, but label_bins asks for one."}


def test_bids_labels_of_sessions(tmp_path):
    write_bids(tmp_path, diagnoses=["n/a", "b", "n/a"], sessions=["ses-1", "ses-2"])
    write_csv(
        tmp_path / "sub-01/sub-01_sessions.tsv", [["session_id", "diagnosis"], ["ses-1", "a"], ["ses-2", "b"]], "\t"
    )
    write_csv(tmp_path / "sub-02/sub-02_sessions.tsv", [["session_id", "diagnosis"], ["2", "n/a"]], "\t")
    listing = list_cases("bids", tmp_path)
    assert labels(listing) == {"sub-01_ses-1": "a", "sub-01_ses-2": "b", "sub-02_ses-1": "b", "sub-02_ses-2": "b"}
    assert reasons(listing) == {
        name: f"{tmp_path}/sub-03/{name}: column 'diagnosis' is empty for it." for name in ("ses-1", "ses-2")
    }


def test_bids_labels_in_sessions_files_only(tmp_path):
    write_bids(tmp_path, diagnoses=["?", "?"], sessions=["ses-1"])
    write_csv(tmp_path / "participants.tsv", [["participant_id"], ["sub-01"], ["sub-02"]], "\t")
    for name, stage in [("sub-01", "a"), ("sub-02", "b")]:
        write_csv(tmp_path / name / f"{name}_sessions.tsv", [["session_id", "stage"], ["ses-1", stage]], "\t")
    assert labels(list_cases("bids", tmp_path, label_column="stage")) == {"sub-01_ses-1": "a", "sub-02_ses-1": "b"}


def test_bids_leaves_out_what_is_incomplete(tmp_path, locked):
    write_bids(tmp_path, diagnoses=["a", "b", "a", "n/a", "b", "a", "b"])
    table = tmp_path / "participants.tsv"
    table.write_text(table.read_text().replace("sub-03\t", "sub-33\t"))
    (tmp_path / "sub-02/anat/sub-02_T1w.nii.gz").unlink()
    annexed = tmp_path / "sub-05/anat/sub-05_T1w.nii.gz"
    annexed.unlink()
    annexed.symlink_to("../../.git/annex/objects/gone")
    locked(tmp_path / "sub-06/anat")
    (tmp_path / "sub-08").symlink_to(tmp_path / "sub-08")
    listing = list_cases("bids", tmp_path)
    assert labels(listing) == {"sub-01": "a", "sub-07": "b"}
    assert reasons(listing) == {
        "sub-02": f"{tmp_path}/sub-02 has no T1w image, anat/sub-02_*T1w.nii.gz.",
        "sub-03": f"{tmp_path}/sub-03 is not in {table}; add it there or drop the folder.",
        "sub-04": f"{tmp_path}/sub-04: column 'diagnosis' is empty for it.",
        "sub-05": f"{annexed} is no file; if it is a link of DataLad, run 'datalad get'.",
        "sub-06": f"{tmp_path}/sub-06/anat can't be opened: Permission denied; check its permissions.",
        "sub-08": f"{tmp_path}/sub-08 is a link that leads nowhere or in a circle; copy what it stands for.",
        "sub-33": f"{tmp_path}/sub-33 does not exist, though {table} has a row for it.",
    }


def test_bids_tables_as_programs_write_them(tmp_path):
    write_bids(tmp_path, diagnoses=["a", "b"])
    (tmp_path / "participants.tsv").write_bytes(
        b"\xef\xbb\xbfparticipant_id\tname, of sorts\tdiagnosis\r\nsub-01\tAndr\xe9\ta\r\nsub-02\tx\tb\r\n"
    )
    assert labels(list_cases("bids", tmp_path)) == {"sub-01": "a", "sub-02": "b"}


def test_bids_input_errors(tmp_path):
    with pytest.raises(InputError, match=r"has no participants\.tsv; give the top folder of a BIDS data set"):
        list_cases("bids", tmp_path)
    write_bids(tmp_path)
    with pytest.raises(InputError, match=r"has no column 'stage'; it has \['age', 'diagnosis', 'participant_id'\]"):
        list_cases("bids", tmp_path, label_column="stage")
    with pytest.raises(InputError, match="needs at least one modality"):
        list_cases("bids", tmp_path, modality=[])
    with pytest.raises(InputError, match="edges must rise"):
        list_cases("bids", tmp_path, label_column="age", label_bins=[2, 1])
    (tmp_path / "participants.tsv").write_text("participant_id,diagnosis\nsub-01,a\n")
    with pytest.raises(InputError, match="needs rows with a tab-separated column participant_id"):
        list_cases("bids", tmp_path)


# Data lists


@pytest.mark.parametrize("as_file", [False, True])
def test_datalist(tmp_path, as_file):
    path = write_datalist(tmp_path)
    listing = list_cases("datalist", path if as_file else tmp_path)
    assert listing.rejected == []
    assert listing.classes == ["control", "patient"]
    assert [(case.name, case.label, case.split) for case in listing.cases] == [
        ("scan_10", "control", "train"),
        ("scan_11", "patient", "train"),
        ("scan_00", "control", "heldout"),
        ("scan_01", "patient", "heldout"),
    ]
    assert list(listing.cases[0].images) == ["image"]
    assert_spot_is_in_place(listing)


@pytest.mark.parametrize(
    ("modality", "names"),
    [
        (None, ["channel0", "channel1"]),
        ({"0": "T1"}, ["T1", "channel1"]),
        ({"0": "FLAIR", "1": "T1w"}, ["FLAIR", "T1w"]),
        (["MRI"], ["channel0", "channel1"]),
    ],
)
def test_datalist_channels(tmp_path, modality, names):
    write_datalist(tmp_path, channels=2, modality=modality)
    for case in list_cases("datalist", tmp_path).cases:
        assert list(case.images) == names
        assert [Path(image).name[-11:] for image in case.images.values()] == ["0000.nii.gz", "0001.nii.gz"]


def write_entries(path, **lists):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(lists))
    return path


def test_datalist_of_the_decathlon(tmp_path):
    images = [tmp_path / f"imagesTr/BRATS_{i:03d}.nii.gz" for i in range(3)]
    for image in [*images, tmp_path / "labelsTr/BRATS_000.nii.gz"]:
        image.parent.mkdir(exist_ok=True)
        image.touch()
    entries = [
        {"image": f"./imagesTr/{image.name}", "label": f"./labelsTr/{image.name}", "grade": grade}
        for image, grade in zip(images, (0, 1.5, 4), strict=True)
    ]
    write_entries(tmp_path / "dataset.json", training=entries, test=["./imagesTs/BRATS_004.nii.gz"])
    listing = list_cases("datalist", tmp_path, label_column="grade", label_bins={"low": [0, 1], "high": [1, 4]})
    assert labels(listing) == {"BRATS_000": "low", "BRATS_001": "high"}
    assert [case.seg for case in listing.cases] == [str(tmp_path / "labelsTr/BRATS_000.nii.gz"), None]
    place = f"{tmp_path}/dataset.json, test[0]"
    assert [(rejection.file, rejection.reason) for rejection in listing.rejected] == [
        (place, f"{place} has no 'grade': it is './imagesTs/BRATS_004.nii.gz', not an object with keys.")
    ]
    with pytest.raises(InputError, match=r"'label' is a segmentation, .*; name the key of classes as label_column"):
        list_cases("datalist", tmp_path)


def test_datalist_subjects_sessions_and_paths(tmp_path):
    image = tmp_path / "elsewhere/one.nii"
    image.parent.mkdir()
    image.touch()
    (tmp_path / "elsewhere/two.nii.gz").touch()
    path = write_entries(
        tmp_path / "lists/folds.json",
        training=[
            {"image": str(image), "label": 0, "patient": 7, "session": 1},
            {"image": "../elsewhere/two.nii.gz", "label": 1, "patient": 7, "session": 2},
            {"image": "../elsewhere/one.nii", "label": 1},
        ],
    )
    listing = list_cases("datalist", path.parent, subject_column="patient")
    assert [(case.subject_id, case.session) for case in listing.cases] == [("7", "1"), ("7", "2"), ("one", "")]
    assert listing.cases[0].images == {"image": str(image)}
    assert listing.classes == ["0", "1"]


def test_datalist_leaves_out_what_is_incomplete(tmp_path):
    path = write_datalist(tmp_path)
    content = json.loads(path.read_text())
    good = content["training"][0]
    loop = tmp_path / "loop.nii"
    loop.symlink_to(loop)
    content["testing"] = [
        {**good, "image": "gone.nii.gz"},
        {**good, "image": "loop.nii"},
        {**good, "image": "nul\0.nii"},
        {**good, "image": 5},
        {**good, "image": []},
        {**good, "image": [good["image"], 5]},
        {"label": "control"},
        {**good, "label": None},
        {**good, "label": " "},
        {**good, "label": [0, 1]},
        good,
        None,
    ]
    path.write_text(json.dumps(content))
    listing = list_cases("datalist", tmp_path)
    assert len(listing.cases) == 4
    expected = [
        f"{path}, testing[0]: {tmp_path}/gone.nii.gz is missing.",
        f"{path}, testing[1]: {tmp_path}/loop.nii is missing.",
        f"{path}, testing[2]: {tmp_path}/nul\0.nii is missing.",
        f"{path}, testing[3]: 'image' must be a path or a list of paths, it is 5.",
        f"{path}, testing[4]: 'image' must be a path or a list of paths, it is [].",
        f"{path}, testing[5]: 'image' must be a path or a list of paths, it is ['{good['image']}', 5].",
        f"{path}, testing[6]: 'image' must be a path or a list of paths, it is None.",
        f"{path}, testing[7] has no 'label'.",
        f"{path}, testing[8] has no 'label'.",
        f"{path}, testing[9]: 'label' must be one value, it is [0, 1].",
        f"{path}, testing[11] has no 'label': it is None, not an object with keys.",
        f"{tmp_path}/imagesTr/scan_10_0000.nii.gz: subject 'scan_10' was already found at "
        f"{tmp_path}/imagesTr/scan_10_0000.nii.gz; keep one of the two",
    ]
    assert [rejection.reason for rejection in listing.rejected] == expected


def test_datalist_two_images_of_one_name(tmp_path):
    write_datalist(tmp_path, channels=2, modality={"0": "MRI", "1": "MRI"})
    with pytest.raises(InputError, match=r"two images have the same name in 'modality', \['MRI', 'MRI'\]"):
        list_cases("datalist", tmp_path)


def test_datalist_text_in_bins(tmp_path):
    write_datalist(tmp_path, labels=[1, "two"])
    with pytest.raises(InputError, match=r"training\[1\]: 'two' is no number, but label_bins asks for one"):
        list_cases("datalist", tmp_path, label_bins=[1.5])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{not json", "can't be read as JSON: Expecting property name"),
        (b"[" * 200_000, "can't be read as JSON: "),
        (b"[]", "is no data list; it needs an object with one or more of the keys ['training', 'validation', 'test'"),
        (b'{"images": []}', "is no data list"),
        (b'{"training": {"image": "x"}}', "'training' must be a list of entries"),
        (b'\xef\xbb\xbf{"name": "Andr\xe9", "training": []}', "gives 0 classes with volumes (of [])"),
    ],
)
def test_datalist_files_that_are_none(tmp_path, content, sentence):
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(sentence)):
        list_cases("datalist", tmp_path)


def test_datalist_is_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"has 0 JSON files and no dataset\.json; give the path of the data list"):
        list_cases("datalist", tmp_path)
    write_datalist(tmp_path).rename(tmp_path / "a.json")
    (tmp_path / "._a.json").touch()
    assert len(list_cases("datalist", tmp_path).cases) == 4
    (tmp_path / "b.json").touch()
    with pytest.raises(InputError, match=r"has 2 JSON files and no dataset\.json"):
        list_cases("datalist", tmp_path)
    os.replace(tmp_path / "a.json", tmp_path / "dataset.json")
    assert len(list_cases("datalist", tmp_path).cases) == 4
