"""Chains of stages: each with its own folder and fingerprint, skipped when done, resumed when killed.

A stage writes into `output_dir/<name>/`; its result, its seconds (null where it was interrupted and went on: nobody measured
those before) and its fingerprint are `stage.json` there. The fingerprint hashes all that the result depends on: settings and
the stages it reads. A stage whose folder has the right one is not run again.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from .errors import InputError
from .files import write_json, write_text
from .processes import alone_in, check_shared, process_state, use_whole_cpu


@dataclass(frozen=True)
class Stage:
    """A stage: its function, the stages it reads, the settings that change its result, and whether all processes take
    part (its trainer splits the work) or the others wait for the first one.
    """

    run: Callable[[Any], dict]
    needs: tuple[str, ...]
    fields: tuple[str, ...]
    split: bool = False


def nothing_left_out(config: Any) -> tuple[str, ...]:
    """No stage."""
    return ()


def nothing_to_check(config: Any, stage: str) -> None:
    """Every machine will do."""


@dataclass(frozen=True)
class Chain:
    """Stages in the order they run, each after those it needs. `config` is any object with an `output_dir`.

    Attributes:
        stages: by name.
        settings: the settings of a config by name, JSON; resolved, so that a default and the same value spelled out
            are one.
        left_out: names of the stages that a config has no use for.
        common: names of settings that every stage depends on.
        counts_left_out: whether stages that are left out, with all their settings, count in the fingerprints of those that need
            them. Another choice for a chain puts the folders that it has made out of date.
        check: what a stage needs of the machine; called for all that are to be run before the first is, it raises InputError.
    """

    stages: Mapping[str, Stage]
    settings: Callable[[Any], dict]
    left_out: Callable[[Any], Collection[str]] = nothing_left_out
    common: tuple[str, ...] = ()
    counts_left_out: bool = True
    check: Callable[[Any, str], None] = nothing_to_check

    def enabled(self, config: Any) -> list[str]:
        """The stages that are run with this config, in order."""
        without = self.left_out(config)
        return [name for name in self.stages if name not in without]

    def up_to(self, name: str) -> list[str]:
        """Stage `name` and all it needs, in order."""
        wanted, open_names = set(), [name]
        while open_names:
            current = open_names.pop()
            wanted.add(current)
            open_names += self.stages[current].needs
        return [stage for stage in self.stages if stage in wanted]

    def fingerprint(self, config: Any, name: str) -> str:
        """Hash of everything a stage's result depends on: settings, and the stages it reads."""
        settings, marks = self.settings(config), {}
        without = () if self.counts_left_out else self.left_out(config)
        for stage_name, stage in self.stages.items():
            inputs = {
                "stage": stage_name,
                "fields": {key: settings[key] for key in stage.fields},
                **{key: settings[key] for key in self.common},
                "needs": [marks[needed] for needed in stage.needs if needed not in without],
            }
            marks[stage_name] = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        return marks[name]

    def run(self, config: Any, only: Sequence[str] | None = None) -> dict:
        """Run all stages, or those named in `only`, skipping those already done; returns the last one's result.

        Raises:
            InputError: an unknown stage, or one whose inputs are not there (when run alone); processes that do not share the
                config's `output_dir`; or what `check` refuses.
            Busy: a stage that another command is running.
        """
        use_whole_cpu()
        names = list(only or self.stages)
        unknown = [name for name in names if name not in self.stages]
        if unknown:
            raise InputError(f"Unknown stage {unknown[0]!r}; the stages are {list(self.stages)}.")
        check_shared(config.output_dir)
        result, asked = {}, [name for name in self.enabled(config) if name in names]
        for name in asked:
            if finished_fingerprint(config, name) != self.fingerprint(config, name):
                self.check(config, name)
        for name in asked:
            result = self._run_stage(config, name)
        return result

    def _run_stage(self, config: Any, name: str) -> dict:
        stage, processes = self.stages[name], process_state()
        folder = Path(config.output_dir) / name
        record, mark = folder / "stage.json", self.fingerprint(config, name)
        if finished_fingerprint(config, name) == mark:
            return json.loads(record.read_text())["result"]
        self.check_finished(config, self.stages[name].needs, f"Stage {name!r}")
        processes.wait_for_everyone()  # all have looked at what is there
        with alone_in(folder):
            resumed = open_folder(folder, mark) if processes.is_main_process else False
            processes.wait_for_everyone()
            started = time.monotonic()
            result = stage.run(config) if stage.split else _run_on_main_process(stage, config)
            processes.wait_for_everyone()
            if processes.is_main_process:
                seconds = None if resumed else round(time.monotonic() - started, 1)
                write_json(record, {"fingerprint": mark, "seconds": seconds, "result": result})
            processes.wait_for_everyone()
        return json.loads(record.read_text())["result"]

    def check_finished(self, config: Any, names: Collection[str], reader: str) -> None:
        """Raise InputError unless the stages `names`, but those left out, are done, with these settings. `reader` is what
        needs them, for the sentence.
        """
        for needed in names:
            if needed not in self.enabled(config):
                continue
            found = finished_fingerprint(config, needed)
            if found is None:
                raise InputError(f"{reader} needs the result of {needed!r}; run that stage first.")
            if found != self.fingerprint(config, needed):
                raise InputError(f"{reader} needs {needed!r}, which was run with other settings; run it again first.")


def _run_on_main_process(stage: Stage, config: Any) -> dict | None:
    """Run a stage in the first process, while the others wait for it; its result there, None in the others.

    Raises:
        InputError: that of the first process, in every one: none is left to wait for a stage that was refused.
    """
    result = refusal = None
    if process_state().is_main_process:
        try:
            result = stage.run(config)
        except InputError as error:
            refusal = error
    (sentence,) = broadcast_object_list([refusal and str(refusal)])
    if sentence is not None:
        raise refusal or InputError(sentence)
    return result


def finished_fingerprint(config: Any, name: str) -> str | None:
    """The fingerprint of what lies in the stage's folder; None if it is not there or not whole."""
    return _recorded_fingerprint(Path(config.output_dir) / name / "stage.json")


def _recorded_fingerprint(record: Path) -> str | None:
    return json.loads(record.read_text())["fingerprint"] if record.is_file() else None


def open_folder(folder: Path, mark: str) -> bool:
    """Make the stage's folder. What an interrupted run of the same stage left is kept, so that training resumes; what
    a run with other settings left is removed. Of a link to another run's folder only the link is. Whether anything was kept.
    """
    marker = folder / ".fingerprint"
    found = marker.read_text() if marker.is_file() else _recorded_fingerprint(folder / "stage.json")
    stale, leftover = found not in (None, mark), folder.with_name(f".{folder.name}.stale")
    shutil.rmtree(leftover, ignore_errors=True)
    if folder.is_symlink():
        if stale or not folder.exists():
            folder.unlink()
    elif stale:
        folder.rename(leftover)  # at once: half of it, where the removal is killed, would look like an interrupted run
        shutil.rmtree(leftover)
    if found != mark or not marker.is_file():  # hidden files are lost when a folder is copied carelessly
        write_text(marker, mark)
    return any(path != marker for path in folder.iterdir())
