"""A study over several seeds and with ablations: which runs it has, and what they share.

Every run is a study of its own in `OUTPUT_DIR/<variant>-seed<N>`. The prior (all that does not depend on `rl_seed`) is made
once, in OUTPUT_DIR itself. A stage that another run has made with the same settings is linked, not made again.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import InputError
from .chain import enabled_stages, fingerprint, finished_fingerprint, study_chain
from .config import StudyConfig


FULL = "full"
# The ablations of arXiv 2603.06173: what is left out, as changes of the config.
ABLATIONS: dict[str, dict] = {
    "sparse_steps": {"synthetic_steps": [1, 50, 99], "reconstruction_steps": [1, 50, 99]},
    "reward_3d_only": {"ppo": {"reward_weights": [1.0, 0.0]}},
}


def variant_config(config: StudyConfig, variant: str, seed: int) -> StudyConfig:
    """The config of one run.

    Raises:
        InputError: an unknown ablation.
    """
    if variant != FULL and variant not in ABLATIONS:
        raise InputError(f"Unknown ablation {variant!r}; there are {sorted(ABLATIONS)}.")
    if config.pretrained and config.pretrained_rewards and any(
        field in ABLATIONS.get(variant, {}) for field in ("synthetic_steps", "reconstruction_steps")
    ):  # fmt: skip
        raise InputError(f"{variant} trains reward models of its own; set pretrained_rewards: false.")
    changes = {config.method if name == "ppo" else name: value for name, value in ABLATIONS.get(variant, {}).items()}
    return changed_config(config, variant, seed, changes)


def changed_config(config: StudyConfig, variant: str, seed: int, changes: Mapping) -> StudyConfig:
    """The config of a run in a folder of its own, `<variant>-seed<N>`, with `changes` of fields; a section's are of those of
    its fields that they name.

    Raises:
        InputError: a field that there is not, or a bad value.
    """
    unknown = sorted(set(changes) - set(StudyConfig.__dataclass_fields__))
    if unknown:
        raise InputError(f"Variant {variant!r} changes the unknown field {unknown[0]!r}.")
    merged = {
        name: {**(getattr(config, name) or {}), **value} if isinstance(value, Mapping) else value
        for name, value in changes.items()
    }
    folder = Path(config.output_dir) / f"{variant}-seed{seed}"
    return replace(config, output_dir=str(folder), rl_seed=seed, **merged)


def shared_stages(config: StudyConfig) -> list[str]:
    """The stages that depend on no seed of reinforcement learning; they are made in the folder of `config` itself."""
    return [
        stage
        for stage in enabled_stages(config)
        if len({fingerprint(replace(config, rl_seed=seed), stage) for seed in (0, 1)}) == 1
    ]


def link_finished(stage: str, config: StudyConfig, others: Sequence[StudyConfig]) -> None:
    """Let the folder of `stage` in this run be a link to (`_link`) that of another run which made it with the same settings."""
    if stage == "report":
        return  # it lies outside its stage's folder
    wanted, folder = fingerprint(config, stage), Path(config.output_dir) / stage
    if folder.is_symlink():
        folder.unlink()  # with other settings than last time it may be another run's, or nobody's
    if folder.exists():
        return
    for other in others:
        source = Path(other.output_dir) / stage
        if source.is_symlink() or finished_fingerprint(other, stage) != wanted:
            continue
        chain = study_chain(other)  # what lies there stale is about to be removed
        if stage in chain.stages and chain.fingerprint(other, stage) == wanted:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _link(folder, source)
            return


def _link(folder: Path, source: Path) -> None:
    """Make `folder` a link to `source`; a copy where the system grants no links, as Windows does not."""
    try:
        folder.symlink_to(os.path.relpath(source, folder.parent), target_is_directory=True)
    except OSError:
        half = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(half, ignore_errors=True)  # of a copy that was killed
        shutil.copytree(source, half)
        half.rename(folder)
