"""What tests look at in a listing: labels, reasons, and where the axes of its images run."""

from pathlib import Path

import nibabel as nib
import numpy as np
from layouts import SPOT_CENTER

from msrl_diffusers.data.cases import Listing
from msrl_diffusers.data.reading import read_image


def labels(listing: Listing) -> dict[str, str]:
    """The label of each case by its name."""
    return {case.name: case.label for case in listing.cases}


def reasons(listing: Listing) -> dict[str, str]:
    """Each reason by the name of what was left out; sentences of one line that end."""
    for rejection in listing.rejected:
        assert "\n" not in rejection.reason
        assert rejection.reason.endswith(".")
    return {Path(rejection.file).name: rejection.reason for rejection in listing.rejected}


def ras(path: str, orientation: str | None = None) -> np.ndarray:
    """The array `[x, y, z]` of an image, running to the right, anterior and superior."""
    return np.asarray(nib.as_closest_canonical(read_image(path, orientation)).dataobj)


def assert_spot_is_in_place(listing: Listing) -> None:
    """The bright cube of `layouts` is at the right, anterior and superior in every image."""
    for case in listing.cases:
        for image in case.images.values():
            data = ras(image, case.orientation)
            bright = np.argwhere(data >= 1000)
            assert len(bright) == 27
            assert tuple(bright.mean(axis=0)) == SPOT_CENTER
