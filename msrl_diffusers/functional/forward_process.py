"""Reinforcement learning on the forward process: finished samples are noised again, and the denoiser learns from them
by their advantages. No trajectory, no likelihood of a sampler.

Shape letters: B batch, C channels, *S spatial axes. `alpha_prod [B, 1, ...]` is the squared signal of each noised
sample. Losses are computed in float64: where there is next to no signal, a clean sample is a small difference of large
numbers.
"""

import torch

from .denoising import predict_clean, reduce_elements


SMALLEST_ERROR = 1e-5  # of a clean sample, as a divisor
HUBER_FLOOR = 1e-10  # of a squared error; its root has no gradient at zero


def add_noise(clean: torch.Tensor, noise: torch.Tensor, alpha_prod: torch.Tensor) -> torch.Tensor:
    """`sqrt(alpha_prod) clean + sqrt(1 - alpha_prod) noise`, `[B, C, *S]` (DDPM, arXiv 2006.11239, eq. 4)."""
    return (alpha_prod.sqrt() * clean + (1 - alpha_prod).sqrt() * noise).to(clean.dtype)


def matching_target(
    clean: torch.Tensor, noise: torch.Tensor, alpha_prod: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """What a denoiser of this prediction type is to say about `add_noise(clean, noise, alpha_prod)`, `[B, C, *S]`.

    Velocity as in arXiv 2202.00512, appendix D.

    Raises:
        ValueError: none of epsilon, v_prediction and sample.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return alpha_prod.sqrt() * noise - (1 - alpha_prod).sqrt() * clean
    if prediction_type == "sample":
        return clean
    raise ValueError(f"Unknown prediction_type {prediction_type!r}; use epsilon, v_prediction or sample.")


def optimality(advantages: torch.Tensor, adv_clip_max: float) -> torch.Tensor:
    """The probability of being a good sample, in [0, 1], that `advantages [B]` stand for: 1/2 for an average one
    (DiffusionNFT, arXiv 2509.16117, section 3.3, "Optimality Reward")."""
    return 0.5 + 0.5 * (advantages / adv_clip_max).clamp(-1, 1)


def nft_loss(
    model_output: torch.Tensor,
    old_output: torch.Tensor,
    latents: torch.Tensor,
    clean: torch.Tensor,
    alpha_prod: torch.Tensor,
    advantages: torch.Tensor,
    prediction_type: str,
    beta: float,
    adv_clip_max: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Negative-aware fine-tuning (DiffusionNFT, arXiv 2509.16117, theorem 3.2, eq. 5), averaged over `[B]`.

    Of the outputs for `latents = add_noise(clean, ...)`, all `[B, C, *S]`, one mixture goes from the old policy
    towards the trained one and one goes as far away from it:

        positive = (1 - beta) old + beta model        negative = (1 + beta) old - beta model
        loss = adv_clip_max / beta * (r e(positive) + (1 - r) e(negative)),   r = optimality(advantages)

    `e` is the self-normalized error of the clean sample that an output implies, `|x - clean|^2 / sg(mean |x - clean|)`
    (section 3.3, "Adaptive Loss Weighting"). It does not depend on the prediction type, and for a velocity it is the
    normalized error of that velocity times the noise level: steps that are nearly free of noise count little. The
    factor in front makes the gradient at `model = old` that of `advantage * e(model)`, whatever `beta` is.

    Statistics: `positive_error`, `negative_error` (mean absolute errors of the two clean samples) and `deviation`
    (mean absolute difference between the clean samples of the trained and of the old policy).

    Raises:
        ValueError: an unknown prediction type.
    """
    latents, clean, alpha_prod = latents.double(), clean.double(), alpha_prod.double()
    trained, _ = predict_clean(model_output.double(), latents, alpha_prod, prediction_type)
    old, _ = predict_clean(old_output.detach().double(), latents, alpha_prod, prediction_type)
    # a clean sample is linear in the output, so the outputs are mixed as well
    positive, positive_error = _self_normalized((1 - beta) * old + beta * trained, clean)
    negative, negative_error = _self_normalized((1 + beta) * old - beta * trained, clean)
    share = optimality(advantages.double(), adv_clip_max)
    loss = adv_clip_max / beta * (share * positive + (1 - share) * negative).mean()
    deviation = (trained.detach() - old).abs().mean()
    stats = {"positive_error": positive_error, "negative_error": negative_error, "deviation": deviation}
    return loss.float(), {name: value.float() for name, value in stats.items()}


def matching_log_prob(
    model_output: torch.Tensor,
    target: torch.Tensor,
    alpha_prod: torch.Tensor,
    weighting: str,
    huber_power: float = 0.25,
) -> torch.Tensor:
    """What stands for the log-probability of a sample in advantage-weighted matching (AWM, arXiv 2509.25050): the
    negative error of pretraining at one noise level, `[B]` float64.

    `m` is the mean squared difference of output and target, `s = sqrt(1 - alpha_prod)` the noise level:

        uniform: -m      noise: -s m      noise_squared: -s^2 m      huber: -s ((m + 1e-10)^p - 1e-10^p) / p

    The last one (the authors' default, `p = huber_power = 1/4`) grows slowly, so that bad samples are not pushed away
    for ever.

    Raises:
        ValueError: an unknown weighting.
    """
    error = reduce_elements((model_output.double() - target.double()) ** 2, "mean")
    level = (1 - alpha_prod.double()).sqrt().reshape(-1)
    if weighting == "uniform":
        return -error
    if weighting == "noise":
        return -level * error
    if weighting == "noise_squared":
        return -(level**2) * error
    if weighting == "huber":
        return -level * ((error + HUBER_FLOOR) ** huber_power - HUBER_FLOOR**huber_power) / huber_power
    raise ValueError(f"Unknown weighting {weighting!r}; use uniform, noise, noise_squared or huber.")


def awm_loss(
    log_prob: torch.Tensor, advantages: torch.Tensor, adv_clip_max: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Advantage-weighted matching (AWM, arXiv 2509.25050) of samples of the policy itself, averaged over `[B]`:
    `-clip(A / adv_clip_max, -1, 1) log_prob`, with `log_prob [B]` of `matching_log_prob`.

    The sign of an advantage says whether a sample is drawn near or pushed away. The authors write the clipped ratio of
    the new to the old policy; strictly on-policy it is one, and its gradient is this one. Statistics: `log_prob`.
    """
    signed = (advantages.double() / adv_clip_max).clamp(-1, 1)
    return -(signed * log_prob).mean().float(), {"log_prob": log_prob.detach().mean().float()}


def prediction_divergence(model_output: torch.Tensor, other_output: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of two outputs for the same latents, `[B]` float32: without Gaussian steps, the
    divergence between two policies (up to a factor that depends on the noise level)."""
    return reduce_elements((model_output.float() - other_output.float()) ** 2, "mean")


def old_policy_decay(step: int, start: int, rate: float, maximum: float) -> float:
    """How much of the old policy stays after the update number `step`, from 0: none up to `start`, then `rate` more
    each time, up to `maximum` (DiffusionNFT, arXiv 2509.16117, section 3.3, "Soft Update of Sampling Policy")."""
    return min(maximum, rate * max(0, step - start))


def _self_normalized(predicted: torch.Tensor, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The error of each sample, `[B]`, and the mean absolute one of all."""
    scale = reduce_elements((predicted - clean).detach().abs(), "mean")
    error = reduce_elements((predicted - clean) ** 2, "mean")
    return error / scale.clamp_min(SMALLEST_ERROR), scale.mean()
