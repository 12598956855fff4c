import json
import math

import pytest
import torch
from scipy.ndimage import gaussian_filter

from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.statistics import compare_statistics, set_statistics


SPACING = (2.0, 2.0, 2.0)


def noise(count=8, size=32, sd=0.1, seed=0, channels=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, channels, size, size, size, generator=generator) * sd).clamp(-1, 1)


def cube(edges=(8, 6, 4), size=16, value=0.5):
    volume = torch.full((1, 1, size, size, size), -1.0)
    depth, height, width = edges
    volume[..., 2 : 2 + depth, 3 : 3 + height, 1 : 1 + width] = value
    return volume


def test_white_noise_has_a_flat_spectrum_of_its_variance():
    spectrum = set_statistics([noise(sd=0.1)], SPACING)["spectrum"]
    assert len(spectrum["frequency"]) == 17
    assert spectrum["frequency"][-2] == pytest.approx(0.25)  # Nyquist of 2 mm
    assert spectrum["frequency"][-1] == pytest.approx(0.25 * math.sqrt(3))
    density = 10 * math.log10(0.1**2 * 8)  # variance times the volume of a voxel
    assert spectrum["power_db"][0] == pytest.approx([density] * 17, abs=0.8)  # few frequencies in the lowest bands
    assert spectrum["power_db"][0][4:] == pytest.approx([density] * 13, abs=0.15)


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_a_wave_is_found_at_its_frequency_in_cycles_per_millimetre(axis):
    spacing, shape = [1.0, 1.0, 1.0], [16, 16, 16]
    spacing[axis - 2], shape[axis - 2] = 2.0, 24
    cycles = 6 / (24 * 2.0)  # six over 48 mm
    phase = 2 * math.pi * cycles * torch.arange(24) * 2.0
    view = [1] * 5
    view[axis] = 24
    wave = 0.5 * torch.cos(phase).view(view).expand(1, 1, *shape)
    spectrum = set_statistics([wave], spacing)["spectrum"]
    powers, edges = spectrum["power_db"][0], [0, *spectrum["frequency"]]
    band = powers.index(max(powers))
    assert edges[band] < cycles <= edges[band + 1] + 1e-9
    assert max(powers[:band] + powers[band + 1 :]) < max(powers) - 60


def test_blur_lowers_a_band_by_its_transfer_function():
    sigma = 1.0  # voxels
    volumes = noise(count=16)
    blurred = torch.stack([
        torch.from_numpy(gaussian_filter(volume[0].numpy(), sigma, mode="wrap"))[None] for volume in volumes
    ])  # fmt: skip
    sharp, soft = (set_statistics([each], SPACING) for each in (volumes, blurred))
    compared = compare_statistics(sharp, soft)["spectrum"]
    middles = [high - 0.25 / 32 for high in compared["frequency"][:8]]
    expected = [-10 * math.log10(math.e) * (2 * math.pi * sigma * 2.0 * f) ** 2 for f in middles]
    assert compared["difference_db"][0][:8] == pytest.approx(expected, abs=0.5)
    differences = compared["difference_db"][0]
    assert differences == sorted(differences, reverse=True)
    rms = math.sqrt(sum(value**2 for value in differences) / len(differences))
    assert compared["log_spectral_distance_db"] == [pytest.approx(rms)]
    assert compare_statistics(soft, sharp)["spectrum"]["difference_db"][0][9] == pytest.approx(-differences[9])


def test_a_checkerboard_is_in_the_last_band():
    index = torch.arange(16)
    board = (index[:, None, None] + index[:, None] + index) % 2 * 0.2
    plain, marked = (set_statistics([cube() * 0.7 + extra], SPACING) for extra in (0, board))
    differences = compare_statistics(plain, marked)["spectrum"]["difference_db"][0]
    assert differences[-1] > 10
    assert max(abs(value) for value in differences[:-1]) < 1e-3


def test_a_cube_has_its_volume_and_intensity():
    found = set_statistics([cube((8, 6, 4), value=0.5), cube((4, 6, 4), value=0.5)], (1.0, 2.0, 3.0))
    one, other = 8 * 6 * 4 * 6 / 1000, 4 * 6 * 4 * 6 / 1000
    assert found["head_volume_ml"]["mean"] == pytest.approx((one + other) / 2)
    assert found["head_volume_ml"]["sd"] == pytest.approx((one - other) / math.sqrt(2))
    assert found["intensity"]["mean"] == [pytest.approx(0.5)]
    assert found["intensity"]["sd"] == [pytest.approx(0, abs=1e-7)]
    assert sum(found["intensity"]["histogram"][0]) == 8 * 6 * 4 + 4 * 6 * 4
    assert found["intensity"]["histogram"][0][750] == 8 * 6 * 4 + 4 * 6 * 4


def test_asymmetry_is_zero_of_a_mirrored_volume_and_one_of_one_side():
    left = cube(value=0.5)
    both = torch.maximum(left, left.flip(-1))
    above = torch.maximum(left, left.flip(-2))  # mirrored along another axis
    values = [set_statistics([volume], SPACING)["asymmetry"]["mean"] for volume in (both, left, above)]
    assert values == [0, pytest.approx(1), pytest.approx(1)]
    dimmer = torch.maximum(left, left.flip(-1) / 2 - 0.5)  # the other side half as bright, background 0
    assert set_statistics([dimmer], SPACING)["asymmetry"]["mean"] == pytest.approx(0.5 / 1.5)


def test_wasserstein_of_shifted_intensities_is_the_shift():
    sets = [set_statistics([noise(sd=0.15) + shift], SPACING) for shift in (0.0, 0.1)]
    compared = compare_statistics(*sets)
    assert compared["intensity"]["wasserstein"] == [pytest.approx(0.1, abs=2e-3)]
    assert compared["intensity"]["mean_difference"] == [pytest.approx(0.1, abs=1e-4)]
    assert compared["intensity"]["sd_difference"] == [pytest.approx(0, abs=1e-4)]
    assert compare_statistics(sets[0], sets[0])["intensity"]["wasserstein"] == [0]


def test_contrast_alone_moves_mass_but_not_the_mean():
    flat, steep = (set_statistics([noise(sd=sd)], SPACING) for sd in (0.1, 0.2))
    compared = compare_statistics(flat, steep)["intensity"]
    assert compared["mean_difference"] == [pytest.approx(0, abs=1e-3)]
    assert compared["wasserstein"] == [pytest.approx(0.1 * math.sqrt(2 / math.pi), rel=0.02)]  # of two normals


def test_batches_only_divide_the_work_and_channels_stay_apart():
    volumes = torch.cat([noise(6, 12, 0.1, channels=2)[:, :1], noise(6, 12, 0.3, seed=1)], dim=1)
    whole = set_statistics([volumes], SPACING)
    parted = set_statistics(iter(volumes.split([1, 3, 2])), SPACING)
    assert json.loads(json.dumps(whole)) == whole
    assert whole["intensity"]["histogram"] == parted["intensity"]["histogram"]
    for key in ("head_volume_ml", "asymmetry"):
        assert whole[key] == pytest.approx(parted[key])
    for channel in range(2):
        assert parted["spectrum"]["power_db"][channel] == pytest.approx(whole["spectrum"]["power_db"][channel])
        assert parted["intensity"]["sd"][channel] == pytest.approx(volumes[:, channel].std().item(), rel=1e-5)
    alone = set_statistics([volumes[:, 1:]], SPACING)
    assert alone["spectrum"]["power_db"] == [pytest.approx(whole["spectrum"]["power_db"][1])]
    assert whole["volumes"] == 6


@pytest.mark.parametrize(
    ("batches", "spacing", "message"),
    [
        ([], SPACING, "the set is empty"),
        ([noise(1, 8)], (1.0, 0.0, 1.0), "three positive numbers"),
        ([noise(1, 8)[0]], SPACING, r"must be \[B, C, D, H, W\]"),
        ([noise(1, 8), noise(1, 9)], SPACING, r"\[1, 8, 8, 8\] and \[1, 9, 9, 9\] are in one set"),
        ([noise(1, 8) / 0], SPACING, "NaN or infinite"),
        ([noise(1, 8) * 0 + 200], SPACING, r"must lie in \[-1, 1\], found 200"),
        ([noise(1, 8) * 0 - 1], SPACING, "No volume has a voxel above -0.95"),
    ],
)
def test_sets_without_statistics_are_refused(batches, spacing, message):
    with pytest.raises(InputError, match=message):
        set_statistics(batches, spacing)


def test_sets_that_cannot_be_compared_are_refused():
    one = set_statistics([noise(1, 8)], SPACING)
    with pytest.raises(InputError, match="number of channels"):
        compare_statistics(one, set_statistics([noise(1, 8, channels=2)], SPACING))
    with pytest.raises(InputError, match="size of grid"):
        compare_statistics(one, set_statistics([noise(1, 12)], SPACING))
    with pytest.raises(InputError, match="spacing"):
        compare_statistics(one, set_statistics([noise(1, 8)], (1.0, 1.0, 2.0)))
