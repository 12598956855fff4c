"""The options of a study's last stages: validity gate, refresh, curve, methods, and further sets of reward data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import copied, differing, tiny_phantoms
from tiny_release import released_study, write_tiny_release

from msrl_diffusers import MedVolumePipeline, StudyConfig, run_study
from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.neighbours import shrink
from msrl_diffusers.study import curve as curve_module
from msrl_diffusers.study.artifacts import load_extractors, load_pipeline, load_reward_models, load_split
from msrl_diffusers.study.chain import STAGES, enabled_stages, study_chain
from msrl_diffusers.study.command_line import parse_study, read_study
from msrl_diffusers.study.curve import turning_point
from msrl_diffusers.study.report import markdown
from msrl_diffusers.study.reward_data import (
    compared_counts,
    first_of,
    reward_data,
    reward_set_names,
    reward_sets,
    score_trajectories,
)
from msrl_diffusers.study.sections import METHODS
from msrl_diffusers.study.stages import train_extractors
from msrl_diffusers.study.validity import measure_validity
from msrl_diffusers.trainers import watchdogs
from msrl_diffusers.trainers.snapshots import read_snapshots
from msrl_diffusers.trainers.watchdogs import high_frequency_share
from msrl_diffusers.trajectories import score_set


CONFIGS = Path(__file__).parent.parent / "examples" / "configs" / "phantoms"
LOW = {"auc": 0.0, "spearman": -1.0}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_tiny_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def finished(release, tmp_path_factory):
    """Config of a finished study with every option of method PPO; not to be written to."""
    quiet = {"report_to": "none"}
    settings = released_study(
        tmp_path_factory.mktemp("study"), release, max_steps=3, validity_floors=LOW, num_curve_points=2, curve_per_class=3,
        refresh={"every": 1, "train_batch_size": 4, **quiet}, marginal_labels=0.4, select_by="-label_fid",
        ppo={"kl_gate_quantile": 0.5, "reference_update_steps": 2, "antithetic": True, "learning_rate": 1e-3},
    )  # fmt: skip
    config = StudyConfig(**settings)
    run_study(config)
    return config


@pytest.fixture
def study(finished, tmp_path):
    """A copy of it."""
    folder = shutil.copytree(finished.output_dir, tmp_path / "study")
    return replace(finished, output_dir=str(folder))


def stage(config: StudyConfig, name: str) -> dict:
    return json.loads((Path(config.output_dir) / name / "stage.json").read_text())["result"]


def report_of(config: StudyConfig) -> dict:
    return json.loads((Path(config.output_dir) / "report.json").read_text())


# ------------------------------------------------------------------------------------------------------------ the chain


def test_a_study_has_the_stages_it_uses(finished, release, tmp_path):
    assert enabled_stages(finished) == [
        "prepare", "trajectories", "validity", "ppo", "curve", "baseline", "evaluate", "report",
    ]  # fmt: skip
    assert {path.parent.name for path in Path(finished.output_dir).glob("*/stage.json")} == set(
        enabled_stages(finished)
    )
    plain = StudyConfig(**released_study(tmp_path, release))
    assert enabled_stages(plain) == ["prepare", "validity", "ppo", "baseline", "evaluate", "report"]
    assert "curve" not in STAGES


@pytest.mark.parametrize("method", METHODS)
def test_the_stage_of_tuning_has_the_name_of_its_method(method):
    chain = study_chain(StudyConfig(method=method))
    assert set(METHODS) & set(chain.stages) == {method}
    for name in ("evaluate", "report"):
        assert method in chain.up_to(name)


# --------------------------------------------------------------------------------------------------------- the curve


def test_the_curve_has_its_start_its_end_and_what_was_kept(finished):
    curve = json.loads((Path(finished.output_dir) / "curve" / "curve.json").read_text())
    assert curve == stage(finished, "curve")
    points = curve["points"]
    assert (points[0]["rollout"], points[0]["sqrt_kl"]) == (0, 0.0)
    assert points[-1]["rollout"] == 3
    assert 0 < points[-1]["sqrt_kl"] < 1
    taken = {snapshot.rollout for snapshot in read_snapshots(Path(finished.output_dir) / "ppo")}
    assert {point["rollout"] for point in points[1:]} <= taken
    assert len(points) in (3, 4)  # two steps of the divergence, the start, and perhaps the end apart
    assert points[0]["reward"]["mean"] == pytest.approx(0, abs=1e-5)
    for point in points:
        assert set(point["reward"]) == {"mean", "volume", "slice", "heldout"}
        assert set(point["fid"]) == set(point["kid"]) == {"label", "judge", "second_judge"}
        assert point["diversity"] > 0
        assert 0 < point["high_frequency"] < 1
        assert 0 <= point["nearest"]["distance"] <= 2**0.5
    assert curve["kept"]["rollout"] == stage(finished, "ppo")["kept_after"]
    assert curve["n"] == 6
    assert {role: value["sha256"] for role, value in curve["extractors"].items()} == {
        role: value["sha256"] for role, value in report_of(finished)["extractors"].items()
    }


def test_points_move_with_the_weights(finished):
    points = stage(finished, "curve")["points"]
    values = [(point["fid"]["judge"], point["reward"]["mean"]) for point in points]
    assert len(set(values)) == len(values)


def test_points_are_sampled_as_the_rollouts_are(release, tmp_path):
    """Those of FrechetTrainer may have no noise, which its `eta` does not say."""
    config = StudyConfig(
        **released_study(tmp_path, release, method="frechet", frechet={"samplers": [0.0], "num_inference_steps": 3})
    )
    run_study(config, ["prepare"])
    assert config.trainer_config("frechet").eta == 1.0
    instruments = curve_module._Instruments(config)
    assert instruments.sampler == {"num_inference_steps": 3, "eta": 0.0, "guidance_scale": 1.0}
    assert torch.equal(instruments._sampled(), instruments._sampled())


def test_the_curve_is_in_the_report(finished):
    report, folder = report_of(finished), Path(finished.output_dir)
    assert report["curve"] == stage(finished, "curve")
    page = (folder / "report.md").read_text()
    for point in report["curve"]["points"]:
        assert f"| {point['sqrt_kl']:.4f} |" in page
    assert "figures/over_optimization.png" in page
    assert (folder / "figures" / "over_optimization.png").stat().st_size > 10_000


def test_a_killed_curve_goes_on_and_snapshots_can_be_removed(study):
    folder = Path(study.output_dir)
    before = stage(study, "curve")
    (folder / "curve" / "stage.json").unlink()
    kept = folder / "curve" / "points" / "rollout-00000.json"
    time = kept.stat().st_mtime_ns
    for name in ("points/rollout-00003.json", "curve.json"):
        (folder / "curve" / name).unlink()
    config = replace(study, keep_snapshots=False)
    run_study(config, ["curve"])
    assert stage(study, "curve") == before
    assert kept.stat().st_mtime_ns == time
    assert list((folder / "ppo" / "snapshots").iterdir()) == []
    (folder / "curve" / "stage.json").unlink()  # killed after the snapshots were removed
    run_study(config, ["curve"])
    assert stage(study, "curve") == before
    shutil.rmtree(folder / "curve")
    with pytest.raises(InputError, match=r"holds no snapshots; remove .*ppo to tune again"):
        run_study(study, ["curve"])


def test_figures_of_the_curve_are_those_of_all_volumes_at_once(monkeypatch):
    train = tiny_phantoms(4)
    values = train.pixel_values.float()
    values[0] *= 3  # batches of other energies
    volumes = replace(train, pixel_values=values.half())
    monkeypatch.setattr(curve_module, "BATCH_SIZE", 3)
    monkeypatch.setattr(curve_module, "WORKING_EDGE", 8)
    share = high_frequency_share(volumes.pixel_values)
    monkeypatch.setattr(watchdogs, "SPECTRA_AT_ONCE", 3)
    assert high_frequency_share(volumes.pixel_values) == pytest.approx(share, rel=1e-5)
    assert torch.equal(curve_module._shrunk(volumes), shrink(volumes.pixel_values.float(), 8).half())


def test_where_a_curve_turns():
    def point(rollout, judge, reward):
        return {"rollout": rollout, "sqrt_kl": rollout / 10, "fid": {"judge": judge}, "reward": {"mean": reward}}

    turning = turning_point([point(0, 3.0, 0.0), point(1, 2.0, 1.0), point(2, 4.0, 2.0)])
    assert turning == {"rollout": 1, "sqrt_kl": 0.1, "reward_rose_after_it": True}
    assert not turning_point([point(0, 2.0, 0.0), point(1, 3.0, -1.0)])["reward_rose_after_it"]
    assert turning_point([point(0, 3.0, 0.0), point(1, 2.0, 1.0)]) is None


# ----------------------------------------------------------------------------------------------------- validity, refresh


def test_figures_of_the_gate_are_those_of_the_report(finished):
    report = report_of(finished)
    assert report["reward_models"] == stage(finished, "validity") == measure_validity(finished)
    assert {"auc", "spearman", "set_spearman", "ece", "slope", "mean_by_set", "n"} <= set(
        report["reward_models"]["volume"]
    )


def test_a_report_warns_of_rewards_that_rank_nothing(finished):
    content = report_of(finished)
    weak, fine = {"auc": 0.55, "spearman": 0.4}, {"auc": 0.9, "spearman": 0.8}
    found = markdown(
        {**content, "reward_models": {**content["reward_models"], "volume": {**fine, **weak}, "slice": fine}}
    )
    assert "hardly rank unseen subjects**: reward 'volume' has auc 0.55 (at least 0.7). What" in found
    fit = {**content, "reward_models": {"volume": fine, "slice": fine, "heldout": weak}}  # the third was not optimized
    assert "hardly rank" not in markdown(fit)
    assert "hardly rank" not in markdown(
        {**content, "reward_models": dict.fromkeys(content["reward_models"], weak), "optimized": []}
    )
    assert content["optimized"] == ["volume", "slice"]
    assert StudyConfig(ppo={"reward_weights": [1.0, 0.0]}).optimized_rewards() == ["volume"]
    assert StudyConfig(method="frechet").optimized_rewards() == []


def test_a_report_says_which_weights_were_kept(finished):
    content = report_of(finished)
    kept = {**content, "ppo": {**content["ppo"], "kept_after": 2}}
    assert "The weights kept are those after 2." in markdown(kept)
    assert "**The pretrained weights were kept**" in markdown({**content, "ppo": {**content["ppo"], "kept_after": 0}})


def test_no_policy_is_tuned_by_a_reward_below_the_floors(study):
    shutil.rmtree(Path(study.output_dir) / "ppo")
    config = replace(study, validity_floors={"auc": 1.01})
    with pytest.raises(InputError, match=r"Reward 'volume' has auc .* \(at least 1\.01\).* a policy would game it"):
        run_study(config)
    assert not (Path(study.output_dir) / "ppo" / "log.jsonl").exists()
    run_study(study, ["ppo"])
    assert (Path(study.output_dir) / "ppo" / "pipeline").is_dir()


def test_rewards_were_refreshed_and_the_first_ones_stay(finished, release):
    folder = Path(finished.output_dir) / "ppo" / "refresh"
    assert sorted(path.name for path in folder.iterdir()) == [
        "00000", "00001", "reference.safetensors", "training",
    ]  # fmt: skip
    targets = load_file(folder / "00001" / "samples.safetensors")["targets"]
    assert targets.std() > 0  # each volume has its own share
    model = load_reward_models(finished)["volume"]
    assert differing(copied(model), load_file(folder / "00001" / "volume.safetensors"))


def test_unseen_sets_are_checked_too(study, release, tmp_path):
    train = load_split(study, "train")
    train.save(tmp_path / "copies.safetensors")
    config = replace(study, unseen_sets={"copies": str(tmp_path / "copies.safetensors")})
    found = measure_validity(config)
    for figures in found.values():
        assert figures["unseen"]["n"] == len(train)
        assert figures["unseen"]["mean_by_set"].keys() == {"copies"}
    assert measure_validity(study)["volume"]["auc"] == found["volume"]["auc"]


# ------------------------------------------------------------------------------------------------------- reward data


@pytest.fixture(scope="module")
def own_rewards(release, tmp_path_factory):
    """A study that trains reward models on all kinds of sets."""
    folder = tmp_path_factory.mktemp("own")
    tiny_phantoms(4).save(folder / "earlier.safetensors")
    config = StudyConfig(
        **released_study(
            folder / "study", release, pretrained_rewards=False, marginal_labels=0.5, conditional_rewards=True,
            degraded_anchors={"kinds": ["blur", "gamma"], "strengths": [0.5]},
            policy_anchors={"earlier": str(folder / "earlier.safetensors")},
            volume_reward={"block_out_channels": [8, 8], "num_heads": 2, "spread_penalty": 0.5},
        )
    )  # fmt: skip
    run_study(config, ["prepare", "trajectories", "score", "rewards"])
    return config


def test_degraded_volumes_and_earlier_policies_are_sets_like_others(own_rewards):
    names = [*reward_set_names(own_rewards)]
    assert names[-3:] == ["degraded-blur-050", "degraded-gamma-050", "policy-earlier"]
    scores = stage(own_rewards, "score")
    assert list(scores["fid"]) == list(scores["targets"]) == names
    train = load_split(own_rewards, "train")
    sets = dict(reward_sets(own_rewards, train))
    assert list(sets) == names
    assert all(len(volumes) == len(train) for volumes in sets.values())
    assert sets["degraded-blur-050"].subject_ids == train.subject_ids
    assert not torch.equal(sets["degraded-blur-050"].pixel_values, train.pixel_values)
    # the phantoms of both are those of one seed: no set is nearer to the real ones
    assert scores["fid"]["policy-earlier"]["HGG"] == pytest.approx(0, abs=1e-6)
    assert scores["targets"]["policy-earlier"] == {"HGG": 1.0, "LGG": 1.0}


def test_marginal_labels_mix_the_set_with_the_volume(own_rewards):
    mixed, plain = reward_data(own_rewards), reward_data(replace(own_rewards, marginal_labels=0.0))
    assert torch.equal(mixed.pixel_values, plain.pixel_values)
    assert ((mixed.targets - 0.5 * plain.targets) >= 0).all()
    assert ((mixed.targets - 0.5 * plain.targets) <= 0.5 + 1e-6).all()
    count = len(load_split(own_rewards, "train"))
    assert (mixed.targets[:count] - 0.5 * plain.targets[:count]).std() > 0
    assert load_reward_models(own_rewards)["volume"].config.num_heads == 2


def test_only_judges_are_told_degradations(own_rewards):
    told = replace(own_rewards, extractors={**own_rewards.extractors, "degraded_share": 0.5})
    figures = train_extractors(told)
    assert {role for role, found in figures.items() if "accuracy_degradation" in found} == {"judge", "second_judge"}


def test_conditional_rewards_know_the_classes_of_the_data(own_rewards):
    assert {model.config.num_classes for model in load_reward_models(own_rewards).values()} == {2}
    train = load_split(own_rewards, "train")
    assert reward_data(own_rewards).class_labels[: len(train)].tolist() == train.class_labels.tolist()


def test_few_volumes_of_an_earlier_policy_are_compared_with_as_few_of_the_others(own_rewards, tmp_path, monkeypatch):
    monkeypatch.setattr("msrl_diffusers.study.reward_data.MIN_ANCHORS", 3)
    tiny_phantoms(3).save(tmp_path / "few.safetensors")
    config = replace(own_rewards, policy_anchors={"few": str(tmp_path / "few.safetensors")})
    train = load_split(own_rewards, "train")
    assert compared_counts(own_rewards, train) == {0: 4, 1: 4}
    assert compared_counts(config, train) == {0: 3, 1: 3}
    sets = dict(reward_sets(config, train))
    assert len(sets["policy-few"]) == 6
    assert len(sets["degraded-blur-050"]) == len(train)  # they are trained on all
    assert first_of(train, {0: 4, 1: 4}) is train
    assert first_of(train, {0: 3, 1: 3}).class_counts() == {"HGG": 3, "LGG": 3}
    config = replace(config, output_dir=str(tmp_path / "study"))
    shutil.copytree(own_rewards.output_dir, config.output_dir)
    scores = score_trajectories(config)
    assert scores["n"] == 6
    extractor, blurred = load_extractors(config)["label"], sets["degraded-blur-050"]
    wanted = score_set(extractor, train.take_per_class(3), blurred.take_per_class(3))
    assert scores["fid"]["degraded-blur-050"] == pytest.approx(wanted, rel=1e-4)


def test_too_few_volumes_of_an_earlier_policy_are_refused(own_rewards, tmp_path):
    tiny_phantoms(2).save(tmp_path / "few.safetensors")
    config = replace(own_rewards, policy_anchors={"few": str(tmp_path / "few.safetensors")})
    with pytest.raises(InputError, match=r"has 2 volumes of class 'HGG'; .* needs 4: sample more"):
        dict(reward_sets(config, load_split(own_rewards, "train")))
    other = replace(tiny_phantoms(4), id2label={0: "LGG", 1: "HGG"})
    other.save(tmp_path / "turned.safetensors")
    config = replace(own_rewards, policy_anchors={"turned": str(tmp_path / "turned.safetensors")})
    with pytest.raises(InputError, match="of the classes"):
        dict(reward_sets(config, load_split(own_rewards, "train")))


def test_data_of_rewards_that_are_given_can_t_be_changed(release):
    for fields in (
        {"marginal_labels": 0.5},
        {"degraded_anchors": {"kinds": ["blur"], "strengths": [0.5]}},
        {"conditional_rewards": True},
    ):
        with pytest.raises(InputError, match="set pretrained_rewards: false"):
            StudyConfig(pretrained=release, **fields)
        StudyConfig(pretrained=release, pretrained_rewards=False, **fields)
    StudyConfig(pretrained=release, marginal_labels=0.5, refresh={"every": 2})


def test_a_release_states_its_sampler(release):
    StudyConfig(pretrained=release, samplers=[])


# ------------------------------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_study_by_another_method(method, release, tmp_path):
    section = {
        "rollout_batch_size": 4, "num_rollout_batches": 1, "train_batch_size": 4, "num_inference_steps": 4,
        "report_to": "none", "learning_rate": 1e-3,
    }  # fmt: skip
    extra = {
        "nft": {},
        "draft": {},
        "frechet": {"queue_batches": 2, "eval_steps": 1, "eval_batches": 1, "samplers": [0.0]},
        "ddo": {"num_updates": 1},
    }
    config = StudyConfig(
        **released_study(tmp_path, release, method=method, num_curve_points=2, curve_per_class=3, evaluation_per_class=3,
            frechet_features=["label", "volume", "slice"], **{method: {**section, **extra[method]}})
    )  # fmt: skip
    run_study(config)
    report = report_of(config)
    assert report["method"] == method
    assert report["n"] == {"all": 6, "HGG": 3, "LGG": 3}
    assert report[method]["rollouts"] == 2
    assert report["unet_forwards"] == report[method]["unet_forwards"] > 0
    assert report["samplers"]["rollout"]["eta"] == {"nft": 0.0, "draft": 1.0, "frechet": 0.0, "ddo": 0.0}[method]
    assert report["samplers"]["stochastic"] == {**report["samplers"]["rollout"], "eta": 1.0}
    assert "rl @ stochastic" in report["fid_by_sampler"]["judge"]
    assert report["curve"]["points"][-1]["rollout"] == 2
    page = (tmp_path / "report.md").read_text()
    assert f"figures/{method}.png" in page
    assert ("| reward trained on |" in page) == (method in ("nft", "draft"))  # others watch rewards alone
    assert page.count("its distance was the loss of the tuning") == (method == "frechet")  # of the label extractor
    assert not (tmp_path / "ppo").exists()
    tuned = MedVolumePipeline.from_pretrained(tmp_path / "pipeline_rl").unet
    assert differing(copied(tuned), copied(load_pipeline(config).unet)) or report[method]["kept_after"] == 0


def test_a_section_of_a_method_makes_it_the_study_s(tmp_path):
    (tmp_path / "a.yaml").write_text("method: ppo\nnum_per_class: 5\n")
    assert parse_study("ppo", tmp_path / "a.yaml", []).method == "ppo"
    for method in METHODS:
        assert parse_study(method, tmp_path / "a.yaml", []).method == method
    (tmp_path / "b.yaml").write_text("method: nft\n")
    assert parse_study("rewards", tmp_path / "b.yaml", []).method == "nft"


def test_the_recipes_say_what_they_are():
    """objectives.yaml tunes by the default recipe's PPO and by other methods, on given rewards; paper.yaml has no remedies."""
    default, objectives, paper = (
        read_study(CONFIGS / name) for name in ("recipes/default.yaml", "objectives.yaml", "recipes/paper.yaml")
    )
    assert StudyConfig(**objectives).pretrained_rewards
    assert set(METHODS) <= set(objectives)
    for name in ("pretrained", "num_per_class", "evaluation_per_class", "select_by", "watch_per_class"):
        assert objectives[name] == default[name], name
    assert {**objectives["ppo"], "max_steps": default["ppo"]["max_steps"]} == default["ppo"]
    for name in ("heldout_reward", "num_per_class", "num_curve_points"):
        assert paper[name] == default[name]
    assert {**paper["rewards"], "max_gain": default["rewards"]["max_gain"]} == default["rewards"]
    assert "max_gain" not in paper["rewards"]
    assert not {"refresh", "marginal_labels", "validity_floors", "degraded_anchors"} & set(paper)


def test_the_published_recipe_on_other_data_is_the_same():
    """nifti_folder/recipes/paper.yaml: the data of nifti_folder/cpu.yaml, the method of phantoms/recipes/paper.yaml."""
    folder = CONFIGS.parent / "nifti_folder"
    found, data, method = (
        read_study(path)
        for path in (folder / "recipes/paper.yaml", folder / "cpu.yaml", CONFIGS / "recipes/paper.yaml")
    )
    for name in ("image_size", "field_of_view", "label_column", "label_bins", "holdout_fraction"):
        assert found[name] == data[name], name
    for name in ("ppo", "volume_reward", "slice_reward", "heldout_reward", "select_by", "pretrained_rewards"):
        assert found[name] == method[name], name
    assert found["rewards"] == {name: value for name, value in data["rewards"].items() if name != "max_gain"}
    assert not set(found) - set(method) - set(data)
