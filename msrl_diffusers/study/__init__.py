"""The paper as a chain of resumable stages, each with its own folder and fingerprint."""

from .chain import STAGES, run_study
from .config import StudyConfig


__all__ = ["STAGES", "StudyConfig", "run_study"]
