"""Nothing is tuned on what judges: with other judges a study makes the very same weights, and chooses the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import differing, settings_with

from msrl_diffusers import StudyConfig
from msrl_diffusers.study import baseline as baseline_module
from msrl_diffusers.study import evaluate as evaluate_module
from msrl_diffusers.study import run_study
from msrl_diffusers.study.artifacts import EXTRACTOR_CLASSES, load_extractors, load_reported, stage_result
from msrl_diffusers.study.baseline import AT_ROLLOUTS
from msrl_diffusers.study.chain import run_up_to, stages_up_to


MADE_AFTER = ("samplers", "score", "rewards", "ppo")  # what could read extractors


def config_in(folder: Path) -> StudyConfig:
    """With every option that takes labels from an extractor."""
    return settings_with(
        folder,
        marginal_labels=0.5,
        select_by="-label_fid",
        watch_per_class=4,
        samplers=[{"num_inference_steps": 2, "eta": 0.0}, {"num_inference_steps": 3, "eta": 1.0}],
        refresh={"every": 1, "max_steps": 1, "train_batch_size": 4},
    )


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A study up to the tuned policy; not to be written to."""
    config = config_in(tmp_path_factory.mktemp("study"))
    run_up_to(config, "ppo")
    return Path(config.output_dir)


def with_other(roles: list[str], stages: tuple[str, ...], tuned: Path, folder: Path) -> Path:
    """The study as if the extractors of these roles had been others; `stages` are made anew."""
    shutil.copytree(tuned, folder)
    config = config_in(folder)
    for role in roles:
        torch.manual_seed(1)
        other = load_extractors(config)[role]
        for parameter in other.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        other.save_pretrained(folder / "extractors" / role)
    for stage in stages:
        shutil.rmtree(folder / stage)
    run_study(config, stages)
    return folder


def numbers(folder: Path) -> list[dict]:
    """What was found of samplers, and of the sets of the reward data."""
    return [json.loads((folder / name).read_text()) for name in ("samplers/samplers.json", "score/scores.json")]


def test_other_judges_change_nothing(tuned, tmp_path):
    judges = [role for role in EXTRACTOR_CLASSES if role != "label"]
    found = with_other(judges, MADE_AFTER, tuned, tmp_path / "study")
    assert numbers(found) == numbers(tuned)
    paths = [path.relative_to(tuned) for stage in MADE_AFTER for path in (tuned / stage).rglob("*.safetensors")]
    assert {path.parts[0] for path in paths} == {"rewards", "ppo"}
    for path in paths:
        assert differing(load_file(found / path), load_file(tuned / path)) == []


def test_another_label_extractor_does(tuned, tmp_path):
    found = numbers(with_other(["label"], ("samplers", "score"), tuned, tmp_path / "study"))
    assert all(other != before for other, before in zip(found, numbers(tuned), strict=True))


def test_samplers_of_both_arms_are_chosen_by_the_label_extractor(monkeypatch, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "study")
    config, asked = config_in(tmp_path / "study"), []

    def choose(pipeline, samplers, extractor, config):
        asked.append(extractor)
        return "rollout"

    for module in (baseline_module, evaluate_module):
        monkeypatch.setattr(module, "choose_among", choose)
    run_study(config, [name for name in stages_up_to(config, "evaluate") if name not in stages_up_to(config, "ppo")])
    expected = load_extractors(config)["label"].state_dict()
    assert len(asked) == 2  # stage samplers did not try the rollouts' sampler
    for used in asked:
        assert used.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in used.state_dict().items())
    found = stage_result(config, "evaluate")
    assert {arm: found["chosen"][arm] for arm in ("standard", "rl")} == {
        "standard": "standard @ rollout", "rl": "rl @ rollout",
    }  # fmt: skip
    assert found["fid"]["judge"]["standard"] == found["fid_by_sampler"]["judge"]["standard @ rollout"]
    standard, at_rollouts = (load_reported(config, name).pixel_values for name in ("standard", AT_ROLLOUTS))
    assert torch.equal(standard, at_rollouts)
