"""The page of results, and the README's lines of them, from the JSON files under examples/results; no number in them is typed.

    python examples/benchmarks/results_page.py

Writes examples/results/README.md, and what stands between marks in README.md: the summary, and the table of methods. A test holds
that they agree with the files.
"""

import json
from pathlib import Path

from _results_images import race_lines, story_lines
from _results_methods import lower_line, method_lines, trainer_lines
from _results_recipes import recipe_lines, refusal_line
from _results_summary import summary_lines
from _results_volumes import STUDIES, agreement_lines, paper_lines, study_lines


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "results"
TITLE = """# Results

Made by `examples/benchmarks/results_page.py` from the JSON files in this folder, which say with which seeds, numbers of
volumes, extractors, versions and commit they were made. Words are explained in the [glossary](../README.md#words); what is measured,
and how, in the [README](../../README.md#what-it-measures-and-how). Not for clinical use.
"""


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))
    (RESULTS / "README.md").write_text(page())


def updated(readme: str) -> str:
    """The README's text with what stands between its marks made anew."""
    for name, lines in {"results": summary(), "methods": methods()}.items():
        start, end = f"<!-- {name}: begin, by examples/benchmarks/results_page.py -->", f"<!-- {name}: end -->"
        before, rest = readme.split(start)
        _, after = rest.split(end)
        readme = "\n".join([before + start, *lines, end + after])
    return readme


def summary() -> list[str]:
    """What the studies say, in one table and some sentences."""
    return summary_lines(
        reports_of("phantoms-demo-seed*.json"), read("objectives-phantoms.json"), read("recipes-phantoms.json"),
        read("study-phantoms-32/tables.json"), read("class-agreement.json"), read("objectives-ixi.json"),
        reports_of("dermoscopy-seed*.json"),
    )  # fmt: skip


def methods() -> list[str]:
    """Which trainer to take when, and what it costs."""
    return trainer_lines(read("objectives-phantoms.json"), read("method-memory.json"))


def page() -> str:
    """The page: a section for each study."""
    sections = {
        "Phantoms at 32^3: `make demo`": study_lines(by_path("phantoms-demo-seed*.json")),
        "Is the tumor that was asked for to be seen?": agreement_lines(read("class-agreement.json")),
        "The same pipeline by other methods": method_lines(
            read("objectives-phantoms.json"), read("method-memory.json")
        ),
        "Rewards under optimization": recipe_lines(
            read("recipes-phantoms.json"),
            "recipes-phantoms",
            read("objectives-phantoms.json"),
            reports_of("phantoms-demo-seed*.json"),
            read("redraws-phantoms.json"),
        ),
        **{
            f"The paper's tables: {STUDIES[path.parent.name][0]}": paper_lines(content, path.parent.name)
            for path, content in by_path("study-*/tables.json").items()
        },
        "Real brains at 32^3: IXI, classes by age": [
            *study_lines(by_path("ixi-*.json")),
            refusal_line(read("recipes-ixi.json"), "recipes-ixi"),
            lower_line(read("objectives-ixi.json"), "objectives-ixi"),
        ],
        "Text to image: drawn dermoscopy images at 32 x 32": story_lines(by_path("dermoscopy-seed*.json")),
        "The trainer beside TRL's DDPOTrainer": race_lines(read("ppo-vs-trl.json")),
    }
    parts = ["\n".join([f"## {title}", "", *lines, ""]) for title, lines in sections.items()]
    return "\n".join([TITLE, *parts])


def read(name: str) -> dict:
    """What a file of the results says."""
    return json.loads((RESULTS / name).read_text())


def by_path(pattern: str) -> dict[Path, dict]:
    """Several files, in the order of their names."""
    return {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))}


def reports_of(pattern: str) -> list[dict]:
    """As `by_path`, without the paths."""
    return list(by_path(pattern).values())


if __name__ == "__main__":
    main()
