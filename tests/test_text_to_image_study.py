"""The text-to-image study end to end on tiny parts: stages, report, adapter, given models, command lines, scripts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from huggingface_hub import metadata_load
from tiny import copied, differing
from tiny_text_to_image import IMAGE_SIZE, VIT, config, tiny_text_to_image, tiny_text_to_image_study

from msrl_diffusers.data.image_folder import ImageDataset
from msrl_diffusers.data.prompts import PromptBuilder
from msrl_diffusers.errors import InputError
from msrl_diffusers.seeding import fold_seed
from msrl_diffusers.text_to_image import CHAIN, TextToImageStudyConfig
from msrl_diffusers.text_to_image.artifacts import load_base, load_match, load_split, load_tuned
from msrl_diffusers.text_to_image.chain import STAGES
from msrl_diffusers.text_to_image.command_line import parse_text_to_image
from msrl_diffusers.text_to_image.release import write_release
from msrl_diffusers.text_to_image.report import report as write_report
from msrl_diffusers.text_to_image.sampling import sample_images
from msrl_diffusers.trainers.base import read_log
from msrl_diffusers.trainers.lora import LORA_FILE


EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPTS = PromptBuilder().prompts()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished study; a test that changes it takes a copy."""
    folder = tmp_path_factory.mktemp("text-to-image") / "study"
    CHAIN.run(config(folder))
    return folder


@pytest.fixture
def study(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "study")


@pytest.fixture(scope="module")
def report(finished) -> dict:
    return json.loads((finished / "report.json").read_text())


def given_models(study: Path) -> dict[str, str]:
    """The fields of a study that starts from the models of a finished one."""
    places = {f"{role}_classifier": study / "classifiers" / role for role in ("reward", "judge")}
    places |= {"pretrained_model_name_or_path": study / "pipeline_standard"}
    places |= {"fid_extractor": study / "classifiers" / "features"}
    return {name: str(place) for name, place in places.items()}


def stale(base: TextToImageStudyConfig, **changes) -> list[str]:
    """The stages that such a change lets run again."""
    changed = replace(base, **changes)
    return [
        name for name in CHAIN.enabled(changed) if CHAIN.fingerprint(base, name) != CHAIN.fingerprint(changed, name)
    ]


def marks(folder) -> dict[str, str]:
    return {name: (folder / name / "stage.json").read_text() for name in STAGES if (folder / name).exists()}


# ------------------------------------------------------------------------------------------------------- the report


def test_the_report_has_match_rates_and_distances_before_and_after(report):
    for role in ("judge", "reward"):
        found = report["attribute_match"][role]
        assert 0 <= found["before"] <= 1
        assert 0 <= found["after"] <= 1
        assert found["difference"]["value"] == pytest.approx(found["after"] - found["before"])
        assert list(found["per_attribute"]) == ["melanoma", "nevus", "hair", "gel bubble", "ruler", "ink"]
        assert found["n"] == report["n"] == 2 * len(PROMPTS)
    assert report["fid"]["before"] > 0
    assert report["fid"]["after"] > 0
    assert report["fid"]["n"] == 64
    assert set(report["fid"]["extractor"]) == {"id", "sha256"}
    low, high = report["fid"]["difference"]["interval"]
    assert low <= report["fid"]["difference"]["value"] <= high
    assert report["kl"] >= 0
    assert [row["prompt"] for row in report["prompts"]] == PROMPTS
    assert sum(row["held_out"] for row in report["prompts"]) == 28
    assert set(report["diversity"]) == {"real", "before", "after"}


def test_the_match_rates_are_those_of_the_prompts(report):
    for role in ("judge", "reward"):
        for arm in ("before", "after"):
            rates = [row[role][arm] for row in report["prompts"]]
            assert sum(rates) / len(rates) == pytest.approx(report["attribute_match"][role][arm])


def test_the_augmentation_study_compares_three_arms(report):
    found = report["augmentation"]
    assert list(found["subgroup_accuracy"]) == ["real only", "+ standard synthetic", "+ RL synthetic"]
    assert found["n"]["train_subgroup"] == 8
    assert found["n"]["synthetic"] == {"real only": 0, "+ standard synthetic": 8, "+ RL synthetic": 8}
    assert set(found["groups"]) == {"all", "with the artifacts", "without the artifacts"}
    for group in found["groups"].values():
        assert 0 <= group["arms"]["+ RL synthetic"]["auc"]["mean"] <= 1
        assert set(group["differences"]["+ RL synthetic"]) == {"real only", "+ standard synthetic"}


def test_the_report_says_where_its_numbers_come_from(report, finished):
    assert report["seed"] == 0
    assert {"python", "torch", "diffusers"} <= set(report["versions"])
    assert (report["data"]["dataset"], report["data"]["train"]["images"]) == ("dermoscopy", 56)
    assert set(report["seconds"]) == set(STAGES) - {"report"}
    assert report["unet_forwards"] > 0
    page = (finished / "report.md").read_text()
    for name in ("prompts", "attributes", "rollouts"):
        assert f"figures/{name}.png" in page
        assert (finished / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"{report['attribute_match']['judge']['after']:.1%}" in page
    (row,) = (line for line in page.splitlines() if line.startswith("| real, training (floor) |"))
    floor, limit = report["fid"]["real"], report["fid"]["reconstruction"]
    assert (floor["n"], limit["n"]) == (56, 64)  # training has one image alone of the prompts of the rare subgroup
    assert row.endswith(f"| n = 56 | {floor['kid']:.4g} |  |")
    assert f"| autoencoder (limit) | {limit['value']:.4g} |  | {limit['kid']:.4g} |  |" in page
    assert "64 on each side (where n is another, the row is not comparable), by features" in page
    assert f"| real, held out |  |  |  | {report['diversity']['real']['value']:.3f} (32 pairs) |" in page
    assert (finished / "report.html").is_file()


def test_the_report_calls_the_judge_independent_only_where_it_is(study):
    page, record = study / "report.md", study / "evaluate" / "stage.json"
    assert "the judge, of another architecture and trained on other images, does not" in page.read_text()
    write_report(config(study, judge_classifier=str(study / "classifiers" / "judge")))
    assert "the judge, of another architecture, does not" in page.read_text()
    found = json.loads(record.read_text())
    found["result"]["attribute_match"]["judge"]["architecture"] = "resnet"
    record.write_text(json.dumps(found))
    write_report(config(study))
    assert "the judge, trained on other images, does not" in page.read_text()
    write_report(config(study, reward_classifier=str(study / "classifiers" / "reward")))
    assert "the judge does not confirm" in page.read_text()


def test_the_report_says_which_weights_were_kept_and_what_picked_them(study):
    page, record = study / "report.md", study / "ppo" / "stage.json"
    found = json.loads(record.read_text())
    kept = found["result"]["kept_after"]
    assert kept
    assert (
        f"The weights kept are those after {kept}. The reward of held-out prompts picked these weights."
        in page.read_text()
    )
    found["result"]["kept_after"] = 0
    record.write_text(json.dumps(found))
    write_report(config(study, select_by="last"))
    assert "The pretrained weights were kept: none" in page.read_text()
    assert "picked these weights" not in page.read_text()
    del found["result"]["kept_after"]  # as an earlier version left it
    record.write_text(json.dumps(found))
    evaluated = json.loads((study / "evaluate" / "stage.json").read_text())
    del evaluated["result"]["real_prompts"]
    (study / "evaluate" / "stage.json").write_text(json.dumps(evaluated))
    write_report(config(study, select_by="last"))
    assert "weights were kept" not in page.read_text()
    assert "means over prompts" not in page.read_text()


def test_the_report_says_over_how_many_prompts_real_images_are(study):
    page, record = study / "report.md", study / "evaluate" / "stage.json"
    assert "All are means over prompts." in page.read_text()
    found = json.loads(record.read_text())
    found["result"]["real_prompts"] = 30
    record.write_text(json.dumps(found))
    write_report(config(study))
    assert (
        "All are means over prompts; held-out images, and so their reconstructions, show 30 of the 32."
        in page.read_text()
    )


def test_the_judge_picks_nothing(finished):
    """Rewards and selection are of the reward classifier; the judge is logged."""
    (first, *_), result = (
        read_log(finished / "ppo"),
        json.loads((finished / "ppo" / "stage.json").read_text())["result"],
    )
    assert {"watch/judge_match", "watch/reward_match", "watch/heldout_reward", "reward/attribute_probability"} <= set(
        first
    )
    assert set(result["scales"]) == {"attribute_probability"}
    history = read_log(finished / "ppo")
    best = max(line["watch/heldout_reward"] for line in history)
    assert result["watch/heldout_reward"] == pytest.approx(best)
    assert set(result["train_prompts"]) | set(result["heldout_prompts"]) == set(PROMPTS)


# ------------------------------------------------------------------------------------------------------- the adapter


def test_the_adapter_loads_in_plain_diffusers_and_gives_the_images_of_the_report(study):
    """Weights of another selection, so that something was trained: the last ones."""
    last = config(study, select_by="last")
    CHAIN.run(last)
    base = StableDiffusionPipeline.from_pretrained(study / "pipeline_standard")
    before = copied(base.unet)
    assert differing(before, copied(load_tuned(last).unet))
    base.scheduler = DDIMScheduler.from_config(base.scheduler.config)
    base.set_progress_bar_config(disable=True)
    base.load_lora_weights(study / "lora")
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    images = sample_images(base, prompts, last.evaluation_sampler, fold_seed(0, "evaluate"), last.builder)
    saved = ImageDataset.load(study / "evaluate" / "after.safetensors")
    assert (images.pixel_values.int() - saved.pixel_values.int()).abs().max() <= 2  # merged there, beside here
    other = ImageDataset.load(study / "evaluate" / "before.safetensors")
    assert not torch.equal(saved.pixel_values, other.pixel_values)
    facts = json.loads((study / "lora" / "facts.json").read_text())
    assert (facts["base_model"], facts["dataset"]) == ("pipeline_standard", "dermoscopy")
    assert facts["adapter"]["rank"] == 2
    assert facts["results"]["attribute_match"]["judge"]["n"] == 64
    assert str(study) not in json.dumps(facts)


@pytest.mark.slow
def test_all_weights_can_be_tuned_instead(study):
    ppo = {**tiny_text_to_image_study()["ppo"], "use_lora": False}
    whole = config(study, ppo=ppo, select_by="last", augmentation={})
    CHAIN.run(whole)
    assert not (study / "ppo" / "lora").exists()
    assert not (study / "lora").exists()  # of the run before
    base, tuned = load_base(whole), load_tuned(whole)
    assert differing(copied(base.unet), copied(tuned.unet))
    assert differing(copied(base.vae), copied(tuned.vae)) == []
    assert json.loads((study / "report.json").read_text())["augmentation"] is None


# -------------------------------------------------------------------------------------------- skipping and resuming


def test_a_finished_study_is_not_run_again(finished):
    before = marks(finished)
    CHAIN.run(config(finished))
    assert marks(finished) == before


def test_other_settings_run_what_depends_on_them_again(finished):
    models, from_ppo_on = config(finished).classifier_models, ["ppo", "evaluate", "augmentation", "report"]
    expected = {
        "reward_kind": ("share", from_ppo_on),
        "rl_seed": (3, from_ppo_on),
        "num_samples_per_prompt": (3, ["evaluate", "report"]),
        "augmentation_seeds": ([1], ["augmentation", "report"]),
        "sampling_batch_size": (3, []),
        "num_per_prompt": (3, list(STAGES)),
        "unet": ({"norm_num_groups": 2}, ["diffusion", *from_ppo_on]),
        "classifier_models": ({**models, "judge": VIT}, ["classifiers", *from_ppo_on]),
        "output_dir": ("elsewhere", []),
    }
    for field, (value, stages) in expected.items():
        assert stale(config(finished), **{field: value}) == stages, field
    assert stale(config(finished), classifier_models={**models, "augmentation": VIT}) == ["augmentation", "report"]
    assert stale(config(finished), augmentation={}) == ["report"]


def test_settings_of_what_is_given_run_nothing_again(study, tmp_path):
    given = config(tmp_path / "out", **given_models(study), rl_seed=0)
    assert CHAIN.enabled(given) == ["data", "ppo", "evaluate", "augmentation", "report"]
    with_data = ["data", "evaluate", "augmentation", "report"]
    expected = {
        "seed": (5, []),
        "vae": ({"norm_num_groups": 2}, []),
        "classifiers": ({"learning_rate": 0.5}, []),
        "classifier_models": ({"augmentation": VIT}, ["augmentation", "report"]),
        "num_per_prompt": (3, with_data),
        "rare_share": (0.25, with_data),
        "ppo": ({**given.ppo, "learning_rate": 0.5}, ["ppo", "evaluate", "augmentation", "report"]),
    }
    for field, (value, stages) in expected.items():
        assert stale(given, **{field: value}) == stages, field
    before = {name: CHAIN.fingerprint(given, name) for name in CHAIN.enabled(given)}
    (study / "classifiers" / "judge" / "another.txt").touch()  # given models count by what they hold
    changed = [name for name, mark in before.items() if CHAIN.fingerprint(given, name) != mark]
    assert changed == ["ppo", "evaluate", "augmentation", "report"]


@pytest.mark.slow
def test_an_interrupted_study_goes_on_to_the_same_result(study):
    """Killed in PPO after its first checkpoint; what follows was never begun."""
    expected = json.loads((study / "report.json").read_text())
    ppo = {**tiny_text_to_image_study()["ppo"], "save_steps": 1, "save_total_limit": 5}
    shutil.rmtree(study / "ppo")
    CHAIN.run(config(study, ppo=ppo), ["ppo"])
    (study / "ppo" / "stage.json").unlink()
    shutil.rmtree(study / "ppo" / "checkpoint-2")
    shutil.rmtree(study / "ppo" / "lora")
    shutil.rmtree(study / "evaluate")
    CHAIN.run(config(study, ppo=ppo))
    found = json.loads((study / "report.json").read_text())
    for name in ("attribute_match", "fid", "diversity", "kl"):
        assert found[name] == expected[name], name


def test_images_of_a_killed_evaluation_are_kept(study):
    (study / "evaluate" / "stage.json").unlink()
    (study / "evaluate" / "after.safetensors").unlink()
    before = (study / "evaluate" / "before.safetensors").stat().st_mtime_ns
    expected = json.loads((study / "report.json").read_text())["attribute_match"]
    assert CHAIN.run(config(study), ["evaluate"])["attribute_match"] == expected
    assert (study / "evaluate" / "before.safetensors").stat().st_mtime_ns == before


# ------------------------------------------------------------------------------------------------------ given models


def test_a_release_loads_and_a_study_s_file_may_name_it_by_a_path_of_its_own(finished, tmp_path):
    write_release(config(finished), tmp_path / "release")
    released = load_base(config(tmp_path / "out", pretrained_model_name_or_path=str(tmp_path / "release")))
    trained, loaded = load_base(config(finished)).unet.state_dict(), released.unet.state_dict()
    assert all(torch.equal(loaded[name], value.half().float()) for name, value in trained.items())
    assert "Not for clinical use" in (tmp_path / "release" / "README.md").read_text()
    assert str(finished) not in "".join(path.read_text() for path in (tmp_path / "release").rglob("*.json"))
    given = config(finished, fid_extractor=str(finished / "classifiers" / "features"))
    write_release(given, tmp_path / "other")
    assert sorted(path.name for path in (tmp_path / "other").glob("classifier_*")) == [
        "classifier_judge",
        "classifier_reward",
    ]
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "study.yaml"
    places = {
        "pretrained_model_name_or_path": "../release",
        **{f"{role}_classifier": f"../release/classifier_{role}" for role in ("reward", "judge")},
        "fid_extractor": "../release/classifier_features",
    }
    file.write_text(yaml.safe_dump({**tiny_text_to_image_study(), **places}))
    found = parse_text_to_image("ppo", file, ["--output_dir", str(tmp_path / "out")])
    assert found.pretrained_model_name_or_path == str(tmp_path / "release")
    assert found.trained_classifiers == []
    assert load_match(found, "judge").model.config.model_type == "convnext"


@pytest.mark.parametrize("dataset", [None, "dermoscopy"])
def test_the_card_of_a_release_of_a_given_pipeline_claims_nothing_for_it(dataset, tmp_path):
    tiny_text_to_image().save_pretrained(tmp_path / "base")
    if dataset:
        (tmp_path / "base" / "README.md").write_text(f"---\ndatasets:\n- {dataset}\n---\n")
    classifiers = {f"{role}_classifier": f"somebody/{role}" for role in ("reward", "judge")}
    base = {"pretrained_model_name_or_path": str(tmp_path / "base"), "fid_extractor": "inception"}
    write_release(config(tmp_path / "out", **base, **classifiers), tmp_path / "release")
    metadata = metadata_load(tmp_path / "release" / "README.md")
    assert metadata.get("datasets") == ([dataset] if dataset else None)
    assert metadata["license"] == "unknown"
    card = (tmp_path / "release" / "README.md").read_text()
    assert "A StableDiffusionPipeline of diffusers, made from the pipeline `base`.\n" in card
    assert "trained on images alone" not in card
    assert ("no person's data" in card) == (dataset == "dermoscopy")
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fid_extractor": "nowhere"}, "nowhere"),
        ({"sampler": {"num_inference_steps": 61}}, "61 steps of .* end below zero"),
        ({"sampler": {"num_inference_steps": 2000}}, "can't take 2000 steps"),
    ],
)
def test_what_could_not_be_measured_is_refused_before_the_rollouts(changes, message, study):
    given = config(study, ppo={**config(study).ppo, "seed": 5}, **changes)  # not done yet
    with pytest.raises(InputError, match=message):
        CHAIN.run(given, CHAIN.up_to("ppo"))
    assert not (study / "ppo" / "log.jsonl").exists()


@pytest.mark.slow
def test_given_models_are_used_and_not_trained(finished, tmp_path):
    # the pipeline's size rules
    given = config(tmp_path / "out", **given_models(finished), image_size=64, augmentation={})
    assert CHAIN.enabled(given) == ["data", "ppo", "evaluate", "report"]
    CHAIN.run(given)
    assert load_split(given, "train").image_size == IMAGE_SIZE
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["given"]["pretrained_model_name_or_path"] == "pipeline_standard"
    assert not (tmp_path / "out" / "pipeline_standard").exists()
    assert (tmp_path / "out" / "lora" / LORA_FILE).is_file()
    expected = json.loads((finished / "report.json").read_text())
    assert content["attribute_match"] == expected["attribute_match"]  # the same models, the same seeds
