"""Reward backpropagation: what carries the gradient of a reward from samples to a denoiser.

Shape letters: B batch, C channels, D axial slices, H and W axes of a slice, *S spatial axes.
"""

import torch


def late_steps(num_steps: int, fraction: float) -> range:
    """The last `fraction` of `num_steps` denoising steps, at least one: those from which ReFL draws the step that it trains
    (arXiv 2304.05977, algorithm 1, where they are steps 30 to 40 of 40: before them a predicted sample says little)."""
    return range(num_steps - max(1, round(fraction * num_steps)), num_steps)


def reparametrized(mean: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The recorded `state [B, C, *S]` of a Gaussian step with the gradient of its `mean`: what lies between them is the
    noise, a constant (so DRaFT differentiates through sampling, arXiv 2309.17400)."""
    return mean + (state - mean).detach()


def clip_per_sample(gradients: torch.Tensor, max_norm: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`gradients [B, ...]` shortened to `max_norm` each (`None`: as they are), and their norms `[B]` before that.

    One sample whose reward is steep, as those are that exploit it, then moves the weights no more than another.
    """
    norms = gradients.flatten(1).norm(dim=1)
    if max_norm is None:
        return gradients, norms
    factors = (max_norm / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1)
    return gradients * factors.view(-1, *[1] * (gradients.ndim - 1)), norms


def surrogate_loss(latents: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """A loss `[]` whose gradient is that of minus the mean reward, given the rewards' `gradients [B, C, *S]` by `latents`.

    The chain rule, cut at the latents (the gradient cache of arXiv 2101.06983): decoder and reward networks need
    not be in memory together with the denoiser. Its value means nothing.
    """
    return -(latents * gradients.detach()).flatten(1).sum(dim=1).mean()


def random_slices(volumes: torch.Tensor, counting: torch.Tensor, keys: torch.Tensor, count: int) -> torch.Tensor:
    """A random subset of the axial slices of each of `volumes [B, C, D, H, W]`, in their order, as volumes
    `[B, C, min(count, D), H, W]`.

    `counting [B, D]` says which slices a reward looks at, `keys [B, D]` are uniform random numbers in [0, 1). Slices that
    count come first, so that the mean over those chosen has the mean over all that count as its expectation.
    """
    B, C, _, H, W = volumes.shape
    places = (keys + (~counting).to(keys)).argsort(dim=1)[:, :count].sort(dim=1).values
    return volumes.gather(2, places.view(B, 1, -1, 1, 1).expand(B, C, places.shape[1], H, W))
