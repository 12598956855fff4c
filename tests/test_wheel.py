"""The wheel alone, without the checkout: what is in it, and that what a user does first works with nothing else of ours."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hub_server import HubServer
from tiny import tiny_pipeline

from msrl_diffusers import sample_volumes
from msrl_diffusers.hub import push_folder


ROOT = Path(__file__).parents[1]
NAME = "somebody/brains"
DOCUMENTATION = {"msrl_diffusers/API.md"}  # read in the repository, not at run time

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("pip", "setuptools"))), reason="a wheel is built by pip and setuptools"
    ),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub about itself
]


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: no `build` folder is left in the repository, and none that was left shows up in the wheel."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("msrl_diffusers", "tests", "examples"):  # of which only the first may be packed
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), str(source))
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder that the wheel, and nothing else, was installed to."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-index", "--no-deps", "--no-compile", "--target", str(target), str(wheel))
    return target


def plain_pipeline():
    """Its denoiser predicts zero, so that a sample, with `eta` 0, is the starting noise, scaled and decoded."""
    pipeline = tiny_pipeline()
    for parameter in pipeline.unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    return pipeline


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A local Hub with a pipeline that was pushed to it."""
    folder = tmp_path_factory.mktemp("pipeline")
    plain_pipeline().save_pretrained(folder)
    with HubServer() as server:
        with pytest.MonkeyPatch.context() as patch:
            server.connect(patch, tmp_path_factory.mktemp("cache"))
            push_folder(folder, NAME, without_audit=True)
        yield server


@pytest.fixture
def run(hub, installed, tmp_path):
    """Runs Python in an empty folder that sees the installed wheel, but neither checkout nor tests."""

    def run(code: str, *arguments: str) -> str:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment = {
            **inherited,
            **{name: value for name, value in hub.environment(tmp_path / "home").items() if name.startswith("HF_")},
            "PYTHONPATH": str(installed),
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        environment.pop("HF_HUB_OFFLINE", None)
        (tmp_path / "empty").mkdir(exist_ok=True)
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert not list((tmp_path / "empty").iterdir())
        return done.stdout

    return run


def test_what_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {name.split("/")[0] for name in names}
    (record,) = (folder for folder in folders if folder.endswith(".dist-info"))
    assert folders == {"msrl_diffusers", record}
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "msrl_diffusers").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("msrl_diffusers/")} == package - DOCUMENTATION
    for suffix in (".md", ".css", ".html", ".js", "py.typed"):
        assert any(name.endswith(suffix) for name in package - DOCUMENTATION), suffix
    entry_points = zipfile.ZipFile(wheel).read(f"{record}/entry_points.txt").decode()
    assert "msrl = msrl_diffusers.cli:main" in entry_points.splitlines()
    assert f"{record}/licenses/LICENSE" in names


OWN_CLASS = """
import sys
from pathlib import Path

import msrl_diffusers
assert Path(msrl_diffusers.__file__).is_relative_to(sys.argv[1]), msrl_diffusers.__file__
from msrl_diffusers import MedVolumePipeline
pipe = MedVolumePipeline.from_pretrained("somebody/brains")
"""
WITH_TRUST = """
import sys
from pathlib import Path

from diffusers import DiffusionPipeline
assert not any(name.startswith("msrl_diffusers") for name in sys.modules)
pipe = DiffusionPipeline.from_pretrained("somebody/brains", trust_remote_code=True)
import msrl_diffusers
assert Path(msrl_diffusers.__file__).is_relative_to(sys.argv[1]), msrl_diffusers.__file__
assert type(pipe) is msrl_diffusers.MedVolumePipeline
"""
TWO_IMAGES = """
import torch

pipe.set_progress_bar_config(disable=True)
start = torch.zeros(2, *pipe.latent_shape)
start[1, :, 6, 1, 6] = 20.0  # [C, D, H, W]: superior, posterior, right
images = pipe(["HGG"] * 2, num_inference_steps=2, eta=0.0, latents=start, output_type="nifti").volumes
for name, image in zip(("empty", "marked"), images):
    image.to_filename(f"{sys.argv[2]}/{name}.nii.gz")
"""


def check_geometry(image: nib.Nifti1Image) -> None:
    """RAS+, millimetres, the middle of the cube at the origin."""
    assert image.shape == (16, 16, 16)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header.get_zooms() == (12.0, 12.0, 12.0)
    np.testing.assert_allclose(image.affine @ [7.5, 7.5, 7.5, 1], [0, 0, 0, 1], atol=1e-4)
    assert image.header["qform_code"] > 0
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)


@pytest.mark.parametrize("load", [OWN_CLASS, WITH_TRUST], ids=["own class", "trust_remote_code"])
def test_a_pipeline_of_the_hub_makes_images_the_right_way_up(run, installed, tmp_path, load):
    """A mark in the latents, superior, posterior and right, is there in the image, too."""
    run(load + TWO_IMAGES, str(installed), str(tmp_path))
    empty, marked = (nib.load(tmp_path / f"{name}.nii.gz") for name in ("empty", "marked"))
    check_geometry(marked)
    difference = np.abs(marked.get_fdata() - empty.get_fdata())
    assert difference.max() > 0.02
    middle = np.argwhere(difference > difference.max() / 2).mean(axis=0)  # of the voxels that the mark changed most
    x, y, z, _ = marked.affine @ [*middle, 1]
    assert x > 12, "the mark is not on the right"
    assert y < -12, "the mark is not posterior"
    assert z > 12, "the mark is not superior"


def test_the_command_generates(run, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "generate", "--model", NAME, "--num_volumes", "2", "--seed", "3", "--num_inference_steps", "2",
        "--output_dir", str(out),
    ]  # fmt: skip
    run("from msrl_diffusers.cli import main; main()", *arguments)
    assert sorted(path.name for path in out.iterdir()) == [
        "HGG-3-00000.nii.gz", "LGG-3-00001.nii.gz", "generation.json", "metadata.csv", "sheet.png",
    ]  # fmt: skip
    expected = sample_volumes(plain_pipeline(), 2, 2, seed=3, progress=False).pixel_values.float().numpy()
    for index, name in enumerate(("HGG-3-00000.nii.gz", "LGG-3-00001.nii.gz")):
        image = nib.load(out / name)
        check_geometry(image)
        array, volume = image.get_fdata(), expected[index, 0] / 2 + 0.5  # [x, y, z] and [D, H, W]
        np.testing.assert_allclose(array, volume.transpose(2, 1, 0), atol=1e-3)
        for axis in range(3):
            assert np.abs(np.flip(array, axis) - array).max() > 0.02
