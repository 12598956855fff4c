"""The Frechet distance of two Gaussians as a loss: gradients to the features of the generated side.

Shape letters: N volumes, P planes, S slices of each plane, F features. All of it runs in float64: the distance is a small
difference of large traces.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Moments(NamedTuple):
    """`mean [..., F]` and `covariance [..., F, F]` (divisor n - 1, as in torchmetrics' FID), float64."""

    mean: torch.Tensor
    covariance: torch.Tensor


class FrechetTarget(NamedTuple):
    """The real side of a distance, whose root is taken once: `mean [..., F]`, `trace [...]` and symmetric square `root
    [..., F, F]` of the covariance, float64, without gradients."""

    mean: torch.Tensor
    trace: torch.Tensor
    root: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "FrechetTarget":
        """Of real features `[N, P, S, F]`, one Gaussian per plane."""
        with torch.no_grad():
            mean, covariance = feature_moments(features)
            return cls(mean, _trace(covariance), matrix_root(covariance))


def feature_moments(features: torch.Tensor) -> Moments:
    """Mean `[P, F]` and covariance `[P, F, F]` of features `[N, P, S, F]`, the slices of a plane pooled, as
    `evaluation.fidelity` pools them.

    Raises:
        ValueError: fewer than two slices of a plane, which have no covariance.
    """
    rows = features.double().transpose(0, 1).flatten(1, 2)
    if rows.shape[1] < 2:
        raise ValueError(f"A covariance needs two slices or more, got {rows.shape[1]}.")
    mean = rows.mean(dim=1)
    centred = rows - mean[:, None]
    return Moments(mean, centred.mT @ centred / (rows.shape[1] - 1))


def matrix_root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root `[..., F, F]` of a positive semi-definite matrix; eigenvalues that rounding has put below
    0 count as 0. For constants: its gradient is not finite where eigenvalues coincide."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT


def root_product_trace(root: torch.Tensor, covariance: torch.Tensor, epsilon: float = 1e-10) -> torch.Tensor:
    """`tr((A B)^1/2) [...]` of the `root [..., F, F]` of A and `covariance [..., F, F]` B, with a gradient to B.

    `A B` has the eigenvalues of the symmetric `A^1/2 B A^1/2`, and the trace is the sum of their roots. Only eigenvalues are
    differentiated, so equal ones do no harm. The slope of the root at 0 is infinite; here the root of an eigenvalue l is
    `l / (l + e)^1/2`, with e = `epsilon` times the largest one: 0 at 0, with a slope of `e^-1/2`, and equal to the root
    to a relative `e / 2l` above. With fewer slices than features both ends of this matter.
    """
    values = torch.linalg.eigvalsh(root @ covariance @ root).clamp_min(0)
    floor = (epsilon * values.detach().amax(dim=-1, keepdim=True)).clamp_min(torch.finfo(values.dtype).tiny)
    return (values / (values + floor).sqrt()).sum(dim=-1)


def frechet_to_target(target: FrechetTarget, moments: Moments, epsilon: float = 1e-10) -> torch.Tensor:
    """`|m - m_r|^2 + tr(C + C_r - 2 (C_r C)^1/2) [...]` (FID: arXiv 1706.08500, eq. 6; Dowson and Landau 1982), with a
    gradient to `moments`."""
    apart = (moments.mean - target.mean).square().sum(dim=-1)
    shared = root_product_trace(target.root, moments.covariance, epsilon)
    return apart + _trace(moments.covariance) + target.trace - 2 * shared


def frechet_loss(
    targets: Sequence[FrechetTarget], features: torch.Tensor, groups: torch.Tensor, epsilon: float = 1e-10
) -> torch.Tensor:
    """The distance `[]` of generated features `[N, P, S, F]` to real ones, averaged over planes and groups.

    The Frechet distance as a training loss is FD-loss (arXiv 2604.28190): statistics of a population larger than the batch
    that has the gradient; within classes here. `groups [N]` numbers the class of each sample, `targets[g]` is that of class g;
    with a single target the distance is the pooled one.

    Raises:
        ValueError: fewer than two slices of a class.
    """
    distances = []
    for group, target in enumerate(targets):
        moments = feature_moments(features[groups == group])
        distances.append(frechet_to_target(target, moments, epsilon).mean())
    return torch.stack(distances).mean()


def _trace(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
