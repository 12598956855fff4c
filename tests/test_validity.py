"""Figures of rewards whose quality is known, and the floors."""

import json

import pytest
import torch
from scipy.stats import mannwhitneyu, spearmanr
from tiny import Brightness, tiny_phantoms
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.regression import spearman_corrcoef

from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.validity import (
    VALIDITY_FLOORS,
    ScoredSet,
    check_validity,
    reward_validity,
    score_set_by,
)


TARGETS = {"reconstruction-001": 1.0, "reconstruction-050": 0.6, "synthetic-010": 0.0, "synthetic-050": 0.3}
BEST, SYNTHETIC = "reconstruction-001", "synthetic-050"


def scored_sets(scale=1.0, noise=0.0, offset=0.0, count=20, targets=TARGETS) -> dict[str, ScoredSet]:
    """Scores that are the targets, stretched, moved and with noise on them."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: ScoredSet(scale * target + offset + noise * torch.randn(count, generator=generator), torch.full((count,), target))
        for name, target in targets.items()
    }  # fmt: skip


def test_a_perfect_reward():
    figures = reward_validity(scored_sets(), BEST, SYNTHETIC)
    assert figures["auc"] == 1
    assert figures["spearman"] == pytest.approx(1, abs=1e-4)
    assert figures["set_spearman"] == pytest.approx(1, abs=1e-4)
    assert figures["ece"] == pytest.approx(0, abs=1e-6)
    assert figures["slope"] == pytest.approx(1)
    assert figures["mean_by_set"] == pytest.approx(TARGETS)
    assert figures["n"] == 20
    assert "unseen" not in figures
    assert json.loads(json.dumps(figures)) == figures
    check_validity({"volume": figures}, {**VALIDITY_FLOORS, "ece": 0.01, "slope": 0.9})


def test_large_scores_are_not_ties():
    figures = reward_validity(scored_sets(scale=10.0, noise=0.1, offset=100.0), BEST, SYNTHETIC)
    assert figures["auc"] == 1


def test_a_reward_that_has_it_upside_down():
    figures = reward_validity(scored_sets(scale=-1.0), BEST, SYNTHETIC)
    assert figures["auc"] == 0
    assert figures["spearman"] == pytest.approx(-1, abs=1e-4)
    assert figures["slope"] == pytest.approx(-1)


def test_figures_are_those_of_other_libraries():
    sets = scored_sets(noise=0.4)
    figures = reward_validity(sets, BEST, SYNTHETIC)
    scores, targets = (torch.cat([getattr(s, name) for s in sets.values()]).numpy() for name in ("scores", "targets"))
    assert figures["spearman"] == pytest.approx(spearmanr(scores, targets).statistic, abs=1e-4)
    pair = torch.cat([sets[BEST].scores, sets[SYNTHETIC].scores])
    assert figures["auc"] == pytest.approx(mannwhitneyu(pair[:20], pair[20:]).statistic / 20**2, abs=1e-6)
    assert 0.5 < figures["auc"] < 1
    # and to the last bit those that reports of studies have had
    labels = torch.cat([torch.ones(20), torch.zeros(20)]).long()
    assert figures["auc"] == binary_auroc(pair.sigmoid(), labels).item()
    assert figures["spearman"] == spearman_corrcoef(torch.from_numpy(scores), torch.from_numpy(targets)).item()


def test_calibration_sees_what_ranks_do_not():
    honest, moved, bold = (
        reward_validity(scored_sets(scale, 0.01, offset), BEST, SYNTHETIC)
        for scale, offset in ((1, 0), (1, 0.3), (4, -1))
    )
    assert (
        honest["spearman"] == pytest.approx(moved["spearman"], abs=0.01) == pytest.approx(bold["spearman"], abs=0.02)
    )
    assert honest["ece"] < 0.02
    assert moved["ece"] == pytest.approx(0.3, abs=0.01)
    assert moved["slope"] == pytest.approx(honest["slope"]) == pytest.approx(1, abs=0.01)
    assert bold["slope"] == pytest.approx(0.25, abs=0.01)
    # a score stands 3 target - 1 too high; errors of both signs cancel in a single bin, not in several
    gaps = [abs(3 * target - 1) for target in TARGETS.values()]
    assert bold["ece"] == pytest.approx(sum(gaps) / 4, abs=0.05)
    single = reward_validity(scored_sets(4, 0, -1), BEST, SYNTHETIC, num_bins=1)
    assert single["ece"] == pytest.approx(abs(sum(3 * target - 1 for target in TARGETS.values())) / 4, abs=1e-5)


def test_unseen_policies_are_kept_apart():
    sets = scored_sets(noise=0.05)
    gamed = {  # high scores for what is worth nothing, and the order of the two turned round
        "ppo-010": ScoredSet(torch.full((8,), 1.5), torch.full((8,), 0.2)),
        "ppo-040": ScoredSet(torch.full((8,), 3.0), torch.full((8,), 0.0)),
    }
    alone, both = reward_validity(sets, BEST, SYNTHETIC), reward_validity(sets, BEST, SYNTHETIC, gamed)
    unseen = both.pop("unseen")
    assert both == alone
    assert unseen["auc"] == 0
    assert unseen["spearman"] == pytest.approx(-1, abs=1e-4)
    assert unseen["set_spearman"] is None  # of two sets
    assert unseen["ece"] > 1
    assert unseen["n"] == 16
    assert unseen["mean_by_set"] == {"ppo-010": 1.5, "ppo-040": 3.0}
    check_validity({"volume": {**both, "unseen": unseen}})
    with pytest.raises(
        InputError, match=r"Reward 'volume' has unseen.auc 0.00 \(at least 0.6\); a policy would game it"
    ):
        check_validity({"volume": {**both, "unseen": unseen}}, {"auc": 0.7, "unseen.auc": 0.6})


def test_figures_that_do_not_exist_are_none():
    one_target = scored_sets(noise=0.1, targets=dict.fromkeys(TARGETS, 0.5))
    figures = reward_validity(one_target, BEST, SYNTHETIC)
    assert figures["spearman"] is None
    assert figures["set_spearman"] is None
    constant = reward_validity(scored_sets(scale=0.0, offset=0.5), BEST, SYNTHETIC)
    assert constant["slope"] is None
    assert constant["auc"] == 0.5
    assert constant["spearman"] == pytest.approx(0)
    with pytest.raises(InputError, match=r"'volume' has spearman no value \(at least 0.3\)"):
        check_validity({"volume": figures}, {"spearman": 0.3})


def test_the_sentence_names_rewards_figures_floors_and_remedy():
    good = reward_validity(scored_sets(), BEST, SYNTHETIC)
    figures = {
        "volume": {**good, "auc": 0.49, "spearman": 0.0061},
        "slice": {**good, "auc": float("nan")},
        "heldout": good,
    }
    with pytest.raises(InputError) as caught:
        check_validity(figures)
    sentence = str(caught.value)
    assert sentence.startswith(
        "Reward 'volume' has auc 0.49 (at least 0.7), spearman 0.01 (at least 0.3); reward 'slice' has auc nan"
    )
    assert "heldout" not in sentence
    assert "lower the floors" in sentence
    assert "\n" not in sentence
    with pytest.raises(InputError, match=r"would game it: set validity_floors to \{\}\.$"):
        check_validity(figures, remedy="set validity_floors to {}")
    check_validity(figures, {})
    with pytest.raises(InputError, match=r"Reward 'volume' has ece 0.31 \(at most 0.2\)"):
        check_validity({"volume": {**good, "ece": 0.31}}, {"ece": 0.2})


@pytest.mark.parametrize(
    ("floor", "message"),
    [
        ("acu", r"Reward 'volume' has no figure 'acu' .* it has \['auc', 'ece'"),
        ("unseen.auc", "no figure 'unseen.auc' .* no sets of unseen policies were given"),
        ("mean_by_set", "'mean_by_set' of reward 'volume' is no number"),
    ],
)
def test_a_floor_of_something_else_is_refused(floor, message):
    figures = reward_validity(scored_sets(), BEST, SYNTHETIC)
    with pytest.raises(InputError, match=message):
        check_validity({"volume": figures}, {floor: 0.5})


def test_sets_that_are_missing_or_of_the_wrong_shape_are_refused():
    with pytest.raises(InputError, match="needs the set 'reconstruction-000'"):
        reward_validity(scored_sets(), "reconstruction-000", SYNTHETIC)
    with pytest.raises(InputError, match="one bin or more, got 0"):
        reward_validity(scored_sets(), BEST, SYNTHETIC, num_bins=0)
    for scores, targets in (
        (torch.zeros(3), torch.zeros(2)),
        (torch.zeros(0), torch.zeros(0)),
        (torch.zeros(2, 1),) * 2,
    ):
        with pytest.raises(InputError, match="one score and one target per volume"):
            ScoredSet(scores, targets)


def test_a_reward_scores_a_set_by_class():
    volumes = tiny_phantoms(2)
    found = score_set_by(Brightness(), volumes, {"HGG": 0.25, "LGG": 0.75})
    torch.testing.assert_close(found.scores, volumes.pixel_values.flatten(1).float().mean(dim=1), atol=1e-3, rtol=1e-2)
    assert found.targets.tolist() == [
        0.25 if volumes.id2label[i] == "HGG" else 0.75 for i in volumes.class_labels.tolist()
    ]
    with pytest.raises(InputError, match="no target for class 'LGG'; its targets are of \\['HGG'\\]"):
        score_set_by(Brightness(), volumes, {"HGG": 0.25})
