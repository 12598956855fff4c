"""Parts of a text-to-image study: images, prompts, match rates, diversity, distances, the small pipeline."""

import inspect
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_text_to_image import (
    IMAGE_SIZE,
    RESNET,
    TEXT_ENCODER,
    UNET,
    VAE,
    VIT,
    tiny_images,
    tiny_text_to_image,
    tiny_text_to_image_study,
)

from msrl_diffusers.data.image_folder import ImageDataset, to_uint8
from msrl_diffusers.data.prompts import PromptBuilder
from msrl_diffusers.errors import InputError
from msrl_diffusers.models.image_classifiers import build_image_classifier
from msrl_diffusers.rewards.attribute_match import AttributeMatch
from msrl_diffusers.seeding import sample_generators
from msrl_diffusers.text_to_image.config import NETWORKS, TextToImageStudyConfig
from msrl_diffusers.text_to_image.diversity import diversity_of_sets, prompt_diversity
from msrl_diffusers.text_to_image.evaluate import attribute_hits, fidelity, matched_rows, mean_over_prompts
from msrl_diffusers.text_to_image.extractors import ClassifierExtractor, image_features
from msrl_diffusers.text_to_image.figures import mosaic
from msrl_diffusers.text_to_image.match import by_prompt, match_figures
from msrl_diffusers.text_to_image.sampling import reconstruct, sample_images
from msrl_diffusers.text_to_image.small import DERIVED, make_autoencoder, make_stable_diffusion, make_tokenizer


BUILDER = PromptBuilder()
PROMPTS = BUILDER.prompts()
SAMPLER = {"num_inference_steps": 2, "eta": 1.0, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def images() -> ImageDataset:
    return tiny_images(2)


def config(**changes) -> TextToImageStudyConfig:
    return TextToImageStudyConfig(**{**tiny_text_to_image_study(), **changes})


# ------------------------------------------------------------------------------------------------- the small pipeline


def test_words_of_the_prompts_are_tokens_and_others_are_spelled(tmp_path):
    tokenizer = make_tokenizer(PROMPTS)
    assert tokenizer.tokenize("Dermoscopy image of melanoma with gel bubble") == [
        "dermoscopy", "image", "of", "melanoma", "with", "gel", "bubble",
    ]  # fmt: skip
    assert tokenizer.tokenize("hairy") == ["h", "a", "i", "r", "y</w>"]
    assert tokenizer.model_max_length % 8 == 0
    ids = tokenizer(PROMPTS, padding="max_length").input_ids
    assert {len(row) for row in ids} == {tokenizer.model_max_length}
    assert len({tuple(row) for row in ids}) == len(PROMPTS)
    assert all(row[0] == tokenizer.bos_token_id and tokenizer.eos_token_id in row for row in ids)
    assert make_tokenizer(PROMPTS[::-1]).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded([*PROMPTS, "a cat, 5 é"]).input_ids == tokenizer([*PROMPTS, "a cat, 5 é"]).input_ids


def test_the_small_pipeline_is_saved_and_loaded_by_plain_diffusers(tmp_path):
    pipeline = tiny_text_to_image()
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    found = [
        pipe(
            PROMPTS[:2], num_inference_steps=2, generator=sample_generators(0, "test", [0, 1]), output_type="pt"
        ).images
        for pipe in (pipeline, loaded)
    ]
    assert found[0].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(*found)
    assert (loaded.unet.config.sample_size, loaded.vae_scale_factor) == (IMAGE_SIZE // 2, 2)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="Images of 18 pixels can't be halved 2 times; give the vae fewer levels"):
        make_autoencoder(18)
    with pytest.raises(InputError, match=r"attention_levels .* needs one entry per level"):
        make_stable_diffusion(make_autoencoder(16), PROMPTS, unet={"block_out_channels": [16]})


def test_all_settings_that_are_accepted_reach_their_network():
    given = {
        section: {
            name: parameter.default
            for name, parameter in inspect.signature(NETWORKS[section]).parameters.items()
            if name not in DERIVED[section]
        }
        for section in DERIVED
    }
    vae = make_autoencoder(IMAGE_SIZE, **{**given["vae"], **VAE, "scaling_factor": 0.5})
    assert vae.config.scaling_factor == 0.5
    sections = {"text_encoder": {**given["text_encoder"], **TEXT_ENCODER}, "unet": {**given["unet"], **UNET}}
    sections["unet"] |= {"mid_block_scale_factor": 0.5, "layers_per_block": 1}
    assert make_stable_diffusion(vae, PROMPTS, **sections).unet.config.mid_block_scale_factor == 0.5


def test_an_image_does_not_depend_on_the_batch_it_is_made_in():
    pipeline, prompts = tiny_text_to_image(), PROMPTS[:3]
    together = sample_images(pipeline, prompts, SAMPLER, 5, BUILDER, batch_size=3)
    apart = sample_images(pipeline, prompts, SAMPLER, 5, BUILDER, batch_size=2)
    assert (together.pixel_values.int() - apart.pixel_values.int()).abs().max() <= 1  # sums in another order
    assert together.prompts == prompts
    expected = pipeline(
        prompts, generator=sample_generators(5, "text to image", range(3)), output_type="pt", **SAMPLER
    )
    assert (together.pixel_values.int() - to_uint8(expected.images * 2 - 1).int()).abs().max() <= 1
    other = sample_images(pipeline, prompts, SAMPLER, 6, BUILDER)
    assert not torch.equal(together.pixel_values, other.pixel_values)


def test_a_number_of_steps_that_would_end_below_zero_is_refused():
    with pytest.raises(InputError, match="The timesteps of 61 steps of DDIMScheduler end below zero"):
        sample_images(tiny_text_to_image(), PROMPTS[:1], {**SAMPLER, "num_inference_steps": 61}, 5, BUILDER)


def test_reconstructions_keep_prompts_and_attributes(images):
    made = reconstruct(tiny_text_to_image().vae, images, BUILDER, batch_size=48)
    assert (made.prompts, made.attributes.tolist()) == (images.prompts, images.attributes.tolist())
    assert made.pixel_values.shape == images.pixel_values.shape


# ------------------------------------------------------------------------------------------------ images and prompts


def test_match_rates_by_hand():
    prompts = ["a", "a", "b", "b"]
    before = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 0]]).bool()
    after = torch.tensor([[1, 1], [1, 1], [0, 1], [1, 1]]).bool()
    found = match_figures({"before": before, "after": after}, prompts, ["x", "y"], ["b"], draws=200)
    assert (found["before"], found["after"], found["n"]) == (0.25, 0.75, 4)
    assert found["difference"]["value"] == 0.5
    assert found["share"] == {"before": 0.5, "after": 0.875}
    assert found["per_attribute"] == {"x": {"before": 0.75, "after": 0.75}, "y": {"before": 0.25, "after": 1.0}}
    assert found["trained_prompts"] == {"before": 0.5, "after": 1.0}
    assert found["heldout_prompts"] == {"before": 0.0, "after": 0.5}
    assert by_prompt(after.all(dim=1), prompts) == {"a": 1.0, "b": 0.5}
    json.dumps(found)
    none = match_figures({"before": before, "after": after}, prompts, ["x", "y"], draws=2)
    assert none["heldout_prompts"] is None


def test_an_interval_of_pairs_is_narrower_and_keeps_the_prompts():
    """Prompt b never matches, so only samples of prompt a vary. Both arms are alike: no difference."""
    generator = torch.Generator().manual_seed(0)
    good = torch.rand(100, 1, generator=generator) < 0.5
    hits = torch.cat([good, torch.zeros(100, 1, dtype=torch.bool)])
    prompts = ["a"] * 100 + ["b"] * 100
    found = match_figures({"before": hits, "after": hits}, prompts, ["x"], draws=500)
    low, high = found["interval"]["before"]
    rate = found["before"]
    half = 1.96 * (2 * rate * (1 - 2 * rate) / 100) ** 0.5 / 2  # binomial, over half of the samples
    assert (low, high) == pytest.approx((rate - half, rate + half), abs=0.02)
    assert found["difference"]["interval"] == [0.0, 0.0]


def test_rows_with_every_prompt_equally_often():
    one, other = ["a", "a", "b", "c"], ["b", "a", "b", "d"]
    rows, other_rows = matched_rows(one, other)
    assert [one[row] for row in rows] == [other[row] for row in other_rows] == ["a", "b"]


# -------------------------------------------------------------------------------------------- diversity and distances


def test_images_of_a_prompt_that_are_alike_have_no_diversity(images):
    same = ImageDataset.cat([images.select(range(8))] * 3)
    alike, real = prompt_diversity(same), prompt_diversity(images)
    assert alike["value"] == pytest.approx(1, abs=1e-6)
    assert 0 < real["value"] < 0.9
    assert alike["pairs"] == 8 * 3
    assert set(alike["by_prompt"]) == set(same.prompts)
    assert prompt_diversity(images.select([0, 1])) is None  # of two prompts


def test_pairs_are_of_one_prompt(images):
    """Black images of one prompt, white ones of another: all pairs are alike, as none is across."""
    pixels = torch.zeros_like(images.pixel_values[:4])
    pixels[2:] = 255
    black_and_white = ImageDataset(
        pixels, images.attributes[[0, 0, 1, 1]], images.attribute_names, ["a", "a", "b", "b"], list("abcd")
    )
    assert prompt_diversity(black_and_white)["value"] == pytest.approx(1, abs=1e-6)


def test_sets_are_compared_over_the_prompts_that_give_the_most_pairs(images):
    """A rare prompt would leave all others one pair; one that a set lacks would count in the others alone."""
    many = ImageDataset.cat([images] * 3)  # six of every prompt
    rows = [row for row, prompt in enumerate(many.prompts) if prompt not in PROMPTS[:2]]
    rare = [many.prompts.index(PROMPTS[1]), len(images) + many.prompts.index(PROMPTS[1])]  # two; of PROMPTS[0] none
    found = diversity_of_sets({"real": many.select(sorted(rows + rare)), "before": many}, seed=3)
    for figures in found.values():
        assert set(figures["by_prompt"]) == set(PROMPTS[2:])
        assert figures["pairs"] == 8 * 30
    assert found["real"] == found["before"] == prompt_diversity(many.select(rows), seed=3)
    assert diversity_of_sets({"real": images, "before": many}, seed=3) == {
        name: prompt_diversity(its, seed=3) for name, its in {"real": images, "before": many}.items()
    }  # of the same prompts: nothing is left out
    single = images.select([images.prompts.index(prompt) for prompt in PROMPTS])
    without = diversity_of_sets({"real": single, "before": images}, seed=3)
    assert without == {"real": None, "before": prompt_diversity(images, seed=3)}


@pytest.mark.parametrize("settings", [RESNET, VIT])
def test_features_are_what_the_last_layer_is_given(settings, images):
    settings = dict(settings)
    model, processor = build_image_classifier(
        settings.pop("architecture"), BUILDER.attribute_names, IMAGE_SIZE, **settings
    )
    extractor = ClassifierExtractor(model, processor)
    features = image_features(extractor, images.select(range(5)), batch_size=2)
    assert features.shape == (5, 1, 1, extractor.num_features)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    samples = images.batch(range(5))["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values=samples).logits
        torch.testing.assert_close(last(features[:, 0, 0].float()), logits, atol=1e-5, rtol=1e-4)
    assert set(extractor.identity) == {"id", "sha256"}


def test_distances_are_to_as_many_held_out_images_of_the_same_prompts(images):
    settings = dict(RESNET)
    torch.manual_seed(0)
    model, processor = build_image_classifier(
        settings.pop("architecture"), BUILDER.attribute_names, IMAGE_SIZE, **settings
    )
    noisy = ImageDataset.from_samples(torch.randn(64, 3, 16, 16).clamp(-1, 1), images.prompts, BUILDER)
    found = fidelity(
        ClassifierExtractor(model, processor), {"before": noisy, "after": images}, images, {"real": noisy}, config()
    )
    assert found["n"] == 64
    assert found["after"] == pytest.approx(0, abs=1e-6)  # the held-out images themselves
    assert found["before"] > found["after"] + 0.01
    assert found["difference"]["value"] == pytest.approx(found["after"] - found["before"])
    assert found["difference"]["interval"][1] < 0
    assert found["real"] == {
        "value": pytest.approx(found["before"]), "kid": pytest.approx(found["kid"]["before"]), "n": 64,
    }  # fmt: skip
    json.dumps(found)


def test_references_are_compared_with_the_held_out_images_of_the_arms(images):
    """The distance depends on their number: twice as many held-out images change nothing, a prompt that is rare in training does."""
    firsts = images.select([images.prompts.index(prompt) for prompt in PROMPTS])
    noisy = ImageDataset.from_samples(torch.randn(64, 3, 16, 16).clamp(-1, 1), images.prompts, BUILDER)
    settings = dict(RESNET)
    torch.manual_seed(0)
    model, processor = build_image_classifier(
        settings.pop("architecture"), BUILDER.attribute_names, IMAGE_SIZE, **settings
    )
    references = {
        "reconstruction": images,
        "real": noisy.select([n for n, p in enumerate(images.prompts) if p != PROMPTS[0]]),
    }
    found = fidelity(
        ClassifierExtractor(model, processor), {"before": firsts, "after": firsts}, images, references, config()
    )
    assert (found["n"], found["reconstruction"]["n"], found["real"]["n"]) == (32, 32, 31)
    assert found["reconstruction"]["value"] == pytest.approx(found["after"], abs=1e-6)  # the images themselves
    assert found["real"]["value"] > 0.01


def test_match_rates_of_real_images_count_every_prompt_the_same(images):
    """As the arms are asked: a table in which one prompt is common tells as much of it as of the others."""
    settings = dict(RESNET)
    torch.manual_seed(0)
    model, processor = build_image_classifier(
        settings.pop("architecture"), BUILDER.attribute_names, IMAGE_SIZE, **settings
    )
    match = AttributeMatch(model, processor, BUILDER)
    model.classifier[-1].bias.data += torch.tensor([30.0, -30, -30, -30, -30, -30])  # sees melanoma, and nothing else
    shown = "dermoscopy image of melanoma"
    rows = [row for row, prompt in enumerate(images.prompts) if prompt == shown]
    one_more = images.select([*rows * 10, images.prompts.index(PROMPTS[-1])])
    assert attribute_hits(match, one_more).all(dim=1).double().mean() > 0.9
    assert mean_over_prompts(match, one_more) == 0.5


def test_intervals_of_distances_draw_within_each_prompt(images):
    """Of one image of every prompt there is but one draw: how often a prompt was asked for is no chance."""
    firsts = images.select([images.prompts.index(prompt) for prompt in PROMPTS])
    noisy = ImageDataset.from_samples(torch.randn(len(PROMPTS), 3, 16, 16).clamp(-1, 1), firsts.prompts, BUILDER)
    settings = dict(RESNET)
    model, processor = build_image_classifier(
        settings.pop("architecture"), BUILDER.attribute_names, IMAGE_SIZE, **settings
    )
    found = fidelity(ClassifierExtractor(model, processor), {"before": noisy, "after": firsts}, firsts, {}, config())
    assert found["interval"]["before"] == pytest.approx([found["before"]] * 2)
    assert found["difference"]["interval"] == pytest.approx([found["difference"]["value"]] * 2)


def test_a_mosaic_has_images_where_they_belong(images):
    picture, places = mosaic([images, images.select([0])], PROMPTS[:2], 2)
    assert places == [0, 2 * (IMAGE_SIZE + 1) + IMAGE_SIZE // 4]
    first = images.pixel_values[0].permute(1, 2, 0).numpy()
    assert (picture[:16, :16] == first).all()
    assert (picture[:16, places[1] : places[1] + 16] == first).all()
    assert (picture[17:33, places[1] : places[1] + 16] == 255).all()  # no second prompt in that arm
