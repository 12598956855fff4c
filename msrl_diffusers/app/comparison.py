"""Volumes of several pipelines from the same noise, with all that a request asks for checked."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..errors import InputError
from ..pipelines.med_volume import MedVolumePipeline
from ..seeding import sample_generators
from .volume_files import decode_checked, file_stems, nifti_bytes


MAX_STEPS = 100
MIN_GUIDANCE, MAX_GUIDANCE = 0.1, 10.0
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class MadeVolume:
    """A generated volume.

    Attributes:
        title (`str`): by which pipeline.
        file_name (`str`): for the one who downloads it; made of the class, the seed and the pipeline.
        content (`bytes`): of the `.nii.gz` file.
    """

    title: str
    file_name: str
    content: bytes


class Comparison:
    """Pipelines of the same classes and the same grid, run one after the other from the same noise.

    Volume and seed are those of `msrl generate --num_volumes 1`.

    Args:
        pipelines (`dict[str, MedVolumePipeline]`): by title.

    Raises:
        InputError: pipelines that can't be compared.
    """

    def __init__(self, pipelines: Mapping[str, MedVolumePipeline]):
        self.pipelines = dict(pipelines)
        first, *others = self.pipelines.values()
        for other in others:
            for name in ("id2label", "latent_shape", "spacing"):
                one, two = getattr(first, name), getattr(other, name)
                if one != two:
                    raise InputError(
                        f"The two pipelines have unequal {name}, {one} and {two}; give a pipeline and its tuned version."
                    )
        self.id2label = first.id2label
        self.max_steps = min(
            MAX_STEPS, *(pipeline.scheduler.config.num_train_timesteps for pipeline in self.pipelines.values())
        )
        self._stems = file_stems(self.id2label)
        self._lock = threading.Lock()  # a scheduler remembers where it is

    @property
    def class_names(self) -> list[str]:
        """The classes, by their labels."""
        return [self.id2label[label] for label in sorted(self.id2label)]

    def to(self, device: torch.device | str) -> None:
        """Move the pipelines."""
        for pipeline in self.pipelines.values():
            pipeline.to(device)

    def generate(
        self,
        class_name: str,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        eta: float = 1.0,
        seed: int = 0,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[MadeVolume]:
        """One volume of every pipeline (one per channel), from the same noise.

        Args:
            class_name: one of `class_names`.
            num_inference_steps: 1 .. `max_steps`.
            guidance_scale: 0.1 .. 10; 1 is none (at 0 a volume would be of no class).
            eta: 0 .. 1.
            seed: 0 .. 2^31 - 1.
            on_step: told after every denoising step how many are done, and of how many.

        Raises:
            InputError: a value that is not within these limits, or a volume that is not finite.
        """
        if not isinstance(class_name, str) or class_name not in self.class_names:
            raise InputError(f"class must be one of {self.class_names}.")
        steps = _whole("steps", num_inference_steps, 1, self.max_steps)
        seed = _whole("seed", seed, 0, MAX_SEED)
        guidance = _number("guidance", guidance_scale, MIN_GUIDANCE, MAX_GUIDANCE)
        eta = _number("eta", eta, 0.0, 1.0)
        made = []
        with self._lock:
            for number, (title, pipeline) in enumerate(self.pipelines.items()):

                def told(_, step: int, timestep, tensors: dict, done: int = number * steps) -> dict:
                    if on_step is not None:
                        on_step(done + step + 1, steps * len(self.pipelines))
                    return tensors

                latents = pipeline(
                    class_name,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    eta=eta,
                    generator=sample_generators(seed, "generated", [0]),
                    output_type="latent",
                    callback_on_step_end=told,
                ).volumes
                made += self._files(decode_checked(pipeline, latents)[0], title, class_name, seed)
        return made

    def _files(self, volume: torch.Tensor, title: str, class_name: str, seed: int) -> list[MadeVolume]:
        """The images of a volume, one per channel."""
        label = {name: label for label, name in self.id2label.items()}[class_name]
        arm = file_stems({0: title})[0]
        spacing = next(iter(self.pipelines.values())).spacing
        made = []
        for channel, image in enumerate(volume):
            which = f", channel {channel}" if len(volume) > 1 else ""
            suffix = f"-channel{channel}" if channel else ""
            name = f"{self._stems[label]}-{seed}-{arm}{suffix}.nii.gz"
            made.append(MadeVolume(f"{title}{which}", name, nifti_bytes(image[None], spacing)))
        return made


def _number(name: str, value, low: float, high: float) -> float:
    """`value` if it is a number in `low .. high`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{name} must be a number in {low:g} .. {high:g}.")
    return float(value)


def _whole(name: str, value, low: int, high: int) -> int:
    """`value` if it is a whole number in `low .. high`; pages send 5 as 5.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{name} must be a whole number in {low} .. {high}.")
    return value
