"""RewardTrainer: regression of a reward model on volumes with targets from FID (arXiv 2603.06173, section 3.2).

Volumes are split by source subject: a noised reconstruction keeps its subject's identity, so a random split would let
the model recognise subjects. The figure to watch is the rank correlation on subjects it never saw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import nn
from torchmetrics.functional.regression import spearman_corrcoef

from ..errors import InputError
from ..models.reward_models import SliceRewardModel, is_conditional, pessimistic_score, scores_of
from ..seeding import batch_indices, fold_seed, generator_for
from .augmentation import augment_volumes, draw_slices
from .base import TrainingRun, in_fast_memory_format, thaw
from .reward_config import RewardConfig


@dataclass(frozen=True)
class ScoredVolumes:
    """Reward data: `pixel_values [N, C, D, H, W]` in [-1, 1], `targets [N]` in [0, 1], `subject_ids`, `weights [N]`,
    positive, in the loss (1 for all by default), and `class_labels [N]`, which only conditional reward models need.

    Samples of a policy show no subject: give each noise an id of its own, and samples of one noise the same.
    """

    pixel_values: torch.Tensor
    targets: torch.Tensor
    subject_ids: list[str]
    weights: torch.Tensor | None = None
    class_labels: torch.Tensor | None = None

    def __post_init__(self):
        N = len(self.targets)
        if not len(self.pixel_values) == len(self.subject_ids) == N or any(
            each is not None and tuple(each.shape) != (N,) for each in (self.weights, self.class_labels)
        ):
            raise InputError(
                f"Reward data needs a volume, a subject and perhaps a weight and a class for each of {N} targets."
            )
        if self.weights is not None and not ((self.weights > 0) & torch.isfinite(self.weights)).all():
            raise InputError("Weights of reward data must be positive; leave out the volumes that should not count.")

    def __len__(self) -> int:
        return len(self.targets)

    @classmethod
    def cat(cls, parts: Sequence["ScoredVolumes"]) -> "ScoredVolumes":
        """The volumes of all parts, in that order; those of a part without weights weigh 1 beside others' weights.

        Raises:
            InputError: no parts, volumes of different shape, or classes of some parts only.
        """
        if not parts:
            raise InputError("There is no reward data to join; give one part or more.")
        shapes = {tuple(part.pixel_values.shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise InputError(f"Reward data can be joined if all volumes have one shape, got {sorted(shapes)}.")
        weights = None
        if any(part.weights is not None for part in parts):
            weights = torch.cat([torch.ones(len(p)) if p.weights is None else p.weights.float() for p in parts])
        labels = [part.class_labels for part in parts if part.class_labels is not None]
        if labels and len(labels) < len(parts):
            raise InputError(
                "Some of the reward data to join states classes and some does not; give class_labels to all."
            )
        return cls(
            torch.cat([part.pixel_values for part in parts]),
            torch.cat([part.targets for part in parts]),
            [subject for part in parts for subject in part.subject_ids],
            weights,
            torch.cat(labels) if labels else None,
        )

    def weighted(self, weight: float) -> "ScoredVolumes":
        """The same volumes, each `weight` times as heavy in the loss: of one source beside others."""
        weights = torch.ones(len(self)) if self.weights is None else self.weights
        return replace(self, weights=weights * weight)

    def select(self, rows: torch.Tensor) -> "ScoredVolumes":
        """The volumes at `rows`, int64, in that order."""
        return ScoredVolumes(
            self.pixel_values[rows],
            self.targets[rows],
            [self.subject_ids[i] for i in rows.tolist()],
            None if self.weights is None else self.weights[rows],
            None if self.class_labels is None else self.class_labels[rows],
        )

    def split_by_subject(self, fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, int64, of training and validation volumes; `fraction` of the subjects go to the second."""
        return self._split(self._validation_subjects(fraction, seed))

    def split_beside(self, first: "ScoredVolumes", fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, int64, of training and validation volumes of data that came later than `first`.

        Subjects of `first` stay on the side where `first.split_by_subject(fraction, seed)` has them. The side of any other
        follows from its id and the seed alone, so that it stays the same however much is added.
        """
        known, chosen = set(first.subject_ids), first._validation_subjects(fraction, seed)
        for subject in set(self.subject_ids) - known:
            if fold_seed(seed, "validation subject", subject) < fraction * 2**63:
                chosen.add(subject)
        return self._split(chosen)

    def _validation_subjects(self, fraction: float, seed: int) -> set[str]:
        subjects = sorted(set(self.subject_ids))
        if len(subjects) < 2:
            raise InputError(f"Reward data of {len(subjects)} subjects can't be split; at least two are needed.")
        order = torch.randperm(len(subjects), generator=generator_for(seed, "validation subjects")).tolist()
        count = min(max(1, round(fraction * len(subjects))), len(subjects) - 1)  # someone to train on is left
        return {subjects[i] for i in order[:count]}

    def _split(self, validation_subjects: set[str]) -> tuple[torch.Tensor, torch.Tensor]:
        inside = torch.tensor([subject in validation_subjects for subject in self.subject_ids])
        return (~inside).nonzero()[:, 0], inside.nonzero()[:, 0]


class RewardTrainer:
    """Trains `model`, a network from volumes to scores `[B]`; `train()` returns its validation figures.

    Training goes on from the weights that the model has, be they fresh or those of an earlier training: a reward that a
    policy has learned to exploit is refreshed with `additional` data, scored samples of that policy, beside all of the
    first. A frozen model (one that serves as a reward) is trained and frozen again.

    An ensemble (`num_heads` above 1 in the model's config) is trained by the mean loss of its heads. Each sees the subjects
    under weights of its own, drawn from the exponential distribution (the Bayesian bootstrap, Rubin 1981): by subject,
    since the volumes of one are no independent draws.

    Args:
        model: a `VolumeRewardModel`, a `SliceRewardModel`, or any network from volumes to scores `[B]`.
        args: the settings; a refresh needs an `output_dir` of its own, or it resumes the training before.
        dataset: the reward data; the split by subject is made on it.
        additional: data that came later. Subjects stay on their side of the split; those validation figures that a
            training without it has stay on the same volumes, and `added_validation_*` stand beside them.

    Raises:
        InputError: reward data of one subject, or without classes for a conditional model, or additional data of which
            nothing would be trained on.
    """

    def __init__(
        self, model: nn.Module, args: RewardConfig, dataset: ScoredVolumes, additional: ScoredVolumes | None = None
    ):
        self.model = in_fast_memory_format(model, args.mixed_precision)
        self.args, self.conditional = args, is_conditional(model)
        if self.conditional and dataset.class_labels is None:
            raise InputError("A conditional reward model (num_classes) needs reward data with class_labels.")
        train, validation = dataset.split_by_subject(args.validation_fraction, args.seed)
        # rows in place of volumes: a side is most of the data, which may fill the memory as they are
        self.data, self.train_rows, self.eval_rows = dataset, train, {"validation": validation}
        if additional is not None:
            added, added_validation = additional.split_beside(dataset, args.validation_fraction, args.seed)
            if not len(added):
                raise InputError(
                    f"All {len(additional)} additional volumes are of validation subjects; add volumes of others."
                )
            self.data = ScoredVolumes.cat([dataset, additional])
            self.train_rows = torch.cat([train, added + len(dataset)])
            if len(added_validation):
                self.eval_rows["added_validation"] = added_validation + len(dataset)
        config = getattr(model, "config", None)
        config = config if isinstance(config, Mapping) else {}  # those of transformers are no mappings
        self.num_heads, self.spread_penalty = config.get("num_heads", 1), config.get("spread_penalty", 0.0)
        self.weights = self._loss_weights()

    def train(self) -> dict[str, float]:
        """Run the training; returns the figures of `evaluate()`."""
        args, run = self.args, TrainingRun(self.args, f"reward {type(self.model).__name__}")
        frozen = thaw(self.model)
        optimizer = run.optimizer(self.model.parameters())
        scheduler = run.lr_scheduler(optimizer, args.max_steps // args.gradient_accumulation_steps)
        model, optimizer, scheduler = run.accelerator.prepare(self.model, optimizer, scheduler)
        run.resume()
        model.train()
        for step in run.steps():
            batch_size = args.train_batch_size * run.accelerator.num_processes
            numbers = run.shard(batch_indices(len(self.train_rows), batch_size, args.seed, step))
            generator = generator_for(args.seed, "augment", step, run.accelerator.process_index)
            volumes = self.data.pixel_values[self.train_rows[numbers]].to(run.device, torch.float32)
            volumes = augment_volumes(volumes, generator, args.max_shift, args.noise_level, args.max_gain)
            if args.slices_per_volume and isinstance(self.model, SliceRewardModel):
                volumes = draw_slices(volumes, args.slices_per_volume, self.model.config.empty_threshold, generator)
            with run.accelerator.accumulate(model):
                loss = self._loss(model, volumes, numbers)
                run.accelerator.backward(loss)
                if run.accelerator.sync_gradients:
                    run.clip_gradients(model.parameters())
                optimizer.step()
                optimizer.zero_grad()
            if run.accelerator.sync_gradients:
                scheduler.step()
            run.record(loss=loss)
        run.finish()
        self.model = run.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
        for buffer in self.model.buffers():  # running statistics are of each process' own batches since the last step
            broadcast(buffer)
        if frozen:
            self.model.requires_grad_(False)
        return self.evaluate()

    def _loss(self, model: nn.Module, volumes: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """The squared error of the training volumes of these numbers; of several heads or volumes of unequal weight, the mean over
        heads of the weighted one."""
        data, rows = self.data, self.train_rows[numbers]
        targets = data.targets[rows].to(volumes.device)
        classes = {"class_labels": data.class_labels[rows].to(volumes.device)} if self.conditional else {}
        if self.weights is None:
            return F.mse_loss(model(volumes, **classes), targets)
        if self.num_heads > 1:
            scores = model(volumes, return_heads=True, **classes)
        else:
            scores = model(volumes, **classes)[:, None]
        weights = self.weights[numbers].to(volumes.device)
        errors = (scores - targets[:, None]).square()
        return ((weights * errors).sum(dim=0) / weights.sum(dim=0)).mean()

    def _loss_weights(self) -> torch.Tensor | None:
        """Weights `[N, heads]` of the training volumes; None where there is one head and all weigh the same."""
        data, rows = self.data, self.train_rows
        if self.num_heads == 1 and data.weights is None:
            return None
        weights = torch.ones(len(rows)) if data.weights is None else data.weights[rows].float()
        if self.num_heads == 1 or not self.args.bootstrap_heads:
            return weights[:, None].repeat(1, self.num_heads)
        subjects = [data.subject_ids[row] for row in rows.tolist()]
        drawn = {
            subject: torch.empty(self.num_heads).exponential_(
                generator=generator_for(self.args.seed, "bootstrap heads", subject)
            )
            for subject in set(subjects)
        }
        return weights[:, None] * torch.stack([drawn[subject] for subject in subjects])

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and Spearman rank correlation on the validation subjects, and on the training subjects beside them.

        With additional data, `added_validation_*` are those of its validation subjects, if it has any. Of an ensemble the
        loss is that of the heads' mean, the correlation that of the score, and `*_spread` the mean deviation of the heads.
        """
        self.model.eval()
        results = {}
        for name, rows in {"train": self.train_rows, **self.eval_rows}.items():
            targets = self.data.targets[rows]
            if self.num_heads > 1:
                by_head = self._scores(rows, return_heads=True)
                results[f"{name}_spread"] = by_head.std(dim=1, correction=0).mean().item()
            else:
                by_head = self._scores(rows)[:, None]
            scores = pessimistic_score(by_head, self.spread_penalty)
            results[f"{name}_loss"] = F.mse_loss(by_head.mean(dim=1), targets).item()
            results[f"{name}_spearman"] = spearman_corrcoef(scores, targets).item()
        return results

    def _scores(self, rows: torch.Tensor, **kwargs) -> torch.Tensor:
        data, scores = self.data, []
        for part in rows.split(32):  # these alone are copied
            labels = None if data.class_labels is None else data.class_labels[part]
            scores.append(scores_of(self.model, data.pixel_values[part], labels, **kwargs).cpu())
        return torch.cat(scores)
