"""benchmarks/class_agreement.py and readme_pictures.py on a study of seconds, as a user runs them."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny_release import released_study, write_tiny_release

from msrl_diffusers import StudyConfig
from msrl_diffusers.errors import InputError
from msrl_diffusers.study import run_study


SCRIPT = str(Path(__file__).parent.parent / "examples" / "benchmarks" / "class_agreement.py")
PICTURES = str(Path(SCRIPT).parent / "readme_pictures.py")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a finished study; not to be written to."""
    folder = tmp_path_factory.mktemp("class-agreement")
    run_study(StudyConfig(**released_study(folder / "study", write_tiny_release(folder / "release"))))
    return folder / "study"


def test_the_picture_shows_what_the_study_left(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [PICTURES, "--volumes", str(study), "--output_dir", str(tmp_path)])
    runpy.run_path(PICTURES, run_name="__main__")
    assert [path.name for path in tmp_path.iterdir()] == ["phantoms.png"]
    monkeypatch.setattr(sys, "argv", [PICTURES, "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(PICTURES, run_name="__main__")
    assert capsys.readouterr().err == "error: There is nothing to draw; give --volumes, --images or both.\n"


def test_every_arm_is_read_by_classifiers_of_real_volumes(study, tmp_path, monkeypatch, capsys):
    output = tmp_path / "results" / "agreement.json"
    options = [
        "--studies",
        str(study),
        "--num_classifiers",
        "2",
        "--max_steps",
        "1",
        "--output",
        str(output),
    ]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *options])
    runpy.run_path(SCRIPT, run_name="__main__")
    content = json.loads(output.read_text())
    found = content["studies"]["study"]
    assert set(found["agreement"]) == {"real_floor", "limit", "standard", "rl"}
    for arm in found["agreement"].values():
        assert set(arm) == {"all", "HGG", "LGG"}
        assert all(0 <= row["interval"][0] <= row["value"] <= row["interval"][1] <= 1 for row in arm.values())
    after, before = (found["agreement"][arm]["all"]["value"] for arm in ("rl", "standard"))
    assert found["difference"]["value"] == pytest.approx(after - before)
    assert json.loads(capsys.readouterr().out) == {"study": found["difference"]}
    assert "| study | real, held out |" in output.with_suffix(".md").read_text()


def test_the_share_is_the_mean_over_classifiers_and_volumes():
    share = runpy.run_path(SCRIPT)["share"]
    found = share(torch.tensor([1.0, 0.5, 0.0, 0.5], dtype=torch.float64), seed=0)
    assert found["value"] == 0.5
    assert 0 <= found["interval"][0] < 0.5 < found["interval"][1] <= 1


def test_studies_of_other_data_or_of_one_name_are_refused(tmp_path):
    script = runpy.run_path(SCRIPT)
    folders = [tmp_path / name for name in ("one/a", "one/b", "two/a", "two/c")]
    for folder, fingerprint in zip(folders, "xxxy", strict=True):
        (folder / "prepare").mkdir(parents=True)
        (folder / "prepare" / "stage.json").write_text(json.dumps({"result": {"fingerprint": fingerprint}}))
    script["check_studies"](folders[:2])
    with pytest.raises(InputError, match=r"The studies in .*a and .*c are of unequal data"):
        script["check_studies"]([folders[0], folders[3]])
    with pytest.raises(InputError, match="folders called 'a'"):
        script["check_studies"](folders[:3])


def test_a_study_that_was_not_evaluated_is_refused(tmp_path, monkeypatch):
    script = runpy.run_path(SCRIPT)
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--studies", str(tmp_path)])
    with pytest.raises(InputError, match="run the study of that folder to its end first"):
        script["main"]()
