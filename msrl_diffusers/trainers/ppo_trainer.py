"""DiffusionPPOTrainer: reinforcement learning of a denoising policy by PPO with a KL leash.

The objective of arXiv 2603.06173, section 3.3, on the DDPO view of denoising (arXiv 2305.13301). What differs from the
DDPO code in use, or is left open there:
1. Steps whose standard deviation is (nearly) zero are no actions and are left out; steps and log-probabilities are float32.
2. The clip range is given as a shift of the policy's mean, so that it means the same in any latent space.
3. The divergence from the pretrained policy is in closed form, at the states the current policy visited.
4. Advantages: mean per condition, one standard deviation over all processes, in float64.
5. Gradients go through the module that accelerate prepared, so they are reduced over processes.
6. At the first update of a rollout every ratio must be one; the run stops with an explanation if it is not.
7. The weights kept are those with the best held-out figure, not the last.
8. The leash can be told whom to hold (samples of uncertain reward) and what to (a reference that moves); what is reported
   is the divergence from the pretrained policy.
9. Everything random follows from the seed, the rollout's number and a sample's number within it, so neither the number of
   processes nor a resume changes what is sampled or in which update it is used.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from transformers import TrainerCallback

from ..errors import InputError
from ..functional.denoising import StepMoments, gaussian_kl, gaussian_log_prob
from ..functional.objectives import kl_mask_loss, ppo_clip_loss, scaled_clip_range
from ..rewards import Reward
from ..rollouts import Rollout, StepTable, sample_rollout, step_moments
from ..seeding import generator_for, sample_generators
from .base import TrainingRun
from .callbacks import Callbacks
from .conditions import Conditions
from .costs import COST_OF_BACKWARD, cost_of_prediction
from .leash import WATCHED_SHARE, Leash
from .ppo_config import DiffusionPPOConfig
from .refresh import RewardRefresh
from .scoring import Scores, Scoring, join_rewards
from .tuned_weights import TunedWeights, tunable_policy
from .uncertainty import check_can_be_unsure
from .watchdogs import Watch, Watchdog, check_patience, draw_samples


class DiffusionPPOTrainer:
    """Fine-tunes the denoiser of `pipeline` to raise rewards, near the pretrained model.

    Args:
        pipeline: any pipeline that has a policy (`policies.POLICIES`).
        reward_funcs: one reward or several, in any form `rewards.as_reward` knows (a reward, a reward model, a function, a
            dotted path); they are standardised on the first rollout and summed by `args.reward_weights`.
        args: settings.
        train_conditions: class labels or prompts, taken in turn; all classes of the pipeline by default.
        train_dataset: instead of `train_conditions`, a `datasets.Dataset` with a column `prompt`, `label` or `class_label`;
            its other columns are the metadata that rewards of the DDPO form are given.
        watchdogs: figures of a rollout that are logged and never trained on, by name; beside those of `watchdogs.py`.
        select_by: name of the watchdog whose highest value (`"-name"`: lowest) picks the weights kept at the end, and
            against which `args.patience` counts; the last weights are kept if not given.
            With `args.ema_decay` the average is kept, though rollouts are sampled with the trained weights.
        callbacks: `transformers.TrainerCallback` objects or classes.
        refresh: trains the reward models on with labelled samples of the policy, now and then.

    Raises:
        InputError: something that is no reward, no conditions, an unknown `select_by` or none for `args.patience`, a gated
            divergence without rewards that can be unsure, or a refresh without class labels.
    """

    def __init__(
        self,
        pipeline,
        reward_funcs: Reward | Callable | str | Sequence,
        args: DiffusionPPOConfig | None = None,
        train_conditions: Sequence | None = None,
        train_dataset=None,
        watchdogs: Mapping[str, Watchdog] | None = None,
        select_by: str | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        refresh: RewardRefresh | None = None,
    ):
        self.pipeline, self.args = pipeline, args or DiffusionPPOConfig()
        args = self.args
        self.reward = join_rewards(reward_funcs, args.reward_weights)
        self.conditions = Conditions.of(pipeline, train_conditions, train_dataset)
        check_patience(args.patience, select_by)
        self.watch = Watch(watchdogs, select_by, args.watch_limits, args.patience, args.watch_steps)
        self.callbacks, self.refresh = callbacks, refresh
        self.unet_forwards = 0
        if args.kl_gate_quantile is not None:
            check_can_be_unsure(self.reward)
        if refresh is not None and not all(isinstance(value, int) for value in self.conditions.values):
            raise InputError("A reward refresh needs class labels as conditions, no prompts.")
        self.policy = tunable_policy(pipeline, args)
        num_elements = math.prod(self.policy.latent_shape)
        self._clip_range = scaled_clip_range(args.clip_shift, num_elements, args.log_prob_reduction)

    def train(self) -> dict[str, float]:
        """Run the training; the pipeline holds the chosen weights afterwards. Returns the figures of the rollout they were
        chosen by (`Watch.result`)."""
        args = self.args
        table = StepTable.of(self.policy.scheduler, args.num_inference_steps, args.eta, args.min_std)
        if not table.stochastic:
            raise InputError(
                f"No denoising step reaches min_std={args.min_std} (eta={args.eta}); lower min_std or raise eta."
            )
        num_noisy = min(args.sde_window or len(table.stochastic), len(table.stochastic))
        num_trained = max(1, round(args.timestep_fraction * num_noisy))
        micro_batches = args.samples_per_rollout // args.train_batch_size // args.num_updates * num_trained
        run = TrainingRun(args, "ppo", gradient_accumulation_steps=micro_batches, allow_fsdp=True)
        self.pipeline.to(run.device)
        table = StepTable.of(self.policy.scheduler, args.num_inference_steps, args.eta, args.min_std, run.device)
        run.callbacks = Callbacks(self.callbacks, args, self.pipeline.unet, run.is_main) if self.callbacks else None
        weights = TunedWeights(run, self.pipeline, self.policy, args.max_steps * args.num_updates)
        self._leash = Leash(run, weights, self.policy)
        run.resume()
        self.watch.resume(run)
        scoring = Scoring(run, self.reward, self.conditions)
        scoring.check_groups()
        if self.refresh is not None:
            self.refresh.resume(run, scoring)
        self.unet_forwards = run.state.get("unet_forwards", 0)

        for step in run.steps():
            noisy = self._draw_window(table, num_noisy, step)
            rollout, scores = self._sample(run, scoring, noisy, step)
            rewards = scoring.combine(scores)
            scoring.record(rewards, scores, rollout.conditions)
            advantages = scoring.advantages(rewards, rollout.conditions, args.adv_clip_max)
            rollout = rollout.with_advantages(advantages)
            self._leash.choose(self.reward, rollout, scores)
            with weights.averaged():  # those that would be kept
                figures = self.watch.figures(run, self.policy, noisy, rollout, scores, args.train_guidance_scale)
            if self.watch.judge(run, figures, step):
                weights.save_best()
            draw_samples(run, rollout.samples, rewards, step)

            chosen = torch.randperm(len(noisy.stochastic), generator=generator_for(args.seed, "steps", step))
            trained = sorted(noisy.stochastic[position] for position in chosen[:num_trained].tolist())
            self._update(run, weights, noisy, rollout, trained)
            self._leash.settle(step)
            if self.refresh is not None:
                self.refresh.step(run, scoring, rollout, step, args.num_updates)
            run.record(epoch=step + 1)
            run.state["unet_forwards"] = self.unet_forwards

        weights.finish(best="best_step" in run.state)
        weights.push_to_hub()
        run.finish()
        return self.watch.result(run)

    # ------------------------------------------------------------------------------------------------------ rollouts

    def _draw_window(self, table: StepTable, size: int, step: int) -> StepTable:
        """The steps that have noise in rollout number `step`."""
        positions = len(table.stochastic) - size + 1
        start = torch.randint(positions, (1,), generator=generator_for(self.args.seed, "window", step)).item()
        return table if positions == 1 else table.window(start, size)

    def _sample(self, run: TrainingRun, scoring: Scoring, table: StepTable, step: int) -> tuple[Rollout, Scores]:
        """This process' samples of rollout number `step`, in the order the updates use them, and their raw rewards."""
        args, parts, scored = self.args, [], []
        with scoring.submitter() as submit:
            for numbers, rows in scoring.batches(step, args.num_updates):
                with run.accelerator.autocast():
                    part = sample_rollout(
                        self.policy,
                        self.conditions.take(rows),
                        table,
                        sample_generators(args.seed, f"rollout {step}", numbers),
                        args.guidance_scale,
                        args.log_prob_reduction,
                        vocabulary=self.conditions.values,
                        log_prob_guidance=args.train_guidance_scale,
                        keep_means=args.policy_loss == "kl_mask",
                        latents=self._antithetic_noise(numbers, step) if args.antithetic else None,
                    )
                scored.append(submit(part.samples, rows))
                parts.append(part.to("cpu") if args.offload_rollouts else part)
            scores = scoring.collect(scored)
        forwards = len(table) * cost_of_prediction(args.guidance_scale)
        if args.train_guidance_scale != args.guidance_scale:
            forwards += len(table.stochastic) * cost_of_prediction(args.train_guidance_scale)
        self.unet_forwards += args.samples_per_rollout * run.accelerator.num_processes * forwards
        return Rollout.cat(parts), scores

    def _antithetic_noise(self, numbers: Sequence[int], step: int) -> torch.Tensor:
        """Where samples of these numbers start: in pairs of one condition, the second from the first one's noise negated."""
        size = len(self.conditions)  # the sample of the same condition after this one stands so many places further
        second = [number // size % 2 == 1 for number in numbers]
        partners = [number - size * is_second for number, is_second in zip(numbers, second, strict=True)]
        generators = sample_generators(self.args.seed, f"antithetic noise {step}", partners)
        noise = randn_tensor((len(numbers), *self.policy.latent_shape), generators)
        signs = 1 - 2 * torch.tensor(second, dtype=noise.dtype)
        return noise * signs.view(-1, *[1] * len(self.policy.latent_shape))

    # ------------------------------------------------------------------------------------------------------- updates

    def _update(
        self, run: TrainingRun, weights: TunedWeights, table: StepTable, rollout: Rollout, trained: Sequence[int]
    ) -> None:
        """`num_updates` optimizer updates; gradients are accumulated over samples x denoising steps."""
        args, accelerator, leash = self.args, run.accelerator, self._leash
        for update, rows_of_update in enumerate(torch.arange(len(rollout)).chunk(args.num_updates)):
            run.doing(f"update {update + 1} of {args.num_updates}")
            for number, rows in enumerate(rows_of_update.split(args.train_batch_size)):
                batch = rollout.select(rows.to(rollout.latents.device)).to(run.device)
                # without a leash the divergence is only watched, on a few samples per rollout: the reference costs a forward
                watched = -(-len(batch) // WATCHED_SHARE) if update == number == 0 else 0
                measured = len(batch) if leash.is_measured else watched
                for t in trained:
                    with accelerator.accumulate(weights.denoiser):
                        loss, kl, stats = self._loss(run, table, batch, rows, t, measured)
                        if update == 0:
                            self._check_ratio(stats)
                            run.record(**{"ppo/ratio_first": stats["ratio_mean"]})
                        norm = weights.backward(loss)
                    if norm is not None:
                        run.record(**{"ppo/grad_norm": norm})
                    if measured:
                        leash.note(kl)
                    run.record(**{f"ppo/{name}": value for name, value in stats.items()}, **{"ppo/loss": loss})
                    more = args.gradient_checkpointing + int(leash.moving is not None)
                    passes = len(batch) * (1 + COST_OF_BACKWARD + more) + measured
                    cost = cost_of_prediction(args.train_guidance_scale)
                    self.unet_forwards += passes * accelerator.num_processes * cost
            if not weights.end_update():
                break

    def _loss(
        self, run: TrainingRun, table: StepTable, batch: Rollout, rows: torch.Tensor, t: int, measured: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, Scores]:
        """The objective of one denoising step of the samples `rows` of a rollout; the divergence from the pretrained policy of
        the first `measured`."""
        args, leash = self.args, self._leash
        with run.accelerator.autocast():
            mean, std = self._moments(table, t, batch)
            pretrained = anchor = None
            if measured:
                with torch.no_grad(), self.policy.reference():
                    pretrained, _ = self._moments(table, t, batch.select(slice(measured)))
            if leash.moving is not None:
                with torch.no_grad(), leash.moving.predicting():
                    anchor, _ = self._moments(table, t, batch)
        log_prob = gaussian_log_prob(batch.latents[:, t + 1], mean, std, args.log_prob_reduction)
        if args.policy_loss == "clip":
            loss, stats = ppo_clip_loss(log_prob, batch.log_probs[:, t], batch.advantages, self._clip_range)
        else:
            moved = gaussian_kl(mean, batch.means[:, t], std)
            loss, stats = kl_mask_loss(log_prob, batch.log_probs[:, t], batch.advantages, moved, args.kl_threshold)
        # reduced as the log-probabilities are, so that a coefficient means the same; what is reported is per element
        reduction = args.log_prob_reduction
        kl = None if pretrained is None else gaussian_kl(mean[:measured], pretrained, std, reduction)
        held = kl if anchor is None else gaussian_kl(mean, anchor, std, reduction)
        if held is not None:
            loss = loss + leash.penalty(held, rows)
        per_element = mean[0].numel() if reduction == "sum" else 1
        return loss, None if kl is None else kl.mean() / per_element, stats

    def _moments(self, table: StepTable, step: int, batch: Rollout) -> StepMoments:
        return step_moments(
            self.policy, table, step, batch.latents[:, step], batch.conditioning, self.args.train_guidance_scale
        )

    def _check_ratio(self, stats: Scores) -> None:
        deviation = stats["ratio_deviation"].item()
        if not deviation < self._clip_range:
            raise RuntimeError(
                f"Before the first update the ratio of new to old policy deviates from 1 by {deviation:.2g} (clip range "
                f"{self._clip_range:.2g}): sampling and training disagree. Usual causes: dropout, batch normalization, "
                "half precision or compilation on one path only, or a changed scheduler."
            )
