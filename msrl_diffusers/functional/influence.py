"""What each sample adds to the Frechet distance of its set, and reward targets that take it into account.

Shape letters: N real and M generated volumes, P planes, S slices of each plane, F features.
"""

import torch


def frechet_influence(real: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """First-order contribution of every generated sample to the Frechet distance (arXiv 1706.08500, eq. 6), `[M]` float64.

    It is the derivative of the distance with respect to the sample's weight in the generated set; all weights are 1 and are
    divided by their sum. **Positive: the sample raises the distance**, and the set without it is closer to the real one,
    by its influence to first order. The influences of a set sum to 0.

    With `m`, `C` the mean and covariance of the generated set and `m_r`, `C_r` those of the real one, the distance
    `|m - m_r|^2 + tr(C + C_r - 2 (C C_r)^1/2)` has the derivatives `2 (m - m_r)` by `m` and `I - T` by `C`, where
    `T = C^-1/2 (C^1/2 C_r C^1/2)^1/2 C^-1/2` maps the generated Gaussian onto the real one (Bhatia, Jain and Lim, arXiv
    1712.01504). A sample moves both moments within the span of the set alone, so T is needed there only: everything is
    computed in the whitened coordinates of the set, and a covariance without full rank (M < F) needs no shrinkage.
    Covariances have the divisor n - 1 and nothing is added to their diagonals, as in torchmetrics' FID: this is the
    derivative of `evaluation.fidelity.frechet_distance`.

    Args:
        real: features `[N, F]`, or `[N, P, S, F]`.
        generated: features `[M, F]`, or `[M, P, S, F]`. Slices of a plane are pooled and planes averaged, as in
            `frechet_distance`; N and M may differ.

    Raises:
        ValueError: shapes that do not fit, fewer than two samples on a side, or features that are not finite.
    """
    _check_features(real, generated)
    if real.ndim == 2:
        real, generated = real[:, None, None], generated[:, None, None]
    planes = [_plane_influence(real[:, p].double(), generated[:, p].double()) for p in range(real.shape[1])]
    return torch.stack(planes).mean(dim=0)


def class_influence(
    real: torch.Tensor, real_labels: torch.Tensor, generated: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """`frechet_influence` within each class, `[M]` float64: of a sample on the distance of its class to the real one.

    Args:
        real, generated: features `[N, ...]` and `[M, ...]`, as of `frechet_influence`.
        real_labels, labels: their classes `[N]` and `[M]`, integers.

    Raises:
        ValueError: a class of `labels` with fewer than two samples on a side, or what `frechet_influence` refuses.
    """
    influence = torch.zeros(len(generated), dtype=torch.float64, device=generated.device)
    for label in labels.unique().tolist():
        rows, real_rows = labels == label, real_labels == label
        if min(rows.sum(), real_rows.sum()) < 2:
            raise ValueError(
                f"The influence in class {label} needs two samples on each side, got {int(real_rows.sum())} real and "
                f"{int(rows.sum())} generated ones."
            )
        influence[rows] = frechet_influence(real[real_rows], generated[rows])
    return influence


def mixed_targets(
    set_targets: float | torch.Tensor,
    influence: torch.Tensor,
    coefficient: float,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reward targets in [0, 1] from the quality of the set and the share of the single sample in it, `[M]` float32.

    `(1 - coefficient) * set target + coefficient * sigmoid(-influence / rms)`, where rms is the root mean square of the
    influences of one set and class. A target rises with that of the set and falls with the influence. A sample that
    leaves the distance as it is stands at 0.5 of its own scale, so sets stay in their order, `1 - coefficient` as far
    apart; the logistic bounds the few samples far from everything, whose influence grows with the square of their
    distance.

    Args:
        set_targets: one target in [0, 1] for all, or one per sample `[M]` (`functional.targets.reward_targets`).
        influence: of each sample on its set, `[M]` (`frechet_influence`, `class_influence`).
        coefficient: 0 gives the set's target, as published; 1 the single sample's alone.
        groups: number of the set and class of each sample, `[M]`; all are of one by default.

    Raises:
        ValueError: a coefficient or target outside [0, 1], or an influence that is not finite.
    """
    if not 0 <= coefficient <= 1:
        raise ValueError(f"coefficient must lie in [0, 1], got {coefficient}.")
    if not torch.isfinite(influence).all():
        raise ValueError(f"{int((~torch.isfinite(influence)).sum())} influences are not finite.")
    set_targets = torch.as_tensor(set_targets, dtype=torch.float64, device=influence.device).expand(len(influence))
    if not ((set_targets >= 0) & (set_targets <= 1)).all():  # refuses NaN as well
        raise ValueError("Targets of sets must lie in [0, 1].")
    influence = influence.double()
    groups = torch.zeros(len(influence), dtype=torch.long, device=influence.device) if groups is None else groups
    _, groups = torch.unique(groups, return_inverse=True)
    counts = torch.bincount(groups)
    squares = torch.zeros(len(counts), dtype=torch.float64, device=influence.device)
    rms = (squares.index_add_(0, groups, influence.square()) / counts).sqrt()[groups]
    quality = torch.where(rms > 0, -influence / rms, 0).sigmoid()  # equal samples are neither good nor bad
    return ((1 - coefficient) * set_targets + coefficient * quality).float()


def _plane_influence(real: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """Influence `[M]` of volumes whose slices `[M, S, F]` are pooled, against `real [N, S, F]`; float64."""
    M, S, _ = generated.shape
    mean, real_mean = generated.mean(dim=(0, 1)), real.mean(dim=(0, 1))
    centred, real_centred = (generated - mean).flatten(0, 1), (real - real_mean).flatten(0, 1)
    n, real_n = len(centred), len(real_centred)
    left, scales, right = torch.linalg.svd(centred, full_matrices=False)
    rank = int((scales > scales[0] * max(centred.shape) * torch.finfo(scales.dtype).eps).sum())
    whitened = left[:, :rank] * (n - 1) ** 0.5
    # The singular values of this factor of C^1/2 C_r C^1/2 are the roots of its eigenvalues, at full precision.
    factor = real_centred @ right[:rank].T * (scales[:rank] / ((n - 1) * (real_n - 1)) ** 0.5)
    _, roots, axes = torch.linalg.svd(factor, full_matrices=False)
    transported = (whitened @ axes.T).square() @ roots  # x^T T x of every slice
    spread = centred.square().sum(dim=1)  # x^T x
    by_covariance = (spread - transported).view(M, S).mean(dim=1) * n / (n - 1)
    by_mean = 2 * (generated.mean(dim=1) - mean) @ (mean - real_mean)
    return (by_mean + by_covariance - by_covariance.mean()) / M


def _check_features(real: torch.Tensor, generated: torch.Tensor) -> None:
    if real.ndim not in (2, 4) or real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"Features must both be [N, F] or [N, P, S, F], got {list(real.shape)} and {list(generated.shape)}."
        )
    if min(len(real), len(generated)) < 2:
        raise ValueError(f"An influence needs two samples on each side, got {len(real)} and {len(generated)}.")
    if not (torch.isfinite(real).all() and torch.isfinite(generated).all()):
        raise ValueError("Features must be finite.")
