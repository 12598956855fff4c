"""What each kind of degradation does to a phantom, and what it leaves alone."""

import pytest
import torch
from tiny import tiny_phantoms

from msrl_diffusers.data.degradations import DEGRADATIONS, blurred, degrade, degrade_dataset
from msrl_diffusers.errors import InputError
from msrl_diffusers.seeding import generator_for


def phantoms() -> torch.Tensor:
    return tiny_phantoms(2).pixel_values.float()


def with_seed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_the_stronger_the_further_from_the_original(kind):
    volumes = phantoms()
    distances = [(degrade(volumes, kind, s, with_seed(0)) - volumes).abs().mean().item() for s in (0, 0.2, 0.6, 1)]
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert distances[1] > 1e-4
    assert distances[3] > 1.5 * distances[1]


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_degraded_volumes_follow_the_generator_alone(kind):
    volumes = torch.cat([phantoms(), phantoms()], dim=1)  # two channels
    state = torch.random.get_rng_state()
    one, again, other = (degrade(volumes, kind, 0.7, with_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, again)
    assert torch.equal(one, other) == (kind == "blur")  # the only one without anything random
    assert one.shape == volumes.shape
    assert type(one) is torch.Tensor
    assert one.min() >= -1
    assert one.max() <= 1
    assert torch.equal(volumes, torch.cat([phantoms(), phantoms()], dim=1)), "the original was changed"
    half = degrade(volumes.half(), kind, 0.7, with_seed(0))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), one, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_a_volume_with_its_own_generator_does_not_depend_on_its_batch(kind):
    volumes = phantoms()
    together = degrade(volumes, kind, 0.5, [generator_for(0, i) for i in range(4)])
    alone = degrade(volumes[2:3], kind, 0.5, [generator_for(0, 2)])
    assert torch.equal(together[2:3], alone)


def test_blur_keeps_the_mean_and_lowers_the_contrast():
    volumes = torch.full((1, 1, 17, 17, 17), -1.0)
    volumes[..., 8, 8, 8] = 1.0
    soft = degrade(volumes, "blur", 0.5, with_seed(0))
    torch.testing.assert_close(soft, blurred(volumes, 1.0))
    assert (soft + 1).sum().item() == pytest.approx(2, rel=1e-3)
    assert soft.max() < -0.5
    torch.testing.assert_close(soft, soft.flip(2, 3, 4))
    assert blurred(torch.full((1, 1, 9, 9, 9), 1.0), 1.0)[0, 0, 0, 0, 0] < 0  # beyond the edge is background


def test_rician_noise_is_a_magnitude():
    background = degrade(torch.full((1, 1, 24, 24, 24), -1.0), "rician_noise", 0.5, with_seed(0))
    gray = degrade(torch.zeros(1, 1, 24, 24, 24), "rician_noise", 0.5, with_seed(0))
    # Rayleigh in the background: mean sigma sqrt(pi / 2) above black, and never below it
    assert ((background + 1) / 2).mean().item() == pytest.approx(0.1 * (torch.pi / 2) ** 0.5, rel=0.02)
    assert gray.std().item() == pytest.approx(2 * 0.1, rel=0.05)  # nearly Gaussian where there is signal
    assert gray.mean().item() == pytest.approx(2 * 0.1**2, rel=0.3)  # and brighter by sigma^2 / 2 signal


def test_a_bias_field_is_smooth_and_leaves_the_background_black():
    volumes = torch.full((1, 2, 16, 16, 16), -0.5)
    volumes[..., :4, :, :] = -1.0
    changed = degrade(volumes, "bias_field", 0.5, with_seed(3))
    assert (changed[..., :4, :, :] == -1).all()
    factor = ((changed + 1) / (volumes + 1))[..., 4:, :, :]
    assert torch.equal(factor[:, 0], factor[:, 1])
    assert factor.max() > 1.05 * factor.min()
    steps = factor.log().diff(dim=-1).abs().max()
    assert 0 < steps < 0.5 * (factor.max() / factor.min()).log()


def test_shuffled_slices_are_the_old_ones_at_other_places():
    volumes = torch.full((1, 1, 12, 4, 4), -1.0)
    volumes[0, 0, 2:10] = torch.linspace(-0.5, 0.9, 8)[:, None, None]
    before = volumes[0, 0, :, 0, 0]
    for strength, moved in ((0.01, 2), (0.5, 4), (1.0, 8)):
        after = degrade(volumes, "slice_shuffle", strength, with_seed(0))[0, 0, :, 0, 0]
        assert torch.equal(after.sort().values, before.sort().values)
        assert int((after != before).sum()) == moved
        assert torch.equal(after[[0, 1, 10, 11]], before[[0, 1, 10, 11]])
    empty = torch.full((1, 1, 4, 4, 4), -1.0)
    assert torch.equal(degrade(empty, "slice_shuffle", 1.0, with_seed(0)), empty)


def test_an_intensity_shift_moves_the_foreground_up_or_down():
    volumes = torch.full((1, 1, 4, 4, 4), -1.0)
    volumes[..., 2:] = 0.0
    found = {round(degrade(volumes, "intensity_shift", 0.5, with_seed(s))[0, 0, 0, 0, 3].item(), 6) for s in range(8)}
    assert found == {0.3, -0.3}
    assert (degrade(volumes, "intensity_shift", 1.0, with_seed(0))[..., :2] == -1).all()


def test_gamma_bends_the_grays_between_black_and_white():
    volumes = torch.tensor([-1.0, 0.0, 1.0, -1.0]).view(1, 1, 1, 2, 2)
    found = {round(degrade(volumes, "gamma", 1.0, with_seed(s)).flatten()[1].item(), 4) for s in range(8)}
    assert found == {-0.5, round(2 * 0.5**0.5 - 1, 4)}
    assert degrade(volumes, "gamma", 1.0, with_seed(0)).flatten()[[0, 2, 3]].tolist() == pytest.approx([-1, 1, -1])


def test_a_degraded_data_set_keeps_classes_and_subjects():
    volumes = tiny_phantoms(2)
    worse, stronger = (degrade_dataset(volumes, "rician_noise", strength, seed=5) for strength in (0.2, 0.4))
    assert worse.subject_ids == volumes.subject_ids
    assert torch.equal(worse.class_labels, volumes.class_labels)
    assert worse.pixel_values.dtype == volumes.pixel_values.dtype
    assert not torch.equal(worse.pixel_values, volumes.pixel_values)
    picked = degrade_dataset(volumes.select([0]), "rician_noise", 0.2, seed=5)
    assert torch.equal(picked.pixel_values, worse.pixel_values[:1])
    changes = [(x.pixel_values.float() - volumes.pixel_values.float()).flatten() for x in (worse, stronger)]
    assert torch.corrcoef(torch.stack(changes))[0, 1] > 0.9, "another path at another strength"
    assert not torch.equal(degrade_dataset(volumes, "rician_noise", 0.2, seed=6).pixel_values, worse.pixel_values)


@pytest.mark.parametrize(
    ("kind", "strength", "shape", "count", "message"),
    [
        ("smear", 0.5, (2, 1, 4, 4, 4), 2, "Degradation 'smear' is unknown; choose one of .*'blur'"),
        ("blur", 1.5, (2, 1, 4, 4, 4), 2, r"strength of a degradation must lie in \[0, 1\], got 1.5"),
        ("blur", float("nan"), (2, 1, 4, 4, 4), 2, "strength of a degradation"),
        ("blur", 0.5, (2, 4, 4, 4), 2, r"must be \[B, C, D, H, W\], got the shape \[2, 4, 4, 4\]"),
        ("blur", 0.5, (2, 1, 4, 4, 4), 3, "2 volumes need one generator or as many, got 3"),
    ],
)
def test_what_can_t_be_degraded_is_refused(kind, strength, shape, count, message):
    with pytest.raises(InputError, match=message):
        degrade(torch.zeros(shape), kind, strength, [with_seed(i) for i in range(count)])
