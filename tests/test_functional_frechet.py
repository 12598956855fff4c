"""The Frechet distance as a loss: values against hand-made numbers and torchmetrics, gradients against differences."""

import math

import pytest
import torch

from msrl_diffusers.evaluation.fidelity import frechet_distance
from msrl_diffusers.functional.frechet import (
    FrechetTarget,
    Moments,
    feature_moments,
    frechet_loss,
    frechet_to_target,
    matrix_root,
    root_product_trace,
)


def features(count, seed, num_features=4, planes=1, slices=1, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(count, planes, slices, num_features, generator=generator, dtype=torch.float64)
    return draws * torch.linspace(0.5, 2, num_features, dtype=torch.float64) + shift


def target_of(mean, variances):
    mean, variances = (torch.tensor(values, dtype=torch.float64) for values in (mean, variances))
    return FrechetTarget(mean, variances.sum(), variances.sqrt().diag())


def distance(real, fake):
    return frechet_loss([FrechetTarget.of(real)], fake, torch.zeros(len(fake), dtype=torch.long))


def test_value_and_gradient_by_hand():
    """Axes do not mix here: (1 - 3)^2 + (0 - 0)^2, and (s - s_r)^2 with deviations 2 and 3 against 1 and 4."""
    mean = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    covariance = torch.tensor([[4.0, 0.0], [0.0, 9.0]], dtype=torch.float64, requires_grad=True)
    found = frechet_to_target(target_of([3.0, 0.0], [1.0, 16.0]), Moments(mean, covariance))
    assert found.item() == pytest.approx(4 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-7)
    found.backward()
    assert mean.grad.tolist() == pytest.approx([-4, 0])
    # d/dC of tr C - 2 tr (C_r C)^1/2 is 1 - s_r / s on the diagonal
    assert covariance.grad.flatten().tolist() == pytest.approx([1 - 1 / 2, 0, 0, 1 - 4 / 3], rel=1e-6)


def test_moments_by_hand():
    one_plane = torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[1.0, 4.0], [3.0, 4.0]]])[:, None]  # [2, 1, 2, 2]
    found = feature_moments(torch.cat([one_plane, 2 * one_plane], dim=1))
    assert found.mean.tolist() == [[2, 2], [4, 4]]
    variances = torch.tensor([[4 / 3, 0], [0, 16 / 3]], dtype=torch.float64)
    torch.testing.assert_close(found.covariance, torch.stack([variances, 4 * variances]))
    with pytest.raises(ValueError, match="needs two slices or more, got 1"):
        feature_moments(one_plane[:1, :, :1])


@pytest.mark.parametrize(("count", "num_features", "planes", "slices"), [(60, 4, 1, 1), (60, 6, 3, 4), (8, 12, 1, 1)])
def test_it_is_the_distance_of_the_reports(count, num_features, planes, slices):
    real = features(count, 0, num_features, planes, slices)
    fake = features(count, 1, num_features, planes, slices, shift=0.3)
    # with fewer slices than features the eigenvalues of torchmetrics' product are known to half their digits
    assert distance(real, fake).item() == pytest.approx(frechet_distance(real, fake), rel=1e-6 if count > 8 else 1e-5)
    assert distance(real, real).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("count", "num_features", "slices"), [(20, 4, 1), (6, 5, 3), (5, 12, 1)])
def test_the_gradient_is_that_of_finite_differences(count, num_features, slices):
    """Also where neither covariance has full rank."""
    target = FrechetTarget.of(features(count + 3, 0, num_features, 2, slices))
    fake = features(count, 1, num_features, 2, slices, shift=0.2).requires_grad_()
    groups = torch.zeros(count, dtype=torch.long)
    (found,) = torch.autograd.grad(frechet_loss([target], fake, groups), fake)
    assert torch.isfinite(found).all()
    generator = torch.Generator().manual_seed(2)
    for _ in range(6):
        direction = torch.randn(fake.shape, generator=generator, dtype=torch.float64)
        moved = [frechet_loss([target], fake.detach() + sign * 1e-5 * direction, groups) for sign in (1, -1)]
        slope = (moved[0] - moved[1]) / 2e-5
        assert (found * direction).sum().item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-6)


def test_gradients_are_finite_in_the_worst_places():
    real = FrechetTarget.of(features(20, 0))
    for fake in (
        torch.ones(5, 1, 1, 4),  # no variance at all
        torch.eye(4)[:, None, None],  # equal eigenvalues
        torch.cat([torch.randn(9, 1, 1, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(9, 1, 1, 2)], -1),
    ):
        leaf = fake.double().requires_grad_()
        loss = frechet_loss([real], leaf, torch.zeros(len(leaf), dtype=torch.long))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(leaf.grad).all()
        assert leaf.grad.abs().max() < 10 * loss
    constant = FrechetTarget.of(torch.zeros(4, 1, 1, 4))  # a real side without variance: tr C + |m|^2
    leaf = features(6, 1).requires_grad_()
    loss = frechet_loss([constant], leaf, torch.zeros(6, dtype=torch.long))
    moments = feature_moments(leaf)
    expected = moments.mean.square().sum() + moments.covariance.diagonal(dim1=-2, dim2=-1).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.isfinite(torch.autograd.grad(loss, leaf)[0]).all()


def test_the_root_of_a_product():
    real, fake = (feature_moments(features(30, seed)).covariance[0] for seed in (0, 1))
    root = matrix_root(real)
    torch.testing.assert_close(root @ root, real)
    expected = torch.linalg.eigvals(real @ fake).sqrt().real.sum()
    assert root_product_trace(root, fake).item() == pytest.approx(expected.item(), rel=1e-7)
    # a single zero eigenvalue: value 0 and the slope that epsilon allows
    covariance = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    found = root_product_trace(torch.eye(2, dtype=torch.float64), covariance, epsilon=1e-6)
    found.backward()
    assert found.item() == pytest.approx(1, abs=1e-6)
    assert covariance.grad[1, 1].item() == pytest.approx(1 / math.sqrt(1e-6), rel=1e-6)


def test_classes_are_measured_apart():
    real, fake = [features(20, 0), features(20, 1, shift=3)], [features(14, 2), features(10, 3, shift=3)]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    groups = torch.tensor([0] * 14 + [1] * 10)[order]
    targets = [FrechetTarget.of(part) for part in real]
    found = frechet_loss(targets, torch.cat(fake)[order], groups)
    assert found.item() == pytest.approx((distance(real[0], fake[0]) + distance(real[1], fake[1])).item() / 2)
    swapped = frechet_loss(targets, torch.cat(fake)[order], 1 - groups)
    assert swapped > 10 * found  # pooled, the two could not be told apart
    with pytest.raises(ValueError, match="two slices or more, got 0"):
        frechet_loss(targets, fake[0], torch.zeros(14, dtype=torch.long))


def test_descent_brings_the_moments_of_the_real_side():
    target = FrechetTarget.of(features(200, 0))
    fake = features(50, 1, shift=1.0).requires_grad_()
    optimizer = torch.optim.Adam([fake], lr=0.05)
    groups = torch.zeros(50, dtype=torch.long)
    first = frechet_loss([target], fake, groups).item()
    for _ in range(100):
        optimizer.zero_grad()
        frechet_loss([target], fake, groups).backward()
        optimizer.step()
    assert frechet_loss([target], fake, groups).item() < 1e-3 * first
