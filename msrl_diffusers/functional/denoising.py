"""One reverse step of a diffusion process as a Gaussian: mean, standard deviation, log-probability, divergence.

Shape letters: B batch, T stochastic steps, C channels, *S spatial axes. All of it runs in float32: in bfloat16 the
rounding of a stored latent alone moves a mean-reduced ratio by 5e-3 at small standard deviations.
"""

import math
from typing import NamedTuple

import torch


class StepMoments(NamedTuple):
    """`mean [B, C, *S]` and `std []` of p(x_{t-1} | x_t)."""

    mean: torch.Tensor
    std: torch.Tensor


def predict_clean(
    model_output: torch.Tensor, latents: torch.Tensor, alpha_prod: torch.Tensor, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean sample and the noise, `[B, C, *S]` each, that a model output implies.

    `latents = sqrt(alpha_prod) x_0 + sqrt(1 - alpha_prod) noise`; v-prediction as in arXiv 2202.00512, appendix D.
    """
    signal, spread = alpha_prod.sqrt(), (1 - alpha_prod).sqrt()
    if prediction_type == "epsilon":
        return (latents - spread * model_output) / signal, model_output
    if prediction_type == "v_prediction":
        return signal * latents - spread * model_output, signal * model_output + spread * latents
    if prediction_type == "sample":
        return model_output, (latents - signal * model_output) / spread
    raise ValueError(f"Unknown prediction_type {prediction_type!r}; use epsilon, v_prediction or sample.")


def ddim_std(alpha_prod: torch.Tensor, alpha_prod_prev: torch.Tensor, eta: float | torch.Tensor) -> torch.Tensor:
    """Standard deviation of a DDIM step (arXiv 2010.02502, eq. 16), `[...]` like the inputs."""
    variance = (1 - alpha_prod_prev) / (1 - alpha_prod) * (1 - alpha_prod / alpha_prod_prev)
    return eta * variance.clamp_min(0).sqrt()


def ddim_moments(
    model_output: torch.Tensor,
    latents: torch.Tensor,
    alpha_prod: torch.Tensor,
    alpha_prod_prev: torch.Tensor,
    eta: float | torch.Tensor,
    prediction_type: str,
) -> StepMoments:
    """Mean and standard deviation of a DDIM step (arXiv 2010.02502, eq. 12). `alpha_prod` and its predecessor are
    scalars, or `[B, 1, ...]` where samples stand at different steps."""
    model_output, latents = model_output.float(), latents.float()
    clean, noise = predict_clean(model_output, latents, alpha_prod, prediction_type)
    std = ddim_std(alpha_prod, alpha_prod_prev, eta)
    direction = (1 - alpha_prod_prev - std**2).clamp_min(0).sqrt() * noise
    return StepMoments(alpha_prod_prev.sqrt() * clean + direction, std)


def reduce_elements(values: torch.Tensor, reduction: str) -> torch.Tensor:
    """Sum or mean over all axes but the first: `[B, ...] -> [B]`."""
    flat = values.flatten(1)
    if reduction == "mean":
        return flat.mean(dim=1)
    if reduction == "sum":
        return flat.sum(dim=1)
    raise ValueError(f"log_prob_reduction must be 'mean' or 'sum', got {reduction!r}.")


def gaussian_log_prob(
    sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Log-density `[B]` of `sample` under N(mean, std^2), summed or averaged over elements.

    Diffusion RL averages (a temperature of one over the dimension); ratios of sums overflow the clip range at once.
    """
    densities = -((sample - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return reduce_elements(densities, reduction)


def gaussian_kl(
    mean: torch.Tensor, other_mean: torch.Tensor, std: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """KL divergence `[B]` between Gaussians of one standard deviation: `|mean - other|^2 / (2 std^2)`."""
    return reduce_elements((mean - other_mean) ** 2 / (2 * std**2), reduction)
