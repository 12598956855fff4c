"""Discriminative self-play: real volumes against a model's own samples, told apart by the model's likelihood itself."""

import torch
import torch.nn.functional as F


def likelihood_gain(
    output: torch.Tensor, reference_output: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much likelier a model finds each noised sample than a reference does, and the mean squared error of the model.

    `|reference_output - target|^2 - |output - target|^2`, summed over the elements of `[B, C, *S]`: up to a factor that depends on
    the noise level, one draw of the difference of both models' evidence bounds, as DDO (arXiv 2503.01103) takes for the likelihood
    ratio of diffusion models.

    Returns:
        The gain, `[B]` float64, and the error, `[B]` float64 without gradient.
    """
    own, other = (
        (values.double() - target.double()).square().flatten(1).sum(dim=1) for values in (output, reference_output)
    )
    return other.detach() - own, own.detach() / target[0].numel()


def ddo_loss(
    real_gain: torch.Tensor, own_gain: torch.Tensor, beta: float, alpha: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Direct discriminative optimization (DDO, arXiv 2503.01103, section 3), averaged over `[B]`.

    The logit of the discriminator is `beta` times the log-likelihood ratio of the trained model and the reference that drew
    the samples:

        loss = -log sigmoid(beta real_gain) - alpha log(1 - sigmoid(beta own_gain))

    Where both weights are 1 its minimum over all models is the distribution of the real volumes; a smaller `beta` asks for more of
    the ratio. At a ratio of one the gradient is that of `beta / 2 (error of real volumes - alpha error of own samples)`.

    Statistics: `real_logit`, `own_logit` (means) and `accuracy`, the share of pairs in which the real volume has the higher logit:
    1/2 where the models are equal.
    """
    real, own = beta * real_gain, beta * own_gain
    loss = F.softplus(-real).mean() + alpha * F.softplus(own).mean()
    with torch.no_grad():
        higher = (real > own).double() + 0.5 * (real == own).double()
    stats = {"real_logit": real.detach().mean(), "own_logit": own.detach().mean(), "accuracy": higher.mean()}
    return loss.float(), {name: value.float() for name, value in stats.items()}
