"""TextToImageStudyConfig: what it refuses, and the configs that come with the package."""

from pathlib import Path

import pytest
from tiny import tiny_stable_diffusion
from tiny_text_to_image import RESNET, config

from msrl_diffusers.errors import InputError
from msrl_diffusers.text_to_image import CHAIN
from msrl_diffusers.text_to_image.chain import STAGES
from msrl_diffusers.text_to_image.command_line import MODELS, parse_text_to_image
from msrl_diffusers.text_to_image.config import CLASSIFIERS


EXAMPLES = Path(__file__).parent.parent / "examples"


def test_no_two_of_reward_judge_and_features_are_one_model(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "one")
    (tmp_path / "one").mkdir()
    places = (str(tmp_path / "one"), str(tmp_path / "link")), ("owner/one", "owner/one")
    for first, second in places:
        with pytest.raises(InputError, match=f"judge_classifier={second} is also the reward_classifier"):
            config(tmp_path / "out", reward_classifier=first, judge_classifier=second)
        with pytest.raises(InputError, match=f"fid_extractor={second} is also the judge_classifier"):
            config(tmp_path / "out", judge_classifier=first, fid_extractor=second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unets": {}}, "unexpected keyword"),
        ({"unet": {"block_channels": [8]}}, "Section 'unet' has the unknown field 'block_channels'"),
        ({"ppo": {"max_step": 3}}, "Section 'ppo' has the unknown field 'max_step'"),
        ({"ppo": {"push_to_hub": True}}, "Section 'ppo': unset push_to_hub"),
        ({"classifiers": {"seed": 3}}, "Section 'classifiers': remove seed here; every network has a seed of its own"),
        ({"augmentation": {"seed": 3}}, "Section 'augmentation': remove seed here; its seeds are augmentation_seeds"),
        ({"augmentation": {"threshold": 0.3}}, "Section 'augmentation': remove threshold here"),
        ({"ppo": {"patience": 3}, "select_by": "last"}, "'ppo': patience counts rollouts since select_by improved"),
        ({"reward_kind": "nice"}, "reward_kind must be one of"),
        (
            {"artifacts": ["hair", "sand"]},
            "Drawn images have the diagnoses, artifacts and opening of dermoscopy; give a data_dir",
        ),
        (
            {"opening": "photo of"},
            "Drawn images have the diagnoses, artifacts and opening of dermoscopy; give a data_dir",
        ),
        ({"num_heldout_prompts": 32}, "num_heldout_prompts=32 of 32 prompts leaves none to train on"),
        ({"num_heldout_prompts": 0}, "select_by: heldout_reward needs num_heldout_prompts above 0"),
        ({"rare_attributes": ["sand"]}, "rare_attributes: there is no 'sand'"),
        ({"rare_attributes": ["hair"]}, "rare_attributes needs one diagnosis"),
        ({"rare_attributes": []}, "Section 'augmentation' needs rare_attributes"),
        ({"rare_share": 0.0}, "rare_share must lie in"),
        ({"sampler": {"steps": 3}}, "Section 'sampler' has the unknown field 'steps'"),
        ({"sampler": {"eta": 1.5}}, r"Section 'sampler': eta is a number from 0 to 1, got 1\.5"),
        ({"sampler": {"eta": "1e-1"}}, r"Section 'sampler': eta is a number from 0 to 1, got '1e-1'"),
        ({"sampler": {"num_inference_steps": None}}, "num_inference_steps is a whole number above 0, got None"),
        ({"sampler": {"num_inference_steps": 0}}, "num_inference_steps is a whole number above 0, got 0"),
        ({"sampler": {"num_inference_steps": "many"}}, "num_inference_steps is a whole number above 0, got 'many'"),
        (
            {"sampler": {"guidance_scale": "5e0"}},
            r"'sampler': guidance_scale is a number, 1 \(none\) or more, got '5e0'",
        ),
        ({"sampler": {"guidance_scale": 0.5}}, r"'sampler': guidance_scale is a number, 1 \(none\) or more, got 0\.5"),
        ({"ppo": {"guidance_scale": 0.0}}, r"'ppo': guidance_scale is 1 \(none\) or more, got 0\.0"),
        (
            {"text_encoder": {"max_position_embeddings": 77}},
            "'text_encoder' has the unknown field 'max_position_embeddings'",
        ),
        ({"vae": {"sample_size": 32}}, "'vae' has the unknown field 'sample_size'; of AutoencoderKL it may have"),
        ({"unet": {"cross_attention_dim": 64}}, "'unet' has the unknown field 'cross_attention_dim'"),
        ({"classifier_models": {"critic": {}}}, "unknown role 'critic'; roles are .*'augmentation'"),
        ({"classifier_models": {"augmentation": RESNET}}, "'classifier_models' needs reward: {architecture: one of"),
        ({"classifier_models": dict.fromkeys(CLASSIFIERS, RESNET)}, "'classifier_models' needs augmentation: "),
        ({"pretrained_model_name_or_path": "nowhere"}, "nowhere holds no StableDiffusionPipeline"),
    ],
)
def test_settings_that_can_t_be_used_are_refused(changes, message, tmp_path):
    with pytest.raises((InputError, TypeError), match=message):
        CHAIN.fingerprint(config(tmp_path, **changes), "data")


def test_the_config_for_stable_diffusion_has_the_published_sampler_and_reward(tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path / "pipeline")
    path = EXAMPLES / "configs" / "dermoscopy" / "stable_diffusion.yaml"
    given = ["--pretrained_model_name_or_path", str(tmp_path / "pipeline"), "--data_dir", str(tmp_path)]
    found = parse_text_to_image("ppo", arguments=["--config", str(path), *given])
    ppo = found.trainer_config("ppo")
    assert (ppo.num_inference_steps, ppo.eta, ppo.guidance_scale, found.reward_kind) == (50, 1, 5, "share")
    assert ppo.samples_per_rollout % (32 - found.num_heldout_prompts) == 0  # every prompt as often


def test_the_embedded_story_starts_from_models_of_the_config_that_trains_all():
    dermoscopy = EXAMPLES / "configs" / "dermoscopy"
    whole, found = (parse_text_to_image("ppo", dermoscopy / name, []) for name in ("cpu.yaml", "demo.yaml"))
    assert CHAIN.enabled(whole) == list(STAGES)
    assert CHAIN.enabled(found) == ["data", "ppo", "evaluate", "augmentation", "report"]
    for name in ("image_size", "data_seed", "num_per_prompt", "rare_attributes", "rare_share"):
        assert getattr(found, name) == getattr(whole, name)  # else the models were trained on held-out images
    assert (found.ppo, found.evaluation_sampler) == (whole.ppo, whole.evaluation_sampler)
    ppo, train_prompts = found.trainer_config("ppo"), 32 - found.num_heldout_prompts
    assert ppo.use_lora
    assert ppo.samples_per_rollout % train_prompts == 0  # every prompt as often
    assert (
        len({settings["architecture"] for role, settings in whole.classifier_models.items() if role != "augmentation"})
        == 3
    )
    assert found.augmentation_seeds == [0, 1, 2]


@pytest.mark.parametrize("option", ["data_dir", *MODELS])
def test_other_data_or_models_than_the_embedded_need_a_config_of_their_own(option, tmp_path):
    """Judge, distances and settings would be those of small drawn images."""
    demo, given = EXAMPLES / "configs" / "dermoscopy" / "demo.yaml", [f"--{option}", str(tmp_path)]
    with pytest.raises(InputError, match=f"--{option} needs --config .* would be those of demo.yaml"):
        parse_text_to_image("ppo", demo, given)
    tiny_stable_diffusion().save_pretrained(tmp_path)
    assert getattr(parse_text_to_image("ppo", demo, ["--config", str(demo), *given]), option) == str(tmp_path)
