"""What a pipeline asks of a scheduler, so that any of diffusers' for noise as DDPM adds it can be put in."""

import inspect

import torch
from diffusers import SchedulerMixin

from ..errors import InputError


NEEDED = ("set_timesteps", "init_noise_sigma", "scale_model_input", "step")
REMEDY = "take one for noise as DDPM adds it, such as DDIMScheduler.from_config(pipe.scheduler.config)"


def set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device | str) -> torch.Tensor:
    """All timesteps of a sampling, from noise on; more than `num_inference_steps` where a step takes several evaluations.

    Raises:
        InputError: a scheduler for other noise than that of DDPM (flow matching, score-based SDEs).
    """
    missing = [name for name in NEEDED if not hasattr(scheduler, name)]
    if missing:
        raise InputError(f"{type(scheduler).__name__} has no {missing[0]}, so it can't sample here; {REMEDY}.")
    scheduler.set_timesteps(num_inference_steps, device=device)
    return scheduler.timesteps


def set_last_timesteps(
    scheduler: SchedulerMixin, num_inference_steps: int, num_last: int, device: torch.device | str
) -> torch.Tensor:
    """The timesteps of the last `num_last` steps of `num_inference_steps`; the first of them is where noise is added to.

    Raises:
        InputError: a scheduler that can't add noise, or not start within its steps (PNDM).
    """
    timesteps = set_timesteps(scheduler, num_inference_steps, device)
    # A step of second order has two evaluations, but for the last one; PNDM's warm-up makes its grid irregular.
    order = getattr(scheduler, "order", 1)
    if not hasattr(scheduler, "add_noise") or len(timesteps) != order * (num_inference_steps - 1) + 1:
        raise InputError(f"{type(scheduler).__name__} can't start from a noised volume; {REMEDY}.")
    first = order * (num_inference_steps - num_last)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return timesteps[first:]


def step_arguments(scheduler: SchedulerMixin, **values) -> dict:
    """Those of `values` (`eta`, `generator`) that the scheduler's `step` has."""
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in values.items() if name in accepted}
