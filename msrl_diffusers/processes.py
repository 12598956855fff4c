"""Processes and threads, as `accelerate launch` set them up."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started.

    `PartialState()` alone does not heed `ACCELERATE_USE_CPU`: every process would take itself for the only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def use_all_cores() -> None:
    """Let torch compute on all cores this process may run on, where it is alone and has no accelerator: `accelerate launch`
    leaves it with one thread, whatever the machine has."""
    state = process_state()
    if state.num_processes == 1 and state.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(cores)
