"""TextToImageTrainer: any StableDiffusionPipeline, fine-tuned on images and their prompts.

1. Posteriors of all training images (and their mirror images, if asked) are computed once; every step draws from them.
2. Embeddings of the prompts are computed once too, unless the text encoder is trained; it is of use for a pipeline
   that is trained from scratch, and seldom for one that knows language.
3. The loss is the mean squared error in the scheduler's own prediction type, with min-SNR weights if asked. A share of
   the prompts is replaced by the empty one, so that the tuned model can be guided (arXiv 2207.12598).
4. All weights of the UNet, or a LoRA adapter, which is saved apart and then merged; an exponential average of what was
   trained is what ends up in the pipeline.
"""

import logging

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline

from ..data.image_folder import ImageDataset
from ..errors import InputError
from ..models.adapters import carried_adapters
from ..processes import process_state
from ..seeding import batch_indices, generator_for
from .base import TrainingRun, in_fast_memory_format
from .denoising_loss import denoising_target, even_timesteps, min_snr_weights
from .lora import ATTENTION, merge_lora, save_lora
from .text_to_image_config import TextToImageConfig
from .tuned_weights import REMEDY, add_lora, check_precision
from .weight_average import WeightAverage


logger = logging.getLogger(__name__)


class PromptedUNet(torch.nn.Module):
    """The UNet, and the text encoder if it is trained: one module, so that processes reduce the gradients of both."""

    def __init__(self, unet: torch.nn.Module, text_encoder: torch.nn.Module | None):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, prompts: dict[str, torch.Tensor], rows: torch.Tensor
    ) -> torch.Tensor:
        """Predictions like `noisy [B, C, h, w]` at `timesteps [B]`; sample i has the prompt `rows[i]` of `prompts`:
        embeddings `{"embeddings": [U, L, E]}`, or the text encoder's inputs, of U prompts.
        """
        if self.text_encoder is None:
            embeddings = prompts["embeddings"][rows]
        else:
            asked, places = rows.unique(return_inverse=True)  # a batch has some prompts several times
            embeddings = self.text_encoder(**{name: value[asked] for name, value in prompts.items()})[0][places]
        return self.unet(noisy, timesteps, embeddings, return_dict=False)[0]


class TextToImageTrainer:
    """Trains `pipeline.unet` (and `pipeline.text_encoder`, if asked) on `train_dataset`; the pipeline holds the
    averaged weights afterwards, and with LoRA `output_dir/lora` the adapter. Prompts longer than the tokenizer takes are cut, as
    diffusers' scripts cut them; a warning counts these.

    Raises:
        InputError: images of another size than the pipeline makes, weights in a precision that can't be trained, or a network that
            carries an adapter already.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, args: TextToImageConfig, train_dataset: ImageDataset):
        self.pipeline, self.args, self.train_dataset = pipeline, args, train_dataset
        size = pipeline_image_size(pipeline)
        if train_dataset.image_size != size:
            raise InputError(
                f"The images have {train_dataset.image_size} pixels along an edge, the pipeline makes images of "
                f"{size}; load them with image_size={size}."
            )
        trained = {pipeline.unet: not args.use_lora, pipeline.text_encoder: args.train_text_encoder}
        for network, whole in trained.items():
            if whole and (names := carried_adapters(network)):
                raise InputError(
                    f"{type(network).__name__} carries the LoRA adapter {names}, which would be trained and saved within it, in weights "
                    f"that can't be loaded; {REMEDY}."
                )
        self.prompts = [*sorted(set(train_dataset.prompts)), ""]  # the empty one is the last
        self._warn_of_long_prompts()
        # the scheduler of a pipeline that is used as it is may be a sampler without get_velocity
        self.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        pipeline.unet.requires_grad_(True)
        pipeline.text_encoder.requires_grad_(args.train_text_encoder)
        check_precision(pipeline.unet, args.mixed_precision, args.use_lora)
        if args.train_text_encoder:
            check_precision(pipeline.text_encoder, args.mixed_precision)
        if args.use_lora:
            add_lora(pipeline.unet, args.lora_rank, args.lora_target_modules or ATTENTION, args.seed)
        if args.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()

    def train(self) -> dict[str, float]:
        """Run the training; returns the last logged figures."""
        args, run, pipeline = self.args, TrainingRun(self.args, "text to image"), self.pipeline
        accelerator = run.accelerator
        pipeline.to(run.device)
        means, stds, rows_of_images = self._cache_posteriors(run.device)
        prompts = self._cache_prompts(run.device)
        network = PromptedUNet(
            in_fast_memory_format(pipeline.unet, args.mixed_precision),
            pipeline.text_encoder if args.train_text_encoder else None,
        )
        optimizer = run.optimizer([value for value in network.parameters() if value.requires_grad])
        lr_scheduler = run.lr_scheduler(optimizer, args.max_steps // args.gradient_accumulation_steps)
        network, optimizer, lr_scheduler = accelerator.prepare(network, optimizer, lr_scheduler)
        trainable = [value for value in accelerator.unwrap_model(network).parameters() if value.requires_grad]
        ema = None
        if args.ema_decay is not None:
            ema = WeightAverage(trainable, args.ema_decay, run.device)
            run.keep(ema, "ema_decay")
        run.resume()
        network.train()
        for step in run.steps():
            batch_size = args.train_batch_size * accelerator.num_processes
            indices = run.shard(batch_indices(len(means), batch_size, args.seed, step))
            draw, noise, timesteps, dropped = (
                run.shard(values).to(run.device) for values in self._draws(batch_size, means.shape[1:], step)
            )
            clean = means[indices].to(run.device, torch.float32) + stds[indices].to(run.device, torch.float32) * draw
            clean = clean * pipeline.vae.config.scaling_factor
            rows = torch.where(dropped, len(self.prompts) - 1, rows_of_images[indices].to(run.device))
            noisy = self.scheduler.add_noise(clean, noise, timesteps)
            with accelerator.accumulate(network):
                prediction = network(noisy, timesteps, prompts, rows)
                target = denoising_target(self.scheduler, clean, noise, timesteps)
                losses = F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(dim=1)
                loss = (losses * min_snr_weights(self.scheduler, timesteps, args.snr_gamma)).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    run.record(grad_norm=run.clip_gradients(trainable))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                lr_scheduler.step()
                if ema is not None:
                    ema.step(trainable)
            run.record(loss=loss)
        run.finish()
        if ema is not None:
            ema.copy_to(trainable)
        trained = accelerator.unwrap_model(network, keep_fp32_wrapper=False)
        pipeline.unet = trained.unet.eval()
        if args.train_text_encoder:
            pipeline.text_encoder = trained.text_encoder.eval()
        if args.use_lora:
            if run.is_main:
                save_lora(pipeline, run.output_dir / "lora")  # beside log and checkpoints: a folder to share
            merge_lora(pipeline.unet)
            pipeline.unet.requires_grad_(True)  # a later trainer takes what has gradients
        return run.history[-1] if run.history else {}

    def _warn_of_long_prompts(self) -> None:
        limit = self.pipeline.tokenizer.model_max_length
        lengths = [len(ids) for ids in self.pipeline.tokenizer(self.prompts, verbose=False).input_ids]
        count = sum(length > limit for length in lengths)
        if count and process_state().is_main_process:
            logger.warning(
                "%d of %d different prompts have more than the %d tokens that the text encoder reads (the longest %d): what is beyond is "
                "cut, and not learned; shorten them.",
                count, len(self.prompts) - 1, limit, max(lengths),
            )  # fmt: skip

    @torch.no_grad()
    def _cache_posteriors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Means and deviations `[N, C, h, w]`, float16 on the CPU, and the number of each image's prompt `[N]`."""
        vae, data = self.pipeline.vae.to(device).eval(), self.train_dataset
        numbers = {prompt: number for number, prompt in enumerate(self.prompts)}
        means, stds, rows = [], [], []
        for flip in (False, True) if self.args.flip_augmentation else (False,):
            for indices in torch.arange(len(data)).split(self.args.encode_batch_size):
                images = data.batch(indices, device)["pixel_values"].to(vae.dtype)
                posterior = vae.encode(images.flip(-1) if flip else images).latent_dist
                means.append(posterior.mean.half().cpu())
                stds.append(posterior.std.half().cpu())
            rows += [numbers[prompt] for prompt in data.prompts]
        return torch.cat(means), torch.cat(stds), torch.tensor(rows)

    @torch.no_grad()
    def _cache_prompts(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Of all prompts, as the pipeline does it: what the text encoder is given, if it is trained, or gives."""
        pipeline = self.pipeline
        if not self.args.train_text_encoder:
            pipeline.text_encoder.eval()
            size, number = self.args.encode_batch_size, len(self.prompts)
            some = [self.prompts[start : start + size] for start in range(0, number, size)]
            return {
                "embeddings": torch.cat([pipeline.encode_prompt(each, device, 1, False)[0].float() for each in some])
            }
        tokenizer = pipeline.tokenizer
        tokens = tokenizer(
            self.prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        names = ["input_ids"]
        if getattr(pipeline.text_encoder.config, "use_attention_mask", False):
            names.append("attention_mask")
        return {name: tokens[name].to(device) for name in names}

    def _draws(self, batch_size: int, shape: torch.Size, step: int) -> tuple[torch.Tensor, ...]:
        """The posterior's draw, noise, timesteps and dropped prompts of the whole batch, whatever the processes."""
        generator = generator_for(self.args.seed, "text to image", step)
        draw, noise = torch.randn(2, batch_size, *shape, generator=generator)
        timesteps = even_timesteps(batch_size, self.scheduler.config.num_train_timesteps, generator)
        return draw, noise, timesteps, torch.rand(batch_size, generator=generator) < self.args.prompt_dropout


def pipeline_image_size(pipeline: StableDiffusionPipeline) -> int:
    """Edge in pixels of the images that the pipeline makes by default."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor
