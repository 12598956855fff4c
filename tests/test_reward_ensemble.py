"""Reward models of several heads; and that those of one are what they were."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_phantoms
from torch.nn import functional as F

from msrl_diffusers import LearnedReward, SliceRewardModel, VolumeRewardModel
from msrl_diffusers.errors import InputError
from msrl_diffusers.models.reward_models import non_empty_slices, pessimistic_score


MODELS = [VolumeRewardModel, SliceRewardModel]


def build(model_class, **settings):
    torch.manual_seed(0)
    return model_class(block_out_channels=(8, 16), **settings).eval()


def phantoms() -> torch.Tensor:
    return tiny_phantoms(2).pixel_values.float()


@pytest.mark.parametrize("model_class", MODELS)
def test_heads_of_an_ensemble(model_class):
    model, volumes = build(model_class, num_heads=4, spread_penalty=0.5), phantoms()
    heads, scores = model(volumes, return_heads=True), model(volumes)
    assert heads.shape == (4, 4)
    assert scores.shape == (4,)
    assert scores.dtype == heads.dtype == torch.float32
    assert heads.std(dim=1).min() > 1e-3, "heads start from one place"
    expected = heads.mean(dim=1) - 0.5 * (heads - heads.mean(dim=1, keepdim=True)).square().mean(dim=1).sqrt()
    torch.testing.assert_close(scores, expected)
    model.register_to_config(spread_penalty=0.0)
    torch.testing.assert_close(model(volumes), heads.mean(dim=1))


@pytest.mark.parametrize("model_class", MODELS)
def test_the_first_head_and_the_trunk_are_those_of_a_model_of_one(model_class):
    single, ensemble, volumes = build(model_class), build(model_class, num_heads=3), phantoms()
    torch.testing.assert_close(ensemble(volumes, return_heads=True)[:, 0], single(volumes))
    weights = ensemble.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in single.state_dict().items())
    assert {name.split(".")[1] for name in set(weights) - set(single.state_dict())} == {"other_heads"}
    assert single(volumes, return_heads=True).shape == (4, 1)


def test_a_slice_ensemble_takes_the_spread_over_volumes():
    model = build(SliceRewardModel, num_heads=3, spread_penalty=1.0)
    volumes = phantoms()
    by_slice = model(volumes[0].movedim(1, 0), return_heads=True)  # [D, 3]
    assert by_slice.shape == (16, 3)
    shown = non_empty_slices(volumes[:1], model.config.empty_threshold)[0]
    assert 0 < shown.sum() < 16
    means = by_slice[shown].mean(dim=0)
    torch.testing.assert_close(model(volumes[:1], return_heads=True)[0], means)
    torch.testing.assert_close(model(volumes[:1])[0], means.mean() - means.std(correction=0))
    assert model(torch.full((1, 1, 16, 16, 16), -1.0)).isfinite().all()


@pytest.mark.parametrize("model_class", MODELS)
def test_a_saved_ensemble_is_the_same_ensemble(model_class, tmp_path):
    model, volumes = build(model_class, num_heads=3, spread_penalty=0.7), phantoms()
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert (loaded.config.num_heads, loaded.config.spread_penalty) == (3, 0.7)
    assert torch.equal(loaded(volumes), model(volumes))
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("model_class", MODELS)
def test_a_penalty_for_spread_is_differentiable_even_where_heads_agree(model_class):
    model, volumes = build(model_class, num_heads=2, spread_penalty=1.0), phantoms().requires_grad_()
    model(volumes).sum().backward()
    assert volumes.grad.isfinite().all()
    assert volumes.grad.abs().sum() > 0
    model.network.other_heads[0].load_state_dict(model.network.head.state_dict())
    volumes.grad = None
    model(volumes).sum().backward()
    assert volumes.grad.isfinite().all()
    single = build(model_class)
    leaf = phantoms().requires_grad_()
    single(leaf).sum().backward()
    torch.testing.assert_close(volumes.grad, leaf.grad)


@pytest.mark.parametrize("model_class", MODELS)
def test_an_ensemble_is_a_reward_as_it_is(model_class):
    model, volumes = build(model_class, num_heads=3, spread_penalty=2.0), phantoms()
    reward = LearnedReward("quality", model, batch_size=3)
    torch.testing.assert_close(reward(volumes, [0] * 4), model(volumes))
    assert (reward(volumes, [0] * 4) < model(volumes, return_heads=True).mean(dim=1)).all()


@pytest.mark.parametrize("model_class", MODELS)
def test_checkpoints_from_before_ensembles_score_bit_for_bit_as_they_did(model_class, tmp_path):
    build(model_class).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    older = {name: value for name, value in config.items() if name not in ("num_heads", "spread_penalty")}
    assert len(older) == len(config) - 2
    (tmp_path / "config.json").write_text(json.dumps(older))
    model = model_class.from_pretrained(tmp_path)
    assert (model.config.num_heads, model.config.spread_penalty) == (1, 0.0)
    blocks = [f"layers.{i}" for i in range(4)] + ["norm_out", "head.0", "head.2"]
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(name.removeprefix("network.").startswith(tuple(blocks)) for name in stored)
    volumes, network = phantoms(), model.network  # the forward pass, as it was
    images = volumes.movedim(2, 1).flatten(0, 1) if model_class is SliceRewardModel else volumes
    hidden = F.silu(network.layers(images)).float().flatten(2)
    pooled = torch.cat([hidden.mean(dim=2), hidden.var(dim=2).add(1e-6).sqrt()], dim=1)
    expected = network.head(network.norm_out(pooled))[:, 0]
    if model_class is SliceRewardModel:
        shown = non_empty_slices(volumes, model.config.empty_threshold).float()
        expected = (expected.reshape(4, 16) * shown).sum(dim=1) / shown.sum(dim=1)
    assert torch.equal(model(volumes), expected)


def test_pessimistic_scores_by_hand():
    heads = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    assert pessimistic_score(heads, 0.0).tolist() == [2.0, 2.0]
    assert pessimistic_score(heads, 0.5).tolist() == [1.5, 2.0]
    assert pessimistic_score(heads[:, :1], 9.0).tolist() == [1.0, 2.0]
    assert pessimistic_score(heads.bfloat16(), 0.5).dtype == torch.float32


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 0}, "num_heads of a reward model must be a whole number from 1, got 0"),
        ({"num_heads": 2.5}, "whole number from 1, got 2.5"),
        ({"num_heads": 2, "spread_penalty": -1.0}, "spread_penalty of a reward model must be 0 or more, got -1.0"),
        ({"num_heads": 2, "spread_penalty": float("nan")}, "must be 0 or more, got nan"),
        ({"spread_penalty": 1.0}, "spread_penalty=1.0 needs heads that can disagree; set num_heads to 2 or more"),
    ],
)
def test_an_ensemble_that_can_t_be_is_refused(model_class, settings, message):
    with pytest.raises(InputError, match=message):
        model_class(**settings)
