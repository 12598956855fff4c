"""A tiny pipeline with any scheduler, and what it generates."""

import diffusers
import torch
from tiny import tiny_pipeline


DETERMINISTIC = [
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
]
STOCHASTIC = ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler"]
STEPS = 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def generate(pipeline, labels=(0, 1), **kwargs):
    """Latents by default: they are continuous, decoded volumes are of quantized ones."""
    defaults = {"num_inference_steps": STEPS, "generator": generator(), "output_type": "latent"}
    return pipeline(list(labels), **{**defaults, **kwargs}).volumes


START = torch.randn(2, 2, 8, 8, 8, generator=generator()).bfloat16().float()


def with_scheduler(name, **changes):
    pipeline = tiny_pipeline()
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **changes)
    return pipeline
