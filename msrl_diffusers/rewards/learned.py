"""LearnedReward: a reward model as a reward."""

from collections.abc import Sequence

import torch
from torch import nn

from ..models.reward_models import scores_of


class LearnedReward:
    """The score of a reward model (`VolumeRewardModel`, `SliceRewardModel`), frozen, in micro-batches.

    Args:
        name: how it is called in logs and reports.
        model: a network from samples to scores `[B]`.
        batch_size: samples scored at once.
    """

    differentiable = True

    def __init__(self, name: str, model: nn.Module, batch_size: int = 32):
        self.name, self.batch_size = name, batch_size
        self.model = model.eval().requires_grad_(False)

    def __call__(self, samples: torch.Tensor, conditions: Sequence | torch.Tensor) -> torch.Tensor:
        """Scores `[B]`, float32, of `samples [B, C, *S]` in [-1, 1], on the model's device. Conditions are class labels; they
        matter to a conditional model alone."""
        return scores_of(self.model, samples, conditions, self.batch_size)
