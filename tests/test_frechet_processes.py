"""A Frechet run that is killed, and one that is split over two processes, end where an undisturbed one does.

Killed: bit for bit. Split: gradients to 1e-3 of their largest element, for sums over samples come in another order.
Run as a script this file is such a run: `test_frechet_processes.py OUTPUT_DIR [--lora] [--processes N] [--kill_after N]`.
"""

import argparse
import os
import signal

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
from tiny import tiny_phantoms, tiny_pipeline

from msrl_diffusers import SliceFeatureExtractor
from msrl_diffusers.trainers.base import checkpoints, read_log
from msrl_diffusers.trainers.frechet_config import FrechetConfig
from msrl_diffusers.trainers.frechet_trainer import FrechetTrainer


pytestmark = pytest.mark.slow
SAMPLES, STEPS = 8, 4
FORWARDS_PER_STEP = (
    3 + 2 + 2 * 3 * 2 + 2 * (2 + 2)
)  # a rollout; the watchdog; divergence and update, in two parts each


class Recording(RecordsGradients, FrechetTrainer):
    """It keeps its gradients."""


def kill_after(count: int) -> None:
    """Make this process kill itself at the `count`-th forward of the denoiser."""
    unet = type(tiny_pipeline().unet)
    forward = unet.forward

    def counted(*arguments, **keywords):
        nonlocal count
        count -= 1
        if count <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(*arguments, **keywords)

    unet.forward = counted


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kill_after", type=int)
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    if options.kill_after:
        kill_after(options.kill_after)
    share = SAMPLES // options.processes
    args = FrechetConfig(
        output_dir=options.output_dir, report_to="none", max_steps=STEPS, learning_rate=1e-3, rollout_batch_size=share,
        train_batch_size=share // 2, num_inference_steps=3, gradient_steps=2, queue_batches=2, eval_steps=2,
        eval_batches=1, prior_weight=1.0, kl_budget=1e6, ema_decay=0.9, save_steps=1, resume_from_checkpoint="latest",
        use_lora=options.lora, lora_rank=2,
    )  # fmt: skip
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    extractor = SliceFeatureExtractor(block_out_channels=(8, 8), num_features=3, num_slices=3)
    trainer = Recording(pipeline, {"label": extractor}, tiny_phantoms(4), args)
    trainer.train()
    save_outcome(trainer, options.output_dir)


@pytest.fixture(scope="module", params=[[], ["--lora"]], ids=["full", "lora"])
def runs(request, tmp_path_factory):
    """Folders of the same run by one process, by two, and by one that is killed twice."""
    folder = tmp_path_factory.mktemp("runs")
    for name, processes in (("one", 1), ("two", 2)):
        finish(__file__, folder / name, *request.param, processes=processes)
    before_steps = 2 * (2 + 1) * 3  # two queues of two batches, and one batch that is judged
    for count in (before_steps + FORWARDS_PER_STEP + 5, FORWARDS_PER_STEP + 9):
        die(__file__, folder / "killed", *request.param, "--kill_after", count)
        assert checkpoints(folder / "killed")
    finish(__file__, folder / "killed", *request.param)
    return folder


def test_two_processes_give_the_distances_and_gradients_of_one(runs):
    one, two = (read_log(runs / name) for name in ("one", "two"))
    assert len(one) == len(two) == STEPS
    figures = ("frechet/loss", "frechet/label", "frechet/kl", "frechet/prior", "watch/high_frequency")
    assert_same_figures(runs / "one", runs / "two", figures)
    assert two[3]["watch/fresh_frechet"] == pytest.approx(one[3]["watch/fresh_frechet"], rel=1e-3)
    assert_same_gradients(runs / "one", runs / "two")


def test_a_run_that_was_killed_ends_with_the_same_weights(runs):
    assert_ended_alike(runs / "one", runs / "killed")


if __name__ == "__main__":
    main()
