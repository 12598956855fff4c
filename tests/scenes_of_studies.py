"""Scenes of making, preparing and tuning: `make`, `msrl generate`, `prepare`, studies, processes."""

import importlib.util
import json
import signal
import socket
import urllib.request
from pathlib import Path

import nibabel as nib
import pytest
import yaml
from documented import (
    ROOT,
    Stage,
)
from layouts import marked_volume, write_bids, write_brats, write_csv, write_datalist, write_nifti, write_oasis
from scenes import scene
from tiny import copied, differing, tiny_pipeline, tiny_study

import msrl_diffusers
from msrl_diffusers import MedVolumePipeline, VolumeDataset, VolumeProcessor, VQModel3D
from msrl_diffusers.cli import prepare as prepare_verb
from msrl_diffusers.data.cases import list_cases
from msrl_diffusers.data.preparation import prepare_cases
from msrl_diffusers.data.splits import TABLE_1, SplitPlan
from msrl_diffusers.study.command_line import parse_study, read_study
from msrl_diffusers.study.variants import FULL, variant_config
from msrl_diffusers.trainers.base import read_log


# ---------------------------------------------------------------------------------------------------- make, env, demo


@scene("make demo", timeout=7200)
def make_demo(stage: Stage) -> None:
    """All of it, as large as it is."""
    stage.link_environment()
    done = stage.bash(stage.command)
    assert done.stdout.splitlines()[-1] == "report: outputs/demo/report.md"
    report = json.loads((stage.folder / "outputs/demo/report.json").read_text())
    study = read_study(ROOT / "examples/configs/phantoms/demo.yaml")
    assert report["n"]["all"] == 2 * (study.get("evaluation_per_class") or study["num_per_class"])
    assert (stage.folder / "outputs/demo/report.md").is_file()


@scene("make demo SEED=1 DEMO_DIR=outputs/demo-1")
def make_demo_with_another_seed(stage: Stage) -> None:
    stage.link_environment()
    stage.make_release_small()
    stage.make_study_small("examples/configs/phantoms/demo.yaml")
    stage.carry_out()
    assert (stage.folder / "outputs/demo-1/report.md").is_file()
    assert json.loads((stage.folder / "outputs/demo-1/report.json").read_text())["seed"] == 1


@scene("make test", slow=False)
def make_test(stage: Stage) -> None:
    """These tests would start themselves: what make would run is looked at, not run."""
    stage.link_environment()
    done = stage.bash(f"make -n {stage.command.removeprefix('make ')}")
    assert done.stdout.splitlines() == [".venv/bin/python -m pytest"]
    (stage.folder / ".venv" / ".ready").unlink()
    lines = stage.bash("make -n test").stdout.splitlines()
    assert lines[0].endswith("-m venv .venv")  # on its first run it makes the environment
    assert lines[-1] == ".venv/bin/python -m pytest"


@scene("pip install -c constraints.txt -e '.[demo,evaluation]'")
def install(stage: Stage) -> None:
    """Pip says what it would do: the environment of the tests stays as it is."""
    (stage.folder / "msrl_diffusers").mkdir()
    (stage.folder / "msrl_diffusers" / "__init__.py").write_text((ROOT / "msrl_diffusers" / "__init__.py").read_text())
    stage.link_environment()
    arguments = stage.command.removeprefix("pip install ")
    said = stage.bash(f".venv/bin/python -m pip install --dry-run --no-deps {arguments}").stdout
    assert f"Would install msrl_diffusers-{msrl_diffusers.__version__}" in said
    assert "does not provide the extra" not in said


@scene("msrl env", here=True)
def env(stage: Stage) -> None:
    said = stage.carry_out()
    assert said.startswith(f"msrl_diffusers {msrl_diffusers.__version__}")
    assert "\nDevice cpu: " in said
    assert "\ndiffusers: " in said


@scene("msrl demo")
def demo(stage: Stage) -> None:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed; it comes with the extra `demo`")
    with socket.socket() as listener:
        assert listener.connect_ex(("127.0.0.1", 7860)), "port 7860 is in use; end what listens there"
    with stage.started(stage.command) as process:
        assert process.stdout.readline() == "The page is at http://127.0.0.1:7860/; Ctrl-C ends it.\n"
        with urllib.request.urlopen("http://127.0.0.1:7860") as page:
            assert page.status == 200
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=300)
        assert process.returncode == 0


# ----------------------------------------------------------------------------------------------------------- generate


@scene(
    "msrl generate --model model_cards/phantoms-32 --num_volumes 8 --num_inference_steps 50 --eta 0 "
    "--output_dir outputs/brains",
    here=True,
)
def generate(stage: Stage) -> None:
    stage.carry_out()
    images = sorted((stage.folder / "outputs/brains").glob("*.nii.gz"))
    assert len(images) == 8
    others = {"metadata.csv", "generation.json", "sheet.png"}
    assert stage.files("outputs/brains") == {path.name for path in images} | others
    image = nib.load(images[0])
    assert image.shape == (32, 32, 32)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")


# ------------------------------------------------------------------------------------------------------------ prepare


def prepared(
    stage: Stage, output_dir: str, train: dict[str, int], heldout: dict[str, int], image_size: int = 32
) -> None:
    """Carry out `msrl prepare` and look at what the README says it writes."""
    if stage.here:  # the processes it starts would import the package for seconds each
        field = prepare_verb.PrepareArguments.__dataclass_fields__["num_workers"]
        stage.monkeypatch.setattr(field, "default", 0)
    stage.carry_out()
    assert stage.files(output_dir) == {
        "train.safetensors", "heldout.safetensors", "rejected.csv", "summary.json", "sheet.png",
    }  # fmt: skip
    for side, counts in (("train", train), ("heldout", heldout)):
        volumes = VolumeDataset.load(stage.folder / output_dir / f"{side}.safetensors")
        assert volumes.class_counts() == counts
        assert volumes.pixel_values.shape[1:] == (1, *[image_size] * 3)
        assert volumes.pixel_values.abs().max() <= 1
    assert (stage.folder / output_dir / "rejected.csv").read_text() == "file,reason\n"


def table_1(stage: Stage, dataset: str, small: dict[str, tuple[int, int]]) -> tuple[dict[str, int], dict[str, int]]:
    """Volumes of both sides by class: the paper's, or in this process fewer."""
    if stage.here:
        stage.monkeypatch.setitem(TABLE_1, dataset, small)
    return tuple({name: counts[side] for name, counts in TABLE_1[dataset].items()} for side in (0, 1))


@scene(
    "msrl prepare --dataset brats2019 --data_dir MICCAI_BraTS_2019_Data_Training --modality t1ce --split table1 "
    "--image_size 32 --output_dir data/brats",
    here=True,
)
def prepare_brats(stage: Stage) -> None:
    sides = table_1(stage, "brats2019", {"HGG": (2, 1), "LGG": (1, 1)})
    write_brats(stage.folder, per_class=sum(side["HGG"] for side in sides), modalities=("t1ce",))
    prepared(stage, "data/brats", *sides)


@scene(
    "msrl prepare --dataset oasis1 --data_dir oasis1 --split table1 --image_size 32 --output_dir data/oasis", here=True
)
def prepare_oasis(stage: Stage) -> None:
    sides = table_1(stage, "oasis1", {"CN": (2, 1), "AD": (1, 1)})
    ratings = ["0"] * sum(side["CN"] for side in sides) + ["1"] * sum(side["AD"] for side in sides)
    sessions = {f"OAS1_{number:04d}_MR1": rating for number, rating in enumerate(ratings, start=1)}
    write_oasis(stage.folder / "oasis1", sessions, kinds=("t88_masked",))
    prepared(stage, "data/oasis", *sides)


@scene(
    "msrl prepare --dataset bids --data_dir ds000000 --modality T1w --label_column diagnosis --image_size 32 --output_dir data/bids",
    here=True,
)
def prepare_bids(stage: Stage) -> None:
    write_bids(stage.folder / "ds000000")
    prepared(stage, "data/bids", {"control": 1, "patient": 1}, {"control": 1, "patient": 1})


def write_ages(folder: Path, per_group: int) -> None:
    """A folder of images of subjects under 40, of 40 to 59, and of 60 or more years, as many of each."""
    rows = [["file_name", "subject_id", "age"]]
    for index, first in enumerate((20, 40, 60)):
        for number in range(per_group):
            name = f"s{index}{number}"
            write_nifti(folder / f"{name}.nii.gz", marked_volume(number, index % 2))
            rows.append([f"{name}.nii.gz", name, str(first + number)])
    write_csv(folder / "metadata.csv", rows)


@scene(
    "msrl prepare --dataset nifti_folder --data_dir DIR --label_column age --label_bins 40 60 --image_size 32 "
    "--output_dir data/mine",
    here=True,
)
def prepare_nifti_folder(stage: Stage) -> None:
    write_ages(stage.folder / "data", 3)
    names = list_cases("nifti_folder", stage.folder / "data", label_column="age", label_bins=[40, 60]).classes
    assert len(names) == 3
    prepared(stage, "data/mine", dict.fromkeys(names, 2), dict.fromkeys(names, 1))


@scene("msrl prepare --dataset datalist --data_dir dataset.json --image_size 32 --output_dir data/list", here=True)
def prepare_datalist(stage: Stage) -> None:
    write_datalist(stage.folder)
    prepared(stage, "data/list", {"control": 1, "patient": 1}, {"control": 1, "patient": 1})


# ------------------------------------------------------------------------------------------------------------ studies


def prepare_small_brats(folder: Path) -> None:
    """What `msrl prepare` writes of eight subjects of each class, half of them held out: `data/brats`."""
    write_brats(folder / "downloaded", per_class=8, modalities=("t1ce",))
    listing = list_cases("brats2019", folder / "downloaded", modality="t1ce")
    prepare_cases(listing, VolumeProcessor(16), SplitPlan(0.5), folder / "data/brats")


@scene(
    "accelerate launch examples/train_ppo.py --config examples/configs/nifti_folder/cpu.yaml --dataset prepared "
    "--data_dir data/brats --output_dir outputs/brats"
)
def study_of_prepared_volumes(stage: Stage) -> None:
    stage.make_study_small("examples/configs/nifti_folder/cpu.yaml")
    prepare_small_brats(stage.folder)
    stage.carry_out()
    report = json.loads((stage.folder / "outputs/brats/report.json").read_text())
    assert report["dataset"] == "prepared"
    assert report["n"] == {"all": 8, "HGG": 4, "LGG": 4}


CPU = "examples/configs/phantoms/cpu.yaml"


@scene(f"accelerate launch examples/train_vqgan.py --config {CPU} --output_dir OUT")
def train_vqgan(stage: Stage) -> None:
    stage.make_study_small(CPU)
    stage.carry_out()
    assert VQModel3D.from_pretrained(stage.folder / "out/vqgan/vqvae").config.latent_channels == 2
    assert not (stage.folder / "out/diffusion").exists()


@scene(f"accelerate launch examples/train_diffusion.py --config {CPU} --output_dir OUT")
def train_diffusion(stage: Stage) -> None:
    stage.make_study_small(CPU)
    stage.carry_out()
    assert MedVolumePipeline.from_pretrained(stage.folder / "out/diffusion/pipeline").id2label == {0: "HGG", 1: "LGG"}
    assert not (stage.folder / "out/rewards").exists()


@scene(f"accelerate launch examples/train_reward.py --config {CPU} --output_dir OUT")
def train_reward(stage: Stage) -> None:
    stage.make_study_small(CPU)
    stage.carry_out()
    assert {"volume", "slice", "heldout"} <= stage.files("out/rewards")
    assert not (stage.folder / "out/ppo").exists()


@scene(f"accelerate launch examples/train_ppo.py --config {CPU} --output_dir OUT")
def whole_study(stage: Stage) -> None:
    """With what the table of examples/README.md says that stages write."""
    stage.make_study_small(CPU)
    stage.carry_out()
    written = stage.files("out")
    assert {"report.json", "report.md", "figures", "pipeline_standard", "pipeline_rl"} <= written
    for name, files in {
        "prepare": {"train.safetensors", "heldout.safetensors", "volumes.png"},
        "extractors": {"label", "judge"},
        "vqgan": {"vqvae", "reconstructions.png"},
        "diffusion": {"pipeline", "samples.png"},
        "samplers": {"samplers.json"},
        "trajectories": {"synthetic-002.safetensors", "reconstruction-001.safetensors"},
        "score": {"scores.json"},
        "rewards": {"volume", "slice", "heldout"},
        "ppo": {"pipeline", "log.jsonl"},
        "validity": set(),
        "baseline": {"real_floor.safetensors", "limit.safetensors", "standard.safetensors", "features.safetensors"},
        "evaluate": {"rl.safetensors"},
        "report": set(),
    }.items():
        assert files | {"stage.json"} <= stage.files(f"out/{name}"), name


@scene(
    "python examples/run_study.py --config examples/configs/nifti_folder/cpu.yaml --dataset prepared --data_dir data/brats "
    "--stages prepare,extractors,vqgan,diffusion --max_steps 5 --output_dir OUT"
)
def some_stages(stage: Stage) -> None:
    stage.make_study_small("examples/configs/nifti_folder/cpu.yaml")
    prepare_small_brats(stage.folder)
    stage.carry_out()
    finished = {path.parent.name for path in (stage.folder / "out").glob("*/stage.json")}
    assert finished == {"prepare", "extractors", "vqgan", "diffusion"}
    train = VolumeDataset.load(stage.folder / "out/prepare/train.safetensors")
    assert train.class_counts() == {"HGG": 4, "LGG": 4}


@scene("accelerate launch examples/train_rl.py --method frechet --config examples/configs/phantoms/objectives.yaml")
def frechet(stage: Stage) -> None:
    stage.make_release_small()
    stage.make_study_small("examples/configs/phantoms/objectives.yaml")
    stage.carry_out()
    report = json.loads((stage.folder / "outputs/objectives/report.json").read_text())
    assert report["method"] == "frechet"
    assert {"log.jsonl", "pipeline"} <= stage.files("outputs/objectives/frechet")


@scene("msrl study --config CONFIG --seeds 0 1 2 --ablations sparse_steps reward_3d_only", timeout=3600)
def tables(stage: Stage) -> None:
    """Nine runs, of which each shares what it does not change."""
    stage.write("study.yaml", yaml.safe_dump({**tiny_study(), "max_steps": 1, "output_dir": "outputs/tables"}))
    stage.carry_out()
    written = stage.files("outputs/tables")
    assert {"tables.md", "tables.json"} <= written
    runs = {f"{variant}-seed{seed}" for variant in (FULL, "sparse_steps", "reward_3d_only") for seed in (0, 1, 2)}
    assert runs <= written


@scene(
    "python examples/run_study.py --seeds 0 1 2 --ablations sparse_steps reward_3d_only",
    "msrl study --config examples/configs/phantoms/study.yaml --seeds 0 1 2 --ablations sparse_steps reward_3d_only",
    here=True, slow=False,
)  # fmt: skip
def seeds_and_ablations(stage: Stage) -> None:
    """These take hours or days: only read as the script reads them. `msrl study` above is run, on a study of seconds."""
    runs = []
    stage.monkeypatch.setattr("msrl_diffusers.cli.study.run_variants", lambda *given: runs.append(given) or {})
    stage.monkeypatch.setattr("msrl_diffusers.cli.study.write_tables", lambda *_: None)
    stage.carry_out()
    ((config, seeds, ablations, _),) = runs
    assert seeds == [0, 1, 2]
    for ablation in ablations:
        assert variant_config(config, ablation, 1).output_dir == f"{config.output_dir}/{ablation}-seed1"


@scene(
    *(f"python examples/train_rl.py --method {method} --config STUDY.yaml" for method in ("ppo", "nft", "draft", "frechet", "ddo")),
    here=True, slow=False,
)  # fmt: skip
def methods(stage: Stage) -> None:
    """A form, not a command: read as the script reads it. tests/test_rl_study.py runs every method."""
    study = ROOT / "examples/configs/phantoms/objectives.yaml"
    stage.write("study.yaml", yaml.safe_dump(read_study(study)))
    words = stage.command.split()
    config = parse_study(words[3], None, words[4:])
    assert config.method == words[3]
    assert config.frechet["queue_batches"] == read_study(study)["frechet"]["queue_batches"]


# -------------------------------------------------------------------------------------------- checkpoints, and processes


ON_CHECKPOINTS = "examples/train_ppo.py --pipeline P --reward_volume R3 --reward_slice R2 --output_dir OUT"
MULTI_GPU = "accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml"


def assert_tuned(stage: Stage) -> None:
    """`OUT/pipeline_rl` and the curves, of two rollouts."""
    history = read_log(stage.folder / "out")
    assert [line["step"] for line in history] == [1, 2]
    assert {"reward/mean", "reward/volume", "reward/slice", "ppo/kl", "watch/diversity"} <= set(history[0])
    assert (stage.folder / "out/curves.png").is_file()
    tuned = MedVolumePipeline.from_pretrained(stage.folder / "out/pipeline_rl")
    assert differing(copied(tuned.unet), copied(tiny_pipeline().unet))
    assert not differing(copied(tuned.vqvae), copied(tiny_pipeline().vqvae))


@scene(f"accelerate launch {ON_CHECKPOINTS}")
def on_checkpoints(stage: Stage) -> None:
    stage.write_checkpoints()
    stage.make_defaults_small()
    stage.carry_out()
    assert_tuned(stage)


@scene(f"{MULTI_GPU} --num_processes 4 {ON_CHECKPOINTS}")
def on_several_gpus(stage: Stage) -> None:
    """On CPUs, in the same words: the variable is what accelerate's own `--cpu` sets."""
    stage.write_checkpoints()
    stage.make_defaults_small()
    stage.environment["ACCELERATE_USE_CPU"] = "true"
    stage.carry_out()
    assert_tuned(stage)


@scene(
    f"{MULTI_GPU} --num_machines 2 --num_processes 8 --machine_rank RANK --main_process_ip ADDRESS "
    f"--main_process_port 29500 {ON_CHECKPOINTS}"
)
def on_several_machines(stage: Stage) -> None:
    """This machine is both of them, four processes each."""
    stage.write_checkpoints()
    stage.make_defaults_small()
    stage.environment["ACCELERATE_USE_CPU"] = "true"
    with socket.socket() as listener:
        assert listener.connect_ex(("127.0.0.1", 29500)), "port 29500 is in use; end what listens there"
    second = stage.command.replace("--machine_rank 0", "--machine_rank 1")
    assert second != stage.command
    with stage.started(f"{stage.command} 2>&1") as one, stage.started(f"{second} > other.txt 2>&1") as other:
        out, _ = one.communicate()
        assert one.returncode == 0, out
        assert other.wait(timeout=300) == 0, (stage.folder / "other.txt").read_text()
    assert_tuned(stage)


@scene("accelerate launch --cpu --num_processes 2 examples/train_ppo.py --config examples/configs/phantoms/demo.yaml")
def on_two_cpus(stage: Stage) -> None:
    stage.make_release_small()
    stage.make_study_small("examples/configs/phantoms/demo.yaml")
    done = stage.bash(stage.command)
    assert done.stdout.count("report: ") == 1
    assert [line["step"] for line in read_log(stage.folder / "outputs/demo/ppo")] == [1, 2]
