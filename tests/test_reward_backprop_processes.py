"""Reward backpropagation split over processes, against the same run by one: gradients to 1e-3 of their largest element, for sums
over samples come in another order.

The file is the script that the tests start, too:

    python test_reward_backprop_processes.py OUTPUT_DIR --variant VARIANT [--lora] [--processes N] [--without_reduction]

It writes, per process, `OUTPUT_DIR/gradients-RANK.safetensors` of every update.
"""

import argparse
import os

import pytest
import torch
from backprop_run import Recording, config, slice_reward
from launching import assert_same_figures, assert_same_gradients, finish
from safetensors.torch import load_file, save_file
from tiny import Brightness, differing, tiny_pipeline

from msrl_diffusers.trainers.base import read_log


pytestmark = pytest.mark.slow
SAMPLES = 8


@pytest.fixture(
    scope="module", params=[["draft"], ["draft_lv", "--lora"], ["refl"]], ids=["draft", "draft_lv-lora", "refl"]
)
def runs(request, tmp_path_factory):
    """Folders of the same run by one process, by two, and by two whose gradients are not reduced."""
    folder = tmp_path_factory.mktemp("runs")
    for name, processes, extra in (("one", 1, []), ("two", 2, []), ("unreduced", 2, ["--without_reduction"])):
        finish(__file__, folder / name, "--variant", *request.param, *extra, processes=processes)
    return folder


def test_two_processes_give_the_rewards_and_gradients_of_one(runs):
    assert [len(read_log(runs / name)) for name in ("one", "two")] == [3, 3]
    # standardized rewards are about 1 apart; the divergence is that of a few small updates
    figures = {"reward/mean": 1e-3, "draft/loss": 1e-3, "draft/trained_reward": 1e-3, "reward/slice": 1e-6,
               "draft/reward_grad_norm": 1e-6, "draft/kl": 1e-9}  # fmt: skip
    for figure, absolute in figures.items():
        assert_same_figures(runs / "one", runs / "two", [figure], rel=5e-3, abs=absolute)
    assert_same_gradients(runs / "one", runs / "two")


def test_without_reduction_the_processes_part(runs):
    """What this guards against: a trainer that calls the denoiser itself, not the module accelerate prepared."""
    ranks = [load_file(runs / f"unreduced/gradients-{rank}.safetensors") for rank in (0, 1)]
    assert differing(*ranks)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--without_reduction", action="store_true")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    share = SAMPLES // options.processes
    args = config(
        options.output_dir, variant=options.variant, gradient_steps=2 if options.variant == "draft" else 1, max_steps=3,
        rollout_batch_size=share // 2, train_batch_size=share // 2, num_inference_steps=3, kl_coef=0.1, num_slices=4,
        reward_grad_clip=100.0, use_lora=options.lora, lora_rank=2, ema_decay=0.9,
    )  # fmt: skip
    trainer = Recording(tiny_pipeline(), [slice_reward(), Brightness()], args)
    if options.without_reduction:
        sample = trainer._sample

        def bypass(run, *arguments):
            trainer.policy.denoiser = run.accelerator.unwrap_model(trainer.policy.denoiser)
            return sample(run, *arguments)

        trainer._sample = bypass
    trainer.train()
    gradients = {
        f"{update}.{name}": value.contiguous()
        for update, found in enumerate(trainer.gradients)
        for name, value in found.items()
    }
    save_file(gradients, f"{options.output_dir}/gradients-{os.environ.get('RANK', '0')}.safetensors")


if __name__ == "__main__":
    main()
