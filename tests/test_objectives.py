"""Objectives, advantages and reward targets."""

import math

import numpy as np
import pytest
import torch

from msrl_diffusers.functional.advantages import normalize_advantages
from msrl_diffusers.functional.objectives import ppo_clip_loss, scaled_clip_range
from msrl_diffusers.functional.targets import reward_targets


ADVANTAGES = torch.tensor([1.5, -0.5, 0.25, -2.0])


def test_gradient_at_ratio_one_is_that_of_reinforce():
    log_prob = torch.tensor([-1.0, -2.0, 0.3, 0.0], requires_grad=True)
    loss, stats = ppo_clip_loss(log_prob, log_prob.detach().clone(), ADVANTAGES, clip_range=0.1)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    (reinforce,) = torch.autograd.grad(-(log_prob * ADVANTAGES).mean(), log_prob)
    torch.testing.assert_close(gradient, reinforce)
    assert stats["ratio_mean"] == 1
    assert stats["ratio_deviation"] == stats["clip_fraction_high"] == stats["clip_fraction_low"] == 0


@pytest.mark.parametrize(
    ("shift", "advantage", "clipped"),
    [(0.5, 1.0, True), (-0.5, -1.0, True), (0.5, -1.0, False), (-0.5, 1.0, False)],
)
def test_clipping_stops_the_gradient_on_its_side_only(shift, advantage, clipped):
    log_prob = torch.tensor([shift], requires_grad=True)
    loss, stats = ppo_clip_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), clip_range=0.1)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert (gradient.item() == 0) == clipped
    assert stats["clip_fraction_high"] == float(clipped and shift > 0)
    assert stats["clip_fraction_low"] == float(clipped and shift < 0)


def test_clip_range_reproduces_the_published_value():
    assert scaled_clip_range(0.0128, 4 * 64 * 64, "mean") == pytest.approx(1e-4)
    assert scaled_clip_range(0.0128, 4 * 64 * 64, "sum") == pytest.approx(1e-4 * 16384)


def advantages_by_hand(rewards, groups, clip=5.0, epsilon=1e-6):
    centred = np.array([r - rewards[groups == g].mean() for r, g in zip(rewards, groups, strict=True)])
    return np.clip(centred / (np.sqrt((centred**2).mean()) + epsilon), -clip, clip)


def test_advantages_against_a_loop():
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat([7, 2, 40], [5, 9, 6]))
    rewards = rng.normal(size=20) + groups
    advantages = normalize_advantages(torch.from_numpy(rewards), torch.from_numpy(groups))
    assert advantages.dtype == torch.float32
    np.testing.assert_allclose(advantages, advantages_by_hand(rewards, groups), rtol=1e-5, atol=1e-6)
    for group in (7, 2, 40):
        assert abs(advantages[torch.from_numpy(groups == group)].mean()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16])
def test_advantages_of_integer_and_half_rewards(dtype):
    rewards, groups = torch.tensor([0, 1, 1, 5, 2, 3]).to(dtype), torch.tensor([0, 0, 0, 1, 1, 1])
    expected = advantages_by_hand(rewards.double().numpy(), groups.numpy())
    np.testing.assert_allclose(normalize_advantages(rewards, groups), expected, rtol=1e-5, atol=1e-6)


def test_advantages_keep_small_differences_of_large_rewards():
    rewards = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64) * 1e-3 + 1e6
    advantages = normalize_advantages(rewards, torch.zeros(4, dtype=torch.int64))
    np.testing.assert_allclose(advantages, np.array([-3, -1, 1, 3]) / np.sqrt(5), rtol=2e-3)


def test_equal_rewards_give_zeros():
    groups = torch.tensor([0, 0, 1, 1])
    assert not normalize_advantages(torch.full((4,), 0.3), groups).any()
    assert not normalize_advantages(torch.tensor([0.1, 0.1, 0.9, 0.9]), groups).any()  # equal within groups


def test_advantages_are_clipped():
    rewards = torch.cat([torch.zeros(99), torch.ones(1)])
    groups = torch.zeros(100, dtype=torch.int64)
    assert normalize_advantages(rewards, groups).max() == 5
    assert normalize_advantages(rewards, groups, clip=20.0).max() > 9
    assert normalize_advantages(-rewards, groups, clip=2.0).min() == -2


FIDS = {"good": 10.0, "middle": 30.0, "poor": 40.0, "bad": 50.0}


def test_linear_targets():
    assert reward_targets(FIDS) == pytest.approx({"good": 1.0, "middle": 0.5, "poor": 0.25, "bad": 0.0})


def test_exponential_targets_spread_the_best_sets():
    targets = reward_targets(FIDS, "exponential", steepness=3.0)
    assert targets["good"] == pytest.approx(1)
    assert targets["bad"] == 0
    assert targets["middle"] == pytest.approx((math.exp(1.5) - 1) / (math.exp(3) - 1))
    assert targets["good"] - targets["middle"] > 0.5


def test_rank_targets_share_ties():
    assert reward_targets(FIDS, "rank") == pytest.approx({"good": 1.0, "middle": 2 / 3, "poor": 1 / 3, "bad": 0.0})
    assert reward_targets({**FIDS, "also_bad": 50.0}, "rank")["also_bad"] == 0


@pytest.mark.parametrize(
    ("fids", "target_map", "sentence"),
    [
        (FIDS, "cubic", "target_map must be one of"),
        ({"only": 3.0}, "linear", "at least two scored sets, got 1"),
        ({"a": 3.0, "b": 3.0}, "linear", "All 2 sets have the FID 3"),
    ],
)
def test_targets_that_cannot_be_learned_raise(fids, target_map, sentence):
    with pytest.raises(ValueError, match=sentence):
        reward_targets(fids, target_map)


def test_a_fid_that_is_no_number_raises():
    with pytest.raises(ValueError, match="middle"):
        reward_targets({**FIDS, "middle": math.nan})
