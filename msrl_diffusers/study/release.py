"""A study's pretrained models as one folder that can be pushed to the Hub, and that a later study can start from."""

import json
from pathlib import Path

import torch

from ..errors import InputError
from ..evaluation.features import volume_hashes
from ..files import write_json, write_text
from ..hub import render_card
from ..hub.contents import SEEN_VOLUMES
from .artifacts import (
    PRIOR_STAGES,
    load_extractors,
    load_pipeline,
    load_reward_models,
    load_samplers,
    load_scores,
    load_split,
    stage_result,
    trained_on,
)
from .chain import study_chain
from .config import StudyConfig
from .report import git_commit, versions


def write_release(config: StudyConfig, path: str | Path) -> None:
    """Write the pipeline, the reward models and extractors in float16, the scores and a card to `path`.

    Raises:
        InputError: one of the stages that made them is not done, or was run with other settings; or what `check_release` refuses.
    """
    check_release(config, path)
    study_chain(config).check_finished(config, ("prepare", *PRIOR_STAGES, "score", "rewards"), "A release")
    path, commit = Path(path), git_commit()  # asked before files change that may lie in the tree themselves
    prepared = stage_result(config, "prepare")
    scores = {**load_scores(config), **load_samplers(config), **_seen(config)}
    # it is written last: without it no study starts from a mixture with an earlier release
    (path / "scores.json").unlink(missing_ok=True)
    load_pipeline(config).to(dtype=torch.float16).save_pretrained(path)
    for role, model in load_reward_models(config).items():
        model.half().save_pretrained(path / f"reward_{role}")
    for role, model in load_extractors(config).items():
        model.half().save_pretrained(path / f"extractor_{role}")
    forget_places(path)
    write_json(path / "scores.json", scores)
    facts = {
        "dataset": config.dataset,
        "data": prepared,
        "data_fingerprint": prepared["fingerprint"],
        "seed": config.seed,
        "commit": commit,
        "versions": versions(),
    }
    write_text(path / "README.md", render_card(facts, path, arm="standard"))


def check_release(config: StudyConfig, path: str | Path) -> None:
    """Raise InputError where this study may not be released to `path`: in the release that it starts from, or in any folder where that
    one was trained on other phantoms, of which one data_seed tells. Needs no stage."""
    given = config.pretrained
    check_outside(path, given)
    phantoms = trained_on(config).phantoms
    if config.dataset == "phantoms" and phantoms and phantoms["data_seed"] != config.data_seed:
        raise InputError(
            f"{given} was trained on phantoms of data_seed {phantoms['data_seed']}, and this study's are of {config.data_seed}: a later "
            "study could hold out either; release one that was trained from nothing, or on the same."
        )


def check_outside(path: str | Path, given: str | Path | None) -> None:
    """Raise InputError where a release would lie in the folder that was `given` to start from: by the files there stages are out of date,
    and half an overwritten release is none."""
    if given and Path(path).resolve().is_relative_to(Path(given).resolve()):
        raise InputError(
            f"The release {path} lies in {given}, which the study starts from and it would spoil; give a folder outside it."
        )


def _seen(config: StudyConfig) -> dict:
    """What the networks of the release have seen, for `trained_on`: none of it may be held out where they are used. Those of the
    release that the study started from are among them."""
    seen, earlier = volume_hashes(load_split(config, "train").pixel_values), trained_on(config)
    phantoms = earlier.phantoms
    if config.dataset == "phantoms":
        phantoms = {"data_seed": config.data_seed, "n": max(len(seen), phantoms["n"] if phantoms else 0)}
    return {
        "phantoms": phantoms,
        "other_volumes": earlier.other_volumes or config.dataset != "phantoms",
        "unnamed_volumes": earlier.unnamed_volumes,
        SEEN_VOLUMES: list(dict.fromkeys([*earlier.hashes, *seen])),
    }


def forget_places(path: Path) -> None:
    """Take from the configs in `path` where the models lay on this machine, which is nobody's business."""
    for file in path.rglob("*.json"):
        content = json.loads(file.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            write_json(file, content)
