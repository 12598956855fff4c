"""From the FID of a set to the reward target of its volumes."""

import math
from collections.abc import Mapping


TARGET_MAPS = ("linear", "exponential", "rank")


def reward_targets(fids: Mapping[str, float], target_map: str = "linear", steepness: float = 3.0) -> dict[str, float]:
    """Targets in [0, 1] of named sets: 1 for the best FID, 0 for the worst (arXiv 2603.06173, section 3.2).

    With `u = (F_max - F) / (F_max - F_min)`: `"linear"` is u; `"exponential"` is
    `(exp(steepness u) - 1) / (exp(steepness) - 1)`, which spreads the best sets; `"rank"` is the rank of u.

    Raises:
        ValueError: fewer than two sets, a FID that is not finite, equal FIDs (nothing to learn), or an unknown map.
    """
    if target_map not in TARGET_MAPS:
        raise ValueError(f"target_map must be one of {list(TARGET_MAPS)}, got {target_map!r}.")
    if len(fids) < 2:
        raise ValueError(f"Reward targets need at least two scored sets, got {len(fids)}.")
    not_finite = [name for name, fid in fids.items() if not math.isfinite(fid)]
    if not_finite:
        raise ValueError(f"The FID of set {not_finite[0]!r} is {fids[not_finite[0]]}; it can't be placed on a scale.")
    worst, best = max(fids.values()), min(fids.values())
    if worst == best:
        raise ValueError(f"All {len(fids)} sets have the FID {best:g}; there is no quality scale to learn.")
    quality = {name: (worst - fid) / (worst - best) for name, fid in fids.items()}
    if target_map == "exponential":
        return {name: math.expm1(steepness * value) / math.expm1(steepness) for name, value in quality.items()}
    if target_map == "rank":
        order = sorted(set(quality.values()))
        return {name: order.index(value) / (len(order) - 1) for name, value in quality.items()}
    return quality
