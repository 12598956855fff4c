"""Phantoms: functions of (seed, index), with classes that differ, readable as a NIfTI folder."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import load_folder

from msrl_diffusers import VolumeProcessor, load_phantoms, make_phantom, write_phantoms
from msrl_diffusers.data.phantoms import FIELD_OF_VIEW
from msrl_diffusers.errors import InputError


def correlation(one, other):
    return np.corrcoef(np.asarray(one, dtype=float).ravel(), np.asarray(other, dtype=float).ravel())[0, 1]


def test_a_phantom_is_a_function_of_seed_and_index():
    phantom = make_phantom(3, 0, image_size=16, seed=5)
    again = make_phantom(3, 0, image_size=16, seed=5)
    assert np.array_equal(phantom.volume, again.volume)
    assert np.array_equal(phantom.tumor_mask, again.tumor_mask)
    assert phantom.parameters == again.parameters
    for other in (make_phantom(4, 0, 16, 5), make_phantom(3, 1, 16, 5), make_phantom(3, 0, 16, 6)):
        assert not np.array_equal(phantom.volume, other.volume)


def test_intensities_and_background():
    phantom = make_phantom(0, 0, image_size=32)
    assert phantom.volume.shape == (1, 32, 32, 32)
    assert phantom.volume.dtype == np.float32
    assert phantom.volume.min() == -1
    assert 0.3 < phantom.volume.max() <= 1
    faces = [phantom.volume[0].take(edge, axis) for axis in range(3) for edge in (0, -1)]
    assert all((face == -1).all() for face in faces)
    assert 0.1 < (phantom.volume > -0.95).mean() < 0.6


@pytest.mark.parametrize("index", range(4))
def test_classes_differ_in_their_tumour(index):
    high, low = make_phantom(index, 0, image_size=32), make_phantom(index, 1, image_size=32)
    assert set(np.unique(high.tumor_mask)) == {0, 1, 2, 4}
    assert set(np.unique(low.tumor_mask)) == {0, 1}
    ring, core = high.volume[0][high.tumor_mask == 4].mean(), high.volume[0][high.tumor_mask == 1].mean()
    assert ring > core + 0.3
    assert low.volume[0][low.tumor_mask == 1].std() < high.volume[0][high.tumor_mask > 0].std()


@pytest.mark.parametrize("label", [0, 1])
def test_every_size_shows_the_same_anatomy(label):
    small, large = (torch.from_numpy(make_phantom(0, label, size).volume) for size in (16, 32))
    assert correlation(F.avg_pool3d(large, 2), small) > 0.9
    assert make_phantom(0, label, 16).parameters == make_phantom(0, label, 32).parameters


def test_unknown_label_and_tiny_size_raise():
    with pytest.raises(InputError, match="label is one of"):
        make_phantom(0, 2)
    with pytest.raises(InputError, match="at least 8 voxels"):
        make_phantom(0, 0, image_size=4)


def test_load_phantoms(phantoms):
    assert phantoms.class_counts() == {"HGG": 6, "LGG": 6}
    assert phantoms.pixel_values.shape == (12, 1, 16, 16, 16)
    assert phantoms.pixel_values.dtype == torch.float16
    assert len(set(phantoms.subject_ids)) == 12
    assert phantoms.spacing == (12.0, 12.0, 12.0)
    later = load_phantoms(2, image_size=16, first_index=4)
    assert later.subject_ids == phantoms.subject_ids[8:]
    assert torch.equal(later.pixel_values, phantoms.pixel_values[8:])


def test_processes_draw_the_same_phantoms(phantoms):
    drawn = load_phantoms(2, image_size=16, first_index=4, num_workers=2)
    assert drawn.subject_ids == phantoms.subject_ids[8:]
    assert torch.equal(drawn.class_labels, phantoms.class_labels[8:])
    assert torch.equal(drawn.pixel_values, phantoms.pixel_values[8:])


def test_written_phantoms_are_read_back(tmp_path):
    write_phantoms(tmp_path, 2, image_size=32)
    with open(tmp_path / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["grade"] for row in rows] == ["HGG", "LGG", "HGG", "LGG"]
    assert json.loads(rows[0]["parameters"])["index"] == 0
    image = nib.load(tmp_path / rows[0]["file_name"])
    assert image.header.get_zooms() == (6.0, 6.0, 6.0)
    mask = nib.load(tmp_path / "masks" / f"{rows[0]['subject_id']}_seg.nii.gz")
    assert np.array_equal(np.unique(np.asarray(mask.dataobj)), [0, 1, 2, 4])
    np.testing.assert_allclose(mask.affine, image.affine)

    loaded = load_folder(tmp_path, VolumeProcessor(32, FIELD_OF_VIEW), label_column="grade")
    original = load_phantoms(2, image_size=32)
    assert loaded.id2label == original.id2label
    assert loaded.spacing == original.spacing
    assert sorted(loaded.subject_ids) == sorted(original.subject_ids)
    for subject, volume, label in zip(loaded.subject_ids, loaded.pixel_values, loaded.class_labels, strict=True):
        place = original.subject_ids.index(subject)
        assert label == original.class_labels[place]
        shifts = [
            correlation(torch.roll(volume, (dz, dy, dx), (1, 2, 3)), original.pixel_values[place])
            for dz in (-1, 0, 1) for dy in (-1, 0, 1) for dx in (-1, 0, 1)
        ]  # fmt: skip
        assert max(shifts) > 0.95
