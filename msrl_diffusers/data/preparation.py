"""Preparing a data set: every case read, brought to one cube and cached, in several processes and in bounded memory.

A case that can't be used is recorded with the reason and the rest goes on. Volumes are kept one file each until all are
there, so a killed run is taken up where it stood; then they are joined into one file per split.
"""

import csv
import hashlib
import io
import json
import logging
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import torch
from nibabel.filename_parser import types_filenames
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..errors import InputError
from ..files import write_json, write_text
from ..seeding import fold_seed
from .cases import Case, Listing, Rejection
from .processor import VolumeProcessor
from .reading import read_image
from .splits import SIDES, SplitPlan
from .workers import worker_pool


logger = logging.getLogger(__name__)


def prepare_cases(
    listing: Listing,
    processor: VolumeProcessor,
    split: SplitPlan,
    output_dir: str | Path,
    num_workers: int = 0,
    strict: bool = False,
) -> dict:
    """Write `train.safetensors`, `heldout.safetensors` (read by `VolumeDataset.load`), `rejected.csv` and `summary.json`.

    Args:
        listing: cases of a loader.
        processor: brings images to the cube.
        split: how volumes are divided; asked once it is known which of them can be used.
        output_dir: the folder to write; a finished one of the same request is left as it is.
        num_workers: processes; 0 works in this one.
        strict: stop at the first image that can't be used. (What the loader left out is the caller's to judge.)

    Returns:
        The summary: `dataset` (the loader), numbers of `subjects` and `volumes`, `counts` of volumes by split and class, `channels`,
        `shape`, `spacing`, `fingerprint` of the result, what made the `split` (see `SplitPlan.rule`), `left_out` by it, `rejected`,
        and the listing's `warnings`.

    Raises:
        InputError: `strict` and a case that can't be used; no case at all that can; a split that can't be made, of what is listed
            (said before anything is read) or of what can be used; a negative number of workers.
    """
    if num_workers < 0:
        raise InputError(f"num_workers must be 0 or more, got {num_workers}.")
    output_dir = Path(output_dir)
    volumes_request = _request(listing, processor)
    request = hashlib.sha256(f"{volumes_request} {split}".encode()).hexdigest()[:16]
    summary_path = output_dir / "summary.json"
    if summary_path.is_file() and all((output_dir / f"{side}.safetensors").is_file() for side in SIDES):
        summary = json.loads(summary_path.read_text())
        again = summary["rejected"] - len(listing.rejected)
        if summary["request"] == request and not (strict and again > 0):
            if again > 0:
                logger.warning(
                    "%s was made before, without %d files that could not be used (%s says why): if they can be by now, remove it and give "
                    "the command again.", summary_path, again, output_dir / "rejected.csv",
                )  # fmt: skip
            return summary
    _sides(split, listing.cases, listing.rejected)
    work = output_dir / f".volumes-{volumes_request}"
    work.mkdir(parents=True, exist_ok=True)
    rejected = list(listing.rejected)
    results = _prepare_all(listing.cases, processor, work, num_workers)
    for case, reason in tqdm(results, total=len(listing.cases), desc="prepare", unit="volume"):
        if reason is not None:
            if strict:
                raise InputError(reason)
            rejected.append(Rejection(next(iter(case.images.values())), reason, case.subject_id, case.split))
    write_rejections(rejected, output_dir / "rejected.csv")
    usable = [(index, case) for index, case in enumerate(listing.cases) if _volume_path(work, index).is_file()]
    if not usable:
        raise InputError(
            f"None of {len(listing.cases)} volumes could be prepared; {output_dir / 'rejected.csv'} says why."
        )
    cases = [case for _, case in usable]
    sides = _sides(split, cases, rejected)
    by_side = {side: [member for member, its in zip(usable, sides, strict=True) if its == side] for side in SIDES}
    for side, members in by_side.items():
        if not members:
            raise InputError(f"The split leaves no volume for {side!r}; give another split.")
    summary_path.unlink(missing_ok=True)  # of an earlier request, whose files are replaced now
    digest, counts = hashlib.sha256(), {}
    for side, members in by_side.items():
        # by chance within a class: of a part of a set, as figures take the first of each class, names would choose the site or the date
        members.sort(
            key=lambda member: (listing.classes.index(member[1].label), fold_seed(0, "order", member[1].name))
        )
        shape = _join(work, members, listing.classes, processor.spacing, output_dir / f"{side}.safetensors", digest)
        counts[side] = {label: sum(case.label == label for _, case in members) for label in listing.classes}
    summary = {
        "request": request,
        "dataset": listing.dataset,
        "subjects": len({case.subject_id for case, side in zip(cases, sides, strict=True) if side}),
        "volumes": sum(sum(by_class.values()) for by_class in counts.values()),
        "counts": counts,
        "channels": list(cases[0].images),
        "shape": shape[1:],
        "spacing": list(processor.spacing),
        "fingerprint": digest.hexdigest()[:16],
        "split": split.rule([case.split for case in cases]),
        "left_out": sides.count(None),
        "rejected": len(rejected),
        "warnings": listing.warnings,
    }
    write_json(summary_path, summary)
    for volumes in output_dir.glob(".volumes-*"):  # this one's, and what other requests left
        shutil.rmtree(volumes)
    return summary


def _sides(split: SplitPlan, cases: Sequence[Case], rejected: Sequence[Rejection]) -> list[str | None]:
    return split.sides(
        [case.subject_id for case in cases], [case.label for case in cases], [case.split for case in cases], rejected
    )


def write_rejections(rejected: Sequence[Rejection], path: str | Path) -> None:
    """A table of what was left out and why."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "reason"])
    writer.writerows([rejection.file, rejection.reason] for rejection in rejected)
    write_text(path, table.getvalue())


def prepare_case(case: Case, processor: VolumeProcessor, path: Path) -> str | None:
    """Write the volume of a case to `path`; what is wrong with it, if it can't be used."""
    if path.is_file():
        return None
    try:
        images = [read_image(image, case.orientation) for image in case.images.values()]
        volume, geometry = processor.preprocess_with_geometry(images)
    except InputError as error:
        reason = str(error)
        named = any(image in reason for image in case.images.values())
        return reason if named else f"{next(iter(case.images.values()))}: {reason}"
    except Exception as error:  # whatever a strange file brings about; the other cases go on
        return f"{next(iter(case.images.values()))} can't be prepared: {type(error).__name__}: {error}"
    temporary = path.with_suffix(".tmp")
    save_file({"volume": volume.half()}, temporary, {"geometry": json.dumps(asdict(geometry))})
    os.replace(temporary, path)
    return None


def _request(listing: Listing, processor: VolumeProcessor) -> str:
    """Hash of the cases, their files' sizes and times, what the loader left out or warns of, and the processor's settings."""
    settings = (sorted(vars(processor).items()), listing.classes, listing.rejected, *listing.warnings)
    digest = hashlib.sha256(repr(settings).encode())
    for case in listing.cases:
        digest.update(repr(case).encode())
        for path in _files_of(case):
            try:
                status = os.stat(path)
                digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
            except OSError:
                continue
    return digest.hexdigest()[:16]


def _files_of(case: Case) -> list[str]:
    """The images, and the headers of those that have theirs apart."""
    pair = (("image", ".img"), ("header", ".hdr"))
    images = [image for image in case.images.values() if Path(image.lower().removesuffix(".gz")).suffix == ".img"]
    return [*case.images.values(), *(types_filenames(image, pair, (".gz",))["header"] for image in images)]


def _volume_path(work: Path, index: int) -> Path:
    return work / f"{index:06d}.safetensors"


def _prepare_all(
    cases: Sequence[Case], processor: VolumeProcessor, work: Path, num_workers: int
) -> Iterator[tuple[Case, str | None]]:
    """Each case as it is done, with what is wrong with it, if anything."""
    if num_workers == 0:
        for index, case in enumerate(cases):
            yield case, prepare_case(case, processor, _volume_path(work, index))
        return
    waiting = list(enumerate(cases))[::-1]
    while waiting:
        running = {}
        with worker_pool(num_workers) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < 2 * num_workers:  # few at a time: memory stays flat
                        index, case = waiting[-1]
                        running[pool.submit(prepare_case, case, processor, _volume_path(work, index))] = (index, case)
                        waiting.pop()  # not before: a pool that broke takes nothing
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        reason = future.result()
                        yield running.pop(future)[1], reason
            except BrokenProcessPool:  # a process died, out of memory perhaps: which file did it?
                yield from _prepare_singly(list(running.values()), processor, work)


def _prepare_singly(
    cases: Sequence[tuple[int, Case]], processor: VolumeProcessor, work: Path
) -> Iterator[tuple[Case, str | None]]:
    """One at a time, so that it is known whose process dies."""
    waiting = list(cases)[::-1]
    while waiting:
        with worker_pool(1) as pool:
            while waiting:
                index, case = waiting.pop()
                try:
                    yield case, pool.submit(prepare_case, case, processor, _volume_path(work, index)).result()
                except BrokenProcessPool:
                    image = next(iter(case.images.values()))
                    yield case, f"{image}: the process that read it died, out of memory perhaps"
                    break


def _volumes(work: Path, members: Sequence[tuple[int, Case]]) -> Iterator[torch.Tensor]:
    for index, _ in members:
        with safe_open(_volume_path(work, index), framework="pt") as file:
            yield file.get_tensor("volume")


def _join(
    work: Path, members: Sequence[tuple[int, Case]], classes: Sequence[str], spacing, path: Path, digest
) -> list[int]:
    """One safetensors file of all volumes in turn, as `VolumeDataset.save` would write it, never all in memory; its
    shape."""
    geometries = []
    for index, _ in members:
        with safe_open(_volume_path(work, index), framework="pt") as file:
            geometries.append(json.loads(file.metadata()["geometry"]))
    shape = [len(members), *next(_volumes(work, members)).shape]
    labels = torch.tensor([classes.index(case.label) for _, case in members])
    volume_bytes, label_bytes = 2 * int(torch.tensor(shape).prod()), 8 * len(members)
    header = {
        "__metadata__": {
            "subject_ids": json.dumps([case.subject_id for _, case in members]),
            "id2label": json.dumps(dict(enumerate(classes))),
            "spacing": json.dumps(spacing),
            "geometries": json.dumps(geometries),
        },
        "class_labels": {"dtype": "I64", "shape": [len(members)], "data_offsets": [0, label_bytes]},
        "pixel_values": {"dtype": "F16", "shape": shape, "data_offsets": [label_bytes, label_bytes + volume_bytes]},
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded + labels.numpy().tobytes())
        for volume, (_, case) in zip(_volumes(work, members), members, strict=True):
            content = volume.numpy().tobytes()
            file.write(content)
            digest.update(f"{path.name} {case.name} {case.label}".encode() + content)
    os.replace(temporary, path)
    return shape
