"""Reward data nobody had to label: synthetic trajectories and noised reconstructions, scored by their FID.

(arXiv 2603.06173, sections 3.1 and 3.2.) For the noise of the scores to stay small, every set is made from the same
training volumes and the same noise seeds: sample i of every set belongs to training volume i.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from .data.volumes import VolumeDataset
from .evaluation.features import extract_features
from .evaluation.fidelity import frechet_distance
from .functional.targets import reward_targets
from .pipelines.med_volume import MedVolumePipeline
from .pipelines.sampling import without_progress_bar
from .precision import autocast
from .seeding import sample_generators


RECONSTRUCTION_GRID = 100


@dataclass(frozen=True)
class SetSpec:
    """One kind of trajectory: `"synthetic"` with `step` denoising steps, or `"reconstruction"` from noise step `step`
    of a grid of 100."""

    kind: str
    step: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.step:03d}"

    @property
    def unet_forwards(self) -> int:
        """Denoiser evaluations per sample without guidance; both kinds take `step`."""
        return self.step


def set_specs(synthetic_steps: Sequence[int], reconstruction_steps: Sequence[int]) -> list[SetSpec]:
    """All sets of a study, reconstructions first."""
    return [SetSpec("reconstruction", step) for step in reconstruction_steps] + [
        SetSpec("synthetic", step) for step in synthetic_steps
    ]


def sample_set(
    pipeline: MedVolumePipeline,
    volumes: VolumeDataset,
    spec: SetSpec,
    seed: int,
    batch_size: int = 32,
    guidance_scale: float = 1.0,
    eta: float = 1.0,
    mixed_precision: str = "no",
    progress: tqdm | None = None,
) -> VolumeDataset:
    """The set `spec`, one sample per volume of `volumes`, with its class and its subject's id.

    A synthetic sample shows no subject; its id names the noise it came from, and splits go by it all the same.
    """
    samples, device = [], pipeline.device
    for indices in torch.arange(len(volumes)).split(batch_size):
        batch = volumes.batch(indices, device)
        settings = {
            "class_labels": batch["class_labels"],
            "guidance_scale": guidance_scale,
            "eta": eta,
            "generator": sample_generators(seed, "trajectory", indices.tolist()),
        }
        with without_progress_bar(pipeline), autocast(device, mixed_precision):
            if spec.kind == "synthetic":
                output = pipeline(num_inference_steps=spec.step, **settings)
            else:
                output = pipeline.reconstruct(
                    batch["pixel_values"], spec.step, num_inference_steps=RECONSTRUCTION_GRID, **settings
                )
        samples.append(output.volumes.half().cpu())
        if progress is not None:
            progress.update(len(indices) * spec.unet_forwards)
    return VolumeDataset(
        torch.cat(samples), volumes.class_labels, volumes.subject_ids, volumes.id2label, volumes.spacing
    )


def score_set(extractor, real: VolumeDataset, fake: VolumeDataset) -> dict[str, float]:
    """FID of a set against the training volumes, by class name and for `"all"`."""
    real_features = extract_features(extractor, real.pixel_values)
    fake_features = extract_features(extractor, fake.pixel_values)
    return frechet_by_class(real_features, real, fake_features, fake)


def frechet_by_class(
    real_features: torch.Tensor, real: VolumeDataset, fake_features: torch.Tensor, fake: VolumeDataset
) -> dict[str, float]:
    """FID by class name and for `"all"`, of features that are already there."""
    distances = {"all": frechet_distance(real_features, fake_features)}
    for label, name in real.id2label.items():
        rows, fake_rows = real.class_labels == label, fake.class_labels == label
        distances[name] = frechet_distance(real_features[rows], fake_features[fake_rows])
    return distances


def set_targets(
    scores: dict[str, dict[str, float]], class_names: Sequence[str], target_map: str = "linear"
) -> dict[str, dict[str, float]]:
    """Reward targets by set name and class name, from FIDs `scores[set][class]`.

    The scale from worst to best is taken within each class: classes differ in FID for reasons that are no quality
    (their own variety), and the advantage is relative to the class anyway.
    """
    by_class = {
        name: reward_targets({set_name: fids[name] for set_name, fids in scores.items()}, target_map)
        for name in class_names
    }
    return {set_name: {name: by_class[name][set_name] for name in class_names} for set_name in scores}
