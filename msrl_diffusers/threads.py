"""Threads: `accelerate launch` leaves a process on the CPU with one, whatever the machine has."""

import os

import torch
from accelerate import PartialState


def use_all_cores() -> None:
    """Let torch compute on all cores this process may run on, where it is alone and has no accelerator."""
    state = PartialState()
    if state.num_processes == 1 and state.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(cores)
