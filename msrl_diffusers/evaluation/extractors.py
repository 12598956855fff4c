"""Feature networks for Frechet distances, by name: this package's own, and those that the field reports.

| spec | network | features | slices and preprocessing |
|---|---|---|---|
| a folder | `SliceFeatureExtractor`, `VolumeFeatureExtractor` or `PatchFeatureExtractor` | its config's | none |
| `random` | a small 2D network with fixed random weights, for a first look without any download | 48 | three planes |
| `inception[:FILE]` | Inception-v3 of the FID (arXiv 1706.08500) | 2048 | three planes, RGB 0 to 255, 299 x 299 |
| `medicalnet:FILE` | ResNet-50 of Med3D (arXiv 1904.00625), 3D | 2048 | none; mean 0 and deviation 1 per volume |
| `radimagenet:FILE` | ResNet-50 of RadImageNet (doi 10.1148/ryai.210315) | 2048 | three planes, 224 x 224, less ImageNet's means |
| `transformers:NAME` | any vision model of transformers | its own | three planes, RGB, its own image processor |

`FILE` is `.safetensors`; its weights are the user's to get, under their own licence. Distances of different networks
differ by orders of magnitude: none means anything without the id and the hash that every extractor carries.
"""

import hashlib
import json
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import InputError
from ..models.feature_extractors import (
    PatchFeatureExtractor,
    SliceFeatureExtractor,
    VolumeFeatureExtractor,
    plane_slices,
)
from ..models.loading import load_model
from .features import hash_tensors


NUM_SLICES = 8  # per plane, over the middle 60 % of its axis
IMAGES_AT_ONCE = 32  # 2D networks at 224 or 299 pixels need some 10 MB for each
IMAGENET_MEANS = (0.406, 0.456, 0.485)  # blue, green, red
UNUSED = frozenset({"fc.weight", "fc.bias"})  # what comes after the features of Inception
PROCESSOR_SETTINGS = (
    "do_resize", "size", "do_center_crop", "crop_size", "resample", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std",
)  # fmt: skip


class Extractor(nn.Module):
    """A frozen feature network with all that its features depend on. Called with volumes `[B, C, D, H, W]` in [-1, 1],
    it gives features `[B, P, S, F]`, float32: P planes, S slices of each, F features.

    Args:
        id (`str`): network, layer and preprocessing.
        network (`nn.Module`): with its weights.
        num_features (`int`): F.
        ignored (`frozenset[str]`): tensors of the network that the features do not depend on.

    Attributes:
        sha256 (`str`): of the weights, the first 16 hexadecimal digits.
    """

    def __init__(self, id: str, network: nn.Module, num_features: int, ignored: frozenset[str] = frozenset()):
        super().__init__()
        self.id, self.num_features = id, num_features
        self.network = network.requires_grad_(False).eval()
        self.sha256 = hash_tensors(
            (name, tensor) for name, tensor in _weights_of(network).items() if name not in ignored
        )

    @property
    def identity(self) -> dict[str, str]:
        """`{"id", "sha256"}`, to be stored beside every number that the extractor took part in."""
        return {"id": self.id, "sha256": self.sha256}

    def train(self, mode: bool = True) -> "Extractor":
        """Stays in evaluation mode: batch statistics have no place in a feature."""
        return super().train(False)


class OwnExtractor(Extractor):
    """One of this package's extractors, trained on volumes like those it judges."""

    def __init__(self, network: SliceFeatureExtractor | VolumeFeatureExtractor | PatchFeatureExtractor):
        of_slices = isinstance(network, SliceFeatureExtractor)
        kind, detail = ("slices", f"{network.config.num_slices} slices") if of_slices else ("volumes", "whole")
        super().__init__(f"{kind}/{type(network).__name__}/{detail}", network, network.config.num_features)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        channels, *shape = volumes.shape[1:]
        if channels != self.network.config.in_channels or len(set(shape)) > 1:
            raise InputError(
                f"The extractor {self.id} takes cubes of {self.network.config.in_channels} channels, these volumes are "
                f"{channels} x {' x '.join(map(str, shape))}; give --image_size to resample NIfTI images."
            )
        return self.network(volumes)


class MedicalNetExtractor(Extractor):
    """ResNet-50 in 3D of MedicalNet, global average of its last layer: `[B, C, 1, 2048]`, channel by channel.

    Volumes are brought to mean 0 and deviation 1, each by itself over all its voxels. (MedicalNet's training took the
    statistics over voxels above 0 and filled the rest with noise, which gives other features on every call; MONAI's
    perceptual loss takes them over the whole batch.)
    """

    def __init__(self, weights: dict[str, torch.Tensor], place: str):
        network = _resnet50(3, in_channels=1)
        # MONAI's network halves the grid in the last two layers, the one that was trained dilates instead
        for layer, dilation in ((network.layer3, 2), (network.layer4, 4)):
            layer[0].conv2.stride = layer[0].downsample[0].stride = (1, 1, 1)
            for block in layer:
                block.conv2.dilation = block.conv2.padding = (dilation,) * 3
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
        _load(network, weights, place, "MedicalNet's ResNet-50", "convert resnet_50_23dataset, its entry state_dict")
        super().__init__("medicalnet/resnet50/pooled/z-score", network, 2048)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        flat = volumes.float().flatten(2)
        deviations = flat.std(dim=2, keepdim=True).clamp(min=1e-6)  # of a constant volume it is 0
        normal = ((flat - flat.mean(dim=2, keepdim=True)) / deviations).view_as(volumes)
        return self.network(normal.flatten(0, 1)[:, None]).unflatten(0, volumes.shape[:2])[:, :, None]


class PlanesExtractor(Extractor, ABC):
    """A 2D network on slices of the three planes. Several channels are planes of their own: `[B, 3 * C, 8, F]`."""

    @abstractmethod
    def images_to_features(self, images: torch.Tensor) -> torch.Tensor:
        """Features `[M, F]` of grey images `[M, 1, height, width]` in [-1, 1]."""

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        planes = []
        for slices in plane_slices(volumes.float(), NUM_SLICES):
            by_channel = slices.transpose(1, 2)
            images = by_channel.flatten(0, 2)[:, None]
            features = torch.cat([self.images_to_features(part).float() for part in images.split(IMAGES_AT_ONCE)])
            planes.append(features.unflatten(0, by_channel.shape[:3]))
        return torch.stack(planes, dim=1).flatten(1, 2)


class RandomExtractor(PlanesExtractor):
    """A `SliceFeatureExtractor` nobody trained, always with the same weights. Its distances rise with blur, noise and lost
    modes, but what it attends to is chance: no figure to publish."""

    def __init__(self, seed: int = 0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = SliceFeatureExtractor()
        super().__init__(f"random/SliceFeatureExtractor/seed {seed}", network, network.config.num_features)

    def images_to_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.embed(images)


class InceptionExtractor(PlanesExtractor):
    """Inception-v3 of the FID as torchmetrics runs it, with the weights of torch-fidelity unless others are given."""

    def __init__(self, weights: dict[str, torch.Tensor] | None, place: str):
        try:
            import torch_fidelity  # noqa: F401
        except ImportError as error:
            raise InputError(
                "The extractor inception needs torch-fidelity; pip install -e '.[evaluation]' in the clone of the repository brings it."
            ) from error
        from torchmetrics.image.fid import NoTrainInceptionV3

        with tempfile.TemporaryDirectory() as folder:
            path = None
            if weights is not None:  # torch-fidelity knows no safetensors, and loads nothing but a file
                path = str(Path(folder) / "inception.pth")
                torch.save(weights, path)
            try:
                network = NoTrainInceptionV3("inception-v3-compat", ["2048"], path)
            except RuntimeError as error:
                raise InputError(
                    f"{place or 'The download'} does not hold the weights of the FID's Inception-v3; convert torch-fidelity's "
                    "weights-inception-2015-12-05."
                ) from error
            except OSError as error:
                raise InputError(
                    f"The weights of Inception-v3 can't be downloaded ({error}); give them as inception:FILE.safetensors."
                ) from error
        super().__init__(f"inception-v3/2048/{NUM_SLICES} slices/299 bilinear antialiased", network, 2048, UNUSED)

    def images_to_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(_rgb(images))


class RadImageNetExtractor(PlanesExtractor):
    """ResNet-50 in 2D of RadImageNet, global average of its last layer.

    The weights are those of MONAI's perceptual loss (`RadImageNet-ResNet50_notop` of the Hub's `MONAI/checkpoints`),
    converted from Keras: torchvision's names, but convolutions have a bias, blocks halve the grid in their first
    convolution, and batch norm has Keras' epsilon. As there, intensities in [0, 1] less ImageNet's means in the order
    blue, green, red are what the network sees; here at the 224 x 224 pixels it was trained with.
    """

    def __init__(self, weights: dict[str, torch.Tensor], place: str):
        network = _resnet50(2, in_channels=3)
        for layer in (network.layer2, network.layer3, network.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1.001e-5
        remedy = "convert RadImageNet-ResNet50_notop of MONAI/checkpoints"
        _load(network, _without_biases(weights), place, "RadImageNet's ResNet-50 (MONAI's conversion)", remedy)
        super().__init__(f"radimagenet/resnet50/pooled/{NUM_SLICES} slices/224 bilinear/less means", network, 2048)

    def images_to_features(self, images: torch.Tensor) -> torch.Tensor:
        resized = F.interpolate((images.clamp(-1, 1) + 1) / 2, (224, 224), mode="bilinear", antialias=True)
        return self.network(resized - resized.new_tensor(IMAGENET_MEANS)[:, None, None])


class TransformersExtractor(PlanesExtractor):
    """A vision model of transformers with its image processor. Features are its pooled output; the mean of its last
    hidden state where it has none, or where the weights have none (transformers would draw them at random)."""

    def __init__(self, name: str):
        from transformers import AutoImageProcessor, AutoModel

        try:
            # the backend of torchvision resizes a little differently; features must not depend on what is installed
            processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
            model, report = AutoModel.from_pretrained(
                name, use_safetensors=True, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"transformers:{name} can't be loaded ({_one_line(error)}); give a vision model with safetensors and an "
                "image processor, by its folder or its name on the Hub."
            ) from error
        missing = frozenset(key.removeprefix("vision_model.") for key in report["missing_keys"])
        lacking = sorted(key for key in missing if "pooler" not in key)
        if lacking:
            raise InputError(
                f"transformers:{name} lacks weights of its {type(model).__name__}, such as {lacking[0]}; give a whole one."
            )
        network = getattr(model, "vision_model", model)  # of a pair of image and text, the image's half
        try:
            output = _vision_output(network, processor, torch.zeros(1, 1, 32, 32))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"transformers:{name} does not work on images alone ({_one_line(error)}); give another model."
            ) from error
        pooled = not missing and getattr(output, "pooler_output", None) is not None
        kind = f"{type(model).__name__}/{'pooled' if pooled else 'mean'}"
        super().__init__(
            f"transformers/{kind}/{NUM_SLICES} slices/{_settings_of(processor)}",
            network,
            _pool(output, pooled).shape[1],
            missing,
        )
        self.processor, self.pooled = processor, pooled

    def images_to_features(self, images: torch.Tensor) -> torch.Tensor:
        return _pool(_vision_output(self.network, self.processor, images), self.pooled)


def _from_file(extractor: Callable[[dict, str], Extractor]) -> Callable[[str], Extractor]:
    return lambda place: extractor(_read_weights(Path(place)), place)


EXTRACTORS: dict[str, Callable[[str], Extractor]] = {
    "random": lambda place: RandomExtractor(),
    "inception": lambda place: InceptionExtractor(_read_weights(Path(place)) if place else None, place),
    "medicalnet": _from_file(MedicalNetExtractor),
    "radimagenet": _from_file(RadImageNetExtractor),
    "transformers": TransformersExtractor,
}


def load_extractor(spec: str) -> Extractor:
    """The extractor that `spec` names: a folder, or a name of the table above with what follows the colon.

    Raises:
        InputError: no such name, no such file, or weights of something else.
    """
    if Path(spec).is_dir():
        return OwnExtractor(_load_own(Path(spec)))
    name, _, place = spec.partition(":")
    if name not in EXTRACTORS:
        raise InputError(
            f"The extractor {spec!r} is no folder, nor does it begin with one of {sorted(EXTRACTORS)} and a colon."
        )
    if not place and name not in ("inception", "random"):
        what = "NAME_OR_FOLDER" if name == "transformers" else "WEIGHTS.safetensors"
        raise InputError(f"The extractor {name} needs weights; give it as {name}:{what}.")
    return EXTRACTORS[name](place)


def _load_own(folder: Path) -> SliceFeatureExtractor | VolumeFeatureExtractor | PatchFeatureExtractor:
    networks = (SliceFeatureExtractor, VolumeFeatureExtractor, PatchFeatureExtractor)
    classes = {network.__name__: network for network in networks}
    try:
        name = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder} has no config.json of an extractor that can be read; give its folder.") from error
    if name not in classes:
        raise InputError(
            f"{folder} holds a {name}, not one of {sorted(classes)}; a model of transformers is given as "
            f"transformers:{folder}."
        )
    return load_model(classes[name], folder, use_safetensors=True).float()


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the file of the weights.")
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path} is no .safetensors file, and other formats can hold code; convert it once: read it by torch.load "
            "with weights_only=True, and write its tensors by safetensors.torch.save_file."
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} can't be read as safetensors ({error}); convert or copy it again.") from error


def _weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """Its tensors but the counters of batch norm, which not every conversion keeps."""
    return {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("num_batches_tracked")}


def _resnet50(spatial_dims: int, in_channels: int) -> nn.Module:
    """MONAI's ResNet-50 up to the global average, with the stride in front and the shortcuts of both medical ones."""
    from monai.networks.nets import resnet50  # takes seconds to import

    return resnet50(
        spatial_dims=spatial_dims,
        n_input_channels=in_channels,
        conv1_t_stride=2,
        feed_forward=False,
        shortcut_type="B",
        bias_downsample=False,
    )


def _load(network: nn.Module, weights: dict[str, torch.Tensor], path: str, what: str, remedy: str) -> None:
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    expected, given = (
        {name: tensor.shape for name, tensor in named.items()} for named in (_weights_of(network), weights)
    )
    wrong = sorted(name for name in {*expected, *given} if expected.get(name) != given.get(name))
    if wrong:
        raise InputError(
            f"{path} does not hold the weights of {what}: {len(wrong)} tensors are missing, unknown or of another shape, "
            f"such as {wrong[0]}; {remedy}."
        )
    network.load_state_dict(weights, strict=False)  # but for the counters all is there


def _without_biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same network with no bias in its convolutions: the batch norm after each subtracts it from its mean."""
    folded = dict(weights)
    for name, bias in weights.items():
        mean = re.sub(r"conv(\d)\.bias$", r"bn\1.running_mean", name)
        mean = re.sub(r"downsample\.0\.bias$", "downsample.1.running_mean", mean)
        if mean != name and mean in folded and folded[mean].shape == bias.shape:
            folded[mean] = folded[mean].float() - folded.pop(name).float()
    return folded


@torch.no_grad()
def _vision_output(network: nn.Module, processor, images: torch.Tensor):
    rgb = list(_rgb(images).permute(0, 2, 3, 1).cpu().numpy())
    pixels = processor(images=rgb, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    return network(pixel_values=pixels.to(images.device))


def _pool(output, pooled: bool) -> torch.Tensor:
    """Features `[M, F]`: of a transformer `[M, tokens, F]` and of a convolutional network `[M, F, height, width]`."""
    if pooled:
        return output.pooler_output.flatten(1)
    hidden = output.last_hidden_state
    return hidden.mean(dim=(2, 3)) if hidden.ndim == 4 else hidden.mean(dim=1)


def _rgb(images: torch.Tensor) -> torch.Tensor:
    """Grey images `[M, 1, height, width]` in [-1, 1] as `[M, 3, height, width]` uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)


def _settings_of(processor) -> str:
    """Class and settings of an image processor, in short."""
    settings = processor.to_dict()
    text = json.dumps({key: settings.get(key) for key in PROCESSOR_SETTINGS}, sort_keys=True, default=str)
    return f"{type(processor).__name__} {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
