"""msrl_diffusers: train a 3D generator of medical volumes, fine-tune it by reinforcement learning from rewards nobody had
to label, prove that it got better, share it. Not for clinical use.

Importing the package registers it with diffusers, so that `DiffusionPipeline.from_pretrained` loads a
`MedVolumePipeline` and `model_index.json` names `["msrl_diffusers", "VQModel3D"]`. It imports nothing that
`import diffusers` has not: every name is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

import diffusers

from .pipelines.registration import register


if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

    from .models.autoencoder_vq_3d import VQModel3D
    from .models.feature_extractors import (
        PatchFeatureExtractor,
        RewardFeatureExtractor,
        SliceFeatureExtractor,
        VolumeFeatureExtractor,
    )
    from .models.reward_models import SliceRewardModel, VolumeRewardModel
    from .models.unet_3d import UNet3DModel
    from .pipelines.med_volume import MedVolumePipeline, MedVolumePipelineOutput


__version__ = "0.1.0"

register()

# Diffusers looks for these base classes of its own in the namespace of every library that it loads components from.
_OF_DIFFUSERS = ("ModelMixin", "SchedulerMixin")

# Public names that are imported when first used: where they live, under this package.
_LAZY = {
    "MedVolumePipeline": "pipelines.med_volume",
    "MedVolumePipelineOutput": "pipelines.med_volume",
    "PatchFeatureExtractor": "models.feature_extractors",
    "RewardFeatureExtractor": "models.feature_extractors",
    "SliceFeatureExtractor": "models.feature_extractors",
    "SliceRewardModel": "models.reward_models",
    "UNet3DModel": "models.unet_3d",
    "VQModel3D": "models.autoencoder_vq_3d",
    "VolumeFeatureExtractor": "models.feature_extractors",
    "VolumeRewardModel": "models.reward_models",
    "ImageDataset": "data.image_folder",
    "PromptBuilder": "data.prompts",
    "VolumeDataset": "data.volumes",
    "VolumeProcessor": "data.processor",
    "class_influence": "functional.influence",
    "degrade": "data.degradations",
    "frechet_influence": "functional.influence",
    "mixed_targets": "functional.influence",
    "load_dermoscopy": "data.dermoscopy",
    "load_image_folder": "data.image_folder",
    "load_phantoms": "data.phantoms",
    "load_volumes": "data.loading",
    "make_phantom": "data.phantoms",
    "split_by_subject": "data.splits",
    "write_dermoscopy": "data.dermoscopy",
    "write_phantoms": "data.phantoms",
    "make_policy": "policies",
    "VolumePolicy": "policies",
    "AttributeMatch": "rewards.attribute_match",
    "ImageTextSimilarity": "rewards.image_text",
    "LearnedReward": "rewards",
    "WeightedSum": "rewards",
    "Auditor": "evaluation.memorization",
    "audit": "evaluation.memorization",
    "check_validity": "evaluation.validity",
    "reward_validity": "evaluation.validity",
    "compare_sets": "evaluation.comparison",
    "load_extractor": "evaluation.extractors",
    "open_source": "evaluation.sources",
    "sample_volumes": "pipelines.sampling",
    "push_folder": "hub",
    "render_card": "hub",
    "AttributeConfig": "trainers.attribute_config",
    "AttributeTrainer": "trainers.attribute_trainer",
    "AutoencoderKLConfig": "trainers.autoencoder_kl_config",
    "AutoencoderKLTrainer": "trainers.autoencoder_kl_trainer",
    "ClassifierConfig": "trainers.classifier_config",
    "ClassifierTrainer": "trainers.classifier_trainer",
    "DiffusionPPOConfig": "trainers.ppo_config",
    "DiffusionPPOTrainer": "trainers.ppo_trainer",
    "FeatureConfig": "trainers.feature_config",
    "FeatureTrainer": "trainers.feature_trainer",
    "LatentDiffusionConfig": "trainers.diffusion_config",
    "LatentDiffusionTrainer": "trainers.diffusion_trainer",
    "DiffusionNFTConfig": "trainers.nft_config",
    "DiffusionNFTTrainer": "trainers.nft_trainer",
    "DDOConfig": "trainers.ddo_config",
    "DDOTrainer": "trainers.ddo_trainer",
    "FrechetConfig": "trainers.frechet_config",
    "FrechetTrainer": "trainers.frechet_trainer",
    "FrechetWatchdog": "trainers.frechet_watchdog",
    "RewardBackpropConfig": "trainers.reward_backprop_config",
    "RewardBackpropTrainer": "trainers.reward_backprop_trainer",
    "RefreshConfig": "trainers.refresh",
    "RewardRefresh": "trainers.refresh",
    "SetLabeler": "evaluation.set_labels",
    "SnapshotCallback": "trainers.snapshots",
    "RewardConfig": "trainers.reward_config",
    "RewardTrainer": "trainers.reward_trainer",
    "ScoredVolumes": "trainers.reward_trainer",
    "TextToImageConfig": "trainers.text_to_image_config",
    "TextToImageTrainer": "trainers.text_to_image_trainer",
    "VQGANConfig": "trainers.vqgan_config",
    "VQGANTrainer": "trainers.vqgan_trainer",
    "StudyConfig": "study",
    "run_downstream": "study.downstream",
    "run_study": "study",
    "TextToImageStudyConfig": "text_to_image",
}

__all__ = [*_OF_DIFFUSERS, *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    if name in _OF_DIFFUSERS:
        return getattr(diffusers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
