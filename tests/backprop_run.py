"""A tiny pipeline trained by the gradients of rewards, with the gradients kept."""

from unittest.mock import patch

import torch
from tiny import Brightness, tiny_pipeline

from msrl_diffusers.models.reward_models import SliceRewardModel
from msrl_diffusers.rewards import LearnedReward
from msrl_diffusers.trainers.base import read_log
from msrl_diffusers.trainers.reward_backprop_config import RewardBackpropConfig
from msrl_diffusers.trainers.reward_backprop_trainer import RewardBackpropTrainer


class Contrast:
    """The spread of the sample, on another scale."""

    name = "contrast"
    differentiable = True

    def __call__(self, samples, conditions):
        return 100 * samples.flatten(1).std(dim=1)


def config(output_dir, **settings):
    return RewardBackpropConfig(
        **{
            "output_dir": str(output_dir), "report_to": "none", "max_steps": 2, "learning_rate": 1e-3,
            "rollout_batch_size": 4, "num_rollout_batches": 2, "train_batch_size": 4, "num_inference_steps": 4, **settings,
        }
    )  # fmt: skip


class Recording(RewardBackpropTrainer):
    """Keeps the gradient of every update, before clipping."""

    gradients = None

    def _update(self, run, weights, *arguments):
        clip = run.accelerator.clip_grad_norm_
        self.gradients = self.gradients or []

        def record(parameters, max_norm):
            self.gradients.append({name: value.grad.clone() for name, value in weights.trainable.items()})
            return clip(parameters, max_norm)

        with patch.object(run.accelerator, "clip_grad_norm_", record):
            return super()._update(run, weights, *arguments)


def train(output_dir, pipeline=None, reward_funcs=None, **settings):
    """A trained pipeline, the trainer, its log and what it returned."""
    pipeline = pipeline or tiny_pipeline()
    arguments = {
        name: settings.pop(name) for name in ("watchdogs", "select_by", "train_conditions") if name in settings
    }
    trainer = Recording(pipeline, reward_funcs or Brightness(), config(output_dir, **settings), **arguments)
    figures = trainer.train()
    return pipeline, trainer, read_log(output_dir), figures


def timeless(history):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in history]


def slice_reward(seed=0):
    torch.manual_seed(seed)
    return LearnedReward("slice", SliceRewardModel(block_out_channels=(8, 8), norm_num_groups=4))
