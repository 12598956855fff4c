"""DDOTrainer: discriminative self-play, without a reward and without features of any network.

Direct discriminative optimization (arXiv 2503.01103): the likelihood ratio of the trained model and a frozen reference is the
discriminator of a GAN; learning to tell real volumes from the reference's samples moves the model to the real ones. Rounds:
1. The reference becomes the trained model, and draws a rollout.
2. Each of its samples is paired with a real volume of its class; both get the same noise at the same levels, so that a pair
   differs in nothing else.
3. After the updates of one or several passes over the rollout the next round begins.
Everything random follows from the seed, the round and a sample's number within it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from transformers import TrainerCallback

from ..errors import InputError
from ..functional.discriminative import ddo_loss, likelihood_gain
from ..functional.forward_process import prediction_divergence
from ..policies import Conditioning, make_policy
from ..rollouts import Rollout
from ..seeding import generator_for, sample_generators
from .base import TrainingRun
from .callbacks import Callbacks
from .conditions import Conditions
from .costs import COST_OF_BACKWARD, cost_of_prediction
from .ddo_config import DDOConfig
from .denoising_loss import denoising_target
from .final_sampler import FinalSampler
from .leash import WATCHED_SHARE, MovingReference, settle_updates
from .real_side import RealSide
from .scoring import Scores, Scoring
from .tuned_weights import TunedWeights, only_denoiser_trained, tunable_policy
from .watchdogs import Watch, Watchdog, check_patience, draw_samples


class DDOTrainer:
    """Fine-tunes the denoiser of `pipeline` towards the distribution of real volumes by telling them from its own samples.

    The policy that is trained is the one without guidance. Logged are `ddo/loss`, `ddo/accuracy` (of the discriminator on pairs),
    `ddo/real_logit`, `ddo/own_logit`, `ddo/real_error` (the denoising error on real volumes, as in pretraining), `ddo/kl`,
    `ddo/grad_norm` and the watchdogs. The rollout that they see has two latents of each trajectory, its middle and its end.

    Args:
        pipeline: any pipeline that has a policy (`policies.POLICIES`), classes and `encode_volumes`.
        real_volumes: a `VolumeDataset`, or `(pixel_values [N, C, *S] in [-1, 1], class_labels [N])`; never hold-out subjects.
        args: settings.
        train_conditions: class labels, taken in turn; all classes of the pipeline by default.
        train_dataset: instead of `train_conditions`, a `datasets.Dataset` with a column `label` or `class_label`.
        watchdogs: figures of a rollout that are logged and never trained on, by name; beside those of `watchdogs.py`.
        select_by: name of the watchdog whose highest value (`"-name"`: lowest) picks the weights kept at the end, and
            against which `args.patience` counts; the last weights are kept if not given.
            With `args.ema_decay` the average is kept, though rollouts are sampled with the trained weights.
        callbacks: `transformers.TrainerCallback` objects or classes.

    Raises:
        InputError: a pipeline that encodes no volumes, real volumes that do not fit the conditions, an unknown `select_by` or none
            for `args.patience`, or a sampler that does not fit.
    """

    def __init__(
        self,
        pipeline,
        real_volumes,
        args: DDOConfig | None = None,
        train_conditions: Sequence | None = None,
        train_dataset=None,
        watchdogs: Mapping[str, Watchdog] | None = None,
        select_by: str | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    ):
        self.pipeline, self.args = pipeline, args or DDOConfig()
        args = self.args
        if not hasattr(pipeline, "encode_volumes"):
            raise InputError(f"{type(pipeline).__name__} encodes no volumes, and DDOTrainer learns from encoded ones.")
        self.conditions, self.callbacks = Conditions.of(pipeline, train_conditions, train_dataset), callbacks
        self.real = RealSide.of(real_volumes, pipeline, self.conditions, class_wise=True)
        self._of_class = {label: (self.real.class_labels == label).nonzero()[:, 0] for label in self.real.classes}
        check_patience(args.patience, select_by)
        self.watch = Watch(watchdogs, select_by, args.watch_limits, args.patience, args.watch_steps)
        self.unet_forwards = 0
        FinalSampler(make_policy(pipeline), args)  # what it refuses stays without an adapter
        self.policy = tunable_policy(pipeline, args)
        self.sampler = FinalSampler(self.policy, args)

    def train(self) -> dict[str, float]:
        """Run the training; the pipeline holds the chosen weights afterwards. Returns the figures of the round they were
        chosen by (`Watch.result`)."""
        args = self.args
        micro_batches = args.samples_per_rollout // args.train_batch_size // args.num_updates
        passes = micro_batches * args.num_train_timesteps_per_sample
        run = TrainingRun(args, "ddo", gradient_accumulation_steps=passes, allow_fsdp=True)
        self.pipeline.to(run.device)
        run.callbacks = Callbacks(self.callbacks, args, self.pipeline.unet, run.is_main) if self.callbacks else None
        weights = TunedWeights(run, self.pipeline, self.policy, args.max_steps * args.num_epochs * args.num_updates)
        with only_denoiser_trained(self.pipeline):
            # a checkpoint lies between two rounds, where the reference is the trained model
            self._reference = MovingReference(run, weights, self.policy)
            run.resume()
            self.watch.resume(run)
            self._scoring = Scoring(run, None, self.conditions)  # for its batches; nothing is scored
            self._latents = self._encode_real()
            self.unet_forwards = run.state.get("unet_forwards", 0)
            for step in run.steps():
                self._reference.follow()
                rollout, numbers = self._sample(run, step)
                with weights.averaged():  # those that would be kept
                    figures = self.watch.figures(run, self.policy, self.sampler.middle, rollout, {}, 1.0)
                if self.watch.judge(run, figures, step):
                    weights.save_best()
                noted, errors = self._update(run, weights, rollout, numbers, step)
                draw_samples(run, rollout.samples, errors, step)
                settle_updates(run, "ddo", noted)
                run.record(epoch=step + 1)
                run.state["unet_forwards"] = self.unet_forwards
        weights.finish(best="best_step" in run.state)
        weights.push_to_hub()
        run.finish()
        return self.watch.result(run)

    # --------------------------------------------------------------------------------------------------- samples, real volumes

    @torch.no_grad()
    def _encode_real(self) -> torch.Tensor:
        """The latents of all real volumes, in main memory."""
        parts = self.real.pixel_values.split(self.args.rollout_batch_size)
        return torch.cat([self.pipeline.encode_volumes(part.float()).cpu() for part in parts])

    def _sample(self, run: TrainingRun, step: int) -> tuple[Rollout, list[int]]:
        """This process' samples of the reference in round `step`, in the order the updates use them, and their numbers within
        the rollout of all processes."""
        args, parts, all_numbers = self.args, [], []
        for numbers, rows in self._scoring.batches(step, args.num_updates):
            generators = sample_generators(args.seed, f"rollout {step}", numbers)
            with run.accelerator.autocast():
                part = self.sampler.sample(
                    self.conditions.take(rows), generators, args.guidance_scale, self.conditions.values, run.device
                )
            parts.append(part.to("cpu") if args.offload_rollouts else part)
            all_numbers += numbers
        cost = cost_of_prediction(args.guidance_scale)
        self.unet_forwards += len(all_numbers) * run.accelerator.num_processes * len(self.sampler) * cost
        return Rollout.cat(parts), all_numbers

    def _partners(self, batch: Rollout, numbers: Sequence[int], *key: int) -> torch.Tensor:
        """Latents of real volumes `[B, C, *S]`, each of the class of the sample beside it."""
        rows = []
        for number, label in zip(numbers, batch.conditions.tolist(), strict=True):
            of_class = self._of_class[label]
            generator = generator_for(self.args.seed, "partner", *key, number)
            rows.append(of_class[torch.randint(len(of_class), (1,), generator=generator)])
        return self._latents[torch.cat(rows)]

    def _draw(self, numbers: Sequence[int], draw: int, *key: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps `[B]` and noise `[B, C, *S]` of draw number `draw` for pairs of these numbers; timesteps are from one of as
        many equal parts of all as there are draws."""
        generators = [generator_for(self.args.seed, "noise", draw, *key, number) for number in numbers]
        last = self.policy.scheduler.config.num_train_timesteps
        part = last / self.args.num_train_timesteps_per_sample
        starts = [draw + torch.rand((), generator=generator).item() for generator in generators]
        timesteps = torch.tensor([min(int(start * part), last - 1) for start in starts])
        return timesteps, randn_tensor((len(numbers), *self.policy.latent_shape), generators)

    # -------------------------------------------------------------------------------------------------------------- updates

    def _update(
        self, run: TrainingRun, weights: TunedWeights, rollout: Rollout, numbers: Sequence[int], step: int
    ) -> tuple[dict[str, list[torch.Tensor]], torch.Tensor]:
        """The updates of a round; gradients are accumulated over pairs x noise levels. Returns figures, and the mean denoising
        error of each sample `[B]`."""
        args, accelerator, noted = self.args, run.accelerator, defaultdict(list)
        errors, draws = torch.zeros(len(rollout), device=run.device), args.num_train_timesteps_per_sample
        updates = torch.arange(len(rollout)).chunk(args.num_updates) * args.num_epochs
        for update, rows_of_update in enumerate(updates):
            run.doing(f"update {update + 1} of {len(updates)}")
            epoch = update // args.num_updates
            for rows in rows_of_update.split(args.train_batch_size):
                batch = rollout.select(rows.to(rollout.latents.device)).to(run.device)
                batch_numbers = [numbers[row] for row in rows.tolist()]
                # without a budget the divergence is only watched, on a few samples: it costs a forward
                watched = 0 if "kl" in noted else -(-len(batch) // WATCHED_SHARE)
                measured = watched if args.kl_budget is None else len(batch)
                real = self._partners(batch, batch_numbers, step, epoch).to(run.device)
                for draw in range(draws):
                    timesteps, noise = (part.to(run.device) for part in self._draw(batch_numbers, draw, step, epoch))
                    with accelerator.accumulate(weights.denoiser):
                        loss, stats, own_errors = self._loss(run, batch, real, timesteps, noise, measured)
                        norm = weights.backward(loss)
                    if norm is not None:
                        run.record(**{"ddo/grad_norm": norm})
                    errors[rows.to(run.device)] += own_errors.float() / (args.num_epochs * draws)
                    for name, value in {"loss": loss, **stats}.items():
                        noted[name].append(value.detach())
                    passes = 2 * (1 + COST_OF_BACKWARD + args.gradient_checkpointing + 1)  # a pair; the reference
                    self.unet_forwards += (len(batch) * passes + measured) * accelerator.num_processes
            if not weights.end_update():
                break
        return noted, errors

    def _loss(
        self,
        run: TrainingRun,
        batch: Rollout,
        real: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        measured: int,
    ) -> tuple[torch.Tensor, Scores, torch.Tensor]:
        """The objective of pairs noised alike, figures, and the denoising error of the samples `[B]`; among the figures `kl`, the
        divergence on the first `measured` samples from the pretrained policy."""
        policy, scheduler = self.policy, self.policy.scheduler
        clean = torch.cat([real, batch.latents[:, -1]])
        timesteps, noise = torch.cat([timesteps, timesteps]), torch.cat([noise, noise])
        conditioning = Conditioning.cat([batch.conditioning, batch.conditioning])
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = denoising_target(scheduler, clean, noise, timesteps)
        own = slice(len(batch), len(batch) + measured)
        with run.accelerator.autocast():
            output = policy.predict(noisy, timesteps, conditioning, 1.0)
            with torch.no_grad():
                with self._reference.predicting():
                    reference_output = policy.predict(noisy, timesteps, conditioning, 1.0)
                if measured:
                    with policy.reference():
                        pretrained = policy.predict(noisy[own], timesteps[own], conditioning.select(own), 1.0)
        gain, error = likelihood_gain(output, reference_output, target)
        (real_gain, own_gain), (real_error, own_error) = gain.chunk(2), error.chunk(2)
        loss, stats = ddo_loss(real_gain, own_gain, self.args.beta, self.args.alpha)
        stats["real_error"] = real_error.mean()
        if measured:
            stats["kl"] = prediction_divergence(output[own], pretrained).mean()
        return loss, stats, own_error
