"""What holds for every loader; what one of them does with its own layout is in the file of its name."""

import numpy as np
import pytest
from layouts import SPOT, marked_volume, write_bids, write_brats, write_datalist, write_nifti_folder, write_oasis
from listings import assert_spot_is_in_place

from msrl_diffusers.data.cases import LOADERS, list_cases
from msrl_diffusers.errors import InputError


WRITERS = {
    "brats2019": write_brats,
    "oasis1": write_oasis,
    "bids": write_bids,
    "nifti_folder": write_nifti_folder,
    "datalist": write_datalist,
}


def test_the_mark_is_on_one_side_only():
    volume = marked_volume(0, 0)
    assert volume.shape == (16, 16, 16)
    assert (volume[SPOT] == 1000).all()
    for axis in range(3):
        assert np.flip(volume, axis)[SPOT].max() <= 500
    assert marked_volume(0, 0, 32)[20:26, 18:24, 16:22].min() == 1000


@pytest.mark.parametrize("loader", LOADERS)
def test_left_is_left(tmp_path, loader):
    WRITERS[loader](tmp_path)
    listing = list_cases(loader, tmp_path)
    assert listing.rejected == []
    assert {case.label for case in listing.cases} == set(listing.classes)
    assert len({case.name for case in listing.cases}) == 4
    assert_spot_is_in_place(listing)


@pytest.mark.parametrize("loader", LOADERS)
def test_hidden_copies_of_a_mac_are_ignored(tmp_path, loader):
    WRITERS[loader](tmp_path)
    listing = list_cases(loader, tmp_path)
    for path in list(tmp_path.rglob("*")):
        (path.parent / f"._{path.name}").touch()
    assert list_cases(loader, tmp_path) == listing


@pytest.mark.parametrize("loader", LOADERS)
def test_an_empty_folder_is_one_sentence(tmp_path, loader):
    with pytest.raises(InputError) as caught:
        list_cases(loader, tmp_path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{tmp_path} h")  # "has no ..." or "holds nothing ..."
    assert "\n" not in sentence
