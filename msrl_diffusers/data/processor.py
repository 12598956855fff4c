"""VolumeProcessor: between NIfTI images and the tensors that models see. The one place that knows axes and affines.

Tensors are `[C, D, H, W]` with D from inferior to superior, H from posterior to anterior, W from left to right, so
that `volume[:, d]` is an axial slice. NIfTI arrays are stored `[x, y, z]` in RAS+: the transpose of the above.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import find_objects

from ..errors import InputError
from .reading import check_values


PERCENTILES = (0.0, 99.5)  # intensities that become -1 and 1
MASKED_SHARE = 0.1  # with so many voxels of exactly one background value, the image was masked
BELOW_SHARE = 0.05  # of the foreground: so many voxels below the background are tissue (z-scores), not errors
FINAL = b"msrl_diffusers: intensities 0 to 1 are final"  # `descrip` in the header of what `to_nifti` wrote


@dataclass(frozen=True)
class Geometry:
    """Where a prepared cube came from, so that it can be put back.

    Attributes:
        shape (`list[int]`): voxels of the source image along its own axes.
        affine (`list[list[float]]`): the source image's affine, 4 x 4.
        cube_affine (`list[list[float]]`): from voxels `[x, y, z]` of the cube to the same millimetres.
        intensities (`list[list[float]]`): per channel the source values that became -1 and 1.
    """

    shape: list[int]
    affine: list[list[float]]
    cube_affine: list[list[float]]
    intensities: list[list[float]]


class VolumeProcessor:
    """Reorient to RAS, cut a cube of `field_of_view` millimetres around the foreground, resample it to `image_size`
    voxels per edge (averaging over area) and scale the percentiles to [-1, 1].

    The foreground is all that differs from the background's value: the brain of a masked image, while one with noise around the
    head is cut at its middle.

    The edges of the cube are whole source voxels, so its field of view is right to half a source voxel.

    Images that `to_nifti` wrote, of volumes a model generated for example, keep their intensities; one that fills the cube exactly is
    not cut again.

    Args:
        image_size (`int`): voxels along each edge of the result.
        field_of_view (`float`): edge of the cube in millimetres; the same for every subject, so sizes of heads stay
            comparable.
        percentiles (`tuple[float, float]`): intensities mapped to -1 and 1; values outside are clipped, and in a masked
            image the few below the background (many are tissue, as in z-scores, and stay).
    """

    def __init__(self, image_size: int, field_of_view: float = 192.0, percentiles: tuple[float, float] = PERCENTILES):
        if image_size < 1 or field_of_view <= 0:
            raise InputError(f"image_size={image_size} and field_of_view={field_of_view} must be positive.")
        self.image_size, self.field_of_view, self.percentiles = image_size, field_of_view, percentiles

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel of the result, in millimetres."""
        return (self.field_of_view / self.image_size,) * 3

    def preprocess(self, images: nib.Nifti1Image | Sequence[nib.Nifti1Image]) -> torch.Tensor:
        """The volume `[C, D, H, W]` in [-1, 1] of an image, or of several on one grid (its channels).

        Raises:
            InputError: not 3D, NaN or infinity, constant, or images on different grids.
        """
        return self.preprocess_with_geometry(images)[0]

    def preprocess_with_geometry(
        self, images: nib.Nifti1Image | Sequence[nib.Nifti1Image]
    ) -> tuple[torch.Tensor, Geometry]:
        """As `preprocess`, and the `Geometry` with which `postprocess` puts a volume back."""
        images = [images] if isinstance(images, nib.spatialimages.SpatialImage) else list(images)
        source = _on_one_grid(images)
        # one image after the other: the copies of all modalities at once would fill the memory
        oriented = [_canonical(image) for image in images]
        arrays = [_array(image) for image in oriented]
        backgrounds = [_background(array) for array in arrays]
        final = [_is_final(image, array) for image, array in zip(oriented, arrays, strict=True)]
        affine = oriented[0].affine
        cube = [max(1, round(self.field_of_view / edge)) for edge in np.linalg.norm(affine[:3, :3], axis=0)]
        if all(final) and cube == list(arrays[0].shape):
            start = [0, 0, 0]
        else:
            box = _foreground(arrays, backgrounds)
            start = [(side.start + side.stop) // 2 - edge // 2 for side, edge in zip(box, cube, strict=True)]
        channels, intensities = [], []
        for array, background, keep in zip(arrays, backgrounds, final, strict=True):
            # means of equal values are those values to the last bit only if they are 0
            above_background = _crop(array, start, cube, background) - np.float32(background)
            resized = self._resize(above_background)
            low, high = (-background, 1 - background) if keep else _limits(resized, 0.0, self.percentiles)
            channels.append(_scaled(resized, low, high))
            intensities.append([low + background, high + background])
        scale = np.array(cube) / self.image_size
        to_source = np.diag([*scale, 1.0])  # voxel centres: (i + 1/2) * scale - 1/2
        to_source[:3, 3] = np.array(start) + scale / 2 - 0.5
        geometry = Geometry(
            [int(edge) for edge in source.shape[:3]],
            source.affine.tolist(),
            (affine @ to_source).tolist(),
            intensities,
        )
        return torch.stack(channels).permute(0, 3, 2, 1).contiguous(), geometry

    def postprocess(self, volume: torch.Tensor, geometry: Geometry, channel: int = 0) -> nib.Nifti1Image:
        """A volume `[C, D, H, W]` in [-1, 1] in the space of the image it came from: its grid, affine and intensities.

        Outside the cube stands the background. For a generated volume the geometry of any subject serves as the target.
        """
        from nibabel.processing import resample_from_to

        low, high = geometry.intensities[channel]
        array = volume[channel].detach().float().cpu().numpy().transpose(2, 1, 0)
        values = (np.clip(array, -1, 1) + 1) / 2 * (high - low) + low
        cube = nib.Nifti1Image(values.astype(np.float32), np.array(geometry.cube_affine))
        image = resample_from_to(cube, (geometry.shape, np.array(geometry.affine)), order=1, cval=low)
        return _with_codes(image)

    def _resize(self, array: np.ndarray) -> torch.Tensor:
        """The cube `[x, y, z]` at its final size: means over area, then linear interpolation along the axes that grow."""
        size = self.image_size
        volume = torch.from_numpy(array)[None, None]
        volume = F.interpolate(volume, [min(edge, size) for edge in array.shape], mode="area")
        if any(edge < size for edge in array.shape):
            volume = F.interpolate(volume, [size] * 3, mode="trilinear", align_corners=False)
        return volume[0, 0]


def scale_on_own_grid(image: nib.Nifti1Image, percentiles: tuple[float, float] = PERCENTILES) -> torch.Tensor:
    """The volume `[1, D, H, W]` in [-1, 1] of an image as it lies: its axes reordered and its intensities scaled as
    `VolumeProcessor` does (those of `to_nifti` are kept), but neither cut nor resampled.

    Raises:
        InputError: not 3D, NaN or infinity, or constant.
    """
    image = _canonical(image)
    array = _array(image)
    volume = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 1, 0)))
    limits = (0.0, 1.0) if _is_final(image, array) else _limits(volume, _background(array), percentiles)
    return _scaled(volume, *limits)[None]


def _canonical(image: nib.spatialimages.SpatialImage) -> nib.Nifti1Image:
    """The image with its axes in the order and directions of RAS+."""
    # as nibabel's own class: that of images out of `datasets` can't be made anew with other axes
    return nib.as_closest_canonical(nib.Nifti1Image(image.dataobj, image.affine, image.header))


def _is_final(image: nib.Nifti1Image, array: np.ndarray) -> bool:
    """Whether `to_nifti` wrote these intensities, and no program that kept the header has put others in their place."""
    return image.header["descrip"].item() == FINAL and 0 <= array.min() and array.max() <= 1


def _limits(volume: torch.Tensor, background: float, percentiles: tuple[float, float]) -> tuple[float, float]:
    """The intensities that become -1 and 1."""
    low, high = (float(value) for value in np.percentile(volume.numpy(), percentiles))
    foreground, below = (volume != background).sum(), (volume < background).sum()
    # a few voxels below it must not lift the background
    if foreground < (1 - MASKED_SHARE) * volume.numel() and below < BELOW_SHARE * foreground:
        low = max(low, background)
    if not high > low:
        raise InputError("the image has no contrast in the part that is taken; drop it or change field_of_view")
    return low, high


def _scaled(volume: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The volume with `low` and `high` at -1 and 1, and nothing beyond."""
    return ((volume - low) / (high - low)).clamp(0, 1) * 2 - 1


def _array(image: nib.Nifti1Image) -> np.ndarray:
    data = np.asarray(image.dataobj, dtype=np.float32)
    if data.ndim == 4 and data.shape[3] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise InputError(f"a 3D image is needed, this one has shape {data.shape}; extract one frame first")
    check_values(data, "the image")  # again for what `read_image` gave: others hand in images of their own
    return data


def _background(array: np.ndarray) -> float:
    """The background's intensity: that of the corners, or the median of all voxels, if that is lower. Not the minimum:
    bias correction leaves some skull-stripped brains voxels below it."""
    corners = array[np.ix_(*[[0, edge - 1] for edge in array.shape])]
    return float(min(np.median(corners), np.median(array)))


def _foreground(arrays: Sequence[np.ndarray], backgrounds: Sequence[float]) -> tuple[slice, slice, slice]:
    """The box of all that is not background in any of the arrays."""
    mask = np.zeros(arrays[0].shape, dtype=np.int8)
    for array, background in zip(arrays, backgrounds, strict=True):
        mask |= array != background
    return find_objects(mask)[0]


def _on_one_grid(images: Sequence[nib.Nifti1Image]) -> nib.Nifti1Image:
    """The first of the images, if all lie on its grid."""
    first = images[0]
    for other in images[1:]:
        if other.shape != first.shape:
            raise InputError(
                f"the modalities have unequal shapes, {first.shape} and {other.shape}; resample them to one"
            )
        if not np.allclose(other.affine, first.affine, atol=1e-2):
            raise InputError("the modalities have unequal affines; resample them to one grid")
    return first


def _crop(array: np.ndarray, start: Sequence[int], size: Sequence[int], background: float) -> np.ndarray:
    """`array` from `start` on, background where that is outside; copies no more than the result."""
    cube = np.full(size, background, dtype=np.float32)
    source, target = [], []
    for first, edge, length in zip(start, size, array.shape, strict=True):
        low, high = max(0, first), min(length, first + edge)
        source.append(slice(low, high))
        target.append(slice(low - first, high - first))
    cube[tuple(target)] = array[tuple(source)]
    return cube


def to_nifti(
    volume: torch.Tensor | np.ndarray,
    spacing: tuple[float, float, float],
    intensity_range: tuple[float, float] | None = (-1.0, 1.0),
) -> nib.Nifti1Image:
    """A NIfTI image (RAS+, origin at the centre of the cube, millimetres) of `volume [1, D, H, W]`.

    With `intensity_range`, intensities are clipped to it and mapped to [0, 1], float32, and the header's `descrip` says that they are
    final: what reads volumes here takes them as they are. With `None` they are written as they are (label maps).

    Raises:
        InputError: more than one channel.
    """
    array = np.asarray(volume.detach().float().cpu() if isinstance(volume, torch.Tensor) else volume)
    if array.ndim != 4 or array.shape[0] != 1:
        raise InputError(f"A volume of shape [1, D, H, W] is needed to write NIfTI, got {list(array.shape)}.")
    if intensity_range is not None:
        low, high = intensity_range
        array = ((np.clip(array, low, high) - low) / (high - low)).astype(np.float32)
    data = np.ascontiguousarray(array[0].transpose(2, 1, 0))
    affine = np.diag([*spacing[::-1], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(data.shape) - 1) / 2)
    image = nib.Nifti1Image(data, affine)
    if intensity_range is not None:
        image.header["descrip"] = FINAL
    return _with_codes(image)


def from_nifti(image: nib.Nifti1Image) -> torch.Tensor:
    """The `volume [1, D, H, W]` in [-1, 1] of an image that `to_nifti` made of one in that range."""
    data = image.get_fdata(dtype=np.float32).transpose(2, 1, 0)
    return torch.from_numpy(np.ascontiguousarray(data))[None] * 2 - 1


def _with_codes(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """The image with millimetres and both affines declared, as readers of one or the other expect."""
    image.header.set_xyzt_units("mm")
    image.set_sform(image.affine, code="scanner")
    image.set_qform(image.affine, code="scanner")
    return image
