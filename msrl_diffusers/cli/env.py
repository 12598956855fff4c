"""msrl env: versions, devices and folders, to be put into a bug report.

    msrl env
    msrl env --json

It names no user and no host; look at the paths of the caches before you share them.
"""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import datasets
import psutil
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

from ..arguments import parse
from ..precision import precision_name
from ..study.report import git_commit


PACKAGE = __package__.partition(".")[0]
GIB = 1 << 30


@dataclass
class EnvArguments:
    """Options of `msrl env`."""

    json: bool = field(default=False, metadata={"help": "JSON instead of text."})


def run(arguments: Sequence[str]) -> None:
    """Write what is known of this machine to standard output."""
    (args,) = parse([EnvArguments], None, arguments, prog="msrl env", description=__doc__)
    found = environment()
    sys.stdout.write((json.dumps(found, indent=2) if args.json else _text(found)) + "\n")


def environment() -> dict:
    """Versions of the packages in `setup.py` beside what it asks for, devices with the precision they compute in, and the
    folders of downloads."""
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "version": importlib.metadata.version(PACKAGE),
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "cores": cores,
            "threads": torch.get_num_threads(),
            "memory_gib": round(memory.total / GIB, 1),
            "available_gib": round(memory.available / GIB, 1),
        },
        "devices": _devices(),
        "cache": {"models": constants.HF_HUB_CACHE, "datasets": str(datasets.config.HF_DATASETS_CACHE)},
        "offline": constants.is_offline_mode(),
        "packages": _packages(),
    }


def _devices() -> list[dict]:
    """The devices that models run on, the one that is used first; a GPU's memory in GiB."""
    gpus = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        gpus.append(
            {
                "device": f"cuda:{number}",
                "name": properties.name,
                "memory_gib": round(properties.total_memory / GIB, 1),
                "precision": precision_name("auto", "cuda"),
            }
        )
    return [*gpus, {"device": "cpu", "name": platform.machine(), "precision": precision_name("auto", "cpu")}]


def _packages() -> dict[str, dict]:
    """What this package requires: the version that is there (None if none), what is asked for, whether that fits, and the
    extra that asks, if it is one."""
    found = {"torch": {}}  # first, as it matters most
    for text in importlib.metadata.requires(PACKAGE) or []:
        requirement = Requirement(text)
        extra = next((name for name in _extras() if _only_for(requirement, name)), None)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        found[requirement.name] = {
            "version": version,
            "needed": str(requirement.specifier) or "any",
            "fits": version is not None and requirement.specifier.contains(version, prereleases=True),
            "extra": extra,
        }
    return found


def _extras() -> list[str]:
    return importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []


def _only_for(requirement: Requirement, extra: str) -> bool:
    """Whether a requirement is one of an extra alone."""
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _text(found: dict) -> str:
    """The findings as lines, problems marked."""
    cpu = found["cpu"]
    lines = [
        f"{PACKAGE} {found['version']}" + (f" at commit {found['commit']}" if found["commit"] else ""),
        f"Python {found['python']} on {found['platform']}",
        f"CPU: {cpu['cores']} cores, {cpu['threads']} threads, {cpu['available_gib']} of {cpu['memory_gib']} GiB free",
    ]
    for device in found["devices"]:
        memory = f", {device['memory_gib']} GiB" if "memory_gib" in device else ""
        lines.append(f"Device {device['device']}: {device['name']}{memory}, computes in {device['precision']}")
    lines += [f"Cache of {name}: {path}" for name, path in found["cache"].items()]
    lines.append(
        "Hub: offline (HF_HUB_OFFLINE is set)"
        if found["offline"]
        else "Hub: asked when needed (HF_HUB_OFFLINE is not set)"
    )
    for name, package in found["packages"].items():
        extra = f" (extra {package['extra']})" if package["extra"] else ""
        if package["version"] is None:
            state = f"not installed, {package['needed']} is needed" if not extra else "not installed"
        else:
            state = package["version"] + ("" if package["fits"] else f", but {package['needed']} is needed")
        lines.append(f"{name}{extra}: {state}")
    return "\n".join(lines)
