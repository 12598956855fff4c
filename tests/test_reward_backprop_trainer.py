"""Gradients of rewards through the decoder and the last denoising steps: against plain autograd, and what is trained by them."""

import json
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from tiny import Brightness, copied, differing, tiny_pipeline, tiny_stable_diffusion, tiny_vqvae

from msrl_diffusers import MedVolumePipeline
from msrl_diffusers.errors import InputError
from msrl_diffusers.functional.backprop import (
    clip_per_sample,
    late_steps,
    random_slices,
    reparametrized,
    surrogate_loss,
)
from msrl_diffusers.functional.denoising import predict_clean
from msrl_diffusers.models.reward_models import SliceRewardModel, VolumeRewardModel
from msrl_diffusers.policies import make_policy
from msrl_diffusers.rewards import LearnedReward, WeightedSum
from msrl_diffusers.rollouts import StepTable, sample_rollout, step_moments
from msrl_diffusers.seeding import generator_for, sample_generators
from msrl_diffusers.trainers.base import checkpoints, read_log
from msrl_diffusers.trainers.reward_backprop_config import RewardBackpropConfig
from msrl_diffusers.trainers.reward_backprop_trainer import RewardBackpropTrainer


ADAPTER = "pytorch_lora_weights.safetensors"


class Contrast:
    """The spread of the sample, on another scale."""

    name = "contrast"
    differentiable = True

    def __call__(self, samples, conditions):
        return 100 * samples.flatten(1).std(dim=1)


def config(output_dir, **settings):
    return RewardBackpropConfig(
        **{
            "output_dir": str(output_dir), "report_to": "none", "max_steps": 2, "learning_rate": 1e-3,
            "rollout_batch_size": 4, "num_rollout_batches": 2, "train_batch_size": 4, "num_inference_steps": 4, **settings,
        }
    )  # fmt: skip


class Recording(RewardBackpropTrainer):
    """Keeps the gradient of every update, before clipping."""

    gradients = None

    def _update(self, run, weights, *arguments):
        clip = run.accelerator.clip_grad_norm_
        self.gradients = self.gradients or []

        def record(parameters, max_norm):
            self.gradients.append({name: value.grad.clone() for name, value in weights.trainable.items()})
            return clip(parameters, max_norm)

        with patch.object(run.accelerator, "clip_grad_norm_", record):
            return super()._update(run, weights, *arguments)


def train(output_dir, pipeline=None, reward_funcs=None, **settings):
    """A trained pipeline, the trainer, its log and what it returned."""
    pipeline = pipeline or tiny_pipeline()
    arguments = {
        name: settings.pop(name) for name in ("watchdogs", "select_by", "train_conditions") if name in settings
    }
    trainer = Recording(pipeline, reward_funcs or Brightness(), config(output_dir, **settings), **arguments)
    figures = trainer.train()
    return pipeline, trainer, read_log(output_dir), figures


def timeless(history):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in history]


def slice_reward(seed=0):
    torch.manual_seed(seed)
    return LearnedReward("slice", SliceRewardModel(block_out_channels=(8, 8), norm_num_groups=4))


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


# --------------------------------------------------------------------------------------------------------- the whole run


@pytest.mark.parametrize(
    "settings", [{"gradient_steps": 2}, {"variant": "draft_lv"}, {"variant": "refl"}, {"eta": 0.0}]
)
def test_an_analytic_reward_rises(settings, tmp_path):
    pipeline = tiny_pipeline()
    start, vqvae = copied(pipeline.unet), copied(pipeline.vqvae)
    _, _, log, figures = train(tmp_path, pipeline, max_steps=6, learning_rate=3e-3, **settings)
    # rewards are standardized on the first rollout: this is a rise by one standard deviation of the pretrained model
    assert abs(log[0]["reward/mean"]) < 1e-4
    assert log[-1]["reward/mean"] > 1
    assert abs(log[0]["draft/kl"]) < 1e-6 < log[-1]["draft/kl"]
    assert (figures["rollouts"], figures["stopped"]) == (6, None)
    assert set(differing(start, copied(pipeline.unet))) == {name for name, _ in pipeline.unet.named_parameters()}
    assert differing(vqvae, copied(pipeline.vqvae)) == []


def test_a_line_of_the_log(tmp_path):
    _, _, log, figures = train(tmp_path, kl_coef=0.1)
    expected = {
        "reward/mean", "reward/std", "reward/brightness", "reward/frac_zero_std", "draft/loss", "draft/kl",
        "draft/trained_reward", "draft/grad_norm", "draft/reward_grad_norm", "watch/diversity", "watch/prediction_norm",
        "watch/high_frequency",
    }  # fmt: skip
    assert expected <= set(log[0])
    assert [(line["step"], line["epoch"]) for line in log] == [(1, 1), (2, 2)]
    for line in log:
        assert line["draft/loss"] == pytest.approx(-line["draft/trained_reward"] + 0.1 * line["draft/kl"], abs=1e-5)
        assert line["draft/trained_reward"] == pytest.approx(line["reward/mean"], abs=1e-4)
    assert figures["kl_form"] == "gaussian"


def run(output_dir, max_steps, **settings):
    pipeline, trainer, _, figures = train(
        output_dir, reward_funcs=[slice_reward(), Brightness()], max_steps=max_steps, save_steps=2, num_slices=4,
        ema_decay=0.9, kl_coef=0.1, watchdogs={"bright": lambda rollout: rollout.samples.mean().item()},
        select_by="bright", **settings,
    )  # fmt: skip
    return trainer, figures, copied(pipeline.unet)


@pytest.mark.parametrize(
    "settings",
    [{"gradient_steps": 2}, {"use_lora": True, "lora_rank": 2, "variant": "draft_lv"}, {"variant": "refl"}],
    ids=["draft-full", "draft_lv-lora", "refl-full"],
)
def test_resume_is_exact(settings, tmp_path):
    whole, figures, weights = run(tmp_path / "whole", 4, **settings)
    run(tmp_path / "parts", 2, **settings)
    resumed, resumed_figures, resumed_weights = run(tmp_path / "parts", 4, resume_from_checkpoint="latest", **settings)
    assert differing(weights, resumed_weights) == []
    assert whole.reward.scales == resumed.reward.scales
    assert whole.unet_forwards == resumed.unet_forwards > 0
    assert timeless([figures]) == timeless([resumed_figures])
    assert timeless(read_log(tmp_path / "whole")) == timeless(read_log(tmp_path / "parts"))
    states = [
        json.loads((tmp_path / name / "checkpoint-4/trainer_state.json").read_text()) for name in ("whole", "parts")
    ]
    assert states[0] == states[1]
    models = [load_file(tmp_path / name / "checkpoint-4/model.safetensors") for name in ("whole", "parts")]
    assert differing(*models) == []


@pytest.mark.parametrize(
    ("settings", "per_sample", "compared"),
    [
        ({"gradient_steps": 3, "guidance_scale": 2.0}, 3 * 3, 3),
        ({"variant": "draft_lv", "num_noise_draws": 2}, 3 * 3, 3),
        ({"variant": "refl", "gradient_checkpointing": True}, 4, 1),
    ],
    ids=["draft-guided", "draft_lv", "refl-checkpointed"],
)
def test_forwards_are_counted(settings, per_sample, compared, tmp_path):
    counted = 0
    pipeline = tiny_pipeline()

    def count(module, inputs):
        nonlocal counted
        counted += len(inputs[0])

    make_policy_of = "msrl_diffusers.trainers.tuned_weights.make_policy"
    with patch(make_policy_of, lambda pipeline: hooked(make_policy(pipeline), count)):
        _, trainer, _, _ = train(tmp_path, pipeline, max_steps=1, **settings)
    factor = 2 if "guidance_scale" in settings else 1
    # sampling; the steps with gradients; the reference for one watched sample of the first batch
    assert trainer.unet_forwards == factor * (8 * 4 + 8 * per_sample + compared)
    # a backward pass is counted as two forwards; checkpointing recomputes inside the denoiser, where no hook sees it
    prediction_norm = 2 * 4  # the watchdog's, of the first batch, which is not counted
    assert counted == factor * (8 * 4 + 8 * compared + compared + prediction_norm)


def hooked(policy, hook):
    """The policy, with a hook on its denoiser and on the frozen copy of it."""
    policy.denoiser.register_forward_pre_hook(hook)
    policy._frozen.register_forward_pre_hook(hook)
    return policy


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


# ------------------------------------------------------------------------------------------- near the pretrained model


def test_the_leash_holds(tmp_path):
    free, held = (
        train(tmp_path / str(coef), max_steps=6, learning_rate=3e-3, kl_coef=coef)[2][-1]["draft/kl"]
        for coef in (0.0, 100.0)
    )
    assert 0 < held < 0.5 * free


def test_the_budget_stops(tmp_path):
    _, _, log, figures = train(tmp_path, max_steps=8, kl_budget=1e-6, learning_rate=3e-3)
    assert "kl_budget=1e-06" in figures["stopped"]
    assert figures["rollouts"] == len(log) == 2
    assert log[0]["draft/kl"] < 1e-6 < log[1]["draft/kl"]


def test_a_held_out_figure_stops_and_picks(tmp_path):
    scripted = iter([1.0, 3.0, 2.0, 1.0, 9.0])
    pipeline, _, _, figures = train(
        tmp_path, max_steps=8, patience=2, save_steps=1, save_total_limit=9,
        watchdogs={"heldout": lambda rollout: next(scripted)}, select_by="heldout",
    )  # fmt: skip
    assert (figures["rollouts"], figures["step"], figures["watch/heldout"]) == (4, 2, 3.0)
    assert "not improved" in figures["stopped"]
    # the second rollout (figure 3.0) was sampled with the weights after one update
    assert differing(copied(pipeline.unet), load_file(checkpoints(tmp_path)[0] / "model.safetensors")) == []


def generate(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generators = sample_generators(3, "dial", [0, 1])
    return pipeline([0, 1], 3, generator=generators, output_type="latent").volumes


def test_the_adapter_is_a_dial(tmp_path):
    settings = {"use_lora": True, "lora_rank": 2, "learning_rate": 1e-2, "max_steps": 3}
    original = generate(tiny_pipeline())
    fused = generate(train(tmp_path / "fused", **settings)[0])
    assert not (tmp_path / "fused" / ADAPTER).exists()
    pipeline, _, _, _ = train(tmp_path / "apart", fuse_lora=False, **settings)
    torch.testing.assert_close(generate(pipeline), fused, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fused, original, atol=1e-3)
    base = {
        name.replace(".base_layer", ""): value for name, value in copied(pipeline.unet).items() if "lora" not in name
    }
    assert differing(base, copied(tiny_pipeline().unet)) == []

    other = tiny_pipeline()
    other.load_lora_weights(tmp_path / "apart", adapter_name="tuned")
    for one, name in ((pipeline, "default"), (other, "tuned")):
        distances = []
        for scale in (0.0, 0.5, 1.0):
            one.set_adapters(name, scale)
            distances.append((generate(one) - original).square().mean().item())
        torch.testing.assert_close(generate(one), fused, rtol=1e-4, atol=1e-4)
        assert distances[0] == pytest.approx(0, abs=1e-10)
        assert 0 < distances[1] < distances[2]

    fused_pipeline = train(tmp_path / "again", **settings)[0]
    fused_pipeline.save_pretrained(tmp_path / "saved")
    assert isinstance(MedVolumePipeline.from_pretrained(tmp_path / "saved"), MedVolumePipeline)


def test_stable_diffusion(tmp_path):
    _, _, log, _ = train(
        tmp_path, tiny_stable_diffusion(), train_conditions=["a", "b"], decoder_checkpointing=True, max_steps=4,
        learning_rate=3e-3, gradient_steps=2, use_lora=True, fuse_lora=False, lora_target_modules=["to_q", "conv1"],
    )  # fmt: skip
    assert log[-1]["reward/brightness"] > log[0]["reward/brightness"]
    assert (tmp_path / ADAPTER).is_file()
    with pytest.raises(InputError, match="autoencoder that quantizes, and that of StableDiffusionPipeline does not"):
        RewardBackpropTrainer(
            tiny_stable_diffusion(), Brightness(), config(tmp_path, decode="pre_quantization"), ["a"]
        )


# -------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "ddpo"}, r"variant must be one of \['draft', 'draft_lv', 'refl'\], got 'ddpo'"),
        ({"decode": "soft"}, "decode must be one of"),
        ({"gradient_steps": 5}, "gradient_steps=5 exceeds num_inference_steps=4"),
        ({"gradient_steps": 2, "variant": "refl"}, "refl trains one step; leave gradient_steps at 1"),
        ({"late_fraction": 0.0}, r"late_fraction must lie in \(0, 1\], got 0.0"),
        ({"eta": -1.0}, "eta must be 0 or more, got -1.0"),
        ({"kl_coef": float("nan")}, "kl_coef must be 0 or more, got nan"),
        ({"num_slices": 0}, "num_slices must be positive, got 0"),
        ({"reward_grad_clip": 0.0}, "reward_grad_clip must be positive"),
        ({"fuse_lora": False}, "set use_lora as well"),
        ({"fuse_lora": False, "use_lora": True, "push_to_hub": True}, "the adapter must be fused"),
        ({"train_batch_size": 3}, "can't be divided into 1 updates"),
    ],
)
def test_bad_settings(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        config(tmp_path, **settings)


def test_rewards_that_are_refused(tmp_path):
    class Detached(Brightness):
        name = "detached"

        def __call__(self, samples, conditions):
            return super().__call__(samples.detach(), conditions)

    class Steep(Brightness):
        name = "steep"

        def __call__(self, samples, conditions):
            brightness = super().__call__(samples, conditions)
            return brightness + (brightness - brightness).sqrt()  # the root's slope at zero is infinite

    def plain(samples, conditions):
        return samples.flatten(1).mean(dim=1)

    with pytest.raises(InputError, match=r"The rewards \['plain'\] are not differentiable.*DiffusionPPOTrainer"):
        RewardBackpropTrainer(tiny_pipeline(), [Brightness(), plain], config(tmp_path))
    with pytest.raises(InputError, match="'detached' says it is differentiable, but no gradient passes"):
        train(tmp_path / "detached", reward_funcs=Detached())
    with pytest.raises(InputError, match=r"gradient is not finite for 4 of 4 samples of rollout 0"):
        train(tmp_path / "steep", reward_funcs=Steep())
    torch.manual_seed(0)
    volume = LearnedReward("volume", VolumeRewardModel(block_out_channels=(8, 8), norm_num_groups=4))
    with pytest.raises(InputError, match="num_slices=4 is for a SliceRewardModel, and no reward is one"):
        RewardBackpropTrainer(tiny_pipeline(), volume, config(tmp_path, num_slices=4))
