"""The trainer of reward models: splits by subject, ensembles, weights, refreshed data."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import finish
from safetensors.torch import load_file
from tiny import copied, differing
from torch.overrides import TorchFunctionMode
from trainers_scene import build, scored_volumes

from msrl_diffusers import (
    RewardConfig,
    RewardTrainer,
    ScoredVolumes,
    SliceRewardModel,
    VolumeRewardModel,
)
from msrl_diffusers.errors import InputError
from msrl_diffusers.models.reward_models import scores_of
from msrl_diffusers.trainers.augmentation import draw_slices


def test_reward_trainer_splits_by_subject(tmp_path):
    trainer, _ = build("reward-volume", tmp_path, max_steps=1, validation_fraction=0.3)
    train, validation = (trainer.data.select(rows) for rows in (trainer.train_rows, trainer.eval_rows["validation"]))
    assert not set(train.subject_ids) & set(validation.subject_ids)
    assert (len(set(train.subject_ids)), len(set(validation.subject_ids))) == (4, 2)
    assert len(train) + len(validation) == 12
    everything = scored_volumes()
    for part in (train, validation):
        for volume, target, subject in zip(part.pixel_values, part.targets, part.subject_ids, strict=True):
            (row,) = [i for i, other in enumerate(everything.pixel_values) if torch.equal(other, volume)]
            assert (everything.targets[row], everything.subject_ids[row]) == (target, subject)


class Largest(TorchFunctionMode):
    """Notes the most volumes that any operation gave."""

    most = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.ndim == 5:
            self.most = max(self.most, len(found))
        return found


def test_reward_data_are_not_copied(tmp_path):
    """All trajectory sets may fill the memory: a side of the split is most of them once more, in every process."""
    many = ScoredVolumes.cat([scored_volumes()] * 8)
    with Largest() as largest:
        trainer, _ = build_ensemble(tmp_path, many, num_heads=1, spread_penalty=0.0, max_steps=1)
        trainer.train()
    assert (len(many), largest.most) == (96, 32)  # a batch of the evaluation


def test_reward_trainer_learns_quality(tmp_path):
    trainer, module = build("reward-volume", tmp_path, max_steps=80, learning_rate=1e-2, train_batch_size=8)
    figures = trainer.train()
    assert figures["train_loss"] < 0.1
    assert figures["train_spearman"] > 0.6
    unseen = trainer.data.select(trainer.eval_rows["validation"])
    scores = scores_of(module, unseen.pixel_values, None, batch_size=1)
    assert scores[unseen.targets == 1].min() > scores[unseen.targets == 0].max()


def additional_volumes(count: int = 40) -> ScoredVolumes:
    """Phantoms of four of the known subjects, and of others, one each; with noise, of target 0.2."""
    known = scored_volumes().select(torch.arange(4))
    other = ScoredVolumes(
        known.pixel_values[torch.arange(count) % 4] + 0.3,
        torch.full((count,), 0.2),
        [f"ppo-1 sample {i}" for i in range(count)],
    )
    return ScoredVolumes.cat([known, other])


def build_ensemble(output_dir, dataset=None, additional=None, num_heads=3, spread_penalty=1.0, **settings):
    torch.manual_seed(0)
    model = VolumeRewardModel(block_out_channels=(8, 8), num_heads=num_heads, spread_penalty=spread_penalty)
    settings = {"train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "report_to": "none", **settings}
    config = RewardConfig(output_dir=str(output_dir), **settings)
    return RewardTrainer(model, config, dataset or scored_volumes(), additional), model


def test_slices_are_drawn_without_replacement_and_empty_ones_last():
    volumes = torch.full((64, 1, 6, 4, 4), -1.0)
    volumes[:, :, 1:5] = torch.arange(1, 5).view(1, 1, 4, 1, 1) / 10  # the first and the last are empty
    drawn = draw_slices(volumes, 3, 0.05, torch.Generator().manual_seed(0))
    assert drawn.shape == (64, 1, 3, 4, 4)
    values = drawn[:, 0, :, 0, 0]
    assert values.min() > 0
    assert all(len(set(row.tolist())) == 3 for row in values)
    counts = [(values == value / 10).float().mean().item() for value in range(1, 5)]
    assert counts == pytest.approx([0.25] * 4, abs=0.08)  # each as often as the others
    for number in (6, 9):
        every = draw_slices(volumes, number, 0.05, torch.Generator().manual_seed(0))[:, 0, :, 0, 0]
        assert torch.equal(every.sort(dim=1).values, volumes[:, 0, :, 0, 0].sort(dim=1).values)
        assert (every[:, -2:] == -1).all()


@pytest.mark.parametrize(("model_class", "seen"), [(SliceRewardModel, 2), (VolumeRewardModel, 16)])
def test_only_slice_rewards_are_trained_on_some_of_the_slices(model_class, seen, tmp_path):
    model, depths = model_class(block_out_channels=(8, 8)), []
    model.register_forward_pre_hook(
        lambda module, inputs: depths.append(inputs[0].shape[2]) if module.training else None
    )
    args = RewardConfig(
        output_dir=str(tmp_path), report_to="none", max_steps=2, train_batch_size=4, slices_per_volume=2
    )
    RewardTrainer(model, args, scored_volumes()).train()
    assert depths == [seen, seen]


def test_a_reward_ensemble_trains_every_head_and_resumes(tmp_path):
    settings = {"max_steps": 4, "save_steps": 2}
    trainer, module = build_ensemble(tmp_path / "whole", **settings)
    before = copied(module)
    figures = trainer.train()
    parameters = {name for name, _ in module.named_parameters()}
    assert {name.split(".")[2] for name in parameters if "other_heads" in name} == {"0", "1"}
    assert parameters <= set(differing(before, copied(module)))
    assert set(figures) == {
        f"{part}_{name}" for part in ("train", "validation") for name in ("loss", "spearman", "spread")
    }
    assert figures["validation_spread"] > 0
    build_ensemble(tmp_path / "parts", **{**settings, "max_steps": 2})[0].train()
    second, resumed = build_ensemble(tmp_path / "parts", **settings, resume_from_checkpoint="latest")
    assert second.train() == figures
    assert differing(copied(module), copied(resumed)) == []


def test_the_penalty_for_spread_is_no_part_of_the_training(tmp_path):
    weights, figures = [], []
    for penalty in (0.0, 2.0):
        trainer, module = build_ensemble(tmp_path / str(penalty), spread_penalty=penalty)
        figures.append(trainer.train())
        weights.append(copied(module))
    assert differing(*weights) == []
    assert figures[0]["validation_loss"] == figures[1]["validation_loss"]


def test_heads_see_subjects_under_weights_of_their_own(tmp_path):
    trainer, _ = build_ensemble(tmp_path)
    data, weights = trainer.data.select(trainer.train_rows), trainer.weights
    assert weights.shape == (len(data), 3)
    assert weights.min() > 0
    by_subject = {subject: weights[i] for i, subject in enumerate(data.subject_ids)}
    assert all(torch.equal(weights[i], by_subject[subject]) for i, subject in enumerate(data.subject_ids))
    assert len({tuple(row.tolist()) for row in by_subject.values()}) == len(by_subject)
    assert all(len(set(row.tolist())) == 3 for row in by_subject.values())
    many = scored_volumes().select(torch.zeros(400, dtype=torch.long))
    many = ScoredVolumes(many.pixel_values, many.targets, [str(i) for i in range(400)])
    drawn = build_ensemble(tmp_path, many)[0].weights
    torch.testing.assert_close(drawn.mean(dim=0), torch.ones(3), atol=0.2, rtol=0)
    torch.testing.assert_close(drawn.std(dim=0), torch.ones(3), atol=0.3, rtol=0)
    assert torch.corrcoef(drawn.T)[0, 1].abs() < 0.2
    grown, _ = build_ensemble(tmp_path, additional=additional_volumes())
    for i, subject in enumerate(grown.data.select(grown.train_rows).subject_ids):
        if subject in by_subject:
            assert torch.equal(grown.weights[i], by_subject[subject])
    plain, _ = build_ensemble(tmp_path, bootstrap_heads=False)
    assert torch.equal(plain.weights, torch.ones(len(data), 3))


def test_the_loss_of_several_heads_and_weights_by_hand(tmp_path):
    def loss_of(trainer, heads):
        return trainer._loss(lambda volumes, return_heads: heads, torch.zeros(2, 1), torch.tensor([0, 1])).item()

    trainer, _ = build_ensemble(tmp_path, num_heads=2)
    trainer.data.targets[trainer.train_rows[:2]] = torch.tensor([1.0, 0.0])
    trainer.weights[:2] = torch.tensor([[1.0, 3.0], [1.0, 1.0]])
    heads = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    # first head: errors 1 and 0 of equal weight; second: 1 of weight 3 and 4 of weight 1
    assert loss_of(trainer, heads) == pytest.approx((0.5 + (3 * 1 + 4) / 4) / 2)
    assert loss_of(trainer, heads) != loss_of(trainer, heads.flip(1))


def test_heavier_volumes_pull_a_single_head_towards_them(tmp_path):
    data = scored_volumes()
    contradictory = ScoredVolumes(data.pixel_values, 1 - data.targets, data.subject_ids)
    assert build_ensemble(tmp_path, num_heads=1, spread_penalty=0.0)[0].weights is None
    means = []
    for name, first, second in (("first", 50.0, 1.0), ("second", 1.0, 50.0)):
        both = ScoredVolumes.cat([data.weighted(first), contradictory.weighted(second)])
        settings = {"max_steps": 30, "learning_rate": 1e-2, "train_batch_size": 8, "max_shift": 0}
        trainer, module = build_ensemble(tmp_path / name, both, num_heads=1, spread_penalty=0.0, **settings)
        figures = trainer.train()
        assert set(figures) == {f"{part}_{name}" for part in ("train", "validation") for name in ("loss", "spearman")}
        scores = scores_of(module, data.pixel_values, None)
        means.append((scores[data.targets == 1].mean() - scores[data.targets == 0].mean()).item())
    assert means[0] > 0.3
    assert means[1] < -0.3


def test_joined_reward_data_keeps_order_and_weights():
    data = scored_volumes()
    joined = ScoredVolumes.cat([data, data.weighted(2.0).weighted(1.5)])
    assert len(joined) == 24
    assert joined.subject_ids == data.subject_ids * 2
    assert torch.equal(joined.targets, data.targets.repeat(2))
    assert joined.weights.tolist() == [1.0] * 12 + [3.0] * 12
    assert joined.select(torch.tensor([0, 20])).weights.tolist() == [1.0, 3.0]
    assert ScoredVolumes.cat([data, data]).weights is None
    parts = joined.split_by_subject(0.3, 0)
    assert torch.cat(parts).sort().values.tolist() == list(range(24))
    assert {weight for rows in parts for weight in joined.select(rows).weights.tolist()} == {1.0, 3.0}


def test_reward_data_that_does_not_fit_is_refused():
    data = scored_volumes()
    with pytest.raises(
        InputError, match="a volume, a subject and perhaps a weight and a class for each of 12 targets"
    ):
        ScoredVolumes(data.pixel_values[:3], data.targets, data.subject_ids)
    with pytest.raises(
        InputError, match="a volume, a subject and perhaps a weight and a class for each of 12 targets"
    ):
        ScoredVolumes(data.pixel_values, data.targets, data.subject_ids, torch.ones(3))
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="Weights of reward data must be positive"):
            data.weighted(weight)
    smaller = ScoredVolumes(data.pixel_values[..., :8], data.targets, data.subject_ids)
    with pytest.raises(InputError, match=r"one shape, got \[\(1, 16, 16, 8\), \(1, 16, 16, 16\)\]"):
        ScoredVolumes.cat([data, smaller])
    with pytest.raises(InputError, match="no reward data to join"):
        ScoredVolumes.cat([])


def test_a_subject_stays_on_its_side_when_data_are_added():
    first, added = scored_volumes(), additional_volumes(200)
    train, validation = (first.select(rows) for rows in first.split_by_subject(0.3, 0))
    added_train, added_validation = (added.select(rows) for rows in added.split_beside(first, 0.3, 0))
    assert len(added_train) + len(added_validation) == len(added)
    sides = {"train": set(added_train.subject_ids), "validation": set(added_validation.subject_ids)}
    assert not sides["train"] & sides["validation"]
    assert sides["train"] & set(first.subject_ids) <= set(train.subject_ids)
    assert sides["validation"] & set(first.subject_ids) <= set(validation.subject_ids)
    assert set(first.subject_ids) & (sides["train"] | sides["validation"]), "no subject is in both"
    assert 0.2 < len(added_validation) / len(added) < 0.4
    more = ScoredVolumes(added.pixel_values, added.targets, [f"ppo-2 {subject}" for subject in added.subject_ids])
    grown = ScoredVolumes.cat([added, more])
    grown_train, grown_validation = (grown.select(rows) for rows in grown.split_beside(first, 0.3, 0))
    assert sides["train"] <= set(grown_train.subject_ids)
    assert sides["validation"] <= set(grown_validation.subject_ids)
    assert set(added.select(added.split_beside(first, 0.3, 1)[1]).subject_ids) != sides["validation"]


def test_a_reward_is_refreshed_from_its_weights(tmp_path):
    plain, model = build("reward-volume", tmp_path / "first", max_steps=30, learning_rate=1e-2, train_batch_size=8)
    plain.train()
    before, figures = copied(model), plain.evaluate()
    model.requires_grad_(False)  # as LearnedReward leaves it
    args = RewardConfig(
        output_dir=str(tmp_path / "refresh-1"), report_to="none", max_steps=60, train_batch_size=8, learning_rate=3e-3
    )
    added = additional_volumes()
    trainer = RewardTrainer(model, args, scored_volumes(), added)
    first, rows = len(plain.train_rows), {**trainer.eval_rows, "train": trainer.train_rows}
    assert sorted(row for each in rows.values() for row in each.tolist()) == list(range(12 + len(added)))
    assert torch.equal(rows["train"][:first], plain.train_rows)
    assert rows["train"][first:].min() >= 12
    assert rows["added_validation"].min() >= 12  # those of the additional data
    assert torch.equal(rows["validation"], plain.eval_rows["validation"])
    untrained = trainer.evaluate()
    assert differing(before, copied(model)) == []
    assert {name: untrained[name] for name in figures if name.startswith("validation")} == {
        name: value for name, value in figures.items() if name.startswith("validation")
    }
    refreshed = trainer.train()
    assert set(refreshed) == {*figures, "added_validation_loss", "added_validation_spearman"}
    assert refreshed["added_validation_loss"] < 0.5 * untrained["added_validation_loss"]
    assert differing(before, copied(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_additional_data_of_validation_subjects_alone_are_refused(tmp_path):
    trainer, _ = build("reward-volume", tmp_path)
    with pytest.raises(InputError, match="All 2 additional volumes are of validation subjects; add volumes of others"):
        RewardTrainer(
            trainer.model, trainer.args, scored_volumes(), trainer.data.select(trainer.eval_rows["validation"])
        )


def test_any_network_may_be_a_reward_model(tmp_path):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16**3, 1), torch.nn.Flatten(0))
    args = RewardConfig(output_dir=str(tmp_path), report_to="none", max_steps=2, train_batch_size=4)
    figures = RewardTrainer(network, args, scored_volumes()).train()
    assert set(figures) == {f"{part}_{name}" for part in ("train", "validation") for name in ("loss", "spearman")}


def test_a_network_whose_config_is_no_mapping_may_be_a_reward_model(tmp_path):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16**3, 1), torch.nn.Flatten(0))
    network.config = SimpleNamespace(num_labels=2)  # as those of transformers
    args = RewardConfig(output_dir=str(tmp_path), report_to="none", max_steps=1, train_batch_size=4)
    assert "train_loss" in RewardTrainer(network, args, scored_volumes()).train()


@pytest.mark.slow
def test_processes_end_with_one_reward_model(tmp_path):
    """Its running statistics too, which every process takes of its own part of the batches."""
    finish(Path(__file__).parent / "reward_run.py", tmp_path, processes=2)
    ranks = [load_file(tmp_path / f"model-{rank}.safetensors") for rank in (0, 1)]
    assert any("running_mean" in name for name in ranks[0])
    assert differing(*ranks) == []
