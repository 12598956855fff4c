"""Checks of what a StudyConfig says about reward data, their labels, the validity of rewards and their use."""

from collections.abc import Mapping

from ..data.degradations import DEGRADATIONS
from ..errors import InputError
from ..evaluation.validity import CEILINGS
from .sections import TRAINED_ON


FLOORED = ("auc", "spearman", "set_spearman", "slope", *CEILINGS)  # figures that a floor may be set for


def check_reward_options(config) -> None:
    """Raise InputError for options of a `StudyConfig` that are off, or of no effect."""
    if not 0 <= config.marginal_labels <= 1:
        raise InputError(f"StudyConfig: marginal_labels must lie in [0, 1], got {config.marginal_labels}.")
    _check_anchors(config.degraded_anchors)
    _check_floors(config.validity_floors or {}, config.unseen_sets)
    for name in ("policy_anchors", "unseen_sets"):
        for key, path in getattr(config, name).items():
            if not isinstance(path, str):
                raise InputError(f"StudyConfig: {name} must name a folder or file for {key!r}, got {path!r}.")
    if config.draft.get("fuse_lora") is False:
        raise InputError(
            "Section 'draft': fuse_lora must be true in a study, which saves and evaluates whole pipelines."
        )
    for method in ("nft", "ddo"):
        if getattr(config, method).get("sampler") not in (None, "DDIMScheduler"):
            raise InputError(
                f"Section {method!r}: sampler must be unset in a study, which samples by DDIM wherever it compares with the rollouts."
            )
    for method in ("ppo", "nft", "draft"):
        weights = getattr(config, method).get("reward_weights")
        if weights is not None and len(weights) != len(TRAINED_ON):
            raise InputError(
                f"Section {method!r}: reward_weights needs a number for each of {list(TRAINED_ON)}, got {weights}."
            )
    given = [name for name in ("degraded_anchors", "policy_anchors") if getattr(config, name)]
    if config.conditional_rewards:
        given.append("conditional_rewards")
    if config.marginal_labels and not config.refreshes:
        given.append("marginal_labels")
    if given and config.pretrained and config.pretrained_rewards:
        raise InputError(
            f"{given[0]} is of the training of reward models, which are those of `pretrained` here; remove it, or set "
            "pretrained_rewards: false to train others."
        )


def _check_anchors(anchors: Mapping) -> None:
    if not anchors:
        return
    if set(anchors) != {"kinds", "strengths"} or not all(isinstance(part, list) and part for part in anchors.values()):
        raise InputError(f"degraded_anchors needs two lists, kinds and strengths, got {anchors}.")
    for kind in anchors["kinds"]:
        if kind not in DEGRADATIONS:
            raise InputError(f"degraded_anchors: kind {kind!r} is unknown; choose of {list(DEGRADATIONS)}.")
    for strength in anchors["strengths"]:
        if not isinstance(strength, (int, float)) or not 0 < strength <= 1:
            raise InputError(f"degraded_anchors: a strength must lie in (0, 1], got {strength!r}.")
    if len({round(100 * strength) for strength in anchors["strengths"]}) < len(anchors["strengths"]):
        raise InputError(
            f"degraded_anchors: strengths must differ in hundredths, which name the sets, got {anchors['strengths']}."
        )


def _check_floors(floors: Mapping, unseen_sets: Mapping) -> None:
    for name, floor in floors.items():
        unseen, figure = str(name).startswith("unseen."), str(name).removeprefix("unseen.")
        if figure not in FLOORED:
            raise InputError(f"validity_floors names {name!r}; figures are {list(FLOORED)}, or unseen.FIGURE.")
        if unseen and not unseen_sets:
            raise InputError(f"validity_floors: {name} needs unseen_sets, sets of policies the rewards never saw.")
        if not isinstance(floor, (int, float)) or isinstance(floor, bool):
            raise InputError(f"validity_floors: {name} must be a number, got {floor!r}.")
