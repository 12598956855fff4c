"""The stages score and rewards: sets of reward data, their distances and targets, and the models regressed on them."""

from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from ..data.degradations import degrade_dataset
from ..data.volumes import VolumeDataset
from ..errors import InputError
from ..evaluation.features import extract_features, extractor_identity
from ..evaluation.set_labels import marginal_targets
from ..files import write_json
from ..processes import process_state
from ..seeding import fold_seed
from ..trainers.reward_trainer import RewardTrainer, ScoredVolumes
from ..trajectories import frechet_by_class, set_specs, set_targets
from .artifacts import REWARD_CLASSES, load_extractors, load_scores, load_sources, load_split
from .config import StudyConfig
from .networks import make_reward_model
from .stages import load_arm


MIN_ANCHORS = 64  # volumes of a class in the smallest set: all distances are of as many


def score_trajectories(config: StudyConfig) -> dict:
    """FID of every set by the label extractor, and the reward targets."""
    sources = load_sources(config)
    extractor, counts, fids = load_extractors(config)["label"], compared_counts(config, sources), {}
    real = first_of(sources, counts)
    real_features = extract_features(extractor, real.pixel_values)
    for name, volumes in tqdm(reward_sets(config, sources), desc="score", total=len(reward_set_names(config))):
        compared = first_of(volumes, counts)
        features = extract_features(extractor, compared.pixel_values)
        fids[name] = frechet_by_class(real_features, real, features, compared)
    scores = {
        "extractor": extractor_identity(extractor),
        "n": len(real),
        "n_by_class": real.class_counts(),
        "fid": fids,
        "targets": set_targets(fids, list(real.id2label.values()), config.target_map),
    }
    write_json(Path(config.output_dir) / "score" / "scores.json", scores)
    return scores


def train_rewards(config: StudyConfig) -> dict:
    """The two reward models, and a third of another seed and width that only watches."""
    data, results = reward_data(config), {}
    num_channels, num_classes = data.pixel_values.shape[1], load_split(config, "train").num_classes
    for role in REWARD_CLASSES:
        torch.manual_seed(fold_seed(config.seed_of("rewards"), "init", "reward", role))
        model = make_reward_model(config, role, num_channels, num_classes)
        args = config.trainer_config("rewards", role, seed=reward_seed(config, role))
        results[role] = RewardTrainer(model, args, data).train()
        if process_state().is_main_process:
            model.save_pretrained(Path(config.output_dir) / "rewards" / role)
    return results


def reward_seed(config: StudyConfig, role: str) -> int:
    """The seed of a reward model's training, which also says on which side of its split a subject stands."""
    return fold_seed(config.seed_of("rewards"), "reward", role) % 2**31


def reward_data(config: StudyConfig) -> ScoredVolumes:
    """All sets of the reward data with the targets of their sets, mixed with each volume's own where the config says so."""
    sources, targets = load_sources(config), load_scores(config)["targets"]
    if config.marginal_labels:
        extractor = load_extractors(config)["label"]
        real = extract_features(extractor, sources.pixel_values)
    parts = []
    for name, volumes in reward_sets(config, sources):
        values = targets_by_volume(targets, name, volumes)
        if config.marginal_labels:
            features = extract_features(extractor, volumes.pixel_values)
            values = marginal_targets(
                real, sources.class_labels, features, volumes.class_labels, values, config.marginal_labels
            )
        parts.append(
            ScoredVolumes(volumes.pixel_values, values, volumes.subject_ids, class_labels=volumes.class_labels)
        )
    return ScoredVolumes.cat(parts)


def targets_by_volume(targets: dict, name: str, volumes: VolumeDataset) -> torch.Tensor:
    """The targets `[N]` of set `name`, of each of its volumes.

    Raises:
        InputError: a set that was not scored.
    """
    if name not in targets:
        raise InputError(
            f"The set {name!r} has no target; scored are {sorted(targets)}: give the steps of these, or score anew."
        )
    return torch.tensor([targets[name][volumes.id2label[label]] for label in volumes.class_labels.tolist()])


def reward_set_names(config: StudyConfig) -> list[str]:
    """Names of all sets of the reward data."""
    return [
        *(spec.name for spec in set_specs(config.synthetic_steps, config.reconstruction_steps)),
        *(_degraded_name(kind, strength) for kind, strength in _degradations(config)),
        *(f"policy-{name}" for name in config.policy_anchors),
    ]


def reward_sets(config: StudyConfig, sources: VolumeDataset) -> Iterator[tuple[str, VolumeDataset]]:
    """Every set of the reward data with its name, one at a time: trajectories from their files, degraded training volumes, and
    samples of earlier policies, at most as many of each class as there are `sources` (`load_sources`).

    Raises:
        InputError: a set that can't be read, or with too few volumes of a class.
    """
    for spec in set_specs(config.synthetic_steps, config.reconstruction_steps):
        yield spec.name, VolumeDataset.load(Path(config.output_dir) / "trajectories" / f"{spec.name}.safetensors")
    for kind, strength in _degradations(config):
        yield _degraded_name(kind, strength), degrade_dataset(sources, kind, strength, config.seed)
    for name, path in config.policy_anchors.items():
        yield f"policy-{name}", _policy_anchor(name, path, sources, config)


def _policy_anchor(name: str, path: str, sources: VolumeDataset, config: StudyConfig) -> VolumeDataset:
    counts = _label_counts(sources)
    least = {label: min(count, MIN_ANCHORS) for label, count in counts.items()}
    return load_given_set(name, path, sources, config, "policy_anchors", least).take_per_class(counts)


def compared_counts(config: StudyConfig, sources: VolumeDataset) -> dict[int, int]:
    """How many volumes of each class label distances are of: as many as the smallest set has, since those of unequal numbers
    can't be compared. Samples of an earlier policy may be fewer than the sources, which all other sets are as many as."""
    anchors = [_policy_anchor(name, path, sources, config) for name, path in config.policy_anchors.items()]
    counts = [_label_counts(volumes) for volumes in (sources, *anchors)]
    return {label: min(each[label] for each in counts) for label in sources.id2label}


def scored_counts(config: StudyConfig, train: VolumeDataset, scores: dict) -> dict[int, int]:
    """How many volumes of each class label the distances in `scores` are of. Scores that don't say it are of all."""
    if "n_by_class" not in scores:
        return compared_counts(config, train)
    return {label: scores["n_by_class"][name] for label, name in train.id2label.items()}


def first_of(volumes: VolumeDataset, counts: dict[int, int]) -> VolumeDataset:
    """The first volumes of each class, so many; `volumes` itself, in its order, where it has no more."""
    return volumes if _label_counts(volumes) == counts else volumes.take_per_class(counts)


def _label_counts(volumes: VolumeDataset) -> dict[int, int]:
    by_name = volumes.class_counts()
    return {label: by_name[name] for label, name in volumes.id2label.items()}


def load_given_set(
    name: str, path: str, train: VolumeDataset, config: StudyConfig, field: str, least: dict[int, int]
) -> VolumeDataset:
    """A set that the config names in `field`, of at least so many volumes of each class label.

    Raises:
        InputError: what `load_arm` refuses, or too few volumes.
    """
    volumes = load_arm(name, path, train, config, field)
    if volumes.id2label != train.id2label or volumes.pixel_values.shape[1:] != train.pixel_values.shape[1:]:
        raise InputError(
            f"{field}: {path} holds volumes {list(volumes.pixel_values.shape[1:])} of the classes {volumes.id2label}; those of "
            f"the study are {list(train.pixel_values.shape[1:])} of {train.id2label}."
        )
    for label, count in _label_counts(volumes).items():
        if count < least[label]:
            raise InputError(
                f"{field}: {path} has {count} volumes of class {volumes.id2label[label]!r}; a distance beside those of the other "
                f"sets needs {least[label]}: sample more."
            )
    return volumes


def _degradations(config: StudyConfig) -> list[tuple[str, float]]:
    anchors = config.degraded_anchors
    return [(kind, strength) for kind in anchors.get("kinds", ()) for strength in anchors.get("strengths", ())]


def _degraded_name(kind: str, strength: float) -> str:
    return f"degraded-{kind}-{round(100 * strength):03d}"
