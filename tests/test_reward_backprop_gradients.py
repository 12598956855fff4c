"""Gradients of rewards through the decoder and the last denoising steps: formulas, plain autograd, and what must not change them."""

import pytest
import torch
from backprop_run import Contrast, slice_reward, train
from tiny import Brightness, copied, differing, tiny_pipeline, tiny_vqvae

from msrl_diffusers.functional.backprop import (
    clip_per_sample,
    late_steps,
    random_slices,
    reparametrized,
    surrogate_loss,
)
from msrl_diffusers.functional.denoising import predict_clean
from msrl_diffusers.policies import make_policy
from msrl_diffusers.rewards import WeightedSum
from msrl_diffusers.rollouts import StepTable, sample_rollout, step_moments
from msrl_diffusers.seeding import generator_for, sample_generators


# ------------------------------------------------------------------------------------------------------------- formulas


def test_late_steps_are_the_last_ones():
    assert late_steps(40, 0.25) == range(30, 40)
    assert late_steps(4, 0.01) == range(3, 4)
    assert late_steps(4, 1.0) == range(4)


def test_a_recorded_state_has_the_gradient_of_its_mean():
    mean = torch.tensor([1.0, -2.0], requires_grad=True)
    state = reparametrized(mean, torch.tensor([1.5, -1.0]))
    assert state.tolist() == [1.5, -1.0]
    (3 * state[0] - state[1]).backward()
    assert mean.grad.tolist() == [3.0, -1.0]


def test_gradients_are_clipped_sample_by_sample():
    gradients = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    clipped, norms = clip_per_sample(gradients, 1.0)
    torch.testing.assert_close(norms, torch.tensor([5.0, 0.5, 0.0]))
    torch.testing.assert_close(clipped, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    assert torch.equal(clip_per_sample(gradients, None)[0], gradients)


def test_the_surrogate_has_the_gradient_of_minus_the_mean_reward():
    weight = torch.tensor(2.0, requires_grad=True)
    inputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    latents = weight * inputs  # the reward is the sum of squares: its gradient by the latents is twice them
    surrogate_loss(latents, 2 * latents).backward()
    # mean over two samples of sum(w^2 x^2) = 15 w^2, whose derivative is 30 w
    assert weight.grad.item() == pytest.approx(-60)


def test_random_slices():
    volumes = torch.arange(2 * 5.0).view(2, 1, 5, 1, 1).expand(2, 3, 5, 2, 2)
    counting = torch.tensor([[True, True, False, True, False], [False] * 4 + [True]])
    keys = torch.tensor([[0.9, 0.1, 0.0, 0.5, 0.2], [0.4, 0.3, 0.2, 0.1, 0.9]])
    chosen = random_slices(volumes, counting, keys, 2)
    assert chosen.shape == (2, 3, 2, 2, 2)
    assert chosen[0, 0, :, 0, 0].tolist() == [1, 3]  # the smallest keys of those that count, in their order
    assert chosen[1, 0, :, 0, 0].tolist() == [8, 9]  # one counts; the other is the smallest key of the rest
    assert torch.equal(random_slices(volumes, counting, keys, 9), volumes)
    generator = torch.Generator().manual_seed(0)
    many = random_slices(volumes[:1].expand(6000, -1, -1, -1, -1), counting[:1].expand(6000, -1),
                         torch.rand(6000, 5, generator=generator), 2)  # fmt: skip
    assert many.mean().item() == pytest.approx((0 + 1 + 3) / 3, abs=0.03)


# --------------------------------------------------------------------------------------------- gradients, by plain autograd


def clean_ending(policy, table, rollout, settings):
    """What is scored, `[N, B, C, *S]`, in the plainest way: the graph is kept through sampling itself."""
    conditioning, last = rollout.conditioning, len(table) - 1

    def denoise(step, state):
        return step_moments(policy, table, step, state, conditioning, settings.get("guidance_scale", 1.0))

    if settings["variant"] == "refl":
        late = late_steps(4, settings["late_fraction"])
        step = late[torch.randint(len(late), (1,), generator=generator_for(0, "late step", 0)).item()]
        state = rollout.latents[:, step]
        output = policy.predict(state, table.timesteps[step], conditioning, 1.0)
        return predict_clean(output, state, table.alpha_prods[step], "v_prediction")[0][None]
    first = len(table) - settings.get("gradient_steps", 1)
    state = rollout.latents[:, first]
    for step in range(first, len(table)):
        mean, std = denoise(step, state)
        # the noise that the rollout drew at this step
        drawn = (rollout.latents[:, step + 1] - step_moments(policy, table, step, rollout.latents[:, step], conditioning,
                 settings.get("guidance_scale", 1.0)).mean).detach() / std  # fmt: skip
        state = mean + std * drawn
    if settings["variant"] == "draft":
        return state[None]
    generators, ends, alpha_prod = sample_generators(0, "last step 0", range(8)), [state], table.alpha_prods[last]
    for _ in range(settings["num_noise_draws"]):
        noise = torch.stack([torch.randn(policy.latent_shape, generator=generator) for generator in generators])
        ends.append(denoise(last, alpha_prod.sqrt() * rollout.latents[:, -1] + (1 - alpha_prod).sqrt() * noise).mean)
    return torch.stack(ends)


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "draft", "gradient_steps": 3, "reward_batch_size": 3},
        {"variant": "draft", "gradient_steps": 1, "guidance_scale": 2.0, "reward_loss_coef": 0.5},
        {"variant": "draft_lv", "num_noise_draws": 2},
        {"variant": "refl", "late_fraction": 0.75},
        {"variant": "draft", "decode": "pre_quantization", "decoder_checkpointing": True},
    ],
    ids=["draft-3", "draft-1-guided", "draft_lv", "refl", "unquantized"],
)
def test_the_gradient_is_that_of_the_rewards(settings, tmp_path):
    rewards = [Brightness(), Contrast()]
    _, trainer, log, _ = train(tmp_path, reward_funcs=rewards, max_steps=1, **settings)

    pipeline = tiny_pipeline()
    pipeline.unet.eval()
    policy, table = make_policy(pipeline), StepTable.of(pipeline.scheduler, 4, 1.0, 0.01)
    generators = sample_generators(0, "rollout 0", range(8))
    rollout = sample_rollout(policy, [0, 1] * 4, table, generators, settings.get("guidance_scale", 1.0))
    joined = WeightedSum(rewards)
    joined.fit(joined.parts(rollout.samples, rollout.conditions))
    latents = clean_ending(policy, table, rollout, settings).flatten(0, 1)
    unquantized = settings.get("decode") == "pre_quantization"
    samples = pipeline.decode_latents(latents, force_not_quantize=True) if unquantized else policy.decode(latents)
    reward = joined(samples, None).mean()
    (-settings.get("reward_loss_coef", 1.0) * reward).backward()
    assert log[0]["draft/trained_reward"] == pytest.approx(reward.item(), abs=1e-4)
    (found,) = trainer.gradients
    for name, parameter in pipeline.unet.named_parameters():
        atol = 1e-6 + 1e-3 * parameter.grad.abs().max().item()
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=atol, msg=name)
    assert max(gradient.abs().max().item() for gradient in found.values()) > 1e-3


def test_gradients_pass_a_codebook_and_leave_it_as_it_is(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.vqvae = tiny_vqvae("vq").train()
    before = copied(pipeline.vqvae)
    _, trainer, _, _ = train(tmp_path, pipeline, max_steps=1, decoder_checkpointing=True)
    assert max(gradient.abs().max().item() for gradient in trainer.gradients[0].values()) > 1e-4
    assert differing(before, copied(pipeline.vqvae)) == []
    assert all(parameter.requires_grad for parameter in pipeline.vqvae.parameters())
    assert not any("forward" in vars(layer) for layer in pipeline.vqvae.decoder.layers)


def test_the_reward_gradient_is_clipped(tmp_path):
    _, free, free_log, _ = train(tmp_path / "free", max_steps=1)
    _, clipped, log, _ = train(tmp_path / "clipped", max_steps=1, reward_grad_clip=1e-4)
    assert free_log[0]["draft/reward_grad_norm"] == log[0]["draft/reward_grad_norm"] > 0.1  # logged before clipping
    lengths = [sum(value.square().sum() for value in one.gradients[0].values()).sqrt() for one in (clipped, free)]
    assert 0 < lengths[0] < 0.01 * lengths[1]


def test_all_slices_as_a_subset_give_the_gradient_of_all(tmp_path):
    rewards = lambda: [slice_reward(), Brightness()]  # noqa: E731
    whole, subset, few = (
        train(tmp_path / str(count), reward_funcs=rewards(), max_steps=1, num_slices=count)[1].gradients[0]
        for count in (None, 16, 3)
    )
    for name, value in whole.items():
        torch.testing.assert_close(subset[name], value, rtol=1e-4, atol=1e-6 + 1e-4 * value.abs().max().item())
    apart = sum((few[name] - value).abs().sum().item() for name, value in whole.items())
    assert apart > 1e-3 * sum(value.abs().sum().item() for value in whole.values())


@pytest.fixture(scope="module")
def plain_gradients(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"), gradient_steps=2, max_steps=1)[1].gradients[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"offload_rollouts": True},
        {"async_rewards": True},
        {"reward_batch_size": 3},
        {"gradient_checkpointing": True},
        {"decoder_checkpointing": True},
        {"train_batch_size": 8},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_must_not_change_the_gradient(settings, plain_gradients, tmp_path):
    other = train(tmp_path, gradient_steps=2, max_steps=1, **settings)[1].gradients[0]
    for name, value in plain_gradients.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-7 + 1e-3 * value.abs().max().item())
