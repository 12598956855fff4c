"""UNet3DModel: the class-conditional denoiser for volumes or their latents."""

import os
from dataclasses import dataclass
from functools import wraps

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from torch import nn

from .adapters import refuse_to_save
from .layers import Conv3d, Downsample3D, ResnetBlock, SpatialAttention3D, Upsample3D


@dataclass
class UNet3DOutput(BaseOutput):
    """`sample [B, out_channels, D, H, W]`: the model output in the scheduler's prediction type."""

    sample: torch.Tensor


class UNetStage3D(nn.Module):
    """A residual block with time embedding and, if asked, attention after it; the unit that is checkpointed."""

    def __init__(self, in_channels, out_channels, temb_channels, norm_num_groups, dropout, attention_head_dim):
        super().__init__()
        self.resnet = ResnetBlock(
            3, in_channels, out_channels, norm_num_groups, temb_channels, dropout, zero_init=True
        )
        self.attention = (
            SpatialAttention3D(out_channels, attention_head_dim, norm_num_groups) if attention_head_dim else None
        )

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        hidden = self.resnet(hidden, temb)
        return hidden if self.attention is None else self.attention(hidden)


class UNet3DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""A U-Net of true 3D convolutions, conditioned on time and, optionally, on a class.

    Classes are 0 .. `num_class_embeds - 1`; the label `num_class_embeds` is the *null class*, used for
    classifier-free guidance (arXiv 2207.12598).

    Args:
        sample_size (`int`): edge of the cubes it is trained on; any size that halves works, but `MedVolumePipeline` samples this.
        in_channels, out_channels (`int`): channels of its input and output.
        block_out_channels (`tuple[int]`): channels per resolution.
        layers_per_block (`int`): residual blocks per resolution on the way down (one more on the way up).
        attention_levels (`tuple[bool]`): at which resolutions attention follows each residual block.
        attention_head_dim (`int`): channels per attention head.
        num_class_embeds (`int`, *optional*): number of classes; `None` makes the model unconditional, which `MedVolumePipeline` does
            not take.
        norm_num_groups (`int`): groups of every GroupNorm.
        dropout (`float`): dropout in residual blocks; reinforcement learning needs 0.

    Raises:
        ValueError: unequal lengths of `block_out_channels` and `attention_levels`, missing `class_labels`, or a sample whose axes
            the network can't halve.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UNetStage3D"]
    _repeated_blocks = ["UNetStage3D"]
    _group_offload_block_modules = ["down_blocks", "up_blocks"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 8,
        out_channels: int = 8,
        block_out_channels: tuple[int, ...] = (64, 128),
        layers_per_block: int = 2,
        attention_levels: tuple[bool, ...] = (False, True),
        attention_head_dim: int = 32,
        num_class_embeds: int | None = None,
        norm_num_groups: int = 8,
        dropout: float = 0.0,
    ):
        super().__init__()
        if len(attention_levels) != len(block_out_channels):
            raise ValueError(
                f"attention_levels has {len(attention_levels)} entries for {len(block_out_channels)} resolutions; give one for each "
                "of block_out_channels."
            )
        first = block_out_channels[0]
        temb_channels = 4 * first
        self.gradient_checkpointing = False
        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, temb_channels)
        self.class_embedding = (
            nn.Embedding(num_class_embeds + 1, temb_channels) if num_class_embeds is not None else None
        )
        self.conv_in = Conv3d(in_channels, first, 3, padding=1)

        def stage(inputs: int, outputs: int, attention: bool) -> UNetStage3D:
            head_dim = attention_head_dim if attention else None
            return UNetStage3D(inputs, outputs, temb_channels, norm_num_groups, dropout, head_dim)

        self.down_blocks, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        skip_channels, channels = [first], first
        for level, (out, attention) in enumerate(zip(block_out_channels, attention_levels, strict=True)):
            stages = nn.ModuleList()
            for _ in range(layers_per_block):
                stages.append(stage(channels, out, attention))
                channels = out
                skip_channels.append(channels)
            self.down_blocks.append(stages)
            if level < len(block_out_channels) - 1:
                self.downsamplers.append(Downsample3D(channels, channels))
                skip_channels.append(channels)

        self.mid_block = nn.ModuleList(
            [stage(channels, channels, attention_levels[-1]), stage(channels, channels, False)]
        )

        self.up_blocks, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(block_out_channels))):
            stages = nn.ModuleList()
            for _ in range(layers_per_block + 1):
                stages.append(
                    stage(channels + skip_channels.pop(), block_out_channels[level], attention_levels[level])
                )
                channels = block_out_channels[level]
            self.up_blocks.append(stages)
            if level:
                self.upsamplers.append(Upsample3D(channels, channels))

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.conv_out = Conv3d(channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet3DOutput | tuple[torch.Tensor]:
        """The model output `[B, C, D, H, W]` for noisy `sample`, `timestep` (a number or `[B]`) and `class_labels [B]`."""
        factor = 2 ** len(self.downsamplers)
        if any(size % factor for size in sample.shape[2:]):
            raise ValueError(
                f"A sample of {list(sample.shape[2:])} can't be denoised: every axis must be divisible by {factor}, for "
                f"{len(self.downsamplers)} halvings."
            )
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        temb = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError(
                    f"This UNet3DModel is class-conditional: pass class_labels (the null class is "
                    f"{self.config.num_class_embeds})."
                )
            temb = temb + self.class_embedding(class_labels).to(temb.dtype)

        hidden = self.conv_in(sample)
        skips = [hidden]
        for level, stages in enumerate(self.down_blocks):
            for stage in stages:
                hidden = self._run(stage, hidden, temb)
                skips.append(hidden)
            if level < len(self.downsamplers):
                hidden = self.downsamplers[level](hidden)
                skips.append(hidden)
        for stage in self.mid_block:
            hidden = self._run(stage, hidden, temb)
        for level, stages in enumerate(self.up_blocks):
            for stage in stages:
                hidden = self._run(stage, torch.cat([hidden, skips.pop().to(hidden.device)], dim=1), temb)
            if level < len(self.upsamplers):
                hidden = self.upsamplers[level](hidden)

        output = self.conv_out(F.silu(self.conv_norm_out(hidden)))
        return UNet3DOutput(sample=output) if return_dict else (output,)

    @wraps(ModelMixin.save_pretrained, assigned=())  # a pipeline that is saved looks at the signature
    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As diffusers' own (`variant`, `max_shard_size`, `push_to_hub`, ...).

        Raises:
            InputError: a LoRA adapter is in it.
        """
        refuse_to_save(self, "save_lora_adapter", "unload_lora")
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *args, **kwargs) -> str:
        """As diffusers' own (`private`, `variant`, `commit_message`, ...).

        Raises:
            InputError: a LoRA adapter is in it; no repository is made then.
        """
        refuse_to_save(self, "save_lora_adapter", "unload_lora")
        return super().push_to_hub(repo_id, *args, **kwargs)

    def _run(self, stage: nn.Module, hidden: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(stage, hidden, temb)
        return stage(hidden, temb)
