"""Folders of NIfTI files: what goes wrong is one sentence, and axes come out right whatever the storage order."""

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from tiny import load_folder

from msrl_diffusers import VolumeProcessor
from msrl_diffusers.data.cases import list_cases
from msrl_diffusers.data.processor import scale_on_own_grid, to_nifti
from msrl_diffusers.data.reading import read_image
from msrl_diffusers.errors import InputError


SIZE, EDGE = 16, 4.0
PROCESSOR = VolumeProcessor(SIZE, field_of_view=SIZE * EDGE)


def ras_image(seed=0, spot=(12, 3, 10)):
    """A box of low intensity in the middle, and a bright cube of 3 voxels around array index `spot` (x, y, z)."""
    rng = np.random.default_rng(seed)
    data = np.zeros((SIZE, SIZE, SIZE), dtype=np.float32)
    data[2:14, 2:14, 2:14] = rng.uniform(1, 2, (12, 12, 12))
    data[tuple(slice(place - 1, place + 2) for place in spot)] = 10
    affine = np.diag([EDGE, EDGE, EDGE, 1.0])
    affine[:3, 3] = (-30, -40, 7)
    return nib.Nifti1Image(data, affine)


def reoriented(image, codes):
    return image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(codes)))


def write_folder(folder, images, header="file_name,subject_id,grade", rows=None):
    for name, image in images.items():
        image.to_filename(folder / name)
    rows = rows or [f"{name},s{i},{'ab'[i % 2]}" for i, name in enumerate(images)]
    (folder / "metadata.csv").write_text("\n".join([header, *rows]) + "\n")


def four_images():
    return {f"v{i}.nii.gz": ras_image(i) for i in range(4)}


def failure(folder, **kwargs):
    with pytest.raises(InputError) as caught:
        load_folder(folder, PROCESSOR, **{"label_column": "grade", **kwargs})
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_a_folder_loads(tmp_path):
    write_folder(tmp_path, four_images())
    volumes = load_folder(tmp_path, PROCESSOR, "grade")
    assert volumes.pixel_values.shape == (4, 1, SIZE, SIZE, SIZE)
    assert volumes.pixel_values.dtype == torch.float16
    assert volumes.id2label == {0: "a", 1: "b"}
    assert dict(zip(volumes.subject_ids, volumes.class_labels.tolist(), strict=True)) == {
        "s0": 0,
        "s1": 1,
        "s2": 0,
        "s3": 1,
    }
    assert volumes.spacing == (EDGE, EDGE, EDGE)
    assert volumes.pixel_values.min() == -1
    assert volumes.pixel_values.max() == 1


def test_the_file_name_is_the_subject_where_no_column_names_it(tmp_path):
    images = four_images()
    rows = [f"{name},{'ab'[i % 2]}" for i, name in enumerate(images)]
    write_folder(tmp_path, images, "file_name,grade", rows)
    assert sorted(load_folder(tmp_path, PROCESSOR, "grade").subject_ids) == ["v0", "v1", "v2", "v3"]


def test_subjects_are_counted_from_zero(tmp_path):
    images = four_images()
    rows = [f"{name},{i // 2},{'ab'[i // 2]}" for i, name in enumerate(images)]
    write_folder(tmp_path, images, rows=rows)
    assert sorted(load_folder(tmp_path, PROCESSOR, "grade").subject_ids) == ["0", "0", "1", "1"]


def test_a_column_of_subjects_by_name(tmp_path):
    images = four_images()
    rows = [f"{name},{i // 2},{'ab'[i // 2]}" for i, name in enumerate(images)]
    write_folder(tmp_path, images, "file_name,patient,grade", rows)
    listing = list_cases("nifti_folder", tmp_path, label_column="grade", subject_column="patient")
    assert [(case.subject_id, case.session) for case in listing.cases] == [
        ("0", "v0"),
        ("0", "v1"),
        ("1", "v2"),
        ("1", "v3"),
    ]
    with pytest.raises(InputError, match="has no column 'person' of subjects; it has"):
        list_cases("nifti_folder", tmp_path, label_column="grade", subject_column="person")


def test_the_column_of_subjects_of_bids(tmp_path, caplog):
    images = four_images()
    rows = [f"{name},sub-{i // 2},{i % 2},{'ab'[i // 2]}" for i, name in enumerate(images)]
    write_folder(tmp_path, images, "file_name,participant_id,session,grade", rows)
    listing = list_cases("nifti_folder", tmp_path, label_column="grade")
    assert [(case.subject_id, case.session) for case in listing.cases] == [
        ("sub-0", "0"), ("sub-0", "1"), ("sub-1", "0"), ("sub-1", "1"),
    ]  # fmt: skip
    assert (listing.warnings, caplog.messages) == ([], [])
    write_folder(
        tmp_path, images, "file_name,participant_id", [f"{name},sub-{i // 2}" for i, name in enumerate(images)]
    )
    assert list_cases("nifti_folder", tmp_path).classes == ["unlabelled"]  # it names no classes


@pytest.mark.parametrize(("column", "cell"), [("patient", "p"), ("subject_id", "n/a")])
def test_a_table_that_names_no_subjects_is_pointed_out(tmp_path, column, cell, caplog):
    images = four_images()
    rows = [f"{name},{cell},{'ab'[i // 2]}" for i, name in enumerate(images)]
    write_folder(tmp_path, images, f"file_name,{column},grade", rows)
    listing = list_cases("nifti_folder", tmp_path, label_column="grade")
    (warning,) = listing.warnings
    assert warning.startswith("metadata.csv names no subjects, so each of its 4 volumes counts as one: if people")
    assert caplog.messages == [warning]


def test_a_subject_that_is_not_known_is_none(tmp_path):
    """The file's name stands for it, as for an empty cell; the same of sessions."""
    images = four_images()
    cells = ["n/a,1", "NA,", "s2,nan", "s2,2"]
    rows = [f"{name},{cell},{'ab'[i % 2]}" for i, (name, cell) in enumerate(zip(images, cells, strict=True))]
    write_folder(tmp_path, images, "file_name,subject_id,session,grade", rows)
    listing = list_cases("nifti_folder", tmp_path, label_column="grade")
    assert [(case.subject_id, case.session) for case in listing.cases] == [
        ("v0", "1"), ("v1", ""), ("s2", "v2"), ("s2", "2"),
    ]  # fmt: skip


def test_subject_and_session_are_told_apart_as_two(tmp_path):
    """Written in one they are the same, though nobody was scanned twice."""
    images = four_images()
    cells = ["1_1,2", "1,1_2", "3,", "3,"]
    rows = [f"{name},{cell},{'ab'[i % 2]}" for i, (name, cell) in enumerate(zip(images, cells, strict=True))]
    write_folder(tmp_path, images, "file_name,subject_id,session,grade", rows)
    listing = list_cases("nifti_folder", tmp_path, label_column="grade")
    assert [(case.subject_id, case.session) for case in listing.cases] == [
        ("1_1", "2"), ("1", "1_2"), ("3", "v2"), ("3", "v3"),
    ]  # fmt: skip
    write_folder(tmp_path, images, "file_name,subject_id,session,grade", [rows[0], rows[0], *rows[1:]])
    (rejection,) = list_cases("nifti_folder", tmp_path, label_column="grade").rejected
    assert "subject '1_1_2' was already found at" in rejection.reason


def test_images_of_one_name_in_several_folders(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    images = {
        "a/T1.nii.gz": ras_image(0),
        "b/T1.nii.gz": ras_image(1),
        "1.2.7.nii.gz": ras_image(2),
        "1.2.8.nii.gz": ras_image(3),
    }
    write_folder(tmp_path, images, "file_name,grade", [f"{name},{'ab'[i % 2]}" for i, name in enumerate(images)])
    listing = list_cases("nifti_folder", tmp_path, label_column="grade")
    assert [case.name for case in listing.cases] == ["a_T1", "b_T1", "1.2.7", "1.2.8"]


@pytest.mark.parametrize(("word", "side"), [("train", "train"), ("val", "heldout"), ("Test", "heldout"), ("", None)])
def test_the_split_of_a_table(tmp_path, word, side):
    images = four_images()
    write_folder(
        tmp_path, images, "file_name,grade,split", [f"{name},{'ab'[i % 2]},{word}" for i, name in enumerate(images)]
    )
    assert {case.split for case in list_cases("nifti_folder", tmp_path, label_column="grade").cases} == {side}


def test_a_split_of_another_name_is_refused(tmp_path):
    images = four_images()
    write_folder(
        tmp_path, images, "file_name,grade,split", [f"{name},{'ab'[i % 2]},fold {i}" for i, name in enumerate(images)]
    )
    assert "line 2: the split 'fold 0' is none of ['training'," in failure(tmp_path)


def test_rows_without_a_label_are_left_out(tmp_path):
    images = four_images()
    rows = [f"{name},s{i},{label}" for i, (name, label) in enumerate(zip(images, ["1", "", "2", "1"], strict=True))]
    write_folder(tmp_path, images, rows=rows)
    volumes = load_folder(tmp_path, PROCESSOR, "grade")
    assert sorted(volumes.subject_ids) == ["s0", "s2", "s3"]
    assert volumes.num_classes == 2


def test_a_changed_table_is_read_again(tmp_path):
    images = four_images()
    write_folder(tmp_path, images)
    load_folder(tmp_path, PROCESSOR, "grade")
    write_folder(tmp_path, images, rows=[f"{name},s{i},{'cd'[i % 2]}" for i, name in enumerate(images)])
    assert load_folder(tmp_path, PROCESSOR, "grade").id2label == {0: "c", 1: "d"}


def test_missing_metadata(tmp_path):
    ras_image().to_filename(tmp_path / "v.nii.gz")
    assert "has no metadata.csv; write one with a column file_name (and one of classes" in failure(tmp_path)


def test_unknown_label_column(tmp_path):
    write_folder(tmp_path, four_images())
    sentence = failure(tmp_path, label_column="stage")
    assert "has no column 'stage'" in sentence
    assert "'grade'" in sentence


def test_a_file_that_metadata_names_is_missing(tmp_path):
    images = four_images()
    rows = [f"{name},s{i},{'ab'[i % 2]}" for i, name in enumerate([*images, "gone.nii.gz"])]
    write_folder(tmp_path, images, rows=rows)
    listing = list_cases("nifti_folder", tmp_path, label_column="grade")
    assert len(listing.cases) == 4
    (rejection,) = listing.rejected
    assert rejection.file.endswith("metadata.csv, line 6")
    assert rejection.reason.endswith("gone.nii.gz is missing.")


def test_truncated_file_is_named(tmp_path):
    write_folder(tmp_path, four_images())
    path = tmp_path / "v2.nii.gz"
    path.write_bytes(path.read_bytes()[:-500])
    assert "v2.nii.gz is damaged, its voxels can't be read" in failure(tmp_path)


def test_a_file_that_is_no_nifti_is_named(tmp_path):
    write_folder(tmp_path, four_images())
    (tmp_path / "v1.nii.gz").write_bytes(b"<html>please log in</html>")
    assert "v1.nii.gz is named .gz but is not compressed by gzip" in failure(tmp_path)


def test_one_class(tmp_path):
    """Of all images: because the table says so, or has no classes."""
    images = four_images()
    write_folder(tmp_path, images, rows=[f"{name},s{i},a" for i, name in enumerate(images)])
    assert list_cases("nifti_folder", tmp_path, label_column="grade").classes == ["a"]
    with pytest.raises(
        InputError, match=r"no column 'label'; .* name that of the classes by label_column, or say none for one"
    ):
        list_cases("nifti_folder", tmp_path)  # it may have been forgotten
    listing = list_cases("nifti_folder", tmp_path, label_column="none")
    assert listing.classes == ["unlabelled"]
    assert [case.label for case in listing.cases] == ["unlabelled"] * 4
    write_folder(tmp_path, images, "file_name,subject_id", [f"{name},s{i}" for i, name in enumerate(images)])
    assert list_cases("nifti_folder", tmp_path).classes == ["unlabelled"]
    with pytest.raises(InputError, match="has no column 'label'"):
        list_cases("nifti_folder", tmp_path, label_bins=[40])


def test_bins_of_a_numeric_column(tmp_path):
    images = {f"v{i}.nii.gz": ras_image(i) for i in range(5)}
    scores = ["0", "0.5", "1.0", "30", ""]
    write_folder(tmp_path, images, "file_name,subject_id,cdr",
                 [f"{name},s{i},{scores[i]}" for i, name in enumerate(images)])  # fmt: skip
    bins = {"CN": [None, 0.5], "AD": [0.5, 2]}
    volumes = load_folder(tmp_path, PROCESSOR, "cdr", bins)
    assert volumes.id2label == {0: "CN", 1: "AD"}
    assert dict(zip(volumes.subject_ids, volumes.class_labels.tolist(), strict=True)) == {"s0": 0, "s1": 1, "s2": 1}
    sentence = failure(tmp_path, label_column="cdr", label_bins={"CN": [None, 1], "AD": [50, None]})
    assert "gives 1 classes with volumes (of ['CN', 'AD'])" in sentence


@pytest.mark.parametrize(
    ("numbers", "refused"),
    [
        (range(20, 31), True),
        ([0.5 * half for half in range(11)], True),
        (range(20, 30), False),  # ten of them
        (range(11), False),  # codes
        (range(1, 13), False),
        ([*range(20, 31), "unknown"], False),  # no column of numbers
    ],
)
def test_many_numbers_are_no_classes(tmp_path, numbers, refused):
    names = [f"v{i}.nii.gz" for i in range(len(numbers))]
    for name in names:
        (tmp_path / name).touch()
    rows = [f"{name},{name},{number}" for name, number in zip(names, numbers, strict=True)]
    write_folder(tmp_path, {}, "file_name,subject_id,age", rows)
    if refused:
        with pytest.raises(
            InputError, match=r"^Column 'age' holds 11 different numbers: give label_bins, edges such as 40 60"
        ):
            list_cases("nifti_folder", tmp_path, label_column="age")
    else:
        assert len(list_cases("nifti_folder", tmp_path, label_column="age").classes) == len(numbers)


def test_text_in_a_binned_column(tmp_path):
    write_folder(tmp_path, four_images())
    assert "'a' is no number" in failure(tmp_path, label_bins={"low": [None, 1], "high": [1, None]})


def broken(change):
    image = ras_image()
    return nib.Nifti1Image(change(np.asarray(image.dataobj)), image.affine)


def with_nan(data):
    data[5, 5, 5] = np.nan
    return data


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (with_nan, "NaN or infinite"),
        (np.ones_like, "constant (1 everywhere)"),
        (lambda data: np.stack([data, data], axis=3), "a 3D image is needed, this one has shape (16, 16, 16, 2)"),
    ],
)
def test_an_unusable_image_is_named(tmp_path, change, sentence):
    write_folder(tmp_path, {**four_images(), "bad.nii.gz": broken(change)})
    message = failure(tmp_path)
    assert "bad.nii.gz" in message
    assert sentence in message


def test_an_image_of_one_frame_is_fine():
    single = broken(lambda data: data[..., None])
    assert torch.equal(PROCESSOR.preprocess(single), PROCESSOR.preprocess(ras_image()))


def test_the_spot_ends_at_its_anatomical_place():
    volume = PROCESSOR.preprocess(ras_image(spot=(12, 3, 10)))[0]  # right, posterior, superior
    places = (volume == volume.max()).nonzero().float()
    assert len(places) == 27
    assert places.mean(dim=0).tolist() == [10, 3, 12]  # z, y, x


@pytest.mark.parametrize("name", ["image.nii", "image.nii.gz"])
@pytest.mark.parametrize("codes", ["LPS", "LAS", "RPI", "SAR", "PIL", "ASL"])
def test_storage_order_does_not_matter(codes, name, tmp_path):
    image = ras_image()
    reoriented(image, codes).to_filename(tmp_path / name)
    stored = nib.load(tmp_path / name)
    assert nib.aff2axcodes(stored.affine) == tuple(codes)
    torch.testing.assert_close(PROCESSOR.preprocess(stored), PROCESSOR.preprocess(image))


def test_an_image_flipped_in_memory_is_fine():
    image = ras_image()
    torch.testing.assert_close(PROCESSOR.preprocess(reoriented(image, "LPS")), PROCESSOR.preprocess(image))


def test_preprocess_leaves_the_image_alone():
    image = ras_image()
    PROCESSOR.preprocess(image)
    assert np.array_equal(image.dataobj, ras_image().dataobj)


def test_an_oblique_affine_is_taken_to_the_nearest_axes():
    image = ras_image()
    cosine, sine = np.cos(0.1), np.sin(0.1)
    turn = np.array([[cosine, -sine, 0, 0], [sine, cosine, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    oblique = nib.Nifti1Image(np.asarray(image.dataobj), turn @ image.affine)
    torch.testing.assert_close(PROCESSOR.preprocess(oblique), PROCESSOR.preprocess(image))


def test_anisotropic_voxels_become_a_cube():
    data = np.asarray(ras_image(spot=(12, 3, 10)).dataobj).repeat(2, axis=0)  # twice the voxels along x
    image = nib.Nifti1Image(data, np.diag([EDGE / 2, EDGE, EDGE, 1.0]))
    volume = PROCESSOR.preprocess(image)
    assert volume.shape == (1, SIZE, SIZE, SIZE)
    torch.testing.assert_close(volume, PROCESSOR.preprocess(ras_image(spot=(12, 3, 10))), rtol=1e-3, atol=2e-3)


def test_to_nifti_and_back_keeps_places_and_values():
    volume = PROCESSOR.preprocess(ras_image())
    image = to_nifti(volume, PROCESSOR.spacing)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    torch.testing.assert_close(PROCESSOR.preprocess(image), volume, rtol=1e-4, atol=1e-4)


def test_what_to_nifti_wrote_keeps_its_intensities(tmp_path):
    """Cut, resampled or as it lies; unless another program has scaled it since. Nothing in this one is black or white."""
    volume = 0.3 * PROCESSOR.preprocess(ras_image(spot=(5, 3, 10))) - 0.2
    to_nifti(volume, PROCESSOR.spacing).to_filename(tmp_path / "made.nii.gz")
    image = read_image(tmp_path / "made.nii.gz")
    for processed in (PROCESSOR.preprocess(image), scale_on_own_grid(image), PROCESSOR.preprocess([image, image])[:1]):
        torch.testing.assert_close(processed, volume)
    half = torch.nn.functional.avg_pool3d(volume, 2)
    torch.testing.assert_close(VolumeProcessor(SIZE // 2, SIZE * EDGE).preprocess(image), half)
    reduced, geometry = VolumeProcessor(SIZE // 2, SIZE * EDGE / 2).preprocess_with_geometry(image)
    torch.testing.assert_close(reduced, volume[:, 4:12, 4:12, 4:12])
    np.testing.assert_allclose(geometry.intensities, [[0, 1]], atol=1e-6)
    scaled = nib.Nifti1Image(5 * np.asarray(image.dataobj), image.affine, image.header)
    assert PROCESSOR.preprocess(scaled).max() == 1


def test_to_nifti_writes_unequal_spacing_in_the_order_of_axes():
    image = to_nifti(torch.zeros(1, 4, 6, 8), spacing=(3.0, 2.0, 1.0))
    assert image.shape == (8, 6, 4)
    assert image.header.get_zooms() == (1.0, 2.0, 3.0)
    with pytest.raises(InputError, match="shape \\[1, D, H, W\\] is needed"):
        to_nifti(torch.zeros(2, 4, 4, 4), (1.0, 1.0, 1.0))


def test_a_small_image_is_padded_with_background():
    data = np.full((8, 8, 8), 5, dtype=np.float32)
    data[2:6, 2:6, 2:6] = 9
    volume = PROCESSOR.preprocess(nib.Nifti1Image(data, np.diag([EDGE, EDGE, EDGE, 1.0])))
    assert volume.shape == (1, SIZE, SIZE, SIZE)
    assert (volume[0, 6:10, 6:10, 6:10] == 1).all()
    assert (volume > -1).sum() == 4**3


def test_thick_slices_are_averaged_in_plane_too():
    """One axis that must grow leaves the means over the others as they are."""
    noise = np.random.default_rng(0).normal(size=(48, 48, 48)).astype(np.float32)
    thick = noise.reshape(48, 48, 12, 4)[..., 0]
    processor = VolumeProcessor(16, 48.0)
    resized = processor._resize(thick).numpy()
    assert resized.std() < 0.5 * thick.std()  # of nine voxels each
    means = thick.reshape(16, 3, 16, 3, 12).mean(axis=(1, 3))
    assert np.abs(resized[..., 0] - means[..., 0]).max() < 1e-5  # the outermost slice is not interpolated


def test_foreground_near_a_border_is_centred_too():
    data = np.zeros((SIZE, SIZE, SIZE), dtype=np.float32)
    data[0:6, 0:6, 0:6] = 9
    volume = PROCESSOR.preprocess(nib.Nifti1Image(data, np.diag([EDGE, EDGE, EDGE, 1.0])))
    assert (volume[0, 5:11, 5:11, 5:11] == 1).all()


def test_bad_processor_settings_raise():
    with pytest.raises(InputError, match="image_size=0"):
        VolumeProcessor(0)
