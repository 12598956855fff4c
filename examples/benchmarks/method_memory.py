"""How much memory tuning takes by each method, at the batches of configs/phantoms/objectives.yaml.

    python examples/benchmarks/method_memory.py --output examples/results/method-memory.json

Two rollouts of every method, each in a fresh process; what the file has of methods that are not measured now stays. `peak_memory`, in bytes: what the process held at most beyond what it held
after its imports (on Linux); on a GPU the most that was allocated there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _runs import merged
from objectives import CONFIG, VARIANTS
from tqdm import tqdm

from msrl_diffusers.errors import InputError, sentence_instead_of_traceback
from msrl_diffusers.files import write_json
from msrl_diffusers.processes import device_name, keep_freed_memory, peak_memory, use_whole_cpu
from msrl_diffusers.study import StudyConfig, run_study
from msrl_diffusers.study.command_line import read_study
from msrl_diffusers.study.report import git_commit, versions
from msrl_diffusers.study.variants import changed_config


METHODS = ("ppo", "ppo_window", "nft", "draft_cheap", "frechet", "ddo")


def config_of(name: str, folder: Path) -> StudyConfig:
    """The study of a method, below `folder`, with two rollouts."""
    base = StudyConfig(**{**read_study(CONFIG), "output_dir": str(folder)})
    method = VARIANTS[name].get("method", base.method)
    return changed_config(base, name, 0, merged(VARIANTS[name], {method: {"max_steps": 2}}))


def measure(name: str, folder: Path) -> int:
    """Bytes that tuning took in this process."""
    keep_freed_memory()
    use_whole_cpu()
    config, before = config_of(name, folder), peak_memory()
    run_study(config, [config.method])
    result = json.loads((Path(config.output_dir) / config.method / "stage.json").read_text())["result"]
    return result["peak_memory"] or peak_memory() - before


def earlier(path: Path) -> dict:
    """The results that an earlier run wrote.

    Raises:
        InputError: they are of another device.
    """
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    if content["device"] != device_name():
        raise InputError(f"{path} is of another device ({content['device']}); give another file, or remove this one.")
    return content["results"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--output", type=Path, default=Path("outputs/method-memory.json"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # a method, and the folder of its study
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], Path(args.child[1]))))
        return
    results = earlier(args.output)  # refused before anything is measured
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(args.methods, desc="method memory"):
            run_study(config_of(name, Path(folder)), ["prepare"])
            command = [sys.executable, __file__, "--child", name, folder]
            lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
            results[name] = {"peak_memory": json.loads(lines[-1]), "commit": git_commit()}
    write_json(
        args.output, {"config": CONFIG.name, "device": device_name(), "results": results, "versions": versions()}
    )


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        main()
