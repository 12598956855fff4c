"""DiffusionNFTTrainer: reinforcement learning of a denoising policy on the forward process.

DiffusionNFT (arXiv 2509.16117): samples are drawn, rewarded, noised again, and the denoiser is trained on them,
towards those of high reward and away from those of low one. Or, by `objective="awm"`, advantage-weighted matching
(AWM, arXiv 2509.25050): the loss of pretraining, with the advantage as a signed weight. What differs from the code in
use, or is left open there:
1. Nothing of a trajectory is kept and no step needs noise, so any sampler for DDPM's noise will do, the ODE as well.
2. Epsilon, velocity and sample prediction: the loss is that of the clean sample they imply, so it is one and the same.
3. Noise levels are those of the sampler's own grid, one from each of equal parts of it.
4. The old policy is an average of the trained weights alone: of the adapter under LoRA, else of a copy.
5. The divergence that is reported and penalized is the mean squared difference of predictions from the pretrained
   policy's, in the pipeline's own prediction type: a deterministic sampler has no Gaussian steps that could be
   compared.
6. Weights kept by a selection are those which drew the samples selected by; with `ema_decay`, the average of the trained
   weights at that time.
7. Before the first update the old policy must predict what the trained one does; if not, the run stops and says why.
8. Everything random follows from the seed, the rollout's number and a sample's number within it, so neither the number
   of processes nor a resume changes what is sampled, how it is noised or in which update it is used.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from diffusers.utils.torch_utils import randn_tensor
from transformers import TrainerCallback

from ..functional.forward_process import (
    add_noise,
    awm_loss,
    matching_log_prob,
    matching_target,
    nft_loss,
    old_policy_decay,
    prediction_divergence,
)
from ..policies import DenoisingPolicy, make_policy
from ..rewards import Reward
from ..rollouts import Rollout
from ..seeding import generator_for, sample_generators
from .base import TrainingRun
from .callbacks import Callbacks
from .conditions import Conditions
from .costs import COST_OF_BACKWARD, cost_of_prediction
from .final_sampler import FinalSampler
from .leash import WATCHED_SHARE, MovingReference, settle_updates
from .nft_config import DiffusionNFTConfig
from .scoring import Scores, Scoring, join_rewards
from .tuned_weights import TunedWeights, tunable_policy
from .watchdogs import Watch, Watchdog, check_patience, draw_samples


MOST_DEVIATION = (
    0.01  # of the old from the trained policy before the first update, over the error of the clean samples
)


class DiffusionNFTTrainer:
    """Fine-tunes the denoiser of `pipeline` to raise rewards, from finished samples alone.

    The policy that is trained is the one without guidance; with `args.guidance_scale` in the rollouts it learns what
    guidance adds. The rollout that watchdogs see has two latents of each trajectory, its middle and its end.

    Args:
        pipeline: any pipeline that has a policy (`policies.POLICIES`).
        reward_funcs: one reward or several, in any form `rewards.as_reward` knows (a reward, a reward model, a
            function, a dotted path); they are standardised on the first rollout and summed by `args.reward_weights`.
        args: settings.
        train_conditions: class labels or prompts, taken in turn; all classes of the pipeline by default.
        train_dataset: instead of `train_conditions`, a `datasets.Dataset` with a column `prompt`, `label` or
            `class_label`; its other columns are the metadata that rewards of the DDPO form are given.
        watchdogs: figures of a rollout that are logged and never trained on, by name; beside those of `watchdogs.py`.
        select_by: name of the watchdog whose highest value (`"-name"`: lowest) picks the weights kept at the end, and
            against which `args.patience` counts; the last weights are kept if not given.
            With `args.ema_decay` the average is kept, though rollouts are sampled with the old policy (awm: the trained weights).
        callbacks: `transformers.TrainerCallback` objects or classes.

    Raises:
        InputError: something that is no reward, no conditions, an unknown `select_by` or none for `args.patience`, or a
            sampler that does not fit.
    """

    def __init__(
        self,
        pipeline,
        reward_funcs: Reward | Callable | str | Sequence,
        args: DiffusionNFTConfig | None = None,
        train_conditions: Sequence | None = None,
        train_dataset=None,
        watchdogs: Mapping[str, Watchdog] | None = None,
        select_by: str | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    ):
        self.pipeline, self.args = pipeline, args or DiffusionNFTConfig()
        args = self.args
        self.reward = join_rewards(reward_funcs, args.reward_weights)
        self.conditions = Conditions.of(pipeline, train_conditions, train_dataset)
        check_patience(args.patience, select_by)
        self.watch = Watch(watchdogs, select_by, args.watch_limits, args.patience, args.watch_steps)
        self.callbacks = callbacks
        self.unet_forwards = 0
        FinalSampler(make_policy(pipeline), args, args.min_signal)  # what it refuses stays without an adapter
        self.policy = tunable_policy(pipeline, args)
        self.sampler = FinalSampler(self.policy, args, args.min_signal)

    def train(self) -> dict[str, float]:
        """Run the training; the pipeline holds the chosen weights afterwards. Returns the figures of the rollout they were
        chosen by (`Watch.result`)."""
        args = self.args
        micro_batches = args.samples_per_rollout // args.train_batch_size // args.num_updates
        passes = micro_batches * args.num_train_timesteps_per_sample
        run = TrainingRun(args, "nft", gradient_accumulation_steps=passes, allow_fsdp=True)
        self.pipeline.to(run.device)
        run.callbacks = Callbacks(self.callbacks, args, self.pipeline.unet, run.is_main) if self.callbacks else None
        weights = TunedWeights(run, self.pipeline, self.policy, args.max_steps * args.num_updates)
        self._old = OldPolicy(run, weights, self.policy) if args.keeps_old else None
        run.resume()
        self.watch.resume(run)
        scoring = Scoring(run, self.reward, self.conditions)
        scoring.check_groups()
        self.unet_forwards = run.state.get("unet_forwards", 0)

        for step in run.steps():
            # awm is strictly on-policy
            with self._old.in_place() if args.objective == "nft" else nullcontext():
                rollout, numbers, scores = self._sample(run, scoring, step)
                rewards = scoring.combine(scores)
                scoring.record(rewards, scores, rollout.conditions)
                advantages = scoring.advantages(rewards, rollout.conditions, args.adv_clip_max)
                rollout = rollout.with_advantages(advantages)
                with weights.averaged():  # those that would be kept
                    figures = self.watch.figures(run, self.policy, self.sampler.middle, rollout, scores, 1.0)
                if self.watch.judge(run, figures, step):
                    weights.save_best()
                draw_samples(run, rollout.samples, rewards, step)

            settle_updates(run, "nft", self._update(run, weights, rollout, numbers, step))
            if self._old is not None:
                decay = old_policy_decay(step, args.old_decay_start, args.old_decay_rate, args.old_decay_max)
                self._old.follow(decay)
                run.record(**{"nft/old_decay": decay})
            run.record(epoch=step + 1)
            run.state["unet_forwards"] = self.unet_forwards

        weights.finish(best="best_step" in run.state)
        weights.push_to_hub()
        run.finish()
        return self.watch.result(run)

    # ------------------------------------------------------------------------------------------------------ rollouts

    def _sample(self, run: TrainingRun, scoring: Scoring, step: int) -> tuple[Rollout, list[int], Scores]:
        """This process' samples of rollout number `step`, in the order the updates use them, their numbers within the
        rollout of all processes, and their raw rewards."""
        args, parts, all_numbers, scored = self.args, [], [], []
        with scoring.submitter() as submit:
            for numbers, rows in scoring.batches(step, args.num_updates):
                generators = sample_generators(args.seed, f"rollout {step}", numbers)
                with run.accelerator.autocast():
                    part = self.sampler.sample(
                        self.conditions.take(rows), generators, args.guidance_scale, self.conditions.values, run.device
                    )
                scored.append(submit(part.samples, rows))
                parts.append(part.to("cpu") if args.offload_rollouts else part)
                all_numbers += numbers
            scores = scoring.collect(scored)
        cost = cost_of_prediction(args.guidance_scale)
        self.unet_forwards += args.samples_per_rollout * run.accelerator.num_processes * len(self.sampler) * cost
        return Rollout.cat(parts), all_numbers, scores

    def _draw(self, numbers: Sequence[int], step: int, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise levels, as positions `[B]` in the sampler's grid, and the noise `[B, C, *S]` of draw number `draw`
        for samples of these numbers: the level from one of as many equal parts of the grid as there are draws."""
        args, size = self.args, len(self.conditions)
        keys = [("sample", number) for number in numbers]
        if args.noise_group_size > 1:  # samples of one condition stand `size` places apart
            keys = [("group", number % size, number // size // args.noise_group_size) for number in numbers]
        generators = [generator_for(args.seed, "forward process", step, draw, *key) for key in keys]
        part = len(self.sampler.timesteps) / args.num_train_timesteps_per_sample
        starts = [draw + torch.rand((), generator=generator).item() for generator in generators]
        positions = torch.tensor([int(start * part) for start in starts])
        return positions, randn_tensor((len(numbers), *self.policy.latent_shape), generators)

    # ------------------------------------------------------------------------------------------------------- updates

    def _update(
        self, run: TrainingRun, weights: TunedWeights, rollout: Rollout, numbers: Sequence[int], step: int
    ) -> dict[str, list[torch.Tensor]]:
        """`num_updates` optimizer updates; gradients are accumulated over samples x noise levels. Returns figures."""
        args, accelerator, noted = self.args, run.accelerator, defaultdict(list)
        held = args.kl_coef > 0 or args.kl_budget is not None
        for update, rows_of_update in enumerate(torch.arange(len(rollout)).chunk(args.num_updates)):
            for batch_number, rows in enumerate(rows_of_update.split(args.train_batch_size)):
                batch = rollout.select(rows.to(rollout.latents.device)).to(run.device)
                # without a leash the divergence is only watched, on a few samples: the reference costs a forward
                watched = -(-len(batch) // WATCHED_SHARE) if update == batch_number == 0 else 0
                measured = len(batch) if held else watched
                for draw in range(args.num_train_timesteps_per_sample):
                    positions, noise = self._draw([numbers[row] for row in rows.tolist()], step, draw)
                    with accelerator.accumulate(weights.denoiser):
                        loss, stats = self._loss(run, batch, positions, noise.to(run.device), measured)
                        if step == update == 0:
                            self._check_old(stats)
                        norm = weights.backward(loss)
                    if norm is not None:
                        run.record(**{"nft/grad_norm": norm})
                    for name, value in {"loss": loss, **stats}.items():
                        noted[name].append(value.detach())
                    passes = 1 + COST_OF_BACKWARD + args.gradient_checkpointing + (self._old is not None)
                    self.unet_forwards += (len(batch) * passes + measured) * accelerator.num_processes
            if not weights.end_update():
                break
        return noted

    def _loss(
        self, run: TrainingRun, batch: Rollout, positions: torch.Tensor, noise: torch.Tensor, measured: int
    ) -> tuple[torch.Tensor, Scores]:
        """The objective of samples noised to these positions of the grid, and figures; among them `kl`, the divergence
        of the first `measured` from the pretrained policy."""
        args, policy, clean = self.args, self.policy, batch.latents[:, -1]
        timesteps = self.sampler.timesteps[positions].to(run.device)
        alpha_prod = self.sampler.alpha_prods[positions].to(run.device).view(-1, *[1] * (clean.ndim - 1))
        prediction_type = policy.scheduler.config.prediction_type
        latents, few = add_noise(clean, noise, alpha_prod), slice(measured)
        with run.accelerator.autocast():
            output = policy.predict(latents, timesteps, batch.conditioning, 1.0)
            with torch.no_grad():
                if self._old is not None:
                    with self._old.predicting():
                        old_output = policy.predict(latents, timesteps, batch.conditioning, 1.0)
                if measured:
                    with policy.reference():
                        pretrained = policy.predict(latents[few], timesteps[few], batch.conditioning.select(few), 1.0)
        if args.objective == "nft":
            loss, stats = nft_loss(
                output, old_output, latents, clean, alpha_prod, batch.advantages, prediction_type,
                beta=args.beta, adv_clip_max=args.adv_clip_max,
            )  # fmt: skip
        else:
            target = matching_target(clean, noise, alpha_prod, prediction_type)
            log_prob = matching_log_prob(output, target, alpha_prod, args.weighting, args.huber_power)
            loss, stats = awm_loss(log_prob, batch.advantages, args.adv_clip_max)
            if self._old is not None:
                stats["old_kl"] = prediction_divergence(output, old_output).mean()
                loss = loss + args.old_kl_coef * stats["old_kl"]
        if measured:
            stats["kl"] = prediction_divergence(output[few], pretrained).mean()
            loss = loss + args.kl_coef * stats["kl"]
        return loss, stats

    def _check_old(self, stats: Scores) -> None:
        deviation, error = (stats.get(name, torch.zeros(())).item() for name in ("deviation", "positive_error"))
        if deviation > MOST_DEVIATION * error:
            raise RuntimeError(
                f"Before the first update the old policy deviates from the trained one by {deviation:.2g} (error of "
                f"the clean samples: {error:.2g}), though their weights are equal. Usual causes: dropout, batch "
                "normalization."
            )


class OldPolicy(MovingReference):
    """An average of the trained weights, or of the adapter under LoRA, that follows them slowly: the policy that draws
    the samples of nft and from which its branches start, the anchor of awm. `run.resume()` loads it: make it before.

    Raises:
        InputError: sharded weights (FSDP).
    """

    def __init__(self, run: TrainingRun, weights: TunedWeights, policy: DenoisingPolicy):
        super().__init__(run, weights, policy, "take objective=awm and old_kl_coef=0")
        run.keep(self, "objective or old_kl_coef")

    @torch.no_grad()
    def follow(self, decay: float = 0.0) -> None:
        """Keep `decay` of itself and take the rest from the trained weights; be them, by default."""
        for name, value in self._trained.items():
            self._weights[name].lerp_(value, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the denoiser itself has these weights."""
        trained = {name: value.detach().clone() for name, value in self._trained.items()}
        self._put(self._weights)
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, value in self._trained.items():
            value.copy_(weights[name])
