"""Networks that can't be made, or can't take the volumes, are refused before anything is trained."""

import re

import pytest
import torch
from tiny import settings_with

from msrl_diffusers import StudyConfig, UNet3DModel, VQGANConfig, run_study
from msrl_diffusers.errors import InputError
from msrl_diffusers.study.networks import check_networks


@pytest.mark.parametrize(
    ("section", "arguments", "sentence"),
    [
        ("unet", {"block_out_channels": [32, 64, 96]}, "attention_levels has 2 entries for 3 resolutions; give one for each"),
        ("unet", {"block_out_channels": [20, 20]}, "num_channels (20) must be divisible by num_groups (8)"),
        ("vqvae", {"block_out_channels": 32}, "'int' object is not iterable"),
        ("vqvae", {"quantizer": "gumbel"}, "quantizer must be 'vq' or 'fsq', got 'gumbel'"),
        ("second_judge_extractor", {"width": 30}, "embed_dim must be divisible by num_heads"),
        ("scheduler", {"beta_schedule": "steep"}, "steep is not implemented"),
        ("slice_reward", {"num_heads": 0}, "num_heads of a reward model must be a whole number from 1, got 0"),
    ],
)  # fmt: skip
def test_a_network_that_can_not_be_made(section, arguments, sentence):
    with pytest.raises(InputError, match=f"^Section '{section}' makes no .*{re.escape(sentence)}") as caught:
        StudyConfig(**{section: arguments})
    assert str(caught.value).endswith(f"; correct one of {sorted(arguments)}.")


def test_making_networks_to_try_them_draws_no_random_numbers():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    config = StudyConfig(unet={"dropout": 0.1}, vqvae={"quantizer": "vq"})
    check_networks(config, (1, 32, 32, 32), 2)
    assert torch.equal(torch.get_rng_state(), state)


DEEP = {"block_out_channels": [8] * 4}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image_size": 17}, "'vqvae' .* every axis must be divisible by 2"),
        ({"image_size": 18}, r"'second_judge_extractor' .* must be multiples of patch_size=4"),
        ({"image_size": 12, "unet": {**DEEP, "attention_levels": [False] * 4}}, r"'unet' .*\[6, 6, 6\] .* divisible by 8, for 3 halvings"),
        ({"volume_reward": DEEP}, r"'volume_reward' .*\[16, 16, 16\] are down to one voxel or none"),
        ({"slice_reward": {"block_out_channels": [8] * 5}}, r"'slice_reward' .*\[16, 16\] are down to one voxel or none"),
        ({"label_extractor": {"block_out_channels": [8] * 5}}, "'label_extractor' .* Output size is too small"),
    ],
)  # fmt: skip
def test_a_network_that_can_not_take_the_volumes(changes, sentence, tmp_path):
    changes = {"second_judge_extractor": {"patch_size": 1 if changes.get("image_size") == 17 else 4}, **changes}
    with pytest.raises(InputError, match=sentence) as caught:
        run_study(settings_with(tmp_path, **changes))
    assert "change its block_out_channels or patch_size, or give another image_size" in str(caught.value)
    assert not (tmp_path / "prepare" / "stage.json").exists()


def test_a_denoiser_says_which_samples_it_can_take():
    unet = UNet3DModel(in_channels=2, out_channels=2, block_out_channels=(8, 8), attention_head_dim=8)
    with pytest.raises(
        ValueError, match=r"A sample of \[6, 5, 6\] can't be denoised: every axis must be divisible by 2"
    ):
        unet(torch.zeros(1, 2, 6, 5, 6), 0)


@pytest.mark.parametrize("name", ["num_slices", "discriminator_channels", "discriminator_layers"])
def test_discriminators_that_can_not_be(name):
    """They begin after the first thousand steps."""
    with pytest.raises(InputError, match=f"VQGANConfig: {name} must be "):
        VQGANConfig(**{name: -1 if name == "discriminator_layers" else 0})
