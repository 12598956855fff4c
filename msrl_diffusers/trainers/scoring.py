"""Scoring: the rewards of a rollout, from samples to advantages, over micro-batches, threads and processes."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from ..errors import InputError
from ..functional.advantages import normalize_advantages
from ..rewards import Reward, WeightedSum, as_reward
from ..rewards.base import Scale
from ..seeding import generator_for
from .base import TrainingRun
from .conditions import Conditions


Scores = dict[str, torch.Tensor]


def join_rewards(
    reward_funcs: Reward | Callable | str | Sequence, weights: Sequence[float] | None = None
) -> WeightedSum:
    """One reward or several, in any form `rewards.as_reward` knows, as one weighted sum; a copy if it is one already, for training
    sets its scales, and another training of the same sum takes its own.

    Raises:
        InputError: something that is no reward, weights beside a sum that has its own, not one weight per reward, or two
            rewards of one name.
    """
    if isinstance(reward_funcs, WeightedSum):
        if weights is not None:
            raise InputError(
                "reward_weights are given beside a WeightedSum, which has its own; leave one of them out."
            )
        return copy.copy(reward_funcs)
    several = isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
    sources = list(reward_funcs) if several else [reward_funcs]
    return WeightedSum([as_reward(source) for source in sources], weights)


class Scoring:
    """Rewards of this process' samples, whose conditions are given by their rows in `conditions`.

    Make it after `run.resume()`: the scales that the first rollout gave are taken from `run.state`, if they are there.

    Args:
        run: the training; its `args` are an `OnlineConfig`. Models behind the rewards go to its device.
        reward: the weighted sum that is trained on.
        conditions: what samples are made of, with the metadata that goes to rewards.

    Raises:
        InputError: the run was resumed, and a reward was not among those it began with.
    """

    def __init__(self, run: TrainingRun, reward: WeightedSum, conditions: Conditions):
        self.run, self.args, self.reward, self.conditions = run, run.args, reward, conditions
        for part in () if reward is None else reward.rewards:
            for network in (part, getattr(part, "model", None)):
                if isinstance(network, nn.Module):
                    network.to(run.device)
        if "scales" in run.state:
            added = [part.name for part in reward.rewards if part.name not in run.state["scales"]]
            if added:
                raise InputError(
                    f"The run in {run.resumed_from} began with the rewards {list(run.state['scales'])}, so the scale of {added} on its "
                    "first rollout is not known: leave out what was added, or start anew in another output_dir."
                )
            reward.scales = {name: Scale(**scale) for name, scale in run.state["scales"].items()}

    @property
    def num_samples(self) -> int:
        """Samples in a rollout of all processes."""
        return self.args.samples_per_rollout * self.run.accelerator.num_processes

    def rows(self, step: int, numbers: Iterable[int]) -> list[int]:
        """Rows of the conditions of samples by their numbers within rollout number `step` of all processes."""
        return [(step * self.num_samples + number) % len(self.conditions) for number in numbers]

    def check_groups(self) -> None:
        """Refuse rollouts that have every condition once: advantages compare samples of one condition.

        Raises:
            InputError: there are several conditions, and a rollout of all processes has no more samples than that.
        """
        several = len(set(self.conditions.values))
        if several > 1 and self.num_samples <= several:
            raise InputError(
                f"A rollout of {self.num_samples} samples has {several} different conditions, each once, so no sample is better than "
                "another of its condition; make rollouts larger (num_rollout_batches), or give fewer conditions."
            )

    def batches(self, step: int, num_parts: int = 1) -> Iterator[tuple[list[int], list[int]]]:
        """This process' part of rollout number `step` in batches of `rollout_batch_size`: numbers of samples within
        the rollout of all processes, and rows of their conditions, which are taken in turn over rollouts.

        Each of `num_parts` updates gets the same samples, whatever the number of processes.
        """
        order = torch.randperm(self.num_samples, generator=generator_for(self.args.seed, "order", step))
        mine = torch.cat([self.run.shard(part) for part in order.chunk(num_parts)])
        start = 0
        for batch in mine.split(self.args.rollout_batch_size):
            numbers = batch.tolist()
            self.run.doing(f"samples {start} to {start + len(numbers)} of {len(mine)}")
            start += len(numbers)
            yield numbers, self.rows(step, numbers)

    @contextmanager
    def submitter(self) -> Iterator[Callable[[torch.Tensor, Sequence[int]], Future]]:
        """A function `(samples, rows) -> Future[Scores]` that runs `score`: with `async_rewards` in a thread of its
        own, while the next batch is denoised, else at once. Call `collect` within."""
        if self.args.async_rewards:
            device = self.run.device  # a thread begins with the first GPU as its own
            prepare = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
            with ThreadPoolExecutor(max_workers=1, initializer=prepare) as executor:
                yield lambda samples, rows: executor.submit(self.score, samples, rows)
        else:

            def run_now(samples: torch.Tensor, rows: Sequence[int]) -> Future:
                future = Future()
                future.set_result(self.score(samples, rows))
                return future

            yield run_now

    @staticmethod
    def collect(futures: Sequence[Future]) -> Scores:
        """The scores of all batches, one after the other; an error in a reward is raised here."""
        return _cat([future.result() for future in futures])

    @torch.no_grad()
    def score(self, samples: torch.Tensor, rows: Sequence[int]) -> Scores:
        """Raw rewards `{name: [B]}` of `samples [B, C, *S]` made of these rows of the conditions, in micro-batches."""
        size = self.args.reward_batch_size or self.args.rollout_batch_size
        starts = range(0, len(samples), size)
        return _cat([self.raw(samples[start : start + size], rows[start : start + size]) for start in starts])

    def raw(self, samples: torch.Tensor, rows: Sequence[int]) -> Scores:
        """Raw rewards of one batch, with gradients to `samples` where a reward has them."""
        conditions = self.conditions.take(rows)
        if all(isinstance(condition, int) for condition in conditions):
            conditions = torch.tensor(conditions, device=samples.device)
        return self.reward.parts(samples, conditions, self.conditions.metadata_of(rows))

    def combine(self, scores: Scores) -> torch.Tensor:
        """The standardized, weighted reward `[B]`. The first rollout, the reference policy's, gives the scales, unless a
        `WeightedSum` with scales was given; either way they are in `run.state` from then on.

        Raises:
            InputError: that rollout is of one sample.
        """
        if not self.reward.scales:
            everywhere = {name: self.run.accelerator.gather(values) for name, values in scores.items()}
            if len(next(iter(everywhere.values()))) < 2:
                raise InputError(
                    "A rollout of one sample gives rewards no scale: raise num_rollout_batches or rollout_batch_size, or give a "
                    "WeightedSum with scales."
                )
            self.reward.fit(everywhere)
        if "scales" not in self.run.state:
            self.keep_scales()
        return self.reward.combine(scores)

    def keep_scales(self) -> None:
        """Put the scales of the rewards into `run.state`, for checkpoints."""
        self.run.state["scales"] = {name: vars(scale) for name, scale in self.reward.scales.items()}

    def record(self, rewards: torch.Tensor, scores: Scores, groups: torch.Tensor) -> None:
        """Log the combined reward, the raw ones, and the share of groups whose rewards are all equal: a group-wise
        advantage learns nothing from those. `groups [B]` numbers the condition of each sample."""
        gather = self.run.accelerator.gather
        rewards, groups = gather(rewards), gather(groups.to(rewards.device))
        spreads = [rewards[groups == group].std(correction=0) for group in groups.unique()]
        means = {f"reward/{name}": gather(values).mean() for name, values in scores.items()}
        self.run.record(**{"reward/mean": rewards.mean(), "reward/std": rewards.std(), **means})
        self.run.record(**{"reward/frac_zero_std": torch.stack([spread == 0 for spread in spreads]).float().mean()})

    def advantages(self, rewards: torch.Tensor, groups: torch.Tensor, clip: float) -> torch.Tensor:
        """Advantages `[B]` of this process' samples, with statistics over all processes (`normalize_advantages`)."""
        accelerator = self.run.accelerator
        groups = groups.to(rewards.device)
        advantages = normalize_advantages(accelerator.gather(rewards), accelerator.gather(groups), clip)
        mine = advantages.reshape(accelerator.num_processes, -1)[accelerator.process_index]
        return mine.cpu() if self.args.offload_rollouts else mine


def _cat(parts: Sequence[Scores]) -> Scores:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
