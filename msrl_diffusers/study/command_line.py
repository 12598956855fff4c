"""From a command line to a StudyConfig: a YAML file, and options that override one section of it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..arguments import CONFIG_HELP, check_known, parse, read_yaml, take_option
from ..errors import InputError
from .config import StudyConfig
from .sections import METHODS, TRAINER_CONFIGS, trainer_defaults


GENERAL_FIELDS = ("output_dir", "seed", "mixed_precision")


@dataclass
class DataArguments:
    """Where the volumes are."""

    dataset: str | None = field(
        default=None, metadata={"help": "Replaces the study's; prepared reads `msrl prepare`."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the study's data set."})


def read_study(path: str | Path) -> dict:
    """The fields of a study's YAML file; a relative `pretrained` is relative to the file.

    Raises:
        InputError: the file can't be read.
    """
    study = read_yaml(path)
    if isinstance(study.get("pretrained"), str):
        study["pretrained"] = str((Path(path).parent / study["pretrained"]).resolve())
    return study


def parse_study(
    section: str,
    default_config: str | Path | None = None,
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    taken: Mapping[str, str] | None = None,
) -> StudyConfig:
    """The study of `--config` (or the default), with all fields of the trainer of `section` as options. Where that is a method
    of tuning, it is the study's. `--help` shows `description` and the options `taken` out of the command line before.

    Raises:
        InputError: an unknown field or a bad value; the sentence names it.
    """
    path, rest = take_option("config", sys.argv[1:] if arguments is None else arguments)
    path = path or default_config
    study = read_study(path) if path else {}
    own = study.get(section, {})
    if not isinstance(own, dict):
        raise InputError(f"StudyConfig: {section} must be dict, got {own!r}.")
    shared = {name: study[name] for name in (*GENERAL_FIELDS, "dataset", "data_dir") if study.get(name) is not None}
    data, trainer = parse(
        [DataArguments, TRAINER_CONFIGS[section]], {**trainer_defaults(section), **shared, **own}, rest,
        description=description, taken={**CONFIG_HELP, **(taken or {})},
    )  # fmt: skip
    fields = asdict(trainer)
    # a general option is the whole study's, unless the section has a value of its own
    general = {name: fields.pop(name) for name in GENERAL_FIELDS if name not in own}
    where = {name: value for name, value in asdict(data).items() if value is not None}
    method = {"method": section} if section in METHODS else {}
    check_known(study, StudyConfig.__dataclass_fields__)
    return StudyConfig(**{**study, **general, **where, **method, section: fields})
