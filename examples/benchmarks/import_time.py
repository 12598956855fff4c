"""What `import msrl_diffusers` costs beside `import diffusers`, without which it can't be.

    python examples/benchmarks/import_time.py --output examples/results/import-time.json

Fresh processes with `-W error` import one and the other in turn, `--runs` times each, after one of each that does not count
(it fills caches of files and of byte code). Seconds are those that the process spent on a processor (user time): a busy
machine stretches the clock on the wall, and these much less. `ratio` is that of the medians. `slowest` are the modules that
took longest by themselves, by `python -X importtime` in a run of its own.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from msrl_diffusers.files import write_json
from msrl_diffusers.study.report import git_commit, versions


NAMES = ("diffusers", "msrl_diffusers")
NUM_SLOWEST = 8


def run(name: str, *options: str) -> str:
    """Import one in a process of its own, on one thread. Returns its standard error."""
    command = [sys.executable, "-W", "error", *options, "-c", f"import {name}"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"`{' '.join(command)}` ended with {done.returncode}:\n{done.stderr}")
    return done.stderr


def user_seconds(name: str) -> float:
    """User time of one process that imports it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    run(name)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def slowest(name: str) -> list[dict]:
    """Modules by the time that they took by themselves, the longest first."""
    rows = [line.removeprefix("import time:").split("|") for line in run(name, "-X", "importtime").splitlines()]
    modules = [
        {"module": module.strip(), "self_ms": round(int(own) / 1000, 1)} for own, _, module in rows if own.strip().isdigit()
    ]  # fmt: skip
    return sorted(modules, key=lambda row: -row["self_ms"])[:NUM_SLOWEST]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="of each of the two, one after the other")
    parser.add_argument("--output", type=Path, default=Path("outputs/import-time.json"))
    args = parser.parse_args()
    for name in NAMES:
        run(name)
    seconds = {name: [] for name in NAMES}
    for _ in tqdm(range(args.runs), desc="imports"):
        for name in NAMES:
            seconds[name].append(round(user_seconds(name), 3))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    content = {
        "what": "user time of a fresh process that imports diffusers, or msrl_diffusers",
        "user_seconds": {name: {"median": medians[name], "runs": seconds[name]} for name in NAMES},
        "ratio": round(medians["msrl_diffusers"] / medians["diffusers"], 3),
        "slowest": {name: slowest(name) for name in NAMES},
        "cpu_count": os.cpu_count(),
        "commit": git_commit(),
        "versions": versions(),
    }
    write_json(args.output, content)
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
