import os

import pytest
import torch

from msrl_diffusers.precision import autocast, resolve_precision
from msrl_diffusers.processes import use_all_cores


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


def test_a_process_alone_uses_all_cores():
    """As `accelerate launch` starts it: with one thread."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        use_all_cores()
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)
