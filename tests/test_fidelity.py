import pytest
import torch
from monai.metrics.fid import get_fid_score
from scipy.linalg import sqrtm

from msrl_diffusers import (
    PatchFeatureExtractor,
    RewardFeatureExtractor,
    SliceFeatureExtractor,
    SliceRewardModel,
    VolumeFeatureExtractor,
    VolumeRewardModel,
)
from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.features import extract_features, extractor_identity, hash_tensors
from msrl_diffusers.evaluation.fidelity import (
    bootstrap_frechet,
    bootstrap_kernel,
    centred_interval,
    frechet_distance,
    frechet_infinity,
    kernel_distance,
)
from msrl_diffusers.models.feature_extractors import plane_slices


def gaussian(count, seed, shift=0.0, planes=1, slices=1, features=4):
    """Draws of one distribution (but for `shift`); `seed` is that of the draws."""
    mixing = torch.randn(features, features, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, planes, slices, features, generator=generator, dtype=torch.float64)
    return noise @ mixing + shift


def closed_form(real, fake):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2))."""
    means, covariances = [x.mean(0).numpy() for x in (real, fake)], [x.T.cov().numpy() for x in (real, fake)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    return ((means[0] - means[1]) ** 2).sum() + (covariances[0] + covariances[1] - 2 * root).trace()


@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated:DeprecationWarning")  # monai calls scipy so
def test_frechet_distance_is_the_closed_form_and_monai_s():
    real, fake = gaussian(60, 0), gaussian(60, 1, shift=0.5)
    value = frechet_distance(real, fake)
    assert value == pytest.approx(closed_form(real[:, 0, 0], fake[:, 0, 0]), rel=1e-6)
    assert value == pytest.approx(get_fid_score(fake[:, 0, 0], real[:, 0, 0]).item(), rel=1e-4)
    assert value > 0.1


def test_frechet_distance_pools_slices_and_averages_planes():
    real, fake = gaussian(20, 0, planes=3, slices=5), gaussian(20, 1, planes=3, slices=5)
    by_plane = [closed_form(real[:, p].flatten(0, 1), fake[:, p].flatten(0, 1)) for p in range(3)]
    assert frechet_distance(real, fake) == pytest.approx(sum(by_plane) / 3, rel=1e-6)


def test_frechet_distance_of_equal_sets_is_zero():
    real = gaussian(40, 0, planes=3, slices=2)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(real, real.flip(0)) == pytest.approx(0, abs=1e-8)


def with_moments(mean, covariance, count=50, seed=0):
    """A set whose mean and covariance are exactly these."""
    draws = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws = draws - draws.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(draws.T.cov()), draws.T, upper=False).T
    return (white @ torch.linalg.cholesky(covariance).T + mean)[:, None, None]


def test_frechet_distance_of_two_known_gaussians():
    zero, mean = torch.zeros(2, dtype=torch.float64), torch.tensor([3.0, -4.0], dtype=torch.float64)
    wide, round_ = torch.diag(torch.tensor([9.0, 1.0], dtype=torch.float64)), torch.eye(2, dtype=torch.float64)
    # one root of the product of diagonal covariances per axis: 25 + (3 - 1)^2 + (1 - 1)^2
    assert frechet_distance(with_moments(zero, wide), with_moments(mean, round_, seed=1)) == pytest.approx(29)
    # turned by a quarter they share no order of axes: tr = 20, and the root of diag(9, 1) diag(1, 9) has trace 6
    assert frechet_distance(with_moments(zero, wide), with_moments(zero, wide.flip(0, 1))) == pytest.approx(8)
    # turned by an eighth they do not commute: tr sqrt of a 2 x 2 product is sqrt(tr + 2 sqrt(det)) = sqrt(50 + 18)
    turned = torch.tensor([[5.0, 4.0], [4.0, 5.0]], dtype=torch.float64)
    assert frechet_distance(with_moments(zero, wide), with_moments(zero, turned)) == pytest.approx(20 - 2 * 68**0.5)


def test_the_bias_of_small_sets_is_extrapolated_away():
    num_features, shift, count = 12, 0.2, 120
    true = num_features * shift**2  # equal covariances
    plain, extrapolated, errors = [], [], []
    for seed in range(4):
        sets = [torch.Generator().manual_seed(2 * seed + side) for side in range(2)]
        real, fake = (
            torch.randn(count, 1, 1, num_features, generator=generator, dtype=torch.float64) for generator in sets
        )
        found = frechet_infinity(real, fake + shift, seed=seed)
        plain.append(frechet_distance(real, fake + shift))
        extrapolated.append(found["value"])
        errors.append(found["standard_error"])
        assert found["sizes"][0] == 30
        assert found["sizes"][-1] == 120
        assert found["distances"][-1] == pytest.approx(plain[-1])  # all of it
        assert found["distances"][0] > 1.5 * found["distances"][-1]
    bias = sum(plain) / 4 - true
    assert bias > 0.3  # nearly as large as what is measured
    assert abs(sum(extrapolated) / 4 - true) < bias / 3
    assert max(errors) < bias
    assert frechet_infinity(real, fake + shift, seed=3) == found
    assert frechet_infinity(real, fake + shift, seed=4)["value"] != found["value"]


def test_sets_too_small_to_extrapolate_are_refused():
    with pytest.raises(ValueError, match="equal size, got 20 and 19 volumes"):
        frechet_infinity(gaussian(20, 0), gaussian(19, 1))
    with pytest.raises(InputError, match=r"19 volumes are too few .* 9 features, 1 slices each; give 20 or more"):
        frechet_infinity(gaussian(19, 0, features=9), gaussian(19, 1, features=9))
    assert frechet_infinity(gaussian(20, 0, features=9), gaussian(20, 1, features=9))["sizes"][0] == 10
    assert (
        frechet_infinity(gaussian(19, 0, features=9, slices=3), gaussian(19, 1, features=9, slices=3))["sizes"][0] == 5
    )


def test_sets_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match="equal size, got 10 and 9 volumes"):
        frechet_distance(gaussian(10, 0), gaussian(9, 0))


def test_kernel_distance():
    real, same, shifted = gaussian(80, 0), gaussian(80, 1), gaussian(80, 1, shift=2.0)
    noise = abs(kernel_distance(real, same))
    assert noise < 0.05 * kernel_distance(real, shifted)
    assert kernel_distance(real, shifted, seed=3) == kernel_distance(real, shifted, seed=3)
    state = torch.random.get_rng_state()
    kernel_distance(real, shifted)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_kernel_distance_is_the_mean_over_planes_of_features_averaged_over_slices():
    real, fake = (gaussian(20, seed, shift, planes=2, slices=3) for seed, shift in ((0, 0.0), (1, 0.5)))
    real[:, 1] += 1
    by_plane = [
        kernel_distance(*(features[:, plane : plane + 1].mean(dim=2, keepdim=True) for features in (real, fake)))
        for plane in (0, 1)
    ]
    assert by_plane[0] != pytest.approx(by_plane[1], rel=0.1)
    assert kernel_distance(real, fake) == pytest.approx(sum(by_plane) / 2)
    averaged = [features.mean(dim=2, keepdim=True) for features in (real, fake)]
    found, expected = (
        bootstrap_kernel(real, {"f": fake}, draws=4),
        bootstrap_kernel(averaged[0], {"f": averaged[1]}, draws=4),
    )
    torch.testing.assert_close(found["f"], expected["f"])


def test_kernel_distance_has_no_bias_where_the_frechet_distance_has():
    kernel, frechet = [], []
    for seed in range(0, 200, 2):
        sets = gaussian(8, seed), gaussian(8, seed + 1)
        kernel.append(kernel_distance(*sets, subsets=4))
        frechet.append(frechet_distance(*sets))
    for values, biased in ((torch.tensor(kernel), False), (torch.tensor(frechet), True)):
        assert (values.mean().abs() > 3 * values.std() / len(values) ** 0.5) == biased


def test_bootstrap_of_the_kernel_distance():
    real, same, shifted = gaussian(60, 0, planes=2), gaussian(60, 1, planes=2), gaussian(60, 1, planes=2, shift=2.0)
    replicates = bootstrap_kernel(real, {"same": same, "twin": same.clone(), "shifted": shifted})
    assert replicates["same"].shape == (200,)
    assert torch.equal(replicates["same"], replicates["twin"])
    assert torch.equal(bootstrap_kernel(real, {"same": same})["same"], replicates["same"])
    low, high = centred_interval(kernel_distance(real, same), replicates["same"])
    assert low < 0 < high  # the floor between sets of one distribution
    low, high = centred_interval(kernel_distance(real, shifted), replicates["shifted"])
    assert 0 < low < high
    with pytest.raises(ValueError, match="equal size, got 60 and 59 volumes"):
        bootstrap_kernel(real, {"same": same[:59]})


@pytest.mark.parametrize("count", [2, 3, 4])
def test_bootstrap_of_the_kernel_distance_of_few_volumes(count):
    """A draw of one volume alone has no pairs."""
    replicates = bootstrap_kernel(gaussian(count, 0), {"same": gaussian(count, 1)}, draws=200)["same"]
    assert replicates.isfinite().all()
    with pytest.raises(ValueError, match="two volumes or more"):
        bootstrap_kernel(gaussian(1, 0), {"same": gaussian(1, 1)})


@pytest.mark.parametrize("count", [12, 1100])  # 1024 rows are taken at once
def test_resampled_doubles_do_not_raise_the_kernel_distance(count):
    """Against the distances of all pairs of one draw with its doubles left out."""
    real, fake = gaussian(count, 0), gaussian(count, 1, shift=0.3)
    (found,) = bootstrap_kernel(real, {"fake": fake}, draws=1, seed=5)["fake"]
    generator = torch.Generator().manual_seed(5)
    rows, other_rows = (torch.randint(count, (count,), generator=generator) for _ in range(2))

    def mean_kernel(one, ones, other, others, same):
        values = (one[ones, 0, 0] @ other[others, 0, 0].T / 4 + 1) ** 3
        return values[ones[:, None] != others].mean() if same else values.mean()

    expected = mean_kernel(real, rows, real, rows, True) + mean_kernel(fake, other_rows, fake, other_rows, True)
    expected = expected - 2 * mean_kernel(real, rows, fake, other_rows, False)
    assert found.item() == pytest.approx(expected.item())


def test_interval_of_two_halves_holds_the_floor_of_two_others():
    held = []
    for seed in range(0, 32, 4):
        one, other, third, fourth = (gaussian(40, seed + part) for part in range(4))
        replicates = bootstrap_frechet(one, {"half": other}, draws=30)["half"]
        low, high = centred_interval(frechet_distance(one, other), replicates)
        held.append(low < frechet_distance(third, fourth) < high)
    assert sum(held) >= 6  # of 8; two random distances, so less than 95 %


def test_bootstrap_compares_arms_as_pairs():
    real, arm, other = gaussian(30, 0), gaussian(30, 1), gaussian(30, 2)
    replicates = bootstrap_frechet(real, {"a": arm, "same": arm.clone(), "other": other}, draws=6)
    assert replicates["a"].shape == (6,)
    assert torch.equal(replicates["a"], replicates["same"])
    assert replicates["a"].std() > 0
    assert (replicates["a"] - replicates["other"]).abs().max() > 0
    assert torch.equal(bootstrap_frechet(real, {"a": arm}, draws=6)["a"], replicates["a"])
    assert not torch.equal(bootstrap_frechet(real, {"a": arm}, draws=6, seed=1)["a"], replicates["a"])


def test_bootstrap_draws_as_many_of_a_class_as_there_are():
    """Two classes far apart: how many of each a draw has would shift its mean."""
    labels = torch.tensor([0] * 20 + [1] * 10)
    real = gaussian(30, 0) + 100.0 * labels[:, None, None, None]
    by_class = bootstrap_frechet(real, {"a": real}, draws=10, labels=labels)["a"]
    by_chance = bootstrap_frechet(real, {"a": real}, draws=10)["a"]
    assert by_class.max() < 0.1 * by_chance.max()


def test_reconstructions_are_drawn_with_their_originals():
    real, arm = gaussian(30, 0), gaussian(30, 1)
    replicates = bootstrap_frechet(real, {"limit": real.clone(), "arm": arm}, draws=6, made_from_real=("limit",))
    assert replicates["limit"].abs().max() < 1e-6
    assert torch.equal(replicates["arm"], bootstrap_frechet(real, {"arm": arm}, draws=6)["arm"])


@pytest.mark.parametrize("count", [5, 12])  # of 2 slices: 24 rows of 24 features still have singular covariances
def test_bootstrap_of_fewer_rows_than_features_takes_no_eigenvalues_of_features(count, monkeypatch):
    real, arm, made = (gaussian(count, seed, seed / 5, planes=2, slices=2, features=24) for seed in range(3))
    labels = torch.arange(count) % 2
    generator = torch.Generator().manual_seed(3)
    strata = [(labels == label).nonzero()[:, 0] for label in (0, 1)]
    expected = {"a": [], "made": []}
    for _ in range(4):
        drawn, other = (
            torch.cat([rows[torch.randint(len(rows), (len(rows),), generator=generator)] for rows in strata])
            for _ in range(2)
        )
        expected["a"].append(frechet_distance(real[drawn], arm[other]))
        expected["made"].append(frechet_distance(real[drawn], made[drawn]))
    monkeypatch.setattr("msrl_diffusers.evaluation.fidelity.frechet_distance", None)
    found = bootstrap_frechet(real, {"a": arm, "made": made}, 4, 3, labels, made_from_real=("made",))
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=0)


def test_bootstrap_of_more_rows_than_features_is_the_distance_of_the_draws():
    real, arm = gaussian(5, 0), gaussian(5, 1)
    generator = torch.Generator().manual_seed(0)
    drawn, other = (torch.randint(5, (5,), generator=generator) for _ in range(2))
    (found,) = bootstrap_frechet(real, {"a": arm}, draws=1)["a"].tolist()
    assert found == frechet_distance(real[drawn], arm[other])  # to the last digit


def test_a_long_bootstrap_shows_its_progress(monkeypatch, capsys):
    bootstrap_frechet(gaussian(8, 0), {"a": gaussian(8, 1)}, draws=2)
    assert not capsys.readouterr().err
    monkeypatch.setattr("msrl_diffusers.evaluation.fidelity.QUIET_SECONDS", 0)
    bootstrap_frechet(gaussian(8, 0), {"a": gaussian(8, 1)}, draws=2)
    assert "bootstrap" in capsys.readouterr().err


def test_intervals_are_centred_on_the_value():
    replicates = torch.linspace(5, 7, 1001, dtype=torch.float64)
    low, high = centred_interval(2.0, replicates)
    assert (low, high) == (pytest.approx(2 - 0.95), pytest.approx(2 + 0.95))
    narrow = centred_interval(2.0, replicates, level=0.5)
    assert low < narrow[0] < 2.0 < narrow[1] < high


@pytest.mark.parametrize(
    ("extractor_class", "settings", "shape"),
    [
        (SliceFeatureExtractor, {"block_out_channels": (8, 8), "num_slices": 2}, (3, 2, 6)),
        (VolumeFeatureExtractor, {"block_out_channels": (8, 8)}, (1, 1, 6)),
        (PatchFeatureExtractor, {"width": 16, "num_layers": 1}, (1, 1, 6)),
    ],
)
def test_features_do_not_depend_on_the_batch_size(extractor_class, settings, shape):
    torch.manual_seed(0)
    extractor = extractor_class(num_features=6, **settings).train()
    volumes = (torch.rand(5, 1, 16, 16, 16) * 2 - 1).half()
    features = extract_features(extractor, volumes, batch_size=2)
    assert features.shape == (5, *shape)
    assert features.dtype == torch.float64
    torch.testing.assert_close(features, extract_features(extractor, volumes), atol=1e-5, rtol=1e-5)
    assert not extractor.training
    assert features.std(dim=0).min() > 0


def test_features_of_a_reward_model_are_what_its_heads_score():
    torch.manual_seed(0)
    volumes = torch.rand(3, 1, 16, 16, 16) * 2 - 1
    whole = VolumeRewardModel(block_out_channels=(8, 16)).eval()
    features = extract_features(RewardFeatureExtractor(whole), volumes, batch_size=2)
    assert features.shape == (3, 1, 1, 32)
    scores = whole.network.head(features[:, 0, 0].float())[:, 0]
    torch.testing.assert_close(scores, whole(volumes), atol=1e-5, rtol=1e-5)

    of_slices = SliceRewardModel(block_out_channels=(8, 16), num_classes=2).eval()
    features = extract_features(RewardFeatureExtractor(of_slices, num_slices=4), volumes)
    assert features.shape == (3, 1, 4, 32)
    last = plane_slices(volumes, 4)[0][:, -1]
    scores = of_slices.network.head(features[:, 0, -1].float())[:, 1]
    torch.testing.assert_close(
        scores, of_slices(last, class_labels=torch.ones(3, dtype=torch.long)), atol=1e-5, rtol=1e-5
    )


def test_identity_of_an_extractor_follows_its_weights():
    torch.manual_seed(0)
    extractor = VolumeFeatureExtractor(block_out_channels=(8,), num_features=2)
    before = extractor_identity(extractor)
    assert before["name"] == "VolumeFeatureExtractor"
    assert before == extractor_identity(extractor)
    with torch.no_grad():
        extractor.project.bias[0] += 1e-3
    assert extractor_identity(extractor)["sha256"] != before["sha256"]
    assert len(extractor_identity(extractor.to(torch.bfloat16))["sha256"]) == 16  # which numpy does not have


def test_hash_of_tensors_knows_their_names_but_not_their_order():
    one, two = torch.zeros(2), torch.ones(2)
    assert hash_tensors([("a", one), ("b", two)]) == hash_tensors([("b", two), ("a", one)])
    assert hash_tensors([("a", one), ("b", two)]) != hash_tensors([("a", two), ("b", one)])
