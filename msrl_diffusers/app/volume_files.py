"""Generated volumes as NIfTI files: their names, and their bytes, equal for equal volumes."""

import gzip
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..data.processor import to_nifti
from ..errors import InputError
from ..pipelines.med_volume import MedVolumePipeline


COMPRESSION_LEVEL = 1  # as nibabel; noise does not get smaller at higher ones


def file_stems(id2label: Mapping[int, str]) -> dict[int, str]:
    """Names of the classes that are safe within file names, by label: letters, digits, dots, dashes and underscores; the
    label itself where nothing of a name is left, or where two classes would have the same."""
    stems = {
        label: re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("._-")[:64] for label, name in id2label.items()
    }
    taken = [stem.lower() for stem in stems.values()]  # some file systems know no case
    return {label: stem if stem and taken.count(stem.lower()) == 1 else str(label) for label, stem in stems.items()}


def decode_checked(pipeline: MedVolumePipeline, latents: torch.Tensor) -> torch.Tensor:
    """The volumes `[B, C, D, H, W]` in [-1, 1], on the CPU, of `latents [B, c, d, h, w]` that `pipeline` sampled.

    Raises:
        InputError: NaN or infinity, before or after.
    """
    finite = torch.isfinite(latents).all()  # the quantizer has no codes for others
    volumes = pipeline.decode_latents(latents).cpu() if finite else None
    if not finite or not torch.isfinite(volumes).all():
        raise InputError(
            "The model made NaN or infinite values; use --dtype float32, a weaker guidance, or other numbers of steps."
        )
    return volumes


def nifti_bytes(volume: torch.Tensor, spacing: tuple[float, float, float]) -> bytes:
    """The content of a `.nii.gz` file of `volume [1, D, H, W]` in [-1, 1]: RAS+, millimetres, intensities in [0, 1]."""
    return gzip.compress(to_nifti(volume, spacing).to_bytes(), COMPRESSION_LEVEL, mtime=0)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
