"""Rollouts: trajectories of a denoising policy, with the log-probability of every stochastic step.

Shape letters: B batch, T denoising steps, C channels, *S spatial axes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from diffusers import DDIMParallelScheduler, DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor

from .errors import InputError
from .functional.denoising import StepMoments, ddim_moments, ddim_std, gaussian_log_prob
from .pipelines.schedulers import space_timesteps
from .policies.base import Conditioning, DenoisingPolicy


@dataclass(frozen=True)
class StepTable:
    """The grid of a sampler: `timesteps [T]`, `alpha_prods [T]`, their successors `alpha_prods_prev [T]`, `etas [T]`.

    `stochastic` lists the steps whose standard deviation reaches `min_std`. The others are deterministic DDIM steps (their eta
    is 0) and no actions: their log-probability is infinite or so steep that it would rule the gradient (the last step of
    a DDIM grid that ends at alpha = 1 is the usual case).
    """

    timesteps: torch.Tensor
    alpha_prods: torch.Tensor
    alpha_prods_prev: torch.Tensor
    etas: torch.Tensor
    stochastic: tuple[int, ...]

    @classmethod
    def of(cls, scheduler, num_inference_steps: int, eta: float, min_std: float, device="cpu") -> "StepTable":
        """The grid of a `DDIMScheduler`.

        Raises:
            InputError: the scheduler has no DDIM transition; others share its tables but not its grid.
        """
        if not isinstance(scheduler, DDIMScheduler | DDIMParallelScheduler):
            raise InputError(
                f"Rollouts need the DDIM transition; {type(scheduler).__name__} has none. "
                "Use DDIMScheduler.from_config(pipeline.scheduler.config)."
            )
        timesteps = space_timesteps(scheduler, num_inference_steps).cpu()
        previous = timesteps - scheduler.config.num_train_timesteps // num_inference_steps
        table = scheduler.alphas_cumprod.double().cpu()  # add_noise moves it
        final = torch.as_tensor(scheduler.final_alpha_cumprod).double()
        alpha_prods = table[timesteps]
        alpha_prods_prev = torch.where(previous >= 0, table[previous.clamp_min(0)], final)
        stds = ddim_std(alpha_prods, alpha_prods_prev, eta)
        stochastic = (stds >= min_std) & (stds > 0)
        return cls(
            timesteps.to(device),
            alpha_prods.float().to(device),
            alpha_prods_prev.float().to(device),
            (eta * stochastic).float().to(device),
            tuple(stochastic.nonzero()[:, 0].tolist()),
        )

    def __len__(self) -> int:
        return len(self.timesteps)

    def window(self, start: int, size: int) -> "StepTable":
        """The same grid with noise only in `size` stochastic steps, from the one at position `start` among them on; all
        others are deterministic DDIM steps (MixGRPO, arXiv 2507.21802: most of a rollout's variance is not of use)."""
        kept = self.stochastic[start : start + size]
        etas = torch.zeros_like(self.etas)
        etas[list(kept)] = self.etas[list(kept)]
        return replace(self, etas=etas, stochastic=kept)


@dataclass(frozen=True)
class Rollout:
    """Finished trajectories.

    Attributes:
        latents (`Tensor [B, T+1, C, *S]`): float32, from noise to the final latents; half precision here would shift
            ratios by more than the clip range.
        log_probs (`Tensor [B, T]`): of the steps taken; 0 where the step was not stochastic.
        conditioning (`Conditioning`): what the denoiser was given.
        conditions (`Tensor [B]`): number of the condition of each sample, the groups of the advantages.
        samples (`Tensor [B, C, *S']`): decoded, in [-1, 1].
        means (`Tensor [B, T, C, *S]`, *optional*): of the steps taken, where a trust region around them is asked for.
        advantages (`Tensor [B]`, *optional*).
    """

    latents: torch.Tensor
    log_probs: torch.Tensor
    conditioning: Conditioning
    conditions: torch.Tensor
    samples: torch.Tensor
    means: torch.Tensor | None = None
    advantages: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def with_advantages(self, advantages: torch.Tensor) -> "Rollout":
        return replace(self, advantages=advantages)

    def select(self, rows: slice | torch.Tensor) -> "Rollout":
        """Some of the samples."""
        return self._map(lambda value: value[rows], self.conditioning.select(rows))

    def to(self, device: torch.device | str) -> "Rollout":
        """All of it on `device`."""
        return self._map(lambda value: value.to(device), self.conditioning.to(device))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor], conditioning: Conditioning) -> "Rollout":
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "conditioning"}
        changed = {name: None if value is None else change(value) for name, value in values.items()}
        return Rollout(conditioning=conditioning, **changed)

    @staticmethod
    def cat(parts: Sequence["Rollout"]) -> "Rollout":
        """One rollout of several batches."""

        def join(name: str) -> torch.Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        names = [item.name for item in fields(Rollout) if item.name != "conditioning"]
        return Rollout(
            conditioning=Conditioning.cat([part.conditioning for part in parts]),
            **{name: join(name) for name in names},
        )


def step_moments(
    policy: DenoisingPolicy,
    table: StepTable,
    step: int,
    latents: torch.Tensor,
    conditioning: Conditioning,
    guidance_scale: float,
) -> StepMoments:
    """Mean and standard deviation of step number `step` from `latents [B, C, *S]`, in float32."""
    model_output = policy.predict(latents, table.timesteps[step], conditioning, guidance_scale)
    prediction_type = policy.scheduler.config.prediction_type
    return ddim_moments(
        model_output, latents, table.alpha_prods[step], table.alpha_prods_prev[step], table.etas[step], prediction_type
    )


@torch.no_grad()
def sample_rollout(
    policy: DenoisingPolicy,
    conditions: Sequence | torch.Tensor,
    table: StepTable,
    generators: Sequence[torch.Generator],
    guidance_scale: float = 1.0,
    log_prob_reduction: str = "mean",
    vocabulary: Sequence | None = None,
    log_prob_guidance: float | None = None,
    keep_means: bool = False,
    latents: torch.Tensor | None = None,
) -> Rollout:
    """Denoise one sample per condition; sample i draws all its noise from `generators[i]`, or starts from `latents [B, C, *S]`.

    `vocabulary` lists all conditions there may be, so that batches of one rollout number them alike. With
    `log_prob_guidance` the log-probabilities (and means) are those of the policy at that guidance scale, whatever the
    scale that chose the actions: the policy that is trained may be the one without guidance.
    """
    conditioning = policy.encode(conditions)
    device = table.timesteps.device
    shape = (len(generators), *policy.latent_shape)
    latents = randn_tensor(shape, list(generators), device) if latents is None else latents.to(device)
    states, log_probs, means = [latents], [], []
    for step in range(len(table)):
        mean, std = step_moments(policy, table, step, latents, conditioning, guidance_scale)
        rated = mean
        if step in table.stochastic:
            if log_prob_guidance not in (None, guidance_scale):
                rated, _ = step_moments(policy, table, step, latents, conditioning, log_prob_guidance)
            latents = mean + std * randn_tensor(shape, list(generators), device)
            log_probs.append(gaussian_log_prob(latents, rated, std, log_prob_reduction))
        else:
            latents = mean
            log_probs.append(torch.zeros(len(latents), device=device))
        states.append(latents)
        if keep_means:
            means.append(rated)
    return Rollout(
        latents=torch.stack(states, dim=1),
        log_probs=torch.stack(log_probs, dim=1),
        conditioning=conditioning,
        conditions=torch.as_tensor(condition_numbers(conditions, vocabulary), device=device),
        samples=policy.decode(latents),
        means=torch.stack(means, dim=1) if keep_means else None,
    )


def condition_numbers(conditions: Sequence | torch.Tensor, vocabulary: Sequence | None = None) -> list[int]:
    """A number per condition, equal where conditions are equal: labels stay, texts get their place among the sorted
    texts of `vocabulary` (of `conditions` themselves, where it is not given)."""
    values = conditions.tolist() if isinstance(conditions, torch.Tensor) else list(conditions)
    if all(isinstance(value, int) for value in values):
        return values
    order = {text: number for number, text in enumerate(sorted(set(map(str, vocabulary or values))))}
    return [order[str(value)] for value in values]
