"""The README says what the JSON files under examples/results say."""

import runpy
from pathlib import Path


ROOT = Path(__file__).parents[1]


def test_results_are_those_of_the_json_files():
    script = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "readme_results.py"))
    readme = (ROOT / "README.md").read_text()
    assert script["updated"](readme) == readme, "run python examples/benchmarks/readme_results.py"
    assert "| seed | extractor |" in readme
