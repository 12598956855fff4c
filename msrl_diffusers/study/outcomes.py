"""What a run of a study came to, as files in its folder: its report, or why it was refused (rewards below their floors, say)."""

import json
from pathlib import Path

from ..files import write_json
from .chain import fingerprint
from .config import StudyConfig


def expect(config: StudyConfig) -> None:
    """Write what the run is to come to, before it is tried: until then a report of other settings in its folder is not its own, and
    why an earlier try was refused no longer holds."""
    run = Path(config.output_dir)
    (run / "refused.json").unlink(missing_ok=True)
    write_json(run / "expected.json", {"report": fingerprint(config, "report")})


def record_refusal(run: Path, sentence: str) -> None:
    """Write why a run was refused."""
    write_json(run / "refused.json", {"sentence": sentence})


def outcome(run: Path) -> dict | str | None:
    """The report of a run, or the sentence why it was refused; None if it is not at its end."""
    if refusal := _read(run / "refused.json"):
        return refusal["sentence"]
    expected = _read(run / "expected.json")
    if expected and expected["report"] != (_read(run / "report" / "stage.json") or {}).get("fingerprint"):
        return None
    return _read(run / "report.json")


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None
