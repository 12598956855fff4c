"""msrl env: what a bug report needs, and that it says what does not fit."""

import importlib.metadata
import json

import pytest
import torch

from msrl_diffusers.cli import env as env_verb
from msrl_diffusers.errors import InputError


def test_json(capsys):
    env_verb.run(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == importlib.metadata.version("msrl_diffusers")
    assert found["cpu"]["cores"] >= 1
    assert 0 < found["cpu"]["available_gib"] < found["cpu"]["memory_gib"]
    assert found["devices"][-1]["device"] == "cpu"
    assert found["devices"][-1]["precision"] in ("float32", "bfloat16")
    assert found["offline"] is True  # the tests are
    assert set(found["cache"]) == {"models", "datasets"}
    assert next(iter(found["packages"])) == "torch"
    assert found["packages"]["torch"] == {"version": torch.__version__, "needed": ">=2.6", "fits": True, "extra": None}
    assert found["packages"]["ruff"]["extra"] == "dev"


def test_text(capsys):
    env_verb.run([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"msrl_diffusers {importlib.metadata.version('msrl_diffusers')}")
    assert f"torch: {torch.__version__}" in lines
    assert any(line.startswith("Device cpu: ") and ", computes in " in line for line in lines)
    assert "Hub: offline (HF_HUB_OFFLINE is set)" in lines


def test_what_does_not_fit_is_said(monkeypatch, capsys):
    asked = importlib.metadata.version

    def other(name):
        if name == "monai":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"peft": "0.1", "ruff": "0.0.1"}.get(name) or asked(name)

    monkeypatch.setattr(importlib.metadata, "version", other)
    env_verb.run([])
    lines = capsys.readouterr().out.splitlines()
    assert "monai: not installed, >=1.5 is needed" in lines
    assert "peft: 0.1, but >=0.17 is needed" in lines
    assert "ruff (extra dev): 0.0.1, but >=0.12 is needed" in lines


def test_a_gpu_stands_first(monkeypatch):
    class Properties:
        name, total_memory = "A GPU", 80 << 30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    gpu, cpu = env_verb.environment()["devices"]
    assert gpu == {"device": "cuda:0", "name": "A GPU", "memory_gib": 80.0, "precision": "bfloat16"}
    assert cpu["device"] == "cpu"


def test_options_and_help(capsys):
    with pytest.raises(InputError, match="There is no option --jsn; did you mean --json"):
        env_verb.run(["--jsn"])
    with pytest.raises(SystemExit) as ended:
        env_verb.run(["--help"])
    assert ended.value.code == 0
    assert "\n    msrl env --json\n" in capsys.readouterr().out
