"""Studies side by side: their stages as jobs in several processes; what two have in common is made once.

One small network keeps neither a GPU nor many cores busy, and seeds and ablations do not wait for one another. What a stage prints
goes to `<run>/<stage>.log`.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..errors import Busy, InputError
from .chain import fingerprint, run_study, study_chain
from .config import StudyConfig
from .outcomes import record_refusal
from .variants import link_finished


Runs = Sequence[tuple[StudyConfig, Sequence[str]]]  # studies, and which of their stages are run


@dataclass
class Job:
    """One stage of one run, and the numbers of the jobs it waits for."""

    config: StudyConfig
    stage: str
    needs: set[int]

    @property
    def name(self) -> str:
        return f"{Path(self.config.output_dir).name}/{self.stage}"


def run_side_by_side(runs: Runs, num_processes: int) -> dict[str, str]:
    """Run studies in so many processes; by `output_dir`, why one was refused."""
    jobs, refused = plan_jobs(runs), {}
    waiting, done, running = set(range(len(jobs))), set(), {}
    with _workers(num_processes) as pool, tqdm(total=len(jobs), desc="stages") as progress:
        while waiting or running:
            for number in sorted(waiting):  # earlier runs first
                if len(running) < num_processes and jobs[number].needs <= done:
                    waiting.remove(number)
                    others = [config for config, _ in runs if config is not jobs[number].config]
                    running[pool.submit(_run_job, jobs[number], others)] = number
            progress.set_postfix_str(", ".join(jobs[number].name for number in running.values())[:100])
            for number, sentence in _finished(running):
                ended = {number}
                if sentence is None:
                    done.add(number)
                else:
                    ended |= _dependents(jobs, number) & waiting
                    folders = {jobs[each].config.output_dir for each in ended}
                    refused |= dict.fromkeys(folders, sentence)
                    for folder in folders - {runs[0][0].output_dir}:  # the first is what all share
                        record_refusal(Path(folder), sentence)
                waiting -= ended
                progress.update(len(ended))
    return {config.output_dir: refused[config.output_dir] for config, _ in runs if config.output_dir in refused}


def plan_jobs(runs: Runs) -> list[Job]:
    """The jobs of runs, in their order. A stage waits for those it reads, for the first run that makes the very same, and for
    what another run makes that its config names (`policy_anchors`)."""
    jobs, first = [], {}
    for config, stages in runs:
        chain, numbers = study_chain(config).stages, {}
        named = {number for number, job in enumerate(jobs) if _reads(config, job)}
        for stage in stages:
            numbers[stage], mark = len(jobs), (stage, fingerprint(config, stage))
            needs = named | {numbers[needed] for needed in chain[stage].needs if needed in numbers}
            if stage != "report" and mark in first:
                needs.add(first[mark])
            first.setdefault(mark, numbers[stage])
            jobs.append(Job(config, stage, needs))
    return jobs


def _reads(config: StudyConfig, job: Job) -> bool:
    """Whether a set of volumes that `config` names is what `job` makes."""
    named = [*config.policy_anchors.values(), *config.unseen_sets.values(), *config.synthetic_arms.values()]
    folder = Path(job.config.output_dir).absolute() / job.stage
    return any(folder in Path(path).absolute().parents for path in named)


def _dependents(jobs: Sequence[Job], number: int) -> set[int]:
    """The jobs that wait for job `number`, or for one that does."""
    found = {number}
    for later in range(number + 1, len(jobs)):
        if jobs[later].needs & found:
            found.add(later)
    return found - {number}


def _finished(running: dict[Future, int]) -> Iterator[tuple[int, str | None]]:
    """Wait for a job; the numbers of those that ended, taken out of `running`, and why they were refused, if they were.

    Raises:
        InputError: a process was killed.
        Busy: another command is at work on the same stage.
    """
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        try:
            yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "One of the processes was killed, as the system does where memory runs out: give the same command with fewer jobs."
            ) from error


@contextlib.contextmanager
def _workers(num_processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that have imported everything once (where the system can fork them), each with its share of the cores."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])
        # what forks must not have touched the GPU, and to ask the driver whether there is one touches it
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    counter = context.Value("i", 0)
    pool = ProcessPoolExecutor(num_processes, context, _start_worker, (counter, num_processes))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(counter, num_processes: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _take_cores(counter, num_processes)


def _end_with_parent() -> None:
    """A command that is killed can't tell its processes; going on, they would keep their stages locked for the next command."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _take_cores(counter, num_processes: int) -> None:
    """Keep this process to its share of the cores, one at least."""
    with counter.get_lock():
        place, counter.value = counter.value, counter.value + 1
    if not hasattr(os, "sched_setaffinity"):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))
        return
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // num_processes)
    start = place * share % len(cores)
    os.sched_setaffinity(0, cores[start : start + share])
    torch.set_num_threads(share)


def _run_job(job: Job, others: Sequence[StudyConfig]) -> str | None:
    """Run one stage, or link it to another run's; why it was refused, if it was."""
    folder = Path(job.config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _output_to(folder / f"{job.stage}.log"):
        try:
            link_finished(job.stage, job.config, others)
            run_study(job.config, [job.stage])
        except Busy:
            raise
        except InputError as refusal:
            return str(refusal)
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # the next stage of this process may be a small one, and the GPU is shared
    return None


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Everything that this process prints goes to the end of a file."""
    streams = (sys.stdout, sys.stderr)
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("a") as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
        finally:
            for stream in streams:
                stream.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
