"""LoRA adapters of a pipeline's denoiser: loaded, mixed, fused and saved as those of Stable Diffusion are."""

import copy
import json
import os
import warnings
from collections.abc import Callable
from functools import update_wrapper, wraps
from pathlib import Path
from types import MethodType

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.utils import get_peft_kwargs
from huggingface_hub import hf_hub_download
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import InputError
from ..models.adapters import refuse_to_save, uncompiled
from ..models.loading import HTTPError, hub_failure


DENOISER = "unet"
PREFIX = f"{DENOISER}."


class _OfInstanceOrClass:
    """A method that gets the instance, or the class when called on that."""

    def __init__(self, function: Callable):
        self._function = function
        update_wrapper(self, function)

    def __get__(self, instance, owner: type) -> Callable:
        return MethodType(self._function, owner if instance is None else instance)


def _of_compiled_too(method: Callable) -> Callable:
    """A method of diffusers, which passes over a denoiser that `torch.compile` has wrapped, on what is inside."""

    @wraps(method)
    def wrapped(self, *args, **kwargs):
        unet = self.unet
        self.unet = uncompiled(unet)
        try:
            return method(self, *args, **kwargs)
        finally:
            self.unet = unet

    return wrapped


class VolumeLoraLoaderMixin(LoraBaseMixin):
    """LoRA for a pipeline whose `unet` has `PeftAdapterMixin`, compiled or not; files are safetensors only.

    From diffusers come `set_adapters(names, weights)`, `get_active_adapters()`, `get_list_adapters()`,
    `delete_adapters(names)`, `enable_lora()`, `disable_lora()`, `unload_lora_weights()` and `set_lora_device(names, device)`.
    """

    _lora_loadable_modules = [DENOISER]
    set_adapters = _of_compiled_too(LoraBaseMixin.set_adapters)
    get_active_adapters = _of_compiled_too(LoraBaseMixin.get_active_adapters)
    get_list_adapters = _of_compiled_too(LoraBaseMixin.get_list_adapters)
    delete_adapters = _of_compiled_too(LoraBaseMixin.delete_adapters)
    enable_lora = _of_compiled_too(LoraBaseMixin.enable_lora)
    disable_lora = _of_compiled_too(LoraBaseMixin.disable_lora)
    unload_lora_weights = _of_compiled_too(LoraBaseMixin.unload_lora_weights)

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        weight_name: str | None = None,
        return_lora_metadata: bool = False,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool | None = None,
        **hub_arguments,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict | None]:
        """The tensors of an adapter, named `unet.<layer>.lora_A.weight`, and its configuration.

        Args:
            pretrained_model_name_or_path_or_dict: a safetensors file, a folder, a repository, or the tensors.
            weight_name: name of the file in the folder or repository, by default `pytorch_lora_weights.safetensors`.
            return_lora_metadata: also the fields of `LoraConfig`, or None where the file has none.
            use_safetensors, low_cpu_mem_usage: of diffusers' pipelines; nothing but safetensors is read anyway, and an adapter is
                always loaded the lean way.
            **hub_arguments: of `huggingface_hub.hf_hub_download`: `subfolder`, `revision`, `token`, `cache_dir`,
                `force_download`, `local_files_only`. `subfolder` holds for folders, too.

        Raises:
            InputError: no such file, or not an adapter, or `use_safetensors` is False.
        """
        if use_safetensors is False:
            raise InputError("Adapters are read from safetensors only: leave use_safetensors out.")
        source, metadata = pretrained_model_name_or_path_or_dict, None
        if isinstance(source, dict):
            tensors = dict(source)
        else:
            source = _find(source, weight_name or LORA_WEIGHT_NAME_SAFE, **hub_arguments)
            tensors, metadata = _read(source)
        if not tensors or not all("lora_" in name for name in tensors):
            place = "The dict" if isinstance(source, dict) else source
            raise InputError(f"{place} holds no LoRA adapter: give what save_lora_weights has written.")
        if not any(name.startswith(PREFIX) for name in tensors):  # saved by the denoiser's own save_lora_adapter
            tensors = {PREFIX + name: value for name, value in tensors.items()}
            metadata = metadata and {PREFIX + name: value for name, value in metadata.items()}
        return (tensors, metadata) if return_lora_metadata else tensors

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs,
    ) -> None:
        """Put an adapter into the denoiser and make it the active one.

        Args:
            pretrained_model_name_or_path_or_dict, **kwargs: see `lora_state_dict`.
            adapter_name: what `set_adapters` and others call it; `default_0`, `default_1`, ... by default.
            hotswap: replace the tensors of the adapter of that name, which keeps a compiled model.

        Raises:
            InputError: no adapter, or one of another denoiser, or a name that can't be.
            ValueError: the name is taken, or, with `hotswap`, is not.
        """
        tensors, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, **{**kwargs, "return_lora_metadata": True}
        )
        if adapter_name and (hasattr(torch.nn.ModuleDict, adapter_name) or "." in adapter_name):
            raise InputError(
                f"{adapter_name!r} can't name an adapter, since PyTorch uses it for modules: take another."
            )
        unet = uncompiled(self.unet)
        _check_fit(unet, tensors)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            try:
                unet.load_lora_adapter(
                    tensors,
                    prefix=DENOISER,
                    adapter_name=adapter_name,
                    metadata=copy.deepcopy(metadata),  # where swapping was prepared its ranks are raised in place
                    hotswap=hotswap,
                    low_cpu_mem_usage=True,
                    _pipeline=self,
                )
            except TypeError as error:
                raise InputError(
                    "The adapter's configuration is none that this version of peft has: update peft."
                ) from error
        _take_over(unet, adapter_name or list(unet.peft_config)[-1], tensors, metadata)
        unet.train(unet.training)  # new layers come in training mode, where their dropout acts

    @_OfInstanceOrClass
    def save_lora_weights(
        self,
        save_directory: str | os.PathLike,
        unet_lora_layers: dict[str, torch.Tensor] | None = None,
        adapter_name: str | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: dict | None = None,
    ) -> None:
        """Write an adapter to `save_directory/pytorch_lora_weights.safetensors`, under a temporary name first.

        `pipe.save_lora_weights(folder)` writes the adapter of the denoiser with its configuration. Training scripts of
        diffusers give tensors instead, and may call this on the class.

        Args:
            save_directory: made if it is not there.
            unet_lora_layers: tensors as `peft.utils.get_peft_model_state_dict` names them.
            adapter_name: which of the denoiser's adapters, where there are several.
            is_main_process: other processes write nothing.
            weight_name: another name of the file.
            safe_serialization: of diffusers' pipelines; nothing but safetensors is written.
            unet_lora_adapter_metadata: fields of `LoraConfig` beside `unet_lora_layers`; without them the rank is taken from
                the tensors, and `lora_alpha` as equal to it.

        Raises:
            InputError: no adapter, or several and no name, a name that is none of a safetensors file, or `safe_serialization` is
                False.
        """
        if not safe_serialization:
            raise InputError("Adapters are written as safetensors only: leave safe_serialization out.")
        weight_name = weight_name or LORA_WEIGHT_NAME_SAFE
        if not weight_name.endswith(".safetensors"):
            raise InputError(f"weight_name must end with .safetensors, got {weight_name!r}.")
        if unet_lora_layers is None:
            if isinstance(self, type):
                raise InputError("Give unet_lora_layers, or call save_lora_weights on a pipeline that has an adapter.")
            unet = uncompiled(self.unet)
            adapter_name = adapter_name or _only_adapter(unet)
            if adapter_name not in getattr(unet, "peft_config", {}):
                raise InputError(f"There is no adapter {adapter_name!r}; there are {_adapters(unet)}.")
            config = unet.peft_config[adapter_name]
            unet_lora_layers = _unpadded(get_peft_model_state_dict(unet, adapter_name=adapter_name), config)
            unet_lora_adapter_metadata = config.to_dict()
        if not is_main_process:
            return
        tensors = {PREFIX + name: value.detach().cpu().contiguous() for name, value in unet_lora_layers.items()}
        header = {"format": "pt"}
        if unet_lora_adapter_metadata:
            fields = {PREFIX + name: value for name, value in unet_lora_adapter_metadata.items()}
            header[LORA_ADAPTER_METADATA_KEY] = json.dumps(fields, default=sorted, sort_keys=True)  # sets as lists
        path = Path(save_directory) / weight_name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, header)
        os.replace(temporary, path)

    @_of_compiled_too
    def fuse_lora(
        self,
        components: list[str] | tuple[str, ...] = (DENOISER,),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """Add the active adapters (or those named), times `lora_scale`, to the denoiser's weights; `unfuse_lora` takes them
        out again. Before the pipeline is saved, `unload_lora_weights` must follow.

        Raises:
            ValueError: `safe_fusing` is set and a weight would not be finite; or a component other than the denoiser.
        """
        super().fuse_lora(list(components), lora_scale, safe_fusing, adapter_names)

    @_of_compiled_too
    def unfuse_lora(self, components: list[str] | tuple[str, ...] = (DENOISER,)) -> None:
        """The denoiser's own weights again, the adapter apart from them."""
        super().unfuse_lora(list(components))

    def _check_no_adapter(self) -> None:
        """
        Raises:
            InputError: the denoiser carries an adapter.
        """
        refuse_to_save(self.unet, "save_lora_weights", "unload_lora_weights")


def _find(source: str | os.PathLike, weight_name: str, subfolder: str | None = None, **hub_arguments) -> Path:
    """The file: given itself, in a folder, or of a repository on the Hub, downloaded."""
    if not weight_name.endswith(".safetensors"):
        raise InputError(f"{weight_name} is no safetensors file, and others are not read: convert it first.")
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        folder = path / (subfolder or "")
        if (folder / weight_name).is_file():
            return folder / weight_name
        found = sorted(file.name for file in folder.glob("*.safetensors"))
        raise InputError(f"{folder} holds no {weight_name}; give weight_name, of {found}.")
    try:
        return Path(hf_hub_download(str(source), weight_name, subfolder=subfolder, **hub_arguments))
    except (OSError, ValueError, HTTPError) as error:
        reason = (
            f"{source} is no folder, and the Hub gave no {weight_name} for it: {str(error).strip().splitlines()[0]}"
        )
        raise InputError(hub_failure(source, error) or reason) from error


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Tensors of a file, and the configuration in its header."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "null"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is no whole safetensors file of an adapter ({error}); fetch it again.") from error


def _check_fit(unet: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Every layer that the adapter has must be in the denoiser, with as many channels."""
    for name, value in tensors.items():
        layer, _, part = name.removeprefix(PREFIX).partition(".lora_")
        try:
            module = unet.get_submodule(layer)
        except AttributeError:
            module = None
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        axis = {"A.weight": 1, "B.weight": 0}.get(part)
        if weight is None or (axis is not None and weight.shape[axis] != value.shape[axis]):
            has = "no such layer" if weight is None else f"{list(weight.shape)} there"
            raise InputError(
                f"The adapter is one of another denoiser: {layer} is {list(value.shape)} ({part}), this one has {has}."
            )


def _take_over(
    unet: torch.nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor], metadata: dict | None
) -> None:
    """Ranks and alphas of the adapter as its file states them. A hotswap takes over tensors and scales alone, and to prepare for one
    (`enable_lora_hotswap`) raises the rank: `set_adapters` would weight, and `save_lora_weights` write, by what is no longer true."""
    ours = {name.removeprefix(PREFIX): value for name, value in (metadata or {}).items() if name.startswith(PREFIX)}
    if metadata is None:
        names = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
        ours = get_peft_kwargs({f"^{n}": v.shape[1] for n, v in names.items() if "lora_B.weight" in n}, None, names)
    new, config = LoraConfig(**ours), unet.peft_config[adapter_name]
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        setattr(config, field, getattr(new, field))
    for name, layer in unet.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling:
            layer.r[adapter_name] = _of_layer(config.rank_pattern, name, config.r)
            layer.lora_alpha[adapter_name] = _of_layer(config.alpha_pattern, name, config.lora_alpha)


def _of_layer(pattern: dict[str, float], layer: str, default: float) -> float:
    return pattern.get(get_pattern_key(pattern, layer), default)


def _unpadded(tensors: dict[str, torch.Tensor], config: LoraConfig) -> dict[str, torch.Tensor]:
    """Without the zeros that a hotswap adds to an adapter of a smaller rank, with which none of that rank can be loaded."""
    cut = {}
    for name, value in tensors.items():
        layer, _, part = name.partition(".lora_")
        rank = _of_layer(config.rank_pattern, layer, config.r)
        cut[name] = value[:rank] if part == "A.weight" else value[:, :rank] if part == "B.weight" else value
    return cut


def _adapters(unet: torch.nn.Module) -> list[str]:
    return sorted(getattr(unet, "peft_config", {}))


def _only_adapter(unet: torch.nn.Module) -> str:
    names = _adapters(unet)
    if len(names) != 1:
        some = (
            f"The denoiser has the adapters {names}: say which by adapter_name." if names else "There is no adapter."
        )
        raise InputError(some)
    return names[0]
