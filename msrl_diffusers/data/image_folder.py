"""ImageDataset: 2D images in memory with attributes and prompts, and the image folders they are read from."""

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..errors import InputError
from ..seeding import generator_for
from .cases import class_is_given, default_subject_column, without_subjects
from .folders import read_table
from .prompts import PromptBuilder
from .rows import row_numbers


logger = logging.getLogger(__name__)

DIAGNOSIS_CODES = {"mel": "melanoma", "nv": "nevus"}  # as ISIC writes them
TRUE, FALSE = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
WIDE_MODES = ("I", "F")
WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
NAMED = 10  # diagnoses that are left out, in the sentence which says so


@dataclass(frozen=True)
class ImageDataset:
    """Images of one size, one entry per image in all fields but `attribute_names`.

    Attributes:
        pixel_values (`Tensor [N, 3, H, W]`): RGB, **uint8**, as files hold it and as an FID reads it; `batch` gives
            float32 in [-1, 1], `to_uint8` goes the other way.
        attributes (`Tensor [N, A]`): 0 or 1, uint8.
        attribute_names (`tuple[str]`): names of the A columns, of `PromptBuilder.attribute_names`.
        prompts (`list[str]`): what an image shows, as a sentence.
        subject_ids (`list[str]`): whose image it is; splits are made by these.

    Raises:
        InputError: lengths, shapes or types that do not fit.
    """

    pixel_values: torch.Tensor
    attributes: torch.Tensor
    attribute_names: Sequence[str]
    prompts: list[str]
    subject_ids: list[str]

    def __post_init__(self):
        object.__setattr__(self, "attribute_names", tuple(self.attribute_names))
        sizes = [len(self.pixel_values), len(self.attributes), len(self.prompts), len(self.subject_ids)]
        if len(set(sizes)) > 1:
            raise InputError("{} images, {} rows of attributes, {} prompts, {} subject ids: not equal.".format(*sizes))
        if self.pixel_values.dtype != torch.uint8 or self.pixel_values.ndim != 4 or self.pixel_values.shape[1] != 3:
            raise InputError(
                f"Images are uint8 [N, 3, H, W], got {self.pixel_values.dtype} {list(self.pixel_values.shape)}; "
                "to_uint8 makes them of samples in [-1, 1]."
            )
        if self.attributes.shape != (len(self), len(self.attribute_names)):
            raise InputError(
                f"{len(self)} images with {len(self.attribute_names)} attributes need as many zeros and ones, got "
                f"{list(self.attributes.shape)}."
            )
        if not ((self.attributes == 0) | (self.attributes == 1)).all():
            raise InputError("Attributes are 0 or 1; threshold probabilities first.")
        object.__setattr__(self, "attributes", self.attributes.to(torch.uint8))

    def __len__(self) -> int:
        return len(self.subject_ids)

    @property
    def image_size(self) -> int:
        """Edge of the images in pixels."""
        return self.pixel_values.shape[-1]

    def batch(self, indices: Sequence[int] | torch.Tensor, device: torch.device | str = "cpu") -> dict:
        """`{"pixel_values": [B, 3, H, W] float32 in [-1, 1], "attributes": [B, A] float32, "prompt": list[str],
        "subject_id": list[str]}`."""
        indices = row_numbers(indices, len(self))
        return {
            "pixel_values": to_samples(self.pixel_values[indices].to(device)),
            "attributes": self.attributes[indices].to(device, torch.float32),
            "prompt": [self.prompts[i] for i in indices.tolist()],
            "subject_id": [self.subject_ids[i] for i in indices.tolist()],
        }

    def select(self, indices: Sequence[int] | torch.Tensor) -> "ImageDataset":
        """The images at `indices`, in that order, or where a Boolean mask of all is true."""
        indices = row_numbers(indices, len(self))
        return ImageDataset(
            self.pixel_values[indices],
            self.attributes[indices],
            self.attribute_names,
            [self.prompts[i] for i in indices.tolist()],
            [self.subject_ids[i] for i in indices.tolist()],
        )

    def split(self, holdout_fraction: float, seed: int = 0) -> tuple["ImageDataset", "ImageDataset"]:
        """Training and held-out images, no subject in both.

        Subjects are drawn systematically over the prompts (a subject counts under that of its first image), so that
        every prompt gives the fraction up to one subject, also where it has very few.

        Raises:
            InputError: the fraction is not inside (0, 1), or leaves one side without images.
        """
        if not 0 < holdout_fraction < 1:
            raise InputError(f"holdout_fraction must lie between 0 and 1, got {holdout_fraction}.")
        members = defaultdict(list)
        for subject, prompt in reversed(dict(zip(self.subject_ids[::-1], self.prompts[::-1], strict=True)).items()):
            members[prompt].append(subject)
        order = []
        for prompt in sorted(members):
            shuffled = torch.randperm(len(members[prompt]), generator=generator_for(seed, "split", prompt))
            order += [sorted(members[prompt])[position] for position in shuffled.tolist()]
        due = [int(position * holdout_fraction + 0.5) for position in range(len(order) + 1)]
        heldout = {subject for subject, before, after in zip(order, due, due[1:], strict=False) if after > before}
        sides = torch.tensor([subject in heldout for subject in self.subject_ids], dtype=torch.bool)
        if not len(self) or sides.all() or not sides.any():
            raise InputError(
                f"{len(order)} subjects are too few for a hold-out of {holdout_fraction:.0%}; give more or another fraction."
            )
        return self.select((~sides).nonzero()[:, 0]), self.select(sides.nonzero()[:, 0])

    @classmethod
    def from_samples(
        cls, samples: torch.Tensor, prompts: Sequence[str], builder: PromptBuilder | None = None, name: str = "sample"
    ) -> "ImageDataset":
        """Generated images `[N, 3, H, W]` in [-1, 1] with the attributes that their prompts state; each is a subject of
        its own, `"{name}-{number}"`.

        Raises:
            InputError: a prompt outside the templates, or not one per sample.
        """
        builder = builder or PromptBuilder()
        subjects = [f"{name}-{number:06d}" for number in range(len(samples))]
        targets = builder.targets(prompts)
        return cls(to_uint8(samples), targets, builder.attribute_names, list(prompts), subjects)

    @classmethod
    def cat(cls, parts: Sequence["ImageDataset"]) -> "ImageDataset":
        """All images of the parts, one part after the other.

        Raises:
            InputError: nothing to join, or parts of different size or attributes.
        """
        kinds = {(part.pixel_values.shape[2:], part.attribute_names) for part in parts}
        if len(kinds) != 1:
            raise InputError(f"Images of one size and one set of attributes can be joined, got {len(kinds)} kinds.")
        return cls(
            torch.cat([part.pixel_values for part in parts]),
            torch.cat([part.attributes for part in parts]),
            parts[0].attribute_names,
            [prompt for part in parts for prompt in part.prompts],
            [subject for part in parts for subject in part.subject_ids],
        )

    def save(self, path: str | Path) -> None:
        """Write a single safetensors file, under a temporary name first."""
        path = Path(path)
        lists = {name: json.dumps(getattr(self, name)) for name in ("attribute_names", "prompts", "subject_ids")}
        tensors = {"pixel_values": self.pixel_values.contiguous(), "attributes": self.attributes.contiguous()}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, lists)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> "ImageDataset":
        """Read a file written by `save`.

        Raises:
            InputError: the file is missing or is not such a file; the sentence names it.
        """
        try:
            with safe_open(path, framework="pt") as file:
                lists = {name: json.loads(text) for name, text in file.metadata().items()}
                return cls(
                    file.get_tensor("pixel_values"),
                    file.get_tensor("attributes"),
                    lists["attribute_names"],
                    lists["prompts"],
                    lists["subject_ids"],
                )
        except (OSError, SafetensorError, KeyError, AttributeError, ValueError) as error:
            raise InputError(f"{path} can't be read as a set of images ({error}); write it anew.") from error


def to_samples(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(samples: torch.Tensor) -> torch.Tensor:
    """Samples in [-1, 1] as uint8 images: clamped and rounded, so that white is 255 and does not wrap around to 0."""
    return ((samples.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def check_attributes(dataset: ImageDataset, what: str) -> None:
    """Raise InputError unless some images have every attribute and some have it not; `what` begins the sentence."""
    for name, column in zip(dataset.attribute_names, dataset.attributes.T, strict=True):
        if column.float().mean() in (0, 1) or not len(column):
            value = int(column[0]) if len(column) else "nothing"
            raise InputError(
                f"{what}: the attribute {name!r} is {value} in all {len(column)} images; give images with it and "
                "without it, or leave it out of the PromptBuilder."
            )


def load_image_folder(
    folder: str | Path,
    builder: PromptBuilder | None = None,
    image_size: int = 64,
    diagnosis_column: str = "diagnosis",
    artifact_columns: Mapping[str, str] | None = None,
    diagnosis_names: Mapping[str, str] | None = None,
    subject_column: str | None = None,
    both_classes: bool = True,
) -> ImageDataset:
    """A folder of images with a `metadata.csv`, in the layout of `datasets`' imagefolder, as ISIC 2019 can be put into.

    A column `file_name` names the image of a row. The diagnosis is a name in `diagnosis_column`, or a 1 in one of several
    columns named after diagnoses (ISIC's `MEL`, `NV`, ...); rows of other diagnoses than the builder's are no part of the
    data set (a warning counts them). Images of any size and mode are turned upright, cropped to the square in their middle,
    resized and made RGB.

    Args:
        folder: with `metadata.csv`.
        builder: names of diagnoses and artifacts, and the prompts made of them.
        image_size: edge of the images in pixels.
        diagnosis_column: where the diagnosis stands; if the table lacks it, columns named after diagnoses are looked for.
        artifact_columns: column of an artifact by its name; by default one that is named like it, where capitals, spaces
            and underscores do not matter (`gel_bubble`). They hold 0 or 1.
        diagnosis_names: the builder's name of a diagnosis by what stands in the table (`{"MEL": "melanoma"}`), for the
            values of `diagnosis_column` or the names of columns; ISIC's codes are known.
        subject_column: column of whose image it is (`patient_id`, `lesion_id`); by default `subject_id` or `participant_id`, or
            each file by itself (and a warning) where the table has none.
        both_classes: refuse a table in which an attribute has the same value in every row.

    Raises:
        InputError: no metadata.csv, a missing column, file or value, an image that can't be used, no row left, or an
            attribute of one class only.
    """
    builder, folder = builder or PromptBuilder(), Path(folder)
    table = folder / "metadata.csv"
    described = _describe_rows(
        table, builder, diagnosis_column, artifact_columns or {}, diagnosis_names or {}, subject_column
    )
    images = torch.empty((len(described), 3, image_size, image_size), dtype=torch.uint8)
    attributes, prompts, subjects = [], [], []
    for name, (values, subject) in tqdm(described.items(), desc="images", disable=None):
        path = str(folder / name)
        images[len(subjects)] = torch.from_numpy(square_image({"path": path}, image_size, path))
        attributes.append([values[attribute] for attribute in builder.attribute_names])
        prompts.append(builder.describe(values))
        subjects.append(subject)
    loaded = ImageDataset(images, torch.tensor(attributes), builder.attribute_names, prompts, subjects)
    if both_classes:
        check_attributes(loaded, str(table))
    return loaded


def square_image(source: Image.Image | Mapping, image_size: int, name: str) -> np.ndarray:
    """An image, or `{"path", "bytes"}` of one, as uint8 `[3, image_size, image_size]`: upright, the square in its middle,
    bicubic, RGB; transparent pixels become white.

    Raises:
        InputError: it can't be opened, is damaged, has more bits per channel than can be kept, or uses fewer than it has.
    """
    try:
        if isinstance(source, Mapping):
            source = Image.open(BytesIO(source["bytes"]) if source.get("bytes") else source["path"])
        with source as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode in WIDE_MODES:
                raise InputError(f"{name} has 32 bits per pixel (mode {image.mode}); save it as 8-bit RGB.")
            if image.mode.startswith("I;16"):  # PIL would clip it at 255
                image = Image.fromarray(_eight_bits(np.asarray(image), name))
            if "transparency" in image.info or image.mode in WITH_ALPHA:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            square = ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.BICUBIC)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{name} can't be read as an image ({_one_line(error)}); copy or convert it again."
        ) from error
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """The upper halves of 16-bit values; of 12-bit ones (a detector's, 0 to 4095) these would be 16 levels of black."""
    lowest, highest = values.min(), values.max()
    if lowest < highest < 4096:
        raise InputError(
            f"{name} has 16 bits per pixel, but no value above {highest}, as 12-bit images have; multiply the values of all images by "
            "16, or save them as 8-bit."
        )
    return (values >> 8).astype(np.uint8)


def _describe_rows(
    table: Path,
    builder: PromptBuilder,
    diagnosis_column: str,
    artifact_columns: Mapping[str, str],
    diagnosis_names: Mapping[str, str],
    subject_column: str | None,
) -> dict[str, tuple[dict[str, int], str]]:
    """Attributes and subject by file name, of the rows whose diagnosis is among the builder's."""
    if not table.is_file():
        raise InputError(
            f"{table.parent} has no metadata.csv; write one with the columns file_name, {diagnosis_column} and one per "
            f"artifact ({', '.join(builder.artifacts)}) beside the images."
        )
    rows = read_table(table, delimiters=",")  # the only one that imagefolder takes
    if not rows:
        raise InputError(f"{table} has no rows.")
    columns = list(rows[0])
    if "file_name" not in columns:
        raise InputError(f"{table} has no column file_name; it has {columns}.")
    artifacts = {name: _artifact_column(table, columns, name, artifact_columns) for name in builder.artifacts}
    known = {**DIAGNOSIS_CODES, **{name: name for name in builder.diagnoses}, **diagnosis_names}
    names = {_key(code): name for code, name in known.items()}
    one_hot = {column: names[_key(column)] for column in columns if names.get(_key(column)) in builder.diagnoses}
    if diagnosis_column not in columns and set(one_hot.values()) != set(builder.diagnoses):
        raise InputError(
            f"{table} has no column {diagnosis_column!r}, nor one for each of {list(builder.diagnoses)}; it has {columns}."
        )
    subject_column = find_subject_column(table, rows, subject_column)
    kept, left_out = [], Counter()
    for number, row in enumerate(rows, start=2):
        place = f"{table}, line {number}"
        file_name = relative_name(table.parent / row["file_name"], table.parent)
        if not (table.parent / file_name).is_file():
            raise InputError(f"{place}: the image {row['file_name']!r} is missing; copy it or leave out the row.")
        if diagnosis_column in columns:
            if not row[diagnosis_column]:
                raise InputError(f"{place}: column {diagnosis_column!r} is empty.")
            shown = [names.get(_key(row[diagnosis_column]))]
        else:
            shown = [name for column, name in one_hot.items() if _truth(row[column], place, column)]
        if len(shown) > 1:
            raise InputError(f"{place} has the diagnoses {shown}; an image has one.")
        if not set(shown) & set(builder.diagnoses):
            left_out[row.get(diagnosis_column)] += 1
            continue
        kept.append((number, row, file_name, shown[0]))
    if left_out:
        found = [f"{count} of {name!r}" for name, count in left_out.most_common(NAMED) if name is not None]
        found += ["..."] if len(left_out) > NAMED else []
        logger.warning(
            "%s: %d of %d rows have a diagnosis that is none of %s and are left out%s; if some mean one of these, say so by diagnosis_names.",
            table, left_out.total(), len(rows), list(builder.diagnoses), f" ({', '.join(found)})" if found else "",
        )  # fmt: skip
    if not kept:
        raise InputError(f"{table} has no row with a diagnosis among {list(builder.diagnoses)}.")
    for name, column in artifacts.items():
        empty = [number for number, row, *_ in kept if not class_is_given(row[column])]
        if empty:
            raise InputError(
                f"{table}: column {column!r} is empty in {len(empty)} rows (line {empty[0]} first): fill it, leave these rows out, or "
                f"take {name!r} out of artifacts."
            )
    described = {}
    for number, row, file_name, diagnosis in kept:
        place = f"{table}, line {number}"
        values = {name: int(name == diagnosis) for name in builder.diagnoses}
        values |= {name: _truth(row[column], place, column) for name, column in artifacts.items()}
        if file_name in described:
            raise InputError(f"{place}: {file_name} has a row already; give each image one.")
        described[file_name] = (values, subject_of(row, subject_column, file_name))
    return described


def find_subject_column(table: Path, rows: Sequence[Mapping[str, str]], subject_column: str | None) -> str:
    """The column of subjects of a table's rows: the one that was named, or else the default. A warning is logged where no row has a
    subject.

    Raises:
        InputError: there is no column of the name given.
    """
    columns = list(rows[0])
    if subject_column and subject_column not in columns:
        raise InputError(f"{table} has no column {subject_column!r} of subjects; it has {columns}.")
    column = subject_column or default_subject_column(columns)
    if not any(class_is_given(row.get(column)) for row in rows):
        logger.warning("%s", without_subjects(table, len(rows), "images"))
    return column


def subject_of(row: Mapping[str, str], subject_column: str, file_name: str) -> str:
    """Whom an image shows; one whose subject is not known, a subject of its own: `file_name`, with the folders it lies in, as
    folders of patients may hold files of the same names."""
    subject = row.get(subject_column)
    return subject if class_is_given(subject) else file_name


def _artifact_column(table: Path, columns: Sequence[str], name: str, given: Mapping[str, str]) -> str:
    """The column of the artifact `name`."""
    if name in given:
        found = [column for column in columns if column == given[name]]
    else:
        found = [column for column in columns if _key(column) == _key(name)]
    if len(found) != 1:
        wanted = given.get(name, name.replace(" ", "_"))
        what = f"no column {wanted!r}" if not found else f"several columns {found}"
        raise InputError(f"{table} has {what} for the artifact {name!r}; it has {list(columns)}.")
    return found[0]


def _truth(value: str, place: str, column: str) -> int:
    if value.lower() not in (*TRUE, *FALSE):
        raise InputError(f"{place}: column {column!r} must be 0 or 1, got {value!r}.")
    return int(value.lower() in TRUE)


def relative_name(path: str | Path, folder: Path) -> str:
    """A file's path within `folder`, written in one way."""
    return Path(os.path.relpath(path, folder)).as_posix()


def _key(name: str) -> str:
    """A name without what tables write in different ways."""
    return name.lower().replace("_", " ").replace("-", " ").strip()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
