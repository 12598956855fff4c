"""Runs of a trainer in processes of their own: recorded, started, and what they leave."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file


class RecordsGradients:
    """Put before a trainer's class: keeps the gradient of every update, before clipping, as `{"UPDATE.PARAMETER": tensor}`."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.gradients, self.num_recorded = {}, 0

    def _update(self, run, weights, *arguments):
        clip = run.accelerator.clip_grad_norm_

        def record(parameters, max_norm):
            for name, parameter in weights.trainable.items():
                gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
                self.gradients[f"{self.num_recorded}.{name}"] = gradient.clone(memory_format=torch.contiguous_format)
            self.num_recorded += 1
            return clip(parameters, max_norm)

        with patch.object(run.accelerator, "clip_grad_norm_", record):
            return super()._update(run, weights, *arguments)


def save_outcome(trainer, output_dir: str | Path) -> None:
    """Write `gradients-RANK.safetensors` of this process and, by the first one, `final.safetensors`."""
    rank = os.environ.get("RANK", "0")
    save_file(trainer.gradients, f"{output_dir}/gradients-{rank}.safetensors")
    if rank == "0":
        weights = {name: value.contiguous() for name, value in trainer.pipeline.unet.state_dict().items()}
        save_file(weights, f"{output_dir}/final.safetensors")


def environment() -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(script: str | Path, *arguments, processes: int = 1) -> subprocess.CompletedProcess:
    """Run a script, by torchrun and with `--processes N` where they are several."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        arguments = (*arguments, "--processes", processes)
    command += [str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment())
