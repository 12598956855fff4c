"""What a folder holds that is about to be shared: a pipeline, a model or a LoRA adapter, and nothing that runs code or
shows a patient."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import InputError
from ..pipelines.remote_code import CODE_FILES, PIPELINE, plain_index


WEIGHTS = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)([.-][\w.-]+)?\.safetensors")
SHARD = re.compile(r"-\d{5}-of-\d{5}")
SHARDS_INDEX = re.compile(r".+\.safetensors(\.[\w.-]+)?\.index(\.[\w.-]+)?\.json")
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # of PeftModel.save_pretrained
ADAPTER_WEIGHTS = ("pytorch_lora_weights.safetensors", PEFT_WEIGHTS)
BASE_MODEL = "base_model_name_or_path"  # in the latter
PICKLES = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pkl", ".pt", ".pth", ".tar"}
SHARED = {".gif", ".jpeg", ".jpg", ".json", ".md", ".png", ".webp"}
SHARED_NAMES = {"CITATION.cff", "LICENSE", "NOTICE", "merges.txt", "spiece.model", "vocab.txt"}
# Written by `msrl audit` and `msrl evaluate`: they show training volumes, or name them and folders of this machine.
LEFT_OUT = {
    "audit.html", "audit.md", "closest_pairs.png", "evaluate.html", "evaluate.md", "generated.safetensors", "volumes.png"
}  # fmt: skip
FINDINGS = {"audit.json", "evaluate.json", "report.json"}
SEEN_VOLUMES = "train_volumes"  # hashes in scores.json, by which a shared model would tell who is among its patients
NAMING_KEYS = {"closest", "copies", "duplicates", "settings"}  # of the findings: subjects, and paths of this machine


@dataclass(frozen=True)
class Contents:
    """A folder that can be shared.

    Attributes:
        folder: where it lies.
        kind: `"pipeline"`, `"model"` or `"adapter"` (LoRA).
        class_name: class of the pipeline or model; for an adapter the name of its weights' file.
        config: `model_index.json` (as the package itself writes it) or `config.json`; empty for an adapter.
        classes: class by subfolder, of all that has weights or a scheduler's config.
        files: what is shared, relative to the folder, with `/`.
        left_out: what stays here because it shows or names training volumes.
        variant: of the weights (`save_pretrained(variant="fp16")`), where there are none without one.
    """

    folder: Path
    kind: str
    class_name: str
    config: dict
    classes: dict[str, str]
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    variant: str | None = None

    def read_json(self, name: str) -> dict | None:
        """A JSON file at the folder's top; None where there is none."""
        return read_json(self.folder / name) if (self.folder / name).is_file() else None


def read_json(path: str | Path) -> dict:
    """The mapping in a JSON file.

    Raises:
        InputError: it can't be read, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}.") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise InputError(f"{path} is no valid JSON; write it again or remove it.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON mapping, as the commands of this package write it.")
    return content


def inspect_folder(folder: str | Path) -> Contents:
    """What `folder` holds. Opens every file of weights (its header) and of JSON; hidden files are passed over.

    Raises:
        InputError: no pipeline, model or adapter; parts of one are missing; or a file that must not be shared: pickles,
            code, volumes, and whatever is no weights, config, card, picture or JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the one that save_pretrained wrote.")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    left_out = tuple(name for name in names if _last(name) in LEFT_OUT)
    files = tuple(name for name in names if name not in left_out and _last(name) not in CODE_FILES)
    for name in names:
        if name not in left_out:
            _check_file(folder, name)
    classes = _classes(folder, files)
    if "model_index.json" in files:
        index = plain_index(read_json(folder / "model_index.json"))
        _check_components(folder, index, files)
        return Contents(
            folder, "pipeline", _class_name(folder, index), index, classes, files, left_out, _variant(files)
        )
    for name in ADAPTER_WEIGHTS:
        if name in files:
            if name == PEFT_WEIGHTS and PEFT_CONFIG not in files:
                raise InputError(
                    f"{folder} has no {PEFT_CONFIG}, without which nothing can load {name}; save the adapter again."
                )
            return Contents(folder, "adapter", name, {}, {}, files, left_out)
    if "config.json" in files:
        config = read_json(folder / "config.json")
        _check_weights_of(folder, ".", files)
        return Contents(folder, "model", _class_name(folder, config), config, {}, files, left_out, _variant(files))
    raise InputError(
        f"{folder} holds no pipeline (model_index.json), no model (config.json) and no LoRA adapter "
        f"({ADAPTER_WEIGHTS[0]}); give the folder that save_pretrained or save_lora_weights wrote."
    )


def is_weights(name: str) -> bool:
    """Whether a file holds weights of a model, or says which files do."""
    return bool(WEIGHTS.fullmatch(_last(name))) or bool(SHARDS_INDEX.fullmatch(_last(name)))


def shared_json(name: str, content: dict) -> dict:
    """`content` of the JSON file `name` without paths of this machine, hashes of training volumes and, in findings, names of
    subjects; they may lie in a folder of the one that is shared."""
    dropped = {"_name_or_path", SEEN_VOLUMES, *(NAMING_KEYS if _last(name) in FINDINGS else ())}
    if is_local(content.get(BASE_MODEL)):
        dropped.add(BASE_MODEL)

    def kept(value):
        if isinstance(value, dict):
            return {key: kept(item) for key, item in value.items() if key not in dropped}
        return [kept(item) for item in value] if isinstance(value, list) else value

    return kept(content)


def is_local(place: object) -> bool:
    """Whether this names a place on a machine, and no repository, `OWNER/NAME` or `NAME`."""
    return isinstance(place, str) and (
        place.startswith((".", "~", "/")) or place.count("/") > 1 or Path(place).is_dir()
    )


def _last(name: str) -> str:
    """The file's own name, without its folders."""
    return name.split("/")[-1]


def _check_file(folder: Path, name: str) -> None:
    path = folder / name
    if path.suffix.lower() in PICKLES:
        raise InputError(
            f"{path} may hold pickles, which run code when they are read; save it as safetensors (save_pretrained "
            "does), or remove it from the folder."
        )
    if path.suffix == ".py":
        if CODE_FILES.get(path.name) != path.read_text(encoding="utf-8", errors="replace"):
            raise InputError(f"{path} is code; remove it: what a repository needs to be loaded is added to it.")
    elif path.suffix == ".safetensors":
        _check_weights(path)
    elif path.suffix.lower() not in SHARED and path.name not in SHARED_NAMES:
        raise InputError(
            f"{path} is no weights, config, card, picture or JSON, so it is not shared; remove it from the folder."
        )
    elif path.suffix == ".json":
        _check_json(path)


def _check_weights(path: Path) -> None:
    adapter = path.name in ADAPTER_WEIGHTS
    if not adapter and not WEIGHTS.fullmatch(path.name):
        raise InputError(
            f"{path} has no name of weights, so it may hold volumes of patients; remove it, or save the model by "
            "save_pretrained."
        )
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no whole safetensors file ({error}); save or download it again.") from error
    if not adapter and any(".lora_A." in key or ".base_layer." in key for key in keys):
        raise InputError(
            f"{path} was saved with a LoRA adapter in it, which nothing can load; fuse and unload the adapter before saving, "
            "or share it as a folder of its own."
        )


def _check_json(path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no valid JSON; write it again or remove it.") from error
    if SHARDS_INDEX.fullmatch(path.name):
        shards = set(content.get("weight_map", {}).values())
        missing = sorted(shard for shard in shards if not (path.parent / shard).is_file())
        if missing:
            raise InputError(
                f"{path} names {missing[0]}, which is not there; remove this index and save the model again."
            )


def _class_name(folder: Path, config: dict) -> str:
    if "model_type" in config and "_class_name" not in config:
        raise InputError(
            f"{folder} holds a model of transformers, which is not shared alone: share the folder of the pipeline it lies in, or use "
            "the model's own push_to_hub."
        )
    if not isinstance(config.get("_class_name"), str):
        raise InputError(f"The config in {folder} names no class; save it by save_pretrained.")
    return config["_class_name"]


def _classes(folder: Path, files: tuple[str, ...]) -> dict[str, str]:
    """Class by subfolder, where a config names one."""
    found = {}
    for name in files:
        parts = name.split("/")
        if len(parts) == 2 and parts[1] in ("config.json", "scheduler_config.json"):
            config = read_json(folder / name)
            found[parts[0]] = str(config.get("_class_name") or (config.get("architectures") or [""])[0])
    return found


def _check_components(folder: Path, index: dict, files: tuple[str, ...]) -> None:
    """Every component that the index names is there, with weights where it has a model's config."""
    for name, value in index.items():
        if not (isinstance(value, list) and len(value) == 2 and all(v is None or isinstance(v, str) for v in value)):
            continue
        if None in value:
            if index.get("_class_name") == PIPELINE:
                raise InputError(f"The component {name} of {folder} was not saved; save the whole pipeline again.")
            continue  # optional in other pipelines: a safety checker
        if not any(file.startswith(f"{name}/") for file in files):
            raise InputError(f"model_index.json of {folder} names the component {name}, but there is no such folder.")
        if f"{name}/config.json" in files:
            _check_weights_of(folder, name, files)


def _check_weights_of(folder: Path, name: str, files: tuple[str, ...]) -> None:
    prefix = "" if name == "." else f"{name}/"
    inside = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    if not any(WEIGHTS.fullmatch(file) for file in inside):
        raise InputError(f"{folder / name} has a config but no weights (.safetensors); save the model again.")


def _variant(files: tuple[str, ...]) -> str | None:
    """The variant that weights are of, where all are of the same."""
    names = [SHARD.sub("", _last(name)).split(".") for name in files if WEIGHTS.fullmatch(_last(name))]
    variants = {".".join(parts[1:-1]) for parts in names}
    return variants.pop() or None if len(variants) == 1 else None
