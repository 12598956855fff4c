"""What the PPO trainer can be asked for beside the plain run: trust regions, windows, guidance, averages, callbacks."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_ppo_trainer import config
from tiny import Brightness, copied, differing, tiny_pipeline, tiny_stable_diffusion
from transformers import TrainerCallback

from msrl_diffusers import (
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    DiffusionPPOConfig,
    DiffusionPPOTrainer,
    RewardBackpropConfig,
    RewardBackpropTrainer,
)
from msrl_diffusers.errors import InputError
from msrl_diffusers.functional.denoising import ddim_std
from msrl_diffusers.functional.objectives import adapted_kl_coef, kl_mask_loss
from msrl_diffusers.policies import make_policy
from msrl_diffusers.rollouts import StepTable, sample_rollout
from msrl_diffusers.seeding import sample_generators
from msrl_diffusers.trainers import base
from msrl_diffusers.trainers.base import checkpoints, read_log
from msrl_diffusers.trainers.conditions import Conditions
from msrl_diffusers.trainers.watchdogs import (
    Watch,
    draw_samples,
    high_frequency_share,
    prediction_norm,
    reward_disagreement,
    sample_diversity,
)


def train(output_dir, pipeline=None, reward_funcs=None, **settings):
    """A trained pipeline, the trainer and its log."""
    pipeline = pipeline or tiny_pipeline()
    arguments = {name: settings.pop(name) for name in ("callbacks", "watchdogs", "select_by") if name in settings}
    trainer = DiffusionPPOTrainer(pipeline, reward_funcs or Brightness(), config(output_dir, **settings), **arguments)
    trainer.train()
    return pipeline, trainer, read_log(output_dir)


def test_a_line_of_the_log(tmp_path):
    _, _, log = train(tmp_path, num_updates=2)
    assert [(line["epoch"], line["step"]) for line in log] == [(1, 1), (2, 2)]
    expected = {
        "reward/mean", "reward/std", "reward/brightness", "reward/frac_zero_std", "ppo/ratio_first", "ppo/ratio_mean",
        "ppo/kl", "ppo/kl_coef", "ppo/clip_fraction", "ppo/grad_norm", "ppo/loss", "watch/prediction_norm",
        "watch/diversity", "watch/high_frequency",
    }  # fmt: skip
    assert expected <= set(log[0])
    assert log[0]["ppo/ratio_first"] == pytest.approx(1, abs=1e-6)
    assert log[1]["ppo/ratio_first"] == pytest.approx(1, abs=1e-6)
    assert log[0]["watch/prediction_norm"] == pytest.approx(1, abs=1e-6)
    assert log[1]["watch/prediction_norm"] != pytest.approx(1, abs=1e-6)


# ----------------------------------------------------------------------------------------------------- trust regions


def test_the_kl_mask_leaves_out_what_has_left_and_moves_on():
    log_prob = torch.tensor([0.1, 0.1, -0.1, -0.1, 0.1], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    kl_to_old = torch.tensor([2.0, 2.0, 2.0, 2.0, 0.5])
    loss, stats = kl_mask_loss(log_prob, torch.zeros(5), advantages, kl_to_old, 1.0)
    loss.backward()
    assert (log_prob.grad == 0).tolist() == [True, False, False, True, False]
    expected = -(math.exp(0.1) * -1 + math.exp(-0.1) + math.exp(0.1)) / 5
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert stats["clip_fraction"].item() == pytest.approx(0.4)
    assert stats["clip_fraction_high"] == stats["clip_fraction_low"] == pytest.approx(0.2)


def test_the_kl_mask_trains_and_at_first_as_the_clip_does(tmp_path):
    weights = {}
    for loss in ("clip", "kl_mask"):
        pipeline, _, _ = train(tmp_path / loss, max_steps=1, policy_loss=loss)
        weights[loss] = copied(pipeline.unet)
    for name, value in weights["clip"].items():
        torch.testing.assert_close(weights["kl_mask"][name], value, atol=1e-6, rtol=1e-5)
    _, _, log = train(
        tmp_path / "long", max_steps=2, num_updates=2, policy_loss="kl_mask", kl_threshold=1e-12, learning_rate=1e-2
    )
    assert log[0]["ppo/clip_fraction"] > 0
    _, _, log = train(
        tmp_path / "wide", max_steps=1, num_updates=2, policy_loss="kl_mask", kl_threshold=0.1, learning_rate=1e-5
    )
    assert log[0]["ppo/clip_fraction"] == 0  # around the old policy's means, from which next to nothing has left


def test_the_adaptive_coefficient_follows_its_target(tmp_path):
    assert adapted_kl_coef(1.0, kl=3.0, kl_target=1.0) == pytest.approx(1.02)
    assert adapted_kl_coef(1.0, kl=1.1, kl_target=1.0) == pytest.approx(1.01)
    assert adapted_kl_coef(1.0, kl=0.0, kl_target=1.0, rate=1.0) == pytest.approx(0.8)
    settings = {"kl_mode": "adaptive", "kl_coef": 1.0, "kl_rate": 1.0, "kl_target": 1e-9, "save_steps": 1}
    _, _, log = train(tmp_path / "whole", max_steps=4, **settings)
    assert [line["ppo/kl_coef"] for line in log] == pytest.approx([1, 0.8, 0.96, 1.152])
    train(tmp_path / "parts", max_steps=2, **settings)
    _, _, resumed = train(tmp_path / "parts", max_steps=4, resume_from_checkpoint="latest", **settings)
    assert [line["ppo/kl_coef"] for line in resumed] == [line["ppo/kl_coef"] for line in log]


def test_a_fixed_coefficient_is_that_of_the_config_after_a_resume_too(tmp_path):
    train(tmp_path, max_steps=1, kl_coef=0.0, save_steps=1)
    _, _, log = train(tmp_path, max_steps=2, kl_coef=0.5, resume_from_checkpoint="latest")
    assert [line["ppo/kl_coef"] for line in log] == [0.0, 0.5]


def test_smaller_micro_batches_after_a_resume(tmp_path):
    """An update stays one of a whole rollout, as it was before, and checkpoints go on being written."""
    settings = {"max_steps": 3, "save_steps": 1, "save_total_limit": 9}
    whole, _, _ = train(tmp_path / "whole", **settings)
    train(tmp_path / "parts", **{**settings, "max_steps": 1})
    parts, _, _ = train(tmp_path / "parts", **settings, train_batch_size=2, resume_from_checkpoint="latest")
    assert [path.name for path in checkpoints(tmp_path / "parts")] == [f"checkpoint-{step}" for step in (1, 2, 3)]
    for name, value in copied(whole.unet).items():
        torch.testing.assert_close(parts.unet.state_dict()[name], value, atol=1e-4, rtol=0)


def test_a_large_coefficient_holds_the_policy_at_the_reference(tmp_path):
    moved = {}
    for name, kl_coef in (("free", 0.0), ("held", 1e4)):
        settings = {"max_steps": 6, "rollout_batch_size": 16, "train_batch_size": 16, "learning_rate": 3e-4}
        _, _, log = train(tmp_path / name, kl_coef=kl_coef, **settings)
        moved[name] = log[-1]["ppo/kl"]
    assert 0 < moved["held"] < 0.2 * moved["free"]


# ------------------------------------------------------------------------------------------------ windows and guidance


def test_a_window_has_noise_in_its_steps_alone():
    pipeline = tiny_pipeline()
    policy, table = make_policy(pipeline), StepTable.of(pipeline.scheduler, 6, 1.0, 1e-6)
    window = table.window(1, 2)
    assert window.stochastic == table.stochastic[1:3]
    stds = ddim_std(window.alpha_prods, window.alpha_prods_prev, window.etas)
    assert (stds > 0).nonzero()[:, 0].tolist() == list(window.stochastic)
    rollouts = [sample_rollout(policy, [0, 1], window, sample_generators(0, name, [0, 1])) for name in "ab"]
    assert (rollouts[0].log_probs != 0).nonzero()[:, 1].unique().tolist() == list(window.stochastic)
    start = rollouts[0].latents[:, 0]
    torch.manual_seed(0)
    expected = pipeline([0, 1], 6, eta=0.0, latents=start, output_type="latent").volumes
    none = sample_rollout(policy, [0, 1], table.window(0, 0), sample_generators(0, "a", [0, 1]))
    torch.testing.assert_close(none.latents[:, -1], expected, atol=1e-4, rtol=1e-3)


def test_training_in_windows(tmp_path):
    _, trainer, log = train(
        tmp_path, max_steps=8, sde_window=1, rollout_batch_size=32, train_batch_size=32, learning_rate=1e-2
    )
    assert log[-1]["reward/mean"] > 0.3
    assert log[0]["ppo/ratio_first"] == pytest.approx(1, abs=1e-6)
    # per rollout of 64: four forwards to sample, one step trained by three passes; one batch of 32 is watched
    assert trainer.unet_forwards == 8 * (64 * 4 + 64 * 3 + 32 // 8)


def test_in_half_precision_the_frozen_copy_is_guided_as_the_policy_is(tmp_path):
    """accelerate makes the trained denoiser's output float32, and the formula of guidance is in it then."""
    settings = {"mixed_precision": "bf16", "guidance_scale": 3.0, "kl_coef": 1.0}
    _, _, log = train(tmp_path, max_steps=2, **settings)
    assert log[0]["ppo/kl"] == 0
    assert log[1]["ppo/kl"] > 0


def test_guidance_in_the_rollout_only(tmp_path):
    """The log-probabilities are those of the policy that is trained: the ratio is one though guidance chose the actions."""
    _, guided, log = train(tmp_path / "without", max_steps=1, guidance_scale=3.0, train_cfg=False)
    assert log[0]["ppo/ratio_first"] == pytest.approx(1, abs=1e-6)
    assert guided.unet_forwards == 8 * (4 * 2 + 4) + 8 * 4 * 3 + 1 * 4
    _, plain, other = train(tmp_path / "with", max_steps=1, guidance_scale=3.0)
    assert log[0]["reward/brightness"] == pytest.approx(other[0]["reward/brightness"], abs=1e-6)
    assert plain.unet_forwards == 2 * (8 * 4 + 8 * 4 * 3 + 1 * 4)


# --------------------------------------------------------------------------------------------------- memory, averages


@pytest.mark.parametrize(
    "settings",
    [{"offload_rollouts": True}, {"async_rewards": True}, {"reward_batch_size": 3}, {"gradient_checkpointing": True}],
)
def test_what_must_not_change_the_result(settings, tmp_path):
    plain, _, log = train(tmp_path / "plain", kl_coef=0.1, use_lora=True)
    other, _, other_log = train(tmp_path / "other", kl_coef=0.1, use_lora=True, **settings)
    for (name, one), two in zip(copied(plain.unet).items(), copied(other.unet).values(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert [line["reward/mean"] for line in log] == pytest.approx(
        [line["reward/mean"] for line in other_log], abs=1e-5
    )


def test_an_error_in_an_asynchronous_reward_stops_the_run(tmp_path):
    def failing(samples, conditions):
        raise ZeroDivisionError("reward server is gone")

    with pytest.raises(ZeroDivisionError, match="reward server is gone"):
        train(tmp_path, reward_funcs=failing, async_rewards=True)


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_average_of_the_weights_is_kept(use_lora, tmp_path):
    settings = {"max_steps": 3, "ema_decay": 0.5, "save_steps": 1, "save_total_limit": 9, "use_lora": use_lora}
    pipeline, _, _ = train(tmp_path / "run", **settings)
    last = load_file(checkpoints(tmp_path / "run")[-1] / "model.safetensors")
    if not use_lora:
        assert differing(copied(pipeline.unet), last)
        states = [load_file(path / "model.safetensors") for path in checkpoints(tmp_path / "run")]
        # decays of the warm-up: 1 - (1 + step) ** -0.75, at most 0.5
        average, start = {}, copied(tiny_pipeline().unet)
        for name in start:
            average[name] = start[name]
            for step, state in enumerate(states):
                decay = min(0.5, 1 - (1 + step) ** -0.75)
                average[name] = decay * average[name] + (1 - decay) * state[name]
            torch.testing.assert_close(pipeline.unet.state_dict()[name], average[name], atol=1e-6, rtol=1e-5)
    train(tmp_path / "parts", **{**settings, "max_steps": 2})
    resumed, _, _ = train(tmp_path / "parts", resume_from_checkpoint="latest", **settings)
    assert differing(copied(pipeline.unet), copied(resumed.unet)) == []


# ---------------------------------------------------------------------------------------------- watchdogs, callbacks


def test_watchdogs_see_what_they_are_named_for(tmp_path):
    samples = torch.randn(8, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert sample_diversity(samples, groups) == pytest.approx(1, abs=0.05)
    assert sample_diversity(samples[:1].expand(8, -1, -1, -1, -1), groups) == 0
    assert sample_diversity(samples[:2], torch.tensor([0, 1])) == 0
    smooth = torch.nn.functional.avg_pool3d(samples, 3, stride=1, padding=1)
    assert high_frequency_share(smooth) < 0.5 * high_frequency_share(samples)
    line = torch.linspace(0, 1, 8)
    assert reward_disagreement({"a": line, "b": 2 * line + 1}) == pytest.approx(0, abs=1e-6)
    assert reward_disagreement({"a": line, "b": -line}) == pytest.approx(2)
    assert reward_disagreement({"a": line, "b": torch.ones(8)}) == 1

    pipeline = tiny_pipeline()
    policy, table = make_policy(pipeline), StepTable.of(pipeline.scheduler, 4, 1.0, 1e-6)
    rollout = sample_rollout(policy, [0, 1], table, sample_generators(0, "norm", [0, 1]))
    assert prediction_norm(policy, table, rollout, 1.0) == pytest.approx(1)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(2)
        pipeline.unet.conv_out.bias.mul_(2)
    assert prediction_norm(policy, table, rollout, 1.0) == pytest.approx(2, rel=1e-4)


def test_the_line_of_the_weights_that_are_kept():
    def result(best_step, *steps):
        history = [{"step": step, "ppo/kl": step / 100} for step in steps]
        state = {} if best_step is None else {"best_step": best_step}
        found = Watch.result(SimpleNamespace(history=history, state=state, stopped=None, step=12))
        return found.get("step"), found.get("ppo/kl")

    assert result(None, 1, 2, 3) == (3, 0.03)
    assert result(1, 1, 2, 3) == (2, 0.02)
    assert result(0, 5, 10) == (1, 0.05)  # a line for every five rollouts
    assert result(7, 5, 10) == (8, 0.1)
    assert result(10, 5, 10) == (10, 0.1)  # judged after the last rollout, of which the last line is


def test_a_watchdog_s_limits_stop_the_run(tmp_path):
    _, _, log = train(tmp_path, max_steps=5, watch_limits={"diversity": [1e6, 1e7]})
    assert len(log) == 1
    with pytest.raises(InputError, match="watch_limits names 'colour', which is no watchdog"):
        train(tmp_path / "unknown", watch_limits={"colour": [0, 1]})
    with pytest.raises(InputError, match=r"watch_limits: diversity needs \[low, high\]"):
        config(tmp_path, watch_limits={"diversity": 3})


def test_a_run_that_ended_early_resumes_to_its_end(tmp_path, caplog):
    settings = {"max_steps": 4, "kl_budget": 1e-12, "save_steps": 1}
    pipeline, _, log = train(tmp_path, **settings)
    assert len(log) == 1
    again, _, resumed = train(tmp_path, **settings, resume_from_checkpoint="latest")
    assert resumed == log
    assert differing(copied(pipeline.unet), copied(again.unet)) == []
    assert "is where the run ended early (the KL divergence passed kl_budget=1e-12)" in caplog.text
    settings["kl_budget"] = None
    assert len(train(tmp_path, **settings, resume_from_checkpoint="latest")[2]) == 4


def test_watchdogs_look_now_and_then_at_the_weights_that_would_be_kept(tmp_path):
    pipeline, looks = tiny_pipeline(), []

    def look(rollout):
        looks.append(copied(pipeline.unet))
        return float(len(looks))

    settings = {  # a patience shorter than the time between looks ends nothing that improves at each
        "max_steps": 5, "ema_decay": 0.5, "save_steps": 1, "save_total_limit": 9, "watch_steps": 2, "patience": 1,
    }  # fmt: skip
    watching = {"watchdogs": {"look": look}, "select_by": "look", "watch_limits": {"look": [0, 9]}}
    _, _, log = train(tmp_path, pipeline, **settings, **watching)
    assert [line.get("watch/look") for line in log] == [1.0, None, 2.0, None, 3.0]
    assert all("watch/diversity" in line for line in log)
    # what was seen last, the average after four updates, is what the pipeline ends with; the trained weights are others
    assert differing(copied(pipeline.unet), looks[-1]) == []
    assert differing(copied(pipeline.unet), load_file(tmp_path / "checkpoint-4/model.safetensors"))
    with pytest.raises(InputError, match="watch_steps"):
        config(tmp_path, watch_steps=0)


@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [
        (DiffusionPPOTrainer, DiffusionPPOConfig),
        (DiffusionNFTTrainer, DiffusionNFTConfig),
        (RewardBackpropTrainer, RewardBackpropConfig),
    ],
)
def test_patience_without_a_figure_to_select_by_is_refused(trainer_class, config_class, tmp_path):
    args = config_class(output_dir=str(tmp_path), patience=3)
    watching = {"watchdogs": {"bright": lambda rollout: 1.0}}
    with pytest.raises(InputError, match=r"patience=3 counts rollouts .*: name a watchdog by select_by, or unset"):
        trainer_class(tiny_pipeline(), Brightness(), args, **watching)
    assert trainer_class(tiny_pipeline(), Brightness(), args, **watching, select_by="bright").watch.patience == 3


class Recorder(TrainerCallback):
    def __init__(self, stop_at=None, save_at=None):
        self.events, self.stop_at, self.save_at = [], stop_at, save_at

    def on_train_begin(self, args, state, control, **kwargs):
        assert kwargs["model"] is not None
        self.events.append(("begin", state.global_step))

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(("step", state.global_step))
        control.should_training_stop = state.global_step == self.stop_at
        control.should_save = state.global_step == self.save_at
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append(("log", logs["step"]))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("save", state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(("end", len(state.log_history)))


def test_callbacks_hear_and_decide(tmp_path):
    recorder = Recorder(stop_at=2, save_at=1)
    train(tmp_path, max_steps=5, callbacks=[recorder])
    assert recorder.events == [
        ("begin", 0), ("step", 1), ("log", 1), ("save", 1), ("step", 2), ("log", 2), ("end", 2),
    ]  # fmt: skip
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_stable_diffusion])
def test_pictures_of_samples(make, tmp_path):
    pipeline = make()
    args = config(tmp_path, max_steps=2, log_samples_steps=1, report_to="tensorboard")
    conditions = None if make is tiny_pipeline else ["a", "b"]
    DiffusionPPOTrainer(pipeline, Brightness(), args, train_conditions=conditions).train()
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["rollout-00000.png", "rollout-00001.png"]
    (events,) = tmp_path.glob("logs/**/events*")
    assert b"samples" in events.read_bytes()


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "get_available_trackers", list)
    args = config(tmp_path, report_to="tensorboard")  # can be read where it is not
    with pytest.raises(InputError, match="report_to=tensorboard needs a package that is not installed"):
        DiffusionPPOTrainer(tiny_pipeline(), Brightness(), args).train()


def test_pictures_for_trackers_that_know_no_formats(tmp_path):
    """All but tensorboard's hand what they do not know on to their services, which refuse it."""
    logged = []

    class Tracker:
        name = "wandb"

        def log_images(self, values, step=None, **kwargs):
            logged.append((values["samples"].shape, step, kwargs))

    run = SimpleNamespace(
        args=SimpleNamespace(log_samples_steps=1), is_main=True, output_dir=tmp_path,
        accelerator=SimpleNamespace(trackers=[Tracker()]),
    )  # fmt: skip
    draw_samples(run, torch.zeros(2, 1, 8, 8, 8), torch.zeros(2), 0)
    ((shape, step, kwargs),) = logged
    assert (len(shape), shape[0], shape[-1], step, kwargs) == (4, 1, 3, 0, {})


# --------------------------------------------------------------------------------------------------------- conditions


def test_a_dataset_gives_prompts_and_metadata(tmp_path):
    seen = []

    def reward(images, prompts, metadata):
        seen.extend(zip(prompts, [entry["age"] for entry in metadata], strict=True))
        return images.flatten(1).mean(dim=1), {}

    dataset = Dataset.from_dict({"prompt": ["a b", "c", "d"], "age": [1, 2, 3]})
    args = config(tmp_path, max_steps=2, num_rollout_batches=1)
    DiffusionPPOTrainer(tiny_stable_diffusion(), reward, args, train_dataset=dataset).train()
    assert len(seen) == 8
    assert set(seen) == {("a b", 1), ("c", 2), ("d", 3)}
    assert sorted(seen[:4]) == [("a b", 1), ("a b", 1), ("c", 2), ("d", 3)]
    assert sorted(seen[4:]) == [("a b", 1), ("c", 2), ("c", 2), ("d", 3)]  # goes on where the first rollout ended


def test_conditions_that_are_refused(tmp_path):
    dataset = Dataset.from_dict({"text": ["a"]})
    cases = [
        ({"train_dataset": dataset}, r"columns \['text'\]; one of"),
        ({"train_dataset": dataset, "train_conditions": ["a"]}, "not both"),
        ({"train_conditions": []}, "no conditions"),
        ({"train_conditions": "a lesion"}, "train_conditions is a list, got the text 'a lesion'"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            DiffusionPPOTrainer(tiny_stable_diffusion(), Brightness(), DiffusionPPOConfig(str(tmp_path)), **arguments)


def test_class_labels_of_numpy_and_torch_are_class_labels():
    pipeline = tiny_pipeline()
    as_numpy = Dataset.from_dict({"label": [1, 0, 1]}).with_format("numpy")
    assert Conditions.of(pipeline, None, as_numpy).values == [1, 0, 1]
    for given in (np.unique([1, 1]), torch.tensor([1]), [np.int64(1)], [torch.tensor(1)], ["LGG"]):
        (value,) = Conditions.of(pipeline, given, None).values
        assert value == 1
        assert type(value) is int
