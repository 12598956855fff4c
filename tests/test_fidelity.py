import pytest
import torch
from monai.metrics.fid import get_fid_score
from scipy.linalg import sqrtm

from msrl_diffusers import SliceFeatureExtractor, VolumeFeatureExtractor
from msrl_diffusers.evaluation.features import extract_features, extractor_identity, hash_tensors
from msrl_diffusers.evaluation.fidelity import (
    bootstrap_frechet,
    centred_interval,
    frechet_distance,
    kernel_distance,
)


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


def test_bootstrap_compares_arms_as_pairs():
    real, arm, other = gaussian(30, 0), gaussian(30, 1), gaussian(30, 2)
    replicates = bootstrap_frechet(real, {"a": arm, "same": arm.clone(), "other": other}, draws=6)
    assert replicates["a"].shape == (6,)
    assert torch.equal(replicates["a"], replicates["same"])
    assert replicates["a"].std() > 0
    assert (replicates["a"] - replicates["other"]).abs().max() > 0
    assert torch.equal(bootstrap_frechet(real, {"a": arm}, draws=6)["a"], replicates["a"])
    assert not torch.equal(bootstrap_frechet(real, {"a": arm}, draws=6, seed=1)["a"], replicates["a"])


def test_intervals_are_centred_on_the_value():
    replicates = torch.linspace(5, 7, 1001, dtype=torch.float64)
    low, high = centred_interval(2.0, replicates)
    assert (low, high) == (pytest.approx(2 - 0.95), pytest.approx(2 + 0.95))
    narrow = centred_interval(2.0, replicates, level=0.5)
    assert low < narrow[0] < 2.0 < narrow[1] < high


@pytest.mark.parametrize(
    ("extractor_class", "shape"), [(SliceFeatureExtractor, (3, 2, 6)), (VolumeFeatureExtractor, (1, 1, 6))]
)
def test_features_do_not_depend_on_the_batch_size(extractor_class, shape):
    torch.manual_seed(0)
    settings = {"num_slices": 2} if extractor_class is SliceFeatureExtractor else {}
    extractor = extractor_class(block_out_channels=(8, 8), num_features=6, **settings).train()
    volumes = (torch.rand(5, 1, 16, 16, 16) * 2 - 1).half()
    features = extract_features(extractor, volumes, batch_size=2)
    assert features.shape == (5, *shape)
    assert features.dtype == torch.float64
    torch.testing.assert_close(features, extract_features(extractor, volumes), atol=1e-5, rtol=1e-5)
    assert not extractor.training
    assert features.std(dim=0).min() > 0


def test_identity_of_an_extractor_follows_its_weights():
    torch.manual_seed(0)
    extractor = VolumeFeatureExtractor(block_out_channels=(8,), num_features=2)
    before = extractor_identity(extractor)
    assert before["name"] == "VolumeFeatureExtractor"
    assert before == extractor_identity(extractor)
    with torch.no_grad():
        extractor.project.bias[0] += 1e-3
    assert extractor_identity(extractor)["sha256"] != before["sha256"]


def test_hash_of_tensors_knows_their_names_but_not_their_order():
    one, two = torch.zeros(2), torch.ones(2)
    assert hash_tensors([("a", one), ("b", two)]) == hash_tensors([("b", two), ("a", one)])
    assert hash_tensors([("a", one), ("b", two)]) != hash_tensors([("a", two), ("b", one)])
