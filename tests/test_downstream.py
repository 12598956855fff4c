"""Metrics and intervals by hand; the study of tiny classifiers, whole, killed and changed."""

import dataclasses
import json

import pytest
import torch
from test_classifier import bright_halves, settings
from tiny import copied, differing

from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.downstream import (
    METRICS,
    bootstrap_metrics,
    bootstrap_rows,
    classification_metrics,
    compare_arms,
)
from msrl_diffusers.study.downstream import run_downstream
from msrl_diffusers.trainers.base import TrainingRun, read_log
from msrl_diffusers.trainers.classifier_trainer import ClassifierTrainer


SEEDS = (0, 1, 2)


def of_class_one(*probabilities) -> torch.Tensor:
    """Probabilities `[N, 2]`."""
    second = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([1 - second, second], dim=1)


def test_metrics_of_two_classes_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1])
    metrics = classification_metrics(of_class_one(0.1, 0.2, 0.7, 0.6, 0.9), labels)
    assert metrics["accuracy"] == pytest.approx(4 / 5)
    assert metrics["f1"] == pytest.approx((2 * 2 / (2 * 2 + 0 + 1) + 2 * 2 / (2 * 2 + 1 + 0)) / 2)
    assert metrics["auc"] == pytest.approx(5 / 6)  # of six pairs, (0.7, 0.6) stands wrong
    assert all(type(value) is float for value in metrics.values())


def test_metrics_of_three_classes_by_hand():
    labels = torch.tensor([0, 1, 2, 2])
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7], [0.3, 0.45, 0.25]])
    metrics = classification_metrics(probabilities, labels)
    assert metrics["accuracy"] == pytest.approx(1 / 2)
    assert metrics["f1"] == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert metrics["auc"] == pytest.approx((3 / 3 + 2 / 3 + 4 / 4) / 3)


def test_a_class_without_volumes_has_no_metrics():
    with pytest.raises(InputError, match="Class 1 has no volume"):
        classification_metrics(of_class_one(0.1, 0.2), torch.tensor([0, 0]))


def test_a_draw_keeps_subjects_whole_and_classes_in_number():
    labels = torch.tensor([0, 0, 1, 1, 1, 0])
    subjects = ["a", "a", "b", "b", "c", "d"]
    generator = torch.Generator().manual_seed(0)
    draws = [bootstrap_rows(labels, subjects, generator).tolist() for _ in range(50)]
    for rows in draws:
        assert rows.count(0) == rows.count(1)
        assert rows.count(2) == rows.count(3)
        assert rows.count(0) + rows.count(5) == 2  # two subjects of class 0: a, d
        assert rows.count(2) + rows.count(4) == 2
    assert len({tuple(rows) for rows in draws}) == 16  # 2^2 ordered draws within each class


def test_a_subject_of_two_classes_is_drawn_as_one():
    labels = torch.tensor([0, 1, 0, 1])
    for seed in range(10):
        rows = bootstrap_rows(labels, ["a", "a", "b", "c"], torch.Generator().manual_seed(seed)).tolist()
        assert sorted(rows) == [0, 1, 2, 3]


def test_replicates_have_the_variance_of_a_stratified_share():
    labels = torch.tensor([0] * 20 + [1] * 10)
    right = torch.tensor([1] * 15 + [0] * 5 + [1] * 6 + [0] * 4)
    predicted = torch.where(right == 1, labels, 1 - labels)
    runs = of_class_one(*predicted.tolist())[None].repeat(3, 1, 1)
    replicates = bootstrap_metrics({"arm": runs}, labels, [f"s{i}" for i in range(30)], draws=300)["arm"]["accuracy"]
    variance = (20**2 * 0.75 * 0.25 / 20 + 10**2 * 0.6 * 0.4 / 10) / 30**2
    assert replicates.mean().item() == pytest.approx(21 / 30, abs=0.01)
    assert replicates.std().item() == pytest.approx(variance**0.5, rel=0.12)


def test_replicates_have_the_variance_of_the_seeds():
    labels = torch.tensor([0, 1])
    right, wrong = of_class_one(0, 1), of_class_one(1, 0)
    runs = torch.stack([right, wrong, wrong])
    replicates = bootstrap_metrics({"arm": runs}, labels, ["a", "b"], draws=300)["arm"]["accuracy"]
    assert replicates.mean().item() == pytest.approx(1 / 3, abs=0.04)
    assert replicates.std().item() == pytest.approx((1 / 3 * 2 / 3 / 3) ** 0.5, rel=0.1)


def test_arms_are_compared_as_pairs():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1] * 15)
    noise = torch.rand(3, 30, generator=generator, dtype=torch.float64)
    good = 0.5 * noise + 0.5 * labels
    arms = {"plain": noise, "copy": noise.clone(), "good": good}
    arms = {name: torch.stack([1 - values, values], dim=2) for name, values in arms.items()}
    result = compare_arms(arms, labels, [f"s{i}" for i in range(30)], draws=60)
    assert json.loads(json.dumps(result)) == result
    assert list(result["differences"]) == ["copy", "good"]
    assert list(result["differences"]["good"]) == ["plain", "copy"]
    for metric in METRICS:
        by_seed = [classification_metrics(run, labels)[metric] for run in arms["good"]]
        figures = result["arms"]["good"][metric]
        assert figures["by_seed"] == by_seed
        assert figures["mean"] == pytest.approx(sum(by_seed) / 3)
        assert figures["std"] == pytest.approx(torch.tensor(by_seed).std().item(), abs=1e-6)
        assert result["differences"]["copy"]["plain"][metric] == {"mean": 0, "interval": [0, 0], "by_seed": [0, 0, 0]}
        gain = result["differences"]["good"]["plain"][metric]
        assert gain["mean"] == pytest.approx(figures["mean"] - result["arms"]["plain"][metric]["mean"])
        assert gain["interval"][0] < gain["mean"] < gain["interval"][1]
    assert result["arms"]["good"]["auc"]["mean"] == pytest.approx(1)
    assert result["arms"]["good"]["auc"]["interval"] == pytest.approx([1, 1])
    assert result["differences"]["good"]["plain"]["auc"]["interval"][0] > 0.2
    narrow = compare_arms(arms, labels, [f"s{i}" for i in range(30)], draws=60, level=0.5)["arms"]["plain"]["auc"]
    wide = result["arms"]["plain"]["auc"]["interval"]
    assert wide[0] < narrow["interval"][0] < narrow["interval"][1] < wide[1]


def config(**changes):
    return settings("unused", **{"max_steps": 3, "pretrain_steps": 4, "logging_steps": 1, "save_steps": 1, **changes})


def real_and_arms():
    """Real training and test volumes; synthetic ones under the ids of the training volumes they were made from."""
    arms = {"+ standard synthetic": bright_halves((4, 5), seed=3), "real only": None}
    arms["+ RL synthetic"] = bright_halves((6, 6), seed=4)
    return bright_halves((8, 4), seed=1), bright_halves((5, 5), seed=2, first_subject=100), arms


class Watch:
    """Records every training of a classifier: its settings, data, and weights before and after."""

    def __init__(self, patch):
        self.trainings = []
        train = ClassifierTrainer.train

        def watched(trainer):
            before = copied(trainer.model)
            record = {"args": trainer.args, "data": trainer.train_dataset, "before": before}
            self.trainings.append(record)
            figures = train(trainer)
            record["after"] = copied(trainer.model)
            return figures

        patch.setattr(ClassifierTrainer, "train", watched)

    def of(self, arm: str, seed: int, phase: str) -> dict:
        (found,) = [t for t in self.trainings if t["args"].output_dir.endswith(f"{arm}/seed-{seed}/{phase}")]
        return found


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a finished study, what it returned, and its trainings."""
    folder = tmp_path_factory.mktemp("downstream")
    train, test, arms = real_and_arms()
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        result = run_downstream(train, test, arms, config(), SEEDS, folder, bootstrap_draws=8)
    return folder, result, watch


def test_the_result_is_what_the_predictions_say(study):
    folder, result, _ = study
    assert json.loads((folder / "downstream.json").read_text()) == result
    assert result["reference"] == "real only"
    assert list(result["arms"]) == ["real only", "+ standard synthetic", "+ RL synthetic"]
    assert set(result["differences"]["+ RL synthetic"]) == {"real only", "+ standard synthetic"}
    _, test, _ = real_and_arms()
    for arm, paths in result["results"].items():
        for seed, path in zip(SEEDS, paths, strict=True):
            saved = json.loads((folder / path).read_text())
            assert saved["seed"] == seed
            assert saved["subject_ids"] == test.subject_ids
            assert saved["labels"] == test.class_labels.tolist()
            metrics = classification_metrics(torch.tensor(saved["probabilities"]), torch.tensor(saved["labels"]))
            assert metrics == saved["metrics"]
            for metric in METRICS:
                assert result["arms"][arm][metric]["by_seed"][seed] == metrics[metric]
            assert set(saved["training"]) == ({"training"} if arm == "real only" else {"pretraining", "training"})
    assert not any(subject in (folder / "downstream.json").read_text() for subject in test.subject_ids)


def test_it_states_its_protocol(study):
    _, result, _ = study
    assert result["protocol"]["settings"] == {
        **result["protocol"]["settings"],
        "network": "resnet10", "pretrain_steps": 4, "max_steps": 3, "seeds": [0, 1, 2], "bootstrap_draws": 8,
    }  # fmt: skip
    assert result["n"] == {
        "train": {"upper": 8, "lower": 4},
        "test": {"upper": 5, "lower": 5},
        "test_subjects": 10,
        "synthetic": {
            "real only": None,
            "+ standard synthetic": {"upper": 4, "lower": 5},
            "+ RL synthetic": {"upper": 6, "lower": 6},
        },
    }


def test_arms_of_a_seed_share_initial_weights_and_the_order_of_real_data(study):
    _, _, watch = study
    for seed in SEEDS:
        initial = watch.of("real_only", seed, "training")["before"]
        fine_tunings = [watch.of("real_only", seed, "training")]
        for arm in ("standard_synthetic", "rl_synthetic"):
            pretraining, training = (watch.of(arm, seed, phase) for phase in ("pretraining", "training"))
            assert differing(pretraining["before"], initial) == []
            assert differing(pretraining["after"], training["before"]) == []
            assert differing(training["before"], initial)
            fine_tunings.append(training)
        for training in fine_tunings:
            assert training["args"].max_steps == 3
            assert training["args"].seed == fine_tunings[0]["args"].seed
            assert torch.equal(training["data"].pixel_values, fine_tunings[0]["data"].pixel_values)
    weights = [watch.of("real_only", seed, "training")["before"] for seed in SEEDS]
    assert differing(weights[0], weights[1])
    assert len({training["args"].seed for training in watch.trainings}) == 2 * len(SEEDS)


def test_no_heldout_subject_is_trained_on(study):
    _, _, watch = study
    heldout = set(real_and_arms()[1].subject_ids)
    assert len(watch.trainings) == 5 * len(SEEDS)
    assert not any(heldout & set(training["data"].subject_ids) for training in watch.trainings)


def test_nothing_large_stays(study):
    folder, _, _ = study
    assert list(folder.rglob("*.safetensors")) == []
    assert len(read_log(folder / "rl_synthetic" / "seed-1" / "pretraining")) == 4


def test_a_study_killed_at_any_place_ends_with_the_same_result(study, tmp_path):
    _, expected, _ = study
    train, test, arms = real_and_arms()
    save_checkpoint, saves, deaths = TrainingRun.save_checkpoint, 0, 0

    def save_and_die(run):
        nonlocal saves
        save_checkpoint(run)
        saves += 1
        if saves in (2, 5, 7, 9, 12):  # within real only, then its first arm's pretraining, its end, within training
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "save_checkpoint", save_and_die)
        while True:
            watch = Watch(patch)
            try:
                result = run_downstream(train, test, arms, config(), SEEDS, tmp_path, bootstrap_draws=8)
                break
            except KeyboardInterrupt:
                deaths += 1
                mark = (tmp_path / "real_only" / "seed-0" / "result.json").stat().st_mtime_ns if deaths > 1 else None
    assert deaths == 5
    assert result == expected
    assert (tmp_path / "real_only" / "seed-0" / "result.json").stat().st_mtime_ns == mark
    assert not any("real_only/seed-0" in training["args"].output_dir for training in watch.trainings)
    assert saves == len(SEEDS) * (3 + 2 * (4 + 3))  # no step was taken twice


def test_only_what_changed_is_trained_again(study, tmp_path):
    _, expected, _ = study
    train, test, arms = real_and_arms()

    def trained(arms, seeds=SEEDS, **changes):
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(patch)
            result = run_downstream(train, test, arms, config(**changes), seeds, tmp_path, bootstrap_draws=8)
        folders = {tuple(training["args"].output_dir.split("/")[-3:-1]) for training in watch.trainings}
        return result, folders

    reference = {"real only": None}
    _, folders = trained(reference)
    assert folders == {("real_only", f"seed-{seed}") for seed in SEEDS}
    result, folders = trained(arms)
    assert folders == {(arm, f"seed-{s}") for arm in ("standard_synthetic", "rl_synthetic") for s in SEEDS}
    assert result == expected
    result, folders = trained(arms, logging_steps=2, save_steps=0, seed=5)
    assert folders == set()
    assert result["arms"]["real only"]["auc"]["by_seed"] == expected["arms"]["real only"]["auc"]["by_seed"]
    _, folders = trained(arms, pretrain_steps=1)
    assert {arm for arm, _ in folders} == {"standard_synthetic", "rl_synthetic"}
    _, folders = trained({**reference, "+ RL synthetic": bright_halves(seed=9)}, pretrain_steps=1)
    assert {arm for arm, _ in folders} == {"rl_synthetic"}
    _, folders = trained(reference, max_steps=1)
    assert folders == {("real_only", f"seed-{seed}") for seed in SEEDS}
    _, folders = trained(reference, seeds=(0, 1, 3), max_steps=1)
    assert folders == {("real_only", "seed-3")}


def test_what_another_run_has_trained_is_taken_over(study, tmp_path):
    _, expected, _ = study
    train, test, arms = real_and_arms()
    known = tmp_path / "known"
    without = {name: volumes for name, volumes in arms.items() if name != "+ RL synthetic"}
    run_downstream(train, test, without, config(), SEEDS, known, bootstrap_draws=8)
    for changes, retrained in (
        ({}, {"rl_synthetic"}),
        ({"pretrain_steps": 1}, {"rl_synthetic", "standard_synthetic"}),
    ):
        other = tmp_path / f"other{len(retrained)}"
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(patch)
            result = run_downstream(train, test, arms, config(**changes), SEEDS, other, bootstrap_draws=8, known=known)
        assert {training["args"].output_dir.split("/")[-3] for training in watch.trainings} == retrained
        assert json.loads((other / "downstream.json").read_text()) == result
        if not changes:
            assert result == expected
            of_known = known / "real_only" / "seed-0" / "result.json"
            assert (other / "real_only" / "seed-0" / "result.json").read_text() == of_known.read_text()


def test_a_validation_split_is_by_subject_and_only_watched(tmp_path):
    train, test, _ = real_and_arms()
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        run_downstream(train, test, {"real": None}, config(max_steps=1, validation_fraction=0.25), SEEDS, tmp_path, 2)
    for seed in SEEDS:
        assert watch.of("real", seed, "training")["data"].class_counts() == {"upper": 6, "lower": 3}
        figures = json.loads((tmp_path / "real" / f"seed-{seed}" / "result.json").read_text())["training"]["training"]
        assert "validation_auc" in figures


def test_what_can_not_be_compared_is_refused(tmp_path):
    train, test, arms = real_and_arms()
    synthetic = arms["+ RL synthetic"]
    coarse = dataclasses.replace(synthetic, spacing=(12.0, 12.0, 12.0))
    small = dataclasses.replace(synthetic, pixel_values=synthetic.pixel_values[..., :4])
    other = dataclasses.replace(synthetic, id2label={0: "HGG", 1: "LGG"})
    copied_test = bright_halves(seed=4, first_subject=105)
    cases = [
        ((train, train, arms, SEEDS), "12 subjects are in the training set and in the hold-out, 's0' first"),
        ((train, test, {**arms, "+ RL synthetic": copied_test}, SEEDS), "ids of 5 hold-out subjects, 's105' first"),
        ((train, test, arms, ()), "one seed or more"),
        ((train, test, arms, (0, 1, 1)), r"each once, got \[0, 1, 1\]"),
        ((train, test, {"+ RL": synthetic}, SEEDS), "here 0 have none"),
        ((train, test, {**arms, "also real": None}, SEEDS), "here 2 have none"),
        ((train, test, {**arms, "- rl synthetic": synthetic}, SEEDS), "Arm '- rl synthetic' has no folder name"),
        ((train, test, {**arms, "+": synthetic}, SEEDS), r"Arm '\+' has no folder name of its own"),
        ((train, test, {**arms, "coarse": coarse}, SEEDS), "Arm 'coarse' has voxels of"),
        ((train, test, {**arms, "small": small}, SEEDS), r"Arm 'small' has volumes of shape \(1, 8, 8, 4\)"),
        ((train, test, {**arms, "other": other}, SEEDS), "Arm 'other' has classes"),
        ((train, test, {**arms, "half": bright_halves((0, 4))}, SEEDS), "Arm 'half' has no volume of class 'upper'"),
        ((bright_halves((4, 0)), test, arms, SEEDS), "real training set has no volume of class 'lower'"),
        ((train, bright_halves((0, 4), first_subject=100), arms, SEEDS), "real test set has no volume"),
    ]
    for (real_train, real_test, case_arms, seeds), sentence in cases:
        with pytest.raises(InputError, match=sentence):
            run_downstream(real_train, real_test, case_arms, config(), seeds, tmp_path)
    assert list(tmp_path.iterdir()) == []
