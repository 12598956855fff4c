"""Sharing on the Hub: what is refused, what is sent, how failures end, and that what was pushed loads again."""

import hashlib
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin, StableDiffusionPipeline
from hub_server import HubServer
from huggingface_hub import snapshot_download
from peft import LoraConfig
from safetensors.torch import save_file
from tiny import copied, differing, tiny_pipeline, tiny_stable_diffusion, tiny_unet, tiny_vqvae

from msrl_diffusers import (
    MedVolumePipeline,
    SliceFeatureExtractor,
    SliceRewardModel,
    UNet3DModel,
    VolumeFeatureExtractor,
    VolumeRewardModel,
    VQModel3D,
)
from msrl_diffusers.cli import push as push_verb
from msrl_diffusers.errors import InputError, sentence_instead_of_traceback
from msrl_diffusers.hub import NO_AUDIT, inspect_folder, push_folder
from msrl_diffusers.hub.push import TRIES
from msrl_diffusers.pipelines.remote_code import plain_index, remote_index


# Warnings are errors here; these are of diffusers and huggingface_hub about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]

NAME = "somebody/brains"
AUDIT = {
    "n_generated": 64,
    "n_train": 32,
    "n_copies": 2,
    "interval": [0.004, 0.108],
    "expected_false_positives": 1.5,
    "copies": [{"generated": "made2", "nearest": "patient-17"}],
    "closest": [{"generated": "made2", "nearest": "patient-17"}],
    "null": {"kind": "held_out", "n": 30, "duplicates": [{"volume": "patient-3", "nearest": "patient-4"}]},
    "settings": {"train": "/data/patients"},
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        server.pauses = server.connect(monkeypatch, tmp_path / "cache")
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline's folder with an audit; tests copy it before they write into it."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    (folder / "audit.json").write_text(json.dumps(AUDIT))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return copy_of(saved, tmp_path / "pipeline")


def copy_of(folder, target):
    for path in folder.rglob("*"):
        if path.is_file():
            (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    return target


def state_of(folder):
    """Bytes and times of all files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def stored(hub, name=NAME):
    return hub.repositories[name]["files"]


def commits(hub, name=NAME):
    return len(hub.repositories[name]["commits"]) - 1  # without the one that a new repository has


def same_weights(one, other):
    assert not differing(copied(one), copied(other))


def run_verb(arguments, capsys):
    """`msrl push` as a user runs it: exit code and the two outputs."""
    code = 0
    try:
        with sentence_instead_of_traceback():
            push_verb.run([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


# ------------------------------------------------------------------------------------------------------- push and load


def test_a_pushed_pipeline_loads_by_its_own_class(hub, folder):
    before = state_of(folder)
    pushed = push_folder(folder, NAME)
    assert state_of(folder) == before
    assert pushed.private is hub.repositories[NAME]["private"] is True
    assert pushed.repo_id == NAME
    assert pushed.url.startswith(f"{hub.url}/{NAME}/commit/")
    assert set(pushed.files) == set(stored(hub)) - {".gitattributes"}
    assert commits(hub) == 1
    loaded, kept = MedVolumePipeline.from_pretrained(NAME), MedVolumePipeline.from_pretrained(folder)
    same_weights(loaded.unet, kept.unet)
    same_weights(loaded.vqvae, kept.vqvae)
    assert loaded.id2label == {0: "HGG", 1: "LGG"}
    assert loaded.spacing == (12.0, 12.0, 12.0)
    one, other = (pipe("LGG", 2, generator=torch.Generator().manual_seed(0)).volumes for pipe in (loaded, kept))
    assert torch.equal(one, other)


SCRIPT = """
import sys
from diffusers import DiffusionPipeline
assert not any(name.startswith("msrl_diffusers") for name in sys.modules)
try:
    DiffusionPipeline.from_pretrained("somebody/brains")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("code of a repository was run without trust")
assert not any(name.startswith("msrl_diffusers") for name in sys.modules)
pipe = DiffusionPipeline.from_pretrained("somebody/brains", trust_remote_code=True)

import torch
from msrl_diffusers import MedVolumePipeline
assert type(pipe) is MedVolumePipeline
pipe.set_progress_bar_config(disable=True)
image = pipe("LGG", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="nifti").volumes[0]
image.to_filename(sys.argv[1] + "/trusted.nii.gz")
pipe.save_pretrained(sys.argv[1] + "/again")  # as the package writes it: it needs no trust
own = MedVolumePipeline.from_pretrained("somebody/brains")  # beside the repository's code in the cache: no trust needed
own.set_progress_bar_config(disable=True)
image = own("LGG", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="nifti").volumes[0]
image.to_filename(sys.argv[1] + "/own.nii.gz")
"""


def test_a_pushed_pipeline_loads_with_trust_where_the_package_was_not_imported(hub, folder, tmp_path):
    push_folder(folder, NAME)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pipe = tiny_pipeline()
    expected = pipe("LGG", 2, generator=torch.Generator().manual_seed(0), output_type="nifti").volumes[0]
    for name in ("trusted", "own"):
        image = nib.load(tmp_path / f"{name}.nii.gz")
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert image.header.get_zooms() == (12.0, 12.0, 12.0)
        assert np.allclose(image.get_fdata(), expected.get_fdata(), atol=1e-5)
    same_weights(MedVolumePipeline.from_pretrained(tmp_path / "again").unet, pipe.unet)


def test_the_index_of_a_repository_is_the_package_s_own_to_the_package(folder):
    index = json.loads((folder / "model_index.json").read_text())
    remote, code = remote_index(index)
    assert remote["_class_name"] == ["pipeline", "MedVolumePipeline"]
    assert remote["unet"] == ["msrl_components", "UNet3DModel"]
    assert remote["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert remote["spacing"] == [12.0, 12.0, 12.0]
    assert set(code) == {"pipeline.py", "unet/msrl_components.py", "vqvae/msrl_components.py"}
    assert plain_index(remote) == plain_index(index) == index
    (folder / "model_index.json").write_text(json.dumps(remote))
    assert MedVolumePipeline.load_config(folder) == index


def test_a_repository_can_be_pushed_on(hub, folder, tmp_path):
    push_folder(folder, NAME)
    snapshot_download(NAME, local_dir=tmp_path / "copy")
    push_folder(tmp_path / "copy", "somebody/copy")
    ours, theirs = stored(hub, "somebody/copy"), stored(hub)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in theirs if name != "README.md")
    assert b'from_pretrained("somebody/copy")' not in theirs["README.md"]


def test_pushing_the_same_again_commits_nothing(hub, folder):
    first = push_folder(folder, NAME)
    uploads = hub.count("PUT", "/lfs/")
    assert push_folder(folder, NAME).url == first.url
    assert commits(hub) == 1
    assert hub.count("PUT", "/lfs/") == uploads


def test_a_branch_of_its_own(hub, folder):
    push_folder(folder, NAME, revision="v2")
    assert set(stored(hub)) == {".gitattributes"}
    same_weights(MedVolumePipeline.from_pretrained(NAME, revision="v2").unet, tiny_unet())
    push_folder(folder, NAME, revision="v2")  # the branch is there now
    assert commits(hub) == 1


def test_a_name_without_an_owner(hub, folder):
    pushed = push_folder(folder, "brains")
    assert pushed.repo_id == NAME
    assert b'from_pretrained("somebody/brains")' in stored(hub)["README.md"]
    assert b'from_pretrained("brains")' not in stored(hub)["README.md"]


@pytest.mark.parametrize(
    "make",
    [
        tiny_vqvae,
        tiny_unet,
        lambda: VolumeRewardModel(block_out_channels=(8, 8)),
        lambda: SliceRewardModel(block_out_channels=(8, 8)),
        lambda: SliceFeatureExtractor(block_out_channels=(8, 8), num_features=4),
        lambda: VolumeFeatureExtractor(block_out_channels=(8, 8), num_features=4),
    ],
    ids=["vqvae", "unet", "volume reward", "slice reward", "slice extractor", "volume extractor"],
)
def test_every_model_goes_both_ways(hub, tmp_path, make):
    torch.manual_seed(0)
    model = make()
    model.push_to_hub("somebody/by-method", private=True)
    same_weights(type(model).from_pretrained("somebody/by-method"), model)
    assert hub.repositories["somebody/by-method"]["private"] is True
    model.save_pretrained(tmp_path / "model")
    push_folder(tmp_path / "model", "somebody/by-command", without_audit=True)
    loaded = type(model).from_pretrained("somebody/by-command")
    same_weights(loaded, model)
    local = type(model).from_pretrained(tmp_path / "model")
    assert {**loaded.config, "_name_or_path": ""} == {**local.config, "_name_or_path": ""}
    card = stored(hub, "somebody/by-command")["README.md"].decode()
    assert f'{type(model).__name__}.from_pretrained("somebody/by-command")' in card
    assert NO_AUDIT in card


def test_push_to_hub_of_the_pipeline(hub):
    pipe = tiny_pipeline()
    pipe.push_to_hub(NAME, private=True)
    same_weights(MedVolumePipeline.from_pretrained(NAME).unet, pipe.unet)
    same_weights(DiffusionPipeline.from_pretrained(NAME).vqvae, pipe.vqvae)  # the package was imported


def test_a_lora_adapter(hub, tmp_path):
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    unet.save_lora_adapter(tmp_path / "adapter")
    assert inspect_folder(tmp_path / "adapter").kind == "adapter"
    push_folder(tmp_path / "adapter", "somebody/adapter", without_audit=True, base_model=NAME)
    card = stored(hub, "somebody/adapter")["README.md"].decode()
    assert "base_model_relation: adapter" in card
    assert 'load_lora_adapter("somebody/adapter", weight_name="pytorch_lora_weights.safetensors", prefix=None)' in card
    loaded = tiny_unet()
    inputs = torch.randn(1, 2, 8, 8, 8), torch.tensor([10]), torch.tensor([0])
    with torch.no_grad():
        before = loaded(*inputs).sample
        loaded.load_lora_adapter("somebody/adapter", weight_name="pytorch_lora_weights.safetensors", prefix=None)
        assert torch.allclose(loaded(*inputs).sample, unet(*inputs).sample, atol=1e-6)
        assert not torch.allclose(loaded(*inputs).sample, before)


def test_a_lora_adapter_of_the_pipeline(hub, tmp_path):
    pipe, other = tiny_pipeline(), tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path / "adapter")
    push_folder(tmp_path / "adapter", "somebody/adapter", without_audit=True)
    card = stored(hub, "somebody/adapter")["README.md"].decode()
    assert 'pipe.load_lora_weights("somebody/adapter", weight_name="pytorch_lora_weights.safetensors")' in card
    other.load_lora_weights("somebody/adapter", weight_name="pytorch_lora_weights.safetensors")
    ours, theirs = (p("HGG", 2, generator=torch.Generator().manual_seed(0)).volumes for p in (pipe, other))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_pipeline_of_diffusers_stays_its_own(hub, tmp_path):
    pipe = tiny_stable_diffusion()
    pipe.save_pretrained(tmp_path / "sd")
    push_folder(tmp_path / "sd", "somebody/sd", without_audit=True)
    files = stored(hub, "somebody/sd")
    assert not any(name.endswith(".py") for name in files)
    assert "tokenizer/tokenizer.json" in files
    loaded = DiffusionPipeline.from_pretrained("somebody/sd")
    assert type(loaded) is StableDiffusionPipeline
    same_weights(loaded.unet, pipe.unet)
    card = files["README.md"].decode()
    assert "pipeline_tag: text-to-image" in card
    assert "A StableDiffusionPipeline of diffusers." in card
    assert 'DiffusionPipeline.from_pretrained("somebody/sd")' in card


# ---------------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("part_size", [math.inf, 4000], ids=["one part", "several parts"])
def test_a_cut_upload_is_repeated_and_nothing_is_lost(monkeypatch, tmp_path, folder, part_size, caplog):
    with HubServer(part_size=part_size) as hub:
        hub.connect(monkeypatch, tmp_path / "cache")
        cut = hub.fail("PUT", "/lfs/", cut="request", times=3)
        push_folder(folder, NAME)
        assert cut.happened == 3
        for name, content in stored(hub).items():
            if name.endswith(".safetensors"):
                assert content == (folder / name).read_bytes()
        parts = 2 if math.isinf(part_size) else sum(map(len, hub.parts.values()))
        assert math.isinf(part_size) or parts > 5
        assert hub.count("PUT", "/lfs/") == parts + 3
        same_weights(MedVolumePipeline.from_pretrained(NAME).vqvae, tiny_vqvae())


def test_a_lost_answer_makes_no_second_commit(hub, folder, caplog):
    lost = hub.fail("POST", "/commit/", cut="answer")
    with caplog.at_level(logging.WARNING, "msrl_diffusers"):
        pushed = push_folder(folder, NAME)
    assert lost.happened == 1
    assert commits(hub) == 1
    assert pushed.url.endswith(hub.repositories[NAME]["branches"]["main"])
    assert any("Trying again in 1 s" in line for line in caplog.messages)


@pytest.mark.parametrize(
    "path", ["/api/repos/create", "/api/models/", "/api/validate-yaml", "/preupload/", "/batch", "/commit/"]
)
@pytest.mark.parametrize("how", [{"status": 503}, {"cut": "request"}], ids=["503", "cut"])
def test_what_passes_is_waited_for(hub, folder, path, how):
    failure = hub.fail("GET" if path == "/api/models/" else "POST", path, **how)
    push_folder(folder, NAME)
    assert failure.happened == 1
    assert commits(hub) == 1
    assert hub.pauses
    same_weights(MedVolumePipeline.from_pretrained(NAME).unet, tiny_unet())


@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "/commit/"])
def test_as_long_as_the_hub_asks_for(hub, folder, path):
    hub.fail("POST", path, status=429, headers={"Retry-After": "7"})
    push_folder(folder, NAME)
    assert len(hub.pauses) == 1
    assert hub.pauses[0] in (7, 8)  # the client adds a second to its own
    assert commits(hub) == 1


SENTENCES = {
    401: "does not accept the token",
    403: "does not let this token write",
    404: "The Hub knows no somebody/brains",
    409: "has another change of somebody/brains under way (409); run this again",
    413: "too large",
    418: "The Hub refuses somebody/brains (418): told to answer 418",
    429: "takes no more requests for now (429); run this again later",
    500: "out of order (500); run this again later: what was uploaded is not sent twice",
    503: "out of order (503)",
}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *(("/commit/", status) for status in SENTENCES),
        *((path, status) for path in ("/api/repos/create", "/preupload/", "/lfs/") for status in (401, 403, 429, 500)),
    ],
)
def test_every_refusal_is_one_sentence(hub, folder, capsys, path, status):
    before = state_of(folder)
    failure = hub.fail("PUT" if path == "/lfs/" else "POST", path, status=status, times=math.inf)
    code, output, errors = run_verb([folder, "--repo_id", NAME], capsys)
    assert failure.happened
    assert code == 1
    assert output == ""
    (sentence,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert sentence.startswith("error: The Hub ")
    assert SENTENCES[status] in sentence
    assert "Traceback" not in errors
    assert state_of(folder) == before
    assert NAME not in hub.repositories or commits(hub) == 0
    if status >= 500 and path in ("/api/repos/create", "/commit/"):
        assert failure.happened == TRIES


def test_who_must_wait_an_hour_is_told_so(hub, folder):
    hub.fail("POST", "/api/repos/create", status=429, headers={"Retry-After": "3600"}, times=math.inf)
    with pytest.raises(InputError, match=r"run this again in 3600 s"):
        push_folder(folder, NAME)
    assert hub.pauses == []


def test_an_interrupted_push_sends_only_the_rest(hub, folder):
    digest = hashlib.sha256((folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    failure = hub.fail("PUT", f"/lfs/{digest}", status=500, times=math.inf)
    with pytest.raises(InputError, match="out of order"):
        push_folder(folder, NAME)
    assert commits(hub) == 0
    hub.failures.remove(failure)
    hub.requests.clear()
    push_folder(folder, NAME)
    assert hub.count("PUT", "/lfs/") == hub.count("PUT", f"/lfs/{digest}") == 1
    same_weights(MedVolumePipeline.from_pretrained(NAME).unet, tiny_unet())


def test_a_hub_that_is_gone(hub, folder):
    hub.fail("POST", "/api/repos/create", cut="request", times=math.inf)
    with pytest.raises(InputError, match=r"The connection to the Hub was lost \(.+\); run this again"):
        push_folder(folder, NAME)
    assert hub.pauses == [1, 2, 4]


def test_a_cut_download_goes_on_where_it_was(hub, folder):
    push_folder(folder, NAME)
    cut = hub.fail("GET", "/cdn/", cut="body")
    same_weights(MedVolumePipeline.from_pretrained(NAME).unet, tiny_unet())
    assert cut.happened == 1


def test_no_token(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="does not accept the token"):
        push_folder(folder, NAME)
    push_folder(folder, NAME, token="hf_local")
    assert commits(hub) == 1


def test_offline_and_impossible_names(hub, folder, monkeypatch):
    for name in ("a/b/c", "some body/x"):
        with pytest.raises(InputError, match="is no name of a repository"):
            push_folder(folder, name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="while HF_HUB_OFFLINE is set"):
        push_folder(folder, NAME)


# -------------------------------------------------------------------------------------------------- privacy and audits


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
        with pytest.raises(InputError, match="somebody/seen exists and is public; say --public"):
            push_folder(folder, "somebody/seen")
        assert commits(hub, "somebody/seen") == 0
        push_folder(folder, "somebody/seen", private=False)
        assert commits(hub, "somebody/seen") == 1


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
    for name in ("audit.html", "closest_pairs.png", "generated.safetensors"):
        (folder / name).write_text("patient-17")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "_name_or_path": "/data/patients/unet"}))
    _, output, _ = run_verb([folder, "--repo_id", NAME], capsys)
    assert output.startswith("Not shared, as they show or name training volumes: audit.html, closest_pairs.png, gen")
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


def test_metadata_that_can_t_be_read(hub, folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(InputError, match=r"The metadata on top of .*README\.md can't be read"):
        push_folder(folder, NAME)
    assert hub.requests == []
    (folder / "README.md").write_text("---\nlicense: 3\n---\n")  # only the Hub finds fault with it
    with pytest.raises(InputError, match=r'Invalid metadata in README\.md. "license" must be a string'):
        push_folder(folder, NAME)
    assert commits(hub) == 0


# --------------------------------------------------------------------------------------------------- what is not shared


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
        "names diffusion_pytorch_model-00001-of-00002.safetensors, which is not there",
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
