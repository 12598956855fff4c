"""How unsure rewards are of a sample: where their heads, or they themselves, part."""

from collections.abc import Mapping, Sequence

import torch

from ..errors import InputError
from ..models.reward_models import scores_of
from ..rewards.base import Reward, WeightedSum


def check_can_be_unsure(reward: WeightedSum) -> None:
    """Raise InputError unless `reward_uncertainty` has something to compare."""
    if len(reward.rewards) < 2 and not any(_num_heads(part) > 1 for part in reward.rewards):
        raise InputError(
            "kl_gate_quantile needs rewards that can be unsure: one with several heads (num_heads of the reward model), or "
            "two rewards."
        )


@torch.no_grad()
def reward_uncertainty(
    reward: WeightedSum,
    samples: torch.Tensor,
    scores: dict[str, torch.Tensor],
    conditions: Sequence | torch.Tensor | None = None,
) -> torch.Tensor:
    """Uncertainty `[B]`, at least 0, of the rewards of `samples [B, C, *S]`, in deviations of the reference policy's rewards;
    `conditions [B]` are the class labels, for rewards that want them.

    Of ensembles it is the standard deviation over the heads, summed over the rewards by their weights. Without any it is
    the standard deviation over the rewards, each standardized, whose raw values are `scores` by name: two that saw other
    sides of the same data agree where these data reach (gated divergence: GARDO, arXiv 2512.24138).
    """
    if any(_num_heads(part) > 1 for part in reward.rewards):
        total = torch.zeros(len(samples))
        for part, weight in zip(reward.rewards, reward.weights, strict=True):
            if _num_heads(part) > 1:
                heads = scores_of(part.model, samples, conditions, part.batch_size, return_heads=True)
                total += abs(weight) * heads.std(dim=1, correction=0).cpu() / max(reward.scales[part.name].std, 1e-6)
        return total.to(samples.device)
    standardised = [reward.scales[name].standardise(values) for name, values in scores.items()]
    return torch.stack(standardised, dim=1).std(dim=1, correction=0)


def _num_heads(part: Reward) -> int:
    config = getattr(getattr(part, "model", None), "config", None)
    return config.get("num_heads", 1) if isinstance(config, Mapping) else 1  # that of a transformers model is none
