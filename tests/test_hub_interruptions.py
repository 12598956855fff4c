"""Sharing on the Hub when it is cut, refused or gone: nothing lost, one sentence."""

import hashlib
import logging
import math

import pytest
from hub_scene import NAME, commits, run_verb, same_weights, state_of, stored
from hub_server import HubServer
from tiny import tiny_unet, tiny_vqvae

from msrl_diffusers import (
    MedVolumePipeline,
)
from msrl_diffusers.errors import InputError
from msrl_diffusers.hub import push_folder
from msrl_diffusers.hub.client import TRIES


# Warnings are errors here; these are of diffusers and huggingface_hub about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]


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
