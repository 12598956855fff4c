"""The chain of a study: which stages it has, what each depends on, and when one may be skipped (`chains.Chain`)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..chains import Chain, Stage, finished_fingerprint
from ..data.datalist import files_of_datalist
from ..errors import InputError
from ..files import file_mark, files_mark, folder_mark
from ..trainers.base import check_tracker
from ..trainers.base_config import BOOKKEEPING
from . import stages
from .artifacts import stages_left_out
from .baseline import measure_baseline
from .config import StudyConfig
from .curve import measure_curve
from .evaluate import evaluate
from .report import report
from .reward_data import score_trajectories, train_rewards
from .sections import TRAINER_CONFIGS, WITHOUT_REWARDS
from .tuning import tune
from .validity import measure_validity


__all__ = [
    "STAGES",
    "enabled_stages",
    "finished_fingerprint",
    "fingerprint",
    "run_study",
    "run_up_to",
    "stages_up_to",
    "study_chain",
]

_SAMPLING = ("mixed_precision", "seed")  # by how many at once tells in the rounding alone
_COMMON = ("max_steps", "pretrained", "pretrained_rewards")


def study_chain(config: StudyConfig) -> Chain:
    """The stages of a study with this config. The stage in which the policy is tuned has the name of the method.

    Stages and settings that not every study has are in it only where they are used: a folder that was made before there
    was such an option stays valid without it.
    """
    return Chain(
        {**_prior_stages(config), **_rl_stages(config)}, _settings, stages_left_out, _COMMON, check=check_trackers
    )


def _prior_stages(config: StudyConfig) -> dict[str, Stage]:
    cap = ("trajectories_per_class",) if config.caps_trajectories else ()
    return {
        "prepare": Stage(
            stages.prepare,
            (),
            ("dataset", "data_dir", "image_size", "field_of_view", "num_per_class", "data_seed", "holdout_fraction",
             "modality", "label_column", "label_bins", *config.changed("subject_column")),
        ),
        "extractors": Stage(
            stages.train_extractors,
            ("prepare",),
            ("label_extractor", "judge_extractor", "second_judge_extractor", "extractors", "mixed_precision", "seed"),
            split=True,
        ),
        "vqgan": Stage(stages.train_vqgan, ("prepare",), ("vqvae", "vqgan", "mixed_precision", "seed"), split=True),
        "diffusion": Stage(
            stages.train_diffusion,
            ("prepare", "vqgan"),
            ("unet", "scheduler", "diffusion", "mixed_precision", "seed"),
            split=True,
        ),
        "samplers": Stage(stages.choose_sampler, ("prepare", "extractors", "diffusion"), ("samplers", *_SAMPLING)),
        "trajectories": Stage(
            stages.sample_trajectories,
            ("prepare", "diffusion"),
            ("synthetic_steps", "reconstruction_steps", *cap, *_SAMPLING),
        ),
        "score": Stage(
            score_trajectories,
            ("prepare", "extractors", "diffusion", "trajectories"),
            ("target_map", *config.changed("degraded_anchors", "policy_anchors"), *_SAMPLING),
        ),
    }  # fmt: skip


def _rl_stages(config: StudyConfig) -> dict[str, Stage]:
    method, labels = config.method, config.changed("marginal_labels")
    refresh = ("refresh", *labels) if config.refreshes else ()
    reward_data = ("trajectories", "score") if config.refreshes else ()
    checked = ("validity",) if config.validity_floors else ()  # else it is measured, and holds nothing up
    floors = ("validity_floors",) if config.validity_floors and method not in WITHOUT_REWARDS else ()
    curve = ("curve",) if config.num_curve_points else ()
    watch = config.changed("watch_per_class")  # at the sampler that stage samplers chose
    watched = ("samplers",) if watch else ()
    features = config.changed("frechet_features") if method == "frechet" else ()
    classifiers = (
        "downstream", "downstream_seeds", *config.changed("downstream_per_class"), "synthetic_arms", "bootstrap_draws",
        "mixed_precision", "rl_seed",
    )  # fmt: skip
    table = {
        "rewards": Stage(
            train_rewards,
            ("trajectories", "score", *(("extractors",) if labels else ())),
            ("volume_reward", "slice_reward", "heldout_reward", "rewards", *labels,
             *config.changed("conditional_rewards"), "mixed_precision", "rl_seed"),
            split=True,
        ),
        "validity": Stage(
            measure_validity,
            ("prepare", "extractors", "diffusion", "score", "rewards"),
            ("num_validity_subjects", *config.changed("unseen_sets"), "rl_seed", *_SAMPLING),
        ),
        method: Stage(
            tune,
            ("prepare", "extractors", "diffusion", *reward_data, *watched, "rewards", *checked),
            (method, "select_by", *watch, *features, *floors, *refresh, *(("snapshots",) if curve else ()), "mixed_precision",
             "rl_seed"),
            split=True,
        ),
        "curve": Stage(
            measure_curve,
            ("prepare", "extractors", "diffusion", "rewards", method),
            ("num_curve_points", "curve_per_class", "rl_seed", *_SAMPLING),
        ),
        "baseline": Stage(
            measure_baseline,
            ("prepare", "extractors", "diffusion", "samplers"),
            ("rollout_sampler", *config.changed("evaluation_per_class"), "rl_seed", *_SAMPLING),
        ),
        "evaluate": Stage(
            evaluate,
            ("prepare", "extractors", "rewards", "validity", method, "baseline"),
            ("bootstrap_draws", "rl_seed", *_SAMPLING),
        ),
        "baseline_downstream": Stage(
            stages.train_baseline_classifiers, ("prepare", "baseline"), classifiers, split=True
        ),
        "downstream": Stage(
            stages.train_classifiers, ("prepare", "baseline_downstream", "evaluate"), classifiers, split=True
        ),
        "report": Stage(report, ("evaluate", "downstream", *curve), ("classifiers",) if config.downstream else ()),
    }  # fmt: skip
    if not curve:
        del table["curve"]
    return table


def check_trackers(config: StudyConfig, stage: str) -> None:
    """Raise InputError where the trainers of a stage report to what is not installed."""
    for section in (stage, *(("refresh",) if stage == "ppo" and config.refreshes else ())):
        if section in TRAINER_CONFIGS:
            check_tracker(config.trainer_config(section))


def _settings(config: StudyConfig) -> dict:
    """The settings of a study, resolved: a default and the same value spelled out are one, and given files count by content."""
    settings = asdict(config)
    for section in TRAINER_CONFIGS:
        trainer = asdict(config.trainer_config(section))
        settings[section] = {key: value for key, value in trainer.items() if key not in BOOKKEEPING}
    settings["rl_seed"] = config.seed if config.rl_seed is None else config.rl_seed
    settings["pretrained_rewards"] = config.pretrained_rewards or not config.pretrained
    settings["rollout_sampler"] = config.rollout_sampler
    settings["snapshots"] = bool(config.num_curve_points)
    settings["classifiers"] = bool(config.downstream)
    settings["pretrained"] = config.pretrained and _mark(config.pretrained)
    if config.dataset == "datalist":  # its images may lie anywhere
        first, *images = files_of_datalist(config.data_dir)
        settings["data_dir"] = files_mark([first, *images], first.parent)
    else:
        settings["data_dir"] = config.data_dir and _mark(config.data_dir)
    for sets in ("synthetic_arms", "policy_anchors", "unseen_sets"):
        settings[sets] = {name: _mark(path) for name, path in getattr(config, sets).items()}
    return settings


def _mark(path: str) -> str:
    """Hash of what a folder, or a file, holds; of what another run has yet to make there, its place."""
    if not Path(path).exists():
        return f"not made: {path}"
    return file_mark(path) if Path(path).is_file() else folder_mark(path)


STAGES = study_chain(StudyConfig()).stages  # of a study without options


def fingerprint(config: StudyConfig, name: str) -> str:
    """Hash of everything a stage's result depends on: settings, the files it is given, and the stages it reads."""
    return study_chain(config).fingerprint(config, name)


def enabled_stages(config: StudyConfig) -> list[str]:
    """The stages that a study with this config runs, in order."""
    return study_chain(config).enabled(config)


def stages_up_to(config: StudyConfig, name: str) -> list[str]:
    """Stage `name` and all it needs in a study with this config, in order."""
    return study_chain(config).up_to(name)


def run_study(config: StudyConfig, only: Sequence[str] | None = None) -> dict:
    """Run all stages, or those named in `only`, skipping those already done; returns the last one's result.

    Raises:
        InputError: an unknown stage, or one whose inputs are not there (when run alone).
    """
    return study_chain(config).run(config, only)


def run_up_to(config: StudyConfig, name: str) -> dict:
    """Run stage `name` and those it needs, skipping those already done; returns its result.

    Raises:
        InputError: the config takes that stage's result from `pretrained`.
    """
    if name not in enabled_stages(config):
        raise InputError(
            f"pretrained={config.pretrained} gives the result of stage {name!r}, so none would be made; take pretrained out of the "
            "config" + (", or set pretrained_rewards: false." if name == "rewards" else ".")
        )
    return run_study(config, stages_up_to(config, name))
