"""Models on the Hugging Face Hub: what of a folder is shared, its card, the code to load it with, and the upload."""

from .cards import NO_AUDIT, render_card
from .contents import Contents, inspect_folder
from .push import Pushed, push_folder


__all__ = ["NO_AUDIT", "Contents", "Pushed", "inspect_folder", "push_folder", "render_card"]
