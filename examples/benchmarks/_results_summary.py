"""Lines of the README's summary of results: one table over all studies of volumes, and what each says in a sentence."""

from statistics import fmean

from _results_methods import perfect_sampler
from _results_recipes import PUBLISHED_RECIPE, lowest, rising, that_help
from _results_words import closed, listed
from _runs import interval_over_seeds

from msrl_diffusers.study.tables import shown, summary


PAGE = "examples/results/README.md"
JUDGES = ("judge", "second_judge")


def summary_lines(
    demos: list[dict], methods: dict, recipes: dict, tables: dict, agreement: dict, ixi: dict, stories: list[dict]
) -> list[str]:
    """The table, and a sentence or two on each: `demos` and `stories` are reports, the others what benchmarks and studies
    over seeds wrote."""
    lines = [
        "*Judges* are networks that had no part in training. *Gap closed*: (before - after) / (before - reconstructions), of Frechet "
        "distances to the training volumes. Means over seeds, with +- their standard deviation, in brackets the 95 % t interval. Below zero: "
        f"farther from the real volumes than before. {PUBLISHED_RECIPE}",
        "",
        "| what was tuned, and how | seeds | judge's distance | gap closed, judge | gap closed, second judge |",
        "|---|---|---|---|---|",
        _row("phantoms, `make demo`: PPO by the default recipe", _of_reports(demos)),
        *(
            _row(f"phantoms, {title}", methods["variants"][name])
            for name, title in {
                "draft_cheap": "gradients of the rewards (DRaFT-1)",
                "frechet": "the Frechet distance as the loss",
                "ddo": "real volumes told from its own samples",
            }.items()
        ),
        *(
            _row(f"phantoms, {title}", recipes["variants"][name])
            for name, title in {
                "paper": "PPO by the published recipe, 12 rollouts",
                "gated_kl": "the same, with a stronger KL term where its rewards disagree",
                "default": "PPO by the default recipe, as long at most",
            }.items()
        ),
        *(
            _row(f"real brains (IXI), {title}", ixi["variants"][name])
            for name, title in {"ppo": "PPO", "frechet": "the Frechet distance as the loss"}.items()
        ),
    ]
    return [
        *lines,
        "",
        _demo_line(demos, agreement),
        f"- {perfect_sampler(next(iter(methods['variants'].values())))}",
        _recipe_line(recipes),
        _paper_line(tables),
        _ixi_line(ixi),
        _story_line(stories),
        "",
        f"By seed, by method, with costs, diversity, copies and intervals: [{PAGE}]({PAGE}).",
    ]


def _of_reports(reports: list[dict]) -> dict:
    """The figures of `_row`, of reports of one study over seeds."""
    return {
        "seeds": [report["seed"] for report in reports],
        "fid": {
            "judge": {
                arm: summary([report["fid"]["judge"][arm]["all"] for report in reports]) for arm in ("standard", "rl")
            }
        },
        "gap_closed": {
            role: interval_over_seeds([report["gap_closed"][role] for report in reports]) for role in JUDGES
        },
    }


def _row(title: str, row: dict) -> str:
    fids = [shown(row["fid"]["judge"][arm], ".3f") for arm in ("standard", "rl")]
    cells = [title, ", ".join(map(str, row["seeds"])), " -> ".join(fids)]
    return "| " + " | ".join(cells + [closed(row["gap_closed"][role]) for role in JUDGES]) + " |"


def _demo_line(reports: list[dict], agreement: dict) -> str:
    def change(figure: str, of: str = "manifold") -> str:
        means = [fmean(report["diversity"][arm][of][figure] for report in reports) for arm in ("standard", "rl")]
        return " -> ".join(f"{mean:.2f}" for mean in means)

    lower = sum(all(report["fid_rl_minus_standard"][role]["interval"][1] < 0 for role in JUDGES) for report in reports)
    agreeing = [
        fmean(study["agreement"][arm]["all"]["value"] for study in agreement["studies"].values())
        for arm in ("standard", "rl")
    ]
    return (
        f"- After `make demo` the distances by both judges are lower in {lower} of {len(reports)} seeds, with 95 % bootstrap intervals of the "
        f"differences that leave out zero. Samples get more diverse (MS-SSIM of pairs {change('value', 'ms_ssim')}; real volumes "
        f"{fmean(report['diversity']['real']['ms_ssim']['value'] for report in reports):.2f}), show the tumor that was asked for more often "
        f"({agreeing[0]:.0%} -> {agreeing[1]:.0%}), and lie less densely near real ones (precision {change('precision')}, density "
        f"{change('density')}, coverage {change('coverage')}). The judge's distance by class: {_by_class(reports)}."
    )


def _by_class(reports: list[dict]) -> str:
    """The judge's distance of each class before and after, and in how many seeds it rose."""
    parts = []
    for name in (name for name in reports[0]["n"] if name != "all"):
        before, after = ([report["fid"]["judge"][arm][name] for report in reports] for arm in ("standard", "rl"))
        rose = sum(new > old for new, old in zip(after, before, strict=True))
        parts.append(f"{name} {fmean(before):.2f} -> {fmean(after):.2f} (higher in {rose} of {len(reports)} seeds)")
    return listed(parts)


def _recipe_line(content: dict) -> str:
    paper = content["variants"]["paper"]
    turning = [points[lowest(points, "judge")]["rollout"] for points in paper["curves"]]
    return (
        f"- Over-optimization: by the published recipe the judge's distance is lowest after {listed(turning)} of {paper['rollouts'][0]} rollouts, "
        f"by seed; after it the reward that is trained on rises in {rising('mean', paper['curves'])}, and so does that of a model which only "
        f"watches in {rising('heldout', paper['curves'])}. What helps is not to go as far, by weights that the label distance picks (samples to "
        f"real volumes, by an extractor that judges nothing), or by a stronger KL term: of the [recipes]({PAGE}#rewards-under-optimization) "
        f"{listed(list(that_help(content['variants'])) or ['none'])} end nearer to the training volumes in every seed (the judge itself, "
        "on these seeds, told them apart; what further seeds say is there too). The label distance is no "
        "alarm that stops a run in time."
    )


def _paper_line(tables: dict) -> str:
    by_verdict = {
        verdict: [finding["claim"] for finding in tables["findings"] if finding["holds"] is verdict]
        for verdict in (True, False, None)
    }
    refuted = f" The opposite holds: {'; '.join(by_verdict[False])}." if by_verdict[False] else ""
    return (
        f"- Of the paper's findings, on phantoms over {len(tables['seeds'])} seeds, these hold: {'; '.join(by_verdict[True])}.{refuted} Not "
        f"shown, with intervals that include zero: {'; '.join(by_verdict[None])} ([tables]({PAGE}#the-papers-tables-phantoms-at-323))."
    )


def _ixi_line(ixi: dict) -> str:
    kid = next(iter(ixi["variants"].values()))["kid"]["judge"]["standard"]["values"]
    return (
        f"- Real brains: with {ixi['n']['all']} held-out volumes the judge sees no gap that could be closed (KID of the pretrained model "
        f"{', '.join(f'{value:+.4f}' for value in kid)} by seed, where 0 is no difference), reward models hardly rank unseen subjects, and "
        "`validity_floors` refuse them: this shows that the chain runs, and not what it gains on patients."
    )


def _story_line(reports: list[dict]) -> str:
    match = [fmean(report["attribute_match"]["judge"][arm] for report in reports) for arm in ("before", "after")]
    fid = [fmean(report["fid"][arm] for report in reports) for arm in ("before", "after")]
    beyond = sum(report["fid"]["difference"]["interval"][0] > 0 for report in reports)
    return (
        f"- Text to image (drawn images, a small model): PPO raises the share of images that show all their prompt states from {match[0]:.0%} "
        f"to {match[1]:.0%} by a classifier that gave no reward; FID goes from {fid[0]:.1f} to {fid[1]:.1f}, and the 95 % bootstrap "
        f"interval of the rise leaves out zero in {beyond} of {len(reports)} seeds. By the classifier that did, a "
        f"model trained for longer, and guided, gets as far without PPO "
        f"([results]({PAGE}#text-to-image-drawn-dermoscopy-images-at-32-x-32))."
    )
