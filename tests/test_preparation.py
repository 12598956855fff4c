"""From a data set as it was downloaded to prepared volumes: counts, splits, left and right, the way back, bad files."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from layouts import (
    EDGE,
    FIELD_OF_VIEW,
    SIZE,
    SOURCES,
    marked_volume,
    write_brats,
    write_marked_folder,
    write_nifti,
    write_oasis,
)
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForeground,
    Orientation,
    Resize,
    ResizeWithPadOrCrop,
    ScaleIntensityRangePercentiles,
)

from msrl_diffusers import VolumeDataset, VolumeProcessor, load_volumes, write_phantoms
from msrl_diffusers.cli import prepare as prepare_verb
from msrl_diffusers.data import preparation
from msrl_diffusers.data.cases import Case, Listing, list_cases
from msrl_diffusers.data.preparation import prepare_cases
from msrl_diffusers.data.processor import scale_on_own_grid
from msrl_diffusers.data.reading import affine_of, read_image
from msrl_diffusers.data.splits import SplitPlan
from msrl_diffusers.errors import Busy, InputError
from msrl_diffusers.processes import alone_in


PROCESSOR = VolumeProcessor(SIZE, FIELD_OF_VIEW)


def spot(volume) -> list[int]:
    """Centre `[x, y, z]` of the brightest voxels of `[D, H, W]`."""
    places = np.argwhere(np.asarray(volume) >= np.asarray(volume).max() - 1e-3)
    return np.round(places.mean(axis=0)[::-1]).astype(int).tolist()


@pytest.mark.parametrize("source", list(SOURCES))
def test_left_stays_left_and_every_voxel_finds_its_way_back(source, tmp_path):
    """Through every loader: the marked spot lands at its anatomical place relative to the foreground, and the inverse
    puts it back to the voxels it came from."""
    options = SOURCES[source](tmp_path / "data")
    listing = list_cases(source.split()[0], tmp_path / "data", **options)
    assert listing.rejected == []
    for case in listing.cases:
        images = [read_image(path, case.orientation) for path in case.images.values()]
        volume, geometry = PROCESSOR.preprocess_with_geometry(images)
        assert volume.shape == (len(images), SIZE, SIZE, SIZE)
        cube = nib.Nifti1Image(volume[0].numpy().transpose(2, 1, 0), np.array(geometry.cube_affine))
        assert nib.aff2axcodes(cube.affine) == ("R", "A", "S")
        source_spot = spot(np.asarray(images[0].dataobj).transpose(2, 1, 0))
        world = images[0].affine @ [*source_spot, 1]
        assert np.allclose(cube.affine @ [*spot(volume[0]), 1], world, atol=EDGE / 2)
        back = PROCESSOR.postprocess(volume, geometry)
        assert back.shape == images[0].shape
        assert np.allclose(back.affine, images[0].affine)
        assert np.abs(np.array(spot(back.get_fdata().transpose(2, 1, 0))) - source_spot).max() <= 0.5
        inside = np.asarray(images[0].dataobj) > 0
        assert np.corrcoef(back.get_fdata()[inside], np.asarray(images[0].dataobj)[inside])[0, 1] > 0.9


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "ASL"])
def test_the_way_back_is_right_for_oblique_and_anisotropic_grids(orientation):
    """A blob at a known place, on a tilted grid of uneven voxels: back to within half a voxel."""
    shape = (60, 72, 40)
    angle = 0.2
    tilt = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = affine_of(orientation, np.array([1.5, 1.25, 3.0]), shape)
    affine[:3, :3] = tilt @ affine[:3, :3]
    affine[:3, 3] = (5, -11, 17)
    grid = np.stack(np.meshgrid(*[np.arange(edge) for edge in shape], indexing="ij"), axis=-1)
    blob = np.array([22, 40, 15])
    data = np.where(np.abs(grid - np.array(shape) / 2).max(axis=-1) < np.array(shape).min() / 2, 100.0, 0)
    data = data + 900 * np.exp(-(((grid - blob) * [1.5, 1.25, 3.0]) ** 2).sum(axis=-1) / (2 * 4.0**2))
    processor = VolumeProcessor(48, 96.0, percentiles=(0, 100))
    volume, geometry = processor.preprocess_with_geometry(nib.Nifti1Image(data.astype(np.float32), affine))
    back = processor.postprocess(volume, geometry).get_fdata()
    weights = np.clip(back - 300, 0, None)
    center = (grid * weights[..., None]).sum(axis=(0, 1, 2)) / weights.sum()
    assert np.abs(center - blob).max() < 0.5


@pytest.mark.parametrize("orientation", ["RAS", "LPI"])
def test_it_does_what_monai_does(orientation):
    """The same steps as a chain of MONAI's transforms, on an image whose cube lies inside."""
    rng = np.random.default_rng(0)
    data = np.zeros((40, 44, 48), np.float32)
    data[8:32, 10:36, 10:38] = rng.uniform(1, 9, (24, 26, 28))
    image = nib.Nifti1Image(data, affine_of(orientation, np.array([2.0, 2, 2]), data.shape))
    chain = Compose([Orientation("RAS", labels=None), CropForeground(), ResizeWithPadOrCrop(32), Resize([16] * 3, mode="area"),
                     ScaleIntensityRangePercentiles(0, 99.5, -1, 1, clip=True)])  # fmt: skip
    expected = chain(MetaTensor(torch.from_numpy(data)[None], affine=torch.as_tensor(image.affine)))
    volume = VolumeProcessor(16, 64.0).preprocess(image)
    torch.testing.assert_close(volume, expected.as_tensor().permute(0, 3, 2, 1), rtol=1e-5, atol=1e-5)


def test_voxels_below_the_background_do_not_move_it():
    """As bias correction leaves them in some skull-stripped brains of BraTS."""
    data = np.zeros((40, 40, 40), np.float32)
    data[4:20, 10:30, 10:30] = 100
    plain, geometry = PROCESSOR.preprocess_with_geometry(nib.Nifti1Image(data, np.diag([6, 6, 6, 1])))
    data[5, 11, 11] = -50
    volume, its_geometry = PROCESSOR.preprocess_with_geometry(nib.Nifti1Image(data, np.diag([6, 6, 6, 1])))
    assert its_geometry == geometry
    assert (volume == -1).float().mean() > 0.5
    assert (volume - plain).abs().max() <= 1


def test_a_shift_of_all_intensities_changes_nothing():
    """The background of a masked image stays -1, whatever its value is: means of equal numbers need not be that number."""
    generator = np.random.default_rng(0)
    data = np.zeros((48, 48, 48), dtype=np.float32)
    data[12:36, 12:36, 12:36] = generator.uniform(0.2, 1.0, (24, 24, 24))
    data[12, 12:36, 12:36] = -0.05  # as splines leave it: some voxels below the background
    processor = VolumeProcessor(16, 96.0)  # means of 27 voxels
    plain, limits = processor.preprocess_with_geometry(nib.Nifti1Image(data, np.diag([2, 2, 2, 1])))
    shifted = nib.Nifti1Image(data + np.float32(0.53), np.diag([2, 2, 2, 1]))
    volume, its_limits = processor.preprocess_with_geometry(shifted)
    assert (volume == -1).float().mean() == (plain == -1).float().mean() > 0.5
    torch.testing.assert_close(volume, plain, atol=1e-5, rtol=0)
    assert np.array(its_limits.intensities) == pytest.approx(np.array(limits.intensities) + 0.53, abs=1e-5)


def test_z_scores_keep_the_darker_half_of_the_brain():
    """Background exactly 0, brain of mean 0: many voxels below the background are tissue."""
    data = np.zeros((40, 40, 40), np.float32)
    data[4:34, 5:35, 5:35] = np.random.default_rng(0).normal(size=(30, 30, 30))
    volume, geometry = PROCESSOR.preprocess_with_geometry(nib.Nifti1Image(data, np.diag([6, 6, 6, 1])))
    assert geometry.intensities[0][0] < -1
    assert (volume == -1).float().mean() < 0.01


def test_a_prepared_cache_has_the_right_volumes(tmp_path):
    write_brats(tmp_path / "data", per_class=4)
    listing = list_cases("brats2019", tmp_path / "data", modality=["t1ce", "flair"])
    summary = prepare_cases(listing, PROCESSOR, SplitPlan(0.25), tmp_path / "out", num_workers=0)
    assert summary["subjects"] == summary["volumes"] == 8
    assert (summary["dataset"], summary["split"]) == ("brats2019", "fraction")
    assert summary["counts"] == {"train": {"HGG": 3, "LGG": 3}, "heldout": {"HGG": 1, "LGG": 1}}
    assert (summary["shape"], summary["channels"]) == ([2, SIZE, SIZE, SIZE], ["t1ce", "flair"])
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    train = VolumeDataset.load(tmp_path / "out" / "train.safetensors")
    assert train.class_counts() == {"HGG": 3, "LGG": 3}
    by_subject = {case.subject_id: case for case in listing.cases}
    for row, subject in enumerate(train.subject_ids):
        images = [read_image(path) for path in by_subject[subject].images.values()]
        expected, geometry = PROCESSOR.preprocess_with_geometry(images)
        assert torch.equal(train.pixel_values[row], expected.half())
        assert train.geometries[row] == geometry
        assert train.id2label[int(train.class_labels[row])] == by_subject[subject].label
    part = VolumeDataset.load(tmp_path / "out" / "train.safetensors", per_class=1)
    assert torch.equal(part.pixel_values, train.take_per_class(1).pixel_values)
    assert part.geometries == train.take_per_class(1).geometries
    part.save(tmp_path / "part.safetensors")
    assert VolumeDataset.load(tmp_path / "part.safetensors").geometries == part.geometries


def test_several_processes_and_a_second_run_give_the_same(tmp_path):
    options = write_marked_folder(tmp_path / "data")
    listing = list_cases("nifti_folder", tmp_path / "data", **options)
    one = prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "one", num_workers=0)
    two = prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "two", num_workers=2)
    assert one == two
    assert (tmp_path / "one/train.safetensors").read_bytes() == (tmp_path / "two/train.safetensors").read_bytes()
    stamp = (tmp_path / "one/train.safetensors").stat().st_mtime_ns
    assert prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "one") == one
    assert (tmp_path / "one/train.safetensors").stat().st_mtime_ns == stamp
    other = prepare_cases(listing, VolumeProcessor(8, FIELD_OF_VIEW), SplitPlan(0.5), tmp_path / "one")
    assert other["shape"] == [1, 8, 8, 8]


def test_a_killed_run_is_taken_up(tmp_path, monkeypatch):
    options = write_marked_folder(tmp_path / "data")
    listing = list_cases("nifti_folder", tmp_path / "data", **options)
    whole = prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "whole")
    preprocess, calls = VolumeProcessor.preprocess_with_geometry, []

    def counted(self, images):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return preprocess(self, images)

    monkeypatch.setattr(VolumeProcessor, "preprocess_with_geometry", counted)
    with pytest.raises(KeyboardInterrupt):
        prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "parts")
    assert not (tmp_path / "parts" / "summary.json").exists()
    assert prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "parts") == whole
    assert len(calls) == 3 + 2  # two were there


class Killer:
    """A processor that takes its process with it where the image is large, as running out of memory does."""

    image_size, field_of_view = SIZE, FIELD_OF_VIEW
    spacing = PROCESSOR.spacing

    def preprocess_with_geometry(self, images):
        if images[0].shape[0] > SIZE:
            os._exit(9)
        return PROCESSOR.preprocess_with_geometry(images)


@pytest.mark.slow
def test_a_process_that_dies_costs_one_volume(tmp_path):
    write_marked_folder(tmp_path / "data")
    large = nib.Nifti1Image(np.pad(marked_volume(0, 0), 4), np.diag([EDGE, EDGE, EDGE, 1]))
    large.to_filename(tmp_path / "data" / "s1.nii.gz")
    listing = list_cases("nifti_folder", tmp_path / "data", label_column="grade")
    for name in ("s4", "s5"):
        listing.cases.append(Case({"image": listing.cases[0].images["image"]}, "b", name))
    summary = prepare_cases(listing, Killer(), SplitPlan(0.5), tmp_path / "out", num_workers=2)
    assert (summary["volumes"], summary["rejected"]) == (5, 1)
    assert "s1.nii.gz: the process that read it died" in (tmp_path / "out" / "rejected.csv").read_text()


def test_bad_files_are_recorded_and_the_rest_goes_on(tmp_path):
    folder = tmp_path / "data"
    write_marked_folder(folder)
    table = (folder / "metadata.csv").read_text()
    bad = {
        "truncated.nii.gz": (folder / "s0.nii.gz").read_bytes()[:-100],
        "html.nii.gz": b"<html>please log in</html>",
        "empty.nii.gz": b"",
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
        table += f"{name},{name.split('.')[0]},a\n"
    nib.Nifti1Image(np.zeros((8, 8, 8, 5), np.float32), np.eye(4)).to_filename(folder / "frames.nii.gz")
    nib.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4)).to_filename(folder / "constant.nii.gz")
    (folder / "loop.nii.gz").symlink_to("loop.nii.gz")
    table += "frames.nii.gz,frames,a\nconstant.nii.gz,constant,b\nloop.nii.gz,loop,b\ns0.nii.gz,s0,a\ns1.nii.gz,s9,\n"
    (folder / "metadata.csv").write_text(table)
    listing = list_cases("nifti_folder", folder, label_column="grade")
    summary = prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "out")
    assert (summary["volumes"], summary["rejected"]) == (4, 8)
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        rejected = {Path(row["file"]).name: row["reason"] for row in csv.DictReader(file)}
    for name, reason in {
        "truncated.nii.gz": "is damaged",
        "html.nii.gz": "not compressed by gzip",
        "empty.nii.gz": "not compressed by gzip",
        "frames.nii.gz": "extract one frame first",
        "constant.nii.gz": "is constant",
        "metadata.csv, line 11": "loop.nii.gz is missing",
        "s0.nii.gz": "was already found at",
        "metadata.csv, line 13": "column 'grade' is empty",
    }.items():
        assert reason in rejected[name], name
    for folder in ("strict", "out"):  # one that is finished, too
        with pytest.raises(InputError, match=r"truncated\.nii\.gz is damaged"):
            prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / folder, strict=True)


def test_modalities_of_unequal_shape_are_refused(tmp_path):
    write_brats(tmp_path / "data")
    listing = list_cases("brats2019", tmp_path / "data", modality=["t1", "t2"])
    write_nifti(Path(listing.cases[0].images["t2"]), marked_volume(0, 0)[1:], "LPS")
    listing.cases.append(Case(listing.cases[1].images, "HGG", "another"))
    summary = prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "out")
    assert summary["rejected"] == 1
    assert "the modalities have unequal shapes" in (tmp_path / "out" / "rejected.csv").read_text()


def test_nothing_usable_is_one_sentence(tmp_path):
    cases = [Case({"image": str(tmp_path / f"{name}.nii")}, name[0], name) for name in ("a0", "a1", "b0", "b1")]
    with pytest.raises(InputError, match="None of 4 volumes could be prepared"):
        prepare_cases(Listing(cases, ["a", "b"]), PROCESSOR, SplitPlan(0.5), tmp_path / "out")


def test_load_volumes_gives_one_dataset_for_every_layout(tmp_path):
    write_brats(tmp_path / "brats")
    rows = load_volumes("brats2019", tmp_path / "brats", modality=["t1", "flair"])
    assert rows.column_names == ["t1", "flair", "seg", "label", "subject_id", "session", "split"]
    assert rows.features["label"].names == ["HGG", "LGG"]
    assert rows[0]["flair"].shape == (SIZE, SIZE, SIZE)
    write_oasis(tmp_path / "oasis")
    rows = load_volumes("oasis1", tmp_path / "oasis")
    assert {"image", "label", "subject_id", "session", "split", "orientation"} <= set(rows.column_names)
    with pytest.raises(InputError, match="Unknown data set 'mnist'"):
        load_volumes("mnist", tmp_path)
    with pytest.raises(InputError, match="has no option 'colour'"):
        load_volumes("bids", tmp_path, colour="red")
    with pytest.raises(InputError, match="does not exist"):
        load_volumes("bids", tmp_path / "nowhere")


def test_an_image_of_load_volumes_can_be_prepared(tmp_path):
    """Stored to LPS, so that its axes have to be turned."""
    write_brats(tmp_path, per_class=1)
    image = load_volumes("brats2019", tmp_path)[0]["t1ce"]
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    stored = read_image(list_cases("brats2019", tmp_path).cases[0].images["t1ce"])
    assert torch.equal(PROCESSOR.preprocess(image), PROCESSOR.preprocess(stored))
    assert torch.equal(scale_on_own_grid(image), scale_on_own_grid(stored))


def test_the_verb_writes_what_it_promises(tmp_path, capsys):
    write_phantoms(tmp_path / "data", 4, image_size=SIZE)
    arguments = ["--dataset", "nifti_folder", "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"),
                 "--label_column", "grade", "--image_size", "8", "--num_workers", "0", "--holdout_fraction", "0.5"]  # fmt: skip
    prepare_verb.run(arguments)
    summary = json.loads(capsys.readouterr().out)
    assert summary["counts"] == {"train": {"HGG": 2, "LGG": 2}, "heldout": {"HGG": 2, "LGG": 2}}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "heldout.safetensors", "rejected.csv", "sheet.png", "summary.json", "train.safetensors",
    ]  # fmt: skip
    (tmp_path / "train.txt").write_text("phantom-HGG-00000\nphantom-LGG-00001\n")
    (tmp_path / "heldout.txt").write_text("phantom-HGG-00002\nphantom-LGG-00003\n")
    lists = ["--train_subjects", str(tmp_path / "train.txt"), "--heldout_subjects", str(tmp_path / "heldout.txt")]
    prepare_verb.run([*arguments, *lists])
    assert json.loads(capsys.readouterr().out)["left_out"] == 4
    (tmp_path / "heldout.txt").write_text("phantom-HGG-00000\nphantom-LGG-00003\n")
    with pytest.raises(InputError, match="1 subjects are in the training set and in the hold-out"):
        prepare_verb.run([*arguments, *lists])


def test_of_two_commands_in_one_folder_the_second_is_refused(tmp_path):
    """The first to end would remove the volumes that the other has yet to join."""
    write_phantoms(tmp_path / "data", 4, image_size=SIZE)
    arguments = ["--dataset", "nifti_folder", "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"),
                 "--label_column", "grade", "--image_size", "8", "--num_workers", "0"]  # fmt: skip
    with (
        alone_in(tmp_path / "out"),
        pytest.raises(Busy, match=r"Another command is at work in .*out; wait for its end"),
    ):
        prepare_verb.run(arguments)
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_told_anew(tmp_path):
    """A folder that is finished, whose table has lost a row that could not be used."""
    write_marked_folder(tmp_path / "data")
    table = tmp_path / "data" / "metadata.csv"
    complete = table.read_text()
    for lost, text in ((1, complete + "gone.nii.gz,gone,a\n"), (0, complete)):
        table.write_text(text)
        listing = list_cases("nifti_folder", tmp_path / "data", label_column="grade")
        assert prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "out")["rejected"] == lost
        assert len((tmp_path / "out" / "rejected.csv").read_text().splitlines()) == 1 + lost


def test_a_mended_header_is_another_request_and_a_mended_file_is_asked_for(tmp_path, caplog):
    nib.Spm2AnalyzeImage(marked_volume(0, 0), np.eye(4)).to_filename(tmp_path / "a.img")
    case = Case({"image": str(tmp_path / "a.img")}, "a", "a")
    listing = Listing([case], ["a"], [], None)
    before = preparation._request(listing, PROCESSOR)
    (tmp_path / "a.hdr").write_bytes((tmp_path / "a.hdr").read_bytes() + b"0")
    assert preparation._request(listing, PROCESSOR) != before

    write_marked_folder(tmp_path / "data")
    (tmp_path / "data" / "bad.nii.gz").write_bytes(b"<html>")
    with (tmp_path / "data" / "metadata.csv").open("a") as table:
        table.write("bad.nii.gz,bad,a\n")
    listing = list_cases("nifti_folder", tmp_path / "data", label_column="grade")
    summary = prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "out")
    assert not caplog.messages
    assert prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "out") == summary
    assert "made before, without 1 files that could not be used" in caplog.messages[0]


def test_volumes_lie_by_chance_within_a_class(tmp_path):
    """So that the first of each, which figures take, are of all sites and dates."""
    names = [f"{site}-{number}" for site in ("A", "B") for number in range(20)]
    rows = ["file_name,subject_id,split"]
    for name in names:
        write_nifti(tmp_path / f"{name}.nii.gz", marked_volume(0, 0))
        rows.append(f"{name}.nii.gz,{name},train")
    rows += [row.replace("train", "heldout").replace("A-", "C-") for row in rows[1:3]]
    for name in ("C-0", "C-1"):
        write_nifti(tmp_path / f"{name}.nii.gz", marked_volume(0, 0))
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    listing = list_cases("nifti_folder", tmp_path)
    prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "out")
    order = VolumeDataset.load(tmp_path / "out" / "train.safetensors").subject_ids
    assert sorted(order) == sorted(names)
    assert 5 <= sum(name.startswith("A") for name in order[:20]) <= 15


def test_the_summary_says_that_no_subjects_are_named(tmp_path):
    write_marked_folder(tmp_path / "data")
    table = tmp_path / "data" / "metadata.csv"
    for header, told in (("file_name,person,grade", 1), ("file_name,participant_id,grade", 0)):
        table.write_text("\n".join([header, *table.read_text().splitlines()[1:]]) + "\n")
        listing = list_cases("nifti_folder", tmp_path / "data", label_column="grade")
        summary = prepare_cases(listing, PROCESSOR, SplitPlan(0.5), tmp_path / "out")
        assert (summary["subjects"], summary["warnings"]) == (4, listing.warnings)
        assert len(listing.warnings) == told


def test_the_verb_takes_bins_by_name_and_by_edges(tmp_path, capsys):
    rows = ["file_name,subject_id,age"]
    for index, age in enumerate((20, 30, 50, 70, 80)):
        write_nifti(tmp_path / f"s{index}.nii.gz", marked_volume(index, 0))
        rows.append(f"s{index}.nii.gz,s{index},{age}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    arguments = ["--dataset", "nifti_folder", "--data_dir", str(tmp_path), "--label_column", "age", "--num_workers", "0",
                 "--image_size", "8", "--holdout_fraction", "0.5"]  # fmt: skip
    named = "{under 40: [null, 40], 60 and over: [60, null]}"
    prepare_verb.run([*arguments, "--output_dir", str(tmp_path / "named"), "--label_bins", named])
    assert json.loads(capsys.readouterr().out)["counts"]["train"] == {"under 40": 1, "60 and over": 1}
    prepare_verb.run([*arguments, "--output_dir", str(tmp_path / "edges"), "--label_bins", "60"])
    assert list(json.loads(capsys.readouterr().out)["counts"]["train"]) == ["age under 60", "age from 60"]
    with pytest.raises(InputError, match="the bounds of 'old' must be numbers or null, got 'forty'"):
        prepare_verb.run([*arguments, "--output_dir", str(tmp_path / "bad"), "--label_bins", "{old: [forty, null]}"])
    with pytest.raises(InputError, match=r"label_bins must be numbers or \{name: .*, got 'forty 60'"):
        prepare_verb.run([*arguments, "--output_dir", str(tmp_path / "bad"), "--label_bins", "forty", "60"])


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_the_command_as_a_user_types_it(tmp_path, strict):
    write_marked_folder(tmp_path / "data")
    with (tmp_path / "data" / "metadata.csv").open("a") as file:
        file.write("bad.nii.gz,bad,a\n")
    (tmp_path / "data" / "bad.nii.gz").write_bytes(b"\x1f\x8bnothing")
    command = [str(Path(sys.executable).parent / "msrl"), "prepare", "--dataset", "nifti_folder", "--data_dir", "data",
               "--label_column", "grade", "--image_size", "16", "--output_dir", "out", "--holdout_fraction", "0.5"]  # fmt: skip
    run = subprocess.run([*command, *(["--strict"] if strict else [])], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == int(strict)
    if strict:
        assert run.stderr.strip().splitlines()[-1].startswith("error: data/bad.nii.gz")
    else:
        assert json.loads(run.stdout)["rejected"] == 1
