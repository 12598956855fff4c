"""Trainers of the autoencoder, the denoiser and the feature extractors."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import copied, differing, tiny_phantoms
from torch.overrides import TorchFunctionMode
from trainers_scene import build

from msrl_diffusers import FeatureConfig, LatentDiffusionConfig, MedVolumePipeline
from msrl_diffusers.data.degradations import DEGRADATIONS
from msrl_diffusers.errors import InputError
from msrl_diffusers.policies import make_policy
from msrl_diffusers.trainers.augmentation import augment_volumes, degrade_some
from msrl_diffusers.trainers.base import read_log
from msrl_diffusers.trainers.vqgan_trainer import psnr, random_slices


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


class Noting(TorchFunctionMode):
    """Keeps every tensor of so many volumes that an operation gave."""

    def __init__(self, number: int):
        super().__init__()
        self.number, self.found = number, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.ndim == 5 and len(found) == self.number:
            self.found.append(found)
        return found


def test_the_latents_of_all_volumes_are_there_once(tmp_path):
    """And not once more for every step of their making."""
    trainer, _ = build("diffusion", tmp_path, flip_augmentation=True, encode_batch_size=4)
    with Noting(12) as noting:
        latents, labels = trainer._cache_latents(torch.device("cpu"))
    assert {tensor.data_ptr() for tensor in noting.found} == {latents.data_ptr()}
    assert torch.equal(labels, trainer.train_dataset.class_labels.repeat(2))


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
    heads = {"accuracy_subject", "accuracy_label", "accuracy_position"}
    assert set(slices.train()) >= {*heads, "loss"}


def test_augmentation_changes_the_brightness_and_leaves_black():
    volumes = torch.rand(64, 1, 4, 4, 4)
    volumes[:, :, 0] = -1.0
    plain = augment_volumes(volumes, torch.Generator().manual_seed(0), max_shift=0)
    changed = augment_volumes(volumes, torch.Generator().manual_seed(0), max_shift=0, max_gain=0.2)
    assert (changed[:, :, 0] == -1).all()
    ratios = ((changed + 1) / (plain + 1))[:, :, 1:].flatten(1)
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios))  # one for all voxels of a volume
    assert 0.8 <= ratios.min() < 0.85
    assert 1.15 < ratios.max() <= 1.2


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


def test_some_volumes_are_degraded_and_the_network_is_told_how():
    volumes = tiny_phantoms().pixel_values.float().repeat(8, 1, 1, 1, 1)
    worse, ways = degrade_some(volumes, 0.5, torch.Generator().manual_seed(0))
    changed = (worse != volumes).flatten(1).any(dim=1)
    assert torch.equal(changed, ways > 0)
    assert 0.3 < changed.float().mean() < 0.7
    assert set(ways.tolist()) == set(range(len(DEGRADATIONS) + 1))
    assert torch.equal(worse, degrade_some(volumes, 0.5, torch.Generator().manual_seed(0))[0])
    untouched, ways = degrade_some(volumes, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(untouched, volumes)
    assert not ways.any()


def test_features_may_be_told_degradations(tmp_path):
    told, _ = build("features-volume", tmp_path, max_steps=1, degraded_share=0.5)
    assert told.network.heads["degradation"].out_features == len(DEGRADATIONS) + 1
    untold, _ = build("features-volume", tmp_path, max_steps=1)
    assert "degradation" not in untold.network.heads
    with pytest.raises(InputError, match="degraded_share must lie in"):
        FeatureConfig(degraded_share=1.5)


def test_gradients_of_the_discriminator_of_volumes_in_bf16(tmp_path):
    """Its last maps have two voxels an edge, where some CPUs' bf16 convolutions give garbage."""
    trainer, _ = build("vqgan-fsq", tmp_path, discriminator_layers=1)
    network, gradients = trainer.discriminators["volume"], []
    volumes = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    for enabled in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            *features, last = network(volumes)
        (last.float() * torch.linspace(0, 1, last.numel()).reshape(last.shape)).sum().backward()
        gradients.append(network.final_conv.conv.weight.grad.clone())
    assert last.shape[2:] == (2, 2, 2)
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()
    assert last.dtype == torch.float32
    assert {feature.dtype for feature in features} == {torch.bfloat16}  # larger maps stay in it


@pytest.mark.parametrize("decay", [0.0, 1.0, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(InputError, match="ema_decay must lie between 0 and 1"):
        LatentDiffusionConfig(ema_decay=decay)


def test_a_denoiser_without_class_dropout_can_not_be_guided(tmp_path):
    for dropout in (0.1, 0.0):
        trainer, _ = build("diffusion", tmp_path / str(dropout), max_steps=1, class_dropout=dropout)
        trainer.train()
        trainer.pipeline.save_pretrained(tmp_path / "pipeline")
        pipeline = MedVolumePipeline.from_pretrained(tmp_path / "pipeline")
        assert pipeline.config.supports_guidance == (dropout > 0)
        pipeline.set_progress_bar_config(disable=True)
        pipeline("HGG", num_inference_steps=1)
        if dropout:
            pipeline("HGG", num_inference_steps=1, guidance_scale=2.0)
    volumes = tiny_phantoms().pixel_values[:1].float()
    policy = make_policy(pipeline)
    step = torch.tensor(1)
    for guided in (
        lambda: pipeline("HGG", num_inference_steps=1, guidance_scale=2.0),
        lambda: pipeline.reconstruct(volumes, 1, "HGG", guidance_scale=2.0),
        lambda: policy.predict(torch.zeros(1, *policy.latent_shape), step, policy.encode(["HGG"]), 2.0),
    ):
        with pytest.raises(InputError, match="can't be guided: use guidance_scale=1"):
            guided()
