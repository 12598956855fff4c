"""DenoisingPolicy: what rollouts and trainers ask of a pipeline."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class Conditioning:
    """Keyword arguments of the denoiser, by its own names: `{"class_labels": [B]}`, `{"encoder_hidden_states": ...}`.

    `negative` is the unconditional counterpart that guidance needs; `None` where there is none.
    """

    positive: dict[str, torch.Tensor]
    negative: dict[str, torch.Tensor] | None = None

    def select(self, rows: slice | torch.Tensor) -> "Conditioning":
        """The conditioning of some of the samples."""
        negative = self.negative and {name: value[rows] for name, value in self.negative.items()}
        return Conditioning({name: value[rows] for name, value in self.positive.items()}, negative)

    def to(self, device: torch.device | str) -> "Conditioning":
        """All of it on `device`."""
        negative = self.negative and {name: value.to(device) for name, value in self.negative.items()}
        return Conditioning({name: value.to(device) for name, value in self.positive.items()}, negative)

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """One conditioning of several batches."""
        join = lambda dicts: {name: torch.cat([one[name] for one in dicts]) for name in dicts[0]}  # noqa: E731
        negatives = [part.negative for part in parts]
        return Conditioning(join([part.positive for part in parts]), None if None in negatives else join(negatives))


class DenoisingPolicy(Protocol):
    """A denoiser as a stochastic policy: state (x_t, t, condition), action x_{t-1}.

    `denoiser` is the only trainable part; a trainer may put its wrapped form in its place. `scheduler` has the DDIM steps that
    are the actions; `sampler` makes finished samples where nobody asks for actions.
    """

    denoiser: nn.Module
    scheduler: object
    sampler: object
    latent_shape: tuple[int, ...]

    def encode(self, conditions: Sequence) -> Conditioning:
        """Conditioning of a list of class labels or prompts."""

    def predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> torch.Tensor:
        """Model output `[B, C, *S]`, guidance inside: the same code when sampling and when training."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Samples `[B, C, *S]` in [-1, 1] of final latents."""

    def reference(self) -> AbstractContextManager:
        """Within it, `predict` is the pretrained model: adapters off under LoRA, otherwise a frozen copy."""

    def frozen_copy(self) -> nn.Module:
        """A copy of the reference, in one piece."""


POLICIES = {
    "MedVolumePipeline": "volume.VolumePolicy",
    "StableDiffusionPipeline": "stable_diffusion.StableDiffusionPolicy",
}


def make_policy(pipeline) -> DenoisingPolicy:
    """The policy of a pipeline, by the name of its class.

    Raises:
        ValueError: no policy for this class.
    """
    name = type(pipeline).__name__
    if name not in POLICIES:
        raise ValueError(f"There is no policy for {name}; known are {sorted(POLICIES)}. A policy is one small file.")
    module, attribute = POLICIES[name].split(".")
    return getattr(import_module(f".{module}", __package__), attribute)(pipeline)
