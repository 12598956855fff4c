"""Denoising steps with gradients: replayed from the states of a rollout, and compared with the pretrained model's."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..functional.backprop import reparametrized
from ..functional.denoising import StepMoments, ddim_moments, gaussian_kl
from ..policies import Conditioning, DenoisingPolicy
from ..rollouts import Rollout, StepTable


class Visit(NamedTuple):
    """The denoiser's `output [B, C, *S]`, with gradients, for `state [B, C, *S]` at denoising step number `step`."""

    step: int
    state: torch.Tensor
    output: torch.Tensor


class GradientSteps:
    """Denoising steps with gradients, and their divergence from the pretrained model.

    Args:
        policy: the policy.
        table: the sampler's grid.
        guidance_scale: of the predictions.
        trained: numbers of the steps that may be visited.

    Attributes:
        kl_form: `"gaussian"` if all of `trained` have noise, otherwise `"prediction"`.
    """

    def __init__(self, policy: DenoisingPolicy, table: StepTable, guidance_scale: float, trained: Sequence[int]):
        self.policy, self.table, self.guidance_scale, self.trained = policy, table, guidance_scale, trained
        self.kl_form = "gaussian" if set(trained) <= set(table.stochastic) else "prediction"

    def visit(self, step: int, state: torch.Tensor, conditioning: Conditioning) -> Visit:
        """A prediction, with gradients if they are enabled."""
        output = self.policy.predict(state, self.table.timesteps[step], conditioning, self.guidance_scale)
        return Visit(step, state, output.float())

    def moments(self, visit: Visit) -> StepMoments:
        """The sampler's step that follows from a prediction."""
        table, step = self.table, visit.step
        grid = (table.alpha_prods[step], table.alpha_prods_prev[step], table.etas[step])
        return ddim_moments(visit.output, visit.state, *grid, self.policy.scheduler.config.prediction_type)

    def replay(self, rollout: Rollout) -> tuple[torch.Tensor, list[Visit]]:
        """Final latents `[B, C, *S]` of a rollout with gradients through its steps `trained`, which are its last ones, and
        the predictions they stem from (DRaFT-K, arXiv 2309.17400, algorithm 1).

        Values are the recorded states; the noise of a step is what lies between its mean and the state that followed, and
        is a constant.
        """
        visits, state = [], rollout.latents[:, self.trained[0]]
        for step in self.trained:
            visits.append(self.visit(step, state, rollout.conditioning))
            state = reparametrized(self.moments(visits[-1]).mean, rollout.latents[:, step + 1])
        return state, visits

    def divergence(self, visits: Sequence[Visit], conditioning: Conditioning, measured: int) -> torch.Tensor:
        """The divergence `[measured]` of the first samples, averaged over `visits`; gradients to the trained model's part. The
        pretrained model's is a constant, though it depends on the state that earlier visits led to: an error of the gradient
        that is 0 for one visit and grows with their number.

        The closed-form Gaussian divergence per element, or the mean squared difference of the predictions, by `kl_form`.
        """
        few, found = slice(measured), []
        for visit in visits:
            own = Visit(visit.step, visit.state[few], visit.output[few])
            with torch.no_grad(), self.policy.reference():
                reference = self.visit(visit.step, own.state, conditioning.select(few))
            if self.kl_form == "gaussian":
                mean, std = self.moments(own)
                with torch.no_grad():
                    pretrained = self.moments(reference).mean
                found.append(gaussian_kl(mean, pretrained, std))
            else:
                found.append((own.output - reference.output).square().flatten(1).mean(dim=1))
        return torch.stack(found).mean(dim=0)
