"""A small Stable Diffusion with random weights, of diffusers' and transformers' own classes, for two CPU cores.

It saves, loads and samples as any `StableDiffusionPipeline` does. Its tokenizer is CLIP's, with the words of the
prompts for a vocabulary; anything else is spelled.
"""

import re
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..errors import InputError


TEXT_ENCODER = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
VAE = {"block_out_channels": [16, 32, 64], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 8}
UNET = {
    "block_out_channels": [64, 128],
    "attention_levels": [False, True],
    "layers_per_block": 1,
    "attention_head_dim": 4,  # of a UNet2DConditionModel it is the number of heads
    "norm_num_groups": 8,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,  # latents are not bounded by 1
    "set_alpha_to_one": False,  # else the last step has no noise and an infinite log-probability
    "steps_offset": 1,  # has no effect with trailing spacing; the pipeline knows no other
}
DERIVED = {  # arguments that follow from images, prompts and the other networks, and can't be given
    "text_encoder": {"vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"},
    "vae": {"sample_size", "down_block_types", "up_block_types"},
    "unet": {
        "sample_size", "in_channels", "out_channels", "cross_attention_dim", "down_block_types", "up_block_types",
    },
}  # fmt: skip


def make_tokenizer(prompts: Sequence[str]) -> CLIPTokenizer:
    """CLIP's tokenizer in which the words of `prompts` are one token each, and all other words are spelled.

    Its `model_max_length` is that of the longest prompt, in tokens, rounded up to a multiple of 8.
    """
    # not learned from the prompts by train_new_from_iterator: its vocabulary differs from run to run where pairs tie
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer({token: number for number, token in enumerate(tokens)}, [])
    words = sorted({word for prompt in prompts for word in re.findall(r"[^\W\d_]{2,}", prompt.lower())})
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    longest = max(len(ids) for ids in tokenizer(list(prompts)).input_ids)
    tokenizer.model_max_length = -(-longest // 8) * 8
    return tokenizer


def make_autoencoder(image_size: int, seed: int = 0, **settings) -> AutoencoderKL:
    """An `AutoencoderKL` whose levels, all but the first, halve the grid; `settings` override `VAE`.

    Raises:
        InputError: images that can't be halved so often.
    """
    settings = {**VAE, **settings}
    levels = len(settings["block_out_channels"])
    if image_size % 2 ** (levels - 1):
        raise InputError(
            f"Images of {image_size} pixels can't be halved {levels - 1} times; give the vae fewer levels."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            sample_size=image_size,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            **settings,
        )


def make_unet(sample_size: int, channels: int, cross_attention_dim: int, **settings) -> UNet2DConditionModel:
    """A `UNet2DConditionModel`; `settings` override `UNET`. `attention_levels` says at which levels, finest first, it
    heeds the prompt (besides the middle, where it always does).
    """
    settings = {**UNET, **settings}
    attention = settings.pop("attention_levels")
    if len(attention) != len(settings["block_out_channels"]):
        raise InputError(
            f"Section 'unet': attention_levels {attention} needs one entry per level of "
            f"{settings['block_out_channels']}."
        )
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        cross_attention_dim=cross_attention_dim,
        down_block_types=tuple("CrossAttnDownBlock2D" if heeds else "DownBlock2D" for heeds in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if heeds else "UpBlock2D" for heeds in reversed(attention)),
        **settings,
    )


def make_stable_diffusion(
    vae: AutoencoderKL,
    prompts: Sequence[str],
    seed: int = 0,
    text_encoder: dict | None = None,
    unet: dict | None = None,
    scheduler: dict | None = None,
) -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` around a trained `vae`, its text encoder and UNet untrained.

    Args:
        vae: its `sample_size` is that of the images.
        prompts: what the tokenizer must know as words.
        seed: of the weights.
        text_encoder, unet, scheduler: override `TEXT_ENCODER`, `UNET` and `SCHEDULER`.
    """
    tokenizer = make_tokenizer(prompts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_config = CLIPTextConfig(
            **{**TEXT_ENCODER, **(text_encoder or {})},
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        text_model = CLIPTextModel(text_config)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        denoiser = make_unet(
            vae.config.sample_size // factor, vae.config.latent_channels, text_config.hidden_size, **(unet or {})
        )
    pipeline = StableDiffusionPipeline(
        vae.eval(),
        text_model.eval(),
        tokenizer,
        denoiser.eval(),
        DDIMScheduler(**{**SCHEDULER, **(scheduler or {})}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
