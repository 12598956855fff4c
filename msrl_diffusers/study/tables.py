"""tables.json and tables.md: a study over several seeds in the shape of the tables of arXiv 2603.06173, from its reports."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student_t

from ..files import write_json, write_text
from . import published
from .chain import enabled_stages
from .config import StudyConfig
from .report import METHOD_NAMES, gap_closed, git_commit, versions
from .variants import FULL


ROLES = ("judge", "second_judge", "label")
ARMS = {"limit": "autoencoder (limit)", "standard": "standard diffusion", "rl": "RL-tuned"}
METRICS = ("accuracy", "f1", "auc")
REAL, STANDARD, TUNED = "real only", "+ standard synthetic", "+ RL synthetic"
DRAWN_ANEW = ["reward models", "PPO", "evaluation"]  # by seed, where tables of earlier versions do not say


def write_tables(config: StudyConfig, runs: Mapping[str, Mapping[int, StudyConfig]]) -> dict:
    """Write `tables.json`, `tables.md` and `tables.png` (samples of the first seed) into the study's folder; `runs` are those of
    `runs.run_variants`."""
    reports = {
        variant: {
            seed: json.loads((Path(run.output_dir) / "report.json").read_text()) for seed, run in by_seed.items()
        }
        for variant, by_seed in runs.items()
    }
    full = reports[FULL]
    content = {
        "dataset": config.dataset,
        "data_fingerprint": next(iter(full.values()))["data_fingerprint"],
        "n": next(iter(full.values()))["n"],
        "seeds": list(full),
        "drawn_anew": [
            *(["reward models"] if "rewards" in enabled_stages(config) else []), METHOD_NAMES[config.method], "evaluation",
        ],
        "extractors": next(iter(full.values()))["extractors"],
        "fid": {role: fid_table(full.values(), role) for role in ROLES},
        "gap_closed": {role: summary([report["gap_closed"][role] for report in full.values()]) for role in ROLES},
        "gap_closed_heldout": {
            role: summary([gap_closed(report["fid_heldout"][role]) for report in full.values()]) for role in ROLES
        },
        "downstream": downstream_table(full.values()),
        "ablations": {variant: ablation_row(by_seed.values()) for variant, by_seed in reports.items()},
        "rewarded": all(report.get("rewarded", True) for report in full.values()),
        "findings": findings(reports),
        "published": {
            "source": published.SOURCE,
            "fid": published.FID,
            "downstream": published.DOWNSTREAM,
            "comparators": published.COMPARATORS,
            "ablations": published.ABLATIONS,
        },
        "runs": {
            variant: {str(seed): _origin(run, reports[variant][seed]) for seed, run in by_seed.items()}
            for variant, by_seed in runs.items()
        },
        "commit": git_commit(),
        "versions": versions(),
    }  # fmt: skip
    pictures = Path(next(iter(runs[FULL].values())).output_dir) / "figures" / "comparison.png"
    shutil.copyfile(pictures, Path(config.output_dir) / "tables.png")
    write_text(Path(config.output_dir) / "tables.md", markdown(content))
    write_json(Path(config.output_dir) / "tables.json", content)
    return content


def _origin(run: StudyConfig, report: dict) -> dict:
    """Where a run lies and what its report was made by; reports of earlier versions name no device or no precision."""
    return {
        "folder": Path(run.output_dir).name,
        "commit": report["commit"],
        "device": report.get("device"),
        "precision": report.get("precision"),
    }


def summary(values: Sequence[float | None]) -> dict | None:
    """`{"mean", "sd", "values"}` over seeds (`sd` is None for one); None where a value is missing."""
    values = list(values)
    if not values or any(value is None for value in values):
        return None
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None, "values": values}


def fid_table(reports: Sequence[dict], role: str) -> dict:
    """Frechet distances by arm and class, over seeds."""
    reports = list(reports)
    return {
        arm: {
            name: summary([report["fid"][role][arm][name] for report in reports])
            for name in reports[0]["fid"][role][arm]
        }
        for arm in ("real_floor", *ARMS)
    }


def downstream_table(reports: Sequence[dict]) -> dict | None:
    """Classification of held-out real volumes by arm, over seeds; None where the study had no such stage."""
    reports = list(reports)
    if any(report.get("downstream") is None for report in reports):
        return None
    return {
        arm: {metric: summary([report["downstream"][arm][metric] for report in reports]) for metric in METRICS}
        for arm in reports[0]["downstream"]
    }


def ablation_row(reports: Sequence[dict]) -> dict:
    """The tuned arm of one variant: its distances, the gap it closes, and the accuracy its volumes lead to."""
    reports = list(reports)
    downstream = downstream_table(reports)
    return {
        **{f"fid_{role}": summary([report["fid"][role]["rl"]["all"] for report in reports]) for role in ROLES},
        **{f"gap_closed_{role}": summary([report["gap_closed"][role] for report in reports]) for role in ROLES},
        "accuracy": downstream and downstream[TUNED]["accuracy"],
    }


def findings(reports: Mapping[str, Mapping[int, dict]]) -> list[dict]:
    """What the paper found, and whether it holds here: the mean of paired differences over seeds with its 95 % t interval.

    `holds` is true (false) where the interval lies on the claimed (other) side of zero, None where it contains it, or where
    there is one seed alone. A difference is positive where the claim is right.
    """
    full = reports[FULL]
    rewarded = all(report.get("rewarded", True) for report in full.values())
    tuned = "RL-tuned" if rewarded else "tuned"

    def tuned_fid(report: dict) -> float:
        return report["fid"]["judge"]["rl"]["all"]

    def accuracy(arm: str, report: dict) -> float:
        return report["downstream"][arm]["accuracy"]

    claims = [
        (f"{tuned} volumes have a lower Frechet distance (judge) than standard ones",
         [report["fid"]["judge"]["standard"]["all"] - tuned_fid(report) for report in full.values()]),
    ]  # fmt: skip
    of_rewards = (
        ("reward_3d_only", "2D and 3D rewards together give a lower distance (judge) than the 3D reward alone"),
        ("sparse_steps", "reward data of many noise steps give a lower distance (judge) than of three"),
    )
    for variant, claim in of_rewards if rewarded else ():
        pairs = [(reports[variant][seed], full[seed]) for seed in full] if variant in reports else []
        claims.append((claim, [tuned_fid(other) - tuned_fid(own) for other, own in pairs]))
    if all(report.get("downstream") for report in full.values()):
        claims += [
            ("pretraining on standard synthetic volumes raises the accuracy of a classifier",
             [accuracy(STANDARD, report) - accuracy(REAL, report) for report in full.values()]),
            (f"pretraining on {tuned} volumes raises it more than on standard ones",
             [accuracy(TUNED, report) - accuracy(STANDARD, report) for report in full.values()]),
        ]  # fmt: skip
    return [{"claim": claim, **verdict(differences)} for claim, differences in claims]


def verdict(differences: Sequence[float]) -> dict:
    """`{"holds", "mean", "interval", "values"}` of paired differences, one per seed."""
    if len(differences) < 2:
        return {"holds": None, "mean": mean(differences) if differences else None, "interval": None, "values": list(differences)}  # fmt: skip
    half = student_t.ppf(0.975, len(differences) - 1) * stdev(differences) / len(differences) ** 0.5
    low, high = mean(differences) - half, mean(differences) + half
    return {
        "holds": True if low > 0 else False if high < 0 else None,
        "mean": mean(differences),
        "interval": [float(low), float(high)],
        "values": list(differences),
    }


def markdown(content: dict) -> str:
    """The tables as a page."""
    seeds = len(content["seeds"])
    lines = [
        "# Tables",
        "",
        f"Data: {content['dataset']} `{content['data_fingerprint']}`; {content['n']['all']} volumes on each side of a distance; mean and "
        f"deviation over {seeds} seed{'s' * (seeds > 1)} of: {', '.join(content.get('drawn_anew', DRAWN_ANEW))}. The published columns "
        f"({published.SOURCE}) are of other data and another extractor: compare shares of the gap, not distances. Not for clinical use.",
        "",
    ]  # fmt: skip
    if not content.get("rewarded", True):
        lines += [
            "Tuned without rewards: the rows called RL are of that, beside the paper's, which are of reinforcement learning.",
            "",
        ]
    for role in ROLES:
        lines += _fid_lines(content, role)
    lines += _downstream_lines(content)
    lines += _ablation_lines(content)
    lines += [
        "## Which findings hold here",
        "",
        "| claim | difference (positive: as claimed) | holds |",
        "|---|---|---|",
    ]
    for finding in content["findings"]:
        interval = finding["interval"]
        difference = (
            f"{finding['mean']:+.4f} ({interval[0]:+.4f} .. {interval[1]:+.4f})"
            if interval
            else "one seed"
            if finding["values"]
            else "not measured"
        )
        lines.append(f"| {finding['claim']} | {difference} | {_holds(finding)} |")
    lines += [
        "",
        "## Samples",
        "",
        f"Seed {content['seeds'][0]}: training volumes, their reconstructions, samples, and samples of the tuned model from the same noise.",
        "",
        "![Samples](tables.png)",
    ]
    return "\n".join([*lines, ""])


def _fid_lines(content: dict, role: str) -> list[str]:
    table, identity = content["fid"][role], content["extractors"][role]
    classes = list(table["standard"])
    columns = [f"{data}, all" for data in published.FID]
    lines = [
        f"## Frechet distance to the training volumes, {role.replace('_', ' ')} (Table 2)",
        "",
        f"`{identity['name']}` `{identity['sha256']}`, lower is better.",
        "",
        "| | " + " | ".join([*classes, *(f"published: {column}" for column in columns)]) + " |",
        "|---" * (1 + len(classes) + len(columns)) + "|",
    ]
    for arm, title in ARMS.items():
        values = [shown(table[arm][name], ".4f") for name in classes]
        theirs = [f"{published.FID[data][arm]['all']:.2f}" for data in published.FID]
        lines.append(f"| {title} | " + " | ".join([*values, *theirs]) + " |")
    gaps = {
        "gap closed": ("gap_closed", [f"{_published_gap(data):.2f}" for data in published.FID]),
        "gap closed, distances to held-out volumes": ("gap_closed_heldout", [""] * len(published.FID)),
    }
    for title, (name, theirs) in gaps.items():
        closed = content[name][role]
        own = "no gap in one seed or more" if closed is None else shown(closed, ".2f")
        lines.append(f"| {title} | {own} |" + " |" * (len(classes) - 1) + " " + " | ".join(theirs) + " |")
    return [*lines, ""]


def _published_gap(data: str) -> float:
    fids = {arm: values["all"] for arm, values in published.FID[data].items()}
    return (fids["standard"] - fids["rl"]) / (fids["standard"] - fids["limit"])


def _downstream_lines(content: dict) -> list[str]:
    table = content["downstream"]
    lines = ["## A classifier pretrained on synthetic volumes (Tables 3 and 4)", ""]
    if table is None:
        return [*lines, "Not measured: the config has no section `downstream`.", ""]
    data = list(published.DOWNSTREAM)
    header = [*METRICS, *(f"published: {name}" for name in data)]
    lines += ["| | " + " | ".join(header) + " |", "|---" * (1 + len(header)) + "|"]
    for arm, row in table.items():
        theirs = [
            " / ".join(
                f"{value:.2f}+-{deviation:.2f}" for value, deviation in published.DOWNSTREAM[name][arm].values()
            )
            if arm in published.DOWNSTREAM[name]
            else ""
            for name in data
        ]
        lines.append(f"| {arm} | " + " | ".join([*(shown(row[metric], ".2f") for metric in METRICS), *theirs]) + " |")
    for name, row in published.COMPARATORS.items():
        if name not in table:
            lines.append(
                f"| {name} (published only) | | | | {' / '.join(f'{value:.2f}' for value in row.values())} | |"
            )
    return [*lines, "", "Published: accuracy / F1 / AUC.", ""]


def _ablation_lines(content: dict) -> list[str]:
    lines = [
        "## What is lost without (Table 5)",
        "",
        "| | judge | label | gap closed, judge | accuracy | published: distance | published: accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, row in content["ablations"].items():
        theirs = published.ABLATIONS[variant]
        cells = [shown(row["fid_judge"], ".4f"), shown(row["fid_label"], ".4f"), shown(row["gap_closed_judge"], ".2f")]
        cells += [shown(row["accuracy"], ".2f"), f"{theirs['fid']:.2f}", f"{theirs['accuracy']:.2f}"]
        lines.append(f"| {variant.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def shown(figure: Mapping | None, form: str) -> str:
    """Mean, and deviation over seeds where there are several, of what `summary` made; `form` is of the mean."""
    if figure is None:
        return ""
    return format(figure["mean"], form) + ("" if figure["sd"] is None else f" +- {figure['sd']:{form.lstrip('+')}}")


def _holds(finding: dict) -> str:
    return {True: "yes", False: "no, the opposite", None: "not shown"}[finding["holds"]]
