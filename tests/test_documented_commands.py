"""Everything that README.md and examples/README.md print to be typed is carried out as it is printed.

A command runs by bash in a folder that looks like a checkout and holds what its words name (`documented.Stage`): data sets
as tests/layouts.py writes them, tiny pipelines, a Hub on this machine. Where its cost is that of real sizes, files of the
checkout have small numbers there; the command has its own. Most `msrl` commands also run in this process, fast.
Whoever prints something new writes a scene for it in tests/scenes_of_*.py.
"""

import ast
import re
from contextlib import ExitStack

import pytest
import scenes_of_models  # noqa: F401 (registers its scenes)
import scenes_of_studies  # noqa: F401
from documented import (
    ROOT,
    Stage,
    blocks,
    commands,
    expressions,
    filled_in,
    mentions,
    read_pages,
)
from scenes import SCENES

from msrl_diffusers.cli import VERBS


# Warnings are errors here; these are of diffusers and huggingface_hub about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]

PAGES = read_pages()
TEXT = "\n".join(PAGES.values())


def printed() -> dict[str, str]:
    """What the pages print, by what its scene is called: what a test carries out."""
    found = {}
    for text in PAGES.values():
        found |= {command: filled_in(command) for command in commands(text)}
        found |= {expression: expression for expression in expressions(text)}
        for block in blocks(text, "python"):
            first = block.splitlines()[0]
            assert found.get(first, block) == block, f"two Python blocks begin with {first!r}"
            found[first] = block
    return found


PRINTED = printed()


def cases() -> list:
    """One test of each, and where its scene is played in this process too, another by bash."""
    found = []
    for name in PRINTED:
        known = SCENES.get(name)
        if known is None or known.here:
            found.append(pytest.param(name, True, id=name))
        if known is not None and (known.slow or not known.here):
            marks = [pytest.mark.timeout(known.timeout)] + [pytest.mark.slow] * known.slow
            found.append(pytest.param(name, False, id=f"bash: {name}", marks=marks))
    return found


@pytest.mark.parametrize(("name", "here"), cases())
def test_as_printed(name, here, tmp_path, monkeypatch):
    assert name in SCENES, f"A page prints {name!r}; write a scene that carries it out."
    with ExitStack() as stack:
        stage = Stage(tmp_path, PRINTED[name], here, monkeypatch, stack.enter_context)
        SCENES[name].play(stage)


def test_no_scene_is_left_over():
    assert set(SCENES) <= set(PRINTED), "no page prints these any more"


def test_what_is_mentioned_is_there():
    """Verbs, targets of make, and scripts that the pages name in passing; and files that they link to."""
    makefile = (ROOT / "Makefile").read_text()
    for mention in mentions(TEXT):
        program, *rest = mention.split()
        if program == "msrl":
            assert rest[0] in VERBS, mention
        elif program == "make":
            assert re.search(rf"^{re.escape(rest[0])}:", makefile, re.MULTILINE), mention
        else:
            assert (ROOT / "examples" / program).is_file(), mention
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"
        for name in re.findall(r"`((?:configs|accelerate_configs|benchmarks)/[\w./-]+)`", text):
            assert (ROOT / "examples" / name).exists(), f"{page} names {name}"


def test_extras_are_those_of_the_package():
    """`pip install` is not run: it would change the environment of the tests."""
    setup = ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    (extras,) = [node.value for node in setup if isinstance(node, ast.keyword) and node.arg == "extras_require"]
    named = re.findall(r"msrl_diffusers\[(\w+)\]|\bextra `(\w+)`", TEXT)
    assert named
    assert {one or other for one, other in named} <= set(ast.literal_eval(extras))


@pytest.mark.parametrize("page", PAGES)
def test_every_word_in_capitals_is_replaced(page):
    for command in commands(PAGES[page]):
        assert not re.search(r"(?<!\S)(P|OUT|DIR|CONFIG|RANK|ADDRESS)(?!\S)", filled_in(command)), command
