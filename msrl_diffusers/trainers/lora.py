"""A LoRA adapter in the UNet of a diffusers pipeline: saved apart, merged. `tuned_weights.add_lora` puts it in."""

import os
import tempfile
from pathlib import Path

import torch
from peft.utils import get_peft_model_state_dict


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers' load_lora_weights looks for


def save_lora(pipeline, folder: str | Path) -> Path:
    """Write the adapter of `pipeline.unet` to `folder/pytorch_lora_weights.safetensors`, whole or not at all.

    Returns the file.

    Plain diffusers loads it by `pipeline.load_lora_weights(folder)`.
    """
    # by PEFT's names: diffusers' older ones exist for attention alone, and of a file with both it loads one half
    layers = {
        name: value.detach().cpu().float().contiguous()
        for name, value in get_peft_model_state_dict(pipeline.unet, unwrap_compiled=True).items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        type(pipeline).save_lora_weights(temporary, unet_lora_layers=layers)
        os.replace(Path(temporary) / LORA_FILE, folder / LORA_FILE)
    return folder / LORA_FILE


def merge_lora(unet: torch.nn.Module) -> None:
    """Add the adapter to the weights beside it and remove it: a pipeline saved with one inside loads without."""
    unet.fuse_lora()
    unet.unload_lora()
