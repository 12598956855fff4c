"""From rewards to advantages, and to where more samples tell most."""

from collections.abc import Sequence

import torch


def normalize_advantages(
    rewards: torch.Tensor, groups: torch.Tensor, clip: float = 5.0, epsilon: float = 1e-6
) -> torch.Tensor:
    """`(reward - mean of its group) / global standard deviation`, clipped, `[B]` float32.

    `groups [B]` numbers the condition of each sample: classes differ in reward, and their difference must not be
    learned. The deviation is that of the centred rewards of all groups, so that a group whose rewards hardly differ
    is not blown up. Computed in float64; rewards that are all equal give zeros.
    """
    rewards = rewards.double()
    _, groups = torch.unique(groups, return_inverse=True)
    sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64, device=rewards.device).index_add_(
        0, groups, rewards
    )
    centred = rewards - (sums / torch.bincount(groups))[groups]
    deviation = centred.square().mean().sqrt()
    return (centred / (deviation + epsilon)).clamp(-clip, clip).float()


def allocate_samples(deviations: Sequence[float], total: int, floor: float = 0.25) -> list[int]:
    """How many of `total` samples each group gets: in proportion to the standard deviation of its rewards (Neyman's
    allocation, by which a sum over groups has the least variance), but at least the share `floor` of an equal part, so
    that a group that gets worse again is seen. Numbers are rounded so that their sum is `total`; equal deviations give
    equal parts, as do ones that are all zero.
    """
    weights = torch.as_tensor(deviations, dtype=torch.float64)
    if weights.sum() == 0:
        weights = torch.ones_like(weights)
    equal = total / len(weights)
    shares = floor * equal + (1 - floor) * total * weights / weights.sum()
    counts = shares.floor()
    remainder = total - int(counts.sum())
    counts[(shares - counts).argsort(descending=True, stable=True)[:remainder]] += 1
    return counts.long().tolist()
