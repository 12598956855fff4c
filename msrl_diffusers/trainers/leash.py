"""Leash: the divergence from reference policies, as a penalty that holds a policy and as a figure that is reported."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import DistributedType
from torch.func import functional_call

from ..errors import InputError
from ..functional.objectives import adapted_kl_coef
from ..policies import DenoisingPolicy
from ..rewards.base import WeightedSum
from ..rollouts import Rollout
from .base import TrainingRun
from .tuned_weights import TunedWeights
from .uncertainty import reward_uncertainty


WATCHED_SHARE = 8  # of how many samples of a batch one is compared with the reference, where nothing asks for all


class Leash:
    """What a `DiffusionPPOConfig` says about the KL divergence: its weight, whom it holds, what to, and when the run ends.

    An adapted weight (`run.state["kl_coef"]`) and a reference that moves survive a resume: make it before `run.resume()`.

    Args:
        run: the training; its `args` are a `DiffusionPPOConfig`.
        weights, policy: of this training.

    Raises:
        InputError: a moving reference of sharded weights (FSDP).
    """

    def __init__(self, run: TrainingRun, weights: TunedWeights, policy: DenoisingPolicy):
        self.run, self.args = run, run.args
        self.moving: MovingReference | None = None
        if self.args.reference_update_steps is not None:
            self.moving = MovingReference(run, weights, policy, "unset reference_update_steps")
            run.keep(self.moving, "reference_update_steps")
        self._held: torch.Tensor | None = None
        self._noted: list[torch.Tensor] = []

    @property
    def coef(self) -> float:
        """The weight of the penalty; one that is adapted goes on from a checkpoint's, a fixed one is what the config says."""
        if self.args.kl_mode == "fixed":
            return self.args.kl_coef
        return self.run.state.setdefault("kl_coef", self.args.kl_coef)

    @property
    def is_measured(self) -> bool:
        """Whether the divergence from the pretrained policy is needed of every sample, not for the log alone."""
        args = self.args
        penalized = self.coef > 0 and self.moving is None
        return penalized or args.kl_budget is not None or args.kl_mode == "adaptive"

    def choose(self, reward: WeightedSum, rollout: Rollout, scores: dict[str, torch.Tensor]) -> None:
        """Decide which samples of a rollout, with raw rewards `scores`, the penalty holds: all of them, or with
        `kl_gate_quantile` those of which the rewards are least sure, over all processes (GARDO, arXiv 2512.24138: where a
        reward is sure there is no need to hold back)."""
        quantile = self.args.kl_gate_quantile
        if quantile is None:
            return
        accelerator = self.run.accelerator
        uncertainty = reward_uncertainty(reward, rollout.samples, scores, rollout.conditions).to(accelerator.device)
        whole = accelerator.gather(uncertainty)
        self._held = uncertainty >= torch.quantile(whole.double(), quantile).to(uncertainty.dtype)
        share = accelerator.reduce(self._held.float().mean(), "mean")
        self.run.record(**{"ppo/uncertainty": whole.mean(), "ppo/kl_held": share})

    def penalty(self, divergences: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The weighted mean of `divergences [n]` of the first n of `rows [B]`, numbers of samples within this process' part of
        the rollout; of those that are held."""
        if self._held is not None:
            divergences = divergences * self._held[rows.to(self._held.device)][: len(divergences)]
        return self.coef * divergences.mean()

    def note(self, divergence: torch.Tensor) -> None:
        """Remember a mean divergence from the pretrained policy, of some samples and one step, for `settle`."""
        self._noted.append(divergence.detach())

    def settle(self, step: int) -> None:
        """After the updates of rollout number `step`: log the mean of what was noted, adapt the weight, stop the run over its
        budget, and move the reference that moves."""
        args = self.args
        kl = self.run.accelerator.reduce(torch.stack(self._noted).mean(), "mean").item()
        self._noted.clear()
        self.run.record(**{"ppo/kl": kl, "ppo/kl_coef": self.coef})
        if args.kl_mode == "adaptive" and math.isfinite(kl):  # else who resumes with a lower rate would have no weight
            self.run.state["kl_coef"] = adapted_kl_coef(self.coef, kl, args.kl_target, args.kl_rate)
        if args.kl_budget is not None and kl > args.kl_budget:
            self.run.stop(f"the KL divergence passed kl_budget={args.kl_budget}")
        if self.moving is not None and (step + 1) % args.reference_update_steps == 0:
            self.moving.follow()


def settle_updates(run: TrainingRun, prefix: str, noted: Mapping[str, list[torch.Tensor]]) -> None:
    """Log the means of what was `noted` in the updates after a rollout, over all processes, and stop the run where `kl`, the
    divergence from the pretrained policy, is over its budget."""
    means = torch.stack([torch.stack(values).float().mean() for values in noted.values()])
    figures = dict(zip(noted, run.accelerator.reduce(means, "mean").tolist(), strict=True))
    run.record(**{f"{prefix}/{name}": value for name, value in figures.items()})
    if run.args.kl_budget is not None and figures["kl"] > run.args.kl_budget:
        run.stop(f"the divergence from the pretrained model passed kl_budget={run.args.kl_budget}")


class MovingReference:
    """The trained weights as they were some rollouts ago. The penalty towards them slows a policy down without tying it to the
    pretrained one for ever (GARDO, arXiv 2512.24138).

    Raises:
        InputError: sharded weights (FSDP); `remedy` is what to do then, if not to train without it.
    """

    def __init__(self, run: TrainingRun, weights: TunedWeights, policy: DenoisingPolicy, remedy: str = ""):
        if run.accelerator.distributed_type == DistributedType.FSDP:
            without = "train without FSDP"
            raise InputError(
                f"A reference that moves needs whole weights: {f'{remedy}, or {without}' if remedy else without}."
            )
        self._run, self._policy, self._trained = run, policy, weights.trainable
        self._weights = {name: value.detach().clone() for name, value in self._trained.items()}

    def follow(self) -> None:
        """Be the weights of now."""
        self.load_state_dict({name: value.detach() for name, value in self._trained.items()})

    @contextmanager
    def predicting(self) -> Iterator[None]:
        """Within it `policy.predict` is the reference; without gradients."""
        current = self._policy.denoiser
        denoiser = self._run.accelerator.unwrap_model(current)
        self._policy.denoiser = lambda *inputs, **named: functional_call(denoiser, self._weights, inputs, named)
        try:
            yield
        finally:
            self._policy.denoiser = current

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._weights

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        for name, value in state_dict.items():
            self._weights[name].copy_(value)
