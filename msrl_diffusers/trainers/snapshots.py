"""Snapshots of the weights along a run, at about equal steps of the square root of its divergence from the pretrained model.

Over-optimization is a function of that distance (Gao et al., arXiv 2210.10760): a run of many rollouts may stand still, and
one of few may go far. Nothing is measured here; what the weights are worth is found after the training, so that no judge
has a part in it.
"""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from ..files import write_json


FOLDER = "snapshots"
SMALLEST_SPACING = 2.0**-20  # of the square root of the divergence; far under that of a single update


@dataclass(frozen=True)
class Snapshot:
    """Weights after so many rollouts and their updates, the square root of the divergence that the run reported then, and
    whether they were due by the number of rollouts alone."""

    rollout: int
    sqrt_kl: float
    is_due: bool = False

    @property
    def name(self) -> str:
        return f"rollout-{self.rollout:05d}.safetensors"


class SnapshotCallback(TrainerCallback):
    """Writes what is trained (all weights, or the LoRA adapter) to `output_dir/snapshots`, for any trainer that logs a
    figure `.../kl` and takes callbacks.

    How far a run will go is not known before. So weights are kept whenever the divergence has passed the next multiple of a
    spacing, and the spacing is doubled whenever there are more than twice as many as wanted; what then stands between its
    multiples is deleted. As what a run reports of its divergence is noisy, weights are also kept after equal numbers of
    rollouts. They are the trained weights, without averages: those that sample the next rollout, but for DiffusionNFT, which
    samples from its old policy.

    Args:
        output_dir: that of the trainer.
        num_points: how many snapshots are wanted; there are up to three times as many, and the last weights.
    """

    def __init__(self, output_dir: str | Path, num_points: int):
        self.folder, self.num_points = Path(output_dir) / FOLDER, num_points
        self.spacing, self.snapshots, self._sqrt_kl, self._interval = SMALLEST_SPACING, [], 0.0, 1

    def on_train_begin(self, args, state, control, model=None, resumed_from=None, **kwargs) -> None:
        """Take up the snapshots of a run that is resumed, from the folder it lies in; later ones are of a part that is done again."""
        self._interval = max(1, state.max_steps // self.num_points)
        source = self.folder if resumed_from is None else Path(resumed_from) / FOLDER
        self.spacing, found = _read(source) if state.global_step else (SMALLEST_SPACING, [])
        self.snapshots = [snapshot for snapshot in found if snapshot.rollout <= state.global_step]
        if state.is_world_process_zero:
            if source.resolve() != self.folder.resolve():
                self.folder.mkdir(parents=True, exist_ok=True)
                for snapshot in self.snapshots:
                    shutil.copyfile(source / snapshot.name, self.folder / snapshot.name)
            self._write()

    def on_log(self, args, state, control, model=None, logs=None, **kwargs) -> None:
        """After a rollout: keep the weights if they are due."""
        divergences = [value for name, value in (logs or {}).items() if name.endswith("/kl") and math.isfinite(value)]
        self._sqrt_kl = max(divergences[0], 0.0) ** 0.5 if divergences else 0.0
        is_due = state.global_step % self._interval == 0
        reached = max((_mark(snapshot, self.spacing) for snapshot in self.snapshots), default=0)
        if int(self._sqrt_kl / self.spacing) <= reached and not is_due:
            return
        self._take(state, model, is_due)
        while sum(not snapshot.is_due for snapshot in self.snapshots) > 2 * self.num_points:
            self.spacing *= 2
            self.snapshots = _passing(self.snapshots, self.spacing)
        if state.is_world_process_zero:
            self._write()

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        """The last weights, wherever they stand."""
        if not self.snapshots or self.snapshots[-1].rollout != state.global_step:
            self._take(state, model, is_due=True)
        if state.is_world_process_zero:
            self._write()

    def _take(self, state, model: torch.nn.Module, is_due: bool) -> None:
        """All processes put sharded weights together; the first one writes them."""
        weights = {}
        for name, value in model.named_parameters():
            if value.requires_grad:
                value = value.detach()
                value = value.full_tensor() if hasattr(value, "full_tensor") else value
                weights[name] = value.cpu().clone(memory_format=torch.contiguous_format)
        snapshot = Snapshot(state.global_step, self._sqrt_kl, is_due)
        self.snapshots.append(snapshot)
        if state.is_world_process_zero:
            path = self.folder / snapshot.name
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(weights, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)

    def _write(self) -> None:
        """The list; files that are not on it go."""
        rows = [asdict(snapshot) for snapshot in self.snapshots]
        write_json(self.folder / "snapshots.json", {"spacing": self.spacing, "snapshots": rows})
        wanted = {snapshot.name for snapshot in self.snapshots}
        for path in self.folder.glob("rollout-*.safetensors"):
            if path.name not in wanted:
                path.unlink()


def read_snapshots(output_dir: str | Path) -> list[Snapshot]:
    """The snapshots of a training in the order of its rollouts; none where it took none."""
    return _read(Path(output_dir) / FOLDER)[1]


def choose_snapshots(snapshots: list[Snapshot], num_points: int) -> list[Snapshot]:
    """Those nearest to `num_points` equal steps of the square root of the divergence up to the largest, and the last one."""
    if not snapshots:
        return []
    farthest = max(snapshot.sqrt_kl for snapshot in snapshots)
    marks = [farthest * number / num_points for number in range(1, num_points + 1)]
    chosen = {min(snapshots, key=lambda snapshot: abs(snapshot.sqrt_kl - mark)) for mark in marks}
    return sorted(chosen | {snapshots[-1]}, key=lambda snapshot: snapshot.rollout)


def _read(folder: Path) -> tuple[float, list[Snapshot]]:
    path = folder / "snapshots.json"
    if not path.is_file():
        return SMALLEST_SPACING, []
    content = json.loads(path.read_text())
    found = [Snapshot(**row) for row in content["snapshots"]]
    return content["spacing"], [snapshot for snapshot in found if (folder / snapshot.name).is_file()]


def _mark(snapshot: Snapshot, spacing: float) -> int:
    return int(snapshot.sqrt_kl / spacing)


def _passing(snapshots: list[Snapshot], spacing: float) -> list[Snapshot]:
    """The first snapshot beyond each multiple of `spacing`, and those that were due. Multiples of the doubled spacing are
    multiples of the single one, so what is kept does not depend on when it was doubled, nor on a resume in between."""
    kept, reached = [], 0
    for snapshot in snapshots:
        if _mark(snapshot, spacing) > reached or snapshot.is_due:
            kept.append(snapshot)
            reached = max(reached, _mark(snapshot, spacing))
    return kept
