"""VolumeProcessor: between NIfTI images and the tensors that models see. The one place that knows axes and affines.

Tensors are `[C, D, H, W]` with D from inferior to superior, H from posterior to anterior, W from left to right, so
that `volume[:, d]` is an axial slice. NIfTI arrays are stored `[x, y, z]` in RAS+: the transpose of the above.
"""

import nibabel as nib
import numpy as np
import torch

from ..errors import InputError


class VolumeProcessor:
    """Reorient to RAS, cut a cube of `field_of_view` millimetres around the foreground, resample it to `image_size`
    voxels per edge (averaging over area) and scale the percentiles to [-1, 1].

    Args:
        image_size (`int`): voxels along each edge of the result.
        field_of_view (`float`): edge of the cube in millimetres; the same for every subject, so sizes of heads stay
            comparable.
        percentiles (`tuple[float, float]`): intensities mapped to -1 and 1; values outside are clipped.
    """

    def __init__(self, image_size: int, field_of_view: float = 192.0, percentiles: tuple[float, float] = (0.0, 99.5)):
        if image_size < 1 or field_of_view <= 0:
            raise InputError(f"image_size={image_size} and field_of_view={field_of_view} must be positive.")
        self.image_size, self.field_of_view, self.percentiles = image_size, field_of_view, percentiles

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel of the result, in millimetres."""
        return (self.field_of_view / self.image_size,) * 3

    def preprocess(self, image: nib.Nifti1Image) -> torch.Tensor:
        """The volume `[1, D, H, W]` in [-1, 1] of a 3D image (a trailing axis of one frame is dropped).

        Raises:
            ValueError: the image is not 3D, holds NaN or infinity, or is constant.
        """
        from monai.data import MetaTensor  # here, since monai takes seconds to import and generating needs none of it
        from monai.transforms import BorderPad, Orientation, Resize, ScaleIntensityRangePercentiles, SpatialCrop
        from monai.transforms.utils import generate_spatial_bounding_box

        data = np.ascontiguousarray(image.dataobj, dtype=np.float32)
        if data.ndim == 4 and data.shape[3] == 1:
            data = data[..., 0]
        if data.ndim != 3:
            raise InputError(f"a 3D image is needed, this one has shape {data.shape}; extract one frame first")
        if not np.isfinite(data).all():
            raise InputError("the image holds NaN or infinite values; repair or drop it")
        if data.min() == data.max():
            raise InputError(f"the image is constant ({data.min():g} everywhere); drop it")
        volume = Orientation("RAS", labels=None)(
            MetaTensor(torch.from_numpy(data)[None], affine=torch.as_tensor(image.affine))
        )
        background = volume.min()
        start, end = generate_spatial_bounding_box(volume, select_fn=lambda x: x > background)
        voxel = torch.linalg.norm(volume.affine[:3, :3], dim=0)
        cube = [max(1, round(self.field_of_view / float(edge))) for edge in voxel]
        volume = BorderPad(cube, value=float(background))(volume)  # so that a cube at the border keeps its centre
        center = [(low + high) // 2 + edge for low, high, edge in zip(start, end, cube, strict=True)]
        volume = SpatialCrop(roi_center=center, roi_size=cube)(volume)
        volume = Resize([self.image_size] * 3, mode="area")(volume)
        volume = ScaleIntensityRangePercentiles(*self.percentiles, b_min=-1.0, b_max=1.0, clip=True)(volume)
        return volume.as_tensor().permute(0, 3, 2, 1).contiguous()


def to_nifti(
    volume: torch.Tensor | np.ndarray,
    spacing: tuple[float, float, float],
    intensity_range: tuple[float, float] | None = (-1.0, 1.0),
) -> nib.Nifti1Image:
    """A NIfTI image (RAS+, origin at the centre of the cube, millimetres) of `volume [1, D, H, W]`.

    With `intensity_range`, intensities are clipped to it and mapped to [0, 1], float32; with `None` they are written
    as they are (label maps).

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
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    return image
