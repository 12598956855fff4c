"""Blocks shared by the networks of this package: residual convolutions in 2D and 3D."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` that leaves bfloat16 where it goes wrong: on CPUs with bf16 instructions the gradient of a kernel is garbage,
    up to NaN, for many inputs and outputs of two voxels an edge or fewer (torch 2.13, oneDNN); those are in float32."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or self._smallest_edge(hidden) > 2:
            return super().forward(hidden)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(hidden.float(), self.weight.float(), bias)

    def _smallest_edge(self, hidden: torch.Tensor) -> int:
        """Of input and output."""
        sizes = zip(hidden.shape[2:], self.kernel_size, self.stride, self.padding, strict=True)
        return min(min(edge, (edge + 2 * pad - kernel) // stride + 1) for edge, kernel, stride, pad in sizes)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that may be told to normalize otherwise: tiling does so by the statistics of the whole volume. Not by a
    hook, which would come too late for weights that offloading brings for the call alone."""

    normalize: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) if self.normalize is None else self.normalize(hidden)


def conv(spatial_dims: int, *args, **kwargs) -> nn.Module:
    """`nn.Conv2d` or `Conv3d`."""
    return {2: nn.Conv2d, 3: Conv3d}[spatial_dims](*args, **kwargs)


class ResnetBlock(nn.Module):
    """Pre-activation residual block: two (GroupNorm, SiLU, 3-convolution), with an optional time embedding between.

    The second convolution starts at zero when `zero_init` is set, so the block starts as the identity.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        norm_num_groups: int = 8,
        temb_channels: int | None = None,
        dropout: float = 0.0,
        zero_init: bool = False,
    ):
        super().__init__()
        self.norm1 = GroupNorm(norm_num_groups, in_channels, eps=1e-6)
        self.conv1 = conv(spatial_dims, in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels) if temb_channels else None
        self.norm2 = GroupNorm(norm_num_groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(spatial_dims, out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = conv(spatial_dims, in_channels, out_channels, 1) if in_channels != out_channels else None
        if zero_init:
            nn.init.zeros_(self.conv2.weight)
            nn.init.zeros_(self.conv2.bias)

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        residual = hidden if self.conv_shortcut is None else self.conv_shortcut(hidden)
        hidden = self.conv1(F.silu(self.norm1(hidden)))
        if self.time_emb_proj is not None:
            projected = self.time_emb_proj(F.silu(temb))
            hidden = hidden + projected.reshape(*projected.shape, *[1] * (hidden.ndim - 2))
        return residual + self.conv2(self.dropout(F.silu(self.norm2(hidden))))


class Downsample3D(nn.Module):
    """Halve every axis with a strided convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = Conv3d(in_channels, out_channels, 4, stride=2, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.conv(hidden)


class Upsample3D(nn.Module):
    """Double every axis: nearest neighbour, then a convolution (a transposed convolution leaves a checkerboard)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = Conv3d(in_channels, out_channels, 3, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


class SpatialAttention3D(nn.Module):
    """Self-attention over all voxels, with diffusers' own `Attention` module."""

    def __init__(self, channels: int, head_dim: int, norm_num_groups: int = 8):
        super().__init__()
        self.attention = Attention(
            query_dim=channels, heads=max(1, channels // head_dim), dim_head=head_dim, bias=True, eps=1e-6
        )
        self.norm = GroupNorm(norm_num_groups, channels, eps=1e-6)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(hidden).flatten(2).transpose(1, 2)
        return hidden + self.attention(tokens).transpose(1, 2).reshape(hidden.shape)


def voxels_to_channels(sample: torch.Tensor, factor: int) -> torch.Tensor:
    """`[B, C, D, H, W] -> [B, C * factor^3, D / factor, H / factor, W / factor]`: every block of voxels becomes channels."""
    B, C, D, H, W = sample.shape
    f = factor
    blocks = sample.reshape(B, C, D // f, f, H // f, f, W // f, f)
    return blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, C * f**3, D // f, H // f, W // f)


def channels_to_voxels(hidden: torch.Tensor, factor: int) -> torch.Tensor:
    """The inverse of `voxels_to_channels` (sub-voxel convolution, arXiv 1609.05158, in 3D)."""
    B, C, D, H, W = hidden.shape
    f = factor
    blocks = hidden.reshape(B, C // f**3, f, f, f, D, H, W)
    return blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, C // f**3, D * f, H * f, W * f)
