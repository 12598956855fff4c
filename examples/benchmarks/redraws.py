"""How much of what a report says is the draw of its samples? Finished studies, sampled again and again.

    python examples/benchmarks/redraws.py --output examples/results/redraws-phantoms.json

A report compares one set of samples of the pretrained policy with one of the tuned policy. Here both are sampled anew, from other
noise in every draw and the same for both, at the samplers that the report chose, and compared with the real volumes of the report.
Draws of one seed differ by the noise of the measurement; means over them, from seed to seed, by what tuning came to. The study of
seed N is in `<output_dir>-N`, as by `make demo SEED=1 DEMO_DIR=outputs/demo-1`; where it is not finished it is run first. Beside the
JSON lies the same as a Markdown table.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from _results_words import closed
from _runs import ROLES, interval_over_seeds
from tqdm import tqdm

from msrl_diffusers.arguments import CONFIG_HELP, parse, take_option
from msrl_diffusers.errors import InputError, sentence_instead_of_traceback
from msrl_diffusers.evaluation.fidelity import frechet_distance
from msrl_diffusers.files import write_json, write_text
from msrl_diffusers.seeding import fold_seed
from msrl_diffusers.study import StudyConfig, run_study
from msrl_diffusers.study.artifacts import load_pipeline, load_tuned_pipeline
from msrl_diffusers.study.baseline import Yardstick, load_baseline
from msrl_diffusers.study.chain import fingerprint
from msrl_diffusers.study.command_line import read_study
from msrl_diffusers.study.report import gap_closed, git_commit, versions
from msrl_diffusers.study.stages import sample_with
from msrl_diffusers.study.tables import summary


CONFIG = Path(__file__).parents[1] / "configs" / "phantoms" / "demo.yaml"
DISTANCES = {  # of a report, and in words
    "fid": "Frechet distance to the training volumes",
    "fid_heldout": "the same to held-out volumes",
    "kid": "kernel distance to the training volumes",
}


@dataclass
class RedrawArguments:
    """What is sampled again. `--config FILE` names another study; every field of StudyConfig is an option too."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the studies."})
    draws: int = field(default=4, metadata={"help": "Sets of samples, of either policy, in every study; 2 or more."})
    output: str = field(default="outputs/redraws.json", metadata={"help": "The JSON; the table lies beside it."})

    def __post_init__(self):
        if self.draws < 2:  # a deviation needs two
            raise InputError(f"--draws must be 2 or more, got {self.draws}.")


class Redraws:
    """A finished study whose policies are sampled again."""

    def __init__(self, config: StudyConfig, report: dict):
        _, real = load_baseline(config)
        self.config, self.yardstick = config, Yardstick.of(config, real)
        self.policies = {"standard": load_pipeline(config), "rl": load_tuned_pipeline(config)}
        self.samplers = {arm: report["samplers"][report["chosen"][arm].split(" @ ")[1]] for arm in self.policies}

    def measure(self, seed: int) -> dict:
        """`{distance: {role: {arm: value}}}` of one draw, of all classes, as the report has them."""
        arms = {
            arm: sample_with(pipeline, self.yardstick.train, self.samplers[arm], self.config, seed)
            for arm, pipeline in self.policies.items()
        }
        features = self.yardstick.features(arms)
        measured = self.yardstick.distances(arms, features)
        fid, real = measured["fid_by_sampler"], self.yardstick.real
        return {
            "fid": {role: {arm: fid[role][arm]["all"] for arm in arms} for role in features},
            "fid_heldout": {
                role: {arm: frechet_distance(real[role]["heldout"], of[arm]) for arm in arms}
                for role, of in features.items()
            },
            "kid": measured["kid_by_sampler"],
        }


def distances_of_draws(config: StudyConfig, report: dict, draws: int) -> list[dict]:
    """Of every draw what `Redraws.measure` finds. Each is written when it is there (`redraws.json` in the study's folder): a
    killed benchmark goes on at the next."""
    path, made_by = Path(config.output_dir) / "redraws.json", fingerprint(config, "report")
    known = json.loads(path.read_text()) if path.is_file() else {}
    found = known["draws"] if known.get("fingerprint") == made_by else []
    if len(found) < draws:
        study = Redraws(config, report)
        for number in tqdm(range(len(found), draws), desc=f"draws of seed {config.seed}"):
            found.append(study.measure(fold_seed(study.yardstick.seed, "redraw", number)))
            write_json(path, {"fingerprint": made_by, "draws": found})
    return found[:draws]


def distances_of_report(report: dict) -> dict:
    """The report's own in the shape of a draw, with those of the limit."""
    values = {
        name: {role: {arm: report[name][role][arm] for arm in ("limit", "standard", "rl")} for role in ROLES}
        for name in DISTANCES
    }
    for name in ("fid", "fid_heldout"):  # which are there by class too
        values[name] = {role: {arm: fid["all"] for arm, fid in arms.items()} for role, arms in values[name].items()}
    return values


def shares_over_seeds(distance: str, role: str, reports: Mapping[int, dict], draws: Mapping[int, list[dict]]) -> dict:
    """By seed the share of the gap that the policy closes by its report, and by the draws, whose limit is the report's; and the
    means of both over the seeds."""
    by_seed = {}
    for seed, report in reports.items():
        own = distances_of_report(report)[distance][role]
        of_draws = [_share({**own, **draw[distance][role]}) for draw in draws[seed]]
        by_seed[str(seed)] = {"report": _share(own), "draws": summary(of_draws)}
    means = [one["draws"] and one["draws"]["mean"] for one in by_seed.values()]
    return {
        "reports": interval_over_seeds([one["report"] for one in by_seed.values()]),
        "draws": interval_over_seeds(means),
        "by_seed": by_seed,
    }


def _share(arms: Mapping[str, float]) -> float | None:
    return gap_closed({arm: {"all": value} for arm, value in arms.items()})


def markdown(content: dict) -> str:
    """The shares as a page."""
    lines = [
        "# The draw of the samples",
        "",
        f"{content['what']}. {content['dataset']} `{content['data_fingerprint']}`, {content['n']['all']} volumes on each side of a "
        f"distance, {len(content['seeds'])} seeds, {content['draws']} draws in each. Not for clinical use.",
        "",
        *(f"- {role}: `{one['name']}` `{one['sha256']}`" for role, one in content["extractors"].items()),
        "",
    ]
    for distance, title in DISTANCES.items():
        lines += [
            f"## Gap closed, {title}",
            "",
            "| seed | " + " | ".join(f"{role.replace('_', ' ')}: report | draws" for role in ROLES) + " |",
            "|---" * (1 + 2 * len(ROLES)) + "|",
        ]
        shares = content["gap_closed"][distance]
        for seed in map(str, content["seeds"]):
            found = [shares[role]["by_seed"][seed] for role in ROLES]
            lines.append(
                f"| {seed} | "
                + " | ".join(f"{_percent(one['report'])} | {_spread(one['draws'])}" for one in found)
                + " |"
            )
        cells = [f"{closed(shares[role]['reports'])} | {closed(shares[role]['draws'])}" for role in ROLES]
        lines += ["| mean (95 %) | " + " | ".join(cells) + " |", ""]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "no gap" if value is None else f"{value:.0%}"


def _spread(figure: Mapping | None) -> str:
    return "no gap in one draw or more" if figure is None else f"{figure['mean']:.0%} +- {figure['sd']:.0%}"


def main() -> None:
    path, rest = take_option("config", sys.argv[1:])
    args, base = parse([RedrawArguments, StudyConfig], read_study(path or CONFIG), rest, taken=CONFIG_HELP)
    reports, draws = {}, {}
    for seed in args.seeds:
        config = replace(base, seed=seed, output_dir=f"{base.output_dir}-{seed}")
        run_study(config)
        reports[seed] = json.loads((Path(config.output_dir) / "report.json").read_text())
        draws[seed] = distances_of_draws(config, reports[seed], args.draws)
    first = next(iter(reports.values()))
    content = {
        "what": "What a tuned policy closes of the gap to the limit, by the report of its run and by further draws of samples; +- between draws",
        **{name: first[name] for name in ("dataset", "data_fingerprint", "pretrained", "n", "extractors")},
        "seeds": args.seeds,
        "draws": args.draws,
        "gap_closed": {
            distance: {role: shares_over_seeds(distance, role, reports, draws) for role in ROLES}
            for distance in DISTANCES
        },
        "distances": {str(seed): found for seed, found in draws.items()},
        "commits_of_runs": sorted({report["commit"] for report in reports.values() if report["commit"]}),
        "commit": git_commit(),
        "versions": versions(),
    }
    write_json(args.output, content)
    write_text(Path(args.output).with_suffix(".md"), markdown(content))
    sys.stdout.write(markdown(content))


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        main()
