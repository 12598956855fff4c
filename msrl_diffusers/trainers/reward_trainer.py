"""RewardTrainer: regression of a reward model on volumes with targets from FID (arXiv 2603.06173, section 3.2).

Volumes are split by source subject: a noised reconstruction keeps its subject's identity, so a random split would let
the model recognise subjects. The figure to watch is the rank correlation on subjects it never saw.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional.regression import spearman_corrcoef

from ..errors import InputError
from ..seeding import batch_indices, generator_for
from .augmentation import augment_volumes
from .base import TrainingRun, channels_last
from .reward_config import RewardConfig


@dataclass(frozen=True)
class ScoredVolumes:
    """Reward data: `pixel_values [N, C, D, H, W]` in [-1, 1], `targets [N]` in [0, 1], `subject_ids`."""

    pixel_values: torch.Tensor
    targets: torch.Tensor
    subject_ids: list[str]

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, rows: torch.Tensor) -> "ScoredVolumes":
        return ScoredVolumes(self.pixel_values[rows], self.targets[rows], [self.subject_ids[i] for i in rows.tolist()])

    def split_by_subject(self, fraction: float, seed: int) -> tuple["ScoredVolumes", "ScoredVolumes"]:
        """Training and validation volumes; `fraction` of the subjects go to the second."""
        subjects = sorted(set(self.subject_ids))
        if len(subjects) < 2:
            raise InputError(f"Reward data of {len(subjects)} subjects can't be split; at least two are needed.")
        order = torch.randperm(len(subjects), generator=generator_for(seed, "validation subjects")).tolist()
        chosen = {subjects[i] for i in order[: max(1, round(fraction * len(subjects)))]}
        inside = torch.tensor([subject in chosen for subject in self.subject_ids])
        return self.select((~inside).nonzero()[:, 0]), self.select(inside.nonzero()[:, 0])


class RewardTrainer:
    """Trains `model`, a network from volumes to scores `[B]`; `train()` returns its validation figures."""

    def __init__(self, model: nn.Module, args: RewardConfig, dataset: ScoredVolumes):
        self.model, self.args = channels_last(model), args
        self.train_dataset, self.eval_dataset = dataset.split_by_subject(args.validation_fraction, args.seed)

    def train(self) -> dict[str, float]:
        """Run the training; returns the figures of `evaluate()`."""
        args, run = self.args, TrainingRun(self.args, f"reward {type(self.model).__name__}")
        optimizer = run.optimizer(self.model.parameters())
        scheduler = run.lr_scheduler(optimizer, args.max_steps // args.gradient_accumulation_steps)
        model, optimizer, scheduler = run.accelerator.prepare(self.model, optimizer, scheduler)
        run.resume()
        model.train()
        for step in run.steps():
            batch_size = args.train_batch_size * run.accelerator.num_processes
            rows = run.shard(batch_indices(len(self.train_dataset), batch_size, args.seed, step))
            generator = generator_for(args.seed, "augment", step, run.accelerator.process_index)
            volumes = self.train_dataset.pixel_values[rows].to(run.device, torch.float32)
            volumes = augment_volumes(volumes, generator, args.max_shift, args.noise_level)
            with run.accelerator.accumulate(model):
                loss = F.mse_loss(model(volumes), self.train_dataset.targets[rows].to(run.device))
                run.accelerator.backward(loss)
                if run.accelerator.sync_gradients:
                    run.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if run.accelerator.sync_gradients:
                scheduler.step()
            run.record(loss=loss)
        run.finish()
        self.model = run.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
        return self.evaluate()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and Spearman rank correlation on the validation subjects, and on the training subjects beside them."""
        self.model.eval()
        results = {}
        for name, data in (("train", self.train_dataset), ("validation", self.eval_dataset)):
            scores = score_volumes(self.model, data.pixel_values)
            results[f"{name}_loss"] = F.mse_loss(scores, data.targets).item()
            results[f"{name}_spearman"] = spearman_corrcoef(scores, data.targets).item()
        return results


@torch.no_grad()
def score_volumes(model: nn.Module, volumes: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """Scores `[N]` of `volumes [N, C, D, H, W]`, on the CPU."""
    parameter = next(model.parameters())
    batches = (batch.to(parameter.device, parameter.dtype) for batch in volumes.split(batch_size))
    return torch.cat([model(batch).float().cpu() for batch in batches])
