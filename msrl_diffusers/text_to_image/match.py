"""How often images show what their prompts state, by a classifier; before and after, as pairs.

The prompts are a design and stay as they are; intervals resample the samples of every prompt. The images before and
after share their noise, so a draw takes the same samples of both.
"""

from collections.abc import Collection, Mapping, Sequence

import torch

from ..seeding import generator_for


LEVEL = 0.95


def match_figures(
    hits: Mapping[str, torch.Tensor],
    prompts: Sequence[str],
    attribute_names: Sequence[str],
    heldout_prompts: Collection[str] = (),
    draws: int = 1000,
    seed: int = 0,
) -> dict:
    """Match rates of the samples before and after.

    Args:
        hits: `{"before": [N, A] bool, "after": [N, A] bool}`: whether an attribute is as the prompt states it.
        prompts: N, the same for both.
        attribute_names: A.
        heldout_prompts: those the policy was not trained on.
        draws, seed: of the bootstrap.

    Returns:
        `before` and `after`, the shares of samples all of whose attributes match (exact match); `interval` of each,
        and `difference` (after minus before), `{"value", "interval"}`, 95 %; `share`, the mean share of matching
        attributes; `per_attribute`; `trained_prompts` and `heldout_prompts`, exact match over these (None without
        any).
    """
    exact = {arm: values.all(dim=1).double() for arm, values in hits.items()}
    replicates = _replicates(exact, prompts, draws, seed)
    heldout = torch.tensor([prompt in heldout_prompts for prompt in prompts])
    difference = (exact["after"] - exact["before"]).mean().item()
    return {
        **{arm: values.mean().item() for arm, values in exact.items()},
        "interval": {arm: _percentiles(values) for arm, values in replicates.items()},
        "difference": {"value": difference, "interval": _percentiles(replicates["after"] - replicates["before"])},
        "share": {arm: values.double().mean().item() for arm, values in hits.items()},
        "per_attribute": {
            name: {arm: values[:, column].double().mean().item() for arm, values in hits.items()}
            for column, name in enumerate(attribute_names)
        },
        "trained_prompts": _over(exact, ~heldout),
        "heldout_prompts": _over(exact, heldout),
        "n": len(prompts),
    }


def by_prompt(values: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Mean of `values [N]` over the samples of each prompt."""
    rows = _strata(prompts)
    return {prompt: values[its].double().mean().item() for prompt, its in rows.items()}


def _over(exact: Mapping[str, torch.Tensor], rows: torch.Tensor) -> dict[str, float] | None:
    return {arm: values[rows].mean().item() for arm, values in exact.items()} if rows.any() else None


def _replicates(
    exact: Mapping[str, torch.Tensor], prompts: Sequence[str], draws: int, seed: int
) -> dict[str, torch.Tensor]:
    """Bootstrap replicates `[draws]` of the mean of every arm's values, samples drawn within their prompt."""
    generator, strata = generator_for(seed, "match"), list(_strata(prompts).values())
    replicates = {arm: [] for arm in exact}
    for _ in range(draws):
        rows = torch.cat([its[torch.randint(len(its), (len(its),), generator=generator)] for its in strata])
        for arm, values in exact.items():
            replicates[arm].append(values[rows].mean())
    return {arm: torch.stack(values) for arm, values in replicates.items()}


def _strata(prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    rows = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return {prompt: torch.tensor(its) for prompt, its in rows.items()}


def _percentiles(values: torch.Tensor) -> list[float]:
    tail = (1 - LEVEL) / 2
    return torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
