"""Rewards: from samples and their conditions to one number per sample, higher is better."""

from .base import Reward, WeightedSum, checked
from .forms import DDPOReward, as_ddpo_reward, as_reward
from .learned import LearnedReward


__all__ = ["DDPOReward", "LearnedReward", "Reward", "WeightedSum", "as_ddpo_reward", "as_reward", "checked"]
