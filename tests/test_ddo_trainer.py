"""Discriminative self-play: what it learns, who is whose partner, when it stops, and that a resume is exact."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import copied, differing, tiny_phantoms, tiny_pipeline, tiny_stable_diffusion

from msrl_diffusers.errors import InputError
from msrl_diffusers.trainers.base import checkpoints, read_log
from msrl_diffusers.trainers.ddo_config import DDOConfig
from msrl_diffusers.trainers.ddo_trainer import DDOTrainer


REAL = tiny_phantoms(6)


def config(output_dir, **settings):
    return DDOConfig(
        **{
            "output_dir": str(output_dir), "report_to": "none", "max_steps": 2, "learning_rate": 1e-3, "ema_decay": None,
            "rollout_batch_size": 4, "num_rollout_batches": 2, "train_batch_size": 4, "num_inference_steps": 3,
            "num_train_timesteps_per_sample": 2, "num_updates": 1, "num_epochs": 1, "beta": 0.002, **settings,
        }
    )  # fmt: skip


def train(output_dir, pipeline=None, real=REAL, **settings):
    """A trained pipeline, the trainer and its log."""
    pipeline = pipeline or tiny_pipeline()
    names = ("watchdogs", "select_by", "train_conditions")
    arguments = {name: settings.pop(name) for name in names if name in settings}
    trainer = DDOTrainer(pipeline, real, config(output_dir, **settings), **arguments)
    trainer.figures = trainer.train()
    return pipeline, trainer, read_log(output_dir)


def timeless(history):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in history]


def test_samples_move_towards_the_real_volumes(tmp_path):
    pipeline, real = tiny_pipeline(), REAL.pixel_values.float()
    before, vqvae = copied(pipeline.unet), copied(pipeline.vqvae)
    with torch.no_grad():
        wanted = torch.stack(
            [pipeline.encode_volumes(real[REAL.class_labels == label]).mean(dim=0) for label in (0, 1)]
        )

    def distance(rollout):
        return (rollout.latents[:, -1] - wanted[rollout.conditions]).square().mean().item()

    _, trainer, log = train(
        tmp_path, pipeline, max_steps=12, learning_rate=1e-3, num_epochs=4, watchdogs={"distance": distance}
    )
    distances = [line["watch/distance"] for line in log]
    assert distances[-1] < 0.7 * distances[0], distances
    assert log[0]["ddo/accuracy"] > 0.6  # they can be told apart
    assert set(differing(before, copied(pipeline.unet))) == {name for name, _ in pipeline.unet.named_parameters()}
    assert differing(vqvae, copied(pipeline.vqvae)) == []
    assert not pipeline.unet.training
    assert trainer.figures["rollouts"] == 12
    assert trainer.figures["stopped"] is None


def test_a_line_of_the_log_and_the_count_of_forwards(tmp_path):
    _, trainer, log = train(tmp_path, num_updates=2, num_epochs=3, gradient_checkpointing=True, guidance_scale=2.0)
    expected = {
        "ddo/loss", "ddo/real_logit", "ddo/own_logit", "ddo/accuracy", "ddo/real_error", "ddo/kl", "ddo/grad_norm",
        "watch/prediction_norm", "watch/diversity", "epoch",
    }  # fmt: skip
    assert expected <= set(log[0])
    assert log[0]["watch/prediction_norm"] == pytest.approx(1, abs=1e-6)
    assert log[0]["ddo/kl"] < 1e-9 < log[1]["ddo/kl"]  # of the first batch of a round, before its update
    # two rounds: three steps with guidance to sample; three epochs at two levels: a pair through the trained policy (three
    # passes, one more for checkpointing) and the reference (one); the pretrained one at two levels of one watched sample
    assert trainer.unet_forwards == 2 * (8 * 3 * 2 + 3 * 8 * 2 * 2 * (4 + 1) + 2)


def test_the_reference_of_a_round_is_the_model_of_its_start(tmp_path):
    """So the first update of every round begins at a ratio of one, where both logits are zero."""
    log = train(tmp_path, max_steps=3, num_train_timesteps_per_sample=1, train_batch_size=8)[2]
    assert [line["ddo/real_logit"] for line in log] == pytest.approx([0, 0, 0], abs=1e-7)
    assert [line["ddo/own_logit"] for line in log] == pytest.approx([0, 0, 0], abs=1e-7)
    assert log[2]["ddo/kl"] > log[1]["ddo/kl"] > 1e-7


def test_partners_are_of_the_class_and_depend_on_the_sample_alone(tmp_path):
    trainer = DDOTrainer(tiny_pipeline(), REAL, config(tmp_path))
    trainer._latents = torch.arange(12.0)[:, None]  # which volume it is
    rollout = type("Rollout", (), {"conditions": torch.tensor([0, 1] * 20)})()
    numbers = list(range(40))
    partners = trainer._partners(rollout, numbers, 0, 1)[:, 0].long()
    assert torch.equal(REAL.class_labels[partners], rollout.conditions)
    assert len(partners.unique()) > 8
    rollout.conditions = rollout.conditions[[7, 4]]
    assert torch.equal(trainer._partners(rollout, [7, 4], 0, 1)[:, 0].long(), partners[[7, 4]])
    other = type("Rollout", (), {"conditions": torch.tensor([0, 1] * 20)})()
    assert not torch.equal(trainer._partners(other, numbers, 1, 1)[:, 0].long(), partners)

    for draw in range(2):
        timesteps, noise = trainer._draw(numbers, draw, 0, 0)
        assert set((timesteps // 500).tolist()) == {draw}  # each draw has its part of the timesteps
        again = trainer._draw([7, 3], draw, 0, 0)
        assert torch.equal(again[0], timesteps[[7, 3]])
        assert torch.equal(again[1], noise[[7, 3]])


def test_classes_that_are_not_all_of_the_real_ones(tmp_path):
    rollouts = []
    _, trainer, _ = train(
        tmp_path, train_conditions=["LGG"], max_steps=1, watchdogs={"seen": lambda one: rollouts.append(one) or 0.0}
    )
    assert rollouts[0].conditions.tolist() == [1] * 8
    trainer._latents = torch.arange(12.0)[:, None]  # which volume it is
    partners = trainer._partners(rollouts[0], list(range(8)), 0, 0)[:, 0].long()
    assert (REAL.class_labels[partners] == 1).all()


@pytest.mark.parametrize(
    "settings",
    [{"ema_decay": 0.9}, {"use_lora": True, "lora_rank": 2, "num_updates": 2, "num_epochs": 2, "ema_decay": 0.9}],
    ids=["full", "lora"],
)
def test_resume_is_exact(settings, tmp_path):
    watching = {
        "watchdogs": {"bright": lambda rollout: rollout.samples.mean().item()}, "select_by": "-bright", "save_steps": 2,
    }  # fmt: skip
    pipeline, whole, log = train(tmp_path / "whole", max_steps=4, **watching, **settings)
    train(tmp_path / "parts", max_steps=2, **watching, **settings)
    again, resumed, parts = train(
        tmp_path / "parts", max_steps=4, resume_from_checkpoint="latest", **watching, **settings
    )
    assert differing(copied(pipeline.unet), copied(again.unet)) == []
    assert differing(copied(pipeline.unet), copied(tiny_pipeline().unet))
    assert whole.unet_forwards == resumed.unet_forwards > 0
    assert timeless(log) == timeless(parts)
    assert timeless([whole.figures]) == timeless([resumed.figures])
    states = [
        json.loads((tmp_path / name / "checkpoint-4/trainer_state.json").read_text()) for name in ("whole", "parts")
    ]
    assert states[0] == states[1]


def test_the_weights_of_the_best_round_are_kept(tmp_path):
    figures = iter([1.0, 2.0, 9.0, 3.0])
    pipeline, trainer, _ = train(
        tmp_path, max_steps=4, save_steps=1, save_total_limit=9, watchdogs={"scripted": lambda _: next(figures)},
        select_by="scripted",
    )  # fmt: skip
    after_two = load_file(checkpoints(tmp_path)[1] / "model.safetensors")
    assert differing(copied(pipeline.unet), after_two) == []
    assert trainer.figures["step"] == 3


def test_its_budget_and_its_patience_stop_it(tmp_path):
    _, trainer, log = train(tmp_path / "budget", max_steps=4, kl_budget=1e-7)
    assert "kl_budget=1e-07" in trainer.figures["stopped"]
    assert len(log) < 4
    figures = iter([2.0, 1.0, 1.5, 1.0])
    _, trainer, log = train(
        tmp_path / "patience",
        max_steps=4,
        patience=2,
        watchdogs={"scripted": lambda _: next(figures)},
        select_by="scripted",
    )
    assert trainer.figures["stopped"] == "the selection figure has not improved"
    assert len(log) == 3


def test_lora_trains_the_adapter_alone(tmp_path):
    pipeline = tiny_pipeline()
    before = copied(pipeline.unet)
    _, trainer, _ = train(tmp_path, pipeline, use_lora=True, lora_rank=1, learning_rate=1e-2)
    assert all("lora" in name for name in trainer._reference.state_dict())
    changed = differing(before, copied(pipeline.unet))
    assert changed
    assert all(name.split(".")[-2] in ("to_q", "to_k", "to_v", "0", "conv1", "conv2") for name in changed)


def test_what_must_not_change_the_result(tmp_path):
    settings = {"max_grad_norm": 1e-3, "num_updates": 2}
    plain, _, log = train(tmp_path / "plain", **settings)
    other, _, other_log = train(tmp_path / "other", offload_rollouts=True, gradient_checkpointing=True, **settings)
    for (name, one), two in zip(copied(plain.unet).items(), copied(other.unet).values(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    smaller = train(tmp_path / "smaller", train_batch_size=2, max_steps=1, **settings)[2]
    for figure in ("ddo/loss", "ddo/grad_norm", "ddo/real_error"):
        values = [lines[0][figure] for lines in (log, other_log, smaller)]
        assert values == pytest.approx([values[0]] * 3, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"alpha": -1.0}, "alpha must be 0 or more, got -1.0"),
        ({"eta": float("nan")}, "eta is 0 to 1, got nan"),
        ({"num_epochs": 0}, "num_epochs must be positive, got 0"),
        ({"kl_budget": 0.0}, "kl_budget must be positive"),
        ({"num_updates": 3}, "8 samples per rollout .* into 3 updates"),
        ({"reward_weights": [1.0]}, "DDOConfig: there are no rewards"),
    ],
)
def test_settings_that_make_no_sense(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        config(tmp_path, **settings)


def test_what_it_can_not_learn_from(tmp_path):
    with pytest.raises(InputError, match="StableDiffusionPipeline encodes no volumes"):
        DDOTrainer(tiny_stable_diffusion(), REAL, config(tmp_path), train_conditions=["a"])
    with pytest.raises(InputError, match="Class 1 has 0 real volumes and needs 2"):
        DDOTrainer(tiny_pipeline(), (REAL.pixel_values, torch.zeros(len(REAL))), config(tmp_path))
    with pytest.raises(InputError, match="real_volumes must be a VolumeDataset"):
        DDOTrainer(tiny_pipeline(), "volumes", config(tmp_path))
    with pytest.raises(InputError, match="select_by='magic' is no watchdog"):
        DDOTrainer(tiny_pipeline(), REAL, config(tmp_path), select_by="magic")
