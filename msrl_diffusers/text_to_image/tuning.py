"""PPO of a StableDiffusionPipeline: prompts held out to pick weights, figures to watch, the LoRA adapter apart."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from ..data.prompts import PromptBuilder
from ..errors import InputError
from ..processes import process_state
from ..rewards.base import Reward, WeightedSum
from ..rollouts import Rollout, StepTable, sample_rollout
from ..seeding import generator_for, sample_generators
from ..trainers.costs import cost_of_prediction
from ..trainers.lora import merge_lora, save_lora
from ..trainers.ppo_config import DiffusionPPOConfig
from ..trainers.ppo_trainer import DiffusionPPOTrainer
from ..trainers.tuned_weights import LORA_TARGETS, add_lora


def split_prompts(builder: PromptBuilder, num_heldout: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Prompts to train on and held-out ones, drawn by `seed` so that every attribute is stated and denied in training.

    Raises:
        InputError: so many are held out that an attribute is the same in all that are left.
    """
    prompts = builder.prompts()
    targets = builder.targets(prompts)
    for attempt in range(100):
        order = torch.randperm(len(prompts), generator=generator_for(seed, "held-out prompts", attempt)).tolist()
        heldout, train = sorted(order[:num_heldout]), sorted(order[num_heldout:])
        stated = targets[train].mean(dim=0)
        if ((stated > 0) & (stated < 1)).all():
            return [prompts[number] for number in train], [prompts[number] for number in heldout]
    raise InputError(
        f"With {num_heldout} of {len(prompts)} prompts held out an attribute is the same in all others; hold out "
        "fewer."
    )


class HeldoutReward:
    """The mean reward of prompts that the policy is not trained on, sampled as rollouts are, from the same noise each
    time; a figure to pick weights by, as reward on the trained prompts rises first where it means least.
    """

    def __init__(self, prompts: Sequence[str], samples_per_prompt: int, args: DiffusionPPOConfig):
        self.prompts = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
        self.args, self.trainer = args, None

    @property
    def unet_forwards(self) -> int:
        """Denoiser forwards that one look takes."""
        return len(self.prompts) * self.args.num_inference_steps * cost_of_prediction(self.args.guidance_scale)

    def __call__(self, rollout: Rollout) -> float:
        args, policy = self.args, self.trainer.policy
        device, values = next(policy.denoiser.parameters()).device, []  # a rollout may be kept elsewhere
        table = StepTable.of(policy.scheduler, args.num_inference_steps, args.eta, args.min_std, device)
        for start in range(0, len(self.prompts), args.rollout_batch_size):
            some = self.prompts[start : start + args.rollout_batch_size]
            numbers = range(start, start + len(some))
            generators = sample_generators(args.seed, "held-out prompts", numbers)
            samples = sample_rollout(policy, some, table, generators, args.guidance_scale).samples
            values.append(self._score(samples, some))
        return torch.cat(values).mean().item()

    @torch.no_grad()
    def _score(self, samples: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        reward: WeightedSum = self.trainer.reward
        return reward.combine(reward.parts(samples, prompts))


def rollout_figure(score: Callable, prompts: Sequence[str]) -> Callable[[Rollout], float]:
    """`score(samples, prompts) -> [B]`, averaged over a rollout on these training prompts: a figure to watch."""
    order = sorted(set(prompts))  # conditions of a rollout are numbered by it

    def figure(rollout: Rollout) -> float:
        shown = [order[number] for number in rollout.conditions.tolist()]
        return score(rollout.samples, shown).float().mean().item()

    return figure


def tune(
    pipeline: StableDiffusionPipeline,
    rewards: Sequence[Reward],
    args: DiffusionPPOConfig,
    train_prompts: Sequence[str],
    heldout_prompts: Sequence[str] = (),
    heldout_samples_per_prompt: int = 4,
    select: bool = True,
    watch: Mapping[str, Callable] | None = None,
) -> dict:
    """Tune `pipeline` by PPO on `rewards`; it holds the chosen weights afterwards, and `args.output_dir/lora` the
    adapter, or `args.output_dir/pipeline` all of it where no adapter was trained.

    Args:
        train_prompts: the conditions of the rollouts.
        heldout_prompts: prompts whose mean reward is watched, and picks the weights with `select`.
        watch: scores `(samples, prompts) -> [B]` by name whose mean over a rollout is logged and nothing else, such as
            the judge's: it never picks weights.

    Returns:
        The trainer's figures with `unet_forwards` (those of watching among them) and the `scales` of the rewards.
    """
    watchdogs = {name: rollout_figure(score, train_prompts) for name, score in (watch or {}).items()}
    if heldout_prompts:
        watchdogs["heldout_reward"] = HeldoutReward(heldout_prompts, heldout_samples_per_prompt, args)
    if args.use_lora:  # put in here, not by the trainer, which would merge it before it could be saved
        add_lora(pipeline.unet, args.lora_rank, args.lora_target_modules or LORA_TARGETS, args.seed)
    trainer = DiffusionPPOTrainer(
        pipeline,
        list(rewards),
        replace(args, use_lora=False),
        train_conditions=list(train_prompts),
        watchdogs=watchdogs,
        select_by="heldout_reward" if select and heldout_prompts else None,
    )
    if heldout_prompts:
        watchdogs["heldout_reward"].trainer = trainer
    figures = trainer.train()
    is_main, folder = process_state().is_main_process, Path(args.output_dir)
    if args.use_lora:
        if is_main:
            save_lora(pipeline, folder / "lora")
        merge_lora(pipeline.unet)
    elif is_main:
        pipeline.save_pretrained(folder / "pipeline")
    scales = {name: vars(scale) for name, scale in trainer.reward.scales.items()}
    forwards = trainer.unet_forwards
    if heldout_prompts:
        looks = math.ceil(figures["rollouts"] / args.watch_steps) * process_state().num_processes  # each samples all
        forwards += looks * watchdogs["heldout_reward"].unet_forwards
    return {**figures, "unet_forwards": forwards, "scales": scales}
