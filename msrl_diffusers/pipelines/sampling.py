"""Sets of volumes from a pipeline: many, of all classes, each with noise of its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tqdm import tqdm

from ..data.volumes import VolumeDataset
from ..errors import InputError
from ..seeding import sample_generators
from .med_volume import MedVolumePipeline


@contextmanager
def without_progress_bar(pipeline: MedVolumePipeline) -> Iterator[None]:
    """The pipeline shows no bar of its own within; then it is configured as before."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


@torch.no_grad()
def sample_volumes(
    pipeline: MedVolumePipeline,
    num_volumes: int,
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
    eta: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
    class_labels: Sequence[int] | None = None,
) -> VolumeDataset:
    """`num_volumes` volumes, classes in turn or of so many `class_labels`; volume i is a function of `seed`, i and its class,
    whatever `batch_size` is.

    Raises:
        InputError: fewer than one volume, or another number of labels.
    """
    if num_volumes < 1:
        raise InputError(f"num_volumes must be at least 1, got {num_volumes}.")
    classes = sorted(pipeline.id2label)
    if class_labels is None:
        class_labels = [classes[index % len(classes)] for index in range(num_volumes)]
    elif len(class_labels) != num_volumes:
        raise InputError(f"class_labels must be {num_volumes}, one for each volume, got {len(class_labels)}.")
    labels, samples = torch.tensor(class_labels), []
    bar = tqdm(total=num_volumes, desc="sample", unit="volume", disable=not progress)
    with without_progress_bar(pipeline), bar:
        for indices in torch.arange(num_volumes).split(batch_size):
            output = pipeline(
                labels[indices],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                eta=eta,
                generator=sample_generators(seed, "generated", indices.tolist()),
            )
            samples.append(output.volumes.half().cpu())
            bar.update(len(indices))
    names = [f"generated-{index:05d}" for index in range(num_volumes)]
    return VolumeDataset(torch.cat(samples), labels, names, pipeline.id2label, pipeline.spacing)
