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
        InputError: one of the stages that made them is not done, or was run with other settings; or the study started from a
            release of other phantoms, of which one number tells.
    """
    n_earlier, seen_earlier = _seen_earlier(config)
    study_chain(config).check_finished(config, ("prepare", *PRIOR_STAGES, "score", "rewards"), "A release")
    path, commit = Path(path), git_commit()  # asked before files change that may lie in the tree themselves
    prepared = stage_result(config, "prepare")
    # it is written last: without it no study starts from a mixture with an earlier release
    (path / "scores.json").unlink(missing_ok=True)
    load_pipeline(config).to(dtype=torch.float16).save_pretrained(path)
    for role, model in load_reward_models(config).items():
        model.half().save_pretrained(path / f"reward_{role}")
    for role, model in load_extractors(config).items():
        model.half().save_pretrained(path / f"extractor_{role}")
    forget_places(path)
    seen = volume_hashes(load_split(config, "train").pixel_values)  # none may be held out where these models are used
    told = {
        "data_seed": config.data_seed,
        "n_train": max(len(seen), n_earlier),
        SEEN_VOLUMES: list(dict.fromkeys([*seen_earlier, *seen])),
    }
    scores = {**load_scores(config), **load_samplers(config), **told}
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


def _seen_earlier(config: StudyConfig) -> tuple[int, list[str]]:
    """How many phantoms, and the hashes of what volumes, the release that the study started from was trained on: its networks are
    in this one too."""
    if not config.pretrained:
        return 0, []
    data_seed, n_train, hashes = trained_on(json.loads((Path(config.pretrained) / "scores.json").read_text()))
    if config.dataset == "phantoms" and data_seed != config.data_seed:
        raise InputError(
            f"{config.pretrained} was trained on phantoms of data_seed {data_seed}, and this study's are of {config.data_seed}: a later study "
            "could hold out either; release one that was trained from nothing, or on the same."
        )
    return n_train if config.dataset == "phantoms" else 0, hashes


def forget_places(path: Path) -> None:
    """Take from the configs in `path` where the models lay on this machine, which is nobody's business."""
    for file in path.rglob("*.json"):
        content = json.loads(file.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            write_json(file, content)
