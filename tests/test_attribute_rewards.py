"""Rewards of text-to-image: an attribute classifier, a CLIP-type model, and the pixels that both are given."""

import json

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_stable_diffusion
from torch import nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from msrl_diffusers import DiffusionPPOConfig, DiffusionPPOTrainer, WeightedSum
from msrl_diffusers.data.prompts import ATTRIBUTES, PromptBuilder
from msrl_diffusers.errors import InputError
from msrl_diffusers.models.image_classifiers import (
    ARCHITECTURES,
    build_image_classifier,
    load_image_classifier,
    save_image_classifier,
)
from msrl_diffusers.models.image_inputs import ImageInputs
from msrl_diffusers.rewards import as_reward, checked
from msrl_diffusers.rewards.attribute_match import AttributeMatch
from msrl_diffusers.rewards.image_text import ImageTextSimilarity


BUILDER = PromptBuilder()


class Output:
    def __init__(self, logits):
        self.logits = logits


class PixelClassifier(nn.Module):
    """Logit number i is ten times the first channel of pixel (0, i), so that a test can say what is seen."""

    def __init__(self, labels=ATTRIBUTES, problem_type="multi_label_classification"):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.config = transformers.PretrainedConfig(
            id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)}
        )
        self.config.problem_type = problem_type
        self.seen = []

    def forward(self, pixel_values):
        self.seen.append(len(pixel_values))
        return Output(self.scale * pixel_values[:, 0, 0, : self.config.num_labels])


def showing(*rows):
    """Samples `[B, 3, 8, 8]` in which a PixelClassifier sees these attributes, certainly."""
    samples = torch.zeros(len(rows), 3, 8, 8)
    for sample, names in zip(samples, rows, strict=True):
        sample[0, 0, :6] = torch.tensor([1.0 if name in names else -1.0 for name in ATTRIBUTES])
    return samples


PROMPTS = [BUILDER.build("melanoma", ["hair", "ink"]), BUILDER.build("nevus")]


def test_the_share_of_attributes_that_are_as_the_prompt_says():
    reward = AttributeMatch(PixelClassifier())
    perfect = showing(("melanoma", "hair", "ink"), ("nevus",))
    assert reward(perfect, PROMPTS).tolist() == [1, 1]
    worse = showing(("melanoma", "nevus", "ink"), ())  # a diagnosis too many and no hair; no diagnosis
    torch.testing.assert_close(reward(worse, PROMPTS), torch.tensor([4 / 6, 5 / 6]))
    assert reward(showing(("nevus", "gel bubble", "ruler")), PROMPTS[:1]).item() == 0
    assert not reward.differentiable
    assert reward.name == "attribute_share"


def test_exact_is_all_or_nothing_and_matches_are_by_attribute():
    reward = AttributeMatch(PixelClassifier(), kind="exact", name="judge")
    samples = showing(("melanoma", "hair"), ("nevus",))
    assert reward(samples, PROMPTS).tolist() == [0, 1]
    assert reward(samples, PROMPTS).dtype == torch.float32
    assert reward.matches(samples, PROMPTS).tolist() == [[True] * 5 + [False], [True] * 6]
    assert reward.name == "judge"


def test_the_threshold_is_where_an_attribute_is_seen():
    samples = showing(("nevus",))
    samples[0, 0, 0, 2] = 0.1  # hair at a probability of 0.73
    values = {
        level: AttributeMatch(PixelClassifier(), threshold=level)(samples, PROMPTS[1:]).item() for level in (0.7, 0.75)
    }
    assert values == {0.7: pytest.approx(5 / 6), 0.75: 1}
    half = torch.zeros(1, 3, 8, 8)  # a probability of exactly a half counts as seen
    assert AttributeMatch(PixelClassifier()).matches(half, PROMPTS[1:]).tolist() == [[False, True, *[False] * 4]]


def test_the_probability_form_is_the_mean_probability_of_what_is_stated():
    reward = AttributeMatch(PixelClassifier(), kind="probability")
    samples = (torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5).requires_grad_()
    probabilities = (10 * samples[:, 0, 0, :6]).sigmoid()
    targets = BUILDER.targets(PROMPTS)
    expected = torch.where(targets == 1, probabilities, 1 - probabilities).mean(dim=1)
    values = reward(samples, PROMPTS)
    torch.testing.assert_close(values, expected)
    assert reward.differentiable
    values.sum().backward()
    gradient = samples.grad[:, 0, 0, :6]
    assert torch.equal(gradient.sign(), 2 * targets - 1)  # more of what is stated, less of the rest
    torch.testing.assert_close(reward.probabilities(samples), probabilities)


@pytest.mark.parametrize("kind", ["share", "probability", "exact"])
def test_samples_that_are_no_numbers_get_no_reward(kind):
    """Beside the threshold they would have no attribute, which many prompts ask for."""
    reward, samples = AttributeMatch(PixelClassifier(), kind=kind), showing((), ("nevus",))
    samples[0] = torch.nan
    for score in (reward, reward.matches):
        with pytest.raises(
            InputError, match=f"attribute_{kind}: the classifier gives 1 of 2 samples pro.* no numbers"
        ):
            score(samples, PROMPTS)


def test_labels_may_stand_in_any_order_among_others():
    labels = ["Ink", "other", "gel_bubble", "NEVUS", "hair", "ruler", "melanoma"]
    reward = AttributeMatch(PixelClassifier(labels), builder=BUILDER)
    samples = torch.full((1, 3, 8, 8), -1.0)
    samples[0, 0, 0, [0, 1, 4, 6]] = 1.0  # ink, other, hair, melanoma
    assert reward.matches(samples, PROMPTS[:1]).all()


def test_samples_come_in_micro_batches():
    reward = AttributeMatch(PixelClassifier(), kind="probability", batch_size=3)
    samples = torch.rand(8, 3, 8, 8) - 0.5
    whole = AttributeMatch(PixelClassifier(), kind="probability")(samples, PROMPTS * 4)
    torch.testing.assert_close(reward(samples, PROMPTS * 4), whole)
    assert reward.model.seen == [3, 3, 2]
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "fraction"}, "no attribute match of kind 'fraction'; choose one of"),
        ({"threshold": 1.0}, "threshold must lie between 0 and 1, got 1.0"),
        ({"model": PixelClassifier(ATTRIBUTES[:5])}, "no label 'ink' of the prompts' attributes; it has"),
        ({"model": PixelClassifier(problem_type="single_label_classification")}, "need multi_label_classification"),
        ({"processor": object()}, "object does not work as an image processor"),
    ],
)
def test_a_classifier_that_can_t_judge_is_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        AttributeMatch(**{"model": PixelClassifier(), **arguments})


def test_conditions_that_state_nothing_are_refused_before_the_classifier_runs():
    reward = AttributeMatch(PixelClassifier())
    for conditions, sentence in (
        (["a cat", "a dog"], "outside the templates"),
        (torch.tensor([0, 1]), "not a tensor"),
    ):
        with pytest.raises(InputError, match=sentence):
            reward(showing((), ()), conditions)
    assert reward.model.seen == []
    with pytest.raises(InputError, match=r"RGB samples \[B, 3, H, W\] are needed, got \[1, 1, 8, 8\]"):
        reward(torch.zeros(1, 1, 8, 8), PROMPTS[:1])


def test_it_is_a_reward_among_others():
    share, smooth = (AttributeMatch(PixelClassifier(), kind=kind) for kind in ("share", "probability"))
    assert as_reward(share) is share
    both = WeightedSum([share, smooth], [0.7, 0.3])
    assert not both.differentiable
    samples = showing(("melanoma", "hair", "ink"), ("melanoma",))
    parts = both.parts(samples, PROMPTS)
    both.fit(parts)
    assert parts["attribute_share"].tolist() == [1, pytest.approx(4 / 6)]
    values = both(samples, PROMPTS)
    assert values[0] > values[1]
    assert checked(share, samples, PROMPTS).shape == (2,)


def test_the_trainer_gives_it_prompts(tmp_path):
    model, processor = build_image_classifier("resnet", ATTRIBUTES, 16)
    builder = PromptBuilder(opening="image of")  # the tiny tokenizer reads twelve tokens
    reward = AttributeMatch(model, processor, builder, kind="probability")
    args = DiffusionPPOConfig(
        output_dir=str(tmp_path), max_steps=1, rollout_batch_size=4, num_rollout_batches=1, train_batch_size=4,
        num_inference_steps=3, report_to="none",
    )  # fmt: skip
    prompts = [builder.build("nevus"), builder.build("nevus", ["ink"])]
    figures = DiffusionPPOTrainer(tiny_stable_diffusion(), reward, args, train_conditions=prompts).train()
    assert 0 < figures["reward/attribute_probability"] < 1


# -------------------------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_small_classifiers_are_saved_and_loaded_as_transformers_does(architecture, tmp_path):
    torch.manual_seed(0)
    model, processor = build_image_classifier(architecture, ATTRIBUTES, 16)
    samples = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = AttributeMatch(model, processor).probabilities(samples)
    assert expected.shape == (2, 6)
    save_image_classifier(model, processor, tmp_path / "classifier")
    (tmp_path / "classifier" / "log.jsonl").write_text("{}")
    save_image_classifier(model, processor, tmp_path / "classifier")  # over the old one
    assert (tmp_path / "classifier" / "log.jsonl").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["classifier"]
    again = AttributeMatch.from_pretrained(tmp_path / "classifier", kind="exact")
    torch.testing.assert_close(again.probabilities(samples), expected)
    assert again.kind == "exact"
    plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "classifier")
    assert plain.config.id2label == dict(enumerate(ATTRIBUTES))
    assert plain.config.problem_type == "multi_label_classification"


def test_a_classifier_is_loaded_to_be_trained_for_other_attributes(tmp_path):
    model, processor = build_image_classifier("resnet", ATTRIBUTES, 16)
    save_image_classifier(model, processor, tmp_path / "classifier")
    trained = model.state_dict()
    other, processor = load_image_classifier(tmp_path / "classifier", ["cat", "dog"], image_size=24)
    assert other.config.id2label == {0: "cat", 1: "dog"}
    inputs = ImageInputs.of(processor)(torch.zeros(1, 3, 8, 8))
    assert inputs.shape == (1, 3, 24, 24)
    assert other(pixel_values=inputs).logits.shape == (1, 2)
    body = {name: value for name, value in other.state_dict().items() if not name.startswith("classifier")}
    assert all(torch.equal(value, trained[name]) for name, value in body.items())


def test_a_pretrained_network_s_batch_statistics_are_kept_when_it_is_trained(tmp_path):
    """The default of transformers, 0.99, is the weight of the newest batch to PyTorch."""
    model, processor = build_image_classifier("efficientnet", ATTRIBUTES, 16, batch_norm_momentum=0.99)
    save_image_classifier(model, processor, tmp_path / "classifier")
    for names, momentum in ((None, 0.99), (["cat", "dog"], 0.1)):
        loaded, _ = load_image_classifier(tmp_path / "classifier", names)
        newest = max(layer.momentum for layer in loaded.modules() if isinstance(layer, nn.BatchNorm2d))
        assert newest == loaded.config.batch_norm_momentum == momentum


def test_what_is_no_classifier_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing can't be loaded as an image classifier"):
        load_image_classifier(str(tmp_path / "nothing"))
    model, processor = build_image_classifier("resnet", ATTRIBUTES, 16)
    model.resnet.save_pretrained(tmp_path / "headless")
    processor.save_pretrained(tmp_path / "headless")
    with pytest.raises(InputError, match=r"headless lacks weights, such as classifier.*; train it first"):
        load_image_classifier(tmp_path / "headless")
    with pytest.raises(InputError, match="no architecture 'vgg'; choose one of"):
        build_image_classifier("vgg", ATTRIBUTES, 16)
    with pytest.raises(InputError, match="16 pixels or more, got 8"):
        build_image_classifier("resnet", ATTRIBUTES, 8)
    with pytest.raises(InputError, match="No resnet can be made of"):
        build_image_classifier("resnet", ATTRIBUTES, 16, layer_type="wide")


# -------------------------------------------------------------------------------------------------------------- pixels


PROCESSORS = [
    ("ViTImageProcessorPil", {"size": {"height": 24, "width": 32}}),
    ("ViTImageProcessorPil", {"do_resize": False, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
    ("EfficientNetImageProcessorPil", {"size": {"height": 32, "width": 32}}),  # divides by the deviation twice
    ("EfficientNetImageProcessorPil", {"size": {"height": 40, "width": 40}, "rescale_offset": True}),
    ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 28}}),  # resizes to more, and crops
    ("ConvNextImageProcessorPil", {}),  # and does not from 384 on
    ("CLIPImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 28}}),
    ("BitImageProcessorPil", {"size": {"shortest_edge": 20}, "do_center_crop": False}),
    ("SiglipImageProcessorPil", {"size": {"height": 20, "width": 20}}),
]


@pytest.mark.parametrize(("name", "settings"), PROCESSORS)
def test_pixels_are_those_of_the_image_processor(name, settings):
    processor = getattr(transformers, name)(**settings)
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # 48 x 64, in blocks
    expected = processor(images=[image], input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    samples = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1).requires_grad_()
    pixels = ImageInputs.of(processor)(samples)
    assert pixels.shape == expected.shape
    scale = (expected.max() - expected.min()).item()
    assert (pixels - expected).abs().max() < 0.06 * scale  # PIL clips what overshoots between its two passes
    assert (pixels - expected).abs().mean() < 0.005 * scale
    pixels.sum().backward()
    assert (samples.grad != 0).any()


def test_pixels_without_an_image_processor():
    samples = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(ImageInputs.of(None)(samples), samples)
    assert ImageInputs.of(12)(samples).shape == (2, 3, 12, 12)
    inputs = ImageInputs(image_mean=[0.1, 0.2, 0.3], image_std=0.5)
    assert ImageInputs.of(inputs) is inputs
    expected = (samples / 2 + 0.5 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.5
    torch.testing.assert_close(inputs(samples), expected)


def test_an_image_processor_that_does_more_is_refused():
    class Sharpening(transformers.ViTImageProcessorPil):
        def normalize(self, image, mean, std, **kwargs):
            return super().normalize(image, mean, std, **kwargs) ** 3

    with pytest.raises(InputError, match="Sharpening does more to an image than resize, crop and scale it"):
        ImageInputs.of(Sharpening(size={"height": 16, "width": 16}))
    cropping = transformers.CLIPImageProcessorPil(do_resize=False, crop_size={"height": 24, "width": 24})
    with pytest.raises(InputError, match="8 x 8 are smaller than the 24 x 24 pixels that the image processor crops"):
        ImageInputs.of(cropping)(torch.zeros(1, 3, 8, 8))


# ------------------------------------------------------------------------------------------------------ image and text


class Processor:
    """Image processor and tokenizer of a pair."""

    def __init__(self):
        self.image_processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        )
        self.tokenizer = tiny_stable_diffusion().tokenizer


def tiny_pair(model_class):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {**sizes, **special, "vocab_size": 60, "max_position_embeddings": 12}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    if model_class is CLIPModel:
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    return SiglipModel(SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=vision))


CAPTIONS = ["a cat", "dog", "a cat", "x", "dog"]


@pytest.mark.parametrize("model_class", [CLIPModel, SiglipModel])
def test_the_similarity_is_that_of_the_model(model_class):
    model, processor = tiny_pair(model_class), Processor()
    samples = (torch.rand(5, 3, 16, 16) * 2 - 1).requires_grad_()
    cosine, logit = (ImageTextSimilarity(model, processor, kind=kind, batch_size=2) for kind in ("cosine", "logit"))
    tokens = processor.tokenizer(CAPTIONS, padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, pixel_values=cosine.inputs(samples))
    values = cosine(samples, CAPTIONS)
    expected = (output.image_embeds * output.text_embeds).sum(dim=-1)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logit(samples, CAPTIONS), output.logits_per_image.diagonal(), atol=1e-4, rtol=1e-4)
    assert (cosine.name, logit.name) == ("image_text_cosine", "image_text_logit")
    assert cosine.differentiable
    values.sum().backward()
    assert samples.grad.abs().sum() > 0
    assert checked(cosine, samples, CAPTIONS).std() > 0


def test_a_pair_is_loaded_from_its_folder(tmp_path):
    model, parts = tiny_pair(CLIPModel), Processor()
    model.save_pretrained(tmp_path)
    transformers.CLIPProcessor(parts.image_processor, parts.tokenizer).save_pretrained(tmp_path)
    samples = torch.rand(2, 3, 16, 16) * 2 - 1
    loaded = ImageTextSimilarity.from_pretrained(tmp_path, kind="logit")
    expected = ImageTextSimilarity(model, parts, kind="logit")(samples, ["a cat", "dog"])
    torch.testing.assert_close(loaded(samples, ["a cat", "dog"]), expected, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "no such"}))
    with pytest.raises(InputError, match="can't be loaded as a CLIP-type model"):
        ImageTextSimilarity.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("conditions", "sentence"),
    [
        (["a cat"], "needs one prompt for each of 2 samples"),
        (torch.tensor([0, 1]), "needs one prompt for each"),
        ([0, 1], "needs one prompt for each"),
        ("ab", "needs one prompt for each"),
        (["a cat", "abcdefghijklm"], "A prompt has 15 tokens, image_text_cosine reads 12; shorten it"),
    ],
)
def test_texts_that_can_t_be_read_are_refused(conditions, sentence):
    reward = ImageTextSimilarity(tiny_pair(CLIPModel), Processor())
    with pytest.raises(InputError, match=sentence):
        reward(torch.zeros(2, 3, 16, 16), conditions)


def test_a_pair_that_lacks_something_is_refused():
    with pytest.raises(InputError, match="no image-text similarity of kind 'dot'"):
        ImageTextSimilarity(tiny_pair(CLIPModel), Processor(), kind="dot")
    processor = Processor()
    processor.tokenizer = None
    with pytest.raises(InputError, match="Processor has no tokenizer; give the processor of a CLIP-type model"):
        ImageTextSimilarity(tiny_pair(CLIPModel), processor)
