"""VQGANTrainer: the autoencoder, trained against a slice and a volume discriminator (arXiv 2603.06173, section 2).

1. L1 (and L2, if asked) and commitment losses from the first step; MONAI's perceptual loss if asked.
2. From `discriminator_start_step` on: hinge losses of two patch discriminators (MONAI's), one on random slices of the
   three planes and one on the volume, and L1 matching of their features.
3. Instance normalization in the discriminators: batch normalization couples the samples of small 3D batches.
"""

import math

import torch
import torch.nn.functional as F
from monai.losses import PatchAdversarialLoss, PerceptualLoss
from monai.networks.nets import PatchDiscriminator

from ..data.volumes import VolumeDataset
from ..models.autoencoder_vq_3d import VQModel3D
from ..models.layers import Conv3d
from ..seeding import batch_indices, generator_for
from .base import TrainingRun, in_fast_memory_format, thaw
from .vqgan_config import VQGANConfig


class VQGANTrainer:
    """Trains `model` on `train_dataset`; `train()` returns the figures of `evaluate()`."""

    def __init__(
        self,
        model: VQModel3D,
        args: VQGANConfig,
        train_dataset: VolumeDataset,
        eval_dataset: VolumeDataset | None = None,
    ):
        self.args, self.train_dataset, self.eval_dataset = args, train_dataset, eval_dataset
        self.model = in_fast_memory_format(model, args.mixed_precision)
        self.discriminators = torch.nn.ModuleDict(
            {"slice": self._discriminator(2, model), "volume": self._discriminator(3, model)}
        )
        self.adversarial = PatchAdversarialLoss(criterion="hinge")
        self.perceptual = (
            PerceptualLoss(spatial_dims=3, network_type=args.perceptual_network, is_fake_3d=False)
            if args.perceptual_weight
            else None
        )

    def train(self) -> dict[str, float]:
        """Run the training; returns the evaluation's figures."""
        args, run = self.args, TrainingRun(self.args, "vqgan")
        accelerator = run.accelerator
        thaw(self.model)
        optimizer = run.optimizer(self.model.parameters())
        d_optimizer = run.optimizer(self.discriminators.parameters(), args.discriminator_learning_rate)
        updates = args.max_steps // args.gradient_accumulation_steps
        scheduler = run.lr_scheduler(optimizer, updates)
        d_scheduler = run.lr_scheduler(d_optimizer, updates)
        model, optimizer, scheduler = accelerator.prepare(self.model, optimizer, scheduler)
        slice_net, volume_net, d_optimizer, d_scheduler = accelerator.prepare(
            self.discriminators["slice"], self.discriminators["volume"], d_optimizer, d_scheduler
        )
        if self.perceptual is not None:
            self.perceptual.to(run.device)
        run.resume()
        model.train()
        for step in run.steps():
            adversarial = step >= args.discriminator_start_step
            real = self._batch(run, step)
            with accelerator.accumulate(model, slice_net, volume_net):
                fake, commitment_loss, perplexity = model(real, return_dict=False)
                l1 = F.l1_loss(fake, real)
                loss = args.l1_weight * l1 + args.l2_weight * F.mse_loss(fake, real) + commitment_loss
                if self.perceptual is not None:
                    loss = loss + args.perceptual_weight * self.perceptual(fake, real)
                if adversarial:
                    self.discriminators.requires_grad_(False)  # the generator's loss is not theirs
                    real_slices, fake_slices = random_slices(
                        [real, fake], args.num_slices, generator_for(args.seed, "slices", step)
                    )
                    for net, reals, fakes in ((slice_net, real_slices, fake_slices), (volume_net, real, fake)):
                        g_loss, matching = self._generator_losses(net, reals, fakes)
                        loss = loss + args.adversarial_weight * g_loss + args.feature_matching_weight * matching
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    run.clip_gradients(model.parameters(), optimizer)  # the discriminators' wait for their backward
                optimizer.step()
                optimizer.zero_grad()
                if adversarial:
                    self.discriminators.requires_grad_(True)
                    d_loss = self._discriminator_loss(slice_net, real_slices, fake_slices.detach())
                    d_loss = d_loss + self._discriminator_loss(volume_net, real, fake.detach())
                    accelerator.backward(d_loss)
                    if accelerator.sync_gradients:  # checked alone: theirs are not clipped
                        run.clip_gradients(self.discriminators.parameters(), d_optimizer, max_norm=math.inf)
                    d_optimizer.step()
                    d_optimizer.zero_grad()
                    run.record(discriminator_loss=d_loss)
            if accelerator.sync_gradients:
                scheduler.step()
                if adversarial:
                    d_scheduler.step()
            run.record(l1=l1, psnr=psnr(fake, real), loss=loss, perplexity=perplexity)
        run.finish()
        self.model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        return self.evaluate()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Peak signal-to-noise ratio in dB (peak to peak 2) of the training volumes and of the evaluation volumes."""
        self.model.eval()
        results = {}
        for name, dataset in (("train", self.train_dataset), ("heldout", self.eval_dataset)):
            if dataset is not None:
                batches = torch.arange(len(dataset)).split(self.args.train_batch_size)
                values = []
                for indices in batches:
                    real = dataset.batch(indices, self.model.device)["pixel_values"]
                    values.append(psnr(self.model(real).sample, real).item() * len(indices))
                results[f"psnr_{name}"] = sum(values) / len(dataset)
        return results

    def _batch(self, run: TrainingRun, step: int) -> torch.Tensor:
        args, count = self.args, self.args.train_batch_size * run.accelerator.num_processes
        indices = run.shard(batch_indices(len(self.train_dataset), count, args.seed, step))
        volumes = self.train_dataset.batch(indices, run.device)["pixel_values"]
        if args.flip_augmentation:
            flips = torch.rand(count, generator=generator_for(args.seed, "flip", step)) < 0.5
            flipped = run.shard(flips).to(run.device)
            volumes = torch.where(flipped[:, None, None, None, None], volumes.flip(-1), volumes)
        return volumes

    def _generator_losses(self, discriminator, real, fake) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            real_features = discriminator(real)
        fake_features = discriminator(fake)
        loss = self.adversarial(fake_features[-1].float(), target_is_real=True, for_discriminator=False)
        pairs = zip(fake_features[:-1], real_features[:-1], strict=True)
        matching = [F.l1_loss(fakes.float(), reals.float()) for fakes, reals in pairs]
        return loss, sum(matching) / len(matching)

    def _discriminator_loss(self, discriminator, real, fake) -> torch.Tensor:
        real_loss = self.adversarial(discriminator(real)[-1].float(), target_is_real=True, for_discriminator=True)
        fake_loss = self.adversarial(discriminator(fake)[-1].float(), target_is_real=False, for_discriminator=True)
        return (real_loss + fake_loss) / 2

    def _discriminator(self, spatial_dims: int, model: VQModel3D) -> PatchDiscriminator:
        network = PatchDiscriminator(
            spatial_dims=spatial_dims,
            in_channels=model.config.out_channels,
            channels=self.args.discriminator_channels,
            num_layers_d=self.args.discriminator_layers,
            norm="INSTANCE",
        )
        for layer in network.modules():
            if type(layer) is torch.nn.Conv3d:
                layer.__class__ = Conv3d  # the same weights; it leaves bfloat16 where a CPU's gradient is garbage
        return network


def random_slices(volumes: list[torch.Tensor], count: int, generator: torch.Generator) -> list[torch.Tensor]:
    """The same `count` random slices of a random plane, `[B * count, C, H, W]`, from each of several `[B, C, S, S, S]`."""
    plane = int(torch.randint(3, (1,), generator=generator)) + 2
    positions = torch.randint(volumes[0].shape[plane], (count,), generator=generator).to(volumes[0].device)
    return [volume.index_select(plane, positions).movedim(plane, 1).flatten(0, 1) for volume in volumes]


def psnr(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of the peak signal-to-noise ratio in dB, for intensities in [-1, 1] (peak to peak 2)."""
    errors = (fake.float() - real.float()).square().flatten(1).mean(dim=1)
    return (20 * math.log10(2) - 10 * errors.clamp_min(1e-12).log10()).mean()
