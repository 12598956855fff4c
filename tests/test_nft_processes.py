"""A run of DiffusionNFT that is killed, and one that is split over processes, end where an undisturbed one does.

Killed: bit for bit. Split: gradients to 1e-3 of their largest element, for sums over samples come in another order;
the learning rate is small, lest that turn a code of the quantizer.

The runs are made by this file itself, as a script:

    python test_nft_processes.py OUTPUT_DIR [--lora] [--awm] [--kill_at MOMENT COUNT] [--processes N]

It writes `OUTPUT_DIR/final.safetensors` and, per process, `OUTPUT_DIR/gradients-RANK.safetensors` of every update.
"""

import argparse
import random

import pytest
import torch
from launching import (
    RecordsGradients,
    assert_ended_alike,
    assert_same_figures,
    assert_same_gradients,
    die,
    finish,
    save_outcome,
)
from ppo_run import die_at
from tiny import Brightness, tiny_pipeline

from msrl_diffusers.trainers.base import checkpoints, read_log
from msrl_diffusers.trainers.nft_config import DiffusionNFTConfig
from msrl_diffusers.trainers.nft_trainer import DiffusionNFTTrainer


pytestmark = pytest.mark.slow
SAMPLES, KILLS = 8, 6
FORWARDS_PER_STEP = 2 * 3 + 2 * 2 * 3 + 2  # sampling; two batches at two levels, by three policies; the watchdog


class Recording(RecordsGradients, DiffusionNFTTrainer):
    """It keeps its gradients."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--awm", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kill_at", nargs=2)
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    if options.kill_at:
        die_at(options.kill_at[0], int(options.kill_at[1]))
    share = SAMPLES // options.processes
    args = DiffusionNFTConfig(
        output_dir=options.output_dir, report_to="none", max_steps=options.steps, learning_rate=1e-4, kl_coef=0.1,
        rollout_batch_size=share // 2, num_rollout_batches=2, train_batch_size=share // 2,
        num_updates=1 if options.awm else 2, num_inference_steps=3, num_train_timesteps_per_sample=2, eta=1.0,
        noise_group_size=2, old_decay_rate=0.3, save_steps=1, resume_from_checkpoint="latest", use_lora=options.lora,
        lora_rank=2, ema_decay=0.9, mixed_precision="no", objective="awm" if options.awm else "nft",
    )  # fmt: skip
    pipeline = tiny_pipeline()
    trainer = Recording(
        pipeline, Brightness(), args, watchdogs={"bright": lambda rollout: rollout.samples.mean().item()},
        select_by="bright",
    )  # fmt: skip
    trainer.train()
    save_outcome(trainer, options.output_dir)


@pytest.mark.parametrize("lora", [[], ["--lora"]], ids=["full", "lora"])
def test_a_run_killed_several_times_ends_with_the_same_weights(lora, tmp_path):
    finish(__file__, tmp_path / "whole", *lora)
    draw = random.Random(0)
    for number in range(KILLS):
        moment = ("forward", "forward", "saving")[number % 3]
        count = draw.randint(1, 2 * FORWARDS_PER_STEP) if moment == "forward" else 1
        die(__file__, tmp_path / "killed", *lora, "--kill_at", moment, count)
    assert checkpoints(tmp_path / "killed")
    finish(__file__, tmp_path / "killed", *lora)
    assert_ended_alike(tmp_path / "whole", tmp_path / "killed")
    assert [line["epoch"] for line in read_log(tmp_path / "killed")] == list(range(1, 7))


@pytest.mark.parametrize("variant", [[], ["--lora"], ["--awm"]], ids=["full", "lora", "awm"])
def test_two_processes_give_the_rewards_figures_and_gradients_of_one(variant, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        finish(__file__, tmp_path / name, "--steps", 3, *variant, processes=processes)
    one, two = tmp_path / "one", tmp_path / "two"
    figures = {name for name in read_log(one)[0] if name.startswith(("reward/", "nft/"))} | {"watch/bright"}
    assert {
        "nft/loss",
        "nft/kl",
        "nft/grad_norm",
        "nft/old_kl" if variant == ["--awm"] else "nft/deviation",
    } <= figures
    assert_same_figures(one, two, figures, abs=1e-4)
    assert_same_gradients(one, two)


if __name__ == "__main__":
    main()
