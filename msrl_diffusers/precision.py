"""Mixed precision: which one a device is fast in, and the context samples are made in."""

from contextlib import nullcontext

import torch


PRECISIONS = ("auto", "no", "bf16", "fp16")
_WORDS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def resolve_precision(mixed_precision: str, device: torch.device | str) -> str:
    """`"no"`, `"bf16"` or `"fp16"`; `"auto"` is bf16 where the device computes in it, else float32.

    A CPU without bfloat16 instructions emulates them several times slower than it computes in float32.
    """
    if mixed_precision != "auto":
        return mixed_precision
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "no"


def precision_name(mixed_precision: str, device: torch.device | str) -> str:
    """What `resolve_precision` comes to, in a word: float32, bfloat16 or float16."""
    return _WORDS[resolve_precision(mixed_precision, device)]


def autocast(device: torch.device, mixed_precision: str):
    """The precision samples are made in; every stage of a study uses the same."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolve_precision(mixed_precision, device))
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)
