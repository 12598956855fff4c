"""The text-to-image study by its command lines and scripts."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny import copied, differing
from tiny_text_to_image import IMAGE_SIZE, config, tiny_text_to_image, tiny_text_to_image_study

from msrl_diffusers.data.dermoscopy import write_dermoscopy
from msrl_diffusers.errors import InputError
from msrl_diffusers.text_to_image import CHAIN
from msrl_diffusers.text_to_image.chain import STAGES
from msrl_diffusers.text_to_image.command_line import parse_text_to_image
from msrl_diffusers.trainers.lora import LORA_FILE


EXAMPLES = Path(__file__).parent.parent / "examples"


def write_config(folder: Path, **changes) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**tiny_text_to_image_study(), **changes}))
    return str(path)


def run_here(script: str, *arguments: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_options_override_the_section_and_the_study(tmp_path):
    path = write_config(tmp_path)
    arguments = ["--config", path, "--learning_rate", "0.5", "--seed", "7", "--reward_kind", "exact", "--rl_seed", "2"]
    arguments += ["--subject_column", "patient"]
    found = parse_text_to_image("ppo", arguments=arguments)
    assert found.trainer_config("ppo").learning_rate == 0.5
    assert (found.seed, found.seed_of("ppo"), found.reward_kind, found.subject_column) == (7, 2, "exact", "patient")
    assert found.trainer_config("ppo").save_steps == 5
    plain = parse_text_to_image("ppo", arguments=["--config", path])
    study = replace(config(plain.output_dir))
    assert {name: CHAIN.fingerprint(plain, name) for name in STAGES} == {
        name: CHAIN.fingerprint(study, name) for name in STAGES
    }


def test_the_story_by_its_script(tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path, max_steps=1, augmentation={})
    run_here(
        "train_text_to_image.py", "--config", path, "--output_dir", str(tmp_path / "out"), monkeypatch=monkeypatch
    )
    assert "diffusion/pipeline written" in capsys.readouterr().out
    trained = (tmp_path / "out" / "diffusion" / "stage.json").read_text()
    assert not (tmp_path / "out" / "ppo").exists()
    run_here(
        "train_ppo_text_to_image.py", "--config", path, "--output_dir", str(tmp_path / "out"), monkeypatch=monkeypatch
    )
    assert capsys.readouterr().out.strip().endswith(f"report: {tmp_path / 'out' / 'report.md'}")
    assert (tmp_path / "out" / "diffusion" / "stage.json").read_text() == trained
    assert (tmp_path / "out" / "report.md").is_file()


def test_a_script_that_has_nothing_to_train_says_so(tmp_path, monkeypatch, capsys):
    tiny_text_to_image().save_pretrained(tmp_path / "base")
    path = write_config(tmp_path, pretrained_model_name_or_path=str(tmp_path / "base"))
    capsys.readouterr()  # the progress of saving
    with pytest.raises(SystemExit):
        run_here(
            "train_text_to_image.py", "--config", path, "--output_dir", str(tmp_path / "out"), monkeypatch=monkeypatch
        )
    said = capsys.readouterr()
    assert said.err.startswith("error: The config gives a fine-tuned pipeline, so none would be trained; take")
    assert "written" not in said.out
    assert not (tmp_path / "out").exists()


def test_captions_without_a_folder_are_refused(tmp_path, monkeypatch, capsys):
    """Drawn images would be what a given pipeline is fine-tuned on."""
    tiny_text_to_image().save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit):
        run_here(
            "train_text_to_image.py", "--pretrained_model_name_or_path", str(tmp_path / "base"),
            "--caption_column", "text", "--output_dir", str(tmp_path / "out"), "--report_to", "none",
            monkeypatch=monkeypatch,
        )  # fmt: skip
    assert "--caption_column needs --data_dir" in capsys.readouterr().err


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_given_pipeline_is_fine_tuned_on_a_folder(use_lora, tmp_path, monkeypatch, capsys):
    tiny_text_to_image().save_pretrained(tmp_path / "base")
    write_dermoscopy(tmp_path / "images", 1, IMAGE_SIZE)
    run_here(
        "train_text_to_image.py", "--pretrained_model_name_or_path", str(tmp_path / "base"),
        "--data_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "out"), "--max_steps", "2",
        "--learning_rate", "1e-2", "--report_to", "none", "--use_lora", str(use_lora), "--lora_rank", "2",
        monkeypatch=monkeypatch,
    )  # fmt: skip
    assert "written" in capsys.readouterr().out
    assert (tmp_path / "out" / "lora" / LORA_FILE).is_file() == use_lora
    assert (tmp_path / "out" / "curves.png").is_file()
    tuned = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")  # what the next command starts from
    assert differing(copied(tiny_text_to_image().unet), copied(tuned.unet))
    assert not getattr(tuned.unet, "peft_config", None)


def test_a_given_pipeline_is_fine_tuned_on_images_of_other_attributes(tmp_path, monkeypatch, capsys, caplog):
    """No classifier is trained, so an attribute may be the same in all images."""
    tiny_text_to_image().save_pretrained(tmp_path / "base")
    (tmp_path / "images").mkdir()
    rows = ["file_name,finding,devices,patient"]
    for number, finding in enumerate(("PE", "normal")):
        Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (90 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        rows.append(f"{number}.png,{finding},1,p{number}")
    (tmp_path / "images" / "metadata.csv").write_text("\n".join(rows) + "\n")
    attributes = ["--diagnoses", "effusion", "normal", "--artifacts", "tube", "--opening", "chest x-ray of"]
    arguments = ["--pretrained_model_name_or_path", str(tmp_path / "base"), *attributes, "--report_to", "none"]
    arguments += [
        "--diagnosis_names",
        "{PE: effusion}",
        "--artifact_columns",
        "{tube: devices}",
        "--subject_column",
        "patient",
    ]
    arguments += ["--diagnosis_column", "finding", "--max_steps", "1", "--output_dir", str(tmp_path / "out")]
    run_here("train_text_to_image.py", *arguments, "--data_dir", str(tmp_path / "images"), monkeypatch=monkeypatch)
    assert (tmp_path / "out" / "pipeline" / "model_index.json").is_file()
    assert not any("left out" in message or "no subjects" in message for message in caplog.messages)
    with pytest.raises(SystemExit):
        run_here("train_text_to_image.py", *arguments, monkeypatch=monkeypatch)
    assert "Drawn images have the prompts of dermoscopy; give a data_dir for others" in capsys.readouterr().err


def test_a_user_s_error_is_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run_here("train_ppo_text_to_image.py", "--config", str(tmp_path / "none.yaml"), monkeypatch=monkeypatch)
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "none.yaml can't be read" in line
    (tmp_path / "wrong.yaml").write_text("images_size: 3\n")
    with pytest.raises(InputError, match="unknown field 'images_size'"):
        parse_text_to_image("ppo", tmp_path / "wrong.yaml", [])
