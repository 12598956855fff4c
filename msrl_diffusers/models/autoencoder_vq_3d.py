"""VQModel3D: the vector-quantized autoencoder for volumes that carries the latent space."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..errors import InputError
from ..functional.quantization import (
    code_perplexity,
    finite_scalar_quantize,
    nearest_code,
    scalar_indices,
    straight_through,
)
from .layers import (
    Conv3d,
    Downsample3D,
    GroupNorm,
    ResnetBlock,
    SpatialAttention3D,
    Upsample3D,
    channels_to_voxels,
    voxels_to_channels,
)
from .tiling import run_tiled


@dataclass
class QuantizerOutput(BaseOutput):
    """`latents [B, C, D, H, W]` (straight-through gradient), `indices`, `loss []`, `perplexity []`.

    `indices` is `[B, D, H, W]` for a codebook and `[B, C, D, H, W]` (one level per channel) for scalar quantization.
    """

    latents: torch.Tensor
    indices: torch.Tensor
    loss: torch.Tensor
    perplexity: torch.Tensor


@dataclass
class VQModel3DOutput(BaseOutput):
    """`sample [B, C, D, H, W]` in about [-1, 1] and the quantizer's `loss []` and `perplexity []`."""

    sample: torch.Tensor
    loss: torch.Tensor
    perplexity: torch.Tensor


class EMAQuantizer(nn.Module):
    """Codebook moved by exponential averages of the vectors assigned to it (arXiv 1711.00937, appendix A.1).

    The first training batch initialises the codes; the flag is a buffer, so a resumed training does not start over.
    A code whose average use falls under `restart_threshold` times (1 - `decay`) of a vector per batch is put onto a random
    vector of the batch. Under `torch.distributed` the statistics are summed and the random vectors taken from the first
    process, so that all processes keep the same codebook.

    It learns in training mode with gradients enabled: under `no_grad`, as a pipeline decodes, it stays as it is in any mode.
    """

    def __init__(self, num_codes: int, channels: int, decay: float, restart_threshold: float, commitment: float):
        super().__init__()
        self.decay, self.restart_threshold, self.commitment = decay, restart_threshold, commitment
        self.register_buffer("codebook", torch.randn(num_codes, channels))
        self.register_buffer("code_sum", torch.zeros(num_codes, channels))
        self.register_buffer("code_count", torch.zeros(num_codes))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        B, C, *spatial = latents.shape
        vectors = latents.movedim(1, -1).reshape(-1, C).float()
        if self.training and torch.is_grad_enabled():
            if not self.initialized:
                self._initialize(vectors.detach())
            indices = nearest_code(vectors.detach(), self.codebook)
            self._update(vectors.detach(), indices)
        else:
            indices = nearest_code(vectors, self.codebook)
        quantized = F.embedding(indices, self.codebook).reshape(B, *spatial, C).movedim(-1, 1).to(latents.dtype)
        return QuantizerOutput(
            latents=straight_through(latents, quantized),
            indices=indices.reshape(B, *spatial),
            loss=self.commitment * F.mse_loss(latents, quantized.detach()),
            perplexity=code_perplexity(indices, len(self.codebook)),
        )

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """Codes `[B, C, *S]` of `indices [B, *S]`."""
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    def _random_vectors(self, vectors: torch.Tensor, count: int) -> torch.Tensor:
        chosen = vectors[torch.randint(len(vectors), (count,), device=vectors.device)].contiguous()
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(chosen, src=0)
        return chosen

    @torch.no_grad()
    def _initialize(self, vectors: torch.Tensor) -> None:
        self.codebook.copy_(self._random_vectors(vectors, len(self.codebook)))
        self.code_sum.copy_(self.codebook)
        self.code_count.fill_(1.0)
        self.initialized.fill_(True)

    @torch.no_grad()
    def _update(self, vectors: torch.Tensor, indices: torch.Tensor) -> None:
        counts = torch.bincount(indices, minlength=len(self.codebook)).to(vectors)
        sums = torch.zeros_like(self.code_sum).index_add_(0, indices, vectors)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        self.code_count.lerp_(counts, 1 - self.decay)
        self.code_sum.lerp_(sums, 1 - self.decay)
        dead = self.code_count < self.restart_threshold * (1 - self.decay)
        restarted = self._random_vectors(vectors, len(self.codebook))
        self.code_sum.copy_(torch.where(dead[:, None], restarted, self.code_sum))
        self.code_count.copy_(torch.where(dead, torch.ones_like(self.code_count), self.code_count))
        self.codebook.copy_(self.code_sum / self.code_count[:, None])


class ScalarQuantizer(nn.Module):
    """Finite scalar quantization: no codebook, no auxiliary loss, nothing that can collapse (arXiv 2309.15505)."""

    def __init__(self, num_levels: int):
        super().__init__()
        self.num_levels = num_levels

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        quantized = finite_scalar_quantize(latents.float(), self.num_levels).to(latents.dtype)
        indices = scalar_indices(quantized.detach(), self.num_levels)
        return QuantizerOutput(
            latents=quantized,
            indices=indices,
            loss=latents.new_zeros(()),
            perplexity=code_perplexity(indices, self.num_levels),
        )

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """Values in [-1, 1], `[B, C, *S]`, of `indices [B, C, *S]`."""
        return indices.float() / (self.num_levels - 1) * 2 - 1


class Encoder3D(nn.Module):
    """Volume to latents: per level residual blocks, then a strided convolution; attention at the lowest, if asked."""

    def __init__(self, in_channels, latent_channels, block_out_channels, layers_per_block, norm_num_groups, attention):
        super().__init__()
        self.conv_in = Conv3d(in_channels, block_out_channels[0], 3, padding=1)
        layers = []
        for level, channels in enumerate(block_out_channels):
            if level:
                layers.append(Downsample3D(block_out_channels[level - 1], channels))
            layers += [ResnetBlock(3, channels, channels, norm_num_groups) for _ in range(layers_per_block)]
        if attention:
            layers.append(SpatialAttention3D(channels, channels, norm_num_groups))
        self.layers = nn.Sequential(*layers)
        self.norm_out = GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.conv_out = Conv3d(channels, latent_channels, 1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.conv_out(F.silu(self.norm_out(self.layers(self.conv_in(sample)))))


class Decoder3D(nn.Module):
    """Latents to volume: the mirror of `Encoder3D`, with nearest-neighbour upsampling."""

    def __init__(
        self, out_channels, latent_channels, block_out_channels, layers_per_block, norm_num_groups, attention
    ):
        super().__init__()
        channels = block_out_channels[-1]
        self.conv_in = Conv3d(latent_channels, channels, 3, padding=1)
        layers = [SpatialAttention3D(channels, channels, norm_num_groups)] if attention else []
        for level in reversed(range(len(block_out_channels))):
            channels = block_out_channels[level]
            layers += [ResnetBlock(3, channels, channels, norm_num_groups) for _ in range(layers_per_block)]
            if level:
                layers.append(Upsample3D(channels, block_out_channels[level - 1]))
        self.layers = nn.Sequential(*layers)
        self.norm_out = GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.conv_out = Conv3d(channels, out_channels, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.conv_out(F.silu(self.norm_out(self.layers(self.conv_in(latents)))))


class VQModel3D(ModelMixin, AutoencoderMixin, ConfigMixin):
    r"""A 3D convolutional autoencoder with a quantized latent space (the VQGAN of arXiv 2603.06173, section 2).

    Volumes are `[B, in_channels, D, H, W]` in [-1, 1]; latents are `[B, latent_channels, d, h, w]` with every axis
    divided by `patch_size * 2 ** (len(block_out_channels) - 1)`. As in diffusers' `VQModel`, `encode` returns latents before
    quantization and `decode` quantizes them. Diffusion runs on `(latents - shift_factor) * scaling_factor`.

    `enable_slicing` and `enable_tiling` are for batches and volumes that don't fit into memory.

    Args:
        in_channels, out_channels (`int`): channels of the volumes; one modality is 1.
        block_out_channels (`tuple[int]`): channels per resolution, first to lowest.
        layers_per_block (`int`): residual blocks per resolution.
        latent_channels (`int`): channels of the latents; with `quantizer="vq"` the length of a code.
        quantizer (`str`): `"vq"` (codebook learned by moving averages) or `"fsq"` (finite scalar quantization).
        num_vq_embeddings (`int`): codes in the codebook of `"vq"`.
        fsq_levels (`int`): levels per channel of `"fsq"`.
        commitment_coef (`float`): weight of the commitment loss of `"vq"`.
        ema_decay, restart_threshold (`float`): see `EMAQuantizer`.
        mid_block_add_attention (`bool`): self-attention at the lowest resolution.
        patch_size (`int`): blocks of so many voxels per edge become channels before the first convolution, and back after
            the last; 2 makes training several times faster, since most of the time goes into full resolution.
        norm_num_groups (`int`): groups of every GroupNorm; must divide every entry of `block_out_channels`.
        scaling_factor, shift_factor (`float`): map latents to zero mean and unit variance for diffusion.

    Raises:
        ValueError: unknown `quantizer`, indivisible channels, or a volume whose axes the network can't halve.
    """

    _supports_gradient_checkpointing = False
    # `encode` and `decode` don't go through `forward`, where a model is brought to the device otherwise
    _group_offload_block_modules = ["encoder", "decoder", "quantization"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        layers_per_block: int = 1,
        latent_channels: int = 8,
        quantizer: str = "vq",
        num_vq_embeddings: int = 1024,
        fsq_levels: int = 8,
        commitment_coef: float = 0.25,
        ema_decay: float = 0.99,
        restart_threshold: float = 1.0,
        mid_block_add_attention: bool = False,
        patch_size: int = 1,
        norm_num_groups: int = 8,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        if any(channels % norm_num_groups for channels in block_out_channels):
            raise ValueError(
                f"block_out_channels {list(block_out_channels)} must all be divisible by norm_num_groups={norm_num_groups}."
            )
        shape = (tuple(block_out_channels), layers_per_block, norm_num_groups, mid_block_add_attention)
        self.encoder = Encoder3D(in_channels * patch_size**3, latent_channels, *shape)
        self.decoder = Decoder3D(out_channels * patch_size**3, latent_channels, *shape)
        if quantizer == "vq":
            self.quantization = EMAQuantizer(
                num_vq_embeddings, latent_channels, ema_decay, restart_threshold, commitment_coef
            )
        elif quantizer == "fsq":
            self.quantization = ScalarQuantizer(fsq_levels)
        else:
            raise ValueError(f"quantizer must be 'vq' or 'fsq', got {quantizer!r}.")
        self.use_slicing = self.use_tiling = False
        self.tile_size, self.tile_step = 128, 96

    @property
    def downsample_factor(self) -> int:
        """By how much every axis of a volume is divided."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    def latent_shape(self, image_size: int) -> tuple[int, int, int, int]:
        """`(C, d, h, w)` of the latents of a cube of `image_size` voxels."""
        return (self.config.latent_channels, *[image_size // self.downsample_factor] * 3)

    def enable_slicing(self) -> None:
        """`encode` and `decode` take the volumes of a batch one at a time: equal results, the memory of one volume."""
        super().enable_slicing()

    def enable_tiling(self, tile_size: int = 128, overlap: float = 0.25) -> None:
        """`encode` and `decode` take volumes in overlapping cubes: the memory of one cube, for several times the time.

        Volumes that fit into one cube are untouched. Quantization and GroupNorm work as on the whole volume, and the edges of
        cubes, where convolutions lack neighbours, are not used: the result is that of the whole volume, but for what lies
        further from a voxel than a quarter of the overlap. Attention sees one cube.

        Args:
            tile_size: edge of a cube in voxels; a multiple of `downsample_factor`.
            overlap: share of an edge that neighbours have in common, from 0 to below 1; rounded to whole latents.

        Raises:
            InputError: a `tile_size` or an `overlap` that can't be.
        """
        factor = self.downsample_factor
        if tile_size < factor or tile_size % factor:
            raise InputError(
                f"tile_size must be a multiple of {factor}, the downsampling of this model, got {tile_size}."
            )
        if not 0 <= overlap < 1:
            raise InputError(f"overlap is a share of the tile, from 0 to below 1, got {overlap}.")
        self.tile_size, self.tile_step = tile_size, max(1, round(tile_size // factor * (1 - overlap))) * factor
        super().enable_tiling()

    @apply_forward_hook
    def encode(self, sample: torch.Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[torch.Tensor]:
        """Latents before quantization, `[B, C, d, h, w]`, of volumes `[B, C, D, H, W]` in [-1, 1]."""
        if any(size % self.downsample_factor for size in sample.shape[2:]):
            raise ValueError(
                f"A volume of {list(sample.shape[2:])} voxels can't be encoded: every axis must be divisible by "
                f"{self.downsample_factor}. Crop or pad it first."
            )
        latents = self._in_pieces(self._encode, self.encoder, sample, 1 / self.downsample_factor)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    def quantize(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantized latents `[B, C, d, h, w]`, their indices, the commitment loss `[]` and the perplexity of code use `[]`."""
        return self.quantization(latents)

    @apply_forward_hook
    def decode(
        self, latents: torch.Tensor, force_not_quantize: bool = False, return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Volumes `[B, C, D, H, W]` of latents `[B, C, d, h, w]`, quantized first, unless `force_not_quantize`."""
        quantized = latents if force_not_quantize else self.quantize(latents).latents
        sample = self._in_pieces(self._decode, self.decoder, quantized, self.downsample_factor)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> VQModel3DOutput | tuple[torch.Tensor, ...]:
        """Encode, quantize and decode volumes `[B, C, D, H, W]` in [-1, 1], to the same shape."""
        quantized = self.quantize(self.encode(sample).latents)
        decoded = self.decode(quantized.latents, force_not_quantize=True).sample
        output = VQModel3DOutput(sample=decoded, loss=quantized.loss, perplexity=quantized.perplexity)
        return output if return_dict else output.to_tuple()

    def _encode(self, sample: torch.Tensor) -> torch.Tensor:
        latents = self.encoder(voxels_to_channels(sample, self.config.patch_size))
        return torch.tanh(latents) if self.config.quantizer == "fsq" else latents

    def _decode(self, quantized: torch.Tensor) -> torch.Tensor:
        return channels_to_voxels(self.decoder(quantized), self.config.patch_size)

    def _in_pieces(
        self, network: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, sample: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """`network(sample)`, by volume and by tile where that is switched on; `scale`: of its output's edges."""
        if len(sample) > 1 and (self.use_slicing or self.use_tiling):
            return torch.cat([self._in_pieces(network, module, volume, scale) for volume in sample.split(1)])
        if not self.use_tiling:
            return network(sample)
        unit = self.downsample_factor if scale > 1 else 1  # tiles are given in voxels; the decoder gets latents
        return run_tiled(network, module, sample, self.tile_size // unit, self.tile_step // unit, scale)
