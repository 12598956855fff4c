"""What is not shared on the Hub: private names, folders without an audit, what can not be read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ModelMixin
from hub_scene import AUDIT, NAME, commits, run_verb, same_weights, stored
from hub_server import HubServer
from peft import LoraConfig
from safetensors.torch import save_file
from tiny import tiny_pipeline, tiny_stable_diffusion

from msrl_diffusers import (
    UNet3DModel,
    VQModel3D,
)
from msrl_diffusers.cli.card import run as write_card
from msrl_diffusers.errors import InputError
from msrl_diffusers.hub import NO_AUDIT, push_folder, render_card
from msrl_diffusers.trainers.lora import save_lora


# Warnings are errors here; these are of diffusers and huggingface_hub about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]


def test_private_unless_said_otherwise(hub, folder, capsys):
    code, output, _ = run_verb([folder, "--repo_id", NAME], capsys)
    assert code == 0
    assert f"{NAME} (private): {hub.url}/{NAME}/commit/" in output
    assert hub.repositories[NAME]["private"] is True
    code, output, _ = run_verb([folder, "--repo_id", "somebody/seen", "--public"], capsys)
    assert "(public)" in output
    assert hub.repositories["somebody/seen"]["private"] is False


def test_a_public_repository_is_not_pushed_to_by_accident(monkeypatch, folder, tmp_path):
    with HubServer(public=("somebody/seen",)) as hub:
        hub.connect(monkeypatch, tmp_path / "cache")
        with pytest.raises(InputError, match="somebody/seen exists and is public; say so"):
            push_folder(folder, "somebody/seen")
        assert commits(hub, "somebody/seen") == 0
        push_folder(folder, "somebody/seen", private=False)
        assert commits(hub, "somebody/seen") == 1


def test_the_audit_that_is_asked_for_is_of_the_variant(hub, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(InputError, match=r"run `msrl audit TRAIN .*half --variant fp16 --held_out OTHER"):
        push_folder(tmp_path / "half", NAME)


def test_no_push_without_an_audit(hub, folder, tmp_path, capsys):
    (folder / "audit.json").unlink()
    code, _, errors = run_verb([folder, "--repo_id", NAME], capsys)
    assert code == 1
    assert "has no audit of memorization" in errors
    assert "--without_audit" in errors
    assert hub.requests == []
    for content in ({"fid": {}, "memorization": None}, {"memorization": {"rl": AUDIT}}):
        (folder / "report.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match="has no audit of memorization"):
            push_folder(folder, NAME, arm="standard")
    (folder / "report.json").unlink()
    code, _, _ = run_verb([folder, "--repo_id", NAME, "--without_audit"], capsys)
    assert code == 0
    assert NO_AUDIT in stored(hub)["README.md"].decode()


def test_no_audit_is_asked_for_where_none_can_be_made(hub, tmp_path):
    """Of images: of a pipeline, and of an adapter without facts about it."""
    pipeline = tiny_stable_diffusion()
    pipeline.save_pretrained(tmp_path / "sd")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    save_lora(pipeline, tmp_path / "lora")
    for place in ("sd", "lora"):
        with pytest.raises(
            InputError, match=r"has no audit of memorization, and .* volumes only: say --without_audit"
        ):
            push_folder(tmp_path / place, NAME)
        push_folder(tmp_path / place, f"somebody/{place}", without_audit=True)
        assert "pipeline_tag: text-to-image" in stored(hub, f"somebody/{place}")["README.md"].decode()


def test_an_audit_from_elsewhere(hub, folder, tmp_path):
    (folder / "audit.json").unlink()
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps(AUDIT))
    push_folder(folder, NAME, audit=elsewhere)
    assert "2 of 64 generated volumes look like copies" in stored(hub)["README.md"].decode()
    elsewhere.write_text(json.dumps({"memorization": {"rl": {**AUDIT, "n_copies": 5}, "standard": AUDIT}}))
    with pytest.raises(InputError, match="say by --arm"):
        push_folder(folder, "somebody/tuned", audit=elsewhere)
    push_folder(folder, "somebody/tuned", audit=elsewhere, arm="rl")
    assert "5 of 64 generated volumes" in stored(hub, "somebody/tuned")["README.md"].decode()
    for content, words in (("{}", "lacks its figures"), ("[1]", "must hold a JSON mapping"), ("{", "no valid JSON")):
        elsewhere.write_text(content)
        with pytest.raises(InputError, match=words):
            push_folder(folder, NAME, audit=elsewhere)
    with pytest.raises(InputError, match="can't be read"):
        push_folder(folder, NAME, audit=tmp_path / "missing.json")


def test_names_of_subjects_and_paths_stay_here(hub, folder, capsys):
    (folder / "audit").mkdir()
    for name in (
        "audit.html",
        "closest_pairs.png",
        "generated.safetensors",
        "audit/audit.md",
        "audit/closest_pairs.png",
    ):
        (folder / name).write_text("patient-17")
    (folder / "audit" / "audit.json").write_text((folder / "audit.json").read_text())
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "_name_or_path": "/data/patients/unet"}))
    _, output, _ = run_verb([folder, "--repo_id", NAME], capsys)
    assert output.startswith(
        "Not shared, as they show or name training volumes: audit.html, audit/audit.md, audit/closest_pairs.png, clo"
    )
    assert "audit/audit.json" in stored(hub)
    for name, content in stored(hub).items():
        assert b"patient-" not in content, name
        assert b"/data/" not in content, name
    audit = json.loads(stored(hub)["audit.json"])
    assert audit["n_copies"] == 2
    assert audit["null"] == {"kind": "held_out", "n": 30}


def test_a_card_of_one_s_own_stays(hub, folder):
    card = '---\nlicense: mit\n---\n\n# Mine\n\n`MedVolumePipeline.from_pretrained("pipeline")`\n'
    shared = card.replace('"pipeline"', '"somebody/brains"')
    (folder / "README.md").write_text(card)
    push_folder(folder, NAME)
    assert (
        stored(hub)["README.md"]
        .decode()
        .startswith(f"{shared}\n## Memorization\n\n2 of 64 generated volumes look like")
    )
    (folder / "README.md").write_text(f"{card}\n## Memorization\n\nThree copies.\n")
    push_folder(folder, NAME)
    assert stored(hub)["README.md"].decode() == f"{shared}\n## Memorization\n\nThree copies.\n"
    with pytest.raises(InputError, match=r"README\.md is there already, so --license has no effect"):
        push_folder(folder, NAME, license="mit")
    (folder / "README.md").write_text(card)
    (folder / "audit.json").unlink()
    push_folder(folder, NAME, without_audit=True)
    assert stored(hub)["README.md"].decode() == f"{shared}\n## Memorization\n\n{NO_AUDIT}\n"
    (folder / "README.md").write_text(card + NO_AUDIT)
    push_folder(folder, NAME, without_audit=True)
    assert stored(hub)["README.md"].decode() == shared + NO_AUDIT
    (folder / "audit.json").write_text(json.dumps(AUDIT))
    with pytest.raises(InputError, match="says that memorization was not audited, but there is an audit"):
        push_folder(folder, NAME)


def test_an_audit_takes_the_place_of_the_package_s_words_that_there_was_none(hub, folder, tmp_path):
    """As of a release: what else its card says stands nowhere else."""
    (folder / "audit.json").unlink()
    data = {"train": {"a": 5}, "heldout": {"a": 3}, "fingerprint": "abc"}
    facts = {"dataset": "phantoms", "data": data, "seed": 7, "commit": "0123abc", "versions": {"torch": "2.0"}}
    card = render_card(facts, folder, name=NAME, arm="standard")
    (folder / "README.md").write_text(card)
    audit = tmp_path / "audit.json"
    audit.write_text(json.dumps(AUDIT))
    push_folder(folder, NAME, audit=audit)
    pushed = stored(hub)["README.md"].decode()
    before, after = card.split(f"{NO_AUDIT} It may reproduce training volumes.")
    assert pushed.startswith(f"{before}2 of 64 generated volumes look like copies of one of 32 training volumes")
    assert pushed.endswith(f"nor is no flag a proof of privacy.{after}")
    assert (folder / "README.md").read_text() == card
    mine = "# Mine\n\n## Memorization\n\n"
    (folder / "README.md").write_text(f"{mine}{NO_AUDIT}\n")  # as a push without an audit adds it
    push_folder(folder, NAME, audit=audit)
    assert stored(hub)["README.md"].decode().startswith(f"{mine}2 of 64 generated volumes look like")
    for changed in (
        card.replace(NO_AUDIT, f"{NO_AUDIT} We will."),
        card.replace("training volumes.\n\n## Lim", "training volumes.\n\nAsk us.\n\n## Lim"),
        card.replace("## Memorization", "## Copies"),
    ):
        assert changed != card
        (folder / "README.md").write_text(changed)
        with pytest.raises(InputError, match="says that memorization was not audited, but there is an audit"):
            push_folder(folder, NAME, audit=audit)


def test_metadata_that_can_t_be_read(hub, folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(InputError, match=r"The metadata on top of .*README\.md can't be read"):
        push_folder(folder, NAME)
    assert hub.requests == []
    (folder / "README.md").write_text("---\nlicense: 3\n---\n")  # only the Hub finds fault with it
    with pytest.raises(InputError, match=r'Invalid metadata in README\.md. "license" must be a string'):
        push_folder(folder, NAME)
    assert commits(hub) == 0


def inject_adapter(folder):
    unet = UNet3DModel.from_pretrained(folder / "unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    ModelMixin.save_pretrained(unet, folder / "unet")  # the class' own refuses


def lose_component(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vqvae": [None, None]}))


def cut_weights(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


REFUSED = {
    "pickle": (lambda folder: torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin"), "may hold pickles, which run code"),
    "numpy": (lambda folder: np.save(folder / "volumes.npy", np.zeros(2)), "may hold pickles, which run code"),
    "disguised pickle": (lambda folder: torch.save({}, folder / "model.safetensors"), "is no whole safetensors file"),
    "disguised as JSON": (lambda folder: torch.save({}, folder / "notes.json"), "is no valid JSON"),
    "volumes": (
        lambda folder: save_file({"volumes": torch.zeros(2)}, folder / "train.safetensors"),
        "may hold volumes of patients",
    ),
    "images": (lambda folder: (folder / "a.nii.gz").write_text(""), "is no weights, config, card, picture or JSON"),
    "tables": (lambda folder: (folder / "metadata.csv").write_text(""), "is no weights, config, card, picture or JSON"),
    "code": (lambda folder: (folder / "pipeline.py").write_text("import os"), "is code; remove it"),
    "cut weights": (cut_weights, "is no whole safetensors file"),
    "adapter within": (inject_adapter, "saved with a LoRA adapter in it"),
    "no weights": (
        lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        "has a config but no weights",
    ),
    "a lost component": (lose_component, "The component vqvae of .* was not saved"),
    "no such component": (
        lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(),
        "names the component scheduler, but there is no such folder",
    ),
    "a lost shard": (
        lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}})
        ),
        "names diffusion_pytorch_model-00001-of-00002.safetensors, which is not there; remove this index and save",
    ),
    "a lost shard of a variant": (
        lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors.index.bf16.json").write_text(
            json.dumps({"weight_map": {"a": "diffusion_pytorch_model.bf16-00001-of-00002.safetensors"}})
        ),
        "names diffusion_pytorch_model.bf16-00001-of-00002.safetensors, which is not there",
    ),
    "no model": (
        lambda folder: (folder / "model_index.json").unlink(),
        "holds no pipeline .*, no model .* and no LoRA adapter",
    ),
    "no class": (lambda folder: (folder / "model_index.json").write_text("{}"), "names no class"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_shared(hub, folder, capsys, name):
    spoil, words = REFUSED[name]
    spoil(folder)
    with pytest.raises(InputError, match=words) as caught:
        push_folder(folder, NAME)
    assert "\n" not in str(caught.value)
    assert hub.requests == []  # nothing left this machine
    code, _, errors = run_verb([folder, "--repo_id", NAME], capsys)
    assert code == 1
    assert errors.startswith("error: ")


def test_a_model_of_transformers_goes_with_its_pipeline(hub):
    classifier = Path(__file__).parents[1] / "model_cards" / "dermoscopy-32" / "classifier_judge"
    with pytest.raises(InputError, match="holds a model of transformers, which is not shared alone: share"):
        push_folder(classifier, NAME, without_audit=True)
    assert hub.requests == []


def test_hidden_files_are_passed_over(hub, folder, tmp_path):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret.pkl").write_text("")
    push_folder(folder, NAME)
    assert not any("secret" in name for name in stored(hub))
    with pytest.raises(InputError, match="is no folder"):
        push_folder(tmp_path / "nowhere", NAME)


def test_sharded_weights(hub, tmp_path):
    model = VQModel3D(block_out_channels=(8, 16), latent_channels=2, quantizer="fsq", norm_num_groups=4)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list(Path(tmp_path / "model").glob("*.safetensors"))) > 1
    push_folder(tmp_path / "model", "somebody/shards", without_audit=True)
    same_weights(VQModel3D.from_pretrained("somebody/shards"), model)


def test_a_card_that_states_another_audit_is_refused(hub, folder, tmp_path):
    write_card([str(folder), "--repo_id", "somebody/else"])
    push_folder(folder, NAME)
    assert b'from_pretrained("somebody/brains")' in stored(hub)["README.md"]
    assert b"somebody/else" not in stored(hub)["README.md"]
    other = tmp_path / "audit.json"
    other.write_text(json.dumps({**AUDIT, "n_copies": 0}))
    with pytest.raises(InputError, match=r"another audit of memorization than this one \(0 of 64 generated"):
        push_folder(folder, NAME, audit=other)
    (folder / "README.md").unlink()
    push_folder(folder, NAME, audit=other)
    assert b"0 of 64 generated volumes look like copies" in stored(hub)["README.md"]
