"""Features of RGB images for Frechet distances: the last layer but one of an image classifier, or Inception-v3."""

from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ..data.image_folder import ImageDataset
from ..errors import InputError
from ..evaluation.extractors import Extractor, load_extractor
from ..models.image_classifiers import load_image_classifier
from ..models.image_inputs import ImageInputs


class ClassifierExtractor(Extractor):
    """What an image classifier of transformers gives to its last linear layer.

    `[B, F]` of samples `[B, 3, H, W]` in [-1, 1].

    Raises:
        InputError: a classifier without a linear layer.
    """

    def __init__(self, model: nn.Module, processor):
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise InputError(f"{type(model).__name__} has no linear layer to take the features before; give another.")
        super().__init__(f"{type(model).__name__}/before the last linear layer", model, linear[-1].in_features)
        self.inputs, self._last = ImageInputs.of(processor), [linear[-1]]  # in a list: it is no part of its own

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        seen, parameter = [], next(self.network.parameters())
        handle = self._last[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            self.network(pixel_values=self.inputs(samples).to(parameter.dtype))
        finally:
            handle.remove()
        return seen[0].flatten(1)


class InceptionImageExtractor(Extractor):
    """Inception-v3 of the FID (arXiv 1706.08500), as torch-fidelity runs it, on RGB images rounded to uint8.

    `[B, 2048]` of samples `[B, 3, H, W]` in [-1, 1].
    """

    def __init__(self, spec: str = "inception"):
        network = load_extractor(spec).network
        super().__init__(
            "inception-v3/2048/RGB/299 bilinear antialiased", network, 2048, frozenset({"fc.weight", "fc.bias"})
        )

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        return self.network(((samples.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))


def load_image_extractor(spec: str | Path) -> Extractor:
    """`inception`, `inception:FILE.safetensors`, or the folder (or Hub repository) of an image classifier.

    Raises:
        InputError: nothing that can be loaded.
    """
    if str(spec).partition(":")[0] == "inception":
        return InceptionImageExtractor(str(spec))
    return ClassifierExtractor(*load_image_classifier(spec))


@torch.no_grad()
def image_features(extractor: Extractor, images: ImageDataset, batch_size: int = 32) -> torch.Tensor:
    """Features `[N, 1, 1, F]`, float64 on the CPU, in the form that `evaluation.fidelity` takes."""
    device = next(extractor.parameters()).device
    parts = [
        extractor(images.batch(indices, device)["pixel_values"]).double().cpu()
        for indices in tqdm(torch.arange(len(images)).split(batch_size), desc="features", leave=False, disable=None)
    ]
    return torch.cat(parts)[:, None, None]
