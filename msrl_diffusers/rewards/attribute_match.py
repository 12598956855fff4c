"""AttributeMatch: does an image show what its prompt states? An image classifier says.

The reward of RL4Med-DDPO: the share of six attributes that a classifier, thresholded, reads off the image as the prompt
states them. It has seven levels and no gradient; `"probability"` is its smooth form. `"exact"` is the usual figure of an
evaluation: all attributes right, or nothing.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..data.prompts import PromptBuilder
from ..errors import InputError
from ..models.image_classifiers import load_image_classifier
from ..models.image_inputs import ImageInputs


KINDS = ("share", "probability", "exact")


class AttributeMatch:
    """How far a classifier finds in samples `[B, 3, H, W]` in [-1, 1] what their prompts state, `[B]` in [0, 1].

    Args:
        model: an image classifier of transformers whose logits are multi-label; its `config.id2label` names the
            attributes of `builder` (in any order, capitals and underscores do not matter) and maybe others. Frozen.
        processor: the classifier's image processor, a `models.image_inputs.ImageInputs` (mean, deviation, size), the size
            of the squares in [-1, 1] that it wants, or None for samples as they are.
        builder: the prompts' grammar and the names of the attributes.
        kind: `"share"` of the attributes on the stated side of `threshold`; mean `"probability"` of the stated values,
            differentiable; `"exact"`, 1 if all match.
        threshold: an attribute is seen where its probability is this or more.
        name: in logs and reports; `"attribute_<kind>"` by default.
        batch_size: samples looked at at once.

    Raises:
        InputError: a classifier of single-label or lacking attributes, an unknown kind, or a threshold outside (0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        processor=None,
        builder: PromptBuilder | None = None,
        kind: str = "share",
        threshold: float = 0.5,
        name: str | None = None,
        batch_size: int = 32,
    ):
        if kind not in KINDS:
            raise InputError(f"There is no attribute match of kind {kind!r}; choose one of {list(KINDS)}.")
        if not 0 < threshold < 1:
            raise InputError(f"threshold must lie between 0 and 1, got {threshold}.")
        self.builder = builder or PromptBuilder()
        self.columns = attribute_columns(model, self.builder.attribute_names)
        self.inputs = ImageInputs.of(processor)
        self.model = model.eval().requires_grad_(False)
        self.kind, self.threshold, self.batch_size = kind, threshold, batch_size
        self.name = name or f"attribute_{kind}"

    @classmethod
    def from_pretrained(cls, path: str | Path, builder: PromptBuilder | None = None, **kwargs) -> "AttributeMatch":
        """From a folder or Hub repository with classifier and image processor; `kwargs` are further arguments.

        Raises:
            InputError: nothing there that can be loaded, or as of the constructor.
        """
        model, processor = load_image_classifier(path)
        return cls(model, processor, builder, **kwargs)

    @property
    def differentiable(self) -> bool:
        """Whether gradients pass to the samples: those of probabilities do, those of counts do not."""
        return self.kind == "probability"

    def probabilities(self, samples: torch.Tensor) -> torch.Tensor:
        """What the classifier sees, `[B, A]` in [0, 1], columns in the order of `builder.attribute_names`.

        Raises:
            InputError: a probability that is no number, of samples or a classifier that hold some such: compared with the threshold
                it would count as absent.
        """
        parameter = next(self.model.parameters())
        logits = [
            self.model(pixel_values=self.inputs(batch.to(parameter.device)).to(parameter.dtype)).logits
            for batch in samples.split(self.batch_size)
        ]
        found = torch.cat(logits)[:, self.columns].float().sigmoid().to(samples.device)
        wrong = int((~found.isfinite()).any(dim=1).sum())
        if wrong:
            raise InputError(
                f"{self.name}: the classifier gives {wrong} of {len(found)} samples probabilities that are no numbers; look for samples "
                "that are not finite, as of a policy that diverged or of fp16, else train the classifier anew."
            )
        return found

    def matches(self, samples: torch.Tensor, conditions: Sequence[str]) -> torch.Tensor:
        """Which attributes are as stated, `[B, A]` bool; for the rate per attribute.

        Raises:
            InputError: a prompt outside the templates, or probabilities that are no numbers.
        """
        targets = self.builder.targets(conditions).bool()  # before the classifier runs for nothing
        return (self.probabilities(samples) >= self.threshold) == targets.to(samples.device)

    def __call__(self, samples: torch.Tensor, conditions: Sequence[str]) -> torch.Tensor:
        """Rewards `[B]`, float32.

        Raises:
            InputError: a prompt outside the templates, class labels in place of prompts, or probabilities that are no numbers.
        """
        if self.kind == "probability":
            targets = self.builder.targets(conditions).to(samples.device)
            probabilities = self.probabilities(samples)
            return (targets * probabilities + (1 - targets) * (1 - probabilities)).mean(dim=1)
        matches = self.matches(samples, conditions)
        return (matches.all(dim=1) if self.kind == "exact" else matches.float().mean(dim=1)).float()


def attribute_columns(model: nn.Module, attribute_names: Sequence[str]) -> list[int]:
    """Which logits of a classifier stand for these attributes.

    Raises:
        InputError: the classifier is not multi-label, or has no such label; or there are no attributes.
    """
    if not attribute_names:
        raise InputError("There is no attribute to tell images by: prompts need several diagnoses, or artifacts.")
    config = model.config
    if config.problem_type not in (None, "multi_label_classification"):
        raise InputError(
            f"{type(model).__name__} is trained for {config.problem_type}; attributes need multi_label_classification."
        )
    labels = {_key(label): int(column) for column, label in config.id2label.items()}
    missing = [name for name in attribute_names if _key(name) not in labels]
    if missing:
        raise InputError(
            f"{type(model).__name__} has no label {missing[0]!r} of the prompts' attributes; it has "
            f"{list(config.id2label.values())}."
        )
    return [labels[_key(name)] for name in attribute_names]


def _key(name: str) -> str:
    return str(name).lower().replace("_", " ").strip()
