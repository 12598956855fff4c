"""Lines of the page of results on PPO by several recipes (`recipes.py`): what each closes of the gap, and where the published one turns."""

from statistics import stdev

from _results_volumes import ROLES
from _results_words import closed, copies, listed

from msrl_diffusers.study.tables import verdict


PUBLISHED_RECIPE = (
    "*The published recipe*: rewards, objective and KL term of arXiv 2603.06173; what is left open there (learning rate, weight of the KL "
    "term, number of rollouts, which weights are kept) was set here."
)
RECIPES = {  # of benchmarks/recipes.py
    "paper": "the published recipe; the weights of the highest held-out reward",
    "early_stop": "label distance stops the run and picks the weights (`select_by: -label_fid`, `patience`)",
    "default": "early_stop, by_class and any_brightness together, with `validity_floors`",
    "by_class": "rewards are told the class (`conditional_rewards`)",
    "any_brightness": "rewards learn that brightness means nothing (`max_gain`)",
    "refresh": "every third rollout is labelled and added to the reward data (`refresh`)",
    "marginal_labels": "a volume's own share of the distance is mixed into its label (`marginal_labels`)",
    "ensemble": "five heads, mean less spread (`num_heads`, `spread_penalty`)",
    "adaptive_kl": "KL towards a target, with a budget (`kl_mode: adaptive`, `kl_target`, `kl_budget`)",
    "gated_kl": "a stronger KL term, on the samples alone that rewards disagree on (`kl_coef: 1.0`, `kl_gate_quantile: 0.7`)",
    "moving_reference": "the reference moves every fourth rollout (`reference_update_steps`)",
    "hard_data": "degraded volumes as further reward data (`degraded_anchors`)",
    "policy_anchors": "samples of an earlier policy, hard_data's, as further reward data (`policy_anchors`)",
    "antithetic": "pairs of samples from opposite noise (`antithetic`)",
    "large_rollouts": "twice the samples in a rollout, and half of its steps trained (`num_rollout_batches`, `timestep_fraction`)",
}

SETTINGS_OF_PAPER = (  # whose reward models are trained as those of `paper` are
    "paper", "refresh", "early_stop", "adaptive_kl", "gated_kl", "moving_reference", "antithetic", "large_rollouts",
)  # fmt: skip
ADDED = {  # of benchmarks/objectives.py: the default recipe and one remedy more
    "ppo_gated": "default with gated_kl",
    "ppo_adaptive": "default with adaptive_kl",
}


def recipe_lines(content: dict, name: str, others: dict, demos: list[dict], redraws: dict) -> list[str]:
    """One table, a row per recipe; where the published one turns; what the label distance stops. `others` is what objectives.py
    wrote: its PPO is the default recipe as `make demo` runs it, whose reports are `demos`, on other seeds; `redraws` is what redraws.py
    found of them."""
    rows = content["variants"]
    lines = [
        f"PPO from the same pipeline with reward models of its own in every seed, by the published recipe, with each remedy alone, and by the "
        f"default recipe (`make demo` and the study run eight rollouts of it, without its floors): {content['n']['all']} volumes on each side, means over "
        f"{len(rows['paper']['seeds'])} seeds ({', '.join(content['devices_of_runs']).replace('cpu', 'CPU')}; [page]({name}.md)). "
        f"Below zero: farther from the real volumes than before tuning. {PUBLISHED_RECIPE}",
        "",
        "| recipe | what it is | gap closed, judge | gap closed, second judge | gap closed, label | MS-SSIM over real | copies | reward gained | kept after rollouts, of |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for variant, row in ((variant, rows[variant]) for variant in RECIPES if variant in rows):
        cells = [
            RECIPES[variant],
            *(closed(row["gap_closed"][role]) for role in ROLES),
            f"{row['ms_ssim_over_real']['mean']:.2f}",
            copies(row),
            _gain(row),
            ", ".join(f"{kept} of {all}" for kept, all in zip(row["kept_after"], row["rollouts"], strict=True)),
        ]
        number = len(row["seeds"])
        seeds = "" if number == len(rows["paper"]["seeds"]) else f" ({number} seeds)"
        lines.append(f"| {variant}{seeds} | " + " | ".join(cells) + " |")
    curves = {variant: rows[variant]["curves"] for variant in ("paper", "default")}
    turning = [points[lowest(points, "judge")]["rollout"] for points in curves["paper"]]
    places = [(lowest(points, "label"), lowest(points, "judge")) for by_seed in curves.values() for points in by_seed]
    later, earlier = (sum(label > judge for label, judge in places), sum(label < judge for label, judge in places))
    return [
        *lines,
        "",
        f"- The published recipe over-optimizes: along its runs (the curves, of samples by the rollouts' sampler with noise in its last step too) the judge's distance is "
        f"lowest after {listed(turning)} of {rows['paper']['rollouts'][0]} rollouts, by seed, of the {_points(curves['paper'])} points of each "
        f"curve. After it the reward that is trained on still "
        f"rises in {rising('mean', curves['paper'])}, and so does that of a model which only watches in "
        f"{rising('heldout', curves['paper'])}.",
        f"- What helps is not to go as far. Nearer to the training volumes by the judge in every seed end {_that_help(rows)}; paper, with a reward "
        f"gained of {_gain(rows['paper'])}, in {_nearer(rows['paper'])}. The judge itself, on these seeds, told them apart."
        f"{_as_moderate(rows)}",
        "- The label distance (samples to real volumes, by an extractor that judges nothing) picks weights well; it is no alarm that stops a run "
        "in time: along the runs of both recipes it is lowest at a later point of the curve than "
        f"the judge's in {later} of {len(places)}, at an earlier one in {earlier}. Where the runs of the default recipe end (not at the weights "
        f"that are kept), the judge's distance is above its start in {_worse_at_the_end(curves['default'])}.",
        *_rewards_lines(rows),
        *_missing_lines(rows),
        "",
        f"![What recipes close of the gap, and the curves of over-optimization]({name}.png)",
        "",
        *_others_lines(others, demos),
        _redraws_line(redraws),
    ]


def _others_lines(content: dict, demos: list[dict]) -> list[str]:
    """What the default recipe closes on seeds that did not choose it, and what remedies within PPO add to it there."""
    rows = {name: content["variants"][name] for name in ("ppo", *ADDED) if name in content["variants"]}
    alone = rows["ppo"]["gap_closed"]["judge"]["values"]
    both = [*(report["gap_closed"]["judge"] for report in demos), *alone]
    within = [_bootstrap_deviation(report) for report in demos]
    lines = [
        f"On seeds that told no recipes apart ({listed(rows['ppo']['seeds'])}): the default recipe as `make demo` runs it, eight rollouts with "
        "the reward models of the release, and with one remedy more ([page](objectives-phantoms.md)).",
        "",
        "| recipe | gap closed, judge | by seed | to held-out | by its KID | gap closed, second judge | gap closed, label | MS-SSIM over real | copies | reward gained |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [
            ADDED.get(name, "default"),
            closed(row["gap_closed"]["judge"]),
            ", ".join(f"{value:.0%}" for value in row["gap_closed"]["judge"]["values"]),
            closed(row["gap_closed_heldout"]["judge"]),
            closed(row["gap_closed_kid"]["judge"]),
            closed(row["gap_closed"]["second_judge"]),
            closed(row["gap_closed"]["label"]),
            f"{row['ms_ssim_over_real']['mean']:.2f}",
            copies(row),
            _gain(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        *_precision_lines(rows),
        *_strength_lines(rows),
        f"- Over these seeds and those of `make demo`, {len(both)} in all, the default recipe closes {closed(verdict(both))} of the judge's gap.",
        f"- Between these {len(both)} seeds what is closed deviates by {stdev(both):.0%} of the gap; within one seed, when the "
        f"{content['n']['all']} volumes are drawn again (the paired bootstrap of `make demo`), by {listed([f'{one:.0%}' for one in within])}.",
    ]


def _redraws_line(content: dict) -> str:
    """What the default recipe closes when its samples are drawn again, by seed."""
    shares = content["gap_closed"]["fid"]["judge"]
    found = [shares["by_seed"][str(seed)] for seed in content["seeds"]]
    by_seed = [
        f"{one['draws']['mean']:.0%} +- {one['draws']['sd']:.0%} (by the report {one['report']:.0%})" for one in found
    ]
    kid, second = (
        closed(content["gap_closed"][name][role]["draws"])
        for name, role in (("kid", "judge"), ("fid", "second_judge"))
    )
    return (
        f"- The samples of `make demo` drawn again, {content['draws']} times in each of the seeds {listed(content['seeds'])} "
        f"([page](redraws-phantoms.md); the runs were made anew, so their reports may differ by a point from those above): {listed(by_seed)} of the judge's gap, {closed(shares['draws'])} over the seeds (by its KID {kid}, by "
        f"the second judge {second})."
    )


def _bootstrap_deviation(report: dict) -> float:
    """The deviation of the judge's gap that is closed over bootstrap draws of the volumes, from its 95 % interval."""
    low, high = report["fid_rl_minus_standard"]["judge"]["interval"]
    standard, limit = (report["fid"]["judge"][arm]["all"] for arm in ("standard", "limit"))
    return (high - low) / (2 * 1.96) / (standard - limit)


def _strength_lines(rows: dict) -> list[str]:
    """Whether it matters which samples a stronger KL term holds."""
    if not {"ppo_gated", "ppo_adaptive"} <= rows.keys():
        return []
    values = [rows[name]["gap_closed"]["judge"]["values"] for name in ("ppo_gated", "ppo_adaptive")]
    apart = max(abs(gated - adaptive) for gated, adaptive in zip(*values, strict=True))
    return [
        f"- Two ways to a stronger KL term, on uncertain samples alone and on all with a coefficient that follows a target, end within "
        f"{apart:.1%} of the gap of each other by the judge in each of these seeds.",
    ]


def that_help(rows: dict) -> dict:
    """The recipes that end nearer to the real volumes by the judge in every seed."""
    return {name: rows[name] for name in RECIPES if name in rows and not _seeds_farther(rows[name])}


def _that_help(rows: dict) -> str:
    found = [
        f"{name} ({_gain(row)}; to the held-out ones in {_nearer_heldout(row)})"
        for name, row in that_help(rows).items()
    ]
    return listed(found or ["none"])


def _as_moderate(rows: dict) -> str:
    """Recipes that go no farther than those that help, and are farther from the real volumes in every seed all the same."""
    helpful = that_help(rows)
    most = max((row["reward_gain"]["mean"] for row in helpful.values()), default=float("-inf"))
    found = [
        name
        for name in RECIPES
        if name in rows and _seeds_farther(rows[name]) == len(rows[name]["seeds"]) and rows[name]["reward_gain"]["mean"] <= most
    ]  # fmt: skip
    if not found:
        return ""
    said = listed([f"{name} ({_gain(rows[name])}, AUC of its rewards {_auc(rows[name])})" for name in found])
    return f" The reward gained alone does not tell: no more than by some of these is gained by {said}, farther in every seed."


def _rewards_lines(rows: dict) -> list[str]:
    """Which recipes share reward models, and which have such trained anew by the same settings: how far a row is another's equal."""
    paper = rows["paper"]["validity"]["volume"]["auc"]["values"]
    auc = {name: rows[name]["validity"]["volume"]["auc"]["values"] for name in SETTINGS_OF_PAPER if name in rows}
    same = [name for name, values in auc.items() if values == paper]
    anew = [name for name in auc if name not in same]
    if not anew:
        return []
    return [
        f"- {listed(same)} have the same reward models; those of {listed(anew)}, by the same settings, were trained anew "
        f"(AUC of the volume reward {_auc(rows[anew[0]])}, of the others' {_auc(rows['paper'])})."
    ]


def _missing_lines(rows: dict) -> list[str]:
    missing = [name for name in RECIPES if name not in rows]
    return [f"- Not measured: {listed(missing)} (in `benchmarks/recipes.py` all the same)."] if missing else []


def _precision_lines(rows: dict) -> list[str]:
    """Rows whose figures before tuning are others, though pipeline, seeds and noise are the same: they were computed in another precision."""
    means = {name: [row["fid"]["judge"][arm]["mean"] for arm in ("standard", "limit")] for name, row in rows.items()}
    others = [name for name, found in means.items() if found != means["ppo"]]
    if not others:
        return []
    before, limit = means[others[0]]
    return [
        f"- {listed([ADDED[name] for name in others])} were computed in another precision than the first row (which, the page says): before tuning {before:.3f}, limit "
        f"{limit:.3f}, in place of {means['ppo'][0]:.3f} and {means['ppo'][1]:.3f}. So compare shares, and small differences of them not at all."
    ]


def _points(curves: list) -> str:
    """How many points curves have, as "6 or 7"."""
    return " or ".join(map(str, sorted({len(points) for points in curves})))


def _auc(row: dict) -> str:
    return f"{row['validity']['volume']['auc']['mean']:.2f}"


def _nearer_heldout(row: dict) -> str:
    values = row["gap_closed_heldout"]["judge"]["values"]
    return f"{sum(value > 0 for value in values)} of {len(values)}"


def _gain(row: dict) -> str:
    return f"{row['reward_gain']['mean']:+.1f}"


def _nearer(row: dict) -> str:
    return f"{len(row['seeds']) - _seeds_farther(row)} of {len(row['seeds'])} seeds"


def _seeds_farther(row: dict) -> int:
    before, after = (row["fid"]["judge"][arm]["values"] for arm in ("standard", "rl"))
    return sum(new >= old for new, old in zip(after, before, strict=True))


def lowest(points: list, role: str) -> int:
    """The place on a curve where a distance is lowest."""
    return min(range(len(points)), key=lambda place: points[place]["fid"][role])


def rising(reward: str, curves: list) -> str:
    """In how many runs a reward at the end is above that where the judge's distance is lowest."""
    rises = [points[-1]["reward"][reward] > points[lowest(points, "judge")]["reward"][reward] for points in curves]
    return f"{sum(rises)} of {len(rises)}"


def _worse_at_the_end(curves: list) -> str:
    first, last = ([points[place]["fid"]["judge"] for points in curves] for place in (0, -1))
    return f"{sum(end > start for start, end in zip(first, last, strict=True))} of {len(curves)}"


def refusal_line(content: dict, name: str) -> str:
    """Whether the floors of the default recipe were right to refuse its rewards: what came of them all the same."""
    refused, rows = len(content["variants"]["default"]["refused"]), content["variants"]
    shares = {variant: closed(rows[variant]["gap_closed"]["judge"]) for variant in ("unchecked", "paper")}
    return (
        f"- On a second pipeline of the same config (its extractors are others: distances do not compare with the table's), "
        f"{len(content['seeds'])} seeds of reward models and PPO ([page]({name}.md)): the default recipe, which has "
        f"`validity_floors`, found its reward models below them and refused to start in {refused}; without floors it closed {shares['unchecked']} of the judge's gap, the published recipe, which has no floors, {shares['paper']}. Below zero: "
        "farther from the real volumes than before."
    )
