"""Sets of volumes on the command line: folders of NIfTI, prepared files, or what a pipeline samples."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import InputError
from ..evaluation.sources import VolumeSource, check_kind, open_source
from ..models.loading import load_model
from ..pipelines.med_volume import MedVolumePipeline
from ..pipelines.sampling import sample_volumes


SET = "folder of NIfTI images, or .safetensors file of prepared volumes"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass
class SetArguments:
    """How sets of volumes are read, and how a pipeline is sampled where one is given instead."""

    image_size: int | None = field(
        default=None, metadata={"help": "Resample NIfTI images to cubes of so many voxels; their own grid if unset."}
    )
    field_of_view: float = field(default=192.0, metadata={"help": "Edge of these cubes in millimetres."})
    batch_size: int = field(default=16, metadata={"help": "Volumes read, or sampled, at once."})
    seed: int = field(default=0, metadata={"help": "Of all that is drawn: samples, subsets, bootstrap."})
    num_volumes: int = field(
        default=256,
        metadata={
            "help": "Volumes that a pipeline samples: classes in turn; by msrl evaluate as often as REAL has them, if it names them."
        },
    )
    num_inference_steps: int = field(default=25, metadata={"help": "Its denoising steps."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Its guidance; 1 is none, 0 is without class."})
    eta: float = field(default=1.0, metadata={"help": "Its noise: 0 is DDIM, 1 as much as DDPM."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit, if it is a Hub repository."})
    variant: str | None = field(default=None, metadata={"help": "Variant of its weights' files, such as fp16."})

    def __post_init__(self):
        for name in ("batch_size", "num_volumes", "num_inference_steps", "field_of_view", "image_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be positive, got {value}.")
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta is 0 to 1, got {self.eta}.")


def open_set(place: str, args: SetArguments) -> VolumeSource:
    """The set of real volumes at `place`."""
    return open_source(place, args.image_size, args.field_of_view)


def open_generated(
    place: str, args: SetArguments, output_dir: str | Path, real: VolumeSource, in_proportion: bool = False
) -> VolumeSource:
    """The set at `place`; if that is a pipeline (a folder or a Hub repository), its samples, which are kept in
    `output_dir/generated.safetensors`: classes in turn, or `in_proportion` to those of `real`, if the pipeline has these.

    Raises:
        InputError: what can't be read or sampled; before a pipeline samples, also volumes that don't compare with `real`.
    """
    if not is_pipeline(place):
        return open_set(place, args)
    pipeline = load_model(MedVolumePipeline, place, dtype=torch.float32, revision=args.revision, variant=args.variant)
    longest = pipeline.scheduler.config.num_train_timesteps
    if args.num_inference_steps > longest:
        raise InputError(f"num_inference_steps is at most {longest} with {place}, got {args.num_inference_steps}.")
    check_kind(real, place, pipeline.volume_shape, pipeline.config.spacing)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    shares = class_shares(pipeline.id2label, real.class_names if in_proportion else None)
    volumes = sample_volumes(
        pipeline, args.num_volumes, args.num_inference_steps, args.guidance_scale, args.eta, args.seed, args.batch_size,
        class_labels=labels_in_proportion(shares, args.num_volumes),
    )  # fmt: skip
    path = Path(output_dir) / "generated.safetensors"
    volumes.save(path)
    return open_source(path)


def class_shares(id2label: Mapping[int, str], class_names: Sequence[str] | None) -> dict[int, int]:
    """How many of `class_names` have each label; 1 of every label where there are no names, or names of other classes."""
    counts = Counter(class_names)
    if not counts or not set(counts) <= set(id2label.values()):
        return dict.fromkeys(sorted(id2label), 1)
    return {label: counts[id2label[label]] for label in sorted(id2label)}


def labels_in_proportion(shares: Mapping[int, int], num_labels: int) -> list[int]:
    """Labels as often as their shares say, in any first part of them too; of equal shares in turn."""
    total, drawn, labels = sum(shares.values()), Counter(), []
    for position in range(1, num_labels + 1):
        label = max(shares, key=lambda label: shares[label] * position - drawn[label] * total)
        drawn[label] += 1
        labels.append(label)
    return labels


def is_pipeline(place: str) -> bool:
    """Whether `place` is a folder with a pipeline, or can only be a Hub repository."""
    if Path(place).exists():
        return (Path(place) / "model_index.json").is_file()
    return bool(HUB_ID.fullmatch(place))
