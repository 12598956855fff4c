"""Reward refresh: now and then the policy's own samples are labelled, join the reward data, and the reward models train on.

A policy moves to where its rewards were never fitted. Here, unlike with human feedback, the label of any set of samples is
free at any time: its Frechet distance by the label extractor.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import InputError
from ..evaluation.set_labels import SetLabeler
from ..rollouts import Rollout
from .base import TrainingRun, check_tracker, in_fast_memory_format
from .base_config import check_positive
from .reward_config import RewardConfig
from .reward_trainer import RewardTrainer, ScoredVolumes
from .scoring import Scoring


FOLDER = "refresh"


@dataclass
class RefreshConfig(RewardConfig):
    """Settings of `RewardRefresh`: when it comes, and how the reward models then train on, each for `max_steps` steps."""

    max_steps: int = field(default=300, metadata={"help": "Steps of each reward model per refresh."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of a refresh."})
    every: int = field(default=5, metadata={"help": "Rollouts between refreshes."})
    sample_weight: float = field(
        default=1.0, metadata={"help": "Weight of a sample of the policy in the loss; a first volume weighs 1."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "every")
        check_positive(self, "sample_weight")


class RewardRefresh:
    """Labels rollouts and refreshes the reward models that score them, in place.

    After every `args.every` rollouts the samples of that rollout get targets by `labeler` and join all earlier data; each
    model goes on from its weights (`RewardTrainer` with `additional`). Then the scales of the rewards are taken anew, from
    the first rollout, the pretrained policy's. What a refresh changed lies in `output_dir/refresh/ROLLOUT/`, as safetensors,
    and `run.state["refreshes"]` names the refreshes done, so a run that is resumed goes on exactly.

    Args:
        models: the models behind the rewards, by name.
        data: the reward data they were trained on.
        labeler: gives the targets.
        args: settings by name of the model; one `every` and one `sample_weight` for all. `seed` and `validation_fraction` should be those of the first
            training, so that subjects stay on their side of the split. Where output goes is not theirs to say.

    Raises:
        InputError: settings for other models, or of unequal `every` or `sample_weight`.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        data: ScoredVolumes,
        labeler: SetLabeler,
        args: Mapping[str, RefreshConfig],
    ):
        if set(args) != set(models) or len({(each.every, each.sample_weight) for each in args.values()}) != 1:
            raise InputError(
                f"A refresh needs settings for each of {sorted(models)} with one value of every and of sample_weight, got "
                f"{sorted(args)}."
            )
        for each in args.values():
            check_tracker(each)  # not after the rollouts before the first refresh
        # as training leaves them: a resumed run must not score in another memory format, which rounds otherwise
        self.models = {
            name: in_fast_memory_format(model, args[name].mixed_precision) for name, model in models.items()
        }
        self.data, self.labeler, self.args = data, labeler, dict(args)
        self.every = next(iter(args.values())).every
        self._added: list[ScoredVolumes] = []

    def resume(self, run: TrainingRun, scoring: Scoring) -> None:
        """Take up the refreshes that the resumed run has made; call it after `run.resume()`.

        Raises:
            InputError: sharded weights (FSDP), as which the reward models would be trained too; a rollout to come that can't be
                labelled; or a run that began without a refresh.
        """
        if run.accelerator.distributed_type == DistributedType.FSDP:
            raise InputError("With FSDP the reward models can't be trained on; leave out the refresh.")
        self._check_labels(run, scoring)
        for model in self.models.values():
            model.to(run.device)
        self._added = []
        if run.resumed_from.resolve() != run.output_dir.resolve() and (run.resumed_from / FOLDER).is_dir():
            if run.is_main:
                shutil.copytree(run.resumed_from / FOLDER, run.output_dir / FOLDER, dirs_exist_ok=True)
            run.accelerator.wait_for_everyone()
        if run.step and not self._reference(run).is_file():
            raise InputError(
                f"{self._reference(run)}, samples of the first rollout, is missing: the run that is resumed began without a refresh; "
                "leave it out, or start anew in another output_dir."
            )
        for step in run.state.get("refreshes", []):
            folder = self._folder(run, step)
            stored = load_file(folder / "samples.safetensors")
            self._added.append(self._scored(step, stored["samples"], stored["targets"], stored["labels"]))
        if self._added:
            for name, model in self.models.items():
                model.load_state_dict(load_file(folder / f"{name}.safetensors", device=str(run.device)))

    def step(self, run: TrainingRun, scoring: Scoring, rollout: Rollout, step: int, num_updates: int) -> bool:
        """After the `num_updates` updates of rollout number `step`: refresh if it is time. Returns whether it was. All processes
        take part."""
        due = self._comes_after(run, step) and not run.stopped
        if not due and step:
            return False
        numbers = [number for batch, _ in scoring.batches(step, num_updates) for number in batch]
        samples, labels = self._gathered(run, rollout, numbers)
        if step == 0:
            self._save(run, self._reference(run), {"samples": samples, "labels": labels})
        if due:
            found = self.labeler(samples, labels)
            self._added.append(self._scored(step, samples, found.targets, labels))
            self._train(run, step)
            self._keep(run, step, {"samples": samples, "labels": labels, "targets": found.targets})
            self._rescale(run, scoring)
            run.state.setdefault("refreshes", []).append(step)
            run.record(**{f"refresh/fid_{name}": value for name, value in found.fid.items()})
            run.record(**{f"refresh/target_{name}": value for name, value in found.quality.items()})
        return due

    def _comes_after(self, run: TrainingRun, step: int) -> bool:
        return (step + 1) % self.every == 0 and step + 1 < run.args.max_steps

    def _check_labels(self, run: TrainingRun, scoring: Scoring) -> None:
        """Refuse now what could not be labelled after many rollouts: classes are taken in turn, so all that is to come is known."""
        for step in filter(partial(self._comes_after, run), range(run.step, run.args.max_steps)):
            labels = scoring.conditions.take(scoring.rows(step, range(scoring.num_samples)))
            try:
                self.labeler.check(torch.tensor(labels))
            except InputError as error:
                raise InputError(
                    f"The refresh after rollout {step + 1} could not label its samples: {error} Make rollouts larger "
                    "(num_rollout_batches), give the labeler more volumes, or leave out the refresh."
                ) from error

    def _gathered(self, run: TrainingRun, rollout: Rollout, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples `[N, C, *S]` (float16, as volumes are kept) and classes `[N]` of all processes, in the order of their numbers."""
        gather, device = run.accelerator.gather, run.device
        order = gather(torch.tensor(numbers, device=device)).argsort()
        samples = gather(rollout.samples.to(device).half())[order]
        return samples.cpu().contiguous(), gather(rollout.conditions.to(device))[order].cpu()

    def _scored(self, step: int, samples: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor) -> ScoredVolumes:
        subjects = [f"rollout-{step}-{number}" for number in range(len(samples))]
        classes = None if self.data.class_labels is None else labels
        scored = ScoredVolumes(samples, targets, subjects, class_labels=classes)
        weight = next(iter(self.args.values())).sample_weight
        return scored if weight == 1.0 else scored.weighted(weight)

    def _train(self, run: TrainingRun, step: int) -> None:
        additional = ScoredVolumes.cat(self._added)
        for name, model in self.models.items():
            args = replace(
                self.args[name],
                output_dir=str(run.output_dir / FOLDER / "training" / f"{step:05d}-{name}"),
                save_steps=0,  # a refresh that was killed is made again, with the rollouts before it
                resume_from_checkpoint=None,
            )
            with _training_within():
                figures = RewardTrainer(model, args, self.data, additional).train()
            for figure in ("validation_spearman", "added_validation_spearman", "added_validation_loss"):
                if figure in figures:
                    run.record(**{f"refresh/{name}_{figure}": figures[figure]})

    def _keep(self, run: TrainingRun, step: int, stored: dict[str, torch.Tensor]) -> None:
        """Write what this refresh changed, whole or not at all."""
        folder = self._folder(run, step)
        temporary = folder.with_name(f".{folder.name}.tmp")
        if run.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(stored, temporary / "samples.safetensors")
            for name, model in self.models.items():
                weights = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
                save_file(weights, temporary / f"{name}.safetensors")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        run.accelerator.wait_for_everyone()

    def _rescale(self, run: TrainingRun, scoring: Scoring) -> None:
        """Standardize the refreshed rewards on the pretrained policy's samples."""
        samples = load_file(self._reference(run))["samples"].to(run.device)
        scoring.reward.fit(scoring.score(samples.float(), scoring.rows(0, range(len(samples)))))
        scoring.keep_scales()

    @staticmethod
    def _save(run: TrainingRun, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if run.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        run.accelerator.wait_for_everyone()

    @staticmethod
    def _reference(run: TrainingRun) -> Path:
        """Where the samples of the first rollout are."""
        return run.output_dir / FOLDER / "reference.safetensors"

    @staticmethod
    def _folder(run: TrainingRun, step: int) -> Path:
        return run.output_dir / FOLDER / f"{step:05d}"


@contextmanager
def _training_within() -> Iterator[None]:
    """Room for a training within another one: accelerate keeps precision and accumulation in one state per process, which
    the inner training would leave as it needs them."""
    kept = [(state._shared_state, dict(state._shared_state)) for state in (AcceleratorState, GradientState)]
    try:
        yield
    finally:
        for shared, values in kept:
            shared.clear()
            shared.update(values)
