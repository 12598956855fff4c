"""Reports: the three files say the same, hold on their own, and take text literally."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.page import NOTICE, Figure, write_report
from msrl_diffusers.plots import plot_volumes


HOSTILE = "<script>alert('x')</script> | *a* & \"b\" `c` [d](http://e) \x1b"


class Page(HTMLParser):
    """Tags with their attributes, and the text of every tag."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], {}
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


@pytest.fixture
def figure(tmp_path):
    path = tmp_path / "out" / "a figure.png"
    plot_volumes({"x": torch.zeros(1, 1, 8, 8, 8)}, path)
    return path


def written(folder, stem="report"):
    return {ending: (folder / f"{stem}.{ending}").read_text(encoding="utf-8") for ending in ("json", "md", "html")}


def test_the_three_files(tmp_path, figure):
    out = figure.parent
    table = [["name", "value", "flag"], ["one", 0.123456, True], ["two", 7, None]]
    sections = [
        ("Findings", "First\nparagraph.\n\nSecond paragraph.", table),
        ("Picture", Figure(figure, "A black square.", "One volume.")),
        ("Plain", figure),
    ]
    write_report(out, "report", "A report", {"value": 0.123456, "names": ["é"]}, sections)
    files = written(out)
    assert json.loads(files["json"]) == {"value": 0.123456, "names": ["é"]}
    assert files["md"].split("\n\n") == [
        "# A report",
        NOTICE,
        "## Findings",
        "First paragraph.",
        "Second paragraph.",
        "| name | value | flag |\n| --- | --- | --- |\n| one | 0.1235 | yes |\n| two | 7 |  |",
        "## Picture",
        "![A black square.](a%20figure.png)",
        "One volume.",
        "## Plain",
        "![Plain](a%20figure.png)\n",
    ]
    page = Page(files["html"])
    assert page.texts["h1"] == ["A report"]
    assert page.texts["h2"] == ["Findings", "Picture", "Plain"]
    assert page.texts["p"] == [NOTICE, "First paragraph.", "Second paragraph."]
    assert page.texts["th"] == ["name", "value", "flag", "one", "two"]
    assert page.texts["td"] == ["0.1235", "yes", "7"]
    assert page.texts["figcaption"] == ["One volume."]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == ["A black square.", "Plain"]
    assert base64.b64decode(images[0]["src"].removeprefix("data:image/png;base64,")) == figure.read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["a figure.png", "report.html", "report.json", "report.md"]


def test_the_page_is_accessible_and_needs_nothing_else(figure):
    write_report(figure.parent, "report", "T", {}, [("S", [["a", "b"], [1, 2]], figure)])
    html = written(figure.parent)["html"]
    page = Page(html)
    assert ("html", {"lang": "en"}) in page.tags
    assert all(tag not in ("script", "link", "iframe", "object") for tag, _ in page.tags)
    assert not re.search(r"https?://|//[a-z]|url\(|@import", html)
    scopes = [attributes.get("scope") for tag, attributes in page.tags if tag == "th"]
    assert scopes == ["col", "col", "row"]
    assert "default-src 'none'" in html
    assert html.count(NOTICE) == 2
    for medium in ("prefers-color-scheme: dark", "@media print"):
        assert medium in html


def test_text_is_taken_literally(tmp_path, figure):
    sections = [(HOSTILE, HOSTILE, [[HOSTILE, "b"], [HOSTILE, "1. x\n\n# y"]], Figure(figure, HOSTILE, HOSTILE))]
    write_report(tmp_path, "report", HOSTILE, {"text": HOSTILE}, sections)
    files = written(tmp_path)
    assert json.loads(files["json"])["text"] == HOSTILE
    page = Page(files["html"])
    shown = HOSTILE.replace("\x1b", "\ufffd")
    assert all(tag not in ("script", "a") for tag, _ in page.tags)
    for tag in ("title", "h1", "h2", "p", "th", "figcaption", "caption"):
        assert "".join(page.texts[tag]).count(shown) >= 1, tag
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"] == [shown]
    for line in files["md"].split("\n"):
        bare = re.sub(r"\\.", "", line)
        assert not re.search(r"[<`&]", bare)
        assert bare.count("|") in (0, 3)
    assert "1\\. x \\# y" in files["md"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sub-01_T1w.nii", "sub-01_T1w.nii"),
        ("_a_", "\\_a\\_"),
        ("- a", "\\- a"),
        ("12) b", "12\\) b"),
        ("1.5 mm", "1.5 mm"),
        ("---", "\\---"),
        ("-2.5", "-2.5"),
    ],
)
def test_markdown_escapes_no_more_than_it_must(tmp_path, text, shown):
    write_report(tmp_path, "report", "T", {}, [("S", text)])
    assert written(tmp_path)["md"].endswith(f"\n\n{shown}\n")


@pytest.mark.parametrize(
    ("content", "block", "error", "message"),
    [
        ({"x": float("nan")}, "fine", ValueError, "JSON compliant"),
        ({}, [["a", "b"], [1]], ValueError, "table of 'S'"),
        ({}, "missing.png", InputError, r"missing\.png can't be read"),
        ({}, "text.png", InputError, r"text\.png is no PNG image"),
    ],
)
def test_bad_reports_leave_nothing(tmp_path, content, block, error, message):
    (tmp_path / "text.png").write_text("no image")
    if isinstance(block, str) and block.endswith(".png"):
        block = tmp_path / block
    with pytest.raises(error, match=message):
        write_report(tmp_path / "out", "report", "T", content, [("S", block)])
    assert not (tmp_path / "out").exists()
