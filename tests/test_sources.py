"""Sets of volumes: axes, scaling and order are right, every file is read once, and what is wrong is one sentence."""

import nibabel as nib
import numpy as np
import pytest
import torch
from layouts import EDGE, FIELD_OF_VIEW, SIZE, SPOT_CENTER, marked_volume, write_csv, write_nifti
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from tiny import tiny_phantoms

from msrl_diffusers import VolumeProcessor, write_phantoms
from msrl_diffusers.data.processor import scale_on_own_grid
from msrl_diffusers.data.reading import read_image
from msrl_diffusers.data.volumes import VolumeDataset
from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation import sources
from msrl_diffusers.evaluation.sources import check_comparable, check_kind, open_source


ORIENTATIONS = ("RAS", "LPS", "ASL", "PIR")


@pytest.fixture
def folder(tmp_path):
    """Five marked phantoms in several storage orders, two of them in a folder below."""
    for index, name in enumerate(["a.nii", "b.nii.gz", "more/c.nii.gz", "more/d.nii.gz", "z.nii.gz"]):
        write_nifti(tmp_path / "set" / name, marked_volume(index, index % 2), ORIENTATIONS[index % 4])
    (tmp_path / "set" / "._a.nii").write_bytes(b"left by a Mac")
    return tmp_path / "set"


@pytest.fixture
def read_paths(monkeypatch):
    """The paths whose voxels were read, as they are read."""
    paths = []
    monkeypatch.setattr(sources, "read_image", lambda path: paths.append(path) or read_image(path))
    return paths


def write_image(path, shape=(6, 8, 10), edges=(1.0, 2.0, 3.0), orientation="RAS", seed=0):
    """A random RAS array `[x, y, z]` whose file's axes run to `orientation`."""
    data = np.random.default_rng(seed).uniform(1, 9, shape).astype(np.float32)
    image = nib.Nifti1Image(data, np.diag([*edges, 1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(orientation))).to_filename(path)
    return data


def failure(function, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_left_stays_left_whatever_the_storage_order(folder):
    source = open_source(folder)
    assert source.names == ["a.nii", "b.nii.gz", "more/c.nii.gz", "more/d.nii.gz", "z.nii.gz"]
    assert (source.shape, source.spacing) == ((1, SIZE, SIZE, SIZE), (EDGE, EDGE, EDGE))
    for volume in source.take(range(5)):
        spot = (volume[0] == 1).nonzero().float().mean(dim=0)
        assert spot.tolist() == list(SPOT_CENTER[::-1])


def test_axes_are_reordered_in_headers_as_in_voxels(tmp_path):
    data = write_image(tmp_path / "PIR.nii.gz", orientation="PIR")
    source = open_source(tmp_path)
    assert nib.load(tmp_path / "PIR.nii.gz").shape == (8, 10, 6)
    assert (source.shape, source.spacing) == ((1, 10, 8, 6), (3.0, 2.0, 1.0))
    low, high = np.percentile(data, (0, 99.5))
    expected = np.clip((data - low) / (high - low), 0, 1).transpose(2, 1, 0) * 2 - 1
    torch.testing.assert_close(source.take([0])[0, 0], torch.from_numpy(expected).float())


def test_intensities_are_scaled_as_the_processor_does(tmp_path):
    """Where its cube is the whole image; with a background that some voxels lie below."""
    data = np.zeros((SIZE, SIZE, SIZE), np.float32)
    data[2:14, 2:14, 2:14] = np.random.default_rng(0).uniform(1, 9, (12, 12, 12))
    data[7, 7, 7] = -5
    image = nib.Nifti1Image(data, np.diag([-EDGE, EDGE, EDGE, 1]))
    image.to_filename(tmp_path / "image.nii")
    expected = VolumeProcessor(SIZE, FIELD_OF_VIEW).preprocess(image)
    assert torch.equal(open_source(tmp_path).take([0])[0], expected)
    assert (expected == -1).float().mean() > 0.5


def test_images_are_resampled_to_the_size_asked_for(folder):
    source = open_source(str(folder), image_size=8, field_of_view=FIELD_OF_VIEW)
    assert (source.shape, source.spacing) == ((1, 8, 8, 8), (2 * EDGE,) * 3)
    processor = VolumeProcessor(8, FIELD_OF_VIEW)
    expected = torch.stack([processor.preprocess(read_image(folder / name)) for name in source.names])
    assert torch.equal(torch.cat(list(source.batches(2))), expected)


def test_unequal_images_can_be_resampled(tmp_path):
    write_image(tmp_path / "a.nii")
    write_image(tmp_path / "b.nii", shape=(12, 8, 10))
    source = open_source(tmp_path, image_size=4, field_of_view=12.0)
    assert source.take([0, 1]).shape == (2, 1, 4, 4, 4)


def test_a_pass_reads_every_image_once_and_opening_reads_none(folder, read_paths):
    source = open_source(folder)
    assert read_paths == []
    sizes = [len(batch) for batch in source.batches(2)]
    assert sizes == [2, 2, 1]
    assert read_paths == [folder / name for name in source.names]
    next(source.batches(2))
    assert len(read_paths) == 5 + 2


def sources_of(kind, folder, tmp_path):
    if kind == "folder":
        return open_source(folder)
    dataset = tiny_phantoms()
    if kind == "dataset":
        return open_source(dataset)
    dataset.save(tmp_path / "set.safetensors")
    return open_source(tmp_path / "set.safetensors")


@pytest.mark.parametrize("kind", ["folder", "file", "dataset"])
def test_batches_takes_and_selections_are_the_same_volumes(kind, folder, tmp_path):
    source = sources_of(kind, folder, tmp_path)
    everything = source.take(range(len(source)))
    assert everything.dtype == torch.float32
    assert everything.shape == (len(source), *source.shape)
    assert everything.flatten(1).std(dim=1).min() > 0.1
    assert everything.min() == -1
    assert 0.5 < everything.max() <= 1
    for batch_size in (1, 3, 100):
        assert torch.equal(torch.cat(list(source.batches(batch_size))), everything)
    part = source.select(torch.tensor([4, 0]))
    assert part.names == [source.names[4], source.names[0]]
    assert torch.equal(torch.cat(list(part.batches(2))), everything[[4, 0]])
    assert torch.equal(part.select([1]).take([0]), everything[:1])
    assert len(source) == len(everything)
    assert source.take([]).shape == (0, *source.shape)
    assert "batch_size must be at least 1" in failure(lambda: next(source.batches(0)))


def test_prepared_volumes_keep_names_classes_and_spacing(folder, tmp_path):
    dataset = tiny_phantoms()
    for kind in ("file", "dataset"):
        source = sources_of(kind, folder, tmp_path)
        assert source.names == dataset.subject_ids
        assert source.class_names == ["HGG", "LGG"] * 3
        assert source.select([5, 0]).class_names == ["LGG", "HGG"]
        assert (source.shape, source.spacing) == ((1, 16, 16, 16), dataset.spacing)
        assert torch.equal(source.take([2, 5]), dataset.pixel_values[[2, 5]].float())


def test_metadata_gives_the_classes_and_the_images(folder):
    rows = [["file_name", "class_label"], ["z.nii.gz", "sick"], ["a.nii", "well"]]
    write_csv(folder / "metadata.csv", rows)
    source = open_source(folder)
    assert (source.names, source.class_names) == (["a.nii", "z.nii.gz"], ["well", "sick"])
    write_csv(folder / "metadata.csv", [[*row[:1], *row] for row in rows])
    assert open_source(folder).class_names == ["well", "sick"]
    write_csv(folder / "metadata.csv", [["subject_id", "label"], ["a", "well"]])
    assert (open_source(folder).class_names, len(open_source(folder))) == (None, 5)
    write_csv(folder / "metadata.csv", [*rows, ["b.nii.gz", ""]])
    assert "metadata.csv gives b.nii.gz no class_label" in failure(open_source, folder)
    write_csv(folder / "metadata.csv", [*rows, ["gone.nii.gz", "well"]])
    assert "names the image 'gone.nii.gz', which is not there" in failure(open_source, folder)


@pytest.mark.parametrize("image_size", [None, 8])
def test_a_table_s_images_are_channels(tmp_path, image_size):
    """As loaders take them, and as `msrl generate` writes volumes of several channels."""
    for name in ("a-t1.nii", "a-t2.nii", "a-seg.nii", "b-t1.nii", "b-t2.nii", "b-seg.nii"):
        write_image(tmp_path / name, seed=len(name) + ord(name[3]) + ord(name[0]))
    rows = [
        ["t1_file_name", "t2_file_name", "seg_file_name"],
        *([f"{one}-{kind}.nii" for kind in ("t1", "t2", "seg")] for one in "ba"),
    ]
    write_csv(tmp_path / "metadata.csv", rows)
    source = open_source(tmp_path, image_size, 16.0)
    assert (len(source), source.names, source.shape[0]) == (2, ["a-t1.nii", "b-t1.nii"], 2)
    volumes = source.take([0, 1])
    assert volumes.shape == (2, *source.shape)
    if image_size is None:
        expected = scale_on_own_grid(read_image(tmp_path / "b-t2.nii"))
    else:
        images = [read_image(tmp_path / f"b-{kind}.nii") for kind in ("t1", "t2")]
        expected = VolumeProcessor(8, 16.0).preprocess(images)[1:]
    torch.testing.assert_close(volumes[1, 1:], expected)
    rows[0][0] = "file_name"  # then that is the first channel
    write_csv(tmp_path / "metadata.csv", rows)
    torch.testing.assert_close(open_source(tmp_path, image_size, 16.0).take([0, 1]), volumes)
    rows[1][1] = "gone.nii"
    write_csv(tmp_path / "metadata.csv", rows)
    assert "names the image 'gone.nii', which is not there" in failure(open_source, tmp_path)


def test_masks_beside_the_images_are_no_volumes(tmp_path):
    write_phantoms(tmp_path, 2, image_size=SIZE)
    source = open_source(tmp_path)
    assert len(list(tmp_path.rglob("*.nii.gz"))) == 8
    assert (len(source), source.class_names) == (4, None)
    assert not any("seg" in name for name in source.names)


def test_nothing_to_read_is_one_sentence(tmp_path):
    assert "nowhere does not exist" in failure(open_source, tmp_path / "nowhere")
    assert f"{tmp_path} holds no .nii or .nii.gz image" in failure(open_source, tmp_path)
    (tmp_path / "scan.dcm").write_bytes(b"")
    assert "scan.dcm is neither a folder" in failure(open_source, tmp_path / "scan.dcm")
    assert "the given VolumeDataset holds no volumes" in failure(open_source, tiny_phantoms().select([]))


def test_unequal_grids_of_a_set_name_both_files(tmp_path):
    write_image(tmp_path / "a.nii")
    write_image(tmp_path / "b.nii", shape=(6, 8, 11))
    sentence = failure(open_source, tmp_path)
    assert "a.nii and " in sentence
    assert "b.nii have 10 x 8 x 6 and 11 x 8 x 6 voxels (D x H x W); give --image_size" in sentence
    write_image(tmp_path / "b.nii", edges=(1, 2, 3.1))
    assert "voxels of 3 x 2 x 1 and 3.1 x 2 x 1 mm" in failure(open_source, tmp_path)
    write_image(tmp_path / "b.nii", edges=(1, 2, 3.001))
    assert len(open_source(tmp_path)) == 2


def test_a_file_that_is_no_image_is_found_at_opening(folder):
    (folder / "bad.nii.gz").write_bytes(b"<html>please log in</html>")
    assert "bad.nii.gz can't be read as an image" in failure(open_source, folder)
    nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.float32), np.eye(4)).to_filename(folder / "bad.nii.gz")
    assert "bad.nii.gz: a 3D image is needed, this one has shape (4, 4, 4, 2)" in failure(open_source, folder)


def test_damaged_voxels_are_found_when_read(folder):
    path = folder / "more" / "c.nii.gz"
    path.write_bytes(path.read_bytes()[:-100])
    batches = open_source(folder).batches(2)
    next(batches)
    assert "c.nii.gz is damaged" in failure(next, batches)


def test_an_image_that_cannot_be_scaled_is_named(tmp_path):
    data = np.zeros((SIZE, SIZE, SIZE), np.float32)
    data[7, 7, 7] = 1
    nib.Nifti1Image(data, np.eye(4)).to_filename(tmp_path / "flat.nii")
    assert "flat.nii: the image has no contrast" in failure(open_source(tmp_path).take, [0])


def test_a_file_that_is_no_set_of_volumes(tmp_path):
    path = tmp_path / "set.safetensors"
    path.write_bytes(b"nothing")
    assert f"{path} can't be read as prepared volumes" in failure(open_source, path)
    tiny_phantoms().save(path)
    path.write_bytes(path.read_bytes()[:-64])
    assert f"{path} can't be read as prepared volumes" in failure(open_source, path)


def test_prepared_volumes_are_not_resampled():
    assert len(open_source(tiny_phantoms(), image_size=16)) == 6
    assert "16 x 16 x 16 voxels, which image_size=8 does not" in failure(open_source, tiny_phantoms(), image_size=8)


def test_a_volume_that_is_not_finite_is_named():
    dataset = tiny_phantoms()
    dataset.pixel_values[1, 0, 3, 3, 3] = float("nan")
    source = open_source(dataset)
    assert source.take([0]).isfinite().all()
    assert f"{dataset.subject_ids[1]} of the given VolumeDataset holds NaN" in failure(source.take, [0, 1])


def test_two_sets_are_compared_before_they_are_read(tmp_path):
    dataset = tiny_phantoms()
    real = open_source(dataset)

    def other(pixel_values=dataset.pixel_values, spacing=dataset.spacing):
        return open_source(
            VolumeDataset(pixel_values, dataset.class_labels, dataset.subject_ids, dataset.id2label, spacing)
        )

    check_comparable(real, other(spacing=tuple(1.005 * edge for edge in dataset.spacing)))
    sentence = failure(check_comparable, real, other(spacing=(12.0, 12.0, 12.5)))
    assert "voxels of 12 x 12 x 12 and 12 x 12 x 12.5 mm; give --image_size" in sentence
    assert (
        "the pipeline does not say how large its voxels are, those of the given VolumeDataset are 12 x 12 x 12 mm"
        in failure(check_kind, real, "the pipeline", real.shape, None)
    )
    assert "have 1 and 2 channels" in failure(
        check_comparable, real, other(dataset.pixel_values.repeat(1, 2, 1, 1, 1))
    )
    assert "16 x 16 x 16 and 16 x 16 x 15 voxels" in failure(
        check_comparable, real, other(dataset.pixel_values[..., :15])
    )
