"""ImageTextSimilarity: how well an image fits its prompt, by a model that was trained on pairs of both."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError
from ..models.image_inputs import ImageInputs


KINDS = ("cosine", "logit")


class ImageTextSimilarity:
    """Similarity `[B]` of samples `[B, 3, H, W]` in [-1, 1] and their prompts by any CLIP-type model (arXiv 2103.00020,
    2303.15343); differentiable.

    Args:
        model: `CLIPModel`, `SiglipModel`, or another of transformers that gives `image_embeds`, `text_embeds` and
            `logits_per_image`. Frozen.
        processor: its processor, with `image_processor` and `tokenizer`.
        kind: `"cosine"` of the two embeddings, in [-1, 1]; or the `"logit"`, which the model scales and shifts.
        name: in logs and reports; `"image_text_<kind>"` by default.
        batch_size: samples looked at at once.

    Raises:
        InputError: an unknown kind, or a processor without tokenizer or image processor.
    """

    differentiable = True

    def __init__(
        self, model: nn.Module, processor, kind: str = "cosine", name: str | None = None, batch_size: int = 32
    ):
        if kind not in KINDS:
            raise InputError(f"There is no image-text similarity of kind {kind!r}; choose one of {list(KINDS)}.")
        for part in ("tokenizer", "image_processor"):
            if getattr(processor, part, None) is None:
                raise InputError(f"{type(processor).__name__} has no {part}; give the processor of a CLIP-type model.")
        self.model = model.eval().requires_grad_(False)
        self.inputs, self.tokenizer = ImageInputs.of(processor.image_processor), processor.tokenizer
        self.max_tokens = model.config.text_config.max_position_embeddings
        self.kind, self.batch_size = kind, batch_size
        self.name = name or f"image_text_{kind}"

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs) -> "ImageTextSimilarity":
        """From a folder or Hub repository with model and processor; `kwargs` are further arguments.

        Raises:
            InputError: nothing there that can be loaded, or as of the constructor.
        """
        from transformers import AutoModel, AutoProcessor

        try:
            model = AutoModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32, trust_remote_code=False)
            processor = AutoProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise InputError(
                f"{path} can't be loaded as a CLIP-type model ({' '.join(str(error).split())}); give a folder or a Hub "
                "repository with safetensors, tokenizer and image processor."
            ) from error
        return cls(model, processor, **kwargs)

    def __call__(self, samples: torch.Tensor, conditions: Sequence[str]) -> torch.Tensor:
        """Similarities `[B]`, float32.

        Raises:
            InputError: class labels in place of prompts, or a prompt longer than the model reads.
        """
        prompts = [] if isinstance(conditions, (str, torch.Tensor)) else list(conditions)
        if not all(isinstance(prompt, str) for prompt in prompts) or len(prompts) != len(samples):
            raise InputError(f"{self.name} needs one prompt for each of {len(samples)} samples.")
        batches = samples.split(self.batch_size)
        starts = range(0, len(samples), self.batch_size)
        values = [
            self._similarity(batch, prompts[start : start + len(batch)])
            for batch, start in zip(batches, starts, strict=True)
        ]
        return torch.cat(values).float().to(samples.device)

    def _similarity(self, samples: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        parameter = next(self.model.parameters())
        different = sorted(set(prompts))  # a batch has some prompts several times
        rows = torch.tensor([different.index(prompt) for prompt in prompts], device=parameter.device)
        pixels = self.inputs(samples.to(parameter.device)).to(parameter.dtype)
        output = self.model(**self._tokens(different).to(parameter.device), pixel_values=pixels)
        if self.kind == "logit":
            return output.logits_per_image.gather(1, rows[:, None])[:, 0]
        return torch.cosine_similarity(output.image_embeds.float(), output.text_embeds[rows].float(), dim=-1)

    def _tokens(self, prompts: list[str]):
        """Padded to the full length, as SigLIP was trained; CLIP does not mind."""
        tokens = self.tokenizer(prompts, padding="max_length", max_length=self.max_tokens, return_tensors=None)
        longest = max(len(ids) for ids in tokens["input_ids"])
        if longest > self.max_tokens:
            raise InputError(f"A prompt has {longest} tokens, {self.name} reads {self.max_tokens}; shorten it.")
        return tokens.convert_to_tensors("pt")
