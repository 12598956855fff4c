"""Which weights a training ends with, whoever trains: of a selection, of one that changed, and after a broken gradient."""

import json
import math

import pytest
from backprop_run import config as backprop_config
from safetensors.torch import load_file
from test_ddo_trainer import config as ddo_config
from test_frechet_trainer import config as frechet_config
from test_frechet_trainer import label_extractor
from test_nft_trainer import config as nft_config
from test_ppo_trainer import config as ppo_config
from tiny import Brightness, copied, differing, tiny_phantoms, tiny_pipeline, tiny_vqvae

from msrl_diffusers import DDOTrainer, DiffusionNFTTrainer, DiffusionPPOTrainer, FrechetTrainer, RewardBackpropTrainer


REAL = tiny_phantoms(6)
TRAINERS = {
    "ppo": lambda folder, pipeline, watching, **settings: DiffusionPPOTrainer(
        pipeline, Brightness(), ppo_config(folder, **settings), **watching
    ),
    "nft": lambda folder, pipeline, watching, **settings: DiffusionNFTTrainer(
        pipeline, Brightness(), nft_config(folder, **settings), **watching
    ),
    "ddo": lambda folder, pipeline, watching, **settings: DDOTrainer(
        pipeline, REAL, ddo_config(folder, **settings), **watching
    ),
    "draft": lambda folder, pipeline, watching, **settings: RewardBackpropTrainer(
        pipeline, Brightness(), backprop_config(folder, **settings), **watching
    ),
    "frechet": lambda folder, pipeline, watching, **settings: FrechetTrainer(
        pipeline, {"label": label_extractor()}, REAL, frechet_config(folder, **settings), **watching
    ),
}
UPDATES = {name: {"num_updates": 2} for name in ("ppo", "nft", "ddo")}  # of a rollout; the others make one


def saying(values):
    values = iter(values)
    return lambda rollout: float(next(values))


def train(name, folder, figures=None, select_by=None, pipeline=None, **settings):
    """The weights that the pipeline ends with, and what the trainer returned; `figures` are what its watchdogs say in turn."""
    pipeline = pipeline or tiny_pipeline()
    watchdogs = {figure: saying(values) for figure, values in (figures or {}).items()}
    watching = {"watchdogs": watchdogs, "select_by": select_by}
    settings = {"ema_decay": None, "lr_scheduler_type": "constant", "save_steps": 1, "save_total_limit": 9, **settings}
    result = TRAINERS[name](folder, pipeline, watching, **settings).train()
    return copied(pipeline.unet), result


def checkpoint(folder, step):
    return load_file(folder / f"checkpoint-{step}/model.safetensors")


@pytest.mark.parametrize("name", TRAINERS)
def test_who_selects_no_more_keeps_the_last_weights(name, tmp_path):
    selected, result = train(name, tmp_path, {"held": [2, 1]}, "held", max_steps=2)
    assert differing(selected, copied(tiny_pipeline().unet)) == []  # which drew the first rollout
    assert (result["step"], result["kept_after"]) == (1, 0)
    weights, result = train(name, tmp_path, max_steps=2, resume_from_checkpoint="latest")
    assert differing(weights, checkpoint(tmp_path, 2)) == []
    assert result["step"] == result["kept_after"] == 2


@pytest.mark.parametrize("name", TRAINERS)
def test_a_codebook_learns_nothing_from_rollouts(name, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.vqvae = tiny_vqvae("vq")
    pipeline.vqvae.train()
    before = copied(pipeline.vqvae)
    train(name, tmp_path, pipeline=pipeline, max_steps=1)
    assert differing(copied(pipeline.vqvae), before) == []


def test_another_selection_starts_anew(tmp_path):
    train("ppo", tmp_path, {"held": [1, 2]}, "held", max_steps=2)
    weights, result = train(
        "ppo", tmp_path, {"fid": [48, 47, 46, 49]}, "-fid", max_steps=6, patience=3, resume_from_checkpoint="latest"
    )
    assert (result["stopped"], result["step"], result["watch/fid"]) == (None, 5, 46)
    assert differing(weights, checkpoint(tmp_path, 4)) == []  # which drew the fifth rollout


def test_fresh_samples_select_anew_after_a_figure_of_the_user_s(tmp_path):
    settings = {"eval_steps": 1, "resume_from_checkpoint": "latest"}
    _, result = train("frechet", tmp_path, {"held": [-1, -2]}, "held", max_steps=2, **settings)
    assert "fresh_frechet_kept" not in result
    _, result = train("frechet", tmp_path, max_steps=3, **settings)
    assert (result["kept_after"], result["fresh_frechet_kept"]) == (3, result["watch/fresh_frechet"])
    weights, result = train("frechet", tmp_path, {"held": [-9]}, "held", max_steps=4, **settings)
    assert differing(weights, checkpoint(tmp_path, 3)) == []
    assert result["step"] == 4


def test_a_checkpoint_that_names_no_selection_has_the_same(tmp_path):
    train("ppo", tmp_path, {"held": [1, 2]}, "held", max_steps=2)
    path = tmp_path / "checkpoint-2/trainer_state.json"
    saved = json.loads(path.read_text())
    assert saved["state"].pop("best_by") == "held"
    path.write_text(json.dumps(saved))
    weights, result = train("ppo", tmp_path, {"held": [0]}, "held", max_steps=3, resume_from_checkpoint="latest")
    assert differing(weights, checkpoint(tmp_path, 1)) == []
    assert result["step"] == 2


def test_weights_that_broke_a_limit_are_not_the_best(tmp_path):
    limits = {"held": [0, 1]}
    weights, result = train("ppo", tmp_path, {"held": [0.5, 0.6, 5.0]}, "held", max_steps=4, watch_limits=limits)
    assert result["stopped"] == "the watchdog held left its limits 0 to 1"
    assert (result["step"], result["rollouts"]) == (2, 3)
    assert differing(weights, checkpoint(tmp_path, 1)) == []


@pytest.mark.parametrize("name", TRAINERS)
def test_a_gradient_that_is_not_finite_ends_it_with_the_weights_before(name, tmp_path):
    settings = {"ema_decay": 0.5, **UPDATES.get(name, {})}
    pipeline, gradients = tiny_pipeline(), []

    def broken_once(gradient):
        """In the second rollout's first micro-batch."""
        gradients.append(gradient)
        return gradient * math.nan if len(gradients) == per_rollout + 1 else gradient

    pipeline.unet.conv_out.weight.register_hook(gradients.append)
    expected, _ = train(name, tmp_path / "one", pipeline=pipeline, max_steps=1, **settings)
    per_rollout = len(gradients)
    gradients.clear()
    pipeline = tiny_pipeline()
    pipeline.unet.conv_out.weight.register_hook(broken_once)
    weights, result = train(name, tmp_path / "broken", pipeline=pipeline, max_steps=4, **settings)
    assert (result["stopped"], result["rollouts"]) == ("the gradient is not finite", 2)
    assert differing(weights, expected) == []
    assert differing(checkpoint(tmp_path / "broken", 1), checkpoint(tmp_path / "broken", 2)) == []
    _, resumed = train(name, tmp_path / "broken", max_steps=4, resume_from_checkpoint="latest", **settings)
    assert (resumed["stopped"], resumed["rollouts"]) == (None, 4)  # who resumes may have lowered the learning rate
    assert differing(weights, copied(tiny_pipeline().unet))
