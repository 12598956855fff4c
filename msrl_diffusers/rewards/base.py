"""What a reward is, and how several are joined."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import InputError


class Reward(Protocol):
    """`(samples [B, C, *S] in [-1, 1], conditions [B]) -> [B]` float32; higher is better; finite, or it raises.

    Conditions are what the trainer was given: class labels (an int64 tensor) or prompts (a list of strings). A reward with
    an attribute `takes_metadata = True` is called with one entry of metadata per sample as a third argument.
    """

    name: str
    differentiable: bool

    def __call__(self, samples: torch.Tensor, conditions: Sequence | torch.Tensor) -> torch.Tensor:
        """Rewards `[B]`."""


def checked(
    reward: Reward,
    samples: torch.Tensor,
    conditions: Sequence | torch.Tensor,
    metadata: Sequence[Mapping] | None = None,
) -> torch.Tensor:
    """The rewards of `reward`, float32 on the samples' device, with their shape and finiteness checked.

    Raises:
        ValueError: wrong shape, NaN or infinity; the sentence names the reward.
    """
    if getattr(reward, "takes_metadata", False):
        values = reward(samples, conditions, metadata or [{}] * len(samples))
    else:
        values = reward(samples, conditions)
    if tuple(values.shape) != (len(samples),):
        raise ValueError(f"Reward {reward.name!r} gave shape {tuple(values.shape)} for {len(samples)} samples.")
    if not torch.isfinite(values).all():
        raise ValueError(
            f"Reward {reward.name!r} gave {int((~torch.isfinite(values)).sum())} values that are not finite."
        )
    return values.to(samples.device, torch.float32)


ROUNDING = 1e-6  # spread over size of float32 values that differ by no more than their last digits


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of a reward on samples of the reference policy; the latter is 1 where the reward had no
    spread there but rounding: its scale is not known then, and a first hit later on must not outweigh all other rewards."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: torch.Tensor) -> "Scale":
        """That of `values [B]`."""
        mean, std = values.double().mean().item(), values.double().std().item()
        return cls(mean, 1.0 if std <= ROUNDING * values.abs().max().item() else std)

    def standardise(self, values: torch.Tensor) -> torch.Tensor:
        """`values` in deviations from the mean."""
        return (values - self.mean) / max(self.std, 1e-6)


class WeightedSum:
    """A weighted sum of rewards, each brought to zero mean and unit deviation on the reference policy's samples first:
    without it the reward of largest spread rules (arXiv 2603.06173 leaves the weights open; 0.5 and 0.5 here).

    Args:
        rewards: the parts.
        weights: one per part; equal and summing to 1 by default.
        scales: one `Scale` per name of a part; set by `fit` where not given.

    Raises:
        InputError: no reward, two of one name, or not one weight per reward.
    """

    name = "weighted_sum"
    takes_metadata = True

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float] | None = None,
        scales: Mapping[str, Scale] | None = None,
    ):
        if not rewards:
            raise InputError("A weighted sum needs at least one reward.")
        self.rewards = list(rewards)
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise InputError(f"Rewards need different names, got {names}.")
        self.weights = list(weights) if weights is not None else [1 / len(self.rewards)] * len(self.rewards)
        if len(self.weights) != len(self.rewards):
            raise InputError(f"{len(self.rewards)} rewards need as many weights, got {len(self.weights)}.")
        self.scales = dict(scales or {})

    @property
    def differentiable(self) -> bool:
        """Whether gradients pass to the samples through every part."""
        return all(reward.differentiable for reward in self.rewards)

    def parts(
        self,
        samples: torch.Tensor,
        conditions: Sequence | torch.Tensor,
        metadata: Sequence[Mapping] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Raw rewards `[B]` by name."""
        return {reward.name: checked(reward, samples, conditions, metadata) for reward in self.rewards}

    def fit(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Take the scale of every part from its values on the reference policy's samples."""
        self.scales = {name: Scale.of(values) for name, values in parts.items()}

    def combine(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum `[B]` of raw rewards, standardised.

        Raises:
            ValueError: the scales are not known yet.
        """
        total = 0
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            if reward.name not in self.scales:
                raise ValueError(
                    f"The scale of reward {reward.name!r} is unknown; call fit on reference samples first."
                )
            total = total + weight * self.scales[reward.name].standardise(parts[reward.name])
        return total

    def __call__(
        self,
        samples: torch.Tensor,
        conditions: Sequence | torch.Tensor,
        metadata: Sequence[Mapping] | None = None,
    ) -> torch.Tensor:
        """The weighted sum `[B]`, float32, for `samples [B, C, *S]` in [-1, 1]. `metadata`, one entry per sample, goes to the
        parts that take it.

        Raises:
            ValueError: the scales are not known yet.
        """
        return self.combine(self.parts(samples, conditions, metadata))
