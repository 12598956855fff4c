"""StudyConfig: one study, as its YAML file states it."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import DDIMScheduler

from ..data.cases import LOADERS
from ..errors import InputError
from ..models.autoencoder_vq_3d import VQModel3D
from ..models.feature_extractors import SliceFeatureExtractor, VolumeFeatureExtractor
from ..models.reward_models import SliceRewardModel, VolumeRewardModel
from ..models.unet_3d import UNet3DModel
from ..precision import PRECISIONS
from ..trainers.base_config import TrainingConfig, check_choice, check_positive, check_types
from ..trainers.classifier_config import ClassifierConfig
from ..trainers.diffusion_config import LatentDiffusionConfig
from ..trainers.feature_config import FeatureConfig
from ..trainers.ppo_config import DiffusionPPOConfig
from ..trainers.reward_config import RewardConfig
from ..trainers.vqgan_config import VQGANConfig


TRAINER_CONFIGS = {
    "extractors": FeatureConfig,
    "vqgan": VQGANConfig,
    "diffusion": LatentDiffusionConfig,
    "rewards": RewardConfig,
    "ppo": DiffusionPPOConfig,
    "downstream": ClassifierConfig,
}
RL_STAGES = ("rewards", "ppo", "evaluate", "downstream", "report")  # the seed of these is `rl_seed`


NETWORKS = {
    "vqvae": VQModel3D,
    "unet": UNet3DModel,
    "scheduler": DDIMScheduler,
    "volume_reward": VolumeRewardModel,
    "slice_reward": SliceRewardModel,
    "heldout_reward": VolumeRewardModel,
    "label_extractor": SliceFeatureExtractor,
    "judge_extractor": VolumeFeatureExtractor,
}


def trainer_defaults(stage: str) -> dict:
    """Where a trainer within a study differs from its own defaults: it resumes when the study is run again."""
    return {"save_steps": 5 if stage == "ppo" else 250, "save_total_limit": 1, "resume_from_checkpoint": "latest"}


@dataclass
class StudyConfig:
    """Data, networks and trainers of one study. Sections are mappings: constructor arguments of a network, or fields of a
    trainer's config; both are checked before anything runs."""

    output_dir: str = field(default="outputs/study", metadata={"help": "Every stage writes its folder in here."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random but the data's split."})
    rl_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of reward models, PPO and what follows, where several share one prior; seed if unset."
        },
    )
    mixed_precision: str = field(
        default="no", metadata={"help": "auto (bf16 where the device is fast in it), no, bf16 or fp16."}
    )
    max_steps: int | None = field(
        default=None, metadata={"help": "Cap on the steps of every trainer; for trying out."}
    )
    pretrained: str | None = field(
        default=None,
        metadata={"help": "A folder written by run_study.py --release; its models are used, not trained."},
    )

    pretrained_rewards: bool = field(
        default=True,
        metadata={"help": "Take the reward models of `pretrained` too; false trains new ones on its pipeline."},
    )

    dataset: str = field(
        default="phantoms", metadata={"help": "phantoms, prepared (a folder of `msrl prepare`), or a loader."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the data set; phantoms need none."})
    image_size: int = field(default=32, metadata={"help": "Voxels along each edge of the cubes."})
    field_of_view: float = field(default=192.0, metadata={"help": "Edge of the cubes in millimetres."})
    num_per_class: int = field(default=128, metadata={"help": "Phantoms per class in training and in the hold-out."})
    data_seed: int = field(default=0, metadata={"help": "Seed of the phantoms and of the split by subject."})
    holdout_fraction: float = field(default=0.3, metadata={"help": "Share of held-out subjects."})
    modality: list[str] | None = field(default=None, metadata={"help": "Images of a case: the channels of a volume."})
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the data set's table with the classes."}
    )
    label_bins: dict | None = field(default=None, metadata={"help": "{class: [low, high]} for a numeric column."})
    num_workers: int = field(default=0, metadata={"help": "Processes that prepare images; 0 is this one."})

    vqvae: dict = field(default_factory=dict, metadata={"help": "Constructor arguments of VQModel3D."})
    unet: dict = field(default_factory=dict, metadata={"help": "Constructor arguments of UNet3DModel."})
    scheduler: dict = field(default_factory=dict, metadata={"help": "Constructor arguments of DDIMScheduler."})
    volume_reward: dict = field(default_factory=dict, metadata={"help": "Arguments of VolumeRewardModel."})
    slice_reward: dict = field(default_factory=dict, metadata={"help": "Arguments of SliceRewardModel."})
    heldout_reward: dict = field(
        default_factory=dict, metadata={"help": "Arguments of the VolumeRewardModel that only watches."}
    )
    label_extractor: dict = field(default_factory=dict, metadata={"help": "Arguments of SliceFeatureExtractor."})
    judge_extractor: dict = field(default_factory=dict, metadata={"help": "Arguments of VolumeFeatureExtractor."})

    extractors: dict = field(default_factory=dict, metadata={"help": "Fields of FeatureConfig."})
    vqgan: dict = field(default_factory=dict, metadata={"help": "Fields of VQGANConfig."})
    diffusion: dict = field(default_factory=dict, metadata={"help": "Fields of LatentDiffusionConfig."})
    rewards: dict = field(default_factory=dict, metadata={"help": "Fields of RewardConfig."})
    ppo: dict = field(default_factory=dict, metadata={"help": "Fields of DiffusionPPOConfig."})
    downstream: dict = field(
        default_factory=dict,
        metadata={"help": "Fields of ClassifierConfig; without any there is no such stage."},
    )

    synthetic_steps: list[int] = field(
        default_factory=lambda: [10, 25, 50, 100], metadata={"help": "Denoising steps k of the synthetic sets."}
    )
    reconstruction_steps: list[int] = field(
        default_factory=lambda: [1, 10, 25, 50, 75, 90, 99], metadata={"help": "Noise steps k of the reconstructions."}
    )
    target_map: str = field(default="linear", metadata={"help": "linear, exponential or rank: from FID to target."})
    sampling_batch_size: int = field(default=32, metadata={"help": "Volumes sampled at once."})
    samplers: list[dict] = field(
        default_factory=lambda: [
            {"num_inference_steps": 10, "eta": 0.0},
            {"num_inference_steps": 25, "eta": 0.0},
            {"num_inference_steps": 50, "eta": 0.0},
            {"num_inference_steps": 25, "eta": 1.0},
            {"num_inference_steps": 50, "eta": 1.0},
            {"num_inference_steps": 100, "eta": 1.0},
        ],
        metadata={"help": "Samplers among which the label extractor picks the standard arm's."},
    )
    select_by: str = field(
        default="heldout_reward",
        metadata={"help": "heldout_reward (highest) or -label_fid (lowest): picks the weights that PPO keeps."},
    )
    num_validity_subjects: int = field(
        default=32, metadata={"help": "Held-out subjects per class on which reward models are checked."}
    )
    downstream_seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the classifiers of stage downstream."}
    )
    synthetic_arms: dict = field(
        default_factory=dict,
        metadata={"help": "{name: folder of NIfTI or .safetensors}: other generators' volumes for stage downstream."},
    )
    bootstrap_draws: int = field(default=200, metadata={"help": "Bootstrap draws of the intervals."})

    def __post_init__(self):
        check_types(self)
        check_choice(self, "dataset", ("phantoms", "prepared", *LOADERS))
        check_choice(self, "mixed_precision", PRECISIONS)
        check_choice(self, "select_by", ("heldout_reward", "-label_fid"))
        check_choice(self, "target_map", ("linear", "exponential", "rank"))
        for name in ("image_size", "num_per_class", "sampling_batch_size", "num_validity_subjects", "bootstrap_draws"):
            check_positive(self, name)
        if self.dataset != "phantoms" and not self.data_dir:
            raise InputError(f"dataset {self.dataset} needs data_dir: the folder of the data set.")
        if self.pretrained and not (Path(self.pretrained) / "model_index.json").is_file():
            raise InputError(f"pretrained={self.pretrained} is no pipeline folder: it has no model_index.json.")
        if self.max_steps is not None:
            check_positive(self, "max_steps")
        for sampler in self.samplers:
            if not {"num_inference_steps", "eta"} <= set(sampler) <= {"num_inference_steps", "eta", "guidance_scale"}:
                raise InputError(f"A sampler has num_inference_steps, eta and perhaps guidance_scale, got {sampler}.")
        for section, network in NETWORKS.items():
            known = set(inspect.signature(network.__init__).parameters) - {"self"}
            unknown = sorted(set(getattr(self, section)) - known)
            if unknown:
                raise InputError(
                    f"Section {section!r} has the unknown field {unknown[0]!r}; {network.__name__} knows {sorted(known)}."
                )
        for stage in TRAINER_CONFIGS:
            self.trainer_config(stage)

    def seed_of(self, stage: str) -> int:
        """The seed of a stage."""
        return self.rl_seed if stage in RL_STAGES and self.rl_seed is not None else self.seed

    def trainer_config(self, stage: str, name: str | None = None, **overrides) -> TrainingConfig:
        """The config of a stage's trainer, writing to the stage's folder (or `name` within it).

        Raises:
            ValueError, TypeError: a field the trainer does not have, or a bad value; the sentence names the section.
        """
        settings = {
            "seed": self.seed_of(stage),
            "mixed_precision": self.mixed_precision,
            **trainer_defaults(stage),
            **getattr(self, stage),
            **overrides,
        }
        settings["output_dir"] = str(Path(self.output_dir) / stage / (name or ""))
        config_class = TRAINER_CONFIGS[stage]
        unknown = set(settings) - set(config_class.__dataclass_fields__)
        if unknown:
            raise InputError(
                f"Section {stage!r} has the unknown field {sorted(unknown)[0]!r}; {config_class.__name__} knows "
                f"{sorted(config_class.__dataclass_fields__)}."
            )
        config = config_class(**settings)
        for name in ("max_steps", "pretrain_steps"):
            if self.max_steps is not None and getattr(config, name, None) is not None:
                setattr(config, name, min(getattr(config, name), self.max_steps))
        return config
