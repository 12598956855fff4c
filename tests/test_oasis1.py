"""oasis1: discs, copies and tables of ratings, with the axes that no header tells, and why the rest is left out."""

import os

import nibabel as nib
import numpy as np
import pytest
from layouts import lock, marked_volume, write_oasis
from listings import assert_spot_is_in_place, labels, reasons

from msrl_diffusers.data.cases import list_cases
from msrl_diffusers.errors import InputError


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


def test_oasis_leaves_out_what_is_incomplete(tmp_path, monkeypatch):
    ratings = {f"OAS1_{i:04d}_MR1": ("0", "1")[i % 2] for i in range(1, 7)}
    write_oasis(tmp_path, {**ratings, "OAS1_0007_MR1": None, "OAS1_0008_MR1": "99"}, kinds=["t88_masked", "fseg"])
    disc = tmp_path / "disc1"
    next(disc.glob("OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/*.hdr")).unlink()
    next(disc.glob("OAS1_0002_MR1/PROCESSED/MPRAGE/T88_111/*.img")).unlink()
    next(disc.glob("OAS1_0003_MR1/FSL_SEG/*.hdr")).unlink()
    pipe = next(disc.glob("OAS1_0005_MR1/FSL_SEG/*.hdr"))
    pipe.unlink()
    os.mkfifo(pipe)
    lock(disc / "OAS1_0004_MR1/PROCESSED/MPRAGE/T88_111", monkeypatch)
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
    (data / "oasis_cross-sectional-reliability.csv").write_text("ID,Delay\nOAS1_0001_MR2,3\n")  # of the same download
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
        b' ID , Name , CDR \noas1_0001_mr1,"a, b",N/A\nOAS1_0003_MR1,x, 0.5 , ,\n\n',
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
