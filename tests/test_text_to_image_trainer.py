"""The trainers of a small Stable Diffusion: autoencoder, then UNet and text encoder; LoRA for plain diffusers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import Brightness, copied, differing
from tiny_text_to_image import IMAGE_SIZE, VAE, tiny_images, tiny_text_to_image

from msrl_diffusers import DiffusionPPOConfig, DiffusionPPOTrainer
from msrl_diffusers.data.image_folder import ImageDataset
from msrl_diffusers.errors import InputError
from msrl_diffusers.seeding import generator_for, sample_generators
from msrl_diffusers.text_to_image.small import make_autoencoder
from msrl_diffusers.trainers.autoencoder_kl_config import AutoencoderKLConfig
from msrl_diffusers.trainers.autoencoder_kl_trainer import AutoencoderKLTrainer
from msrl_diffusers.trainers.base import checkpoints
from msrl_diffusers.trainers.denoising_loss import denoising_target, even_timesteps, min_snr_weights
from msrl_diffusers.trainers.lora import LORA_FILE
from msrl_diffusers.trainers.text_to_image_config import TextToImageConfig
from msrl_diffusers.trainers.text_to_image_trainer import PromptedUNet, TextToImageTrainer


@pytest.fixture(scope="module")
def images() -> ImageDataset:
    return tiny_images()


def settings(folder, **changes) -> dict:
    return {
        "output_dir": str(folder), "report_to": "none", "train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, **changes,
    }  # fmt: skip


def fine_tune(images: ImageDataset, folder, **changes) -> StableDiffusionPipeline:
    pipeline = tiny_text_to_image()
    TextToImageTrainer(pipeline, TextToImageConfig(**settings(folder, **changes)), images).train()
    return pipeline


def sample(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    prompts = ["dermoscopy image of nevus", "dermoscopy image of melanoma with hair"]
    generators = sample_generators(0, "test", [0, 1])
    return pipeline(prompts, num_inference_steps=2, generator=generators, output_type="latent").images


# -------------------------------------------------------------------------------------------------------- autoencoder


def test_the_autoencoder_learns_and_scales_its_latents(images, tmp_path):
    model = make_autoencoder(IMAGE_SIZE, **VAE)
    args = AutoencoderKLConfig(**settings(tmp_path, max_steps=60, learning_rate=5e-3, train_batch_size=8))
    trainer = AutoencoderKLTrainer(model, args, images, images.select(range(4)))
    before = trainer.evaluate()
    after = trainer.train()
    assert set(after) == {"psnr_train", "psnr_heldout"}
    assert after["psnr_train"] > before["psnr_train"] + 3
    with torch.no_grad():
        latents = model.encode(images.batch(range(len(images)))["pixel_values"]).latent_dist.mean
    assert (latents * model.config.scaling_factor).std().item() == pytest.approx(1, abs=1e-3)


def test_the_autoencoder_resumes_exactly(images, tmp_path):
    whole, resumed = make_autoencoder(IMAGE_SIZE, **VAE), make_autoencoder(IMAGE_SIZE, **VAE)
    args = AutoencoderKLConfig(**settings(tmp_path / "whole", max_steps=3, save_steps=1, save_total_limit=3))
    AutoencoderKLTrainer(whole, args, images).train()
    path = str(checkpoints(tmp_path / "whole")[0])
    args = replace(args, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=path)
    AutoencoderKLTrainer(resumed, args, images).train()
    assert path.endswith("checkpoint-1")
    assert differing(copied(whole), copied(resumed)) == []


def test_a_divergence_that_weighs_more_is_smaller(images, tmp_path):
    found = {}
    for weight in (0.0, 10.0):
        model = make_autoencoder(IMAGE_SIZE, **VAE)
        args = AutoencoderKLConfig(**settings(tmp_path / str(weight), max_steps=10, kl_weight=weight))
        AutoencoderKLTrainer(model, args, images).train()
        with torch.no_grad():
            found[weight] = model.encode(images.batch([0, 1])["pixel_values"]).latent_dist.kl().mean().item()
    assert found[10.0] < found[0.0] / 2


@pytest.mark.parametrize("weights", [{"kl_weight": -1.0}, {"l1_weight": 0.0, "l2_weight": 0.0}])
def test_weights_that_make_no_loss_are_refused(weights, tmp_path):
    with pytest.raises(InputError, match="weight"):
        AutoencoderKLConfig(**settings(tmp_path, **weights))


# ---------------------------------------------------------------------------------------------------- text to image


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_two_steps_change_what_is_trained_and_nothing_else(images, train_text_encoder, tmp_path):
    pipeline = tiny_text_to_image()
    before = {name: copied(getattr(pipeline, name)) for name in ("unet", "text_encoder", "vae")}
    args = TextToImageConfig(
        **settings(tmp_path, max_steps=2, train_text_encoder=train_text_encoder, prompt_dropout=0.0)
    )
    figures = TextToImageTrainer(pipeline, args, images).train()
    assert figures["loss"] > 0
    changed = {name: differing(before[name], copied(getattr(pipeline, name))) for name in before}
    assert set(changed["unet"]) == set(before["unet"])
    assert changed["vae"] == []
    assert bool(changed["text_encoder"]) == train_text_encoder


@pytest.mark.parametrize("changes", [{}, {"train_text_encoder": True}, {"use_lora": True, "lora_rank": 2}])
def test_resume_is_exact(images, changes, tmp_path):
    args = {"max_steps": 4, "save_steps": 2, "ema_decay": 0.9, **changes}
    whole = fine_tune(images, tmp_path / "whole", **args)
    path = str(checkpoints(tmp_path / "whole")[0])
    assert path.endswith("checkpoint-2")
    resumed = fine_tune(images, tmp_path / "resumed", **args, resume_from_checkpoint=path)
    assert differing(copied(whole.unet), copied(resumed.unet)) == []
    assert differing(copied(whole.text_encoder), copied(resumed.text_encoder)) == []


def test_it_learns_what_the_images_are(images, tmp_path):
    """One image, so that little is to be learned; the loss is that of the pipeline on draws no step has seen."""
    one = images.select([0] * 4)
    args = {"max_steps": 60, "learning_rate": 5e-3, "ema_decay": 0.9, "flip_augmentation": False}

    def loss(pipeline: StableDiffusionPipeline) -> float:
        scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        with torch.no_grad():
            posterior = pipeline.vae.encode(one.batch([0])["pixel_values"]).latent_dist
            clean = (posterior.mean * pipeline.vae.config.scaling_factor).expand(64, -1, -1, -1)
            noise = torch.randn(clean.shape, generator=generator_for(1, "loss"))
            timesteps = torch.linspace(0, 999, 64).long()
            embeddings = pipeline.encode_prompt(one.prompts[:1], "cpu", 64, False)[0]
            prediction = pipeline.unet(scheduler.add_noise(clean, noise, timesteps), timesteps, embeddings).sample
            return F.mse_loss(prediction, scheduler.get_velocity(clean, noise, timesteps)).item()

    assert loss(fine_tune(one, tmp_path, **args)) < 0.7 * loss(tiny_text_to_image())


def test_a_dropped_prompt_is_the_empty_one(images, tmp_path):
    """With all prompts dropped, only the embedding of the empty prompt has a gradient."""
    pipeline = tiny_text_to_image()
    args = TextToImageConfig(**settings(tmp_path, max_steps=1, train_text_encoder=True, prompt_dropout=0.999))
    before = pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    TextToImageTrainer(pipeline, args, images).train()
    after = pipeline.text_encoder.get_input_embeddings().weight
    changed = (before != after).any(dim=1).nonzero()[:, 0].tolist()
    assert changed == sorted(set(pipeline.tokenizer("").input_ids))


def test_cached_embeddings_are_those_of_the_text_encoder_and_the_pipeline(images, tmp_path):
    pipeline = tiny_text_to_image()
    rows = torch.tensor([3, 0, 3, 32])
    noisy = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 100, 500, 999])
    found = {}
    for trained in (False, True):
        args = TextToImageConfig(**settings(tmp_path, train_text_encoder=trained))
        trainer = TextToImageTrainer(pipeline, args, images)
        network = PromptedUNet(pipeline.unet, pipeline.text_encoder if trained else None)
        with torch.no_grad():
            found[trained] = network(noisy, timesteps, trainer._cache_prompts(torch.device("cpu")), rows)
        prompts = [trainer.prompts[row] for row in rows.tolist()]
    assert trainer.prompts[32] == ""
    with torch.no_grad():
        embeddings = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
        expected = pipeline.unet(noisy, timesteps, embeddings).sample
    for prediction in found.values():
        torch.testing.assert_close(prediction, expected)


def test_posteriors_are_those_of_the_autoencoder_with_and_without_mirror_images(images, tmp_path):
    pipeline, some = tiny_text_to_image(), images.select([0, 5, 9])
    trainer = TextToImageTrainer(pipeline, TextToImageConfig(**settings(tmp_path)), some)
    means, stds, rows = trainer._cache_posteriors(torch.device("cpu"))
    pixels = some.batch(range(3))["pixel_values"]
    with torch.no_grad():
        posterior = pipeline.vae.encode(torch.cat([pixels, pixels.flip(-1)])).latent_dist
    torch.testing.assert_close(means, posterior.mean.half(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(stds, posterior.std.half(), atol=2e-3, rtol=2e-3)
    assert [trainer.prompts[row] for row in rows.tolist()] == some.prompts * 2


def test_lora_loads_in_plain_diffusers(images, tmp_path):
    untouched = tiny_text_to_image()
    before = copied(untouched.unet)
    tuned = fine_tune(
        images, tmp_path, max_steps=2, use_lora=True, lora_rank=2, ema_decay=None, learning_rate=1e-1,
        lora_target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"],
    )  # fmt: skip
    assert not getattr(tuned.unet, "peft_config", None)  # merged: a saved pipeline is whole
    assert differing(before, copied(tuned.unet))
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [LORA_FILE]  # alone: a folder to share
    expected = sample(tuned)
    assert not torch.allclose(sample(untouched), expected, atol=1e-3)
    untouched.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(sample(untouched), expected, atol=1e-4, rtol=1e-3)
    untouched.unload_lora_weights()
    assert differing(before, copied(untouched.unet)) == []


def test_after_an_adapter_all_weights_can_be_tuned(images, tmp_path):
    """By reinforcement learning in the same process, on the pipeline that fine-tuning left."""
    pipeline = fine_tune(images, tmp_path / "sft", max_steps=1, use_lora=True, lora_rank=2)
    assert all(value.requires_grad for value in pipeline.unet.parameters())
    pipeline.unet.requires_grad_(False)  # as `load_lora_weights`, `fuse_lora` and `unload_lora_weights` leave it
    before = copied(pipeline.unet)
    args = DiffusionPPOConfig(
        output_dir=str(tmp_path / "rl"), max_steps=1, rollout_batch_size=4, num_rollout_batches=1, train_batch_size=4,
        num_inference_steps=2, report_to="none",
    )  # fmt: skip
    DiffusionPPOTrainer(pipeline, Brightness(), args, train_conditions=["a nevus"]).train()
    assert len(differing(before, copied(pipeline.unet))) > 0.9 * len(before)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_adapter_in_what_is_trained_is_refused(part, images, tmp_path):
    """All weights would be saved under the names of its layers, which nothing loads."""
    pipeline = tiny_text_to_image()
    target = {"unet": "to_q", "text_encoder": "q_proj"}[part]
    getattr(pipeline, part).add_adapter(LoraConfig(r=2, target_modules=[target], init_lora_weights=False), "mine")
    args = TextToImageConfig(**settings(tmp_path, max_steps=1, train_text_encoder=True))
    with pytest.raises(InputError, match=r"carries the LoRA adapter mine, .*fuse_lora\(\), then unload_lora_weights"):
        TextToImageTrainer(pipeline, args, images)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    TextToImageTrainer(pipeline, args, images).train()
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert differing(copied(getattr(pipeline, part)), copied(getattr(again, part))) == []


def test_weights_that_somebody_froze_stay_as_they_are(tmp_path):
    pipeline = tiny_text_to_image()
    pipeline.unet.conv_in.requires_grad_(False)
    args = DiffusionPPOConfig(output_dir=str(tmp_path), report_to="none")
    DiffusionPPOTrainer(pipeline, Brightness(), args, train_conditions=["a nevus"])
    frozen = [name for name, value in pipeline.unet.named_parameters() if not value.requires_grad]
    assert frozen == ["conv_in.weight", "conv_in.bias"]


# ------------------------------------------------------------------------------------------------------ half precision


def half_text_to_image() -> StableDiffusionPipeline:
    pipeline = tiny_text_to_image()
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.to(torch.bfloat16)
    return pipeline


def adapter_dtypes(pipeline: StableDiffusionPipeline) -> set[torch.dtype]:
    return {value.dtype for value in pipeline.unet.parameters() if value.requires_grad}


def test_the_adapter_of_a_half_precision_pipeline_is_in_float32(images, tmp_path):
    pipeline = half_text_to_image()
    args = {"use_lora": True, "lora_rank": 2, "mixed_precision": "bf16", "max_steps": 1, "ema_decay": None}
    before = copied(pipeline.unet)
    trainer = TextToImageTrainer(pipeline, TextToImageConfig(**settings(tmp_path / "sft", **args)), images)
    assert adapter_dtypes(pipeline) == {torch.float32}
    assert trainer.train()["grad_norm"] > 0
    assert {value.dtype for value in load_file(tmp_path / "sft" / "lora" / LORA_FILE).values()} == {torch.float32}
    assert {value.dtype for value in pipeline.unet.parameters()} == {torch.bfloat16}
    assert differing(before, copied(pipeline.unet))


def test_rl_of_a_half_precision_pipeline_trains_a_float32_adapter(tmp_path):
    pipeline = half_text_to_image()
    args = DiffusionPPOConfig(
        output_dir=str(tmp_path), max_steps=1, rollout_batch_size=4, num_rollout_batches=1, train_batch_size=4,
        num_inference_steps=2, guidance_scale=2.0, learning_rate=1e-2, report_to="none", mixed_precision="bf16",
        use_lora=True, lora_rank=2, save_steps=1,
    )  # fmt: skip
    trainer = DiffusionPPOTrainer(pipeline, Brightness(), args, train_conditions=["a nevus"])
    assert adapter_dtypes(pipeline) == {torch.float32}
    assert trainer.train()["ppo/grad_norm"] > 0
    saved = load_file(tmp_path / "checkpoint-1/model.safetensors")
    grown = [value for name, value in saved.items() if "lora_B" in name]
    assert {value.dtype for value in grown} == {torch.float32}
    assert all(value.any() for value in grown)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mixed_precision": "bf16"},
            "UNet2DConditionModel are torch.bfloat16.*load the pipeline in float32, and set",
        ),
        (
            {"mixed_precision": "no", "use_lora": True},
            r"UNet2DConditionModel is torch.bfloat16.*set mixed_precision \(bf16",
        ),
    ],
)
def test_half_precision_that_can_not_be_trained_is_refused(images, changes, message, tmp_path):
    pipeline = half_text_to_image()
    with pytest.raises(InputError, match=message):
        TextToImageTrainer(pipeline, TextToImageConfig(**settings(tmp_path, **changes)), images)
    args = DiffusionPPOConfig(output_dir=str(tmp_path), report_to="none", **changes)
    with pytest.raises(InputError, match=message):
        DiffusionPPOTrainer(pipeline, Brightness(), args, train_conditions=["a nevus"])
    right = replace(args, mixed_precision="bf16", use_lora=True)
    DiffusionPPOTrainer(pipeline, Brightness(), right, train_conditions=["a nevus"])  # nothing was left in it


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_prompts_that_are_cut_are_counted(train_text_encoder, images, tmp_path, caplog):
    pipeline = tiny_text_to_image()
    args = TextToImageConfig(**settings(tmp_path, train_text_encoder=train_text_encoder))
    TextToImageTrainer(pipeline, args, images)
    assert caplog.messages == []
    long = "dermoscopy " + "of " * pipeline.tokenizer.model_max_length
    TextToImageTrainer(pipeline, args, replace(images, prompts=[long, long, *images.prompts[2:]]))
    limit = pipeline.tokenizer.model_max_length
    (warning,) = caplog.messages
    assert warning.startswith(f"1 of 31 different prompts have more than the {limit} tokens")
    assert f"(the longest {limit + 3})" in warning


def test_another_size_of_images_is_refused(tmp_path):
    pipeline = tiny_text_to_image()
    large = ImageDataset(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 0), (), ["a"], ["a"])
    with pytest.raises(
        InputError, match="have 32 pixels along an edge, the pipeline makes images of 16; load them with"
    ):
        TextToImageTrainer(pipeline, TextToImageConfig(**settings(tmp_path)), large)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_dropout": 1.0}, "prompt_dropout must lie in"),
        ({"ema_decay": 1.0}, "ema_decay must lie between"),
        ({"use_lora": True, "train_text_encoder": True}, "use_lora adapts the UNet alone"),
        ({"snr_gamma": 0.0}, "snr_gamma must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        TextToImageConfig(**settings(tmp_path, **changes))


# ------------------------------------------------------------------------------------------------------------- losses


def test_targets_of_every_prediction_type():
    clean, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = DDIMScheduler(prediction_type=prediction_type)
        alpha = scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - scheduler.alphas_cumprod[timesteps]).sqrt()[:, None, None, None]
        expected = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}[prediction_type]
        torch.testing.assert_close(denoising_target(scheduler, clean, noise, timesteps), expected)
    scheduler = DDIMScheduler()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(InputError, match="'flow' can't be trained"):
        denoising_target(scheduler, clean, noise, timesteps)


def test_min_snr_weights_by_hand():
    timesteps = torch.tensor([10, 900])
    alpha = DDIMScheduler().alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)  # about 500 and 0.004: the first is clipped, the second is not
    weights = {"epsilon": [5 / snr[0], 1.0], "v_prediction": [5 / (snr[0] + 1), snr[1] / (snr[1] + 1)]}
    for prediction_type, expected in weights.items():
        found = min_snr_weights(DDIMScheduler(prediction_type=prediction_type), timesteps, 5.0)
        torch.testing.assert_close(found, torch.tensor([float(value) for value in expected]), rtol=1e-3, atol=1e-6)
    assert min_snr_weights(DDIMScheduler(), timesteps, None).tolist() == [1.0, 1.0]


def test_timesteps_stay_in_range_when_a_position_is_rounded_up(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, generator: torch.full((size,), 1 - 2**-24))
    assert even_timesteps(64, 1000, torch.Generator().manual_seed(0)).max() == 999


def test_timesteps_are_spread_over_the_range():
    timesteps = even_timesteps(10, 1000, torch.Generator().manual_seed(0))
    assert sorted(value // 100 for value in timesteps.tolist()) == list(range(10))
    assert timesteps.tolist() != sorted(timesteps.tolist())
