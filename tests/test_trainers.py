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
