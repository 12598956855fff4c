"""Objectives: pure functions that return a loss and statistics to log."""

import math

import torch


def scaled_clip_range(clip_shift: float, num_elements: int, log_prob_reduction: str) -> float:
    """The clip range of the ratio for a policy mean that moved by `clip_shift` standard deviations (root mean square).

    Such a move changes the summed log-ratio of `d` elements by noise of standard deviation `clip_shift * sqrt(d)`, the
    averaged one by `clip_shift / sqrt(d)`. The published 1e-4 (DDPO, arXiv 2305.13301) is the averaged form at
    d = 4 x 64 x 64 and a shift of 0.0128; in other latent spaces the same number means something else.
    """
    if log_prob_reduction == "mean":
        return clip_shift / math.sqrt(num_elements)
    if log_prob_reduction == "sum":
        return clip_shift * math.sqrt(num_elements)
    raise ValueError(f"log_prob_reduction must be 'mean' or 'sum', got {log_prob_reduction!r}.")


def ppo_clip_loss(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate of PPO (arXiv 1707.06347, eq. 7), negated, averaged over `[B]`.

    Statistics: mean and deviation of the ratio, and the shares clipped from above and from below (in high dimensions
    the ratio leans to one side; a single clip fraction would hide it).
    """
    ratio = torch.exp(log_prob - old_log_prob)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = -torch.minimum(unclipped, clipped).mean()
    detached = ratio.detach()
    stats = {
        "ratio_mean": detached.mean(),
        "ratio_deviation": (detached - 1).square().mean().sqrt(),
        "clip_fraction_high": ((detached > 1 + clip_range) & (advantages > 0)).float().mean(),
        "clip_fraction_low": ((detached < 1 - clip_range) & (advantages < 0)).float().mean(),
    }
    return loss, stats
