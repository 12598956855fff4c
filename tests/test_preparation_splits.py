"""Preparing with a split: refused before anything is read, made anew without reading, and the data set's own."""

from pathlib import Path

import pytest
from layouts import FIELD_OF_VIEW, SIZE, SOURCES, write_marked_folder

from msrl_diffusers import VolumeDataset, VolumeProcessor
from msrl_diffusers.data.cases import list_cases
from msrl_diffusers.data.preparation import prepare_cases
from msrl_diffusers.data.splits import SplitPlan
from msrl_diffusers.errors import InputError


PROCESSOR = VolumeProcessor(SIZE, FIELD_OF_VIEW)


def test_a_split_that_can_t_be_made_is_said_before_anything_is_read(tmp_path, monkeypatch):
    write_marked_folder(tmp_path / "data")
    listing = list_cases("nifti_folder", tmp_path / "data", label_column="grade")
    monkeypatch.setattr(VolumeProcessor, "preprocess_with_geometry", None)
    for split, sentence in (
        (SplitPlan(1.5), "holdout_fraction must lie between 0 and 1"),
        (
            SplitPlan(train_subjects=("s0", "s9"), heldout_subjects=("s1",)),
            "1 listed subjects are not in the data set, 's9' first; its subjects are called like 's0'",
        ),
    ):
        with pytest.raises(InputError, match=sentence):
            prepare_cases(listing, PROCESSOR, split, tmp_path / "out")
    with pytest.raises(InputError, match="num_workers must be 0 or more"):
        prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "out", num_workers=-1)
    assert not (tmp_path / "out").exists()


def test_another_split_reads_nothing_again_and_leaves_no_mixture(tmp_path, monkeypatch):
    write_marked_folder(tmp_path / "data")
    (tmp_path / "data" / "s3.nii.gz").write_bytes(b"\x1f\x8bnothing")
    listing = list_cases("nifti_folder", tmp_path / "data", label_column="grade")
    everything = SplitPlan(train_subjects=("s0", "s1", "s2"), heldout_subjects=("s3",))  # which can't be read
    with pytest.raises(InputError, match="The split leaves no volume for 'heldout'"):
        prepare_cases(listing, PROCESSOR, everything, tmp_path / "out")
    monkeypatch.setattr(VolumeProcessor, "preprocess_with_geometry", None)  # what was prepared is there
    first = SplitPlan(train_subjects=("s0", "s3"), heldout_subjects=("s1",))
    summary = prepare_cases(listing, PROCESSOR, first, tmp_path / "out")
    assert (summary["volumes"], summary["rejected"]) == (2, 1)
    assert not list((tmp_path / "out").glob(".volumes-*"))
    monkeypatch.undo()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    with pytest.raises(InputError, match="The split leaves no volume for 'heldout'"):
        prepare_cases(listing, PROCESSOR, everything, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")} == before
    assert prepare_cases(listing, PROCESSOR, first, tmp_path / "out") == summary


@pytest.mark.parametrize("lost", ["missing", "damaged", "without a class"])
def test_the_data_set_s_own_hold_out_is_kept_or_refused(tmp_path, lost):
    data = tmp_path / "data"
    write_marked_folder(data)
    rows = [f"s{index}.nii.gz,s{index},{'ab'[index % 2]},{'train' if index < 2 else 'test'}\n" for index in range(4)]
    (data / "metadata.csv").write_text("file_name,subject_id,grade,split\n" + "".join(rows))
    listing = list_cases("nifti_folder", data, label_column="grade")
    assert prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "out")["split"] == "own"
    assert VolumeDataset.load(tmp_path / "out" / "heldout.safetensors").subject_ids == ["s2", "s3"]
    if lost == "without a class":
        rows[2:] = [row.replace(",a,", ",,").replace(",b,", ",,") for row in rows[2:]]
    for name in ("s2", "s3"):
        if lost == "missing":
            (data / f"{name}.nii.gz").unlink()
        elif lost == "damaged":
            (data / f"{name}.nii.gz").write_bytes(b"\x1f\x8bnothing")
    (data / "metadata.csv").write_text("file_name,subject_id,grade,split\n" + "".join(rows))
    listing = list_cases("nifti_folder", data, label_column="grade")
    with pytest.raises(InputError, match=r"no volume for 'heldout' can be used: .* The first: .*(s2|line 4)"):
        prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "out")


def test_a_hold_out_without_a_training_set_is_not_trained_on(tmp_path):
    write_marked_folder(tmp_path)
    rows = [f"s{index}.nii.gz,s{index},{'ab'[index % 2]},test\n" for index in range(4)]
    (tmp_path / "metadata.csv").write_text("file_name,subject_id,grade,split\n" + "".join(rows))
    listing = list_cases("nifti_folder", tmp_path, label_column="grade")
    with pytest.raises(InputError, match="own split holds all volumes that can be used out of training: give lists"):
        prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "out")


@pytest.mark.parametrize("source", ["nifti_folder", "datalist", "brats2019", "oasis1", "bids"])
def test_lists_may_name_subjects_whose_images_are_missing(source, tmp_path):
    options = SOURCES[source](tmp_path / "data")
    gone, *others = list_cases(source, tmp_path / "data", **options).cases
    for image in gone.images.values():
        Path(image).unlink()
    listing = list_cases(source, tmp_path / "data", **options)
    held = next(case.subject_id for case in others if case.subject_id != gone.subject_id)
    kept = sorted({case.subject_id for case in others} - {held})
    split = SplitPlan(train_subjects=(*kept, gone.subject_id), heldout_subjects=(held,))
    summary = prepare_cases(listing, PROCESSOR, split, tmp_path / "out")
    assert (summary["volumes"], summary["rejected"], summary["split"]) == (len(others), 1, "lists")
    assert listing.rejected[0].reason in (tmp_path / "out" / "rejected.csv").read_text()
