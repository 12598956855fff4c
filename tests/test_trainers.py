import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import copied, differing, tiny_phantoms, tiny_pipeline, tiny_vqvae

from msrl_diffusers import (
    FeatureConfig,
    FeatureTrainer,
    LatentDiffusionConfig,
    LatentDiffusionTrainer,
    RewardConfig,
    RewardTrainer,
    ScoredVolumes,
    SliceFeatureExtractor,
    SliceRewardModel,
    VolumeFeatureExtractor,
    VolumeRewardModel,
    VQGANConfig,
    VQGANTrainer,
)
from msrl_diffusers.errors import InputError
from msrl_diffusers.seeding import batch_indices
from msrl_diffusers.trainers.augmentation import augment_volumes
from msrl_diffusers.trainers.base import TrainingRun, checkpoints, read_log
from msrl_diffusers.trainers.reward_trainer import score_volumes
from msrl_diffusers.trainers.vqgan_trainer import psnr, random_slices


NAMES = ["vqgan", "vqgan-fsq", "diffusion", "features-slice", "features-volume", "reward-volume", "reward-slice"]


def scored_volumes() -> ScoredVolumes:
    """Clean volumes with target 1 and noisy ones with target 0, of six subjects."""
    volumes = tiny_phantoms()
    noise = torch.randn(volumes.pixel_values.shape, generator=torch.Generator().manual_seed(0)).half()
    pixel_values = torch.cat([volumes.pixel_values, volumes.pixel_values + noise])
    return ScoredVolumes(pixel_values, torch.tensor([1.0] * 6 + [0.0] * 6), volumes.subject_ids * 2)


def build(name: str, output_dir, **settings):
    """A trainer of freshly built weights, always the same, and the module whose weights it trains."""
    settings = {
        "output_dir": str(output_dir), "report_to": "none", "train_batch_size": 2, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "logging_steps": 1, **settings,
    }  # fmt: skip
    torch.manual_seed(0)
    if name.startswith("vqgan"):
        settings = {"discriminator_start_step": 0, "discriminator_channels": 8, "discriminator_layers": 1, **settings}
        model = tiny_vqvae("fsq" if name == "vqgan-fsq" else "vq")
        trainer = VQGANTrainer(model, VQGANConfig(**settings), tiny_phantoms())
        return trainer, torch.nn.ModuleDict({"model": model, "discriminators": trainer.discriminators})
    if name == "diffusion":
        pipeline = tiny_pipeline()
        return LatentDiffusionTrainer(pipeline, LatentDiffusionConfig(**settings), tiny_phantoms()), pipeline.unet
    if name.startswith("features"):
        model_class = {"slice": SliceFeatureExtractor, "volume": VolumeFeatureExtractor}[name.split("-")[1]]
        model = model_class(block_out_channels=(8, 8), num_features=16)
        trainer = FeatureTrainer(model, FeatureConfig(**settings), tiny_phantoms())
        return trainer, trainer.network
    model_class = {"volume": VolumeRewardModel, "slice": SliceRewardModel}[name.split("-")[1]]
    model = model_class(block_out_channels=(8, 8))
    return RewardTrainer(model, RewardConfig(**settings), scored_volumes()), model


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_change_every_parameter(name, tmp_path):
    trainer, module = build(name, tmp_path, max_steps=2)
    before = copied(module)
    figures = trainer.train()
    assert figures
    assert all(torch.isfinite(torch.tensor(value)) for value in figures.values())
    unchanged = [key for key, value in module.named_parameters() if torch.equal(value, before[key])]
    assert unchanged == []


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_exact(name, tmp_path):
    trainer, module = build(name, tmp_path / "whole", max_steps=4, save_steps=2)
    figures = trainer.train()
    first, _ = build(name, tmp_path / "parts", max_steps=2, save_steps=2)
    first.train()
    second, resumed = build(name, tmp_path / "parts", max_steps=4, save_steps=2, resume_from_checkpoint="latest")
    initial = copied(resumed)
    resumed_figures = second.train()
    assert differing(copied(resumed), copied(module)) == []
    assert differing(initial, copied(resumed))
    histories = [read_log(tmp_path / folder) for folder in ("whole", "parts")]
    for history in histories:
        assert [line["step"] for line in history] == [1, 2, 3, 4]
    without_time = [[{k: v for k, v in line.items() if k != "seconds"} for line in h] for h in histories]
    assert without_time[0] == without_time[1]
    timeless = [{k: v for k, v in f.items() if k != "seconds"} for f in (figures, resumed_figures)]
    assert timeless[0] == timeless[1]


def test_figures_since_the_last_log_line_survive_a_kill(tmp_path, monkeypatch):
    build("reward-volume", tmp_path / "whole", max_steps=4, logging_steps=4)[0].train()
    save_checkpoint = TrainingRun.save_checkpoint

    def save_and_die(run):
        save_checkpoint(run)
        raise KeyboardInterrupt

    settings = {"max_steps": 4, "logging_steps": 4, "save_steps": 3, "resume_from_checkpoint": "latest"}
    killed, _ = build("reward-volume", tmp_path / "parts", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            killed.train()
    assert read_log(tmp_path / "parts") == []
    build("reward-volume", tmp_path / "parts", **settings)[0].train()
    (one,), (other,) = (read_log(tmp_path / folder) for folder in ("whole", "parts"))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_another_seed_gives_another_training(tmp_path):
    one, other = (build("reward-volume", tmp_path / str(seed), max_steps=2, seed=seed) for seed in (0, 1))
    for trainer, _ in (one, other):
        trainer.train()
    assert differing(copied(one[1]), copied(other[1]))


def test_a_named_checkpoint_is_resumed_and_later_history_dropped(tmp_path):
    trainer, module = build("reward-volume", tmp_path, max_steps=4, save_steps=1, save_total_limit=4)
    trainer.train()
    again, resumed = build(
        "reward-volume", tmp_path, max_steps=4, resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    again.train()
    assert differing(copied(module), copied(resumed)) == []
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4]


def test_a_finished_training_resumes_to_its_result(tmp_path):
    trainer, module = build("reward-volume", tmp_path, max_steps=2, save_steps=2)
    trainer.train()
    again, resumed = build("reward-volume", tmp_path, max_steps=2, save_steps=2, resume_from_checkpoint="latest")
    again.train()
    assert differing(copied(module), copied(resumed)) == []
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trainer, _ = build("reward-volume", tmp_path, max_steps=12, save_steps=1, save_total_limit=3)
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11", "checkpoint-12"]
    assert len(list(tmp_path.glob("*checkpoint*"))) == 3


def test_a_limit_of_no_checkpoints_does_not_keep_all(tmp_path):
    try:
        trainer, _ = build("reward-volume", tmp_path, max_steps=3, save_steps=1, save_total_limit=0)
    except InputError:
        return
    trainer.train()
    assert checkpoints(tmp_path) == []


def test_what_a_killed_run_left_is_ignored(tmp_path):
    trainer, module = build("reward-volume", tmp_path / "clean", max_steps=3, save_steps=2)
    trainer.train()
    folder = tmp_path / "killed"
    for name in (".checkpoint-2.tmp", ".checkpoint-3.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "trainer_state.json").write_text(json.dumps({"step": 2, "state": {}}))
    (folder / "checkpoint-7").mkdir()  # no state: not whole
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    again, resumed = build("reward-volume", folder, max_steps=3, save_steps=2, resume_from_checkpoint="latest")
    again.train()
    assert differing(copied(module), copied(resumed)) == []
    assert [line["step"] for line in read_log(folder)] == [1, 2, 3]
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    assert not (folder / ".checkpoint-2.tmp").exists()


@pytest.mark.parametrize("wanted", ["checkpoint-9", "."])
def test_a_checkpoint_that_is_not_there_is_refused(wanted, tmp_path):
    trainer, _ = build("reward-volume", tmp_path, max_steps=1, resume_from_checkpoint=str(tmp_path / wanted))
    with pytest.raises(InputError, match="is not a checkpoint of this trainer"):
        trainer.train()


@pytest.mark.parametrize("name", ["vqgan", "diffusion", "features-slice", "reward-volume"])
def test_accumulated_gradients_update_less_often(name, tmp_path):
    trainer, module = build(name, tmp_path, max_steps=1, gradient_accumulation_steps=2)
    before = copied(module)
    trainer.train()
    parameters = {key for key, _ in module.named_parameters()}
    assert not parameters & set(differing(before, copied(module)))


def test_half_the_batch_twice_is_the_whole_batch(tmp_path):
    whole = build("reward-volume", tmp_path / "whole", max_steps=1, train_batch_size=4, max_shift=0)
    halves = build(
        "reward-volume",
        tmp_path / "halves",
        max_steps=2,
        train_batch_size=2,
        max_shift=0,
        gradient_accumulation_steps=2,
    )
    for _, module in (whole, halves):  # batch normalization sees batches, not updates
        module.network.norm_out = torch.nn.Identity()
    before = copied(whole[1])
    for trainer, _ in (whole, halves):  # flips are drawn per step: without left and right there is nothing to flip
        data = trainer.train_dataset.pixel_values
        data.copy_((data + data.flip(-1)) / 2)
        trainer.train()
    one, other = copied(whole[1]), copied(halves[1])
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-4, rtol=1e-3)  # a wrong mean moves Adam by 2e-3
    assert differing(before, one)


def test_discriminators_accumulate_gradients_too(tmp_path):
    weights = []
    for name in ("same", "other"):
        trainer, module = build(
            "vqgan-fsq", tmp_path / name, max_steps=2, gradient_accumulation_steps=2, learning_rate=1e-12
        )
        first = batch_indices(len(trainer.train_dataset), 2, 0, 0)
        assert not set(first.tolist()) & set(batch_indices(len(trainer.train_dataset), 2, 0, 1).tolist())
        if name == "other":  # only the first of the two accumulated batches sees a difference
            trainer.train_dataset.pixel_values[first] = -trainer.train_dataset.pixel_values[first]
        trainer.train()
        weights.append(copied(module["discriminators"]))
    assert differing(*weights)


def test_trainings_of_different_precision_in_one_process(tmp_path):
    for precision in ("no", "bf16", "no"):
        trainer, module = build("reward-volume", tmp_path / precision, max_steps=1, mixed_precision=precision)
        trainer.train()
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
        output = module(torch.rand(1, 1, 16, 16, 16))  # the wrapper of mixed precision is gone
        assert output.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_vqgan_starts_its_discriminators_late(tmp_path):
    trainer, module = build("vqgan-fsq", tmp_path, max_steps=2, discriminator_start_step=5)
    before = copied(module["discriminators"])
    trainer.train()
    assert differing(before, copied(module["discriminators"])) == []
    assert all("discriminator_loss" not in line for line in read_log(tmp_path))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_vqgan_learns_to_reconstruct(tmp_path):
    trainer, _ = build("vqgan-fsq", tmp_path, max_steps=30, discriminator_start_step=99, learning_rate=3e-3)
    before = trainer.evaluate()["psnr_train"]
    trainer.eval_dataset = tiny_phantoms(1)
    after = trainer.train()
    assert after["psnr_train"] > before + 2
    assert "psnr_heldout" in after
    assert not trainer.model.training


def test_a_discriminator_that_waits_is_no_cause_for_a_warning(tmp_path):
    trainer, _ = build("vqgan-fsq", tmp_path, max_steps=2, discriminator_start_step=5)
    trainer.train()


def test_psnr_and_random_slices():
    real = torch.zeros(2, 1, 4, 4, 4)
    assert psnr(real + 0.2, real).item() == pytest.approx(20)
    volume = torch.arange(64.0).reshape(1, 1, 4, 4, 4)
    one, other = random_slices([volume, volume + 100], 3, torch.Generator().manual_seed(0))
    assert one.shape == (3, 1, 4, 4)
    assert torch.equal(one + 100, other)
    planes = [volume.movedim(axis, 0) for axis in (2, 3, 4)]
    assert any(all(any(torch.equal(s, p[None][0]) for p in plane[:, 0]) for s in one) for plane in planes)


@pytest.mark.parametrize("flip", [False, True])
def test_diffusion_sets_the_scale_of_the_latents(flip, tmp_path):
    trainer, _ = build("diffusion", tmp_path, max_steps=1, flip_augmentation=flip, encode_batch_size=4)
    trainer.train()
    pipeline = trainer.pipeline
    assert pipeline.vqvae.config.scaling_factor != 2.0
    volumes = trainer.train_dataset.batch(range(6))["pixel_values"]
    volumes = torch.cat([volumes, volumes.flip(-1)]) if flip else volumes
    with torch.no_grad():
        latents = pipeline.encode_volumes(volumes)
        restored = pipeline.decode_latents(latents)
        expected = pipeline.vqvae(volumes).sample.clamp(-1, 1)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    assert latents.mean().item() == pytest.approx(0, abs=1e-3)
    assert (restored - expected).abs().mean() < 1e-2


def test_diffusion_keeps_the_averaged_weights(tmp_path):
    trainer, module = build("diffusion", tmp_path, max_steps=6, save_steps=6, learning_rate=1e-2, ema_decay=0.9)
    before = copied(module)
    trainer.train()
    averaged, last = copied(trainer.pipeline.unet), load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert set(differing(averaged, last)) == {name for name, _ in module.named_parameters()}

    def moved(weights):
        return sum((weights[name] - before[name]).abs().sum().item() for name in before)

    assert 0 < moved(averaged) < moved(last)
    assert not trainer.pipeline.unet.training


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_diffusion_learns_in_every_prediction_type(prediction_type, snr_gamma, tmp_path):
    trainer, _ = build(
        "diffusion", tmp_path, max_steps=40, learning_rate=3e-3, train_batch_size=8, snr_gamma=snr_gamma
    )
    trainer.pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    trainer.train()
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_diffusion_refuses_a_prediction_type_it_can_t_train(tmp_path):
    trainer, _ = build("diffusion", tmp_path, max_steps=1)
    trainer.pipeline.scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(InputError, match="'flow_prediction' can't be trained"):
        trainer.train()


def test_feature_trainer_tells_subjects_apart(tmp_path):
    trainer, _ = build("features-volume", tmp_path, max_steps=60, learning_rate=1e-2, train_batch_size=6, max_shift=0)
    figures = trainer.train()
    assert figures["accuracy_subject"] > 0.4  # chance: one of six
    assert figures["accuracy_label"] > 0.8
    assert "accuracy_position" not in figures  # a volume has one
    slices, _ = build("features-slice", tmp_path / "slices", max_steps=1)
    assert set(slices.train()) >= {"accuracy_subject", "accuracy_label", "accuracy_position", "loss"}


def test_reward_trainer_splits_by_subject(tmp_path):
    trainer, _ = build("reward-volume", tmp_path, max_steps=1, validation_fraction=0.3)
    train, validation = trainer.train_dataset, trainer.eval_dataset
    assert not set(train.subject_ids) & set(validation.subject_ids)
    assert (len(set(train.subject_ids)), len(set(validation.subject_ids))) == (4, 2)
    assert len(train) + len(validation) == 12
    everything = scored_volumes()
    for part in (train, validation):
        for volume, target, subject in zip(part.pixel_values, part.targets, part.subject_ids, strict=True):
            (row,) = [i for i, other in enumerate(everything.pixel_values) if torch.equal(other, volume)]
            assert (everything.targets[row], everything.subject_ids[row]) == (target, subject)


def test_reward_trainer_learns_quality(tmp_path):
    trainer, module = build("reward-volume", tmp_path, max_steps=80, learning_rate=1e-2, train_batch_size=8)
    figures = trainer.train()
    assert figures["train_loss"] < 0.1
    assert figures["train_spearman"] > 0.6
    scores = score_volumes(module, trainer.eval_dataset.pixel_values, batch_size=1)
    assert scores[trainer.eval_dataset.targets == 1].min() > scores[trainer.eval_dataset.targets == 0].max()


def test_augmentation_flips_shifts_and_adds_noise():
    volumes = torch.rand(16, 1, 4, 4, 4)
    flipped = augment_volumes(volumes, torch.Generator().manual_seed(0), max_shift=0)
    kinds = [
        (torch.equal(new, old), torch.equal(new, old.flip(-1))) for new, old in zip(flipped, volumes, strict=True)
    ]
    assert set(kinds) == {(True, False), (False, True)}
    shifted = augment_volumes(volumes, torch.Generator().manual_seed(0), max_shift=1)
    for new, old in zip(shifted, volumes, strict=True):
        torch.testing.assert_close(new.flatten().sort().values, old.flatten().sort().values)
    noisy = augment_volumes(volumes, torch.Generator().manual_seed(0), max_shift=0, noise_level=0.1)
    assert (noisy - flipped).std().item() == pytest.approx(0.1, rel=0.2)
    again = augment_volumes(volumes, torch.Generator().manual_seed(0), max_shift=0, noise_level=0.1)
    assert torch.equal(noisy, again)


def test_tensorboard_gets_the_figures(tmp_path):
    trainer, _ = build("reward-volume", tmp_path, max_steps=1, report_to="tensorboard")
    trainer.train()
    assert list(Path(tmp_path).rglob("events.out.tfevents*"))


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
    data, weights = trainer.train_dataset, trainer.weights
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
    for i, subject in enumerate(grown.train_dataset.subject_ids):
        if subject in by_subject:
            assert torch.equal(grown.weights[i], by_subject[subject])
    plain, _ = build_ensemble(tmp_path, bootstrap_heads=False)
    assert torch.equal(plain.weights, torch.ones(len(data), 3))


def test_the_loss_of_several_heads_and_weights_by_hand(tmp_path):
    def loss_of(trainer, heads):
        return trainer._loss(lambda volumes, return_heads: heads, torch.zeros(2, 1), torch.tensor([0, 1])).item()

    trainer, _ = build_ensemble(tmp_path, num_heads=2)
    trainer.train_dataset.targets[:2] = torch.tensor([1.0, 0.0])
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
        scores = score_volumes(module, data.pixel_values)
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
    assert {weight for part in parts for weight in part.weights.tolist()} == {1.0, 3.0}


def test_reward_data_that_does_not_fit_is_refused():
    data = scored_volumes()
    with pytest.raises(InputError, match="a volume, a subject and perhaps a weight for each of 12 targets"):
        ScoredVolumes(data.pixel_values[:3], data.targets, data.subject_ids)
    with pytest.raises(InputError, match="a volume, a subject and perhaps a weight for each of 12 targets"):
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
    train, validation = first.split_by_subject(0.3, 0)
    added_train, added_validation = added.split_beside(first, 0.3, 0)
    assert len(added_train) + len(added_validation) == len(added)
    sides = {"train": set(added_train.subject_ids), "validation": set(added_validation.subject_ids)}
    assert not sides["train"] & sides["validation"]
    assert sides["train"] & set(first.subject_ids) <= set(train.subject_ids)
    assert sides["validation"] & set(first.subject_ids) <= set(validation.subject_ids)
    assert set(first.subject_ids) & (sides["train"] | sides["validation"]), "no subject is in both"
    assert 0.2 < len(added_validation) / len(added) < 0.4
    more = ScoredVolumes(added.pixel_values, added.targets, [f"ppo-2 {subject}" for subject in added.subject_ids])
    grown_train, grown_validation = ScoredVolumes.cat([added, more]).split_beside(first, 0.3, 0)
    assert sides["train"] <= set(grown_train.subject_ids)
    assert sides["validation"] <= set(grown_validation.subject_ids)
    assert set(added.split_beside(first, 0.3, 1)[1].subject_ids) != sides["validation"]


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
    assert len(trainer.train_dataset) + len(trainer.added_eval_dataset) == len(plain.train_dataset) + len(added)
    assert torch.equal(trainer.train_dataset.targets[: len(plain.train_dataset)], plain.train_dataset.targets)
    assert trainer.eval_dataset.subject_ids == plain.eval_dataset.subject_ids
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
        RewardTrainer(trainer.model, trainer.args, scored_volumes(), trainer.eval_dataset)


def test_any_network_may_be_a_reward_model(tmp_path):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16**3, 1), torch.nn.Flatten(0))
    args = RewardConfig(output_dir=str(tmp_path), report_to="none", max_steps=2, train_batch_size=4)
    figures = RewardTrainer(network, args, scored_volumes()).train()
    assert set(figures) == {f"{part}_{name}" for part in ("train", "validation") for name in ("loss", "spearman")}
