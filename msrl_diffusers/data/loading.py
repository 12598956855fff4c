"""load_volumes: a data set as it was downloaded, as a `datasets.Dataset`."""

import logging
from pathlib import Path

import datasets

from ..errors import InputError
from .cases import list_cases


logger = logging.getLogger(__name__)


def load_volumes(name: str, data_dir: str | Path, strict: bool = False, **options) -> datasets.Dataset:
    """One row per volume, whatever the data set's layout; images are opened when they are looked at.

    Columns: `image`, or one per modality (`datasets.Nifti`), `label` (`ClassLabel`), `subject_id`, `session`, `split`
    (`"train"`, `"heldout"`, or None where the data set does not say), and `seg` and `orientation` where there are any.
    `orientation` tells where the axes of an Analyze image run to; its header can't.

    Args:
        name: `"brats2019"`, `"oasis1"`, `"bids"`, `"nifti_folder"` or `"datalist"`.
        data_dir: the folder (for a datalist also the JSON file).
        strict: raise where something was left out; else it is logged.
        options: the loader's own (`modality`, `label_column`, `label_bins`, ...).

    Raises:
        InputError: see `list_cases`; or `strict` and something was left out.
    """
    listing = list_cases(name, data_dir, **options)
    if listing.rejected and strict:
        raise InputError(listing.rejected[0].reason)
    for rejection in listing.rejected:
        logger.warning("left out: %s", rejection.reason)
    cases = listing.cases
    columns = {modality: [case.images[modality] for case in cases] for modality in cases[0].images}
    features = {modality: datasets.Nifti() for modality in columns}
    if any(case.seg for case in cases):
        columns["seg"], features["seg"] = [case.seg for case in cases], datasets.Nifti()
    columns["label"] = [listing.classes.index(case.label) for case in cases]
    features["label"] = datasets.ClassLabel(names=listing.classes)
    for column in ("subject_id", "session", "split"):
        columns[column] = [getattr(case, column) for case in cases]
        features[column] = datasets.Value("string")
    if any(case.orientation for case in cases):
        columns["orientation"] = [case.orientation for case in cases]
        features["orientation"] = datasets.Value("string")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
