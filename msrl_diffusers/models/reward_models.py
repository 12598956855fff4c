"""Reward models: networks that score the quality of a volume, or of its slices, on a scale regressed from FID."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from .layers import ResnetBlock, conv


class ScoreNetwork(nn.Module):
    """Images or volumes `[B, C, *S]` to pooled features and a score `[B]`: strided convolutions and residual blocks."""

    def __init__(self, spatial_dims: int, in_channels: int, block_out_channels: tuple[int, ...], norm_num_groups: int):
        super().__init__()
        layers, channels = [], in_channels
        for outputs in block_out_channels:
            layers.append(conv(spatial_dims, channels, outputs, 4, stride=2, padding=1))
            layers.append(ResnetBlock(spatial_dims, outputs, outputs, norm_num_groups))
            channels = outputs
        self.layers = nn.Sequential(*layers)
        self.norm_out = nn.BatchNorm1d(2 * channels)
        self.head = nn.Sequential(nn.Linear(2 * channels, channels), nn.SiLU(), nn.Linear(channels, 1))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(self.layers(sample)).float().flatten(2)
        # Mean and deviation over space, normalized over samples only: a norm within a sample would hide its contrast.
        pooled = torch.cat([hidden.mean(dim=2), hidden.var(dim=2).add(1e-6).sqrt()], dim=1)
        return self.head(self.norm_out(pooled))[:, 0]


class VolumeRewardModel(ModelMixin, ConfigMixin):
    """R_3D of arXiv 2603.06173: global anatomy. A 3D network from a volume to one score.

    Args:
        in_channels (`int`): channels of the volumes.
        block_out_channels (`tuple[int]`): channels per resolution; each entry halves the axes.
        norm_num_groups (`int`): groups of every GroupNorm.
    """

    @register_to_config
    def __init__(
        self, in_channels: int = 1, block_out_channels: tuple[int, ...] = (16, 32, 64), norm_num_groups: int = 8
    ):
        super().__init__()
        self.network = ScoreNetwork(3, in_channels, block_out_channels, norm_num_groups)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Scores `[B]`, float32, about 0 (worst set) to 1 (best), of `volumes [B, C, D, H, W]` in [-1, 1]."""
        return self.network(volumes)


class SliceRewardModel(ModelMixin, ConfigMixin):
    """R_2D of arXiv 2603.06173: texture. A 2D network on axial slices; a volume's score is their mean.

    Args:
        in_channels (`int`): channels of the slices.
        block_out_channels (`tuple[int]`): channels per resolution; each entry halves the axes.
        norm_num_groups (`int`): groups of every GroupNorm.
        empty_threshold (`float`): a slice counts as non-empty if this share of its voxels is above the background.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        block_out_channels: tuple[int, ...] = (32, 48, 64),
        norm_num_groups: int = 8,
        empty_threshold: float = 0.05,
    ):
        super().__init__()
        self.network = ScoreNetwork(2, in_channels, block_out_channels, norm_num_groups)

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        """Scores `[B]`, float32, of axial slices `[B, C, H, W]`; or of volumes `[B, C, D, H, W]`, as the mean over
        their non-empty slices (over all of them, where every one is empty)."""
        if slices.ndim == 4:
            return self.network(slices)
        B, _, D = slices.shape[:3]
        scores = self.network(slices.movedim(2, 1).flatten(0, 1)).reshape(B, D)
        weights = non_empty_slices(slices, self.config.empty_threshold).float()
        weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, torch.ones_like(weights))
        return (scores * weights).sum(dim=1) / weights.sum(dim=1)


def non_empty_slices(volumes: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which axial slices of `[B, C, D, H, W]` in [-1, 1] show more than `threshold` of foreground, `[B, D]` bool."""
    return (volumes.detach() > -0.95).float().mean(dim=(1, 3, 4)) > threshold
