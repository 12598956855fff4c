"""Command lines of `msrl` and of the example scripts: dataclasses by TRL's parser, with a YAML file behind `--config`."""

import sys
import types
import typing
from argparse import (
    SUPPRESS,
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentTypeError,
    RawDescriptionHelpFormatter,
)
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import yaml
from trl import TrlParser

from .errors import InputError


CONFIG_HELP = {"config": "YAML file of the study; options stand above what it says."}


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of the description, which holds examples, as they are."""


class _Parser(TrlParser):
    """TRL's parser; what is wrong with a command line is one sentence instead of the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[:1].upper()}{message[1:]}; --help shows the options.")


class _Taken(Action):
    """An option that `--help` lists; whoever wants it takes it (`take_option`) before the parser sees it."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise InputError(f"{option_string} must be written out, and may need others beside it; --help shows how.")


def is_given(option: str, arguments: Sequence[str]) -> bool:
    """Whether a command line names an option, in any spelling that the parser takes: with hyphens, or its beginning alone."""
    words = [argument.split("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")]
    return any(len(word) > 2 and f"__{option}".startswith(word) for word in words)


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file.

    Raises:
        InputError: no such file, no YAML, or no mapping at its top.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Config {path} can't be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"Config {path} is no valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise InputError(f"Config {path} must be a mapping of field names to values.")
    return content


def check_known(config: Mapping, known: Collection[str]) -> None:
    """Raise InputError for a field of a YAML file that is none of `known`."""
    unknown = [field for field in config if field not in known]
    if unknown:
        raise InputError(f"The config has the unknown field {str(unknown[0])!r}; it may have {sorted(known)}.")


def parse(
    config_classes: Sequence[type],
    defaults: dict | None = None,
    arguments: Sequence[str] | None = None,
    positionals: Sequence[str] = (),
    prog: str | None = None,
    description: str | None = None,
    taken: Mapping[str, str] | None = None,
) -> tuple:
    """Instances of `config_classes` from the command line. `defaults` (from a YAML file) stand behind it. The fields
    `positionals` are given in that order, without a name. `--help` shows `prog` (the command, as it is typed) and
    `description` with its lines as they are, so that it can hold examples, and also the options `taken` out of the command
    line before, `{name: help}`. A mapping is written as in YAML or JSON, and stands for the whole one of `defaults`.

    Raises:
        InputError: an option that does not exist, or one that is missing; a default that no class has a field for; a value
            that the parser or a class refuses.
    """
    parser = _Parser(list(config_classes), prog=prog, description=description, formatter_class=_HelpFormatter)
    known = {name for config_class in config_classes for name in config_class.__dataclass_fields__}
    check_known(defaults or {}, known)
    parser.set_defaults(**_readable(config_classes, defaults or {}))
    for action in parser._actions:
        if action.dest in (defaults or {}):  # what the file says is not required any more
            action.required = False
        if action.type is dict:
            action.type = _mapping
    for name in positionals:  # TRL's parser makes options only
        action = parser._option_string_actions[f"--{name}"]
        for flag in action.option_strings:
            del parser._option_string_actions[flag]
        action.container._remove_action(action)
        parser.add_argument(name, metavar=name.upper(), type=action.type, help=action.help)
    for name, text in (taken or {}).items():
        parser.add_argument(f"--{name}", action=_Taken, default=SUPPRESS, help=text)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _check_options(arguments, sorted(parser._option_string_actions))  # before the parser misses a required one
    if positionals:
        arguments = _with_flags_closed(arguments, parser)
    *configs, rest = parser.parse_args_into_dataclasses(args=arguments, return_remaining_strings=True)
    if rest:
        raise InputError(f"No option takes {rest[0]!r}; --help shows the options.")
    return tuple(configs)


def _mapping(text: str) -> dict:
    """A mapping on the command line, such as `{a: 1}` or `{"a": 1}`."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"needs a mapping such as {{name: value}}, got {text!r}")
    return value


def _with_flags_closed(arguments: Sequence[str], parser: _Parser) -> list[str]:
    """The command line with `--flag=true` for a flag before a word that is neither yes nor no: the parser would take a positional
    for its value."""
    options, closed = parser._option_string_actions, list(arguments)
    for place, (word, following) in enumerate(pairwise(arguments)):
        if word == "--":  # what follows are values
            break
        names = [word] if word in options else [name for name in options if name.startswith(word)]
        flags = [options[name] for name in names if options[name].nargs == "?" and options[name].const is True]
        if not word.startswith("--") or not flags or len(flags) < len(names):
            continue
        try:
            flags[0].type(following)
        except ArgumentTypeError:
            closed[place] = f"{word}=true"
    return closed


def _check_options(arguments: Sequence[str], known: Sequence[str]) -> None:
    """Raise InputError for an option that is neither known nor the beginning of one that is."""
    for argument in arguments:
        option = argument.split("=")[0]
        if option == "--":  # what follows are values
            return
        if not option.startswith("--") or any(name.startswith(option) for name in known):
            continue
        words = [name[2:] for name in known if name.startswith("--") and "-" not in name[2:]]  # not --max-steps
        close = get_close_matches(option[2:].replace("-", "_"), words, 1)
        remedy = f"did you mean --{close[0]}?" if close else "--help shows the options."
        raise InputError(f"There is no option {option}; {remedy}")


def _readable(config_classes: Sequence[type], defaults: dict) -> dict:
    """The defaults with words where numbers belong refused (the parser would end with its usage), and YAML's `1e-4`,
    which is a word to YAML, read as a number."""
    readable = dict(defaults)
    for config_class in config_classes:
        for name, hint in typing.get_type_hints(config_class).items():
            options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            value = defaults.get(name)
            if not isinstance(value, str) or str in options:
                continue
            try:
                readable[name] = float(value) if float in options else None
            except ValueError:
                readable[name] = None
            if readable[name] is None:
                names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
                raise InputError(f"{config_class.__name__}: {name} must be {names}, got {value!r}.")
    return readable


def take_option(name: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE` and the arguments without it."""
    rest, value, flag = [], None, f"--{name}"
    iterator = iter(arguments)
    for argument in iterator:
        if argument == flag:
            value = next(iterator, None)
            if value is None:
                raise InputError(f"{flag} needs a value.")
        elif argument.startswith(flag + "="):
            value = argument[len(flag) + 1 :]
        else:
            rest.append(argument)
    return value, rest
