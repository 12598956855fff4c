"""Resuming with settings that ask for other weights, or other rewards, than a checkpoint has."""

import json

import pytest
from test_ppo_options import train
from test_ppo_trainer import Contrast
from tiny import Brightness, tiny_pipeline

from msrl_diffusers import DiffusionNFTConfig, DiffusionNFTTrainer
from msrl_diffusers.errors import InputError


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"ema_decay": 0.5}, "has no weights for ema_decay, which this run needs: go on with the settings"),
        ({"ema_decay": 0.5}, {}, "has weights for ema_decay, which this run has no use for"),
        ({}, {"reference_update_steps": 1, "kl_coef": 0.1}, "has no weights for reference_update_steps"),
        (
            {"ema_decay": 0.5},
            {"reference_update_steps": 1, "kl_coef": 0.1},
            "has no weights for reference_update_steps, which this run needs, and weights for ema_decay",
        ),
        (
            {},
            {"reward_funcs": [Brightness(), Contrast()]},
            r"began with the rewards \['brightness'\].* of \['contrast'\]",
        ),
    ],
)
def test_a_checkpoint_of_other_settings_says_which(before, now, message, tmp_path):
    train(tmp_path, max_steps=1, save_steps=1, **before)
    with pytest.raises(InputError, match=message) as caught:
        train(tmp_path, resume_from_checkpoint="latest", **now)
    assert "\n" not in str(caught.value)
    assert len(train(tmp_path, resume_from_checkpoint="latest", **before)[2]) == 2


def test_a_checkpoint_with_an_old_policy_is_not_of_a_run_without(tmp_path):
    shared = {"rollout_batch_size": 8, "num_rollout_batches": 1, "train_batch_size": 4, "num_inference_steps": 4}
    common = {"output_dir": str(tmp_path), "report_to": "none", "objective": "awm", **shared}
    args = DiffusionNFTConfig(max_steps=1, save_steps=1, old_kl_coef=0.1, **common)
    DiffusionNFTTrainer(tiny_pipeline(), Brightness(), args).train()
    args = DiffusionNFTConfig(max_steps=2, old_kl_coef=0.0, resume_from_checkpoint="latest", **common)
    with pytest.raises(InputError, match="has weights for objective or old_kl_coef, which this run has no use for"):
        DiffusionNFTTrainer(tiny_pipeline(), Brightness(), args).train()


def test_a_checkpoint_that_does_not_say_what_weights_it_has_is_resumed(tmp_path):
    train(tmp_path, max_steps=1, save_steps=1, ema_decay=0.5)
    path = tmp_path / "checkpoint-1/trainer_state.json"
    saved = json.loads(path.read_text())
    assert saved.pop("kept_for") == ["ema_decay"]
    path.write_text(json.dumps(saved))
    assert len(train(tmp_path, resume_from_checkpoint="latest", ema_decay=0.5)[2]) == 2
