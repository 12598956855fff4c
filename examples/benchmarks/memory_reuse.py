"""What it is worth on CPUs to keep the memory that is freed (`msrl_diffusers.processes.keep_freed_memory`). Needs glibc.

    python examples/benchmarks/memory_reuse.py --output examples/results/memory-reuse.json

Four pieces of work at the size of model_cards/phantoms-32, each in fresh processes with it and without it in turn, `--runs`
times; `ratio` is that of the median seconds, with over without, and `peak_memory` is of the whole process, in MiB.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from msrl_diffusers import MedVolumePipeline, SliceFeatureExtractor, SliceRewardModel, VolumeRewardModel
from msrl_diffusers.evaluation.features import extract_features
from msrl_diffusers.files import write_json
from msrl_diffusers.processes import keep_freed_memory, peak_memory
from msrl_diffusers.study.report import git_commit, versions
from msrl_diffusers.trainers.base import in_fast_memory_format


RELEASE = Path(__file__).parents[2] / "model_cards" / "phantoms-32"


def features() -> Callable[[], object]:
    """Features of 256 volumes."""
    extractor = SliceFeatureExtractor.from_pretrained(RELEASE / "extractor_label", dtype=torch.float32)
    volumes = torch.rand(256, 1, 32, 32, 32).half()
    return lambda: extract_features(extractor, volumes)


def reward_step(model: torch.nn.Module) -> Callable[[], None]:
    """Four steps of training on 32 volumes."""
    in_fast_memory_format(model, "no").train()
    optimizer, volumes = torch.optim.AdamW(model.parameters()), torch.rand(32, 1, 32, 32, 32)

    def steps() -> None:
        for _ in range(4):
            model(volumes).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


def sampling() -> Callable[[], object]:
    """64 volumes by 10 steps."""
    pipeline = MedVolumePipeline.from_pretrained(RELEASE, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(["HGG", "LGG"] * 32, num_inference_steps=10, eta=1.0)


WORK = {
    "features": features,
    "slice reward, training": lambda: reward_step(SliceRewardModel()),
    "volume reward, training": lambda: reward_step(VolumeRewardModel()),
    "sampling": sampling,
}


def measure(name: str, kept: bool) -> dict[str, float]:
    """Seconds and peak memory of one piece of work in this process, the first time not counted."""
    if kept:
        keep_freed_memory()
    torch.manual_seed(0)
    work = WORK[name]()
    work()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_memory": peak_memory() / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="of each of the two, one after the other")
    parser.add_argument("--output", type=Path, default=Path("outputs/memory-reuse.json"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # a piece of work, and whether memory is kept
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], args.child[1] == "kept")))
        return
    results = {}
    for name in tqdm(WORK, desc="memory reuse"):
        runs = {"kept": [], "returned": []}
        for _ in range(args.runs):
            for way, found in runs.items():
                command = [sys.executable, __file__, "--child", name, way]
                found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        medians = {
            way: {figure: statistics.median(run[figure] for run in found) for figure in found[0]}
            for way, found in runs.items()
        }
        results[name] = {**medians, "ratio": medians["kept"]["seconds"] / medians["returned"]["seconds"]}
    content = {
        "runs": args.runs, "threads": torch.get_num_threads(), "results": results,
        "versions": versions(), "commit": git_commit(),
    }  # fmt: skip
    write_json(args.output, content)


if __name__ == "__main__":
    main()
