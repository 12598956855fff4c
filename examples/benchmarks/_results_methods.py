"""Lines of the page of results on one pipeline tuned by several methods (`objectives.py`), and the README's table of trainers."""

from _results_volumes import ROLES
from _results_words import closed, copies, listed

from msrl_diffusers.study.tables import REAL, STANDARD, TUNED, shown


GAPS = (
    ("gap_closed", "judge"),
    ("gap_closed_heldout", "judge"),
    ("gap_closed_kid", "judge"),
    ("gap_closed", "second_judge"),
)
METHODS = {  # of benchmarks/objectives.py; others stand on its page alone
    "ppo": "any reward, a black box too; the published method",
    "ppo_window": "the same, and forwards are dear: noise in four of the steps, closed-form KL mask (`sde_window`, `policy_loss: kl_mask`)",
    "nft": "any reward, and final samples only",
    "draft_cheap": "rewards are differentiable, and little time (DRaFT-1, with only two looks at the label distance: `watch_steps: 7`, `watch_per_class: 32`)",
    "frechet": "real volumes are at hand: rewards lend their features only",
    "ddo": "the same, and no network but the denoiser is to say what counts: real volumes against own samples",
}
TRAINERS = {  # with the name that train_rl.py takes
    "ppo": "`ppo`: `DiffusionPPOTrainer`",
    "ppo_window": "`ppo`: `DiffusionPPOTrainer`",
    "nft": "`nft`: `DiffusionNFTTrainer` ([arXiv 2509.16117](https://arxiv.org/abs/2509.16117))",
    "draft_cheap": "`draft`: `RewardBackpropTrainer` (DRaFT-K, DRaFT-LV, ReFL)",
    "frechet": "`frechet`: `FrechetTrainer` ([arXiv 2604.28190](https://arxiv.org/abs/2604.28190))",
    "ddo": "`ddo`: `DDOTrainer` ([arXiv 2503.01103](https://arxiv.org/abs/2503.01103))",
}


def method_lines(content: dict, memory: dict) -> list[str]:
    """One table, a row per method: what it closes of the gap, what it costs, and when to take it; what the methods say together.
    `memory` is what `method_memory.py` wrote."""
    rows = _rows(content)
    first = next(iter(rows.values()))
    lines = [
        f"{content['n']['all']} volumes on each side; means and deviations over seeds of tuning and evaluation ({_seeds_of(rows)}); one set "
        f"of reward models. Limits: {', '.join(_limit(role, first) for role in ROLES)}. *Gap closed*: (standard - tuned) "
        "/ (standard - limit), in brackets the 95 % interval over seeds; *to held-out*: of distances to held-out volumes, on which nothing was trained; KID is "
        "the kernel distance, unbiased at any number of volumes. Settings were chosen on other seeds and without the judges, with two "
        "exceptions: draft_cheap looked at the label distance once at first, and its second look was added when the judges' figures of runs "
        "with one look, of two of those other seeds, were known; and of ddo a first setting was given up when the label distance of a run "
        "with seed 3, one of those below, rose again. *Copies*: samples that the audit flags. Forwards of the "
        f"denoiser include those of watching; memory is what tuning takes beyond a process's imports on a {memory['device'].replace('cpu', 'CPU')} "
        "([distances](objectives-phantoms.md), [memory](method-memory.json)).",
        "",
        "| method | take it when | judge | gap closed, judge | to held-out | by its KID | gap closed, second judge | label | MS-SSIM over real | copies | forwards | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [
            METHODS[name],
            _change(row["fid"]["judge"]) + _unchanged(row),
            *(closed(row[gap][role]) for gap, role in GAPS),
            _change(row["fid"]["label"]),
            f"{row['ms_ssim_over_real']['mean']:.2f}",
            copies(row),
            f"{row['unet_forwards']['mean']:,.0f}",
            _memory(memory, name),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        _beside_ppo({name: share for name, share in content["share_of_ppo"].items() if name in rows}),
        f"- {perfect_sampler(first)}",
        *(_accuracy_line(name, row["downstream"]) for name, row in rows.items() if row["downstream"]),
    ]


def trainer_lines(content: dict, memory: dict) -> list[str]:
    """The README's table: which trainer to take when, what it closed of the gap, what it costs in forwards and in memory."""
    rows = _rows(content)
    forwards = {name: row["unet_forwards"]["mean"] for name, row in rows.items()}
    lines = [
        "| method: trainer | take it when | gap closed, judge | forwards of the denoiser, of PPO's | memory |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [
            TRAINERS[name], METHODS[name], closed(row["gap_closed"]["judge"]), f"{forwards[name] / forwards['ppo']:.2f}", _memory(memory, name)
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        f"One pipeline of phantoms tuned by each, seeds {_seeds_of(rows)}, in brackets the 95 % interval over them; memory is what tuning "
        f"takes beyond a process's imports on a {memory['device'].replace('cpu', 'CPU')} "
        "([all figures](examples/results/README.md#the-same-pipeline-by-other-methods)).",
    ]


def _rows(content: dict) -> dict:
    return {name: content["variants"][name] for name in METHODS if name in content["variants"]}


def _memory(memory: dict, name: str) -> str:
    return f"{memory['results'][name]['peak_memory'] / 2**30:.1f} GiB"


def _beside_ppo(shares: dict) -> str:
    """Which methods reach PPO's distance, and at what cost."""
    reached = [
        f"{name} with {share['forwards']:.0%} of its forwards"
        for name, share in shares.items()
        if share["reaches_ppo"]
    ]
    missed = [name for name, share in shares.items() if share["reaches_ppo"] is False]
    beyond = f"; {listed(missed)} did not" if missed else ""
    return f"- Methods whose mean judge distance is at or below PPO's, over the same seeds: {', '.join(reached) or 'none'}{beyond}."


def perfect_sampler(row: dict) -> str:
    """What reconstructions of held-out volumes would close of the judge's gap, in place of samples."""
    fid = {arm: found["mean"] for arm, found in row["fid"]["judge"].items()}
    closed = (fid["standard"] - fid["limit_heldout"]) / (fid["standard"] - fid["limit"])
    return (
        "A gap closed by 100 % is out of reach: the limit reconstructs the training volumes, so it is compared with its own originals. "
        f"Reconstructions of held-out volumes, which a perfect sampler of new subjects would give, are {fid['limit_heldout']:.3f} from the "
        f"training volumes by the judge: {closed:.0%} of the gap (seeds {listed(row['seeds'])}). What closes more lies nearer to these very subjects than new ones would, so "
        "distances to held-out volumes are measured too."
    )


def _accuracy_line(name: str, arms: dict) -> str:
    """What a classifier gains from a method's volumes."""
    accuracies = [shown(arms[arm]["accuracy"], ".3f") for arm in (TUNED, STANDARD, REAL)]
    return (
        f"- A classifier with few real volumes, pretrained on those of {name}: accuracy {accuracies[0]}; on those of the pretrained model: "
        f"{accuracies[1]}; on none: {accuracies[2]}."
    )


def lower_line(content: dict, name: str) -> str:
    """In how many seeds each method ended nearer to the real volumes by the judge; where it sees no gap that is chance."""
    parts = []
    for method, row in content["variants"].items():
        before, after = (row["fid"]["judge"][arm]["values"] for arm in ("standard", "rl"))
        nearer = sum(new < old for new, old in zip(after, before, strict=True))
        parts.append(f"{method} {nearer} of {len(after)} ({_change(row['fid']['judge'])}{_unchanged(row)})")
    first = next(iter(content["variants"].values()))
    kid = ", ".join(f"{value:+.4f}" for value in first["kid"]["judge"]["standard"]["values"])
    return (
        f"- A further pipeline of the same config tuned by several methods ([page]({name}.md)); nearer to the real volumes by the judge: "
        f"{', '.join(parts)}. The judge's KID of the pretrained model is {kid} by seed, where 0 is no difference: with "
        f"{content['n']['all']} volumes on each side there is no gap that it could see closed."
    )


def _seeds_of(rows: dict) -> str:
    """Which seeds the methods were run with; those of the same seeds together."""
    names: dict[str, list[str]] = {}
    for name, row in rows.items():
        names.setdefault(", ".join(map(str, row["seeds"])), []).append(name)
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{seeds} of {', '.join(of)}" for seeds, of in names.items())


def _limit(role: str, row: dict) -> str:
    return f"{role.replace('_', ' ')} {row['fid'][role]['limit']['mean']:.3f}"


def _change(fids: dict) -> str:
    """A distance before and after tuning."""
    return " -> ".join(shown(fids[arm], ".3f") for arm in ("standard", "rl"))


def _unchanged(row: dict) -> str:
    """In how many seeds the weights that were kept are the pretrained ones; figures may differ by another choice of sampler."""
    number = row["kept_after"].count(0)
    return f"; weights unchanged in {number} of {len(row['seeds'])}" if number else ""
