"""Vector and finite scalar quantization.

Shape letters: N vectors, D channels of a vector, K codes.
"""

import torch


def nearest_code(vectors: torch.Tensor, codebook: torch.Tensor, chunk_size: int = 1024) -> torch.Tensor:
    """Indices `[N]` of the codes nearest to `vectors [N, D]` in `codebook [K, D]` (VQ-VAE, arXiv 1711.00937, eq. 1).

    `argmin |v - c|^2 = argmax (v.c - |c|^2 / 2)`: one matrix product, taken in chunks whose `[chunk, K]` scores stay
    in the processor's cache (a full distance matrix is bound by memory and several times slower on a CPU). In float32, within
    autocast too: rounded scores have ties.
    """
    vectors, codebook = vectors.float(), codebook.float()
    with torch.autocast(vectors.device.type, enabled=False):
        half_norms_K = codebook.square().sum(dim=1) / 2
        scores = (torch.addmm(-half_norms_K, chunk, codebook.T) for chunk in vectors.split(chunk_size))
        return torch.cat([chunk.argmax(dim=1) for chunk in scores])


def straight_through(continuous: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """The value of `quantized` with the gradient of `continuous`, all `[B, C, *S]` (arXiv 1711.00937, section 3.2)."""
    return continuous + (quantized - continuous).detach()


def finite_scalar_quantize(latents: torch.Tensor, num_levels: int) -> torch.Tensor:
    """Round every element of `latents [B, C, *S]`, clamped to [-1, 1], to one of `num_levels` values there (FSQ, arXiv
    2309.15505, eq. 1).

    The encoder bounds its output by tanh; the clamp is for latents from elsewhere (a diffusion model). The gradient
    is straight through the rounding.

    Raises:
        ValueError: fewer than two levels.
    """
    if num_levels < 2:
        raise ValueError(f"num_levels must be at least 2, got {num_levels}.")
    steps = num_levels - 1
    unit = (latents.clamp(-1, 1) + 1) / 2 * steps
    return straight_through(unit, unit.round()) / steps * 2 - 1


def scalar_indices(quantized: torch.Tensor, num_levels: int) -> torch.Tensor:
    """The level (0 .. num_levels - 1) of every element of an output `[B, C, *S]` of `finite_scalar_quantize`, int64."""
    return ((quantized + 1) / 2 * (num_levels - 1)).round().long()


def code_perplexity(indices: torch.Tensor, num_codes: int) -> torch.Tensor:
    """exp of the entropy of the use of codes by `indices [B, *S]`: `[]`, from 1 (collapsed) to `num_codes` (uniform)."""
    flat = indices.flatten()
    # torch.bincount has no fixed size, at which torch.compile breaks the graph
    use = flat.new_zeros(num_codes).scatter_add_(0, flat, torch.ones_like(flat)).float()
    probabilities = use / use.sum()
    return torch.exp(-torch.special.xlogy(probabilities, probabilities).sum())
