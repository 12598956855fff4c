"""msrl prepare: read a data set as it was downloaded, check it, and write volumes that every study runs from.

msrl prepare --dataset brats2019 --data_dir MICCAI_BraTS_2019_Data_Training --split table1 --output_dir data/brats
msrl prepare --dataset nifti_folder --data_dir DIR --label_column age --label_bins 40 60 --output_dir data/mine
msrl prepare --dataset nifti_folder --data_dir DIR --label_column age \\
    --label_bins '{under 40: [null, 40], 60 and over: [60, null]}' --output_dir data/mine
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ..arguments import parse
from ..data.cases import list_cases
from ..data.preparation import prepare_cases, write_rejections
from ..data.processor import VolumeProcessor
from ..data.splits import SIDES, TABLE_1, SplitPlan
from ..data.volumes import VolumeDataset
from ..errors import InputError
from ..plots import plot_volumes
from ..processes import alone_in


@dataclass
class PrepareArguments:
    """Options of `msrl prepare`."""

    dataset: str = field(metadata={"help": "brats2019, oasis1, bids, nifti_folder or datalist."})
    data_dir: str = field(metadata={"help": "Folder of the data set (for a datalist also its JSON file)."})
    output_dir: str = field(metadata={"help": "Folder to write."})
    modality: list[str] | None = field(
        default=None, metadata={"help": "Images of a case; several become channels. The loader's default if unset."}
    )
    kind: str | None = field(default=None, metadata={"help": "oasis1: t88_masked, t88, subj_111 or raw."})
    csv: str | None = field(default=None, metadata={"help": "oasis1: the table of ratings, if it lies elsewhere."})
    label_column: str | None = field(default=None, metadata={"help": "Column with the classes."})
    label_bins: list[str] | None = field(
        default=None,
        metadata={
            "help": "Classes of a numeric column: edges (40 60 gives three), or {name: [low, high], ...} in quotes, null for "
            "no bound; values in no bin are left out."
        },
    )
    subject_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that names the subject, for splits: subject_id or participant_id, or each file, if unset."
        },
    )
    image_size: int = field(default=64, metadata={"help": "Voxels along each edge of the cubes."})
    field_of_view: float = field(default=192.0, metadata={"help": "Edge of the cubes in millimetres."})
    split: str = field(
        default="auto",
        metadata={
            "help": "auto (the data set's own, if it has a hold-out, else holdout_fraction) or table1 (as arXiv 2603.06173)."
        },
    )
    holdout_fraction: float = field(default=0.3, metadata={"help": "Share of every class' subjects held out."})
    split_seed: int = field(default=0, metadata={"help": "Seed that draws the held-out subjects."})
    train_subjects: str | None = field(default=None, metadata={"help": "File with one training subject per line."})
    heldout_subjects: str | None = field(default=None, metadata={"help": "File with one held-out subject per line."})
    num_workers: int = field(default=2, metadata={"help": "Processes; 0 works in this one."})
    strict: bool = field(default=False, metadata={"help": "Stop at the first file that can't be used."})

    def __post_init__(self):
        if self.split not in ("auto", "table1"):
            raise InputError(f"split must be auto or table1, got {self.split!r}.")
        if self.split == "table1" and self.dataset not in TABLE_1:
            raise InputError(f"split table1 is that of {sorted(TABLE_1)}, not of {self.dataset!r}.")

    def bins(self) -> list[float] | dict | None:
        """The classes of a numeric column, as the loaders take them."""
        if self.label_bins is None:
            return None
        try:
            mapping = yaml.safe_load(" ".join(self.label_bins))
            return mapping if isinstance(mapping, dict) else [float(edge) for edge in self.label_bins]
        except (yaml.YAMLError, ValueError):
            raise InputError(
                f"label_bins must be numbers or {{name: [low, high], ...}}, got {' '.join(self.label_bins)!r}."
            ) from None

    def plan(self) -> SplitPlan:
        """How volumes are divided."""
        return SplitPlan(
            self.holdout_fraction,
            self.split_seed,
            TABLE_1[self.dataset] if self.split == "table1" else None,
            _subjects(self.train_subjects),
            _subjects(self.heldout_subjects),
        )


def run(arguments: Sequence[str]) -> None:
    """Prepare what the command line says and print the summary."""
    (args,) = parse([PrepareArguments], None, arguments, prog="msrl prepare", description=__doc__)
    output_dir = Path(args.output_dir)
    with alone_in(output_dir):
        listing = list_cases(
            args.dataset, args.data_dir,
            modality=args.modality, kind=args.kind, csv=args.csv, label_column=args.label_column, label_bins=args.bins(),
            subject_column=args.subject_column,
        )  # fmt: skip
        if args.strict and listing.rejected:
            write_rejections(listing.rejected, output_dir / "rejected.csv")
            raise InputError(listing.rejected[0].reason)
        processor = VolumeProcessor(args.image_size, args.field_of_view)
        summary = prepare_cases(listing, processor, args.plan(), output_dir, args.num_workers, args.strict)
        shown = {
            side: VolumeDataset.load(output_dir / f"{side}.safetensors", per_class=4).pixel_values for side in SIDES
        }
        plot_volumes(shown, output_dir / "sheet.png")
    sys.stdout.write(json.dumps(summary, indent=2) + "\n")


def _subjects(path: str | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()  # some editors put a mark in front
    except OSError as error:
        raise InputError(f"{path} can't be read as a list of subjects: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} can't be read as a list of subjects: save it as text in UTF-8.") from error
    return tuple(line.strip() for line in lines if line.strip())
