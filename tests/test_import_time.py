"""`import msrl_diffusers` imports nothing that `import diffusers` has not, and diffusers knows it all the same."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import DDIMScheduler, DDPMPipeline
from tiny import tiny_pipeline, tiny_unet

import msrl_diffusers


BENCHMARK = Path(__file__).parent.parent / "examples" / "benchmarks" / "import_time.py"
HEAVY = [
    "accelerate", "datasets", "diffusers.models.modeling_utils", "diffusers.pipelines.pipeline_loading_utils", "matplotlib",
    "monai", "nibabel", "peft", "scipy", "tensorboard", "torchmetrics", "transformers", "trl",
]  # fmt: skip
METHODS = ["save_pretrained", "from_pretrained"]
OWN = {"msrl_diffusers", "msrl_diffusers.pipelines", "msrl_diffusers.pipelines.registration"}


def run(*arguments: str) -> tuple[dict, str]:
    """What a fresh Python writes as JSON, and its standard error."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stderr


def test_nothing_is_imported_but_diffusers():
    code = """
import json, sys
import diffusers
before = set(sys.modules)
import msrl_diffusers
new = set(sys.modules) - before - set(sys.stdlib_module_names)
missing = set(msrl_diffusers.__all__) - set(dir(msrl_diffusers))
print(json.dumps({"new": sorted(new), "all": sorted(sys.modules), "missing": sorted(missing)}))
"""
    found, complaints = run("-W", "error", "-c", code)
    assert complaints == ""
    foreign = {name for name in found["new"] if name.split(".")[0] not in sys.stdlib_module_names} - OWN
    assert not foreign
    assert "torch" in found["all"]  # of diffusers itself
    assert not set(HEAVY) & set(found["all"])
    assert not found["missing"]


def test_diffusers_learns_of_the_package_when_it_needs_to(tmp_path):
    """A pipeline of diffusers' own with one of our networks, loaded by who has used no name of the package."""
    scheduler = DDIMScheduler.from_config(tiny_pipeline().scheduler.config)
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["msrl_diffusers", "UNet3DModel"]
    code = """
import json, sys
import msrl_diffusers, diffusers
loading = "diffusers.pipelines.pipeline_loading_utils"
lazy = loading not in sys.modules and "MedVolumePipeline" not in vars(diffusers)
unknown = hasattr(diffusers, "MedVolumePipelin")
from diffusers import DiffusionPipeline
entered = sys.modules[loading].LOADABLE_CLASSES["msrl_diffusers"]
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
own = diffusers.MedVolumePipeline is msrl_diffusers.MedVolumePipeline
kinds = [type(pipe).__name__, type(pipe.unet).__module__]
print(json.dumps({"lazy": lazy, "unknown": unknown, "entered": entered, "own": own, "kinds": kinds}))
"""
    found, _ = run("-c", code, str(tmp_path))
    assert found == {
        "lazy": True,
        "unknown": False,
        "entered": {"ModelMixin": METHODS, "SchedulerMixin": METHODS},
        "own": True,
        "kinds": ["DDPMPipeline", "msrl_diffusers.models.unet_3d"],
    }


def test_registering_again_changes_nothing():
    """As a reload of the package does."""
    import diffusers

    from msrl_diffusers.pipelines.registration import register

    finders = list(sys.meta_path)
    register()
    assert sys.meta_path == finders  # diffusers' loading has been imported: nothing is to be waited for
    assert diffusers.MedVolumePipeline is msrl_diffusers.MedVolumePipeline
    with pytest.raises(AttributeError, match="Teapot"):
        _ = diffusers.Teapot


@pytest.mark.slow
def test_the_benchmark_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    output = tmp_path / "import-time.json"
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), "--runs", "1", "--output", str(output)])
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    content = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == content
    seconds = content["user_seconds"]
    assert content["ratio"] == pytest.approx(
        seconds["msrl_diffusers"]["median"] / seconds["diffusers"]["median"], abs=1e-3
    )
    for name in ("diffusers", "msrl_diffusers"):
        assert len(seconds[name]["runs"]) == 1
        assert seconds[name]["median"] > 0.1
        assert content["slowest"][name][0]["self_ms"] > 0
    assert content["versions"]["diffusers"]
