"""datalist: lists of MONAI and of the Decathlon, and why entries are left out."""

import json
import os
import re
from pathlib import Path

import pytest
from layouts import write_datalist
from listings import assert_spot_is_in_place, labels

from msrl_diffusers.data.cases import list_cases
from msrl_diffusers.errors import InputError


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
        (place, f"{place} has no 'grade'.")
    ]
    with pytest.raises(InputError, match=r"'label' is a segmentation, .*; name the key of classes as label_column"):
        list_cases("datalist", tmp_path, label_column="label")


def test_a_list_as_the_decathlon_has_it_is_of_one_class(tmp_path):
    """Its labels are segmentations, and its images for testing have no keys."""
    for name in ("imagesTr/BRATS_000", "imagesTr/BRATS_001", "imagesTs/BRATS_002", "labelsTr/BRATS_000"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    entries = [
        {"image": f"./imagesTr/BRATS_{i:03d}.nii.gz", "label": f"./labelsTr/BRATS_{i:03d}.nii.gz"} for i in range(2)
    ]
    write_entries(tmp_path / "dataset.json", training=entries, test=["./imagesTs/BRATS_002.nii.gz"])
    listing = list_cases("datalist", tmp_path)
    assert (listing.classes, listing.rejected) == (["unlabelled"], [])
    assert [(case.name, case.split) for case in listing.cases] == [
        ("BRATS_000", "train"), ("BRATS_001", "train"), ("BRATS_002", "heldout"),
    ]  # fmt: skip
    assert listing.cases[0].seg == str(tmp_path / "labelsTr/BRATS_000.nii.gz")
    write_entries(tmp_path / "dataset.json", training=[{**entry, "age": 40} for entry in entries])
    with pytest.raises(InputError, match="name the key of classes as label_column, or say none for one class of all"):
        list_cases("datalist", tmp_path)  # that key may have been forgotten
    assert list_cases("datalist", tmp_path, label_column="none").classes == ["unlabelled"]


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


def test_datalist_several_images_of_a_subject(tmp_path):
    """One name in several folders, and dots that belong to names."""
    images = ["a/T1.nii.gz", "b/T1.nii.gz", "1.2.840.7.nii.gz", "1.2.840.8.nii.gz"]
    for image in images:
        (tmp_path / image).parent.mkdir(exist_ok=True)
        (tmp_path / image).touch()
    entries = [{"image": image, "label": index % 2} for index, image in enumerate(images)]
    path = write_entries(
        tmp_path / "list.json", training=[{**entry, "patient": 7} for entry in entries[:2]] + entries[2:]
    )
    assert [case.name for case in list_cases("datalist", path, subject_column="patient").cases] == [
        "7_a_T1", "7_b_T1", "1.2.840.7", "1.2.840.8",
    ]  # fmt: skip
    assert [case.name for case in list_cases("datalist", path).cases] == ["a_T1", "b_T1", "1.2.840.7", "1.2.840.8"]
    with pytest.raises(InputError, match=r"No entry of .*list\.json has the key 'person' of subjects"):
        list_cases("datalist", path, subject_column="person")
    without_classes = [{"image": image, "patient": index // 2} for index, image in enumerate(images)]
    write_entries(path, training=without_classes)
    listing = list_cases("datalist", path, subject_column="patient")
    assert (listing.classes, [case.subject_id for case in listing.cases]) == (["unlabelled"], ["0", "0", "1", "1"])
    write_entries(path, training=[{**entry, "age": 40} for entry in without_classes])
    with pytest.raises(InputError, match="has no 'label'"):  # that of the subjects is there
        list_cases("datalist", path, subject_column="patient")


def test_datalist_subjects_of_bids_or_none(tmp_path, caplog):
    images = [f"{index}.nii.gz" for index in range(4)]
    for image in images:
        (tmp_path / image).touch()
    entries = [{"image": image, "participant_id": index // 2} for index, image in enumerate(images)]
    path = write_entries(tmp_path / "list.json", training=entries)
    listing = list_cases("datalist", path)
    assert (listing.classes, [case.subject_id for case in listing.cases]) == (["unlabelled"], ["0", "0", "1", "1"])
    assert (listing.warnings, caplog.messages) == ([], [])
    write_entries(path, training=[{**entry, "participant_id": None} for entry in entries])
    listing = list_cases("datalist", path)
    assert [case.subject_id for case in listing.cases] == ["0", "1", "2", "3"]
    (warning,) = listing.warnings
    assert warning.startswith(
        f"{path.name} names no subjects, so each of its 4 volumes counts as one: if people have several"
    )
    assert caplog.messages == [warning]


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
        f"{path}, testing[11] is None, neither a path nor an object with keys.",
        f"{tmp_path}/imagesTr/scan_10_0000.nii.gz: subject 'scan_10_scan_10_0000' was already found at "
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
