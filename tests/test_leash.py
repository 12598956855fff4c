"""Whom the divergence holds and what to, and antithetic starts."""

from types import SimpleNamespace

import pytest
import torch
from test_ppo_trainer import Contrast, config, timeless
from tiny import Brightness, copied, differing, tiny_pipeline

from msrl_diffusers import DiffusionPPOTrainer, LearnedReward, VolumeRewardModel, WeightedSum
from msrl_diffusers.errors import InputError
from msrl_diffusers.rewards.base import Scale
from msrl_diffusers.trainers.base import read_log
from msrl_diffusers.trainers.leash import Leash
from msrl_diffusers.trainers.uncertainty import reward_uncertainty


def train(output_dir, max_steps=3, rewards=None, **settings):
    pipeline = tiny_pipeline()
    args = config(output_dir, max_steps=max_steps, **settings)
    trainer = DiffusionPPOTrainer(pipeline, rewards or [Brightness(), Contrast()], args)
    trainer.train()
    return trainer, copied(pipeline.unet), read_log(output_dir)


def distance(one, other):
    return sum((one[name] - other[name]).square().sum().item() for name in one) ** 0.5


# ---------------------------------------------------------------------------------------------------------- uncertainty


def test_two_rewards_are_unsure_where_they_part():
    reward = WeightedSum(
        [Brightness(), Contrast()], scales={"brightness": Scale(0.0, 1.0), "contrast": Scale(0.0, 10.0)}
    )
    scores = {"brightness": torch.tensor([0.0, 1.0, -1.0]), "contrast": torch.tensor([0.0, 10.0, 10.0])}
    found = reward_uncertainty(reward, torch.zeros(3, 1, 4, 4, 4), scores)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 1.0]))


def test_an_ensemble_is_unsure_where_its_heads_part():
    torch.manual_seed(0)
    model = VolumeRewardModel(block_out_channels=(8, 8), num_heads=3)
    reward = WeightedSum([LearnedReward("volume", model)], [2.0], {"volume": Scale(0.0, 0.5)})
    samples = torch.randn(4, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = 2.0 * model(samples, return_heads=True).std(dim=1, correction=0) / 0.5
    torch.testing.assert_close(reward_uncertainty(reward, samples, {}), expected)
    assert expected.min() > 0


def test_one_reward_of_one_head_is_never_unsure(tmp_path):
    with pytest.raises(InputError, match="kl_gate_quantile needs rewards that can be unsure"):
        DiffusionPPOTrainer(tiny_pipeline(), Brightness(), config(tmp_path, kl_gate_quantile=0.5))
    other = Brightness()  # behind it a model of transformers, whose config is no mapping
    other.model = torch.nn.Linear(1, 1)
    other.model.config = SimpleNamespace(num_labels=2)
    with pytest.raises(InputError, match="kl_gate_quantile needs rewards that can be unsure"):
        DiffusionPPOTrainer(tiny_pipeline(), other, config(tmp_path, kl_gate_quantile=0.5))
    with pytest.raises(InputError, match=r"kl_gate_quantile must lie between 0 and 1, got 1\.0"):
        config(tmp_path, kl_gate_quantile=1.0)


# ------------------------------------------------------------------------------------------------------------ the gate


def test_the_gate_holds_a_share_of_the_samples(tmp_path):
    _, held, _ = train(tmp_path / "all", kl_coef=1e3)
    _, gated, log = train(tmp_path / "gated", kl_coef=1e3, kl_gate_quantile=0.75)
    _, free, _ = train(tmp_path / "free", kl_coef=0.0)
    assert [line["ppo/kl_held"] for line in log] == pytest.approx([0.25] * 3)
    assert all(line["ppo/uncertainty"] > 0 for line in log)
    assert distance(gated, free) > 1e-3
    assert distance(gated, held) > 1e-3


def test_the_gate_holds_those_it_chose_wherever_they_stand_in_a_batch(tmp_path):
    """Rows are the samples' places in the rollout; the first of them alone may have been compared."""
    leash = Leash(SimpleNamespace(args=config(tmp_path, kl_coef=2.0)), None, None)
    leash._held = torch.tensor([True, False, False, True, True])
    found = leash.penalty(torch.tensor([1.0, 10.0, 100.0]), torch.tensor([3, 1, 4, 2]))
    assert found.item() == pytest.approx(2.0 * (1.0 + 100.0) / 3)


def test_a_divergence_that_is_no_number_does_not_become_the_weight(tmp_path):
    """Which a checkpoint would keep, for ever."""
    recorded = {}
    run = SimpleNamespace(
        args=config(tmp_path, kl_coef=0.5, kl_mode="adaptive"), state={}, record=lambda **figures: recorded.update(figures),
        accelerator=SimpleNamespace(reduce=lambda value, how: value),
    )  # fmt: skip
    leash = Leash(run, None, None)
    for value, coefficient in ((float("nan"), 0.5), (1.0, 0.5)):
        leash.note(torch.tensor(value))
        leash.settle(0)
        assert recorded["ppo/kl_coef"] == coefficient
    assert leash.coef > 0.5


def test_a_gate_that_lets_nobody_out_is_no_gate(tmp_path):
    class Same(Contrast):
        """As sure as the other reward, always."""

        def __call__(self, samples, conditions):
            return Brightness()(samples, conditions)

    rewards = [Brightness(), Same()]
    _, plain, _ = train(tmp_path / "plain", rewards=rewards, kl_coef=1.0)
    _, gated, log = train(tmp_path / "gated", rewards=rewards, kl_coef=1.0, kl_gate_quantile=0.5)
    assert [line["ppo/kl_held"] for line in log] == [1.0] * 3
    assert differing(plain, gated) == []


# ------------------------------------------------------------------------------------------- the reference that moves


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_reference_that_moves_at_once_holds_nothing_at_first(use_lora, tmp_path):
    """After each rollout it is the policy of that moment: at the next rollout's only update the penalty has no gradient."""
    settings = {"max_steps": 3, "use_lora": use_lora}
    _, free, free_log = train(tmp_path / "free", kl_coef=0.0, **settings)
    _, held, _ = train(tmp_path / "held", kl_coef=0.1, **settings)
    _, moving, log = train(tmp_path / "moving", kl_coef=0.1, reference_update_steps=1, **settings)
    assert distance(moving, free) < 0.02 * distance(held, free)  # but for rounding, which the coefficient magnifies
    # what is reported is the divergence from the pretrained weights, which are left behind
    assert [line["ppo/kl"] for line in log] == pytest.approx([line["ppo/kl"] for line in free_log], rel=1e-3, abs=1e-9)
    assert log[2]["ppo/kl"] > 1e-9


def test_a_reference_that_never_moves_is_the_pretrained_one(tmp_path):
    settings = {"max_steps": 3, "num_updates": 2, "kl_coef": 10.0, "kl_budget": 1e9}
    plain, weights, log = train(tmp_path / "plain", **settings)
    moving, same, other_log = train(tmp_path / "moving", reference_update_steps=99, **settings)
    # but for rounding: the copy of the pretrained weights lies in memory in another order
    assert distance(same, weights) < 0.02 * distance(weights, copied(tiny_pipeline().unet))
    assert [line["ppo/kl"] for line in other_log] == pytest.approx([line["ppo/kl"] for line in log], rel=0.1, abs=1e-9)
    # one more pass over four trained steps of 8 samples
    assert moving.unet_forwards == plain.unet_forwards + 3 * 8 * 4


def test_a_weight_that_adapts_beside_a_reference_that_moves_is_refused(tmp_path):
    with pytest.raises(InputError, match="kl_coef would grow with it: unset reference_update_steps, or set kl_mode"):
        config(tmp_path, kl_mode="adaptive", kl_coef=1.0, reference_update_steps=2)


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_moving_reference_resumes_exactly(use_lora, tmp_path):
    settings = {
        "num_updates": 2, "kl_coef": 5.0, "reference_update_steps": 2, "save_steps": 1, "use_lora": use_lora,
        "kl_gate_quantile": 0.4, "antithetic": True,
    }  # fmt: skip
    _, weights, log = train(tmp_path / "whole", max_steps=5, **settings)
    train(tmp_path / "parts", max_steps=3, **settings)
    _, resumed, resumed_log = train(tmp_path / "parts", max_steps=5, resume_from_checkpoint="latest", **settings)
    assert differing(weights, resumed) == []
    assert timeless(log) == timeless(resumed_log)


# ----------------------------------------------------------------------------------------------------------- antithetic


def test_antithetic_pairs_start_from_opposite_noise(tmp_path, monkeypatch):
    import msrl_diffusers.trainers.ppo_trainer as module

    seen, sample = [], module.sample_rollout

    def recorded(*arguments, **named):
        rollout = sample(*arguments, **named)
        seen.append((rollout.conditions, rollout.latents[:, 0], rollout.latents[:, 1]))
        return rollout

    monkeypatch.setattr(module, "sample_rollout", recorded)
    train(tmp_path, max_steps=2, antithetic=True)
    starts = {}
    for step in range(2):
        conditions, first, second = (torch.cat(parts) for parts in zip(*seen[2 * step : 2 * step + 2], strict=True))
        for row in range(8):
            opposite = [other for other in range(8) if torch.equal(first[other], -first[row])]
            assert len(opposite) == 1
            assert conditions[opposite[0]] == conditions[row]
            assert not torch.allclose(second[opposite[0]], -second[row])  # steps draw noise of their own
        starts[step] = first
    assert len({tuple(row.flatten().tolist()) for row in torch.cat(list(starts.values()))}) == 16
