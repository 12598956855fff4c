"""What a denoiser is trained towards, at which timesteps and with which weights, by its scheduler."""

import torch
from diffusers.training_utils import compute_snr

from ..errors import InputError


def even_timesteps(batch_size: int, num_timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps `[batch_size]`, in random order, one from each of `batch_size` equal parts of `[0, num_timesteps)`:
    less variance between batches than independent draws have.
    """
    positions = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
    timesteps = (positions[torch.randperm(batch_size, generator=generator)] * num_timesteps).long()
    return timesteps.clamp_(max=num_timesteps - 1)  # a position just below 1 may be rounded to it


def denoising_target(scheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the denoiser is to predict of `clean [B, C, *S]` with `noise` at `timesteps [B]`.

    Raises:
        InputError: a prediction type that is none of epsilon, v_prediction and sample.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    if prediction_type == "sample":
        return clean
    raise InputError(f"prediction_type {prediction_type!r} can't be trained; use epsilon, v_prediction or sample.")


def min_snr_weights(scheduler, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """Weights `[B]` of the losses at `timesteps [B]`: min-SNR (arXiv 2303.09556, section 3.4) in the scheduler's
    prediction type; ones for no `gamma`.
    """
    if gamma is None:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = compute_snr(scheduler, timesteps)
    clipped = snr.clamp(max=gamma)
    return {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[
        scheduler.config.prediction_type
    ]
