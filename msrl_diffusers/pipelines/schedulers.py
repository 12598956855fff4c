"""What a pipeline asks of a scheduler, so that any of diffusers' for noise as DDPM adds it can be put in."""

import inspect

import torch
from diffusers import SchedulerMixin

from ..errors import InputError


NEEDED = ("set_timesteps", "init_noise_sigma", "scale_model_input", "step")
CLIPPING = ("clip_sample", "thresholding")
REMEDY = (
    "take one for noise as DDPM adds it, such as DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"
)


def check_unclipped(scheduler: SchedulerMixin) -> None:
    """Raise InputError if the scheduler clips what it predicts to the range of images: latents are not bounded."""
    options = inspect.signature(type(scheduler).__init__).parameters
    # from_config keeps what the class has no use for
    clips = [name for name in CLIPPING if name in options and scheduler.config.get(name)]
    if clips:
        raise InputError(
            f"The pipeline's scheduler has {clips[0]}, which clips latents that are not bounded: set pipe.scheduler = "
            f"{type(scheduler).__name__}.from_config(pipe.scheduler.config, {clips[0]}=False)."
        )


def space_timesteps(
    scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Call `scheduler.set_timesteps`, and take out what rounding there puts below zero: with trailing spacing 61 of 1000
    would be 62, the last of them -1, which a table of noise levels takes for its noisiest end.

    Raises:
        InputError: such a number of steps, of a scheduler that holds more than timesteps; or more than it was trained with.
    """
    if not _spaced_above_zero(scheduler, num_inference_steps, device):
        if hasattr(scheduler, "sigmas"):
            raise _below_zero(scheduler, num_inference_steps)
        scheduler.timesteps = scheduler.timesteps[scheduler.timesteps >= 0]
    return scheduler.timesteps


def check_number_of_steps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Raise InputError for a number of steps that a pipeline of diffusers, which spaces them itself, can't sample with."""
    if not _spaced_above_zero(scheduler, num_inference_steps, None):
        raise _below_zero(scheduler, num_inference_steps)


def _spaced_above_zero(scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device | str | None) -> bool:
    try:
        scheduler.set_timesteps(num_inference_steps, device=device)
    except ValueError as error:
        raise InputError(f"{type(scheduler).__name__} can't take {num_inference_steps} steps: {error}") from error
    return bool((scheduler.timesteps >= 0).all())


def _below_zero(scheduler: SchedulerMixin, num_inference_steps: int) -> InputError:
    return InputError(
        f"The timesteps of {num_inference_steps} steps of {type(scheduler).__name__} end below zero, by a rounding of diffusers; "
        "take another number."
    )


def set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device | str) -> torch.Tensor:
    """All timesteps of a sampling of latents, from noise on; more than `num_inference_steps` where a step takes several
    evaluations.

    Raises:
        InputError: a scheduler for other noise than that of DDPM (flow matching, score-based SDEs), or one that clips; what
            `space_timesteps` refuses.
    """
    missing = [name for name in NEEDED if not hasattr(scheduler, name)]
    if missing:
        raise InputError(f"{type(scheduler).__name__} has no {missing[0]}, so it can't sample here; {REMEDY}.")
    check_unclipped(scheduler)
    return space_timesteps(scheduler, num_inference_steps, device)


def set_last_timesteps(
    scheduler: SchedulerMixin, num_inference_steps: int, num_last: int, device: torch.device | str
) -> torch.Tensor:
    """The timesteps of the last `num_last` steps of `num_inference_steps`; the first of them is where noise is added to.

    Raises:
        InputError: a scheduler that can't add noise, or not start within its steps (PNDM); what `set_timesteps` refuses.
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
