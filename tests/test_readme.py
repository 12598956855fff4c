"""The README and the page of results say what the JSON files under examples/results say."""

import json
import re
import runpy
from pathlib import Path

import pytest

from msrl_diffusers.cli import api_page


ROOT = Path(__file__).parents[1]


def test_results_are_those_of_the_json_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    script = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "results_page.py"))
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "examples/results/README.md"))
    assert script["updated"](readme) == readme, "run python examples/benchmarks/results_page.py"
    assert script["page"]() == page, "run python examples/benchmarks/results_page.py"
    assert "| what was tuned, and how |" in readme
    assert "| method: trainer | take it when |" in readme
    assert "| seed | extractor |" in page


def test_methods_were_measured_by_the_release_s_label_extractor():
    measured = json.loads((ROOT / "examples/results/objectives-phantoms.json").read_text())["extractors"]["label"]
    released = json.loads((ROOT / "model_cards/phantoms-32/scores.json").read_text())["extractor"]
    assert measured["sha256"] == released["sha256"]


@pytest.mark.parametrize("page", ["README.md", "examples/README.md", "examples/results/README.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", (ROOT / page).read_text())
    assert links
    for target, anchor in links:
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in [api_page.anchor(heading) for heading in headings], f"{target}#{anchor}"
