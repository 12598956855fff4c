"""A run of discriminative self-play that is killed, and one that is split over processes, end where an undisturbed one does.

Killed: bit for bit. Split: gradients to 1e-3 of their largest element, for sums over samples come in another order.
Run as a script this file is such a run:

    python test_ddo_processes.py OUTPUT_DIR [--lora] [--kill_at MOMENT COUNT] [--processes N]
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
from tiny import tiny_phantoms, tiny_pipeline

from msrl_diffusers.trainers.base import checkpoints, read_log
from msrl_diffusers.trainers.ddo_config import DDOConfig
from msrl_diffusers.trainers.ddo_trainer import DDOTrainer


pytestmark = pytest.mark.slow
SAMPLES, STEPS, KILLS = 8, 4, 4
FORWARDS_PER_STEP = 2 * 3 + 2 + 2 * 2 * 2 * (2 + 1)  # sampling; the watchdog; two passes of two batches at two levels


class Recording(RecordsGradients, DDOTrainer):
    """It keeps its gradients."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kill_at", nargs=2)
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    if options.kill_at:
        die_at(options.kill_at[0], int(options.kill_at[1]))
    share = SAMPLES // options.processes
    args = DDOConfig(
        output_dir=options.output_dir, report_to="none", max_steps=STEPS, learning_rate=1e-4,
        rollout_batch_size=share // 2, num_rollout_batches=2, train_batch_size=share // 2, num_updates=2, num_epochs=2,
        num_inference_steps=3, num_train_timesteps_per_sample=2, beta=0.002, kl_budget=1e6, eta=1.0, save_steps=1,
        resume_from_checkpoint="latest", use_lora=options.lora, lora_rank=2, ema_decay=0.9, mixed_precision="no",
    )  # fmt: skip
    trainer = Recording(
        tiny_pipeline(), tiny_phantoms(4), args, watchdogs={"bright": lambda rollout: rollout.samples.mean().item()},
        select_by="-bright",
    )  # fmt: skip
    trainer.train()
    save_outcome(trainer, options.output_dir)


@pytest.mark.parametrize("lora", [[], ["--lora"]], ids=["full", "lora"])
def test_a_run_killed_several_times_ends_with_the_same_weights(lora, tmp_path):
    finish(__file__, tmp_path / "whole", *lora)
    draw = random.Random(0)
    for number in range(KILLS):
        moment = ("forward", "saving")[number % 2]
        count = draw.randint(FORWARDS_PER_STEP, 2 * FORWARDS_PER_STEP) if moment == "forward" else 1
        die(__file__, tmp_path / "killed", *lora, "--kill_at", moment, count)
    assert checkpoints(tmp_path / "killed")
    finish(__file__, tmp_path / "killed", *lora)
    assert_ended_alike(tmp_path / "whole", tmp_path / "killed")
    assert [line["epoch"] for line in read_log(tmp_path / "killed")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("lora", [[], ["--lora"]], ids=["full", "lora"])
def test_two_processes_give_the_figures_and_gradients_of_one(lora, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        finish(__file__, tmp_path / name, *lora, processes=processes)
    one, two = tmp_path / "one", tmp_path / "two"
    figures = {name for name in read_log(one)[0] if name.startswith("ddo/")} | {"watch/bright"}
    assert {"ddo/loss", "ddo/kl", "ddo/grad_norm", "ddo/accuracy"} <= figures
    figures.remove(
        "ddo/accuracy"
    )  # in the first update of a round, where ratios are one, rounding says which is higher
    assert_same_figures(one, two, figures, abs=1e-4)
    assert_same_gradients(one, two)


if __name__ == "__main__":
    main()
