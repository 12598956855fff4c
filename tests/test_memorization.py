"""The audit finds planted copies, leaves honest volumes alone, and says what its threshold means."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from msrl_diffusers import SliceFeatureExtractor, VolumeDataset, load_phantoms
from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.memorization import Auditor, audit, tolerance_threshold
from msrl_diffusers.evaluation.neighbours import FeatureSpace, VoxelSpace
from msrl_diffusers.evaluation.sources import open_source


EXTRACTOR = Path(__file__).parents[1] / "model_cards" / "phantoms-32" / "extractor_label"


def source_of(volumes, prefix):
    """A source of `volumes [N, C, D, H, W]` named by a prefix and their position."""
    labels = torch.zeros(len(volumes), dtype=torch.long)
    names = [f"{prefix}{row}" for row in range(len(volumes))]
    return open_source(VolumeDataset(volumes.half(), labels, names, {0: "any"}, (6.0, 6.0, 6.0)))


def shifted(volume, z, y, x):
    """The volume moved by so many voxels, with background where nothing came from."""
    edge = volume.shape[-1]
    padded = F.pad(volume, (2,) * 6, value=-1.0)
    return padded[:, 2 - z : 2 - z + edge, 2 - y : 2 - y + edge, 2 - x : 2 - x + edge]


def blurred(volumes):
    return F.avg_pool3d(F.pad(volumes, (2,) * 6, mode="replicate"), 5, stride=1)


def planted_copies(train):
    """Five copies each: exact, mirrored, noisy, shifted; of training volumes 0 to 19."""
    noise = torch.randn(5, *train.shape[1:], generator=torch.Generator().manual_seed(0))
    moves = [(1, 0, 0), (0, 2, 0), (0, 0, -1), (-1, 1, 2), (2, -2, -2)]
    return torch.cat(
        [
            train[0:5],
            train[5:10].flip(-1),
            (train[10:15] + 0.05 * noise).clamp(-1, 1),
            torch.stack([shifted(volume, *move) for volume, move in zip(train[15:20], moves, strict=True)]),
        ]
    )


@pytest.fixture(scope="module")
def small():
    """60 training, 40 new and 60 held-out phantoms of 16^3."""
    sizes = [(30, 0), (20, 1000), (30, 2000)]  # per class, and the first index
    return [load_phantoms(count, 16, first_index=first).pixel_values.float() for count, first in sizes]


def test_planted_copies_are_found_and_honest_volumes_are_not_flagged():
    train = load_phantoms(100, 32).pixel_values.float()
    honest = load_phantoms(100, 32, first_index=1000).pixel_values.float()
    held_out = load_phantoms(60, 32, first_index=2000).pixel_values.float()
    generated = torch.cat([planted_copies(train), honest])
    result = audit(source_of(train, "train"), source_of(generated, "made"), source_of(held_out, "new"))
    flagged = {pair.index for pair in result.copies}
    assert flagged >= set(range(20))
    assert len(flagged - set(range(20))) <= 0.05 * len(honest)
    found = sorted((pair for pair in result.pairs if pair.index < 20), key=lambda pair: pair.index)
    assert [pair.nearest for pair in found] == [f"train{row}" for row in range(20)]
    assert [pair.flipped for pair in found] == [5 <= row < 10 for row in range(20)]
    assert max(pair.score for pair in found) < 0.5 * result.spaces["voxel"].threshold.value
    assert max(pair.distance for pair in found[:10]) < 0.01


def test_both_spaces(small):
    train, honest, held_out = small
    mean = train.mean(dim=0, keepdim=True)
    generated = torch.cat([planted_copies(train), mean, blurred(mean), blurred(honest[:3]), honest])
    extractor = SliceFeatureExtractor.from_pretrained(EXTRACTOR)
    sources = source_of(train, "train"), source_of(generated, "made"), source_of(held_out, "new")
    result = audit(*sources, extractor, batch_size=7)
    assert set(result.spaces) == {"voxel", "feature"}
    flagged = {pair.index for pair in result.copies}
    assert flagged >= set(range(20))
    assert not flagged & set(range(20, 25))  # neither the mean nor what is blurred is a copy
    assert len(flagged - set(range(25))) <= 0.05 * len(honest)
    by_features = result.spaces["feature"].generated
    assert by_features.nearest[:10].tolist() == list(range(10))
    assert by_features.flipped[:10].tolist() == [False] * 5 + [True] * 5
    assert by_features.scores[:10].max() < 0.01
    assert by_features.scores[20:].max() <= 1
    rates = [space.threshold.expected_rate for space in result.spaces.values()]
    assert result.expected_rate == pytest.approx(sum(rates))
    again = audit(*sources, extractor, batch_size=16)
    assert [pair.index for pair in again.copies] == [pair.index for pair in result.copies]


def test_one_auditor_for_several_sets(small):
    train, honest, held_out = small
    auditor = Auditor(source_of(train, "train"), source_of(held_out, "new"))
    for generated in (planted_copies(train), honest):
        alone = audit(source_of(train, "train"), source_of(generated, "made"), source_of(held_out, "new"))
        assert auditor.audit(source_of(generated, "made")).summary() == alone.summary()


def test_a_mean_like_volume_is_near_to_all_but_no_copy(small):
    train, _, held_out = small
    mean = train.mean(dim=0, keepdim=True)
    distance_to_train = [(volume - train).flatten(1).norm(dim=1).min() for volume in (mean, held_out[:1])]
    assert distance_to_train[0] < distance_to_train[1]  # so plain distances would flag it first
    towards_the_mean = (mean + train[3:4]) / 2
    generated = source_of(torch.cat([mean, blurred(mean), towards_the_mean]), "made")
    result = audit(source_of(train, "train"), generated, source_of(held_out, "new"))
    assert [(pair.index, pair.nearest) for pair in result.copies] == [(2, "train3")]


def test_leave_one_out_is_the_null_without_held_out_volumes(small):
    train, honest, _ = small
    doubled = torch.cat([train, train[:1].flip(-1)])
    generated = source_of(torch.cat([train[30:32], honest]), "made")
    result = audit(source_of(doubled, "train"), generated, max_null=1000)
    assert result.null == "leave_one_out"
    assert result.duplicates == [("train0", "train60"), ("train60", "train0")]
    null = result.spaces["voxel"].null
    assert len(null.scores) == 59
    assert not (null.nearest == torch.arange(1, 60)).any()
    assert null.scores.min() > 0.5
    assert {pair.generated for pair in result.copies} >= {"made0", "made1"}
    fewer = [audit(source_of(train, "train"), generated, max_null=20, seed=seed) for seed in (0, 0, 1)]
    scores = [run.spaces["voxel"].null.scores for run in fewer]
    assert len(scores[0]) == 20
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_held_out_volumes_that_were_trained_on_are_left_out_of_the_null(small):
    train, honest, held_out = small
    leaky = torch.cat([held_out[:20], train[7:8]])
    sources = source_of(train, "train"), source_of(honest, "made")
    clean = audit(*sources, source_of(held_out[:20], "new"))
    leaked = audit(*sources, source_of(leaky, "new"))
    assert leaked.duplicates == [("new20", "train7")]
    assert leaked.spaces["voxel"].threshold == clean.spaces["voxel"].threshold
    with pytest.raises(InputError, match=r"^Only 0 of 60 volumes that should set the threshold are not themselves"):
        audit(*sources, source_of(train, "same"))


def test_brightness_contrast_channels_and_shape_do_not_matter(small):
    train, _, _ = small
    two = torch.cat([train[:30], 0.5 * train[30:]], dim=1)[:, :, 2:, :, 1:]
    assert two.shape[1:] == (2, 14, 16, 15)
    space = VoxelSpace(two.half(), neighbours=5, max_shift=1)
    query = two[4:6].clone()
    query[:, 1] = 0.7 * query[:, 1] + 0.2
    found = space.search(query.half())
    assert found.nearest.tolist() == [4, 5]
    assert found.scores.max() < 0.02
    flat = VoxelSpace(train[:, :, 7:8].half(), neighbours=5, max_shift=2)  # one slice has nowhere to move along D
    assert flat.search(train[8:9, :, 7:8].flip(-1).half()).flipped.tolist() == [True]


def test_a_search_knows_shifts_up_to_its_limit(small):
    train = small[0]
    moved = torch.stack([torch.roll(train[row], (2, -2, 1), (1, 2, 3)) for row in range(3)]).half()
    distances = {shift: VoxelSpace(train.half(), 5, shift).search(moved).distances.max().item() for shift in (0, 1, 2)}
    assert distances[2] < 0.01 < 0.3 < min(distances[0], distances[1])


@pytest.mark.parametrize("leave_out", [False, True])
def test_features_are_searched_block_by_block(leave_out):
    """Against all distances at once, of more queries than a block holds."""
    generator = torch.Generator().manual_seed(0)
    references, *queries = (torch.randn(count, 2, 3, 2, generator=generator) for count in (40, 1500, 1500))
    own = torch.randint(40, (1500,), generator=generator) if leave_out else None
    found = FeatureSpace(references, 5).search(*queries, own)
    mean, deviation = references.flatten(1).mean(dim=0), references.flatten(1).std(dim=0)
    directions = [F.normalize((part.flatten(1) - mean) / deviation) for part in (references, *queries)]
    distances = torch.stack([(1 - part @ directions[0].T).sqrt() for part in directions[1:]])
    if leave_out:
        distances[:, torch.arange(1500), own] = torch.inf
    ordered, order = distances.amin(dim=0).sort(dim=1)
    torch.testing.assert_close(found.distances, ordered[:, 0])
    torch.testing.assert_close(found.scores, ordered[:, 0] / ordered[:, 4])
    assert torch.equal(found.nearest, order[:, 0])
    assert torch.equal(found.flipped, distances[:, torch.arange(1500), order[:, 0]].argmin(dim=0).bool())


def test_what_hardly_varies_outweighs_nothing():
    """Of rectified features many are zero in all training volumes, and nearly zero in a copy that is not bit-equal."""
    generator = torch.Generator().manual_seed(0)
    train, others = torch.randn(60, 1, 1, 40, generator=generator), torch.randn(20, 1, 1, 40, generator=generator)
    copies = train[:20] + 0.1 * torch.randn(20, 1, 1, 40, generator=generator)
    train, copies, others = (F.pad(part, (0, 40)) for part in (train, copies, others))
    for part in (copies, others):
        part[..., 40:] = 1e-3 * torch.randn(20, 1, 1, 40, generator=generator).relu()
    space = FeatureSpace(train, 5)
    found = space.search(copies, copies)
    assert found.nearest.tolist() == list(range(20))
    assert found.scores.max() < 0.5 < space.search(others, others).scores.min()


def test_large_volumes_are_averaged_down():
    large = load_phantoms(6, 40).pixel_values.float()
    result = audit(source_of(large, "train"), source_of(large[3:5].flip(-1), "made"))
    assert result.neighbours == 10
    assert [
        (pair.index, pair.nearest, pair.flipped) for pair in sorted(result.pairs, key=lambda pair: pair.index)
    ] == [
        (0, "train3", True),
        (1, "train4", True),
    ]
    assert max(pair.distance for pair in result.pairs) < 0.01


def test_threshold_is_a_wilks_order_statistic():
    scores = torch.linspace(0, 1, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    threshold = tolerance_threshold(scores)
    assert stats.beta.cdf(0.025, 2, 199) >= 0.95 > stats.beta.cdf(0.025, 3, 198)  # coverage of order statistics
    assert threshold.value == pytest.approx(scores.sort().values[1].item())
    assert threshold.expected_rate == pytest.approx(2 / 201)
    assert "score 2 from below of the null's 200" in threshold.rule
    assert "order" not in tolerance_threshold(scores[:119]).rule
    assert tolerance_threshold(scores[:119]).expected_rate == pytest.approx(1 / 120)  # ln 0.05 / ln 0.975 = 118.3
    assert "normal tolerance bound" in tolerance_threshold(scores[:118]).rule


@pytest.mark.parametrize(("n", "stated"), [(10, 0.025), (30, 0.025), (150, 1 / 151)])
def test_a_threshold_keeps_its_promise(n, stated):
    """In at least 95 % of repetitions at most 2.5 % of the distribution lies below; the mean share is as stated."""
    generator = torch.Generator().manual_seed(n)
    thresholds = [tolerance_threshold((2 + 0.4 * torch.randn(n, generator=generator)).sigmoid()) for _ in range(300)]
    shares = stats.norm.cdf([(torch.tensor(threshold.value).logit().item() - 2) / 0.4 for threshold in thresholds])
    kept = int((shares <= 0.025).sum())
    assert stats.binomtest(kept, 300, 0.95, alternative="less").pvalue > 0.01
    assert thresholds[0].expected_rate == pytest.approx(stated)
    assert 0.001 < shares.mean() <= 1.2 * stated


def test_a_threshold_never_exceeds_the_smallest_score_of_few():
    scores = torch.tensor([0.9] * 9 + [0.89])
    assert tolerance_threshold(scores).value <= 0.89
    assert 0 < tolerance_threshold(torch.linspace(0, 1, 10)).value < 0.01


def test_summary_is_plain_and_complete(small):
    train, honest, held_out = small
    generated = torch.cat([train[:2], train[:1].flip(-1), honest[:7]])
    result = audit(source_of(train, "train"), source_of(generated, "made"), source_of(held_out, "new"))
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert (summary["n_generated"], summary["n_train"], summary["n_copies"], summary["n_train_copied"]) == (
        10,
        60,
        3,
        2,
    )
    assert summary["share"] == 0.3
    tail = 0.025  # Clopper and Pearson's own definition
    low, high = stats.beta.ppf(tail, 3, 8), stats.beta.ppf(1 - tail, 4, 7)
    assert summary["interval"] == pytest.approx([low, high])
    assert summary["copies"] == [asdict(pair) for pair in result.copies]
    assert {copy["generated"]: (copy["nearest"], copy["flipped"]) for copy in summary["copies"]} == {
        "made0": ("train0", False), "made1": ("train1", False), "made2": ("train0", True)
    }  # fmt: skip
    assert summary["threshold"] == summary["spaces"]["voxel"]["threshold"]
    assert all(copy["score"] < summary["threshold"] for copy in summary["copies"])
    assert summary["null"] == {"kind": "held_out", "n": 60, "duplicates": []}
    quantiles = summary["spaces"]["voxel"]["score_quantiles"]
    assert list(quantiles["null"].values()) == sorted(quantiles["null"].values())
    assert quantiles["generated"]["0"] < 0.01 < quantiles["null"]["0"]
    scores = [pair.score for pair in result.pairs]
    assert scores == sorted(scores)
    assert set(summary["fingerprints"]) == {"train", "generated", "null"}


@pytest.mark.parametrize(
    ("counts", "settings", "message"),
    [
        ((9, 5, None), {}, "^the given VolumeDataset holds 9 training volumes, .* needs at least 10"),
        ((12, 5, 9), {}, "holds 9 held-out volumes, too few for a threshold; give at least 10, or none"),
        ((12, 0, None), {}, "holds no generated volumes"),
        ((12, 5, None), {"neighbours": 1}, "neighbours=1 must be at least 2"),
        ((12, 5, None), {"max_null": 9}, "max_null=9 at least 10"),
    ],
)
def test_too_little_is_said_in_one_sentence(small, counts, settings, message):
    train, honest, held_out = small
    sources = [source_of(train, "train"), source_of(honest, "made"), source_of(held_out, "new")]
    chosen = [
        None if count is None else source.select(range(count)) for source, count in zip(sources, counts, strict=True)
    ]
    with pytest.raises(InputError, match=message):
        audit(*chosen, **settings)


def test_sets_of_unequal_shape_are_refused(small):
    train, honest, held_out = small
    with pytest.raises(InputError, match="16 x 16 x 16 and 15 x 16 x 16 voxels"):
        audit(source_of(train, "train"), source_of(honest[:, :, 1:], "made"))
    with pytest.raises(InputError, match="16 x 16 x 16 and 16 x 16 x 15 voxels"):
        audit(source_of(train, "train"), source_of(honest, "made"), source_of(held_out[..., 1:], "new"))
