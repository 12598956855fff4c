"""The README says what the JSON files under examples/results say."""

import json
import runpy
from pathlib import Path


ROOT = Path(__file__).parents[1]


def test_results_are_those_of_the_json_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    script = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "readme_results.py"))
    readme = (ROOT / "README.md").read_text()
    assert script["updated"](readme) == readme, "run python examples/benchmarks/readme_results.py"
    assert "| seed | extractor |" in readme


def test_methods_were_measured_by_the_release_s_label_extractor():
    measured = json.loads((ROOT / "examples/results/objectives-phantoms.json").read_text())["extractors"]["label"]
    released = json.loads((ROOT / "model_cards/phantoms-32/scores.json").read_text())["extractor"]
    assert measured["sha256"] == released["sha256"]
