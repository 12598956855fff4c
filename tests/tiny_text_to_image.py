"""Tiny text-to-image parts: 16 x 16 drawn images, 8 x 8 latents, a small Stable Diffusion with random weights."""

import torch
from diffusers import StableDiffusionPipeline

from msrl_diffusers.data.dermoscopy import load_dermoscopy
from msrl_diffusers.data.image_folder import ImageDataset
from msrl_diffusers.data.prompts import PromptBuilder
from msrl_diffusers.text_to_image import TextToImageStudyConfig
from msrl_diffusers.text_to_image.small import make_autoencoder, make_stable_diffusion


IMAGE_SIZE = 16
VAE = {"block_out_channels": [8, 8], "norm_num_groups": 4}
UNET = {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 2}
TEXT_ENCODER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
RESNET = {"architecture": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
CONVNEXT = {"architecture": "convnext", "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
VIT = {
    "architecture": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
}  # fmt: skip


def tiny_images(num_per_prompt: int = 1) -> ImageDataset:
    return load_dermoscopy(num_per_prompt, IMAGE_SIZE)


def tiny_text_to_image(seed: int = 0, lively: bool = True) -> StableDiffusionPipeline:
    """`lively`: without the zero initialization of a fresh denoiser; every parameter has a gradient at once."""
    vae = make_autoencoder(IMAGE_SIZE, seed, **VAE)
    pipeline = make_stable_diffusion(vae, PromptBuilder().prompts(), seed, TEXT_ENCODER, UNET)
    if lively:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in pipeline.unet.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return pipeline


def tiny_text_to_image_study() -> dict:
    """Fields of a TextToImageStudyConfig that runs the whole chain in seconds; no tracker."""
    quiet = {"report_to": "none", "train_batch_size": 4}
    return {
        "max_steps": 2,
        "image_size": IMAGE_SIZE,
        "num_per_prompt": 2,
        "rare_attributes": ["melanoma", "hair"],
        "rare_share": 0.5,
        "vae": VAE,
        "unet": UNET,
        "text_encoder": TEXT_ENCODER,
        "classifier_models": {"reward": RESNET, "judge": CONVNEXT, "features": VIT, "augmentation": RESNET},
        "autoencoder": quiet,
        "diffusion": {**quiet, "train_text_encoder": True},
        "classifiers": quiet,
        "ppo": {
            "report_to": "none", "rollout_batch_size": 4, "num_rollout_batches": 2, "train_batch_size": 4,
            "num_inference_steps": 3, "guidance_scale": 2.0, "min_std": 0.01, "use_lora": True, "lora_rank": 2,
            "learning_rate": 1e-2,
        },
        "reward_kind": "probability",  # shares are all alike by a classifier that knows nothing
        "num_heldout_prompts": 28,  # with 4 left, a rollout has two samples of each
        "heldout_samples_per_prompt": 1,
        "num_samples_per_prompt": 2,
        "bootstrap_draws": 10,
        "augmentation": quiet,
        "augmentation_seeds": [0],
    }  # fmt: skip


def config(folder, **changes) -> TextToImageStudyConfig:
    """The study of these fields."""
    return TextToImageStudyConfig(**{**tiny_text_to_image_study(), "output_dir": str(folder), **changes})
