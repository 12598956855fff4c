"""The stage report: report.json, report.md, figures and the two pipelines, from what the other stages found."""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Collection
from pathlib import Path

from ..evaluation.validity import broken_floors
from ..files import write_json, write_text
from ..plots import plot_history, plot_scatter, plot_volumes
from ..precision import precision_name
from ..processes import device_name, process_state
from .artifacts import load_pipeline, load_reported, load_scores, load_split, load_tuned_pipeline, stages_left_out
from .config import SHOW_LESIONS, StudyConfig
from .curve_figure import curve_lines, draw_curve
from .sections import WITHOUT_REWARDS


PACKAGES = ("msrl_diffusers", "torch", "diffusers", "accelerate", "transformers", "monai", "torchmetrics", "numpy")
ARMS = {
    "real_floor": "real, held out (floor)",
    "limit": "autoencoder (limit)",
    "limit_heldout": "autoencoder, of held-out volumes",
    "standard": "standard diffusion",
    "rl": "RL-tuned",
}
EXTRACTORS = {
    "judge": "used for nothing but this table",
    "second_judge": "neither: of another architecture, to confirm the judge",
    "label": "it also scored the reward data",
}
METHOD_NAMES = {
    "ppo": "PPO", "nft": "DiffusionNFT", "draft": "Reward backpropagation", "frechet": "Frechet distance as the loss",
    "ddo": "Discriminative self-play",
}  # fmt: skip


def report(config: StudyConfig) -> dict:
    """Write `report.json`, `report.md`, `figures/`, `pipeline_standard/` and `pipeline_rl/` into the study's folder."""
    output_dir = Path(config.output_dir)
    records = stage_records(output_dir, stages_left_out(config))
    figures = records["evaluate"]["result"]
    content = {
        **figures,
        "gap_closed": {role: gap_closed(fids) for role, fids in figures["fid"].items()},
        "gap_closed_heldout": {role: gap_closed(fids) for role, fids in figures["fid_heldout"].items()},
        "seed": config.seed_of("report"),
        "dataset": config.dataset,
        "data_fingerprint": records["prepare"]["result"]["fingerprint"],
        "data": records["prepare"]["result"],
        "downstream": _downstream(records) if config.downstream else None,
        "method": config.method,
        "rewarded": config.method not in WITHOUT_REWARDS,
        "optimized": config.optimized_rewards(),
        "refreshed": config.refreshes,
        config.method: records[config.method]["result"],
        **({"frechet_features": config.frechet_features} if config.method == "frechet" else {}),
        "unet_forwards": records[config.method]["result"]["unet_forwards"],
        "curve": records["curve"]["result"] if config.num_curve_points else None,
        "seconds": {name: record["seconds"] for name, record in records.items()},
        "pretrained": config.pretrained and Path(config.pretrained).name,
        "device": device_name(),
        "precision": precision_name(config.mixed_precision, process_state().device),
        "commit": git_commit(),
        "versions": versions(),
    }
    load_pipeline(config).save_pretrained(output_dir / "pipeline_standard")
    load_tuned_pipeline(config).save_pretrained(output_dir / "pipeline_rl")
    _draw(config, content)
    write_text(output_dir / "report.md", markdown(content))
    write_json(output_dir / "report.json", content)
    return {"report": str(output_dir / "report.md")}


def stage_records(output_dir: Path, without: Collection[str]) -> dict[str, dict]:
    """What the stages of a study wrote of themselves, by name, but those `without`: an earlier study in the folder may have left
    its own."""
    paths = sorted(path for path in output_dir.glob("*/stage.json") if path.parent.name not in without)
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def _downstream(records: dict) -> dict[str, dict[str, float]]:
    """Metrics of the downstream classifiers by arm, means over their seeds."""
    arms = records["downstream"]["result"]["arms"]
    return {arm: {metric: figures["mean"] for metric, figures in row.items()} for arm, row in arms.items()}


def gap_closed(fids: dict[str, dict[str, float]]) -> float | None:
    """(standard - RL) / (standard - limit) over all classes; None where there is no gap.

    Of distances to the training volumes (`fid`) the limit is compared with its own originals, which no generator of new subjects
    is: the arm `limit_heldout` shows how far reconstructions of others lie. Of distances to held-out volumes (`fid_heldout`) limit and
    samples both show other subjects.
    """
    gap = fids["standard"]["all"] - fids["limit"]["all"]
    return (fids["standard"]["all"] - fids["rl"]["all"]) / gap if gap > 0 else None


def git_commit() -> str | None:
    """The commit of the source tree this package lies in, with `+` if files differ; None where no repository has its files, as
    that around a virtual environment has not."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _loss(content: dict, role: str) -> str:
    """What is optimized is not measured by it."""
    return "; its distance was the loss of the tuning" if role in content.get("frechet_features", ()) else ""


def markdown(content: dict) -> str:
    """The report as a page."""
    classes = list(content["fid"]["judge"]["standard"])
    lines = [
        "# Study report",
        "",
        f"Data: {_data_name(content)} `{content['data_fingerprint']}`; {content['n']['all']} volumes on each side of every "
        f"distance; seed {content['seed']}. Not for clinical use.",
        "",
        *(line for warning in content.get("data", {}).get("warnings", ()) for line in (f"**Warning**: {warning}", "")),
    ]
    for role, purpose in EXTRACTORS.items():
        identity = content["extractors"][role]
        lines += [
            f"## Frechet distance to the training volumes, {role.replace('_', ' ')} extractor",
            "",
            f"`{identity['name']}` `{identity['sha256']}`, {purpose}{_loss(content, role)}. Lower is better; intervals: 95 % bootstrap by volume.",
            "",
            "| | " + " | ".join(classes) + " | interval (all) | KID | to held-out volumes (all) |",
            "|---" * (len(classes) + 4) + "|",
        ]
        for arm, title in ARMS.items():
            fids = content["fid"][role][arm]
            low, high = content["fid_interval"][role][arm]
            other = content["fid_heldout"][role].get(arm)
            lines.append(
                f"| {title} | "
                + " | ".join(f"{fids[name]:.4f}" for name in classes)
                + f" | {low:.4f} .. {high:.4f} | {content['kid'][role][arm]:.5f} | {'' if other is None else format(other['all'], '.4f')} |"
            )
        difference = content["fid_rl_minus_standard"][role]
        closed, of_others = (_share(content[name][role]) for name in ("gap_closed", "gap_closed_heldout"))
        lines += [
            "",
            f"RL minus standard: {difference['value']:+.4f} ({difference['interval'][0]:+.4f} .. "
            f"{difference['interval'][1]:+.4f}, paired). Gap closed: {closed}; to held-out volumes: {of_others}. (The limit "
            "reconstructs the training volumes: with these it is compared with its own originals, with held-out ones it is not. What a "
            "perfect sampler of new subjects would show is the autoencoder, of held-out volumes.)",
            "",
        ]
    lines += [
        "## Both arms at every sampler (all classes)",
        "",
        "| arm and sampler | judge | second judge | label |",
        "|---|---|---|---|",
    ]
    for name in content["fid_by_sampler"]["judge"]:
        if "@" in name:
            cells = [f"{content['fid_by_sampler'][role][name]['all']:.4f}" for role in EXTRACTORS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"Samplers: {json.dumps(content['samplers'])}", "", "## Reward", ""]
    reward = content["reward"]
    lines += [
        f"Mean reward before {reward['before']['mean']:.2f} (sd {reward['before']['std']:.2f}), after "
        f"{reward['after']['mean']:.2f} (sd {reward['after']['std']:.2f}): a gain of {reward['gain']:.2f} reference deviations.",
        "",
        "| reward model, on held-out subjects | AUC, reconstructions of the least noise against samples | Spearman over the volumes of all sets | after RL "
        "(reference deviations) |",
        "|---|---|---|---|",
    ]
    for role, validity in content["reward_models"].items():
        after = reward["parts"]["after"][role]
        lines.append(f"| {role} | {validity['auc']:.3f} | {validity['spearman']:.3f} | {after:+.2f} |")
    if content["refreshed"]:
        lines += [
            "",
            "All rewards here, and along the curve, are by the reward models as they were before the first refresh.",
        ]
    lines += _weak_reward_lines(content)
    lines += _diversity_lines(content) + _memorization_lines(content) + _downstream_lines(content)
    method, tuning = content["method"], content[content["method"]]
    lines += [
        "",
        f"{METHOD_NAMES[method]}: {tuning['rollouts']} rollouts, {content['unet_forwards']} denoiser forwards, stopped: "
        f"{tuning['stopped'] or 'at max_steps'}. {kept_line(tuning['kept_after'])}",
        *(curve_lines(content["curve"], content["rewarded"]) if content["curve"] else []),
        "",
        "## Figures",
        "",
        *(f"![{name}](figures/{name}.png)" for name in ("comparison", method, "reward_vs_fid")),
        "",
        *(
            ["Slices meet where left and right of a volume differ most, which is where a lesion shows.", ""]
            if _data_name(content) in SHOW_LESIONS
            else []
        ),
        "Not measured here: anatomical correctness by a reader"
        + (", downstream use." if content["downstream"] is None else "."),
        "",
    ]
    return "\n".join(lines)


def _weak_reward_lines(content: dict) -> list[str]:
    """A warning where what was optimized hardly ranks unseen subjects; the floors of the study itself may be lower, or none."""
    broken = broken_floors({role: content["reward_models"][role] for role in content["optimized"]})
    if not broken:
        return []
    return [
        "",
        f"**Tuned by rewards that hardly rank unseen subjects**: {'; '.join(broken)}. What the policy gained of them says nothing about "
        "its volumes; `validity_floors` refuses such rewards.",
    ]


def kept_line(kept_after: int, strong: str = "**") -> str:
    """Which weights the tuned arm has; the pretrained ones are a result too, but not one of tuning. `strong` is what a page has around
    words that must be seen."""
    if kept_after:
        return f"The weights kept are those after {kept_after}."
    return f"{strong}The pretrained weights were kept{strong}: none that was looked at was better, and the arms can differ by their samplers alone."


def _data_name(content: dict) -> str:
    """The data set, by the name that `msrl prepare` read it by."""
    return content.get("data", {}).get("dataset", content["dataset"])


def _share(closed: float | None) -> str:
    return "no gap" if closed is None else format(closed, ".1%")


def _diversity_lines(content: dict) -> list[str]:
    lines = [
        "",
        "## Diversity",
        "",
        "| | MS-SSIM of pairs (lower: more diverse) | precision | recall | density | coverage |",
        "|---|---|---|---|---|---|",
    ]
    for arm, figures in content["diversity"].items():
        similarity, manifold = figures["ms_ssim"], figures.get("manifold")
        cells = ["" if similarity is None else f"{similarity['value']:.3f}"]
        names = ("precision", "recall", "density", "coverage")
        cells += [f"{manifold[name]:.3f}" if manifold else "" for name in names]
        lines.append(f"| {ARMS.get(arm, 'real, training')} | " + " | ".join(cells) + " |")
    return lines


def _memorization_lines(content: dict) -> list[str]:
    lines = ["", "## Memorization", ""]
    if content["memorization"] is None:
        return [*lines, "Not audited: too few volumes."]
    for arm, found in content["memorization"].items():
        low, high = found["interval"]
        lines.append(
            f"- {ARMS[arm]}: {found['n_copies']} of {found['n_generated']} volumes look like copies of training volumes "
            f"({low:.1%} .. {high:.1%}; {found['expected_false_positives']:.1f} at most expected by chance)."
        )
    return lines


def _downstream_lines(content: dict) -> list[str]:
    if content["downstream"] is None:
        return []
    rows = content["downstream"]
    names = list(next(iter(rows.values())))
    return [
        "",
        "## A classifier of real volumes, pretrained on synthetic ones",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (1 + len(names)) + "|",
        *(f"| {arm} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |" for arm, row in rows.items()),
        "",
        "Intervals and paired differences: `downstream/downstream.json`.",
    ]


def _draw(config: StudyConfig, content: dict) -> None:
    output_dir, figures = Path(config.output_dir), Path(config.output_dir) / "figures"
    arms = {arm: load_reported(config, arm) for arm in ("limit", "standard", "rl")}
    shown = {"real": load_split(config, "train"), **arms}
    titles = {"real": "real", "limit": "autoencoder (limit)", "standard": "standard", "rl": "RL, from the same noise"}
    rows = {titles[name]: volumes.take_per_class(4).pixel_values for name, volumes in shown.items()}
    plot_volumes(rows, figures / "comparison.png", at_asymmetry=_data_name(content) in SHOW_LESIONS)
    method = config.method
    plot_history(
        output_dir / method,
        ["reward/mean", "watch/heldout_reward", "watch/label_fid", f"{method}/kl"],
        figures / f"{method}.png",
    )
    if content["curve"]:
        draw_curve(content["curve"], figures / "over_optimization.png", content["rewarded"])
    fids = load_scores(config)["fid"]
    groups = {
        role: ([fids[name]["all"] for name in validity["mean_by_set"]], list(validity["mean_by_set"].values()))
        for role, validity in content["reward_models"].items()
    }
    plot_scatter(
        groups, figures / "reward_vs_fid.png", "FID of the set (label extractor)", "mean reward, held-out subjects"
    )
