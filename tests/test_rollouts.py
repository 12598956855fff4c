import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from tiny import tiny_pipeline

from msrl_diffusers.errors import InputError
from msrl_diffusers.functional.denoising import gaussian_log_prob
from msrl_diffusers.policies import make_policy
from msrl_diffusers.rollouts import Rollout, StepTable, condition_numbers, sample_rollout, step_moments
from msrl_diffusers.seeding import sample_generators


STEPS = 5
LABELS = [0, 1, 1]


def roll(policy, indices, guidance_scale=1.0, min_std=1e-6):
    table = StepTable.of(policy.scheduler, STEPS, 1.0, min_std)
    labels = [LABELS[i] for i in indices]
    return table, sample_rollout(policy, labels, table, sample_generators(0, "test", indices), guidance_scale)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_rollout_is_what_the_pipeline_samples(guidance_scale):
    pipeline = tiny_pipeline()
    table, rollout = roll(make_policy(pipeline), [0, 1, 2], guidance_scale)
    assert table.stochastic == tuple(range(STEPS))
    generators = sample_generators(0, "test", [0, 1, 2])
    expected = pipeline(LABELS, STEPS, guidance_scale, eta=1.0, generator=generators, output_type="latent").volumes
    torch.testing.assert_close(rollout.latents[:, -1], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rollout.samples, pipeline.decode_latents(rollout.latents[:, -1]))
    assert rollout.samples.std() > 0
    assert rollout.log_probs.shape == (3, STEPS)


def test_with_guidance_in_rollouts_alone_all_that_is_rated_is_rated_without():
    """The actions are those of the guided policy; their log-probabilities, and the means around which these are taken, are those
    of the policy that is trained."""
    policy, generators = make_policy(tiny_pipeline()), sample_generators(0, "test", [0, 1, 2])
    table, guided = roll(policy, [0, 1, 2], guidance_scale=3.0)
    found = sample_rollout(policy, LABELS, table, generators, 3.0, log_prob_guidance=1.0, keep_means=True)
    assert torch.equal(found.latents, guided.latents)
    assert not torch.allclose(found.log_probs, guided.log_probs)
    for step in table.stochastic:
        mean, std = step_moments(policy, table, step, found.latents[:, step], found.conditioning, 1.0)
        torch.testing.assert_close(found.means[:, step], mean)
        torch.testing.assert_close(found.log_probs[:, step], gaussian_log_prob(found.latents[:, step + 1], mean, std))


def test_a_sample_does_not_depend_on_its_batch():
    policy = make_policy(tiny_pipeline())
    _, together = roll(policy, [0, 1, 2])
    _, alone = roll(policy, [2])
    torch.testing.assert_close(together.latents[2:], alone.latents, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together.latents[1], together.latents[2])


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_recomputed_ratios_are_one(guidance_scale):
    policy = make_policy(tiny_pipeline())
    table, rollout = roll(policy, [0, 1, 2], guidance_scale)
    for batch in (rollout, rollout.select(torch.tensor([2, 0]))):
        for step in table.stochastic:
            mean, std = step_moments(policy, table, step, batch.latents[:, step], batch.conditioning, guidance_scale)
            ratio = torch.exp(gaussian_log_prob(batch.latents[:, step + 1], mean, std) - batch.log_probs[:, step])
            torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)


def test_steps_without_noise_are_no_actions():
    policy = make_policy(tiny_pipeline())
    stds = StepTable.of(policy.scheduler, 10, 1.0, 0.0)
    assert stds.stochastic == tuple(range(10))
    table, rollout = roll(policy, [0, 1], min_std=0.5)
    quiet = [step for step in range(STEPS) if step not in table.stochastic]
    assert quiet
    assert table.stochastic
    assert (rollout.log_probs[:, quiet] == 0).all()
    assert (rollout.log_probs[:, list(table.stochastic)] != 0).all()
    without_noise = StepTable.of(policy.scheduler, STEPS, 0.0, 0.0)
    assert without_noise.stochastic == ()
    for step in quiet:  # deterministic steps of DDIM
        mean, _ = step_moments(policy, without_noise, step, rollout.latents[:, step], rollout.conditioning, 1.0)
        torch.testing.assert_close(rollout.latents[:, step + 1], mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_a_scheduler_that_clips_latents_is_refused(option):
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **{option: True})
    with pytest.raises(InputError, match=rf"has {option}, which clips latents .* set pipe.scheduler = DDIMScheduler"):
        make_policy(pipeline)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)  # which has no such option
    assert not make_policy(pipeline).scheduler.config[option]


def test_rounding_adds_no_step_below_zero():
    table = StepTable.of(tiny_pipeline().scheduler, 61, 1.0, 0.0)
    assert len(table) == 61
    assert (table.timesteps >= 0).all()
    assert (table.alpha_prods.diff() > 0).all()


@pytest.mark.parametrize(
    "scheduler_class", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler]
)
def test_steps_are_those_of_ddim_whatever_sampler_the_pipeline_has(scheduler_class):
    _, expected = roll(make_policy(tiny_pipeline()), [0, 1, 2])
    pipeline = tiny_pipeline()
    pipeline.scheduler = sampler = scheduler_class.from_config(pipeline.scheduler.config)
    policy = make_policy(pipeline)
    _, rollout = roll(policy, [0, 1, 2])
    assert torch.equal(rollout.latents, expected.latents)
    assert pipeline.scheduler is policy.sampler is sampler
    assert not policy.scheduler.config.clip_sample


def test_a_scheduler_for_other_noise_is_refused():
    pipeline = tiny_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler has none"):
        roll(make_policy(pipeline), [0])


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_every_sample_may_have_a_timestep_of_its_own(guidance_scale):
    policy = make_policy(tiny_pipeline())
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning = policy.encode([0, 1])
    with torch.no_grad():
        apart = [policy.predict(latents, torch.tensor(t), conditioning, guidance_scale) for t in (900, 100)]
        together = policy.predict(latents, torch.tensor([900, 100]), conditioning, guidance_scale)
    torch.testing.assert_close(together, torch.stack([apart[0][0], apart[1][1]]), atol=1e-5, rtol=1e-5)


def test_a_scheduler_without_ddim_steps_is_refused():
    scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler has none"):
        StepTable.of(scheduler, STEPS, 1.0, 0.01)


def test_select_and_cat_undo_each_other():
    _, rollout = roll(make_policy(tiny_pipeline()), [0, 1, 2])
    joined = Rollout.cat([rollout.select(slice(0, 1)), rollout.select(torch.tensor([1, 2]))])
    assert len(joined) == 3
    for name in ("latents", "log_probs", "conditions", "samples"):
        assert torch.equal(getattr(joined, name), getattr(rollout, name))
    assert torch.equal(joined.conditioning.positive["class_labels"], torch.tensor(LABELS))
    assert torch.equal(joined.conditioning.negative["class_labels"], torch.tensor([2, 2, 2]))
    rated = rollout.with_advantages(torch.tensor([1.0, 2.0, 3.0])).select(torch.tensor([2, 0]))
    assert rated.advantages.tolist() == [3.0, 1.0]
    assert rated.conditioning.positive["class_labels"].tolist() == [1, 0]


def test_condition_numbers():
    assert condition_numbers([3, 0, 3]) == [3, 0, 3]
    assert condition_numbers(torch.tensor([1, 0])) == [1, 0]
    assert condition_numbers(["b", "a", "b"]) == [1, 0, 1]


def test_conditions_given_by_name_stay_apart_over_batches():
    policy = make_policy(tiny_pipeline())
    table = StepTable.of(policy.scheduler, 2, 1.0, 0.01)
    parts = [
        sample_rollout(policy, [name], table, sample_generators(0, "test", [index]), vocabulary=["HGG", "LGG"])
        for index, name in enumerate(["HGG", "LGG"])
    ]
    assert len(set(Rollout.cat(parts).conditions.tolist())) == 2


def predict(policy):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, *policy.latent_shape, generator=generator)
    with torch.no_grad():
        return policy.predict(latents, torch.tensor(500), policy.encode([0, 1]), 1.0)


def perturb(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))


def test_reference_is_the_model_before_full_fine_tuning():
    policy = make_policy(tiny_pipeline())
    before = predict(policy)
    perturb(policy.denoiser.parameters())
    after = predict(policy)
    assert not torch.allclose(before, after, atol=1e-2)
    with policy.reference():
        torch.testing.assert_close(predict(policy), before)
    torch.testing.assert_close(predict(policy), after)


def test_reference_is_the_model_without_its_adapter():
    pipeline = tiny_pipeline()
    before = predict(make_policy(pipeline))
    pipeline.unet.requires_grad_(False)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv1"]))
    policy = make_policy(pipeline)
    adapter = [parameter for name, parameter in pipeline.unet.named_parameters() if "lora" in name]
    perturb(adapter)
    after = predict(policy)
    assert not torch.allclose(before, after, atol=1e-3)
    with policy.reference():
        torch.testing.assert_close(predict(policy), before)
    torch.testing.assert_close(predict(policy), after)
    assert all(parameter.requires_grad for parameter in adapter)
