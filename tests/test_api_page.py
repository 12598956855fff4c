"""The API page is that of the code, and every public name on it is explained."""

import re

import pytest

import msrl_diffusers
from msrl_diffusers.cli import api_page


@pytest.fixture(scope="module")
def entries():
    return [entry for found in api_page.entries().values() for entry in found]


def test_the_page_is_made_from_the_code():
    text = api_page.PAGE.read_text(encoding="utf-8")
    assert text == api_page.page(), f"run {api_page.COMMAND}"


def test_every_public_name_is_on_the_page_and_explained(entries):
    names = {entry.name for entry in entries if entry.level == 3}
    assert set(msrl_diffusers.__all__) - names == {"ModelMixin", "SchedulerMixin"}  # of diffusers
    assert {"frechet_influence", "ppo_clip_loss", "nearest_code"} <= names
    assert not [entry.name for entry in entries if not entry.docstring]


def test_formulas_that_take_tensors_give_their_shapes(entries):
    lacking = [
        entry.name
        for entry in entries
        if entry.module.startswith("functional.")
        and "torch.Tensor" in entry.signature.partition("->")[0]
        and not re.search(r"\[[^\]]*\]", entry.docstring)
    ]
    assert not lacking


def test_links_lead_to_headings():
    text = api_page.PAGE.read_text(encoding="utf-8")
    headings = [api_page.anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    links = re.findall(r"\]\(#([^)]+)\)", text)
    assert len(links) > 100
    assert set(links) <= set(headings)
    assert len(set(headings)) == len(headings)


def test_signatures_are_those_of_the_source(entries):
    by_name = {entry.name: entry for entry in entries}
    assert by_name["ppo_clip_loss"].signature.startswith("ppo_clip_loss(\n    log_prob: torch.Tensor,\n")
    assert by_name["MedVolumePipeline.id2label"].signature == "MedVolumePipeline.id2label: dict[int, str]"
    call = by_name["MedVolumePipeline.__call__"].signature
    assert "    guidance_scale: float = 1.0,\n" in call
    assert "self" not in call
    assert by_name["StepMoments"].signature == "class StepMoments(mean, std)"
    assert by_name["UNet3DModel"].signature.startswith("class UNet3DModel(\n    sample_size: int | None = None,\n")
    assert "MedVolumePipeline.load_lora_weights" in by_name  # of a base class of this package
    assert "MedVolumePipeline.to" not in by_name  # of diffusers
    row = next(row for row in by_name["DiffusionPPOConfig"].fields if row.startswith("| `max_steps` "))
    assert row == "| `max_steps` | `int` | `100` | Number of rollouts, each followed by its updates. |"


def test_docstrings_as_markdown():
    docstring = """Shapes `[B, <C>]` and <C>.

    formula = 1

Args:
    one: the first
        of two.
    two: the <other>.

Returns:
    A list of
    - `x`: y.

Example:
    >>> run()

Raises:
    ValueError: never."""
    assert api_page.markdown(docstring).splitlines() == [
        "Shapes `[B, <C>]` and &lt;C>.", "", "    formula = 1", "",
        "**Args**", "", "- one: the first of two.", "- two: the &lt;other>.", "",
        "**Returns**", "", "A list of", "- `x`: y.", "",
        "**Example**", "", "```python", ">>> run()", "```", "",
        "**Raises**", "", "- ValueError: never.",
    ]  # fmt: skip
