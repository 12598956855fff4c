"""RewardBackpropTrainer: gradients of differentiable rewards through the decoder and the last denoising steps.

DRaFT-K and DRaFT-LV (arXiv 2309.17400) and ReFL (arXiv 2304.05977). What differs from the code in use, or is left open there:
1. Gradients of the rewards by the latents come first, in batches of `reward_batch_size`; then the denoiser is passed with
   them. So decoder and reward networks are not in memory together with the denoiser, and one sample's gradient can be clipped.
2. The denoising steps are replayed from the states of the rollout with its own noise; the rollout keeps no graph.
3. Rewards are standardized on the first rollout and enter as they are (ReFL: without its map by ReLU, which is for one reward
   of known range), and the loss of pretraining is not mixed in; the divergence from the pretrained model holds instead.
4. ReFL finishes its rollouts, since watchdogs look at finished samples, and all samples of a rollout train one late step.
5. Averaged weights, a held-out figure that picks the weights, budget and limits: a reward that has gradients is exploited
   within few updates.
6. Everything random follows from the seed, the rollout's number and a sample's number within it.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from ..errors import InputError
from ..functional.backprop import clip_per_sample, late_steps, random_slices, surrogate_loss
from ..models.reward_models import SliceRewardModel, non_empty_slices
from ..rewards import Reward, WeightedSum
from ..rollouts import Rollout, StepTable, sample_rollout
from ..seeding import generator_for, sample_generators
from .base import TrainingRun
from .callbacks import Callbacks
from .conditions import Conditions
from .costs import COST_OF_BACKWARD, cost_of_prediction
from .gradient_steps import GradientSteps
from .leash import WATCHED_SHARE, settle_updates
from .lora import save_lora
from .reward_backprop_config import RewardBackpropConfig
from .reward_backprop_variants import VARIANTS, Drawn
from .scoring import Scores, Scoring, join_rewards
from .tuned_weights import TunedWeights, only_denoiser_trained, tunable_policy
from .watchdogs import Watch, Watchdog, check_patience, draw_samples


class RewardBackpropTrainer:
    """Fine-tunes the denoiser of `pipeline` to raise differentiable rewards, by their own gradients.

    Logged are the rewards of the rollout, the watchdogs, and `draft/*`, whatever the variant: `loss`; `trained_reward`, that of
    the samples which had gradients; `reward_grad_norm`, of a sample's standardized reward by its latents, before clipping;
    `grad_norm`; and `kl`. The last one is the closed-form Gaussian divergence per step and element from the pretrained model, at
    the states that were trained, if all steps that may be trained have noise (`args.min_std`); otherwise the mean squared
    difference of the predictions. `train()` says which, as `kl_form`. The reference is a constant in its gradient.

    With `args.fuse_lora=False` the adapter stays in the pipeline, and is in `output_dir/pytorch_lora_weights.safetensors`:
    `pipeline.set_adapters("default", 0.5)` is half way between the pretrained and the tuned model.

    Args:
        pipeline: any pipeline that has a policy (`policies.POLICIES`) whose `decode` passes gradients.
        reward_funcs: one differentiable reward or several, in any form `rewards.as_reward` knows; they are standardized on the
            first rollout and summed by `args.reward_weights`.
        args: settings.
        train_conditions: class labels or prompts, taken in turn; all classes of the pipeline by default.
        train_dataset: instead of `train_conditions`, a `datasets.Dataset` with a column `prompt`, `label` or `class_label`;
            its other columns are metadata.
        watchdogs: figures of a rollout that are logged and never trained on, by name; beside those of `watchdogs.py`.
        select_by: name of the watchdog whose highest value (`"-name"`: lowest) picks the weights kept at the end, and
            against which `args.patience` counts; the last weights are kept if not given. A held-out reward is the usual one.
            With `args.ema_decay` the average is kept, though rollouts are sampled with the trained weights.
        callbacks: `transformers.TrainerCallback` objects or classes.

    Raises:
        InputError: a reward that is not differentiable, no conditions, an unknown `select_by` or none for `args.patience`,
            `num_slices` without a reward of slices, or `decode: pre_quantization` without a quantizer.
    """

    def __init__(
        self,
        pipeline,
        reward_funcs: Reward | Callable | str | Sequence,
        args: RewardBackpropConfig | None = None,
        train_conditions: Sequence | None = None,
        train_dataset=None,
        watchdogs: Mapping[str, Watchdog] | None = None,
        select_by: str | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    ):
        self.pipeline, self.args = pipeline, args or RewardBackpropConfig()
        args = self.args
        self.reward = join_rewards(reward_funcs, args.reward_weights)
        stiff = [part.name for part in self.reward.rewards if not part.differentiable]
        if stiff:
            raise InputError(
                f"The rewards {stiff} are not differentiable: leave them out, or tune by DiffusionPPOTrainer; where gradients do pass "
                "through one, give it the attributes name and differentiable=True."
            )
        if args.num_slices is not None and not any(map(_sees_slices, self.reward.rewards)):
            raise InputError(
                f"num_slices={args.num_slices} is for a SliceRewardModel, and no reward is one: unset it."
            )
        if args.decode == "pre_quantization" and not hasattr(_autoencoder(pipeline), "quantize"):
            raise InputError(
                f"decode: pre_quantization needs an autoencoder that quantizes, and that of {type(pipeline).__name__} does "
                "not; leave decode at straight_through."
            )
        self.conditions = Conditions.of(pipeline, train_conditions, train_dataset)
        check_patience(args.patience, select_by)
        self.watch = Watch(watchdogs, select_by, args.watch_limits, args.patience, args.watch_steps)
        self.callbacks = callbacks
        self.unet_forwards = 0
        self.policy = tunable_policy(pipeline, args)

    def train(self) -> dict:
        """Run the training; the pipeline holds the chosen weights afterwards. Returns the figures of the rollout they were
        chosen by (`Watch.result`), and `kl_form`."""
        args = self.args
        micro_batches = args.samples_per_rollout // args.train_batch_size
        run = TrainingRun(args, "draft", gradient_accumulation_steps=micro_batches, allow_fsdp=True)
        self.pipeline.to(run.device)
        table = StepTable.of(self.policy.scheduler, args.num_inference_steps, args.eta, args.min_std, run.device)
        last = range(len(table) - args.gradient_steps, len(table))
        trained = late_steps(len(table), args.late_fraction) if args.variant == "refl" else last
        self._steps = GradientSteps(self.policy, table, args.guidance_scale, trained)
        run.callbacks = Callbacks(self.callbacks, args, self.pipeline.unet, run.is_main) if self.callbacks else None
        weights = SwitchableWeights(run, self.pipeline, self.policy, args.max_steps)
        run.resume()
        self.watch.resume(run)
        scoring = Scoring(run, self.reward, self.conditions)
        self.unet_forwards = run.state.get("unet_forwards", 0)

        with only_denoiser_trained(self.pipeline), _checkpointed_decoder(self.pipeline, args.decoder_checkpointing):
            for step in run.steps():
                rollout, drawn, scores = self._sample(run, scoring, table, step)
                rewards = scoring.combine(scores)
                scoring.record(rewards, scores, rollout.conditions)
                with weights.averaged():  # those that would be kept
                    figures = self.watch.figures(run, self.policy, table, rollout, scores, args.guidance_scale)
                if self.watch.judge(run, figures, step):
                    weights.save_best()
                draw_samples(run, rollout.samples, rewards, step)
                settle_updates(run, "draft", self._update(run, weights, rollout, drawn, step))
                run.record(epoch=step + 1)
                run.state["unet_forwards"] = self.unet_forwards

        weights.finish(best="best_step" in run.state)
        weights.push_to_hub()
        run.finish()
        return {**self.watch.result(run), "kl_form": self._steps.kl_form}

    def _sample(
        self, run: TrainingRun, scoring: Scoring, table: StepTable, step: int
    ) -> tuple[Rollout, Drawn, Scores]:
        """This process' samples of rollout number `step`, which they are, and their raw rewards; without gradients."""
        args, parts, scored, drawn = self.args, [], [], Drawn([], [])
        with scoring.submitter() as submit:
            for numbers, rows in scoring.batches(step):
                with run.accelerator.autocast():
                    part = sample_rollout(
                        self.policy,
                        self.conditions.take(rows),
                        table,
                        sample_generators(args.seed, f"rollout {step}", numbers),
                        args.guidance_scale,
                        vocabulary=self.conditions.values,
                    )
                scored.append(submit(part.samples, rows))
                parts.append(part.to("cpu") if args.offload_rollouts else part)
                drawn = Drawn(drawn.numbers + numbers, drawn.rows + rows)
            scores = scoring.collect(scored)
        self._count(run, len(drawn.numbers) * len(table))
        return Rollout.cat(parts), drawn, scores

    # ------------------------------------------------------------------------------------------------------- updates

    def _update(
        self, run: TrainingRun, weights: TunedWeights, rollout: Rollout, drawn: Drawn, step: int
    ) -> dict[str, list[torch.Tensor]]:
        """One optimizer update, its gradient accumulated over micro-batches. Returns what to log."""
        args, accelerator, noted = self.args, run.accelerator, defaultdict(list)
        held = args.kl_coef > 0 or args.kl_budget is not None
        for number, rows in enumerate(torch.arange(len(rollout)).split(args.train_batch_size)):
            batch = rollout.select(rows.to(rollout.latents.device)).to(run.device)
            which = drawn.select(rows.tolist())
            # without a leash the divergence is only watched, on a few samples per rollout: the reference costs forwards
            watched = -(-len(batch) // WATCHED_SHARE) if number == 0 else 0
            measured = len(batch) if held else watched
            with accelerator.accumulate(weights.denoiser):
                with accelerator.autocast():
                    scored, visits = VARIANTS[args.variant](self._steps, batch, which, step, args)
                gradients, rewards = self._reward_gradients(run, scored, which, step)
                gradients, norms = clip_per_sample(gradients, args.reward_grad_clip)
                loss = args.reward_loss_coef * surrogate_loss(scored.flatten(0, 1), gradients)
                value = -args.reward_loss_coef * rewards.mean()
                if measured:
                    with accelerator.autocast():
                        kl = self._steps.divergence(visits, batch.conditioning, measured).mean()
                    loss, value = loss + args.kl_coef * kl, value + args.kl_coef * kl
                    noted["kl"].append(kl.detach())
                norm = weights.backward(loss)
            if norm is not None:
                run.record(**{"draft/grad_norm": norm})
            noted["loss"].append(value.detach())
            noted["trained_reward"].append(rewards.mean())
            noted["reward_grad_norm"].append(norms.mean())
            passes = 1 + COST_OF_BACKWARD + args.gradient_checkpointing
            self._count(run, len(visits) * (len(batch) * passes + measured))
        weights.end_update()
        return noted

    def _reward_gradients(
        self, run: TrainingRun, scored: torch.Tensor, drawn: Drawn, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients `[N * B, C, *S]` of the standardized rewards of `scored [N, B, C, *S]` by these latents, and the rewards
        `[N * B]`.

        Raises:
            InputError: a reward that passes no gradient, or gradients that are not finite.
        """
        latents, draws = scored.detach().flatten(0, 1), len(scored)
        rows, gradients, rewards = drawn.rows * draws, [], []
        keys = [(number, draw) for draw in range(draws) for number in drawn.numbers]
        size = self.args.reward_batch_size or len(drawn.rows)
        for start in range(0, len(latents), size):
            part = slice(start, start + size)
            leaf = latents[part].requires_grad_()
            combined = self.reward.combine(self._rewards(run, self._decode(run, leaf), rows[part], keys[part], step))
            gradients += torch.autograd.grad(combined.sum(), leaf)
            rewards.append(combined.detach())
        gradients = torch.cat(gradients)
        wrong = (~torch.isfinite(gradients.flatten(1)).all(dim=1)).sum().item()
        if wrong:
            raise InputError(
                f"The rewards' gradient is not finite for {wrong} of {len(gradients)} samples of rollout {step}; look for a "
                "division or a root at zero in the rewards."
            )
        return gradients, torch.cat(rewards)

    def _decode(self, run: TrainingRun, latents: torch.Tensor) -> torch.Tensor:
        """Samples `[B, C, *S]` in [-1, 1], with gradients to `latents`."""
        full = run.accelerator.mixed_precision == "fp16"  # gradients would underflow: no loss scale is in force here
        with nullcontext() if full else run.accelerator.autocast():
            if self.args.decode == "pre_quantization":
                return self.pipeline.decode_latents(latents, force_not_quantize=True)
            return self.policy.decode(latents)

    def _rewards(
        self, run: TrainingRun, samples: torch.Tensor, rows: list[int], keys: Sequence[tuple[int, int]], step: int
    ) -> Scores:
        """Raw rewards `{name: [B]}` with gradients to `samples`; a slice reward sees the random slices that `keys` (number of
        the sample and of its draw) give."""
        args, found = self.args, {}
        for reward in self.reward.rewards:
            seen = samples
            if args.num_slices is not None and _sees_slices(reward):
                generators = [generator_for(args.seed, "slices", step, *key) for key in keys]
                random = torch.stack([torch.rand(samples.shape[2], generator=generator) for generator in generators])
                counting = non_empty_slices(samples, reward.model.config.empty_threshold)
                seen = random_slices(samples, counting, random.to(samples.device), args.num_slices)
            found |= Scoring(run, WeightedSum([reward]), self.conditions).raw(seen, rows)
            if not found[reward.name].requires_grad:
                raise InputError(
                    f"Reward {reward.name!r} says it is differentiable, but no gradient passes from its value to the samples; "
                    "look for no_grad or detach in it, or tune by DiffusionPPOTrainer."
                )
        return found

    def _count(self, run: TrainingRun, predictions: int) -> None:
        cost = cost_of_prediction(self.args.guidance_scale)
        self.unet_forwards += predictions * run.accelerator.num_processes * cost


# --------------------------------------------------------------------------------------------- weights, networks, rewards


class SwitchableWeights(TunedWeights):
    """`TunedWeights` that may leave the adapter apart from the weights beside it, so that its scale can be chosen."""

    def finish(self, best: bool) -> None:
        """As that of `TunedWeights`; with `args.fuse_lora=False` the adapter stays in the pipeline and is saved."""
        if self.args.fuse_lora:
            super().finish(best)
            return
        self.args = copy.copy(self.args)
        self.args.use_lora = False  # there is nothing to fuse
        super().finish(best)
        if self.run.is_main:
            save_lora(self.pipeline, self.run.output_dir)


def _autoencoder(pipeline) -> nn.Module:
    return pipeline.vqvae if hasattr(pipeline, "vqvae") else pipeline.vae


def _sees_slices(reward: Reward) -> bool:
    return isinstance(getattr(reward, "model", None), SliceRewardModel)


@contextmanager
def _checkpointed_decoder(pipeline, enabled: bool) -> Iterator[None]:
    """Within it, if `enabled`, the decoder keeps what passes between its layers, and recomputes the rest in the backward pass."""
    decoder = _autoencoder(pipeline).decoder
    layers = list(getattr(decoder, "layers", None) or decoder.up_blocks) if enabled else []
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
