"""TrainingConfig: the fields every trainer shares, and their validation."""

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from accelerate.utils import LoggerType
from diffusers.optimization import SchedulerType

from ..errors import InputError
from ..precision import PRECISIONS


LR_SCHEDULERS = tuple(
    name.value for name in SchedulerType if name != SchedulerType.PIECEWISE_CONSTANT
)  # which needs rules

# Fields that have no influence on what comes out.
BOOKKEEPING = (
    "output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps", "report_to",
    "push_to_hub", "hub_model_id", "hub_private_repo",
)  # fmt: skip


@dataclass
class TrainingConfig:
    """Fields shared by all trainers. Batch sizes are per process; randomness follows from `seed` alone, but for the first
    weights of discriminators and classification heads, which are made with the trainer (studies set torch's seed before)."""

    output_dir: str = field(default="outputs/run", metadata={"help": "Where checkpoints, logs and results go."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})
    max_steps: int = field(default=1000, metadata={"help": "Number of steps (of the PPO trainer: rollouts)."})
    train_batch_size: int = field(default=8, metadata={"help": "Samples per process in one forward pass of training."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer update."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "A scheduler name of diffusers: constant, cosine, linear, ..."}
    )
    warmup_steps: int = field(default=0, metadata={"help": "Optimizer updates of linear warm-up."})
    adam_beta1: float = field(default=0.9, metadata={"help": "First moment decay of AdamW."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Second moment decay of AdamW."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm is clipped to this."})
    mixed_precision: str = field(
        default="no", metadata={"help": "auto (bf16 where the device is fast in it), no, bf16 or fp16."}
    )
    logging_steps: int = field(default=20, metadata={"help": "Steps between log lines."})
    save_steps: int = field(default=0, metadata={"help": "Steps between checkpoints; 0 writes none."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "'latest', or the path of a checkpoint folder. Learning rates are those of this command."},
    )
    report_to: str = field(default="tensorboard", metadata={"help": "A tracker of accelerate, or none."})

    def __post_init__(self):
        check_types(self)
        for name in ("max_steps", "train_batch_size", "gradient_accumulation_steps", "logging_steps"):
            check_positive(self, name)
        for name in ("learning_rate", "max_grad_norm", "save_total_limit"):
            check_positive(self, name)
        for name in ("save_steps", "warmup_steps"):
            check_not_negative(self, name)
        if self.max_steps < self.gradient_accumulation_steps:
            raise InputError(
                f"{type(self).__name__}: max_steps={self.max_steps} is less than gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}, so not one update would be made; take more steps, or accumulate fewer."
            )
        check_choice(self, "lr_scheduler_type", LR_SCHEDULERS)
        check_choice(self, "report_to", ("none", *(tracker.value for tracker in LoggerType)))
        check_choice(self, "mixed_precision", PRECISIONS)


def check_types(config) -> None:
    """Raise InputError unless every field of a dataclass holds its annotated type (YAML is not checked by parsers).

    An int is taken where a float is annotated.
    """
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        allowed = tuple(typing.get_origin(option) or option for option in options)
        if float in allowed and type(value) is int:
            setattr(config, item.name, float(value))
        elif not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            names = " or ".join(getattr(option, "__name__", str(option)) for option in allowed)
            raise InputError(f"{type(config).__name__}: {item.name} must be {names}, got {value!r}.")
        if isinstance(value, list):
            element = next(typing.get_args(option)[0] for option in options if typing.get_origin(option) is list)
            wrong = [entry for entry in value if not isinstance(entry, (int, float) if element is float else element)]
            if wrong:
                raise InputError(
                    f"{type(config).__name__}: {item.name} must hold {element.__name__} values, got {wrong[0]!r}."
                )


def check_positive(config, name: str) -> None:
    """Raise InputError unless the field is greater than zero."""
    if not 0 < getattr(config, name) < float("inf"):  # refuses NaN as well
        raise InputError(f"{type(config).__name__}: {name} must be positive, got {getattr(config, name)}.")


def check_not_negative(config, name: str) -> None:
    """Raise InputError unless the field is zero or greater."""
    if not 0 <= getattr(config, name) < float("inf"):
        raise InputError(f"{type(config).__name__}: {name} must be 0 or more, got {getattr(config, name)}.")


def check_batch_statistics(config) -> None:
    """Raise InputError unless a batch has two samples or more, which batch normalization takes its statistics of."""
    if config.train_batch_size < 2:
        raise InputError(
            f"{type(config).__name__}: train_batch_size must be 2 or more, got {config.train_batch_size}: the network is normalized by "
            "statistics of each batch, which gradient_accumulation_steps does not enlarge."
        )


def check_choice(config, name: str, choices: tuple) -> None:
    """Raise InputError unless the field is one of `choices`."""
    if getattr(config, name) not in choices:
        raise InputError(
            f"{type(config).__name__}: {name} must be one of {list(choices)}, got {getattr(config, name)!r}."
        )


def check_outputs_apart(config, *inputs: str) -> None:
    """Raise InputError if `output_dir` lies in a folder that one of these fields names, of which all files say whether a stage is
    out of date."""
    for name in inputs:
        given = getattr(config, name)
        if given and Path(config.output_dir).resolve().is_relative_to(Path(given).resolve()):
            raise InputError(f"output_dir={config.output_dir} lies in {name}={given}; give a folder outside it.")


def resumed(settings: Mapping) -> str | None:
    """`resume_from_checkpoint` of a trainer within a study: without checkpoints it begins anew whenever the stage is run again."""
    wanted = settings["resume_from_checkpoint"]
    return None if wanted == "latest" and not settings["save_steps"] else wanted
