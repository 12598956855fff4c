"""A release as `write_release` writes it, of tiny random networks: a study that starts from it trains no prior."""

from pathlib import Path

import torch
from tiny import tiny_pipeline, tiny_study

from msrl_diffusers import (
    PatchFeatureExtractor,
    SliceFeatureExtractor,
    SliceRewardModel,
    VolumeFeatureExtractor,
    VolumeRewardModel,
)
from msrl_diffusers.files import write_json


DISTANCES = {"reconstruction-001": 0.1, "reconstruction-005": 0.4, "synthetic-002": 1.0, "synthetic-004": 0.7}


def write_tiny_release(folder: Path) -> str:
    """Its folder; sets, steps and sizes are those of `tiny_study`."""
    tiny_pipeline().save_pretrained(folder)
    torch.manual_seed(0)
    models = {
        "reward_volume": VolumeRewardModel(block_out_channels=(8, 8)),
        "reward_slice": SliceRewardModel(block_out_channels=(8, 8)),
        "reward_heldout": VolumeRewardModel(block_out_channels=(8,)),
        "extractor_label": SliceFeatureExtractor(block_out_channels=(8, 8), num_features=4, num_slices=3),
        "extractor_judge": VolumeFeatureExtractor(block_out_channels=(8, 8), num_features=3),
        "extractor_second_judge": PatchFeatureExtractor(width=16, num_layers=1, num_features=3),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    fids = {name: dict.fromkeys(("all", "HGG", "LGG"), distance) for name, distance in DISTANCES.items()}
    targets = {name: dict.fromkeys(("HGG", "LGG"), (1.0 - distance) / 0.9) for name, distance in DISTANCES.items()}
    sampler = {"num_inference_steps": 2, "eta": 1.0}
    scores = {
        "n": 8,
        "fid": fids,
        "targets": targets,
        "samplers": [{**sampler, "fid": fids["synthetic-002"]}],
        "best_sampler": 0,
    }
    write_json(folder / "scores.json", scores)
    return str(folder)


def released_study(folder: Path, release: str, **changes) -> dict:
    """Fields of a StudyConfig of the last stages alone: tuning, evaluation, report."""
    tiny = tiny_study()
    settings = {**tiny, "pretrained": release, "output_dir": str(folder), "mixed_precision": "no", **changes}
    settings["ppo"] = {**tiny["ppo"], **changes.get("ppo", {})}
    return {name: value for name, value in settings.items() if name != "downstream"}
