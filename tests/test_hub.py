"""Sharing on the Hub: what was pushed loads again."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from hub_scene import NAME, commits, same_weights, state_of, stored
from huggingface_hub import hf_hub_download, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_pipeline, tiny_stable_diffusion, tiny_unet, tiny_vqvae

from msrl_diffusers import (
    MedVolumePipeline,
    SliceFeatureExtractor,
    SliceRewardModel,
    UNet3DModel,
    VolumeFeatureExtractor,
    VolumeRewardModel,
)
from msrl_diffusers.errors import InputError
from msrl_diffusers.hub import NO_AUDIT, inspect_folder, push_folder
from msrl_diffusers.hub.contents import shared_json
from msrl_diffusers.pipelines.remote_code import plain_index, remote_index


# Warnings are errors here; these are of diffusers and huggingface_hub about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]


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


@pytest.mark.slow
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


def test_what_is_left_of_an_earlier_model_goes(hub, folder, capsys):
    """A loader prefers the index of shards, and a variant when asked; findings would be taken for the new model's."""
    (folder / "audit").mkdir()
    shutil.copy(folder / "audit.json", folder / "audit" / "audit.json")  # not at the top: nothing reads it
    tiny_pipeline().save_pretrained(folder, variant="fp16")
    tiny_vqvae().save_pretrained(folder / "vqvae", max_shard_size="20KB")
    (folder / "vqvae" / "diffusion_pytorch_model.safetensors").unlink()
    push_folder(folder, NAME)
    hub.repositories[NAME]["files"]["adapters/pytorch_lora_weights.safetensors"] = b"theirs"
    hub.lfs[hashlib.sha256(b"theirs").hexdigest()] = b"theirs"
    earlier, model = set(stored(hub)), tiny_pipeline()
    for part in (model.unet, model.vqvae):
        torch.nn.init.ones_(next(part.parameters()))
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    pushed = push_folder(folder, NAME, without_audit=True)
    assert set(pushed.removed) == {"audit.json"} | {
        name for name in earlier if any(part in name for part in ("fp16", "-of-0", "safetensors.index"))
    }
    assert set(stored(hub)) == {
        *pushed.files,
        ".gitattributes",
        "adapters/pytorch_lora_weights.safetensors",
        "audit/audit.json",
    }
    same_weights(MedVolumePipeline.from_pretrained(NAME).unet, model.unet)


def test_whole_weights_of_a_variant_take_the_place_of_its_shards_and_their_index(hub, tmp_path):
    model = tiny_vqvae()
    model.save_pretrained(tmp_path / "shards", variant="bf16", max_shard_size="20KB")
    push_folder(tmp_path / "shards", NAME, without_audit=True)
    assert "diffusion_pytorch_model.safetensors.index.bf16.json" in stored(hub)
    torch.nn.init.ones_(next(model.parameters()))
    model.save_pretrained(tmp_path / "whole", variant="bf16")
    pushed = push_folder(tmp_path / "whole", NAME, without_audit=True)
    assert "diffusion_pytorch_model.safetensors.index.bf16.json" in pushed.removed
    same_weights(type(model).from_pretrained(NAME, variant="bf16"), model)


def test_weights_of_one_variant(hub, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "half", variant="fp16")
    assert inspect_folder(tmp_path / "half").variant == "fp16"
    push_folder(tmp_path / "half", NAME, without_audit=True)
    card = stored(hub)["README.md"].decode()
    assert f'MedVolumePipeline.from_pretrained("{NAME}", variant="fp16")' in card
    assert f'DiffusionPipeline.from_pretrained("{NAME}", variant="fp16", trust_remote_code=True)' in card
    MedVolumePipeline.from_pretrained(NAME, variant="fp16")
    tiny_pipeline().save_pretrained(tmp_path / "half")  # plain ones beside them
    assert inspect_folder(tmp_path / "half").variant is None


def test_a_branch_of_its_own(hub, folder):
    push_folder(folder, NAME, revision="v2")
    assert set(stored(hub)) == {".gitattributes"}
    same_weights(MedVolumePipeline.from_pretrained(NAME, revision="v2").unet, tiny_unet())
    card = Path(hf_hub_download(NAME, "README.md", revision="v2")).read_text()
    assert f'MedVolumePipeline.from_pretrained("{NAME}", revision="v2")' in card
    assert f'DiffusionPipeline.from_pretrained("{NAME}", revision="v2", trust_remote_code=True)' in card
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


@pytest.mark.parametrize("given", [str, Path])  # of which peft's card makes YAML that is none
def test_a_lora_adapter_saved_by_peft(hub, tmp_path, given):
    unet, inputs = tiny_unet(), (torch.randn(1, 2, 8, 8, 8), torch.tensor([10]), torch.tensor([0]))
    tiny_unet().save_pretrained(tmp_path / "unet")
    base = UNet3DModel.from_pretrained(given(tmp_path / "unet"))
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "unet")  # as peft writes it of models of transformers
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    push_folder(tmp_path / "adapter", "somebody/adapter", without_audit=True, base_model=NAME)
    for place in ("outputs/study/pipeline_standard/unet", "./unet", "~/unet"):
        assert shared_json("adapter_config.json", {"base_model_name_or_path": place, "r": 2}) == {"r": 2}
    named = {"base_model_name_or_path": NAME}
    assert shared_json("adapter_config.json", named) == named
    assert not any(str(tmp_path).encode() in content for content in stored(hub, "somebody/adapter").values())
    card = stored(hub, "somebody/adapter")["README.md"].decode()
    assert "More Information Needed" not in card
    assert f"base_model: {NAME}" in card
    assert 'pipe.unet = PeftModel.from_pretrained(pipe.unet, "somebody/adapter")' in card
    loaded = PeftModel.from_pretrained(unet, "somebody/adapter").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(*inputs).sample, tuned.eval()(*inputs).sample, atol=1e-6)
    template = tmp_path / "adapter" / "README.md"
    template.write_text(template.read_text().replace("Model Card for Model ID", "Mine"))
    sentence = r"names the base model .*/unet, which is a place on this machine; name its Hub|The metadata on top of .* can't be read"
    with pytest.raises(InputError, match=sentence):
        push_folder(tmp_path / "adapter", "somebody/adapter", without_audit=True)
    template.unlink()
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"has no adapter_config\.json, without which nothing can load adapter_model"):
        inspect_folder(tmp_path / "adapter")


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
