"""The losses of reinforcement learning on the forward process, against numbers worked out by hand."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from msrl_diffusers.functional.denoising import predict_clean
from msrl_diffusers.functional.forward_process import (
    add_noise,
    awm_loss,
    matching_log_prob,
    matching_target,
    nft_loss,
    old_policy_decay,
    optimality,
    prediction_divergence,
)


TYPES = ("epsilon", "v_prediction", "sample")
ALPHA = torch.tensor([0.36, 0.64, 0.04], dtype=torch.float64).view(3, 1, 1)  # signals 0.6, 0.8, 0.2


def draws(count, shape=(3, 2, 5)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("prediction_type", TYPES)
def test_noise_and_target_are_those_of_a_scheduler(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    clean, noise = draws(2)
    timesteps = torch.tensor([0, 400, 999])
    alpha_prod = scheduler.alphas_cumprod[timesteps].double().view(3, 1, 1)
    latents = add_noise(clean, noise, alpha_prod)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, scheduler.add_noise(clean, noise, timesteps))
    target = matching_target(clean, noise, alpha_prod, prediction_type)
    if prediction_type == "v_prediction":
        torch.testing.assert_close(target.float(), scheduler.get_velocity(clean, noise, timesteps))
    # a denoiser that hits the target implies the clean sample
    implied, _ = predict_clean(target.double(), latents.double(), alpha_prod, prediction_type)
    torch.testing.assert_close(implied.float(), clean, atol=1e-4, rtol=1e-4)


def test_an_unknown_type_or_weighting_is_refused():
    clean, noise = draws(2)
    with pytest.raises(ValueError, match="Unknown prediction_type 'score'"):
        matching_target(clean, noise, ALPHA, "score")
    with pytest.raises(ValueError, match="Unknown prediction_type 'score'"):
        nft_loss(clean, clean, clean, clean, ALPHA, torch.zeros(3), "score", 1.0, 5.0)
    with pytest.raises(ValueError, match="Unknown weighting 'cosine'"):
        matching_log_prob(clean, noise, ALPHA, "cosine")


def test_optimality_is_half_for_the_average_and_saturates():
    advantages = torch.tensor([-9.0, -5.0, -2.5, 0.0, 2.5, 5.0, 9.0])
    assert optimality(advantages, 5.0).tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]


# ---------------------------------------------------------------------------------------------------------------- nft


def one_sample(model, old, clean=0.0):
    """Outputs of one element that are the clean sample itself."""
    return [torch.tensor([[[value]]]) for value in (model, old)] + [torch.zeros(1, 1, 1), torch.tensor([[[clean]]])]


def test_the_loss_by_hand():
    # beta 0.5: positive (3 + 1) / 2 = 2, negative 1.5 * 1 - 0.5 * 3 = 0; clean 0.5: errors 1.5 and -0.5, normalized
    model, old, latents, clean = one_sample(3.0, 1.0, clean=0.5)
    model.requires_grad_()
    loss, stats = nft_loss(model, old, latents, clean, ALPHA[:1], torch.tensor([2.5]), "sample", 0.5, 5.0)
    assert loss.item() == pytest.approx(5 / 0.5 * (0.75 * 1.5 + 0.25 * 0.5))
    assert stats["positive_error"].item() == pytest.approx(1.5)
    assert stats["negative_error"].item() == pytest.approx(0.5)
    assert stats["deviation"].item() == pytest.approx(2)
    loss.backward()
    # d |e|^2 / |e| with the divisor held: 2 sign(e), times beta and -beta
    assert model.grad.item() == pytest.approx(10 * (0.75 * 2 * 0.5 + 0.25 * 2 * 0.5))


@pytest.mark.parametrize(("advantage", "beta"), [(5.0, 0.5), (-5.0, 0.5), (2.0, 1.0), (-2.0, 0.1), (0.0, 1.0)])
def test_at_the_old_policy_the_gradient_is_the_signed_one(advantage, beta):
    model, old, latents, clean = one_sample(3.0, 3.0, clean=0.5)
    model.requires_grad_()
    loss, _ = nft_loss(model, old, latents, clean, ALPHA[:1], torch.tensor([advantage]), "sample", beta, 5.0)
    loss.backward()
    assert model.grad.item() == pytest.approx(advantage * 2, abs=1e-6)  # of advantage * e^2 / sg|e|


@pytest.mark.parametrize("advantage", [5.0, -5.0])
def test_the_optimum_lies_on_the_right_side_of_the_old_policy(advantage):
    """Theorem 3.2 for one sample: the best output is a good sample, or the mirror image of a bad one."""
    _, old, latents, clean = one_sample(0.0, 1.0, clean=3.0)
    model = torch.tensor([[[1.0]]], requires_grad=True)
    optimizer = torch.optim.SGD([model], lr=0.02)
    for _ in range(200):
        loss, _ = nft_loss(model, old, latents, clean, ALPHA[:1], torch.tensor([advantage]), "sample", 1.0, 5.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.item() == pytest.approx(3.0 if advantage > 0 else -1.0, abs=0.3)


def outputs_of(predicted, latents, alpha_prod, prediction_type):
    """The output that implies the clean sample `predicted`."""
    noise = (latents - alpha_prod.sqrt() * predicted) / (1 - alpha_prod).sqrt()
    return matching_target(predicted, noise, alpha_prod, prediction_type)


def test_the_loss_is_the_same_in_every_prediction_type():
    clean, noise, trained, old = (value.double() for value in draws(4))
    advantages = torch.tensor([1.0, -3.0, 0.5])
    latents = add_noise(clean, noise, ALPHA)
    losses = []
    for prediction_type in TYPES:
        model, other = (outputs_of(value, latents, ALPHA, prediction_type) for value in (trained, old))
        losses.append(nft_loss(model, other, latents, clean, ALPHA, advantages, prediction_type, 0.3, 5.0)[0].item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_each_sample_is_normalized_by_its_own_error():
    """A sample whose error is ten times as large weighs ten times, not a hundred times."""
    clean, _, trained = draws(3)
    losses = []
    for factor in (1.0, 10.0):
        model = clean + factor * (trained - clean)
        losses.append(nft_loss(model, model, clean, clean, ALPHA, torch.full((3,), 5.0), "sample", 1.0, 5.0)[0].item())
    assert losses[1] == pytest.approx(10 * losses[0], rel=1e-5)


def test_the_old_policy_and_the_divisor_have_no_gradient():
    model, old = (value.requires_grad_() for value in draws(2))
    (clean,) = draws(1)
    loss, _ = nft_loss(model, old, clean, clean * 0.5, ALPHA, torch.tensor([1.0, 0.0, -1.0]), "v_prediction", 0.5, 5.0)
    loss.backward()
    assert old.grad is None
    assert torch.isfinite(model.grad).all()


def test_a_perfect_prediction_has_a_finite_gradient():
    (clean,) = draws(1)
    model = clean.clone().requires_grad_()
    loss, _ = nft_loss(model, clean, clean, clean, ALPHA, torch.ones(3), "sample", 1.0, 5.0)
    loss.backward()
    assert loss.item() == 0
    assert not model.grad.any()


# ---------------------------------------------------------------------------------------------------------------- awm


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("uniform", -4.0),
        ("noise", -0.8 * 4),
        ("noise_squared", -0.64 * 4),
        ("huber", -0.8 * 4 * (4**0.25 - 1e-10**0.25)),
    ],
)
def test_the_log_prob_by_hand(weighting, expected):
    """A mean squared difference of 4 at a noise level of 0.8."""
    output = torch.tensor([[[1.0, 3.0]]], requires_grad=True)
    log_prob = matching_log_prob(output, torch.tensor([[[3.0, 1.0]]]), ALPHA[:1], weighting)
    assert log_prob.dtype == torch.float64
    assert log_prob.item() == pytest.approx(expected, rel=1e-6)
    log_prob.sum().backward()
    slope = {"uniform": 1, "noise": 0.8, "noise_squared": 0.64, "huber": 0.8 * 4**-0.75}[weighting]
    torch.testing.assert_close(output.grad, slope * torch.tensor([[[2.0, -2.0]]]), rtol=1e-5, atol=1e-6)


def test_a_signed_weight_draws_near_and_pushes_away():
    log_prob = torch.tensor([-1.0, -2.0, -4.0, -8.0], dtype=torch.float64, requires_grad=True)
    loss, stats = awm_loss(log_prob, torch.tensor([5.0, -2.5, 0.0, 50.0]), 5.0)
    assert loss.item() == pytest.approx(-(-1.0 + 0.5 * 2 - 8) / 4)
    assert stats["log_prob"].item() == pytest.approx(-15 / 4)
    loss.backward()
    assert log_prob.grad.tolist() == pytest.approx([-0.25, 0.125, 0, -0.25])


def test_awm_and_nft_agree_in_direction_at_the_old_policy():
    """Both are advantage-weighted regressions to the sample there; they differ in the weight of a noise level."""
    clean, noise, model = draws(3)
    latents = add_noise(clean, noise, ALPHA)
    advantages, gradients = torch.tensor([2.0, -1.0, 0.5]), []
    for objective in ("nft", "awm"):
        output = model.clone().requires_grad_()
        if objective == "nft":
            loss, _ = nft_loss(output, model, latents, clean, ALPHA, advantages, "v_prediction", 0.5, 5.0)
        else:
            target = matching_target(clean, noise, ALPHA, "v_prediction")
            loss, _ = awm_loss(matching_log_prob(output, target, ALPHA, "huber"), advantages, 5.0)
        loss.backward()
        gradients.append(output.grad.flatten(1))
    cosines = torch.nn.functional.cosine_similarity(*gradients)
    torch.testing.assert_close(cosines, torch.ones(3), atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------------------- leash


def test_the_divergence_is_a_mean_over_elements():
    one = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    other = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert prediction_divergence(one, other).tolist() == [2.0, 12.5]


def test_the_schedule_of_the_old_policy():
    assert [old_policy_decay(step, 0, 0.25, 0.6) for step in range(5)] == [0, 0.25, 0.5, 0.6, 0.6]
    assert [old_policy_decay(step, 75, 0.0075, 0.999) for step in (0, 75, 76, 1000)] == [0, 0, 0.0075, 0.999]
    assert not math.isnan(old_policy_decay(0, 0, 0.0, 0.0))
