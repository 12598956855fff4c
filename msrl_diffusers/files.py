"""Writing files whole: under a temporary name first, then renamed, so a killed run leaves no half of one."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path


TABLES = (".csv", ".tsv", ".json")  # a label that was corrected far down counts


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
    """Hash of the names, sizes and first 256 KiB of the files of a folder, tables whole, those behind links to folders too. Cards
    and other README.md do not count: no result depends on them."""
    folder = Path(folder).absolute()  # a relative path may mean another one by the next call
    return files_mark(sorted(path for path in _files_below(folder, frozenset()) if path.name != "README.md"), folder)


def files_mark(paths: Iterable[Path], folder: Path) -> str:
    """Hash of the names, as seen from `folder`, sizes and first 256 KiB of files, tables whole."""
    files = []
    for path in paths:
        stat = path.stat()
        files.append((f"{os.path.relpath(path, folder)} {stat.st_size}\n", path, stat.st_mtime_ns))
    return _mark(tuple(files), 1 << 18)


def _files_below(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """The files of a folder and those below, of folders that can be read; hidden ones, which editors and systems come and go with, are
    nobody's input. `above` are the folders on the way, to which a link may lead back."""
    here = folder.resolve()
    if here in above or not os.access(folder, os.R_OK | os.X_OK):
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if os.path.isdir(path):  # of a link into a closed folder Path.is_dir raises
            yield from _files_below(path, above | {here})
        elif os.path.isfile(path):
            yield path


def file_mark(path: str | Path) -> str:
    """Hash of the size and the first MiB of a file, all of a table."""
    path = Path(path).absolute()
    stat = path.stat()
    return _mark(((str(stat.st_size), path, stat.st_mtime_ns),), 1 << 20)


@lru_cache
def _mark(files: tuple[tuple[str, Path, int], ...], num_bytes: int) -> str:
    """Hash of the title (with the size) and the first `num_bytes` of every file, all of a table. The times are there for the cache: a plan of
    many runs asks for the same files hundreds of times, and those that keep size and time are read once."""
    digest = hashlib.sha256()
    for title, path, _ in files:
        digest.update(title.encode())
        try:
            with path.open("rb") as file:
                digest.update(file.read(-1 if path.suffix.lower() in TABLES else num_bytes))
        except PermissionError:
            digest.update(b"not readable")  # whoever needs the file says so
    return digest.hexdigest()[:16]
