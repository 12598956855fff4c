"""Runs of a trainer, recorded, started in processes of their own or interrupted, and what they leave."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import differing

from msrl_diffusers.trainers.base import TrainingRun, read_log


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


@contextmanager
def interrupted_when_saving() -> Iterator[None]:
    """Within it a training of this process is interrupted, and must be, right after its first checkpoint."""
    save_checkpoint = TrainingRun.save_checkpoint

    def save_and_die(run):
        save_checkpoint(run)
        raise KeyboardInterrupt

    with patch.object(TrainingRun, "save_checkpoint", save_and_die), pytest.raises(KeyboardInterrupt):
        yield


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


def finish(script: str | Path, *arguments, processes: int = 1) -> None:
    """As `launch`; the run must end well."""
    done = launch(script, *arguments, processes=processes)
    assert done.returncode == 0, done.stderr


def die(script: str | Path, *arguments) -> None:
    """As `launch`; the run must be killed."""
    killed = launch(script, *arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def assert_ended_alike(one: Path, other: Path) -> None:
    """Two runs left the same final weights, bit for bit, and the same log but for the seconds."""
    assert differing(*(load_file(folder / "final.safetensors") for folder in (one, other))) == []
    logs = [
        [{name: value for name, value in line.items() if name != "seconds"} for line in read_log(folder)]
        for folder in (one, other)
    ]
    assert logs[0] == logs[1]


def assert_same_figures(one: Path, other: Path, figures: Iterable[str], rel: float = 1e-3, abs: float = 1e-5) -> None:
    """Two runs logged the same of these figures in every step, within `rel` and `abs` of `pytest.approx`."""
    logs = [read_log(folder) for folder in (one, other)]
    for figure in figures:
        first, second = ([line[figure] for line in log] for log in logs)
        assert second == pytest.approx(first, rel=rel, abs=abs), figure


def assert_same_gradients(one: Path, two: Path) -> None:
    """A run of two processes had the same gradients in both, and those of a run of one to 1e-3 of their largest element."""
    single = load_file(one / "gradients-0.safetensors")
    ranks = [load_file(two / f"gradients-{rank}.safetensors") for rank in (0, 1)]
    assert differing(*ranks) == []
    for parameter, gradient in single.items():
        atol = 1e-6 + 1e-3 * gradient.abs().max().item()
        torch.testing.assert_close(ranks[0][parameter], gradient, rtol=1e-3, atol=atol, msg=parameter)
