"""Volumes made worse on purpose, in six ways of growing strength: anchors on the scale of a reward that no sampler makes.

Intensities are in [-1, 1] with a background of -1, as `VolumeProcessor` makes them. Every kind draws from the generator
alone, and the same for every strength: a volume gets worse along one path.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from monai.transforms import AdjustContrast, RandBiasField, RandRicianNoise
from monai.utils import convert_to_tensor
from scipy.ndimage import gaussian_filter

from ..errors import InputError
from ..seeding import sample_generators
from .volumes import VolumeDataset


# What strength 1 means.
BLUR_SIGMA = 2.0  # voxels
NOISE_DEVIATION = 0.2  # of the range from black to white
BIAS_COEFFICIENT = 0.3  # largest coefficient of the field's logarithm
SHIFT = 0.3  # of the range from black to white
GAMMA = 2.0  # or its inverse

FOREGROUND = -0.95  # what is brighter is no background


def blurred(volumes: torch.Tensor, sigma: float) -> torch.Tensor:
    """`volumes [..., D, H, W]` under a Gaussian of `sigma` voxels; beyond the edge is background."""
    return torch.from_numpy(gaussian_filter(volumes.numpy(), sigma, mode="constant", cval=-1, axes=(-3, -2, -1)))


def _blur(volume: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """A Gaussian of up to `BLUR_SIGMA` voxels."""
    return blurred(volume, strength * BLUR_SIGMA)


def _rician_noise(volume: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """The magnitude of a complex image with white noise in both parts; it brightens the background."""
    noise = RandRicianNoise(prob=1.0, std=strength * NOISE_DEVIATION, sample_std=False)
    return _by_monai(noise.set_random_state(_seed(generator)), volume)


def _bias_field(volume: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Multiplied by the exponential of a random polynomial of degree 3, one for all channels."""
    coefficient = strength * BIAS_COEFFICIENT
    field = RandBiasField(degree=3, coeff_range=(-coefficient, coefficient), prob=1.0)
    return _by_monai(field.set_random_state(_seed(generator)), volume)


def _slice_shuffle(volume: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """A share `strength` of the axial slices that show anything change places, each with another."""
    shown = (volume > FOREGROUND).any(dim=0).flatten(1).any(dim=1).nonzero()[:, 0]
    chosen = shown[torch.randperm(len(shown), generator=generator)][: max(2, round(strength * len(shown)))]
    shuffled = volume.clone()
    shuffled[:, chosen] = volume[:, chosen.roll(1)]
    return shuffled


def _intensity_shift(volume: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """The foreground brighter or darker, by up to `SHIFT` of the range; which of the two is drawn."""
    offset = 2 * strength * SHIFT * _sign(generator)
    return torch.where(volume > FOREGROUND, volume + offset, volume)


def _gamma(volume: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """A gamma curve from black to the brightest voxel, with an exponent of up to `GAMMA` or down to its inverse."""
    return _by_monai(AdjustContrast(GAMMA ** (strength * _sign(generator))), volume)


_KINDS = {
    "blur": _blur,
    "rician_noise": _rician_noise,
    "bias_field": _bias_field,
    "slice_shuffle": _slice_shuffle,
    "intensity_shift": _intensity_shift,
    "gamma": _gamma,
}
DEGRADATIONS = tuple(_KINDS)


def degrade(
    volumes: torch.Tensor, kind: str, strength: float, generator: torch.Generator | Sequence[torch.Generator]
) -> torch.Tensor:
    """`volumes [B, C, D, H, W]` in [-1, 1], made worse; a new tensor of the same type on the same device, in [-1, 1].

    Equal strengths of two kinds are not equally bad by FID. Where the worst set ends a scale of rewards, one that is far
    beyond the others leaves them no room: look at its FID first, and keep to the strengths that lie among theirs.

    Args:
        volumes: axes inferior-superior, posterior-anterior, left-right; background -1.
        kind: one of `DEGRADATIONS`: `"blur"`, `"rician_noise"`, `"bias_field"`, `"slice_shuffle"`, `"intensity_shift"` or
            `"gamma"`.
        strength: from 0, which changes nothing, to 1, which nobody mistakes for a scan.
        generator: on the CPU; one for all volumes in turn, or one for each, so that a volume does not depend on its batch.
            The same draws are taken at every strength.

    Raises:
        InputError: an unknown kind, a strength outside [0, 1], volumes of another shape, or a wrong number of generators.
    """
    if kind not in DEGRADATIONS:
        raise InputError(f"Degradation {kind!r} is unknown; choose one of {list(DEGRADATIONS)}.")
    if not 0 <= strength <= 1:
        raise InputError(f"The strength of a degradation must lie in [0, 1], got {strength}.")
    if volumes.ndim != 5:
        raise InputError(f"Volumes to degrade must be [B, C, D, H, W], got the shape {list(volumes.shape)}.")
    generators = [generator] * len(volumes) if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != len(volumes):
        raise InputError(f"{len(volumes)} volumes need one generator or as many, got {len(generators)}.")
    if not strength or not len(volumes):
        return volumes.clone()
    worse = [
        _KINDS[kind](volume, float(strength), each)
        for volume, each in zip(volumes.cpu().float(), generators, strict=True)
    ]
    return torch.stack(worse).clamp(-1, 1).to(volumes.device, volumes.dtype)


def degrade_dataset(volumes: VolumeDataset, kind: str, strength: float, seed: int) -> VolumeDataset:
    """Every volume of a data set degraded, with its class and its subject; volume i by draws of `(seed, kind, i)`.

    Raises:
        InputError: what `degrade` refuses.
    """
    generators = sample_generators(seed, f"degrade {kind}", range(len(volumes)))
    return replace(volumes, pixel_values=degrade(volumes.pixel_values, kind, strength, generators))


def _by_monai(transform, volume: torch.Tensor) -> torch.Tensor:
    """A transform of MONAI on a volume, which it sees from black 0 to white 1."""
    return convert_to_tensor(transform((volume + 1) / 2), track_meta=False) * 2 - 1


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator))


def _sign(generator: torch.Generator) -> int:
    return 1 if torch.rand((), generator=generator) < 0.5 else -1
