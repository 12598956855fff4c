"""What a run of a study came to, as files in its folder: its report, or why it was refused (rewards below their floors, say)."""

import json
from pathlib import Path

from ..files import write_json
from .chain import fingerprint, finished_fingerprint
from .config import StudyConfig


def outcome(run: Path) -> dict | str | None:
    """The report of a run, or the sentence why it was refused; None if it is not at its end."""
    report, refusal = run / "report.json", run / "refused.json"
    if refusal.is_file():
        return json.loads(refusal.read_text())["sentence"]
    return json.loads(report.read_text()) if report.is_file() else None


def record_refusal(run: Path, sentence: str) -> None:
    """Write why a run was refused."""
    write_json(run / "refused.json", {"sentence": sentence})


def forget_outcome(config: StudyConfig) -> None:
    """Remove what an earlier try came to, before the run is tried again: why it was refused, and a report of other settings."""
    run = Path(config.output_dir)
    (run / "refused.json").unlink(missing_ok=True)
    if finished_fingerprint(config, "report") != fingerprint(config, "report"):
        (run / "report.json").unlink(missing_ok=True)
