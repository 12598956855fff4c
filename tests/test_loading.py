"""What is given as a checkpoint and is none, or none that can be had, is one sentence that names the cause."""

import math
from pathlib import Path

import pytest
import torch
from hub_scene import NAME
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline, tiny_stable_diffusion

from msrl_diffusers import MedVolumePipeline, SliceFeatureExtractor, SliceRewardModel, VolumeRewardModel
from msrl_diffusers.cli import generate as generate_verb
from msrl_diffusers.errors import InputError
from msrl_diffusers.models.loading import load_model
from msrl_diffusers.text_to_image.artifacts import load_pipeline, load_stable_diffusion


# Warnings are errors here; this one is of diffusers and huggingface_hub about each other.
pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")


@pytest.mark.parametrize("path_type", [str, Path])
@pytest.mark.parametrize("model_class", [VolumeRewardModel, MedVolumePipeline])
def test_a_checkpoint_that_is_not_there_is_refused(model_class, path_type, tmp_path):
    with pytest.raises(InputError, match="nothing is neither a folder nor a name of a repository on the Hub"):
        load_model(model_class, path_type(tmp_path / "nothing"))
    with pytest.raises(
        InputError, match=f"holds no {model_class.__name__}: Error no file named {model_class.config_name}"
    ):
        load_model(model_class, path_type(tmp_path))
    (tmp_path / model_class.config_name).write_text("[1]")
    with pytest.raises(InputError, match=f"holds no {model_class.__name__}: "):
        load_model(model_class, path_type(tmp_path))


def test_a_checkpoint_of_another_class_is_refused(tmp_path):
    """All its weights would be missing, and first be missed when they are moved."""
    extractor = SliceFeatureExtractor(block_out_channels=(8, 8), num_features=4)
    extractor.save_pretrained(tmp_path / "extractor")
    with pytest.raises(
        InputError, match="extractor holds a SliceFeatureExtractor, not a SliceRewardModel; give the folder"
    ):
        load_model(SliceRewardModel, tmp_path / "extractor", dtype=torch.float32)
    assert load_model(SliceFeatureExtractor, tmp_path / "extractor").config.num_features == 4
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(index.read_text().replace("MedVolumePipeline", "DDPMPipeline"))
    with pytest.raises(InputError, match="pipeline holds a DDPMPipeline, not a MedVolumePipeline"):
        load_model(MedVolumePipeline, tmp_path / "pipeline")


def drop_weight(file, name):
    weights = load_file(file)
    del weights[name]
    save_file(weights, file)


def test_a_model_without_all_its_weights_is_refused(tmp_path):
    SliceRewardModel(block_out_channels=(8, 8)).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    drop_weight(file, "network.layers.0.bias")
    with pytest.raises(
        InputError, match=r"lacks weights of SliceRewardModel, such as network\.layers\.0\.bias; save it again"
    ):
        load_model(SliceRewardModel, tmp_path)
    file.write_bytes(b"cut")
    with pytest.raises(InputError, match="holds no SliceRewardModel: Unable to load weights"):
        load_model(SliceRewardModel, tmp_path)


def test_a_pipeline_without_all_its_weights_is_refused(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    drop_weight(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", "conv_out.bias")
    with pytest.raises(
        InputError, match=r"lacks weights of MedVolumePipeline, such as unet\.conv_out\.bias; save it again"
    ):
        load_model(MedVolumePipeline, tmp_path)


@pytest.mark.parametrize("load", [load_pipeline, load_stable_diffusion])
def test_a_stable_diffusion_without_all_its_weights_is_refused(load, tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path)
    drop_weight(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", "conv_out.bias")
    with pytest.raises(
        InputError, match=r"lacks weights of StableDiffusionPipeline, such as unet\.conv_out\.bias; save it again"
    ):
        load(tmp_path)


GATED, UNKNOWN = ({"X-Error-Code": code} for code in ("GatedRepo", "RepoNotFound"))
NO_REPOSITORY = "There is no folder somebody/brains, and the Hub shows no such repository ({}); check the name, or, if it is private, log in by"
FAILURES = {
    "401": ({"status": 401}, NO_REPOSITORY.format(401)),
    "401, unknown": ({"status": 401, "headers": UNKNOWN}, NO_REPOSITORY.format(401)),
    "404, unknown": ({"status": 404, "headers": UNKNOWN}, NO_REPOSITORY.format(404)),
    "401, gated": ({"status": 401, "headers": GATED}, "somebody/brains is gated (401): ask for access on its page on the Hub, and log in by"),
    "403, gated": ({"status": 403, "headers": GATED}, "somebody/brains is gated (403): ask for access on its page on the Hub, and log in by"),
    "403": ({"status": 403}, "The Hub does not let this token read somebody/brains (403); log in by"),
    "429": ({"status": 429}, "The Hub did not give somebody/brains (429); run this again later."),
    "500": ({"status": 500}, "The Hub did not give somebody/brains (500); run this again later."),
    "cut": ({"cut": "request"}, "There is no folder somebody/brains, and the Hub can't be reached (Server disconnected"),
}  # fmt: skip


@pytest.mark.parametrize(("failure", "sentence"), FAILURES.values(), ids=FAILURES)
def test_what_the_hub_does_not_give_is_told_by_its_cause(hub, tmp_path, failure, sentence):
    for method in ("GET", "HEAD"):
        hub.fail(method, "/", times=math.inf, **failure)
    for call in (
        lambda: generate_verb.run(["--model", NAME, "--output_dir", str(tmp_path / "out")]),
        lambda: load_model(VolumeRewardModel, NAME),
        lambda: tiny_pipeline().load_lora_weights(NAME),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value).startswith(sentence)
        assert "\n" not in str(caught.value)


def test_a_repository_of_something_else_and_an_unknown_revision(hub):
    hub.repositories["somebody/else"] = {
        "private": False,
        "files": {},
        "branches": {"main": "0" * 40},
        "commits": {"0" * 40: {}},
    }
    with pytest.raises(
        InputError, match=r"somebody/else on the Hub has no model_index\.json \(404\); give a repository with one"
    ):
        load_model(MedVolumePipeline, "somebody/else")
    with pytest.raises(InputError, match=r"somebody/else on the Hub has no such branch, tag or commit \(404\)"):
        load_model(MedVolumePipeline, "somebody/else", revision="nope")


def test_what_is_not_asked_for_offline(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"no folder somebody/brains, and the Hub is not asked while HF_HUB_OFFLINE is set: unset it"
    ):
        load_model(MedVolumePipeline, NAME)
