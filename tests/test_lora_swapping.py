"""Adapters that take the place of others in a loaded pipeline: what they do, and what is saved of them."""

import pytest
import torch
from lora_scene import FILE, generate, with_adapter
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import tiny_pipeline


@pytest.fixture
def pipeline():
    pipeline = tiny_pipeline()
    pipeline.unet.eval()
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An adapter, saved."""
    folder = tmp_path_factory.mktemp("adapter")
    with_adapter().save_lora_weights(folder)
    return folder


def test_an_adapter_may_be_swapped_for_another(pipeline, folder, tmp_path):
    other = with_adapter(seed=1)
    other.save_lora_weights(tmp_path)
    pipeline.load_lora_weights(folder, adapter_name="one")
    pipeline.load_lora_weights(tmp_path, adapter_name="one", hotswap=True)
    torch.testing.assert_close(generate(pipeline), generate(other))
    assert pipeline.get_list_adapters() == {"unet": ["one"]}


@pytest.mark.parametrize("changes", [{"lora_alpha": 12}, {"r": 1, "lora_alpha": 2}])
def test_an_adapter_that_was_swapped_in_is_weighted_and_saved_as_what_it_is(pipeline, tmp_path, changes):
    """Of another alpha, and of a smaller rank, which peft pads."""
    targets = {"target_modules": ["to_q", "to_v"]}  # peft pads no 3D convolutions
    other = with_adapter(seed=1, **targets, **changes)
    with_adapter(**targets).save_lora_weights(tmp_path / "one")
    other.save_lora_weights(tmp_path / "other")
    pipeline.load_lora_weights(tmp_path / "one", adapter_name="one")
    pipeline.load_lora_weights(tmp_path / "other", adapter_name="one", hotswap=True)
    torch.testing.assert_close(generate(pipeline), generate(other))
    pipeline.save_lora_weights(tmp_path / "saved")
    saved, expected = load_file(tmp_path / "saved" / FILE), load_file(tmp_path / "other" / FILE)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    again = tiny_pipeline()
    again.load_lora_weights(tmp_path / "saved")
    torch.testing.assert_close(generate(again), generate(other))
    pipeline.set_adapters("one", 0.5)
    other.set_adapters("default", 0.5)
    torch.testing.assert_close(generate(pipeline), generate(other))


@pytest.mark.parametrize("changes", [{}, {"rank_pattern": {"to_q": 1}}])
def test_an_adapter_is_saved_as_it_is_where_swapping_was_prepared(pipeline, tmp_path, changes):
    other = with_adapter(target_modules=["to_q", "to_v"], **changes)
    other.save_lora_weights(tmp_path / "one")
    pipeline.enable_lora_hotswap(target_rank=8)
    pipeline.load_lora_weights(tmp_path / "one", adapter_name="one")
    pipeline.save_lora_weights(tmp_path / "saved")
    again = tiny_pipeline()
    again.load_lora_weights(tmp_path / "saved")
    torch.testing.assert_close(generate(again), generate(other))


def test_tensors_that_are_swapped_in_have_alpha_equal_to_their_rank(pipeline, folder, tmp_path):
    tensors = {f"unet.{name}": value for name, value in get_peft_model_state_dict(with_adapter(seed=1).unet).items()}
    expected = tiny_pipeline()
    expected.load_lora_weights(tensors)
    pipeline.load_lora_weights(folder, adapter_name="one")
    pipeline.load_lora_weights(tensors, adapter_name="one", hotswap=True)
    pipeline.save_lora_weights(tmp_path)
    again = tiny_pipeline()
    again.load_lora_weights(tmp_path)
    torch.testing.assert_close(generate(again), generate(expected))
