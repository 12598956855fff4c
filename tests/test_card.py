"""Model cards: every figure is the report's, the metadata are valid, and what was not measured is said."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from huggingface_hub import ModelCard, metadata_load
from safetensors.torch import save_file
from tiny import tiny_phantoms, tiny_pipeline, tiny_stable_diffusion, tiny_unet

from msrl_diffusers import SliceRewardModel, VolumeFeatureExtractor
from msrl_diffusers.cli import card as card_verb
from msrl_diffusers.errors import InputError
from msrl_diffusers.hub import NO_AUDIT, render_card
from msrl_diffusers.hub.cards import UNKNOWN_TERMS
from msrl_diffusers.study import StudyConfig, release
from msrl_diffusers.study.chain import fingerprint


ROOT = Path(__file__).parents[1]
RELEASE = ROOT / "model_cards" / "phantoms-32"
REPORTS = sorted((ROOT / "examples" / "results").glob("phantoms-*-seed*.json"))
REPORT = json.loads((ROOT / "examples" / "results" / "phantoms-demo-seed0.json").read_text())
AUDIT = {
    "n_generated": 50,
    "n_train": 40,
    "n_copies": 3,
    "interval": [0.0125, 0.1655],
    "expected_false_positives": 1.25,
    "null": {"kind": "leave_one_out", "n": 40},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "pipeline_rl"
    tiny_pipeline().save_pretrained(folder)
    return folder


def metadata_of(card, tmp_path):
    (tmp_path / "README.md").write_text(card)
    return metadata_load(tmp_path / "README.md")


def test_every_figure_is_the_report_s(folder):
    card = render_card(REPORT, folder, name="somebody/brains")
    fid, interval = REPORT["fid"]["judge"]["rl"]["all"], REPORT["fid_interval"]["judge"]["rl"]
    assert f"| **after reinforcement learning** | {fid:.4f} ({interval[0]:.4f} .. {interval[1]:.4f}) | " in card
    assert f"| before reinforcement learning | {REPORT['fid']['label']['standard']['all']:.4f} (" in card
    change = REPORT["fid_rl_minus_standard"]["judge"]
    low, high = change["interval"]
    word = "no diff" if low <= 0 <= high else "better" if high < 0 else "worse"
    assert f"paired: {change['value']:+.4f} ({low:+.4f} .. {high:+.4f}), {word}" in card
    found = REPORT["memorization"]["rl"]
    assert f"{found['n_copies']} of {found['n_generated']} generated volumes look like copies" in card
    low, high = (f"{100 * bound:.1f} %" for bound in found["interval"])
    assert f"(95 % interval {low} to\n{high}; at most about {found['expected_false_positives']:.1f} would be" in card
    assert f"{REPORT['n']['all']} volumes on each side of a distance, seed {REPORT['seed']}" in card
    for value in (REPORT["commit"], REPORT["data_fingerprint"], REPORT["extractors"]["judge"]["sha256"]):
        assert f"`{value}`" in card
    other = json.loads(json.dumps(REPORT))
    other["fid"]["judge"]["rl"]["all"] = 0.7654321
    other["memorization"]["rl"]["n_copies"] = 77
    changed = render_card(other, folder, name="somebody/brains")
    assert "| 0.7654 (" in changed
    assert f"77 of {found['n_generated']} generated" in changed
    for interval, word in (
        ([-1.0, 1.0], "no difference beyond the interval"),
        ([-2.0, -1.0], "better"),
        ([1.0, 2.0], "worse"),
    ):
        other["fid_rl_minus_standard"]["judge"] = {"value": sum(interval) / 2, "interval": interval}
        assert f"{interval[1]:+.4f}), {word}." in render_card(other, folder)


def test_what_a_card_must_say(folder):
    card = render_card(REPORT, folder, name="somebody/brains")
    assert "**Not for clinical use.**" in card
    assert "the package `msrl_diffusers`, which is not on PyPI: install it as its README says" in card
    assert 'MedVolumePipeline.from_pretrained("somebody/brains")' in card
    assert 'DiffusionPipeline.from_pretrained("somebody/brains", trust_remote_code=True)' in card
    sampler = REPORT["samplers"][REPORT["chosen"]["rl"].split(" @ ")[1]]
    call = ", ".join(f"{name}={sampler[name]}" for name in ("num_inference_steps", "eta", "guidance_scale"))
    assert f'pipe("HGG", {call}, output_type="nifti")' in card
    sections = [line.removeprefix("## ") for line in card.splitlines() if line.startswith("## ")]
    assert sections == [
        "How to load", "Intended use", "Training data", "Results", "Memorization", "Limitations", "Origin"
    ]  # fmt: skip
    assert "no person's data" in card
    assert NO_AUDIT not in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


def test_the_metadata(folder, tmp_path, monkeypatch):
    card = render_card(REPORT, folder, name="somebody/brains", base_model="somebody/base")
    metadata = metadata_of(card, tmp_path)
    assert metadata["library_name"] == "diffusers"
    assert metadata["pipeline_tag"] == "unconditional-image-generation"
    assert metadata["license"] == "apache-2.0"
    assert metadata["datasets"] == ["phantoms"]
    assert metadata["base_model"] == "somebody/base"
    assert metadata["base_model_relation"] == "finetune"
    assert {"medical", "mri", "3d", "msrl_diffusers", "not-for-clinical-use", "ppo"} <= set(metadata["tags"])
    (model,) = metadata["model-index"]
    assert model["name"] == "brains"
    results = ModelCard(card).data.eval_results  # read back by the Hub's own reader
    found = {(r.metric_type, r.metric_args.get("extractor"), r.dataset_split): r for r in results}
    judge = found["fid", "VolumeFeatureExtractor", "train"]
    assert judge.metric_value == REPORT["fid"]["judge"]["rl"]["all"]
    assert judge.metric_args["interval"] == REPORT["fid_interval"]["judge"]["rl"]
    assert judge.metric_args["num_volumes"] == REPORT["n"]["all"]
    assert judge.dataset_args == {"fingerprint": REPORT["data_fingerprint"]}
    assert found["kid", "SliceFeatureExtractor", "train"].metric_value == REPORT["kid"]["label"]["rl"]
    heldout = found["fid", "SliceFeatureExtractor", "held-out"]
    assert heldout.metric_value == REPORT["fid_heldout"]["label"]["rl"]["all"]
    copies = REPORT["memorization"]["rl"]
    assert found["memorization_rate", None, "train"].metric_value == copies["n_copies"] / copies["n_generated"]
    assert set(metadata["metrics"]) == {"fid", "kid", "memorization_rate"}
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "cache")
        ModelCard(card).validate()
        assert hub.count("POST", "/api/validate-yaml") == 1


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("arm", ["rl", "standard"])
def test_every_published_report_has_a_card(path, arm, tmp_path):
    report = json.loads(path.read_text())
    card = render_card(report, RELEASE, arm=arm)
    values = [result.metric_value for result in ModelCard(card).data.eval_results]
    assert report["fid"]["judge"][arm]["all"] in values
    assert (NO_AUDIT in card) == (report.get("memorization") is None)
    assert ("reinforcement-learning" in metadata_of(card, tmp_path)["tags"]) == (arm == "rl")
    assert card.endswith("\n")
    assert not any(line != line.rstrip() for line in card.splitlines())


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("frechet", "with the Frechet distance to the training volumes as the loss"),
        ("ddo", "by discriminative self-play"),
    ],
)
def test_what_no_reward_tuned_is_not_said_to_be_rewarded(folder, method, sentence, tmp_path):
    report = {
        **REPORT,
        "method": method,
        "rewarded": False,
        "frechet_features": ["label"] if method == "frechet" else [],
    }
    card = render_card(report, folder)
    assert f"It was fine-tuned {sentence}" in card
    assert "| **after fine-tuning** |" in card
    assert "einforcement" not in card.split("Made with")[0]
    assert "learned reward" not in card
    assert ("chose samplers, and this distance was the loss." in card) == (method == "frechet")
    assert metadata_of(card, tmp_path)["tags"][-2:] == ["fine-tuning", method]


def test_pretrained_weights_that_were_kept_are_not_said_to_be_tuned(folder):
    assert "It was fine-tuned by" in render_card({**REPORT, "ppo": {"kept_after": 3}}, folder)
    card = render_card({**REPORT, "ppo": {"kept_after": 0}}, folder)
    assert "Its weights are those from before reinforcement learning: of what was looked at none was better." in card
    assert "It was fine-tuned" not in card


def test_the_arm_is_told_or_asked_for(folder):
    assert "**after reinforcement learning**" in render_card(REPORT, folder)
    with pytest.raises(InputError, match="say by --arm standard or --arm rl which of them"):
        render_card(REPORT, RELEASE)
    with pytest.raises(InputError, match="arm must be rl or standard, got 'both'"):
        render_card(REPORT, RELEASE, arm="both")


def test_prepared_data_have_the_terms_of_what_was_prepared(folder, tmp_path):
    report = {**REPORT, "dataset": "prepared", "data": {**REPORT["data"], "dataset": "brats2019"}}
    card = render_card(report, folder)
    assert "BraTS (2019, or another release in its layout): " in card
    assert "Handed out by its organizers to registered users" in card
    metadata = metadata_of(card, tmp_path)
    assert (metadata["datasets"], metadata["license"]) == (["brats2019"], "unknown")
    assert ModelCard(card).data.eval_results[0].dataset_name.startswith("BraTS (2019")
    report["data"]["dataset"] = "prepared"
    assert "A folder of images" in render_card(report, folder)


def test_an_audit_goes_before_the_report(folder):
    card = render_card(REPORT, folder, audit=AUDIT)
    assert "3 of 50 generated volumes look like copies of one of 40 training volumes (95 % interval 1.2 % to" in card
    assert "16.6 %; at most about 1.2 would be flagged by chance" in card
    assert "40 training volumes, each against the others" in card
    with pytest.raises(InputError, match="lacks its figures"):
        render_card(REPORT, folder, audit={"n_copies": 1})


def test_a_report_of_its_own_parts_only(folder, tmp_path):
    """What the report lacks, the card lacks: no figure, no table, no entry of the model index."""
    card = render_card({"dataset": "oasis1", "seed": 4}, folder)
    assert "No report was given with this card." in card
    assert NO_AUDIT in card
    assert "OASIS-1." in card
    assert "data use agreement" in card
    metadata = metadata_of(card, tmp_path)
    assert metadata["license"] == "unknown"
    assert "model-index" not in metadata
    assert "metrics" not in metadata
    partial = {name: REPORT[name] for name in ("n", "fid", "extractors")}
    card = render_card(partial, folder)
    assert f"| **after reinforcement learning** | {REPORT['fid']['judge']['rl']['all']:.4f} |  |  |" in card
    card = render_card({"downstream": {"real | own": {"auc": 0.75, "f1": 0.5}}, **partial}, folder)
    assert "| real \\| own | 0.750 | 0.500 |" in card


@pytest.mark.parametrize(
    "report", [{"fid": {"judge": {}}}, {"fid": 3}, {"reward_models": {"volume": {}}}, {"data": 1}]
)
def test_a_report_of_something_else(folder, report):
    with pytest.raises(InputError, match="The report lacks figures that a card needs"):
        render_card(report, folder)


def test_terms_and_license_can_be_stated(folder, tmp_path):
    unknown = render_card({"dataset": "nifti_folder"}, folder)
    assert "The terms of these data were not stated" in unknown
    card = render_card({"dataset": "nifti_folder"}, folder, license="cc-by-4.0", data_terms="Every subject agreed.")
    assert "Every subject agreed." in card
    assert "not stated" not in card
    assert metadata_of(card, tmp_path)["license"] == "cc-by-4.0"


def test_the_sampler_of_the_scores(folder, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "release")
    scores = {"samplers": [{"num_inference_steps": 7, "eta": 0.5, "fid": {}}], "best_sampler": 0}
    (tmp_path / "release" / "scores.json").write_text(json.dumps(scores))
    assert "num_inference_steps=7, eta=0.5, guidance_scale=1.0" in render_card(None, tmp_path / "release")
    assert "num_inference_steps=25, eta=1.0, guidance_scale=1.0" in render_card(None, folder)


def test_cards_of_models_and_adapters(tmp_path):
    SliceRewardModel(block_out_channels=(8, 8)).save_pretrained(tmp_path / "reward")
    VolumeFeatureExtractor(block_out_channels=(8, 8)).save_pretrained(tmp_path / "judge")
    tiny_unet().save_pretrained(tmp_path / "unet")
    reward = render_card(REPORT, tmp_path / "reward", arm="rl")
    assert 'SliceRewardModel.from_pretrained("reward")' in reward
    assert "a reward model of axial slices" in reward
    auc, spearman = (REPORT["reward_models"]["slice"][name] for name in ("auc", "spearman"))
    assert f"| slice | {auc:.3f} | {spearman:.3f} |" in reward
    assert "| Spearman over the volumes of all sets |" in reward  # not `set_spearman`, over the sets' means
    assert "FID" not in reward  # it generates nothing
    assert "pipeline_tag" not in metadata_of(reward, tmp_path)
    judge = metadata_of(render_card(None, tmp_path / "judge"), tmp_path)
    assert judge["pipeline_tag"] == "image-feature-extraction"
    assert 'UNet3DModel.from_pretrained("unet")' in render_card(None, tmp_path / "unet")
    for prefix, call in (("", "pipe.unet.load_lora_adapter("), ("unet.", "pipe.load_lora_weights(")):
        folder = tmp_path / f"adapter{prefix}"
        folder.mkdir()
        weights = {f"{prefix}mid.to_q.lora_A.weight": tiny_unet().conv_in.weight.detach()}
        if prefix:  # what says which component it is for may also be for another
            weights["text_encoder.q_proj.lora_A.weight"] = torch.ones(1)
        save_file(weights, folder / "pytorch_lora_weights.safetensors")
        card = render_card(None, folder, name="somebody/lora", base_model="somebody/base")
        assert f'{call}"somebody/lora", weight_name="pytorch_lora_weights.safetensors"' in card
        assert metadata_of(card, tmp_path)["base_model_relation"] == "adapter"
        assert "lora" in metadata_of(card, tmp_path)["tags"]


def test_a_card_of_images_speaks_of_images(tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path / "pipeline")
    card = render_card({"dataset": "dermoscopy"}, tmp_path / "pipeline")
    assert "Generated images show no real patients" in card
    assert f"{NO_AUDIT} It may reproduce training images." in card
    assert "after *RL4Med-DDPO*" in card
    assert "2603.06173" not in card
    # somebody else's, tuned on prompts of drawn images
    base = {"pretrained_model_name_or_path": "somebody/stable-diffusion"}
    given = render_card({"data": {"dataset": "dermoscopy"}, "given": base}, tmp_path / "pipeline", arm="rl")
    assert UNKNOWN_TERMS in given
    assert "Drawn" not in given


def adapter_of_images(folder, base_model):
    """A LoRA adapter with what a text-to-image study says of it."""
    folder.mkdir()
    save_file({"unet.mid.to_q.lora_A.weight": torch.zeros(2, 2)}, folder / "pytorch_lora_weights.safetensors")
    facts = {"pipeline_tag": "text-to-image", "base_model": base_model, "dataset": "dermoscopy", "results": {}}
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder


def test_the_card_of_an_adapter_of_images(tmp_path):
    folder = adapter_of_images(tmp_path / "lora", "somebody/stable-diffusion")
    card = render_card(None, folder)
    metadata = metadata_of(card, tmp_path)
    assert (metadata["pipeline_tag"], metadata["base_model"]) == ("text-to-image", "somebody/stable-diffusion")
    assert (metadata["datasets"], metadata["license"]) == (["dermoscopy"], "unknown")  # that of the base
    assert metadata["tags"] == ["msrl_diffusers", "not-for-clinical-use", "lora"]
    assert "Drawn dermoscopy images." in card
    assert "They are in `facts.json`." in card
    assert "to be loaded into [somebody/stable-diffusion](https://huggingface.co/somebody/stable-diffusion)." in card
    assert not any(word in card for word in ("2603.06173", "MRI", "volumes"))
    other = render_card(None, folder, base_model="somebody/other")
    assert metadata_of(other, tmp_path)["base_model"] == "somebody/other"
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps({**facts, "dataset": None}))
    unknown = render_card({"data": {"dataset": "dermoscopy"}}, folder)  # what distances are to
    assert "datasets" not in metadata_of(unknown, tmp_path)
    assert UNKNOWN_TERMS in unknown
    (folder / "facts.json").write_text(json.dumps(facts))
    data = {"prompts": 2, "train": {"images": 5}, "heldout": {"images": 3}, "fingerprint": "abc"}
    drawn = render_card({"data": {**data, "dataset": "dermoscopy"}}, folder)
    assert "Drawn dermoscopy images: 5 training and 3 held-out images, fingerprint `abc`." in drawn
    photos = render_card({"data": {**data, "dataset": "image_folder"}}, folder)  # which did not train the adapter
    assert "Drawn dermoscopy images.\n" in photos
    assert "held-out images" not in photos
    assert "abc" not in photos
    beside = render_card(None, adapter_of_images(tmp_path / "lora2", "pipeline_standard"))
    assert "base_model" not in metadata_of(beside, tmp_path)  # a folder, which the Hub does not know
    assert "made for the pipeline `pipeline_standard`." in beside


@pytest.mark.parametrize("known", [True, False])
def test_the_report_of_a_text_to_image_study(known, tmp_path):
    report = json.loads((ROOT / "examples" / "results" / "dermoscopy-seed3.json").read_text())
    report["data"] |= {"dataset": "dermoscopy"} if known else {}  # as studies write it now
    card = render_card(report, adapter_of_images(tmp_path / "lora", "pipeline_standard"), arm="rl")
    train, heldout = (report["data"][split]["images"] for split in ("train", "heldout"))
    assert f"Drawn dermoscopy images: {train} training and {heldout} held-out images, fingerprint" in card
    assert f"Seed {report['seed']}." in card
    assert "from what a classifier finds of what a prompt states." in card
    assert "FID" not in card
    assert metadata_of(card, tmp_path)["tags"][-3:] == ["reinforcement-learning", "ppo", "lora"]
    tiny_stable_diffusion().save_pretrained(tmp_path / "pipeline_standard")
    assert "They are in the study's `report.json`." in render_card(report, tmp_path / "pipeline_standard")


def test_the_verb(folder, tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "audit.json").write_text(json.dumps(AUDIT))
    options = [
        "--report",
        str(tmp_path / "report.json"),
        "--output",
        str(tmp_path / "out.md"),
        "--repo_id",
        "somebody/x",
    ]
    card_verb.run([str(folder), *options])
    assert capsys.readouterr().out == f"Card: {tmp_path / 'out.md'}\n"
    assert (tmp_path / "out.md").read_text() == render_card(REPORT, folder, name="somebody/x")
    assert not (folder / "README.md").exists()
    card_verb.run([str(folder), *options[:2], "--audit", str(tmp_path / "audit.json"), "--data_terms", "Mine."])
    card = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    assert "3 of 50 generated" in card
    assert "Mine." in card
    assert 'from_pretrained("pipeline_rl")' in card
    with pytest.raises(InputError, match=r"nowhere\.json can't be read"):
        card_verb.run([str(folder), "--report", "nowhere.json"])


def test_class_names_are_data(folder, tmp_path):
    """A class or a data set that looks like YAML or Markdown spoils neither the metadata nor the code."""
    tiny_pipeline().save_pretrained(tmp_path / "odd")
    index = json.loads((tmp_path / "odd" / "model_index.json").read_text())
    index["id2label"] = {"0": 'a "quoted" | class', "1": "b: [c]"}
    (tmp_path / "odd" / "model_index.json").write_text(json.dumps(index))
    card = render_card({"dataset": "x: {y", "data_fingerprint": "# z"}, tmp_path / "odd")
    assert yaml.safe_load(card.split("---")[1])["datasets"] == ["x: {y"]
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'a \\"quoted\\" | class' in code or "a \\u0022quoted" in code


def test_the_card_of_a_release(tmp_path, monkeypatch):
    prepared = {"train": {"a": 5, "b": 6}, "heldout": {"a": 3, "b": 4}, "shape": [1, 16, 16, 16], "fingerprint": "abc"}
    config = StudyConfig(output_dir=str(tmp_path), seed=3)
    for stage in ("prepare", "extractors", "vqgan", "diffusion", "samplers", "score", "rewards"):
        (tmp_path / stage).mkdir()
        record = {"fingerprint": fingerprint(config, stage), "result": prepared}
        (tmp_path / stage / "stage.json").write_text(json.dumps(record))
    tiny_phantoms().save(tmp_path / "prepare" / "train.safetensors")
    samplers = {"samplers": [{"num_inference_steps": 9, "eta": 0.0, "guidance_scale": 2.0}], "best_sampler": 0}
    rewards = {"slice": SliceRewardModel(block_out_channels=(8, 8))}
    for name, value in (
        ("pipeline", tiny_pipeline()),
        ("scores", {}),
        ("samplers", samplers),
        ("reward_models", rewards),
        ("extractors", {}),
    ):
        monkeypatch.setattr(release, f"load_{name}", lambda config, value=value: value)
    release.write_release(config, tmp_path / "release")
    card = (tmp_path / "release" / "README.md").read_text()
    assert "Phantoms: 5 + 6 training and 3 + 4 held-out volumes of the\nclasses a, b, fingerprint `abc`." in card
    assert "num_inference_steps=9, eta=0.0, guidance_scale=2.0" in card
    assert "volumes of 16 x 16 x 16 voxels, 12 x 12 x 12 mm each." in card
    assert "before any reinforcement learning" in card
    assert "| `reward_slice` | reward model of axial slices |" in card
    assert "Seed 3.\nVersions: python " in card
    assert NO_AUDIT in card
    assert ModelCard(card).data.license == "apache-2.0"


def test_the_release_of_the_repository_has_what_a_card_needs():
    card = (RELEASE / "README.md").read_text()
    assert "Not for clinical use" in card
    assert "of 512 generated volumes look like" in card
    assert NO_AUDIT not in card
    assert ModelCard(card).data.library_name == "diffusers"
