"""Slicing and tiling of the autoencoder: batches and volumes that do not fit into memory."""

from itertools import pairwise

import pytest
import torch
from accelerate import cpu_offload
from tiny import tiny_pipeline
from torch import nn

from msrl_diffusers import VQModel3D, load_phantoms
from msrl_diffusers.errors import InputError
from msrl_diffusers.models import tiling
from msrl_diffusers.models.layers import GroupNorm
from msrl_diffusers.models.tiling import run_tiled, spans


TILE = 32


@pytest.fixture(scope="module")
def volume():
    """`[1, 1, 64, 16, 16]`: longer than a tile along one axis."""
    volume = load_phantoms(1, 64, seed=0).pixel_values[:1].float()
    return volume[..., 24:40, 24:40].contiguous()


@pytest.fixture(params=["fsq", "vq"])
def model(request):
    torch.manual_seed(0)
    return VQModel3D(
        block_out_channels=(8, 16), latent_channels=2, quantizer=request.param, num_vq_embeddings=16, norm_num_groups=4
    ).eval()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def tile_sizes(module):
    """Appends the shape of every input of `module` to the list that is returned."""
    seen = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    return seen


def relative_error(tensor, expected):
    return ((tensor - expected).square().mean().sqrt() / expected.std()).item()


# ------------------------------------------------------------------------------------------------------------- tiles


class Halves(nn.Sequential):
    """Without neighbourhoods, so that nothing but the statistics of the norms depends on tiles."""

    def __init__(self, resize):
        torch.manual_seed(0)
        norms = [GroupNorm(2, 4), GroupNorm(1, 4)]
        for norm in norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        super().__init__(nn.Conv3d(1, 4, 1), norms[0], nn.SiLU(), resize, norms[1], nn.SiLU(), nn.Conv3d(4, 3, 1))


RESIZE = {0.5: nn.AvgPool3d(2), 1.0: nn.Identity(), 2.0: nn.Upsample(scale_factor=2)}


@pytest.mark.parametrize("scale", RESIZE)
@pytest.mark.parametrize("step", [4, 6, 8])
@pytest.mark.parametrize("edges", [(16, 8, 8), (22, 10, 6), (8, 18, 20)])
def test_norms_take_the_statistics_of_the_whole_volume(scale, step, edges):
    network = Halves(RESIZE[scale])
    sample = torch.randn(1, 1, *edges, generator=torch.Generator().manual_seed(0))
    sample += torch.linspace(-3, 3, edges[0]).reshape(-1, 1, 1)  # tiles differ from each other
    expected = network(sample)
    tiled = run_tiled(network, network, sample, 8, step, scale)
    assert tiled.shape == expected.shape
    torch.testing.assert_close(tiled, expected, rtol=1e-4, atol=1e-4)
    assert norms_are_as_before(network)


def norms_are_as_before(network):
    return all(layer.normalize is None for layer in network.modules() if isinstance(layer, GroupNorm))


def test_norms_are_as_before_after_an_error():
    network = Halves(nn.Identity())

    def fails(sample):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run_tiled(fails, network, torch.zeros(1, 1, 16, 8, 8), 8, 4, 1.0)
    assert norms_are_as_before(network)


@pytest.mark.parametrize(("edge", "step"), [(12, 12), (16, 4), (20, 8), (20, 11), (24, 12), (40, 8), (44, 12)])
def test_tiles_fill_an_axis(edge, step):
    parts = spans(edge, 12, step)
    assert parts[0].start == 0
    assert parts[-1].stop == edge
    assert all(before.high == after.low for before, after in pairwise(parts))
    weights = torch.zeros(4 * edge)
    for span in parts:
        assert span.stop - span.start == 12
        assert span.start <= span.low < span.high <= span.stop
        weights[4 * span.start : 4 * span.stop] += tiling._weights(span, edge, 48, max((12 - step) / 2, 1e-6))
    torch.testing.assert_close(weights, torch.ones(4 * edge))


def test_ends_of_tiles_are_not_used_but_at_the_ends_of_the_volume():
    """8 voxels are shared; the outer 2 at either side have no weight."""
    first, second = (tiling._weights(span, 24, 16, 4) for span in spans(24, 16, 8))
    assert first.tolist() == [1] * 10 + [0.875, 0.625, 0.375, 0.125] + [0] * 2
    assert second.tolist() == [0] * 2 + [0.125, 0.375, 0.625, 0.875] + [1] * 10


# --------------------------------------------------------------------------------------------------- the autoencoder


def test_one_tile_over_everything_changes_nothing(model, volume):
    latents = model.encode(volume).latents
    decoded = model.decode(latents).sample
    model.enable_tiling(64)
    assert torch.equal(model.encode(volume).latents, latents)
    assert torch.equal(model.decode(latents).sample, decoded)


def test_tiles_are_as_large_as_said_and_cover_the_volume(model):
    shapes = tile_sizes(model.encoder), tile_sizes(model.decoder)
    model.enable_tiling(12, overlap=0.5)
    sample = torch.rand(2, 1, 20, 16, 12) * 2 - 1
    latents = model.encode(sample).latents
    assert latents.shape == (2, 2, 10, 8, 6)
    assert model.decode(latents).sample.shape == sample.shape
    assert set(shapes[0]) == {(1, 1, 12, 12, 12)}
    assert set(shapes[1]) == {(1, 2, 6, 6, 6)}


def errors_of(model, volume, tile_size, overlap):
    """Of latents and of decoded volumes."""
    model.disable_tiling()
    latents = model.encode(volume).latents
    decoded = model.decode(latents).sample
    model.enable_tiling(tile_size, overlap)
    return torch.tensor(
        [relative_error(model.encode(volume).latents, latents), relative_error(model.decode(latents).sample, decoded)]
    )


def test_tiles_that_share_enough_give_the_whole(model, volume):
    """A quarter of 48 voxels is more than a voxel of this network depends on to one side."""
    assert (errors_of(model, volume, 56, 0.86) < 1e-3).all()


def test_tiled_is_close_to_untiled(model, volume, monkeypatch):
    """Closer than with less overlap, and than tiles that normalize by themselves."""
    half, quarter, none = (errors_of(model, volume, TILE, overlap) for overlap in (0.5, 0.25, 0.0))
    assert (half < 0.03).all()
    assert (half < 0.6 * quarter).all()
    assert (quarter < 0.6 * none).all()
    monkeypatch.setattr(tiling.F, "batch_norm", _own_statistics)
    assert (10 * half < errors_of(model, volume, TILE, 0.5)).all()


def test_tiling_can_be_switched_off(model, volume):
    latents = model.encode(volume).latents
    model.enable_tiling(TILE)
    assert not torch.equal(model.encode(volume).latents, latents)
    model.disable_tiling()
    assert torch.equal(model.encode(volume).latents, latents)


def _own_statistics(hidden, mean, variance, weight, bias, eps):
    return nn.functional.group_norm(hidden, 4, weight, bias, eps)


def test_no_seam_where_tiles_meet(model, volume):
    """Steps between neighbouring slices are those of the untiled volume, also where one tile takes over from the other."""
    latents = model.encode(volume).latents
    expected = model.decode(latents).sample.diff(dim=2).abs().mean(dim=(0, 1, 3, 4))
    model.enable_tiling(TILE, 0.5)
    steps = model.decode(latents).sample.diff(dim=2).abs().mean(dim=(0, 1, 3, 4))
    assert (steps - expected).abs().max() < 0.02 * expected.max()


def test_quantization_is_that_of_the_whole(model, volume):
    latents = model.encode(volume).latents
    quantized = model.quantize(latents).latents
    model.enable_tiling(TILE, 0.5)
    expected = model.decode(quantized, force_not_quantize=True).sample
    torch.testing.assert_close(model.decode(latents).sample, expected)
    assert relative_error(expected, model.decode(latents, force_not_quantize=True).sample) > 0.01
    indices = model.quantize(model.encode(volume).latents).indices
    assert (indices == model.quantize(latents).indices).float().mean() > 0.97


def test_slices_are_equal_and_come_one_at_a_time(model):
    sample = torch.rand(3, 1, 16, 16, 16) * 2 - 1
    latents = model.encode(sample).latents
    decoded = model.decode(latents).sample
    shapes = tile_sizes(model.encoder), tile_sizes(model.decoder)
    model.enable_slicing()
    torch.testing.assert_close(model.encode(sample).latents, latents)
    torch.testing.assert_close(model.decode(latents).sample, decoded)
    assert shapes == ([(1, 1, 16, 16, 16)] * 3, [(1, 2, 8, 8, 8)] * 3)
    model.disable_slicing()
    model.encode(sample)
    assert shapes[0][-1] == (3, 1, 16, 16, 16)


def test_a_batch_in_tiles_is_each_volume_in_tiles(model):
    sample = torch.rand(2, 1, 24, 16, 16) * torch.tensor([0.1, 1.0]).reshape(2, 1, 1, 1, 1)
    model.enable_tiling(16)
    together = model.encode(sample).latents
    torch.testing.assert_close(together, torch.cat([model.encode(one).latents for one in sample.split(1)]))


def test_half_precision(volume):
    model = VQModel3D(block_out_channels=(8, 16), latent_channels=2, quantizer="fsq").eval()
    latents = model.encode(volume).latents.bfloat16()
    model = model.bfloat16()
    decoded = model.decode(latents).sample
    model.enable_tiling(TILE, 0.5)
    tiled = model.decode(latents).sample
    assert tiled.dtype == torch.bfloat16
    assert relative_error(tiled.float(), decoded.float()) < 0.05


@pytest.mark.parametrize("patch_size", [1, 2, 3, 5])
def test_any_downsampling(patch_size):
    torch.manual_seed(0)
    model = VQModel3D(
        block_out_channels=(4, 4), latent_channels=2, quantizer="fsq", patch_size=patch_size, norm_num_groups=2
    )
    factor = model.downsample_factor
    sample = torch.rand(1, 1, 20 * factor, 2 * factor, 2 * factor)
    expected = model.eval().encode(sample).latents
    model.enable_tiling(12 * factor, 0.75)
    assert model.encode(sample).latents.shape == expected.shape
    assert model.decode(expected).sample.shape == sample.shape
    assert relative_error(model.encode(sample).latents, expected) < 0.1


def test_attention_works_within_a_tile():
    torch.manual_seed(0)
    model = VQModel3D(
        block_out_channels=(8, 8), latent_channels=2, quantizer="fsq", mid_block_add_attention=True
    ).eval()
    model.enable_tiling(16, 0.5)
    sample = torch.rand(1, 1, *(32, 16, 16))
    assert model.decode(model.encode(sample).latents).sample.shape == sample.shape
    assert norms_are_as_before(model)


def test_gradients_go_through_tiles(model, volume):
    """Those of the volume's statistics are left out."""
    sample = volume.clone().requires_grad_()
    model.enable_tiling(TILE)
    with torch.enable_grad():
        latents = model.encode(sample).latents
        latents.square().sum().backward()
        assert (sample.grad.flatten(3).abs().sum(dim=3) > 0).all()  # of every slice
        latents = latents.detach().requires_grad_()
        model.decode(latents, force_not_quantize=True).sample.square().sum().backward()
    assert (latents.grad.abs() > 0).all()
    assert all(weight.grad is not None for weight in model.decoder.parameters())


def test_tiling_with_weights_that_are_brought_for_each_call(model, volume):
    """As `enable_sequential_cpu_offload` has it."""
    model.enable_tiling(TILE)
    latents = model.encode(volume).latents
    decoded = model.decode(latents).sample
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.encoder.norm_out.weight.device.type == "meta"
    assert torch.equal(model.encode(volume).latents, latents)
    assert torch.equal(model.decode(latents).sample, decoded)


def test_settings_that_cannot_be_raise(model):
    for size in (0, 15):
        with pytest.raises(InputError, match=f"tile_size must be a multiple of 2, the downsampling of .*, got {size}"):
            model.enable_tiling(size)
    for overlap in (-0.1, 1.0):
        with pytest.raises(InputError, match=f"from 0 to below 1, got {overlap}"):
            model.enable_tiling(16, overlap)
    assert not model.use_tiling


def test_a_pipeline_reconstructs_in_tiles(volume):
    pipeline = tiny_pipeline()
    shapes = tile_sizes(pipeline.vqvae.decoder)
    arguments = {"noise_step": 2, "class_labels": 0, "num_inference_steps": 4, "eta": 0.0}
    expected = pipeline.reconstruct(volume, generator=torch.Generator().manual_seed(0), **arguments).volumes
    pipeline.vqvae.enable_tiling(TILE, 0.5)
    tiled = pipeline.reconstruct(volume, generator=torch.Generator().manual_seed(0), **arguments).volumes
    assert shapes[-1] == (1, 2, TILE // 2, 8, 8)
    assert relative_error(tiled, expected) < 0.2
