"""LatentDiffusionTrainer: class-conditional diffusion over the latents of a trained autoencoder.

1. All training volumes (and their mirror images, if asked) are encoded once; their mean and standard deviation become
   the autoencoder's `shift_factor` and `scaling_factor`.
2. The loss is the mean squared error in the scheduler's own prediction type (epsilon, v or sample).
3. An exponential average of the weights is what ends up in the pipeline.
"""

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from ..data.volumes import VolumeDataset
from ..pipelines.med_volume import MedVolumePipeline
from ..seeding import batch_indices, generator_for
from .base import TrainingRun, in_fast_memory_format, thaw
from .denoising_loss import denoising_target, even_timesteps, min_snr_weights
from .diffusion_config import LatentDiffusionConfig
from .weight_average import WeightAverage


class LatentDiffusionTrainer:
    """Trains `pipeline.unet`; the pipeline holds the averaged weights afterwards."""

    def __init__(self, pipeline: MedVolumePipeline, args: LatentDiffusionConfig, train_dataset: VolumeDataset):
        self.pipeline, self.args, self.train_dataset = pipeline, args, train_dataset

    def train(self) -> dict[str, float]:
        """Run the training; returns the last logged figures."""
        args, run = self.args, TrainingRun(self.args, "diffusion")
        # whatever sampler the pipeline has: others add noise by scales of their own
        accelerator, scheduler = run.accelerator, DDIMScheduler.from_config(self.pipeline.scheduler.config)
        unet = in_fast_memory_format(self.pipeline.unet, args.mixed_precision)
        latents, labels = self._cache_latents(run.device)
        thaw(unet)
        optimizer = run.optimizer(unet.parameters())
        lr_scheduler = run.lr_scheduler(optimizer, args.max_steps // args.gradient_accumulation_steps)
        unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
        ema = WeightAverage(accelerator.unwrap_model(unet).parameters(), args.ema_decay, run.device)
        run.keep(ema, "ema_decay")
        run.resume()
        unet.train()
        for step in run.steps():
            batch_size = args.train_batch_size * accelerator.num_processes
            indices = run.shard(batch_indices(len(latents), batch_size, args.seed, step))
            clean, known = latents[indices].to(run.device), labels[indices].to(run.device)
            noise, timesteps, dropped = (
                run.shard(values).to(run.device) for values in self._draws(batch_size, clean.shape[1:], step)
            )
            classes = torch.where(dropped, self.pipeline.null_class, known)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            with accelerator.accumulate(unet):
                (prediction,) = unet(noisy, timesteps, classes, return_dict=False)
                target = denoising_target(scheduler, clean, noise, timesteps)
                losses = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(dim=1)
                loss = (losses * min_snr_weights(scheduler, timesteps, args.snr_gamma)).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = run.clip_gradients(unet.parameters())
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                lr_scheduler.step()
                ema.step(accelerator.unwrap_model(unet).parameters())
                run.record(grad_norm=grad_norm)
            run.record(loss=loss)
        run.finish()
        self.pipeline.unet = accelerator.unwrap_model(unet, keep_fp32_wrapper=False).eval()
        self.pipeline.register_to_config(supports_guidance=args.class_dropout > 0)
        ema.copy_to(self.pipeline.unet.parameters())
        return run.history[-1] if run.history else {}

    @torch.no_grad()
    def _cache_latents(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of about unit variance `[N, C, d, h, w]` and labels `[N]`, in main memory; sets the autoencoder's scale."""
        vqvae, data = self.pipeline.vqvae.to(device).eval(), self.train_dataset
        flips = (False, True) if self.args.flip_augmentation else (False,)
        edges = [edge // vqvae.downsample_factor for edge in data.pixel_values.shape[2:]]
        latents = torch.empty(len(flips) * len(data), vqvae.config.latent_channels, *edges)
        for side, flip in zip(latents.split(len(data)), flips, strict=True):
            for indices in torch.arange(len(data)).split(self.args.encode_batch_size):
                volumes = data.batch(indices, device)["pixel_values"]
                side[indices] = vqvae.encode(volumes.flip(-1) if flip else volumes).latents.cpu()
        shift, scale = latents.mean().item(), 1 / latents.std().item()
        vqvae.register_to_config(shift_factor=shift, scaling_factor=scale)
        return latents.sub_(shift).mul_(scale), data.class_labels.repeat(len(flips))

    def _draws(self, batch_size: int, shape: torch.Size, step: int) -> tuple[torch.Tensor, ...]:
        """Noise, timesteps and dropped classes of the whole batch, so processes can't change them."""
        generator = generator_for(self.args.seed, "diffusion", step)
        noise = torch.randn(batch_size, *shape, generator=generator)
        timesteps = even_timesteps(batch_size, self.pipeline.scheduler.config.num_train_timesteps, generator)
        return noise, timesteps, torch.rand(batch_size, generator=generator) < self.args.class_dropout
