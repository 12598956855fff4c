"""Randomness as a function of (seed, step, global sample index): resume is exact, and samples do not depend on the
number of processes."""

import hashlib

import torch


def fold_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed for the stream named by `keys`; different keys give independent streams."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator for the stream named by `keys`."""
    return torch.Generator().manual_seed(fold_seed(seed, *keys))


def sample_generators(seed: int, name: str, indices: range | list[int]) -> list[torch.Generator]:
    """One generator per sample, by its global index."""
    return [generator_for(seed, name, index) for index in indices]


def batch_indices(num_items: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """Which items step number `step` sees, `[batch_size]`: epochs of shuffled items, one after the other.

    A batch may run over the end of an epoch, so it always has `batch_size` items.
    """
    first, chosen = step * batch_size, []
    while len(chosen) < batch_size:
        epoch, offset = divmod(first + len(chosen), num_items)
        order = torch.randperm(num_items, generator=generator_for(seed, "epoch", epoch))
        chosen += order[offset : offset + batch_size - len(chosen)].tolist()
    return torch.tensor(chosen)
