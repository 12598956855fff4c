"""Figures: orthogonal slices side by side, curves, scatter plots. Without the state that matplotlib keeps for the user."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def orthogonal_slices(volume: torch.Tensor, point: tuple[int, int, int] | None = None) -> list[torch.Tensor]:
    """The axial, coronal and sagittal slice of `volume [C, D, H, W]` (its first channel) through a voxel, near the middle if
    none is given."""
    data = volume[0].float()
    D, H, W = data.shape
    z, y, x = point or (D * 9 // 16, H // 2, W * 3 // 8)
    return [data[z], data[:, y], data[:, :, x]]


def most_asymmetric_point(volume: torch.Tensor) -> tuple[int, int, int]:
    """The voxel of `volume [C, D, H, W]` around which left and right differ most: a tumour's place, where there is one."""
    difference = (volume[:1].float() - volume[:1].float().flip(-1)).abs()
    smooth = F.avg_pool3d(difference[None], 5, stride=1, padding=2)[0, 0]
    lightened = F.avg_pool3d(volume[:1].float()[None], 3, stride=1, padding=1)[0, 0] > -0.9  # within the head
    flat = (smooth * lightened).argmax().item()
    return tuple(int(index) for index in np.unravel_index(flat, smooth.shape))


def plot_volumes(
    rows: Mapping[str, torch.Tensor], path: str | Path, max_volumes: int = 8, at_asymmetry: bool = False
) -> None:
    """Three orthogonal slices of each volume; one band of rows per entry `{name: [N, C, D, H, W] in [-1, 1]}`.

    Volumes at the same position of all entries stand under one another. With `at_asymmetry` the slices of each volume meet
    in its `most_asymmetric_point`, which shows lesions; else all show the same place.
    """
    columns = min(max_volumes, min(len(volumes) for volumes in rows.values()))
    figure = Figure(figsize=(1.3 * columns + 0.6, 3.9 * len(rows)), facecolor="black")
    axes = figure.subplots(3 * len(rows), columns, squeeze=False)
    for band, (name, volumes) in enumerate(rows.items()):
        for column in range(columns):
            point = most_asymmetric_point(volumes[column]) if at_asymmetry else None
            for plane, image in enumerate(orthogonal_slices(volumes[column], point)):
                axis = axes[3 * band + plane, column]
                axis.imshow(image.numpy(), cmap="gray", vmin=-1, vmax=1, origin="lower", interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
        axes[3 * band, 0].set_title(name, color="white", loc="left", fontsize=10)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.97, bottom=0.01, hspace=0.08, wspace=0.04)
    save_figure(figure, path, facecolor="black")


def plot_samples(samples: torch.Tensor, titles: Sequence[str], path: str | Path, max_samples: int = 8) -> np.ndarray:
    """Samples of a rollout with a title each: images `[B, C, H, W]`, or the middle slices of volumes `[B, C, D, H, W]`.

    Returns the picture `[height, width, 3]` in uint8, for trackers.
    """
    samples = samples[:max_samples].float().cpu()
    rows = 3 if samples.ndim == 5 else 1
    figure = Figure(figsize=(1.5 * len(samples), 1.6 * rows + 0.3))
    canvas, axes = FigureCanvasAgg(figure), figure.subplots(rows, len(samples), squeeze=False)
    for column, (sample, title) in enumerate(zip(samples, titles, strict=False)):
        pictures = orthogonal_slices(sample) if sample.ndim == 4 else [_displayed(sample)]
        for axis, picture in zip(axes[:, column], pictures, strict=True):
            axis.imshow(picture.numpy(), cmap="gray", vmin=-1, vmax=1, origin="lower" if rows == 3 else "upper")
            axis.axis("off")
        axes[0, column].set_title(title, fontsize=8)
    figure.tight_layout()
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    save_figure(figure, path)
    return picture


def _displayed(image: torch.Tensor) -> torch.Tensor:
    """`[C, H, W]` in [-1, 1] as matplotlib shows it: RGB on [0, 1], or the first channel."""
    return (image.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) if len(image) == 3 else image[0]


def plot_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | Path, xlabel: str) -> None:
    """One panel per entry `{name: (x, y)}`, sharing the horizontal axis."""
    figure = Figure(figsize=(3.4 * len(curves), 3))
    axes = figure.subplots(1, len(curves), squeeze=False)
    for axis, (name, (x, y)) in zip(axes[0], curves.items(), strict=True):
        axis.plot(x, y, color="tab:blue")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(xlabel)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, path)


def plot_history(output_dir: str | Path, names: Sequence[str], path: str | Path | None = None) -> None:
    """The curves `names` of a training's `log.jsonl`, to `path` or `output_dir/curves.png`; those it lacks are left out."""
    history = [json.loads(line) for line in (Path(output_dir) / "log.jsonl").read_text().splitlines()]
    curves = {}
    for name in names:
        points = [(line["step"], line[name]) for line in history if name in line]
        if points:
            curves[name] = tuple(zip(*points, strict=True))
    if curves:
        plot_curves(curves, path or Path(output_dir) / "curves.png", "step")


def plot_scatter(
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]], path, xlabel: str, ylabel: str
) -> None:
    """Points of several groups `{name: (x, y)}` on one pair of axes."""
    figure = Figure(figsize=(5, 4))
    axis = figure.subplots()
    for name, (x, y) in groups.items():
        axis.scatter(x, y, s=12, alpha=0.6, label=name)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path, dpi: int = 100, **kwargs) -> None:
    """Write a figure, whole or not at all, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=dpi, format=path.suffix[1:], **kwargs)
    os.replace(temporary, path)
