"""Images of any size and mode become squares of RGB, and what can't be kept is refused."""

import numpy as np
import pytest
from layouts import picture
from PIL import Image
from PIL.ExifTags import Base

from msrl_diffusers.data.image_folder import square_image
from msrl_diffusers.errors import InputError


SIZE = 16


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "RGBA", "LA", "YCbCr"])
@pytest.mark.parametrize("size", [(16, 16), (40, 20), (9, 31)])
def test_images_of_any_size_and_mode(size, mode):
    pixels = square_image(picture(0, size, mode), SIZE, "x")
    assert pixels.shape == (3, SIZE, SIZE)
    assert pixels.dtype == np.uint8
    assert pixels.std() > 5
    gray = mode in ("L", "1", "LA")
    assert gray == bool((pixels[0] == pixels[2]).all())


def test_the_middle_is_kept():
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, 16:32] = (10, 100, 200)
    pixels = square_image(Image.fromarray(wide), SIZE, "x")
    assert (pixels == np.array([10, 100, 200])[:, None, None]).all()


def test_images_are_turned_upright(tmp_path):
    upright = picture(1, (16, 16))
    exif = Image.Exif()
    exif[Base.Orientation] = 6  # to be turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        assert np.array_equal(square_image(turned, SIZE, "x"), np.asarray(upright).transpose(2, 0, 1))


def test_what_is_transparent_becomes_white():
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert (square_image(clear, SIZE, "x") == 255).all()
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = bytes([255, 0])
    assert (square_image(palette, SIZE, "x") == 255).all()


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = np.repeat(np.linspace(0, 65535, SIZE).astype(np.uint16)[None], SIZE, axis=0)
    pixels = square_image(Image.fromarray(ramp), SIZE, "x")
    assert np.abs(pixels[0, 0] - np.linspace(0, 255, SIZE)).max() <= 1
    with pytest.raises(InputError, match=r"scan.tif has 32 bits per pixel \(mode F\); save it as 8-bit RGB"):
        square_image(Image.fromarray(ramp.astype(np.float32)), SIZE, "scan.tif")


def test_twelve_bits_in_sixteen_are_refused():
    """They would become black, in 16 levels; an image of one value is no sign of its scale."""
    ramp = np.repeat(np.linspace(0, 4095, SIZE).astype(np.uint16)[None], SIZE, axis=0)
    with pytest.raises(InputError, match=r"x.png has 16 bits per pixel, but no value above 4095, .*multiply .* by 16"):
        square_image(Image.fromarray(ramp), SIZE, "x.png")
    assert square_image(Image.fromarray(ramp * 16), SIZE, "x.png").max() == 255
    assert (square_image(Image.fromarray(np.zeros_like(ramp)), SIZE, "x.png") == 0).all()


def test_bytes_are_read_as_files_are(tmp_path):
    picture(3).save(tmp_path / "a.png")
    content = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    expected = square_image({"path": str(tmp_path / "a.png"), "bytes": None}, SIZE, "x")
    assert np.array_equal(square_image(content, SIZE, "x"), expected)
    assert np.array_equal(square_image(picture(3), SIZE, "x"), expected)
