"""Variants of reward backpropagation: which latents are scored, and which predictions their gradients reach."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..functional.denoising import predict_clean
from ..functional.forward_process import add_noise
from ..rollouts import Rollout
from ..seeding import generator_for, sample_generators
from .gradient_steps import GradientSteps, Visit
from .reward_backprop_config import RewardBackpropConfig


class Drawn(NamedTuple):
    """Which samples these are: `numbers` within the rollout of all processes, and `rows` of their conditions."""

    numbers: list[int]
    rows: list[int]

    def select(self, places: Sequence[int]) -> "Drawn":
        return Drawn([self.numbers[place] for place in places], [self.rows[place] for place in places])


# latents to score `[N, B, C, *S]`, N of each sample; the predictions they stem from
Scored = tuple[torch.Tensor, list[Visit]]


def draft(steps: GradientSteps, batch: Rollout, drawn: Drawn, step: int, args: RewardBackpropConfig) -> Scored:
    """Final latents, with gradients through the last K steps (DRaFT-K, arXiv 2309.17400, algorithm 1)."""
    latents, visits = steps.replay(batch)
    return latents[None], visits


def draft_lv(steps: GradientSteps, batch: Rollout, drawn: Drawn, step: int, args: RewardBackpropConfig) -> Scored:
    """As `draft` of the last step, and the finished sample noised to it and denoised again several times: a gradient of lower
    variance, whose steps cost less than new samples (DRaFT-LV, arXiv 2309.17400, algorithm 1)."""
    scored, visits = draft(steps, batch, drawn, step, args)
    (last,) = steps.trained
    found, clean = [scored[0]], batch.latents[:, -1]
    generators = sample_generators(args.seed, f"last step {step}", drawn.numbers)
    for _ in range(args.num_noise_draws):
        noise = randn_tensor(clean.shape, generators, clean.device)
        noisy = add_noise(clean, noise, steps.table.alpha_prods[last])
        visits.append(steps.visit(last, noisy, batch.conditioning))
        found.append(steps.moments(visits[-1]).mean)
    return torch.stack(found), visits


def refl(steps: GradientSteps, batch: Rollout, drawn: Drawn, step: int, args: RewardBackpropConfig) -> Scored:
    """The clean latents predicted at a late step, one for the whole rollout (ReFL, arXiv 2304.05977, algorithm 1)."""
    generator = generator_for(args.seed, "late step", step)
    number = steps.trained[torch.randint(len(steps.trained), (1,), generator=generator).item()]
    visit = steps.visit(number, batch.latents[:, number], batch.conditioning)
    prediction_type = steps.policy.scheduler.config.prediction_type
    clean, _ = predict_clean(visit.output, visit.state, steps.table.alpha_prods[number], prediction_type)
    return clean[None], [visit]


VARIANTS = {"draft": draft, "draft_lv": draft_lv, "refl": refl}
