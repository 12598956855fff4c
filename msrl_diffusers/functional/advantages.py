"""From rewards to advantages."""

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
