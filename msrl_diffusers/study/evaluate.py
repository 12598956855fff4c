"""The stage evaluate: both arms against real volumes by both extractors, and the reward models on held-out subjects."""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from ..data.volumes import VolumeDataset
from ..evaluation.comparison import ms_ssim_of
from ..evaluation.diversity import manifold_figures, volume_features
from ..evaluation.features import extract_features, extractor_identity
from ..evaluation.fidelity import bootstrap_frechet, centred_interval, kernel_distance
from ..evaluation.memorization import MIN_VOLUMES, Auditor
from ..evaluation.sources import open_source
from ..evaluation.statistics import compare_statistics, set_statistics
from ..pipelines.med_volume import MedVolumePipeline
from ..rewards import LearnedReward, WeightedSum
from ..seeding import fold_seed
from ..trajectories import SetSpec, frechet_by_class, sample_set
from .artifacts import (
    best_sampler,
    load_extractors,
    load_pipeline,
    load_reward_models,
    load_split,
    load_tuned_pipeline,
)
from .config import StudyConfig
from .stages import sample_with
from .validity import validity_of


REPORTED = ("real_floor", "limit", "standard", "rl")
CHOICE_PER_CLASS = 128


def evaluate(config: StudyConfig) -> dict:
    """All figures of the report that need models or volumes. Saves the volumes of every reported arm.

    Each arm stands at the sampler that the label extractor chooses for it on other samples than these: the standard arm
    among all of the config, in stage score; the tuned one among that sampler, the rollouts', and the latter with noise.
    """
    seed = config.seed_of("evaluate")
    train, heldout = load_split(config, "train"), load_split(config, "heldout")
    validity_subjects = heldout.take_per_class(config.num_validity_subjects)
    counts = {
        label: int(min((split.class_labels == label).sum() for split in (train, heldout))) for label in train.id2label
    }
    counts = {label: min(count, config.evaluation_per_class or count) for label, count in counts.items()}
    train, heldout = train.take_per_class(counts), heldout.take_per_class(counts)  # distances need sets of equal size
    extractors, samplers = load_extractors(config), _samplers(config)
    rewards = {role: LearnedReward(role, model) for role, model in load_reward_models(config).items()}
    pipelines = {
        "standard": load_pipeline(config),
        "rl": load_tuned_pipeline(config),
    }
    chosen = {"real_floor": "real_floor", "limit": "limit", "standard": "standard @ best"}
    chosen["rl"] = f"rl @ {_choose_sampler(pipelines['rl'], samplers, train, extractors['label'], config)}"
    arms = {"real_floor": heldout, "limit": _reconstructions(pipelines["standard"], train, config)}
    with tqdm(total=len(pipelines) * len(samplers), desc="evaluate") as progress:
        for arm, pipeline in pipelines.items():
            for name, sampler in samplers.items():
                volumes = arms.get(f"{arm} @ {_first_like(sampler, samplers)}")
                if volumes is None:
                    volumes = sample_with(pipeline, train, sampler, config, fold_seed(seed, "evaluate"))
                arms[f"{arm} @ {name}"] = volumes
                progress.update()
    features = {
        role: {name: extract_features(extractor, volumes.pixel_values) for name, volumes in arms.items()}
        for role, extractor in extractors.items()
    }
    references = {
        role: {split: extract_features(extractor, volumes.pixel_values) for split, volumes in (("train", train), ("heldout", heldout))}
        for role, extractor in extractors.items()
    }  # fmt: skip
    by_sampler = {
        role: {
            name: frechet_by_class(references[role]["train"], train, features[role][name], arms[name]) for name in arms
        }
        for role in extractors
    }
    kids = {
        role: {name: kernel_distance(references[role]["train"], features[role][name], seed) for name in arms}
        for role in extractors
    }
    folder = Path(config.output_dir) / "evaluate"
    for arm in REPORTED:
        arms[chosen[arm]].save(folder / f"{arm}.safetensors")
    return {
        "n": {"all": len(train), **train.class_counts()},
        "samplers": samplers,
        "chosen": chosen,
        "fid": {role: {arm: by_sampler[role][chosen[arm]] for arm in REPORTED} for role in extractors},
        "fid_by_sampler": by_sampler,
        "fid_heldout": {
            role: {
                arm: frechet_by_class(references[role]["heldout"], heldout, features[role][chosen[arm]], arms[chosen[arm]])
                for arm in REPORTED
                if arm != "real_floor"
            }
            for role in extractors
        },
        "kid": {role: {arm: kids[role][chosen[arm]] for arm in REPORTED} for role in extractors},
        "kid_by_sampler": kids,
        **_intervals(references, features, by_sampler, chosen, config),
        "diversity": _diversity(references["judge"]["train"], train, features["judge"], arms, chosen, seed),
        "statistics": _statistics(train, arms, chosen, config.sampling_batch_size),
        "memorization": _memorization(train, heldout, arms, chosen, extractors["label"], seed),
        "reward": _rewards(config, rewards, arms["standard @ rollout"], arms["rl @ rollout"]),
        "reward_models": _validity(config, pipelines["standard"], rewards, validity_subjects),
        "extractors": {role: extractor_identity(extractor) for role, extractor in extractors.items()},
    }  # fmt: skip


def _samplers(config: StudyConfig) -> dict[str, dict]:
    """`best`: the standard arm's best; `rollout`: the one tuning sampled with (the first, of several); `stochastic`: that
    with all the noise of DDPM, so that a sampler with noise is among them whatever the other two are."""
    tuning = config.trainer_config(config.method)
    rollout = {
        "num_inference_steps": tuning.num_inference_steps,
        "eta": tuning.etas[0],
        "guidance_scale": tuning.guidance_scale,
    }
    return {"best": best_sampler(config), "rollout": rollout, "stochastic": {**rollout, "eta": 1.0}}


def _first_like(sampler: dict, samplers: dict[str, dict]) -> str:
    """The first name of a sampler that has several."""
    return next(name for name, other in samplers.items() if other == sampler)


def _choose_sampler(
    pipeline: MedVolumePipeline, samplers: dict, train: VolumeDataset, extractor: torch.nn.Module, config: StudyConfig
) -> str:
    """The sampler of the lowest label FID; on other samples than those of the report, and fewer where there are many."""
    samplers = {_first_like(sampler, samplers): sampler for sampler in samplers.values()}
    if len(samplers) == 1:
        return next(iter(samplers))
    train, distances = train.take_per_class(CHOICE_PER_CLASS), {}
    real = extract_features(extractor, train.pixel_values)
    for name, sampler in samplers.items():
        sampled = sample_with(pipeline, train, sampler, config, fold_seed(config.seed, "sampler choice"))
        features = extract_features(extractor, sampled.pixel_values)
        distances[name] = frechet_by_class(real, train, features, sampled)["all"]
    return min(distances, key=distances.get)


def _reconstructions(pipeline: MedVolumePipeline, volumes: VolumeDataset, config: StudyConfig) -> VolumeDataset:
    """What the autoencoder makes of the volumes: no generator over its latents can do better."""
    return sample_set(
        pipeline,
        volumes,
        SetSpec("reconstruction", 0),
        config.seed,
        config.sampling_batch_size,
        mixed_precision=config.mixed_precision,
    )


def _intervals(references: dict, features: dict, by_sampler: dict, chosen: dict, config: StudyConfig) -> dict:
    """95 % bootstrap intervals of every distance, and of the paired difference between the arms, over all classes."""
    intervals, differences = {}, {}
    for role, reference in references.items():
        arms = {arm: features[role][chosen[arm]] for arm in REPORTED}
        replicates = bootstrap_frechet(reference["train"], arms, config.bootstrap_draws, config.seed_of("evaluate"))
        values = {arm: by_sampler[role][chosen[arm]]["all"] for arm in REPORTED}
        intervals[role] = {arm: centred_interval(values[arm], replicates[arm]) for arm in REPORTED}
        difference = values["rl"] - values["standard"]
        interval = centred_interval(difference, replicates["rl"] - replicates["standard"])
        differences[role] = {"value": difference, "interval": interval}
    return {"fid_interval": intervals, "fid_rl_minus_standard": differences}


def _diversity(
    reference: torch.Tensor, train: VolumeDataset, features: dict, arms: dict, chosen: dict, seed: int
) -> dict:
    """MS-SSIM of pairs within each arm beside that of the training volumes; precision, recall, density and coverage of the
    judge's features. None where there are too few volumes."""
    real, found = volume_features(reference), {"real": {"ms_ssim": ms_ssim_of(open_source(train), seed)}}
    for arm in ("real_floor", "standard", "rl"):
        found[arm] = {
            "ms_ssim": ms_ssim_of(open_source(arms[chosen[arm]]), seed),
            "manifold": manifold_figures(real, volume_features(features[chosen[arm]])),
        }
    return found


def _statistics(train: VolumeDataset, arms: dict, chosen: dict, batch_size: int) -> dict:
    """How intensities, size, symmetry and spectrum of each arm differ from those of the training volumes."""

    def of(volumes: VolumeDataset) -> dict:
        return set_statistics(open_source(volumes).batches(batch_size), volumes.spacing)

    real = of(train)
    return {arm: compare_statistics(real, of(arms[chosen[arm]])) for arm in REPORTED}


def _memorization(
    train: VolumeDataset, heldout: VolumeDataset, arms: dict, chosen: dict, extractor: torch.nn.Module, seed: int
) -> dict | None:
    """The audit of both arms against the held-out null; None where there are too few volumes for one."""
    if min(len(train), len(heldout)) < MIN_VOLUMES:
        return None
    auditor = Auditor(open_source(train), open_source(heldout), extractor, seed=seed)
    return {arm: auditor.audit(open_source(arms[chosen[arm]])).summary() for arm in ("standard", "rl")}


def _rewards(config: StudyConfig, rewards: dict, before: VolumeDataset, after: VolumeDataset) -> dict:
    """Mean and deviation of the reward that was trained on, and of its parts, before and after, at the rollouts' sampler.

    Parts are in units of the reference policy's deviation; `gain` is in units of the whole reward's deviation before.
    """
    trained = WeightedSum([rewards["volume"], rewards["slice"]], config.trainer_config(config.method).reward_weights)
    scores = {
        name: {role: reward(volumes.pixel_values, volumes.class_labels) for role, reward in rewards.items()}
        for name, volumes in (("before", before), ("after", after))
    }
    trained.fit(scores["before"])
    result = {"parts": {}}
    for name, parts in scores.items():
        total = trained.combine(parts)
        result[name] = {"mean": total.mean().item(), "std": total.std().item()}
        result["parts"][name] = {
            role: trained.scales[role].standardise(values).mean().item() for role, values in parts.items()
        }
    result["gain"] = (result["after"]["mean"] - result["before"]["mean"]) / result["before"]["std"]
    return result


def _validity(config: StudyConfig, pipeline: MedVolumePipeline, rewards: dict, subjects: VolumeDataset) -> dict:
    """The figures of the reward models: those of stage validity, where the study has it."""
    if config.validity_floors:
        return json.loads((Path(config.output_dir) / "validity" / "stage.json").read_text())["result"]
    return validity_of(config, pipeline, rewards, subjects)
