"""Labels of a policy's own samples, and reward models that train on with them."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file
from test_ppo_trainer import config, timeless
from tiny import copied, differing, tiny_phantoms, tiny_pipeline

from msrl_diffusers import (
    DiffusionPPOTrainer,
    LearnedReward,
    ScoredVolumes,
    SliceFeatureExtractor,
    SliceRewardModel,
    VolumeRewardModel,
)
from msrl_diffusers.data.degradations import degrade_dataset
from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.features import extract_features
from msrl_diffusers.evaluation.fidelity import frechet_distance
from msrl_diffusers.evaluation.set_labels import SetLabeler, place_on_scale
from msrl_diffusers.functional.influence import frechet_influence
from msrl_diffusers.rewards.base import Scale
from msrl_diffusers.trainers import base, refresh
from msrl_diffusers.trainers.base import checkpoints, read_log
from msrl_diffusers.trainers.refresh import RefreshConfig, RewardRefresh, _training_within
from msrl_diffusers.trainers.reward_trainer import RewardTrainer


@pytest.fixture(scope="module")
def real():
    return tiny_phantoms(6)


@pytest.fixture(scope="module")
def anchors(real):
    return {f"blur-{strength}": degrade_dataset(real, "blur", strength, seed=0) for strength in (0.1, 0.4, 1.0)}


def extractor():
    torch.manual_seed(0)
    return SliceFeatureExtractor(block_out_channels=(8, 8), num_features=4, num_slices=3)


# --------------------------------------------------------------------------------------------------------------- labels


def test_a_place_on_the_scale():
    scale = {"worst": 3.0, "middle": 2.0, "best": 1.0}
    assert place_on_scale(scale, 1.5) == pytest.approx(0.75)
    assert place_on_scale(scale, 0.1) == 1.0
    assert place_on_scale(scale, 99.0) == 0.0
    assert place_on_scale(scale, 1.5, "rank") == pytest.approx(2 / 3)


def test_a_set_is_placed_between_better_and_worse_ones(real, anchors):
    labeler = SetLabeler(extractor(), real, anchors)
    targets = {}
    for strength in (0.02, 0.25, 0.6, 1.0):
        found = labeler(degrade_dataset(real, "blur", strength, seed=1).pixel_values, real.class_labels)
        assert set(found.fid) == set(found.quality) == {"HGG", "LGG"}
        for label, name in real.id2label.items():
            rows = real.class_labels == label
            assert (found.targets[rows] == torch.tensor(found.quality[name])).all()
        targets[strength] = found.targets.mean().item()
    assert targets[0.02] == 1.0  # better than all of the scale
    assert 1 > targets[0.25] > targets[0.6] > 0
    assert targets[1.0] == pytest.approx(0, abs=0.05)


def test_a_smaller_set_is_compared_at_its_own_size(real, anchors):
    network = extractor()
    rows = torch.cat([(real.class_labels == label).nonzero()[:count, 0] for label, count in ((0, 3), (1, 2))])
    volumes = degrade_dataset(real, "blur", 0.3, seed=1).select(rows)
    found = SetLabeler(network, real, anchors)(volumes.pixel_values, volumes.class_labels)
    features = extract_features(network, volumes.pixel_values[:3])
    of_class = real.select((real.class_labels == 0).nonzero()[:3, 0])
    expected = frechet_distance(extract_features(network, of_class.pixel_values), features)
    assert found.fid["HGG"] == pytest.approx(expected)
    with pytest.raises(InputError, match="has 1 volumes in the set to be labelled; a label needs two or more"):
        SetLabeler(network, real, anchors)(volumes.pixel_values[:4], volumes.class_labels[:4])


def test_marginal_labels_single_out_the_worst_volume(real, anchors):
    network = extractor()
    volumes = degrade_dataset(real, "blur", 0.3, seed=1)
    pixel_values = volumes.pixel_values.clone()
    pixel_values[0] = degrade_dataset(real, "rician_noise", 1.0, seed=1).pixel_values[0]
    found = SetLabeler(network, real, anchors, marginal_labels=0.5)(pixel_values, volumes.class_labels)
    rows = volumes.class_labels == 0
    influence = frechet_influence(
        extract_features(network, real.pixel_values[rows]), extract_features(network, pixel_values[rows])
    )
    assert influence.argmax() == found.targets[rows].argmin()
    assert found.targets[rows].std() > 0
    assert ((found.targets >= 0) & (found.targets <= 1)).all()


# -------------------------------------------------------------------------------------------------------------- refresh


def refreshed_run(
    output_dir,
    real,
    anchors,
    max_steps,
    of_models=None,
    of_trainer=None,
    sample_weight=1.0,
    more_rewards=(),
    **settings,
):
    """A tiny PPO run with a refresh after every second rollout; `of_models` are arguments of both reward models."""
    torch.manual_seed(0)
    models = {
        name: model_class(block_out_channels=(8, 8), **(of_models or {}))
        for name, model_class in {"volume": VolumeRewardModel, "slice": SliceRewardModel}.items()
    }
    before = {name: copied(model) for name, model in models.items()}
    rewards = [LearnedReward(name, model) for name, model in models.items()]
    parts = [
        ScoredVolumes(
            volumes.pixel_values,
            torch.full((len(volumes),), 1.0 - number / 2),
            volumes.subject_ids,
            class_labels=volumes.class_labels if of_models else None,
        )
        for number, volumes in enumerate(anchors.values())
    ]
    args = {
        name: RefreshConfig(
            every=2,
            max_steps=3,
            train_batch_size=4,
            report_to="none",
            validation_fraction=0.3,
            sample_weight=sample_weight,
        )
        for name in models
    }
    of_rewards = RewardRefresh(models, ScoredVolumes.cat(parts), SetLabeler(extractor(), real, anchors), args)
    pipeline = tiny_pipeline()
    trainer = DiffusionPPOTrainer(
        pipeline, [*rewards, *more_rewards], config(output_dir, max_steps=max_steps, save_steps=1, **settings),
        **{"refresh": of_rewards, **(of_trainer or {})},
    )  # fmt: skip
    trainer.train()
    return pipeline, trainer, models, before


@pytest.mark.parametrize(
    "options",
    [{}, {"of_models": {"num_classes": 2, "num_heads": 2}, "kl_gate_quantile": 0.5}],
    ids=["plain", "by class"],
)
def test_a_refreshed_run_resumes_exactly(options, real, anchors, tmp_path):
    settings = {"num_updates": 2, "kl_coef": 0.1, **options}
    pipeline, trainer, models, before = refreshed_run(tmp_path / "whole", real, anchors, 6, **settings)
    assert [line["step"] for line in read_log(tmp_path / "whole") if "refresh/fid_HGG" in line] == [2, 4]
    for name, model in models.items():
        assert differing(before[name], copied(model))
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    refreshed_run(tmp_path / "parts", real, anchors, 3, **settings)
    latest = (
        tmp_path / "parts" / ".." / "parts" / checkpoints(tmp_path / "parts")[-1].name
    )  # the same folder by another name
    resumed, other, other_models, _ = refreshed_run(
        tmp_path / "parts", real, anchors, 6, resume_from_checkpoint=str(latest), **settings
    )
    assert differing(copied(pipeline.unet), copied(resumed.unet)) == []
    for name, model in models.items():
        assert differing(copied(model), copied(other_models[name])) == []
    assert trainer.reward.scales == other.reward.scales
    logs = [timeless(read_log(tmp_path / name)) for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_a_refresh_changes_rewards_and_their_scales_from_the_next_rollout_on(real, anchors, tmp_path):
    _, trainer, _, _ = refreshed_run(tmp_path / "run", real, anchors, 3)
    assert not (tmp_path / "run/refresh/training").joinpath("00002-volume").exists()  # no rollout comes after the last
    log = read_log(tmp_path / "run")
    assert log[0]["reward/mean"] == pytest.approx(0, abs=1e-4)
    stored = tmp_path / "run/refresh/00001"
    assert {path.name for path in stored.iterdir()} == {
        "samples.safetensors", "volume.safetensors", "slice.safetensors",
    }  # fmt: skip
    assert 0 <= log[1]["refresh/target_HGG"] <= 1
    assert "refresh/volume_validation_spearman" in log[1]
    assert trainer.reward.scales.keys() == {"volume", "slice"}


def test_a_refresh_trains_on_the_samples_of_all_so_far_and_standardizes_anew(real, anchors, tmp_path, monkeypatch):
    added, rollouts = [], []

    class Noting(RewardTrainer):
        def __init__(self, model, args, data, additional):
            added.append(additional)
            super().__init__(model, args, data, additional)

    def keep(rollout):
        rollouts.append((rollout.samples.half().flatten(1), rollout.conditions.clone()))
        return 0.0

    monkeypatch.setattr(refresh, "RewardTrainer", Noting)
    _, trainer, _, _ = refreshed_run(
        tmp_path, real, anchors, 6, of_trainer={"watchdogs": {"keep": keep}}, sample_weight=0.25
    )
    assert [len(one) for one in added] == [8, 8, 16, 16]  # two models, two refreshes
    assert all((one.weights == 0.25).all() for one in added)  # those of the first training weigh 1
    for place, step in enumerate((1, 3)):
        stored = load_file(tmp_path / f"refresh/{step:05d}/samples.safetensors")
        samples, conditions = rollouts[step]
        distances = (stored["samples"].flatten(1)[:, None].float() - samples[None].float()).abs().amax(dim=2)
        assert (distances.amin(dim=1) == 0).all()
        assert torch.equal(conditions[distances.argmin(dim=1)], stored["labels"])
        rows = slice(8 * place, 8 * place + 8)
        assert torch.equal(added[-1].pixel_values[rows], stored["samples"])
        assert torch.equal(added[-1].targets[rows], stored["targets"])
    reference = load_file(tmp_path / "refresh/reference.safetensors")
    scales = {name: replace(scale) for name, scale in trainer.reward.scales.items()}
    with torch.no_grad():
        trainer.reward.fit(trainer.reward.parts(reference["samples"].float(), reference["labels"]))
    for name, scale in trainer.reward.scales.items():
        assert vars(scales[name]) == pytest.approx(vars(scale), rel=1e-4)


@pytest.fixture
def fresh_accelerate():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_a_training_within_another_leaves_its_accumulation_and_precision(fresh_accelerate):
    outer = Accelerator(cpu=True, gradient_accumulation_steps=4, mixed_precision="bf16")
    with _training_within():
        AcceleratorState._reset_state()  # as a TrainingRun does
        inner = Accelerator(cpu=True, gradient_accumulation_steps=1, mixed_precision="no")
        assert (inner.gradient_accumulation_steps, inner.mixed_precision) == (1, "no")
    assert (outer.gradient_accumulation_steps, outer.mixed_precision) == (4, "bf16")


def test_a_refresh_standardizes_rewards_with_their_metadata_in_their_batches(real, anchors, tmp_path):
    seen = []

    def age(images, prompts, metadata):
        seen.append([(label, entry["age"]) for label, entry in zip(prompts, metadata, strict=True)])
        return [entry["age"] for entry in metadata], {}

    dataset = Dataset.from_dict({"label": [0, 1, 1], "age": [1, 2, 3]})
    _, trainer, _, _ = refreshed_run(
        tmp_path, real, anchors, 3, of_trainer={"train_dataset": dataset}, more_rewards=[age], reward_batch_size=3
    )
    assert trainer.reward.scales["age"] == Scale.of(torch.tensor([1, 2, 3, 1, 2, 3, 1, 2]))
    rescaling = seen[8:11]  # two rollouts were of two batches, each scored in two parts
    assert rescaling == [[(0, 1), (1, 2), (1, 3)], [(0, 1), (1, 2), (1, 3)], [(0, 1), (1, 2)]]


def test_a_refresh_that_would_fail_is_refused_before_the_first_rollout(real, anchors, tmp_path):
    once = {"train_conditions": [0] * 7 + [1]}
    with pytest.raises(
        InputError,
        match=r"refresh after rollout 2 .*'LGG' has 1 volumes in the set to be labelled.*num_rollout_batches",
    ):
        refreshed_run(tmp_path / "once", real, anchors, 3, of_trainer=once)
    few = real.select([0, *(real.class_labels == 1).nonzero()[:, 0].tolist()])
    with pytest.raises(InputError, match=r"refresh after rollout 2 .*'HGG' has 1 volumes in the training set"):
        refreshed_run(tmp_path / "few", few, anchors, 3)
    assert not list(tmp_path.glob("*/refresh"))
    refreshed_run(tmp_path / "once", real, anchors, 2, of_trainer=once)  # no refresh comes


def test_a_refresh_is_not_added_to_a_run_that_began_without(real, anchors, tmp_path):
    refreshed_run(tmp_path, real, anchors, 2, of_trainer={"refresh": None})
    with pytest.raises(
        InputError, match=r"reference\.safetensors.* is missing: .* began without a refresh; leave it out"
    ):
        refreshed_run(tmp_path, real, anchors, 5, resume_from_checkpoint="latest")
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


def test_refreshes_that_are_refused(real, anchors, tmp_path, monkeypatch):
    models = {"volume": VolumeRewardModel(block_out_channels=(8, 8))}
    data = ScoredVolumes(real.pixel_values, torch.rand(len(real)), real.subject_ids)
    labeler = SetLabeler(extractor(), real, anchors)
    with pytest.raises(
        InputError, match=r"settings for each of \['volume'\] with one value of every and of sample_weight, got \[\]"
    ):
        RewardRefresh(models, data, labeler, {})
    with monkeypatch.context() as bare:
        bare.setattr(base, "get_available_trackers", list)
        with pytest.raises(InputError, match="report_to=tensorboard needs a package that is not installed"):
            RewardRefresh(models, data, labeler, {"volume": RefreshConfig(report_to="tensorboard")})
    refresh = RewardRefresh(models, data, labeler, {"volume": RefreshConfig(report_to="none")})
    with pytest.raises(InputError, match="needs class labels as conditions"):
        DiffusionPPOTrainer(
            tiny_pipeline(), LearnedReward("volume", models["volume"]), config(tmp_path), train_conditions=["a brain"],
            refresh=refresh,
        )  # fmt: skip
    with pytest.raises(InputError, match="every must be positive, got 0"):
        RefreshConfig(every=0)
