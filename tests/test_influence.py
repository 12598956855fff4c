"""The influence of a sample against finite differences and against sets without it."""

import pytest
import torch
from torchmetrics.image.fid import _compute_fid

from msrl_diffusers.evaluation.fidelity import frechet_distance
from msrl_diffusers.functional.influence import class_influence, frechet_influence, mixed_targets


def features(count, seed, num_features=4, planes=1, slices=1, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(count, planes, slices, num_features, generator=generator, dtype=torch.float64)
    return draws * torch.linspace(0.5, 2, num_features, dtype=torch.float64) + shift


def weighted_distance(real, generated, weights):
    """The Frechet distance of a generated set whose volumes have weights, by torchmetrics' formula."""
    distances = []
    for plane in range(real.shape[1]):
        moments = []
        for x, w in ((real, torch.ones(len(real), dtype=torch.float64)), (generated, weights)):
            rows = x[:, plane].flatten(0, 1)
            n, w = len(rows), (w / w.sum() / x.shape[2]).repeat_interleave(x.shape[2])
            mean = w @ rows
            moments += [mean, (rows - mean).T @ ((rows - mean) * w[:, None]) * n / (n - 1)]
        distances.append(_compute_fid(*moments).item())
    return sum(distances) / len(distances)


def slope(real, generated, index, size=1e-4):
    """Central difference of the distance by the weight of one sample."""
    step = torch.zeros(len(generated), dtype=torch.float64)
    step[index] = size
    one = torch.ones_like(step)
    return (weighted_distance(real, generated, one + step) - weighted_distance(real, generated, one - step)) / 2 / size


def test_the_weighted_distance_of_equal_weights_is_the_one_of_the_reports():
    real, generated = features(20, 0, planes=3, slices=2), features(20, 1, planes=3, slices=2, shift=0.5)
    weights = torch.full((20,), 3.0, dtype=torch.float64)
    assert weighted_distance(real, generated, weights) == pytest.approx(frechet_distance(real, generated), rel=1e-9)


@pytest.mark.parametrize(("planes", "slices"), [(1, 1), (3, 4)])
def test_influence_is_the_derivative_by_the_weight(planes, slices):
    real = features(30, 0, planes=planes, slices=slices)
    generated = features(24, 1, planes=planes, slices=slices, shift=0.3)
    found = frechet_influence(real, generated)
    assert found.shape == (24,)
    assert found.dtype == torch.float64
    assert found.sum().item() == pytest.approx(0, abs=1e-10)
    for i in range(0, 24, 5):
        assert found[i].item() == pytest.approx(slope(real, generated, i), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("real_count", "count"), [(40, 7), (7, 40), (7, 6)])
def test_influence_is_the_derivative_where_there_are_more_features_than_samples(real_count, count):
    real, generated = features(real_count, 0, num_features=12), features(count, 1, num_features=12, shift=0.3)
    found = frechet_influence(real, generated)
    assert torch.isfinite(found).all()
    assert found.sum().item() == pytest.approx(0, abs=1e-10)
    for i in range(0, count, 3):  # eigenvalues of a product without full rank are known to half their digits
        assert found[i].item() == pytest.approx(slope(real, generated, i, 1e-2), rel=2e-3, abs=1e-5)


def test_features_that_never_vary_or_repeat_others_change_nothing():
    real, generated = features(30, 0), features(20, 1, shift=0.2)
    found = frechet_influence(real, generated)
    constant = [torch.cat([x, torch.full_like(x[..., :1], 7.0)], dim=-1) for x in (real, generated)]
    torch.testing.assert_close(frechet_influence(*constant), found, rtol=1e-8, atol=1e-10)
    # x and x again are a single feature of twice the distance
    repeated = [torch.cat([x, x], dim=-1) for x in (real, generated)]
    torch.testing.assert_close(frechet_influence(*repeated), 2 * found, rtol=1e-8, atol=1e-10)


def test_influence_predicts_the_distance_without_the_sample():
    real, generated = features(400, 0), features(300, 1, shift=0.1)
    generated[:5] += torch.linspace(1, 3, 5, dtype=torch.float64).view(5, 1, 1, 1)  # five of growing strangeness
    found = frechet_influence(real, generated)
    whole = weighted_distance(real, generated, torch.ones(300, dtype=torch.float64))
    without = [
        whole - weighted_distance(real, torch.cat([generated[:i], generated[i + 1 :]]), torch.ones(299).double())
        for i in range(300)
    ]
    without = torch.tensor(without, dtype=torch.float64)
    assert (found - without).square().mean().sqrt() < 0.1 * found.square().mean().sqrt()
    torch.testing.assert_close(found[2:5], without[2:5], rtol=0.1, atol=0)
    assert torch.corrcoef(torch.stack([found[5:], without[5:]]))[0, 1] > 0.99
    assert found[4] > found[3] > found[2] > 0
    assert found[4] == found.max()


def test_a_sample_towards_the_real_mean_lowers_the_distance():
    real, generated = features(50, 0), features(50, 1, shift=2.0)
    generated[0], generated[1] = real.mean(dim=0), generated.mean(dim=0) + 3.0
    found = frechet_influence(real, generated)
    assert found[0] < 0 < found[1]


def test_weights_that_follow_the_influence_lower_the_distance():
    real, generated = features(60, 0), features(60, 1, shift=0.5)
    found = frechet_influence(real, generated)
    ones = torch.ones(60, dtype=torch.float64)
    better = weighted_distance(real, generated, ones - 0.1 * found / found.abs().max())
    worse = weighted_distance(real, generated, ones + 0.1 * found / found.abs().max())
    assert better < weighted_distance(real, generated, ones) < worse


def test_two_dimensional_features_are_one_plane_of_one_slice():
    real, generated = features(20, 0), features(15, 1)
    assert torch.equal(frechet_influence(real[:, 0, 0], generated[:, 0, 0]), frechet_influence(real, generated))
    single = frechet_influence(real[:, 0, 0].float(), generated[:, 0, 0].float())
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, frechet_influence(real, generated), rtol=1e-4, atol=1e-6)


def test_a_set_of_one_volume_over_and_over_has_no_influence():
    found = frechet_influence(features(20, 0), features(1, 1).repeat(6, 1, 1, 1))
    torch.testing.assert_close(found, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_influence_by_class_is_that_of_each_class_alone():
    real, generated = features(30, 0), features(20, 1, shift=0.4)
    real_labels, labels = torch.arange(30) % 2, torch.arange(20) % 2
    found = class_influence(real, real_labels, generated, labels)
    for label in (0, 1):
        alone = frechet_influence(real[real_labels == label], generated[labels == label])
        assert torch.equal(found[labels == label], alone)
    assert not torch.allclose(found, frechet_influence(real, generated))


def test_features_that_do_not_fit_are_refused():
    good = features(5, 0)
    for real, generated, message in (
        (good, good[:, 0], r"must both be \[N, F\] or \[N, P, S, F\]"),
        (good, features(5, 0, num_features=3), "must both be"),
        (good, good[:1], "two samples on each side, got 5 and 1"),
        (good, torch.full_like(good, float("nan")), "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            frechet_influence(real, generated)
    with pytest.raises(ValueError, match="influence in class 2 needs two samples on each side, got 0 real and 5"):
        class_influence(good, torch.zeros(5).long(), good, torch.full((5,), 2))


def test_mixed_targets_rise_with_the_set_and_fall_with_the_influence():
    influence = torch.tensor([-3.0, -0.1, 0.0, 0.1, 3.0, 400.0], dtype=torch.float64)
    targets = mixed_targets(0.6, influence, 0.25)
    assert targets.dtype == torch.float32
    assert (targets[1:] < targets[:-1]).all()
    assert ((targets >= 0) & (targets <= 1)).all()
    assert targets[2].item() == pytest.approx(0.75 * 0.6 + 0.25 * 0.5)
    assert (mixed_targets(0.7, influence, 0.25) > targets).all()
    # one deviation is one unit of the logistic: rms of (-1, 1) is 1
    ends = mixed_targets(1.0, torch.tensor([-1.0, 1.0]), 1.0)
    torch.testing.assert_close(ends, torch.tensor([1.0, -1.0]).sigmoid())


def test_the_coefficient_goes_from_the_set_to_the_single_sample():
    influence, set_targets = torch.tensor([-2.0, 1.0, 1.0]), torch.tensor([0.1, 0.3, 1.0])
    assert torch.equal(mixed_targets(set_targets, influence, 0.0), set_targets)
    alone = mixed_targets(set_targets, influence, 1.0)
    assert torch.equal(alone, mixed_targets(0.5, influence, 1.0))
    assert alone[1] == alone[2] < 0.5 < alone[0]
    half = mixed_targets(set_targets, influence, 0.5)
    torch.testing.assert_close(half, (set_targets + alone) / 2)


def test_influences_are_scaled_within_their_group():
    influence = torch.tensor([-1.0, 2.0, -100.0, 200.0, 0.0])
    targets = mixed_targets(0.5, influence, 0.5, groups=torch.tensor([7, 7, 2, 2, 4]))
    torch.testing.assert_close(targets[:2], targets[2:4])
    assert targets[4] == 0.5
    assert mixed_targets(0.5, influence, 0.5)[0] < targets[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, torch.zeros(2), 1.5), r"coefficient must lie in \[0, 1\], got 1.5"),
        ((1.5, torch.zeros(2), 0.5), r"Targets of sets must lie in \[0, 1\]"),
        ((torch.tensor([0.1, float("nan")]), torch.zeros(2), 0.5), "Targets of sets"),
        ((0.5, torch.tensor([0.0, float("inf")]), 0.5), "1 influences are not finite"),
    ],
)
def test_mixed_targets_refuse_what_has_no_meaning(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixed_targets(*arguments)
