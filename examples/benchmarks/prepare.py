"""Speed and memory of `msrl prepare` on BraTS-sized cases, beside MONAI's PersistentDataset on the same files.

    python examples/benchmarks/prepare.py --num_cases 335 --output examples/results/prepare-brats.json

Cases are generated (240 x 240 x 155 voxels, int16, four modalities); a few distinct ones stand under many names, since
reading and unpacking cost the same. Memory is the sum over all processes, sampled; shared pages count once per process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import torch
from tqdm import tqdm

from msrl_diffusers.data.phantoms import make_phantom
from msrl_diffusers.files import write_json
from msrl_diffusers.study.report import git_commit, versions


SHAPE, MODALITIES = (240, 240, 155), ("t1", "t1ce", "t2", "flair")


def write_cases(folder: Path, num_cases: int, num_distinct: int) -> None:
    """A BraTS 2019 tree."""
    for index in tqdm(range(num_cases), desc="cases"):
        grade = ("HGG", "LGG")[index % 2]
        case = folder / grade / f"BraTS19_TCIA01_{index:03d}_1"
        case.mkdir(parents=True)
        for number, modality in enumerate(MODALITIES):
            path = case / f"{case.name}_{modality}.nii.gz"
            if index < num_distinct:
                _write_volume(path, index, number)
            else:
                twin = folder / ("HGG", "LGG")[(index % num_distinct) % 2]
                name = f"BraTS19_TCIA01_{index % num_distinct:03d}_1"
                os.link(twin / name / f"{name}_{modality}.nii.gz", path)


def _write_volume(path: Path, index: int, modality: int) -> None:
    small = torch.from_numpy(make_phantom(index, index % 2, 64).volume)[None]
    large = torch.nn.functional.interpolate(small, SHAPE, mode="trilinear")[0, 0].numpy()
    noise = np.random.default_rng([index, modality]).normal(0, 8, SHAPE)
    values = np.where(large > -0.9, (large + 1) * 400 + noise, 0)
    image = nib.Nifti1Image(values.astype(np.int16), np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.to_filename(path)


def watched(command: list[str]) -> dict[str, float]:
    """Seconds and peak memory, in MiB over the whole tree of processes, of a command."""
    started, peak, done = time.monotonic(), 0, threading.Event()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def sample() -> None:
        nonlocal peak
        root = psutil.Process(process.pid)
        while not done.wait(0.1):
            try:
                tree = [root, *root.children(recursive=True)]
                peak = max(peak, sum(member.memory_info().rss for member in tree))
            except psutil.NoSuchProcess:
                continue

    watcher = threading.Thread(target=sample)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"{command} ended with {code}")
    return {"seconds": round(time.monotonic() - started, 1), "peak_mib": round(peak / 2**20)}


MONAI_SCRIPT = """
import sys
from pathlib import Path

import torch
from monai.data import DataLoader, PersistentDataset
from monai.transforms import (
    Compose, CropForegroundd, EnsureChannelFirstd, LoadImaged, Orientationd, ResizeWithPadOrCropd, Resized,
    ScaleIntensityRangePercentilesd,
)

data_dir, cache_dir, size, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
modalities = ["t1", "t1ce", "t2", "flair"]
cases = sorted(path for grade in ("HGG", "LGG") for path in (data_dir / grade).iterdir())[: int(sys.argv[5])]
files = [{"image": [str(case / f"{case.name}_{name}.nii.gz") for name in modalities]} for case in cases]
transform = Compose([
    LoadImaged("image"), EnsureChannelFirstd("image"), Orientationd("image", "RAS", labels=None),
    CropForegroundd("image", source_key="image"), ResizeWithPadOrCropd("image", 192),
    Resized("image", [size] * 3, mode="area"),
    ScaleIntensityRangePercentilesd("image", 0, 99.5, -1, 1, clip=True, channel_wise=True),
])
dataset = PersistentDataset(files, transform, cache_dir)
torch.set_num_threads(1)
for _ in DataLoader(dataset, batch_size=1, num_workers=workers, worker_init_fn=lambda _: torch.set_num_threads(1)):
    pass
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_cases", type=int, default=335)
    parser.add_argument("--monai_cases", type=int, help="as many of them for MONAI; all if unset")
    parser.add_argument("--num_distinct", type=int, default=4)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs/prepare-brats.json"))
    args = parser.parse_args()
    args.monai_cases = args.monai_cases or args.num_cases
    with tempfile.TemporaryDirectory() as scratch:
        data_dir = Path(scratch) / "MICCAI_BraTS_2019_Data_Training"
        write_cases(data_dir, args.num_cases, args.num_distinct)
        ours = watched([
            sys.executable, "-c", "from msrl_diffusers.cli import main; main()", "prepare", "--dataset", "brats2019",
            "--data_dir", str(data_dir), "--modality", *MODALITIES, "--image_size", str(args.image_size),
            "--output_dir", f"{scratch}/ours", "--num_workers", str(args.num_workers),
        ])  # fmt: skip
        monai = watched([
            sys.executable, "-c", MONAI_SCRIPT, str(data_dir), f"{scratch}/monai", str(args.image_size),
            str(args.num_workers), str(args.monai_cases),
        ])  # fmt: skip
        summary = json.loads((Path(scratch) / "ours" / "summary.json").read_text())
    for figures, count in ((ours, args.num_cases), (monai, args.monai_cases)):
        figures["cases"] = count
        figures["cases_per_second"] = round(count / figures["seconds"], 3)
    content = {
        "what": "preparing BraTS-sized cases: 240 x 240 x 155, int16, four modalities",
        "distinct_cases": args.num_distinct,
        "image_size": args.image_size,
        "num_workers": args.num_workers,
        "msrl_prepare": ours,
        "monai_persistent_dataset": monai,
        "speed_ratio": round(ours["cases_per_second"] / monai["cases_per_second"], 3),
        "memory_ratio": round(ours["peak_mib"] / monai["peak_mib"], 3),
        "prepared": {"volumes": summary["volumes"], "rejected": summary["rejected"]},
        "cpu_count": os.cpu_count(),
        "commit": git_commit(),
        "versions": versions(),
    }
    write_json(args.output, content)
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
