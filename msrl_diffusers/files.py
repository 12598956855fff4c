"""Writing files whole: under a temporary name first, then renamed, so a killed run leaves no half of one."""

import hashlib
import json
import os
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)


def write_json(path: str | Path, content) -> None:
    """Write `content` as indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def folder_mark(folder: str | Path) -> str:
    """Hash of the names, sizes and first 256 KiB of the files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 18))
    return digest.hexdigest()[:16]
