"""The stage in which the policy is tuned, by any of the methods; watched alike, and judged by none of what is reported."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from ..data.volumes import VolumeDataset
from ..evaluation.set_labels import SetLabeler
from ..evaluation.validity import check_validity
from ..models.feature_extractors import RewardFeatureExtractor
from ..pipelines.med_volume import MedVolumePipeline
from ..processes import process_state
from ..rewards import LearnedReward
from ..rollouts import Rollout
from ..seeding import fold_seed
from ..trainers.costs import cost_of_prediction
from ..trainers.ddo_trainer import DDOTrainer
from ..trainers.frechet_trainer import FrechetTrainer
from ..trainers.frechet_watchdog import FrechetWatchdog
from ..trainers.nft_trainer import DiffusionNFTTrainer
from ..trainers.ppo_trainer import DiffusionPPOTrainer
from ..trainers.refresh import RewardRefresh
from ..trainers.reward_backprop_trainer import RewardBackpropTrainer
from ..trainers.snapshots import SnapshotCallback
from .artifacts import (
    best_sampler,
    load_extractors,
    load_pipeline,
    load_reward_models,
    load_sources,
    load_split,
    stage_result,
)
from .config import StudyConfig
from .reward_data import reward_data, reward_seed, reward_sets
from .sections import TRAINED_ON
from .stages import sample_with


def tune(config: StudyConfig) -> dict:
    """The pipeline tuned by `config.method` on the two rewards, on the Frechet distance or by self-play; watched by the held-out
    reward and the label FID, one of which picks the weights that are kept (with `frechet.eval_steps` fresh samples do). The judge has no part in it.

    Raises:
        InputError: rewards below `validity_floors`.
    """
    optimized = config.optimized_rewards()
    if config.validity_floors and optimized:
        figures = stage_result(config, "validity")
        check_validity({role: figures[role] for role in optimized}, config.validity_floors)
    pipeline, models, train = load_pipeline(config), load_reward_models(config), load_split(config, "train")
    extractor = load_extractors(config)["label"]
    args = config.trainer_config(config.method)
    shared = {
        "watchdogs": watchdogs(config, pipeline, models["heldout"], extractor, train),
        "select_by": config.select_by,
        "callbacks": [SnapshotCallback(args.output_dir, config.num_curve_points)] if config.num_curve_points else (),
    }
    rewards = [LearnedReward(role, models[role]) for role in TRAINED_ON]
    trainer = _MAKERS[config.method](config, pipeline, rewards, extractor, train, args, shared)
    device = process_state().device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    figures = trainer.train()
    if process_state().is_main_process:
        pipeline.save_pretrained(Path(args.output_dir) / "pipeline")
    reward, looks = getattr(trainer, "reward", None), math.ceil(figures["rollouts"] / args.watch_steps)
    return {
        **figures,
        "unet_forwards": trainer.unet_forwards + looks * _watch_forwards(config, train),
        "peak_memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,  # bytes
        "scales": {name: vars(scale) for name, scale in reward.scales.items()} if reward is not None else {},
    }


def watchdogs(
    config: StudyConfig,
    pipeline: MedVolumePipeline,
    heldout_model: torch.nn.Module,
    extractor: torch.nn.Module,
    train: VolumeDataset,
) -> dict[str, Callable[[Rollout], float]]:
    """`heldout_reward`, by the model that is never trained on, and `label_fid`, the mean distance over the classes.

    With `watch_per_class` the second is of samples of `pipeline`, whose denoiser is tuned, at the best sampler of the
    pretrained one: few noisy steps leave errors that a policy can mend although no other sampler makes them. They start
    from the same noise every time, so that weights differ in nothing else.
    """
    heldout, watched = LearnedReward("heldout", heldout_model), _watched(config, train)
    frechet = FrechetWatchdog(extractor, train)

    def heldout_reward(rollout: Rollout) -> float:
        return heldout(rollout.samples, rollout.conditions).mean().item()

    def label_fid(rollout: Rollout) -> float:
        if watched is None:
            return frechet(rollout)
        seed = config.seed_of(config.method)
        drawn = sample_with(pipeline, watched, best_sampler(config), config, fold_seed(seed, "watch"))
        return frechet.distance(drawn.pixel_values, drawn.class_labels)

    return {"heldout_reward": heldout_reward, "label_fid": label_fid}


def _watched(config: StudyConfig, train: VolumeDataset) -> VolumeDataset | None:
    """The training volumes of whose classes samples are drawn to be watched; None where the rollout's own are."""
    return train.take_per_class(config.watch_per_class) if config.watch_per_class else None


def _watch_forwards(config: StudyConfig, train: VolumeDataset) -> int:
    """Denoiser forwards that one look takes; every process samples all, to see the same figure."""
    watched = _watched(config, train)
    if watched is None:
        return 0
    sampler = best_sampler(config)
    passes = sampler["num_inference_steps"] * cost_of_prediction(sampler["guidance_scale"])
    return len(watched) * passes * process_state().num_processes


def _ppo(config, pipeline, rewards, extractor, train, args, shared):
    refresh = None
    if config.refreshes:
        most = args.samples_per_rollout * process_state().num_processes  # no class of a rollout has more
        sources = load_sources(config)
        anchors = {name: volumes.take_per_class(most) for name, volumes in reward_sets(config, sources)}
        labeler = SetLabeler(extractor, sources, anchors, config.target_map, config.marginal_labels)
        refresh = RewardRefresh(
            {reward.name: reward.model for reward in rewards},
            reward_data(config),
            labeler,
            {
                reward.name: config.trainer_config("refresh", seed=reward_seed(config, reward.name))
                for reward in rewards
            },
        )
    return DiffusionPPOTrainer(pipeline, rewards, args, refresh=refresh, **shared)


def _nft(config, pipeline, rewards, extractor, train, args, shared):
    return DiffusionNFTTrainer(pipeline, rewards, args, **shared)


def _draft(config, pipeline, rewards, extractor, train, args, shared):
    return RewardBackpropTrainer(pipeline, rewards, args, **shared)


def _frechet(config, pipeline, rewards, extractor, train, args, shared):
    if args.eval_steps:  # it picks by the distance of fresh samples then, which is none of a rollout
        shared = {**shared, "select_by": None}
    known = {"label": extractor, **{reward.name: RewardFeatureExtractor(reward.model) for reward in rewards}}
    return FrechetTrainer(pipeline, {name: known[name] for name in config.frechet_features}, train, args, **shared)


def _ddo(config, pipeline, rewards, extractor, train, args, shared):
    return DDOTrainer(pipeline, train, args, **shared)


_MAKERS = {"ppo": _ppo, "nft": _nft, "draft": _draft, "frechet": _frechet, "ddo": _ddo}
