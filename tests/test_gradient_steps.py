"""Denoising steps with gradients: a replay is the sampler with its noise fixed; divergences against closed forms."""

import pytest
import torch
from tiny import tiny_pipeline

from msrl_diffusers.policies import make_policy
from msrl_diffusers.rollouts import StepTable, sample_rollout
from msrl_diffusers.seeding import sample_generators
from msrl_diffusers.trainers.gradient_steps import GradientSteps, Visit


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_replay_has_the_gradient_of_the_sampler_with_its_noise_fixed(eta):
    pipeline = tiny_pipeline()
    policy, table = make_policy(pipeline), StepTable.of(pipeline.scheduler, 3, eta, 1e-6)

    def sampled():
        return sample_rollout(policy, [0, 1], table, sample_generators(0, "replay", [0, 1]))

    rollout, weight = sampled(), pipeline.unet.conv_out.weight

    def replayed(num_steps):
        return GradientSteps(policy, table, 1.0, range(3 - num_steps, 3)).replay(rollout)[0]

    for num_steps in (1, 3):
        assert torch.equal(replayed(num_steps), rollout.latents[:, -1])
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    probe = torch.randn(rollout.latents[:, -1].shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((replayed(3) * probe).sum(), weight)
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * 1e-3 * direction)
            moved.append((sampled().latents[:, -1] * probe).sum().item())
            weight.sub_(sign * 1e-3 * direction)
    slope = (moved[0] - moved[1]) / 2e-3
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=2e-2)
    (last_step,) = torch.autograd.grad((replayed(1) * probe).sum(), weight)
    assert not torch.allclose(last_step, gradient, rtol=1e-2)


def test_the_divergence_in_both_forms():
    pipeline = tiny_pipeline()
    policy = make_policy(pipeline)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.add_(0.1)  # every prediction moves by that
    conditioning = policy.encode([0, 1])
    state = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    for eta, form in ((1.0, "gaussian"), (0.0, "prediction")):
        table = StepTable.of(policy.scheduler, 4, eta, 0.01)
        steps = GradientSteps(policy, table, 1.0, [2, 3])
        visit = steps.visit(2, state, conditioning)
        assert steps.kl_form == form
        found = steps.divergence([visit], conditioning, 2)
        assert found.shape == (2,)
        std = steps.moments(visit).std
        shifted = [
            steps.moments(Visit(2, state, torch.full_like(state, value))).mean.flatten()[0] for value in (0, 0.1)
        ]
        moved = (shifted[1] - shifted[0]) ** 2 / (2 * std**2) if form == "gaussian" else torch.tensor(0.01)
        assert found.tolist() == pytest.approx([moved.item()] * 2, rel=1e-3)
        (gradient,) = torch.autograd.grad(found.mean(), pipeline.unet.conv_out.bias)
        assert gradient.sum().item() == pytest.approx(2 * moved.item() / 0.1, rel=1e-3)
