"""Command lines of the example scripts: dataclasses by TRL's parser, with a YAML file behind `--config`."""

import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml
from trl import TrlParser

from .errors import InputError


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file.

    Raises:
        InputError: no such file, no YAML, or no mapping at its top.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(f"Config {path} can't be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise InputError(f"Config {path} is no valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise InputError(f"Config {path} must be a mapping of field names to values.")
    return content


def parse(
    config_classes: Sequence[type],
    defaults: dict | None = None,
    arguments: Sequence[str] | None = None,
    positionals: Sequence[str] = (),
) -> tuple:
    """Instances of `config_classes` from the command line. `defaults` (from a YAML file) stand behind it. The fields
    `positionals` are given in that order, without a name.

    Raises:
        InputError: a default that no class has a field for, or a value a class refuses.
    """
    parser = TrlParser(list(config_classes))
    known = {name for config_class in config_classes for name in config_class.__dataclass_fields__}
    unknown = sorted(set(defaults or {}) - known)
    if unknown:
        raise InputError(f"The config has the unknown field {unknown[0]!r}; it may have {sorted(known)}.")
    parser.set_defaults(**_readable(config_classes, defaults or {}))
    for action in parser._actions:  # a field with a value from the file is not required any more
        if action.dest in (defaults or {}):
            action.required = False
    for name in positionals:  # TRL's parser makes options only
        action = parser._option_string_actions[f"--{name}"]
        for flag in action.option_strings:
            del parser._option_string_actions[flag]
        action.container._remove_action(action)
        parser.add_argument(name, metavar=name.upper(), type=action.type, help=action.help)
    return tuple(parser.parse_args_into_dataclasses(args=list(sys.argv[1:] if arguments is None else arguments)))


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
