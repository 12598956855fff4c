"""ImageInputs: from samples in [-1, 1] to the pixels a pretrained vision model wants, on tensors.

The image processors of transformers take uint8 images to NumPy and back: no gradient passes, and a generated sample is
rounded on the way. Here the same resizing, cropping and scaling are done on tensors of any device.
"""

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import InputError


MODES = {0: "nearest-exact", 1: "bicubic", 2: "bilinear", 3: "bicubic"}  # by PIL's number; Lanczos is nearly bicubic
CONVNEXT_WARPS_FROM = 384  # pixels; smaller ones are resized by `crop_pct` and cropped
PROBE_SIZE = 96  # pixels of the picture that both are given
TOLERANCE = 0.03  # of the range from black to white: rounding to uint8, and Lanczos by bicubic


class ImageInputs:
    """Resizes to `resize`, crops the middle to `crop`, and maps black and white to where the model expects them.

    Called with samples `[B, 3, H, W]` in [-1, 1], float32, it gives `[B, 3, h, w]`; gradients pass.

    Args:
        size (`int` or `tuple[int, int]`, *optional*): height and width the samples are resized to; None leaves theirs.
        image_mean, image_std (`float` or 3 of them): subtracted from and divided into intensities on [0, 1]. The defaults
            leave samples in [-1, 1].
        shortest_edge (`int`, *optional*): instead of `size`: the shorter edge gets this length, proportions stay.
        crop (`tuple[int, int]`, *optional*): height and width of the crop after that.
        mode (`str`): of `torch.nn.functional.interpolate`; antialiased.

    Raises:
        InputError: samples of other channels than three, or smaller than the crop.
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None = None,
        image_mean: float | list[float] = 0.5,
        image_std: float | list[float] = 0.5,
        shortest_edge: int | None = None,
        crop: tuple[int, int] | None = None,
        mode: str = "bicubic",
    ):
        self.size = (size, size) if isinstance(size, int) else size
        self.shortest_edge, self.crop, self.mode = shortest_edge, crop, mode
        mean, std = (torch.as_tensor(values, dtype=torch.float32).expand(3) for values in (image_mean, image_std))
        self.black, self.white = -mean / std, (1 - mean) / std

    @classmethod
    def of(cls, processor) -> "ImageInputs":
        """What `processor` does: an `ImageInputs`, an image processor of transformers, the size of square images, or
        None for samples as they are.

        What black and white become is asked of the processor, not read from its settings: some scale twice. Then both are
        given the same picture, and must agree.

        Raises:
            InputError: a processor that does something else as well.
        """
        if isinstance(processor, cls):
            return processor
        if processor is None or isinstance(processor, int):
            return cls(processor)
        inputs = cls(**_geometry(processor))
        edge = max(PROBE_SIZE, *(inputs.crop or (0,)))
        levels = [np.full((edge, edge, 3), level, dtype=np.uint8) for level in (0, 255)]
        inputs.black, inputs.white = (_processed(processor, image).mean(dim=(1, 2)) for image in levels)
        _check_agreement(inputs, processor, edge)
        return inputs

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        if samples.ndim != 4 or samples.shape[1] != 3:
            raise InputError(f"RGB samples [B, 3, H, W] are needed, got {list(samples.shape)}.")
        pixels = samples.float() / 2 + 0.5
        height, width = pixels.shape[2:]
        target = self.size
        if self.shortest_edge is not None:
            scale = self.shortest_edge / min(height, width)
            target = (max(self.shortest_edge, int(height * scale)), max(self.shortest_edge, int(width * scale)))
        if target is not None and target != (height, width):
            antialias = {} if self.mode == "nearest-exact" else {"antialias": True}
            pixels = F.interpolate(pixels, target, mode=self.mode, **antialias).clamp(0, 1)  # as uint8 images are
        if self.crop is not None:
            top, left = ((have - want) // 2 for have, want in zip(pixels.shape[2:], self.crop, strict=True))
            if min(top, left) < 0:
                raise InputError(
                    f"Samples of {height} x {width} are smaller than the {self.crop[0]} x {self.crop[1]} pixels that the "
                    "image processor crops; give one that resizes."
                )
            pixels = pixels[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        black, white = (level.to(pixels.device)[:, None, None] for level in (self.black, self.white))
        return black + (white - black) * pixels


def _geometry(processor) -> dict:
    """How an image processor resizes and crops, as arguments of `ImageInputs`."""
    settings = {"mode": MODES.get(int(getattr(processor, "resample", None) or 0), "bilinear")}
    size, crop = _lengths(getattr(processor, "size", None)), _lengths(getattr(processor, "crop_size", None))
    if getattr(processor, "do_resize", False):
        if "height" in size:
            settings["size"] = (size["height"], size["width"])
        elif "shortest_edge" in size:
            settings["shortest_edge"] = edge = size["shortest_edge"]
            crop_share = getattr(processor, "crop_pct", None)
            if crop_share is not None:  # ConvNeXt's
                square = {"size": (edge, edge)}
                cropped = {"shortest_edge": int(edge / crop_share), "crop": (edge, edge)}
                del settings["shortest_edge"]
                settings.update(square if edge >= CONVNEXT_WARPS_FROM else cropped)
    if getattr(processor, "do_center_crop", False) and crop:
        edge = crop.get("shortest_edge")
        settings["crop"] = (crop.get("height", edge), crop.get("width", edge))
    return settings


def _lengths(size) -> dict[str, int]:
    """A size of an image processor as a plain mapping without what is not set."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    return {name: size[name] for name in ("height", "width", "shortest_edge") if size and size.get(name)}


def _processed(processor, image: np.ndarray) -> torch.Tensor:
    """`[3, h, w]` that the processor makes of an image `[H, W, 3]`, uint8."""
    try:
        pixels = processor(images=[image], input_data_format="channels_last", return_tensors="pt")["pixel_values"][0]
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"{type(processor).__name__} does not work as an image processor ({' '.join(str(error).split())}); give one of "
            "transformers, or ImageInputs."
        ) from error
    return torch.as_tensor(pixels).float()


def _check_agreement(inputs: ImageInputs, processor, edge: int) -> None:
    y, x = np.meshgrid(*[np.linspace(0, 1, edge)] * 2, indexing="ij")
    waves = [np.sin(6 * x) * np.cos(4 * y), np.cos(7 * x + 3 * y), x * y]
    image = ((np.stack(waves, axis=-1) + 1) * 127.5).round().astype(np.uint8)
    expected = _processed(processor, image)
    got = inputs(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1)[0]
    spread = (inputs.white - inputs.black).abs().clamp(min=1e-6)[:, None, None]
    if got.shape != expected.shape or not ((got - expected).abs() <= TOLERANCE * spread).all():
        raise InputError(
            f"{type(processor).__name__} does more to an image than resize, crop and scale it, or pads it; give an "
            "ImageInputs with the size, mean and deviation that the model wants."
        )
