"""Text-to-image: a Stable Diffusion made to show what prompts state, as a chain of resumable stages (RL4Med-DDPO)."""

from .chain import CHAIN
from .config import TextToImageStudyConfig


__all__ = ["CHAIN", "TextToImageStudyConfig"]
