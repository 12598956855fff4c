"""FinalSampler: finished samples by any sampler of diffusers; of their trajectories hardly anything is kept."""

import inspect
from collections.abc import Sequence

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..errors import InputError
from ..pipelines.schedulers import set_timesteps, step_arguments
from ..policies import DenoisingPolicy
from ..rollouts import Rollout, StepTable, condition_numbers
from .ddo_config import DDOConfig
from .nft_config import DiffusionNFTConfig


class FinalSampler:
    """Samples of a policy by any sampler of diffusers for DDPM's noise; of a trajectory only the middle and the end
    are kept.

    Args:
        policy: the policy.
        args: settings; `sampler`, `num_inference_steps` and `eta` are used.
        min_signal: epsilon prediction: steps with less signal, sqrt(alpha_prod), are left out of `timesteps`.

    Attributes:
        timesteps (`Tensor [T]`): the noise levels of the sampler's grid that can be trained, from noise on, int64.
        alpha_prods (`Tensor [T]`): their squared signal, float64.
        middle (`StepTable`): the step of which rollouts keep the first latents.

    Raises:
        InputError: no sampler of that name, one for other noise, one that has no `eta`, or a grid of noise alone.
    """

    def __init__(self, policy: DenoisingPolicy, args: DiffusionNFTConfig | DDOConfig, min_signal: float = 0.0):
        self.policy, self.args = policy, args
        own = policy.sampler
        kind = type(own) if args.sampler is None else getattr(diffusers, args.sampler, None)
        if not (inspect.isclass(kind) and issubclass(kind, SchedulerMixin)):
            raise InputError(
                f"sampler={args.sampler!r} is no scheduler class of diffusers; take DDIMScheduler, or leave it unset."
            )
        # the policy's has no clipping, but where it lacks the option (DPM-Solver) a class that has it clips by default
        self.scheduler = kind.from_config(own.config, clip_sample=False)
        if not hasattr(own, "alphas_cumprod"):
            raise InputError(f"{type(own).__name__} has no noise schedule of DDPM; give the pipeline a DDIMScheduler.")
        self._all = set_timesteps(self.scheduler, args.num_inference_steps, "cpu")
        if args.eta and not step_arguments(self.scheduler, eta=args.eta):
            raise InputError(f"{kind.__name__} has no eta: set eta=0, got {args.eta}, or sampler=DDIMScheduler.")
        grid = self._all.round().long().unique().flip(0)
        alpha_prods = own.alphas_cumprod.double().cpu()[grid]
        if own.config.prediction_type == "epsilon":  # of noise alone no clean sample can be computed
            kept = alpha_prods.sqrt() >= min_signal
            if not kept.any():
                raise InputError(f"No step of the sampler has min_signal={min_signal}; lower it.")
            grid, alpha_prods = grid[kept], alpha_prods[kept]
        self.timesteps, self.alpha_prods = grid, alpha_prods
        middle = self._all[len(self._all) // 2].reshape(1)
        signal = own.alphas_cumprod.float().cpu()[middle.round().long()]
        self.middle = StepTable(middle, signal, torch.ones(1), torch.zeros(1), stochastic=())

    def __len__(self) -> int:
        """Predictions for one sample."""
        return len(self._all)

    @torch.no_grad()
    def sample(
        self,
        conditions: Sequence,
        generators: Sequence[torch.Generator],
        guidance_scale: float,
        vocabulary: Sequence,
        device: torch.device | str,
    ) -> Rollout:
        """One sample per condition; sample i draws all its noise from `generators[i]`. `latents` are `[B, 2, C, *S]`:
        what the denoiser was given in the middle of the trajectory, and the end. `vocabulary` lists all conditions
        there may be."""
        conditioning, generators = self.policy.encode(conditions), list(generators)
        timesteps = set_timesteps(self.scheduler, self.args.num_inference_steps, device)
        noise = randn_tensor((len(generators), *self.policy.latent_shape), generators, torch.device(device))
        latents = noise * self.scheduler.init_noise_sigma
        arguments = step_arguments(self.scheduler, eta=self.args.eta, generator=generators)
        for number, timestep in enumerate(timesteps):
            given = self.scheduler.scale_model_input(latents, timestep)
            if number == len(timesteps) // 2:
                middle = given
            output = self.policy.predict(given, timestep, conditioning, guidance_scale).float()
            with torch.autocast(latents.device.type, enabled=False):  # some samplers have matrix products
                latents = self.scheduler.step(output, timestep, latents, **arguments).prev_sample
        return Rollout(
            latents=torch.stack([middle, latents], dim=1),
            log_probs=torch.zeros(len(latents), 1, device=device),
            conditioning=conditioning,
            conditions=torch.as_tensor(condition_numbers(conditions, vocabulary), device=device),
            samples=self.policy.decode(latents),
        )
