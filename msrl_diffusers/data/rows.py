"""Which rows of a set are meant: by their numbers, or by a mask."""

from collections.abc import Sequence

import torch

from ..errors import InputError


def row_numbers(chosen: Sequence[int] | torch.Tensor, count: int) -> torch.Tensor:
    """Numbers `[N]`, int64, of the rows chosen out of `count`: `chosen` itself, or where it is true if it is Boolean.

    Raises:
        InputError: a mask of another length.
    """
    chosen = torch.as_tensor(chosen)
    if chosen.dtype != torch.bool:
        return chosen.long()
    if tuple(chosen.shape) != (count,):
        raise InputError(f"A mask of {count} rows needs one truth value for each, got shape {list(chosen.shape)}.")
    return chosen.nonzero()[:, 0]
