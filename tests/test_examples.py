"""The scripts as a user runs them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import copied, differing, tiny_phantoms, tiny_pipeline, tiny_study

from msrl_diffusers import (
    MedVolumePipeline,
    SliceFeatureExtractor,
    SliceRewardModel,
    VolumeRewardModel,
    VQModel3D,
    load_phantoms,
)
from msrl_diffusers.study.chain import STAGES
from msrl_diffusers.trainers.base import read_log


ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def write_config(path: Path, **changes) -> str:
    path.write_text(yaml.safe_dump({**tiny_study(), **changes}))
    return str(path)


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )


def run_here(script: str, *arguments: str, monkeypatch) -> None:
    """The script as `__main__` of this process, which spares the seconds that its imports take."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A pipeline and two reward models, saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    tiny_pipeline().save_pretrained(folder / "pipeline")
    VolumeRewardModel(block_out_channels=(8, 8)).save_pretrained(folder / "volume")
    SliceRewardModel(block_out_channels=(8, 8)).save_pretrained(folder / "slice")
    return folder


def test_run_study_by_its_config(tmp_path):
    config = write_config(tmp_path / "tiny.yaml")
    done = run("examples/run_study.py", "--config", config, "--max_steps", "1", "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == f"{tmp_path / 'out'}: report.md done"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["ppo"]["rollouts"] == 1
    assert "Warning" not in done.stderr


@pytest.mark.slow
def test_train_ppo_on_checkpoints(checkpoints, tmp_path):
    done = run(
        "-m", "accelerate.commands.launch", "--config_file", "examples/accelerate_configs/cpu.yaml",
        "examples/train_ppo.py", "--pipeline", str(checkpoints / "pipeline"),
        "--reward_volume", str(checkpoints / "volume"), "--reward_slice", str(checkpoints / "slice"),
        "--output_dir", str(tmp_path), "--max_steps", "2", "--report_to", "none", "--rollout_batch_size", "4",
        "--num_rollout_batches", "1", "--train_batch_size", "2", "--num_inference_steps", "3",
        "--learning_rate", "1e-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    history = read_log(tmp_path)
    assert [line["step"] for line in history] == [1, 2]
    assert {"reward/mean", "reward/volume", "reward/slice", "ppo/kl", "ppo/ratio_first"} <= set(history[0])
    assert (tmp_path / "curves.png").is_file()
    tuned = MedVolumePipeline.from_pretrained(tmp_path / "pipeline_rl").unet.state_dict()
    before = tiny_pipeline().unet.state_dict()
    assert any(not torch.equal(tuned[name], before[name]) for name in before)


def test_train_ppo_on_checkpoints_keeps_the_weights_of_the_lowest_distance(checkpoints, tmp_path, monkeypatch, capsys):
    tiny_phantoms().save(tmp_path / "real.safetensors")
    SliceFeatureExtractor(block_out_channels=(8, 8), num_features=4).save_pretrained(tmp_path / "extractor")
    run_here(
        "train_ppo.py", "--pipeline", str(checkpoints / "pipeline"), "--reward_volume", str(checkpoints / "volume"),
        "--real", str(tmp_path / "real.safetensors"), "--extractor", str(tmp_path / "extractor"),
        "--output_dir", str(tmp_path / "out"), "--max_steps", "4", "--patience", "1", "--report_to", "none",
        "--rollout_batch_size", "4", "--num_rollout_batches", "1", "--train_batch_size", "2", "--num_inference_steps", "3",
        "--learning_rate", "1e-2", monkeypatch=monkeypatch,
    )  # fmt: skip
    distances = [line["watch/label_fid"] for line in read_log(tmp_path / "out")]
    best = distances.index(min(distances))
    assert len(distances) == min(best + 2, 4)  # one look without a lower one ends it
    tuned = MedVolumePipeline.from_pretrained(tmp_path / "out" / "pipeline_rl")
    assert bool(differing(copied(tuned.unet), copied(tiny_pipeline().unet))) == (
        best > 0
    )  # each is of before its update
    assert "pipeline_rl" in capsys.readouterr().out


def test_train_ppo_refuses_real_volumes_of_another_size(checkpoints, tmp_path, monkeypatch, capsys):
    """Whose distance means nothing: the slice extractor takes any size."""
    load_phantoms(2, image_size=32).save(tmp_path / "real.safetensors")
    SliceFeatureExtractor(block_out_channels=(8, 8), num_features=4).save_pretrained(tmp_path / "extractor")
    with pytest.raises(SystemExit):
        run_here(
            "train_ppo.py", "--pipeline", str(checkpoints / "pipeline"), "--reward_volume", str(checkpoints / "volume"),
            "--real", str(tmp_path / "real.safetensors"), "--extractor", str(tmp_path / "extractor"),
            "--output_dir", str(tmp_path / "out"), "--report_to", "none", monkeypatch=monkeypatch,
        )  # fmt: skip
    error = capsys.readouterr().err
    assert "has volumes of shape (1, 16, 16, 16), --real" in error
    assert "real.safetensors (1, 32, 32, 32); prepare them alike." in error


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_train_rl_needs_no_method(flag, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run_here("train_rl.py", flag, monkeypatch=monkeypatch)
    assert (caught.value.code, capsys.readouterr().out.startswith("usage: train_rl.py")) == (0, True)


def test_make_clean_removes_no_results(tmp_path):
    (tmp_path / "outputs" / "study").mkdir(parents=True)
    (tmp_path / "build").mkdir()
    subprocess.run(
        ["make", "-C", str(tmp_path), "-f", str(ROOT / "Makefile"), "clean"], check=True, capture_output=True
    )
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


@pytest.mark.slow
def test_a_study_in_two_processes(tmp_path):
    """All processes train, the first one does the rest; every stage leaves what it leaves in one process."""
    config = write_config(tmp_path / "tiny.yaml", max_steps=1)
    done = run(
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
        "examples/train_ppo.py", "--config", config, "--output_dir", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    # two rollout batches of four samples and four steps in each process; half of the three noisy steps are trained
    assert report["unet_forwards"] == 2 * (8 * 4 + 8 * 2 * 4)
    assert sorted(path.parent.name for path in (tmp_path / "out").glob("*/stage.json")) == sorted(STAGES)
    assert [line["step"] for line in read_log(tmp_path / "out" / "ppo")] == [1]


def test_a_user_s_error_is_one_line(tmp_path):
    done = run("examples/run_study.py", "--config", str(tmp_path / "none.yaml"))
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line == f"error: Config {tmp_path / 'none.yaml'} can't be read: No such file or directory."


@pytest.mark.slow
def test_the_scripts_of_single_stages(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path / "tiny.yaml", max_steps=1)
    arguments = ("--config", config, "--output_dir", str(tmp_path / "out"))
    run_here("train_vqgan.py", *arguments, monkeypatch=monkeypatch)
    assert "vqgan/vqvae written" in capsys.readouterr().out
    assert VQModel3D.from_pretrained(tmp_path / "out/vqgan/vqvae").config.quantizer == "fsq"
    assert not (tmp_path / "out/diffusion").exists()
    run_here("train_diffusion.py", *arguments, monkeypatch=monkeypatch)
    assert MedVolumePipeline.from_pretrained(tmp_path / "out/diffusion/pipeline").unet.config.num_class_embeds == 2
    assert not (tmp_path / "out/rewards").exists()
    run_here("train_reward.py", *arguments, "--learning_rate", "0.5", monkeypatch=monkeypatch)
    assert VolumeRewardModel.from_pretrained(tmp_path / "out/rewards/volume")
    assert not (tmp_path / "out/ppo").exists()
    run_here("train_ppo.py", *arguments, monkeypatch=monkeypatch)
    assert (tmp_path / "out" / "report.md").is_file()


def test_run_study_by_stages_and_release(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path / "tiny.yaml", max_steps=1)
    arguments = ("--config", config, "--output_dir", str(tmp_path / "out"))
    run_here("run_study.py", *arguments, "--stages", "prepare,extractors", monkeypatch=monkeypatch)
    assert "prepare,extractors done" in capsys.readouterr().out
    done = {path.parent.name for path in (tmp_path / "out").glob("*/stage.json")}
    assert done == {"prepare", "extractors"}


DEMO = str(ROOT / "examples/configs/phantoms/demo.yaml")  # starts from a release
BAD = {
    "missing config": ("run_study.py", ["--config", "{folder}/none.yaml"], "none.yaml can't be read"),
    "config is no mapping": ("run_study.py", ["--config", "{folder}/list.yaml"], "must be a mapping"),
    "unknown field": ("run_study.py", ["--config", "{folder}/unknown.yaml"], "unknown field 'imagesize'"),
    "wrong type": ("run_study.py", ["--config", "{folder}/fraction.yaml"], "max_steps must be int or NoneType, got 7.5"),
    "wrong type in a section": ("run_study.py", ["--config", "{folder}/section.yaml"], "max_steps must be int, got 'ten'"),
    "section of another script": ("train_vqgan.py", ["--config", "{folder}/section.yaml"], "max_steps must be int, got 'ten'"),
    "indivisible batch": ("run_study.py", ["--config", "{folder}/batch.yaml"], "train_batch_size=3; make the product divisible"),
    "indivisible batch of options": (
        "train_ppo.py", ["--pipeline", "p", "--rollout_batch_size", "4", "--train_batch_size", "3"], "make the product divisible",
    ),
    "unknown stage": ("run_study.py", ["--config", "{folder}/good.yaml", "--stages", "brew"], "Unknown stage 'brew'"),
    "no inputs": ("run_study.py", ["--config", "{folder}/good.yaml", "--stages", "ppo"], "'ppo' needs the result of 'prepare'"),
    "missing checkpoint": (
        "train_ppo.py", ["--pipeline", "{folder}/nothing", "--reward_volume", "r"], "nothing is neither a folder nor a name of a repository",
    ),
    "output_dir is a file": (
        "train_ppo.py", ["--pipeline", "p", "--reward_volume", "r", "--output_dir", "{folder}/good.yaml"], "good.yaml is a file; give another",
    ),
    "no reward": ("train_ppo.py", ["--pipeline", "{folder}/nothing"], "--pipeline needs a reward"),
    "patience for nothing": (
        "train_ppo.py", ["--pipeline", "p", "--reward_volume", "r", "--patience", "3"], "give --real and --extractor as well",
    ),
    "real volumes alone": (
        "train_ppo.py", ["--pipeline", "p", "--reward_volume", "r", "--real", "x"], "--real and --extractor go together",
    ),
    "no release": ("run_study.py", ["--config", "{folder}/release.yaml"], "is no pipeline folder"),
    **{
        f"{stage} is given": (f"train_{script}.py", ["--config", DEMO], f"gives the result of stage '{stage}', so none would be made")
        for stage, script in (("vqgan", "vqgan"), ("diffusion", "diffusion"), ("rewards", "reward"))
    },
    "no metadata.csv": ("run_study.py", ["--config", "{folder}/folder.yaml"], "has no metadata.csv"),
    "no data_dir": ("run_study.py", ["--config", "{folder}/nowhere.yaml"], "needs data_dir"),
}  # fmt: skip
CASES = [pytest.param(*case, id=name) for name, case in BAD.items()]


@pytest.fixture
def bad_configs(tmp_path):
    write_config(tmp_path / "good.yaml", output_dir=str(tmp_path / "out"))
    (tmp_path / "list.yaml").write_text("- prepare\n")
    write_config(tmp_path / "unknown.yaml", imagesize=3)
    write_config(tmp_path / "fraction.yaml", max_steps=7.5)
    sections = {name: {**tiny_study()[name], "max_steps": "ten"} for name in ("vqgan",)}
    write_config(tmp_path / "section.yaml", **sections)
    write_config(tmp_path / "batch.yaml", ppo={**tiny_study()["ppo"], "train_batch_size": 3})
    write_config(tmp_path / "release.yaml", pretrained="nowhere")
    (tmp_path / "data").mkdir()
    folder = {"dataset": "nifti_folder", "output_dir": str(tmp_path / "out")}
    write_config(tmp_path / "folder.yaml", data_dir=str(tmp_path / "data"), **folder)
    write_config(tmp_path / "nowhere.yaml", **folder)
    return tmp_path


@pytest.mark.parametrize(("script", "arguments", "message"), CASES)
def test_bad_input_is_one_line_on_standard_error(script, arguments, message, bad_configs, monkeypatch, capsys):
    arguments = [argument.format(folder=bad_configs) for argument in arguments]
    monkeypatch.chdir(bad_configs)
    with pytest.raises(SystemExit) as caught:
        run_here(script, *arguments, monkeypatch=monkeypatch)
    captured = capsys.readouterr()
    assert caught.value.code == 1
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert captured.out == ""


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arguments", "message"), CASES)
def test_bad_input_is_one_line_in_a_process_of_its_own(script, arguments, message, bad_configs):
    arguments = [argument.format(folder=bad_configs) for argument in arguments]
    done = run(str(EXAMPLES / script), *arguments)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
