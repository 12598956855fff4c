"""In which memory format networks train faster, contiguous or channels-last, in float32 and in bfloat16.

    python examples/benchmarks/memory_formats.py --output examples/results/memory-formats.json

A forward and a backward pass of each network of model_cards/phantoms-32, in both formats by turns, `--runs` times; `ratio` is that
of the median seconds, channels-last over contiguous.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from msrl_diffusers import MedVolumePipeline, SliceRewardModel, VolumeRewardModel
from msrl_diffusers.files import write_json
from msrl_diffusers.precision import autocast
from msrl_diffusers.processes import device_name, process_state, use_whole_cpu
from msrl_diffusers.study.report import git_commit, versions
from msrl_diffusers.trainers.base import channels_last_format


RELEASE = Path(__file__).parents[2] / "model_cards" / "phantoms-32"
BATCH = 32


def networks(device: torch.device) -> dict[str, tuple[torch.nn.Module, Callable[[torch.nn.Module], torch.Tensor]]]:
    """Each network, and a forward pass of it over 32 volumes or their latents, to something with a mean."""
    pipeline = MedVolumePipeline.from_pretrained(RELEASE, dtype=torch.float32)
    labels = torch.arange(BATCH, device=device) % 2
    volumes = torch.rand(BATCH, 1, 32, 32, 32, device=device)
    latents = torch.rand(BATCH, pipeline.unet.config.in_channels, 8, 8, 8, device=device)
    timesteps = torch.full((BATCH,), 500, device=device)
    return {
        "denoiser": (pipeline.unet, lambda model: model(latents, timesteps, class_labels=labels).sample),
        "autoencoder": (pipeline.vqvae, lambda model: model(volumes).sample),
        "volume reward": (
            VolumeRewardModel.from_pretrained(RELEASE / "reward_volume", dtype=torch.float32),
            lambda model: model(volumes, class_labels=labels),
        ),
        "slice reward": (
            SliceRewardModel.from_pretrained(RELEASE / "reward_slice", dtype=torch.float32),
            lambda model: model(volumes[:, :, ::4], class_labels=labels),
        ),
    }


def seconds_of(forward: Callable[[torch.nn.Module], torch.Tensor], model: torch.nn.Module, precision: str) -> float:
    """Of one forward and backward pass."""
    device = process_state().device
    started = time.perf_counter()
    with autocast(device, precision):
        mean = forward(model).float().mean()
    mean.backward()
    model.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="of each format, by turns; the first is not counted")
    parser.add_argument("--output", type=Path, default=Path("outputs/memory-formats.json"))
    args = parser.parse_args()
    use_whole_cpu()
    device, results = process_state().device, {}
    for name, (model, forward) in tqdm(networks(device).items(), desc="memory formats"):
        model = model.to(device).train()
        models = {
            "contiguous": model,
            "channels_last": copy.deepcopy(model).to(memory_format=channels_last_format(model)),
        }
        results[name] = {}
        for precision in ("no", "bf16"):
            seconds = {way: [] for way in models}
            for _ in range(args.runs):
                for way, found in seconds.items():
                    found.append(seconds_of(forward, models[way], precision))
            medians = {way: statistics.median(found[1:]) for way, found in seconds.items()}
            results[name][precision] = {
                **medians, "ratio": medians["channels_last"] / medians["contiguous"]
            }  # fmt: skip
    content = {
        "runs": args.runs, "batch_size": BATCH, "device": device_name(), "threads": torch.get_num_threads(),
        "results": results, "versions": versions(), "commit": git_commit(),
    }  # fmt: skip
    write_json(args.output, content)


if __name__ == "__main__":
    main()
