"""A short PPO run in a process of its own, for the tests that kill it and the tests that split it over processes.

    python ppo_run.py OUTPUT_DIR [--lora] [--kill_at MOMENT COUNT] [--processes N] [--without_reduction] [--fsdp]

Writes `OUTPUT_DIR/final.safetensors` and, per process, `OUTPUT_DIR/gradients-RANK.safetensors` of every update.
"""

import argparse
import os
import signal

import torch
from accelerate import Accelerator, DistributedType
from launching import RecordsGradients, save_outcome
from tiny import Brightness, tiny_phantoms, tiny_pipeline

from msrl_diffusers import DiffusionPPOConfig, DiffusionPPOTrainer, FrechetWatchdog, SliceFeatureExtractor
from msrl_diffusers.processes import process_state
from msrl_diffusers.trainers.base import TrainingRun


SAMPLES = 8


def die_at(moment: str, count: int) -> None:
    """Make this process kill itself at the `count`-th forward of the denoiser ("forward", in a rollout or an update),
    inside a checkpoint ("saving": its files are written, its name is not final) or between two ("saved")."""

    def counted(function):
        def call(*arguments, **keywords):
            nonlocal count
            result = function(*arguments, **keywords)
            count -= 1
            if count <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    if moment == "forward":
        unet = type(tiny_pipeline().unet)
        unet.forward = counted(unet.forward)
    elif moment == "saving":
        Accelerator.save_state = counted(Accelerator.save_state)
    else:
        TrainingRun.save_checkpoint = counted(TrainingRun.save_checkpoint)


def shard_on_cpu() -> None:
    """FSDP 2 over gloo. Accelerate takes it up for accelerators only; all that stands in the way is the name of the
    distributed type, from which it goes on to FSDP by the very same code."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
                      FSDP_TRANSFORMER_CLS_TO_WRAP="ResnetBlock", FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT")  # fmt: skip
    process_state().distributed_type = DistributedType.MULTI_GPU


class Recording(RecordsGradients, DiffusionPPOTrainer):
    """PPO that keeps its gradients."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kill_at", nargs=2)
    parser.add_argument("--without_reduction", action="store_true")
    parser.add_argument("--fsdp", action="store_true")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    if options.kill_at:
        die_at(options.kill_at[0], int(options.kill_at[1]))
    if options.fsdp:
        shard_on_cpu()
    share = SAMPLES // options.processes
    args = DiffusionPPOConfig(
        output_dir=options.output_dir, report_to="none", max_steps=options.steps, learning_rate=1e-3, kl_coef=0.1,
        rollout_batch_size=share // 2, num_rollout_batches=2, train_batch_size=share // 2, num_updates=2,
        num_inference_steps=3, save_steps=1, resume_from_checkpoint="latest", use_lora=options.lora, lora_rank=2,
        ema_decay=None if options.fsdp else 0.9, kl_mode="adaptive", sde_window=2, mixed_precision="no",
    )  # fmt: skip
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    extractor = SliceFeatureExtractor(block_out_channels=(8, 8), num_features=3, num_slices=3)
    watchdogs = {
        "bright": lambda rollout: rollout.samples.mean().item(),
        "frechet": FrechetWatchdog(extractor, tiny_phantoms(3)),  # a rollout has four of a class
    }
    trainer = Recording(pipeline, Brightness(), args, watchdogs=watchdogs, select_by="bright")
    if options.without_reduction:  # what a trainer does that calls the unwrapped denoiser
        sample = trainer._sample

        def bypass(run, scoring, table, step):
            trainer.policy.denoiser = run.accelerator.unwrap_model(trainer.policy.denoiser)
            return sample(run, scoring, table, step)

        trainer._sample = bypass
    trainer.train()
    save_outcome(trainer, options.output_dir)


if __name__ == "__main__":
    main()
