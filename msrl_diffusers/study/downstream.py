"""The downstream study of arXiv 2603.06173: does a classifier of real volumes gain from synthetic ones?

For every arm and seed: all weights of the network are trained on the arm's synthetic volumes, then on the real
training volumes; last it is tested on the hold-out. The reference arm has no synthetic volumes, so its network starts
on the real ones at once, with the same steps there. The arms of a seed share their initial weights and the order of
the real data, and are compared as pairs. Steps are fixed beforehand: no validation figure picks weights, and the
hold-out is used once.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..chains import open_folder
from ..data.splits import check_no_leak, split_by_subject
from ..data.volumes import VolumeDataset
from ..errors import InputError
from ..evaluation.downstream import classification_metrics, compare_arms
from ..evaluation.features import hash_tensors
from ..files import write_json, write_text
from ..processes import process_state
from ..seeding import fold_seed
from ..trainers.base import checkpoints
from ..trainers.base_config import BOOKKEEPING
from ..trainers.classifier_config import ClassifierConfig
from ..trainers.classifier_trainer import ClassifierTrainer, build_classifier, check_classes, predict
from .kinds import check_same_kind


def run_downstream(
    real_train: VolumeDataset,
    real_test: VolumeDataset,
    arms: Mapping[str, VolumeDataset | None],
    config: ClassifierConfig,
    seeds: Sequence[int],
    output_dir: str | Path,
    bootstrap_draws: int = 1000,
    known: str | Path | None = None,
) -> dict:
    """Train and test the classifier of every arm and seed, compare the arms, write `downstream.json` and return it.

    Args:
        real_train, real_test: real volumes of disjoint subjects. The latter are the hold-out: never trained on.
        arms: synthetic volumes by the arm's name, of the shape, spacing and classes of the real ones; None for the one
            reference arm, such as `{"real only": None, "+ standard synthetic": ..., "+ RL synthetic": ...}`.
        config: `pretrain_steps` are those on synthetic volumes, `max_steps` those on real ones; `seed` is that of the
            bootstrap, `output_dir` and `resume_from_checkpoint` are not used.
        seeds: of initial weights, data order and augmentation; a claim about an arm wants three or more.
        output_dir: holds `<arm>/seed-<seed>/result.json` with the predictions, and `downstream.json`. An arm and seed
            whose result is there, for the same settings and volumes, is not trained again; an interrupted one goes on
            from its last checkpoint (if `config.save_steps` wrote any).
        bootstrap_draws: number of draws of test subjects and seeds behind the intervals.
        known: the `output_dir` of another such run. Its results are taken over where they are of the same settings and volumes.

    Returns:
        `{"protocol", "n", "fingerprints", "reference", "arms", "differences", "results"}`: `arms` and `differences` as
        `compare_arms` gives them, the reference first; `results` the paths of the predictions, relative to
        `output_dir`. No subject is named.

    Raises:
        InputError: no seed or one twice, not exactly one reference arm, a hold-out subject among the volumes to
            train on, volumes of another shape, spacing or classes, a class without volumes, or names of arms that give
            no folder names.
    """
    reference = _check(real_train, real_test, arms, seeds)
    folder, processes = Path(output_dir), process_state()
    arms = {reference: None, **arms}
    marks = {name: synthetic and _data_mark(synthetic) for name, synthetic in arms.items()}
    real_marks = {"train": _data_mark(real_train), "test": _data_mark(real_test)}
    results = {name: [] for name in arms}
    for seed in seeds:
        for name, synthetic in arms.items():
            settings = _settings(config, pretrained=synthetic is not None)
            inputs = {"settings": settings, "seed": seed, "real": real_marks, "synthetic": marks[name]}
            mark = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
            path = folder / _folder_name(name) / f"seed-{seed}"
            if known is not None:
                _take_over(Path(known) / path.relative_to(folder), path, mark)
            results[name].append(_run_arm(path, mark, real_train, real_test, synthetic, config, seed))
    probabilities = {
        name: torch.tensor([result["probabilities"] for result in runs], dtype=torch.float64)
        for name, runs in results.items()
    }
    content = {
        "protocol": {
            "settings": {
                **_settings(config, pretrained=True),
                "seeds": list(seeds),
                "bootstrap_draws": bootstrap_draws,
            },
            "selection": "none: fixed steps, the last weights",
            "initial_weights": "equal in all arms of a seed",
            "std": "over seeds",
            "interval": "95 %, over test subjects and seeds",
        },
        "n": {
            "train": real_train.class_counts(),
            "test": real_test.class_counts(),
            "test_subjects": len(set(real_test.subject_ids)),
            "synthetic": {name: synthetic and synthetic.class_counts() for name, synthetic in arms.items()},
        },
        "fingerprints": {"real": real_marks, "synthetic": marks},
        "reference": reference,
        **compare_arms(probabilities, real_test.class_labels, real_test.subject_ids, bootstrap_draws, config.seed),
        "results": {name: [f"{_folder_name(name)}/seed-{seed}/result.json" for seed in seeds] for name in arms},
    }
    if processes.is_main_process:
        write_json(folder / "downstream.json", content)
    processes.wait_for_everyone()
    return content


def _take_over(source: Path, folder: Path, mark: str) -> None:
    """Copy the result of an arm and seed, if there is one with this fingerprint."""
    processes, record = process_state(), source / "result.json"
    if processes.is_main_process and record.is_file() and json.loads(record.read_text())["fingerprint"] == mark:
        write_text(folder / "result.json", record.read_text())
    processes.wait_for_everyone()


def _run_arm(
    folder: Path,
    mark: str,
    real_train: VolumeDataset,
    real_test: VolumeDataset,
    synthetic: VolumeDataset | None,
    config: ClassifierConfig,
    seed: int,
) -> dict:
    """What `result.json` of an arm and seed holds; trained and written, unless it is there."""
    record, processes = folder / "result.json", process_state()
    if record.is_file():
        saved = json.loads(record.read_text())
        if saved["fingerprint"] == mark:
            return saved
    processes.wait_for_everyone()  # all have looked at what is there
    if processes.is_main_process:
        open_folder(folder, mark)
    processes.wait_for_everyone()
    started = time.monotonic()
    model, figures = _train(folder, real_train, synthetic, config, seed)
    probabilities = predict(model, real_test.pixel_values, config.train_batch_size)
    if processes.is_main_process:
        content = {
            "fingerprint": mark,
            "seed": seed,
            "seconds": round(time.monotonic() - started, 1),
            "training": figures,
            "metrics": classification_metrics(probabilities, real_test.class_labels),
            "classes": [real_test.id2label[label] for label in sorted(real_test.id2label)],
            "subject_ids": real_test.subject_ids,
            "labels": real_test.class_labels.tolist(),
            "probabilities": probabilities.tolist(),
        }
        write_json(record, content)
        for path in (*checkpoints(folder / "pretraining"), *checkpoints(folder / "training")):
            shutil.rmtree(path)  # half a gigabyte each of a ResNet-50
        (folder / "pretrained.safetensors").unlink(missing_ok=True)
    processes.wait_for_everyone()
    return json.loads(record.read_text())


def _train(
    folder: Path, real_train: VolumeDataset, synthetic: VolumeDataset | None, config: ClassifierConfig, seed: int
) -> tuple[nn.Module, dict]:
    """The classifier of an arm and seed after its trainings, and the figures of both."""
    torch.manual_seed(fold_seed(seed, "init", "classifier"))
    model = build_classifier(
        config.network,
        real_train.num_channels,
        real_train.num_classes,
        widen_factor=config.widen_factor,
        conv1_t_stride=config.stem_stride,
    )
    figures = {}
    if synthetic is not None:
        stored = folder / "pretrained.safetensors"
        if not stored.is_file():
            args = _phase(config, folder / "pretraining", seed, _pretrain_steps(config))
            trainer = ClassifierTrainer(model, args, synthetic)
            _save_weights(stored, trainer.train(), trainer.model)
        figures["pretraining"] = _load_weights(stored, model)
    train, validation = real_train, None
    if config.validation_fraction:
        train, validation = split_by_subject(real_train, config.validation_fraction, fold_seed(seed, "validation"))
    args = _phase(config, folder / "training", seed, config.max_steps)
    trainer = ClassifierTrainer(model, args, train, validation)
    figures["training"] = trainer.train()
    return trainer.model, figures


def _phase(config: ClassifierConfig, folder: Path, seed: int, max_steps: int) -> ClassifierConfig:
    """The settings of one training; its seed is the same in all arms."""
    return replace(
        config,
        output_dir=str(folder),
        seed=fold_seed(seed, folder.name) % 2**31,
        max_steps=max_steps,
        resume_from_checkpoint="latest" if config.save_steps else None,
    )


def _save_weights(path: Path, figures: dict, model: nn.Module) -> None:
    """Write the pretrained weights, so that an arm killed in its second training does not repeat the first."""
    processes = process_state()
    if processes.is_main_process:
        temporary = path.with_name(path.name + ".tmp")
        tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        save_file(tensors, temporary, {"figures": json.dumps(figures)})
        os.replace(temporary, path)
    processes.wait_for_everyone()


def _load_weights(path: Path, model: nn.Module) -> dict:
    """Load what `_save_weights` wrote; returns the figures."""
    with safe_open(path, framework="pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        return json.loads(file.metadata()["figures"])


def _pretrain_steps(config: ClassifierConfig) -> int:
    return config.max_steps if config.pretrain_steps is None else config.pretrain_steps


def _settings(config: ClassifierConfig, pretrained: bool) -> dict:
    """The settings that the result of an arm depends on."""
    settings = {name: value for name, value in asdict(config).items() if name not in (*BOOKKEEPING, "seed")}
    return {**settings, "pretrain_steps": _pretrain_steps(config) if pretrained else 0}


def _data_mark(volumes: VolumeDataset) -> str:
    """Hash of volumes, labels, subjects and classes."""
    tensors = hash_tensors({"pixel_values": volumes.pixel_values, "class_labels": volumes.class_labels}.items())
    names = json.dumps([tensors, volumes.subject_ids, sorted(volumes.id2label.items())])
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def _folder_name(arm: str) -> str:
    return "_".join(re.findall(r"[a-z0-9]+", arm.lower()))


def _check(
    real_train: VolumeDataset, real_test: VolumeDataset, arms: Mapping[str, VolumeDataset | None], seeds: Sequence[int]
) -> str:
    """Raise InputError as `run_downstream` states; returns the name of the reference arm."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"A downstream study takes one seed or more, each once, got {list(seeds)}.")
    references = [name for name, synthetic in arms.items() if synthetic is None]
    if len(references) != 1:
        raise InputError(f"One arm must have no synthetic volumes, to compare with; here {len(references)} have none.")
    folders = {}
    for name in arms:
        other = folders.setdefault(_folder_name(name), name)
        if other != name or not _folder_name(name):
            raise InputError(f"Arm {name!r} has no folder name of its own; name it by other letters or digits.")
    check_classes(real_train, "The real training set")
    check_classes(real_test, "The real test set")
    trained_on = {f"Arm {name!r}": synthetic for name, synthetic in arms.items() if synthetic is not None}
    for name, volumes in {"The real test set": real_test, **trained_on}.items():
        check_classes(volumes, name)
        check_same_kind(real_train, volumes, name)
    check_no_leak(real_train.subject_ids, real_test.subject_ids)
    for name, volumes in trained_on.items():
        shared = sorted(set(volumes.subject_ids) & set(real_test.subject_ids))
        if shared:
            raise InputError(
                f"{name} has volumes with the ids of {len(shared)} hold-out subjects, {shared[0]!r} first; take them "
                "out, or give generated volumes ids of their own."
            )
    return references[0]
