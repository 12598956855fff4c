"""Reports: the same findings as JSON for tools, as Markdown, and as one HTML page that needs no other file."""

import base64
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined

from ..errors import InputError
from ..files import write_text


NOTICE = "Not for clinical use."
PNG = b"\x89PNG\r\n\x1a\n"
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Figure:
    """A PNG image in a report.

    Attributes:
        path (`Path`): the file.
        alt (`str`): what it shows, for those who can't see it.
        caption (`str`): printed under it.
    """

    path: str | Path
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class _Block:
    """One piece of a section: paragraphs, a table whose first row is its header, or a figure with its bytes."""

    paragraphs: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figure: Figure | None = None
    image: str = ""


def write_report(
    output_dir: str | Path,
    stem: str,
    title: str,
    content: dict,
    sections: Sequence[tuple[str, str | Path | Figure | Sequence[Sequence[Cell]]]],
) -> None:
    """Write `{stem}.json`, `{stem}.md` and `{stem}.html` into `output_dir`, each whole or not at all.

    Text is taken literally: no HTML or Markdown in it has an effect. Figures are part of the HTML page; the Markdown
    page refers to their files.

    Args:
        output_dir: made if missing.
        stem: name of the files without their ending.
        title: heading of the pages.
        content: what the JSON holds, in plain Python.
        sections: a heading and one or more blocks each. A block is text (blank lines part paragraphs), the rows of a
            table (first the header; numbers are rounded to four digits), or a PNG file: a `Figure`, or a path, whose
            alternative text is then the heading.

    Raises:
        ValueError: content that JSON can't hold, such as NaN, or rows of unequal length.
        InputError: a figure that is missing or no PNG.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"  # before anything is written
    blocks = [(_clean(heading), [_block(heading, part) for part in parts]) for heading, *parts in sections]
    pages = {
        "json": text,
        "md": _markdown(_clean(title), blocks, Path(output_dir)),
        "html": HTML.render(title=_clean(title), notice=NOTICE, sections=blocks, stem=_clean(stem)),
    }
    for ending, page in pages.items():
        write_text(Path(output_dir) / f"{stem}.{ending}", page)


def _block(heading: str, part: str | Path | Figure | Sequence[Sequence[Cell]]) -> _Block:
    if isinstance(part, str):
        paragraphs = (" ".join(_clean(text).split()) for text in re.split(r"\n\s*\n", part))
        return _Block(paragraphs=[text for text in paragraphs if text])
    if isinstance(part, Path | Figure):
        figure = part if isinstance(part, Figure) else Figure(part, heading)
        figure = Figure(figure.path, _clean(figure.alt), _clean(figure.caption))
        return _Block(figure=figure, image=base64.b64encode(_read_png(Path(figure.path))).decode())
    rows = [[_cell(value) for value in row] for row in part]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"The table of {heading!r} needs a header and rows of its length.")
    return _Block(rows=rows)


def _read_png(path: Path) -> bytes:
    try:
        image = path.read_bytes()
    except OSError as error:
        raise InputError(f"The figure {path} can't be read: {error.strerror}.") from error
    if not image.startswith(PNG):
        raise InputError(f"The figure {path} is no PNG image; save it as one.")
    return image


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else " ".join(_clean(str(value)).split())


def _clean(text: str) -> str:
    """Control characters, which neither page may hold, made visible."""
    return CONTROL.sub("\ufffd", text)


def _markdown(title: str, sections: Sequence[tuple[str, Sequence[_Block]]], output_dir: Path) -> str:
    parts = [f"# {_escaped(title)}", NOTICE]
    for heading, blocks in sections:
        parts.append(f"## {_escaped(heading)}")
        for block in blocks:
            parts += [_escaped(paragraph) for paragraph in block.paragraphs]
            if block.rows:
                header, *rows = ([_escaped(cell) for cell in row] for row in block.rows)
                lines = [header, ["---"] * len(header), *rows]
                parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
            if block.figure:
                place = quote(Path(os.path.relpath(block.figure.path, output_dir)).as_posix())
                parts.append(f"![{_escaped(block.figure.alt)}]({place})")
                parts += [_escaped(block.figure.caption)] if block.figure.caption else []
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """Text that Markdown (GitHub's) shows as it is; underscores within words need nothing."""
    text = re.sub(r"([\\`*\[\]<>|#~&$]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return re.sub(r"^(\d*)([-+=.)])(?=[\s=-]|$)", r"\1\\\2", text)  # what begins a list or underlines a heading


HTML = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --text: #1b1f24; --back: #ffffff; --soft: #f3f5f7; --line: #c9d0d8; --note: #8a2b06; }
:root { color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ed; --back: #14171b; --soft: #1f242a; --line: #434b55; --note: #ffb38a; }
}
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; font: 1rem/1.55 system-ui, sans-serif;
  color: var(--text); background: var(--back); overflow-wrap: anywhere; }
h1 { line-height: 1.2; margin-bottom: 0.5rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.notice { color: var(--note); font-weight: 600; }
.table { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: 0.35rem 0.75rem; border: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { background: var(--soft); }
tbody th { font-weight: 500; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); }
figcaption, footer { font-size: 0.9rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 0.5rem; }
@media print {
  :root { --text: #000000; --back: #ffffff; --soft: #f3f5f7; --line: #999999; --note: #8a2b06; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .table { overflow: visible; }
}
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="notice">{{ notice }}</p>
{% for heading, blocks in sections %}
<section>
<h2>{{ heading }}</h2>
{% for block in blocks %}
{% for paragraph in block.paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
{% if block.rows %}
<div class="table" role="region" aria-label="{{ heading }}" tabindex="0">
<table>
<caption>{{ heading }}</caption>
<thead><tr>{% for cell in block.rows[0] %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in block.rows[1:] %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
{% if block.figure %}
<figure>
<img src="data:image/png;base64,{{ block.image }}" alt="{{ block.figure.alt }}">
{% if block.figure.caption %}
<figcaption>{{ block.figure.caption }}</figcaption>
{% endif %}
</figure>
{% endif %}
{% endfor %}
</section>
{% endfor %}
</main>
<footer>All values: {{ stem }}.json. {{ notice }}</footer>
</body>
</html>
"""
)
