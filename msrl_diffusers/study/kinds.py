"""Whether sets of volumes, and the volumes that a pipeline makes, are of one kind: features of others would be compared in vain."""

from math import isclose

import torch

from ..data.volumes import VolumeDataset
from ..errors import InputError
from ..pipelines.med_volume import MedVolumePipeline


def check_same_kind(
    real: VolumeDataset, volumes: VolumeDataset, name: str, real_name: str = "the real training set"
) -> None:
    """Raise InputError unless `volumes` have the shape, the classes and the spacing of the real ones."""
    shapes = [tuple(data.pixel_values.shape[1:]) for data in (real, volumes)]
    if shapes[0] != shapes[1]:
        raise InputError(f"{name} has volumes of shape {shapes[1]}, {real_name} {shapes[0]}; prepare them alike.")
    if real.id2label != volumes.id2label:
        raise InputError(f"{name} has classes {volumes.id2label}, {real_name} {real.id2label}; make them equal.")
    if not all(isclose(one, other, rel_tol=0.01) for one, other in zip(real.spacing, volumes.spacing, strict=True)):
        raise InputError(
            f"{name} has voxels of {volumes.spacing} mm, {real_name} {real.spacing} mm; prepare them alike."
        )


def check_makes_same_kind(
    real: VolumeDataset, pipeline: MedVolumePipeline, name: str, real_name: str = "the real training set"
) -> None:
    """Raise InputError unless a pipeline makes volumes like the real ones. Where it does not know its spacing, any will do."""
    volumes = torch.empty(0, *pipeline.volume_shape)
    spacing = pipeline.spacing if pipeline.config.spacing else real.spacing
    made = VolumeDataset(volumes, torch.empty(0).long(), [], pipeline.id2label, spacing)
    check_same_kind(real, made, name, real_name)
