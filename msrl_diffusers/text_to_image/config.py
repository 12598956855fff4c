"""TextToImageStudyConfig: one text-to-image study, as its YAML file states it."""

import inspect
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from transformers import CLIPTextConfig

from ..data.prompts import ARTIFACTS, DIAGNOSES, OPENING, PromptBuilder
from ..errors import InputError
from ..files import folder_mark
from ..models.image_classifiers import ARCHITECTURES
from ..precision import PRECISIONS
from ..trainers.attribute_config import AttributeConfig
from ..trainers.autoencoder_kl_config import AutoencoderKLConfig
from ..trainers.base_config import (
    BOOKKEEPING,
    TrainingConfig,
    check_choice,
    check_outputs_apart,
    check_positive,
    check_types,
    resumed,
)
from ..trainers.ppo_config import DiffusionPPOConfig
from ..trainers.text_to_image_config import TextToImageConfig
from .small import DERIVED


TRAINER_CONFIGS = {
    "autoencoder": AutoencoderKLConfig,
    "diffusion": TextToImageConfig,
    "classifiers": AttributeConfig,
    "ppo": DiffusionPPOConfig,
    "augmentation": AttributeConfig,
}
NETWORKS = {
    "text_encoder": CLIPTextConfig,
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
    "scheduler": DDIMScheduler,
}
CLASSIFIERS = ("reward", "judge", "features")
RL_STAGES = ("ppo", "evaluate", "augmentation", "report")  # the seed of these is `rl_seed`
OF_THE_STUDY = {  # fields of its trainers that a section may not set, and why
    "classifiers": {"seed": "every network has a seed of its own, of the study's; set that"},
    "augmentation": {
        "seed": "its seeds are augmentation_seeds; set these",
        "threshold": "the figures of that stage are of the most probable diagnosis",
    },
}
SAMPLER = ("num_inference_steps", "eta", "guidance_scale")
APART = ("reward_classifier", "judge_classifier", "fid_extractor")  # of which no two are one model
FOLDERS = (  # that a study is given
    "data_dir", "pretrained_model_name_or_path", "reward_classifier", "judge_classifier", "fid_extractor", "image_text_model",
)  # fmt: skip


def trainer_defaults(stage: str) -> dict:
    """Where a trainer within a study differs from its own defaults: it resumes when the study is run again."""
    return {"save_steps": 5 if stage == "ppo" else 250, "save_total_limit": 1, "resume_from_checkpoint": "latest"}


@dataclass
class TextToImageStudyConfig:
    """Data, networks and trainers of one study. Sections are mappings: constructor arguments of a network, or fields
    of a trainer's config; both are checked before anything runs.
    """

    output_dir: str = field(
        default="outputs/text_to_image", metadata={"help": "Every stage writes its folder in here."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything random but the data's split."})
    rl_seed: int | None = field(
        default=None,
        metadata={"help": "Seed of PPO and what follows, where several share one fine-tuned model; seed if unset."},
    )
    mixed_precision: str = field(
        default="no", metadata={"help": "auto (bf16 where the device is fast in it), no, bf16 or fp16."}
    )
    max_steps: int | None = field(
        default=None, metadata={"help": "Cap on the steps of every trainer; for trying out."}
    )

    # given models; what is given is not trained
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A fine-tuned StableDiffusionPipeline to tune by PPO: a folder or Hub name."}
    )  # fmt: skip
    reward_classifier: str | None = field(
        default=None, metadata={"help": "The reward: an image classifier of transformers, labels: attributes."}
    )  # fmt: skip
    judge_classifier: str | None = field(
        default=None, metadata={"help": "Another one, of another architecture, that only judges."}
    )
    fid_extractor: str | None = field(
        default=None,
        metadata={"help": "inception, or the folder of an image classifier; unset: one is trained for it alone."},
    )
    image_text_model: str | None = field(
        default=None, metadata={"help": "A CLIP-type model of transformers, whose similarity is added as a reward."}
    )

    # data
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of images with metadata.csv; unset: procedurally drawn dermoscopy images."},
    )
    image_size: int = field(
        default=32, metadata={"help": "Edge of the images in pixels; that of a given pipeline rules."}
    )
    num_per_prompt: int = field(
        default=64, metadata={"help": "Drawn images of each prompt, for each of training, judge and hold-out."}
    )
    data_seed: int = field(default=0, metadata={"help": "Seed of drawn images and of the split by subject."})
    holdout_fraction: float = field(default=0.3, metadata={"help": "Share of held-out subjects of a data_dir."})
    judge_fraction: float = field(
        default=0.3,
        metadata={
            "help": "Share of the other subjects of a data_dir on which only the judge and the network of the distances are trained."
        },
    )
    diagnoses: list[str] = field(
        default_factory=lambda: list(DIAGNOSES), metadata={"help": "Of which an image has one."}
    )
    artifacts: list[str] = field(
        default_factory=lambda: list(ARTIFACTS), metadata={"help": "Of which an image has any."}
    )
    opening: str = field(default=OPENING, metadata={"help": "How every prompt begins."})
    diagnosis_column: str = field(default="diagnosis", metadata={"help": "Column of the diagnosis in metadata.csv."})
    diagnosis_names: dict = field(default_factory=dict, metadata={"help": "{what stands in the table: diagnosis}."})
    artifact_columns: dict = field(default_factory=dict, metadata={"help": "{artifact: its column}."})
    subject_column: str | None = field(
        default=None,
        metadata={"help": "Column that names the subject: subject_id or participant_id, or each file, if unset."},
    )
    rare_attributes: list[str] = field(
        default_factory=list, metadata={"help": "A subgroup that is rare in training: one diagnosis and artifacts."}
    )
    rare_share: float = field(
        default=1.0,
        metadata={"help": "Share of the subgroup's drawn training images that are left; a data_dir stays as it is."},
    )

    # networks
    text_encoder: dict = field(default_factory=dict, metadata={"help": "Arguments of CLIPTextConfig."})
    vae: dict = field(default_factory=dict, metadata={"help": "Constructor arguments of AutoencoderKL."})
    unet: dict = field(
        default_factory=dict, metadata={"help": "Arguments of UNet2DConditionModel, and attention_levels."}
    )
    scheduler: dict = field(default_factory=dict, metadata={"help": "Constructor arguments of DDIMScheduler."})
    classifier_models: dict = field(
        default_factory=lambda: {
            "reward": {"architecture": "resnet"},
            "judge": {"architecture": "convnext"},
            "features": {"architecture": "efficientnet"},
            "augmentation": {"architecture": "resnet"},
        },
        metadata={"help": "{reward, judge, features, augmentation: {architecture: ..., its arguments}}."},
    )

    # trainers
    autoencoder: dict = field(default_factory=dict, metadata={"help": "Fields of AutoencoderKLConfig."})
    diffusion: dict = field(default_factory=dict, metadata={"help": "Fields of TextToImageConfig."})
    classifiers: dict = field(default_factory=dict, metadata={"help": "Fields of AttributeConfig."})
    ppo: dict = field(default_factory=dict, metadata={"help": "Fields of DiffusionPPOConfig."})
    augmentation: dict = field(
        default_factory=dict, metadata={"help": "Fields of AttributeConfig; without any there is no such stage."}
    )

    # reinforcement learning
    reward_kind: str = field(
        default="share",
        metadata={"help": "share of the attributes that match (as published), probability (smooth), or exact."},
    )
    num_heldout_prompts: int = field(default=8, metadata={"help": "Prompts that the policy is not trained on."})
    heldout_samples_per_prompt: int = field(
        default=4, metadata={"help": "Samples of each of these in every rollout, always from the same noise."}
    )
    select_by: str = field(
        default="heldout_reward",
        metadata={"help": "heldout_reward (of these prompts, highest) or last: picks the weights that PPO keeps."},
    )

    # evaluation
    num_samples_per_prompt: int = field(default=16, metadata={"help": "Images of each prompt, before and after."})
    sampler: dict = field(
        default_factory=dict, metadata={"help": f"Of the evaluation: {', '.join(SAMPLER)}; the rollouts' if unset."}
    )
    sampling_batch_size: int = field(
        default=32, metadata={"help": "Images sampled at once; with another number what is done stays."}
    )
    bootstrap_draws: int = field(
        default=1000,
        metadata={"help": "Bootstrap draws of the intervals; of distances at most 200, of augmentation at most 300."},
    )
    augmentation_seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the classifiers of stage augmentation."}
    )

    def __post_init__(self):
        check_types(self)
        check_choice(self, "mixed_precision", PRECISIONS)
        check_choice(self, "reward_kind", ("share", "probability", "exact"))
        check_choice(self, "select_by", ("heldout_reward", "last"))
        for name in ("image_size", "num_per_prompt", "num_samples_per_prompt", "sampling_batch_size",
                     "bootstrap_draws", "heldout_samples_per_prompt"):  # fmt: skip
            check_positive(self, name)
        if self.max_steps is not None:
            check_positive(self, "max_steps")
        for name in ("holdout_fraction", "judge_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} must lie between 0 and 1, got {getattr(self, name)}.")
        check_outputs_apart(self, *FOLDERS)
        self._check_given()
        self._check_prompts()
        self._check_networks()
        for stage in TRAINER_CONFIGS:
            self.trainer_config(stage)
        for section, reserved in OF_THE_STUDY.items():
            for name in sorted(set(getattr(self, section)) & set(reserved)):
                raise InputError(f"Section {section!r}: remove {name} here; {reserved[name]}.")
        self._check_samplers()
        if self.trainer_config("ppo").patience and self.select_by == "last":
            raise InputError(
                "Section 'ppo': patience counts rollouts since select_by improved; set select_by: heldout_reward."
            )
        if self.trainer_config("ppo").push_to_hub:
            raise InputError("Section 'ppo': unset push_to_hub; the study's pipeline and adapter are folders to push.")

    @property
    def builder(self) -> PromptBuilder:
        """The prompts of this study."""
        return PromptBuilder(tuple(self.diagnoses), tuple(self.artifacts), self.opening)

    @property
    def pixels(self) -> int:
        """Edge of the study's images: that of the given pipeline, else `image_size`.

        Raises:
            InputError: the given pipeline has no UNet and autoencoder.
        """
        path = self.pretrained_model_name_or_path
        if not path:
            return self.image_size
        unet, vae = (_component_config(path, name) for name in ("unet", "vae"))
        return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)

    @property
    def evaluation_sampler(self) -> dict:
        """`num_inference_steps`, `eta` and `guidance_scale` of the evaluation."""
        ppo = self.trainer_config("ppo")
        return {name: self.sampler.get(name, getattr(ppo, name)) for name in SAMPLER}

    @property
    def trained_classifiers(self) -> list[str]:
        """The roles whose classifier is not given."""
        given = {"reward": self.reward_classifier, "judge": self.judge_classifier, "features": self.fid_extractor}
        return [role for role in CLASSIFIERS if not given[role]]

    def seed_of(self, stage: str) -> int:
        """The seed of a stage."""
        return self.rl_seed if stage in RL_STAGES and self.rl_seed is not None else self.seed

    def trainer_config(self, stage: str, name: str | None = None, **overrides) -> TrainingConfig:
        """The config of a stage's trainer, writing to the stage's folder (or `name` within it).

        Raises:
            InputError: a field the trainer does not have, or a bad value; the sentence names it.
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
        config_class = TRAINER_CONFIGS[stage]
        unknown = sorted(set(settings) - set(config_class.__dataclass_fields__))
        if unknown:
            raise InputError(
                f"Section {stage!r} has the unknown field {unknown[0]!r}; {config_class.__name__} knows "
                f"{sorted(config_class.__dataclass_fields__)}."
            )
        config = config_class(**settings)
        return config if self.max_steps is None else replace(config, max_steps=min(config.max_steps, self.max_steps))

    def settings(self) -> dict:
        """All settings that results depend on: trainers with their defaults, given folders by their contents."""
        settings = asdict(self)
        for section in TRAINER_CONFIGS:
            trainer = asdict(self.trainer_config(section))
            settings[section] = {key: value for key, value in trainer.items() if key not in BOOKKEEPING}
        models = self.classifier_models  # two stages read it, each its own roles
        settings["classifier_models"] = {role: models[role] for role in self.trained_classifiers}
        settings["augmentation_model"] = models.get("augmentation")
        settings["pixels"], settings["evaluation_sampler"] = self.pixels, self.evaluation_sampler
        settings["rl_seed"] = self.seed if self.rl_seed is None else self.rl_seed
        for name in FOLDERS:
            place = settings[name]
            settings[name] = folder_mark(place) if place and Path(place).is_dir() else place
        return settings

    def _check_given(self) -> None:
        found = {}
        for name in APART:
            if given := getattr(self, name):
                place = Path(given).resolve() if Path(given).is_dir() else given
                if place in found:
                    raise InputError(
                        f"{name}={given} is also the {found[place]}, and what judges must be a model of its own; give another, "
                        "or unset it: then one is trained."
                    )
                found[place] = name

    def _check_samplers(self) -> None:
        guidance = self.trainer_config("ppo").guidance_scale
        if not 1 <= guidance < float("inf"):
            raise InputError(f"Section 'ppo': guidance_scale is 1 (none) or more, got {guidance}.")
        unknown = sorted(set(self.sampler) - set(SAMPLER))
        if unknown:
            raise InputError(f"Section 'sampler' has the unknown field {unknown[0]!r}; it may have {list(SAMPLER)}.")
        steps, eta, guidance = (self.evaluation_sampler[name] for name in SAMPLER)
        if type(steps) is not int or steps < 1:
            raise InputError(f"Section 'sampler': num_inference_steps is a whole number above 0, got {steps!r}.")
        if not isinstance(eta, int | float) or not 0 <= eta <= 1:
            raise InputError(f"Section 'sampler': eta is a number from 0 to 1, got {eta!r}.")
        if not isinstance(guidance, int | float) or not 1 <= guidance < float("inf"):
            raise InputError(f"Section 'sampler': guidance_scale is a number, 1 (none) or more, got {guidance!r}.")

    def _check_prompts(self) -> None:
        builder = self.builder  # refuses names that make no prompts
        if not self.data_dir and builder != PromptBuilder():
            raise InputError(
                "Drawn images have the diagnoses, artifacts and opening of dermoscopy; give a data_dir for others."
            )
        if not 0 <= self.num_heldout_prompts < len(builder.prompts()):
            raise InputError(
                f"num_heldout_prompts={self.num_heldout_prompts} of {len(builder.prompts())} prompts leaves none to "
                "train on."
            )
        if self.select_by == "heldout_reward" and not self.num_heldout_prompts:
            raise InputError("select_by: heldout_reward needs num_heldout_prompts above 0; or choose last.")
        if self.rare_attributes and len(builder.diagnoses) == 1:
            raise InputError(
                "rare_attributes are of one diagnosis among several, which stage 'augmentation' tells apart; unset them, or give "
                "more diagnoses."
            )
        unknown = sorted(set(self.rare_attributes) - set(builder.attribute_names))
        if unknown:
            raise InputError(f"rare_attributes: there is no {unknown[0]!r} among {list(builder.attribute_names)}.")
        diagnoses = [name for name in self.rare_attributes if name in builder.diagnoses]
        if self.rare_attributes and len(diagnoses) != 1:
            raise InputError(f"rare_attributes needs one diagnosis, and artifacts, got {self.rare_attributes}.")
        if not 0 < self.rare_share <= 1:
            raise InputError(f"rare_share must lie in (0, 1], got {self.rare_share}.")
        if self.augmentation and not self.rare_attributes:
            raise InputError("Section 'augmentation' needs rare_attributes: the subgroup to add synthetic images of.")

    def _check_networks(self) -> None:
        for section, network in NETWORKS.items():
            known = set(inspect.signature(network).parameters) | ({"attention_levels"} if section == "unet" else set())
            known -= DERIVED.get(section, set())
            unknown = sorted(set(getattr(self, section)) - known)
            if unknown:
                raise InputError(
                    f"Section {section!r} has the unknown field {unknown[0]!r}; of {network.__name__} it may have "
                    f"{sorted(known)}."
                )
        roles = [*CLASSIFIERS, "augmentation"]
        unknown = sorted(set(self.classifier_models) - set(roles))
        if unknown:
            raise InputError(f"Section 'classifier_models' has the unknown role {unknown[0]!r}; roles are {roles}.")
        for role in (*self.trained_classifiers, *(["augmentation"] if self.augmentation else [])):
            model = self.classifier_models.get(role)
            if not isinstance(model, dict) or model.get("architecture") not in ARCHITECTURES:
                raise InputError(
                    f"Section 'classifier_models' needs {role}: {{architecture: one of {list(ARCHITECTURES)}}}, got {model!r}."
                )


def _component_config(path: str, name: str) -> dict:
    """The `config.json` of a component of a pipeline, from a folder or the Hub.

    Raises:
        InputError: there is none.
    """
    file = f"{name}/config.json"
    try:
        place = Path(path) / file if Path(path).is_dir() else hf_hub_download(path, file)
        return json.loads(Path(place).read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} holds no StableDiffusionPipeline ({str(error).splitlines()[0]}); give a folder or a Hub name."
        ) from error
