"""What a text-to-image study makes of its images: splits, captions, and what its card says of them."""

import numpy as np
import pytest
from PIL import Image
from tiny_text_to_image import (
    IMAGE_SIZE,
    tiny_images,
    tiny_text_to_image_study,
)

from msrl_diffusers.data.dermoscopy import write_dermoscopy
from msrl_diffusers.data.image_folder import ImageDataset
from msrl_diffusers.data.prompts import PromptBuilder
from msrl_diffusers.errors import InputError
from msrl_diffusers.text_to_image.artifacts import data_facts
from msrl_diffusers.text_to_image.augmentation import diagnosis_only, missing_prompts
from msrl_diffusers.text_to_image.config import CLASSIFIERS, TextToImageStudyConfig
from msrl_diffusers.text_to_image.data import in_subgroup, load_captioned_folder, make_splits, thin_out, trained_splits
from msrl_diffusers.text_to_image.tuning import split_prompts


BUILDER = PromptBuilder()
PROMPTS = BUILDER.prompts()
SAMPLER = {"num_inference_steps": 2, "eta": 1.0, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def images() -> ImageDataset:
    return tiny_images(2)


def config(**changes) -> TextToImageStudyConfig:
    return TextToImageStudyConfig(**{**tiny_text_to_image_study(), **changes})


# ------------------------------------------------------------------------------------------------- the small pipeline


def test_splits_share_no_subject_and_the_subgroup_is_rare_in_training_only():
    splits = make_splits(config(num_per_prompt=2, rare_attributes=["melanoma", "hair"], rare_share=0.5))
    subjects = [set(its.subject_ids) for its in splits.values()]
    assert len(set.union(*subjects)) == sum(map(len, subjects))
    counts = {name: int(in_subgroup(its, ["melanoma", "hair"]).sum()) for name, its in splits.items()}
    assert counts == {"train": 8, "judge": 16, "heldout": 16}
    assert {name: len(its) for name, its in splits.items()} == {"train": 56, "judge": 64, "heldout": 64}


def test_splits_on_which_nothing_is_trained_need_not_show_everything():
    assert trained_splits(config()) == ["train", "judge", "heldout"]
    given = {
        "pretrained_model_name_or_path": "somebody/pipeline", "reward_classifier": "somebody/reward",
        "fid_extractor": "inception", "augmentation": {},
    }  # fmt: skip
    assert trained_splits(config(**given)) == ["judge", "heldout"]
    assert trained_splits(config(**given, judge_classifier="somebody/judge")) == ["heldout"]


@pytest.mark.parametrize(
    ("card", "dataset", "data"),
    [
        (None, None, "not stated by the pipeline that was given"),
        (
            "---\ndatasets:\n- dermoscopy\n---\n",
            "dermoscopy",
            "procedurally drawn dermoscopy-like images, of no patient",
        ),
        ("---\ndatasets: [a, b]\n---\n", None, "not stated by the pipeline that was given"),
        ("---\ndatasets: [a\n---\n", None, "not stated by the pipeline that was given"),
        ("No metadata.", None, "not stated by the pipeline that was given"),
    ],
)
def test_the_data_of_a_given_pipeline_are_those_its_card_names(card, dataset, data, tmp_path):
    if card:
        (tmp_path / "README.md").write_text(card)
    facts = data_facts(config(pretrained_model_name_or_path=str(tmp_path)))
    assert (facts["dataset"], facts["data"], facts["sampler"]["eta"]) == (
        dataset,
        data,
        config().evaluation_sampler["eta"],
    )


def test_no_data_set_is_named_where_pipeline_and_classifiers_saw_different_ones(tmp_path):
    card, drawn = tmp_path / "README.md", "procedurally drawn dermoscopy-like images, of no patient"
    given = {"pretrained_model_name_or_path": str(tmp_path), "data_dir": "photos"}
    card.write_text("---\ndatasets:\n- dermoscopy\n---\n")
    mixed = data_facts(config(**given))
    assert mixed["dataset"] is None
    assert mixed["data"] == f"{drawn}; of classifiers trained here: a folder of images"
    rewarded = config(**given, reward_classifier="somebody/reward")  # the photos trained nothing of an adapter
    assert (data_facts(rewarded)["dataset"], data_facts(rewarded)["data"]) == ("dermoscopy", drawn)
    assert data_facts(rewarded, CLASSIFIERS)["dataset"] is None  # but the judge beside it
    card.write_text("---\ndatasets:\n- somebody/isic\n---\n")
    assert data_facts(rewarded)["data"] == "somebody/isic"
    del given["data_dir"]
    assert data_facts(config(**given))["dataset"] is None  # and not that of drawn images


def test_splits_of_an_only_diagnosis(tmp_path):
    write_dermoscopy(tmp_path, 2, IMAGE_SIZE)
    fields = {"data_dir": str(tmp_path), "diagnoses": ["nevus"], "opening": "photo of", "num_heldout_prompts": 4}
    splits = make_splits(config(**fields, rare_attributes=[], augmentation={}))
    assert sum(len(images) for images in splits.values()) == 32
    for images in splits.values():
        assert images.attribute_names == ("hair", "gel bubble", "ruler", "ink")
        assert all(prompt.startswith("photo of nevus") for prompt in images.prompts)
    with pytest.raises(InputError, match="rare_attributes are of one diagnosis among several"):
        config(**fields)


def test_thinning_out_leaves_one_of_every_prompt(images):
    thin = thin_out(images, ["nevus", "ink"], 0.01)
    inside = in_subgroup(thin, ["nevus", "ink"])
    assert int(inside.sum()) == 8
    assert len({prompt for prompt, its in zip(thin.prompts, inside.tolist(), strict=True) if its}) == 8
    assert len(thin) == len(images) - 8
    assert len(thin_out(images, [], 0.5)) == len(images)


def test_synthetic_images_fill_up_what_is_missing(images):
    thin = thin_out(images, ["melanoma", "hair"], 0.5)
    prompts = missing_prompts(thin, ["melanoma", "hair"], PROMPTS, BUILDER.targets(PROMPTS))
    assert sorted(prompts) == sorted(prompt for prompt in PROMPTS if "melanoma with hair" in prompt)
    assert missing_prompts(images, ["melanoma", "hair"], PROMPTS, BUILDER.targets(PROMPTS)) == []


def test_only_the_diagnosis_is_left(images):
    left = diagnosis_only(images, ["melanoma", "nevus"])
    assert left.attribute_names == ("melanoma", "nevus")
    assert left.attributes.tolist() == images.attributes[:, :2].tolist()


def test_held_out_prompts_leave_every_attribute_with_both_values():
    train, heldout = split_prompts(BUILDER, 28, seed=1)
    assert (len(train), len(heldout)) == (4, 28)
    assert set(train) | set(heldout) == set(PROMPTS)
    stated = BUILDER.targets(train).mean(dim=0)
    assert ((stated > 0) & (stated < 1)).all()
    assert split_prompts(BUILDER, 28, seed=1) == (train, heldout)
    assert split_prompts(BUILDER, 0)[1] == []
    with pytest.raises(InputError, match="With 31 of 32 prompts held out an attribute is the same in all others"):
        split_prompts(BUILDER, 31)
    only = PromptBuilder(["nevus"], ["hair", "ink"])
    train, heldout = split_prompts(only, 2, seed=1)
    stated = only.targets(train)
    assert stated.sum(dim=0).tolist() == [1, 1]  # of two prompts


def write_captions(folder, rows: list[str], header: str = "file_name,text") -> None:
    Image.fromarray(np.full((20, 30, 3), 200, dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(np.full((40, 20), 100, dtype=np.uint8)).save(folder / "b.png")
    (folder / "metadata.csv").write_text("\n".join([header, *rows]) + "\n")


def test_a_folder_with_captions(tmp_path, caplog):
    write_captions(tmp_path, ["a.png,A mole on the back,", 'b.png,"Hair, and ink", ,'])
    loaded = load_captioned_folder(tmp_path, image_size=16)
    assert "names no subjects, so each of its 2 images counts as one" in caplog.messages[0]
    assert loaded.prompts == ["A mole on the back", "Hair, and ink"]
    assert loaded.pixel_values.shape == (2, 3, 16, 16)
    assert [int(image.unique()) for image in loaded.pixel_values] == [200, 100]
    assert loaded.subject_ids == ["a.png", "b.png"]
    write_captions(tmp_path, ["a.png,A mole,n/a", "b.png,Hair,s2"], "file_name,text,subject_id")
    assert load_captioned_folder(tmp_path, image_size=16).subject_ids == ["a.png", "s2"]
    for patient in ("p1", "p2"):
        (tmp_path / patient).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / patient / "a.png")
    write_captions(tmp_path, ["p1/a.png,A mole", "p2/a.png,Hair"])
    assert load_captioned_folder(tmp_path, image_size=16).subject_ids == ["p1/a.png", "p2/a.png"]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["a.png,x"], "file_name,caption", "has no column 'text'; it has"),
        (["a.png,"], "file_name,text", "line 2: column 'text' is empty"),
        (
            ["a.png,x", "b.png,a nevus, with hair and ink"],
            "file_name,text",
            "metadata.csv, line 3 has more cells than the header; quote cells that hold ','",
        ),
        (["a.png,x", "c.png,y"], "file_name,text", "line 3: the image 'c.png' is missing"),
    ],
)
def test_a_folder_whose_captions_can_t_be_used(rows, header, message, tmp_path):
    write_captions(tmp_path, rows, header)
    with pytest.raises(InputError, match=message):
        load_captioned_folder(tmp_path, image_size=16)


def test_a_folder_without_a_table(tmp_path):
    with pytest.raises(InputError, match=r"has no metadata\.csv; write one with the columns file_name and text"):
        load_captioned_folder(tmp_path)


# -------------------------------------------------------------------------------------------------------- match rates
