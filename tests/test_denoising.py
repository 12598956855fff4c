"""The reverse step as a Gaussian, against torch.distributions and diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch.distributions import Normal, kl_divergence

from msrl_diffusers.functional.denoising import (
    ddim_moments,
    gaussian_kl,
    gaussian_log_prob,
    predict_clean,
    reduce_elements,
)
from msrl_diffusers.rollouts import StepTable
from msrl_diffusers.study.stages import SCHEDULER_DEFAULTS


def draws(count, shape=(3, 4, 2, 2, 2)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob_is_that_of_a_normal(reduction):
    sample, mean = draws(2)
    expected = getattr(Normal(mean, 0.3).log_prob(sample).flatten(1), reduction)(dim=1)
    torch.testing.assert_close(gaussian_log_prob(sample, mean, torch.tensor(0.3), reduction), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_is_that_of_two_normals(reduction):
    mean, other = draws(2)
    divergence = kl_divergence(Normal(mean, 0.3), Normal(other, 0.3))
    expected = getattr(divergence.flatten(1), reduction)(dim=1)
    torch.testing.assert_close(gaussian_kl(mean, other, torch.tensor(0.3), reduction), expected)


def test_std_may_differ_between_samples():
    sample, mean, other = draws(3)
    std = torch.tensor([0.1, 0.5, 2.0]).reshape(3, 1, 1, 1, 1)
    expected = Normal(mean, std).log_prob(sample).flatten(1).mean(dim=1)
    torch.testing.assert_close(gaussian_log_prob(sample, mean, std), expected)
    expected = kl_divergence(Normal(mean, std), Normal(other, std)).flatten(1).mean(dim=1)
    torch.testing.assert_close(gaussian_kl(mean, other, std), expected)


def test_unknown_reduction_and_prediction_type_raise():
    with pytest.raises(ValueError, match="log_prob_reduction must be"):
        reduce_elements(torch.ones(2, 3), "median")
    with pytest.raises(ValueError, match="Unknown prediction_type 'flow'"):
        predict_clean(torch.ones(1), torch.ones(1), torch.tensor(0.5), "flow")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predict_clean_inverts_the_forward_process(prediction_type):
    clean, noise = draws(2)
    alpha = torch.tensor(0.6)
    latents = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    output = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[prediction_type]
    for value, expected in zip(predict_clean(output, latents, alpha, prediction_type), (clean, noise), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("num_steps", [7, 10])
def test_ddim_moments_agree_with_diffusers(prediction_type, eta, spacing, num_steps):
    scheduler = DDIMScheduler(
        **{**SCHEDULER_DEFAULTS, "prediction_type": prediction_type, "timestep_spacing": spacing}
    )
    table = StepTable.of(scheduler, num_inference_steps=num_steps, eta=eta, min_std=0.0)
    assert len(table) == num_steps
    output, latents, noise = draws(3)
    for step in range(num_steps):
        alphas = table.alpha_prods[step], table.alpha_prods_prev[step]
        mean, std = ddim_moments(output, latents, *alphas, eta, prediction_type)
        expected = scheduler.step(
            output, scheduler.timesteps[step], latents, eta=eta, variance_noise=noise if eta else None
        ).prev_sample
        torch.testing.assert_close(mean + std * noise, expected, rtol=1e-4, atol=1e-4)
        assert (std == 0) == (eta == 0 or (spacing == "leading" and step == num_steps - 1))


def test_every_step_of_our_scheduler_is_an_action():
    table = StepTable.of(DDIMScheduler(**SCHEDULER_DEFAULTS), num_inference_steps=10, eta=1.0, min_std=1e-3)
    assert table.stochastic == tuple(range(10))


def test_steps_without_noise_are_no_actions():
    scheduler = DDIMScheduler(**{**SCHEDULER_DEFAULTS, "set_alpha_to_one": True})
    table = StepTable.of(scheduler, num_inference_steps=10, eta=1.0, min_std=1e-3)
    assert table.alpha_prods_prev[-1] == 1
    assert table.stochastic == tuple(range(9))
    assert StepTable.of(scheduler, num_inference_steps=10, eta=0.0, min_std=1e-3).stochastic == ()
    # A higher floor leaves out more of the last steps.
    assert len(StepTable.of(scheduler, num_inference_steps=10, eta=1.0, min_std=0.5).stochastic) < 9


def test_a_scheduler_without_ddim_transition_raises():
    scheduler = DPMSolverMultistepScheduler.from_config(SCHEDULER_DEFAULTS)
    with pytest.raises(ValueError, match=r"DPMSolverMultistepScheduler has none\. Use DDIMScheduler.from_config"):
        StepTable.of(scheduler, num_inference_steps=10, eta=1.0, min_std=1e-3)


def test_the_default_scheduler_of_stable_diffusion_raises():
    with pytest.raises(ValueError, match="PNDMScheduler"):
        StepTable.of(PNDMScheduler(), num_inference_steps=10, eta=1.0, min_std=1e-3)
