import json
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file
from tiny import Brightness, copied, differing, tiny_pipeline, tiny_stable_diffusion

from msrl_diffusers.errors import InputError
from msrl_diffusers.policies import make_policy
from msrl_diffusers.seeding import sample_generators
from msrl_diffusers.trainers.base import checkpoints, read_log
from msrl_diffusers.trainers.final_sampler import FinalSampler
from msrl_diffusers.trainers.nft_config import DiffusionNFTConfig
from msrl_diffusers.trainers.nft_trainer import DiffusionNFTTrainer


def config(output_dir, **settings):
    return DiffusionNFTConfig(
        **{
            "output_dir": str(output_dir), "report_to": "none", "max_steps": 2, "learning_rate": 1e-3,
            "rollout_batch_size": 4, "num_rollout_batches": 2, "train_batch_size": 4, "num_inference_steps": 3,
            "num_train_timesteps_per_sample": 2, **settings,
        }
    )  # fmt: skip


def train(output_dir, pipeline=None, reward_funcs=None, **settings):
    """A trained pipeline, the trainer and its log."""
    pipeline = pipeline or tiny_pipeline()
    names = ("watchdogs", "select_by", "train_conditions")
    arguments = {name: settings.pop(name) for name in names if name in settings}
    trainer = DiffusionNFTTrainer(pipeline, reward_funcs or Brightness(), config(output_dir, **settings), **arguments)
    trainer.figures = trainer.train()
    return pipeline, trainer, read_log(output_dir)


def bright_samples(rollout):
    return rollout.samples.mean().item()


def timeless(history):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in history]


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("objective", ["nft", "awm"])
def test_an_analytic_reward_rises(objective, tmp_path):
    pipeline = tiny_pipeline()
    before, vqvae = copied(pipeline.unet), copied(pipeline.vqvae)
    settings = {"max_steps": 5, "rollout_batch_size": 8, "train_batch_size": 8, "learning_rate": 1e-2}
    _, trainer, log = train(tmp_path, pipeline, objective=objective, num_train_timesteps_per_sample=1, **settings)
    # rewards are standardised on the first rollout: a rise by so many standard deviations of the pretrained model
    assert abs(log[0]["reward/mean"]) < 1e-4
    assert log[-1]["reward/mean"] > 1
    assert log[-1]["reward/brightness"] > log[0]["reward/brightness"]
    assert abs(log[0]["nft/kl"]) < 1e-9
    assert log[-1]["nft/kl"] > 1e-5
    assert trainer.figures["rollouts"] == 5
    assert trainer.figures["stopped"] is None
    assert set(differing(before, copied(pipeline.unet))) == {name for name, _ in pipeline.unet.named_parameters()}
    assert differing(vqvae, copied(pipeline.vqvae)) == []
    assert not pipeline.unet.training


def test_a_line_of_the_log_and_the_count_of_forwards(tmp_path):
    _, trainer, log = train(tmp_path / "nft", num_updates=2)
    expected = {
        "reward/mean", "reward/brightness", "reward/frac_zero_std", "nft/loss", "nft/kl", "nft/grad_norm",
        "nft/deviation", "nft/positive_error", "nft/negative_error", "nft/old_decay", "watch/prediction_norm",
        "watch/diversity", "epoch",
    }  # fmt: skip
    assert expected <= set(log[0])
    assert log[0]["watch/prediction_norm"] == pytest.approx(1, abs=1e-6)
    assert log[1]["watch/prediction_norm"] != pytest.approx(1, abs=1e-6)
    assert [line["nft/old_decay"] for line in log] == pytest.approx([0, 0.001])
    assert log[0]["nft/deviation"] > 0  # after the first of two updates
    # two rollouts: three steps to sample; two levels: the trained policy (three passes), the old one, the reference
    assert trainer.unet_forwards == 2 * (8 * 3 + 8 * 2 * (3 + 1 + 1))

    settings = {"objective": "awm", "old_kl_coef": 0.0, "kl_coef": 0.0, "guidance_scale": 2.0}
    _, trainer, log = train(tmp_path / "awm", gradient_checkpointing=True, **settings)
    assert {"nft/log_prob", "nft/kl"} <= set(log[0])
    assert "nft/old_decay" not in log[0]
    # guidance in the rollouts; in the updates one forward more for checkpointing; the reference on one watched sample
    assert trainer.unet_forwards == 2 * (8 * 3 * 2 + 8 * 2 * (3 + 1) + 1 * 2)


def test_the_leash_holds_and_its_budget_stops(tmp_path):
    settings = {"max_steps": 4, "learning_rate": 3e-3}
    kl = [train(tmp_path / str(coef), kl_coef=coef, **settings)[2][-1]["nft/kl"] for coef in (0.0, 1e4)]
    assert 0 < kl[1] < 0.5 * kl[0]
    _, trainer, log = train(tmp_path / "stopped", kl_budget=1e-7, **settings)
    assert "kl_budget=1e-07" in trainer.figures["stopped"]
    assert len(log) == 2
    assert log[0]["nft/kl"] < 1e-7 < log[1]["nft/kl"]


def test_the_anchor_of_awm_holds(tmp_path):
    settings = {
        "objective": "awm",
        "max_steps": 4,
        "learning_rate": 1e-3,
        "old_decay_rate": 1.0,
        "old_decay_max": 0.99,
    }
    log = train(tmp_path / "free", old_kl_coef=0.0, **settings)[2]
    held_log = train(tmp_path / "held", old_kl_coef=1e4, **settings)[2]
    assert "nft/old_kl" not in log[-1]
    assert held_log[-1]["nft/old_kl"] > 0
    assert held_log[-1]["nft/kl"] < 0.5 * log[-1]["nft/kl"]


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "settings",
    [
        {"old_decay_rate": 0.3},
        {"use_lora": True, "lora_rank": 2, "old_decay_rate": 0.3, "num_updates": 2, "noise_group_size": 2},
        {"objective": "awm", "old_decay_rate": 0.3, "ema_decay": 0.9},
    ],
    ids=["full", "lora", "awm"],
)
def test_resume_is_exact(settings, tmp_path):
    watching = {"watchdogs": {"bright": bright_samples}, "select_by": "bright", "save_steps": 2}
    pipeline, whole, log = train(tmp_path / "whole", max_steps=4, **watching, **settings)
    train(tmp_path / "parts", max_steps=2, **watching, **settings)
    again, resumed, parts = train(
        tmp_path / "parts", max_steps=4, resume_from_checkpoint="latest", **watching, **settings
    )
    assert differing(copied(pipeline.unet), copied(again.unet)) == []
    assert differing(copied(pipeline.unet), copied(tiny_pipeline().unet))
    assert whole.unet_forwards == resumed.unet_forwards > 0
    assert timeless(log) == timeless(parts)
    assert [line["step"] for line in parts] == [1, 2, 3, 4]
    assert timeless([whole.figures]) == timeless([resumed.figures])
    files = [tmp_path / name / "checkpoint-4" for name in ("whole", "parts")]
    assert differing(*(load_file(path / "model.safetensors") for path in files)) == []
    states = [json.loads((path / "trainer_state.json").read_text()) for path in files]
    assert states[0] == states[1]
    assert {"best_figure", "scales", "unet_forwards"} <= set(states[0]["state"])


# ---------------------------------------------------------------------------------------------------------- old policy


@pytest.mark.parametrize("objective", ["nft", "awm"])
def test_who_draws_the_samples_and_what_is_kept(objective, tmp_path):
    """nft samples from an average of the weights, awm from the weights; those that drew the best rollout are kept."""
    pipeline, drawing, figures = tiny_pipeline(), [], iter([1.0, 2.0, 9.0, 3.0])

    def scripted(rollout):
        drawing.append(copied(pipeline.unet))
        return next(figures)

    settings = {"objective": objective, "old_decay_rate": 0.8, "old_decay_max": 0.9, "save_steps": 1}
    train(
        tmp_path, pipeline, max_steps=4, save_total_limit=9, watchdogs={"scripted": scripted}, select_by="scripted",
        **settings,
    )  # fmt: skip
    trained = [
        copied(tiny_pipeline().unet),
        *(load_file(path / "model.safetensors") for path in checkpoints(tmp_path)),
    ]
    assert differing(drawing[0], trained[0]) == []
    assert differing(drawing[1], trained[1]) == []  # the old policy follows at once after the first rollout
    for name, value in trained[2].items():
        expected = value if objective == "awm" else 0.8 * trained[1][name] + 0.2 * value
        torch.testing.assert_close(drawing[2][name], expected)
    assert differing(drawing[2], trained[1])
    assert differing(copied(pipeline.unet), drawing[2]) == []


def test_lora_trains_the_adapter_alone_and_averages_it(tmp_path):
    pipeline = tiny_pipeline()
    before = copied(pipeline.unet)
    _, trainer, log = train(tmp_path, pipeline, use_lora=True, lora_rank=1, learning_rate=1e-2, save_steps=2)
    assert log[-1]["nft/deviation"] < 1e-6 < log[-1]["nft/kl"] ** 0.5  # the old policy followed, the reference did not
    assert all("lora" in name for name in trainer._old.state_dict())
    after = copied(pipeline.unet)
    changed = differing(before, after)
    assert changed
    assert all(name.split(".")[-2] in ("to_q", "to_k", "to_v", "0", "conv1", "conv2") for name in changed)
    checkpoint = load_file(tmp_path / "checkpoint-2/model.safetensors")
    base = {name.replace(".base_layer", ""): value for name, value in checkpoint.items() if "lora" not in name}
    assert differing(base, before) == []


def test_dropout_is_explained(tmp_path):
    pipeline = tiny_pipeline(dropout=0.5)
    pipeline.unet.train()
    with pytest.raises(RuntimeError, match=r"the old policy deviates from the trained one by .*dropout"):
        train(tmp_path, pipeline)


# ------------------------------------------------------------------------------------------------- samplers and noise


@pytest.mark.parametrize(
    ("settings", "guidance_scale"), [({}, 1.0), ({"eta": 1.0}, 2.0), ({"sampler": "DPMSolverMultistepScheduler"}, 1.0)]
)
def test_samples_are_those_of_the_pipeline(settings, guidance_scale, tmp_path):
    pipeline = tiny_pipeline()
    args = config(tmp_path, num_inference_steps=5, **settings)
    sampler = FinalSampler(make_policy(pipeline), args)
    rollout = sampler.sample([0, 1], sample_generators(0, "test", [0, 1]), guidance_scale, [0, 1], "cpu")
    if "sampler" in settings:
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        [0, 1], 5, guidance_scale, eta=args.eta, generator=sample_generators(0, "test", [0, 1]), output_type="latent"
    ).volumes
    assert rollout.latents.shape == (2, 2, *expected.shape[1:])
    torch.testing.assert_close(rollout.latents[:, -1], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rollout.samples, pipeline.decode_latents(rollout.latents[:, -1]))
    assert rollout.conditions.tolist() == [0, 1]
    assert len(sampler) == 5
    assert sampler.timesteps.tolist() == [999, 799, 599, 399, 199]
    assert sampler.middle.timesteps.tolist() == [599]
    torch.testing.assert_close(sampler.alpha_prods, pipeline.scheduler.alphas_cumprod[sampler.timesteps].double())


def test_noise_depends_on_the_sample_alone_or_on_its_group(tmp_path):
    args = config(tmp_path, num_inference_steps=6, num_train_timesteps_per_sample=3)
    trainer = DiffusionNFTTrainer(tiny_pipeline(), Brightness(), args)
    numbers = list(range(40))
    drawn = [trainer._draw(numbers, step=1, draw=draw) for draw in range(3)]
    for draw, (positions, _) in enumerate(drawn):
        assert set(positions.tolist()) == {2 * draw, 2 * draw + 1}  # each draw has its part of the grid
    positions, noise = drawn[1]
    some_positions, some_noise = trainer._draw([7, 3], step=1, draw=1)
    assert torch.equal(some_positions, positions[[7, 3]])
    assert torch.equal(some_noise, noise[[7, 3]])
    assert not torch.equal(noise[0], noise[2])
    assert not torch.equal(trainer._draw([7], step=2, draw=1)[1], noise[[7]])
    assert noise.mean().abs() < 0.05
    assert noise.std().item() == pytest.approx(1, abs=0.05)

    args.noise_group_size = 3  # two classes in turn: 0, 2, 4 | 1, 3, 5 | 6, 8, 10 | ...
    positions, noise = trainer._draw(numbers, step=1, draw=1)
    for group in ([0, 2, 4], [1, 3, 5], [6, 8, 10]):
        assert len(set(positions[group].tolist())) == 1
        assert torch.equal(noise[group], noise[group[:1]].expand_as(noise[group]))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[4], noise[6])


def test_prompts_epsilon_prediction_and_another_sampler(tmp_path):
    settings = {"train_conditions": ["a b", "c"], "sampler": "EulerDiscreteScheduler", "max_steps": 2}
    pipeline, trainer, log = train(tmp_path, tiny_stable_diffusion(), **settings)
    assert log[0]["nft/deviation"] < 1e-6
    assert all(math.isfinite(value) for line in log for value in line.values())
    assert differing(copied(pipeline.unet), copied(tiny_stable_diffusion().unet))
    # noise alone says nothing about a clean sample
    grid = FinalSampler(trainer.policy, config(tmp_path, num_inference_steps=10)).timesteps
    few = FinalSampler(trainer.policy, config(tmp_path, num_inference_steps=10), min_signal=0.3).timesteps
    assert 0 < len(few) < len(grid)
    assert few.tolist() == grid[-len(few) :].tolist()


def test_what_must_not_change_the_result(tmp_path):
    settings = {"use_lora": True, "max_grad_norm": 1e-3}
    plain, _, log = train(tmp_path / "plain", **settings)
    others = {"offload_rollouts": True, "async_rewards": True, "reward_batch_size": 3, "gradient_checkpointing": True}
    other, _, other_log = train(tmp_path / "other", **settings, **others)
    for (name, one), two in zip(copied(plain.unet).items(), copied(other.unet).values(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    smaller = train(tmp_path / "smaller", train_batch_size=2, max_steps=1, **settings)[2]
    for figure in ("nft/loss", "nft/grad_norm", "nft/positive_error"):
        values = [lines[0][figure] for lines in (log, other_log, smaller)]
        assert values == pytest.approx([values[0]] * 3, rel=1e-3)


# -------------------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "dpo"}, r"objective must be one of \['nft', 'awm'\], got 'dpo'"),
        ({"weighting": "cosine"}, "weighting must be one of"),
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"eta": -1.0}, r"eta is 0 to 1, got -1\.0"),
        ({"kl_coef": float("nan")}, "kl_coef must be 0 or more, got nan"),
        ({"kl_budget": 0.0}, "kl_budget must be positive"),
        ({"old_decay_max": 1.0}, r"old_decay_max must lie in \[0, 1\), got 1.0"),
        ({"huber_power": 2.0}, r"huber_power must lie in \(0, 1\], got 2.0"),
        (
            {"objective": "awm", "num_updates": 2},
            "awm learns from samples of the policy it updates: num_updates must be 1",
        ),
        ({"num_train_timesteps_per_sample": 9}, "num_train_timesteps_per_sample=9 is more than the sampler has steps"),
        ({"num_updates": 3}, "8 samples per rollout .* into 3 updates"),
    ],
)
def test_settings_that_make_no_sense(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "Teapot"}, "sampler='Teapot' is no scheduler class of diffusers"),
        ({"sampler": "UNet2DModel"}, "is no scheduler class of diffusers"),
        ({"sampler": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler has no"),
        ({"sampler": "DPMSolverMultistepScheduler", "eta": 1.0}, "has no eta: set eta=0, got 1.0"),
    ],
)  # fmt: skip
def test_samplers_that_do_not_fit(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        DiffusionNFTTrainer(tiny_pipeline(), Brightness(), config(tmp_path, **settings))


def test_a_sampler_clips_no_latents_even_if_its_class_would(tmp_path):
    """DPM-Solver has no such option, so its config says nothing of it, and DDIM clips by default."""
    pipeline = tiny_pipeline()
    expected = FinalSampler(make_policy(pipeline), config(tmp_path)).scheduler
    plain = {name: value for name, value in pipeline.scheduler.config.items() if name != "clip_sample"}
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(plain)
    sampler = FinalSampler(make_policy(pipeline), config(tmp_path, sampler="DDIMScheduler"))
    assert not sampler.scheduler.config.clip_sample
    assert torch.equal(sampler.scheduler.alphas_cumprod, expected.alphas_cumprod)
    assert type(FinalSampler(make_policy(pipeline), config(tmp_path)).scheduler) is DPMSolverMultistepScheduler


def test_epsilon_prediction_needs_some_signal(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(InputError, match=r"No step of the sampler has min_signal=0\.9999"):
        DiffusionNFTTrainer(pipeline, Brightness(), config(tmp_path, min_signal=0.9999))
