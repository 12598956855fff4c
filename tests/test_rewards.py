import pytest
import torch

from msrl_diffusers import LearnedReward, SliceRewardModel, VolumeRewardModel, WeightedSum
from msrl_diffusers.errors import InputError
from msrl_diffusers.rewards import as_ddpo_reward, as_reward, checked
from msrl_diffusers.rewards.base import Scale


class Formula:
    """A reward that is a function of the samples."""

    differentiable = True

    def __init__(self, name, function):
        self.name, self.function = name, function

    def __call__(self, samples, conditions):
        return self.function(samples)


def first_voxel(samples):
    return samples.flatten(1)[:, 0]


def last_voxel(samples):
    return samples.flatten(1)[:, -1]


@pytest.mark.parametrize("function", [lambda x: x.mean(), lambda x: x.flatten(1), lambda x: first_voxel(x)[:-1]])
def test_a_reward_of_the_wrong_shape_is_refused(function):
    with pytest.raises(ValueError, match=r"Reward 'bad' gave shape .* for 3 samples"):
        checked(Formula("bad", function), torch.rand(3, 1, 2, 2, 2), [0, 0, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused(value):
    def function(samples):
        return torch.tensor([0.0, value, value])

    with pytest.raises(ValueError, match="Reward 'bad' gave 2 values that are not finite"):
        checked(Formula("bad", function), torch.rand(3, 1, 2, 2, 2), [0, 0, 0])


def test_rewards_come_out_as_float32():
    assert (
        checked(Formula("half", lambda x: first_voxel(x).half()), torch.rand(3, 1, 2), [0] * 3).dtype == torch.float32
    )


def test_weighted_sum_gives_rewards_of_any_scale_an_equal_say():
    samples = torch.randn(50, 1, 4, generator=torch.Generator().manual_seed(0))
    small, large = Formula("small", first_voxel), Formula("large", lambda x: 1000 * last_voxel(x) + 7)
    both = WeightedSum([small, large])
    both.fit(both.parts(samples, [0] * 50))
    total = both(samples, [0] * 50)
    first, last = first_voxel(samples), last_voxel(samples)
    expected = 0.5 * (first - first.mean()) / first.std() + 0.5 * (last - last.mean()) / last.std()
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-4)
    assert both.scales["large"].std == pytest.approx(1000 * last.std().item(), rel=1e-4)
    only_large = WeightedSum([small, large], [0.0, 1.0], both.scales)
    torch.testing.assert_close(only_large(samples, [0] * 50), (last - last.mean()) / last.std(), atol=1e-4, rtol=1e-4)


def test_weighted_sum_explains_what_is_missing():
    reward = Formula("bright", first_voxel)
    with pytest.raises(ValueError, match="scale of reward 'bright' is unknown; call fit"):
        WeightedSum([reward])(torch.rand(2, 1, 4), [0, 0])
    with pytest.raises(ValueError, match="1 rewards need as many weights, got 2"):
        WeightedSum([reward], [0.5, 0.5])
    with pytest.raises(ValueError, match="at least one reward"):
        WeightedSum([])


def test_weighted_sum_is_differentiable_if_all_parts_are():
    smooth, rough = Formula("smooth", first_voxel), Formula("rough", first_voxel)
    rough.differentiable = False
    assert WeightedSum([smooth, Formula("smooth too", last_voxel)]).differentiable
    assert not WeightedSum([smooth, rough]).differentiable


def test_a_reward_without_spread_does_not_blow_up():
    flat = WeightedSum([Formula("flat", first_voxel)], scales={"flat": Scale(2.0, 0.0)})
    assert torch.isfinite(flat(torch.full((3, 1, 2), 2.0), [0] * 3)).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -300.0])
def test_a_reward_that_was_constant_at_first_does_not_rule_later(value):
    samples = torch.randn(8, 1, 2, generator=torch.Generator().manual_seed(0))
    rounding = torch.tensor([0.0, 1e-7, -1e-7, 0.0] * 2)
    rare = Formula("rare", lambda x: value * (1 + rounding) + (first_voxel(x) > 10).float())
    both = WeightedSum([rare, Formula("other", last_voxel)])
    both.fit(both.parts(samples, [0] * 8))
    assert both.scales["rare"].std == 1
    assert both.scales["other"].std == pytest.approx(last_voxel(samples).std().item())
    alone = both.scales["rare"].standardise(rare(samples, [0] * 8))
    torch.testing.assert_close(alone, torch.zeros(8), atol=1e-4, rtol=0)
    samples[3, 0, 0] = 11.0
    hit = both.scales["rare"].standardise(rare(samples, [0] * 8))
    torch.testing.assert_close(hit, torch.eye(8)[3], atol=1e-4, rtol=0)


def test_a_small_spread_that_is_no_rounding_is_a_scale():
    values = 1e-3 + 1e-7 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert Scale.of(values).std == pytest.approx(1e-7, rel=0.3)


def test_two_rewards_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same"):
        WeightedSum([Formula("same", first_voxel), Formula("same", last_voxel)])


def test_a_reward_in_the_form_of_ddpo_trainers():
    function = as_ddpo_reward(Formula("bright", lambda x: x.flatten(1).mean(dim=1)))
    images = torch.stack([torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.5), torch.ones(1, 4, 4)])
    result = function(images, ("a", "b", "c"), ({}, {}, {}))
    assert isinstance(result, tuple)
    rewards, info = result
    assert rewards.tolist() == [-1.0, 0.0, 1.0]
    assert info == {}
    with pytest.raises(ValueError, match="'broken'"):
        as_ddpo_reward(Formula("broken", lambda x: x))(images, ("a", "b", "c"), ({}, {}, {}))


@pytest.mark.parametrize("model_class", [VolumeRewardModel, SliceRewardModel])
def test_learned_reward_in_micro_batches(model_class):
    torch.manual_seed(0)
    model = model_class(block_out_channels=(8, 16)).train()
    volumes = torch.rand(5, 1, 16, 16, 16) * 2 - 1
    whole = LearnedReward("quality", model, batch_size=5)(volumes, [0] * 5)
    parts = LearnedReward("quality", model, batch_size=2)(volumes, [0] * 5)
    assert whole.shape == (5,)
    assert whole.std() > 0
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    leaf = volumes.clone().requires_grad_()
    LearnedReward("quality", model)(leaf, [0] * 5).sum().backward()
    assert leaf.grad.abs().sum() > 0


def ddpo_brightness(images, prompts, metadata):
    """As TRL's trainer took it: images in [0, 1]; integers and lists are fine as well."""
    assert images.min() >= 0
    assert images.max() <= 1
    offset = [entry.get("offset", 0) for entry in metadata]
    return [image.mean().item() + more for image, more in zip(images, offset, strict=True)], {"prompts": prompts}


def two_arguments(samples, conditions):
    return samples.flatten(1).mean(dim=1).tolist()


def test_a_function_of_the_ddpo_form_is_a_reward():
    reward, samples = as_reward(ddpo_brightness), torch.rand(2, 3, 4, 4) * 2 - 1
    values = checked(reward, samples, ["a", "b"], [{"offset": 1}, {}])
    expected = samples.flatten(1).mean(dim=1) / 2 + 0.5 + torch.tensor([1.0, 0.0])
    torch.testing.assert_close(values, expected)
    assert reward.name == "ddpo_brightness"
    torch.testing.assert_close(checked(reward, samples, ["a", "b"])[1], expected[1])
    there_and_back = as_ddpo_reward(reward)(samples / 2 + 0.5, ("a", "b"), ({"offset": 1}, {}))[0]
    torch.testing.assert_close(there_and_back, expected)


def optional_metadata(images, prompts, metadata=None):
    return ddpo_brightness(images, prompts, metadata)


def test_metadata_may_have_a_default():
    reward, samples = as_reward(optional_metadata), torch.rand(2, 3, 4, 4) * 2 - 1
    torch.testing.assert_close(checked(reward, samples, ["a", "b"]), samples.flatten(1).mean(dim=1) / 2 + 0.5)


def test_what_takes_samples_gets_samples_whatever_else_it_may_take():
    samples = torch.rand(2, 3, 4, 4) * 2 - 1
    reward = as_reward(lambda samples, conditions, metadata=None: samples.flatten(1).mean(dim=1))
    torch.testing.assert_close(checked(reward, samples, ["a", "b"]), samples.flatten(1).mean(dim=1))


def test_a_function_without_metadata_that_answers_in_the_ddpo_form_is_refused():
    reward = as_reward(lambda images, prompts: (images.flatten(1).mean(dim=1), {}))
    with pytest.raises(
        InputError, match="gave a tuple, as functions of the DDPO form do: give it a third argument, metadata"
    ):
        checked(reward, torch.rand(2, 3, 4, 4), ["a", "b"])


def test_a_weighted_sum_hands_metadata_on():
    both = WeightedSum(
        [as_reward(ddpo_brightness), Formula("first", first_voxel)], [1.0, 0.0],
        {"ddpo_brightness": Scale(0.0, 1.0), "first": Scale(0.0, 1.0)},
    )  # fmt: skip
    images, metadata = torch.rand(2, 3, 4, 4), ({"offset": 1}, {})
    expected = images.flatten(1).mean(dim=1) + torch.tensor([1.0, 0.0])
    torch.testing.assert_close(as_ddpo_reward(both)(images, ("a", "b"), metadata)[0], expected)
    torch.testing.assert_close(both(images * 2 - 1, ["a", "b"])[1], expected[1])


class ModuleReward(torch.nn.Module):
    """A reward as the guide for contributors has it, which happens to be a network."""

    name, differentiable = "own", True

    def forward(self, samples, conditions):
        return conditions.float()


def test_other_forms_of_a_reward():
    samples = torch.rand(2, 1, 8, 8, 8) * 2 - 1
    torch.testing.assert_close(checked(as_reward(two_arguments), samples, [0, 1]), samples.flatten(1).mean(dim=1))
    torch.manual_seed(0)
    model = VolumeRewardModel(block_out_channels=(8, 8))
    learned = as_reward(model)
    assert isinstance(learned, LearnedReward)
    assert learned.name == "VolumeRewardModel"
    assert as_reward(learned) is learned
    own = ModuleReward()
    assert as_reward(own) is own
    assert checked(as_reward(own), samples, torch.tensor([0, 3])).tolist() == [0, 3]
    for path in (f"{__name__}.ddpo_brightness", f"{__name__}:ddpo_brightness"):
        assert as_reward(path).name == "ddpo_brightness"


@pytest.mark.parametrize("source", ["no.such.module", "math.no_such_function", "plain", 3.0])
def test_what_can_be_no_reward_is_refused(source):
    with pytest.raises(InputError, match=r"can't be imported|is a function, a model or a dotted path"):
        as_reward(source)
