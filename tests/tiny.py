"""Tiny real components: random weights, 16^3 volumes, 8^3 latents, seconds on one core."""

import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from msrl_diffusers import MedVolumePipeline, StudyConfig, UNet3DModel, VQModel3D
from msrl_diffusers.data.cases import list_cases
from msrl_diffusers.data.phantoms import load_phantoms
from msrl_diffusers.data.preparation import prepare_case
from msrl_diffusers.data.volumes import VolumeDataset
from msrl_diffusers.errors import InputError


def tiny_phantoms(num_per_class: int = 3) -> VolumeDataset:
    return load_phantoms(num_per_class, 16, seed=0)


def tiny_vqvae(quantizer: str = "fsq", seed: int = 0) -> VQModel3D:
    torch.manual_seed(seed)
    return VQModel3D(
        block_out_channels=(8, 16), latent_channels=2, quantizer=quantizer, num_vq_embeddings=16, norm_num_groups=4
    )


def tiny_unet(seed: int = 0, dropout: float = 0.0) -> UNet3DModel:
    """Without the zero initialisation of a fresh denoiser, so that every parameter has a gradient at once."""
    torch.manual_seed(seed)
    unet = UNet3DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        attention_levels=(False, True),
        attention_head_dim=8,
        num_class_embeds=2,
        norm_num_groups=4,
        dropout=dropout,
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


def tiny_pipeline(seed: int = 0, dropout: float = 0.0) -> MedVolumePipeline:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=0,
    )
    pipeline = MedVolumePipeline(
        tiny_vqvae(seed=seed), tiny_unet(seed, dropout), scheduler, (12.0, 12.0, 12.0), {0: "HGG", 1: "LGG"}
    )
    pipeline.vqvae.register_to_config(scaling_factor=2.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights and buffers of a module as they are now."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def tiny_study() -> dict:
    """Fields of a StudyConfig that runs the whole chain in seconds; no tracker."""
    quiet = {"report_to": "none"}
    return {
        "max_steps": 2,
        "num_per_class": 4,
        "image_size": 16,
        "mixed_precision": "bf16",
        "vqvae": {"block_out_channels": [8, 16], "latent_channels": 2, "quantizer": "fsq"},
        "unet": {"block_out_channels": [8, 8], "layers_per_block": 1, "attention_head_dim": 8},
        "volume_reward": {"block_out_channels": [8, 8]},
        "slice_reward": {"block_out_channels": [8, 8]},
        "heldout_reward": {"block_out_channels": [8]},
        "label_extractor": {"block_out_channels": [8, 8], "num_features": 4, "num_slices": 3},
        "judge_extractor": {"block_out_channels": [8, 8], "num_features": 3},
        "second_judge_extractor": {"width": 16, "num_layers": 1, "num_features": 3},
        "extractors": {"train_batch_size": 4, **quiet},
        "vqgan": {
            "train_batch_size": 4, "discriminator_start_step": 0, "discriminator_channels": 8,
            "discriminator_layers": 1, **quiet,
        },
        "diffusion": {"train_batch_size": 4, **quiet},
        "rewards": {"train_batch_size": 4, **quiet},
        "ppo": {
            "rollout_batch_size": 4, "num_rollout_batches": 2, "train_batch_size": 4, "num_inference_steps": 4,
            "timestep_fraction": 0.5, **quiet,
        },
        "downstream": {"network": "resnet10", "widen_factor": 0.0625, "train_batch_size": 4, **quiet},
        "downstream_seeds": [0],
        "synthetic_steps": [2, 4],
        "reconstruction_steps": [1, 5],
        "samplers": [{"num_inference_steps": 2, "eta": 0.0}, {"num_inference_steps": 4, "eta": 1.0}],
        "num_validity_subjects": 3,
        "bootstrap_draws": 4,
    }  # fmt: skip


def tiny_stable_diffusion(seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion with all its parts: 16 x 16 images, 8 x 8 latents, prompts in small letters, a PNDM scheduler."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=12)
    torch.manual_seed(seed)
    text_config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae, CLIPTextModel(text_config), tokenizer, unet, scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings_with(folder, **changes) -> StudyConfig:
    """The config of `tiny_study` in a folder, with changes of fields; of a section those that are named."""
    settings = tiny_study()
    for name, value in changes.items():
        settings[name] = {**settings[name], **value} if isinstance(settings.get(name), dict) else value
    return StudyConfig(output_dir=str(folder), **settings)


class Brightness:
    """The mean intensity of the sample."""

    name = "brightness"
    differentiable = True

    def __call__(self, samples, conditions):
        return samples.flatten(1).mean(dim=1)


def load_folder(folder, processor, label_column=None, label_bins=None) -> VolumeDataset:
    """The volumes of a nifti_folder, in memory; what is wrong with an image is raised."""
    listing = list_cases("nifti_folder", folder, label_column=label_column, label_bins=label_bins)
    volumes = []
    with tempfile.TemporaryDirectory() as work:
        for index, case in enumerate(listing.cases):
            path = Path(work) / f"{index}.safetensors"
            reason = prepare_case(case, processor, path)
            if reason:
                raise InputError(reason)
            volumes.append(load_file(path)["volume"])
    return VolumeDataset(
        torch.stack(volumes),
        torch.tensor([listing.classes.index(case.label) for case in listing.cases]),
        [case.subject_id for case in listing.cases],
        dict(enumerate(listing.classes)),
        processor.spacing,
    )
