"""Splits by subject, prepared volumes, and seeds."""

import pytest
import torch

from msrl_diffusers import VolumeDataset, split_by_subject
from msrl_diffusers.data.cases import Rejection
from msrl_diffusers.data.splits import SplitPlan, check_no_leak
from msrl_diffusers.errors import InputError
from msrl_diffusers.seeding import batch_indices, fold_seed, generator_for, sample_generators


def dataset(subjects_per_class=(20, 10), volumes_per_subject=3):
    subjects, labels = [], []
    for _ in range(volumes_per_subject):  # the volumes of a subject are not neighbours
        for label, count in enumerate(subjects_per_class):
            subjects += [f"{label}-{i}" for i in range(count)]
            labels += [label] * count
    values = torch.arange(len(subjects)).reshape(-1, 1, 1, 1, 1).expand(-1, 1, 2, 2, 2).half()
    return VolumeDataset(values, torch.tensor(labels), subjects, {0: "a", 1: "b"}, (1.0, 2.0, 3.0))


def test_no_subject_is_on_both_sides():
    volumes = dataset()
    train, heldout = split_by_subject(volumes, 0.3)
    assert not set(train.subject_ids) & set(heldout.subject_ids)
    assert len(train) + len(heldout) == len(volumes)
    assert set(train.subject_ids) | set(heldout.subject_ids) == set(volumes.subject_ids)
    assert heldout.class_counts() == {"a": 6 * 3, "b": 3 * 3}  # all volumes of a subject stay together
    for part in (train, heldout):  # labels and volumes still belong to their subjects
        assert all(subject[0] == str(label) for subject, label in zip(part.subject_ids, part.class_labels.tolist(),
                                                                      strict=True))  # fmt: skip
        places = part.pixel_values[:, 0, 0, 0, 0].int().tolist()
        assert [volumes.subject_ids[place] for place in places] == part.subject_ids


def test_split_is_a_function_of_the_seed():
    parts = [set(split_by_subject(dataset(), 0.3, seed)[1].subject_ids) for seed in (1, 1, 2)]
    assert parts[0] == parts[1] != parts[2]


def test_a_subject_with_volumes_of_two_classes_stays_on_one_side():
    volumes = dataset((4, 4), 2)
    mixed = VolumeDataset(volumes.pixel_values, volumes.class_labels,
                          [f"s{i % 8 // 2}{i % 2}" for i in range(16)], volumes.id2label, volumes.spacing)  # fmt: skip
    train, heldout = split_by_subject(mixed, 0.5)
    assert not set(train.subject_ids) & set(heldout.subject_ids)


def test_a_class_that_comes_first_for_nobody_goes_along():
    """Sessions before and after treatment: every subject has both classes, and counts for the first."""
    subjects = [f"s{number // 2}" for number in range(20)]
    values = torch.zeros(20, 1, 2, 2, 2, dtype=torch.float16)
    volumes = VolumeDataset(values, torch.tensor([0, 1] * 10), subjects, {0: "before", 1: "after"}, (1.0, 1.0, 1.0))
    train, heldout = split_by_subject(volumes, 0.3)
    assert train.class_counts() == {"before": 7, "after": 7}
    assert heldout.class_counts() == {"before": 3, "after": 3}


def test_too_few_subjects_raise():
    with pytest.raises(InputError, match="Class 'b' has 1 subjects, too few for a hold-out of 50%"):
        split_by_subject(dataset((6, 1)), 0.5)
    with pytest.raises(InputError, match=r"holdout_fraction must lie between 0 and 1, got 1\.5"):
        split_by_subject(dataset(), 1.5)


def test_the_data_set_s_own_split():
    subjects, labels = ["a", "b", "c", "d"], ["x", "y", "x", "y"]
    own = ["train", "train", "heldout", "heldout"]
    assert SplitPlan().sides(subjects, labels, own) == own
    drawn = SplitPlan(0.5).sides(subjects, labels, ["train"] * 4)  # which holds nothing out
    assert sorted(drawn) == ["heldout", "heldout", "train", "train"]
    with pytest.raises(InputError, match="1 of 4 volumes have no split of their own, that of subject 'b' first"):
        SplitPlan().sides(subjects, labels, ["train", None, "heldout", "heldout"])


@pytest.mark.parametrize(("left", "lost"), [("train", "heldout"), ("heldout", "train"), (None, "heldout")])
def test_what_is_lost_of_the_data_set_s_own_split_is_not_drawn(left, lost):
    subjects, labels, own = ["a", "b", "c", "d"], ["x", "y", "x", "y"], [left] * 4
    rejected = [Rejection("f.nii", "f.nii is missing.", "f"), Rejection("g.nii", "g.nii is missing.", "e", lost)]
    with pytest.raises(InputError, match=rf"no volume for '{lost}' can be used: .* The first: g\.nii is missing\."):
        SplitPlan(0.5).sides(subjects, labels, own, rejected)
    lists = SplitPlan(train_subjects=("a", "e"), heldout_subjects=("b", "f"))  # it needs no other
    assert lists.sides(subjects, labels, own, rejected) == ["train", "heldout", None, None]
    counts = SplitPlan(counts={"x": (1, 1), "y": (1, 1)})
    assert counts.sides(subjects, labels, own, rejected).count("heldout") == 2
    if left == "heldout":
        with pytest.raises(InputError, match="own split holds all volumes that can be used out of training"):
            SplitPlan(0.5).sides(subjects, labels, own, rejected[:1])
    else:
        drawn = SplitPlan(0.5).sides(subjects, labels, own, rejected[:1])
        assert sorted(drawn) == ["heldout", "heldout", "train", "train"]


def test_a_leak_raises():
    with pytest.raises(InputError, match="subjects are in the training set and in the hold-out, '0-0' first"):
        check_no_leak(dataset().subject_ids, dataset().subject_ids)


def test_save_and_load(tmp_path, phantoms):
    phantoms.save(tmp_path / "deep" / "volumes.safetensors")
    loaded = VolumeDataset.load(tmp_path / "deep" / "volumes.safetensors")
    assert torch.equal(loaded.pixel_values, phantoms.pixel_values)
    assert loaded.pixel_values.dtype == torch.float16
    assert torch.equal(loaded.class_labels, phantoms.class_labels)
    assert loaded.subject_ids == phantoms.subject_ids
    assert loaded.id2label == phantoms.id2label
    assert loaded.spacing == phantoms.spacing
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["volumes.safetensors"]


@pytest.mark.parametrize("content", [None, b"", b"no safetensors at all, but long enough to be read as a header"])
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "volumes.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"volumes\.safetensors can't be read as prepared volumes"):
        VolumeDataset.load(path)


def test_unequal_lengths_raise():
    with pytest.raises(InputError, match="2 volumes, 2 labels and 1 subject ids"):
        VolumeDataset(torch.zeros(2, 1, 2, 2, 2), torch.zeros(2), ["s"], {0: "a"}, (1.0, 1.0, 1.0))


def test_take_per_class_and_batch(phantoms):
    taken = phantoms.take_per_class(2)
    assert taken.class_counts() == {"HGG": 2, "LGG": 2}
    assert taken.subject_ids == ["phantom-HGG-00000", "phantom-HGG-00001", "phantom-LGG-00000", "phantom-LGG-00001"]
    assert phantoms.take_per_class(100).class_counts() == phantoms.class_counts()
    assert phantoms.take_per_class({0: 1, 1: 2}).class_counts() == {"HGG": 1, "LGG": 2}
    batch = phantoms.batch([3, 0])
    assert batch["subject_id"] == [phantoms.subject_ids[3], phantoms.subject_ids[0]]
    assert batch["pixel_values"].dtype == torch.float32
    assert torch.equal(batch["pixel_values"], phantoms.pixel_values[[3, 0]].float())
    assert batch["class_labels"].tolist() == [1, 0]
    assert phantoms.image_size == 16
    assert phantoms.num_classes == 2


@pytest.mark.parametrize(("num_items", "batch_size"), [(12, 4), (10, 4), (3, 8), (7, 7)])
def test_every_item_is_seen_once_per_epoch(num_items, batch_size):
    steps = num_items  # a whole number of epochs
    seen = torch.cat([batch_indices(num_items, batch_size, seed=0, step=step) for step in range(steps)])
    epochs = seen.reshape(-1, num_items)
    assert len(epochs) == batch_size
    assert all(torch.equal(epoch.sort().values, torch.arange(num_items)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_batches_are_a_function_of_seed_and_step():
    assert torch.equal(batch_indices(50, 8, 0, 3), batch_indices(50, 8, 0, 3))
    assert not torch.equal(batch_indices(50, 8, 0, 3), batch_indices(50, 8, 1, 3))


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_processes_share_one_batch(num_processes):
    batch = batch_indices(50, 8, seed=0, step=3)
    shards = [batch[rank::num_processes] for rank in range(num_processes)]  # as in TrainingRun.shard
    assert sorted(torch.cat(shards).tolist()) == sorted(batch_indices(50, 8, seed=0, step=3).tolist())


def test_seeds_are_stable_and_independent():
    assert fold_seed(0, "rollout", 7) == 199113886062862569
    assert (
        len({fold_seed(seed, *keys) for seed in (0, 1) for keys in ((), ("a",), ("b",), ("a", 1), ("a", "1"))}) == 10
    )
    assert all(0 <= fold_seed(seed, "x") < 2**63 for seed in range(100))


def test_samples_do_not_depend_on_their_batch():
    def noise(indices):
        return [torch.randn(4, generator=generator) for generator in sample_generators(0, "rollout", indices)]

    together, apart = noise(range(4)), noise([2])
    assert torch.equal(together[2], apart[0])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(torch.randn(4, generator=generator_for(0, "rollout", 2)), apart[0])
