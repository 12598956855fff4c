"""The stages prepare, extractors, vqgan, diffusion, samplers, trajectories and those of classifiers; others have files of their own."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from tqdm import tqdm

from ..data.cases import list_cases
from ..data.phantoms import load_phantoms
from ..data.preparation import prepare_cases
from ..data.processor import VolumeProcessor
from ..data.splits import SIDES, SplitPlan, check_no_leak
from ..data.volumes import VolumeDataset
from ..errors import InputError
from ..evaluation.features import extract_features, extractor_identity, hash_tensors, volume_hashes
from ..evaluation.sources import open_source
from ..files import write_json
from ..hub.contents import read_json
from ..models.autoencoder_vq_3d import VQModel3D
from ..pipelines.med_volume import MedVolumePipeline
from ..plots import plot_volumes
from ..processes import process_state
from ..seeding import fold_seed
from ..trainers.diffusion_trainer import LatentDiffusionTrainer
from ..trainers.feature_trainer import FeatureTrainer
from ..trainers.vqgan_trainer import VQGANTrainer
from ..trajectories import SetSpec, frechet_by_class, sample_set, set_specs
from .artifacts import (
    EXTRACTOR_CLASSES,
    load_extractors,
    load_pipeline,
    load_reported,
    load_sources,
    load_split,
    stage_result,
    trained_on,
)
from .config import SHOW_LESIONS, StudyConfig
from .downstream import run_downstream
from .kinds import check_makes_same_kind, check_same_kind
from .networks import check_networks, make_autoencoder, make_denoiser, make_extractor


logger = logging.getLogger(__name__)

SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,  # latents are not bounded by 1
    "set_alpha_to_one": False,  # else the last step has no noise and an infinite log-probability
    "steps_offset": 0,
}


def prepare(config: StudyConfig) -> dict:
    """Volumes of both splits, their counts and fingerprint.

    Raises:
        InputError: a split that later stages could not use (`_check_splits`), networks that could not take its volumes
            (`check_networks`), or a data set that can't be read.
    """
    folder, dataset, left_out, warnings = Path(config.output_dir) / "prepare", config.dataset, 0, []
    if config.dataset == "phantoms":
        for number, split in enumerate(SIDES):
            start = number * config.num_per_class
            volumes = load_phantoms(
                config.num_per_class, config.image_size, config.data_seed, start, config.num_workers
            )
            volumes.save(folder / f"{split}.safetensors")
    elif config.dataset == "prepared":
        for split in SIDES:
            VolumeDataset.load(Path(config.data_dir) / f"{split}.safetensors").save(folder / f"{split}.safetensors")
        dataset, warnings = _prepared_from(Path(config.data_dir) / "summary.json")
    else:
        listing = list_cases(
            config.dataset, config.data_dir,
            modality=config.modality, label_column=config.label_column, label_bins=config.label_bins,
            subject_column=config.subject_column,
        )  # fmt: skip
        processor = VolumeProcessor(config.image_size, config.field_of_view)
        plan = SplitPlan(config.holdout_fraction, config.data_seed)
        summary = prepare_cases(listing, processor, plan, folder, config.num_workers, strict=True)
        left_out, warnings = summary["rejected"], summary.get("warnings", [])  # earlier versions had none
    train, heldout = load_split(config, "train"), load_split(config, "heldout")
    _check_splits(train, heldout)
    check_networks(config, tuple(train.pixel_values.shape[1:]), train.num_classes)
    if config.pretrained:
        warnings = [*warnings, *_check_pretrained(config, train, heldout)]
    if config.downstream:
        _check_classes(train)
    plot_volumes({"training volumes": train.take_per_class(4).pixel_values}, folder / "volumes.png")
    return {
        "dataset": dataset,
        "train": train.class_counts(),
        "heldout": heldout.class_counts(),
        "shape": list(train.pixel_values.shape[1:]),
        "spacing": list(train.spacing),
        "left_out": left_out,
        "fingerprint": hash_tensors({"train": train.pixel_values, "heldout": heldout.pixel_values}.items()),
        "warnings": warnings,
    }


def _prepared_from(summary: Path) -> tuple[str, list[str]]:
    """The data set that `msrl prepare` read, for its terms (where that is not known, only that it was prepared), and its warnings."""
    found = read_json(summary) if summary.is_file() else {}
    return found.get("dataset") or "prepared", found.get("warnings", [])


def _check_classes(train: VolumeDataset) -> None:
    if train.num_classes < 2:
        raise InputError("Section 'downstream' trains classifiers, and these data have one class; remove it.")


def _check_splits(train: VolumeDataset, heldout: VolumeDataset) -> None:
    """Raise InputError for a subject on both sides, volumes of two kinds, or a class with fewer than two volumes on a side."""
    check_no_leak(train.subject_ids, heldout.subject_ids)
    check_same_kind(train, heldout, "The hold-out")
    for side, volumes in (("training set", train), ("hold-out", heldout)):
        for name, count in volumes.class_counts().items():
            if count < 2:  # the covariance in a distance needs two
                raise InputError(
                    f"Class {name!r} needs 2 volumes or more in the {side} and has {count}; give more, or another split."
                )


def _check_pretrained(config: StudyConfig, train: VolumeDataset, heldout: VolumeDataset) -> list[str]:
    """Raise InputError unless the given models are of volumes like these, and have seen none that are held out here: a class is
    only a number to them, and so is a phantom. What of it nobody can tell is logged, and returned for the report."""
    check_makes_same_kind(train, load_pipeline(config), f"The pipeline {config.pretrained}")
    known = trained_on(config)
    phantoms = known.phantoms or {}
    if config.dataset == "phantoms" and phantoms.get("data_seed") == config.data_seed and phantoms["n"] > len(train):
        raise InputError(
            f"{config.pretrained} was trained on {phantoms['n']} phantoms or more, and with num_per_class={config.num_per_class} the "
            f"later ones would be held out here; give num_per_class={phantoms['n'] // train.num_classes} or more, or another data_seed."
        )
    seen = set(known.hashes).intersection(volume_hashes(heldout.pixel_values))
    if seen:
        raise InputError(
            f"{config.pretrained} was trained on {len(seen)} of the {len(heldout)} volumes that are held out here; split as it was "
            "(data_seed, holdout_fraction, or lists of subjects)."
        )
    if config.dataset == "phantoms" or not known.unnamed_volumes:
        return []
    warning = (
        f"{Path(config.pretrained).name} does not say which volumes it was trained on (releases on the Hub do not): split as it was, "
        "with the same seeds, or held-out volumes may be among them."
    )
    logger.warning(warning)
    return [warning]


def train_extractors(config: StudyConfig) -> dict:
    """The label extractor and both judges, on the training volumes.

    Only judges may be told degradations (`degraded_share`). A label extractor that is told them sees the autoencoder's blur
    above all: no policy can mend it, and rewards regressed on such distances pay for little else.
    """
    train, results = load_split(config, "train"), {}
    for role in EXTRACTOR_CLASSES:
        torch.manual_seed(fold_seed(config.seed, "init", role))
        model = make_extractor(config, role, train.num_channels)
        untold = {"degraded_share": 0.0} if role == "label" else {}
        args = config.trainer_config("extractors", role, seed=fold_seed(config.seed, role) % 2**31, **untold)
        figures = FeatureTrainer(model, args, train).train()
        model.half().float()  # rounded, so that a release in float16 measures the very same
        if process_state().is_main_process:
            model.save_pretrained(Path(config.output_dir) / "extractors" / role)
        results[role] = {**extractor_identity(model), **figures}
    return results


def train_vqgan(config: StudyConfig) -> dict:
    """The autoencoder."""
    train, heldout = load_split(config, "train"), load_split(config, "heldout")
    torch.manual_seed(fold_seed(config.seed, "init", "vqvae"))
    model = make_autoencoder(config, train.num_channels)
    trainer = VQGANTrainer(model, config.trainer_config("vqgan"), train, heldout)
    figures = trainer.train()
    if not process_state().is_main_process:
        return figures
    folder = Path(config.output_dir) / "vqgan"
    model.save_pretrained(folder / "vqvae")
    shown = heldout.take_per_class(4)
    model.enable_slicing()  # the picture must not need more memory than training did
    with torch.no_grad():
        reconstructed = model(shown.batch(range(len(shown)), model.device)["pixel_values"]).sample.cpu()
    plot_volumes({"held-out": shown.pixel_values, "reconstructed": reconstructed}, folder / "reconstructions.png")
    return figures


def train_diffusion(config: StudyConfig) -> dict:
    """The denoiser; the pipeline."""
    train = load_split(config, "train")
    vqvae = VQModel3D.from_pretrained(Path(config.output_dir) / "vqgan" / "vqvae")
    torch.manual_seed(fold_seed(config.seed, "init", "unet"))
    unet = make_denoiser(config, vqvae, train.image_size, train.num_classes)
    scheduler = DDIMScheduler(**{**SCHEDULER_DEFAULTS, **config.scheduler})
    pipeline = MedVolumePipeline(vqvae, unet, scheduler, spacing=train.spacing, id2label=train.id2label)
    figures = LatentDiffusionTrainer(pipeline, config.trainer_config("diffusion"), train).train()
    if not process_state().is_main_process:
        return figures
    folder = Path(config.output_dir) / "diffusion"
    pipeline.save_pretrained(folder / "pipeline")
    shown = train.take_per_class(4)
    samples = sample_with(pipeline, shown, {"num_inference_steps": 50, "eta": 1.0}, config, config.seed)
    plot_volumes(
        {"real": shown.pixel_values, "generated": samples.pixel_values},
        folder / "samples.png",
        at_asymmetry=stage_result(config, "prepare").get("dataset", config.dataset) in SHOW_LESIONS,
    )
    return figures


def sample_trajectories(config: StudyConfig) -> dict:
    """Every trajectory set, each in a file of its own; those already there are kept."""
    sources, pipeline = load_sources(config), load_pipeline(config)
    specs = set_specs(config.synthetic_steps, config.reconstruction_steps)
    folder = Path(config.output_dir) / "trajectories"
    total = sum(spec.unet_forwards for spec in specs) * len(sources)
    with tqdm(total=total, desc="trajectories", unit="forward") as progress:
        for spec in specs:
            path = folder / f"{spec.name}.safetensors"
            if path.is_file():  # left by a killed run of this very stage: files are written whole
                progress.update(spec.unet_forwards * len(sources))
                continue
            sampled = sample_set(
                pipeline, sources, spec, config.seed, config.sampling_batch_size,
                mixed_precision=config.mixed_precision, progress=progress,
            )  # fmt: skip
            sampled.save(path)
    return {"sets": [spec.name for spec in specs], "volumes_per_set": len(sources), "unet_forwards": total}


def sample_with(
    pipeline: MedVolumePipeline, volumes: VolumeDataset, sampler: dict, config: StudyConfig, seed: int
) -> VolumeDataset:
    """One sample per volume of `volumes`, of its class, by `{"num_inference_steps", "eta", "guidance_scale"}`."""
    return sample_set(
        pipeline,
        volumes,
        SetSpec("synthetic", sampler["num_inference_steps"]),
        seed,
        config.sampling_batch_size,
        guidance_scale=sampler.get("guidance_scale", 1.0),
        eta=sampler["eta"],
        mixed_precision=config.mixed_precision,
    )


def choose_sampler(config: StudyConfig) -> dict:
    """FID of the pretrained model by the label extractor at every sampler of the config, and the best of these."""
    train, extractor, pipeline = load_split(config, "train"), load_extractors(config)["label"], load_pipeline(config)
    real, samplers = extract_features(extractor, train.pixel_values), []
    for sampler in tqdm(config.samplers, desc="samplers"):
        sampled = sample_with(pipeline, train, sampler, config, fold_seed(config.seed, "sampler choice"))
        features = extract_features(extractor, sampled.pixel_values)
        samplers.append({**sampler, "fid": frechet_by_class(real, train, features, sampled)})
    best = min(range(len(samplers)), key=lambda number: samplers[number]["fid"]["all"])
    found = {"samplers": samplers, "best_sampler": best}
    write_json(Path(config.output_dir) / "samplers" / "samplers.json", found)
    return found


def train_baseline_classifiers(config: StudyConfig) -> dict:
    """Classifiers of all arms but the tuned one: real volumes only, with standard synthetic ones, with those of other generators."""
    return _compare_classifiers(config, {"+ standard synthetic": "standard"}, "baseline_downstream")


def train_classifiers(config: StudyConfig) -> dict:
    """Classifiers of real volumes without and with synthetic ones (`downstream.run_downstream`), and their metrics. Of those
    that tuning has no part in, stage baseline_downstream has trained all."""
    arms = {"+ standard synthetic": "standard", "+ RL synthetic": "rl"}
    return _compare_classifiers(config, arms, "downstream", Path(config.output_dir) / "baseline_downstream")


def _unseen(config: StudyConfig, arm: str) -> VolumeDataset:
    """The volumes of an arm of the report, with ids of their own: they show no subject."""
    volumes = load_reported(config, arm)
    return replace(volumes, subject_ids=[f"{arm}-{number:05d}" for number in range(len(volumes))])


def _compare_classifiers(config: StudyConfig, reported: dict[str, str], stage: str, known: Path | None = None) -> dict:
    """`run_downstream` on the study's real volumes, in the folder of `stage`: without others, with those of arms of the report, by
    title, and with those of other generators."""
    train, seed = load_split(config, "train"), config.seed_of("downstream")
    _check_classes(train)  # the section may be newer than stage prepare
    arms = {"real only": None, **{title: _unseen(config, arm) for title, arm in reported.items()}}
    arms |= {name: load_arm(name, path, train, config) for name, path in config.synthetic_arms.items()}
    found = run_downstream(
        train.take_per_class(config.downstream_per_class) if config.downstream_per_class else train,
        load_split(config, "heldout"),
        arms,
        config.trainer_config("downstream"),
        [1000 * seed + number for number in config.downstream_seeds],
        Path(config.output_dir) / stage,
        config.bootstrap_draws,
        known,
    )
    return {name: found[name] for name in ("n", "reference", "arms", "differences")}


def load_arm(
    name: str, path: str | Path, like: VolumeDataset, config: StudyConfig, field: str = "synthetic_arms"
) -> VolumeDataset:
    """Another generator's volumes: a `.safetensors` file of `VolumeDataset.save`, or a folder of NIfTI with the classes in its
    `metadata.csv`, resampled to the study's cubes. `field` is where the config names it.

    Raises:
        InputError: no classes, or one that the study does not have.
    """
    if Path(path).suffix == ".safetensors":
        return VolumeDataset.load(path)
    source = open_source(path, like.image_size, like.image_size * like.spacing[0])
    labels = {class_name: label for label, class_name in like.id2label.items()}
    unknown = sorted(set(source.class_names or ["none at all"]) - set(labels))
    if unknown:
        raise InputError(
            f"{field}: {path} has volumes of class {unknown[0]!r}; the study's classes are {sorted(labels)}."
        )
    return VolumeDataset(
        torch.cat([batch.half() for batch in source.batches(config.sampling_batch_size)]),
        torch.tensor([labels[class_name] for class_name in source.class_names]),
        [f"{name}/{file}" for file in source.names],
        like.id2label,
        source.spacing,
    )
