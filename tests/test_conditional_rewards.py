"""Reward models that are told the class of what they score."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_phantoms
from torch import nn

from msrl_diffusers import (
    LearnedReward,
    RewardConfig,
    RewardTrainer,
    ScoredVolumes,
    SliceRewardModel,
    VolumeRewardModel,
    WeightedSum,
)
from msrl_diffusers.errors import InputError
from msrl_diffusers.models.reward_models import non_empty_slices
from msrl_diffusers.trainers.uncertainty import reward_uncertainty


MODELS = [VolumeRewardModel, SliceRewardModel]
LABELS = torch.tensor([0, 1, 1, 0])


def build(model_class, **settings):
    torch.manual_seed(0)
    return model_class(block_out_channels=(8, 16), num_classes=2, **settings).eval()


def phantoms() -> torch.Tensor:
    return tiny_phantoms(2).pixel_values.float()


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("num_heads", [1, 3])
def test_every_class_has_a_score_of_its_own(model_class, num_heads):
    model, volumes = build(model_class, num_heads=num_heads), phantoms()
    whole = [model(volumes, return_heads=True, class_labels=torch.full((4,), label)) for label in (0, 1)]
    assert whole[0].shape == (4, num_heads)
    assert (whole[0] - whole[1]).abs().min() > 1e-3
    mixed = model(volumes, return_heads=True, class_labels=LABELS)
    torch.testing.assert_close(mixed, torch.stack([whole[label][row] for row, label in enumerate(LABELS)]))


def test_all_slices_of_a_volume_are_of_its_class():
    model, volumes = build(SliceRewardModel), phantoms()
    slices = volumes[1].movedim(1, 0)
    by_slice = model(slices, class_labels=torch.ones(len(slices), dtype=torch.long))
    shown = non_empty_slices(volumes[1:2], model.config.empty_threshold)[0]
    assert 0 < shown.sum() < len(shown)
    torch.testing.assert_close(model(volumes, class_labels=LABELS)[1], by_slice[shown].mean())


@pytest.mark.parametrize("model_class", MODELS)
def test_a_conditional_model_comes_back(model_class, tmp_path):
    model, volumes = build(model_class), phantoms()
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert again.config.num_classes == 2
    assert torch.equal(again(volumes, class_labels=LABELS), model(volumes, class_labels=LABELS))


def test_a_learned_reward_passes_the_conditions_on():
    model, volumes = build(VolumeRewardModel, num_heads=2), phantoms()
    reward, expected = LearnedReward("volume", model, batch_size=3), model(volumes, class_labels=LABELS)
    torch.testing.assert_close(reward(volumes, LABELS), expected)
    torch.testing.assert_close(reward(volumes, LABELS.tolist()), expected)
    joined = WeightedSum([reward])
    joined.fit(joined.parts(volumes, LABELS))
    heads = model(volumes, return_heads=True, class_labels=LABELS)
    torch.testing.assert_close(
        reward_uncertainty(joined, volumes, {}, LABELS), heads.std(dim=1, correction=0) / joined.scales["volume"].std
    )


def test_a_model_without_classes_is_told_none():
    class Brightness(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, volumes):
            return self.factor * volumes.flatten(1).mean(dim=1)

    volumes, model = phantoms(), Brightness()
    for config in (SimpleNamespace(num_classes=7), {"num_classes": 7}):  # of a network that means another thing by it
        model.config = config
        scores = LearnedReward("brightness", model, batch_size=3)(volumes, LABELS)
        torch.testing.assert_close(scores, volumes.flatten(1).mean(dim=1))


def test_what_a_class_is_worth_is_learned(tmp_path):
    """The same volumes are good as one class and bad as the other: nothing to learn for a model that is not told."""
    volumes = tiny_phantoms(6)
    first, second = (
        ScoredVolumes(
            volumes.pixel_values,
            torch.full((12,), worth),
            volumes.subject_ids,
            class_labels=torch.full((12,), label),
        )
        for label, worth in ((0, 1.0), (1, 0.0))
    )
    data, errors = ScoredVolumes.cat([first, second]), {}
    for num_classes in (None, 2):
        torch.manual_seed(0)
        model = VolumeRewardModel(block_out_channels=(8, 8), num_classes=num_classes)
        args = RewardConfig(
            output_dir=str(tmp_path / str(num_classes)), max_steps=40, learning_rate=1e-2, train_batch_size=8,
            report_to="none",
        )  # fmt: skip
        errors[num_classes] = RewardTrainer(model, args, data).train()["validation_loss"]
    assert errors[2] < 0.05
    assert errors[None] > 0.2


def test_classes_stay_with_their_volumes():
    volumes = tiny_phantoms(2)
    data = ScoredVolumes(volumes.pixel_values, torch.rand(4), volumes.subject_ids, class_labels=LABELS)
    assert data.weighted(2.0).select(torch.tensor([3, 1])).class_labels.tolist() == [0, 1]
    assert ScoredVolumes.cat([data, data]).class_labels.tolist() == LABELS.tolist() * 2


def test_missing_or_unknown_classes_are_refused(tmp_path):
    model, volumes = build(VolumeRewardModel), phantoms()
    with pytest.raises(InputError, match="scores a sample as one of its class; give class_labels"):
        model(volumes)
    for labels in (LABELS[:2], LABELS + 1, LABELS - 1):
        with pytest.raises(InputError, match="class_labels must be 4 whole numbers below 2"):
            model(volumes, class_labels=labels)
    for number in (0, -1, 2.0):
        with pytest.raises(InputError, match="num_classes of a reward model must be a whole number from 1"):
            VolumeRewardModel(num_classes=number)
    data = ScoredVolumes(volumes, torch.rand(4), list("abcd"))
    with pytest.raises(InputError, match="needs reward data with class_labels"):
        RewardTrainer(model, RewardConfig(output_dir=str(tmp_path), report_to="none"), data)
    labeled = ScoredVolumes(volumes, torch.rand(4), list("abcd"), class_labels=LABELS)
    with pytest.raises(InputError, match="Some of the reward data to join states classes"):
        ScoredVolumes.cat([data, labeled])
    with pytest.raises(InputError, match="perhaps a weight and a class for each of 4 targets"):
        ScoredVolumes(volumes, torch.rand(4), list("abcd"), class_labels=LABELS[:3])
