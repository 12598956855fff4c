"""Beyond PPO: the judge's distance against denoiser forwards and seconds, for every method from the same pipeline.

    python examples/benchmarks/objectives.py --seeds 3 4 5 --variants ppo ppo_window nft draft_cheap frechet ddo ppo_gated ppo_adaptive \
        --output examples/results/objectives-phantoms.json
    python examples/benchmarks/objectives.py --config CONFIG --data_dir DIR --variants ppo frechet --seeds 0 1 2
    python examples/benchmarks/objectives.py --finished DIR DIR

Beside the JSON lie the same as a table and a figure. `share_of_ppo` says of each method how many of PPO's denoiser forwards it
took, and whether it reached PPO's distance over the seeds that both have. Every tuned model stands at two samplers: the pretrained
model's best, and the rollouts' with all the noise of DDPM.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

from _runs import COLUMNS, earlier_results, gathered, parse_benchmark, reports_of, table, write_results
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from recipes import REMEDIES

from msrl_diffusers.errors import sentence_instead_of_traceback
from msrl_diffusers.study.tables import shown


CONFIG = Path(__file__).parents[1] / "configs" / "phantoms" / "objectives.yaml"
VARIANTS: dict[str, dict] = {
    "ppo": {},  # the recipe of the base
    "ppo_3d_only": {"ppo": {"reward_weights": [1.0, 0.0]}},
    "ppo_window": {"ppo": {"sde_window": 4, "policy_loss": "kl_mask", "timestep_fraction": 1.0}},
    "ppo_gated": {"ppo": REMEDIES["gated_kl"]["ppo"]},
    "ppo_adaptive": {"ppo": REMEDIES["adaptive_kl"]["ppo"]},
    "nft": {"method": "nft"},
    "awm": {"method": "nft", "nft": {"objective": "awm", "num_updates": 1}},
    "draft": {"method": "draft"},
    "draft_cheap": {"method": "draft", "watch_per_class": 32, "draft": {"watch_steps": 7}},  # hardly watched
    "draft_lv": {"method": "draft", "draft": {"variant": "draft_lv"}},
    "refl": {"method": "draft", "draft": {"variant": "refl"}},
    "frechet": {"method": "frechet"},
    "frechet_50": {"method": "frechet", "frechet": {"num_inference_steps": 50, "gradient_steps": 10}},
    "frechet_label": {"method": "frechet", "frechet_features": ["label"]},
    "ddo": {"method": "ddo"},
}
BY_SAMPLER = {
    f"judge distance, {sampler} sampler": lambda row, sampler=sampler: shown(
        row["judge_by_sampler"][sampler]["fid"], ".4f"
    )
    for sampler in ("best", "stochastic")
}


def shares_of_ppo(content: dict) -> dict[str, dict] | None:
    """Of each method: its denoiser forwards and seconds over those of PPO, means over the seeds of each, and `_reaches` of the two.
    None where PPO was not run; no share of seconds where one of the two ran on a GPU and the other did not, or was resumed."""
    rows = {name: row for name, row in content["variants"].items() if row["seeds"]}
    if "ppo" not in rows:
        return None

    def mean(row: dict, name: str) -> float:
        return row[name]["mean"]

    ppo = rows["ppo"]
    return {
        name: {
            "forwards": mean(row, "unet_forwards") / mean(ppo, "unet_forwards"),
            "seconds": mean(row, "seconds") / mean(ppo, "seconds")
            if row["seconds"] and ppo["seconds"] and bool(row["peak_memory"]) == bool(ppo["peak_memory"])
            else None,
            "reaches_ppo": _reaches(row, ppo),
        }
        for name, row in rows.items()
        if name != "ppo"
    }


def _reaches(row: dict, ppo: dict) -> bool | None:
    """Whether the judge distance is at most PPO's, means over the seeds that both have: each starts from other noise, at another
    distance of the pretrained model. None where they have none in common."""
    own, others = (dict(zip(one["seeds"], one["fid"]["judge"]["rl"]["values"], strict=True)) for one in (row, ppo))
    both = own.keys() & others.keys()
    return fmean(own[seed] for seed in both) <= fmean(others[seed] for seed in both) if both else None


def draw(content: dict) -> Figure:
    """Judge distance, KID and diversity of every method against its cost, a point per seed."""
    rows = {name: row for name, row in content["variants"].items() if row["seeds"]}
    costs = {"denoiser forwards": "unet_forwards", "seconds": "seconds"}
    figures = {
        "judge distance": lambda row: row["fid"]["judge"]["rl"],
        "judge KID": lambda row: row["kid"]["judge"]["rl"],
        "MS-SSIM over real": lambda row: row["ms_ssim_over_real"],
    }
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(len(costs), len(figures), squeeze=False)
    for line, (cost_title, cost) in zip(axes, costs.items(), strict=True):
        for axis, (title, figure_of) in zip(line, figures.items(), strict=True):
            for name, row in rows.items():
                found = figure_of(row)
                if found is not None and row[cost] is not None:
                    axis.plot(row[cost]["values"], found["values"], "o", markersize=5, label=name)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel(cost_title, fontsize=9)
            axis.set_title(title, fontsize=10)
            axis.grid(alpha=0.3)
    first = next(iter(rows.values()))
    for line in axes:
        for axis, name in zip(line, ("fid", "kid"), strict=False):
            for arm, style in (("standard", "--"), ("limit_heldout", "-."), ("limit", ":")):
                axis.axhline(first[name]["judge"][arm]["mean"], color="tab:gray", linestyle=style, label=arm)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")  # over no point
    return figure


def lines(content: dict) -> list[str]:
    """The table, at both samplers, and the costs beside PPO's."""
    found = table(content, {**COLUMNS, **BY_SAMPLER})
    if content["share_of_ppo"]:
        found += [
            "",
            "| | forwards, of PPO's | seconds, of PPO's | reaches PPO's judge distance |",
            "|---|---|---|---|",
        ]
        for name, share in content["share_of_ppo"].items():
            reaches = {True: "yes", False: "no", None: "other seeds"}[share["reaches_ppo"]]
            seconds = "not comparable" if share["seconds"] is None else f"{share['seconds']:.2f}"
            found.append(f"| {name} | {share['forwards']:.2f} | {seconds} | {reaches} |")
    return found


def main() -> None:
    args, base = parse_benchmark(CONFIG, "outputs/objectives.json")
    reports = reports_of(args, base, VARIANTS)
    what = "One pretrained pipeline tuned by several methods"
    content = gathered(reports, what, args.note, earlier_results(args), args.untimed)
    content["share_of_ppo"] = shares_of_ppo(content)
    write_results(content, "Objectives", lines(content), draw(content), args.output)
    sys.stdout.write(json.dumps(content["share_of_ppo"], indent=2) + "\n")


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        main()
