"""Quality against steps: label distance of a pipeline's samples, by scheduler and number of steps.

    python examples/benchmarks/schedulers.py --output examples/results/schedulers.json

Samples of the released phantoms pipeline are compared with phantoms that no model was trained on, as many of them, by the
extractor that scored the reward data; the judge is for reports alone. All samplers start from the same noise: volume i is a
function of the seed and i. Every scheduler is made from the pipeline's own by `from_config`. Beside the JSON lies the same
as a Markdown table. A killed run goes on with what the JSON has, if the settings are the same.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import diffusers
import torch
from tqdm import tqdm

from msrl_diffusers import MedVolumePipeline, SliceFeatureExtractor, load_phantoms, sample_volumes
from msrl_diffusers.errors import InputError, sentence_instead_of_traceback
from msrl_diffusers.evaluation.features import extract_features, extractor_identity
from msrl_diffusers.evaluation.fidelity import bootstrap_frechet, centred_interval, frechet_distance
from msrl_diffusers.files import folder_mark, write_json, write_text
from msrl_diffusers.models.loading import load_model
from msrl_diffusers.study.report import git_commit, versions


MODELS = Path(__file__).parents[2] / "model_cards" / "phantoms-32"
SAMPLERS = {  # name: class, changes of its configuration, arguments of the call
    "DDIM": ("DDIMScheduler", {}, {"eta": 0.0}),
    "DDIM, eta 1": ("DDIMScheduler", {}, {"eta": 1.0}),
    "DDPM": ("DDPMScheduler", {}, {}),
    "Euler": ("EulerDiscreteScheduler", {}, {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {}, {}),
    "DPM-Solver++ SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "UniPC": ("UniPCMultistepScheduler", {}, {}),
}


def draw_features(extractor: torch.nn.Module, num_volumes: int, image_size: int, seed: int, part: int) -> torch.Tensor:
    """Features `[N, P, S, F]` of phantoms, classes in turn; parts have none in common."""
    num_per_class = -(-num_volumes // 2)
    phantoms = load_phantoms(num_per_class, image_size, seed, first_index=part * num_per_class)
    return extract_features(extractor, phantoms.pixel_values[:num_volumes])


def distance(real: torch.Tensor, fake: torch.Tensor, draws: int, seed: int) -> dict[str, float]:
    """The distance and its 95 % bootstrap interval."""
    value = frechet_distance(real, fake)
    low, high = centred_interval(value, bootstrap_frechet(real, {"fake": fake}, draws, seed)["fake"])
    return {"value": value, "low": low, "high": high}


def samples_of(
    pipeline: MedVolumePipeline, config: dict, name: str, num_inference_steps: int, args
) -> tuple[torch.Tensor, dict]:
    """Volumes of a sampler, and what they cost. `config`: of the scheduler that the pipeline came with."""
    scheduler, changes, call = SAMPLERS[name]
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(config, **changes)
    started = time.monotonic()
    volumes = sample_volumes(
        pipeline,
        args.num_volumes,
        num_inference_steps,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=False,
        **call,
    )
    return volumes.pixel_values, {
        "evaluations": pipeline.num_timesteps,
        "seconds_per_volume": (time.monotonic() - started) / args.num_volumes,
    }


def measure(args) -> dict:
    """All cells of the table, the JSON written after each."""
    pipeline = load_model(MedVolumePipeline, args.model, dtype=torch.float32)
    extractor = load_model(SliceFeatureExtractor, args.model / "extractor_label", dtype=torch.float32)
    config = pipeline.scheduler.config
    image_size = pipeline.latent_shape[-1] * pipeline.vqvae.downsample_factor
    settings = {
        "model": args.model.name,
        "model_mark": folder_mark(args.model / "unet"),
        "extractor": extractor_identity(extractor),
        "n": args.num_volumes,
        "seed": args.seed,
        "bootstrap_draws": args.bootstrap_draws,
        "image_size": image_size,
    }
    content = {"what": "label distance of samples to phantoms, by scheduler and steps", "settings": settings}
    before = json.loads(args.output.read_text()) if args.output.exists() else {}
    content["rows"] = before["rows"] if before.get("settings") == settings else {}

    real, others = (draw_features(extractor, args.num_volumes, image_size, args.seed, part) for part in (0, 1))
    content["floor"] = distance(real, others, args.bootstrap_draws, args.seed)
    content |= {"cpu_count": os.cpu_count(), "commit": git_commit(), "versions": versions()}
    cells = [(name, steps) for name in args.schedulers for steps in args.num_inference_steps]
    for name, steps in tqdm(cells, desc="samplers"):
        row = content["rows"].setdefault(name, {})
        if str(steps) not in row:
            volumes, cost = samples_of(pipeline, config, name, steps, args)
            fid = distance(real, extract_features(extractor, volumes), args.bootstrap_draws, args.seed)
            row[str(steps)] = {"fid": fid, **cost}
            write_json(args.output, content)
    return content


def markdown(content: dict) -> str:
    """The distances as a page."""
    settings, floor = content["settings"], content["floor"]
    steps = sorted({int(count) for row in content["rows"].values() for count in row})
    lines = [
        "# Quality against steps",
        "",
        f"Frechet distance of {settings['n']} samples of {settings['model']} to as many phantoms of "
        f"{settings['image_size']}^3 voxels, seed {settings['seed']}, by the label extractor "
        f"`{settings['extractor']['sha256']}`; 95 % bootstrap intervals; lower is better. Between two sets of phantoms it is "
        f"{interval(floor)}.",
        "",
        "| scheduler | " + " | ".join(f"{count} steps" for count in steps) + " |",
        "|---" * (len(steps) + 1) + "|",
    ]
    for name, row in content["rows"].items():
        cells = [interval(row[str(count)]["fid"]) if str(count) in row else "" for count in steps]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def interval(fid: dict[str, float]) -> str:
    """`value (low .. high)`."""
    return f"{fid['value']:.4f} ({fid['low']:.4f} .. {fid['high']:.4f})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODELS, help="folder of a release on phantoms")
    parser.add_argument("--schedulers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS, metavar="NAME")
    parser.add_argument("--num_inference_steps", nargs="+", type=int, default=[5, 10, 20, 50])
    parser.add_argument("--num_volumes", type=int, default=256, help="on each side of a distance")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--bootstrap_draws", type=int, default=100)
    parser.add_argument(
        "--seed", type=int, default=1, help="of samples and phantoms; the models were trained on seed 0"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/schedulers.json"))
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.num_volumes < 2:
        raise InputError(f"num_volumes must be at least 2 for a distance, got {args.num_volumes}.")
    content = measure(args)
    write_json(args.output, content)
    page = markdown(content)
    write_text(args.output.with_suffix(".md"), page)
    sys.stdout.write(page)


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        main()
