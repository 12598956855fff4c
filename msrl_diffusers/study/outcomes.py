"""What a run of a study came to, as files in its folder: its report, or why it was refused (rewards below their floors, say)."""

import json
from pathlib import Path

from ..files import write_json
from .chain import fingerprint, finished_fingerprint
from .config import StudyConfig


def begin_run(config: StudyConfig) -> None:
    """Before a run is tried: why an earlier try was refused no longer holds, and a report of other settings is outdated. It stays:
    who goes back to those settings has it again."""
    run, found = Path(config.output_dir), finished_fingerprint(config, "report")
    (run / "refused.json").unlink(missing_ok=True)
    if found in (None, fingerprint(config, "report")):
        (run / "outdated.json").unlink(missing_ok=True)
    else:
        write_json(run / "outdated.json", {"report": found})


def end_run(config: StudyConfig) -> None:
    """After it: the report is its own, whatever was there before."""
    (Path(config.output_dir) / "outdated.json").unlink(missing_ok=True)


def record_refusal(run: Path, sentence: str) -> None:
    """Write why a run was refused."""
    write_json(run / "refused.json", {"sentence": sentence})


def outcome(run: Path) -> dict | str | None:
    """The report of a run, or the sentence why it was refused; None if it is not at its end."""
    if refusal := _read(run / "refused.json"):
        return refusal["sentence"]
    outdated, record = _read(run / "outdated.json"), _read(run / "report" / "stage.json")
    if outdated and record and outdated["report"] == record["fingerprint"]:
        return None
    return _read(run / "report.json")


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None
