import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import copied, differing, settings_with
from torch.nn.modules.module import register_module_forward_pre_hook

from msrl_diffusers import (
    MedVolumePipeline,
    StudyConfig,
    UNet3DModel,
    VolumeDataset,
    run_study,
    write_phantoms,
)
from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.features import extract_features
from msrl_diffusers.evaluation.fidelity import frechet_distance
from msrl_diffusers.models.autoencoder_vq_3d import Decoder3D, Encoder3D
from msrl_diffusers.processes import process_state
from msrl_diffusers.study import STAGES
from msrl_diffusers.study.artifacts import (
    load_extractors,
    load_reported,
    load_reward_models,
    load_scores,
    load_sources,
    load_split,
)
from msrl_diffusers.study.baseline import Yardstick, load_baseline
from msrl_diffusers.study.chain import fingerprint, stages_up_to
from msrl_diffusers.study.command_line import parse_study, read_study
from msrl_diffusers.study.release import write_release
from msrl_diffusers.study.report import ARMS as PAGE_ARMS
from msrl_diffusers.study.report import gap_closed, markdown
from msrl_diffusers.study.reward_data import reward_data, reward_sets, scored_counts
from msrl_diffusers.study.stages import load_arm
from msrl_diffusers.trainers import base
from msrl_diffusers.trajectories import score_set


CPU_CONFIG = Path(__file__).parent.parent / "examples" / "configs" / "phantoms" / "cpu.yaml"
ARMS = ("real_floor", "limit", "limit_heldout", "standard", "rl")
ROLES = ("judge", "second_judge", "label")


def marks(folder) -> dict[str, tuple[int, str]]:
    """When each stage's record was written, and for what settings."""
    return {
        name: ((Path(folder) / name / "stage.json").stat().st_mtime_ns, json.loads((Path(folder) / name / "stage.json").read_text())["fingerprint"])
        for name in STAGES
    }  # fmt: skip


@pytest.fixture(scope="module")
def report(finished):
    return json.loads((finished / "report.json").read_text())


def test_distances_of_every_arm_by_all_extractors(report):
    for role in ROLES:
        fids = report["fid"][role]
        assert set(fids) == set(ARMS)
        for arm in ARMS:
            assert set(fids[arm]) == {"all", "HGG", "LGG"}
            assert all(isinstance(value, float) and value >= 0 for value in fids[arm].values())
            low, high = report["fid_interval"][role][arm]
            assert low <= fids[arm]["all"] <= high
            assert isinstance(report["kid"][role][arm], float)
        assert set(report["fid_heldout"][role]) == {"limit", "standard", "rl"}
        difference = report["fid_rl_minus_standard"][role]
        assert difference["value"] == pytest.approx(fids["rl"]["all"] - fids["standard"]["all"])
        assert difference["interval"][0] <= difference["value"] <= difference["interval"][1]
        gap = fids["standard"]["all"] - fids["limit"]["all"]
        expected = (fids["standard"]["all"] - fids["rl"]["all"]) / gap if gap > 0 else None
        assert report["gap_closed"][role] == (expected if expected is None else pytest.approx(expected))
        assert report["gap_closed_heldout"][role] == gap_closed(report["fid_heldout"][role])


def test_copies_are_looked_for_among_all_training_volumes(study):
    config = settings_with(study, num_per_class=6, evaluation_per_class=2)
    run_study(config, ["prepare", "extractors"])
    yardstick, train = Yardstick.of(config), load_split(config, "train")
    assert (len(yardstick.train), len(train)) == (4, 12)
    found = yardstick.audit(train)
    assert (found["n_train"], found["null"]["n"], found["n_train_copied"]) == (12, 12, 12)


def test_both_arms_stand_at_both_samplers(report):
    names = {f"{arm} @ {sampler}" for arm in ("standard", "rl") for sampler in ("best", "rollout", "stochastic")}
    for role in ROLES:
        assert names <= set(report["fid_by_sampler"][role])
    assert report["samplers"]["rollout"] == {"num_inference_steps": 4, "eta": 1.0, "guidance_scale": 1.0}
    assert report["samplers"]["stochastic"] == report["samplers"]["rollout"]
    assert report["chosen"]["standard"] == "standard @ best"
    assert report["chosen"]["rl"] in ("rl @ best", "rl @ rollout")  # equal ones go by the first name
    for arm, name in report["chosen"].items():
        assert report["fid"]["judge"][arm] == report["fid_by_sampler"]["judge"][name]


def test_classifiers_of_every_arm(report, finished):
    assert set(report["downstream"]) == {"real only", "+ standard synthetic", "+ RL synthetic"}
    found = json.loads((finished / "downstream" / "downstream.json").read_text())
    for arm, metrics in report["downstream"].items():
        assert set(metrics) == {"accuracy", "f1", "auc"}
        assert metrics["auc"] == found["arms"][arm]["auc"]["mean"]
    assert found["n"]["synthetic"]["+ RL synthetic"] == {"HGG": 4, "LGG": 4}
    assert "| + RL synthetic |" in (finished / "report.md").read_text()


def test_volumes_of_another_generator_are_an_arm(study, tmp_path):
    write_phantoms(tmp_path / "other", 2, image_size=16, seed=7)
    rows = (tmp_path / "other" / "metadata.csv").read_text().replace(",grade,", ",label,")
    (tmp_path / "other" / "metadata.csv").write_text(rows)
    config = settings_with(study, synthetic_arms={"phantoms": str(tmp_path / "other")}, downstream_per_class=3)
    run_study(config)
    report = json.loads((study / "report.json").read_text())
    assert list(report["downstream"])[-1] == "phantoms"
    found = json.loads((study / "downstream" / "downstream.json").read_text())
    assert found["n"]["synthetic"]["phantoms"] == {"HGG": 2, "LGG": 2}
    assert found["n"]["train"] == {"HGG": 3, "LGG": 3}
    wide = VolumeDataset(
        torch.zeros(2, 1, 24, 24, 24), torch.tensor([0, 1]), ["a", "b"], {0: "HGG", 1: "LGG"}, (4.0,) * 3
    )
    arm = load_arm("phantoms", tmp_path / "other", wide, config)  # the cubes are the study's, whatever image_size says
    assert arm.pixel_values.shape[1:] == wide.pixel_values.shape[1:]
    assert arm.spacing == wide.spacing
    (tmp_path / "other" / "metadata.csv").write_text(rows.replace(",LGG,", ",healthy,"))
    with pytest.raises(InputError, match="class 'healthy'; the study's classes are"):
        load_arm("phantoms", tmp_path / "other", load_split(config, "train"), config)


def test_rewards_before_and_after(report):
    for moment in ("before", "after"):
        assert set(report["reward"][moment]) == {"mean", "std"}
        assert set(report["reward"]["parts"][moment]) == {"volume", "slice", "heldout"}
    assert report["reward"]["before"]["mean"] == pytest.approx(0, abs=1e-4)
    assert report["reward"]["before"]["std"] > 0
    expected = (report["reward"]["after"]["mean"] - report["reward"]["before"]["mean"]) / report["reward"]["before"][
        "std"
    ]
    assert report["reward"]["gain"] == pytest.approx(expected)
    for role in ("volume", "slice", "heldout"):
        assert -1 <= report["reward_models"][role]["spearman"] <= 1
        assert 0 <= report["reward_models"][role]["auc"] <= 1
        assert report["reward_models"][role]["n"] == 6


def test_the_report_says_where_its_numbers_come_from(report):
    assert report["n"] == {"all": 8, "HGG": 4, "LGG": 4}
    assert report["seed"] == 0
    assert {role: value["name"] for role, value in report["extractors"].items()} == {
        "judge": "VolumeFeatureExtractor",
        "second_judge": "PatchFeatureExtractor",
        "label": "SliceFeatureExtractor",
    }
    assert all(len(value["sha256"]) == 16 for value in report["extractors"].values())
    assert len(report["data_fingerprint"]) == 16
    assert report["commit"] is None or len(report["commit"].rstrip("+")) == 40
    assert (
        report["versions"]["torch"] == torch.__version__.split("+")[0]
        or report["versions"]["torch"] == torch.__version__
    )
    assert report["device"] == process_state().device.type
    assert set(report["seconds"]) >= set(STAGES) - {"report"}
    # two rollouts of eight samples: four steps each, then four passes over two trained steps
    assert report["unet_forwards"] == 2 * (8 * 4 + 8 * 2 * 4)
    assert report["ppo"]["rollouts"] == 2


def test_the_page_holds_the_numbers_of_the_json(finished, report):
    page = (finished / "report.md").read_text()
    assert page == markdown(report)
    for role in ROLES:
        table = page.split(f"training volumes, {role.replace('_', ' ')} extractor")[1].split("## ")[0]
        rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
        header = [*report["fid"][role]["rl"], "interval (all)", "KID", "to held-out volumes (all)"]
        assert rows[0] == header
        for (title, *cells), (arm, name) in zip(rows[1:], PAGE_ARMS.items(), strict=True):
            assert title == name
            low, high = report["fid_interval"][role][arm]
            other = report["fid_heldout"][role].get(arm)
            assert cells == [
                *(f"{value:.4f}" for value in report["fid"][role][arm].values()),
                f"{low:.4f} .. {high:.4f}",
                f"{report['kid'][role][arm]:.5f}",
                *([f"{other['all']:.4f}"] if other else []),
            ]
    header, _, volume = page.split("| reward model, on held-out subjects |")[1].splitlines()[:3]
    assert header.split(" | ")[1] == "Spearman over the volumes of all sets"  # not over the sets' means
    assert volume.split(" | ")[2] == f"{report['reward_models']['volume']['spearman']:.3f}"
    for figure in ("comparison", "ppo", "reward_vs_fid"):
        assert f"figures/{figure}.png" in page
        assert (finished / "figures" / f"{figure}.png").stat().st_size > 1000


def test_both_pipelines_load_and_differ(finished):
    volumes, weights = [], []
    for name in ("pipeline_standard", "pipeline_rl"):
        pipeline = DiffusionPipeline.from_pretrained(finished / name)
        assert isinstance(pipeline, MedVolumePipeline)
        assert pipeline.id2label == {0: "HGG", 1: "LGG"}
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        volumes.append(pipeline("HGG", 2, generator=generator).volumes)
        weights.append(copied(pipeline.unet))
        assert volumes[-1].shape == (1, 1, 16, 16, 16)
    assert differing(*weights) or json.loads((finished / "ppo/stage.json").read_text())["result"]["step"] == 1


def test_the_arms_are_kept_and_the_splits_apart(finished):
    config = settings_with(finished)
    train, heldout = load_split(config, "train"), load_split(config, "heldout")
    assert not set(train.subject_ids) & set(heldout.subject_ids)
    for arm in ARMS:
        volumes = load_reported(config, arm)
        assert len(volumes) == 8
        assert set(volumes.subject_ids) == set(
            (heldout if arm in ("real_floor", "limit_heldout") else train).subject_ids
        )
    for picture in ("prepare/volumes.png", "vqgan/reconstructions.png", "diffusion/samples.png"):
        assert (finished / picture).is_file()


def test_pictures_of_a_stage_need_no_more_memory_than_its_training(tmp_path):
    """Else it dies of them after its training was done."""
    seen = {Encoder3D: [], Decoder3D: [], UNet3DModel: []}

    def note(module, inputs):
        if type(module) in seen and not module.training:
            seen[type(module)].append((len(inputs[0]), torch.is_autocast_enabled("cpu")))

    config = settings_with(
        tmp_path, sampling_batch_size=3, vqgan={"train_batch_size": 2}, diffusion={"encode_batch_size": 2}
    )
    run_study(config, ["prepare"])
    handle = register_module_forward_pre_hook(note)
    try:
        run_study(config, ["vqgan", "diffusion"])
    finally:
        handle.remove()
    assert {count for count, _ in seen[Encoder3D]} == {1, 2}  # pictures, and what training takes at once
    assert {count for count, _ in seen[Decoder3D]} == {1, 2, 3}
    assert set(seen[UNet3DModel]) == {(3, True), (2, True)}  # 8 volumes, in bfloat16 as of the config


def test_distances_are_those_of_the_volumes_that_are_kept(finished, report):
    config = settings_with(finished)
    _, known = load_baseline(config)
    yardstick = Yardstick.of(config, known)
    for role, extractor in yardstick.extractors.items():
        real = extract_features(extractor, yardstick.train.pixel_values)
        assert torch.equal(known[role]["train"], real)
        for arm in ARMS:
            features = extract_features(extractor, load_reported(config, arm).pixel_values)
            assert report["fid"][role][arm]["all"] == pytest.approx(frechet_distance(real, features), abs=1e-12)
            if arm != "rl":
                assert torch.equal(known[role][arm], features)


def test_targets_run_from_nought_to_one(finished):
    scores = json.loads((finished / "score" / "scores.json").read_text())
    assert set(scores["targets"]) == {"reconstruction-001", "reconstruction-005", "synthetic-002", "synthetic-004"}
    for name in ("HGG", "LGG"):
        targets = {key: by_class[name] for key, by_class in scores["targets"].items()}
        fids = {key: by_class[name] for key, by_class in scores["fid"].items()}
        assert (min(targets.values()), max(targets.values())) == (0, 1)
        assert min(fids, key=fids.get) == max(targets, key=targets.get)
    chosen = json.loads((finished / "samplers" / "samplers.json").read_text())
    fids = [sampler["fid"]["all"] for sampler in chosen["samplers"]]
    assert chosen["best_sampler"] == fids.index(min(fids))


def test_a_set_of_trajectories_has_no_more_volumes_than_is_said(study, tmp_path):
    """And all that is made of the sets, or compared with them, is of as many; a release says what it was trained on all the same."""
    train, degraded = load_split(settings_with(study), "train"), {"kinds": ["blur"], "strengths": [0.5]}
    config = settings_with(study, trajectories_per_class=3, degraded_anchors=degraded, marginal_labels=0.5)
    run_study(config, ["trajectories", "score", "rewards"])
    made = json.loads((study / "trajectories" / "stage.json").read_text())["result"]
    assert (made["volumes_per_set"], made["unet_forwards"]) == (6, 6 * (1 + 5 + 2 + 4))
    sets = dict(reward_sets(config, load_sources(config)))
    for volumes in sets.values():
        assert volumes.subject_ids == train.take_per_class(3).subject_ids
    scores = load_scores(config)
    assert (scores["n"], scores["n_by_class"]) == (6, {"HGG": 3, "LGG": 3})
    extractor, blurred = load_extractors(config)["label"], sets["degraded-blur-050"]
    assert scores["fid"]["degraded-blur-050"] == pytest.approx(
        score_set(extractor, train.take_per_class(3), blurred), rel=1e-4
    )
    assert len(reward_data(config)) == 5 * 6
    uncapped = settings_with(study, trajectories_per_class=None)
    assert load_sources(uncapped).subject_ids == train.subject_ids  # in their order: noise goes by it
    assert scored_counts(uncapped, train, scores) == {0: 3, 1: 3}
    assert scored_counts(uncapped, train, {}) == {0: 4, 1: 4}  # as of models released before there was a limit
    write_release(config, tmp_path / "release")
    with pytest.raises(InputError, match=r"was trained on 8 phantoms or more, .* give num_per_class=4"):
        run_study(settings_with(tmp_path / "out", pretrained=str(tmp_path / "release"), num_per_class=3), ["prepare"])


def test_a_finished_study_is_not_run_again(study):
    before = marks(study)
    page = (study / "report.md").stat().st_mtime_ns
    run_study(settings_with(study))
    assert marks(study) == before
    assert (study / "report.md").stat().st_mtime_ns == page


def test_other_ppo_settings_run_ppo_and_what_follows_again(study):
    before = marks(study)
    run_study(settings_with(study, ppo={"learning_rate": 3e-3}))
    after = marks(study)
    assert [name for name in STAGES if before[name] != after[name]] == ["ppo", "evaluate", "downstream", "report"]


def test_an_interrupted_stage_is_taken_up(study):
    before = json.loads((study / "ppo" / "stage.json").read_text())["result"]
    weights = copied(MedVolumePipeline.from_pretrained(study / "ppo" / "pipeline").unet)
    (study / "ppo" / "stage.json").unlink()
    shutil.rmtree(study / "ppo" / "pipeline")
    (study / "ppo" / "left_by_the_first_run").touch()
    result = run_study(settings_with(study), ["ppo"])
    assert (study / "ppo" / "left_by_the_first_run").is_file()
    assert result["scales"] == before["scales"]
    assert differing(weights, copied(MedVolumePipeline.from_pretrained(study / "ppo" / "pipeline").unet)) == []


def test_what_other_settings_left_is_removed(study):
    (study / "ppo" / "stage.json").unlink()
    (study / "ppo" / "left_by_the_first_run").touch()
    run_study(settings_with(study, ppo={"seed": 5}), ["ppo"])
    assert not (study / "ppo" / "left_by_the_first_run").exists()


def test_a_stage_does_not_take_stale_inputs(study):
    with pytest.raises(InputError, match="diffusion"):
        run_study(settings_with(study, diffusion={"learning_rate": 0.5}), ["ppo"])


def test_trackers_that_are_not_installed_are_told_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "get_available_trackers", list)
    config = settings_with(tmp_path / "out", refresh={"every": 1, "report_to": "wandb"})
    with pytest.raises(InputError, match="report_to=wandb needs a package that is not installed"):
        run_study(config)
    assert not list((tmp_path / "out").glob("*"))
    assert run_study(config, ["prepare"])["dataset"] == "phantoms"


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"Unknown stage 'teapot'; the stages are \['prepare'"):
        run_study(settings_with(tmp_path), ["prepare", "teapot"])
    assert not (tmp_path / "prepare").exists()


@pytest.mark.parametrize(
    ("stage", "needed"), [("vqgan", "prepare"), ("report", "evaluate"), ("rewards", "trajectories")]
)
def test_a_stage_without_its_inputs_is_refused(stage, needed, tmp_path):
    with pytest.raises(InputError, match=f"Stage '{stage}' needs the result of '{needed}'; run that stage first"):
        run_study(settings_with(tmp_path), [stage])


def test_stages_up_to():
    config = StudyConfig()
    assert stages_up_to(config, "prepare") == ["prepare"]
    assert stages_up_to(config, "diffusion") == ["prepare", "vqgan", "diffusion"]
    assert stages_up_to(config, "report") == list(STAGES)
    assert "samplers" not in stages_up_to(config, "ppo")
    assert "samplers" in stages_up_to(replace(config, watch_per_class=4), "ppo")  # where it watches
    for name, stage in STAGES.items():
        assert all(list(STAGES).index(needed) < list(STAGES).index(name) for needed in stage.needs)


def test_scripts_of_one_stage_share_their_results_with_the_study(tmp_path):
    """train_vqgan.py, then train_diffusion.py or run_study.py with one config: the autoencoder is not trained twice."""
    study = StudyConfig(**read_study(CPU_CONFIG))
    for section in ("extractors", "vqgan", "diffusion", "rewards", "ppo", "downstream"):
        script = parse_study(section, CPU_CONFIG, [])
        assert fingerprint(script, section) == fingerprint(study, section), section


def test_reward_models_are_ready_to_score(finished):
    models = load_reward_models(settings_with(finished))
    assert set(models) == {"volume", "slice", "heldout"}
    assert not any(model.training for model in models.values())
