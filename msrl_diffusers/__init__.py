"""msrl_diffusers: train a 3D generator of medical volumes, fine-tune it by reinforcement learning from rewards nobody had
to label, prove that it got better, share it. Not for clinical use.

Importing the package registers its classes with diffusers, so that `DiffusionPipeline.from_pretrained` loads a
`MedVolumePipeline` and `model_index.json` names `["msrl_diffusers", "VQModel3D"]`. Diffusers never imports a module that a
repository names, and looks for `ModelMixin` and `SchedulerMixin` in its namespace; hence the eager imports below.
"""

from importlib import import_module

import diffusers
from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .models.autoencoder_vq_3d import VQModel3D
from .models.feature_extractors import SliceFeatureExtractor, VolumeFeatureExtractor
from .models.reward_models import SliceRewardModel, VolumeRewardModel
from .models.unet_3d import UNet3DModel
from .pipelines.med_volume import MedVolumePipeline, MedVolumePipelineOutput


__version__ = "0.1.0"

LOADABLE_CLASSES[__name__] = {
    "ModelMixin": ["save_pretrained", "from_pretrained"],
    "SchedulerMixin": ["save_pretrained", "from_pretrained"],
}
diffusers.MedVolumePipeline = MedVolumePipeline

# Public names that are imported when first used: where they live, under this package.
_LAZY = {
    "VolumeDataset": "data.volumes",
    "VolumeProcessor": "data.processor",
    "load_phantoms": "data.phantoms",
    "load_volumes": "data.loading",
    "make_phantom": "data.phantoms",
    "split_by_subject": "data.splits",
    "write_phantoms": "data.phantoms",
    "make_policy": "policies",
    "VolumePolicy": "policies",
    "LearnedReward": "rewards",
    "WeightedSum": "rewards",
    "audit": "evaluation.memorization",
    "compare_sets": "evaluation.comparison",
    "load_extractor": "evaluation.extractors",
    "open_source": "evaluation.sources",
    "sample_volumes": "pipelines.sampling",
    "ClassifierConfig": "trainers.classifier_config",
    "ClassifierTrainer": "trainers.classifier_trainer",
    "DiffusionPPOConfig": "trainers.ppo_config",
    "DiffusionPPOTrainer": "trainers.ppo_trainer",
    "FeatureConfig": "trainers.feature_config",
    "FeatureTrainer": "trainers.feature_trainer",
    "LatentDiffusionConfig": "trainers.diffusion_config",
    "LatentDiffusionTrainer": "trainers.diffusion_trainer",
    "RewardConfig": "trainers.reward_config",
    "RewardTrainer": "trainers.reward_trainer",
    "ScoredVolumes": "trainers.reward_trainer",
    "VQGANConfig": "trainers.vqgan_config",
    "VQGANTrainer": "trainers.vqgan_trainer",
    "StudyConfig": "study",
    "run_downstream": "study.downstream",
    "run_study": "study",
}

__all__ = [
    "MedVolumePipeline",
    "MedVolumePipelineOutput",
    "ModelMixin",
    "SchedulerMixin",
    "SliceFeatureExtractor",
    "SliceRewardModel",
    "UNet3DModel",
    "VQModel3D",
    "VolumeFeatureExtractor",
    "VolumeRewardModel",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
