"""From volumes to features, and who computed them."""

import hashlib
from collections.abc import Iterable

import torch
from torch import nn
from tqdm import tqdm

from ..errors import InputError
from .sources import VolumeSource


@torch.no_grad()
def extract_features(extractor: nn.Module, volumes: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """Features `[N, P, S, F]` (P planes, S slices of each; 1 and 1 for a 3D extractor) of `volumes [N, C, D, H, W]`.

    Float64 on the CPU, as covariances want it.
    """
    extractor.eval()
    parameter = next(extractor.parameters())
    batches = (batch.to(parameter.device, parameter.dtype) for batch in volumes.split(batch_size))
    return torch.cat([extractor(batch).cpu().double() for batch in batches])


@torch.no_grad()
def source_features(
    extractor: nn.Module, source: VolumeSource, batch_size: int = 16, progress: bool = True
) -> torch.Tensor:
    """Features `[N, P, S, F]`, float32 on the CPU, of all volumes of a set, of which one batch at a time is in memory.

    Raises:
        InputError: an empty set, a volume that can't be read, or one that the extractor does not take.
    """
    if not len(source):
        raise InputError(f"{source.place} holds no volumes.")
    extractor.eval()
    parameter, features, done = next(extractor.parameters()), None, 0
    with tqdm(total=len(source), desc="features", unit="volume", disable=not progress) as bar:
        for batch in source.batches(batch_size):
            found = extractor(batch.to(parameter.device, parameter.dtype)).float()
            if features is None:  # in one piece: small ones kept between the large ones of a batch would pin the heap
                features = torch.empty(len(source), *found.shape[1:])
            features[done : done + len(batch)] = found
            done += len(batch)
            bar.update(len(batch))
    return features


def extractor_identity(extractor: nn.Module) -> dict[str, str]:
    """`{"name": class, "sha256": of the weights}`: a Frechet distance means nothing without it."""
    return {"name": type(extractor).__name__, "sha256": hash_tensors(extractor.state_dict().items())}


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of named tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(name.encode())
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # which numpy does not have
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def volume_hashes(volumes: torch.Tensor) -> list[str]:
    """What tells each of volumes `[N, C, D, H, W]` from others, without showing it."""
    return [hash_tensors([("volume", volume)]) for volume in volumes]
