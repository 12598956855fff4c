"""FrechetTrainer: the Frechet distance to the real volumes as the loss, in features of one or several networks.

FD-loss (arXiv 2604.28190): the statistics are those of a population, the gradient that of a batch. What is added here:
1. The population is a queue of the last rollouts' features, filled by the pretrained policy before the first update; one
   queue per sampler, since a mixture of samplers can have the right moments while neither has.
2. The distance is taken within each class, and divided by that of the first queue, so that every extractor counts alike.
3. The gradient by the features comes first, of the whole batch over all processes; then denoiser, decoder and extractors are
   passed in micro-batches with it (the gradient cache of arXiv 2101.06983). So the loss is that of the batch, whatever its
   parts, and memory holds one micro-batch.
4. It is multiplied by population over batch: the gradient of a population drawn anew, as far as the batch can tell.
5. Gradients pass through the last denoising steps only, replayed from the rollout's own states with its own noise.
6. Averaged weights are judged on fresh samples, always of the same noise, which no update has seen; the best are kept.
7. Everything random follows from the seed, the rollout's number and a sample's number within it.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import TrainerCallback

from ..errors import InputError
from ..policies import Conditioning
from ..rollouts import Rollout, StepTable, sample_rollout
from ..seeding import batch_indices, sample_generators
from .base import TrainingRun
from .callbacks import Callbacks
from .conditions import Conditions
from .costs import COST_OF_BACKWARD, cost_of_prediction
from .denoising_loss import denoising_target
from .feature_population import FeatureQueue, Features, Representations
from .frechet_config import FrechetConfig
from .gradient_steps import GradientSteps
from .leash import WATCHED_SHARE
from .real_side import RealSide
from .scoring import Scoring
from .tuned_weights import TunedWeights, only_denoiser_trained, tunable_policy
from .watchdogs import Watch, Watchdog, draw_samples


KL_STEPS = 4  # denoising steps at which they are compared, evenly spaced
KL_MIN_STD = 0.01  # as that of PPO: where there is hardly any noise the divergence is no measure
FRESH = "fresh_frechet"  # the figure by which weights are picked


class FrechetTrainer:
    """Fine-tunes the denoiser of `pipeline` towards the distribution of real volumes, without a learned reward.

    Logged are the distance by each extractor (`frechet/NAME`, in its own units), `frechet/loss` (1 is the pretrained model),
    `frechet/kl` and `frechet/grad_norm`, the watchdogs, and every `args.eval_steps` steps `watch/fresh_frechet`. `frechet/kl`
    is the closed-form divergence per step and element of the sampler of largest eta from the pretrained one at the states
    visited; where no sampler has noise it is the mean squared difference of the predictions.

    Args:
        pipeline: any pipeline that has a policy (`policies.POLICIES`) whose `decode` passes gradients.
        extractors: networks from samples `[B, C, *S]` in [-1, 1] to features `[B, P, S, F]`, by name. Never the judge.
        real_volumes: a `VolumeDataset`, or `(pixel_values [N, C, *S] in [-1, 1], class_labels [N])`.
        args: settings.
        train_conditions: class labels or prompts, taken in turn; all classes of the pipeline by default.
        train_dataset: instead of `train_conditions`, a `datasets.Dataset` with a column `prompt`, `label` or `class_label`.
        watchdogs: figures of a rollout that are logged and never trained on, by name; beside those of `watchdogs.py`.
        select_by: name of the watchdog whose highest value (`"-name"`: lowest) picks the weights kept at the end, and
            against which `args.patience` counts; by default the distance of fresh samples does. With
            `args.ema_decay` the average is kept, which fresh samples are of, though rollouts are sampled with the trained weights.
        callbacks: `transformers.TrainerCallback` objects or classes.

    Raises:
        InputError: no extractors, another number of weights than of them, real volumes that do not fit the conditions, an unknown
            `select_by`, or a `prior` the pipeline can't have.
    """

    def __init__(
        self,
        pipeline,
        extractors: Mapping[str, nn.Module],
        real_volumes,
        args: FrechetConfig | None = None,
        train_conditions: Sequence | None = None,
        train_dataset=None,
        watchdogs: Mapping[str, Watchdog] | None = None,
        select_by: str | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    ):
        self.pipeline, self.args = pipeline, args or FrechetConfig()
        args = self.args
        self.conditions, self.callbacks = Conditions.of(pipeline, train_conditions, train_dataset), callbacks
        self.real = RealSide.of(real_volumes, pipeline, self.conditions, args.class_wise)
        self.representations = Representations(extractors, args.extractor_weights)
        if args.prior_weight and args.prior == "data" and not hasattr(pipeline, "encode_volumes"):
            raise InputError(f"{type(pipeline).__name__} encodes no volumes; prior: data needs it, so use reference.")
        limits = dict(args.watch_limits or {})
        fresh_limits = {FRESH: limits.pop(FRESH)} if FRESH in limits and args.eval_steps else {}
        self._picks = select_by is None and args.eval_steps > 0
        self.watch = Watch(watchdogs, select_by, limits, args.patience, args.watch_steps)
        self._fresh = Watch({FRESH: None}, f"-{FRESH}" if self._picks else None, fresh_limits, args.patience)
        self._etas = args.etas
        self.unet_forwards = 0
        self.policy = tunable_policy(pipeline, args)

    def train(self) -> dict:
        """Run the training; the pipeline holds the chosen weights afterwards.

        Returns the figures of the rollout they were chosen by (`Watch.result`), and, where fresh samples picked them, `kept_after` in
        updates and `fresh_frechet_kept` (relative to the pretrained model).
        """
        args = self.args
        run = TrainingRun(
            args,
            "frechet",
            gradient_accumulation_steps=args.samples_per_rollout // args.train_batch_size,
            allow_fsdp=True,
        )
        self.pipeline.to(run.device)
        run.callbacks = Callbacks(self.callbacks, args, self.pipeline.unet, run.is_main) if self.callbacks else None
        weights = TunedWeights(run, self.pipeline, self.policy, args.max_steps)
        with only_denoiser_trained(self.pipeline, self.representations.networks):
            self._set_up(run)
            run.resume()
            (self._fresh if self._picks else self.watch).resume(run)
            self._begin(run, weights)
            for step in run.steps():
                eta = args.samplers[step % len(args.samplers)]
                rollout, numbers, features = self._sample(run, "rollout", step, eta)
                with weights.averaged():  # those that would be kept
                    figures = self.watch.figures(run, self.policy, self._tables[eta], rollout, {}, args.guidance_scale)
                if self.watch.judge(run, figures, step):
                    weights.save_best()
                pulls = self._pulls(run, eta, features)
                if pulls is None:
                    run.stop("the Frechet distance is not finite", binding=False)
                    continue
                draw_samples(run, rollout.samples, _lengths(pulls), step)
                self._measure_divergence(run, rollout)
                self._update(run, weights, self._tables[eta], rollout, numbers, pulls, step)
                self._queue.push(self._etas.index(eta), features)
                if self._is_due(step + 1) and not run.stopped:
                    self._judge_fresh(run, weights, step + 1)
                run.record(epoch=step + 1)
                run.state["unet_forwards"] = self.unet_forwards
        weights.finish(best="best_step" in run.state)
        weights.push_to_hub()
        run.finish()
        return self._result(run)

    # ---------------------------------------------------------------------------------------------------------- before

    def _set_up(self, run: TrainingRun) -> None:
        """What a checkpoint does not hold: grids, statistics of the real volumes, their latents; and the empty queue."""
        args, scheduler = self.args, self.policy.scheduler
        grid = (scheduler, args.num_inference_steps)
        self._tables = {eta: StepTable.of(*grid, eta, 1e-6, run.device) for eta in self._etas}
        self._kl_table = StepTable.of(*grid, max(self._etas), KL_MIN_STD, run.device)
        self._scoring = Scoring(run, None, self.conditions)  # for its batches; nothing is scored
        self._queue = FeatureQueue(args.queue_batches)
        self._queue.keep_with(run)
        self.representations.fit(self.real, args.rollout_batch_size, run)
        self._real_latents = None
        if args.prior_weight and args.prior == "data":
            parts = self.real.pixel_values.split(args.rollout_batch_size)
            with torch.no_grad():
                self._real_latents = torch.cat([self.pipeline.encode_volumes(part.float()) for part in parts])

    def _begin(self, run: TrainingRun, weights: TunedWeights) -> None:
        """Fill the queue with samples of the pretrained policy, and take the distances that all later ones are divided by; or
        take them from the checkpoint.

        Raises:
            InputError: too few samples of a class, or a checkpoint of other extractors or samplers.
        """
        args = self.args
        setting = {
            "extractors": self.representations.identity,
            "samplers": self._etas,
            "queue_batches": args.queue_batches,
            "eval_batches": args.eval_batches if args.eval_steps else 0,
        }
        self.unet_forwards = run.state.get("unet_forwards", 0)
        if run.state.setdefault("frechet", setting) != setting:
            raise InputError(
                "The checkpoint is of other extractors, samplers, queue_batches or eval_batches; go on with those it was made "
                "with, or start anew in another output_dir."
            )
        if "queue_scales" in run.state:
            return
        with tqdm(total=len(self._etas) * args.queue_batches, desc="reference queue", disable=not run.is_main) as bar:
            for sampler, eta in enumerate(self._etas):
                for number in range(args.queue_batches):
                    self._queue.push(sampler, self._sample(run, "queue", number, eta)[2])
                    bar.update()
        run.state["queue_scales"] = [
            self.representations.floats(self._queue.population(sampler)) for sampler in range(len(self._etas))
        ]
        if args.eval_steps:
            run.state["fresh_scales"] = self._fresh_distances(run)
            if self._fresh.judge(run, {FRESH: 1.0}, 0):
                weights.save_best()
        run.state["unet_forwards"] = self.unet_forwards

    # -------------------------------------------------------------------------------------------- rollouts and features

    @torch.no_grad()
    def _sample(self, run: TrainingRun, stream: str, step: int, eta: float) -> tuple[Rollout, list[int], Features]:
        """This process' samples of rollout number `step` of a stream of noise, their numbers, and the features of the samples
        of all processes, in the order of the processes."""
        args, table, parts, features, drawn = self.args, self._tables[eta], [], [], []
        for numbers, rows in self._scoring.batches(step):
            with run.accelerator.autocast():
                part = sample_rollout(
                    self.policy,
                    self.conditions.take(rows),
                    table,
                    sample_generators(args.seed, f"{stream} {step}", numbers),
                    args.guidance_scale,
                    vocabulary=self.conditions.values,
                )
            groups = self.real.groups[rows].to(run.device)
            features.append(Features(self.representations.extract(part.samples), groups))
            parts.append(part.to("cpu") if args.offload_rollouts else part)
            drawn += numbers
        self.unet_forwards += len(drawn) * run.accelerator.num_processes * len(table) * self._cost
        return Rollout.cat(parts), drawn, Features.cat(features).map(run.accelerator.gather)

    # --------------------------------------------------------------------------------------------------------- distances

    def _pulls(self, run: TrainingRun, eta: float, features: Features) -> dict[str, torch.Tensor] | None:
        """The gradient of the loss by the features of this process' samples, `{extractor: [B, P, S, F]}` float32; the
        population is the queue and the rollout of all processes. None where it is not finite."""
        sampler = self._etas.index(eta)
        leaves = {name: values.double().requires_grad_() for name, values in features.values.items()}
        population = self._queue.population(sampler, Features(leaves, features.groups))
        distances = self.representations.distances(population)
        loss = self.representations.relative(distances, run.state["queue_scales"][sampler])
        run.record(**{"frechet/loss": loss, **{f"frechet/{name}": value for name, value in distances.items()}})
        if not torch.isfinite(loss):
            return None
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        ratio = len(population.groups) / len(features.groups)
        own = len(features.groups) // run.accelerator.num_processes
        start = run.accelerator.process_index * own
        return {
            name: (ratio * gradient[start : start + own]).float()
            for name, gradient in zip(leaves, gradients, strict=True)
        }

    # ----------------------------------------------------------------------------------------------------------- updates

    def _update(
        self,
        run: TrainingRun,
        weights: TunedWeights,
        table: StepTable,
        rollout: Rollout,
        numbers: Sequence[int],
        pulls: Mapping[str, torch.Tensor],
        step: int,
    ) -> None:
        """One optimizer update, its gradient accumulated over micro-batches."""
        args, accelerator = self.args, run.accelerator
        # accelerate divides by the number of micro-batches, and averages over processes
        parts = args.samples_per_rollout // args.train_batch_size * accelerator.num_processes
        last = range(len(table) - args.gradient_steps, len(table))
        steps, priors = GradientSteps(self.policy, table, args.guidance_scale, last), []
        for rows in torch.arange(len(rollout)).split(args.train_batch_size):
            batch = rollout.select(rows.to(rollout.latents.device)).to(run.device)
            with accelerator.accumulate(weights.denoiser):
                with accelerator.autocast():
                    latents, _ = steps.replay(batch)
                features = self._decoded_features(run, latents)
                loss = parts * sum((values * pulls[name][rows]).sum() for name, values in features.items())
                if args.prior_weight:
                    prior = self._prior(run, batch, [numbers[row] for row in rows.tolist()], step)
                    loss = loss + args.prior_weight * prior
                    priors.append(prior.detach())
                norm = weights.backward(loss)
            if norm is not None:
                run.record(**{"frechet/grad_norm": norm})
        weights.end_update()
        if priors:
            run.record(**{"frechet/prior": accelerator.reduce(torch.stack(priors).mean(), "mean")})
        passes = args.gradient_steps * self._cost_of_gradient * self._cost
        if args.prior_weight:
            referred = args.prior == "reference"
            passes += (self._cost_of_gradient + referred) * (self._cost if referred else 1)
        self.unet_forwards += len(rollout) * accelerator.num_processes * passes

    def _decoded_features(self, run: TrainingRun, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of final `latents [B, C, *S]` by extractor, with gradients; decoder and extractors are recomputed in the
        backward pass, sample by sample, if asked."""

        def decoded(latents: torch.Tensor) -> dict[str, torch.Tensor]:
            with run.accelerator.autocast():
                samples = self.policy.decode(latents)
            return self.representations.extract(samples)

        if not self.args.decoder_checkpointing:
            return decoded(latents)
        parts = [checkpoint(decoded, part, use_reentrant=False) for part in latents.split(1)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _prior(self, run: TrainingRun, batch: Rollout, numbers: Sequence[int], step: int) -> torch.Tensor:
        """What keeps the prior, `[]`: the mean squared error of predictions at random timesteps, against the pretrained model's
        on the noised samples, or against the truth on noised latents of real volumes."""
        args, scheduler = self.args, self.policy.scheduler
        generators = sample_generators(args.seed, f"prior {step}", numbers)
        referred = args.prior == "reference"
        clean, conditioning = batch.latents[:, -1], batch.conditioning
        if not referred:
            total = args.samples_per_rollout * run.accelerator.num_processes
            rows = batch_indices(len(self._real_latents), total, args.seed, step)[numbers]
            clean, conditioning = self._real_latents[rows.to(run.device)], self._real_conditioning(rows)
        last = scheduler.config.num_train_timesteps
        timesteps = torch.cat([torch.randint(last, (1,), generator=generator) for generator in generators]).to(
            run.device
        )
        noise = randn_tensor(clean.shape, generators, run.device)
        noisy, scale = scheduler.add_noise(clean, noise, timesteps), args.guidance_scale if referred else 1.0
        with run.accelerator.autocast():
            prediction = self.policy.predict(noisy, timesteps, conditioning, scale)
            if referred:
                with torch.no_grad(), self.policy.reference():
                    target = self.policy.predict(noisy, timesteps, conditioning, scale)
            else:
                target = denoising_target(scheduler, clean, noise, timesteps)
        return F.mse_loss(prediction.float(), target.float())

    def _real_conditioning(self, rows: torch.Tensor) -> Conditioning:
        return self.policy.encode(self.real.class_labels[rows].tolist())

    @torch.no_grad()
    def _measure_divergence(self, run: TrainingRun, rollout: Rollout) -> None:
        """Log `frechet/kl`, and stop the run over its budget."""
        args, policy, table = self.args, self.policy, self._kl_table
        measured = len(rollout) if args.kl_budget is not None else -(-len(rollout) // WATCHED_SHARE)
        places = table.stochastic or range(len(table))
        even = torch.linspace(0, len(places) - 1, min(KL_STEPS, len(places))).round().int().tolist()
        steps = GradientSteps(policy, table, args.guidance_scale, [places[number] for number in even])
        divergences = []
        for rows in torch.arange(measured).split(args.train_batch_size):
            batch = rollout.select(rows.to(rollout.latents.device)).to(run.device)
            with run.accelerator.autocast():
                visits = [steps.visit(step, batch.latents[:, step], batch.conditioning) for step in steps.trained]
                divergences.append(steps.divergence(visits, batch.conditioning, len(batch)))
        kl = run.accelerator.reduce(torch.cat(divergences).mean(), "mean").item()
        run.record(**{"frechet/kl": kl})
        self.unet_forwards += 2 * measured * len(steps.trained) * self._cost * run.accelerator.num_processes
        if args.kl_budget is not None and kl > args.kl_budget:
            run.stop(f"the divergence from the pretrained model passed kl_budget={args.kl_budget}")

    # ---------------------------------------------------------------------------------------------------------- judgement

    def _is_due(self, num_updates: int) -> bool:
        args = self.args
        return args.eval_steps > 0 and (num_updates % args.eval_steps == 0 or num_updates == args.max_steps)

    def _fresh_distances(self, run: TrainingRun) -> list[dict[str, float]]:
        """Of the present weights, by sampler and extractor; always the same noise, which differs from that of all updates."""
        found = []
        for eta in self._etas:
            parts = [self._sample(run, "fresh", number, eta)[2] for number in range(self.args.eval_batches)]
            found.append(self.representations.floats(Features.cat(parts)))
        return found

    def _judge_fresh(self, run: TrainingRun, weights: TunedWeights, num_updates: int) -> None:
        """Log the distance of fresh samples of the averaged weights; keep the weights if they are the best so far."""
        with weights.averaged():
            by_sampler = self._fresh_distances(run)
        scales = run.state["fresh_scales"]
        relative = [
            self.representations.relative(found, scale) for found, scale in zip(by_sampler, scales, strict=True)
        ]
        figure = sum(relative) / len(relative)
        run.record(**{f"watch/{FRESH}": figure})
        for eta, found in zip(self._etas, by_sampler, strict=True):
            run.record(**{f"watch/{FRESH}_{name}_eta{eta:g}": value for name, value in found.items()})
        if self._fresh.judge(run, {FRESH: figure}, num_updates):
            weights.save_best()

    def _result(self, run: TrainingRun) -> dict:
        result = self.watch.result(run)
        if self._picks and "best_step" in run.state:
            result[f"{FRESH}_kept"] = -run.state["best_figure"]
        return result

    @property
    def _cost(self) -> int:
        return cost_of_prediction(self.args.guidance_scale)

    @property
    def _cost_of_gradient(self) -> int:
        """Forwards that one prediction with its gradient is worth."""
        return 1 + COST_OF_BACKWARD + self.args.gradient_checkpointing


def _lengths(pulls: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """How hard the loss pulls at each sample, `[B]`."""
    return sum(pull.flatten(1).square().sum(dim=1) for pull in pulls.values()).sqrt()
