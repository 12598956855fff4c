"""The stage baseline: what a tuned policy is compared with. All that are tuned from one pretrained policy share it.

Real held-out volumes (the floor), what the autoencoder makes of the training volumes (the limit) and of the held-out ones (which
is what a perfect sampler of new subjects would show), and samples of the pretrained policy (standard), measured as `Yardstick`
measures any arm.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ..data.volumes import VolumeDataset
from ..evaluation.comparison import ms_ssim_of
from ..evaluation.diversity import manifold_figures, volume_features
from ..evaluation.features import extract_features
from ..evaluation.fidelity import kernel_distance
from ..evaluation.memorization import MIN_VOLUMES, Auditor
from ..evaluation.sources import open_source
from ..evaluation.statistics import compare_statistics, set_statistics
from ..pipelines.med_volume import MedVolumePipeline
from ..seeding import fold_seed
from ..trajectories import SetSpec, frechet_by_class, sample_set
from .artifacts import best_sampler, load_extractors, load_pipeline, load_samplers, load_split, without_fid
from .config import StudyConfig
from .stages import sample_with


ARMS = ("real_floor", "limit", "limit_heldout", "standard")
CHOICE_PER_CLASS = 128
AT_ROLLOUTS = "standard_rollout"  # at the rollouts' sampler, where rewards before and after are compared
Features = dict[str, dict[str, torch.Tensor]]  # by extractor and set, `[N, P, S, F]`


@dataclass
class Yardstick:
    """The real volumes that every arm is measured against, as many of a class from either split and in the order of the classes,
    and their features."""

    config: StudyConfig
    train: VolumeDataset
    heldout: VolumeDataset
    extractors: dict[str, torch.nn.Module]
    real: Features  # of "train" and "heldout"

    @classmethod
    def of(cls, config: StudyConfig, real: Features | None = None) -> "Yardstick":
        """That of a study; features of real volumes are computed unless given."""
        train, heldout = load_split(config, "train"), load_split(config, "heldout")
        counts = {
            label: int(min((split.class_labels == label).sum() for split in (train, heldout)))
            for label in train.id2label
        }
        counts = {label: min(count, config.evaluation_per_class or count) for label, count in counts.items()}
        train, heldout = train.take_per_class(counts), heldout.take_per_class(counts)  # distances need equal sizes
        yardstick = cls(config, train, heldout, load_extractors(config), {})
        yardstick.real = real or yardstick.features({"train": train, "heldout": heldout})
        return yardstick

    @property
    def seed(self) -> int:
        return self.config.seed_of("evaluate")

    def sample(self, pipeline: MedVolumePipeline, sampler: dict) -> VolumeDataset:
        """One sample per training volume, from noise that is the same for every pipeline."""
        return sample_with(pipeline, self.train, sampler, self.config, fold_seed(self.seed, "evaluate"))

    def features(self, arms: Mapping[str, VolumeDataset]) -> Features:
        """Those of every extractor; of samplers that are the same, which share their volumes, once."""
        distinct = {id(volumes): volumes for volumes in arms.values()}
        found = {
            role: {key: extract_features(extractor, volumes.pixel_values) for key, volumes in distinct.items()}
            for role, extractor in self.extractors.items()
        }
        return {role: {name: of[id(volumes)] for name, volumes in arms.items()} for role, of in found.items()}

    def distances(self, arms: Mapping[str, VolumeDataset], features: Features) -> dict:
        """FID (by class and for all) and KID from the training volumes, by extractor and arm."""
        return {
            "fid_by_sampler": {
                role: {
                    name: frechet_by_class(self.real[role]["train"], self.train, found[name], volumes)
                    for name, volumes in arms.items()
                }
                for role, found in features.items()
            },
            "kid_by_sampler": {
                role: {name: kernel_distance(self.real[role]["train"], found[name], self.seed) for name in arms}
                for role, found in features.items()
            },
        }

    def portraits(self, arms: Mapping[str, VolumeDataset], features: Features) -> dict:
        """All that is reported of an arm at one sampler alone: FID from held-out volumes, diversity, statistics."""
        batch_size, judge = self.config.sampling_batch_size, self.real["judge"]["train"]
        real_statistics = set_statistics(open_source(self.train).batches(batch_size), self.train.spacing)
        portraits = {"fid_heldout": {role: {} for role in features}, "diversity": {}, "statistics": {}}
        for arm, volumes in arms.items():
            for role, found in features.items() if arm != "real_floor" else ():
                portraits["fid_heldout"][role][arm] = frechet_by_class(
                    self.real[role]["heldout"], self.heldout, found[arm], volumes
                )
            if arm != "limit":
                portraits["diversity"][arm] = {
                    "ms_ssim": ms_ssim_of(open_source(volumes), self.seed),
                    "manifold": manifold_figures(volume_features(judge), volume_features(features["judge"][arm])),
                }
            portraits["statistics"][arm] = compare_statistics(
                real_statistics, set_statistics(open_source(volumes).batches(batch_size), volumes.spacing)
            )
        return portraits

    def audit(self, volumes: VolumeDataset) -> dict | None:
        """Copies of any training volume, against the null of all held-out ones; None where there are too few volumes for one."""
        train, heldout = load_split(self.config, "train"), load_split(self.config, "heldout")
        if min(len(train), len(heldout)) < MIN_VOLUMES:
            return None
        auditor = Auditor(open_source(train), open_source(heldout), self.extractors["label"], seed=self.seed)
        return auditor.audit(open_source(volumes)).summary()


def measure_baseline(config: StudyConfig) -> dict:
    """The figures of all arms but the tuned one. Saves their volumes, and features for `evaluate`."""
    yardstick, samplers, pipeline = Yardstick.of(config), samplers_of(config), load_pipeline(config)
    arms = {
        "real_floor": yardstick.heldout,
        "limit": _reconstructions(pipeline, yardstick.train, config),
        "limit_heldout": _reconstructions(pipeline, yardstick.heldout, config),
    }
    arms |= at_samplers("standard", samplers, lambda sampler: yardstick.sample(pipeline, sampler))
    features = yardstick.features(arms)
    chosen = _standard_sampler(pipeline, samplers, yardstick.extractors["label"], config)
    standard = f"standard @ {chosen}"
    reported = {"real_floor": arms["real_floor"], "limit": arms["limit"], "standard": arms[standard]}
    for found in features.values():
        found["standard"] = found[standard]
    folder = Path(config.output_dir) / "baseline"
    kept = {**reported, "limit_heldout": arms["limit_heldout"], AT_ROLLOUTS: arms["standard @ rollout"]}
    for name, volumes in kept.items():
        volumes.save(folder / f"{name}.safetensors")
    _save_features(folder, yardstick.real, features)
    portraits = yardstick.portraits(reported, features)
    real = {"real": {"ms_ssim": ms_ssim_of(open_source(yardstick.train), yardstick.seed)}}
    return {
        "n": {"all": len(yardstick.train), **yardstick.train.class_counts()},
        "samplers": samplers,
        "standard_sampler": chosen,
        **yardstick.distances(arms, features),
        **portraits,
        "diversity": {**real, **portraits["diversity"]},
        "memorization": {"standard": yardstick.audit(reported["standard"])},
    }


def samplers_of(config: StudyConfig) -> dict[str, dict]:
    """`best`: the pretrained pipeline's best of the config's; `rollout`: the one tuning sampled with (the first, of several); `stochastic`: that
    with all the noise of DDPM, so that a sampler with noise is among them whatever the other two are."""
    rollout = config.rollout_sampler
    return {"best": best_sampler(config), "rollout": rollout, "stochastic": {**rollout, "eta": 1.0}}


def choose_among(
    pipeline: MedVolumePipeline, samplers: dict[str, dict], extractor: torch.nn.Module, config: StudyConfig
) -> str:
    """The sampler of the lowest label FID; on other samples than those of the report, and fewer where there are many."""
    samplers = {first_like(sampler, samplers): sampler for sampler in samplers.values()}
    if len(samplers) == 1:
        return next(iter(samplers))
    train, distances = load_split(config, "train").take_per_class(CHOICE_PER_CLASS), {}
    real = extract_features(extractor, train.pixel_values)
    for name, sampler in samplers.items():
        sampled = sample_with(pipeline, train, sampler, config, fold_seed(config.seed, "sampler choice"))
        features = extract_features(extractor, sampled.pixel_values)
        distances[name] = frechet_by_class(real, train, features, sampled)["all"]
    return min(distances, key=distances.get)


def _standard_sampler(
    pipeline: MedVolumePipeline, samplers: dict[str, dict], extractor: torch.nn.Module, config: StudyConfig
) -> str:
    """The sampler of the standard arm. A tuned one may stand at those of its rollouts too, so it is tried there as well, where stage
    samplers did not."""
    tried = [without_fid(sampler) for sampler in load_samplers(config)["samplers"]]
    known = all(sampler in tried for sampler in samplers.values())
    return "best" if known else choose_among(pipeline, samplers, extractor, config)


def first_like(sampler: dict, samplers: dict[str, dict]) -> str:
    """The first name of a sampler that has several."""
    return next(name for name, other in samplers.items() if other == sampler)


def at_samplers(
    arm: str, samplers: dict[str, dict], sample: Callable[[dict], VolumeDataset]
) -> dict[str, VolumeDataset]:
    """An arm at every sampler, by `<arm> @ <sampler>`; samplers that are the same have the same volumes."""
    arms = {}
    for name, sampler in tqdm(samplers.items(), desc=f"{arm} at every sampler"):
        found = arms.get(f"{arm} @ {first_like(sampler, samplers)}")
        arms[f"{arm} @ {name}"] = sample(sampler) if found is None else found
    return arms


def load_baseline(config: StudyConfig) -> tuple[dict, Features]:
    """What stage baseline found, and the features of the real volumes ("train", "heldout") and of its arms, by extractor."""
    folder = Path(config.output_dir) / "baseline"
    features: Features = {}
    for name, values in load_file(folder / "features.safetensors").items():
        role, of = name.split("/")
        features.setdefault(role, {})[of] = values
    return json.loads((folder / "stage.json").read_text())["result"], features


def _save_features(folder: Path, real: Features, features: Features) -> None:
    tensors = {
        f"{role}/{name}": values.contiguous()
        for role, found in features.items()
        for name, values in {**real[role], **{arm: found[arm] for arm in ARMS}}.items()
    }
    temporary = folder / "features.safetensors.tmp"
    save_file(tensors, temporary)
    os.replace(temporary, folder / "features.safetensors")


def _reconstructions(pipeline: MedVolumePipeline, volumes: VolumeDataset, config: StudyConfig) -> VolumeDataset:
    """What the autoencoder makes of the volumes: no generator over its latents shows these better."""
    return sample_set(
        pipeline,
        volumes,
        SetSpec("reconstruction", 0),
        config.seed,
        config.sampling_batch_size,
        mixed_precision=config.mixed_precision,
    )
