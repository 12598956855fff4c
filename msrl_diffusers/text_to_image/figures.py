"""Figures of the report: images before and after per prompt, and what happened over the rollouts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from ..data.image_folder import ImageDataset
from ..plots import save_figure


CURVES = {
    "mean reward": ["reward/mean", "watch/heldout_reward"],
    "exact match of the rollouts": ["watch/reward_match", "watch/judge_match"],
    "divergence from the fine-tuned model": ["ppo/kl"],
    "diversity": ["watch/diversity"],
}
NAMES = {
    "reward/mean": "trained prompts",
    "watch/heldout_reward": "held-out prompts",
    "watch/reward_match": "reward classifier",
    "watch/judge_match": "judge",
    "ppo/kl": "KL per step and element",
    "watch/diversity": "distance within a prompt",
}


def plot_prompts(
    arms: Mapping[str, ImageDataset], prompts: Sequence[str], path: str | Path, images_per_prompt: int = 4
) -> None:
    """One row per prompt, the first images of every arm side by side; generated ones at a place share their noise."""
    picture, places = mosaic(list(arms.values()), prompts, images_per_prompt)
    height, width = picture.shape[:2]
    pixel = 0.5 / next(iter(arms.values())).image_size  # inches: an image is half an inch wide
    labels, margin = [prompt.partition(" of ")[2] or prompt for prompt in prompts], 3.2
    figure = Figure(figsize=(width * pixel + margin, height * pixel + 0.4))
    axis = figure.add_axes((margin / figure.get_figwidth(), 0, width * pixel / figure.get_figwidth(),
                            height * pixel / figure.get_figheight()))  # fmt: skip
    axis.imshow(picture, interpolation="nearest", aspect="auto")
    axis.set_yticks([(row + 0.5) * height / len(prompts) for row in range(len(prompts))], labels, fontsize=7)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.set_frame_on(False)
    for arm, place in zip(arms, places, strict=True):
        axis.text(place, -2, arm, fontsize=9, va="bottom")
    save_figure(figure, path, dpi=110)


def mosaic(
    arms: Sequence[ImageDataset], prompts: Sequence[str], images_per_prompt: int
) -> tuple[np.ndarray, list[int]]:
    """One picture `[height, width, 3]`, uint8, of the first images of every prompt (a row) in every arm (a band of
    columns); and where each band begins. White where an arm has too few.
    """
    edge, gap = arms[0].image_size + 1, arms[0].image_size // 4
    band = images_per_prompt * edge + gap
    picture = np.full((len(prompts) * edge, len(arms) * band - gap, 3), 255, dtype=np.uint8)
    for number, images in enumerate(arms):
        for row, prompt in enumerate(prompts):
            found = [place for place, its in enumerate(images.prompts) if its == prompt][:images_per_prompt]
            for column, place in enumerate(found):
                top, left = row * edge, number * band + column * edge
                picture[top : top + edge - 1, left : left + edge - 1] = (
                    images.pixel_values[place].permute(1, 2, 0).numpy()
                )
    return picture, [number * band for number in range(len(arms))]


def plot_rollouts(output_dir: str | Path, path: str | Path) -> None:
    """Reward, match by both classifiers, divergence and diversity over the rollouts, from a training's `log.jsonl`."""
    history = [json.loads(line) for line in (Path(output_dir) / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(3.6 * len(CURVES), 3.1))
    axes = figure.subplots(1, len(CURVES))
    for axis, (title, names) in zip(axes, CURVES.items(), strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in history if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=NAMES[name], marker=".")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("rollout")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path, dpi=110)


def plot_attributes(figures: Mapping[str, dict], path: str | Path) -> None:
    """Match rate of every attribute before and after, a panel per classifier; `figures` are of `match_figures`."""
    figure = Figure(figsize=(4.2 * len(figures), 3.2))
    axes = figure.subplots(1, len(figures), sharey=True, squeeze=False)
    for axis, (role, found) in zip(axes[0], figures.items(), strict=True):
        names = [*found["per_attribute"], "all of them"]
        places = torch.arange(len(names))
        for offset, arm in ((-0.2, "before"), (0.2, "after")):
            values = [*(rates[arm] for rates in found["per_attribute"].values()), found[arm]]
            axis.bar((places + offset).tolist(), values, 0.38, label=arm)
        axis.set_xticks(places.tolist(), names, rotation=45, ha="right", fontsize=8)
        axis.set_title(role, fontsize=10)
        axis.set_ylim(0, 1)
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    axes[0, 0].set_ylabel("share of images that match")
    figure.tight_layout()
    save_figure(figure, path, dpi=110)
