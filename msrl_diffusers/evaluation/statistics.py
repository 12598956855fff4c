"""Plain statistics of sets of volumes: intensities, size and symmetry of the head, power spectrum. No network is needed,
so they show what a feature extractor may not see, such as blur, noise, checkerboards or a shifted contrast.

The head is all that is brighter than `HEAD_THRESHOLD` in any channel; it takes volumes whose background is -1, as
`VolumeProcessor` makes them of skull-stripped images.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from scipy.stats import wasserstein_distance

from ..errors import InputError


HEAD_THRESHOLD = -0.95
NUM_BINS = 1000  # of the histogram of intensities, over [-1, 1]
MAX_BANDS = 16  # of frequencies up to Nyquist
SILENCE = 1e-12  # -120 dB stands for no power at all


def set_statistics(batches: Iterable[torch.Tensor], spacing: Sequence[float]) -> dict:
    """Statistics of a set, fit for JSON, in memory that does not grow with its size.

    Args:
        batches: volumes `[B, C, D, H, W]` in [-1, 1], of any B; axes inferior-superior, posterior-anterior, left-right.
        spacing: edge lengths of a voxel in millimetres, in that order.

    Returns:
        A dictionary of `volumes` (their number), `spacing` and

        - `intensity`: `mean`, `sd` and `histogram` (counts in `NUM_BINS` bins over [-1, 1]) of the voxels of all heads,
          one entry per channel;
        - `head_volume_ml` and `asymmetry`: `mean` and `sd` over the volumes. Asymmetry is the sum of absolute
          differences to the mirror image, left for right, over the sum of both (background 0, white 1): 0 for a
          symmetric volume, 1 for one that fills one side only;
        - `spectrum`: `frequency`, upper edges of the bands in cycles/mm, and per channel `power_db`, the mean power
          spectral density of a band in dB (10 log10, against 1 mm^3). Bands are shells of equal width around frequency
          0, which is left out, up to the Nyquist frequency of the coarsest axis; the last band is all beyond, the
          corners of the spectrum, where checkerboards are.

    Raises:
        InputError: no volumes, unequal shapes, a spacing that is no three positive numbers, intensities that are not
            finite or beyond [-1, 1], or no head in any volume.
    """
    spacing = [float(edge) for edge in spacing]
    if len(spacing) != 3 or min(spacing) <= 0:
        raise InputError(f"The spacing must be three positive numbers of millimetres, got {spacing}.")
    shape, sizes, asymmetries = None, _Moments(), _Moments()
    for batch in batches:
        batch = batch.detach().cpu().float()
        if shape is None:
            shape = _checked_shape(batch)
            bands, frequencies = _bands(shape[1:], spacing)
            histogram = torch.zeros(shape[0], NUM_BINS, dtype=torch.long)
            intensities = [_Moments() for _ in range(shape[0])]
            power = torch.zeros(shape[0], len(frequencies), dtype=torch.float64)
        _check_batch(batch, shape)
        head = (batch > HEAD_THRESHOLD).any(dim=1)
        sizes.update(head.flatten(1).sum(dim=1).double() * math.prod(spacing) / 1000)
        asymmetries.update(_asymmetry(batch))
        for channel in range(shape[0]):
            values = batch[:, channel][head]
            intensities[channel].update(values.double())
            bins = ((values + 1) / 2 * NUM_BINS).long().clamp(0, NUM_BINS - 1)
            histogram[channel] += torch.bincount(bins, minlength=NUM_BINS)
            power[channel] += _band_power(batch[:, channel], bands) * math.prod(spacing)
    if shape is None or not sizes.count:
        raise InputError("Statistics need at least one volume; the set is empty.")
    if not intensities[0].count:
        raise InputError(f"No volume has a voxel above {HEAD_THRESHOLD}; give volumes in [-1, 1], background -1.")
    decibels = 10 * (power / sizes.count).clamp_min(SILENCE).log10()
    return {
        "volumes": sizes.count,
        "spacing": spacing,
        "intensity": {
            "mean": [moments.mean for moments in intensities],
            "sd": [moments.sd for moments in intensities],
            "histogram": histogram.tolist(),
        },
        "head_volume_ml": {"mean": sizes.mean, "sd": sizes.sd},
        "asymmetry": {"mean": asymmetries.mean, "sd": asymmetries.sd},
        "spectrum": {"frequency": frequencies, "power_db": decibels.tolist()},
    }


def compare_statistics(real: dict, fake: dict) -> dict:
    """How two sets differ, from their `set_statistics`; differences are generated minus real.

    Returns:
        A dictionary of

        - `intensity`, per channel: `wasserstein`, the Wasserstein-1 distance of the head's intensities (of their
          histograms, so exact to 2 / `NUM_BINS`), `mean_difference` and `sd_difference`;
        - `head_volume_ml_difference` and `asymmetry_difference`, of the means;
        - `spectrum`: `frequency` as in the sets, and per channel `difference_db` of every band and
          `log_spectral_distance_db`, the root mean square of these over bands.

    Raises:
        InputError: sets of different channels, spacing or size of grid.
    """
    if len(real["intensity"]["mean"]) != len(fake["intensity"]["mean"]):
        raise InputError("The sets differ in their number of channels; choose the same modalities.")
    frequencies = real["spectrum"]["frequency"], fake["spectrum"]["frequency"]
    same_grid = len(frequencies[0]) == len(frequencies[1]) and all(map(_close, *frequencies))
    if not same_grid or not all(map(_close, real["spacing"], fake["spacing"])):
        raise InputError("The sets differ in spacing or size of grid; resample both to one.")
    centres = (torch.arange(NUM_BINS) + 0.5) / NUM_BINS * 2 - 1
    histograms = zip(real["intensity"]["histogram"], fake["intensity"]["histogram"], strict=True)
    powers = zip(real["spectrum"]["power_db"], fake["spectrum"]["power_db"], strict=True)
    decibels = [_differences(*channel) for channel in powers]
    return {
        "intensity": {
            "wasserstein": [float(wasserstein_distance(centres, centres, *counts)) for counts in histograms],
            "mean_difference": _differences(real["intensity"]["mean"], fake["intensity"]["mean"]),
            "sd_difference": _differences(real["intensity"]["sd"], fake["intensity"]["sd"]),
        },
        "head_volume_ml_difference": fake["head_volume_ml"]["mean"] - real["head_volume_ml"]["mean"],
        "asymmetry_difference": fake["asymmetry"]["mean"] - real["asymmetry"]["mean"],
        "spectrum": {
            "frequency": real["spectrum"]["frequency"],
            "difference_db": decibels,
            "log_spectral_distance_db": [
                math.sqrt(sum(value**2 for value in channel) / len(channel)) for channel in decibels
            ],
        },
    }


class _Moments:
    """Count, mean and standard deviation of numbers that come in parts (Chan, Golub and LeVeque 1983)."""

    def __init__(self):
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def update(self, values: torch.Tensor) -> None:
        if not len(values):
            return
        mean, total = values.mean().item(), self.count + len(values)
        shift = mean - self.mean
        self._squares += (values - mean).square().sum().item() + shift**2 * self.count * len(values) / total
        self.mean += shift * len(values) / total
        self.count = total

    @property
    def sd(self) -> float:
        """Of a sample; 0 for a single number."""
        return math.sqrt(self._squares / max(1, self.count - 1))


def _checked_shape(batch: torch.Tensor) -> tuple[int, ...]:
    if batch.ndim != 5 or min(batch.shape[2:]) < 2:
        raise InputError(f"Batches must be [B, C, D, H, W] of at least 2 voxels per edge, got {list(batch.shape)}.")
    return tuple(batch.shape[1:])


def _check_batch(batch: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(batch.shape[1:]) != shape:
        raise InputError(
            f"Volumes of shape {list(shape)} and {list(batch.shape[1:])} are in one set; resample them to one grid."
        )
    if not torch.isfinite(batch).all():
        raise InputError("A volume holds NaN or infinite values; drop it.")
    if batch.numel() and batch.abs().max() > 1.01:  # rounding may pass 1
        raise InputError(f"Intensities must lie in [-1, 1], found {batch.abs().max():.4g}; scale the volumes first.")


def _asymmetry(batch: torch.Tensor) -> torch.Tensor:
    """Of every volume `[B]`, in [0, 1]."""
    brightness = ((batch.double() + 1) / 2).clamp_min(0)
    difference = (brightness - brightness.flip(-1)).abs().flatten(1).sum(dim=1)
    return difference / (2 * brightness.flatten(1).sum(dim=1)).clamp_min(torch.finfo(torch.float64).tiny)


def _bands(shape: Sequence[int], spacing: Sequence[float]) -> tuple[torch.Tensor, list[float]]:
    """The band `[D, H, W]` of every frequency of an FFT (0: the mean alone), and the bands' upper edges, cycles/mm."""
    axes = [torch.fft.fftfreq(size, edge, dtype=torch.float64) for size, edge in zip(shape, spacing, strict=True)]
    radius = sum(axis.square() for axis in torch.meshgrid(*axes, indexing="ij")).sqrt()
    coarsest = max(range(3), key=lambda axis: spacing[axis])
    count = min(MAX_BANDS, shape[coarsest] // 2)  # no band is empty: each is wider than a step of that axis
    width = 0.5 / spacing[coarsest] / count
    bands = (radius / width - 1e-6).ceil().long().clamp(0, count + 1)  # a frequency on an edge is the lower band's
    return bands, [width * (number + 1) for number in range(count)] + [radius.max().item()]


def _band_power(volumes: torch.Tensor, bands: torch.Tensor) -> torch.Tensor:
    """Power of `volumes [B, D, H, W]`, summed over them and averaged over the frequencies of a band; white noise has its
    variance in every band."""
    centred = volumes - volumes.mean(dim=(1, 2, 3), keepdim=True)
    power = torch.fft.fftn(centred, dim=(1, 2, 3)).abs().square().double().sum(dim=0) / bands.numel()
    sums = torch.bincount(bands.flatten(), weights=power.flatten(), minlength=int(bands.max()) + 1)
    return (sums / torch.bincount(bands.flatten()))[1:]


def _differences(real: list[float], fake: list[float]) -> list[float]:
    return [ours - theirs for theirs, ours in zip(real, fake, strict=True)]


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=0.01)
