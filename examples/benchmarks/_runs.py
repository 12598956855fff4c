"""Studies of several variants and seeds side by side: run, gathered into figures over seeds, written as JSON and Markdown.

For recipes.py and objectives.py. Every run is a study in a folder of its own below `output_dir`; what several have in common
is made once, and a benchmark that was killed goes on when it is started again.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from _results_words import closed
from accelerate.utils import merge_dicts
from matplotlib.figure import Figure

from msrl_diffusers.arguments import CONFIG_HELP, parse, take_option
from msrl_diffusers.errors import InputError
from msrl_diffusers.files import write_json, write_text
from msrl_diffusers.study import StudyConfig
from msrl_diffusers.study.command_line import read_study
from msrl_diffusers.study.outcomes import outcome
from msrl_diffusers.study.report import gap_closed, git_commit
from msrl_diffusers.study.runs import run_configs
from msrl_diffusers.study.tables import TUNED, downstream_table, shown, summary, verdict
from msrl_diffusers.study.variants import changed_config


Changes = Mapping | Callable[[StudyConfig, int], Mapping]  # of StudyConfig's fields; some depend on the seed
SAMPLERS = ("best", "rollout", "stochastic")
ROLES = ("judge", "second_judge", "label")
OTHER_ARMS = {
    "standard": "pretrained, at its best sampler",
    "limit_heldout": "reconstructions of held-out volumes",
    "limit": "reconstructions (limit)",
}


@dataclass
class BenchmarkArguments:
    """What is run. `--config FILE` names another base study; every field of StudyConfig is an option too."""

    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of reward models, tuning and evaluation."}
    )
    variants: list[str] | None = field(default=None, metadata={"help": "Only these, by name; all if unset."})
    jobs: int = field(default=1, metadata={"help": "Runs side by side, in so many processes."})
    finished: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folders with runs of this benchmark, `<variant>-seed<N>`, of whatever seeds and machines: their reports are "
            "gathered as they are, with the sentences of those that were refused, and nothing is run. A JSON that this benchmark "
            "wrote may be among them: its variants stay, and those of the folders come beside them. Alone it is written again, with its "
            "table and figure."
        },
    )
    note: str = field(default="", metadata={"help": "What the page should say of how the runs were made."})
    untimed: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Variants whose seconds are left out, since they ran on another machine than the others, say, or beside other work."
        },
    )
    output: str = field(
        default="outputs/benchmark.json", metadata={"help": "The JSON; the table and the figure lie beside it."}
    )


def parse_benchmark(
    default_config: Path, default_output: str, arguments: Sequence[str] | None = None
) -> tuple[BenchmarkArguments, StudyConfig]:
    """The command line of a benchmark.

    Raises:
        InputError: an unknown field, or a bad value.
    """
    path, rest = take_option("config", sys.argv[1:] if arguments is None else arguments)
    defaults = {"output": default_output, **read_study(path or default_config)}
    return parse([BenchmarkArguments, StudyConfig], defaults, rest, taken=CONFIG_HELP)


def merged(*parts: Mapping) -> dict:
    """Several changes as one; of sections both are taken."""
    result = {}
    for part in parts:
        merge_dicts(part, result)
    return result


def chosen(variants: Mapping[str, Changes], names: Sequence[str] | None) -> dict[str, Changes]:
    """The variants of these names.

    Raises:
        InputError: a name that there is not.
    """
    unknown = sorted(set(names or ()) - set(variants))
    if unknown:
        raise InputError(f"There is no variant {unknown[0]!r}; there are {list(variants)}.")
    return {name: changes for name, changes in variants.items() if names is None or name in names}


def reports_of(
    args: BenchmarkArguments, base: StudyConfig, variants: Mapping[str, Changes]
) -> dict[str, dict[int, dict | str]]:
    """The reports that the command line asks for, by variant and seed: of runs that are finished, or run now.

    Raises:
        InputError: what `chosen`, `finished_reports` and `run_all` refuse.
    """
    asked = chosen(variants, args.variants)
    chosen(variants, args.untimed)  # refused now, not after hours
    if not args.finished:
        return run_all(base, asked, args.seeds, args.jobs)
    folders = [path for path in args.finished if not _is_result(path)]
    return finished_reports(folders, asked) if folders else {}


def earlier_results(args: BenchmarkArguments) -> list[dict]:
    """What this benchmark wrote earlier, of the files in `args.finished`.

    Raises:
        InputError: a file that can't be read.
    """
    contents = []
    for path in filter(_is_result, args.finished or ()):
        try:
            contents.append(json.loads(Path(path).read_text()))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} can't be read ({error}); give a JSON that this benchmark wrote.") from error
    return contents


def _is_result(path: str | Path) -> bool:
    return Path(path).suffix == ".json"


def finished_reports(folders: Sequence[str | Path], variants: Iterable[str]) -> dict[str, dict[int, dict | str]]:
    """The reports in `<folder>/<variant>-seed<N>` by variant and seed, the sentence where a run was refused; variants without any
    are left out.

    Raises:
        InputError: no report at all, one seed of a variant in two folders, or reports of other volumes, of more or fewer,
            of other judges or pretrained models than the first.
    """
    found: dict[str, dict[int, dict | str]] = {}
    for name, folder in ((name, Path(folder)) for name in variants for folder in folders):
        for run in sorted(folder.glob(f"{name}-seed*")):
            seed, result = run.name.removeprefix(f"{name}-seed"), outcome(run)
            if not seed.isdigit() or result is None:
                continue  # somebody's copy, or not at its end
            if int(seed) in found.setdefault(name, {}):
                raise InputError(f"{name} has two reports of seed {seed}; one is in {run}: name one of the folders.")
            found[name][int(seed)] = result
    reports = [report for by_seed in found.values() for report in by_seed.values() if isinstance(report, dict)]
    if not reports:
        raise InputError(
            f"No finished run (<variant>-seed<N>/report.json) lies in {', '.join(map(str, folders)) or 'no folder'}."
        )
    origins = {
        (one["data_fingerprint"], one["extractors"]["judge"]["sha256"], one["pretrained"], one["n"]["all"])
        for one in reports
    }
    if len(origins) > 1:
        raise InputError(
            "The finished runs are of several data sets, judges, pretrained models or numbers of volumes; give those of one."
        )
    return {name: dict(sorted(by_seed.items())) for name, by_seed in found.items()}


def run_all(
    base: StudyConfig, variants: Mapping[str, Changes], seeds: Sequence[int], jobs: int = 1
) -> dict[str, dict[int, dict | str]]:
    """Reports by variant and seed; the sentence instead, where a run was refused (rewards below their floors, say)."""
    configs = configs_of(base, variants, seeds)
    run_configs(base, configs, jobs)
    return {
        name: {seed: outcome(Path(config.output_dir)) for seed, config in by_seed.items()}
        for name, by_seed in configs.items()
    }


def configs_of(
    base: StudyConfig, variants: Mapping[str, Changes], seeds: Sequence[int]
) -> dict[str, dict[int, StudyConfig]]:
    """The configs of all runs, by variant and seed."""
    return {
        name: {
            seed: changed_config(base, name, seed, changes(base, seed) if callable(changes) else changes)
            for seed in seeds
        }
        for name, changes in variants.items()
    }


def gathered(
    reports: Mapping[str, Mapping[int, dict | str]],
    what: str,
    note: str = "",
    earlier: Sequence[Mapping] = (),
    untimed: Sequence[str] = (),
) -> dict:
    """The content of the JSON: a row of figures per variant, and where they come from. Variants of `earlier` contents stay,
    also where there are no `reports`; those in `untimed` have no seconds.

    Raises:
        InputError: every run was refused, or `earlier` is of an older version, has a variant with further seeds, or is of other volumes,
            judges or models.
    """
    parts = [dict(each) for each in earlier]
    content = _of_reports(reports, what) if reports or not parts else parts.pop(0)
    content["commit"] = git_commit()
    for each in parts:
        _add_earlier(content, each)
    if note:
        content["what"] += f"; {note}"
    for name in content["variants"].keys() & set(untimed):
        content["variants"][name]["seconds"] = None
    return content


def _of_reports(reports: Mapping[str, Mapping[int, dict | str]], what: str) -> dict:
    """The content of `gathered` without earlier ones."""
    finished = [report for by_seed in reports.values() for report in by_seed.values() if isinstance(report, dict)]
    if not finished:
        sentences = [sentence for by_seed in reports.values() for sentence in by_seed.values()]
        raise InputError(f"Every run was refused; the first because: {sentences[0]}")
    first = finished[0]
    return {
        "what": what,
        "dataset": first["dataset"],
        "data_fingerprint": first["data_fingerprint"],
        "pretrained": first["pretrained"],
        "n": first["n"],
        "seeds": sorted({seed for by_seed in reports.values() for seed in by_seed}),
        "extractors": first["extractors"],
        "variants": {name: row_of(by_seed) for name, by_seed in reports.items()},
        "commits_of_runs": sorted({report["commit"] for report in finished if report["commit"]}),
        "devices_of_runs": sorted({_device(report) for report in finished if report.get("device")}),
        "versions": _united(report["versions"] for report in finished),
    }


def _device(report: Mapping) -> str:
    """What a run was computed on, and in which precision where its report says so: figures of two precisions differ by rounding."""
    return report["device"] + (f" ({report['precision']})" if report.get("precision") else "")


def _add_earlier(content: dict, earlier: Mapping) -> None:
    """Put the variants of an earlier content before those of `content`, which may have one again, with the same seeds and more;
    raises InputError as `gathered` states."""
    figures = {name for row in content["variants"].values() for name in row}
    rows = [row for row in earlier["variants"].values() if row["seeds"]]
    if not content.keys() <= earlier.keys() or not all(figures <= row.keys() for row in rows):
        raise InputError(
            "The earlier results are of an older version, which gathered less; give the folders of these runs."
        )
    for name in content["variants"].keys() & earlier["variants"].keys():
        known, new = (
            {*row["seeds"], *map(int, row["refused"])}
            for row in (earlier["variants"][name], content["variants"][name])
        )
        missing = sorted(known - new)
        if missing:
            raise InputError(
                f"The earlier results have {name!r} with the seeds {missing} too: give the folder of these runs, or leave {name!r} "
                "out of --variants."
            )
    for name in ("data_fingerprint", "pretrained", "extractors", "n"):
        if content[name] != earlier[name]:
            raise InputError(f"The earlier results are of other runs: their {name} differs; give those of one.")
    content["variants"] = {**earlier["variants"], **content["variants"]}
    for name in ("seeds", "commits_of_runs", "devices_of_runs"):
        content[name] = sorted({*content[name], *earlier[name]})
    content["versions"] = _united([content["versions"], earlier["versions"]])
    # what was run, once, and the notes of both
    content["what"] = "; ".join(dict.fromkeys(f"{earlier['what']}; {content['what']}".split("; ")))


def _united(versions: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """By package, the versions of all runs: those of several machines differ."""
    found: dict[str, set[str]] = {}
    for each in versions:
        for package, version in each.items():
            found.setdefault(package, set()).update(version.split(", "))
    return {package: ", ".join(sorted(of)) for package, of in found.items()}


def row_of(by_seed: Mapping[int, dict | str]) -> dict:
    """Figures of one variant over its seeds. `gap_closed` has its 95 % t interval over seeds."""
    reports = [report for report in by_seed.values() if isinstance(report, dict)]
    refused = {str(seed): sentence for seed, sentence in by_seed.items() if isinstance(sentence, str)}
    if not reports:
        return {"seeds": [], "refused": refused}

    def over_seeds(figure: Callable[[dict], float | None]) -> dict | None:
        return summary([figure(report) for report in reports])

    tunings = [report[report["method"]] for report in reports]
    return {
        "seeds": [seed for seed, report in by_seed.items() if isinstance(report, dict)],
        "refused": refused,
        "method": reports[0]["method"],
        "gap_closed": {
            role: interval_over_seeds([report["gap_closed"][role] for report in reports]) for role in ROLES
        },
        "gap_closed_heldout": {
            role: interval_over_seeds([gap_closed(report["fid_heldout"][role]) for report in reports])
            for role in ROLES
        },
        "gap_closed_kid": {
            role: interval_over_seeds([_kid_gap_closed(report, role) for report in reports]) for role in ROLES
        },
        "fid": {role: _arms(over_seeds, "fid", role, lambda fid: fid["all"]) for role in ROLES},
        "kid": {role: _arms(over_seeds, "kid", role, float) for role in ROLES},
        "judge_by_sampler": {
            sampler: {
                "fid": over_seeds(
                    lambda report, name=f"rl @ {sampler}": report["fid_by_sampler"]["judge"][name]["all"]
                ),
                "kid": over_seeds(lambda report, name=f"rl @ {sampler}": report["kid_by_sampler"]["judge"][name]),
            }
            for sampler in SAMPLERS
        },
        "fid_heldout": over_seeds(lambda report: report["fid_heldout"]["judge"]["rl"]["all"]),
        "ms_ssim_over_real": over_seeds(_similarity),
        "copies": {arm: over_seeds(lambda report, arm=arm: _copies(report, arm)) for arm in ("standard", "rl")},
        "downstream": downstream_table(reports),
        "reward_gain": over_seeds(lambda report: report["reward"]["gain"]),
        "heldout_reward_gain": over_seeds(lambda report: report["reward"]["parts"]["after"]["heldout"]),
        "validity": {
            role: {
                figure: over_seeds(lambda report, role=role, figure=figure: report["reward_models"][role][figure])
                for figure in ("auc", "spearman")
            }
            for role in ("volume", "slice")
        },
        "unet_forwards": over_seeds(lambda report: report["unet_forwards"]),
        "seconds": over_seeds(lambda report: report["seconds"][report["method"]]),
        "peak_memory": over_seeds(lambda report: report[report["method"]]["peak_memory"]),
        "rollouts": [tuning["rollouts"] for tuning in tunings],
        "kept_after": [tuning["kept_after"] for tuning in tunings],
        "stopped": [tuning["stopped"] for tuning in tunings],
        "turning_points": [(report["curve"] or {}).get("turning_point") for report in reports],
        "curves": [report["curve"] and report["curve"]["points"] for report in reports],
    }


def _arms(over_seeds: Callable, figure: str, role: str, value: Callable) -> dict:
    return {arm: over_seeds(lambda report, arm=arm: value(report[figure][role][arm])) for arm in (*OTHER_ARMS, "rl")}


def _kid_gap_closed(report: dict, role: str) -> float | None:
    """The same of the kernel distance, which has no bias of a finite number of volumes."""
    return gap_closed({arm: {"all": value} for arm, value in report["kid"][role].items()})


def interval_over_seeds(values: Sequence[float | None]) -> dict | None:
    """Mean, interval and values; None where there was no gap to close."""
    if None in values:
        return None
    return {name: figure for name, figure in verdict(values).items() if name != "holds"}


def _similarity(report: dict) -> float | None:
    """MS-SSIM of pairs of tuned volumes over that of real ones: above 1 they are more alike."""
    tuned, real = report["diversity"]["rl"]["ms_ssim"], report["diversity"]["real"]["ms_ssim"]
    return tuned["value"] / real["value"] if tuned and real else None


def _copies(report: dict, arm: str) -> float | None:
    return report["memorization"][arm]["share"] if report["memorization"] else None


COLUMNS: dict[str, Callable[[dict], str]] = {
    "judge gap closed (95 %)": lambda row: closed(row["gap_closed"]["judge"]),
    "second judge": lambda row: closed(row["gap_closed"]["second_judge"]),
    "judge, to held-out volumes": lambda row: closed(row["gap_closed_heldout"]["judge"]),
    "judge, KID": lambda row: closed(row["gap_closed_kid"]["judge"]),
    "judge distance": lambda row: shown(row["fid"]["judge"]["rl"], ".4f"),
    "judge KID": lambda row: shown(row["kid"]["judge"]["rl"], ".5f"),
    "label distance": lambda row: shown(row["fid"]["label"]["rl"], ".4f"),
    "MS-SSIM over real": lambda row: shown(row["ms_ssim_over_real"], ".3f"),
    "copies": lambda row: shown(row["copies"]["rl"], ".1%"),
    "accuracy with its volumes": lambda row: shown(row["downstream"] and row["downstream"][TUNED]["accuracy"], ".3f"),
    "reward gained": lambda row: shown(row["reward_gain"], "+.2f"),
    "held-out reward": lambda row: shown(row["heldout_reward_gain"], "+.2f"),
    "denoiser forwards": lambda row: shown(row["unet_forwards"], ",.0f"),
    "seconds": lambda row: shown(row["seconds"], ",.0f"),
    "GPU memory, MiB": lambda row: shown(_in_mib(row["peak_memory"]), ",.0f"),
}


def table(content: Mapping, columns: Mapping[str, Callable[[dict], str]] = COLUMNS) -> list[str]:
    """A Markdown table with a line per variant, and one with what they are compared with."""
    rows = content["variants"]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    done = {name: row for name, row in rows.items() if row["seeds"]}
    for name, row in done.items():
        fewer = "" if row["seeds"] == content["seeds"] else f" (seeds {', '.join(map(str, row['seeds']))})"
        lines.append(f"| {name}{fewer} | " + " | ".join(cell(row) for cell in columns.values()) + " |")
    first = next(iter(done.values()))
    distances = {role: [shown(first["fid"][role][arm], ".4f") for arm in OTHER_ARMS] for role in ROLES}
    lines += ["", "| distance | " + " | ".join(OTHER_ARMS.values()) + " |", "|---" * (1 + len(OTHER_ARMS)) + "|"]
    lines += [f"| {role.replace('_', ' ')} | " + " | ".join(cells) + " |" for role, cells in distances.items()]
    for name, row in rows.items():
        lines += [f"- {name}, seed {seed}, was refused: {sentence}" for seed, sentence in row["refused"].items()]
    return lines


def write_results(content: dict, title: str, lines: Sequence[str], figure: Figure, output: str | Path) -> None:
    """`output` (JSON), and beside it the page and the figure of the same name."""
    output = Path(output)
    page = [
        f"# {title}",
        "",
        f"{content['dataset']} `{content['data_fingerprint']}`, {content['n']['all']} volumes on each side of a distance, "
        f"{len(content['seeds'])} seeds: means, with deviations over seeds. Not for clinical use.",
        "",
        f"{content['what']}.",
        "",
        *(f"- {role}: `{one['name']}` `{one['sha256']}`" for role, one in content["extractors"].items()),
        "",
        *lines,
        "",
        f"![{title}]({output.with_suffix('.png').name})",
    ]
    write_text(output.with_suffix(".md"), "\n".join(page) + "\n")
    figure.savefig(output.with_suffix(".png"), dpi=100)
    write_json(output, content)


def _in_mib(figure: Mapping | None) -> dict | None:
    return figure and {name: figure[name] and figure[name] / 2**20 for name in ("mean", "sd")}
