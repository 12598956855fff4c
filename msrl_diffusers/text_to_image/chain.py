"""The chain of a text-to-image study: which stages there are, and what each depends on."""

from ..chains import Chain, Stage
from ..trainers.base import check_tracker
from . import stages
from .artifacts import stages_left_out
from .augmentation import run_augmentation
from .config import TRAINER_CONFIGS, TextToImageStudyConfig
from .evaluate import evaluate
from .report import report


_SAMPLING = ("evaluation_sampler", "mixed_precision")  # by how many at once tells in the rounding alone
_PROMPTS = ("diagnoses", "artifacts", "opening")
_REWARD = ("reward_classifier", "judge_classifier", "image_text_model")
STAGES: dict[str, Stage] = {
    "data": Stage(
        stages.make_data,
        (),
        ("data_dir", "pixels", "num_per_prompt", "data_seed", "holdout_fraction", "judge_fraction", "diagnosis_column",
         "diagnosis_names", "artifact_columns", "subject_column", "rare_attributes", "rare_share", *_PROMPTS),
    ),
    "autoencoder": Stage(
        stages.train_autoencoder, ("data",), ("vae", "autoencoder", "mixed_precision", "seed"), split=True
    ),
    "diffusion": Stage(
        stages.train_diffusion,
        ("data", "autoencoder"),
        ("text_encoder", "unet", "scheduler", "diffusion", "mixed_precision", "seed"),
        split=True,
    ),
    "classifiers": Stage(
        stages.train_classifiers,
        ("data",),
        ("classifier_models", "classifiers", "mixed_precision", "seed"),
        split=True,
    ),
    "ppo": Stage(
        stages.train_ppo,
        ("diffusion", "classifiers"),
        ("ppo", "reward_kind", "num_heldout_prompts", "heldout_samples_per_prompt", "select_by", "mixed_precision",
         "rl_seed", "pretrained_model_name_or_path", *_REWARD, *_PROMPTS),
        split=True,
    ),
    "evaluate": Stage(
        evaluate,
        ("data", "diffusion", "classifiers", "ppo"),
        ("num_samples_per_prompt", "bootstrap_draws", "fid_extractor", "rl_seed", *_SAMPLING),
    ),
    "augmentation": Stage(
        run_augmentation,
        ("data", "diffusion", "ppo"),
        ("augmentation", "augmentation_seeds", "augmentation_model", "bootstrap_draws", "rl_seed", *_SAMPLING),
        split=True,
    ),
    "report": Stage(report, ("data", "ppo", "evaluate", "augmentation"), ()),
}  # fmt: skip


def check_trackers(config: TextToImageStudyConfig, stage: str) -> None:
    """Raise InputError where the trainer of a stage reports to what is not installed."""
    if stage in TRAINER_CONFIGS:
        check_tracker(config.trainer_config(stage))


CHAIN = Chain(
    STAGES,
    TextToImageStudyConfig.settings,
    stages_left_out,
    ("max_steps",),
    counts_left_out=False,
    check=check_trackers,
)
