"""Adapters inside a network: which it carries, whether they have learned anything; it is not saved with them."""

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import InputError


def uncompiled(network: torch.nn.Module) -> torch.nn.Module:
    """The network that `torch.compile` has wrapped, or `network` itself: layers of the wrapper have other names."""
    return getattr(network, "_orig_mod", network)


def carried_adapters(network: torch.nn.Module) -> str:
    """Names of the adapters in a network, for a sentence: `"one, two"`; `"(deleted)"` where only their layers are left,
    and `""` where there is none."""
    if not any(isinstance(layer, BaseTunerLayer) for layer in network.modules()):
        return ""
    return ", ".join(sorted(getattr(network, "peft_config", {}))) or "(deleted)"


def carries_fresh_adapters(network: torch.nn.Module) -> bool:
    """Whether there are adapters in a network, and all are LoRA whose B is still zero (arXiv 2106.09685, section 4.1):
    with them it computes what it did without."""
    layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    return bool(layers and getattr(network, "peft_config", {})) and all(
        isinstance(layer, LoraLayer)
        and not any(value.any() for part in (layer.lora_B, layer.lora_embedding_B) for value in part.parameters())
        for layer in layers
    )


def refuse_to_save(network: torch.nn.Module, write_apart: str, unload: str) -> None:
    """Saved weights of a denoiser with an adapter in it have other names, and load as newly initialized layers.

    Args:
        network: the denoiser.
        write_apart, unload: what the methods are called that write its adapter and take it out.

    Raises:
        InputError: it carries an adapter.
    """
    names = carried_adapters(network)
    if names:
        raise InputError(
            f"The denoiser carries the LoRA adapter {names} and can't be saved with it: write the adapter apart with "
            f"{write_apart}(FOLDER), or keep it by fuse_lora(), then {unload}()."
        )
