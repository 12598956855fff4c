import math

import pytest
import torch
from monai.metrics import MultiScaleSSIMMetric
from tiny import tiny_phantoms

from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.diversity import (
    density_coverage,
    draw_pairs,
    expected_coverage,
    ms_ssim,
    ms_ssim_diversity,
    ms_ssim_settings,
    pair_interval,
    precision_recall,
    volume_features,
)


def gaussian(count, seed, shift=0.0, features=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=generator, dtype=torch.float64) + shift


@pytest.mark.parametrize(
    ("size", "window", "scales"),
    [(7, 7, 1), (13, 7, 1), (14, 7, 2), (27, 7, 2), (28, 7, 3), (32, 7, 3), (62, 7, 3), (64, 7, 4), (128, 7, 5), (175, 7, 5), (176, 11, 5)],
)  # fmt: skip
def test_scales_and_window_follow_the_edge(size, window, scales):
    settings = ms_ssim_settings(size)
    assert (settings["window"], len(settings["weights"])) == (window, scales)
    assert sum(settings["weights"]) == pytest.approx(1)
    assert size / 2 ** (scales - 1) >= window
    if scales > 1:
        assert settings["weights"][1] / settings["weights"][0] == pytest.approx(0.2856 / 0.0448)


@pytest.mark.parametrize("size", [7, 14, 28, 32, 63])
def test_every_edge_is_taken_by_the_metric(size):
    volumes = torch.rand(2, 1, size, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert ms_ssim(volumes, torch.tensor([[0, 0]])).item() == pytest.approx(1)
    assert ms_ssim(volumes, torch.tensor([[0, 1]])).item() < 0.5


def test_ms_ssim_is_monai_s_on_intensities_from_0_to_1():
    volumes = tiny_phantoms().pixel_values
    pairs = torch.tensor([[0, 1], [2, 5], [4, 4]])
    metric = MultiScaleSSIMMetric(
        3, kernel_size=7, kernel_sigma=1.0, weights=ms_ssim_settings(16)["weights"], reduction="none"
    )
    expected = metric((volumes[pairs[:, 0]].float() + 1) / 2, (volumes[pairs[:, 1]].float() + 1) / 2)[:, 0]
    values = ms_ssim(volumes, pairs)
    torch.testing.assert_close(values, expected.double())
    assert values[:2].max() < 0.99
    assert values[2].item() == pytest.approx(1)
    assert values.dtype == torch.float64


def test_batches_of_pairs_only_divide_the_work(monkeypatch):
    volumes = tiny_phantoms().pixel_values
    pairs = draw_pairs(len(volumes), 7, seed=1)
    whole = ms_ssim(volumes, pairs)
    monkeypatch.setattr("msrl_diffusers.evaluation.diversity.VOXELS_AT_ONCE", 2 * 16**3)
    torch.testing.assert_close(ms_ssim(volumes, pairs), whole)


def test_a_set_that_repeats_itself_is_less_diverse():
    data = tiny_phantoms(4)
    repeating = data.pixel_values[[0, 1] * 4]
    real, collapsed = (
        ms_ssim_diversity(volumes, 12, labels=data.class_labels) for volumes in (data.pixel_values, repeating)
    )
    assert collapsed["value"] > real["value"] + 0.1
    assert real["interval"][0] < real["value"] < real["interval"][1]
    assert real["value"] == ms_ssim(data.pixel_values, draw_pairs(8, 12, labels=data.class_labels)).mean().item()
    assert (real["pairs"], real["window"], len(real["weights"])) == (12, 7, 2)


def test_pairs_are_distinct_and_within_classes():
    labels = torch.tensor([3, 5] * 10)
    pairs = draw_pairs(20, 60, seed=0, labels=labels)
    assert pairs.shape == (60, 2)
    assert torch.equal(labels[pairs[:, 0]], labels[pairs[:, 1]])
    assert (labels[pairs[:, 0]] == 3).sum() == 30
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert len(pairs.unique(dim=0)) == 60
    assert torch.equal(draw_pairs(20, 60, seed=0, labels=labels.tolist()), pairs)
    assert not torch.equal(draw_pairs(20, 60, seed=1, labels=labels), pairs)


def test_all_pairs_are_drawn_where_there_are_no_more():
    assert sorted(map(tuple, draw_pairs(5, 99).tolist())) == [(i, j) for i in range(5) for j in range(i + 1, 5)]
    assert len(draw_pairs(7, 99, labels=[0, 0, 0, 1, 1, 1, 1])) == 6  # three of each, so that classes weigh the same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 5), "at least 2 volumes in every class, the smallest has 1"),
        ((0, 5), "the smallest has 0"),
        ((3, 5, 0, [0, 0, 1]), "the smallest has 1"),
        ((4, 1, 0, [0, 0, 1, 1]), "1 pairs can't be shared by 2 classes"),
        ((4, 5, 0, [0, 0, 1]), "4 volumes and 3 labels"),
    ],
)
def test_sets_without_pairs_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        draw_pairs(*arguments)


def test_volumes_too_small_for_a_window_are_refused():
    with pytest.raises(InputError, match="at least 7 voxels along every edge, got 6"):
        ms_ssim(torch.zeros(2, 1, 8, 6, 8), torch.tensor([[0, 1]]))


@pytest.mark.parametrize(("share_of_volumes", "naive"), [(1.0, False), (0.0, True)])
def test_interval_of_pairs_holds_the_mean_though_pairs_share_volumes(share_of_volumes, naive):
    generator = torch.Generator().manual_seed(0)
    held, held_by_independence = 0, 0
    for seed in range(200):
        pairs = draw_pairs(40, 200, seed=seed, labels=[0, 1] * 20)
        classes = pairs[:, 0] % 2
        of_volumes = share_of_volumes * torch.randn(40, generator=generator, dtype=torch.float64)
        values = of_volumes[pairs].sum(dim=1) + torch.randn(200, generator=generator, dtype=torch.float64)
        values = values + 10 * classes  # classes may differ as they like: their shares are fixed
        low, high = pair_interval(values, pairs, classes)
        held += low < 5 < high
        spread = (values - 10 * classes).std().item() / 200**0.5
        held_by_independence += abs(values.mean().item() - 5) < 1.96 * spread
    assert 0.88 < held / 200 < 0.99
    assert (held_by_independence / 200 > 0.88) == naive


def test_one_pair_of_a_class_makes_no_interval():
    """Its residual is zero: an interval of these pairs would have no width, whatever they are."""
    values, pairs = gaussian(1, 0, features=3)[0], torch.tensor([[0, 1], [2, 3], [0, 2]])
    assert pair_interval(values[:1], pairs[:1]) is None
    assert pair_interval(values, pairs, torch.tensor([0, 1, 0])) is None
    assert pair_interval(values, pairs) is not None
    volumes = tiny_phantoms().pixel_values[:5]
    assert ms_ssim_diversity(volumes, labels=[0, 0, 0, 1, 1])["interval"] is None


def test_interval_widens_with_its_level():
    pairs = draw_pairs(10, 20)
    values = gaussian(1, 0, features=20)[0]
    intervals = [pair_interval(values, pairs, level=level) for level in (0.5, 0.95)]
    assert intervals[1][0] < intervals[0][0] < values.mean() < intervals[0][1] < intervals[1][1]


def test_volume_features_are_means_over_slices_side_by_side():
    features = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    vectors = volume_features(features)
    assert vectors.shape == (2, 15)
    assert vectors.dtype == torch.float64
    assert torch.equal(vectors[1, 5:10], features[1, 1].mean(dim=0).double())


def test_identical_sets():
    features = gaussian(40, 0)
    shuffled = features[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    assert precision_recall(features, shuffled) == {"precision": 1, "recall": 1}
    found = density_coverage(features, shuffled)
    assert found["coverage"] == 1
    assert found["density"] == pytest.approx(6 / 5)  # every ball holds its own centre as well


def test_sets_far_apart():
    real, fake = gaussian(40, 0), gaussian(30, 1, shift=100)
    assert precision_recall(real, fake) == {"precision": 0, "recall": 0}
    assert density_coverage(real, fake) == {"density": 0, "coverage": 0}


def test_sets_on_a_line_by_hand():
    real = torch.tensor([0.0, 1, 3, 6])[:, None]  # radii for k = 1: 1, 1, 2, 3
    fake = torch.tensor([0.5, 2, 20])[:, None]  # radii: 1.5, 1.5, 18
    # 0.5 is in the balls of 0 and 1, 2 in those of 1 and 3; 0 and 1 are in those of 0.5 and 2, 3 in that of 2, 6 in 20's
    assert precision_recall(real, fake, k=1) == {"precision": pytest.approx(2 / 3), "recall": 1}
    assert density_coverage(real, fake, k=1) == {"density": pytest.approx(4 / 3), "coverage": 3 / 4}


def test_mode_collapse_keeps_precision_and_loses_recall():
    real, fake = gaussian(60, 0, features=2), 0.05 * gaussian(60, 1, features=2)
    found = precision_recall(real, fake) | density_coverage(real, fake)
    assert found["precision"] == 1
    assert found["recall"] < 0.1
    assert found["density"] > 1
    assert found["coverage"] < 0.4


@pytest.mark.parametrize(("num_real", "num_fake"), [(20, 20), (30, 12)])
def test_expectations_for_sets_of_one_distribution(num_real, num_fake):
    """1 for density, Naeem's closed form for coverage, whatever the sizes of the sets."""
    found = [
        density_coverage(gaussian(num_real, seed), gaussian(num_fake, seed + 1), k=3) for seed in range(0, 300, 2)
    ]
    for key, expected in (("density", 1), ("coverage", expected_coverage(num_real, num_fake, k=3))):
        values = torch.tensor([each[key] for each in found])
        error = values.std().item() / math.sqrt(len(values))
        assert error < 0.03
        assert values.mean().item() == pytest.approx(expected, abs=3 * error)


def test_expected_coverage_of_many():
    assert expected_coverage(10**5, 10**5, k=5) == pytest.approx(1 - 0.5**5, abs=1e-4)


def test_rows_at_once_only_divide_the_work(monkeypatch):
    real, fake = gaussian(20, 0), gaussian(17, 1)
    whole = precision_recall(real, fake) | density_coverage(real, fake)
    monkeypatch.setattr("msrl_diffusers.evaluation.diversity.ROWS_AT_ONCE", 3)
    assert precision_recall(real, fake) | density_coverage(real, fake) == whole


@pytest.mark.parametrize("measure", [precision_recall, density_coverage])
def test_features_without_neighbours_are_refused(measure):
    with pytest.raises(InputError, match="more than 5 volumes in each set, got 9 and 5"):
        measure(gaussian(9, 0), gaussian(5, 1))
    with pytest.raises(InputError, match=r"shape \[9, 6\] and \[9, 4\]"):
        measure(gaussian(9, 0), gaussian(9, 1, features=4))
