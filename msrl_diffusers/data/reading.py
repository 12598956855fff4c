"""Reading images that users hand in: a right array, or one sentence that says why not.

Headers are believed only as far as the file bears them out, so that a damaged or hostile one allocates nothing.
"""

import math
import os
import stat
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt

from ..errors import InputError


MAX_VOXELS = 2**28  # 1 GiB as float32; the largest head scans in use have a quarter of it
MAX_COMPRESSION = 1100  # deflate can't do better than 1032
MAX_TRAILER = 2**26  # bytes after the voxels; MGH has a footer there, of some kilobytes
VOXEL_EDGES = (0.01, 100.0)  # millimetres
COMPRESSED = (".gz", ".bz2", ".mgz")


def read_image(path: str | Path, orientation: str | None = None) -> nib.Nifti1Image:
    """The 3D image at `path` in memory, float32, scaled as its header says, with a usable affine.

    NIfTI-1 and -2, Analyze, MGH: what nibabel reads. A trailing axis of one frame is dropped. Of two affines in a NIfTI
    header the sform counts, as the standard has it.

    Args:
        path: a file; for a pair, the `.img`.
        orientation: where the axes run *to*, such as `"ASL"`; replaces what the header says, voxel sizes are kept.

    Raises:
        InputError: not readable, not an image, damaged, not 3D, NaN or infinity, constant, or without a usable affine.
    """
    path = Path(path)
    _check_file(path)
    try:
        image = nib.load(path, mmap=False)
        shape, dtype = image.shape, image.get_data_dtype()
    except Exception as error:  # nibabel, zlib, numpy and struct each have their own
        raise InputError(f"{path} can't be read as an image: {_one_line(error)}") from error
    shape = _checked_shape(path, shape)
    _check_size(path, image, shape, dtype)
    try:
        data = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
        _check_stream(image, math.prod(shape) * dtype.itemsize)
    except Exception as error:
        raise InputError(f"{path} is damaged, its voxels can't be read: {_one_line(error)}; copy it again") from error
    check_values(data, path)
    result = nib.Nifti1Image(data, _checked_affine(path, image, orientation, shape))
    if isinstance(image, nib.Nifti1Pair):
        result.header["descrip"] = image.header["descrip"]  # it tells `VolumeProcessor` what `to_nifti` wrote
    return result


def check_values(data: np.ndarray, name: str | Path) -> None:
    """Raise InputError where voxels are not finite or all equal; `name` begins the sentence."""
    low, high = data.min(), data.max()  # NaN where any voxel is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{name} holds NaN or infinite values; repair or drop it")
    if low == high:
        raise InputError(f"{name} is constant ({low:g} everywhere); drop it")


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is no regular file")
        with path.open("rb") as file:
            magic = file.read(2)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:  # no permission, or a loop of symbolic links
        raise InputError(f"{path} can't be opened: {error.strerror}") from error
    if path.suffix.lower() == ".gz" and magic != b"\x1f\x8b":
        raise InputError(f"{path} is named .gz but is not compressed by gzip; rename or download it again")


def _checked_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) < 3 or any(edge < 1 for edge in shape):
        raise InputError(f"{path}: a 3D image is needed, this one has shape {shape}")
    if math.prod(shape[3:]) != 1:
        raise InputError(f"{path}: a 3D image is needed, this one has shape {shape}; extract one frame first")
    if math.prod(shape) > MAX_VOXELS:
        raise InputError(f"{path}: the header claims {shape} voxels, more than any head scan has; it is damaged")
    return shape[:3]


def _check_size(path: Path, image, shape: tuple[int, int, int], dtype: np.dtype) -> None:
    if dtype.kind not in "iuf":
        raise InputError(f"{path} holds {dtype} values; a grey-value image is needed")
    holder = image.file_map["image"].filename or path
    try:
        available = os.path.getsize(holder)
    except OSError as error:
        raise InputError(f"{holder} can't be opened: {error.strerror}") from error
    claimed = math.prod(shape) * dtype.itemsize
    if str(holder).lower().endswith(COMPRESSED):
        available *= MAX_COMPRESSION
    elif getattr(image.dataobj, "offset", 0) + claimed > available:
        raise InputError(f"{holder} is cut off: its header claims {claimed} bytes of voxels, the file has {available}")
    if claimed > available:
        raise InputError(
            f"{holder} is too small for the {claimed} bytes of voxels that its header claims; it is damaged"
        )


def _check_stream(image, claimed: int) -> None:
    """Read a compressed file to its end, where its checksum stands: nibabel stops at the last of its `claimed` bytes of voxels.

    Raises:
        Exception: the decompressor's own, of a damaged stream.
        ValueError: it goes on for longer than any footer.
    """
    holder = image.file_map["image"]
    if not str(holder.filename).lower().endswith(COMPRESSED):
        return
    allowed = getattr(image.dataobj, "offset", 0) + claimed + MAX_TRAILER
    with holder.get_prepare_fileobj("rb") as stream:
        while chunk := stream.read(2**20):
            allowed -= len(chunk)
            if allowed < 0:
                raise ValueError(f"more than {MAX_TRAILER} bytes follow them")


def _checked_affine(path: Path, image, orientation: str | None, shape: tuple[int, int, int]) -> np.ndarray:
    affine = image.affine
    if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: the header's affine is not invertible; set a right one")
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    if edges.min() < VOXEL_EDGES[0] or edges.max() > VOXEL_EDGES[1]:
        sizes = " x ".join(f"{edge:g}" for edge in edges)
        raise InputError(f"{path}: voxels of {sizes} mm can't be right; repair the header (millimetres are needed)")
    if orientation is None:
        return affine
    return affine_of(orientation, edges, shape)


def affine_of(orientation: str, edges: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The affine of an array whose axes run to `orientation`, with voxels of `edges` millimetres, centred on 0."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (axis, direction) in enumerate(axcodes2ornt(orientation)):
        affine[int(axis), column] = direction * edges[column]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
