"""The stage augmentation: does a classifier of a rare subgroup gain from synthetic images of it?

A classifier of the diagnosis is trained on the real training images, in which one diagnosis with some artifacts is
rare, so that it may take the artifact for the other diagnosis. Then the same with synthetic images of the subgroup
added, of the pipeline before and after reinforcement learning, from the same noise, until its prompts are as frequent
as the others. The pipelines have seen none of the images that were left out. Every arm has the same steps, initial
weights and test images.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch

from ..data.image_folder import ImageDataset
from ..evaluation.downstream import compare_arms
from ..files import write_json
from ..models.image_classifiers import build_image_classifier
from ..processes import process_state
from ..seeding import fold_seed
from ..trainers.attribute_trainer import AttributeTrainer, predict_attributes
from .artifacts import load_base, load_split, load_tuned
from .config import TextToImageStudyConfig
from .data import in_subgroup
from .sampling import sample_images


REFERENCE = "real only"
ARMS = {"+ standard synthetic": load_base, "+ RL synthetic": load_tuned}


def run_augmentation(config: TextToImageStudyConfig) -> dict:
    """Train and test the classifier of every arm and seed; predictions lie in `augmentation/predictions/`, and are
    kept when the stage was killed.

    Returns:
        `subgroup` (its attributes), `n`, and by group of test images (`all`, `with the artifacts`, `without the
        artifacts`) what `evaluation.downstream.compare_arms` gives: accuracy, F1 and AUC of the diagnosis, mean and
        deviation over seeds, intervals, differences to each arm before. `subgroup_accuracy`: the share of the
        subgroup's images that get their diagnosis, by arm and seed. Groups without images of every diagnosis are left
        out.
    """
    train, heldout = load_split(config, "train"), load_split(config, "heldout")
    diagnoses = list(config.builder.diagnoses)
    arms = {REFERENCE: train}
    for name, images in _synthetic(config, train).items():
        arms[name] = ImageDataset.cat([train, images])
    test, labels = diagnosis_only(heldout, diagnoses), _labels(heldout, diagnoses)
    probabilities = {
        name: torch.stack([
            _probabilities(config, name, diagnosis_only(images, diagnoses), test, seed)
            for seed in config.augmentation_seeds
        ])
        for name, images in arms.items()
    }  # fmt: skip
    inside = in_subgroup(heldout, config.rare_attributes)
    artifacts = [name for name in config.rare_attributes if name not in diagnoses]
    near = in_subgroup(heldout, artifacts) if artifacts else torch.ones(len(heldout), dtype=torch.bool)
    groups = {
        "all": torch.ones(len(heldout), dtype=torch.bool),
        "with the artifacts": near,
        "without the artifacts": ~near,
    }
    compared = {}
    for group, chosen in groups.items():
        if len(labels[chosen].unique()) == len(diagnoses):
            rows = chosen.nonzero()[:, 0]
            compared[group] = compare_arms(
                {name: values[:, rows] for name, values in probabilities.items()}, labels[rows],
                [heldout.subject_ids[row] for row in rows.tolist()], min(config.bootstrap_draws, 300),
                config.seed_of("augmentation"),
            )  # fmt: skip
    right = {name: (values.argmax(dim=2) == labels).double()[:, inside] for name, values in probabilities.items()}
    return {
        "subgroup": list(config.rare_attributes),
        "n": {
            "train": len(train), "train_subgroup": int(in_subgroup(train, config.rare_attributes).sum()),
            "synthetic": {name: len(images) - len(train) for name, images in arms.items()},
            "test": {group: int(chosen.sum()) for group, chosen in groups.items()}, "test_subgroup": int(inside.sum()),
        },
        "seeds": list(config.augmentation_seeds),
        "groups": compared,
        "subgroup_accuracy": {
            name: {"mean": values.mean().item(), "by_seed": values.mean(dim=1).tolist()} if inside.any() else None
            for name, values in right.items()
        },
    }  # fmt: skip


def missing_prompts(
    train: ImageDataset, attributes: list[str], prompts: list[str], targets: torch.Tensor
) -> list[str]:
    """Prompts of the synthetic images: so many of every prompt of the subgroup that it is as frequent as the mean of
    the other prompts; `targets [P, A]` are those of `prompts`.
    """
    columns = [train.attribute_names.index(name) for name in attributes]
    wanted = targets[:, columns].bool().all(dim=1).tolist()
    counts = [train.prompts.count(prompt) for prompt in prompts]
    others = [count for count, its in zip(counts, wanted, strict=True) if not its]
    level = round(sum(others) / len(others))
    return [
        prompt for prompt, count, its in zip(prompts, counts, wanted, strict=True) if its for _ in range(level - count)
    ]


def diagnosis_only(images: ImageDataset, diagnoses: list[str]) -> ImageDataset:
    """The images with their diagnosis as the only attributes."""
    columns = [images.attribute_names.index(name) for name in diagnoses]
    return replace(images, attributes=images.attributes[:, columns], attribute_names=tuple(diagnoses))


def _synthetic(config: TextToImageStudyConfig, train: ImageDataset) -> dict[str, ImageDataset]:
    """Images of the subgroup by the pipelines before and after, by the arm's name."""
    builder, folder = config.builder, Path(config.output_dir) / "augmentation"
    every = builder.prompts()
    prompts = missing_prompts(train, config.rare_attributes, every, builder.targets(every))
    if not prompts:
        return {}
    found = {}
    for number, (name, load) in enumerate(ARMS.items()):
        path = folder / f"synthetic-{number}.safetensors"
        if process_state().is_main_process and not path.is_file():
            sample_images(
                load(config), prompts, config.evaluation_sampler,
                fold_seed(config.seed_of("augmentation"), "synthetic"), builder, config.sampling_batch_size,
                config.mixed_precision, f"synthetic-{number}",
            ).save(path)  # fmt: skip
        process_state().wait_for_everyone()
        found[name] = ImageDataset.load(path)
    return found


def _probabilities(
    config: TextToImageStudyConfig, arm: str, train: ImageDataset, test: ImageDataset, seed: int
) -> torch.Tensor:
    """Probabilities `[N, D]` of the diagnoses of the test images, of sum one, by a classifier trained on `train`."""
    arm_folder = f"{[REFERENCE, *ARMS].index(arm)}-seed-{seed}"
    folder = Path(config.output_dir) / "augmentation"
    path = folder / "predictions" / f"{arm_folder}.json"
    if not path.is_file():
        mixed = fold_seed(config.seed_of("augmentation"), seed)
        settings = dict(config.classifier_models["augmentation"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed)  # the same for every arm
            model, processor = build_image_classifier(
                settings.pop("architecture"), train.attribute_names, train.image_size, **settings
            )
        args = config.trainer_config("augmentation", arm_folder, seed=mixed % 2**31)
        trainer = AttributeTrainer(model, args, train, processor=processor)
        trainer.train()
        found = predict_attributes(trainer.model, test, processor, config.sampling_batch_size)
        if process_state().is_main_process:
            write_json(path, {"arm": arm, "seed": seed, "probabilities": found.tolist()})
        process_state().wait_for_everyone()
    return _normalized(path)


def _normalized(path: Path) -> torch.Tensor:
    found = torch.tensor(json.loads(path.read_text())["probabilities"], dtype=torch.float64).clamp_min(1e-12)
    return found / found.sum(dim=1, keepdim=True)


def _labels(images: ImageDataset, diagnoses: list[str]) -> torch.Tensor:
    columns = [images.attribute_names.index(name) for name in diagnoses]
    return images.attributes[:, columns].argmax(dim=1).long()
