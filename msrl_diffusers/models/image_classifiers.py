"""Image classifiers of transformers that say of each attribute whether an image shows it: made, loaded, saved."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    EfficientNetConfig,
    PreTrainedModel,
    ResNetConfig,
    ViTConfig,
    ViTImageProcessorPil,
)

from ..errors import InputError


ARCHITECTURES = ("resnet", "vit", "convnext", "efficientnet")
SMALLEST_IMAGE = 16  # pixels; below, the last maps have no room for a kernel
FINE_BELOW = 48  # pixels
MOMENTUM = 0.1  # of batch norms; in PyTorch the weight of the newest batch: with EfficientNet's default, 0.99, no others would count


def build_image_classifier(
    architecture: str, attribute_names: Sequence[str], image_size: int, **settings
) -> tuple[PreTrainedModel, ViTImageProcessorPil]:
    """A small multi-label classifier with random weights, and an image processor that leaves images of `image_size` in
    [-1, 1].

    Args:
        architecture (`str`): `"resnet"`, `"vit"`, `"convnext"` or `"efficientnet"`. A reward and its judge want different
            ones: what fools the one should not fool the other by construction.
        attribute_names (`Sequence[str]`): the labels.
        image_size (`int`): edge of the images in pixels, 16 or more.
        **settings: fields of the architecture's config in transformers, instead of the small ones here.

    Raises:
        InputError: an unknown architecture, too small images, or settings that the architecture refuses.
    """
    if architecture not in ARCHITECTURES:
        raise InputError(f"There is no architecture {architecture!r}; choose one of {list(ARCHITECTURES)}.")
    if image_size < SMALLEST_IMAGE:
        raise InputError(f"Classifiers need images of {SMALLEST_IMAGE} pixels or more, got {image_size}.")
    config_class, small = _small(architecture, image_size)
    try:
        config = config_class(**{**small, **_labels(attribute_names), **settings})
        model = AutoModelForImageClassification.from_config(config)
    except (TypeError, ValueError, AttributeError, RuntimeError, StrictDataclassError) as error:
        raise InputError(f"No {architecture} can be made of {settings} ({_one_line(error)}).") from error
    edge = {"height": image_size, "width": image_size}
    return model.eval(), ViTImageProcessorPil(size=edge, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def load_image_classifier(
    path: str | Path, attribute_names: Sequence[str] | None = None, image_size: int | None = None
) -> tuple[PreTrainedModel, object]:
    """An image classifier of transformers and its image processor, from a folder or the Hub, in float32 and evaluation
    mode.

    Args:
        path: a folder or a repository, with weights as safetensors.
        attribute_names: give these to train it: the head then has these labels, with random weights where the loaded one
            has another number of them. By default the classifier is taken as it is and must be whole.
        image_size: edge in pixels the processor resizes to, where not its own.

    Raises:
        InputError: nothing there, no image classifier, or a head that was never trained.
    """
    labels = {} if attribute_names is None else {**_labels(attribute_names), "ignore_mismatched_sizes": True}
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            path,
            use_safetensors=True,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            **labels,
        )
        processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise InputError(
            f"{path} can't be loaded as an image classifier ({_one_line(error)}); give a folder or a Hub repository with "
            "config.json, safetensors and preprocessor_config.json."
        ) from error
    if report["missing_keys"] and attribute_names is None:
        raise InputError(f"{path} lacks weights, such as {sorted(report['missing_keys'])[0]}; train it first.")
    if attribute_names is not None:
        _keep_batch_statistics(model)
    if image_size is not None:
        _resize_to(processor, image_size)
    return model.eval(), processor


def save_image_classifier(model: PreTrainedModel, processor, folder: str | Path) -> None:
    """Write model and processor to `folder`, which `load_image_classifier` and transformers read; under temporary names
    first, `config.json` last. Other files in there stay."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
    temporary.rmdir()


def _keep_batch_statistics(model: PreTrainedModel) -> None:
    """Give batch norms PyTorch's own momentum where they have one in TensorFlow's sense, the weight of what was before."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.momentum is not None and layer.momentum > 0.5:
            layer.momentum = MOMENTUM
    if getattr(model.config, "batch_norm_momentum", 0) > 0.5:  # saved with it
        model.config.batch_norm_momentum = MOMENTUM


def _small(architecture: str, image_size: int) -> tuple[type, dict]:
    """The config's class, and fields that make a network of 0.1 to 0.7 million parameters; small images keep finer maps, or
    a hair of one pixel would be lost in the first."""
    if architecture == "resnet":
        fields = {"embedding_size": 24, "hidden_sizes": [24, 48, 96], "depths": [1, 1, 1], "layer_type": "basic"}
        return ResNetConfig, fields
    if architecture == "vit":
        fields = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192}
        return ViTConfig, {**fields, "image_size": image_size, "patch_size": max(4, image_size // 8)}
    fine = image_size < FINE_BELOW
    if architecture == "convnext":
        fields = {"num_stages": 3, "hidden_sizes": [24, 48, 96], "depths": [1, 1, 2], "patch_size": 2 if fine else 4}
        return ConvNextConfig, {**fields, "image_size": image_size}
    fields = {
        "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640, "batch_norm_momentum": MOMENTUM,
        "strides": [1, 1, 2, 2, 1, 1, 1] if fine else [1, 2, 2, 2, 1, 1, 1],
        "dropout_rate": 0.1, "drop_connect_rate": 0.0,
    }  # fmt: skip
    return EfficientNetConfig, {**fields, "image_size": image_size}


def _labels(attribute_names: Sequence[str]) -> dict:
    names = list(attribute_names)
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "multi_label_classification",
    }


def _resize_to(processor, image_size: int) -> None:
    """Let an image processor resize to squares of `image_size`, in the terms it has."""
    edge = {"height": image_size, "width": image_size}
    processor.do_resize, processor.size = True, edge
    if getattr(processor, "crop_pct", None) is not None:
        processor.size = {"shortest_edge": image_size}
    if getattr(processor, "do_center_crop", False):
        processor.crop_size = edge


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
