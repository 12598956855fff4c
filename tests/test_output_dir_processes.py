"""An output_dir that several processes do not share is refused in all of them, before anything is trained.

Run as a script this file is two such processes, each of which writes `OUTPUT_DIR/answers-RANK.json`:

    torchrun --nproc_per_node 2 test_output_dir_processes.py OUTPUT_DIR
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from launching import finish

from msrl_diffusers.chains import Chain, Stage
from msrl_diffusers.errors import InputError
from msrl_diffusers.trainers.base import TrainingRun
from msrl_diffusers.trainers.base_config import TrainingConfig


def train(folder: Path) -> None:
    TrainingRun(TrainingConfig(str(folder), report_to="none"), "training").finish()


def run_chain(folder: Path) -> None:
    stage = Stage(lambda settings: {}, (), (), split=True)
    Chain({"stage": stage}, lambda settings: {}).run(SimpleNamespace(output_dir=str(folder)))


def answer(function: Callable[[Path], None], folder: Path) -> str:
    try:
        function(folder)
    except InputError as error:
        return str(error)
    return "done"


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    answers = [
        answer(function, folder / name)
        for function, place in ((train, "run"), (run_chain, "chain"))
        for name in (f"{place}-of-{rank}", place)
    ]
    (folder / f"answers-{rank}.json").write_text(json.dumps(answers))
    torch.distributed.destroy_process_group()


def test_an_output_dir_that_is_not_shared_is_refused_in_all_processes(tmp_path):
    finish(__file__, tmp_path, processes=2)
    for rank in (0, 1):
        answers = json.loads((tmp_path / f"answers-{rank}.json").read_text())
        for place, refusal in (("run", answers[0]), ("chain", answers[2])):
            assert refusal.startswith(
                f"output_dir={tmp_path / place}-of-{rank} is not the folder that the first of 2 processes has: 1 of them"
            )
        assert answers[1::2] == ["done", "done"]
    for name in ("run", "run-of-0", "chain-of-0"):
        assert list((tmp_path / name).iterdir()) == []


if __name__ == "__main__":
    main()
