"""Watchdogs: figures of a rollout that are logged and never trained on. A reward that rises hides what they show."""

from collections.abc import Mapping

import torch

from ..policies import DenoisingPolicy
from ..rollouts import Rollout, StepTable


@torch.no_grad()
def prediction_norm(policy: DenoisingPolicy, table: StepTable, rollout: Rollout, guidance_scale: float) -> float:
    """Root mean square of the denoiser's output in the middle of the trajectories, over that of the reference.

    Reinforcement learning inflates it by some percent before pictures are oversaturated (NormGuard, arXiv 2606.27771).
    """
    step = len(table) // 2
    latents, timestep = rollout.latents[:, step], table.timesteps[step]
    current = policy.predict(latents, timestep, rollout.conditioning, guidance_scale)
    with policy.reference():
        reference = policy.predict(latents, timestep, rollout.conditioning, guidance_scale)
    return (current.float().square().mean() / reference.float().square().mean()).sqrt().item()


def sample_diversity(samples: torch.Tensor, groups: torch.Tensor) -> float:
    """Root mean square distance of `samples [B, C, *S]` from the mean sample of their group, per element.

    It falls when the policy collapses to a few samples of high reward. Groups of one sample say nothing and are left out.
    """
    squares, count = 0.0, 0
    for group in groups.unique():
        members = samples[groups == group].float()
        if len(members) > 1:
            squares += (members - members.mean(dim=0)).square().flatten(1).mean(dim=1).sum().item()
            count += len(members) - 1
    return (squares / count) ** 0.5 if count else 0.0


def high_frequency_share(samples: torch.Tensor) -> float:
    """Share of the spectral energy of `samples [B, C, *S]` above half the Nyquist frequency along any axis, means removed.

    It falls when edges are wiped out and rises with noise and checkerboards.
    """
    axes = tuple(range(2, samples.ndim))
    values = samples.float() - samples.float().mean(dim=axes, keepdim=True)
    energy = torch.fft.fftn(values, dim=axes).abs().square()
    grids = torch.meshgrid(*(torch.fft.fftfreq(samples.shape[axis]).abs() for axis in axes), indexing="ij")
    high = torch.stack(grids).amax(dim=0).to(energy.device) > 0.25
    return (energy[..., high].sum() / energy.sum().clamp_min(1e-12)).item()


def reward_disagreement(parts: Mapping[str, torch.Tensor]) -> float:
    """1 - correlation of the first two rewards over the samples: 0 where they agree, 1 where they are unrelated.

    Rewards that see a volume in 3D and slice by slice agree on quality, and part where one of them is exploited.
    """
    first, second = list(parts.values())[:2]
    pair = torch.stack([first.double(), second.double()])
    if len(first) < 2 or (pair.std(dim=1) == 0).any():
        return 1.0
    return 1 - torch.corrcoef(pair)[0, 1].item()
