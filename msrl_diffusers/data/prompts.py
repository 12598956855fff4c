"""Prompts from templates: what an image is asked to show, as a sentence and as a vector of attributes.

The templates of RL4Med-DDPO are two diagnoses times the presence of four artifacts, 32 prompts. An artifact that is
not to be seen is not named: text encoders heed the noun more than the "no" before it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from ..errors import InputError


DIAGNOSES = ("melanoma", "nevus")
ARTIFACTS = ("hair", "gel bubble", "ruler", "ink")
ATTRIBUTES = (*DIAGNOSES, *ARTIFACTS)
OPENING = "dermoscopy image of"
WITH, COMMA, AND = " with ", ", ", " and "


@dataclass(frozen=True)
class PromptBuilder:
    """Prompts of one diagnosis and any artifacts, such as `"dermoscopy image of melanoma with hair, ruler and ink"`.

    Attributes:
        diagnoses (`tuple[str]`): of which every image has exactly one.
        artifacts (`tuple[str]`): of which an image has none, some or all.
        opening (`str`): how a prompt begins.

    Raises:
        InputError: no diagnosis, a name that is there twice, or one that the grammar can't tell from its own words.
    """

    diagnoses: Sequence[str] = DIAGNOSES
    artifacts: Sequence[str] = ARTIFACTS
    opening: str = OPENING

    def __post_init__(self):
        for name in ("diagnoses", "artifacts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        names = (*self.diagnoses, *self.artifacts)
        if not self.diagnoses:
            raise InputError("Prompts need at least one diagnosis.")
        if len(set(names)) < len(names):
            raise InputError(f"Attributes need different names, got {list(names)}.")
        for name in (*names, self.opening):
            if not name or name != _normalized(name):
                raise InputError(f"{name!r} can't be part of a prompt; write it in small letters with single spaces.")
        for name in names:
            if any(word in f" {name} " for word in (WITH, COMMA.strip(), AND)):
                raise InputError(
                    f"The attribute {name!r} holds a comma, 'with' or 'and', which join names; rename it."
                )

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """The diagnoses, then the artifacts: the order of `targets`. An only diagnosis is none: all images have it."""
        return (*(self.diagnoses if len(self.diagnoses) > 1 else ()), *self.artifacts)

    def prompts(self) -> list[str]:
        """All prompts, diagnosis by diagnosis; `D * 2^A` of them, 32 by default."""
        return [
            self.build(diagnosis, [name for name, present in zip(self.artifacts, shown, strict=True) if present])
            for diagnosis in self.diagnoses
            for shown in product((False, True), repeat=len(self.artifacts))
        ]

    def build(self, diagnosis: str, artifacts: Collection[str] = ()) -> str:
        """The prompt of a diagnosis with some artifacts, in whatever order these are given.

        Raises:
            InputError: a name that is not among the attributes.
        """
        artifacts = [artifacts] if isinstance(artifacts, str) else list(artifacts)
        if diagnosis not in self.diagnoses:
            raise InputError(f"There is no diagnosis {diagnosis!r}; there are {list(self.diagnoses)}.")
        unknown = [name for name in artifacts if name not in self.artifacts]
        if unknown:
            raise InputError(f"There is no artifact {unknown[0]!r}; there are {list(self.artifacts)}.")
        shown = [name for name in self.artifacts if name in artifacts]
        start = f"{self.opening} {diagnosis}"
        if not shown:
            return start
        *most, last = shown
        return start + WITH + (COMMA.join(most) + AND + last if most else last)

    def describe(self, attributes: Mapping[str, bool | int]) -> str:
        """The prompt of an image with these attributes; what is not named is absent, but for an only diagnosis.

        Raises:
            InputError: an unknown name, or not exactly one diagnosis.
        """
        names = (*self.diagnoses, *self.artifacts)
        unknown = sorted(set(attributes) - set(names))
        if unknown:
            raise InputError(f"There is no attribute {unknown[0]!r}; there are {list(names)}.")
        shown = [name for name in self.diagnoses if attributes.get(name, len(self.diagnoses) == 1)]
        if len(shown) != 1:
            raise InputError(f"An image has one of the diagnoses {list(self.diagnoses)}; this one has {shown}.")
        return self.build(shown[0], [name for name in self.artifacts if attributes.get(name)])

    def parse(self, prompt: str) -> dict[str, bool]:
        """Which attributes `prompt` states, by name in the order of `attribute_names`; capitals and spaces are free.

        Raises:
            InputError: a prompt that is none of `prompts()`.
        """
        text = _normalized(prompt) if isinstance(prompt, str) else ""
        start, _, rest = text.partition(WITH)
        diagnosis = start.removeprefix(self.opening + " ")
        named = rest.replace(AND, COMMA).split(COMMA) if rest else []
        if diagnosis not in self.diagnoses or not set(named) <= set(self.artifacts):
            raise InputError(
                f"The prompt {prompt!r} is outside the templates; write one like {self.prompts()[-1]!r}, of a diagnosis "
                f"among {list(self.diagnoses)} and artifacts among {list(self.artifacts)}."
            )
        expected = self.build(diagnosis, named)
        if text != expected:
            raise InputError(f"The prompt {prompt!r} is outside the templates; write it as {expected!r}.")
        return {name: name in (diagnosis, *named) for name in self.attribute_names}

    def targets(self, prompts: Iterable[str]) -> torch.Tensor:
        """What prompts state as zeros and ones `[B, A]`, float32, columns in the order of `attribute_names`.

        Raises:
            InputError: a prompt outside the templates, or no prompts but something else, such as class labels.
        """
        if isinstance(prompts, (str, torch.Tensor)):
            what = "one string" if isinstance(prompts, str) else "a tensor"
            raise InputError(f"A list of prompts is needed to know what they state, not {what}.")
        rows = [list(self.parse(prompt).values()) for prompt in prompts]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), len(self.attribute_names))


def _normalized(text: str) -> str:
    return " ".join(text.lower().split())
