"""Rewards: from samples and their conditions to one number per sample, higher is better."""

from .base import Reward, WeightedSum, checked
from .learned import LearnedReward


__all__ = ["LearnedReward", "Reward", "WeightedSum", "checked"]
