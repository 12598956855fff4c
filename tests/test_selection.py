"""benchmarks/selection.py: which samples are chosen, and a run of seconds as a user starts it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_release import released_study, write_tiny_release


SCRIPT = Path(__file__).parent.parent / "examples" / "benchmarks" / "selection.py"


def test_the_best_the_worst_and_as_many_at_random():
    chosen_rows = runpy.run_path(str(SCRIPT))["chosen_rows"]
    rewards = torch.tensor([0.1, 0.9, 0.5, 0.3])
    rows = chosen_rows(rewards, 2, seed=0)
    assert [set(draw.tolist()) for name in ("best", "worst") for draw in rows[name]] == [{1, 2}, {0, 3}]
    assert all(len(set(draw.tolist())) == 2 for draw in rows["random"])
    assert len({tuple(draw.tolist()) for draw in rows["random"]}) > 1
    again = chosen_rows(rewards, 2, seed=0)["random"]
    assert all(torch.equal(one, other) for one, other in zip(rows["random"], again, strict=True))


def test_all_of_the_samples_are_one_set_whoever_chooses(tmp_path, monkeypatch, capsys):
    release = write_tiny_release(tmp_path / "release")
    index_file = Path(release) / "model_index.json"
    index = json.loads(index_file.read_text())  # as the release of the default config has it
    index_file.write_text(json.dumps({**index, "supports_guidance": False}))
    fields = released_study(tmp_path / "unused", release)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(fields))
    output = tmp_path / "selection.json"
    arguments = [
        "--config",
        str(tmp_path / "study.yaml"),
        "--output_dir",
        str(tmp_path / "out"),
        "--output",
        str(output),
    ]
    arguments += ["--num_inference_steps", "2", "--shares", "1.0", "0.5"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    content = json.loads(output.read_text())
    assert content["n"] == 8
    whole = [row for row in content["rows"] if row["share"] == 1.0]
    assert [(row["class"], row["choice"]) for row in whole] == [
        (name, choice) for name in ("HGG", "LGG") for choice in ("best", "random", "worst")
    ]
    for row in whole:
        (best,) = (other for other in whole if other["class"] == row["class"] and other["choice"] == "best")
        assert row["reward"] == pytest.approx(best["reward"], abs=1e-5)
        assert row["fid"] == pytest.approx(best["fid"], rel=1e-3)
    by_choice = {
        row["choice"]: row["reward"] for row in content["rows"] if row["share"] == 0.5 and row["class"] == "HGG"
    }
    assert by_choice["best"] > by_choice["random"] > by_choice["worst"]
    assert output.with_suffix(".md").read_text() in capsys.readouterr().out


def test_a_study_without_given_rewards_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "study.yaml").write_text("dataset: phantoms\n")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--config", str(tmp_path / "study.yaml")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "names no release" in capsys.readouterr().err
