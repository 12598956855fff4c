"""How well can a reward model tell reconstructions from samples at all? The AUC of the study's rewards beside its ceiling.

    python examples/benchmarks/reward_ceiling.py --num_validity_subjects 16 --output examples/results/reward-ceiling-phantoms.json

The reward models of a study learn all its trajectory sets; those of `extremes` are the same networks, trained as long on the two
sets that the AUC compares and on nothing else: reconstructions of one noise step, and samples of 100 steps. What they can't tell
apart on held-out subjects, no reward of this size can. Beside the JSON lies the same as a Markdown table.
"""

import json
import sys
from pathlib import Path

from _runs import chosen, configs_of, parse_benchmark

from msrl_diffusers.errors import InputError, sentence_instead_of_traceback
from msrl_diffusers.files import write_json, write_text
from msrl_diffusers.study import StudyConfig
from msrl_diffusers.study.chain import study_chain
from msrl_diffusers.study.report import git_commit, versions
from msrl_diffusers.study.runs import run_configs
from msrl_diffusers.study.tables import shown, summary


CONFIG = Path(__file__).parents[1] / "configs" / "phantoms" / "recipes" / "default.yaml"
VARIANTS: dict[str, dict] = {"all_sets": {}, "extremes": {"reconstruction_steps": [1], "synthetic_steps": [100]}}
FIGURES = ("auc", "spearman")


def validity_of_run(config: StudyConfig) -> dict:
    """What the reward models of a run are worth on held-out subjects, by role."""
    return json.loads((Path(config.output_dir) / "validity" / "stage.json").read_text())["result"]


def markdown(content: dict) -> str:
    """A line per set of reward models."""
    columns = [(role, figure) for role in next(iter(content["rows"].values())) for figure in FIGURES]
    lines = [
        "# What the reward models can learn",
        "",
        f"{content['what']}. {content['dataset']} `{content['data_fingerprint']}`, {content['num_validity_subjects']} held-out "
        f"subjects per class, seeds {', '.join(map(str, content['seeds']))}: means, with deviations over seeds.",
        "",
        "| trained on | " + " | ".join(f"{figure}, {role}" for role, figure in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name, row in content["rows"].items():
        cells = [shown(row[role][figure], ".3f") for role, figure in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args, base = parse_benchmark(CONFIG, "outputs/reward_ceiling.json")
    if args.finished or args.note:
        raise InputError(
            "reward_ceiling.py gathers no finished runs and prints no note; leave --finished and --note out."
        )
    configs = configs_of(base, chosen(VARIANTS, args.variants), args.seeds)
    for sentence in run_configs(base, configs, args.jobs, study_chain(base).up_to("validity")).values():
        raise InputError(sentence)
    rows = {}
    for name, by_seed in configs.items():
        found = [validity_of_run(config) for config in by_seed.values()]
        rows[name] = {
            role: {figure: summary([one[role][figure] for one in found]) for figure in FIGURES} for role in found[0]
        }
    prepared = json.loads((Path(base.output_dir) / "prepare" / "stage.json").read_text())["result"]
    content = {
        "what": "AUC of reconstructions of one noise step against samples of 100 steps, and rank correlation with the targets",
        "dataset": base.dataset,
        "data_fingerprint": prepared["fingerprint"],
        "pretrained": base.pretrained and Path(base.pretrained).name,
        "num_validity_subjects": base.num_validity_subjects,
        "seeds": args.seeds,
        "rows": rows,
        "commit": git_commit(),
        "versions": versions(),
    }
    write_json(args.output, content)
    write_text(Path(args.output).with_suffix(".md"), markdown(content))
    sys.stdout.write(markdown(content))


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        main()
