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
"""

import os
from collections.abc import Callable, Mapping, Sequence

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from ..errors import InputError
from ..functional.advantages import normalize_advantages
from ..functional.denoising import gaussian_kl, gaussian_log_prob
from ..functional.objectives import ppo_clip_loss, scaled_clip_range
from ..policies import make_policy
from ..rewards import Reward, WeightedSum
from ..rewards.base import Scale
from ..rollouts import Rollout, StepTable, sample_rollout, step_moments
from ..seeding import generator_for, sample_generators
from .base import TrainingRun, channels_last
from .ppo_config import DiffusionPPOConfig


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
COST_OF_TRAINING = 4  # in forwards per sample and step: one forward, a backward worth two, the reference's forward
Watchdog = Callable[[Rollout], float]


class DiffusionPPOTrainer:
    """Fine-tunes the denoiser of `pipeline` to raise rewards, near the pretrained model.

    Args:
        pipeline: any pipeline that has a policy (`policies.POLICIES`).
        reward_funcs: one reward or several; several are standardised on the first rollout and summed by
            `args.reward_weights`.
        args: settings.
        train_conditions: class labels or prompts, taken in turn; all classes of the pipeline by default.
        watchdogs: figures of a rollout that are logged and never trained on, by name.
        select_by: name of the watchdog whose highest value (`"-name"`: lowest) picks the weights kept at the end, and
            against which `args.patience` counts; the last weights are kept if not given.
    """

    def __init__(
        self,
        pipeline,
        reward_funcs: Reward | Sequence[Reward],
        args: DiffusionPPOConfig,
        train_conditions: Sequence | None = None,
        watchdogs: Mapping[str, Watchdog] | None = None,
        select_by: str | None = None,
    ):
        self.pipeline, self.args = pipeline, args
        if isinstance(reward_funcs, WeightedSum):
            self.reward = reward_funcs
        else:
            rewards = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
            self.reward = WeightedSum(rewards, args.reward_weights)
        if train_conditions is None and not hasattr(pipeline, "id2label"):
            raise InputError(f"{type(pipeline).__name__} has no classes; give its prompts as train_conditions.")
        self.train_conditions = list(train_conditions if train_conditions is not None else pipeline.id2label)
        self.watchdogs = dict(watchdogs or {})
        if select_by is not None and select_by.removeprefix("-") not in self.watchdogs:
            raise InputError(f"select_by={select_by!r} is no watchdog; there are {sorted(self.watchdogs)}.")
        self.select_by = select_by
        self.unet_forwards = 0
        if args.use_lora:
            pipeline.unet.requires_grad_(False)
            pipeline.unet.add_adapter(
                LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=LORA_TARGETS)
            )
        self.policy = make_policy(pipeline)

    def train(self) -> dict[str, float]:
        """Run the training; the pipeline holds the chosen weights afterwards. Returns that rollout's figures."""
        args = self.args
        table = StepTable.of(self.policy.scheduler, args.num_inference_steps, args.eta, args.min_std)
        if not table.stochastic:
            raise InputError(
                f"No denoising step reaches min_std={args.min_std} (eta={args.eta}); lower min_std or raise eta."
            )
        num_trained = max(1, round(args.timestep_fraction * len(table.stochastic)))
        micro_batches = args.samples_per_rollout // args.train_batch_size // args.num_updates * num_trained
        run = TrainingRun(args, "ppo", gradient_accumulation_steps=micro_batches)
        accelerator = run.accelerator
        table = StepTable.of(self.policy.scheduler, args.num_inference_steps, args.eta, args.min_std, run.device)
        self.pipeline.to(run.device)
        denoiser = channels_last(self.pipeline.unet)
        trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        optimizer = run.optimizer(trainable)
        scheduler = run.lr_scheduler(optimizer, args.max_steps * args.num_updates)
        denoiser, optimizer, scheduler = accelerator.prepare(denoiser, optimizer, scheduler)
        self.policy.denoiser = denoiser
        clip_range = scaled_clip_range(
            args.clip_shift, int(torch.tensor(self.policy.latent_shape).prod()), args.log_prob_reduction
        )
        run.resume()
        self.unet_forwards = run.state.get("unet_forwards", 0)
        if "scales" in run.state:
            self.reward.scales = {name: Scale(**scale) for name, scale in run.state["scales"].items()}

        for step in run.steps():
            rollout = self._sample(run, table, step)
            parts = self.reward.parts(rollout.samples, rollout.conditions)
            if not self.reward.scales:  # the first rollout is the reference policy's
                self.reward.fit({name: accelerator.gather(values) for name, values in parts.items()})
                run.state["scales"] = {name: vars(scale) for name, scale in self.reward.scales.items()}
            rewards = self.reward.combine(parts)
            rollout = rollout.with_advantages(self._advantages(run, rewards, rollout.conditions))
            run.record(reward=accelerator.gather(rewards).mean(), reward_std=accelerator.gather(rewards).std())
            run.record(**{name: accelerator.gather(values).mean() for name, values in parts.items()})
            if self._watch(run, rollout, step):
                run.stop("the selection figure has not improved")

            generator = generator_for(args.seed, "update", step)
            order = torch.randperm(len(rollout), generator=generator)
            chosen = torch.randperm(len(table.stochastic), generator=generator)[:num_trained].sort().values
            trained_steps = [table.stochastic[i] for i in chosen.tolist()]
            kl_sum, kl_count = 0.0, 0
            for update, rows_of_update in enumerate(order.chunk(args.num_updates)):
                for rows in rows_of_update.split(args.train_batch_size):
                    batch = rollout.select(rows.to(run.device))
                    for t in trained_steps:
                        with accelerator.accumulate(denoiser), accelerator.autocast():
                            mean, std = self._moments(table, t, batch)
                            log_prob = gaussian_log_prob(batch.latents[:, t + 1], mean, std, args.log_prob_reduction)
                            with torch.no_grad(), self.policy.reference():
                                reference_mean, _ = self._moments(table, t, batch)
                            policy_loss, stats = ppo_clip_loss(
                                log_prob, batch.log_probs[:, t], batch.advantages, clip_range
                            )
                            kl = gaussian_kl(mean, reference_mean, std).mean()
                            if update == 0:
                                self._check_ratio(stats, clip_range)
                            accelerator.backward(policy_loss + args.kl_coef * kl)
                            if accelerator.sync_gradients:
                                run.record(grad_norm=accelerator.clip_grad_norm_(trainable, args.max_grad_norm))
                            optimizer.step()
                            optimizer.zero_grad()
                        kl_sum, kl_count = kl_sum + kl.item(), kl_count + 1
                        run.record(**stats)
                        self.unet_forwards += len(batch) * COST_OF_TRAINING * self._forwards_per_prediction
                scheduler.step()
            run.record(kl=kl_sum / kl_count)
            run.state["unet_forwards"] = self.unet_forwards
            if args.kl_budget is not None and kl_sum / kl_count > args.kl_budget:
                run.stop(f"the KL divergence passed kl_budget={args.kl_budget}")
        return self._finish(run)

    @property
    def _forwards_per_prediction(self) -> int:
        return 1 if self.args.guidance_scale == 1.0 else 2

    def _sample(self, run: TrainingRun, table: StepTable, step: int) -> Rollout:
        """This process' samples of rollout number `step`."""
        args, accelerator = self.args, run.accelerator
        indices = run.shard(torch.arange(args.samples_per_rollout * accelerator.num_processes))
        parts = []
        for batch in indices.split(args.rollout_batch_size):
            conditions = [self.train_conditions[i % len(self.train_conditions)] for i in batch.tolist()]
            generators = sample_generators(args.seed, f"rollout {step}", batch.tolist())
            with accelerator.autocast():
                parts.append(
                    sample_rollout(
                        self.policy,
                        conditions,
                        table,
                        generators,
                        args.guidance_scale,
                        args.log_prob_reduction,
                        vocabulary=self.train_conditions,
                    )
                )
        self.unet_forwards += len(indices) * len(table) * self._forwards_per_prediction
        return Rollout.cat(parts)

    def _advantages(self, run: TrainingRun, rewards: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        """Advantages of this process' samples, with statistics over all processes."""
        gather = run.accelerator.gather
        advantages = normalize_advantages(gather(rewards), gather(conditions), self.args.adv_clip_max)
        return advantages.reshape(run.accelerator.num_processes, -1)[run.accelerator.process_index]

    def _moments(self, table: StepTable, step: int, batch: Rollout):
        return step_moments(
            self.policy, table, step, batch.latents[:, step], batch.conditioning, self.args.guidance_scale
        )

    @staticmethod
    def _check_ratio(stats: Mapping[str, torch.Tensor], clip_range: float) -> None:
        deviation = stats["ratio_deviation"].item()
        if not deviation < clip_range:
            raise RuntimeError(
                f"Before the first update the ratio of new to old policy deviates from 1 by {deviation:.2g} (clip range "
                f"{clip_range:.2g}): sampling and training disagree. Usual causes: dropout, batch normalization, half "
                "precision or compilation on one path only, or a changed scheduler."
            )

    def _watch(self, run: TrainingRun, rollout: Rollout, step: int) -> bool:
        """Log the watchdogs; keep the weights if the selection figure is the best so far; whether patience is over.

        The figures are of the weights before this rollout's update.
        """
        figures = {name: watchdog(rollout) for name, watchdog in self.watchdogs.items()}
        run.record(**figures)
        if self.select_by is None:
            return False
        figure = figures[self.select_by.removeprefix("-")] * (-1 if self.select_by.startswith("-") else 1)
        if figure > run.state.get("best_figure", float("-inf")):
            run.state.update(best_figure=figure, best_step=step)
            self._save_best(run)
        patience = self.args.patience
        return patience is not None and step - run.state["best_step"] >= patience

    def _save_best(self, run: TrainingRun) -> None:
        if run.is_main:
            path = run.output_dir / "best.safetensors"
            unwrapped = run.accelerator.unwrap_model(self.policy.denoiser)
            save_file({name: value.contiguous() for name, value in unwrapped.state_dict().items()}, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        run.accelerator.wait_for_everyone()

    def _finish(self, run: TrainingRun) -> dict[str, float]:
        self.pipeline.unet = run.accelerator.unwrap_model(self.policy.denoiser, keep_fp32_wrapper=False)
        self.policy.denoiser = self.pipeline.unet
        best_step = run.state.get("best_step")
        if best_step is not None:
            self.pipeline.unet.load_state_dict(load_file(run.output_dir / "best.safetensors"))
        if self.args.use_lora:
            self.pipeline.unet.fuse_lora()
            self.pipeline.unet.unload_lora()
        self.pipeline.unet.eval()
        run.finish()
        chosen = [line for line in run.history if best_step is None or line["step"] <= best_step + 1]
        return {**(chosen or [{}])[-1], "stopped": run.stopped, "rollouts": run.step}
