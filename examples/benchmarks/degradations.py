"""Does the Frechet distance see what is wrong? Phantoms under growing blur, noise and mode dropping, by both extractors.

    python examples/benchmarks/degradations.py --output examples/results/degradations.json

Two sets of phantoms that no extractor was trained on: a reference, and one that gets worse level by level, from level 0
(as drawn: the real-real floor). Noise is the same at every level but for its size; the volumes that are dropped at one
level are among those of the next. Dropped volumes are replaced by copies of kept ones, so N stays. Beside the JSON lies the
same as a Markdown table. `monotone` says whether the distance rises from each level to the next.
"""

import argparse
import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from msrl_diffusers.data.degradations import blurred
from msrl_diffusers.data.phantoms import ID2LABEL, PhantomParameters, make_phantom
from msrl_diffusers.evaluation.features import extract_features, extractor_identity
from msrl_diffusers.evaluation.fidelity import frechet_distance
from msrl_diffusers.files import write_json, write_text
from msrl_diffusers.models.loading import load_model
from msrl_diffusers.seeding import generator_for
from msrl_diffusers.study.artifacts import EXTRACTOR_CLASSES
from msrl_diffusers.study.report import git_commit, versions


MODELS = Path(__file__).parents[2] / "model_cards" / "phantoms-32"
BLUR_SIGMAS = (0.0, 0.4, 0.6, 0.8, 1.0, 1.5)  # voxels
NOISE_DEVIATIONS = (0.0, 0.02, 0.04, 0.08, 0.16, 0.32)  # of intensities in [-1, 1]
DROPPED_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
DROPPED_CLASS = 0
DROPPED_PARAMETER = "ventricle_size"  # phantoms whose value is under the median


def draw_phantoms(
    num_per_class: int, image_size: int, seed: int, first_index: int
) -> tuple[torch.Tensor, list[PhantomParameters]]:
    """Volumes `[N, 1, D, H, W]`, classes in turn, and what was drawn for each."""
    phantoms = [
        make_phantom(index, label, image_size, seed)
        for index in tqdm(range(first_index, first_index + num_per_class), desc="phantoms")
        for label in ID2LABEL
    ]
    return torch.stack([torch.from_numpy(phantom.volume) for phantom in phantoms]), [
        phantom.parameters for phantom in phantoms
    ]


def noisy(volumes: torch.Tensor, deviation: float, seed: int) -> torch.Tensor:
    """With white noise, also in the background."""
    noise = torch.randn(volumes.shape, generator=generator_for(seed, "noise"))
    return (volumes + deviation * noise).clamp(-1, 1)


def rows_after_dropping(mode: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Which volume stands at every place `[N]` when `share` of the `mode [N]` (booleans) is replaced by copies of the rest.

    A copy changes from one share to a larger one only where its original is dropped.
    """
    members = mode.nonzero()[:, 0]
    members = members[torch.randperm(len(members), generator=generator_for(seed, "order"))]
    dropped = members[: round(share * len(members))]
    preference = torch.rand(len(mode), len(mode), generator=generator_for(seed, "copies"))
    preference[:, dropped] = -1
    rows = torch.arange(len(mode))
    rows[dropped] = preference[dropped].argmax(dim=1)
    return rows


def measure(num_per_class: int, image_size: int, seed: int) -> dict:
    """All distances: per kind of degradation the levels, and per extractor the distance at each."""
    reference, _ = draw_phantoms(num_per_class, image_size, seed, 0)
    volumes, parameters = draw_phantoms(num_per_class, image_size, seed, num_per_class)
    in_class = torch.tensor([each.label == DROPPED_CLASS for each in parameters])
    values = torch.tensor([getattr(each, DROPPED_PARAMETER) for each in parameters])
    modes = {f"drop {ID2LABEL[DROPPED_CLASS]}": in_class, f"drop small {DROPPED_PARAMETER}": values < values.median()}
    levels = {"blur": BLUR_SIGMAS, "noise": NOISE_DEVIATIONS, **dict.fromkeys(modes, DROPPED_SHARES)}
    rows = {kind: {"levels": list(levels[kind]), "fid": {}, "monotone": {}} for kind in levels}
    extractors = {
        role: load_model(model_class, MODELS / f"extractor_{role}", dtype=torch.float32)
        for role, model_class in EXTRACTOR_CLASSES.items()
    }
    for role, extractor in extractors.items():
        real, whole = extract_features(extractor, reference), extract_features(extractor, volumes)

        def degraded(kind: str, level: float, extractor=extractor, whole=whole) -> torch.Tensor:
            if not level:
                return whole
            if kind in modes:
                return whole[rows_after_dropping(modes[kind], level, seed)]
            changed = blurred(volumes, level) if kind == "blur" else noisy(volumes, level, seed)
            return extract_features(extractor, changed)

        for kind, row in rows.items():
            steps = tqdm(levels[kind], desc=f"{role}, {kind}")
            distances = [frechet_distance(real, degraded(kind, level)) for level in steps]
            row["fid"][role] = distances
            row["monotone"][role] = all(low < high for low, high in pairwise(distances))
    return {
        "rows": rows,
        "extractors": {role: extractor_identity(extractor) for role, extractor in extractors.items()},
    }


def markdown(content: dict) -> str:
    """The distances as a page."""
    identities = content["extractors"]
    lines = [
        "# Frechet distance of degraded phantoms",
        "",
        f"{content['n']} phantoms of {content['image_size']}^3 voxels on each side, seed {content['seed']}. Level 0 is the "
        "floor between two sets of real ones.",
        "",
    ]
    for role, identity in identities.items():
        lines.append(f"- {role}: `{identity['name']}` `{identity['sha256']}`")
    lines += [
        "",
        "| degradation | extractor | " + " | ".join(f"level {i}" for i in range(len(BLUR_SIGMAS))) + " | monotone |",
        "|---" * (len(BLUR_SIGMAS) + 3) + "|",
    ]
    for kind, row in content["rows"].items():
        lines.append(f"| **{kind}** | level | " + " | ".join(f"{level:g}" for level in row["levels"]) + " | |")
        for role in identities:
            values = " | ".join(f"{value:.4f}" for value in row["fid"][role])
            lines.append(f"| | {role} | {values} | {'yes' if row['monotone'][role] else 'no'} |")
    units = "Levels: blur in voxels (sigma), noise as standard deviation of intensities in [-1, 1], dropping as share of the mode."
    return "\n".join([*lines, "", units]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_per_class", type=int, default=128)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1, help="of the phantoms; the extractors were trained on seed 0")
    parser.add_argument("--output", type=Path, default=Path("outputs/degradations.json"))
    args = parser.parse_args()
    started = time.monotonic()
    content = {
        "what": "Frechet distance to other phantoms, under growing degradation",
        "n": args.num_per_class * len(ID2LABEL),
        "image_size": args.image_size,
        "seed": args.seed,
        **measure(args.num_per_class, args.image_size, args.seed),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_count": os.cpu_count(),
        "commit": git_commit(),
        "versions": versions(),
    }
    write_json(args.output, content)
    write_text(args.output.with_suffix(".md"), markdown(content))
    sys.stdout.write(json.dumps({kind: row["monotone"] for kind, row in content["rows"].items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
