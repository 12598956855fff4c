"""Reading hostile and odd images: a right array, or a sentence; nothing allocated on a header's word alone."""

import gzip
import resource
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest

from msrl_diffusers.data.reading import MAX_TRAILER, read_image
from msrl_diffusers.errors import InputError


SHAPE = (7, 8, 9)


def image(dtype=np.int16, affine=None, seed=0):
    data = np.random.default_rng(seed).integers(0, 1000, SHAPE).astype(dtype)
    return nib.Nifti1Image(data, np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine)


def sentence(path, **kwargs):
    with pytest.raises(InputError) as caught:
        read_image(path, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def patched(path, offset, content):
    """The file with some bytes of its header replaced."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        data = bytearray(file.read())
    data[offset : offset + len(content)] = content
    with opened(path, "wb") as file:
        file.write(data)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.img"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, ">i2", np.float32, np.float64])
def test_values_and_affine_are_read(tmp_path, name, dtype):
    stored = image(np.dtype(dtype))
    if name == "a.img":
        stored = nib.Nifti1Pair(stored.dataobj, stored.affine)
    stored.to_filename(tmp_path / name)
    read = read_image(tmp_path / name)
    assert np.array_equal(read.dataobj, stored.get_fdata(dtype=np.float32))
    assert np.asarray(read.dataobj).dtype == np.float32
    assert np.allclose(read.affine, stored.affine)


def test_slope_and_intercept_count(tmp_path):
    stored = image()
    stored.header.set_slope_inter(0.5, -3)
    stored.to_filename(tmp_path / "a.nii.gz")
    expected = nib.load(tmp_path / "a.nii.gz").get_fdata()
    assert np.allclose(read_image(tmp_path / "a.nii.gz").dataobj, expected, atol=1e-3)


def test_a_trailing_frame_is_dropped(tmp_path):
    nib.Nifti1Image(np.asarray(image().dataobj)[..., None], image().affine).to_filename(tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii").shape == SHAPE


def test_the_sform_counts_where_two_affines_disagree(tmp_path):
    stored = image()
    stored.set_sform(np.diag([-2.0, -3.0, 4.0, 1.0]), code=1)
    stored.set_qform(np.diag([2.0, 3.0, 4.0, 1.0]), code=1)
    stored.to_filename(tmp_path / "a.nii")
    assert nib.aff2axcodes(read_image(tmp_path / "a.nii").affine) == ("L", "P", "S")


@pytest.mark.parametrize("orientation", ["ASL", "LAS", "RPI"])
def test_a_given_orientation_replaces_the_header(tmp_path, orientation):
    data = np.asarray(image().dataobj)
    nib.Spm2AnalyzeImage(data, None).to_filename(tmp_path / "a.img")
    read = read_image(tmp_path / "a.img", orientation)
    assert "".join(nib.aff2axcodes(read.affine)) == orientation
    assert np.array_equal(read.dataobj, data)
    assert np.allclose(read.affine @ [*((np.array(SHAPE) - 1) / 2), 1], [0, 0, 0, 1])


@pytest.mark.parametrize("keep", [0, 1, 100, 348, 360, 600])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_truncated_file_is_refused(tmp_path, name, keep):
    image().to_filename(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
    assert name in sentence(tmp_path / name)


def test_names_in_capitals_are_names(tmp_path):
    """Of well compressed images, whose files are smaller than their voxels."""
    nib.Nifti1Image(np.eye(64)[:, :, None] * np.ones(64), np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").rename(tmp_path / "A.NII.GZ")
    assert read_image(tmp_path / "A.NII.GZ").shape == (64, 64, 64)
    (tmp_path / "B.NII.GZ").write_bytes(b"<html>please log in</html>")
    assert "not compressed by gzip" in sentence(tmp_path / "B.NII.GZ")


def test_a_file_that_is_no_gzip_is_refused(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"<html>please log in</html>")
    assert "not compressed by gzip" in sentence(tmp_path / "a.nii.gz")


def test_a_wrong_magic_is_refused(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"\x00" * 1000)
    assert "can't be read as an image" in sentence(tmp_path / "a.nii")


def test_a_corrupt_stream_is_refused(tmp_path):
    image().to_filename(tmp_path / "a.nii.gz")
    content = bytearray((tmp_path / "a.nii.gz").read_bytes())
    content[-8:-4] = struct.pack("<I", zlib.crc32(b"something else"))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.nii.gz").write_bytes(content)
    assert "a.nii.gz" in sentence(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("level", [0, 6])
def test_one_wrong_bit_in_a_long_stream_is_refused(tmp_path, level):
    """nibabel reads no further than the voxels, so that it never comes to the checksum."""
    path = tmp_path / "a.nii.gz"
    voxels = np.random.default_rng(0).integers(0, 1000, (48, 48, 48)).astype(np.int16)
    intact = gzip.compress(nib.Nifti1Image(voxels, np.eye(4)).to_bytes(), level)
    assert len(intact) > 100_000
    path.write_bytes(intact)
    assert np.array_equal(read_image(path).dataobj, voxels)
    for place in range(len(intact) // 6, len(intact), len(intact) // 6):
        content = bytearray(intact)
        content[place] ^= 1
        path.write_bytes(content)
        assert "is damaged, its voxels can't be read" in sentence(path)
    path.write_bytes(intact[:-4])  # of the trailer alone
    assert "is damaged, its voxels can't be read" in sentence(path)


def test_what_follows_the_voxels_is_not_read_for_ever(tmp_path):
    path = tmp_path / "a.nii.gz"
    content = image().to_bytes()
    path.write_bytes(gzip.compress(content + bytes(1000)))
    assert read_image(path).shape == SHAPE
    path.write_bytes(gzip.compress(content + bytes(MAX_TRAILER + 1), 1))
    assert f"more than {MAX_TRAILER} bytes follow them" in sentence(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(
    ("dims", "wanted"),
    [
        ((3, 32767, 32767, 32767), "claims"),
        ((3, 600, 600, 600), "claims"),
        ((3, 7, 8, 1000), "bytes of voxels"),
        ((3, 7, -8, 9), "a.nii"),
        ((3, 0, 8, 9), "a.nii"),
        ((4, 7, 8, 3, 3), "extract one frame first"),
        ((2, 63, 8, 1), "a 3D image is needed"),
    ],
)
def test_dimensions_that_cannot_be_are_refused(tmp_path, name, dims, wanted):
    path = tmp_path / name
    image().to_filename(path)
    patched(path, 40, struct.pack(f"<{len(dims)}h", *dims))
    if dims == (3, 7, 8, 1000) and name == "a.nii.gz":
        wanted = "voxels can't be read"  # a small file may well unpack to as much; it does not
    assert wanted in sentence(path)


def test_a_claim_of_gigabytes_allocates_nothing(tmp_path):
    path = tmp_path / "a.nii.gz"
    image().to_filename(path)
    patched(path, 40, struct.pack("<4h", 3, 640, 640, 640))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "too small" in sentence(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda data: np.where(data == data.max(), np.nan, data), "NaN or infinite"),
        (lambda data: np.where(data == data.max(), np.inf, data), "NaN or infinite"),
        (np.ones_like, "constant (1 everywhere)"),
    ],
)
def test_values_that_cannot_be_used_are_refused(tmp_path, change, wanted):
    nib.Nifti1Image(change(image(np.float32).get_fdata(dtype=np.float32)), np.eye(4)).to_filename(
        tmp_path / "a.nii.gz"
    )
    assert wanted in sentence(tmp_path / "a.nii.gz")


def test_colours_are_refused(tmp_path):
    colours = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.Nifti1Image(colours, np.eye(4)).to_filename(tmp_path / "a.nii")
    assert "a grey-value image is needed" in sentence(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("affine", "wanted"),
    [
        (np.diag([0.002, 0.002, 0.002, 1.0]), "can't be right"),
        (np.diag([2.0, 2.0, 500.0, 1.0]), "can't be right"),
        (np.array([[2.0, 2, 0, 0], [2, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]), "not invertible"),
    ],
)
def test_affines_that_cannot_be_are_refused(tmp_path, affine, wanted):
    stored = image()
    stored.header["sform_code"] = 1
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        stored.header[name] = affine[row]
    nib.save(nib.Nifti1Image(stored.dataobj, None, stored.header), tmp_path / "a.nii")
    assert wanted in sentence(tmp_path / "a.nii")


def test_what_is_no_file_is_refused(tmp_path):
    assert "does not exist" in sentence(tmp_path / "gone.nii")
    assert "no regular file" in sentence(tmp_path)
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    assert "can't be opened" in sentence(tmp_path / "loop.nii")


def test_a_pair_without_its_header_is_refused(tmp_path):
    nib.Nifti1Pair(image().dataobj, np.eye(4)).to_filename(tmp_path / "a.img")
    (tmp_path / "a.hdr").unlink()
    assert "a.img" in sentence(tmp_path / "a.img")


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Bits flipped (in the header, mostly), bytes cut off or doubled, or fields set to extremes."""
    data = bytearray(content)
    kind = rng.integers(4)
    if kind == 0:
        for place in rng.integers(0, len(data), rng.integers(1, 20)):
            data[place] ^= 1 << rng.integers(8)
    elif kind == 1:
        for place in rng.integers(0, min(352, len(data)), rng.integers(1, 8)):
            data[place] = rng.integers(256)
    elif kind == 2:
        del data[rng.integers(len(data)) :]
    else:
        place = rng.choice(
            [40, 42, 44, 46, 48, 68, 70, 72, 76, 80, 84, 88, 108, 112, 116, 252, 254, 256, 280, 296, 312, 348]
        )
        extreme = rng.choice([b"\x00" * 4, b"\xff" * 4, b"\xff\x7f\xff\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f"])
        data[place : place + 4] = extreme
    return bytes(data)


@pytest.mark.slow
def test_a_thousand_mutated_files_are_read_or_refused(tmp_path):
    """No crash, no hang, no memory; and what is read has the shape and the values of a usable image."""
    rng = np.random.default_rng(0)
    image().to_filename(tmp_path / "a.nii")
    nib.Spm2AnalyzeImage(np.asarray(image().dataobj), None).to_filename(tmp_path / "a.img")
    sources = {"nii": (tmp_path / "a.nii").read_bytes(), "hdr": (tmp_path / "a.hdr").read_bytes()}
    outcomes = {"read": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(1200):
        kind = ("nii", "nii.gz", "gz bytes", "hdr")[number % 4]
        path = tmp_path / ("m.img" if kind == "hdr" else "m.nii" if kind == "nii" else "m.nii.gz")
        if kind == "hdr":
            path.write_bytes((tmp_path / "a.img").read_bytes())
            path.with_suffix(".hdr").write_bytes(mutated(sources["hdr"], rng))
        elif kind == "gz bytes":
            path.write_bytes(mutated(gzip.compress(sources["nii"]), rng))
        else:
            content = mutated(sources["nii"], rng)
            path.write_bytes(gzip.compress(content) if kind == "nii.gz" else content)
        try:
            read = read_image(path)
        except InputError:
            outcomes["refused"] += 1
        else:
            data = np.asarray(read.dataobj)
            assert data.ndim == 3
            assert np.isfinite(data).all()
            assert data.min() < data.max()
            assert np.isfinite(read.affine).all()
            outcomes["read"] += 1
    assert min(outcomes.values()) > 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
