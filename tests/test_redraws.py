"""benchmarks/redraws.py on a study of seconds, as a user runs it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from tiny_release import released_study, write_tiny_release

from msrl_diffusers import StudyConfig
from msrl_diffusers.seeding import fold_seed


BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


def redraw(config: Path, output: Path, draws: int, monkeypatch) -> dict:
    options = ["--config", str(config), "--output", str(output), "--seeds", "0", "1", "--draws", str(draws)]
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as when it is started by its path
    monkeypatch.setattr(sys, "argv", ["redraws.py", *options])
    runpy.run_path(str(BENCHMARKS / "redraws.py"), run_name="__main__")
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """The config of studies whose runs are finished, of two seeds, after two draws of each; and what was written of those."""
    folder = tmp_path_factory.mktemp("redraws")
    fields = released_study(folder / "runs", write_tiny_release(folder / "release"))
    (folder / "base.yaml").write_text(yaml.safe_dump(fields))
    with pytest.MonkeyPatch.context() as monkeypatch:
        redraw(folder / "base.yaml", folder / "redraws.json", 2, monkeypatch)
    return folder


def test_every_draw_is_another(studies):
    content, page = json.loads((studies / "redraws.json").read_text()), (studies / "redraws.md").read_text()
    assert (content["seeds"], content["draws"]) == ([0, 1], 2)
    found = [
        draw["fid"]["label"][arm]
        for draws in content["distances"].values()
        for draw in draws
        for arm in draw["fid"]["label"]
    ]
    assert len(found) == 8
    assert len({*found}) >= 4  # of either seed two draws; a tuned policy may be the pretrained one
    assert set(content["gap_closed"]) == set(content["distances"]["1"][0]) == {"fid", "fid_heldout", "kid"}
    report = json.loads((studies / "runs-1" / "report.json").read_text())
    shares = content["gap_closed"]["fid"]["second_judge"]["by_seed"]["1"]
    assert shares["report"] == report["gap_closed"]["second_judge"]
    assert "\n| 0 | " in page
    assert "\n| mean (95 %) | " in page


def test_shares_are_of_the_gap_to_the_limit_of_the_report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import redraws

    def report(tuned: float) -> dict:
        arms = {"limit": 1.0, "standard": 3.0, "rl": tuned}
        by_class = {arm: {"all": value, "HGG": 0.0} for arm, value in arms.items()}
        return {
            "fid": dict.fromkeys(redraws.ROLES, by_class),
            "fid_heldout": dict.fromkeys(redraws.ROLES, by_class),
            "kid": dict.fromkeys(redraws.ROLES, arms),
        }

    def draw(standard: float, tuned: float) -> dict:
        arms = {"standard": standard, "rl": tuned}
        return {distance: dict.fromkeys(redraws.ROLES, arms) for distance in redraws.DISTANCES}

    reports = {3: report(2.0), 5: report(1.5)}
    draws = {3: [draw(2.0, 2.0), draw(5.0, 3.0)], 5: [draw(2.0, 1.0), draw(3.0, 2.0)]}
    for distance in redraws.DISTANCES:
        found = redraws.shares_over_seeds(distance, "judge", reports, draws)
        assert found["by_seed"]["3"] == {
            "report": 0.5,
            "draws": {"mean": 0.25, "sd": pytest.approx(0.125**0.5), "values": [0.0, 0.5]},
        }
        assert found["by_seed"]["5"]["draws"]["values"] == [1.0, 0.5]
        assert found["reports"]["values"] == [0.5, 0.75]
        assert (found["draws"]["mean"], found["draws"]["values"]) == (0.5, [0.25, 0.75])
    draws[5][0] = draw(1.0, 0.9)  # as near as the limit: nothing to close
    assert redraws.shares_over_seeds("kid", "judge", reports, draws)["draws"] is None


def test_the_noise_of_the_report_gives_its_distances(studies, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import redraws

    config = StudyConfig(**released_study(studies / "runs-1", str(studies / "release"), seed=1))
    report = json.loads((studies / "runs-1" / "report.json").read_text())
    study = redraws.Redraws(config, report)
    again = study.measure(fold_seed(study.yardstick.seed, "evaluate"))
    known = redraws.distances_of_report(report)
    for distance, by_role in again.items():
        for role, arms in by_role.items():
            assert arms == pytest.approx({arm: known[distance][role][arm] for arm in arms}, rel=1e-6)


def test_a_killed_benchmark_goes_on(studies, tmp_path, monkeypatch):
    """Draws that are there stay, and those after them do not depend on where it was killed."""
    kept = studies / "runs-0" / "redraws.json"
    before = json.loads(kept.read_text())["draws"]
    redraw(studies / "base.yaml", tmp_path / "more.json", 3, monkeypatch)
    whole = json.loads(kept.read_text())["draws"]
    assert whole[:2] == before
    assert len(whole) == 3
    kept.write_text(json.dumps({"fingerprint": "of another study", "draws": before[:1] * 3}))
    redraw(studies / "base.yaml", tmp_path / "again.json", 3, monkeypatch)
    assert json.loads(kept.read_text())["draws"] == whole
    fewer = redraw(studies / "base.yaml", tmp_path / "fewer.json", 2, monkeypatch)
    assert fewer["distances"]["0"] == before


def test_one_draw_has_no_deviation(studies, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="1"):
        redraw(studies / "base.yaml", tmp_path / "one.json", 1, monkeypatch)
    assert capsys.readouterr().err == "error: --draws must be 2 or more, got 1.\n"
