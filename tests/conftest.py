"""Tiny real components at small size, shared by all tests."""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest


# Before datasets is imported: its cache of tables must not outlive the tests, nor be read by them.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="msrl-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import torch  # noqa: E402
from diffusers import DDIMScheduler  # noqa: E402
from hub_scene import AUDIT, copy_of  # noqa: E402
from hub_server import HubServer  # noqa: E402
from tiny import settings_with, tiny_pipeline  # noqa: E402

from msrl_diffusers import MedVolumePipeline, UNet3DModel, VQModel3D, load_phantoms, run_study  # noqa: E402
from msrl_diffusers.study.stages import SCHEDULER_DEFAULTS  # noqa: E402


def fill_zeros(model: torch.nn.Module) -> torch.nn.Module:
    """Small random weights where a layer starts at zero, so that outputs depend on every input."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="session")
def phantoms():
    return load_phantoms(6, image_size=16)


@pytest.fixture(scope="session")
def vqvae():
    torch.manual_seed(0)
    return VQModel3D(block_out_channels=(8, 16), latent_channels=4, quantizer="fsq").eval()


@pytest.fixture
def unet():
    torch.manual_seed(0)
    model = UNet3DModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 16), num_class_embeds=2)
    return fill_zeros(model).eval()


@pytest.fixture
def pipeline(vqvae, unet):
    pipe = MedVolumePipeline(
        vqvae,
        unet,
        DDIMScheduler(**SCHEDULER_DEFAULTS),
        spacing=(12.0, 12.0, 12.0),
        id2label={0: "HGG", 1: "LGG"},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished study; not to be written to."""
    folder = tmp_path_factory.mktemp("study")
    run_study(settings_with(folder))
    return folder


@pytest.fixture
def study(finished, tmp_path):
    """A copy of the finished study."""
    return Path(shutil.copytree(finished, tmp_path / "study"))
