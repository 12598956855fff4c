"""Lines of the page of results on studies of volumes: distances before and after, the paper's tables, classes to be seen."""

from pathlib import Path

from msrl_diffusers.study.tables import REAL, STANDARD, shown


ROLES = ("judge", "second_judge", "label")
STUDIES = {  # folders of `examples/results`: what was studied, and by which config
    "study-phantoms-32": ("phantoms at 32^3", "phantoms/study.yaml"),
    "study-phantoms-64": ("phantoms at 64^3", "phantoms/study_64.yaml"),
    "study-ixi-64": ("real brains at 64^3, IXI", "nifti_folder/study_64.yaml"),
}
LEAST_AUC = 0.7  # of a reward model that learned something


def study_lines(reports: dict[Path, dict]) -> list[str]:
    """Two tables: distances, and rewards, one row per seed; and what they say together."""
    first = next(iter(reports.values()))
    lines = [
        f"{first['n']['all']} volumes on each side of a distance; lower is better; in brackets 95 % bootstrap intervals. *Floor*: real "
        "held-out volumes. *Limit*: reconstructions of the training volumes by the autoencoder (rFID), which may lie below the floor. *Gap "
        "closed*: (standard - RL) / (standard - limit); *to held-out*: the same with all distances to held-out volumes (there the judge's "
        f"limit is {first['fid_heldout']['judge']['limit']['all']:.3f}). Features are of networks trained here: no distance compares with "
        "one of Inception. Each run keeps the weights of the lowest label distance; *unchanged*: those were the pretrained ones.",
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
            seed = f"[{report['seed']}]({path.name})" if role == ROLES[0] else ""
            lines.append(f"| {seed} | {role.replace('_', ' ')} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Cost and rewards. A *rollout* is one set of samples that the policy learns from; gains are in standard deviations of the "
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


def paper_lines(content: dict, name: str) -> list[str]:
    """What a study over seeds (`tables.json`) says: its ablations, its classifiers, and which of the paper's findings hold."""
    data = next(iter(content["published"]["fid"]))
    seeds, (_, config) = len(content["seeds"]), STUDIES[name]
    lines = [
        f"`msrl study --config examples/configs/{config} --seeds {' '.join(map(str, content['seeds']))} --ablations "
        f"{' '.join(variant for variant in content['ablations'] if variant != 'full')}`: {content['n']['all']} volumes on each side, mean and "
        f"deviation over {seeds} seeds of the reward models, PPO and the evaluation ([all tables]({name}/tables.md)). Published "
        f"figures ({content['published']['source']}, {data}) are of other data and another extractor; compare shares of the gap. *Accuracy*: of a "
        "classifier that is pretrained on the volumes of the arm and then trained on few real ones (`downstream_per_class` of the config).",
        "",
        "| | judge | gap closed, judge | accuracy with its volumes | published: distance | published: accuracy |",
        "|---|---|---|---|---|---|",
    ]
    theirs, ours = content["published"], content["downstream"] or {}
    published = theirs["downstream"][data]
    rows = {
        "real volumes only": (
            [None, None, ours.get(REAL, {}).get("accuracy")],
            None,
            published[REAL]["accuracy"][0],
        ),
        "standard diffusion": (
            [content["fid"]["judge"]["standard"]["all"], None, ours.get(STANDARD, {}).get("accuracy")],
            theirs["fid"][data]["standard"]["all"],
            published[STANDARD]["accuracy"][0],
        ),
    }
    for variant, row in content["ablations"].items():
        published = theirs["ablations"][variant]
        figures = [row["fid_judge"], row["gap_closed_judge"], row["accuracy"]]
        rows[f"RL, {variant.replace('_', ' ')}"] = (figures, published["fid"], published["accuracy"])
    for title, (figures, fid, accuracy) in rows.items():
        cells = [shown(figure, form) for figure, form in zip(figures, (".3f", ".2f", ".2f"), strict=True)]
        cells += ["" if fid is None else f"{fid:.2f}", f"{accuracy:.2f}"]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "What the paper found, and whether it holds here (mean of differences over seeds, positive as claimed, 95 % interval):",
        "",
    ]
    for finding in content["findings"]:
        holds = {True: "holds", False: "the opposite holds", None: "not shown"}[finding["holds"]]
        interval = finding["interval"]
        difference = (
            f"{finding['mean']:+.4f} ({interval[0]:+.4f} .. {interval[1]:+.4f})"
            if interval
            else "not measured over seeds"
        )
        lines.append(f"- {finding['claim']}: {holds}, {difference}.")
    return lines


def agreement_lines(content: dict) -> list[str]:
    """One table, a row per study: the share of samples in which classifiers see the class asked for."""
    first = next(iter(content["studies"].values()))
    real = first["agreement"]["real_floor"]["all"]["value"]
    lines = [
        f"The share of the samples above in which {content['classifiers']} classifiers, trained on real volumes alone and with no part in "
        f"anything else, see the class that was asked for; in brackets 95 % bootstrap intervals. Of held-out real volumes they see it in "
        f"{real:.1%} ([all intervals, and by class](class-agreement.md)).",
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
        f"- The reward models learned next to nothing (AUC at most {best:.2f}, that of the held-out one included; chance is 0.5): "
        "these runs say nothing about reinforcement learning, only that the chain runs to its end."
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
