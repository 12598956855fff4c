"""The images of a study: three sets of different subjects, a subgroup made rare; and folders with captions."""

from pathlib import Path

import torch

from ..data.dermoscopy import load_dermoscopy
from ..data.folders import read_table
from ..data.image_folder import (
    ImageDataset,
    check_attributes,
    find_subject_column,
    load_image_folder,
    relative_name,
    square_image,
    subject_of,
)
from ..errors import InputError
from .config import TextToImageStudyConfig


SPLITS = ("train", "judge", "heldout")
TRAINED_ON = {"reward": "train", "judge": "judge", "features": "judge"}  # classifiers


def make_splits(config: TextToImageStudyConfig) -> dict[str, ImageDataset]:
    """`train`, of pipeline and reward classifier; `judge`, of the judge and the features of the distances; `heldout`,
    of no training. No subject is in two of them.

    Raises:
        InputError: a folder that can't be used, or a split with an attribute of one class only.
    """
    image_size = config.pixels
    if config.data_dir:
        images = load_image_folder(
            config.data_dir, config.builder, image_size, config.diagnosis_column, config.artifact_columns,
            config.diagnosis_names, config.subject_column,
        )  # fmt: skip
        rest, heldout = images.split(config.holdout_fraction, config.data_seed)
        train, judge = rest.split(config.judge_fraction, config.data_seed)
        splits = {"train": train, "judge": judge, "heldout": heldout}
    else:
        count = config.num_per_prompt
        splits = {
            name: load_dermoscopy(count, image_size, config.data_seed, first_index=number * count)
            for number, name in enumerate(SPLITS)
        }
        splits["train"] = thin_out(splits["train"], config.rare_attributes, config.rare_share)
    for name in trained_splits(config):
        check_attributes(splits[name], f"The {name} images")
    return splits


def trained_splits(config: TextToImageStudyConfig) -> list[str]:
    """The splits on which a network is trained, and the hold-out."""
    used = {"heldout", *(TRAINED_ON[role] for role in config.trained_classifiers)}
    if config.augmentation or not config.pretrained_model_name_or_path:
        used.add("train")
    return [name for name in SPLITS if name in used]


def in_subgroup(images: ImageDataset, attributes: list[str]) -> torch.Tensor:
    """Which images `[N]` have all of these attributes; none, if there are no attributes."""
    if not attributes:
        return torch.zeros(len(images), dtype=torch.bool)
    columns = [images.attribute_names.index(name) for name in attributes]
    return images.attributes[:, columns].bool().all(dim=1)


def thin_out(images: ImageDataset, attributes: list[str], share: float) -> ImageDataset:
    """The images with only the first `share` of those that have all of `attributes`, of every prompt, at least one."""
    inside, seen, kept = in_subgroup(images, attributes).tolist(), {}, []
    totals = {}
    for prompt in images.prompts:
        totals[prompt] = totals.get(prompt, 0) + 1
    for row, prompt in enumerate(images.prompts):
        seen[prompt] = seen.get(prompt, 0) + 1
        if not inside[row] or seen[prompt] <= max(1, round(share * totals[prompt])):
            kept.append(row)
    return images.select(kept)


def load_captioned_folder(
    folder: str | Path, caption_column: str = "text", image_size: int = 512, subject_column: str | None = None
) -> ImageDataset:
    """A folder of images with a `metadata.csv` of `file_name` and a caption, as diffusers' scripts take it.

    The data set has no attributes.

    Images of any size and mode are cropped to the square in their middle, resized and made RGB.

    Raises:
        InputError: no such table, column or image, or an empty caption.
    """
    table = Path(folder) / "metadata.csv"
    if not table.is_file():
        raise InputError(f"{folder} has no metadata.csv; write one with the columns file_name and {caption_column}.")
    rows = read_table(table)
    columns = list(rows[0]) if rows else []
    for column in ("file_name", caption_column):
        if column not in columns:
            raise InputError(f"{table} has no column {column!r}; it has {columns}.")
    subject_column = find_subject_column(table, rows, subject_column)
    images, prompts, subjects = [], [], []
    for number, row in enumerate(rows, start=2):
        path = table.parent / row["file_name"]
        if not path.is_file():
            raise InputError(
                f"{table}, line {number}: the image {row['file_name']!r} is missing; copy it or leave out the row."
            )
        if not row[caption_column]:
            raise InputError(f"{table}, line {number}: column {caption_column!r} is empty.")
        images.append(torch.from_numpy(square_image({"path": str(path)}, image_size, str(path))))
        prompts.append(row[caption_column])
        subjects.append(subject_of(row, subject_column, relative_name(path, table.parent)))
    attributes = torch.zeros((len(images), 0), dtype=torch.uint8)
    return ImageDataset(torch.stack(images), attributes, (), prompts, subjects)
