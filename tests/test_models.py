"""Models: saving and loading, gradients, adapters, and the errors of their constructors."""

import pytest
import torch
from conftest import fill_zeros
from peft import LoraConfig

from msrl_diffusers import (
    PatchFeatureExtractor,
    SliceFeatureExtractor,
    SliceRewardModel,
    UNet3DModel,
    VolumeFeatureExtractor,
    VolumeRewardModel,
    VQModel3D,
)
from msrl_diffusers.errors import InputError
from msrl_diffusers.models.layers import Conv3d, channels_to_voxels, voxels_to_channels
from msrl_diffusers.trainers.tuned_weights import LORA_TARGETS


VOLUMES = torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
LATENTS = torch.randn(2, 4, 8, 8, 8, generator=torch.Generator().manual_seed(1))
UNET_INPUTS = (LATENTS, torch.tensor([10, 700]), torch.tensor([0, 1]))

MODELS = {
    "fsq": (VQModel3D, {"block_out_channels": (8, 16), "quantizer": "fsq"}, (VOLUMES,)),
    "vq": (VQModel3D, {"block_out_channels": (8, 16), "num_vq_embeddings": 32}, (VOLUMES,)),
    "vq-attention": (VQModel3D, {"block_out_channels": (8, 16), "mid_block_add_attention": True}, (VOLUMES,)),
    "unet": (
        UNet3DModel,
        {"in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "num_class_embeds": 2},
        UNET_INPUTS,
    ),
    "volume-reward": (VolumeRewardModel, {"block_out_channels": (8, 16)}, (VOLUMES,)),
    "slice-reward": (SliceRewardModel, {"block_out_channels": (8, 16)}, (VOLUMES,)),
    "slice-features": (SliceFeatureExtractor, {"block_out_channels": (8, 16), "num_features": 5}, (VOLUMES,)),
    "volume-features": (VolumeFeatureExtractor, {"block_out_channels": (8, 16), "num_features": 5}, (VOLUMES,)),
    "patch-features": (PatchFeatureExtractor, {"width": 16, "num_layers": 1, "num_features": 5}, (VOLUMES,)),
}


def run(model, inputs):
    with torch.no_grad():
        output = model(*inputs)
    return output if isinstance(output, torch.Tensor) else output.sample


@pytest.mark.parametrize("name", MODELS)
def test_saved_model_loads_with_equal_outputs(name, tmp_path):
    model_class, config, inputs = MODELS[name]
    model = fill_zeros(model_class(**config)).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = model_class.from_pretrained(tmp_path)
    assert not loaded.training
    assert all(tuple(loaded.config[key]) == value if isinstance(value, tuple) else loaded.config[key] == value
               for key, value in config.items())  # fmt: skip
    expected = run(model, inputs)
    torch.testing.assert_close(run(loaded, inputs), expected)
    weights = loaded.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert expected.isfinite().all()
    assert expected.float().std() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_models_run_in_half_precision(name, dtype):
    model_class, config, inputs = MODELS[name]
    model = fill_zeros(model_class(**config)).eval()
    expected = run(model, inputs)
    model.to(dtype)
    output = run(model, [value.to(dtype) if value.is_floating_point() else value for value in inputs])
    if "features" in name or "reward" in name:
        assert output.dtype == torch.float32
    if model_class is not VQModel3D:  # rounding changes codes
        torch.testing.assert_close(output.float(), expected.float(), rtol=0.1, atol=0.1 * float(expected.abs().max()))


def test_feature_and_score_shapes():
    shapes = {
        name: tuple(run(model_class(**config).eval(), inputs).shape)
        for name, (model_class, config, inputs) in MODELS.items()
    }
    assert shapes["slice-features"] == (2, 3, 8, 5)
    assert shapes["volume-features"] == (2, 1, 1, 5)
    assert shapes["volume-reward"] == shapes["slice-reward"] == (2,)


def test_a_sample_of_which_one_voxel_is_left_has_no_score():
    model = VolumeRewardModel(block_out_channels=(8, 8, 8)).eval()
    with pytest.raises(
        InputError, match=r"Samples \[8, 8, 8\] are down to one voxel .*; give it fewer block_out_channels"
    ):
        model(torch.rand(2, 1, 8, 8, 8))
    assert model(torch.rand(2, 1, 8, 8, 16)).isfinite().all()


def test_attention_of_the_autoencoder_is_used():
    config = {"block_out_channels": (8, 16), "quantizer": "fsq"}
    plain, attentive = VQModel3D(**config), VQModel3D(**config, mid_block_add_attention=True)
    extra = [name for name, _ in attentive.named_parameters() if "attention" in name]
    assert any(name.startswith("encoder") for name in extra)
    assert any(name.startswith("decoder") for name in extra)
    assert not any("attention" in name for name, _ in plain.named_parameters())
    attentive(VOLUMES).sample.sum().backward()
    assert all(parameter.grad is not None for _, parameter in attentive.named_parameters())


def test_a_fresh_unet_outputs_zero():
    model_class, config, inputs = MODELS["unet"]
    assert not run(model_class(**config), inputs).any()


def test_unet_depends_on_time_and_class(unet):
    output = run(unet, UNET_INPUTS)
    assert not torch.allclose(output, run(unet, (LATENTS, torch.tensor([11, 11]), torch.tensor([0, 1]))))
    assert not torch.allclose(output, run(unet, (LATENTS, torch.tensor([10, 700]), torch.tensor([2, 2]))))
    torch.testing.assert_close(
        run(unet, (LATENTS, 10, torch.tensor([0, 1]))), run(unet, (LATENTS, torch.tensor(10), torch.tensor([0, 1])))
    )
    torch.testing.assert_close(unet(*UNET_INPUTS, return_dict=False)[0], unet(*UNET_INPUTS).sample)


def test_unconditional_unet_needs_no_labels():
    model = fill_zeros(UNet3DModel(in_channels=4, out_channels=4, block_out_channels=(8, 16)))
    assert run(model, (LATENTS, 5)).shape == LATENTS.shape


def test_gradient_checkpointing_gives_the_same_gradients(unet):
    def gradients():
        unet.zero_grad()
        unet(*UNET_INPUTS).sample.square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}

    unet.train()
    plain = gradients()
    unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-4)


def add_lora(unet):
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=LORA_TARGETS))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def test_lora_trains_adapters_only_and_can_be_switched_off(unet):
    before = run(unet, UNET_INPUTS)
    add_lora(unet)
    trainable = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora" in name for name in trainable)
    for target in LORA_TARGETS:
        assert any(f"{target}.lora" in name for name in trainable), target
    assert not torch.allclose(run(unet, UNET_INPUTS), before, atol=1e-3)
    unet.disable_adapters()
    torch.testing.assert_close(run(unet, UNET_INPUTS), before)
    unet.enable_adapters()
    assert not torch.allclose(run(unet, UNET_INPUTS), before, atol=1e-3)


def test_fused_lora_saves_as_a_plain_model(unet, tmp_path):
    add_lora(unet)
    adapted = run(unet, UNET_INPUTS)
    unet.fuse_lora()
    unet.unload_lora()
    assert not any("lora" in name for name in unet.state_dict())
    unet.save_pretrained(tmp_path)
    torch.testing.assert_close(run(UNet3DModel.from_pretrained(tmp_path), UNET_INPUTS), adapted, rtol=1e-4, atol=1e-4)


def test_missing_class_labels_raise(unet):
    with pytest.raises(ValueError, match=r"pass class_labels \(the null class is 2\)"):
        unet(LATENTS, 5)


def test_constructors_refuse_what_cannot_work():
    with pytest.raises(ValueError, match="quantizer must be 'vq' or 'fsq', got 'gumbel'"):
        VQModel3D(block_out_channels=(8, 16), quantizer="gumbel")
    with pytest.raises(ValueError, match=r"\[8, 12\] must all be divisible by norm_num_groups=8"):
        VQModel3D(block_out_channels=(8, 12))
    with pytest.raises(ValueError, match="attention_levels has 2 entries for 3 resolutions"):
        UNet3DModel(block_out_channels=(8, 8, 8))


def test_a_volume_that_cannot_be_halved_raises(vqvae):
    with pytest.raises(ValueError, match=r"\[16, 15, 16\] voxels can't be encoded: every axis must be divisible by 2"):
        vqvae.encode(torch.zeros(1, 1, 16, 15, 16))


def test_slice_reward_is_the_mean_over_non_empty_slices(phantoms):
    model = SliceRewardModel(block_out_channels=(8, 16), empty_threshold=0.05).eval()
    volumes = phantoms.pixel_values[:3].float()
    volumes[0, :, :9] = -1
    scores = run(model, (volumes,))
    for volume, score in zip(volumes, scores, strict=True):
        kept = [d for d in range(16) if (volume[0, d] > -0.95).float().mean() > 0.05]
        assert 0 < len(kept) < 16
        expected = torch.stack([run(model, (volume[None, :, d],))[0] for d in kept]).mean()
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5)


def test_slice_reward_of_an_empty_volume_is_finite_and_differentiable():
    model = SliceRewardModel(block_out_channels=(8, 16)).eval()
    volumes = torch.full((1, 1, 16, 16, 16), -1.0, requires_grad=True)
    score = model(volumes)
    torch.testing.assert_close(score[0], model(torch.full((1, 1, 16, 16), -1.0))[0])
    (gradient,) = torch.autograd.grad(score.sum(), volumes)
    assert gradient.isfinite().all()


def test_blocks_of_voxels_become_channels_and_back():
    from monai.networks.utils import pixelshuffle

    sample = torch.randn(2, 3, 4, 6, 8)
    channels = voxels_to_channels(sample, 2)
    assert channels.shape == (2, 24, 2, 3, 4)
    torch.testing.assert_close(channels_to_voxels(channels, 2), sample)
    torch.testing.assert_close(channels_to_voxels(channels, 2), pixelshuffle(channels, 3, 2))


def test_autoencoder_on_blocks_of_voxels(phantoms):
    model = VQModel3D(patch_size=2, block_out_channels=(8, 16), latent_channels=4, quantizer="fsq")
    volumes = phantoms.batch([0, 1])["pixel_values"]
    assert model.downsample_factor == 4
    assert model.encode(volumes).latents.shape == (2, 4, 4, 4, 4)
    assert model(volumes).sample.shape == volumes.shape


def test_a_small_convolution_of_half_weights_under_autocast():
    layer, inputs = Conv3d(4, 4, 3, padding=1).to(torch.bfloat16), torch.randn(1, 4, 2, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(inputs)
    torch.testing.assert_close(outputs, layer.float()(inputs), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 1, 3), (1, 3, 1), (3, 3, 3), (4, 2, 2), (6, 6, 6)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (4, 1), (4, 2)])
def test_gradients_of_small_inputs_in_bf16(shape, kernel, stride):
    """Some CPUs' bf16 convolutions give garbage for them; 1 % is the rounding of bf16 itself."""
    if any(edge + 2 < kernel for edge in shape):
        pytest.skip("smaller than the kernel")
    torch.manual_seed(0)
    layer = Conv3d(16, 16, kernel, stride=stride, padding=1).to(memory_format=torch.channels_last_3d)
    inputs, gradients = torch.randn(4, 16, *shape).to(memory_format=torch.channels_last_3d), []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = layer(inputs).float()
        (outputs * torch.linspace(0, 1, outputs.numel()).reshape(outputs.shape)).sum().backward()
        gradients.append(layer.weight.grad.clone())
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[0].norm()
