"""The README's section of results, from the JSON files under examples/results; nothing in it is typed.

    python examples/benchmarks/readme_results.py

Writes what stands between the two marks in README.md anew. A test holds that the two agree.
"""

import json
from pathlib import Path


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "results"
START, END = "<!-- results: begin, by examples/benchmarks/readme_results.py -->", "<!-- results: end -->"
ROLES = ("judge", "second_judge", "label")
STANDARD = "+ standard synthetic"  # an arm of the downstream study
GAPS = (
    ("gap_closed", "judge"),
    ("gap_closed_heldout", "judge"),
    ("gap_closed_kid", "judge"),
    ("gap_closed", "second_judge"),
)
ON_GPU = {"frechet": "frechet_50"}  # whose memory stands for it
LEAST_AUC = 0.7  # of a reward model that learned something
METHODS = {  # of benchmarks/objectives.py; others stand on its page alone
    "ppo": "any reward, a black box too; the published method",
    "draft_cheap": "rewards are differentiable, and little time (DRaFT-1, looked at twice)",
    "frechet": "real volumes are at hand: rewards lend their features only",
}


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
    agreement = RESULTS / "class-agreement.json"
    if agreement.is_file():
        lines += [
            "### Is the tumor that was asked for to be seen?",
            "",
            *_agreement_lines(json.loads(agreement.read_text())),
            "",
        ]
    objectives = RESULTS / "objectives-phantoms.json"
    if objectives.is_file():
        on_gpu = json.loads((RESULTS / "objectives-phantoms-h200.json").read_text())
        lines += [
            "### The same pipeline by other methods",
            "",
            *_method_lines(json.loads(objectives.read_text()), on_gpu),
            "",
        ]
    for path in sorted(RESULTS.glob("study-*/tables.json")):
        lines += ["### The paper's tables", "", *_paper_lines(json.loads(path.read_text()), path.parent.name), ""]
    others = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("ixi-*.json"))}
    if others:
        recipes = RESULTS / "recipes-ixi.json"
        refusals = [_refusal_line(json.loads(recipes.read_text()), recipes.stem)] if recipes.is_file() else []
        methods = RESULTS / "objectives-ixi.json"
        by_method = [_lower_line(json.loads(methods.read_text()), methods.stem)] if methods.is_file() else []
        lines += ["### Real brains at 32^3: IXI, classes by age", "", *_study_lines(others), *refusals, *by_method, ""]
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
        f"{first['n']['all']} volumes on each side of a distance; lower is better; in brackets 95 % bootstrap intervals. *Floor*: real "
        "held-out volumes. *Limit*: reconstructions by the autoencoder, of the very volumes they are compared with: it may lie below the "
        "floor, which compares other subjects. *Gap closed*: (standard - RL) / (standard - limit); *to held-out*: the same of distances to "
        f"held-out volumes, of which the limit shows none either: by the judge it is {first['fid_heldout']['judge']['limit']['all']:.3f} from "
        "them. Features are those of networks trained "
        "here; no figure compares with one of Inception. Of a run the weights with the lowest label distance are kept: *unchanged* are "
        "those from which no rollout led to a lower one.",
        "",
        "| seed | extractor | floor | limit | before (standard) | after RL | after minus before, paired | gap closed | to held-out |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path, report in reports.items():
        for role in ROLES:
            fids = {arm: values["all"] for arm, values in report["fid"][role].items()}
            difference, unseen = report["fid_rl_minus_standard"][role], report["fid_heldout"][role]
            low, high = difference["interval"]
            before = report["fid_interval"][role]["standard"]
            cells = [f"{fids[arm]:.4f}" for arm in ("real_floor", "limit")]
            cells.append(f"{fids['standard']:.4f} ({before[0]:.4f} .. {before[1]:.4f})")
            if kept_rollouts(report):
                cells += [
                    f"{fids['rl']:.4f}",
                    f"{difference['value']:+.4f} ({low:+.4f} .. {high:+.4f})",
                    *(
                        _gap_closed(distances)
                        for distances in (fids, {arm: values["all"] for arm, values in unseen.items()})
                    ),
                ]
            else:
                cells += ["unchanged", "", "", ""]
            seed = f"[{report['seed']}](examples/results/{path.name})" if role == ROLES[0] else ""
            lines.append(f"| {seed} | {role.replace('_', ' ')} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Cost and rewards. A *rollout* is one batch of samples that the policy learns from; gains are in standard deviations of the "
        "reward before tuning; AUC (reconstructions against samples) and rank correlation (of all sets) of the reward models are on "
        "held-out subjects.",
        "",
        "| seed | rollouts kept, of | denoiser forwards | gain in reward | in a reward that was not trained on | AUC volume / slice | "
        "Spearman volume / slice |",
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
            f"| {report['seed']} | {kept_rollouts(report)} of {run['rollouts']} | {report['unet_forwards']:,} | "
            f"{report['reward']['gain']:+.2f} | {watching:+.2f} | {pairs[0]} | {pairs[1]} |"
        )
    tuned = [report for report in reports.values() if kept_rollouts(report)]
    verdicts = [_verdict(role, tuned, len(reports)) for role in ROLES] if tuned else []
    if not tuned:
        verdicts.append("- No rollout led to weights of a lower label distance: tuning changed nothing.")
    return [*lines, "", *verdicts, *_reward_verdict(list(reports.values()))]


def _gap_closed(fids: dict[str, float]) -> str:
    gap = fids["standard"] - fids["limit"]
    return f"{(fids['standard'] - fids['rl']) / gap:.0%}" if gap > 0 else ""


def _method_lines(content: dict, on_gpu: dict) -> list[str]:
    """One table, a row per method: what it closes of the gap, what it costs, and when to take it. Memory is that of `on_gpu`, an
    earlier run of the same batches."""
    first = next(iter(content["variants"].values()))
    lines = [
        f"{content['n']['all']} volumes on each side; means and deviations over seeds of tuning and evaluation ({_seeds_of(content)}); one set "
        f"of reward models. Limits: {', '.join(_limit(role, first) for role in ROLES)}. *Gap closed*: (standard - tuned) "
        "/ (standard - limit), in brackets the 95 % interval over seeds; *to held-out*: of distances to volumes that no stage has seen (the limit "
        "reconstructs the training volumes, so with those it is compared with its own originals); KID is the kernel distance, unbiased at any "
        "number of volumes. PPO's runs are those of `make demo`. Settings were picked on other "
        "seeds, without a judge; how often draft_cheap is looked at a second time, when a first had been judged on two of these. Forwards of "
        "the denoiser include those of watching; GPU memory is that of [an earlier run](examples/results/objectives-phantoms-h200.md) "
        "on an H200, with as many samples in a batch, that of frechet of rollouts of 50 steps with gradients through ten, which close no more "
        "([JSON](examples/results/objectives-phantoms.json), [page](examples/results/objectives-phantoms.md)).",
        "",
        "| method | take it when | judge | gap closed, judge | to held-out | by its KID | gap closed, second judge | label | MS-SSIM over real | copies | forwards | GPU memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ((name, content["variants"][name]) for name in METHODS):
        measured = content["variants"][ON_GPU[name]] if name in ON_GPU else on_gpu["variants"][row["method"]]
        cells = [
            METHODS[name],
            _change(row["fid"]["judge"]),
            *(_closed(row[gap][role]) for gap, role in GAPS),
            _change(row["fid"]["label"]),
            f"{row['ms_ssim_over_real']['mean']:.2f}",
            " -> ".join(f"{row['copies'][arm]['mean']:.1%}" for arm in ("standard", "rl")),
            f"{row['unet_forwards']['mean']:,.0f}",
            f"{measured['peak_memory']['mean'] / 2**30:.1f} GiB",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _paper_lines(content: dict, name: str) -> list[str]:
    """What a study over seeds (`tables.json`) says: its ablations, its classifiers, and which of the paper's findings hold."""
    data = next(iter(content["published"]["fid"]))
    seeds = len(content["seeds"])
    lines = [
        f"`msrl study --config examples/configs/phantoms/study.yaml --seeds {' '.join(map(str, content['seeds']))} --ablations "
        f"{' '.join(variant for variant in content['ablations'] if variant != 'full')}`: {content['n']['all']} volumes on each side, mean and "
        f"deviation over {seeds} seeds of the reward models, PPO and the evaluation ([all tables](examples/results/{name}/tables.md)). Published "
        f"figures ({content['published']['source']}, {data}) are of other data and another extractor; compare shares of the gap.",
        "",
        "| | judge | gap closed, judge | accuracy with its volumes | published: distance | published: accuracy |",
        "|---|---|---|---|---|---|",
    ]
    theirs = content["published"]
    standard = [
        content["fid"]["judge"]["standard"]["all"],
        None,
        (content["downstream"] or {}).get(STANDARD, {}).get("accuracy"),
    ]
    rows = {
        "standard diffusion": (
            standard,
            theirs["fid"][data]["standard"]["all"],
            theirs["downstream"][data][STANDARD]["accuracy"][0],
        )
    }
    for variant, row in content["ablations"].items():
        published = theirs["ablations"][variant]
        figures = [row["fid_judge"], row["gap_closed_judge"], row["accuracy"]]
        rows[f"RL, {variant.replace('_', ' ')}"] = (figures, published["fid"], published["accuracy"])
    for title, (figures, fid, accuracy) in rows.items():
        cells = [_shown(figure, digits) for figure, digits in zip(figures, (3, 2, 2), strict=True)]
        lines.append(f"| {title} | " + " | ".join([*cells, f"{fid:.2f}", f"{accuracy:.2f}"]) + " |")
    lines += [
        "",
        "What the paper found, and whether it holds here (mean of differences over seeds, positive as claimed, 95 % interval):",
        "",
    ]
    for finding in content["findings"]:
        holds = {True: "holds", False: "the opposite holds", None: "not shown"}[finding["holds"]]
        interval = finding["interval"]
        shown = (
            f"{finding['mean']:+.4f} ({interval[0]:+.4f} .. {interval[1]:+.4f})"
            if interval
            else "not measured over seeds"
        )
        lines.append(f"- {finding['claim']}: {holds}, {shown}.")
    return lines


def _refusal_line(content: dict, name: str) -> str:
    """Whether the floors of the default recipe were right to refuse its rewards: what came of them all the same."""
    refused, rows = len(content["variants"]["default"]["refused"]), content["variants"]
    closed = {variant: _closed(rows[variant]["gap_closed"]["judge"]) for variant in ("unchecked", "paper")}
    return (
        f"- With {len(content['seeds'])} seeds of reward models and PPO on the same pipeline ([page](examples/results/{name}.md)): the "
        f"default recipe found its reward models below their floors and refused to start in {refused}; told to start all the same it "
        f"closed {closed['unchecked']} of the judge's gap, the published recipe, which has no floors, {closed['paper']}: less than nothing "
        "is farther from the real volumes than before."
    )


def _lower_line(content: dict, name: str) -> str:
    """In how many seeds each method ended nearer to the real volumes by the judge; where it sees no gap that is chance."""
    parts = []
    for method, row in content["variants"].items():
        before, after = (row["fid"]["judge"][arm]["values"] for arm in ("standard", "rl"))
        nearer = sum(new < old for new, old in zip(after, before, strict=True))
        parts.append(f"{method} {nearer} of {len(after)} ({_change(row['fid']['judge'])})")
    first = next(iter(content["variants"].values()))
    kid = ", ".join(f"{value:+.4f}" for value in first["kid"]["judge"]["standard"]["values"])
    return (
        f"- One pipeline tuned by several methods ([page](examples/results/{name}.md)); nearer to the real volumes by the judge: "
        f"{', '.join(parts)}. The judge's KID of the pretrained model is {kid} by seed, where 0 is no difference: with "
        f"{content['n']['all']} volumes on each side there is no gap that it could see closed."
    )


def _agreement_lines(content: dict) -> list[str]:
    """One table, a row per study: the share of samples in which classifiers see the class asked for."""
    first = next(iter(content["studies"].values()))
    real = first["agreement"]["real_floor"]["all"]["value"]
    lines = [
        f"Of the samples above, and of {real:.1%} of held-out real volumes, {content['classifiers']} classifiers that were trained on real "
        "volumes alone and had no part in anything else read it ([with intervals and by class](examples/results/class-agreement.md)):",
        "",
        "| run | before | after | after minus before, paired | HGG (ring), before | HGG, after |",
        "|---|---|---|---|---|---|",
    ]
    for name, study in content["studies"].items():
        rows, (low, high) = study["agreement"], study["difference"]["interval"]
        cells = [
            f"{rows['standard']['all']['value']:.1%}",
            f"{rows['rl']['all']['value']:.1%}",
            f"{100 * study['difference']['value']:+.1f} points ({100 * low:+.1f} .. {100 * high:+.1f})",
            f"{rows['standard']['HGG']['value']:.1%}",
            f"{rows['rl']['HGG']['value']:.1%}",
        ]
        lines.append(f"| {name.replace('-', ', ').replace('seed', 'seed ')} | " + " | ".join(cells) + " |")
    return lines


def _seeds_of(content: dict) -> str:
    """Which seeds each variant was run with; variants of the same seeds together."""
    names: dict[str, list[str]] = {}
    for name in METHODS:
        names.setdefault(", ".join(map(str, content["variants"][name]["seeds"])), []).append(name)
    return "; ".join(f"{seeds} of {', '.join(of)}" for seeds, of in names.items())


def _limit(role: str, row: dict) -> str:
    return f"{role.replace('_', ' ')} {row['fid'][role]['limit']['mean']:.3f}"


def _change(fids: dict) -> str:
    """A distance before and after tuning."""
    return " -> ".join(_shown(fids[arm], 3) for arm in ("standard", "rl"))


def _closed(figure: dict | None) -> str:
    if figure is None:
        return "no gap"
    low, high = figure["interval"]
    return f"{figure['mean']:.0%} ({low:.0%} .. {high:.0%})"


def _shown(figure: dict | None, digits: int) -> str:
    """Mean and deviation over seeds."""
    return "" if figure is None else f"{figure['mean']:.{digits}f} +- {figure['sd']:.{digits}f}"


def kept_rollouts(report: dict) -> int:
    """After how many rollouts the weights that were kept are; 0 for the pretrained ones."""
    run = report[report.get("method", "ppo")]
    return run.get("kept_after", run["step"] - 1)


def _reward_verdict(reports: list[dict]) -> list[str]:
    """A line where no reward model tells better from worse on unseen subjects."""
    best = max(models["auc"] for report in reports for models in report["reward_models"].values())
    if best >= LEAST_AUC:
        return []
    return [
        f"- The reward models learned next to nothing (AUC at most {best:.2f}; chance is .5): these runs say nothing about "
        "reinforcement learning, only that the chain runs to its end."
    ]


def _story_lines(reports: dict[Path, dict]) -> list[str]:
    """One table, one row per seed: what two classifiers see, distance and diversity, before and after."""
    first = next(iter(reports.values()))
    sampler, limits = first["sampler"], first["attribute_match"]["judge"]
    lines = [
        f"{first['n']} images before and after PPO, from the same noise, by {sampler['num_inference_steps']} steps, eta "
        f"{sampler['eta']:g}, guidance {sampler['guidance_scale']:g}, {_rank_of_sampler(sampler)} before any tuning. Seeds are of PPO and "
        "what follows; the fine-tuned model is one. *Exact match*: share of "
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
    return [*lines, "", _weaker_leash_line(), "", _guided_line(), "", *_augmentation_lines(list(reports.values()))]


def _weaker_leash_line() -> str:
    """What the first runs did, whose KL term was weaker."""
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("dermoscopy-kl*-seed*.json"))]
    gains = ", ".join(f"{100 * report['attribute_match']['judge']['difference']['value']:+.1f}" for report in reports)
    differences = [report["fid"]["difference"] for report in reports]
    rises = ", ".join(f"{difference['value']:+.1f}" for difference in differences)
    worse = sum(difference["interval"][0] > 0 for difference in differences)
    return (
        f"With a weaker KL term (`--kl_coef {reports[0]['ppo']['ppo/kl_coef']:g} --rl_seed "
        f"{'`, `'.join(str(report['seed']) for report in reports)}`) the "
        f"judge's match rises as much, by {gains} points, but FID by {rises}, beyond "
        f"the interval in {worse} of {len(reports)}: over-optimization that neither classifier shows. Those runs came first; the term "
        "was then set on a further seed, by the reward classifier and a feature extractor that has no part here, and the rows above "
        "are of seeds that had not run before."
    )


def _guided_line() -> str:
    """What guidance gives a model that was trained for it, beside what reinforcement learning gives one that was not."""
    content = json.loads((RESULTS / "text-to-image-samplers-guided.json").read_text())
    best = min(content["rows"], key=lambda row: row["fid"])
    return (
        "The fine-tuned model was trained without prompt dropout, so guidance makes it worse. One that was trained for longer, and for "
        f"guidance, matches without reinforcement learning: {best['reward_match']:.1%} by the reward classifier, FID {best['fid']:.1f}, "
        f"at {best['num_inference_steps']} steps, eta {best['eta']:g}, guidance {best['guidance_scale']:g} "
        "([its samplers](examples/results/text-to-image-samplers-guided.md)); each of its steps costs two forwards."
    )


def _rank_of_sampler(sampler: dict) -> str:
    """Where a sampler stands by FID among those that were measured."""
    rows = json.loads((RESULTS / "text-to-image-samplers.json").read_text())["rows"]
    (own,) = [row["fid"] for row in rows if all(row[name] == value for name, value in sampler.items())]
    rank = sum(row["fid"] < own for row in rows) + 1
    return f"number {rank} by FID of [{len(rows)} samplers](examples/results/text-to-image-samplers.md)"


def _augmentation_lines(reports: list[dict]) -> list[str]:
    """What synthetic images of a rare subgroup do to a classifier of the diagnosis, by seed."""
    found = [report["augmentation"] for report in reports]
    accuracies = {
        arm: ", ".join(f"{study['subgroup_accuracy'][arm]['mean']:.1%}" for study in found)
        for arm in found[0]["subgroup_accuracy"]
    }
    first = found[0]
    return [
        f"A classifier of the diagnosis with synthetic images of a rare subgroup ({' with '.join(first['subgroup'])}, "
        f"{first['n']['train_subgroup']} of {first['n']['train']} training images) sees it right, by seed (means of "
        f"{len(first['seeds'])} trainings): "
        + "; ".join(f"{arm}: {values}" for arm, values in accuracies.items())
        + ".",
    ]


def _race_lines(race: dict) -> list[str]:
    """Three ratios, and by how much each side's reward rose in one common sampler."""
    sides = race["time_to_reward"]
    seconds = {side: ", ".join(f"{value:.0f}" for value in sides[side]["seconds"]) for side in ("ours", "trl")}
    rises = {
        side: ", ".join(f"{rise:.1f}" for rise in sides[side]["rise_in_common_sampler"]) for side in ("ours", "trl")
    }
    return [
        f"A tiny Stable Diffusion ({race['denoiser_parameters'] / 1e6:.1f} million parameters) with LoRA, {race['threads']} CPU threads, "
        f"TRL {race['versions']['trl']['trl']}, medians of {race['seeds']} seeds ([JSON](examples/results/ppo-vs-trl.json)), at equal work:",
        "",
        "| | ours / TRL's |",
        "|---|---|",
        f"| samples per second | {race['ratio_equal_work']:.2f} |",
        f"| peak memory | {race['peak_memory_ratio']:.2f} |",
        "",
        "Each by its own settings (ours trains half of the steps, without guidance, precision auto, on the leash; TRL's guides, as its "
        f"documentation does), until the reward had risen by one deviation of its own first samples: {seconds['ours']} s (ours), "
        f"{seconds['trl']} s (TRL's). In one guided sampler for both it then stood higher by {rises['ours']} deviations (ours) and "
        f"{rises['trl']} (TRL's): this does not show that either learns faster.",
    ]


def _verdict(role: str, reports: list[dict], number: int) -> str:
    """In how many of `number` seeds the distance of these runs fell or rose, and where an interval excludes zero."""
    differences = [report["fid_rl_minus_standard"][role] for report in reports]
    lower = sum(difference["value"] < 0 for difference in differences)
    surely_lower = sum(difference["interval"][1] < 0 for difference in differences)
    surely_higher = sum(difference["interval"][0] > 0 for difference in differences)
    higher = sum(difference["value"] > 0 for difference in differences)
    purpose = {
        "judge": "which scored no reward and picked no weights",
        "second_judge": "of another architecture, which did neither",
        "label": "which scored the reward data and picked the weights",
    }[role]
    return (
        f"- By the {role.replace('_', ' ')}, {purpose}: unchanged in {number - len(reports)} of {number} seeds, lower after RL in {lower} (beyond the "
        f"interval in {surely_lower}), higher in {higher} (beyond it in {surely_higher})."
    )


if __name__ == "__main__":
    main()
