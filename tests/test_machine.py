"""Precision, threads and processes, as the machine and the launcher give them."""

import ctypes
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

from msrl_diffusers import processes
from msrl_diffusers.errors import InputError
from msrl_diffusers.precision import autocast, resolve_precision
from msrl_diffusers.processes import (
    _asked_of_accelerate,
    keep_freed_memory,
    peak_memory,
    start_missing_processes,
    use_whole_cpu,
)


@pytest.mark.parametrize(
    ("precision", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("no", torch.float32)]
)
def test_autocast(precision, expected):
    weight = torch.ones(2, 2)
    with autocast(torch.device("cpu"), precision):
        assert (weight @ weight).dtype == expected


@pytest.mark.parametrize("instructions", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_auto_is_bf16_where_the_processor_has_it(monkeypatch, instructions):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == instructions)
    assert resolve_precision("auto", "cpu") == ("bf16" if instructions else "no")


def test_a_named_precision_is_kept():
    assert [resolve_precision(name, "cpu") for name in ("no", "bf16", "fp16")] == ["no", "bf16", "fp16"]


@pytest.mark.parametrize("apple", [True, False])
def test_a_gpu_without_float64_is_left_alone(monkeypatch, apple):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    monkeypatch.setattr(processes, "PartialState", lambda cpu: cpu)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert processes.process_state() is apple


def test_a_process_alone_uses_all_cores():
    """As `accelerate launch` starts it: with one thread."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        use_whole_cpu()
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)


def test_one_of_several_processes_side_by_side_keeps_its_share_of_the_cores(monkeypatch):
    """Where no system call says which cores a process has, only its parent can have told it."""
    before = torch.get_num_threads()
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    try:
        torch.set_num_threads(2)
        use_whole_cpu()
        assert torch.get_num_threads() == 2  # somebody's choice
        torch.set_num_threads(1)
        use_whole_cpu()
        assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
        use_whole_cpu()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("platform", "calls"), [("linux", {(-4, 0), (-1, -1)}), ("darwin", set()), ("win32", set())])
def test_freed_memory_is_kept_where_there_is_glibc(monkeypatch, platform, calls):
    found = set()

    class Library:
        @staticmethod
        def mallopt(option, value):
            found.add((option, value))

    monkeypatch.setattr(processes.sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    keep_freed_memory()
    assert found == calls
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # musl has no such function
    keep_freed_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_the_process_s_own():
    """`ru_maxrss` of a child would be at least the peak of its parent."""
    block = torch.ones(2**27)  # 512 MiB
    program = "from msrl_diffusers.processes import peak_memory; print(peak_memory())"
    child = int(subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert child + 2**28 < peak_memory()
    assert block.nbytes < peak_memory()


def test_an_ordinary_process_starts_no_others(monkeypatch):
    for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    start_missing_processes()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # somebody's own; the parent is no launcher
    start_missing_processes()


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        (["/usr/bin/python", "/usr/bin/accelerate", "launch", "--cpu", "--num_processes", "3", "a.py", "--seed", "1"], (3, 1)),
        (["python", "-m", "accelerate.commands.launch", "--num_processes=4", "--num_machines=2", "a.py"], (4, 2)),
        (["accelerate-launch", "--cpu", "a.py"], (1, 1)),
        (["bash", "-c", "python a.py"], (1, 1)),
    ],
)  # fmt: skip
def test_what_accelerate_was_asked_for(command, asked):
    assert _asked_of_accelerate(command) == asked


def test_the_number_of_processes_in_a_config_file(tmp_path):
    file = tmp_path / "cpu.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
    )
    assert _asked_of_accelerate(["accelerate", "launch", "--config_file", str(file), "a.py"]) == (2, 1)


def test_several_machines_on_cpus_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr("msrl_diffusers.processes._asked_of_accelerate", lambda command: (4, 2))
    with pytest.raises(InputError, match="--nnodes 2 --nproc_per_node 2"):
        start_missing_processes()
