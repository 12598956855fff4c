import pytest
import torch

from msrl_diffusers.data.prompts import ATTRIBUTES, PromptBuilder
from msrl_diffusers.errors import InputError


def test_the_published_templates():
    prompts = PromptBuilder().prompts()
    assert len(prompts) == len(set(prompts)) == 32
    assert prompts[0] == "dermoscopy image of melanoma"
    assert prompts[-1] == "dermoscopy image of nevus with hair, gel bubble, ruler and ink"
    assert sum("melanoma" in prompt for prompt in prompts) == 16
    assert all(sum(name in prompt for prompt in prompts) == 16 for name in ATTRIBUTES)


def test_a_prompt_says_what_it_was_built_of():
    builder = PromptBuilder()
    for prompt in builder.prompts():
        stated = builder.parse(prompt)
        assert tuple(stated) == ATTRIBUTES
        assert builder.describe(stated) == prompt
        assert stated["melanoma"] != stated["nevus"]
    assert builder.build("nevus", ["ink", "hair"]) == "dermoscopy image of nevus with hair and ink"
    assert builder.build("nevus", "ink") == "dermoscopy image of nevus with ink"
    assert builder.parse("dermoscopy image of nevus with hair and ink") == {
        "melanoma": False, "nevus": True, "hair": True, "gel bubble": False, "ruler": False, "ink": True,
    }  # fmt: skip


def test_targets_are_columns_in_the_order_of_the_names():
    builder = PromptBuilder()
    targets = builder.targets([builder.build("melanoma", ["gel bubble"]), builder.build("nevus", ["ruler", "ink"])])
    assert targets.dtype == torch.float32
    assert targets.tolist() == [[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 1]]
    assert builder.targets(builder.prompts()).sum(dim=0).tolist() == [16] * 6
    assert builder.targets([]).shape == (0, 6)


def test_capitals_and_spaces_do_not_matter():
    builder = PromptBuilder()
    assert builder.parse("  Dermoscopy image  of Melanoma with Hair\n")["hair"]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat",
        "dermoscopy image of",
        "dermoscopy image of eczema",
        "dermoscopy image of melanoma with",
        "dermoscopy image of melanoma with tattoo",
        "dermoscopy image of melanoma with hair and",
        "dermoscopy image of melanoma with hair with ink",
        "dermoscopy image of melanoma with hair, and ink",
        "photo of melanoma with hair",
        "dermoscopy image of hair",
        3,
    ],
)
def test_a_prompt_outside_the_templates_is_refused(prompt):
    with pytest.raises(InputError, match="outside the templates; write one like 'dermoscopy image of nevus with"):
        PromptBuilder().parse(prompt)


@pytest.mark.parametrize("rest", ["ink and hair", "hair and hair", "hair, ink", "hair and gel bubble and ink"])
def test_other_words_for_the_same_are_told_the_template(rest):
    builder = PromptBuilder()
    with pytest.raises(InputError) as caught:
        builder.parse(f"dermoscopy image of nevus with {rest}")
    template = builder.build("nevus", [name for name in builder.artifacts if name in rest])
    assert str(caught.value).endswith(f"outside the templates; write it as {template!r}.")


def test_other_names():
    builder = PromptBuilder(["covid", "pneumonia", "normal"], ["pacemaker", "support devices"], "chest x-ray of")
    assert builder.attribute_names == ("covid", "pneumonia", "normal", "pacemaker", "support devices")
    prompts = builder.prompts()
    assert len(prompts) == 12
    assert prompts[3] == "chest x-ray of covid with pacemaker and support devices"
    assert builder.targets(prompts[3:5]).tolist() == [[1, 0, 0, 1, 1], [0, 1, 0, 0, 0]]
    assert [builder.describe(builder.parse(prompt)) for prompt in prompts] == prompts
    assert PromptBuilder(["a"], []).prompts() == ["dermoscopy image of a"]
    assert PromptBuilder(["a"], []).attribute_names == ()
    assert PromptBuilder(["melanoma", "nevus"]) == PromptBuilder()


def test_an_only_diagnosis_is_no_attribute():
    """It would be the same in all images, and no classifier can learn it."""
    builder = PromptBuilder(["chest x-ray"], ["pacemaker", "tube"], "image of")
    assert builder.attribute_names == ("pacemaker", "tube")
    prompts = builder.prompts()
    endings = ["", " with tube", " with pacemaker", " with pacemaker and tube"]
    assert prompts == ["image of chest x-ray" + ending for ending in endings]
    assert builder.targets(prompts).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert [builder.describe(builder.parse(prompt)) for prompt in prompts] == prompts
    assert builder.describe({"chest x-ray": 1, "tube": 1}) == prompts[1]
    with pytest.raises(InputError, match="has one of the diagnoses"):
        builder.describe({"chest x-ray": 0, "tube": 1})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"diagnoses": ()}, "at least one diagnosis"),
        ({"artifacts": ("nevus",)}, "different names"),
        ({"artifacts": ("hair and ink",)}, "holds a comma, 'with' or 'and'"),
        ({"artifacts": ("with",)}, "holds a comma, 'with' or 'and'"),
        ({"artifacts": ("ruler, long",)}, "holds a comma"),
        ({"artifacts": ("Hair",)}, "small letters"),
        ({"opening": "image  of"}, "small letters with single spaces"),
        ({"diagnoses": ("",)}, "can't be part of a prompt"),
    ],
)
def test_names_that_make_no_prompts_are_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        PromptBuilder(**arguments)


def test_unknown_names_are_refused():
    builder = PromptBuilder()
    with pytest.raises(InputError, match="no diagnosis 'hair'"):
        builder.build("hair")
    with pytest.raises(InputError, match="no artifact 'tattoo'"):
        builder.build("nevus", ["tattoo"])
    with pytest.raises(InputError, match="no attribute 'tattoo'"):
        builder.describe({"nevus": True, "tattoo": True})
    for attributes in ({"hair": True}, {"nevus": True, "melanoma": True}):
        with pytest.raises(InputError, match="has one of the diagnoses"):
            builder.describe(attributes)


@pytest.mark.parametrize("conditions", ["dermoscopy image of nevus", torch.tensor([0, 1])])
def test_something_else_than_a_list_of_prompts_is_refused(conditions):
    with pytest.raises(InputError, match="list of prompts is needed"):
        PromptBuilder().targets(conditions)
