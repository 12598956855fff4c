"""The loss of discriminative self-play, against numbers worked out by hand and against the optimum it promises."""

import math

import pytest
import torch

from msrl_diffusers.functional.discriminative import ddo_loss, likelihood_gain


def test_the_gain_is_a_difference_of_squared_errors():
    target = torch.zeros(2, 1, 2)
    output = torch.tensor([[[1.0, 1.0]], [[0.0, 3.0]]], requires_grad=True)
    reference = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]], requires_grad=True)
    gain, error = likelihood_gain(output, reference, target)
    assert gain.tolist() == [4 - 2, 1 - 9]
    assert error.tolist() == [1.0, 4.5]
    gain.sum().backward()
    assert torch.equal(output.grad, -2 * output.detach())
    assert reference.grad is None


def test_the_loss_and_its_figures():
    real, own = torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    loss, stats = ddo_loss(real, own, beta=0.5, alpha=3.0)
    sigmoid = lambda value: 1 / (1 + math.exp(-value))  # noqa: E731
    expected = -(math.log(sigmoid(1.0)) + math.log(0.5)) / 2 - 3 * (math.log(1 - sigmoid(0.5)) + math.log(0.5)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert {name: value.item() for name, value in stats.items()} == {
        "real_logit": 0.5, "own_logit": 0.25, "accuracy": 0.75,  # of two equal logits neither is higher
    }  # fmt: skip


def test_the_gradient_where_the_models_are_equal():
    real, own = torch.zeros(4, dtype=torch.float64, requires_grad=True), torch.zeros(4, requires_grad=True)
    ddo_loss(real, own, beta=0.2, alpha=3.0)[0].backward()
    # of gains; those of errors have the other sign
    assert real.grad.tolist() == pytest.approx([-0.2 / 2 / 4] * 4)
    assert own.grad.tolist() == pytest.approx([3 * 0.2 / 2 / 4] * 4)


def test_large_logits_are_finite():
    loss, _ = ddo_loss(torch.tensor([-1e6]).double(), torch.tensor([1e6]).double(), beta=1.0, alpha=1.0)
    assert loss.item() == pytest.approx(2e6)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_minimum_is_the_distribution_of_the_real_ones(beta):
    """A categorical model, whose likelihoods are known: the optimum is reference * (real / reference)^(1 / beta), before it is
    normalized; the real distribution itself for beta 1."""
    real = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    gains = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([gains], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        """The expectation of the loss over both distributions; a class at a time, as gains of a class are equal."""
        optimizer.zero_grad()
        zero = torch.zeros(1, dtype=torch.float64)
        half = math.log(2)
        terms = []
        for number in range(3):
            gain = gains[number : number + 1]
            terms.append(real[number] * (ddo_loss(gain, zero, beta, 1.0)[0].double() - half))
            terms.append(reference[number] * (ddo_loss(zero, gain, beta, 1.0)[0].double() - half))
        loss = sum(terms)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (real / reference).log() / beta
    torch.testing.assert_close(gains.detach(), expected, atol=2e-3, rtol=2e-3)  # the loss is float32
