"""The sections of a study's YAML file: mappings that are the fields of a trainer's config or the arguments of a network."""

import inspect
from collections.abc import Mapping

import torch
from diffusers import DDIMScheduler

from ..errors import InputError
from ..models.autoencoder_vq_3d import VQModel3D
from ..models.feature_extractors import PatchFeatureExtractor, SliceFeatureExtractor, VolumeFeatureExtractor
from ..models.reward_models import SliceRewardModel, VolumeRewardModel
from ..models.unet_3d import UNet3DModel
from ..trainers.base_config import TrainingConfig
from ..trainers.classifier_config import ClassifierConfig
from ..trainers.ddo_config import DDOConfig
from ..trainers.diffusion_config import LatentDiffusionConfig
from ..trainers.feature_config import FeatureConfig
from ..trainers.frechet_config import FrechetConfig
from ..trainers.nft_config import DiffusionNFTConfig
from ..trainers.ppo_config import DiffusionPPOConfig
from ..trainers.refresh import RefreshConfig
from ..trainers.reward_backprop_config import RewardBackpropConfig
from ..trainers.reward_config import RewardConfig
from ..trainers.vqgan_config import VQGANConfig


# How a policy is tuned: the name of the method is that of its section and of its stage.
METHOD_CONFIGS: dict[str, type[TrainingConfig]] = {
    "ppo": DiffusionPPOConfig,
    "nft": DiffusionNFTConfig,
    "draft": RewardBackpropConfig,
    "frechet": FrechetConfig,
    "ddo": DDOConfig,
}
METHODS = tuple(METHOD_CONFIGS)
TRAINED_ON = ("volume", "slice")  # the third reward model only watches
WITHOUT_REWARDS = ("frechet", "ddo")  # learned rewards only watch
TRAINER_CONFIGS: dict[str, type[TrainingConfig]] = {
    "extractors": FeatureConfig,
    "vqgan": VQGANConfig,
    "diffusion": LatentDiffusionConfig,
    "rewards": RewardConfig,
    "refresh": RefreshConfig,
    **METHOD_CONFIGS,
    "downstream": ClassifierConfig,
}
NETWORKS = {
    "vqvae": VQModel3D,
    "unet": UNet3DModel,
    "scheduler": DDIMScheduler,
    "volume_reward": VolumeRewardModel,
    "slice_reward": SliceRewardModel,
    "heldout_reward": VolumeRewardModel,
    "label_extractor": SliceFeatureExtractor,
    "judge_extractor": VolumeFeatureExtractor,
    "second_judge_extractor": PatchFeatureExtractor,
}


DERIVED = ("sample_size", "in_channels", "out_channels", "num_class_embeds")  # arguments of the denoiser
SEEDED_BY_ROLE = ("extractors", "rewards", "refresh")  # several networks each, all of a seed of their own


def trainer_defaults(section: str) -> dict:
    """Where a trainer within a study differs from its own defaults: it resumes when the study is run again."""
    return {"save_steps": 5 if section in METHODS else 250, "save_total_limit": 1, "resume_from_checkpoint": "latest"}


def make_trainer_config(section: str, settings: Mapping) -> TrainingConfig:
    """The config of a section's trainer.

    Raises:
        InputError: a field the trainer does not have, or a bad value; the sentence names it.
    """
    config_class = TRAINER_CONFIGS[section]
    unknown = set(settings) - set(config_class.__dataclass_fields__)
    if unknown:
        raise InputError(
            f"Section {section!r} has the unknown field {sorted(unknown)[0]!r}; {config_class.__name__} knows "
            f"{sorted(config_class.__dataclass_fields__)}."
        )
    return config_class(**settings)


def check_network(section: str, arguments: Mapping) -> None:
    """Raise InputError for an argument that the section's network does not have, or with which it can't be made."""
    network = NETWORKS[section]
    known = set(inspect.signature(network.__init__).parameters) - {"self"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise InputError(
            f"Section {section!r} has the unknown field {unknown[0]!r}; {network.__name__} knows {sorted(known)}."
        )
    found = sorted(set(arguments) & set(DERIVED)) if section == "unet" else []
    if found:
        raise InputError(f"Section 'unet': {found[0]} follows from the data and the autoencoder; remove it.")
    if arguments:
        try:
            with torch.device("meta"):  # tensors there are shapes alone: no memory, no random numbers
                network(**arguments)
        except Exception as error:  # constructors, of others too, fail in every way
            raise InputError(
                f"Section {section!r} makes no {network.__name__} ({str(error).rstrip('.')}); correct one of {sorted(arguments)}."
            ) from error
