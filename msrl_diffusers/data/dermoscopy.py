"""Dermoscopy-like images with known attributes, drawn, not photographed: for tests, demos and studies without patients.

Every image is a function of (seed, index, attributes). A lesion on skin: a *nevus* is round, smooth and of one or two
browns; a *melanoma* is asymmetric, with an irregular border and several colors, a blue-white veil and dots. On it, each
if asked for: *hair*, a *ruler* along one edge, *ink* marks and *gel bubbles*. Each part is drawn from random numbers of
its own, so an image with and without hair differs by the hair alone. Lengths are fractions of half the image, lines at
least a pixel wide: any size shows the same picture.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from ..errors import InputError
from ..files import write_text
from .image_folder import ImageDataset, to_uint8
from .prompts import DIAGNOSES, PromptBuilder


OVERSAMPLING = 4  # lines are drawn so many times finer, then averaged: soft edges
PARTS = ("skin", "lesion", "nevus", "melanoma", "ink", "hair", "ruler", "gel bubble", "light", "noise")

# RGB on [0, 1]
LIGHT_SKIN, DARK_SKIN = np.array([0.95, 0.80, 0.72]), np.array([0.70, 0.52, 0.41])
LIGHT_BROWN, DARK_BROWN, BLACK = (
    np.array([0.58, 0.37, 0.24]),
    np.array([0.33, 0.19, 0.12]),
    np.array([0.12, 0.08, 0.08]),
)
VEIL, RED, PALE = np.array([0.46, 0.55, 0.64]), np.array([0.70, 0.30, 0.28]), np.array([0.86, 0.80, 0.78])
VIOLET, HAIR, TICKS = np.array([0.36, 0.10, 0.66]), np.array([0.12, 0.08, 0.06]), np.array([0.06, 0.06, 0.07])


def make_image(index: int, attributes: Mapping[str, bool], image_size: int = 64, seed: int = 0) -> np.ndarray:
    """Draw image `index` with the given attributes; those not named are absent.

    Returns:
        `[3, H, W]` float32, RGB in [-1, 1].

    Raises:
        InputError: an attribute that is none of `prompts.ATTRIBUTES`, not exactly one of melanoma and nevus, or fewer than 16
            pixels along an edge.
    """
    PromptBuilder().describe(attributes)  # refuses what is no image
    if image_size < 16:
        raise InputError(f"A dermoscopy image needs at least 16 pixels along an edge, got {image_size}.")
    rng = {part: np.random.default_rng([seed, index, number]) for number, part in enumerate(PARTS)}
    axis = (np.arange(image_size) + 0.5) / image_size * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")

    image = _skin(rng["skin"], x, y)
    lesion = rng["lesion"]
    center, radius = lesion.uniform(-0.12, 0.12, 2), lesion.uniform(0.38, 0.52)
    draw_lesion = _melanoma if attributes.get("melanoma") else _nevus
    image = draw_lesion(
        image, rng["melanoma" if attributes.get("melanoma") else "nevus"], x - center[0], y - center[1], radius
    )
    if attributes.get("ink"):
        image = _ink(image, rng["ink"])
    if attributes.get("hair"):
        image = _hair(image, rng["hair"])
    if attributes.get("ruler"):
        image = _ruler(image, rng["ruler"])
    if attributes.get("gel bubble"):
        image = _gel_bubbles(image, rng["gel bubble"], x, y)
    image = _light(image, rng["light"], x, y)
    image = image + rng["noise"].normal(0, rng["noise"].uniform(0.005, 0.02), image.shape)
    return (np.clip(image, 0, 1) * 2 - 1).astype(np.float32)


def load_dermoscopy(num_per_prompt: int, image_size: int = 64, seed: int = 0, first_index: int = 0) -> ImageDataset:
    """`num_per_prompt` images of each of the 32 prompts of `PromptBuilder()`, taken in turn.

    No two show the same skin and lesion. `first_index` counts images of a prompt: sets with the same seed share none if
    the ranges `first_index` to `first_index + num_per_prompt` do not overlap. Every image is its own subject.

    Raises:
        InputError: no images asked for, or as `make_image` does.
    """
    if num_per_prompt < 1 or first_index < 0:
        raise InputError(
            f"At least one image per prompt is needed, from 0 on; got {num_per_prompt} from {first_index}."
        )
    builder = PromptBuilder()
    prompts = builder.prompts()
    indices = range(first_index * len(prompts), (first_index + num_per_prompt) * len(prompts))
    pixels = torch.empty((len(indices), 3, image_size, image_size), dtype=torch.uint8)
    shown = [prompts[index % len(prompts)] for index in indices]
    for row, index in enumerate(tqdm(indices, desc="dermoscopy", leave=False, disable=None)):
        image = make_image(index, builder.parse(shown[row]), image_size, seed)
        pixels[row] = to_uint8(torch.from_numpy(image))
    subjects = [f"dermoscopy-{seed}-{index:06d}" for index in indices]
    return ImageDataset(pixels, builder.targets(shown), builder.attribute_names, shown, subjects)


def write_dermoscopy(
    folder: str | Path, num_per_prompt: int, image_size: int = 64, seed: int = 0, first_index: int = 0
) -> None:
    """Write images as PNG with a `metadata.csv` that `load_image_folder` reads; arguments as of `load_dermoscopy`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images = load_dermoscopy(num_per_prompt, image_size, seed, first_index)
    artifacts = images.attribute_names[len(DIAGNOSES) :]
    rows = [",".join(["file_name", "subject_id", "diagnosis", *(name.replace(" ", "_") for name in artifacts)])]
    for pixels, values, subject in zip(
        images.pixel_values, images.attributes.tolist(), images.subject_ids, strict=True
    ):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{subject}.png")
        diagnosis = DIAGNOSES[values.index(1)]
        rows.append(",".join([f"{subject}.png", subject, diagnosis, *map(str, values[len(DIAGNOSES) :])]))
    write_text(folder / "metadata.csv", "\n".join(rows) + "\n")  # last: a folder without it is not whole


# --------------------------------------------------------------------------------------------------- skin and lesions


def _skin(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    tone = LIGHT_SKIN + (DARK_SKIN - LIGHT_SKIN) * rng.uniform() + rng.normal(0, 0.012, 3)
    mottle = 0.015 * _waves(rng, x, y, (2, 5), 4) + 0.008 * _waves(rng, x, y, (18, 26), 6)
    redness = 0.02 * _waves(rng, x, y, (1, 3), 3)
    return tone[:, None, None] * (1 + mottle) + np.array([0.3, -0.5, -0.5])[:, None, None] * redness


def _nevus(image: np.ndarray, rng: np.random.Generator, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Round, smooth, one or two browns, the darker one in the middle."""
    angle, ratio = rng.uniform(0, np.pi), rng.uniform(0.84, 1.0)
    u, v = _turn(x, y, angle)
    distance = np.hypot(u, v / ratio) + 0.012 * _waves(rng, x, y, (4, 7), 3)
    tone = _between(LIGHT_BROWN, DARK_BROWN, rng.uniform(0.0, 0.55))
    image = _blend(image, tone, 0.92 * _inside(radius - distance, 0.07, x))
    if rng.uniform() < 0.6:
        inner = _inside(radius * rng.uniform(0.4, 0.6) - distance, 0.12, x)
        image = _blend(image, _between(tone, DARK_BROWN, rng.uniform(0.4, 0.8)), 0.8 * inner)
    network = 0.03 * _waves(rng, x, y, (20, 28), 8) * _inside(0.9 * radius - distance, 0.1, x)
    return image * (1 + network)


def _melanoma(image: np.ndarray, rng: np.random.Generator, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Asymmetric, notched, several colors in patches, a blue-white veil, dots toward the border."""
    heights = radius * np.array([0.22, 0.16, 0.14, 0.10, 0.09, 0.07, 0.06]) * rng.uniform(0.6, 1.1, 7)
    phases = rng.uniform(0, 2 * np.pi, 7)

    def border(angle: np.ndarray) -> np.ndarray:  # distance from the middle
        waves = heights * np.cos(np.arange(1, 8) * np.asarray(angle)[..., None] + phases)
        return np.maximum(radius + waves.sum(axis=-1), 0.3 * radius)

    outline = border(np.arctan2(y, x)) + 0.02 * _waves(rng, x, y, (9, 14), 4)
    depth = outline - np.hypot(x, y)
    lesion = _inside(depth, 0.02, x)
    image = _blend(image, _between(LIGHT_BROWN, DARK_BROWN, rng.uniform(0.3, 0.8)), 0.95 * lesion)

    def patch(image: np.ndarray, color: np.ndarray, opacity: float, size: float) -> np.ndarray:
        turn, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 0.6) * radius
        distance = np.hypot(x - away * np.cos(turn), y - away * np.sin(turn))
        distance = distance + 0.07 * _waves(rng, x, y, (5, 9), 4)
        return _blend(image, color, opacity * _inside(size * radius - distance, 0.05, x) * lesion)

    image = patch(image, BLACK, 0.9, rng.uniform(0.45, 0.65))
    if rng.uniform() < 0.6:
        image = patch(image, RED, 0.7, rng.uniform(0.25, 0.4))
    if rng.uniform() < 0.4:
        image = patch(image, PALE, 0.7, rng.uniform(0.2, 0.35))
    image = patch(image, VEIL, 0.85, rng.uniform(0.4, 0.55))
    for _ in range(rng.integers(5, 12)):
        turn = rng.uniform(0, 2 * np.pi)
        reach = rng.uniform(0.7, 1.05) * border(turn)
        dot = _inside(rng.uniform(0.03, 0.06) - np.hypot(x - reach * np.cos(turn), y - reach * np.sin(turn)), 0.0, x)
        image = _blend(image, BLACK, 0.8 * dot)
    return image


# ---------------------------------------------------------------------------------------------------------- artifacts


def _hair(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Thin dark curves across most of the image, roughly in one direction."""
    direction = rng.uniform(0, np.pi)

    def strokes(line: Callable) -> None:
        for _ in range(rng.integers(6, 11)):
            angle, offset, bend = direction + rng.normal(0, 0.35), rng.uniform(-0.85, 0.85), rng.uniform(-0.5, 0.5)
            start, end = -rng.uniform(0.6, 1.3), rng.uniform(0.6, 1.3)
            t = np.linspace(start, end, 24)
            u, v = _turn(t, offset + bend * (t**2 - 0.4), angle)
            line(u, v, rng.uniform(0.026, 0.04))

    return _blend(image, HAIR + rng.uniform(0, 0.08), 0.9 * _drawn(image, strokes))


def _ruler(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The marks of a scale along one edge, every fifth longer."""
    side, spacing, phase = rng.integers(4), rng.uniform(0.19, 0.23), rng.uniform(0, 1)
    edge, first_long = rng.uniform(0.90, 0.96), rng.integers(5)

    def strokes(line: Callable) -> None:
        def put(along: tuple[float, float], inward: tuple[float, float], width: float) -> None:
            u, v = np.array(along), edge - np.array(inward)
            line(*[(u, v), (u, -v), (v, u), (-v, u)][side], width)

        put((-1.1, 1.1), (0, 0), 0.04)
        for number in range(int(2.2 / spacing) + 1):
            place = -1.1 + (number + phase) * spacing
            put((place, place), (0, 0.28 if number % 5 == first_long else 0.16), 0.045)

    return _blend(image, TICKS, 0.95 * _drawn(image, strokes))


def _ink(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Violet marks of a skin marker around the lesion: arcs, or strokes across a corner."""

    def strokes(line: Callable) -> None:
        for _ in range(rng.integers(2, 4)):
            start, width = rng.uniform(0, 2 * np.pi), rng.uniform(0.10, 0.15)
            if rng.uniform() < 0.5:
                t = start + np.linspace(0, rng.uniform(0.6, 1.1), 16)
                reach = rng.uniform(0.72, 0.88)
                line(reach * np.cos(t), reach * np.sin(t), width)
            else:
                middle = rng.uniform(0.72, 0.85) * np.array([np.cos(start), np.sin(start)])
                angle, half = rng.uniform(0, np.pi), rng.uniform(0.18, 0.3)
                u, v = _turn(np.array([-half, half]), np.zeros(2), angle)
                line(middle[0] + u, middle[1] + v, width)

    return _blend(image, VIOLET + rng.normal(0, 0.03, 3), 0.85 * _drawn(image, strokes))


def _gel_bubbles(image: np.ndarray, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bright rings, lighter within, each with a highlight on one side."""
    for _ in range(rng.integers(3, 6)):
        u, v = x - rng.uniform(-0.8, 0.8), y - rng.uniform(-0.8, 0.8)
        radius, turn = rng.uniform(0.13, 0.24), rng.uniform(0, 2 * np.pi)
        distance = np.hypot(u, v)
        image = _blend(image, np.ones(3), 0.15 * _inside(radius - distance, 0.02, x))
        image = _blend(image, np.ones(3), 0.85 * _inside(0.035 - np.abs(distance - radius), 0.01, x))
        shine = np.hypot(u - 0.45 * radius * np.cos(turn), v - 0.45 * radius * np.sin(turn))
        image = _blend(image, np.ones(3), _inside(0.28 * radius - shine, 0.02, x))
    return image


def _light(image: np.ndarray, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Color and direction of the light, and the darker corners of a lens."""
    color = 1 + rng.normal(0, 0.02, 3)
    slope = rng.uniform(-0.06, 0.06, 2)
    vignette = 1 - rng.uniform(0, 0.3) * np.clip((x**2 + y**2) / 2, 0, 1) ** 2
    return image * color[:, None, None] * rng.uniform(0.92, 1.04) * (1 + slope[0] * x + slope[1] * y) * vignette


# -------------------------------------------------------------------------------------------------------------- tools


def _drawn(image: np.ndarray, strokes: Callable[[Callable], None]) -> np.ndarray:
    """Coverage `[H, W]` in [0, 1] by lines; `strokes` is given `line(x, y, width)`, in fractions of half the image."""
    size = image.shape[-1] * OVERSAMPLING
    canvas = Image.new("L", (size, size))
    pen = ImageDraw.Draw(canvas)

    def line(x: np.ndarray, y: np.ndarray, width: float) -> None:
        points = np.stack([(x + 1) / 2 * size, (y + 1) / 2 * size], axis=1)
        pen.line([tuple(point) for point in points.tolist()], 255, max(OVERSAMPLING, round(width / 2 * size)), "curve")

    strokes(line)
    return np.asarray(canvas.reduce(OVERSAMPLING), dtype=np.float64) / 255


def _inside(depth: np.ndarray, softness: float, x: np.ndarray) -> np.ndarray:
    """1 where `depth` is positive, 0 where negative, a ramp as wide as `softness` or one pixel between."""
    width = max(softness, 1 / x.shape[-1])
    return 1 / (1 + np.exp(-np.clip(2 * depth / width, -30, 30)))


def _blend(image: np.ndarray, color: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return image + (color[:, None, None] - image) * weight


def _between(one: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    return one + (other - one) * share


def _turn(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    return np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y


def _waves(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, frequencies: tuple[float, float], count: int
) -> np.ndarray:
    """A random field of unit variance: plane waves of frequencies (radians per unit length) drawn from the range."""
    field = np.zeros_like(x)
    for _ in range(count):
        direction, frequency, phase = rng.uniform(0, 2 * np.pi), rng.uniform(*frequencies), rng.uniform(0, 2 * np.pi)
        field += np.cos(frequency * (np.cos(direction) * x + np.sin(direction) * y) + phase)
    return field * np.sqrt(2 / count)
