"""The forms a reward may come in, and the form other trainers want."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

import torch
from torch import nn

from ..errors import InputError
from .base import Reward, checked
from .learned import LearnedReward


DDPO_ARGUMENTS = 3  # images, prompts, metadata


class FunctionReward:
    """A function `(samples, conditions) -> [B]` with a name.

    Raises:
        InputError: the function gives a tuple, as those of the DDPO form do, which want other samples.
    """

    differentiable = False

    def __init__(self, name: str, function: Callable):
        self.name, self.function = name, function

    def __call__(self, samples: torch.Tensor, conditions: Sequence | torch.Tensor) -> torch.Tensor:
        rewards = self.function(samples, conditions)
        if isinstance(rewards, tuple):
            raise InputError(
                f"Reward {self.name!r} gave a tuple, as functions of the DDPO form do: give it a third argument, metadata, and it gets "
                "images in [0, 1], or let it return the rewards alone."
            )
        return torch.as_tensor(rewards, dtype=torch.float32, device=samples.device)


class DDPOReward:
    """A function as DDPO trainers take it: `(images [B, C, *S] in [0, 1], prompts, metadata) -> (rewards [B], info)`.

    Rewards may be a tensor, an array or a list, of any number type; `info` is not used.
    """

    differentiable = False
    takes_metadata = True

    def __init__(self, name: str, function: Callable):
        self.name, self.function = name, function

    def __call__(
        self, samples: torch.Tensor, conditions: Sequence | torch.Tensor, metadata: Sequence[Mapping]
    ) -> torch.Tensor:
        prompts = tuple(conditions.tolist() if isinstance(conditions, torch.Tensor) else conditions)
        answer = self.function((samples / 2 + 0.5).clamp(0, 1), prompts, tuple(metadata))
        rewards = answer[0] if isinstance(answer, tuple) else answer
        return torch.as_tensor(rewards, dtype=torch.float32, device=samples.device)


def as_reward(source: Reward | nn.Module | Callable | str) -> Reward:
    """A reward from any of its forms.

    - a reward (it has a `name`; a `torch.nn.Module` also `differentiable`): itself;
    - a reward model (any other `torch.nn.Module`): its score, named by its class;
    - a function of three arguments, or with one named `metadata`: the DDPO form; of two: `(samples, conditions)`;
    - a dotted path, `package.module.function` or `package.module:function`: what it names.

    Raises:
        InputError: a path that names nothing, or something that can't be a reward.
    """
    if isinstance(source, str):
        return as_reward(_by_path(source))
    is_module = isinstance(source, nn.Module)
    if hasattr(source, "name") and callable(source) and (hasattr(source, "differentiable") or not is_module):
        return source
    if is_module:
        return LearnedReward(type(source).__name__, source)
    if not callable(source):
        raise InputError(f"A reward is a function, a model or a dotted path to one, got {source!r}.")
    name = getattr(source, "__name__", type(source).__name__)
    parameters = inspect.signature(source).parameters
    required = [
        parameter
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    # metadata may have a default; but what names its first argument as a reward does wants what a reward gets
    ddpo = len(required) == DDPO_ARGUMENTS or ("metadata" in parameters and next(iter(parameters)) != "samples")
    return (DDPOReward if ddpo else FunctionReward)(name, source)


def as_ddpo_reward(reward: Reward) -> Callable:
    """`reward` as the function that DDPO trainers call: `(images in [0, 1], prompts, metadata) -> (rewards [B], info)`."""

    def reward_function(images: torch.Tensor, prompts: Sequence, metadata: Sequence[Mapping]) -> tuple:
        return checked(reward, images * 2 - 1, prompts, metadata), {}

    return reward_function


def _by_path(path: str):
    module, _, attribute = path.replace(":", ".").rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"Reward {path!r} can't be imported ({error}); give package.module.function.") from error
