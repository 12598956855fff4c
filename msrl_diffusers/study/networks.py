"""The networks that a study trains, of the config's sections and of what follows from its data."""

from collections.abc import Callable

import torch
from torch import nn

from ..errors import InputError
from ..models.autoencoder_vq_3d import VQModel3D
from ..models.feature_extractors import RewardFeatureExtractor
from ..models.unet_3d import UNet3DModel
from .artifacts import EXTRACTOR_CLASSES, REWARD_CLASSES, stages_left_out
from .config import StudyConfig


def make_extractor(config: StudyConfig, role: str, num_channels: int) -> nn.Module:
    """An extractor of volumes with so many channels."""
    return EXTRACTOR_CLASSES[role](**{"in_channels": num_channels, **getattr(config, f"{role}_extractor")})


def make_autoencoder(config: StudyConfig, num_channels: int) -> VQModel3D:
    """The autoencoder of volumes with so many channels."""
    return VQModel3D(**{"in_channels": num_channels, "out_channels": num_channels, **config.vqvae})


def make_denoiser(config: StudyConfig, vqvae: VQModel3D, image_size: int, num_classes: int) -> UNet3DModel:
    """The denoiser of the latents that `vqvae` makes of cubes of `image_size` voxels."""
    return UNet3DModel(
        sample_size=image_size // vqvae.downsample_factor,
        in_channels=vqvae.config.latent_channels,
        out_channels=vqvae.config.latent_channels,
        num_class_embeds=num_classes,
        **config.unet,
    )


def make_reward_model(config: StudyConfig, role: str, num_channels: int, num_classes: int) -> nn.Module:
    """A reward model of volumes with so many channels; it is told their classes where the config says so."""
    told = {"num_classes": num_classes} if config.conditional_rewards else {}
    return REWARD_CLASSES[role](**{"in_channels": num_channels, **told, **getattr(config, f"{role}_reward")})


def check_networks(config: StudyConfig, shape: tuple[int, int, int, int], num_classes: int) -> None:
    """Raise InputError for a network that the study would train and that can't take volumes of `shape` `(C, D, H, W)`.

    Nothing is computed: tensors on the device "meta" are shapes alone.
    """
    left_out, num_channels = stages_left_out(config), shape[0]
    with torch.device("meta"), torch.no_grad():
        volumes = torch.empty(2, *shape)
        if "extractors" not in left_out:
            for role in EXTRACTOR_CLASSES:
                _run(f"{role}_extractor", shape, make_extractor(config, role, num_channels), volumes)
        if "vqgan" not in left_out:
            vqvae = make_autoencoder(config, num_channels)
            latents = _run("vqvae", shape, lambda given: vqvae.encode(given).latents, volumes)
            unet = make_denoiser(config, vqvae, shape[-1], num_classes)
            _run("unet", shape, unet, latents, 0, torch.zeros(2, dtype=torch.long))
        if "rewards" not in left_out:
            for role in REWARD_CLASSES:
                model = make_reward_model(config, role, num_channels, num_classes)
                _run(f"{role}_reward", shape, RewardFeatureExtractor(model), volumes)


def _run(section: str, shape: tuple[int, ...], network: Callable, *inputs):
    try:
        return network(*inputs)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"Section {section!r} makes a network that can't take volumes {list(shape)} ({str(error).rstrip('.')}); change its "
            "block_out_channels or patch_size, or give another image_size."
        ) from error
