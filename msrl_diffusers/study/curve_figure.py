"""The over-optimization curve as a figure and as lines of the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


PANELS = {
    "reward, in deviations": {
        "trained on": ("reward", "mean"), "volume": ("reward", "volume"), "slice": ("reward", "slice"),
        "held out": ("reward", "heldout"),
    },
    "Frechet distance, label": {"label": ("fid", "label")},
    "Frechet distance, judge": {"judge": ("fid", "judge")},
    "KID, judge": {"judge": ("kid", "judge")},
    "diversity": {"deviation in a class": ("diversity",)},
    "MS-SSIM of pairs": {"pairs": ("ms_ssim",)},
    "high frequencies": {"share": ("high_frequency",)},
    "nearest training volume": {"distance": ("nearest", "distance")},
}  # fmt: skip
REAL = ("diversity", "ms_ssim", "high_frequency")  # figures that the real volumes have too


def draw_curve(curve: Mapping, path: str | Path, rewarded: bool = True) -> None:
    """Draw all figures of `curve.json` against the square root of the divergence, a panel each. A dotted line marks the real
    volumes' value, a star the weights that were kept. Where the policy is not `rewarded`, rewards only watched."""
    points, kept = curve["points"], curve["kept"]
    distances = [point["sqrt_kl"] for point in points]
    figure = Figure(figsize=(13, 6), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(2, 4).flat, PANELS.items(), strict=True):
        for name, keys in lines.items():
            values = [look_up(point, keys) for point in points]
            if None not in values:
                label = "mean" if name == "trained on" and not rewarded else name
                (line,) = axis.plot(distances, values, marker="o", markersize=3, label=label)
                if kept:
                    axis.plot(kept["sqrt_kl"], look_up(kept, keys), marker="*", markersize=10, color=line.get_color())
            if keys[0] in REAL and curve["real"][keys[0]] is not None:
                axis.axhline(curve["real"][keys[0]], color="tab:gray", linestyle=":")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("square root of the KL divergence", fontsize=8)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=7)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def curve_lines(curve: Mapping, rewarded: bool = True) -> list[str]:
    """The curve as a table of the report, and what it says. Where the policy is not `rewarded`, rewards only watched."""
    reward = "reward trained on" if rewarded else "reward, not trained on"
    lines = [
        "",
        "## Over-optimization",
        "",
        f"{curve['n']} samples at each point, by the sampler of the rollouts; measured after the training, on its weights. Rewards are "
        "in deviations of the pretrained samples.",
        "",
        f"| rollouts | sqrt(KL) | {reward} | held-out reward | label distance | judge distance | judge KID | diversity | "
        "high frequencies | nearest training volume |",
        "|---" * 10 + "|",
    ]
    for point in [*curve["points"], *([curve["kept"]] if curve["kept"] else [])]:
        cells = [f"{point['rollout']}{' (kept)' * (point is curve['kept'])}", f"{point['sqrt_kl']:.4f}"]
        cells += [f"{point['reward'][name]:+.2f}" for name in ("mean", "heldout")]
        cells += [f"{point['fid'][role]:.4f}" for role in ("label", "judge")]
        cells += [f"{point['kid']['judge']:.5f}", f"{point['diversity']:.3f}", f"{point['high_frequency']:.4f}"]
        lines.append("| " + " | ".join([*cells, f"{point['nearest']['distance']:.3f}"]) + " |")
    return [*lines, "", _verdict(curve, rewarded), "", "![over-optimization](figures/over_optimization.png)"]


def _verdict(curve: Mapping, rewarded: bool) -> str:
    turning = curve["turning_point"]
    if turning is None:
        return "The judge's distance was lowest at the end of the run: no over-optimization is seen."
    rose = "went on rising" if turning["reward_rose_after_it"] else "did not rise any further"
    return (
        f"The judge's distance was lowest after {turning['rollout']} rollouts, at sqrt(KL) {turning['sqrt_kl']:.4f}; the reward"
        f"{' that is trained on' if rewarded else ''} {rose} after it."
    )


def look_up(point: Mapping, keys: Sequence[str]) -> float | None:
    """A figure of a point, by its keys."""
    for key in keys:
        point = point[key]
    return point
