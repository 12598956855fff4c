"""The page `msrl_diffusers/API.md`: every public name with its signature and docstring, made from the code.

    python -m msrl_diffusers.cli.api_page

Signatures are read from the source, as they are written there, so that the page does not depend on versions of Python and of
other packages. Methods are those that this package defines; what diffusers' base classes bring is documented there.
"""

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from ..files import write_text


PACKAGE = __package__.partition(".")[0]
PAGE = Path(__file__).parents[1] / "API.md"
COMMAND = f"python -m {__package__}.api_page"
WIDTH = 110  # of a signature on one line
FORMULAS = "functional"
GROUPS = {  # folders, in the order of the README's layout
    "pipelines": ("Pipelines", "An ordinary diffusers pipeline, and sampling from it."),
    "models": ("Models", "Networks with `save_pretrained`, `from_pretrained` and `push_to_hub`."),
    "data": ("Data", "Loaders, phantoms, prompts, the processor that knows axes and affines, splits by subject."),
    "policies": ("Policies", "A pipeline as a Markov decision process."),
    "rewards": ("Rewards", "From samples and their conditions to one number per sample, higher is better."),
    "evaluation": ("Evaluation", "Distances, validity of rewards, copies of training volumes."),
    "trainers": ("Trainers", "One config and one visible loop each."),
    "study": ("Study", "The paper as a chain of stages."),
    "text_to_image": ("Text to image", "The method of RL4Med-DDPO as a chain of stages."),
    "hub": ("Hub", "Cards, and what of a folder is shared."),
    FORMULAS: ("Formulas", "Pure functions on tensors. `from msrl_diffusers.functional.MODULE import NAME`"),
}
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Example):\s*")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A heading of the page: a public class or function, or a method of one.

    Attributes:
        name: as it is called, `CLASS.METHOD` for methods.
        module: where it is defined, under this package.
        signature: as it is written in the source, without `self`; of a class that of its constructor, of a property its type.
        docstring: its own, or that of a class of this package from which it is inherited; `""` where there is none.
        fields: of a dataclass, a row of the table each.
        level: of the heading.
    """

    name: str
    module: str
    signature: str
    docstring: str
    fields: tuple[str, ...] = ()
    level: int = 3


def entries() -> dict[str, list[Entry]]:
    """All entries of the page by group, classes followed by their methods.

    Public names stand in the order of `__all__`, formulas in that of their modules.
    """
    package = import_module(PACKAGE)
    found = {folder: [] for folder in GROUPS}
    for name in package.__all__:
        thing = getattr(package, name)
        if not _is_own(thing):
            continue  # base classes of diffusers
        folder = thing.__module__.split(".")[1]
        if folder != FORMULAS:
            found[folder] += _entries_of(name, thing)
    formulas = import_module(f"{PACKAGE}.{FORMULAS}")
    for info in iter_modules(formulas.__path__):
        module = import_module(f"{formulas.__name__}.{info.name}")
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", None) == module.__name__ and not name.startswith("_"):
                found[FORMULAS] += _entries_of(name, thing)
    return found


def page() -> str:
    """The whole page."""
    contents, body = [], []
    for folder, found in entries().items():
        title, purpose = GROUPS[folder]
        contents.append(f"- [{title}](#{anchor(title)})")
        body += [f"## {title}", purpose]
        module = None
        for entry in found:
            if folder == FORMULAS and entry.module != module:
                module = entry.module
                contents.append(f"  - `{module}`")
                body += [f"**`{module}`**", markdown(inspect.getdoc(sys.modules[f"{PACKAGE}.{module}"]))]
            if entry.level == 3:
                indent = "    " if folder == FORMULAS else "  "
                contents.append(f"{indent}- [{entry.name}](#{anchor(entry.name)})")
            body += _section(entry)
    head = [
        f"# API of {PACKAGE}",
        f"Made from the code by `{COMMAND}`: do not edit. Public names are imported from `{PACKAGE}`. Shape letters: B batch, "
        "C channels, D, H, W axes of a volume (inferior to superior, posterior to anterior, left to right), *S* spatial axes.",
        "## Contents",
        "\n".join(contents),
    ]
    return "\n\n".join(part for part in head + body if part) + "\n"


def anchor(heading: str) -> str:
    """What GitHub calls the anchor of a heading, with code in it or without."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def markdown(docstring: str) -> str:
    """A docstring, cleaned of its indentation, as Markdown: sections as lists, examples as code."""
    blocks, lines = [], docstring.splitlines()
    while lines:
        heading = SECTION.fullmatch(lines[0])
        if heading is None:
            end = next((i for i, line in enumerate(lines) if i and SECTION.fullmatch(line)), len(lines))
            blocks.append(_prose(lines[:end]))
        else:
            end = next((i for i, line in enumerate(lines) if i and line and not line.startswith(" ")), len(lines))
            content = textwrap.dedent("\n".join(lines[1:end])).strip("\n")
            if heading[1] == "Returns":
                blocks.append(f"**Returns**\n\n{_escaped(content)}")
            elif heading[1] == "Example":
                blocks.append(f"**Example**\n\n```python\n{content}\n```")
            else:
                blocks.append(f"**{heading[1]}**\n\n" + "\n".join(_items(content)))
        lines = lines[end:]
    return "\n\n".join(filter(None, blocks))


def main() -> None:
    """Write the page."""
    write_text(PAGE, page())
    sys.stdout.write(f"{PAGE}\n")


# ------------------------------------------------------------------------------------------------------------- entries


def _is_own(thing) -> bool:
    return thing.__module__.startswith(f"{PACKAGE}.")


def _entries_of(name: str, thing) -> Iterator[Entry]:
    """The entry of a class or function, and those of its public methods, with inherited ones of this package."""
    module = thing.__module__.removeprefix(f"{PACKAGE}.")
    if not isinstance(thing, type):
        definition = _definition(thing)
        yield Entry(name, module, _call(name, definition), ast.get_docstring(definition) or "")
        return
    bases = [_definition(base) for base in thing.__mro__ if _is_own(base)]
    yield Entry(
        name, module, _constructor(name, thing, bases), ast.get_docstring(bases[0]) or "", _fields(thing, bases)
    )
    seen = set()
    for base in bases:
        for method in base.body:
            public = isinstance(method, ast.FunctionDef) and (method.name == "__call__" or method.name[0] != "_")
            if public and method.name not in seen:
                seen.add(method.name)
                full = f"{name}.{method.name}"
                signature = _property(full, method) if _is_property(method) else _call(full, method)
                yield Entry(full, module, signature, _method_docstring(method.name, bases), level=4)


def _definition(thing) -> ast.FunctionDef | ast.ClassDef:
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def _methods(name: str, bases: Sequence[ast.ClassDef]) -> Iterator[ast.FunctionDef]:
    """Definitions of a method, from the class itself to its bases."""
    return (node for base in bases for node in base.body if isinstance(node, ast.FunctionDef) and node.name == name)


def _method_docstring(name: str, bases: Sequence[ast.ClassDef]) -> str:
    return next(filter(None, map(ast.get_docstring, _methods(name, bases))), "")


def _is_property(method: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).endswith("property") for decorator in method.decorator_list)


# ---------------------------------------------------------------------------------------------------------- signatures


def _constructor(name: str, cls: type, bases: Sequence[ast.ClassDef]) -> str:
    constructor = next(_methods("__init__", bases), None)
    if dataclasses.is_dataclass(cls):
        return f"class {name}(...)  # a dataclass of the fields below"
    if issubclass(cls, tuple):
        return f"class {name}({', '.join(cls._fields)})"
    return _call(f"class {name}", constructor).removesuffix(" -> None") if constructor else f"class {name}()"


def _property(name: str, method: ast.FunctionDef) -> str:
    return f"{name}: {ast.unparse(method.returns)}" if method.returns else name


def _call(name: str, function: ast.FunctionDef) -> str:
    """`name(arguments) -> type`, on one line or with one argument on each."""
    parts = _arguments(function.args)
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    line = f"{name}({', '.join(parts)}){returns}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def _arguments(arguments: ast.arguments) -> list[str]:
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    parts = [_argument(*pair) for pair in zip(plain, defaults, strict=True)]
    if plain and plain[0].arg in ("self", "cls"):
        parts = parts[1:]
    if arguments.vararg:
        parts.append("*" + _argument(arguments.vararg))
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [_argument(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return parts + (["**" + _argument(arguments.kwarg)] if arguments.kwarg else [])


def _argument(argument: ast.arg, default: ast.expr | None = None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    equals = " = " if annotation else "="
    return f"{argument.arg}{annotation}" + (f"{equals}{ast.unparse(default)}" if default is not None else "")


def _fields(cls: type, bases: Sequence[ast.ClassDef]) -> tuple[str, ...]:
    """Rows of a table: the fields of a dataclass with their types, as they are written, defaults and help."""
    if not dataclasses.is_dataclass(cls):
        return ()
    types = {}
    for node in (node for base in reversed(bases) for node in base.body if isinstance(node, ast.AnnAssign)):
        types[node.target.id] = ast.unparse(node.annotation).replace("|", "\\|")
    rows = []
    for item in dataclasses.fields(cls):
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        shown = "required" if default is dataclasses.MISSING else f"`{default!r}`".replace("|", "\\|")
        rows.append(f"| `{item.name}` | `{types[item.name]}` | {shown} | {_escaped(item.metadata.get('help', ''))} |")
    return tuple(rows)


# ------------------------------------------------------------------------------------------------------------ Markdown


def _section(entry: Entry) -> list[str]:
    table = ("| field | type | default | |", "|---|---|---|---|", *entry.fields) if entry.fields else ()
    code = f"```python\n{entry.signature}\n```"
    return [f"{'#' * entry.level} `{entry.name}`", code, markdown(entry.docstring), "\n".join(table)]


def _items(content: str) -> list[str]:
    """The entries of a section, one line each."""
    items = []
    for line in content.splitlines():
        if items and (line.startswith(" ") or not line):
            items[-1] += f" {line.strip()}"
        else:
            items.append(line.strip())
    return [f"- {_escaped(item.strip())}" for item in items]


def _prose(lines: list[str]) -> str:
    """Paragraphs, and indented formulas as they are."""
    paragraphs = "\n".join(lines).strip("\n").split("\n\n")
    return "\n\n".join(part if part.startswith("    ") else _escaped(part) for part in paragraphs)


def _escaped(text: str) -> str:
    """Without what Markdown would take for HTML, outside of code."""
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;") for part in re.split(r"(`[^`]*`)", text)
    )


if __name__ == "__main__":
    main()
