import pytest
import torch
import torch.nn.functional as F
from launching import interrupted_when_saving
from monai.networks.nets.resnet import ResNetBlock, ResNetBottleneck
from tiny import copied, differing

from msrl_diffusers.data.volumes import VolumeDataset
from msrl_diffusers.errors import InputError
from msrl_diffusers.trainers.base import read_log
from msrl_diffusers.trainers.classifier_config import NETWORKS, ClassifierConfig
from msrl_diffusers.trainers.classifier_trainer import (
    ClassifierTrainer,
    balanced_indices,
    build_classifier,
    predict,
    random_crops,
)


def bright_halves(counts=(6, 6), seed=0, first_subject=0) -> VolumeDataset:
    """Noise with a bright upper half (class 0) or lower half (class 1), 8^3; left and right tell nothing."""
    labels = torch.tensor([0] * counts[0] + [1] * counts[1])
    volumes = 0.3 * torch.randn(len(labels), 1, 8, 8, 8, generator=torch.Generator().manual_seed(seed)) - 0.3
    for volume, label in zip(volumes, labels.tolist(), strict=True):
        volume[:, 4 * label : 4 * label + 4] += 0.6
    subjects = [f"s{first_subject + i}" for i in range(len(labels))]
    return VolumeDataset(volumes.clamp(-1, 1).half(), labels, subjects, {0: "upper", 1: "lower"}, (24.0, 24.0, 24.0))


def settings(output_dir, **changes) -> ClassifierConfig:
    fields = {
        "network": "resnet10", "widen_factor": 1 / 16, "max_steps": 4, "train_batch_size": 4, "max_shift": 1,
        "learning_rate": 3e-3, "logging_steps": 1, "report_to": "none", "output_dir": str(output_dir), **changes,
    }  # fmt: skip
    return ClassifierConfig(**fields)


def build(output_dir, data=None, validation=None, **changes) -> ClassifierTrainer:
    """A trainer of freshly built weights, always the same."""
    torch.manual_seed(0)
    model = build_classifier("resnet10", 1, 2, widen_factor=1 / 16)
    return ClassifierTrainer(model, settings(output_dir, **changes), data or bright_halves(), validation)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_channels_and_give_classes(name):
    model = build_classifier(name, 2, 3, widen_factor=1 / 32, conv1_t_stride=2).eval()
    assert model(torch.zeros(2, 2, 16, 16, 16)).shape == (2, 3)
    blocks = [part for part in model.modules() if isinstance(part, (ResNetBlock, ResNetBottleneck))]
    expected = {"resnet10": 4, "resnet18": 8, "resnet34": 16, "resnet50": 16}[name]
    assert len(blocks) == expected
    assert isinstance(blocks[0], ResNetBottleneck) == (name == "resnet50")
    assert model.conv1.stride == (2, 2, 2)
    assert model.conv1.out_channels == 2


def test_an_unknown_network_is_refused():
    with pytest.raises(InputError, match="no classifier 'resnet12'"):
        build_classifier("resnet12", 1, 2)


def test_batches_are_balanced_and_a_class_is_seen_in_epochs():
    labels = torch.tensor([0] * 9 + [1] * 3)
    batches = [balanced_indices(labels, 4, 0, step) for step in range(9)]
    assert all(labels[batch].tolist().count(1) == 2 for batch in batches)
    seen = torch.cat(batches)
    assert sorted(seen[seen < 9].tolist()) == sorted(2 * list(range(9)))
    assert sorted(seen[seen >= 9].tolist()) == sorted(6 * [9, 10, 11])
    assert torch.equal(balanced_indices(labels, 4, 0, 5), batches[5])
    assert not torch.equal(balanced_indices(labels, 4, 1, 5), batches[5])


def test_a_process_among_several_sees_all_classes():
    labels = torch.tensor([0, 1] * 8)
    shares = torch.stack([labels[balanced_indices(labels, 8, 0, step)][0::2] for step in range(20)]).float()
    assert 0.3 < shares.mean() < 0.7


def test_crops_are_shifts_that_let_background_in():
    volumes = torch.arange(1.0, 65.0).reshape(1, 1, 4, 4, 4).repeat(40, 1, 1, 1, 1)
    crops = random_crops(volumes, torch.Generator().manual_seed(0), 1)
    assert crops.shape == volumes.shape
    shifts = set()
    for crop in crops[:, 0]:
        value = crop[1, 1, 1]  # an inner voxel, inside at any shift of one
        place = torch.tensor([(value - 1) // 16, (value - 1) // 4 % 4, (value - 1) % 4]).long() - 1
        expected = F.pad(volumes[0, 0], [1] * 6, value=-1.0)
        d, h, w = (place + 1).tolist()
        assert torch.equal(crop, expected[d : d + 4, h : h + 4, w : w + 4])
        shifts.add(tuple(place.tolist()))
    assert len(shifts) > 10
    assert {shift[axis] for shift in shifts for axis in range(3)} == {-1, 0, 1}
    assert torch.equal(random_crops(volumes, torch.Generator().manual_seed(0), 1), crops)
    assert random_crops(volumes, torch.Generator(), 0) is volumes


@pytest.mark.parametrize("flips", [True, False])
def test_flips_are_left_to_right_and_can_be_switched_off(flips, tmp_path):
    trainer = build(tmp_path, max_shift=0, flips=flips)
    volumes = trainer.train_dataset.batch(range(12))["pixel_values"]
    augmented = trainer._augment(volumes, 0, 0)
    same = [torch.equal(one, other) for one, other in zip(augmented, volumes, strict=True)]
    mirrored = [torch.equal(one, other.flip(-1)) for one, other in zip(augmented, volumes, strict=True)]
    assert all(one != other for one, other in zip(same, mirrored, strict=True))
    assert 0 < sum(mirrored) < 12 if flips else all(same)


def test_it_learns_separable_classes(tmp_path):
    heldout = bright_halves(seed=1, first_subject=100)
    trainer = build(tmp_path, bright_halves((12, 4)), heldout, max_steps=30)
    before = trainer.evaluate()
    figures = trainer.train()
    assert before["validation_accuracy"] < 0.8
    assert figures["validation_accuracy"] == 1
    assert figures["validation_auc"] == 1
    assert figures["train_f1"] == 1
    log = read_log(tmp_path)
    assert len(log) == 30
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert not trainer.model.training


def test_training_is_a_function_of_the_seed(tmp_path):
    trainers = [build(tmp_path / str(i), max_steps=2, seed=seed) for i, seed in enumerate((0, 0, 1))]
    before = copied(trainers[0].model)
    figures = [trainer.train() for trainer in trainers]
    one, same, other = (copied(trainer.model) for trainer in trainers)
    assert differing(one, same) == []
    assert figures[0] == figures[1]
    assert differing(one, other)
    assert set(differing(before, one)) == set(before)


def test_resume_is_exact(tmp_path):
    whole = build(tmp_path / "whole")
    figures = whole.train()
    with interrupted_when_saving():
        build(tmp_path / "parts", save_steps=2).train()
    resumed = build(tmp_path / "parts", save_steps=2, resume_from_checkpoint="latest")
    assert resumed.train() == figures
    assert differing(copied(whole.model), copied(resumed.model)) == []
    histories = [[(line["step"], line["loss"]) for line in read_log(tmp_path / name)] for name in ("whole", "parts")]
    assert histories[0] == histories[1]
    assert len(histories[0]) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="about CPUs")
def test_a_cpu_trains_in_float32_whatever_is_asked_for(tmp_path):
    one, other = (build(tmp_path / precision, mixed_precision=precision) for precision in ("no", "bf16"))
    assert one.train() == other.train()
    assert differing(copied(one.model), copied(other.model)) == []


def test_label_smoothing_is_that_of_the_loss(tmp_path):
    logged = {}
    for smoothing in (0.0, 0.4):
        trainer = build(tmp_path / str(smoothing), max_steps=1, max_shift=0, flips=False, label_smoothing=smoothing)
        batch = trainer.train_dataset.batch(balanced_indices(trainer.train_dataset.class_labels, 4, 0, 0))
        log_probs = trainer.model.train()(batch["pixel_values"]).log_softmax(dim=1)
        right = log_probs.gather(1, batch["class_labels"][:, None]).mean()
        trainer = build(tmp_path / str(smoothing), max_steps=1, max_shift=0, flips=False, label_smoothing=smoothing)
        trainer.train()
        logged[smoothing] = read_log(tmp_path / str(smoothing))[0]["loss"]
        expected = -(1 - smoothing) * right - smoothing * log_probs.mean()
        assert logged[smoothing] == pytest.approx(expected.item(), rel=1e-4)
    assert logged[0.0] != logged[0.4]


def test_probabilities_do_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    model = build_classifier("resnet10", 1, 3, widen_factor=1 / 16).train()
    volumes = bright_halves().pixel_values
    probabilities = predict(model, volumes, batch_size=5)
    assert probabilities.shape == (12, 3)
    assert probabilities.dtype == torch.float64
    assert not model.training
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(predict(model, volumes), probabilities, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        expected = model(volumes.float()).double().softmax(dim=1)
    torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=1e-5)


def test_a_diverged_classifier_is_not_scored():
    model = build_classifier("resnet10", 1, 2, widen_factor=1 / 16)
    torch.nn.init.constant_(model.fc.bias, float("nan"))
    with pytest.raises(InputError, match="lower learning_rate"):
        predict(model, torch.zeros(1, 1, 8, 8, 8))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"network": "resnet101"}, "network must be one of"),
        ({"widen_factor": 0.001}, "widen_factor must be 1/64"),
        ({"widen_factor": float("nan")}, "widen_factor must be 1/64"),
        ({"stem_stride": 0}, "stem_stride must be positive"),
        ({"pretrain_steps": 0}, "pretrain_steps must be positive"),
        ({"max_shift": -1}, "max_shift must be 0 or more"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
        ({"validation_fraction": -0.1}, r"validation_fraction must lie in \[0, 1\)"),
        ({"flips": 1}, "flips must be bool"),
        ({"pretrain_steps": 2.5}, "pretrain_steps must be int or NoneType"),
    ],
)
def test_bad_settings_are_refused(change, sentence):
    with pytest.raises(InputError, match=sentence):
        settings("unused", **change)


def test_data_it_can_not_learn_from_is_refused(tmp_path):
    with pytest.raises(InputError, match="training set of the classifier has no volume of class 'lower'"):
        build(tmp_path, bright_halves((4, 0)))
    with pytest.raises(InputError, match="validation set of the classifier has no volume of class 'upper'"):
        build(tmp_path, validation=bright_halves((0, 4), first_subject=50))
    with pytest.raises(InputError, match="2 subjects are in training and validation, 's10' first"):
        build(tmp_path, validation=bright_halves(first_subject=10))
    with pytest.raises(InputError, match="max_shift=5 is more than half the 8 voxels"):
        build(tmp_path, max_shift=5)
