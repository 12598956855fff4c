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
    high = (detached > 1 + clip_range) & (advantages > 0)
    low = (detached < 1 - clip_range) & (advantages < 0)
    return loss, _statistics(detached, high, low)


def kl_mask_loss(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    kl_to_old: torch.Tensor,
    kl_threshold: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The surrogate without a clip; samples whose step has left the trust region and moves on outward are left out.

    The trust region is the closed-form divergence `kl_to_old [B]` from the policy of the rollout, averaged over elements
    (Flow-DPPO, arXiv 2606.11025), and means the same in any dimension, where a clipped ratio leans to one side.
    Statistics as those of `ppo_clip_loss`.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    detached, outside = ratio.detach(), kl_to_old.detach() >= kl_threshold
    high, low = outside & (detached > 1) & (advantages > 0), outside & (detached < 1) & (advantages < 0)
    loss = -(ratio * advantages * ~(high | low)).mean()
    return loss, _statistics(detached, high, low)


def adapted_kl_coef(kl_coef: float, kl: float, kl_target: float, rate: float = 0.1) -> float:
    """The weight of the divergence for the next rollout: raised where `kl` is above its target, lowered where it is below
    (Ziegler et al., arXiv 1909.08593, section 2.2; `rate` is their K)."""
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + rate * error)


def _statistics(ratio: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "ratio_mean": ratio.mean(),
        "ratio_deviation": (ratio - 1).square().mean().sqrt(),
        "clip_fraction": (high | low).float().mean(),
        "clip_fraction_high": high.float().mean(),
        "clip_fraction_low": low.float().mean(),
    }
