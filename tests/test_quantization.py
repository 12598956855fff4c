"""Quantizers: formulas, the moving-average codebook, and the shapes of VQModel3D."""

import pytest
import torch
from tiny import copied, differing, tiny_vqvae

from msrl_diffusers import VQModel3D
from msrl_diffusers.functional.quantization import (
    code_perplexity,
    finite_scalar_quantize,
    nearest_code,
    scalar_indices,
    straight_through,
)
from msrl_diffusers.models.autoencoder_vq_3d import EMAQuantizer, ScalarQuantizer


def ema_quantizer(num_codes=4, channels=2, decay=0.5, restart_threshold=1.0):
    torch.manual_seed(0)
    return EMAQuantizer(num_codes, channels, decay, restart_threshold, commitment=0.25)


def as_latents(vectors):
    """`[N, C]` to `[1, C, N, 1, 1]`."""
    return vectors.T[None, :, :, None, None]


@pytest.mark.parametrize("chunk_size", [1024, 7])
def test_nearest_code_is_the_argmin_of_distances(chunk_size):
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = torch.randn(100, 5, generator=generator), torch.randn(33, 5, generator=generator)
    expected = torch.cdist(vectors, codebook).argmin(dim=1)
    assert torch.equal(nearest_code(vectors, codebook, chunk_size), expected)


def test_nearest_code_is_as_exact_within_autocast():
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = torch.randn(500, 5, generator=generator), torch.randn(200, 5, generator=generator)
    expected = nearest_code(vectors, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(vectors, codebook), expected)


def test_straight_through_has_the_gradient_of_the_continuous():
    continuous = torch.randn(8, requires_grad=True)
    value = straight_through(continuous, continuous.round())
    torch.testing.assert_close(value, continuous.round())
    (gradient,) = torch.autograd.grad((value * torch.arange(8)).sum(), continuous)
    torch.testing.assert_close(gradient, torch.arange(8.0))


@pytest.mark.parametrize("num_levels", [2, 5, 8])
def test_scalar_quantization_has_its_levels_only(num_levels):
    latents = torch.linspace(-1.5, 1.5, 1000)
    quantized = finite_scalar_quantize(latents, num_levels)
    assert torch.equal(quantized.unique(), torch.arange(num_levels) / (num_levels - 1) * 2 - 1)
    assert torch.equal(finite_scalar_quantize(quantized, num_levels), quantized)
    assert (quantized - latents.clamp(-1, 1)).abs().max() <= 1 / (num_levels - 1) + 1e-6


def test_scalar_quantization_passes_the_gradient_inside_its_range():
    latents = torch.tensor([-2.0, -0.4, 0.1, 0.9, 2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(finite_scalar_quantize(latents, 8).sum(), latents)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))


def test_one_level_raises():
    with pytest.raises(ValueError, match="num_levels must be at least 2, got 1"):
        finite_scalar_quantize(torch.zeros(1), 1)


def test_lookup_inverts_scalar_indices():
    quantizer = ScalarQuantizer(8)
    output = quantizer(torch.rand(2, 3, 4, 4, 4) * 2 - 1)
    assert output.indices.dtype == torch.int64
    torch.testing.assert_close(quantizer.lookup(output.indices), output.latents)
    assert torch.equal(scalar_indices(quantizer.lookup(output.indices), 8), output.indices)


def test_lookup_inverts_codebook_indices():
    quantizer = ema_quantizer().eval()
    output = quantizer(torch.randn(2, 2, 3, 4, 5))
    assert output.indices.shape == (2, 3, 4, 5)
    torch.testing.assert_close(quantizer.lookup(output.indices), output.latents)


def test_perplexity_counts_codes_in_use():
    torch.testing.assert_close(code_perplexity(torch.arange(16), 16), torch.tensor(16.0))
    torch.testing.assert_close(code_perplexity(torch.arange(16) % 4, 16), torch.tensor(4.0))
    torch.testing.assert_close(code_perplexity(torch.full((9,), 3), 16), torch.tensor(1.0))


def test_codebook_starts_on_vectors_of_the_first_batch():
    quantizer = ema_quantizer(decay=1 - 1e-6)
    vectors = torch.randn(50, 2) + 10
    quantizer.train()(as_latents(vectors))
    assert quantizer.initialized
    assert (quantizer.codebook[:, None] - vectors).abs().amax(dim=2).amin(dim=1).max() < 1e-3


def test_a_resumed_codebook_does_not_start_over():
    first = ema_quantizer()
    first.train()(torch.randn(1, 2, 4, 4, 4))
    resumed = ema_quantizer()
    resumed.load_state_dict(first.state_dict())
    assert resumed.initialized
    before = resumed.codebook.clone()
    resumed.decay = 1 - 1e-6  # hardly moves, so that only a new start would show
    resumed.train()(torch.randn(1, 2, 4, 4, 4) + 50)
    assert (resumed.codebook - before).abs().max() < 1


def test_a_dead_code_restarts_on_a_vector_of_the_batch():
    quantizer = ema_quantizer().train()
    vectors = torch.rand(64, 2)
    quantizer(as_latents(vectors))
    quantizer.codebook[3] = quantizer.code_sum[3] = 1000.0
    quantizer.code_count[3] = 1.0
    for _ in range(3):
        quantizer(as_latents(vectors))
    assert quantizer.codebook[3].abs().max() <= 1


def test_codebook_converges_to_cluster_centres():
    quantizer = ema_quantizer(num_codes=2, decay=0.8).train()
    centres = torch.tensor([[-5.0, 0.0], [5.0, 3.0]])
    for _ in range(60):
        vectors = centres.repeat_interleave(64, dim=0) + 0.1 * torch.randn(128, 2)
        output = quantizer(as_latents(vectors))
    assert torch.cdist(centres, quantizer.codebook).amin(dim=1).max() < 0.1
    assert output.perplexity == pytest.approx(2, abs=1e-3)
    assert output.loss < 0.25 * 0.02


def test_evaluation_leaves_the_codebook_alone():
    quantizer = ema_quantizer().eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(torch.randn(1, 2, 4, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_decoding_without_gradients_leaves_the_codebook_alone():
    """As of a pipeline whose autoencoder is fresh, and so in training mode."""
    model = tiny_vqvae("vq").train()
    before = copied(model)
    with torch.no_grad():
        model.decode(torch.randn(1, 2, 4, 4, 4))
    assert not differing(copied(model), before)
    model.decode(torch.randn(1, 2, 4, 4, 4))
    assert "quantization.codebook" in differing(copied(model), before)


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_decoding_is_one_graph(quantizer):
    quantize = tiny_vqvae(quantizer).eval().quantization
    latents = torch.randn(1, 2, 4, 4, 4)
    compiled = torch.compile(quantize, backend="eager", fullgraph=True)
    assert torch.equal(compiled(latents).latents, quantize(latents).latents)


def test_commitment_loss_pulls_the_encoder_only():
    quantizer = ema_quantizer().train()
    latents = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    output = quantizer(latents)
    (gradient,) = torch.autograd.grad(output.loss, latents)
    expected = 0.25 * 2 * (latents - output.latents).detach() / latents.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_shapes_of_encode_quantize_decode(quantizer):
    model = VQModel3D(block_out_channels=(8, 8, 16), latent_channels=3, quantizer=quantizer, num_vq_embeddings=32)
    model.eval()
    volumes = torch.rand(2, 1, 16, 8, 12) * 2 - 1
    latents = model.encode(volumes).latents
    assert latents.shape == (2, 3, 4, 2, 3)
    assert model.latent_shape(16) == (3, 4, 4, 4)
    quantized = model.quantize(latents)
    assert quantized.latents.shape == latents.shape
    assert quantized.indices.shape == ((2, 4, 2, 3) if quantizer == "vq" else latents.shape)
    assert quantized.loss.shape == quantized.perplexity.shape == ()
    torch.testing.assert_close(
        model.decode(latents).sample, model.decode(quantized.latents, force_not_quantize=True).sample
    )
    assert model(volumes).sample.shape == volumes.shape
    torch.testing.assert_close(model(volumes, return_dict=False)[0], model(volumes).sample)
    if quantizer == "fsq":
        assert latents.abs().max() <= 1
