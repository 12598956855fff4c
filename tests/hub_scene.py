"""What tests of the Hub share; the fixtures `hub` and `folder` are in conftest.py."""

import hashlib

from tiny import copied, differing

from msrl_diffusers.cli import push as push_verb
from msrl_diffusers.errors import sentence_instead_of_traceback


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
