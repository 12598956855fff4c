"""Speed and memory of a Frechet distance between folders of NIfTI images, by the number of images.

    python examples/benchmarks/evaluate.py --num_volumes 100 500 1000 --output examples/results/evaluate.json

For every number N a process of its own reads two folders of N images, by the same functions as `msrl evaluate`, takes
features with an untrained `SliceFeatureExtractor` and computes the distance. A few distinct phantoms stand under many names,
since reading and unpacking cost the same. Memory is the peak that the kernel counted for that process (VmHWM, Linux).

- `volumes_per_second`: both folders' images over the seconds from opening the first to the distance; imports do not count.
- `peak_mib`: of the whole process; `idle_mib` is what it had before it opened a folder.
- `mib_per_volume`: growth of the peak from the smallest N to the largest, over the images read more. One image takes
  `volume_mib` as float32: far less growth says that memory does not hold the set.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from msrl_diffusers import SliceFeatureExtractor
from msrl_diffusers.data.phantoms import FIELD_OF_VIEW, make_phantom
from msrl_diffusers.data.processor import to_nifti
from msrl_diffusers.errors import sentence_instead_of_traceback
from msrl_diffusers.evaluation.features import source_features
from msrl_diffusers.evaluation.fidelity import frechet_distance
from msrl_diffusers.evaluation.sources import open_source
from msrl_diffusers.files import write_json
from msrl_diffusers.processes import peak_memory
from msrl_diffusers.study.report import git_commit, versions


def write_images(folder: Path, num_volumes: int, num_distinct: int, image_size: int, first_index: int) -> None:
    """`num_volumes` compressed images, of which the first `num_distinct` are phantoms and the others links to these."""
    folder.mkdir(parents=True)
    for index in tqdm(range(num_volumes), desc=f"images of {folder.name}"):
        path = folder / f"phantom-{index:06d}.nii.gz"
        if index < num_distinct:
            volume = make_phantom(first_index + index, index % 2, image_size).volume
            to_nifti(volume, (FIELD_OF_VIEW / image_size,) * 3).to_filename(path)
        else:
            os.link(folder / f"phantom-{index % num_distinct:06d}.nii.gz", path)


def measure(folder: Path, batch_size: int) -> dict:
    """What a child process finds: seconds and memory of the distance between `folder/real` and `folder/fake`."""
    torch.manual_seed(0)
    extractor, idle = SliceFeatureExtractor(), peak_memory()
    started = time.monotonic()
    features = [
        source_features(extractor, open_source(folder / name), batch_size=batch_size).double()
        for name in ("real", "fake")
    ]
    extracted = time.monotonic()
    value = frechet_distance(*features)
    return {
        "volumes": sum(map(len, features)),
        "seconds": time.monotonic() - started,
        "distance_seconds": time.monotonic() - extracted,
        "idle_mib": idle / 2**20,
        "peak_mib": peak_memory() / 2**20,
        "fid": value,
    }


def measured_apart(folder: Path, batch_size: int) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--child", str(folder), "--batch_size", str(batch_size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}")
    found = json.loads(done.stdout)
    found["volumes_per_second"] = found["volumes"] / found["seconds"]
    return {name: round(value, 6 if name == "fid" else 2) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_volumes", type=int, nargs="+", default=[100, 500, 1000], help="in each of two folders")
    parser.add_argument("--num_distinct", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluate.json"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        sys.stdout.write(json.dumps(measure(args.child, args.batch_size)))
        return
    runs = {}
    for num_volumes in sorted(args.num_volumes):
        with tempfile.TemporaryDirectory() as scratch:
            for part, name in enumerate(("real", "fake")):
                first_index = part * args.num_distinct
                write_images(Path(scratch) / name, num_volumes, args.num_distinct, args.image_size, first_index)
            runs[num_volumes] = measured_apart(Path(scratch), args.batch_size)
    smallest, largest = runs[min(runs)], runs[max(runs)]
    more = largest["volumes"] - smallest["volumes"]
    content = {
        "what": "Frechet distance between two folders of compressed NIfTI images, N images each",
        "image_size": args.image_size,
        "distinct_images": args.num_distinct,
        "batch_size": args.batch_size,
        "extractor": "SliceFeatureExtractor, untrained",
        "volume_mib": args.image_size**3 * 4 / 2**20,
        "by_n": runs,
        "mib_per_volume": round((largest["peak_mib"] - smallest["peak_mib"]) / more, 4) if more else None,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "commit": git_commit(),
        "versions": versions(),
    }
    write_json(args.output, content)
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        main()
