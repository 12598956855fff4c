"""Processes and threads, as `accelerate launch` set them up, and folders that one command at a time may write into."""

import ctypes
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from filelock import FileLock, Timeout

from .errors import Busy, InputError


LAUNCHERS = ("launch", "accelerate-launch", "accelerate.commands.launch")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def process_state() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started.

    `PartialState()` alone does not heed `ACCELERATE_USE_CPU`: every process would take itself for the only one. And it takes the GPU
    of an Apple computer, which has no float64, in which rewards are standardized and distances measured: the CPU is used there.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or torch.backends.mps.is_available())


def device_name() -> str:
    """What this process computes on: the name of its GPU, or the device's type."""
    device = process_state().device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def check_writable(folder: str | Path) -> None:
    """Raise InputError where nothing can be written into a folder, which need not exist: said before the work whose results go
    there. Makes nothing."""
    place = Path(os.path.abspath(folder))
    nearest = next(path for path in (place, *place.parents) if os.path.exists(path))
    if not nearest.is_dir():
        raise InputError(f"Nothing can be written into {folder}: {nearest} is a file; give another folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(
            f"Nothing may be written into {folder}: {nearest} is closed to this user; give another folder."
        )


def check_shared(output_dir: str | Path) -> None:
    """Raise InputError, in every process, unless all of them see what the first one writes into `output_dir`, which it makes. All
    must call it; does nothing where there is one."""
    state, folder = process_state(), Path(output_dir)
    if state.num_processes == 1:
        return
    check_writable(folder)
    name = f".seen-by-all-{uuid4().hex}"  # a name that no network file system remembers as missing
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (name,) = broadcast_object_list([name])
    seen = gather_object([(folder / name).is_file()])
    if state.is_main_process:
        (folder / name).unlink()
    if not all(seen):
        raise InputError(
            f"output_dir={folder} is not the folder that the first of {len(seen)} processes has: {seen.count(False)} of them do not see "
            "what that one writes; on several machines give one on a disk that all share."
        )


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Hold a folder, which need not exist: of two commands that write into one, each would spoil what the other resumes from. The
    system lets go of it when this process dies, whatever killed it. All processes must call it.

    Raises:
        InputError: nothing can be written there.
        Busy: another command holds it.
    """
    check_writable(folder)
    lock, held = None, True
    if process_state().is_main_process:
        place = Path(os.path.abspath(folder))  # "." has no name
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.with_name(f".{place.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            held = False
        except (OSError, NotImplementedError):
            pass  # the file system has no locks, or closes the place beside the folder: nothing is held
    try:
        (held,) = broadcast_object_list([held])
        if not held:
            raise Busy(
                f"Another command is at work in {folder}; wait for its end, or give this one another output_dir."
            )
        yield
    finally:
        if lock is not None:
            lock.release()


def use_whole_cpu() -> None:
    """Let torch compute on all cores this process may run on, where it is alone, has no accelerator and one thread, with which
    `accelerate launch` leaves it, whatever the machine has; another number of threads is somebody's choice. And keep the memory
    that it frees."""
    state = process_state()
    if state.num_processes == 1 and state.device.type == "cpu" and torch.get_num_threads() == 1:
        if hasattr(os, "sched_getaffinity"):
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        elif multiprocessing.parent_process() is None:  # else one of several side by side, which has its share
            torch.set_num_threads(os.cpu_count() or 1)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc reuse the large blocks that are freed. It gives them back to the kernel by default, which hands them out
    again page by page: features of many volumes take more time there than on arithmetic, samplers a quarter of theirs
    (`examples/benchmarks/memory_reuse.py`). Does nothing where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes (VmHWM). Not `ru_maxrss`, which begins with its parent's.

    Raises:
        InputError: a system other than Linux.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise InputError(f"{status} has no VmHWM, from which the peak of memory is read; measure it on Linux.")


def start_missing_processes() -> None:
    """Make `accelerate launch --cpu --num_processes N` mean what it says: without MPI it starts one process, whatever N is.
    That process becomes `torchrun`, which starts N of the same script. Does nothing anywhere else.

    Raises:
        InputError: several machines, which only `torchrun` itself can start on CPUs.
    """
    alone = not any(
        name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
    )
    if not (alone and parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ):
        return  # accelerate sets that address where it was asked for more than one
    num_processes, num_machines = _asked_of_accelerate(psutil.Process().parent().cmdline())
    if num_machines > 1:
        raise InputError(
            "accelerate launch starts no CPU processes on several machines; use ACCELERATE_USE_CPU=true torchrun --nnodes "
            f"{num_machines} --nproc_per_node {num_processes // num_machines} --rdzv_endpoint ADDRESS:PORT SCRIPT."
        )
    if num_processes > 1:
        sys.stdout.flush()
        distributed = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        os.execv(sys.executable, [sys.executable, *distributed, *sys.argv])


def _asked_of_accelerate(command: list[str]) -> tuple[int, int]:
    """Processes and machines that a command line of `accelerate launch`, or its config file, asks for; 1 and 1 of any other."""
    from accelerate.commands.config import load_config_from_file  # seldom needed, and slow to import
    from accelerate.commands.launch import launch_command_parser

    places = [place for place, word in enumerate(command) if os.path.basename(word) in LAUNCHERS]
    if not places:
        return 1, 1
    asked = launch_command_parser().parse_args(command[places[0] + 1 :])
    saved = load_config_from_file(asked.config_file) if asked.config_file else None
    return tuple(getattr(asked, name) or getattr(saved, name, None) or 1 for name in ("num_processes", "num_machines"))
