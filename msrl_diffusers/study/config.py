"""StudyConfig: one study, as its YAML file states it."""

from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path

from ..data.cases import LOADERS
from ..errors import InputError
from ..precision import PRECISIONS
from ..trainers.base_config import (
    TrainingConfig,
    check_choice,
    check_outputs_apart,
    check_positive,
    check_types,
    resumed,
)
from ..trajectories import RECONSTRUCTION_GRID
from .reward_options import check_reward_options
from .sections import (
    METHODS,
    NETWORKS,
    SEEDED_BY_ROLE,
    TRAINED_ON,
    TRAINER_CONFIGS,
    WITHOUT_REWARDS,
    check_network,
    make_trainer_config,
    trainer_defaults,
)


__all__ = ["RL_STAGES", "TRAINER_CONFIGS", "StudyConfig"]


SHOW_LESIONS = ("phantoms", "brats2019")  # pictures look for one in each volume; of other data all show the same place
FRECHET_FEATURES = ("label", "volume", "slice")  # the judges are not among them, nor the reward that watches
# The seed of these is `rl_seed`.
RL_STAGES = (
    "rewards",
    "validity",
    "refresh",
    *METHODS,
    "curve",
    "baseline",
    "evaluate",
    "baseline_downstream",
    "downstream",
    "report",
)


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
    subject_column: str | None = field(
        default=None,
        metadata={"help": "Column that names the subject: subject_id or participant_id, or each file, if unset."},
    )
    num_workers: int = field(default=0, metadata={"help": "Processes that prepare volumes; 0 is this one."})

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
    second_judge_extractor: dict = field(
        default_factory=dict, metadata={"help": "Arguments of PatchFeatureExtractor."}
    )

    extractors: dict = field(
        default_factory=dict,
        metadata={"help": "Fields of FeatureConfig; the label extractor is told no degradations."},
    )
    vqgan: dict = field(default_factory=dict, metadata={"help": "Fields of VQGANConfig."})
    diffusion: dict = field(default_factory=dict, metadata={"help": "Fields of LatentDiffusionConfig."})
    rewards: dict = field(default_factory=dict, metadata={"help": "Fields of RewardConfig."})
    method: str = field(
        default="ppo",
        metadata={"help": "How the policy is tuned: ppo, nft, draft, frechet or ddo, each with its section."},
    )
    ppo: dict = field(default_factory=dict, metadata={"help": "Fields of DiffusionPPOConfig."})
    nft: dict = field(default_factory=dict, metadata={"help": "Fields of DiffusionNFTConfig."})
    draft: dict = field(default_factory=dict, metadata={"help": "Fields of RewardBackpropConfig."})
    frechet: dict = field(default_factory=dict, metadata={"help": "Fields of FrechetConfig."})
    ddo: dict = field(default_factory=dict, metadata={"help": "Fields of DDOConfig."})
    frechet_features: list[str] = field(
        default_factory=lambda: ["label"],
        metadata={
            "help": "Whose features method frechet takes the distance in: label (the extractor), volume, slice (reward models)."
        },
    )
    refresh: dict = field(
        default_factory=dict,
        metadata={"help": "Fields of RefreshConfig, for method ppo; without any the reward models stay as they are."},
    )
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
    trajectories_per_class: int | None = field(
        default=250,
        metadata={
            "help": "Volumes per class in every such set: as many as there are to train on, at most this; null: no limit."
        },
    )
    target_map: str = field(default="linear", metadata={"help": "linear, exponential or rank: from FID to target."})
    degraded_anchors: dict = field(
        default_factory=dict,
        metadata={
            "help": "{kinds: [...], strengths: [...]}: degraded training volumes as further sets of reward data."
        },
    )
    policy_anchors: dict = field(
        default_factory=dict,
        metadata={"help": "{name: folder of NIfTI or .safetensors}: samples of earlier policies as further sets."},
    )
    conditional_rewards: bool = field(
        default=False,
        metadata={"help": "Tell reward models the class of what they score; the paper's are not told."},
    )
    marginal_labels: float = field(
        default=0.0, metadata={"help": "Share of each volume's own influence on the distance in its reward target."}
    )
    validity_floors: dict | None = field(
        default=None, metadata={"help": "{auc: .., spearman: ..}: below these of any reward no policy is tuned by it."}
    )
    unseen_sets: dict = field(
        default_factory=dict,
        metadata={
            "help": "{name: folder or .safetensors}: samples of other policies, on which rewards are checked too."
        },
    )
    sampling_batch_size: int = field(
        default=32, metadata={"help": "Volumes sampled at once; with another number what is done stays."}
    )
    samplers: list[dict] = field(
        default_factory=lambda: [
            {"num_inference_steps": 10, "eta": 0.0},
            {"num_inference_steps": 25, "eta": 0.0},
            {"num_inference_steps": 50, "eta": 0.0},
            {"num_inference_steps": 25, "eta": 1.0},
            {"num_inference_steps": 50, "eta": 1.0},
            {"num_inference_steps": 100, "eta": 1.0},
        ],
        metadata={
            "help": "Samplers among which the label extractor picks the standard arm's; a release (`pretrained`) states its own."
        },
    )
    select_by: str = field(
        default="heldout_reward",
        metadata={
            "help": "heldout_reward (highest) or -label_fid (lowest; in a command --select_by=-label_fid): picks the weights that are kept."
        },
    )
    watch_per_class: int = field(
        default=0,
        metadata={
            "help": "Volumes per class, at the pretrained model's best of `samplers`, that -label_fid is measured on, every watch_steps rollouts; "
            "0: the rollout's own."
        },
    )
    num_curve_points: int = field(
        default=0, metadata={"help": "Points of the over-optimization curve; 0 measures none."}
    )
    curve_per_class: int = field(default=64, metadata={"help": "Volumes per class at each point of the curve."})
    keep_snapshots: bool = field(
        default=True, metadata={"help": "Keep the weights along the run after the curve has been measured."}
    )
    num_validity_subjects: int = field(
        default=32, metadata={"help": "Held-out subjects per class on which reward models are checked."}
    )
    downstream_seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the classifiers of stage downstream."}
    )
    downstream_per_class: int | None = field(
        default=None,
        metadata={"help": "Real training volumes per class of those classifiers; all there are if unset."},
    )
    synthetic_arms: dict = field(
        default_factory=dict,
        metadata={"help": "{name: folder of NIfTI or .safetensors}: other generators' volumes for stage downstream."},
    )
    evaluation_per_class: int | None = field(
        default=None,
        metadata={"help": "Volumes per class on either side of the reported distances; all there are if unset."},
    )
    bootstrap_draws: int = field(default=200, metadata={"help": "Bootstrap draws of the intervals."})

    def __post_init__(self):
        check_types(self)
        check_choice(self, "dataset", ("phantoms", "prepared", *LOADERS))
        check_choice(self, "mixed_precision", PRECISIONS)
        check_choice(self, "method", METHODS)
        check_choice(self, "select_by", ("heldout_reward", "-label_fid"))
        check_choice(self, "target_map", ("linear", "exponential", "rank"))
        for name in ("image_size", "num_per_class", "sampling_batch_size", "num_validity_subjects", "bootstrap_draws"):
            check_positive(self, name)
        check_positive(self, "curve_per_class")
        for name in ("num_curve_points", "watch_per_class"):
            if getattr(self, name) < 0:
                raise InputError(f"StudyConfig: {name} must be 0 or more, got {getattr(self, name)}.")
        if self.dataset != "phantoms" and not self.data_dir:
            raise InputError(f"dataset {self.dataset} needs data_dir: the folder of the data set.")
        if self.dataset == "phantoms" and self.data_dir:
            raise InputError(
                f"data_dir={self.data_dir} is not read: the dataset is phantoms. Give dataset as well (prepared, nifti_folder, "
                "brats2019, ...), or leave data_dir out."
            )
        data = () if self.dataset == "datalist" else ("data_dir",)  # a list's images are known one by one
        check_outputs_apart(self, *data, "pretrained")
        if self.pretrained and not (Path(self.pretrained) / "model_index.json").is_file():
            raise InputError(f"pretrained={self.pretrained} is no pipeline folder: it has no model_index.json.")
        for name in ("max_steps", "downstream_per_class"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        for name in ("evaluation_per_class", "trajectories_per_class"):
            if getattr(self, name) is not None and getattr(self, name) < 2:  # the covariance needs two
                raise InputError(f"StudyConfig: {name} must be 2 or more, got {getattr(self, name)}.")
        self._check_lists()
        if not self.frechet_features or not set(self.frechet_features) <= set(FRECHET_FEATURES):
            raise InputError(
                f"StudyConfig: frechet_features must be of {list(FRECHET_FEATURES)}, got {self.frechet_features}."
            )
        for section in NETWORKS:
            check_network(section, getattr(self, section))
        for section in TRAINER_CONFIGS:
            self.trainer_config(section)
        if self.trainer_config(self.method).push_to_hub:
            raise InputError(
                f"Section {self.method!r}: unset push_to_hub; a study leaves pipeline_rl with its audit: push it by msrl push."
            )
        for section in SEEDED_BY_ROLE:
            if "seed" in getattr(self, section):
                raise InputError(
                    f"Section {section!r}: its seeds follow from the study's; remove seed here, and set the study's own seed or rl_seed."
                )
        check_reward_options(self)

    def _check_lists(self) -> None:
        """Raise InputError for samplers or steps that the stages which go through them, hours later, could not use."""
        for name in ("synthetic_steps", "reconstruction_steps", *(() if self.pretrained else ("samplers",))):
            if not getattr(self, name):
                raise InputError(f"StudyConfig: {name} is empty; give one or more.")
        if min(self.synthetic_steps) < 1:
            raise InputError(f"StudyConfig: synthetic_steps must be 1 or more, got {min(self.synthetic_steps)}.")
        wrong = [step for step in self.reconstruction_steps if not 1 <= step <= RECONSTRUCTION_GRID]
        if wrong:
            raise InputError(
                f"StudyConfig: reconstruction_steps must be from 1 to {RECONSTRUCTION_GRID}, got {wrong[0]}."
            )
        longest = self.scheduler.get("num_train_timesteps", 1000)
        if max(self.synthetic_steps) > longest:
            raise InputError(f"StudyConfig: synthetic_steps are at most {longest}, got {max(self.synthetic_steps)}.")
        for sampler in self.samplers:
            self._check_sampler(sampler, longest)
        self._check_guidance(self.rollout_sampler, f"section {self.method!r}")

    def _check_sampler(self, sampler: dict, longest: int) -> None:
        if not {"num_inference_steps", "eta"} <= set(sampler) <= {"num_inference_steps", "eta", "guidance_scale"}:
            raise InputError(f"A sampler has num_inference_steps, eta and perhaps guidance_scale, got {sampler}.")
        steps, eta, guidance = sampler["num_inference_steps"], sampler["eta"], sampler.get("guidance_scale", 1.0)
        numbers = isinstance(steps, int) and isinstance(eta, int | float) and isinstance(guidance, int | float)
        if not numbers or not 1 <= steps <= longest or not 0 <= eta <= 1:
            raise InputError(
                f"A sampler has 1 to {longest} num_inference_steps, and numbers as eta (0 to 1) and guidance_scale, got {sampler}."
            )
        self._check_guidance(sampler, f"the sampler {sampler}")

    def _check_guidance(self, sampler: dict, name: str) -> None:
        guidance = sampler.get("guidance_scale", 1.0)
        if guidance != 1.0 and not self.pretrained and not self.trainer_config("diffusion").class_dropout:
            raise InputError(
                f"A guidance_scale of {guidance} ({name}) needs a denoiser trained with class_dropout above 0; set it in section "
                "'diffusion'."
            )

    @property
    def refreshes(self) -> bool:
        """Whether the reward models train on while the policy is tuned."""
        return bool(self.refresh) and self.method == "ppo"

    @property
    def caps_trajectories(self) -> bool:
        """Whether a class may have more training volumes than `trajectories_per_class`; of phantoms that is known."""
        most = self.trajectories_per_class
        return most is not None and (self.dataset != "phantoms" or self.num_per_class > most)

    @property
    def rollout_sampler(self) -> dict:
        """The sampler of rollouts (the first, where they take several; with noise in all steps, where `sde_window` draws some)."""
        tuning = self.trainer_config(self.method)
        return {
            "num_inference_steps": tuning.num_inference_steps,
            "eta": tuning.etas[0],
            "guidance_scale": tuning.guidance_scale,
        }

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
        settings["resume_from_checkpoint"] = resumed(settings)
        config = make_trainer_config(stage, settings)
        if self.max_steps is None:
            return config
        steps = {name: getattr(config, name, None) for name in ("max_steps", "pretrain_steps")}
        return replace(
            config, **{name: min(value, self.max_steps) for name, value in steps.items() if value is not None}
        )

    def optimized_rewards(self) -> list[str]:
        """The learned rewards that the method optimizes: none where they only watch, nor one of weight 0."""
        if self.method in WITHOUT_REWARDS:
            return []
        weights = self.trainer_config(self.method).reward_weights or (1.0,) * len(TRAINED_ON)
        return [role for role, weight in zip(TRAINED_ON, weights, strict=True) if weight]

    def changed(self, *names: str) -> tuple[str, ...]:
        """Which of these fields differ from their defaults."""
        return tuple(name for name in names if getattr(self, name) != _default(name))


def _default(name: str):
    item = StudyConfig.__dataclass_fields__[name]
    return item.default_factory() if item.default is MISSING else item.default
