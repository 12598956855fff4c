"""A tiny pipeline with a LoRA adapter, and what it generates."""

import torch
from peft import LoraConfig
from tiny import tiny_pipeline

from msrl_diffusers.trainers.tuned_weights import LORA_TARGETS


FILE = "pytorch_lora_weights.safetensors"
START = torch.randn(1, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def generate(pipeline):
    return pipeline([1], num_inference_steps=2, eta=0.0, latents=START, output_type="latent").volumes


def with_adapter(seed=0, name="default", pipeline=None, **config):
    """A tiny pipeline with an adapter that has been trained, as it were."""
    pipeline = pipeline or tiny_pipeline()
    config = {"r": 2, "lora_alpha": 6, "target_modules": LORA_TARGETS, **config}
    pipeline.unet.add_adapter(LoraConfig(**config), name)
    torch.manual_seed(seed)
    for parameter_name, parameter in pipeline.unet.named_parameters():
        if f"lora_B.{name}" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    pipeline.unet.eval()
    return pipeline
