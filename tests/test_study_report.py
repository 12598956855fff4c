"""What a report is made of: the records of its own study, the commit of the code, the share of a gap."""

import subprocess

import pytest

from msrl_diffusers import StudyConfig
from msrl_diffusers.files import write_json
from msrl_diffusers.study import report as report_module
from msrl_diffusers.study.artifacts import stages_left_out
from msrl_diffusers.study.report import gap_closed, git_commit, stage_records


def test_a_report_leaves_out_what_an_earlier_study_in_its_folder_did(tmp_path):
    for name in ("prepare", "ppo", "nft", "downstream"):
        write_json(tmp_path / name / "stage.json", {"seconds": 1})
    kept = stage_records(tmp_path, stages_left_out(StudyConfig(method="nft")))
    assert list(kept) == ["nft", "prepare"]


def test_the_commit_is_of_the_code_and_not_of_what_it_was_installed_into(monkeypatch, tmp_path):
    """A virtual environment lies in somebody's own repository, which does not keep it."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    name = ["-c", "user.name=A", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(tmp_path), *name, "commit", "-q", "--allow-empty", "-m", "Begin"], check=True)
    code = tmp_path / ".venv" / "report.py"
    code.parent.mkdir()
    code.touch()
    monkeypatch.setattr(report_module, "__file__", str(code))
    assert git_commit() is None
    subprocess.run(["git", "-C", str(code.parent), "add", code.name], check=True)
    assert len(git_commit().rstrip("+")) == 40


def test_gap_closed():
    fids = {"standard": {"all": 10.0}, "limit": {"all": 6.0}, "rl": {"all": 7.0}}
    assert gap_closed(fids) == pytest.approx(0.75)
    assert gap_closed({**fids, "limit": {"all": 10.0}}) is None
