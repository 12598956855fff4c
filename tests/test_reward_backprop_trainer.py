"""A training by the gradients of rewards: that rewards rise, the log, resumption, the leash, adapters, refusals."""

import json
from unittest.mock import patch

import pytest
import torch
from backprop_run import config, slice_reward, timeless, train
from safetensors.torch import load_file
from tiny import Brightness, copied, differing, tiny_pipeline, tiny_stable_diffusion

from msrl_diffusers import MedVolumePipeline
from msrl_diffusers.errors import InputError
from msrl_diffusers.models.reward_models import VolumeRewardModel
from msrl_diffusers.policies import make_policy
from msrl_diffusers.rewards import LearnedReward
from msrl_diffusers.seeding import sample_generators
from msrl_diffusers.trainers.base import checkpoints, read_log
from msrl_diffusers.trainers.reward_backprop_trainer import RewardBackpropTrainer


ADAPTER = "pytorch_lora_weights.safetensors"


def hooked(policy, hook):
    """The policy, with a hook on its denoiser and on the frozen copy of it."""
    policy.denoiser.register_forward_pre_hook(hook)
    policy._frozen.register_forward_pre_hook(hook)
    return policy


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
        ({"eta": -1.0}, r"eta is 0 to 1, got -1\.0"),
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

    with pytest.raises(
        InputError, match=r"The rewards \['plain'\] are not differentiable.*DiffusionPPOTrainer.*differentiable=True"
    ):
        RewardBackpropTrainer(tiny_pipeline(), [Brightness(), plain], config(tmp_path))
    with pytest.raises(InputError, match="'detached' says it is differentiable, but no gradient passes"):
        train(tmp_path / "detached", reward_funcs=Detached())
    with pytest.raises(InputError, match=r"gradient is not finite for 4 of 4 samples of rollout 0"):
        train(tmp_path / "steep", reward_funcs=Steep())
    with pytest.raises(InputError, match="A rollout of one sample gives rewards no scale: raise num_rollout_batches"):
        train(tmp_path / "one", rollout_batch_size=1, num_rollout_batches=1, train_batch_size=1)
    torch.manual_seed(0)
    volume = LearnedReward("volume", VolumeRewardModel(block_out_channels=(8, 8), norm_num_groups=4))
    with pytest.raises(InputError, match="num_slices=4 is for a SliceRewardModel, and no reward is one"):
        RewardBackpropTrainer(tiny_pipeline(), volume, config(tmp_path, num_slices=4))
