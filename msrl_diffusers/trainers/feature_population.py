"""Populations of features: the queue of what a policy sampled last, and the networks."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from ..errors import InputError
from ..evaluation.features import extract_features, extractor_identity
from ..functional.frechet import FrechetTarget, frechet_loss
from .base import TrainingRun
from .real_side import RealSide


QUEUE_FILE = "feature_queue.safetensors"


class Features(NamedTuple):
    """Of some samples: `values {extractor: [N, P, S, F]}` and the numbers of their classes, `groups [N]`."""

    values: dict[str, torch.Tensor]
    groups: torch.Tensor

    @staticmethod
    def cat(parts: Sequence["Features"]) -> "Features":
        """Those of several batches."""
        values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
        return Features(values, torch.cat([part.groups for part in parts]))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Features":
        """With every tensor changed."""
        return Features({name: change(value) for name, value in self.values.items()}, change(self.groups))


class FeatureQueue:
    """Features of the last `size` rollouts of each sampler, by its number; the same in all processes, and in checkpoints."""

    def __init__(self, size: int):
        self.size, self._batches = size, {}

    def push(self, sampler: int, batch: Features) -> None:
        """Add a rollout's, and drop the oldest over `size`."""
        self._batches[sampler] = [*self._batches.get(sampler, []), batch][-self.size :]

    def population(self, sampler: int, batch: Features | None = None) -> Features:
        """All that is there, with `batch` at the end."""
        return Features.cat(self._batches[sampler] + ([] if batch is None else [batch]))

    def keep_with(self, run: TrainingRun) -> None:
        """Save it in the checkpoints of `run`, as safetensors, and load it from one that is resumed."""

        def save(models, weights, folder) -> None:
            if run.is_main:
                save_file(self._tensors(), Path(folder) / QUEUE_FILE)

        def load(models, folder) -> None:
            path = Path(folder) / QUEUE_FILE
            if not path.is_file():
                raise InputError(f"{folder} has no {QUEUE_FILE}: it is no checkpoint of a FrechetTrainer.")
            self._take(load_file(path, device=str(run.device)))

        run.accelerator.register_save_state_pre_hook(save)
        run.accelerator.register_load_state_pre_hook(load)

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for sampler, batches in self._batches.items():
            for place, batch in enumerate(batches):
                tensors[f"{sampler}/{place}/groups"] = batch.groups.contiguous()
                for name, values in batch.values.items():
                    tensors[f"{sampler}/{place}/features/{name}"] = values.contiguous()
        return tensors

    def _take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        found: dict[tuple[int, int], dict] = {}
        for key, value in tensors.items():
            sampler, place, name = key.split("/", 2)
            found.setdefault((int(sampler), int(place)), {})[name] = value
        self._batches = {}
        for (sampler, _), parts in sorted(found.items()):
            groups = parts.pop("groups")
            values = {name.removeprefix("features/"): value for name, value in parts.items()}
            self.push(sampler, Features(values, groups))


class Representations:
    """Networks from samples to features, and the distances to the real side in each of them.

    Args:
        extractors: from samples `[B, C, *S]` in [-1, 1] to features `[B, P, S, F]`, by name.
        weights: one per extractor; equal by default.

    Raises:
        InputError: no extractors, or another number of weights.
    """

    def __init__(self, extractors: Mapping[str, nn.Module], weights: Sequence[float] | None = None):
        self._extractors = dict(extractors)
        if not self._extractors:
            raise InputError("A Frechet distance needs one extractor or more, by name.")
        weights = [1.0] * len(extractors) if weights is None else weights
        if len(weights) != len(extractors):
            raise InputError(f"{len(extractors)} extractors need as many extractor_weights, got {len(weights)}.")
        self._weights = {name: weight / sum(weights) for name, weight in zip(extractors, weights, strict=True)}
        self._targets: dict[str, list[FrechetTarget]] = {}

    @property
    def networks(self) -> list[nn.Module]:
        return list(self._extractors.values())

    @property
    def identity(self) -> dict[str, dict[str, str]]:
        """Who measures, by name: a distance means nothing without it."""
        return {name: extractor_identity(extractor) for name, extractor in self._extractors.items()}

    def fit(self, real: RealSide, batch_size: int, run: TrainingRun) -> None:
        """Take the statistics of the real volumes, on the device of the run."""
        for name, extractor in self._extractors.items():
            extractor.to(run.device)
            batches = tqdm(real.pixel_values.split(batch_size), desc=f"real features, {name}", disable=not run.is_main)
            features = torch.cat([extract_features(extractor, batch, batch_size) for batch in batches])
            if features.ndim != 4:
                raise InputError(
                    f"The extractor {name!r} must give [B, P, S, F], with axes of planes and slices; got {list(features.shape)}."
                )
            chosen = [real.class_labels == label for label in real.classes] or [slice(None)]
            targets = [FrechetTarget.of(features[rows]) for rows in chosen]
            self._targets[name] = [FrechetTarget(*(part.to(run.device) for part in target)) for target in targets]

    def extract(self, samples: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features `[B, P, S, F]` of `samples [B, C, *S]` by extractor, in its own precision, as those of the real side."""
        return {
            name: extractor(samples.to(next(extractor.parameters()).dtype))
            for name, extractor in self._extractors.items()
        }

    def distances(self, features: Features) -> dict[str, torch.Tensor]:
        """The distance `[]` to the real side by extractor; infinite where features are not finite.

        Raises:
            InputError: too few samples of a class.
        """
        if not all(torch.isfinite(values).all() for values in features.values.values()):
            return {name: torch.tensor(math.inf) for name in features.values}
        try:
            return {
                name: frechet_loss(self._targets[name], values, features.groups)
                for name, values in features.values.items()
            }
        except ValueError as error:
            raise InputError(
                "Some class has too few samples for a covariance; raise queue_batches, eval_batches or num_rollout_batches."
            ) from error

    @torch.no_grad()
    def floats(self, features: Features) -> dict[str, float]:
        """The distances as plain numbers."""
        return {name: distance.item() for name, distance in self.distances(features).items()}

    def relative(self, distances: Mapping, scales: Mapping[str, float]) -> torch.Tensor | float:
        """The weighted mean of distances, each divided by that of the pretrained policy in `scales`."""
        return sum(weight * distances[name] / max(scales[name], 1e-12) for name, weight in self._weights.items())
