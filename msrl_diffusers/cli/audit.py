"""msrl audit: do generated volumes copy training volumes? A report with the closest pairs.

Folders of NIfTI, prepared files, or a pipeline on the second place:

    msrl audit data/brats/train.safetensors outputs/brains --held_out data/brats/heldout.safetensors --output_dir outputs/audit
    msrl audit data/brats/train.safetensors OWNER/NAME --num_volumes 64 --output_dir outputs/audit
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..arguments import parse
from ..evaluation.extractors import load_extractor
from ..evaluation.memorization import Pair, audit, check_references
from ..evaluation.page import Figure, write_report
from ..evaluation.sources import VolumeSource
from ..plots import plot_volumes
from ..processes import check_writable, keep_freed_memory
from ..study.report import git_commit, versions
from .sets import SET, SetArguments, open_generated, open_set


SHOWN_PAIRS = 8
LISTED = 100  # on the pages; the JSON has all
CAPTION = (
    "Generated volumes above their nearest training volumes, most copy-like first, mirrored where the mirror image is "
    "nearer. It shows training volumes: share it only as you may share those."
)


@dataclass
class AuditArguments:
    """Options of `msrl audit`."""

    train: str = field(metadata={"help": f"What the generator was trained on: {SET}."})
    generated: str = field(metadata={"help": f"What it made: {SET}, or the pipeline's folder or Hub repository."})
    output_dir: str = field(metadata={"help": "Folder to write audit.json, audit.md, audit.html and a figure to."})
    held_out: str | None = field(
        default=None,
        metadata={
            "help": f"Real volumes that no training saw, which set the threshold: {SET}. Unset: training volumes."
        },
    )
    extractor: str | None = field(
        default=None, metadata={"help": "Also compare features: folder of an extractor, or a name, as msrl evaluate."}
    )


def run(arguments: Sequence[str]) -> None:
    """Audit what the command line says; finding copies is no failure."""
    args, set_args = parse(
        [AuditArguments, SetArguments], None, arguments,
        positionals=("train", "generated"), prog="msrl audit", description=__doc__,
    )  # fmt: skip
    check_writable(args.output_dir)
    keep_freed_memory()
    train = open_set(args.train, set_args)
    held_out = args.held_out and open_set(args.held_out, set_args)
    check_references(train, held_out)
    # classes in turn, whatever the mix of real ones is: copies are looked for in all
    generated = open_generated(args.generated, set_args, args.output_dir, train)
    extractor = load_extractor(args.extractor) if args.extractor else None
    if extractor is not None:
        extractor.to("cuda" if torch.cuda.is_available() else "cpu")
    result = audit(train, generated, held_out, extractor, batch_size=set_args.batch_size, seed=set_args.seed)
    output_dir, shown = Path(args.output_dir), result.pairs[:SHOWN_PAIRS]
    figure = output_dir / "closest_pairs.png"
    _plot_pairs(shown, train, generated, figure)
    content = {
        **result.summary(),
        "closest": [asdict(pair) for pair in shown],
        "extractor": extractor and extractor.identity,
        "settings": {**asdict(args), **asdict(set_args)},
        "shape": list(train.shape),
        "spacing": list(train.spacing),
        "seed": set_args.seed,
        "versions": versions(),
        "commit": git_commit(),
    }
    write_report(output_dir, "audit", "Memorization audit", content, _sections(content, figure))
    sys.stdout.write(f"{_finding(content)} Report: {output_dir / 'audit.html'}\n")


def _plot_pairs(pairs: Sequence[Pair], train: VolumeSource, generated: VolumeSource, path: Path) -> None:
    """Every pair's generated volume, mirrored if that is what was found, above its nearest training volume."""
    above = generated.take([pair.index for pair in pairs])
    for volume, pair in zip(above, pairs, strict=True):
        if pair.flipped:
            volume.copy_(volume.flip(-1))
    plot_volumes(
        {"generated": above, "nearest training volume": train.take([pair.nearest_index for pair in pairs])}, path
    )


def _finding(content: dict) -> str:
    low, high = content["interval"]
    return (
        f"{content['n_copies']} of {content['n_generated']} generated volumes look like copies of training volumes "
        f"(95 % interval {low:.1%} to {high:.1%}; at most about {content['expected_false_positives']:.1f} would be flagged by "
        "chance)."
    )


def _sections(content: dict, figure: Path) -> list[tuple]:
    copies = content["copies"]
    blocks = [_pair_table(copies[:LISTED])] if copies else ["None was found."]
    if len(copies) > LISTED:
        blocks.append(f"These are the first {LISTED} of {len(copies)}.")
    alt = f"Slices of {len(content['closest'])} generated volumes, each above those of its nearest training volume."
    return [
        ("Finding", f"{_finding(content)}\n\n{_reading(content)}"),
        ("By space", _space_table(content)),
        ("Copies", *blocks),
        ("Closest pairs", Figure(figure, alt, CAPTION), _pair_table(content["closest"])),
        ("Quantiles of the scores", _quantile_table(content, "score_quantiles")),
        ("Quantiles of the distance to the nearest", _quantile_table(content, "distance_quantiles")),
        ("How it was measured", _method(content)),
        *_duplicates(content["null"]["duplicates"]),
        ("Origin", _origin(content)),
    ]


def _reading(content: dict) -> str:
    text = (
        "A flag is a reason to look at the pair, no proof; nor is no flag a proof of privacy. A score is the distance "
        f"to the nearest training volume over that to neighbour number {content['neighbours']}: near 0 for a copy, "
        "near 1 for a volume that is equally far from several."
    )
    if content["null"]["kind"] == "leave_one_out":
        text += (
            "\n\nCaveat: no held-out volumes were given, so every training volume against the others set the "
            "threshold. That knows of no gap between training and new volumes, and where subjects have several "
            "training volumes it is too low and misses copies. Give held-out volumes for a firmer answer."
        )
    return text


def _method(content: dict) -> str:
    kinds = {"held_out": "held-out real volumes", "leave_one_out": "training volumes, each against the others"}
    spaces = content["spaces"].items()
    rules = "\n\n".join(f"Threshold in {name} space: {space['rule']}." for name, space in spaces)
    return (
        f"{content['n_generated']} generated volumes and their mirror images against {content['n_train']} training "
        f"volumes; the null: {content['null']['n']} {kinds[content['null']['kind']]}. Distances are taken around the "
        "mean training volume, in voxel space also over small shifts. A volume is flagged if its score lies below the "
        f"threshold of any space.\n\n{rules}"
    )


def _duplicates(duplicates: Sequence[dict]) -> list[tuple]:
    if not duplicates:
        return []
    rows = [[pair["volume"], pair["nearest"]] for pair in duplicates[:LISTED]]
    text = f"{len(duplicates)} volumes of the null are themselves training volumes and were left out; check the split."
    return [("Left out of the null", text, [["volume", "training volume"], *rows])]


def _origin(content: dict) -> list[list]:
    extractor = content["extractor"]
    rows = [
        ["extractor", f"{extractor['id']} ({extractor['sha256']})" if extractor else "none"],
        ["seed", content["seed"]],
        ["commit", content["commit"]],
        *([f"fingerprint of {name}", mark] for name, mark in content["fingerprints"].items()),
        *([f"version of {name}", version] for name, version in content["versions"].items()),
    ]
    return [["", "value"], *rows]


def _space_table(content: dict) -> list[list]:
    rows = [
        [
            "space",
            "threshold",
            "flagged",
            "share expected of honest volumes",
            "median score",
            "median score of the null",
        ]
    ]
    for name, space in content["spaces"].items():
        medians = (space["score_quantiles"][side]["0.5"] for side in ("generated", "null"))
        rows.append([name, space["threshold"], space["n_flagged"], space["expected_false_positive_rate"], *medians])
    return rows


def _pair_table(pairs: Sequence[dict]) -> list[list]:
    columns = ("generated", "nearest", "score", "threshold", "distance", "space", "flipped")
    return [list(columns), *([pair[column] for column in columns] for pair in pairs)]


def _quantile_table(content: dict, kind: str) -> list[list]:
    sides = [(name, side) for name in content["spaces"] for side in ("generated", "null")]
    levels = content["spaces"]["voxel"][kind]["generated"]
    rows = [[level, *(content["spaces"][name][kind][side][level] for name, side in sides)] for level in levels]
    return [["quantile", *(f"{name}, {side}" for name, side in sides)], *rows]
