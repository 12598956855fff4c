"""Feature extractors for Frechet distances, trained in the domain they judge: on slices, on volumes, on patches of volumes; and
what reward models see."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_3d_sincos_pos_embed
from torch import nn

from .layers import ResnetBlock, conv
from .reward_models import SliceRewardModel, VolumeRewardModel


def plane_slices(volumes: torch.Tensor, num_slices: int) -> list[torch.Tensor]:
    """Slices of the three planes of `volumes [B, C, D, H, W]`, evenly spaced over the middle 60 % of each axis.

    Axial `[B, num_slices, C, H, W]`, coronal `[B, num_slices, C, D, W]`, sagittal `[B, num_slices, C, D, H]`.
    """
    planes = []
    for axis in (2, 3, 4):
        size = volumes.shape[axis]
        positions = torch.linspace(0.2 * size, 0.8 * size - 1, num_slices).round().long()
        planes.append(volumes.index_select(axis, positions.to(volumes.device)).movedim(axis, 1))
    return planes


def _projected(project: nn.Linear, pooled: torch.Tensor) -> torch.Tensor:
    """`project(pooled)`, float32, also of a network in half precision."""
    return project(pooled.to(project.weight.dtype)).float()


class SliceFeatureExtractor(ModelMixin, ConfigMixin):
    """A plain (VGG-like) 2D network on slices of the three planes: the *label* extractor.

    Args:
        in_channels (`int`): channels of the volumes.
        block_out_channels (`tuple[int]`): channels per resolution.
        num_features (`int`): length of a feature vector.
        num_slices (`int`): slices per plane, evenly spaced over the middle 60 % of the axis.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        block_out_channels: tuple[int, ...] = (16, 32, 64),
        num_features: int = 48,
        num_slices: int = 8,
    ):
        super().__init__()
        layers, channels = [], in_channels
        for outputs in block_out_channels:
            layers += [conv(2, channels, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.LeakyReLU(0.1)]
            layers += [conv(2, outputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.LeakyReLU(0.1)]
            layers += [nn.AvgPool2d(2)]
            channels = outputs
        self.layers = nn.Sequential(*layers)
        self.project = nn.Linear(2 * channels, num_features)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Features `[B, 3, num_slices, num_features]`, float32, of `volumes [B, C, D, H, W]` in [-1, 1]."""
        slices = torch.stack(plane_slices(volumes, self.config.num_slices), dim=1)
        return self.embed(slices.flatten(0, 2)).unflatten(0, slices.shape[:3])

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Features `[M, num_features]`, float32, of `images [M, C, height, width]` in [-1, 1]."""
        hidden = self.layers(images).float().flatten(2)
        return _projected(self.project, torch.cat([hidden.mean(dim=2), hidden.amax(dim=2)], dim=1))


class VolumeFeatureExtractor(ModelMixin, ConfigMixin):
    """A residual 3D network on whole volumes: the *judge*.

    Args:
        in_channels (`int`): channels of the volumes.
        block_out_channels (`tuple[int]`): channels per resolution.
        num_features (`int`): length of a feature vector.
    """

    @register_to_config
    def __init__(
        self, in_channels: int = 1, block_out_channels: tuple[int, ...] = (16, 32, 48), num_features: int = 48
    ):
        super().__init__()
        layers, channels = [], in_channels
        for outputs in block_out_channels:
            layers += [conv(3, channels, outputs, 3, stride=2, padding=1), ResnetBlock(3, outputs, outputs, 8)]
            channels = outputs
        self.layers = nn.Sequential(*layers)
        self.norm_out = nn.GroupNorm(8, channels)
        self.project = nn.Linear(channels * 8, num_features)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Features `[B, 1, 1, num_features]`, float32, of `volumes [B, C, D, H, W]` in [-1, 1]."""
        hidden = F.silu(self.norm_out(self.layers(volumes))).float()
        pooled = F.adaptive_avg_pool3d(hidden, 2).flatten(1)  # octants: where something is matters
        return _projected(self.project, pooled)[:, None, None]


class PatchFeatureExtractor(ModelMixin, ConfigMixin):
    """A transformer on cubes of voxels: the *second judge*, which shares no convolution with the other two.

    Args:
        in_channels (`int`): channels of the volumes.
        patch_size (`int`): edge of a cube, in voxels; edges of the volumes are multiples of it.
        width (`int`): channels of a token, a multiple of 16 and of `num_heads`.
        num_layers (`int`): layers of attention.
        num_heads (`int`): heads of each.
        num_features (`int`): length of a feature vector.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        patch_size: int = 4,
        width: int = 64,
        num_layers: int = 3,
        num_heads: int = 4,
        num_features: int = 48,
    ):
        super().__init__()
        self.embed = nn.Linear(in_channels * patch_size**3, width)
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.project = nn.Linear(2 * width, num_features)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Features `[B, 1, 1, num_features]`, float32, of `volumes [B, C, D, H, W]` in [-1, 1].

        Raises:
            ValueError: edges that are no multiples of `patch_size`.
        """
        size = self.config.patch_size
        if any(edge % size for edge in volumes.shape[2:]):
            raise ValueError(f"Edges {list(volumes.shape[2:])} must be multiples of patch_size={size}.")
        patches = volumes.unfold(2, size, size).unfold(3, size, size).unfold(4, size, size)  # [B, C, d, h, w, p, p, p]
        depth, height, width = patches.shape[2:5]
        patches = patches.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(1, 3)
        positions = get_3d_sincos_pos_embed(
            self.config.width, (width, height), depth, output_type="pt", device=volumes.device
        )
        hidden = self.layers(self.embed(patches) + positions.flatten(0, 1).to(patches.dtype)).float()
        return _projected(self.project, torch.cat([hidden.mean(dim=1), hidden.amax(dim=1)], dim=1))[:, None, None]


class RewardFeatureExtractor(nn.Module):
    """The features from which a reward model scores: those in which better and worse volumes differ.

    A Frechet distance in them asks for the real *distribution* of what the reward sees, where the reward itself asks for ever
    more of it.

    Args:
        model (`VolumeRewardModel` or `SliceRewardModel`): the reward model; it is not copied.
        num_slices (`int`): axial slices that a slice reward sees, evenly spaced over the middle 60 % of the axis.
    """

    def __init__(self, model: VolumeRewardModel | SliceRewardModel, num_slices: int = 12):
        super().__init__()
        self.model, self.num_slices = model, num_slices

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Features `[B, 1, S, F]`, float32, of `volumes [B, C, D, H, W]` in [-1, 1]; S is 1 for a volume reward."""
        if not isinstance(self.model, SliceRewardModel):
            return self.model.network.features(volumes)[:, None, None]
        axial = plane_slices(volumes, self.num_slices)[0]
        return self.model.network.features(axial.flatten(0, 1)).unflatten(0, axial.shape[:2])[:, None]
