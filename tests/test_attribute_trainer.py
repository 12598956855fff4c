import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import interrupted_when_saving
from tiny import copied, differing
from torchmetrics.functional.classification import binary_auroc

from msrl_diffusers.arguments import parse
from msrl_diffusers.data.dermoscopy import load_dermoscopy, write_dermoscopy
from msrl_diffusers.data.image_folder import ImageDataset
from msrl_diffusers.data.prompts import PromptBuilder
from msrl_diffusers.errors import InputError
from msrl_diffusers.models.image_classifiers import build_image_classifier
from msrl_diffusers.models.image_inputs import ImageInputs
from msrl_diffusers.rewards.attribute_match import AttributeMatch
from msrl_diffusers.trainers.attribute_config import AttributeConfig
from msrl_diffusers.trainers.attribute_trainer import (
    AttributeTrainer,
    attribute_metrics,
    augment_images,
    class_weights,
    predict_attributes,
)
from msrl_diffusers.trainers.base import read_log


BUILDER = PromptBuilder(["melanoma", "nevus"], ["gel bubble"])
SIZE = 16
SCRIPT = Path(__file__).parent.parent / "examples" / "train_attribute_classifier.py"


def blatant(num=16, seed=0, name="s", builder=BUILDER) -> ImageDataset:
    """Noise that is red or green by the diagnosis and has a white middle if there is a bubble."""
    prompts = [builder.prompts()[number % len(builder.prompts())] for number in range(num)]
    targets = builder.targets(prompts)
    generator = torch.Generator().manual_seed(seed)
    samples = 0.4 * torch.randn(num, 3, SIZE, SIZE, generator=generator) - 0.3
    for sample, row in zip(samples, targets, strict=True):
        sample[int(row[1])] += 0.7
        sample[:, 5:11, 5:11] += 1.5 * row[2]
    return ImageDataset.from_samples(samples, prompts, builder, name)


def settings(output_dir, **changes) -> AttributeConfig:
    fields = {
        "max_steps": 4, "train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 1, "report_to": "none",
        "output_dir": str(output_dir), **changes,
    }  # fmt: skip
    return AttributeConfig(**fields)


def build(output_dir, train=None, heldout=None, **changes) -> AttributeTrainer:
    """A trainer of freshly built weights, always the same."""
    torch.manual_seed(0)
    fields = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model, processor = build_image_classifier("resnet", BUILDER.attribute_names, SIZE, **fields)
    return AttributeTrainer(model, settings(output_dir, **changes), train or blatant(), heldout, processor)


def test_it_learns_what_is_blatant(tmp_path):
    heldout = blatant(24, seed=1, name="h")
    trainer = build(tmp_path, blatant(32), heldout, max_steps=40, train_batch_size=16, learning_rate=1e-2)
    before = trainer.evaluate()
    figures = trainer.train()
    assert before["heldout_exact_match"] < 0.7
    assert figures["heldout_exact_match"] > 0.9
    assert figures["heldout_auc_gel_bubble"] > 0.95
    assert figures["train_accuracy"] > 0.95
    log = read_log(tmp_path)
    assert [line["step"] for line in log] == list(range(1, 41))
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert {"accuracy", "exact_match"} <= set(log[0])
    assert not trainer.model.training
    reward = AttributeMatch(trainer.model, trainer.inputs, BUILDER, kind="exact")
    samples = heldout.batch(range(24))["pixel_values"]
    assert reward(samples, heldout.prompts).mean().item() == pytest.approx(figures["heldout_exact_match"])


@pytest.mark.slow
def test_a_small_network_reads_all_six_attributes(tmp_path):
    torch.manual_seed(0)
    train, heldout = load_dermoscopy(24, 32), load_dermoscopy(4, 32, first_index=24)
    model, processor = build_image_classifier("resnet", train.attribute_names, 32)
    args = settings(tmp_path, max_steps=150, train_batch_size=32, learning_rate=3e-3)
    figures = AttributeTrainer(model, args, train, heldout, processor).train()
    assert figures["heldout_auc"] > 0.97
    assert figures["heldout_accuracy"] > 0.92


@pytest.fixture
def run_script(monkeypatch):
    """The example script as `__main__` of this process, which spares the seconds that its imports take."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--report_to", "none", "--max_steps", "2", *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def test_the_script_trains_a_fresh_network_and_goes_on_from_it(run_script, tmp_path, capsys):
    drawn = ("--image_size", "16", "--num_per_prompt", "2", "--train_batch_size", "4")
    run_script("--architecture", "convnext", "--output_dir", str(tmp_path / "fresh"), *drawn)
    assert f"classifier: {tmp_path / 'fresh' / 'classifier'}, exact match" in capsys.readouterr().out
    figures = json.loads((tmp_path / "fresh" / "metrics.json").read_text())
    assert (figures["num_train"], figures["num_heldout"]) == (51, 13)
    assert 0 <= figures["heldout_exact_match"] <= 1
    assert (tmp_path / "fresh" / "curves.png").is_file()
    reward = AttributeMatch.from_pretrained(tmp_path / "fresh" / "classifier")
    assert type(reward.model).__name__ == "ConvNextForImageClassification"

    write_dermoscopy(tmp_path / "images", 1, 20)
    run_script(
        "--model_name_or_path", str(tmp_path / "fresh" / "classifier"), "--data_dir", str(tmp_path / "images"),
        "--image_size", "16", "--train_batch_size", "4", "--output_dir", str(tmp_path / "tuned"),
    )  # fmt: skip
    tuned = AttributeMatch.from_pretrained(tmp_path / "tuned" / "classifier")
    assert differing(copied(reward.model), copied(tuned.model))


def test_the_script_reads_a_table_of_other_names(tmp_path, caplog):
    write_dermoscopy(tmp_path, 1, SIZE)
    table = tmp_path / "metadata.csv"
    header, rows = table.read_text().split("\n", 1)
    header = header.replace("subject_id", "patient").replace("hair", "strands")
    table.write_text(f"{header}\n{rows.replace('melanoma', 'MM')}")
    script = runpy.run_path(str(SCRIPT))
    names = [
        "--subject_column",
        "patient",
        "--artifact_columns",
        "{hair: strands}",
        "--diagnosis_names",
        "{MM: melanoma}",
    ]
    (arguments,) = parse(
        [script["ScriptArguments"]], arguments=["--data_dir", str(tmp_path), "--image_size", "16", *names]
    )
    loaded, drawn = script["load_images"](arguments, PromptBuilder()), load_dermoscopy(1, SIZE)
    assert sorted(zip(loaded.subject_ids, loaded.prompts, strict=True)) == sorted(
        zip(drawn.subject_ids, drawn.prompts, strict=True)
    )
    assert caplog.messages == []


def test_the_script_reads_artifacts_of_an_only_diagnosis(run_script, tmp_path):
    write_dermoscopy(tmp_path / "images", 2, 16)
    run_script(
        "--data_dir", str(tmp_path / "images"), "--diagnoses", "nevus", "--image_size", "16", "--train_batch_size", "4",
        "--output_dir", str(tmp_path / "out"),
    )  # fmt: skip
    only = PromptBuilder(["nevus"])
    reward = AttributeMatch.from_pretrained(tmp_path / "out" / "classifier", only)
    assert list(reward.model.config.id2label.values()) == list(only.artifacts)
    assert reward(torch.zeros(1, 3, 16, 16), only.prompts()[:1]).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data_dir", "nowhere"], "nowhere has no metadata.csv"),
        (["--architecture", "vgg", "--num_per_prompt", "1"], "no architecture 'vgg'"),
        (["--artifacts", "hair", "tattoo"], "give a data_dir for others"),
        (
            ["--model_name_or_path", "nowhere", "--num_per_prompt", "1"],
            "nowhere can't be loaded as an image classifier",
        ),
        (["--threshold", "2"], "threshold must lie between 0 and 1"),
    ],
)
def test_the_script_says_in_one_line_what_is_wrong(arguments, sentence, run_script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run_script("--image_size", "16", *arguments)
    captured = capsys.readouterr()
    assert caught.value.code == 1
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line
    assert captured.out == ""


def test_two_steps_change_every_parameter(tmp_path):
    trainer = build(tmp_path, max_steps=2)
    before = copied(trainer.model)
    figures = trainer.train()
    after = copied(trainer.model)
    assert {name for name, _ in trainer.model.named_parameters()} <= set(differing(before, after))
    assert all(isinstance(value, float) and 0 <= value <= 1 for value in figures.values())


def test_a_frozen_classifier_is_trained_all_the_same(tmp_path):
    trainer = build(tmp_path, max_steps=1)
    AttributeMatch(trainer.model, trainer.inputs, BUILDER)  # freezes it
    again = AttributeTrainer(trainer.model, trainer.args, trainer.train_dataset, processor=trainer.inputs)
    before = copied(again.model)
    again.train()
    assert differing(before, copied(again.model))


def test_training_is_a_function_of_the_seed(tmp_path):
    trainers = [build(tmp_path / str(i), max_steps=2, seed=seed) for i, seed in enumerate((0, 0, 1))]
    figures = [trainer.train() for trainer in trainers]
    one, same, other = (copied(trainer.model) for trainer in trainers)
    assert differing(one, same) == []
    assert figures[0] == figures[1]
    assert differing(one, other)


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


def rare(num=12) -> ImageDataset:
    """One image of twelve has a bubble."""
    images = blatant(48)
    rows = [row for row in range(48) if not images.attributes[row, 2]][: num - 1]
    return images.select([*rows, images.attributes[:, 2].nonzero()[0, 0].item()])


def test_both_classes_of_an_attribute_weigh_the_same(tmp_path):
    attributes = rare().attributes
    weights = class_weights(attributes)
    assert weights.shape == (2, 3)
    torch.testing.assert_close(weights[:, 2], torch.tensor([12 / 22, 6.0]))
    of_each = attributes * weights[1] + (1 - attributes) * weights[0]
    torch.testing.assert_close(of_each.mean(dim=0), torch.ones(3))
    torch.testing.assert_close((of_each * attributes).sum(dim=0), torch.full((3,), 6.0))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_weighted_and_smoothed_cross_entropy(weighted, smoothing, tmp_path):
    changes = {
        "max_steps": 1, "train_batch_size": 12, "flips": False, "crop_share": 0.0, "color_jitter": 0.0,
        "class_weights": weighted, "label_smoothing": smoothing,
    }  # fmt: skip
    trainer = build(tmp_path, rare(), **changes)
    batch = rare().batch(range(12))
    logits = trainer.model.train()(pixel_values=batch["pixel_values"]).logits
    trainer = build(tmp_path, rare(), **changes)  # batch norm of the first has seen a batch
    trainer.train()
    targets, probabilities = batch["attributes"], logits.sigmoid()
    soft = targets * (1 - smoothing) + smoothing / 2
    terms = -soft * probabilities.log() - (1 - soft) * (1 - probabilities).log()
    weights = class_weights(rare().attributes) if weighted else torch.ones(2, 3)
    expected = (terms * torch.where(targets == 1, weights[1], weights[0])).mean()
    assert read_log(tmp_path)[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_image_processor_stands_before_the_network(tmp_path):
    trainer = build(tmp_path, max_steps=1)
    sizes = []
    trainer.model.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(kwargs["pixel_values"].shape[-1]), with_kwargs=True
    )
    trainer.inputs = ImageInputs(24)
    trainer.train()
    assert set(sizes) == {24}


def test_metrics_are_by_attribute_and_of_all():
    probabilities = torch.tensor([[0.9, 0.2, 0.1], [0.4, 0.7, 0.2], [0.6, 0.5, 0.3], [0.2, 0.1, 0.9]])
    attributes = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]])
    metrics = attribute_metrics(probabilities, attributes, ["melanoma", "gel bubble", "ink"])
    assert metrics["accuracy_melanoma"] == 0.5
    assert metrics["accuracy_gel_bubble"] == 1  # a half is seen, as by the reward
    assert metrics["accuracy_ink"] == 0.75
    assert metrics["accuracy"] == pytest.approx(0.75)
    assert metrics["exact_match"] == 0.25
    assert metrics["auc_melanoma"] == pytest.approx(binary_auroc(probabilities[:, 0], attributes[:, 0]).item())
    assert "auc_ink" not in metrics  # no image has it
    assert metrics["auc"] == pytest.approx((metrics["auc_melanoma"] + 1) / 2)
    strict = attribute_metrics(probabilities, attributes, ["melanoma", "gel bubble", "ink"], threshold=0.95)
    assert strict["accuracy_ink"] == 1
    assert strict["exact_match"] == 0.25
    assert "auc" not in attribute_metrics(probabilities[:1], attributes[:1], ["melanoma", "gel bubble", "ink"])
    single = attribute_metrics(probabilities[:, :1], attributes[:, :1], ["melanoma"])
    assert single["accuracy"] == single["exact_match"] == 0.5


def test_probabilities_do_not_depend_on_the_batch_size(tmp_path):
    trainer, images = build(tmp_path), blatant()
    trainer.model.train()
    probabilities = predict_attributes(trainer.model, images, trainer.inputs, batch_size=5)
    assert probabilities.shape == (16, 3)
    assert probabilities.dtype == torch.float64
    assert not trainer.model.training
    torch.testing.assert_close(
        predict_attributes(trainer.model, images, trainer.inputs), probabilities, atol=1e-6, rtol=1e-5
    )
    torch.nn.init.constant_(trainer.model.classifier[1].bias, float("nan"))
    with pytest.raises(InputError, match="lower learning_rate"):
        predict_attributes(trainer.model, images)


def test_augmentation_flips_and_crops_without_new_colors():
    images = torch.rand(128, 3, 8, 8) * 2 - 1
    flipped = augment_images(images, torch.Generator().manual_seed(0), crop_share=0.0, color_jitter=0.0)
    kinds = [
        [torch.equal(new, old.flip(axes)) for axes in ([], [1], [2], [1, 2])]
        for new, old in zip(flipped, images, strict=True)
    ]
    assert all(sum(kind) == 1 for kind in kinds)
    assert all(any(kind[number] for kind in kinds) for number in range(4))
    cropped = augment_images(images, torch.Generator().manual_seed(0), False, 0.13, 0.0)  # one pixel of eight
    places = set()
    for new, old in zip(cropped, images, strict=True):
        (place,) = [
            (h, w) for h in range(3) for w in range(3)
            if torch.equal(new[:, max(0, 1 - h) : 9 - h, max(0, 1 - w) : 9 - w], old[:, max(0, h - 1) : 7 + h, max(0, w - 1) : 7 + w])
        ]  # fmt: skip
        places.add(place)
    assert len(places) == 9


def test_color_jitter_changes_light_and_not_hue():
    images = (torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5) * 0.4
    changed = augment_images(images, torch.Generator().manual_seed(0), False, 0.0, 0.2)
    assert changed.abs().max() <= 1
    ratio = (changed / 2 + 0.5).mean(dim=(1, 2, 3)) / (images / 2 + 0.5).mean(dim=(1, 2, 3))
    assert 0.8 <= ratio.min() < 0.9 < 1.1 < ratio.max() <= 1.2 + 1e-5
    contrast = changed.mean(dim=1).std(dim=(1, 2)) / images.mean(dim=1).std(dim=(1, 2)) / ratio
    assert contrast.min() < 0.9 < 1.1 < contrast.max()

    def hue(pixels):  # angle in the plane of equal gray
        red, green, blue = pixels.unbind(1)
        return torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue)

    angle = hue(changed) - hue(images)
    assert torch.atan2(angle.sin(), angle.cos()).abs().max() < 1e-2
    again = augment_images(images, torch.Generator().manual_seed(0), False, 0.0, 0.2)
    assert torch.equal(again, changed)
    assert torch.equal(augment_images(images, torch.Generator(), False, 0.0, 0.0), images)


def test_sets_that_can_t_be_trained_on_are_refused(tmp_path):
    no_bubble = blatant().select((blatant().attributes[:, 2] == 0).nonzero()[:, 0])
    with pytest.raises(
        InputError, match="training images of the classifier: the attribute 'gel bubble' is 0 in all 8"
    ):
        build(tmp_path, no_bubble)
    with pytest.raises(InputError, match="16 subjects are in training and evaluation, 's-000000' first"):
        build(tmp_path, blatant(), blatant())
    other = PromptBuilder(["melanoma", "nevus"], ["ink"])
    with pytest.raises(InputError, match="give both the same"):
        build(tmp_path, blatant(), blatant(name="h", builder=other))
    with pytest.raises(InputError, match="has no label 'ink'"):
        build(tmp_path, blatant(builder=other))
    with pytest.raises(InputError, match="no attribute to tell images by"):
        build(tmp_path, replace(blatant(), attributes=torch.zeros(16, 0), attribute_names=()))


def test_images_of_another_size_than_the_model_s_are_refused(tmp_path):
    model, processor = build_image_classifier("vit", BUILDER.attribute_names, 32)
    with pytest.raises(InputError, match="ViTForImageClassification can't be used on images of 16 pixels"):
        AttributeTrainer(model, settings(tmp_path), blatant())
    AttributeTrainer(model, settings(tmp_path), blatant(), processor=processor)  # which makes them larger


def test_an_evaluation_of_one_class_has_no_area(tmp_path):
    heldout = blatant(4, name="h").select([0])
    figures = build(tmp_path, heldout=heldout, max_steps=1).train()
    assert "heldout_accuracy_melanoma" in figures
    assert "heldout_auc" not in figures
    assert "train_auc" in figures


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"threshold": 0.0}, "threshold must lie between 0 and 1, got 0.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"crop_share": 0.5}, r"crop_share must lie in \[0, 0.5\), got 0.5"),
        ({"color_jitter": -0.1}, r"color_jitter must lie in \[0, 1\), got -0.1"),
        ({"color_jitter": float("nan")}, r"color_jitter must lie in \[0, 1\)"),
        ({"eval_batch_size": 0}, "eval_batch_size must be positive"),
        ({"flips": 1}, "flips must be bool, got 1"),
    ],
)
def test_bad_settings_are_refused(change, sentence):
    with pytest.raises(InputError, match=sentence):
        AttributeConfig(**change)
