"""Reward models: networks that score the quality of a volume, or of its slices, on a scale regressed from FID."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..errors import InputError
from .layers import ResnetBlock, conv


def pessimistic_score(head_scores: torch.Tensor, spread_penalty: float) -> torch.Tensor:
    """Scores `[B]` of an ensemble whose heads gave `head_scores [B, K]`: `mean - spread_penalty * standard deviation`.

    Where heads that agree on the training volumes disagree, none of them knows; a policy that seeks high scores ends up
    there (uncertainty-weighted optimization, Coste et al., arXiv 2310.02743, section 3; there with the variance).
    """
    head_scores = head_scores.float()
    if head_scores.shape[1] == 1:
        return head_scores[:, 0]
    return head_scores.mean(dim=1) - spread_penalty * head_scores.std(dim=1, correction=0)


class ScoreNetwork(nn.Module):
    """Images or volumes `[B, C, *S]` to pooled features and the scores `[B, K]` of K heads: strided convolutions and
    residual blocks, shared by all heads."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        block_out_channels: tuple[int, ...],
        norm_num_groups: int,
        num_heads: int = 1,
        num_classes: int | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        layers, channels = [], in_channels
        for outputs in block_out_channels:
            layers.append(conv(spatial_dims, channels, outputs, 4, stride=2, padding=1))
            layers.append(ResnetBlock(spatial_dims, outputs, outputs, norm_num_groups))
            channels = outputs
        self.layers = nn.Sequential(*layers)
        self.norm_out = nn.BatchNorm1d(2 * channels)
        # the first head has the name of the only one in checkpoints without an ensemble
        self.head = _score_head(channels, num_classes)
        self.other_heads = nn.ModuleList(_score_head(channels, num_classes) for _ in range(num_heads - 1))

    @property
    def _dtype(self) -> torch.dtype:
        """Of the weights behind the pooling."""
        return self.head[0].weight.dtype

    def features(self, sample: torch.Tensor) -> torch.Tensor:
        """What the heads score: pooled features `[B, F]`, float32.

        Raises:
            InputError: samples so small that after all levels one voxel is left, which has no deviation, or none.
        """
        levels = len(self.layers) // 2
        if math.prod(edge // 2**levels for edge in sample.shape[2:]) < 2:
            raise InputError(
                f"Samples {list(sample.shape[2:])} are down to one voxel or none after the levels of the reward model; give it fewer "
                "block_out_channels."
            )
        hidden = F.silu(self.layers(sample)).float().flatten(2)
        # Mean and deviation over space, normalized over samples only: a norm within a sample would hide its contrast.
        pooled = torch.cat([hidden.mean(dim=2), hidden.var(dim=2).add(1e-6).sqrt()], dim=1)
        return self.norm_out(pooled.to(self._dtype)).float()

    def forward(self, sample: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        features = self.features(sample).to(self._dtype)
        scores = torch.stack([head(features) for head in (self.head, *self.other_heads)], dim=1)
        if self.num_classes is None:
            return scores[..., 0]
        labels = _checked_labels(class_labels, len(scores), self.num_classes)
        return scores.gather(2, labels[:, None, None].expand(-1, scores.shape[1], 1))[..., 0]


def _score_head(channels: int, num_classes: int | None) -> nn.Sequential:
    """From pooled features to a score, or to one for every class that the sample might be asked to show."""
    return nn.Sequential(nn.Linear(2 * channels, channels), nn.SiLU(), nn.Linear(channels, num_classes or 1))


def _checked_labels(class_labels: torch.Tensor | None, number: int, num_classes: int) -> torch.Tensor:
    """The classes `[number]` that a conditional reward model was given.

    Raises:
        InputError: none, not one for each sample, or one that the model does not know.
    """
    if class_labels is None:
        raise InputError("This reward model scores a sample as one of its class; give class_labels.")
    if tuple(class_labels.shape) != (number,) or not ((0 <= class_labels) & (class_labels < num_classes)).all():
        raise InputError(
            f"class_labels must be {number} whole numbers below {num_classes}, one for each sample, got "
            f"{tuple(class_labels.shape)}: {class_labels.flatten()[:8].tolist()}."
        )
    return class_labels


def scores_of(
    model: nn.Module,
    samples: torch.Tensor,
    class_labels: Sequence[int] | torch.Tensor | None,
    batch_size: int = 32,
    **kwargs,
) -> torch.Tensor:
    """The scores `[B]`, float32, that a reward model gives `samples [B, C, *S]`, in micro-batches and on its device; only a
    conditional one is told their classes. `kwargs` go to the model."""
    parameter, batches = next(model.parameters()), samples.split(batch_size)
    told = [{}] * len(batches)
    if is_conditional(model) and class_labels is not None:
        labels = torch.as_tensor(class_labels, device=parameter.device)
        told = [{"class_labels": part} for part in labels.split(batch_size)]
    scores = [
        model(batch.to(parameter.device, parameter.dtype), **classes, **kwargs)
        for batch, classes in zip(batches, told, strict=True)
    ]
    return torch.cat(scores).float()


def is_conditional(model: nn.Module) -> bool:
    """Whether `model` is a reward model of this package that scores samples as of a class, which it must be told. Any other
    network may mean something else by `num_classes`."""
    return isinstance(model, (VolumeRewardModel, SliceRewardModel)) and model.config.num_classes is not None


def _check_options(num_heads: int, spread_penalty: float, num_classes: int | None) -> None:
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise InputError(f"num_classes of a reward model must be a whole number from 1, or None, got {num_classes!r}.")
    if not isinstance(num_heads, int) or num_heads < 1:
        raise InputError(f"num_heads of a reward model must be a whole number from 1, got {num_heads!r}.")
    if not isinstance(spread_penalty, (int, float)) or not 0 <= spread_penalty < float("inf"):
        raise InputError(f"spread_penalty of a reward model must be 0 or more, got {spread_penalty!r}.")
    if spread_penalty and num_heads == 1:
        raise InputError(f"spread_penalty={spread_penalty} needs heads that can disagree; set num_heads to 2 or more.")


class VolumeRewardModel(ModelMixin, ConfigMixin):
    """R_3D of arXiv 2603.06173: global anatomy. A 3D network from a volume to one score.

    With `num_heads` above 1 it is an ensemble: heads of different initial weights on one trunk, which `RewardTrainer` fits
    to different weights of the subjects. Its score is `pessimistic_score` of theirs.

    With `num_classes` it is conditional: it scores a volume as one of the class that it should show. Without, as in the paper,
    it can't see that a volume shows another class well, and where classes differ in what the generator makes of them, it
    scores volumes by what they look like.

    Args:
        in_channels (`int`): channels of the volumes.
        block_out_channels (`tuple[int]`): channels per resolution; each entry halves the axes.
        norm_num_groups (`int`): groups of every GroupNorm.
        num_heads (`int`): heads of the ensemble; 1 is none.
        spread_penalty (`float`): deviations between the heads that are taken off their mean.
        num_classes (`int`, *optional*): classes that it tells apart; None: it is not told any.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        block_out_channels: tuple[int, ...] = (16, 32, 64),
        norm_num_groups: int = 8,
        num_heads: int = 1,
        spread_penalty: float = 0.0,
        num_classes: int | None = None,
    ):
        super().__init__()
        _check_options(num_heads, spread_penalty, num_classes)
        self.network = ScoreNetwork(3, in_channels, block_out_channels, norm_num_groups, num_heads, num_classes)

    def forward(
        self, volumes: torch.Tensor, return_heads: bool = False, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scores `[B]`, float32, about 0 (worst set) to 1 (best), of `volumes [B, C, D, H, W]` in [-1, 1]; with
        `return_heads`, those of every head, `[B, num_heads]`. A conditional model needs `class_labels [B]`, int64.

        Raises:
            InputError: a conditional model without `class_labels`, or with others than it knows.
        """
        head_scores = self.network(volumes, class_labels)
        return head_scores if return_heads else pessimistic_score(head_scores, self.config.spread_penalty)


class SliceRewardModel(ModelMixin, ConfigMixin):
    """R_2D of arXiv 2603.06173: texture. A 2D network on axial slices; a volume's score is their mean.

    With `num_heads` above 1 it is an ensemble as `VolumeRewardModel` is. Of a volume, each head gives the mean over the
    slices, and the heads' spread is that of these means: it is about the volume, not about its single slices.
    With `num_classes` it is conditional, as `VolumeRewardModel` may be.

    Args:
        in_channels (`int`): channels of the slices.
        block_out_channels (`tuple[int]`): channels per resolution; each entry halves the axes.
        norm_num_groups (`int`): groups of every GroupNorm.
        empty_threshold (`float`): a slice counts as non-empty if this share of its voxels is above the background.
        num_heads (`int`): heads of the ensemble; 1 is none.
        spread_penalty (`float`): deviations between the heads that are taken off their mean.
        num_classes (`int`, *optional*): classes that it tells apart; None: it is not told any.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        block_out_channels: tuple[int, ...] = (32, 48, 64),
        norm_num_groups: int = 8,
        empty_threshold: float = 0.05,
        num_heads: int = 1,
        spread_penalty: float = 0.0,
        num_classes: int | None = None,
    ):
        super().__init__()
        _check_options(num_heads, spread_penalty, num_classes)
        self.network = ScoreNetwork(2, in_channels, block_out_channels, norm_num_groups, num_heads, num_classes)

    def forward(
        self, slices: torch.Tensor, return_heads: bool = False, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scores `[B]`, float32, of axial slices `[B, C, H, W]`; or of volumes `[B, C, D, H, W]`, as the mean over
        their non-empty slices (over all of them, where every one is empty); with `return_heads`, those of every head,
        `[B, num_heads]`. A conditional model needs `class_labels [B]`, int64.

        Raises:
            InputError: a conditional model without `class_labels`, or with others than it knows.
        """
        if slices.ndim == 4:
            head_scores = self.network(slices, class_labels)
        else:
            depth = slices.shape[2]
            labels = None if class_labels is None else class_labels.repeat_interleave(depth)
            by_slice = self.network(slices.movedim(2, 1).flatten(0, 1), labels).unflatten(0, (len(slices), depth))
            weights = non_empty_slices(slices, self.config.empty_threshold).float()
            weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, torch.ones_like(weights))
            head_scores = torch.stack(
                [(scores * weights).sum(dim=1) / weights.sum(dim=1) for scores in by_slice.unbind(2)], dim=1
            )
        return head_scores if return_heads else pessimistic_score(head_scores, self.config.spread_penalty)


def non_empty_slices(volumes: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which axial slices of `[B, C, D, H, W]` in [-1, 1] show more than `threshold` of foreground, `[B, D]` bool."""
    return (volumes.detach() > -0.95).float().mean(dim=(1, 3, 4)) > threshold
