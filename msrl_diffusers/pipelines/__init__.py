"""Pipelines: ordinary diffusers pipelines, which know nothing of reinforcement learning."""
