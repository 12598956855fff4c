"""An unmodified Stable Diffusion pipeline as a policy: the same rollouts and trainer, prompts instead of classes."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import Brightness, copied, differing, tiny_stable_diffusion

from msrl_diffusers import DiffusionPPOConfig, DiffusionPPOTrainer
from msrl_diffusers.errors import InputError
from msrl_diffusers.functional.denoising import gaussian_log_prob
from msrl_diffusers.policies import make_policy
from msrl_diffusers.rollouts import StepTable, sample_rollout, step_moments
from msrl_diffusers.seeding import sample_generators


PROMPTS = ["a lesion", "a nevus", "hair"]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_rollout_is_what_the_pipeline_samples(guidance_scale):
    pipeline = tiny_stable_diffusion()
    policy = make_policy(pipeline)
    table = StepTable.of(policy.scheduler, 4, 1.0, 1e-6)
    rollout = sample_rollout(policy, PROMPTS, table, sample_generators(0, "sd", [0, 1, 2]), guidance_scale)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    expected = pipeline(
        PROMPTS, num_inference_steps=4, eta=1.0, guidance_scale=guidance_scale, output_type="latent",
        generator=sample_generators(0, "sd", [0, 1, 2]),
    ).images  # fmt: skip
    torch.testing.assert_close(rollout.latents[:, -1], expected, atol=1e-4, rtol=1e-4)
    images = pipeline(
        PROMPTS, num_inference_steps=4, eta=1.0, guidance_scale=guidance_scale, output_type="pt",
        generator=sample_generators(0, "sd", [0, 1, 2]),
    ).images  # fmt: skip
    assert rollout.samples.shape == (3, 3, 16, 16)
    torch.testing.assert_close(rollout.samples.clamp(-1, 1), 2 * images - 1, atol=1e-3, rtol=0)
    for step in table.stochastic:
        mean, std = step_moments(policy, table, step, rollout.latents[:, step], rollout.conditioning, guidance_scale)
        ratio = (gaussian_log_prob(rollout.latents[:, step + 1], mean, std) - rollout.log_probs[:, step]).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)


def test_guidance_that_the_pipeline_does_not_have_is_refused(tmp_path):
    policy = make_policy(tiny_stable_diffusion())
    table = StepTable.of(policy.scheduler, 4, 1.0, 1e-6)
    with pytest.raises(InputError, match=r"guided by scales above 1 only, and guidance_scale is 0\.0; give 1 or more"):
        sample_rollout(policy, PROMPTS, table, sample_generators(0, "sd", [0, 1, 2]), guidance_scale=0.0)


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_trainer_takes_it_as_it_is(tmp_path, use_lora):
    pipeline = tiny_stable_diffusion()
    before = copied(pipeline.unet)
    frozen = copied(pipeline.vae), copied(pipeline.text_encoder)
    args = DiffusionPPOConfig(
        output_dir=str(tmp_path), max_steps=2, rollout_batch_size=6, num_rollout_batches=1, train_batch_size=6,
        num_inference_steps=3, guidance_scale=2.0, learning_rate=1e-3, use_lora=use_lora, report_to="none",
    )  # fmt: skip
    figures = DiffusionPPOTrainer(pipeline, Brightness(), args, train_conditions=PROMPTS).train()
    assert figures["ppo/ratio_deviation"] < 1e-3
    assert differing(before, copied(pipeline.unet))
    assert differing(frozen[0], copied(pipeline.vae)) == []
    assert differing(frozen[1], copied(pipeline.text_encoder)) == []
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert type(pipeline).from_pretrained(tmp_path / "pipeline") is not None


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_samples_are_in_float32_whatever_the_autoencoder_is_in(half):
    policy = make_policy(tiny_stable_diffusion())
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    whole = policy.decode(latents)
    with torch.autocast("cpu", half):
        assert policy.decode(latents).dtype == torch.float32
    policy.pipeline.vae.to(half)
    samples = policy.decode(latents)
    assert samples.dtype == torch.float32
    assert (samples - whole).abs().max() < 0.1


def test_prompts_must_be_given(tmp_path):
    with pytest.raises(
        InputError, match="StableDiffusionPipeline has no classes; give its prompts as train_conditions"
    ):
        DiffusionPPOTrainer(tiny_stable_diffusion(), Brightness(), DiffusionPPOConfig(output_dir=str(tmp_path)))


@pytest.mark.slow
def test_an_analytic_reward_rises(tmp_path):
    args = DiffusionPPOConfig(
        output_dir=str(tmp_path), max_steps=40, rollout_batch_size=32, num_rollout_batches=1, train_batch_size=32,
        num_inference_steps=4, learning_rate=1e-2, report_to="none", clip_shift=0.5, num_updates=1, kl_coef=0.0,
    )  # fmt: skip
    trainer = DiffusionPPOTrainer(tiny_stable_diffusion(), Brightness(), args, train_conditions=PROMPTS[:2])
    assert trainer.train()["reward/mean"] > 1
