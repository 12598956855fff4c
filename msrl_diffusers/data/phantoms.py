"""Phantoms: synthetic brain MRI with a glioma, in the manner of contrast-enhanced T1, for tests, demos and studies.

Every phantom is a function of (seed, index). Anatomy is drawn as smooth fields on [-1, 1]^3: a head-shaped envelope
with a folded cortex, white matter, lateral and third ventricles, deep nuclei; then a tumour, a bias field and Rician
noise. The two classes follow glioma grades: *HGG* has an enhancing ring around a necrotic core within oedema, *LGG* is
homogeneous and dark. Fields have soft edges one voxel wide, so any cube size shows the same anatomy.
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from .processor import to_nifti
from .volumes import VolumeDataset
from .workers import worker_pool


ID2LABEL = {0: "HGG", 1: "LGG"}
FIELD_OF_VIEW = 192.0  # millimetres along each edge of the cube

# Intensities before bias and noise, on [0, 1].
CSF, GRAY, WHITE, NUCLEI = 0.14, 0.46, 0.76, 0.58
NECROSIS, RING, OEDEMA, LOW_GRADE = 0.14, 1.00, 0.40, 0.33


@dataclass(frozen=True)
class PhantomParameters:
    """What was drawn for one phantom; lengths are fractions of half the field of view, angles in radians."""

    index: int
    label: int
    semi_axes: tuple[float, float, float]
    rotation: tuple[float, float, float]
    cortex_thickness: float
    folding_depth: float
    ventricle_size: float
    tumor_center: tuple[float, float, float]
    tumor_radius: float
    ring_thickness: float
    oedema_width: float
    contrast: float
    bias_strength: float
    noise_level: float


@dataclass(frozen=True)
class Phantom:
    """`volume [1, D, H, W]` in [-1, 1], `tumor_mask [D, H, W]` (0 none, 1 core, 2 oedema, 4 enhancing, as in BraTS)."""

    volume: np.ndarray
    tumor_mask: np.ndarray
    parameters: PhantomParameters


def make_phantom(index: int, label: int, image_size: int = 64, seed: int = 0) -> Phantom:
    """Draw phantom `index` of class `label` on a cube of `image_size` voxels.

    Raises:
        InputError: unknown label, or fewer than 8 voxels along an edge.
    """
    if label not in ID2LABEL:
        raise InputError(f"A phantom's label is one of {ID2LABEL}, got {label}.")
    if image_size < 8:
        raise InputError(f"A phantom needs at least 8 voxels along an edge, got {image_size}.")
    anatomy_rng, noise_rng = (np.random.default_rng([seed, index, label, part]) for part in (0, 1))
    parameters = _draw_parameters(anatomy_rng, index, label)
    softness = 1.2 / image_size
    axis = (np.arange(image_size) + 0.5) / image_size * 2 - 1
    z, y, x = _rotate(np.meshgrid(axis, axis, axis, indexing="ij"), parameters.rotation)

    def inside(signed_depth: np.ndarray) -> np.ndarray:  # 1 inside, 0 outside, a voxel-wide ramp between
        return 1 / (1 + np.exp(-np.clip(signed_depth / softness, -30, 30)))

    a, b, c = parameters.semi_axes
    radius = np.sqrt((z / a) ** 2 + (y / b) ** 2 + (x / c) ** 2)
    depth = (1 - radius) * np.mean(parameters.semi_axes) + 0.02 * _waves(anatomy_rng, (z, y, x), (1.5, 3.0), 4)
    folds = _waves(anatomy_rng, (z, y, x), (8.0, 12.0), 10)
    fissure = (
        np.abs(x) - 0.012 - 0.03 * np.clip(0.25 - depth, 0, None)
    )  # between the hemispheres, wider at the surface

    brain = inside(depth)
    pial = inside(np.minimum(depth - 0.02 - parameters.folding_depth * np.clip(folds, 0, None), fissure))
    white = inside(np.minimum(depth - parameters.cortex_thickness - parameters.folding_depth * (0.6 + folds), fissure))
    image = CSF * brain
    image = _blend(image, GRAY, pial * brain)
    image = _blend(image, WHITE, white * brain)
    nuclei = inside(0.13 - np.sqrt(((z + 0.02) / 0.9) ** 2 + (y / 1.25) ** 2 + ((np.abs(x) - 0.16) / 0.8) ** 2))
    image = _blend(image, NUCLEI, nuclei)
    v = parameters.ventricle_size
    lateral = inside(
        v
        - np.sqrt(((z - 0.12 - 0.25 * y**2) / 0.9) ** 2 + (y / 3.2) ** 2 + ((np.abs(x) - 0.9 * v - 0.02) / 0.75) ** 2)
    )
    third = inside(0.35 * v - np.sqrt(((z + 0.05) / 3.0) ** 2 + (y / 2.5) ** 2 + (x / 0.6) ** 2))
    image = _blend(image, CSF, np.maximum(lateral, third))

    image, mask = _add_tumor(image, brain, (z, y, x), parameters, inside, anatomy_rng)
    image = image * parameters.contrast
    image = image * np.exp(parameters.bias_strength * _waves(anatomy_rng, (z, y, x), (0.5, 1.2), 3))
    noise = noise_rng.normal(0, parameters.noise_level, (2, *image.shape))
    image = np.sqrt((image + noise[0]) ** 2 + noise[1] ** 2) * (brain > 0.5)  # Rician; the skull is stripped
    volume = (np.clip(image, 0, 1) * 2 - 1).astype(np.float32)[None]
    return Phantom(volume, mask, parameters)


def load_phantoms(
    num_per_class: int, image_size: int = 64, seed: int = 0, first_index: int = 0, num_workers: int = 0
) -> VolumeDataset:
    """`num_per_class` phantoms of each class, `[N, 1, image_size, image_size, image_size]`, indices from `first_index` on;
    every phantom is its own subject. So many processes draw them; 0 draws in this one.

    Raises:
        InputError: fewer than 8 voxels along an edge.
    """
    drawn = list(product(range(first_index, first_index + num_per_class), ID2LABEL))
    draw = partial(_draw_half, image_size=image_size, seed=seed)
    if num_workers:
        with worker_pool(num_workers) as pool:
            volumes = list(pool.map(draw, drawn, chunksize=8))
    else:
        volumes = [draw(each) for each in drawn]
    spacing = (FIELD_OF_VIEW / image_size,) * 3
    labels = torch.tensor([label for _, label in drawn])
    subjects = [f"phantom-{ID2LABEL[label]}-{index:05d}" for index, label in drawn]
    return VolumeDataset(torch.from_numpy(np.stack(volumes)), labels, subjects, dict(ID2LABEL), spacing)


def _draw_half(drawn: tuple[int, int], image_size: int, seed: int) -> np.ndarray:
    """The volume of phantom `(index, label)` in half precision."""
    return make_phantom(*drawn, image_size, seed).volume.astype(np.float16)


def write_phantoms(output_dir: str | Path, num_per_class: int, image_size: int = 64, seed: int = 0) -> None:
    """Write phantoms as `.nii.gz` images and tumour masks, with a `metadata.csv` that the `nifti_folder` loader reads."""
    output_dir = Path(output_dir)
    (output_dir / "masks").mkdir(parents=True, exist_ok=True)
    spacing = (FIELD_OF_VIEW / image_size,) * 3
    rows = ["file_name,subject_id,grade,parameters"]
    for index in range(num_per_class):
        for label, name in ID2LABEL.items():
            phantom = make_phantom(index, label, image_size, seed)
            subject = f"phantom-{name}-{index:05d}"
            to_nifti(phantom.volume, spacing).to_filename(output_dir / f"{subject}.nii.gz")
            mask = to_nifti(phantom.tumor_mask[None], spacing, intensity_range=None)
            mask.to_filename(output_dir / "masks" / f"{subject}_seg.nii.gz")
            quoted = json.dumps(asdict(phantom.parameters)).replace('"', '""')
            rows.append(f'{subject}.nii.gz,{subject},{name},"{quoted}"')
    (output_dir / "metadata.csv").write_text("\n".join(rows) + "\n")


def _draw_parameters(rng: np.random.Generator, index: int, label: int) -> PhantomParameters:
    size = rng.uniform(1.03, 1.14)
    radius = rng.uniform(0.26, 0.36)
    side = rng.choice([-1, 1])
    center = (rng.uniform(-0.05, 0.32), rng.uniform(-0.42, 0.42), side * rng.uniform(0.22, 0.36))
    return PhantomParameters(
        index=index,
        label=label,
        semi_axes=(0.72 * size * rng.uniform(0.96, 1.04), 0.86 * size * rng.uniform(0.97, 1.03), 0.68 * size),
        rotation=tuple(rng.normal(0, 0.05, 3).tolist()),
        cortex_thickness=rng.uniform(0.09, 0.12),
        folding_depth=rng.uniform(0.06, 0.09),
        ventricle_size=rng.uniform(0.075, 0.15),
        tumor_center=tuple(float(value) for value in center),
        tumor_radius=float(radius),
        ring_thickness=rng.uniform(0.10, 0.14),
        oedema_width=rng.uniform(0.08, 0.17),
        contrast=rng.uniform(0.88, 1.0),
        bias_strength=rng.uniform(0.02, 0.08),
        noise_level=rng.uniform(0.008, 0.02),
    )


def _add_tumor(image, brain, coordinates, parameters, inside, rng):
    """The image with its tumour, and the label map. The outline is an irregular ball."""
    center, radius = parameters.tumor_center, parameters.tumor_radius
    distance = np.sqrt(sum((axis - middle) ** 2 for axis, middle in zip(coordinates, center, strict=True)))
    distance = distance + 0.03 * _waves(rng, coordinates, (4.0, 7.0), 4)
    if parameters.label == 0:
        core_radius = radius - parameters.ring_thickness
        oedema = (
            inside(radius + parameters.oedema_width + 0.03 * _waves(rng, coordinates, (3, 6), 4) - distance) * brain
        )
        tumor, core = inside(radius - distance) * brain, inside(core_radius - distance) * brain
        image = _blend(_blend(_blend(image, OEDEMA, 0.8 * oedema), RING, tumor), NECROSIS, core)
        mask = np.select([core > 0.5, tumor > 0.5, oedema > 0.5], [1, 4, 2], 0)
    else:
        tumor = inside(radius + 0.04 - distance) * brain
        image = _blend(image, LOW_GRADE, tumor)
        mask = np.where(tumor > 0.5, 1, 0)
    return image, mask.astype(np.uint8)


def _blend(image: np.ndarray, value: float, weight: np.ndarray) -> np.ndarray:
    return image + (value - image) * weight


def _rotate(coordinates: list[np.ndarray], angles: tuple[float, float, float]) -> list[np.ndarray]:
    for (i, j), angle in zip([(0, 1), (0, 2), (1, 2)], angles, strict=True):
        cosine, sine = np.cos(angle), np.sin(angle)
        rotated = list(coordinates)
        rotated[i] = cosine * coordinates[i] - sine * coordinates[j]
        rotated[j] = sine * coordinates[i] + cosine * coordinates[j]
        coordinates = rotated
    return coordinates


def _waves(rng: np.random.Generator, coordinates, frequency_range: tuple[float, float], count: int) -> np.ndarray:
    """A random field of unit variance: plane waves of frequencies (radians per unit length) drawn from the range."""
    field = np.zeros_like(coordinates[0])
    for _ in range(count):
        direction = rng.normal(size=3)
        direction *= rng.uniform(*frequency_range) / np.linalg.norm(direction)
        phase = rng.uniform(0, 2 * np.pi)
        field += np.cos(sum(k * axis for k, axis in zip(direction, coordinates, strict=True)) + phase)
    return field * np.sqrt(2 / count)
