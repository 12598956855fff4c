"""Rewards that hold under optimization: the published recipe, each remedy alone, and the default recipe of several.

    python examples/benchmarks/recipes.py --output examples/results/recipes-phantoms.json
    python examples/benchmarks/recipes.py --config CONFIG --data_dir DIR --variants paper unchecked --seeds 0 1 2

From one pretrained pipeline, over seeds: how much of the judge's gap each closes, at what cost in diversity and copies, for
how many denoiser forwards. Beside the JSON lie the same as a table and a figure. The base (`--config`) is the recipe `paper`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from _runs import COLUMNS, earlier_results, gathered, merged, parse_benchmark, reports_of, table, write_results
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from msrl_diffusers.errors import sentence_instead_of_traceback
from msrl_diffusers.study import StudyConfig
from msrl_diffusers.study.tables import shown


RECIPES = Path(__file__).parents[1] / "configs" / "phantoms" / "recipes"
REMEDIES: dict[str, dict] = {
    "by_class": {"conditional_rewards": True},
    "any_brightness": {"rewards": {"max_gain": 0.15}},
    "refresh": {"refresh": {"every": 3, "max_steps": 200, "train_batch_size": 16}},
    "marginal_labels": {"marginal_labels": 0.3},
    "ensemble": {
        "volume_reward": {"num_heads": 5, "spread_penalty": 1.0},
        "slice_reward": {"num_heads": 5, "spread_penalty": 1.0},
    },
    "early_stop": {"select_by": "-label_fid", "watch_per_class": 64, "ppo": {"patience": 4}},
    "adaptive_kl": {  # the target: where the label distance is lowest along the runs of `paper`, on average
        "ppo": {"kl_mode": "adaptive", "kl_coef": 0.3, "kl_target": 3e-4, "kl_budget": 6e-4}
    },
    "gated_kl": {"ppo": {"kl_gate_quantile": 0.7, "kl_coef": 1.0}},
    "moving_reference": {"ppo": {"reference_update_steps": 4}},
    "hard_data": {
        "degraded_anchors": {
            "kinds": ["blur", "rician_noise", "bias_field", "slice_shuffle", "intensity_shift"], "strengths": [0.1, 0.25]
        }
    },
    "antithetic": {"ppo": {"antithetic": True}},
    "large_rollouts": {"ppo": {"num_rollout_batches": 8, "timestep_fraction": 0.5}},
}  # fmt: skip
RECIPE = ("by_class", "any_brightness", "early_stop")  # what the default recipe is made of
DEFAULT = merged(*(REMEDIES[name] for name in RECIPE))
FLOORS = {"validity_floors": {"auc": 0.7, "spearman": 0.3}}
NO_CURVE = {"num_curve_points": 0}  # as long as a third of a run; that of `paper` is what remedies are for


def earlier_policy(base: StudyConfig, seed: int) -> dict:
    """The samples of a policy that was led astray, that of `hard_data`, as a further set of reward data; the run that ended with
    it comes before."""
    samples = Path(base.output_dir) / f"hard_data-seed{seed}" / "evaluate" / "rl.safetensors"
    return {"policy_anchors": {"hard_data": str(samples)}, **NO_CURVE}


VARIANTS = {
    "paper": {},
    "default": merged(DEFAULT, FLOORS),
    "unchecked": merged(DEFAULT, NO_CURVE),  # started whatever its rewards are worth
    "gated_default": merged(DEFAULT, REMEDIES["gated_kl"], FLOORS, NO_CURVE),
    **{name: merged(changes, NO_CURVE) for name, changes in REMEDIES.items()},
    "policy_anchors": earlier_policy,
}


VALIDITY = {
    f"AUC, {role}": lambda row, role=role: shown(row["validity"][role]["auc"], ".2f") for role in ("volume", "slice")
} | {
    f"Spearman, {role}": lambda row, role=role: shown(row["validity"][role]["spearman"], ".2f")
    for role in ("volume", "slice")
}


BARS = {
    "judge gap closed": lambda row: row["gap_closed"]["judge"],
    "label gap closed": lambda row: row["gap_closed"]["label"],
    "reward gained, in deviations": lambda row: row["reward_gain"],
    "MS-SSIM over real": lambda row: row["ms_ssim_over_real"],
}
AGAINST_KL = {
    "reward that is trained on": lambda point: point["reward"]["mean"],
    "label distance": lambda point: point["fid"]["label"],
    "judge distance": lambda point: point["fid"]["judge"],
    "second judge distance": lambda point: point["fid"]["second_judge"],
}
SHOWN_GAP = -2.0  # bars end here: a recipe that ruins the policy would hide all others


def draw(content: dict) -> Figure:
    """What each variant closes of the judge's gap, seed by seed, beside reward, diversity and cost; and where variants have them,
    the over-optimization curves."""
    rows = {name: row for name, row in content["variants"].items() if row["seeds"]}
    curves = {name: row["curves"] for name, row in rows.items() if all(row.get("curves") or [None])}
    figure = Figure(figsize=(13, 0.4 * len(rows) + 1.5 + 3.5 * bool(curves)), layout="constrained")
    if not curves:
        _draw_bars(figure.subplots(1, len(BARS), sharey=True), rows)
        return figure
    above, below = figure.subfigures(2, 1, height_ratios=[0.4 * len(rows) + 1.5, 3.5])
    _draw_bars(above.subplots(1, len(BARS), sharey=True), rows)
    _draw_curves(below.subplots(1, len(AGAINST_KL)), curves)
    return figure


def _draw_bars(axes: Sequence[Axes], rows: dict) -> None:
    places = range(len(rows))
    for axis, (title, figure_of) in zip(axes, BARS.items(), strict=True):
        for place, row in zip(places, rows.values(), strict=True):
            found = figure_of(row)
            if found is not None:
                axis.barh(place, found["mean"], color="tab:blue", alpha=0.4)
                axis.plot(found["values"], [place] * len(found["values"]), "o", color="tab:blue", markersize=4)
                if found.get("interval"):
                    axis.plot(found["interval"], [place, place], color="black", linewidth=1)
        axis.axvline(0, color="black", linewidth=0.5)
        axis.set_yticks(places, list(rows))
        axis.grid(axis="x", alpha=0.3)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        if "gap" in title and axis.get_xlim()[0] < SHOWN_GAP:
            axis.set_xlim(SHOWN_GAP, 1.0)
            title += f", cut at {SHOWN_GAP:.0%}"
        axis.set_title(title, fontsize=10)


def _draw_curves(axes: Sequence[Axes], curves: dict) -> None:
    for axis, (title, figure_of) in zip(axes, AGAINST_KL.items(), strict=True):
        for number, (name, by_seed) in enumerate(curves.items()):
            for place, points in enumerate(by_seed):
                axis.plot(
                    [point["sqrt_kl"] for point in points], [figure_of(point) for point in points],
                    marker="o", markersize=3, color=f"C{number}", label=None if place else name,
                )  # fmt: skip
        axis.set_title(f"{title}, by seed", fontsize=10)
        axis.set_xlabel("square root of the KL divergence", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)


def lines(content: dict) -> list[str]:
    """The table, and where each variant turned."""
    found = [
        "",
        "| | rollouts | weights kept after | stopped by | judge's distance lowest after |",
        "|---|---|---|---|---|",
    ]
    for name, row in content["variants"].items():
        for place, seed in enumerate(row["seeds"]):
            turning = row["turning_points"][place]
            cells = [row["rollouts"][place], row["kept_after"][place], row["stopped"][place] or "max_steps"]
            cells.append(
                f"{turning['rollout']} (sqrt(KL) {turning['sqrt_kl']:.4f})" if turning else "the end, or no curve"
            )
            found.append(f"| {name}, seed {seed} | " + " | ".join(map(str, cells)) + " |")
    return [*table(content, {**COLUMNS, **VALIDITY}), *found]


def main() -> None:
    args, base = parse_benchmark(RECIPES / "paper.yaml", "outputs/recipes.json")
    reports = reports_of(args, base, VARIANTS)
    what = "PPO by the published recipe, with each remedy alone, and by the default recipe"
    content = gathered(reports, what, args.note, earlier_results(args), args.untimed)
    write_results(content, "Recipes", lines(content), draw(content), args.output)
    closed = {name: row["gap_closed"]["judge"] for name, row in content["variants"].items() if row["seeds"]}
    sys.stdout.write(json.dumps({name: value and value["mean"] for name, value in closed.items()}, indent=2) + "\n")


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        main()
