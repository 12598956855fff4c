"""The README's section of results, from the JSON files under examples/results; nothing in it is typed.

    python examples/benchmarks/readme_results.py

Writes what stands between the two marks in README.md anew. A test holds that the two agree.
"""

import json
from pathlib import Path

from _readme_images import race_lines, story_lines
from _readme_methods import lower_line, method_lines, recipe_lines, refusal_line
from _readme_volumes import agreement_lines, paper_lines, study_lines


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "results"
START, END = "<!-- results: begin, by examples/benchmarks/readme_results.py -->", "<!-- results: end -->"


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))


def updated(readme: str) -> str:
    """The README's text with the section made anew."""
    before, rest = readme.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{section()}{END}{after}"


def section() -> str:
    """The lines between the marks."""
    demos = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("phantoms-demo-seed*.json"))}
    lines = ["### Phantoms at 32^3: `make demo`", "", *study_lines(demos), ""]
    agreement = RESULTS / "class-agreement.json"
    if agreement.is_file():
        lines += [
            "### Is the tumor that was asked for to be seen?",
            "",
            *agreement_lines(json.loads(agreement.read_text())),
            "",
        ]
    objectives = RESULTS / "objectives-phantoms.json"
    if objectives.is_file():
        memory = json.loads((RESULTS / "method-memory.json").read_text())
        lines += [
            "### The same pipeline by other methods",
            "",
            *method_lines(json.loads(objectives.read_text()), memory),
            "",
        ]
    recipes = RESULTS / "recipes-phantoms.json"
    if recipes.is_file():
        lines += [
            "### Rewards under optimization",
            "",
            *recipe_lines(json.loads(recipes.read_text()), recipes.stem),
            "",
        ]
    for path in sorted(RESULTS.glob("study-*/tables.json")):
        lines += [*paper_lines(json.loads(path.read_text()), path.parent.name), ""]
    others = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("ixi-*.json"))}
    if others:
        recipes = RESULTS / "recipes-ixi.json"
        refusals = [refusal_line(json.loads(recipes.read_text()), recipes.stem)] if recipes.is_file() else []
        methods = RESULTS / "objectives-ixi.json"
        by_method = [lower_line(json.loads(methods.read_text()), methods.stem)] if methods.is_file() else []
        lines += ["### Real brains at 32^3: IXI, classes by age", "", *study_lines(others), *refusals, *by_method, ""]
    stories = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("dermoscopy-seed*.json"))}
    if stories:
        lines += ["### Text to image: drawn dermoscopy images at 32 x 32", "", *story_lines(stories), ""]
    race = json.loads((RESULTS / "ppo-vs-trl.json").read_text())
    lines += ["### The trainer beside TRL's DDPOTrainer", "", *race_lines(race), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
