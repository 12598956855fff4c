"""brats2019: the releases and their copies, grades from folders or a table, and why the rest is left out."""

from pathlib import Path

import numpy as np
import pytest
from layouts import BRATS_MODALITIES, lock, marked_volume, tumor_mask, write_brats, write_brats2023, write_nifti
from listings import assert_spot_is_in_place, labels, ras, reasons

from msrl_diffusers.data.cases import list_cases
from msrl_diffusers.data.splits import SplitPlan
from msrl_diffusers.errors import InputError


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


def test_brats_folders_that_cannot_be_opened(tmp_path, monkeypatch):
    root = write_brats(tmp_path)
    lock(root / "HGG/BraTS19_2013_HGG0_1", monkeypatch)
    listing = list_cases("brats2019", root)
    assert len(listing.cases) == 3
    assert reasons(listing) == {
        "BraTS19_2013_HGG0_1": f"{root}/HGG/BraTS19_2013_HGG0_1 can't be opened: Permission denied; check its "
        "permissions."
    }
    lock(root / "LGG", monkeypatch)
    with pytest.raises(InputError, match=r"gives 1 classes .* the first: .*LGG can't be opened: Permission denied"):
        list_cases("brats2019", root)
    lock(root, monkeypatch)
    with pytest.raises(InputError, match="Training can't be opened: Permission denied; check its permissions"):
        list_cases("brats2019", root)


def test_brats_2023(tmp_path):
    root = write_brats2023(tmp_path)
    listing = list_cases("brats2019", tmp_path)
    assert listing.rejected == []
    assert labels(listing) == {
        f"BraTS-GLI-{number:05d}_{session}": ("HGG", "LGG")[number % 2]
        for number in range(4)
        for session in ("000", "001")
    }
    first = listing.cases[0]
    name = "BraTS-GLI-00000-000"
    assert (first.subject_id, first.session) == ("BraTS-GLI-00000", "000")
    assert first.images == {"t1ce": str(root / name / f"{name}-t1c.nii.gz")}
    assert np.array_equal(ras(first.seg), tumor_mask(0, 0))
    assert_spot_is_in_place(listing)


@pytest.mark.parametrize("write", [write_brats, write_brats2023])
@pytest.mark.parametrize(
    "modality",
    [["flair", "t1", "t2", "t1ce"], ["T2F", "t1n", "t2w", "t1c"], ["flair", "t1n", "T2", "t1c"]],
)
def test_brats_modalities_have_two_names(tmp_path, write, modality):
    write(tmp_path, per_class=1)
    for case in list_cases("brats2019", tmp_path, modality=modality).cases:
        assert list(case.images) == ["flair", "t1", "t2", "t1ce"]
        background = [ras(image)[0, 0, 0] for image in case.images.values()]
        assert background == [BRATS_MODALITIES.index(name) for name in case.images]


def test_brats_2023_time_points_stay_on_one_side(tmp_path):
    write_brats2023(tmp_path, per_class=4, sessions=["000", "001", "002"])
    cases = list_cases("brats2019", tmp_path).cases
    sides = SplitPlan(0.5).sides([case.subject_id for case in cases], [case.label for case in cases], [None] * 24)
    by_subject = {}
    for case, side in zip(cases, sides, strict=True):
        by_subject.setdefault(case.subject_id, []).append(side)
    assert sorted(by_subject.values()) == [["heldout"] * 3] * 4 + [["train"] * 3] * 4


def test_brats_2023_in_folders_of_grades(tmp_path):
    root = write_brats2023(tmp_path)
    expected = labels(list_cases("brats2019", tmp_path))
    (root / "name_mapping.csv").unlink()
    for name, grade in expected.items():
        (root / grade).mkdir(exist_ok=True)
        name = name.replace("_", "-")
        (root / name).rename(root / grade / name)
    assert labels(list_cases("brats2019", tmp_path)) == expected


def test_brats_2023_without_grades(tmp_path):
    root = write_brats2023(tmp_path)
    table = root / "name_mapping.csv"
    table.write_text(table.read_text().replace("HGG,BraTS-GLI-00002-001\n", ""))
    listing = list_cases("brats2019", tmp_path)
    assert len(listing.cases) == 7
    assert reasons(listing) == {
        "BraTS-GLI-00002-001": f"{root}/BraTS-GLI-00002-001: name_mapping.csv gives no grade (HGG or LGG) for it; add "
        "it or drop the folder."
    }
    table.unlink()
    with pytest.raises(InputError, match="TrainingData holds no cases with grades; expected MICCAI_BraTS_2019"):
        list_cases("brats2019", tmp_path)


def test_brats_2023_leaves_out_what_is_incomplete(tmp_path):
    root = write_brats2023(tmp_path)
    name = "BraTS-GLI-00000-001"
    (root / name / f"{name}-t1c.nii.gz").unlink()
    (root / "BraTS-GLI-00001-000/BraTS-GLI-00001-000-seg.nii.gz").unlink()
    listing = list_cases("brats2019", tmp_path)
    assert reasons(listing) == {
        name: f"{root}/{name} has no t1ce image, {name}-t1c.nii.gz; download it again or drop the folder."
    }
    assert [case.name for case in listing.cases if case.seg is None] == ["BraTS-GLI-00001_000"]


def test_brats_input_errors(tmp_path):
    with pytest.raises(
        InputError,
        match=r"Unknown modality 'T1w' for BraTS; there are \['t1', 't1ce', 't2', 'flair'\], or \['t1n', 't1c', 't2w', 't2f'\]",
    ):
        list_cases("brats2019", tmp_path, modality="T1w")
    with pytest.raises(InputError, match=r"Unknown modality \[\]"):
        list_cases("brats2019", tmp_path, modality=[])
    with pytest.raises(
        InputError, match=r"nothing that looks like BraTS; expected MICCAI_BraTS_2019_Data_Training/\{HG"
    ):
        list_cases("brats2019", tmp_path)
