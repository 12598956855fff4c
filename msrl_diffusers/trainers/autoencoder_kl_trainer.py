"""AutoencoderKLTrainer: diffusers' AutoencoderKL on images, small enough for a CPU.

1. L1 (and L2, if asked) of reconstructions from a draw of the posterior, and its divergence from the standard normal
   (arXiv 2112.10752, section 3.1, without its perceptual and adversarial terms, which need networks of their own).
2. At the end the latents' deviation over the training images becomes the model's `scaling_factor`.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from ..data.image_folder import ImageDataset
from ..seeding import batch_indices, generator_for
from .autoencoder_kl_config import AutoencoderKLConfig
from .base import TrainingRun, in_fast_memory_format, thaw
from .vqgan_trainer import psnr


class AutoencoderKLTrainer:
    """Trains `model` on `train_dataset`; `train()` returns the figures of `evaluate()`."""

    def __init__(
        self,
        model: AutoencoderKL,
        args: AutoencoderKLConfig,
        train_dataset: ImageDataset,
        eval_dataset: ImageDataset | None = None,
    ):
        self.model, self.args = in_fast_memory_format(model, args.mixed_precision), args
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset

    def train(self) -> dict[str, float]:
        """Run the training; returns the evaluation's figures."""
        args, run = self.args, TrainingRun(self.args, "autoencoder")
        accelerator = run.accelerator
        thaw(self.model)
        optimizer = run.optimizer(self.model.parameters())
        scheduler = run.lr_scheduler(optimizer, args.max_steps // args.gradient_accumulation_steps)
        network, optimizer, scheduler = accelerator.prepare(_Reconstruction(self.model), optimizer, scheduler)
        run.resume()
        network.train()
        for step in run.steps():
            real = self._batch(run, step)
            with accelerator.accumulate(network):
                fake, kl = network(real, self._noise(run, real, step))
                l1 = F.l1_loss(fake, real)
                loss = args.l1_weight * l1 + args.l2_weight * F.mse_loss(fake, real) + args.kl_weight * kl
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    run.clip_gradients(network.parameters())
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
            run.record(l1=l1, psnr=psnr(fake, real), kl=kl, loss=loss)
        run.finish()
        self.model = accelerator.unwrap_model(network, keep_fp32_wrapper=False).model.eval()
        self.model.register_to_config(scaling_factor=1 / self._latents(self.train_dataset).std().item())
        return self.evaluate()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Peak signal-to-noise ratio in dB (peak to peak 2) of training and evaluation images, by the means."""
        self.model.eval()
        results = {}
        for name, dataset in (("train", self.train_dataset), ("heldout", self.eval_dataset)):
            if dataset is not None:
                total = 0.0
                for indices in torch.arange(len(dataset)).split(self.args.train_batch_size):
                    real = dataset.batch(indices, self.model.device)["pixel_values"]
                    fake = self.model(real, sample_posterior=False, return_dict=False)[0]
                    total += psnr(fake, real).item() * len(indices)
                results[f"psnr_{name}"] = total / len(dataset)
        return results

    @torch.no_grad()
    def _latents(self, dataset: ImageDataset) -> torch.Tensor:
        """Means `[N, C, h, w]` of the posteriors, on the CPU."""
        means = []
        for indices in torch.arange(len(dataset)).split(self.args.train_batch_size):
            real = dataset.batch(indices, self.model.device)["pixel_values"]
            means.append(self.model.encode(real).latent_dist.mean.float().cpu())
        return torch.cat(means)

    def _batch(self, run: TrainingRun, step: int) -> torch.Tensor:
        count = self.args.train_batch_size * run.accelerator.num_processes
        indices = run.shard(batch_indices(len(self.train_dataset), count, self.args.seed, step))
        images = self.train_dataset.batch(indices, run.device)["pixel_values"]
        if self.args.flip_augmentation:
            flips = torch.rand(count, generator=generator_for(self.args.seed, "flip", step)) < 0.5
            images = torch.where(run.shard(flips).to(run.device)[:, None, None, None], images.flip(-1), images)
        return images

    def _noise(self, run: TrainingRun, images: torch.Tensor, step: int) -> torch.Tensor:
        """The posterior's draw, of the whole batch, so that processes can't change it."""
        config, count = self.model.config, self.args.train_batch_size * run.accelerator.num_processes
        factor = 2 ** (len(config.block_out_channels) - 1)
        shape = (config.latent_channels, *(edge // factor for edge in images.shape[2:]))
        noise = torch.randn(count, *shape, generator=generator_for(self.args.seed, "posterior", step))
        return run.shard(noise).to(images)


class _Reconstruction(torch.nn.Module):
    """The autoencoder with its losses' inputs as outputs: one forward, so that data-parallel training sees it."""

    def __init__(self, model: AutoencoderKL):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstructions like `images [B, C, H, W]`, and the divergence per element of the latents."""
        posterior = self.model.encode(images).latent_dist
        fake = self.model.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
        return fake.float(), posterior.kl().mean() / noise[0].numel()
