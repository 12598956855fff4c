"""The stage validity: are the rewards worth optimizing, on subjects and policies that no training of theirs saw?"""

import torch
from tqdm import tqdm

from ..evaluation.features import extract_features
from ..evaluation.set_labels import place_on_scale
from ..evaluation.validity import ScoredSet, reward_validity, score_set_by
from ..rewards import LearnedReward
from ..seeding import fold_seed
from ..trajectories import frechet_by_class, sample_set, set_specs
from .artifacts import load_extractors, load_pipeline, load_reward_models, load_scores, load_split
from .config import StudyConfig
from .reward_data import first_of, load_given_set, scored_counts, targets_by_volume


def measure_validity(config: StudyConfig) -> dict:
    """By role, how well each reward ranks trajectory sets of held-out subjects, tells k = 1 from synthetic ones and predicts
    targets; and the same of `unseen_sets` (`evaluation.validity.reward_validity`)."""
    pipeline = load_pipeline(config)
    subjects = load_split(config, "heldout").take_per_class(config.num_validity_subjects)
    rewards = {role: LearnedReward(role, model) for role, model in load_reward_models(config).items()}
    targets, specs = load_scores(config)["targets"], set_specs(config.synthetic_steps, config.reconstruction_steps)
    sets = {role: {} for role in rewards}
    with tqdm(
        total=sum(spec.unet_forwards for spec in specs) * len(subjects), desc="reward check", unit="forward"
    ) as bar:
        for spec in specs:
            sampled = sample_set(
                pipeline, subjects, spec, fold_seed(config.seed_of("evaluate"), "validity"), config.sampling_batch_size,
                mixed_precision=config.mixed_precision, progress=bar,
            )  # fmt: skip
            worth = targets_by_volume(targets, spec.name, sampled)
            for role, reward in rewards.items():
                sets[role][spec.name] = ScoredSet(reward(sampled.pixel_values, sampled.class_labels).cpu(), worth)
    best = min((spec for spec in specs if spec.kind == "reconstruction"), key=lambda spec: spec.step).name
    synthetic = max((spec for spec in specs if spec.kind == "synthetic"), key=lambda spec: spec.step).name
    unseen = _unseen(config, rewards)
    return {role: reward_validity(sets[role], best, synthetic, unseen[role]) for role in rewards}


@torch.no_grad()
def _unseen(config: StudyConfig, rewards: dict[str, LearnedReward]) -> dict[str, dict[str, ScoredSet] | None]:
    """The sets of `unseen_sets` as each reward scores them, with the place of their distance on the scale of the reward data."""
    if not config.unseen_sets:
        return dict.fromkeys(rewards)
    train, extractor, scores = load_split(config, "train"), load_extractors(config)["label"], load_scores(config)
    counts, unseen = scored_counts(config, train, scores), {role: {} for role in rewards}
    real = first_of(train, counts)
    features = extract_features(extractor, real.pixel_values)
    for name, path in config.unseen_sets.items():
        volumes = first_of(load_given_set(name, path, train, config, "unseen_sets", counts), counts)
        found = frechet_by_class(features, real, extract_features(extractor, volumes.pixel_values), volumes)
        targets = {
            class_name: place_on_scale(
                {each: by_class[class_name] for each, by_class in scores["fid"].items()}, distance, config.target_map
            )
            for class_name, distance in found.items()
        }
        for role, reward in rewards.items():
            unseen[role][name] = score_set_by(reward, volumes, targets)
    return unseen
