from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from msrl_diffusers import (
    ClassifierConfig,
    DiffusionNFTConfig,
    DiffusionPPOConfig,
    FeatureConfig,
    FrechetConfig,
    LatentDiffusionConfig,
    RewardBackpropConfig,
    RewardConfig,
    StudyConfig,
    VQGANConfig,
)
from msrl_diffusers.arguments import is_given, parse, read_yaml, take_option
from msrl_diffusers.errors import InputError
from msrl_diffusers.study.command_line import parse_study, read_study
from msrl_diffusers.study.config import TRAINER_CONFIGS


TRAINERS = [
    DiffusionNFTConfig, DiffusionPPOConfig, FeatureConfig, FrechetConfig, LatentDiffusionConfig, RewardBackpropConfig,
    RewardConfig, VQGANConfig,
]  # fmt: skip
CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
YAMLS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "dermoscopy")  # that is text to image


@pytest.mark.parametrize("config_class", [*TRAINERS, StudyConfig])
@pytest.mark.parametrize("value", ["ten", 7.5, True, [3]])
def test_a_value_of_the_wrong_type_is_named(config_class, value):
    with pytest.raises(InputError) as caught:
        config_class(max_steps=value)
    assert str(caught.value).startswith(f"{config_class.__name__}: max_steps must be int")
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("config_class", [*TRAINERS, StudyConfig])
def test_every_field_has_a_type_that_is_checked_and_a_help(config_class):
    for item in fields(config_class):
        assert item.metadata.get("help", "").strip(), item.name
        with pytest.raises(InputError, match=f"{config_class.__name__}: {item.name} must be "):
            config_class(**{item.name: object()})


@pytest.mark.parametrize("config_class", TRAINERS)
def test_whole_numbers_are_taken_as_floats(config_class):
    config = config_class(learning_rate=1)
    assert isinstance(config.learning_rate, float)


@pytest.mark.parametrize("config_class", TRAINERS)
@pytest.mark.parametrize("field", ["max_steps", "train_batch_size", "logging_steps", "learning_rate"])
def test_zero_is_refused_where_it_makes_no_sense(config_class, field):
    with pytest.raises(InputError, match=f"{field} must be positive, got 0"):
        config_class(**{field: 0})


@pytest.mark.parametrize("config_class", [*TRAINERS, StudyConfig])
def test_an_unknown_precision_is_refused(config_class):
    with pytest.raises(
        InputError, match=r"mixed_precision must be one of \['auto', 'no', 'bf16', 'fp16'\], got 'fp8'"
    ):
        config_class(mixed_precision="fp8")


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (DiffusionPPOConfig, {"log_prob_reduction": "max"}, r"log_prob_reduction must be one of \['mean', 'sum'\]"),
        (DiffusionPPOConfig, {"timestep_fraction": 1.5}, r"timestep_fraction must lie in \(0, 1\], got 1.5"),
        (DiffusionPPOConfig, {"eta": 0.0}, "eta must be positive, got 0.0"),
        (DiffusionPPOConfig, {"eta": 1.2}, r"eta is 0 to 1, got 1\.2"),
        (DiffusionPPOConfig, {"gradient_accumulation_steps": 2}, "leave it at 1"),
        (DiffusionPPOConfig, {"kl_coef": -0.1}, "kl_coef must be 0 or more, got -0.1"),
        (DiffusionPPOConfig, {"kl_mode": "adaptive", "kl_coef": 0.0}, "kl_coef must be positive, got 0.0"),
        (DiffusionPPOConfig, {"min_std": -1.0}, "min_std must be 0 or more, got -1.0"),
        (DiffusionPPOConfig, {"adv_clip_max": 0.0}, "adv_clip_max must be positive, got 0.0"),
        (DiffusionPPOConfig, {"max_grad_norm": -1.0}, "max_grad_norm must be positive, got -1.0"),
        (DiffusionPPOConfig, {"lr_scheduler_type": "piecewise_constant"}, "lr_scheduler_type must be one of"),
        (RewardConfig, {"max_steps": 1, "gradient_accumulation_steps": 2}, "so not one update would be made"),
        (StudyConfig, {"max_steps": 2, "diffusion": {"gradient_accumulation_steps": 8}}, "so not one update would be made"),
        (DiffusionPPOConfig, {"watch_limits": {"diversity": [0.02, None]}}, r"diversity needs \[low, high\], two numbers"),
        (DiffusionPPOConfig, {"watch_limits": {"diversity": [0, "1e3"]}}, r"diversity needs \[low, high\], two numbers"),
        (DiffusionPPOConfig, {"watch_limits": {"diversity": [2, 1]}}, r"diversity needs \[low, high\], .*, got \[2, 1\]"),
        (LatentDiffusionConfig, {"snr_gamma": 0.0}, "snr_gamma must be positive, got 0.0"),
        (VQGANConfig, {"discriminator_learning_rate": 0.0}, "discriminator_learning_rate must be positive, got 0.0"),
        (RewardConfig, {"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
        (LatentDiffusionConfig, {"class_dropout": 1.0}, r"class_dropout must lie in \[0, 1\), got 1.0"),
        (LatentDiffusionConfig, {"encode_batch_size": 0}, "encode_batch_size must be positive, got 0"),
        (RewardConfig, {"validation_fraction": 0.0}, r"validation_fraction must lie in \(0, 1\), got 0.0"),
        (FeatureConfig, {"train_batch_size": 1}, "train_batch_size must be 2 or more, got 1: .* does not enlarge"),
        (RewardConfig, {"train_batch_size": 1}, "train_batch_size must be 2 or more, got 1: .* does not enlarge"),
        (StudyConfig, {"rewards": {"train_batch_size": 1}}, "RewardConfig: train_batch_size must be 2 or more, got 1"),
        (RewardConfig, {"max_shift": -1}, "max_shift must be 0 or more, got -1"),
        (FeatureConfig, {"max_shift": -1}, "max_shift must be 0 or more, got -1"),
        (RewardConfig, {"max_gain": 1.0}, r"max_gain must lie in \[0, 1\), got 1.0"),
        (RewardConfig, {"slices_per_volume": 0}, "slices_per_volume must be positive, got 0"),
        (StudyConfig, {"watch_per_class": -1}, "watch_per_class must be 0 or more, got -1"),
        (StudyConfig, {"dataset": "mnist"}, r"dataset must be one of \['phantoms', 'prepared', 'brats2019', .*\], got 'mnist'"),
        (StudyConfig, {"target_map": "cubic"}, "target_map must be one of .*, got 'cubic'"),
        (StudyConfig, {"dataset": "nifti_folder"}, "nifti_folder needs data_dir"),
        (StudyConfig, {"pretrained": "/nowhere"}, "pretrained=/nowhere is no pipeline folder"),
        (StudyConfig, {"image_size": 0}, "image_size must be positive, got 0"),
        (StudyConfig, {"unet": [1]}, r"unet must be dict, got \[1\]"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused(config_class, settings, message):
    with pytest.raises(InputError, match=message):
        config_class(**settings)


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        (DiffusionPPOConfig, {"lr_scheduler_type": "zigzag"}),
        (DiffusionPPOConfig, {"report_to": "my_diary"}),
        (ClassifierConfig, {"train_batch_size": 1}),
        (DiffusionPPOConfig, {"save_steps": -1}),
        (DiffusionPPOConfig, {"learning_rate": float("nan")}),
        (DiffusionPPOConfig, {"reward_weights": ["much", "little"]}),
        (StudyConfig, {"synthetic_steps": ["ten", "fifty"]}),
        (StudyConfig, {"samplers": [{"num_inference_steps": 5}]}),
        (StudyConfig, {"vqvae": {"block_channels": [8]}}),
        (StudyConfig, {"max_steps": 0}),
    ],
)
def test_a_bad_setting_is_refused_before_anything_runs(config_class, settings):
    with pytest.raises(InputError):
        config_class(**settings)


@pytest.mark.parametrize("section", list(TRAINER_CONFIGS))
def test_sections_are_checked(section):
    with pytest.raises(InputError, match=f"Section '{section}' has the unknown field 'max_stepz'"):
        StudyConfig(**{section: {"max_stepz": 3}})
    with pytest.raises(InputError, match="max_steps must be int, got 'ten'"):
        StudyConfig(**{section: {"max_steps": "ten"}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "magic"}, r"method must be one of \['ppo', 'nft', 'draft', 'frechet', 'ddo'\], got 'magic'"),
        (
            {"frechet_features": ["judge"]},
            r"frechet_features must be of \['label', 'volume', 'slice'\], got \['judge'\]",
        ),
        ({"marginal_labels": 1.5}, r"marginal_labels must lie in \[0, 1\], got 1.5"),
        (
            {"ppo": {"reward_weights": [1.0]}},
            r"Section 'ppo': reward_weights needs a number for each of \['volume', 'slice'\]",
        ),
        ({"samplers": []}, "samplers is empty; give one or more"),
        (
            {"samplers": [{"num_inference_steps": "ten", "eta": 0.0}]},
            "A sampler has 1 to 1000 num_inference_steps, and numbers",
        ),
        ({"samplers": [{"num_inference_steps": 1001, "eta": 0.0}]}, "A sampler has 1 to 1000 num_inference_steps"),
        (
            {"samplers": [{"num_inference_steps": 10, "eta": "1e-1"}]},
            "A sampler has 1 to 1000 num_inference_steps, and numbers",
        ),
        (
            {
                "samplers": [{"num_inference_steps": 10, "eta": 0.0, "guidance_scale": 2.0}],
                "diffusion": {"class_dropout": 0.0},
            },
            r"A guidance_scale of 2.0 \(the sampler .*\) needs a denoiser trained with class_dropout above 0",
        ),
        (
            {"method": "nft", "nft": {"guidance_scale": 3.0}, "diffusion": {"class_dropout": 0.0}},
            r"A guidance_scale of 3.0 \(section 'nft'\) needs a denoiser trained with class_dropout above 0",
        ),
        ({"data_dir": "somewhere"}, "data_dir=somewhere is not read: the dataset is phantoms. Give dataset as well"),
        ({"ppo": {"push_to_hub": True}}, "Section 'ppo': unset push_to_hub; a study leaves pipeline_rl"),
        ({"synthetic_steps": [2000]}, "synthetic_steps are at most 1000, got 2000"),
        ({"synthetic_steps": []}, "synthetic_steps is empty; give one or more"),
        ({"reconstruction_steps": []}, "reconstruction_steps is empty; give one or more"),
        ({"synthetic_steps": [10, 0]}, "synthetic_steps must be 1 or more, got 0"),
        ({"reconstruction_steps": [0, 10]}, "reconstruction_steps must be from 1 to 100, got 0"),
        ({"reconstruction_steps": [1, 101]}, "reconstruction_steps must be from 1 to 100, got 101"),
        ({"evaluation_per_class": 1}, "evaluation_per_class must be 2 or more, got 1"),
        ({"trajectories_per_class": 0}, "trajectories_per_class must be 2 or more, got 0"),
        ({"num_curve_points": -1}, "num_curve_points must be 0 or more, got -1"),
        ({"degraded_anchors": {"kinds": ["blur"]}}, "needs two lists, kinds and strengths"),
        ({"degraded_anchors": {"kinds": ["smear"], "strengths": [0.5]}}, "kind 'smear' is unknown; choose of"),
        ({"degraded_anchors": {"kinds": ["blur"], "strengths": [0.0]}}, r"a strength must lie in \(0, 1\], got 0.0"),
        ({"degraded_anchors": {"kinds": ["blur"], "strengths": [0.1, 0.104]}}, "strengths must differ in hundredths"),
        ({"policy_anchors": {"a": 3}}, "policy_anchors must name a folder or file for 'a', got 3"),
        ({"validity_floors": {"accuracy": 0.5}}, "validity_floors names 'accuracy'; figures are"),
        ({"validity_floors": {"auc": "high"}}, "validity_floors: auc must be a number, got 'high'"),
        ({"validity_floors": {"unseen.auc": 0.6}}, "unseen.auc needs unseen_sets"),
        ({"refresh": {"every": 0}}, "every must be positive, got 0"),
        ({"draft": {"use_lora": True, "fuse_lora": False}}, "fuse_lora must be true in a study"),
        ({"nft": {"sampler": "DPMSolverMultistepScheduler"}}, "'nft': sampler must be unset in a study"),
        ({"ddo": {"sampler": "DPMSolverMultistepScheduler"}}, "'ddo': sampler must be unset in a study"),
        ({"unet": {"in_channels": 16}}, "'unet': in_channels follows from the data and the autoencoder; remove it"),
        ({"rewards": {"seed": 3}}, "'rewards': its seeds follow from the study's; remove seed here"),
    ],
)
def test_options_of_a_study_that_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        StudyConfig(**fields)


def test_a_stage_without_checkpoints_begins_anew():
    """`"latest"` would be refused: the log of the run before would be lost."""
    study = StudyConfig(vqgan={"save_steps": 0}, ppo={"save_steps": 0, "resume_from_checkpoint": "checkpoint-3"})
    found = {name: study.trainer_config(name).resume_from_checkpoint for name in ("vqgan", "diffusion", "ppo")}
    assert found == {"vqgan": None, "diffusion": "latest", "ppo": "checkpoint-3"}


def test_a_study_hands_its_settings_to_the_trainers(tmp_path):
    study = StudyConfig(
        output_dir=str(tmp_path), seed=3, max_steps=7, mixed_precision="bf16", vqgan={"max_steps": 5, "seed": 4},
        extractors={"mixed_precision": "no"},
    )  # fmt: skip
    vqgan, diffusion = study.trainer_config("vqgan"), study.trainer_config("diffusion")
    assert (vqgan.max_steps, vqgan.seed, vqgan.mixed_precision) == (5, 4, "bf16")
    assert (diffusion.max_steps, diffusion.seed) == (7, 3)
    assert Path(diffusion.output_dir) == tmp_path / "diffusion"
    judge = study.trainer_config("extractors", "judge", seed=9)
    assert (judge.seed, judge.mixed_precision, Path(judge.output_dir)) == (9, "no", tmp_path / "extractors" / "judge")


@pytest.mark.parametrize("content", [b"stray: 1\n", b"5: 1\n", b"pretrained: 5\n", b"dataset: \xff\n"])
def test_a_study_s_file_that_can_t_be_used_is_one_sentence(tmp_path, content):
    (tmp_path / "study.yaml").write_bytes(content)
    with pytest.raises(
        InputError, match=r"unknown field '(stray|5)'; it may have|pretrained must be|is no valid YAML"
    ) as caught:
        parse_study("ppo", arguments=["--config", str(tmp_path / "study.yaml")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_of_the_examples_is_a_study(path, tmp_path):
    settings = read_study(path)
    if settings.get("pretrained") and not Path(settings["pretrained"]).is_dir():
        settings.pop("pretrained")
    if settings.get("dataset") == "nifti_folder":
        settings["data_dir"] = str(tmp_path)
    study = StudyConfig(**settings)
    for stage in TRAINER_CONFIGS:
        assert study.trainer_config(stage).max_steps > 0


def test_there_are_configs():
    assert YAMLS


def write(path, text):
    path.write_text(text)
    return str(path)


def test_read_yaml_explains(tmp_path):
    with pytest.raises(InputError, match=r"none.yaml can't be read: No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"bad.yaml is no valid YAML") as caught:
        read_yaml(write(tmp_path / "bad.yaml", "a: [1\nb: 2"))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="must be a mapping"):
        read_yaml(write(tmp_path / "list.yaml", "- 1"))


def test_the_command_line_overrides_the_file():
    defaults = {"seed": 5, "max_steps": 9, "learning_rate": 1e-2}
    (config,) = parse([RewardConfig], defaults, ["--max_steps", "4"])
    assert (config.seed, config.max_steps, config.learning_rate) == (5, 4, 1e-2)
    with pytest.raises(InputError, match="unknown field 'sed'"):
        parse([RewardConfig], {"sed": 5}, [])
    with pytest.raises(InputError, match=r"max_steps must be int, got 7\.5"):
        parse([RewardConfig], {"max_steps": 7.5}, [])


def test_a_word_for_a_number_in_the_file_is_refused_in_one_sentence():
    with pytest.raises(InputError, match=r"max_steps must be int.*'ten'"):
        parse([RewardConfig], {"max_steps": "ten"}, [])


def test_an_option_is_given_in_any_spelling_of_the_parser():
    for words in (["--model_name=x"], ["--seed", "1", "--model-name-or-path", "x"], ["--mod", "x"]):
        assert is_given("model_name_or_path", words)
    for words in ([], ["--", "model_name_or_path"], ["--model_name_or_path_x"], ["--seed", "model_name_or_path"]):
        assert not is_given("model_name_or_path", words)


def test_take_option():
    assert take_option("config", ["--seed", "1"]) == (None, ["--seed", "1"])
    assert take_option("config", ["--config", "a", "--seed", "1"]) == ("a", ["--seed", "1"])
    assert take_option("config", ["--seed", "1", "--config=b=c"]) == ("b=c", ["--seed", "1"])
    with pytest.raises(InputError, match="--config needs a value"):
        take_option("config", ["--config"])


@pytest.mark.parametrize("section", list(TRAINER_CONFIGS))
def test_a_section_of_a_study_on_the_command_line(section, tmp_path):
    path = write(
        tmp_path / "a.yaml", f"seed: 3\nnum_per_class: 5\n{section}:\n  max_steps: 40\n  learning_rate: 0.5\n"
    )
    study = parse_study(section, arguments=["--config", path, "--max_steps", "6", "--output_dir", str(tmp_path)])
    trainer = study.trainer_config(section)
    assert (trainer.max_steps, trainer.learning_rate, trainer.seed) == (6, 0.5, 3)
    assert (study.seed, study.num_per_class, study.output_dir) == (3, 5, str(tmp_path))


def test_the_default_config_of_a_script(tmp_path):
    path = write(tmp_path / "a.yaml", "num_per_class: 5\n")
    assert parse_study("ppo", path, []).num_per_class == 5
    assert parse_study("ppo", None, []).num_per_class == StudyConfig().num_per_class


def test_an_option_equal_to_the_default_still_overrides_the_file(tmp_path):
    path = write(tmp_path / "a.yaml", "ppo:\n  max_steps: 40\n")
    study = parse_study("ppo", path, ["--max_steps", str(DiffusionPPOConfig().max_steps)])
    assert study.trainer_config("ppo").max_steps == DiffusionPPOConfig().max_steps


def test_checkpoints_can_be_switched_off_on_the_command_line(tmp_path):
    study = parse_study("ppo", write(tmp_path / "a.yaml", "seed: 3\n"), ["--save_steps", "0"])
    assert study.trainer_config("ppo").save_steps == 0


def test_a_section_keeps_its_own_precision_on_the_command_line(tmp_path):
    path = write(tmp_path / "a.yaml", "mixed_precision: bf16\nppo:\n  mixed_precision: 'no'\n")
    study = parse_study("ppo", path, [])
    assert (study.mixed_precision, study.trainer_config("ppo").mixed_precision) == ("bf16", "no")


@pytest.mark.parametrize("text", ["ppo:\n", "ppo: 5\n"])
def test_a_section_that_is_no_mapping_is_refused(text, tmp_path):
    with pytest.raises(InputError, match="ppo must be dict"):
        parse_study("ppo", write(tmp_path / "a.yaml", text), [])


def test_a_relative_release_is_relative_to_its_file(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "model_index.json").write_text("{}")
    path = write(tmp_path / "configs" / "a.yaml", "pretrained: ../release\n")
    monkeypatch.chdir("/")
    assert Path(read_study(path)["pretrained"]) == tmp_path / "release"
    assert StudyConfig(**read_study(path)).pretrained == str(tmp_path / "release")


@dataclass
class Placed:
    place: str
    track: bool = field(default=True, metadata={"help": "Where it goes."})


@dataclass
class Flagged(Placed):
    quick: bool = False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_stepz", "4"], "There is no option --max_stepz; did you mean --max_steps?"),
        (["--max-stepz=4"], "There is no option --max-stepz; did you mean --max_steps?"),
        (["--teapot"], "There is no option --teapot; --help shows the options."),
        (["--place", "a", "--max_steps", "4", "5"], "No option takes '5'; --help shows the options."),
        (["--place", "a", "-z", "4"], "No option takes '-z'; --help shows the options."),
        (
            ["--max_steps", "ten"],
            "Argument --max_steps/--max-steps: invalid int value: 'ten'; --help shows the options.",
        ),
        (["--max_steps"], "Argument --max_steps/--max-steps: expected one argument; --help shows the options."),
        (["--trak"], "There is no option --trak; did you mean --track?"),
        ([], "The following arguments are required: --place; --help shows the options."),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments, message):
    with pytest.raises(InputError) as caught:
        parse([Placed, RewardConfig], None, arguments)
    assert str(caught.value) == message


def test_options_may_be_shortened_and_values_may_look_like_options():
    arguments = ["--place=--here", "--max_st", "4", "--trac", "no"]
    placed, config = parse([Placed, RewardConfig], None, arguments)
    assert (placed.place, placed.track, config.max_steps) == ("--here", False, 4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--quick", "here", "--track", "no"], ("here", False, True)),
        (["--track", "no", "--qui", "here"], ("here", False, True)),
        (["--track", "False", "--quick", "--", "here"], ("here", False, True)),
        (["--quick=no", "here", "--track"], ("here", True, False)),
        (["--quick", "no", "--track", "n", "no"], ("no", False, False)),
        (["--", "--quick"], ("--quick", True, False)),
    ],
)
def test_a_flag_takes_no_positional_for_its_value(arguments, expected):
    (placed,) = parse([Flagged], None, arguments, positionals=("place",))
    assert (placed.place, placed.track, placed.quick) == expected


def test_a_mapping_is_an_option_too():
    arguments = ["--synthetic_arms", '{"other": "DIR"}', "--ppo", "{max_steps: 3, learning_rate: 1.0e-4}"]
    (config,) = parse([StudyConfig], {"ppo": {"clip_range": 0.1}}, arguments)
    assert config.synthetic_arms == {"other": "DIR"}
    assert config.ppo == {"max_steps": 3, "learning_rate": 1e-4}
    with pytest.raises(InputError, match=r"needs a mapping such as \{name: value\}, got 'DIR'; --help"):
        parse([StudyConfig], None, ["--synthetic_arms", "DIR"])


def test_help_keeps_the_lines_of_the_description(capsys):
    with pytest.raises(SystemExit) as ended:
        parse([Placed], None, ["--help"], prog="msrl test", description="Does it.\n\n    msrl test --place here\n")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: msrl test ")
    assert "\nDoes it.\n\n    msrl test --place here\n" in shown
    assert "(default: True)" in shown
