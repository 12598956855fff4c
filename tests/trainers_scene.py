"""Trainers of freshly built tiny models, by name."""

import torch
from tiny import tiny_phantoms, tiny_pipeline, tiny_vqvae

from msrl_diffusers import (
    FeatureConfig,
    FeatureTrainer,
    LatentDiffusionConfig,
    LatentDiffusionTrainer,
    PatchFeatureExtractor,
    RewardConfig,
    RewardTrainer,
    ScoredVolumes,
    SliceFeatureExtractor,
    SliceRewardModel,
    VolumeFeatureExtractor,
    VolumeRewardModel,
    VQGANConfig,
    VQGANTrainer,
)


def scored_volumes() -> ScoredVolumes:
    """Clean volumes with target 1 and noisy ones with target 0, of six subjects."""
    volumes = tiny_phantoms()
    noise = torch.randn(volumes.pixel_values.shape, generator=torch.Generator().manual_seed(0)).half()
    pixel_values = torch.cat([volumes.pixel_values, volumes.pixel_values + noise])
    return ScoredVolumes(pixel_values, torch.tensor([1.0] * 6 + [0.0] * 6), volumes.subject_ids * 2)


def build(name: str, output_dir, **settings):
    """A trainer of freshly built weights, always the same, and the module whose weights it trains."""
    settings = {
        "output_dir": str(output_dir), "report_to": "none", "train_batch_size": 2, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "logging_steps": 1, **settings,
    }  # fmt: skip
    torch.manual_seed(0)
    if name.startswith("vqgan"):
        settings = {"discriminator_start_step": 0, "discriminator_channels": 8, "discriminator_layers": 1, **settings}
        model = tiny_vqvae("fsq" if name == "vqgan-fsq" else "vq")
        trainer = VQGANTrainer(model, VQGANConfig(**settings), tiny_phantoms())
        return trainer, torch.nn.ModuleDict({"model": model, "discriminators": trainer.discriminators})
    if name == "diffusion":
        pipeline = tiny_pipeline()
        return LatentDiffusionTrainer(pipeline, LatentDiffusionConfig(**settings), tiny_phantoms()), pipeline.unet
    if name.startswith("features"):
        model = {
            "slice": lambda: SliceFeatureExtractor(block_out_channels=(8, 8), num_features=16),
            "volume": lambda: VolumeFeatureExtractor(block_out_channels=(8, 8), num_features=16),
            "patch": lambda: PatchFeatureExtractor(width=16, num_layers=1, num_features=16),
        }[name.split("-")[1]]()
        trainer = FeatureTrainer(model, FeatureConfig(**settings), tiny_phantoms())
        return trainer, trainer.network
    model_class = {"volume": VolumeRewardModel, "slice": SliceRewardModel}[name.split("-")[1]]
    model = model_class(block_out_channels=(8, 8))
    return RewardTrainer(model, RewardConfig(**settings), scored_volumes()), model
