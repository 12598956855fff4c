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
8. Everything random follows from the seed, the rollout's number and a sample's number within it, so neither the number of
   processes nor a resume changes what is sampled or in which update it is used.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from accelerate import DistributedType
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from ..errors import InputError
from ..functional.advantages import normalize_advantages
from ..functional.denoising import StepMoments, gaussian_kl, gaussian_log_prob
from ..functional.objectives import adapted_kl_coef, kl_mask_loss, ppo_clip_loss, scaled_clip_range
from ..plots import plot_samples
from ..policies import make_policy
from ..rewards import Reward, WeightedSum, as_reward
from ..rewards.base import Scale
from ..rollouts import Rollout, StepTable, sample_rollout, step_moments
from ..seeding import generator_for, sample_generators
from .base import TrainingRun, channels_last
from .callbacks import Callbacks
from .conditions import Conditions
from .ppo_config import DiffusionPPOConfig
from .watchdogs import high_frequency_share, prediction_norm, reward_disagreement, sample_diversity


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
COST_OF_BACKWARD = 2  # in forwards
WATCHED_SHARE = 8  # of how many samples of a batch one is compared with the reference, where there is no leash
Watchdog = Callable[[Rollout], float]
Scores = dict[str, torch.Tensor]


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
        callbacks: `transformers.TrainerCallback` objects or classes.

    Raises:
        InputError: something that is no reward, no conditions, or an unknown `select_by`.
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
    ):
        self.pipeline, self.args = pipeline, args or DiffusionPPOConfig()
        if isinstance(reward_funcs, WeightedSum):
            self.reward = reward_funcs
        else:
            several = isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
            sources = list(reward_funcs) if several else [reward_funcs]
            self.reward = WeightedSum([as_reward(source) for source in sources], self.args.reward_weights)
        self.conditions = Conditions.of(pipeline, train_conditions, train_dataset)
        self.watchdogs = dict(watchdogs or {})
        if select_by is not None and select_by.removeprefix("-") not in self.watchdogs:
            raise InputError(f"select_by={select_by!r} is no watchdog; there are {sorted(self.watchdogs)}.")
        self.select_by, self.callbacks = select_by, callbacks
        self.unet_forwards = 0
        if self.args.use_lora:
            pipeline.unet.requires_grad_(False)
            targets = self.args.lora_target_modules or LORA_TARGETS
            rank = self.args.lora_rank
            pipeline.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        if self.args.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        self.policy = make_policy(pipeline)

    def train(self) -> dict[str, float]:
        """Run the training; the pipeline holds the chosen weights afterwards. Returns that rollout's figures."""
        args = self.args
        table = StepTable.of(self.policy.scheduler, args.num_inference_steps, args.eta, args.min_std)
        if not table.stochastic:
            raise InputError(
                f"No denoising step reaches min_std={args.min_std} (eta={args.eta}); lower min_std or raise eta."
            )
        num_noisy = min(args.sde_window or len(table.stochastic), len(table.stochastic))
        num_trained = max(1, round(args.timestep_fraction * num_noisy))
        micro_batches = args.samples_per_rollout // args.train_batch_size // args.num_updates * num_trained
        run = TrainingRun(args, "ppo", gradient_accumulation_steps=micro_batches)
        self.pipeline.to(run.device)
        table = StepTable.of(self.policy.scheduler, args.num_inference_steps, args.eta, args.min_std, run.device)
        self._prepare(run)
        run.resume()
        self._restore(run.state)

        for step in run.steps():
            noisy = self._draw_window(table, num_noisy, step)
            rollout, scores = self._sample(run, noisy, step)
            rewards = self._combine(run, scores)
            self._record_rewards(run, rewards, scores, rollout)
            rollout = rollout.with_advantages(self._advantages(run, rewards, rollout.conditions))
            self._watch(run, noisy, rollout, scores, step)
            if args.log_samples_steps and step % args.log_samples_steps == 0:
                self._draw_samples(run, rollout, rewards, step)

            chosen = torch.randperm(len(noisy.stochastic), generator=generator_for(args.seed, "steps", step))
            trained = sorted(noisy.stochastic[position] for position in chosen[:num_trained].tolist())
            self._update(run, noisy, rollout, trained)
            run.record(epoch=step + 1)
            run.state["unet_forwards"] = self.unet_forwards
        return self._finish(run)

    # ------------------------------------------------------------------------------------------------------- set-up

    def _prepare(self, run: TrainingRun) -> None:
        """Optimizer, learning rate, averaged weights; the policy gets the denoiser that accelerate wrapped."""
        args = self.args
        sharded = run.accelerator.distributed_type == DistributedType.FSDP
        if sharded and (args.use_lora or args.ema_decay is not None):
            raise InputError("With FSDP all weights are trained, without averages: unset use_lora and ema_decay.")
        denoiser = self.pipeline.unet if sharded else channels_last(self.pipeline.unet)  # FSDP wants them contiguous
        optimizer = run.optimizer([value for value in denoiser.parameters() if value.requires_grad])
        scheduler = run.lr_scheduler(optimizer, args.max_steps * args.num_updates)
        run.callbacks = Callbacks(self.callbacks, args, denoiser, run.is_main) if self.callbacks else None
        self.policy.denoiser, self._optimizer, self._scheduler = run.accelerator.prepare(
            denoiser, optimizer, scheduler
        )
        inner = run.accelerator.unwrap_model(self.policy.denoiser)  # sharding has put other parameters into it
        self._trainable = {name: value for name, value in inner.named_parameters() if value.requires_grad}
        self._ema = None
        if args.ema_decay is not None:
            self._ema = EMAModel(list(self._trainable.values()), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
            run.accelerator.register_for_checkpointing(self._ema)
        num_elements = int(torch.tensor(self.policy.latent_shape).prod())
        self._clip_range = scaled_clip_range(args.clip_shift, num_elements, args.log_prob_reduction)

    def _restore(self, state: dict) -> None:
        """What a checkpoint remembers beside weights and optimizer."""
        self.unet_forwards = state.get("unet_forwards", 0)
        if "scales" in state:
            self.reward.scales = {name: Scale(**scale) for name, scale in state["scales"].items()}
        self._kl_coef = state.setdefault("kl_coef", self.args.kl_coef)
        if self._ema is not None:
            self._ema.to(next(iter(self._trainable.values())).device)

    # ------------------------------------------------------------------------------------------------------ rollouts

    def _draw_window(self, table: StepTable, size: int, step: int) -> StepTable:
        """The steps that have noise in rollout number `step`."""
        positions = len(table.stochastic) - size + 1
        start = torch.randint(positions, (1,), generator=generator_for(self.args.seed, "window", step)).item()
        return table if positions == 1 else table.window(start, size)

    def _sample(self, run: TrainingRun, table: StepTable, step: int) -> tuple[Rollout, Scores]:
        """This process' samples of rollout number `step`, in the order the updates use them, and their raw rewards."""
        args, num_processes = self.args, run.accelerator.num_processes
        total = args.samples_per_rollout * num_processes
        order = torch.randperm(total, generator=generator_for(args.seed, "order", step))
        indices = torch.cat([run.shard(part) for part in order.chunk(args.num_updates)])
        parts, scores = [], []
        with self._scorer() as submit:
            for batch in indices.split(args.rollout_batch_size):
                rows = [(step * total + index) % len(self.conditions) for index in batch.tolist()]
                with run.accelerator.autocast():
                    part = sample_rollout(
                        self.policy,
                        self.conditions.take(rows),
                        table,
                        sample_generators(args.seed, f"rollout {step}", batch.tolist()),
                        args.guidance_scale,
                        args.log_prob_reduction,
                        vocabulary=self.conditions.values,
                        log_prob_guidance=args.train_guidance_scale,
                        keep_means=args.policy_loss == "kl_mask",
                    )
                scores.append(submit(self._score, part.samples, rows))
                parts.append(part.to("cpu") if args.offload_rollouts else part)
            scores = [future.result() for future in scores]
        forwards = len(table) * self._cost(args.guidance_scale)
        if args.train_guidance_scale != args.guidance_scale:
            forwards += len(table.stochastic) * self._cost(args.train_guidance_scale)
        self.unet_forwards += total * forwards
        return Rollout.cat(parts), {name: torch.cat([score[name] for score in scores]) for name in scores[0]}

    @contextmanager
    def _scorer(self) -> Iterator[Callable[..., Future]]:
        """A function that runs another one: in a thread of its own with `async_rewards`, else at once."""
        if self.args.async_rewards:
            with ThreadPoolExecutor(max_workers=1) as executor:
                yield executor.submit
        else:

            def run_now(function: Callable, *arguments) -> Future:
                future = Future()
                future.set_result(function(*arguments))
                return future

            yield run_now

    @torch.no_grad()
    def _score(self, samples: torch.Tensor, rows: Sequence[int]) -> Scores:
        """Raw rewards of samples made of these rows of the conditions, in micro-batches."""
        size = self.args.reward_batch_size or len(samples)
        parts = []
        for start in range(0, len(samples), size):
            some = rows[start : start + size]
            conditions = self.conditions.take(some)
            if all(isinstance(condition, int) for condition in conditions):
                conditions = torch.tensor(conditions, device=samples.device)
            parts.append(
                self.reward.parts(samples[start : start + size], conditions, self.conditions.metadata_of(some))
            )
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    # ------------------------------------------------------------------------------------------ rewards and watchdogs

    def _combine(self, run: TrainingRun, scores: Scores) -> torch.Tensor:
        """The standardised, weighted reward. The first rollout, the reference policy's, gives the scales."""
        if not self.reward.scales:
            self.reward.fit({name: run.accelerator.gather(values) for name, values in scores.items()})
            run.state["scales"] = {name: vars(scale) for name, scale in self.reward.scales.items()}
        return self.reward.combine(scores)

    def _record_rewards(self, run: TrainingRun, rewards: torch.Tensor, scores: Scores, rollout: Rollout) -> None:
        gather = run.accelerator.gather
        rewards, groups = gather(rewards), gather(rollout.conditions.to(rewards.device))
        spreads = [rewards[groups == group].std(correction=0) for group in groups.unique()]
        means = {f"reward/{name}": gather(values).mean() for name, values in scores.items()}
        run.record(**{"reward/mean": rewards.mean(), "reward/std": rewards.std(), **means})
        run.record(**{"reward/frac_zero_std": torch.stack([spread == 0 for spread in spreads]).float().mean()})

    def _advantages(self, run: TrainingRun, rewards: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        """Advantages of this process' samples, with statistics over all processes."""
        gather = run.accelerator.gather
        conditions = conditions.to(rewards.device)
        advantages = normalize_advantages(gather(rewards), gather(conditions), self.args.adv_clip_max)
        mine = advantages.reshape(run.accelerator.num_processes, -1)[run.accelerator.process_index]
        return mine.cpu() if self.args.offload_rollouts else mine

    def _watch(self, run: TrainingRun, table: StepTable, rollout: Rollout, scores: Scores, step: int) -> None:
        """Log the watchdogs; keep the weights if the selection figure is the best so far; stop where it is time to.

        The figures are of the weights before this rollout's update, averaged over processes.
        """
        args = self.args
        head = rollout.select(slice(args.train_batch_size)).to(run.device)
        with run.accelerator.autocast():
            norm = prediction_norm(self.policy, table, head, args.train_guidance_scale)
        figures = {
            "prediction_norm": norm,
            "diversity": sample_diversity(rollout.samples, rollout.conditions),
            "high_frequency": high_frequency_share(rollout.samples),
        }
        if len(scores) > 1:
            figures["reward_disagreement"] = reward_disagreement(scores)
        figures.update({name: watchdog(rollout) for name, watchdog in self.watchdogs.items()})
        values = torch.tensor(list(figures.values()), dtype=torch.float32, device=run.device)
        figures = dict(zip(figures, run.accelerator.reduce(values, "mean").tolist(), strict=True))
        run.record(**{f"watch/{name}": value for name, value in figures.items()})

        for name, (low, high) in (args.watch_limits or {}).items():
            if name not in figures:
                raise InputError(f"watch_limits names {name!r}, which is no watchdog; there are {sorted(figures)}.")
            if not low <= figures[name] <= high:
                run.stop(f"the watchdog {name} left its limits {low} to {high}")
        if self.select_by is not None:
            figure = figures[self.select_by.removeprefix("-")] * (-1 if self.select_by.startswith("-") else 1)
            if figure > run.state.get("best_figure", float("-inf")):
                run.state.update(best_figure=figure, best_step=step)
                self._save_best(run)
            if args.patience is not None and step - run.state["best_step"] >= args.patience:
                run.stop("the selection figure has not improved")

    def _draw_samples(self, run: TrainingRun, rollout: Rollout, rewards: torch.Tensor, step: int) -> None:
        if run.is_main:
            titles = [f"{reward:+.2f}" for reward in rewards.tolist()]
            picture = plot_samples(rollout.samples, titles, run.output_dir / "samples" / f"rollout-{step:05d}.png")
            for tracker in run.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    tracker.log_images({"samples": picture[None]}, step=step, dataformats="NHWC")

    # ------------------------------------------------------------------------------------------------------- updates

    def _update(self, run: TrainingRun, table: StepTable, rollout: Rollout, trained: Sequence[int]) -> None:
        """`num_updates` optimizer updates; gradients are accumulated over samples x denoising steps."""
        args, accelerator, denoiser = self.args, run.accelerator, self.policy.denoiser
        leashed = self._kl_coef > 0 or args.kl_budget is not None or args.kl_mode == "adaptive"
        divergences = []
        for update, rows_of_update in enumerate(torch.arange(len(rollout)).chunk(args.num_updates)):
            for number, rows in enumerate(rows_of_update.split(args.train_batch_size)):
                batch = rollout.select(rows.to(rollout.latents.device)).to(run.device)
                # without a leash the divergence is only watched, on a few samples per rollout: the reference costs a forward
                watched = -(-len(batch) // WATCHED_SHARE) if update == number == 0 else 0
                measured = len(batch) if leashed else watched
                for t in trained:
                    with accelerator.accumulate(denoiser):
                        loss, kl, stats = self._loss(run, table, batch, t, measured)
                        if update == 0:
                            self._check_ratio(stats)
                            run.record(**{"ppo/ratio_first": stats["ratio_mean"]})
                        accelerator.backward(loss)
                        if accelerator.sync_gradients:
                            norm = accelerator.clip_grad_norm_(self._trainable.values(), args.max_grad_norm)
                            run.record(**{"ppo/grad_norm": norm})
                        self._optimizer.step()
                        self._optimizer.zero_grad()
                    if measured:
                        divergences.append(kl.detach())
                    run.record(**{f"ppo/{name}": value for name, value in stats.items()}, **{"ppo/loss": loss})
                    passes = len(batch) * (1 + COST_OF_BACKWARD) + measured
                    self.unet_forwards += passes * accelerator.num_processes * self._cost(args.train_guidance_scale)
            self._scheduler.step()
            if self._ema is not None:
                self._ema.step(self._trainable.values())
        kl = accelerator.reduce(torch.stack(divergences).mean(), "mean").item()
        run.record(**{"ppo/kl": kl, "ppo/kl_coef": self._kl_coef})
        if args.kl_mode == "adaptive":
            self._kl_coef = run.state["kl_coef"] = adapted_kl_coef(self._kl_coef, kl, args.kl_target, args.kl_rate)
        if args.kl_budget is not None and kl > args.kl_budget:
            run.stop(f"the KL divergence passed kl_budget={args.kl_budget}")

    def _loss(
        self, run: TrainingRun, table: StepTable, batch: Rollout, t: int, measured: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, Scores]:
        """The objective of one denoising step of some samples; the divergence from the reference of the first `measured`."""
        args = self.args
        with run.accelerator.autocast():
            mean, std = self._moments(table, t, batch)
            reference = None
            if measured:
                with torch.no_grad(), self.policy.reference():
                    reference, _ = self._moments(table, t, batch.select(slice(measured)))
        log_prob = gaussian_log_prob(batch.latents[:, t + 1], mean, std, args.log_prob_reduction)
        if args.policy_loss == "clip":
            loss, stats = ppo_clip_loss(log_prob, batch.log_probs[:, t], batch.advantages, self._clip_range)
        else:
            moved = gaussian_kl(mean, batch.means[:, t], std)
            loss, stats = kl_mask_loss(log_prob, batch.log_probs[:, t], batch.advantages, moved, args.kl_threshold)
        if reference is None:
            return loss, None, stats
        kl = gaussian_kl(mean[:measured], reference, std).mean()
        return loss + self._kl_coef * kl, kl, stats

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

    @staticmethod
    def _cost(guidance_scale: float) -> int:
        """Forwards of the denoiser in one prediction."""
        return 1 if guidance_scale == 1.0 else 2

    # ------------------------------------------------------------------------------------------------------- weights

    def _save_best(self, run: TrainingRun) -> None:
        with self._averaged():
            weights = self._whole_weights()
        if run.is_main:
            path = run.output_dir / "best.safetensors"
            save_file(weights, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        run.accelerator.wait_for_everyone()

    def _whole_weights(self) -> dict[str, torch.Tensor]:
        """What is trained, put together from all processes where it is sharded (FSDP); a copy, on the CPU."""
        whole = {}
        for name, value in self._trainable.items():
            value = value.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            whole[name] = value.cpu().clone(memory_format=torch.contiguous_format)
        return whole

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within it the denoiser has its averaged weights, if there are any."""
        if self._ema is None:
            yield
            return
        parameters = list(self._trainable.values())
        self._ema.store(parameters)
        self._ema.copy_to(parameters)
        try:
            yield
        finally:
            self._ema.restore(parameters)

    def _finish(self, run: TrainingRun) -> dict[str, float]:
        best_step = run.state.get("best_step")
        if best_step is not None:
            weights = load_file(run.output_dir / "best.safetensors")
        else:
            with self._averaged():
                weights = self._whole_weights()
        unet = run.accelerator.unwrap_model(self.policy.denoiser, keep_fp32_wrapper=False)
        if run.accelerator.distributed_type == DistributedType.FSDP:
            unet = self.policy.frozen_copy()  # the same network in one piece
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
        if self.args.use_lora:
            unet.fuse_lora()
            unet.unload_lora()
        self.pipeline.unet = self.policy.denoiser = unet.requires_grad_(True).eval()
        if self.args.push_to_hub and run.is_main:
            repository = self.args.hub_model_id or run.output_dir.resolve().name
            self.pipeline.push_to_hub(repository, private=self.args.hub_private_repo)
        run.finish()
        chosen = [line for line in run.history if best_step is None or line["step"] <= best_step + 1]
        return {**(chosen or [{}])[-1], "stopped": run.stopped, "rollouts": run.step}
