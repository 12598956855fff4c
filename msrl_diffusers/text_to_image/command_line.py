"""From a command line to a TextToImageStudyConfig: a YAML file, and options that override one section of it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..arguments import CONFIG_HELP, check_known, is_given, parse, read_yaml, take_option
from ..errors import InputError
from .config import TRAINER_CONFIGS, TextToImageStudyConfig, trainer_defaults


GENERAL_FIELDS = ("output_dir", "seed", "mixed_precision")
MODELS = (
    "pretrained_model_name_or_path",
    "reward_classifier",
    "judge_classifier",
    "fid_extractor",
    "image_text_model",
)


@dataclass
class GivenArguments:
    """What is given and need not be made, and what of the study is often changed."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder of images with metadata.csv."})
    subject_column: str | None = field(
        default=None,
        metadata={"help": "Column that names the subject: subject_id or participant_id, or each file, if unset."},
    )
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A fine-tuned StableDiffusionPipeline: a folder or a Hub repository."}
    )
    reward_classifier: str | None = field(
        default=None, metadata={"help": "An image classifier of transformers, whose labels are the attributes."}
    )
    judge_classifier: str | None = field(default=None, metadata={"help": "Another one, which only judges."})
    fid_extractor: str | None = field(
        default=None, metadata={"help": "inception, or the folder of an image classifier."}
    )
    image_text_model: str | None = field(default=None, metadata={"help": "A CLIP-type model, as a further reward."})
    reward_kind: str | None = field(default=None, metadata={"help": "share, probability or exact."})
    rl_seed: int | None = field(default=None, metadata={"help": "Seed of PPO and what follows; seed if unset."})
    num_samples_per_prompt: int | None = field(default=None, metadata={"help": "Images of each prompt to judge."})


def parse_text_to_image(
    section: str,
    default_config: str | Path | None = None,
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    taken: Mapping[str, str] | None = None,
) -> TextToImageStudyConfig:
    """The study of `--config` (or the default), with all fields of the trainer of `section` as options. `--help` shows
    `description` and the options `taken` out of the command line before.

    Raises:
        InputError: an unknown field or a bad value; or other data or models than those of a default config that gives models: the rest
            of it is made for these. The sentence names it.
    """
    given_path, rest = take_option("config", sys.argv[1:] if arguments is None else arguments)
    path = given_path or default_config
    study = _with_places(read_yaml(path), Path(path).parent) if path else {}
    replaced = [name for name in ("data_dir", *MODELS) if is_given(name, rest)]
    if replaced and not given_path and any(study.get(name) for name in MODELS):
        raise InputError(
            f"--{replaced[0]} needs --config CONFIG.yaml, a config of its own, such as examples/configs/dermoscopy/stable_diffusion.yaml: the "
            f"other models and settings would be those of {Path(path).name}, made for its drawn images."
        )
    own = study.get(section, {})
    if not isinstance(own, dict):
        raise InputError(f"TextToImageStudyConfig: {section} must be dict, got {own!r}.")
    shared = {
        name: study[name]
        for name in (*GENERAL_FIELDS, *GivenArguments.__dataclass_fields__)
        if study.get(name) is not None
    }
    given, trainer = parse(
        [GivenArguments, TRAINER_CONFIGS[section]], {**trainer_defaults(section), **shared, **own}, rest,
        description=description, taken={**CONFIG_HELP, **(taken or {})},
    )  # fmt: skip
    fields = asdict(trainer)
    # a general option is the whole study's, unless the section has a value of its own
    general = {name: fields.pop(name) for name in GENERAL_FIELDS if name not in own}
    changed = {name: value for name, value in asdict(given).items() if value is not None}
    check_known(study, TextToImageStudyConfig.__dataclass_fields__)
    return TextToImageStudyConfig(**{**study, **general, **changed, section: fields})


def _with_places(study: dict, folder: Path) -> dict:
    """The fields of a YAML file in `folder`, in which a model's place that is a folder is relative to the file."""
    found = {name: folder / study[name] for name in MODELS if isinstance(study.get(name), str)}
    return {**study, **{name: str(path.resolve()) for name, path in found.items() if path.is_dir()}}
