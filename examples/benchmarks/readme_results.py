"""The README's section of results, from the JSON files under examples/results; nothing in it is typed.

    python examples/benchmarks/readme_results.py

Writes what stands between the two marks in README.md anew. A test holds that the two agree.
"""

import json
from pathlib import Path

from msrl_diffusers.study.tables import verdict


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "results"
START, END = "<!-- results: begin, by examples/benchmarks/readme_results.py -->", "<!-- results: end -->"
ROLES = ("judge", "label")


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
    lines = ["### Phantoms at 32^3: `make demo`", "", *_study_lines(demos), ""]
    others = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("ixi-*.json"))}
    if others:
        lines += ["### Real brains at 32^3: IXI, classes by age", "", *_study_lines(others), ""]
    stories = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("dermoscopy-seed*.json"))}
    if stories:
        lines += ["### Text to image: drawn dermoscopy images at 32 x 32", "", *_story_lines(stories), ""]
    race = json.loads((RESULTS / "ppo-vs-trl.json").read_text())
    lines += ["### The trainer beside TRL's DDPOTrainer", "", *_race_lines(race), ""]
    return "\n".join(lines)


def _study_lines(reports: dict[Path, dict]) -> list[str]:
    """Two tables: distances, and rewards, one row per seed; and what they say together."""
    first = next(iter(reports.values()))
    lines = [
        f"{first['n']['all']} volumes on each side of a distance, 95 % bootstrap intervals, lower is better. *Floor*: real held-out "
        "volumes; *limit*: reconstructions by the autoencoder; *gap closed*: (standard - RL) / (standard - limit). Of a run the "
        "weights with the lowest label distance are kept; after 0 rollouts they are the pretrained ones.",
        "",
        "| seed | extractor | floor | limit | standard | RL-tuned | RL minus standard, paired | gap closed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path, report in reports.items():
        for role in ROLES:
            fids = {arm: values["all"] for arm, values in report["fid"][role].items()}
            difference, closed = report["fid_rl_minus_standard"][role], report["gap_closed"][role]
            low, high = difference["interval"]
            cells = [f"{fids[arm]:.3f}" for arm in ("real_floor", "limit", "standard", "rl")]
            cells += [
                f"{difference['value']:+.3f} ({low:+.3f} .. {high:+.3f})",
                "" if closed is None else f"{closed:.0%}",
            ]
            seed = f"[{report['seed']}](examples/results/{path.name})" if role == ROLES[0] else ""
            lines.append(f"| {seed} | {role} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| seed | rollouts kept, of | denoiser forwards | reward gained, in reference deviations | of the model that only watches | AUC volume / "
        "slice | Spearman volume / slice |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports.values():
        models, watching = (
            report["reward_models"],
            round(report["reward"]["parts"]["after"]["heldout"], 2) + 0.0,
        )  # no -0.00
        pairs = [
            " / ".join(f"{models[name][figure]:.2f}" for name in ("volume", "slice")) for figure in ("auc", "spearman")
        ]
        run = report[report.get("method", "ppo")]
        lines.append(
            f"| {report['seed']} | {run.get('kept_after', run['step'] - 1)} of {run['rollouts']} | {report['unet_forwards']:,} | "
            f"{report['reward']['gain']:+.2f} | {watching:+.2f} | {pairs[0]} | {pairs[1]} |"
        )
    return [*lines, "", *(_verdict(role, list(reports.values())) for role in ROLES)]


def _story_lines(reports: dict[Path, dict]) -> list[str]:
    """One table, one row per seed: what two classifiers see, distance and diversity, before and after."""
    first = next(iter(reports.values()))
    sampler, limits = first["sampler"], first["attribute_match"]["judge"]
    lines = [
        f"{first['n']} images before and after PPO, from the same noise, by {sampler['num_inference_steps']} steps, eta "
        f"{sampler['eta']:g}, guidance {sampler['guidance_scale']:g}, at which the fine-tuned model is at its best. *Exact match*: share of "
        f"images that show all six attributes as their prompt states them; by the judge {limits['real']:.0%} of real images do and "
        f"{limits['reconstruction']:.0%} of reconstructions by the autoencoder. FID: {first['fid']['n']} on each side, by a third classifier.",
        "",
        "| seed | exact match by the judge | difference | by the reward classifier | FID | difference | KL | MS-SSIM within prompts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path, report in reports.items():
        judge, reward = (report["attribute_match"][role] for role in ("judge", "reward"))
        fid, diversity = report["fid"], report["diversity"]
        (low, high), (fid_low, fid_high) = judge["difference"]["interval"], fid["difference"]["interval"]
        cells = [
            f"[{report['seed']}](examples/results/{path.name})",
            f"{judge['before']:.1%} -> {judge['after']:.1%}",
            f"{100 * judge['difference']['value']:+.1f} points ({100 * low:+.1f} .. {100 * high:+.1f})",
            f"{reward['before']:.1%} -> {reward['after']:.1%}",
            f"{fid['before']:.1f} -> {fid['after']:.1f}",
            f"{fid['difference']['value']:+.1f} ({fid_low:+.1f} .. {fid_high:+.1f})",
            f"{report['kl']:.4f}",
            " -> ".join(f"{diversity[arm]['value']:.3f}" for arm in ("before", "after")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _race_lines(race: dict) -> list[str]:
    """Three ratios, and by how much each side's reward rose in one common sampler."""
    sides = race["time_to_reward"]
    rises = {
        side: ", ".join(f"{rise:.1f}" for rise in sides[side]["rise_in_common_sampler"]) for side in ("ours", "trl")
    }
    rollouts = {side: ", ".join(map(str, sides[side]["rollouts"])) for side in ("ours", "trl")}
    return [
        f"A tiny Stable Diffusion ({race['denoiser_parameters'] / 1e6:.1f} million parameters) with LoRA, {race['threads']} CPU threads, "
        f"TRL {race['versions']['trl']['trl']}, medians of {race['seeds']} seeds ([JSON](examples/results/ppo-vs-trl.json)).",
        "",
        "| | ours / TRL's |",
        "|---|---|",
        f"| samples per second at equal work | {race['ratio_equal_work']:.2f} |",
        f"| peak memory at equal work | {race['peak_memory_ratio']:.2f} |",
        f"| seconds until the reward has risen by one deviation | {1 / race['ratio_time_to_reward']:.2f} |",
        "",
        "In the last row ours trains half of the steps, without guidance, on the leash; TRL's guides as its documentation does. Rollouts "
        f"needed: {rollouts['ours']} (ours), {rollouts['trl']} (TRL's). In one guided sampler for both the reward then stood higher by "
        f"{rises['ours']} deviations (ours) and {rises['trl']} (TRL's): guidance costs time and carries over to guided samples.",
    ]


def _verdict(role: str, reports: list[dict]) -> str:
    """In how many seeds the distance fell, and where an interval excludes zero."""
    differences = [report["fid_rl_minus_standard"][role] for report in reports]
    lower = sum(difference["value"] < 0 for difference in differences)
    surely_lower = sum(difference["interval"][1] < 0 for difference in differences)
    surely_higher = sum(difference["interval"][0] > 0 for difference in differences)
    closed = [report["gap_closed"][role] for report in reports if report["gap_closed"][role] is not None]
    found, average = verdict(closed), ""
    if found["interval"]:
        low, high = found["interval"]
        average = (
            f"; {found['mean']:.0%} of the gap closed on average (Student's 95 % interval {low:.0%} .. {high:.0%})"
        )
    purpose = {"judge": "which scored no reward and picked no weights", "label": "which scored the reward data"}[role]
    return (
        f"- By the {role}, {purpose}: lower after RL in {lower} of {len(reports)} seeds, beyond the interval in {surely_lower}; "
        f"higher beyond it in {surely_higher}{average}."
    )


if __name__ == "__main__":
    main()
