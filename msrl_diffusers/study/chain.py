"""The chain: which stages there are, what each depends on, and when one may be skipped."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import InputError
from ..files import folder_mark, write_json
from ..processes import process_state, use_all_cores
from ..trainers.base_config import BOOKKEEPING
from . import stages
from .artifacts import pretrained_stages
from .config import TRAINER_CONFIGS, StudyConfig
from .evaluate import evaluate
from .report import report


@dataclass(frozen=True)
class Stage:
    """A stage: its function, the stages it reads, the fields of the config that change its result, and whether all
    processes take part (its trainer splits the work) or the others wait for the first one."""

    run: Callable[[StudyConfig], dict]
    needs: tuple[str, ...]
    fields: tuple[str, ...]
    split: bool = False


_SAMPLING = ("sampling_batch_size", "mixed_precision", "seed")
STAGES: dict[str, Stage] = {
    "prepare": Stage(
        stages.prepare,
        (),
        ("dataset", "data_dir", "image_size", "field_of_view", "num_per_class", "data_seed", "holdout_fraction",
         "modality", "label_column", "label_bins"),
    ),
    "extractors": Stage(
        stages.train_extractors,
        ("prepare",),
        ("label_extractor", "judge_extractor", "extractors", "mixed_precision", "seed"),
        split=True,
    ),
    "vqgan": Stage(stages.train_vqgan, ("prepare",), ("vqvae", "vqgan", "mixed_precision", "seed"), split=True),
    "diffusion": Stage(
        stages.train_diffusion,
        ("prepare", "vqgan"),
        ("unet", "scheduler", "diffusion", "mixed_precision", "seed"),
        split=True,
    ),
    "trajectories": Stage(
        stages.sample_trajectories, ("prepare", "diffusion"), ("synthetic_steps", "reconstruction_steps", *_SAMPLING)
    ),
    "score": Stage(
        stages.score_trajectories,
        ("prepare", "extractors", "diffusion", "trajectories"),
        ("target_map", "samplers", *_SAMPLING),
    ),
    "rewards": Stage(
        stages.train_rewards,
        ("trajectories", "score"),
        ("volume_reward", "slice_reward", "heldout_reward", "rewards", "mixed_precision", "rl_seed"),
        split=True,
    ),
    "ppo": Stage(
        stages.train_ppo,
        ("prepare", "extractors", "diffusion", "rewards"),
        ("ppo", "select_by", "mixed_precision", "rl_seed"),
        split=True,
    ),
    "evaluate": Stage(
        evaluate,
        ("prepare", "extractors", "diffusion", "score", "rewards", "ppo"),
        ("num_validity_subjects", "bootstrap_draws", "rl_seed", *_SAMPLING),
    ),
    "downstream": Stage(
        stages.train_classifiers,
        ("prepare", "evaluate"),
        ("downstream", "downstream_seeds", "synthetic_arms", "bootstrap_draws", "mixed_precision", "rl_seed"),
        split=True,
    ),
    "report": Stage(report, ("evaluate", "downstream"), ()),
}  # fmt: skip


def fingerprint(config: StudyConfig, name: str) -> str:
    """Hash of everything a stage's result depends on: settings, the files it is given, and the stages it reads."""
    settings = asdict(config)
    for section in TRAINER_CONFIGS:  # resolved, so that a default and the same value spelled out are one
        trainer = asdict(config.trainer_config(section))
        settings[section] = {key: value for key, value in trainer.items() if key not in BOOKKEEPING}
    settings["rl_seed"] = config.seed if config.rl_seed is None else config.rl_seed
    for folder in ("data_dir", "pretrained"):
        settings[folder] = settings[folder] and folder_mark(settings[folder])
    settings["synthetic_arms"] = {name: folder_mark(path) for name, path in config.synthetic_arms.items()}
    marks = {}
    for stage_name, stage in STAGES.items():  # every stage stands after those it needs
        inputs = {
            "stage": stage_name,
            "fields": {key: settings[key] for key in stage.fields},
            "max_steps": config.max_steps,
            "pretrained": settings["pretrained"],
            "pretrained_rewards": config.pretrained_rewards or not config.pretrained,
            "needs": [marks[needed] for needed in stage.needs],
        }
        marks[stage_name] = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    return marks[name]


def enabled_stages(config: StudyConfig) -> list[str]:
    """The stages that a study with this config runs, in order."""
    without = pretrained_stages(config) if config.downstream else (*pretrained_stages(config), "downstream")
    return [name for name in STAGES if name not in without]


def finished_fingerprint(config: StudyConfig, name: str) -> str | None:
    """The fingerprint of what lies in the stage's folder; None if it is not there or not whole."""
    record = Path(config.output_dir) / name / "stage.json"
    return json.loads(record.read_text())["fingerprint"] if record.is_file() else None


def stages_up_to(name: str) -> list[str]:
    """Stage `name` and all it needs, in order."""
    wanted, open_names = set(), [name]
    while open_names:
        current = open_names.pop()
        wanted.add(current)
        open_names += STAGES[current].needs
    return [stage for stage in STAGES if stage in wanted]


def run_study(config: StudyConfig, only: Sequence[str] | None = None) -> dict:
    """Run all stages, or those named in `only`, skipping those already done; returns the last one's result.

    Raises:
        InputError: an unknown stage, or one whose inputs are not there (when run alone).
    """
    use_all_cores()
    names = list(only or STAGES)
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise InputError(f"Unknown stage {unknown[0]!r}; the stages are {list(STAGES)}.")
    result = {}
    for name in (name for name in enabled_stages(config) if name in names):
        result = _run_stage(config, name)
    return result


def _run_stage(config: StudyConfig, name: str) -> dict:
    stage, processes = STAGES[name], process_state()
    folder = Path(config.output_dir) / name
    record, mark = folder / "stage.json", fingerprint(config, name)
    if finished_fingerprint(config, name) == mark:
        return json.loads(record.read_text())["result"]
    _check_inputs(config, name)
    processes.wait_for_everyone()  # all have looked at what is there
    if processes.is_main_process:
        _open_folder(folder, mark)
    processes.wait_for_everyone()
    started, result = time.monotonic(), None
    if stage.split or processes.is_main_process:
        result = stage.run(config)
    processes.wait_for_everyone()
    if processes.is_main_process:
        saved = {"fingerprint": mark, "seconds": round(time.monotonic() - started, 1), "result": result}
        write_json(record, saved)
    processes.wait_for_everyone()
    return json.loads(record.read_text())["result"]


def _check_inputs(config: StudyConfig, name: str) -> None:
    """Raise InputError unless every stage that `name` reads is done, with these settings."""
    for needed in STAGES[name].needs:
        if needed not in enabled_stages(config):
            continue
        found = finished_fingerprint(config, needed)
        if found is None:
            raise InputError(f"Stage {name!r} needs the result of {needed!r}; run that stage first.")
        if found != fingerprint(config, needed):
            raise InputError(
                f"Stage {name!r} needs {needed!r}, which was run with other settings; run it again first."
            )


def _open_folder(folder: Path, mark: str) -> None:
    """Make the stage's folder. What an interrupted run of the same stage left is kept, so that training resumes; what
    a run with other settings left is removed."""
    marker = folder / ".fingerprint"
    if marker.is_file() and marker.read_text() != mark:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(mark)
