"""Checkpoints from a folder or the Hub: whole and of the class that is asked for, or one sentence."""

from pathlib import Path
from typing import TypeVar

from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import nn

from ..errors import InputError


HTTPError = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, whichever the client is built on: also lost connections

T = TypeVar("T", bound=ModelMixin | DiffusionPipeline)


def load_model(model_class: type[T], path: str | Path, **kwargs) -> T:
    """`from_pretrained` of a model (in evaluation mode, as it always is) or of a pipeline.

    Raises:
        InputError: there is no such checkpoint, or it is of another class, or lacks weights; the Hub does not give it.
    """
    name, report, config = model_class.__name__, {}, path
    try:
        if not Path(path).is_dir():
            config = hf_hub_download(str(path), model_class.config_name, revision=kwargs.get("revision"))
        found = model_class.load_config(str(config)).get("_class_name")
        if found == name:  # weights of another class would load as none
            if issubclass(model_class, ModelMixin):
                model, report = model_class.from_pretrained(str(path), output_loading_info=True, **kwargs)
            else:
                model = model_class.from_pretrained(str(path), **kwargs)
    except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError, HTTPError) as error:
        raise InputError(hub_failure(path, error) or f"{path} holds no {name}: {_first_line(error)}") from error
    if found != name:
        raise InputError(f"{path} holds a {found}, not a {name}; give the folder or the repository of one.")
    _refuse_missing(path, name, report.get("missing_keys", []))
    if isinstance(model, DiffusionPipeline):
        check_whole(model, path)
    return model


def check_whole(pipeline: DiffusionPipeline, path: str | Path) -> None:
    """Look for parameters that no file in `path` held: diffusers leaves them on the device "meta", and warns.

    Raises:
        InputError: there are; the sentence names one.
    """
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    missing = [
        f"{component}.{name}"
        for component, network in networks.items()
        for name, tensor in network.state_dict().items()
        if tensor.is_meta
    ]
    _refuse_missing(path, type(pipeline).__name__, missing)


def _refuse_missing(path: str | Path, name: str, missing: list[str]) -> None:
    if missing:
        raise InputError(f"{path} lacks weights of {name}, such as {missing[0]}; save it again.")


def hub_failure(place: str | Path, error: BaseException) -> str | None:
    """Why the Hub did not give `place`, in one sentence, from what its client raised; None if that was not it. Libraries raise errors
    of their own on top, which name other causes."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return _answered(place, cause)
        if isinstance(cause, OfflineModeIsEnabled):
            return f"There is no folder {place}, and the Hub is not asked while HF_HUB_OFFLINE is set: unset it, or give a folder."
        if isinstance(cause, HTTPError):
            return f"There is no folder {place}, and the Hub can't be reached ({_first_line(cause)}); check the connection."
        if isinstance(cause, HFValidationError):
            return f"{place} is neither a folder nor a name of a repository on the Hub; give one of these."
        cause = cause.__cause__ or cause.__context__
    return None


def _answered(place: str | Path, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"{place} is gated ({status}): ask for access on its page on the Hub, and log in by `hf auth login`."
    if isinstance(error, EntryNotFoundError):
        return f"{place} on the Hub has no {str(error.response.url).rpartition('/')[2]} ({status}); give a repository with one."
    if isinstance(error, RevisionNotFoundError):
        return f"{place} on the Hub has no such branch, tag or commit ({status}); give another revision."
    if status in (401, 404):  # who is not logged in is told 401 of what is private and of what does not exist
        return (
            f"There is no folder {place}, and the Hub shows no such repository ({status}); check the name, or, if it is private, "
            "log in by `hf auth login`."
        )
    if status == 403:
        return f"The Hub does not let this token read {place} (403); log in by `hf auth login` with one that may."
    return f"The Hub did not give {place} ({status}); run this again later."


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
