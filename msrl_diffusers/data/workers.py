"""Processes that prepare data."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch


def worker_pool(num_workers: int) -> ProcessPoolExecutor:
    """So many fresh processes of one thread each."""
    context = multiprocessing.get_context("spawn")  # forking a process with torch's threads may lock up
    return ProcessPoolExecutor(num_workers, context, initializer=torch.set_num_threads, initargs=(1,))
