"""Everything that README.md and examples/README.md print to be typed is carried out as it is printed.

A command runs by bash in a folder that looks like a checkout and holds what its words name (`documented.Stage`): data sets
as tests/layouts.py writes them, tiny pipelines, a Hub on this machine. Where its cost is that of real sizes, files of the
checkout have small numbers there; the command has its own. Most `msrl` commands also run in this process, fast.
Whoever prints something new writes a scene for it here.
"""

import ast
import importlib.util
import json
import re
import signal
import socket
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import nibabel as nib
import pytest
import torch
import yaml
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from documented import (
    ROOT,
    Scene,
    Stage,
    blocks,
    commands,
    expressions,
    filled_in,
    mentions,
    read_pages,
)
from layouts import marked_volume, write_bids, write_brats, write_csv, write_datalist, write_nifti, write_oasis
from peft import LoraConfig
from tiny import copied, differing, tiny_phantoms, tiny_pipeline, tiny_stable_diffusion, tiny_study
from tiny_text_to_image import tiny_text_to_image_study

import msrl_diffusers
from msrl_diffusers import MedVolumePipeline, VolumeDataset, VolumeProcessor, VolumeRewardModel, VQModel3D
from msrl_diffusers.cli import VERBS
from msrl_diffusers.cli import prepare as prepare_verb
from msrl_diffusers.data.cases import list_cases
from msrl_diffusers.data.phantoms import write_phantoms
from msrl_diffusers.data.preparation import prepare_cases
from msrl_diffusers.data.splits import TABLE_1, SplitPlan
from msrl_diffusers.evaluation import extractors
from msrl_diffusers.hub import push_folder
from msrl_diffusers.study.command_line import parse_study, read_study
from msrl_diffusers.study.variants import FULL, variant_config
from msrl_diffusers.text_to_image.command_line import MODELS
from msrl_diffusers.trainers.base import read_log
from msrl_diffusers.trainers.lora import save_lora


# Warnings are errors here; these are of diffusers and huggingface_hub about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]

PAGES = read_pages()
TEXT = "\n".join(PAGES.values())
RESULTS = ROOT / "examples" / "results"
REPORT = RESULTS / "phantoms-demo-seed0.json"
AUDIT = {
    "n_generated": 20, "n_train": 12, "n_copies": 1, "interval": [0.001, 0.249], "expected_false_positives": 0.5,
    "copies": [{"generated": "made-3", "nearest": "patient-17"}], "null": {"kind": "held_out", "n": 12},
}  # fmt: skip
SCENES: dict[str, Scene] = {}


def scene(*printed: str, **how) -> Callable:
    """Register how these commands, expressions or blocks (by their first line) are carried out."""

    def register(play: Callable[[Stage], None]) -> Callable[[Stage], None]:
        for text in printed:
            assert text not in SCENES, f"{text!r} has two scenes"
            SCENES[text] = Scene(play, **how)
        return play

    return register


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


@scene("make demo SEED=1")
def make_demo_with_another_seed(stage: Stage) -> None:
    stage.link_environment()
    stage.make_release_small()
    stage.make_study_small("examples/configs/phantoms/demo.yaml")
    stage.carry_out()
    assert (stage.folder / "outputs/demo/report.md").is_file()
    assert json.loads((stage.folder / "outputs/demo/report.json").read_text())["seed"] == 1


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


@scene("msrl generate --model model_cards/phantoms-32 --num_volumes 8 --output_dir outputs/brains", here=True)
def generate(stage: Stage) -> None:
    stage.carry_out()
    images = sorted((stage.folder / "outputs/brains").glob("*.nii.gz"))
    assert len(images) == 8
    assert stage.files("outputs/brains") == {path.name for path in images} | {"metadata.csv", "generation.json"}
    image = nib.load(images[0])
    assert image.shape == (32, 32, 32)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")


# ------------------------------------------------------------------------------------------------------------ prepare


def prepared(stage: Stage, output_dir: str, train: dict[str, int], heldout: dict[str, int]) -> None:
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
        assert volumes.pixel_values.shape[1:] == (1, 64, 64, 64)
        assert volumes.pixel_values.abs().max() <= 1
    assert (stage.folder / output_dir / "rejected.csv").read_text() == "file,reason\n"


def table_1(stage: Stage, dataset: str, small: dict[str, tuple[int, int]]) -> tuple[dict[str, int], dict[str, int]]:
    """Volumes of both sides by class: the paper's, or in this process fewer."""
    if stage.here:
        stage.monkeypatch.setitem(TABLE_1, dataset, small)
    return tuple({name: counts[side] for name, counts in TABLE_1[dataset].items()} for side in (0, 1))


@scene(
    "msrl prepare --dataset brats2019 --data_dir MICCAI_BraTS_2019_Data_Training --modality t1ce --split table1 "
    "--output_dir data/brats",
    here=True,
)
def prepare_brats(stage: Stage) -> None:
    sides = table_1(stage, "brats2019", {"HGG": (2, 1), "LGG": (1, 1)})
    write_brats(stage.folder, per_class=sum(side["HGG"] for side in sides), modalities=("t1ce",))
    prepared(stage, "data/brats", *sides)


@scene("msrl prepare --dataset oasis1 --data_dir oasis1 --split table1 --output_dir data/oasis", here=True)
def prepare_oasis(stage: Stage) -> None:
    sides = table_1(stage, "oasis1", {"CN": (2, 1), "AD": (1, 1)})
    ratings = ["0"] * sum(side["CN"] for side in sides) + ["1"] * sum(side["AD"] for side in sides)
    sessions = {f"OAS1_{number:04d}_MR1": rating for number, rating in enumerate(ratings, start=1)}
    write_oasis(stage.folder / "oasis1", sessions, kinds=("t88_masked",))
    prepared(stage, "data/oasis", *sides)


@scene(
    "msrl prepare --dataset bids --data_dir ds000000 --modality T1w --label_column diagnosis --output_dir data/bids",
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
    "msrl prepare --dataset nifti_folder --data_dir DIR --label_column age --label_bins 40 60 --output_dir data/mine",
    here=True,
)
def prepare_nifti_folder(stage: Stage) -> None:
    write_ages(stage.folder / "data", 3)
    names = list_cases("nifti_folder", stage.folder / "data", label_column="age", label_bins=[40, 60]).classes
    assert len(names) == 3
    prepared(stage, "data/mine", dict.fromkeys(names, 2), dict.fromkeys(names, 1))


@scene("msrl prepare --dataset datalist --data_dir dataset.json --output_dir data/list", here=True)
def prepare_datalist(stage: Stage) -> None:
    write_datalist(stage.folder)
    prepared(stage, "data/list", {"control": 1, "patient": 1}, {"control": 1, "patient": 1})


# ------------------------------------------------------------------------------------------------------------ studies


@scene(
    "accelerate launch examples/train_ppo.py --config examples/configs/nifti_folder/cpu.yaml --dataset prepared "
    "--data_dir data/brats"
)
def study_of_prepared_volumes(stage: Stage) -> None:
    stage.make_study_small("examples/configs/nifti_folder/cpu.yaml")
    write_brats(stage.folder / "downloaded", per_class=8, modalities=("t1ce",))
    listing = list_cases("brats2019", stage.folder / "downloaded", modality="t1ce")
    prepare_cases(listing, VolumeProcessor(16), SplitPlan(0.5), stage.folder / "data/brats")
    stage.carry_out()
    report = json.loads((stage.folder / "outputs/nifti_folder/report.json").read_text())
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
        "trajectories": {"synthetic-002.safetensors", "reconstruction-001.safetensors"},
        "score": {"scores.json"},
        "rewards": {"volume", "slice", "heldout"},
        "ppo": {"pipeline", "log.jsonl"},
        "evaluate": {"standard.safetensors", "rl.safetensors"},
        "report": set(),
    }.items():
        assert files | {"stage.json"} <= stage.files(f"out/{name}"), name


@scene(
    "python examples/run_study.py --config examples/configs/nifti_folder/cpu.yaml --data_dir DIR --stages prepare,vqgan"
)
def some_stages(stage: Stage) -> None:
    stage.make_study_small("examples/configs/nifti_folder/cpu.yaml")
    write_ages(stage.folder / "data", 6)
    stage.carry_out()
    finished = {path.parent.name for path in (stage.folder / "outputs/nifti_folder").glob("*/stage.json")}
    assert finished == {"prepare", "vqgan"}
    train = VolumeDataset.load(stage.folder / "outputs/nifti_folder/prepare/train.safetensors")
    assert train.class_counts() == {"under 40": 4, "60 and over": 4}


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


@scene("python examples/run_study.py --seeds 0 1 2 --ablations sparse_steps reward_3d_only", here=True, slow=False)
def seeds_and_ablations(stage: Stage) -> None:
    """Printed without its config, whose defaults take days: only read as the script reads it. `msrl study` above is run."""
    runs = []
    stage.monkeypatch.setattr("msrl_diffusers.cli.study.run_variants", lambda *given: runs.append(given) or {})
    stage.monkeypatch.setattr("msrl_diffusers.cli.study.write_tables", lambda *_: None)
    stage.carry_out()
    ((config, seeds, ablations),) = runs
    assert seeds == [0, 1, 2]
    for ablation in ablations:
        assert variant_config(config, ablation, 1).output_dir == f"{config.output_dir}/{ablation}-seed1"


@scene(
    *(f"python examples/train_rl.py --method {method} --config STUDY.yaml" for method in ("ppo", "nft", "draft", "frechet")),
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


# ------------------------------------------------------------------------------------------------------ text to image


@scene("accelerate launch examples/train_ppo_text_to_image.py")
def dermoscopy(stage: Stage) -> None:
    """With all models trained, also where the embedded ones would be taken."""
    script = (stage.folder / "examples/train_ppo_text_to_image.py").read_text()
    (name,) = re.findall(r'"configs" / "dermoscopy" / "(\w+\.yaml)"', script)
    path = f"examples/configs/dermoscopy/{name}"
    study = yaml.safe_load((stage.folder / path).read_text())
    kept = {name: value for name, value in study.items() if name not in MODELS}
    stage.write(path, yaml.safe_dump({**kept, **tiny_text_to_image_study()}))
    stage.carry_out()
    assert (stage.folder / "outputs/dermoscopy/report.md").is_file()
    assert "pytorch_lora_weights.safetensors" in stage.files("outputs/dermoscopy/lora")


@scene('pipe.load_lora_weights("outputs/dermoscopy/lora")', here=True, slow=False)
def an_adapter_in_plain_diffusers(stage: Stage) -> None:
    tuned, pipe = tiny_stable_diffusion(), tiny_stable_diffusion()
    tuned.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    save_lora(tuned, stage.folder / "outputs/dermoscopy/lora")
    stage.evaluate(pipe=pipe)
    assert pipe.get_active_adapters() == ["default_0"]


# ------------------------------------------------------------------------------------------------ evaluation and audit


def write_sets(stage: Stage) -> None:
    """TRAIN (and REAL), OTHER_REAL and GENERATED: folders of twelve phantoms each."""
    for seed, name in enumerate(("train", "held_out", "generated")):
        write_phantoms(stage.folder / name, 6, image_size=16, seed=seed)


@scene("msrl evaluate REAL GENERATED --held_out OTHER_REAL --extractor inception --output_dir OUT", here=True)
def evaluate(stage: Stage) -> None:
    """Inception's weights are a download, and torch-fidelity is an extra: in this process another network has its name; by
    bash it works, or says what is lacking."""
    write_sets(stage)
    if stage.here:
        stage.monkeypatch.setitem(extractors.EXTRACTORS, "inception", lambda place: extractors.RandomExtractor())
        stage.carry_out()
    else:
        done = stage.try_bash(stage.command)
        if done.returncode:
            said = done.stderr.splitlines()[-1]
            assert re.match(
                "error: The (extractor inception needs torch-fidelity; install it with: pip install"
                "|weights of Inception-v3 can't be downloaded)", said,
            ), done.stderr  # fmt: skip
            return
    assert {"evaluate.json", "evaluate.md", "evaluate.html"} <= stage.files("out")
    found = json.loads((stage.folder / "out/evaluate.json").read_text())
    assert found["counts"] == {"real": 12, "generated": 12, "held_out": 12}
    # what the README says it gives
    assert {"fid", "kid", "fid_floor", "by_class", "held_out", "manifold", "ms_ssim", "statistics"} <= set(found)


@scene("msrl audit TRAIN GENERATED --held_out OTHER_REAL --output_dir OUT", here=True)
def audit(stage: Stage) -> None:
    write_sets(stage)
    stage.carry_out()
    assert {"audit.json", "audit.md", "audit.html"} <= stage.files("out")
    found = json.loads((stage.folder / "out/audit.json").read_text())
    assert (found["n_generated"], found["n_train"], found["null"]["kind"]) == (12, 12, "held_out")


# ------------------------------------------------------------------------------------------------------------- the Hub


@scene("msrl audit TRAIN my_pipeline --held_out OTHER_REAL --output_dir my_pipeline")
def audit_of_a_pipeline(stage: Stage) -> None:
    """And what it left in the pipeline's folder is what `msrl push` asks for."""
    write_sets(stage)
    tiny_pipeline().save_pretrained(stage.folder / "my_pipeline")
    stage.carry_out()
    found = json.loads((stage.folder / "my_pipeline/audit.json").read_text())
    assert (found["n_generated"], found["n_train"]) == (256, 12)
    hub = stage.open_hub()
    stage.bash("msrl push my_pipeline --repo_id OWNER/NAME")
    assert not any("generated" in name or "pairs" in name for name in hub.repositories["OWNER/NAME"]["files"])


@scene("msrl push my_pipeline --repo_id OWNER/NAME", here=True)
def push(stage: Stage) -> None:
    hub = stage.open_hub()
    tiny_pipeline().save_pretrained(stage.folder / "my_pipeline")
    with pytest.raises((SystemExit, AssertionError)):  # refused without an audit
        stage.carry_out()
    assert "OWNER/NAME" not in hub.repositories
    stage.write("my_pipeline/audit.json", json.dumps(AUDIT))
    stage.carry_out()
    repository = hub.repositories["OWNER/NAME"]
    assert repository["private"]
    assert {"README.md", "model_index.json", "audit.json"} <= set(repository["files"])
    assert b"1 of 20 generated volumes look like copies" in repository["files"]["README.md"]
    assert not any(b"patient-17" in content for content in repository["files"].values())


@scene("msrl push outputs/study/pipeline_rl --repo_id OWNER/NAME --report outputs/study/report.json", here=True)
def push_with_a_report(stage: Stage) -> None:
    hub = stage.open_hub()
    tiny_pipeline().save_pretrained(stage.folder / "outputs/study/pipeline_rl")
    stage.write("outputs/study/report.json", REPORT.read_text())
    stage.carry_out()
    card = hub.repositories["OWNER/NAME"]["files"]["README.md"].decode()
    report = json.loads(REPORT.read_text())
    assert f"{report['fid']['judge']['rl']['all']:.4f}" in card
    assert f"{report['memorization']['rl']['n_copies']} of {report['memorization']['rl']['n_generated']} gen" in card


@scene('msrl card my_pipeline --report report.json --arm rl --data_terms "..."', here=True)
def card(stage: Stage) -> None:
    tiny_pipeline().save_pretrained(stage.folder / "my_pipeline")
    before = stage.files("my_pipeline")
    stage.write("report.json", REPORT.read_text())
    stage.carry_out()
    assert stage.files("my_pipeline") == before | {"README.md"}  # "only the card"
    text = (stage.folder / "my_pipeline/README.md").read_text()
    assert "**Not for clinical use.**" in text
    assert "..." in text


@scene('MedVolumePipeline.from_pretrained("OWNER/NAME")', here=True, slow=False)
def load_from_the_hub(stage: Stage) -> None:
    stage.open_hub()
    tiny_pipeline().save_pretrained(stage.folder / "my_pipeline")
    push_folder(stage.folder / "my_pipeline", "OWNER/NAME", without_audit=True)
    pipe = stage.evaluate(MedVolumePipeline=MedVolumePipeline)
    assert not differing(copied(pipe.unet), copied(tiny_pipeline().unet))


@scene('DiffusionPipeline.from_pretrained("OWNER/NAME", trust_remote_code=True)')
def load_with_trust(stage: Stage) -> None:
    """In a process that has not imported the package."""
    stage.open_hub()
    tiny_pipeline().save_pretrained(stage.folder / "my_pipeline")
    stage.bash("msrl push my_pipeline --repo_id OWNER/NAME --without_audit")
    stage.write(
        "load.py",
        "import sys\n"
        "from diffusers import DiffusionPipeline\n"
        'assert "msrl_diffusers" not in sys.modules\n'
        f"pipe = {stage.command}\n"
        'print(type(pipe).__name__, tuple(pipe("HGG", 2).volumes.shape))\n',
    )
    assert stage.bash("python load.py").stdout == "MedVolumePipeline (1, 1, 16, 16, 16)\n"


# --------------------------------------------------------------------------------------------------------- in Python


@scene("from msrl_diffusers import MedVolumePipeline", here=True, slow=False)
def generate_in_python(stage: Stage) -> None:
    stage.execute()
    image = nib.load(stage.folder / "brain.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    center = image.affine @ [15.5, 15.5, 15.5, 1]
    assert center[:3] == pytest.approx([0, 0, 0], abs=1e-4)  # "origin at the centre"


@scene("pipe.reconstruct(volumes, noise_step=50, class_labels=...)", here=True, slow=False)
def reconstruct(stage: Stage) -> None:
    stage = replaced(stage, "...", "labels")
    batch = tiny_phantoms(1).batch([0, 1])
    output = stage.evaluate(pipe=tiny_pipeline(), volumes=batch["pixel_values"], labels=batch["class_labels"])
    assert output.volumes.shape == (2, 1, 16, 16, 16)


def replaced(stage: Stage, old: str, new: str) -> Stage:
    """The stage, with what the page leaves to the reader filled in."""
    assert stage.command.count(old) == 1
    stage.command = stage.command.replace(old, new)
    return stage


@scene("from diffusers import DPMSolverMultistepScheduler", here=True, slow=False)
def diffusers_habits(stage: Stage) -> None:
    """Where there is no accelerator, the CPU stands in for it: diffusers refuses to offload without one."""
    stage.open_hub()
    tuned, pipe = tiny_pipeline(), tiny_pipeline()
    tuned.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    tuned.save_lora_weights(stage.folder / "adapter")
    push_folder(stage.folder / "adapter", "OWNER/ADAPTER", without_audit=True)
    offload = partial(pipe.enable_model_cpu_offload, device="cpu")
    stage.monkeypatch.setattr(pipe, "enable_model_cpu_offload", offload, raising=False)
    stage.execute(pipe=pipe)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    assert pipe.vqvae.use_tiling
    assert pipe.get_active_adapters() == ["tuned"]
    assert len(pipe._all_hooks) == 2
    assert torch.isfinite(pipe("HGG", 2).volumes).all()


@scene('msrl_diffusers.load_volumes("brats2019", DIR)', here=True, slow=False)
def load_volumes(stage: Stage) -> None:
    folder = write_brats(stage.folder, modalities=("t1ce",))
    rows = stage.evaluate(msrl_diffusers=msrl_diffusers, DIR=folder)
    assert type(rows).__module__.startswith("datasets.")
    assert rows.num_rows == 4


def make_ppo_small(stage: Stage, **more) -> Callable:
    """`DiffusionPPOConfig` with fewer and smaller rollouts by default; what a block says goes before that."""
    small = {
        "rollout_batch_size": 4, "num_rollout_batches": 1, "train_batch_size": 4, "num_inference_steps": 6,
        "timestep_fraction": 0.25, "report_to": "none", **more,
    }  # fmt: skip
    config_class = msrl_diffusers.DiffusionPPOConfig
    assert not set(small) & set(re.findall(r"(\w+)=", stage.command))
    return lambda **fields: config_class(**small, **fields)


@scene(
    "from msrl_diffusers import DiffusionPPOConfig, DiffusionPPOTrainer, LearnedReward, VolumeRewardModel",
    here=True,
    slow=False,
)
def tune_in_python(stage: Stage) -> None:
    stage.monkeypatch.setattr(msrl_diffusers, "DiffusionPPOConfig", make_ppo_small(stage), raising=False)
    pipe = tiny_pipeline()
    names = stage.execute(pipe=pipe)
    assert isinstance(names["reward"].model, VolumeRewardModel)
    assert [line["step"] for line in read_log(stage.folder / "out")] == list(range(1, 21))
    assert differing(copied(pipe.unet), copied(tiny_pipeline().unet))


@scene("def brightness(images, prompts, metadata):  # images in [0, 1]", here=True, slow=False)
def tune_stable_diffusion(stage: Stage) -> None:
    stage.write("my_package/__init__.py", "")
    stage.write(
        "my_package/rewards.py",
        "def sharpness(samples, conditions):\n    return samples.diff(dim=-1).abs().flatten(1).mean(dim=1)\n",
    )
    stage.monkeypatch.syspath_prepend(str(stage.folder))
    pipe = tiny_stable_diffusion()
    trainer = msrl_diffusers.DiffusionPPOTrainer
    stage.execute(pipe=pipe, DiffusionPPOConfig=make_ppo_small(stage, max_steps=2), DiffusionPPOTrainer=trainer)
    assert type(pipe) is StableDiffusionPipeline
    history = read_log(stage.folder / "out")
    assert [line["step"] for line in history] == [1, 2]
    assert {"reward/brightness", "reward/sharpness", "ppo/kl"} <= set(history[0])


# ------------------------------------------------------------------------------------------------------- the tutorial


@scene("python examples/tutorial.py", here=True)
def tutorial(stage: Stage) -> None:
    """By bash as it is; in this process with few volumes and steps."""
    if stage.here:
        stage.replace(
            "examples/tutorial.py",
            {
                "NUM_PER_CLASS = 64": "NUM_PER_CLASS = 6",
                "NUM_RECONSTRUCTED = 32": "NUM_RECONSTRUCTED = 3",
                "NOISE_STEPS = (1, 30, 60, 90)": "NOISE_STEPS = (1, 3)",
                "NUM_STEPS = 20": "NUM_STEPS = 4",
                "ROLLOUT_BATCH_SIZE = 64": "ROLLOUT_BATCH_SIZE = 4",
            },
        )
    stage.carry_out()
    assert stage.files("outputs/tutorial") >= {
        "phantoms_and_generated.png", "brain.nii.gz", "reconstructions.png", "noise_steps.png", "before_and_after.png",
        "comparison.json", "pipeline_rl",
    }  # fmt: skip
    compared = json.loads((stage.folder / "outputs/tutorial/comparison.json").read_text())
    assert set(compared) == {"label", "judge"}
    assert set(compared["judge"]) == {"before", "after", "floor"}
    assert len(read_log(stage.folder / "outputs/tutorial/ppo")) == 2
    tuned = MedVolumePipeline.from_pretrained(stage.folder / "outputs/tutorial/pipeline_rl")
    assert differing(copied(tuned.unet), copied(MedVolumePipeline.from_pretrained("model_cards/phantoms-32").unet))
    text = (stage.folder / "outputs/tutorial/pipeline_rl/README.md").read_text()
    assert "**Not for clinical use.**" in text
    assert "generated volumes look like copies" in text


# ---------------------------------------------------------------------------------------------------------- the tests


def printed() -> dict[str, str]:
    """What the pages print, by what its scene is called: what a test carries out."""
    found = {}
    for text in PAGES.values():
        found |= {command: filled_in(command) for command in commands(text)}
        found |= {expression: expression for expression in expressions(text)}
        for block in blocks(text, "python"):
            first = block.splitlines()[0]
            assert found.get(first, block) == block, f"two Python blocks begin with {first!r}"
            found[first] = block
    return found


PRINTED = printed()


def cases() -> list:
    """One test of each, and where its scene is played in this process too, another by bash."""
    found = []
    for name in PRINTED:
        known = SCENES.get(name)
        if known is None or known.here:
            found.append(pytest.param(name, True, id=name))
        if known is not None and (known.slow or not known.here):
            marks = [pytest.mark.timeout(known.timeout)] + [pytest.mark.slow] * known.slow
            found.append(pytest.param(name, False, id=f"bash: {name}", marks=marks))
    return found


@pytest.mark.parametrize(("name", "here"), cases())
def test_as_printed(name, here, tmp_path, monkeypatch):
    assert name in SCENES, f"A page prints {name!r}; write a scene that carries it out."
    with ExitStack() as stack:
        stage = Stage(tmp_path, PRINTED[name], here, monkeypatch, stack.enter_context)
        SCENES[name].play(stage)


def test_no_scene_is_left_over():
    assert set(SCENES) <= set(PRINTED), "no page prints these any more"


def test_what_is_mentioned_is_there():
    """Verbs, targets of make, and scripts that the pages name in passing; and files that they link to."""
    makefile = (ROOT / "Makefile").read_text()
    for mention in mentions(TEXT):
        program, *rest = mention.split()
        if program == "msrl":
            assert rest[0] in VERBS, mention
        elif program == "make":
            assert re.search(rf"^{re.escape(rest[0])}:", makefile, re.MULTILINE), mention
        else:
            assert (ROOT / "examples" / program).is_file(), mention
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"
        for name in re.findall(r"`((?:configs|accelerate_configs|benchmarks)/[\w./-]+)`", text):
            assert (ROOT / "examples" / name).exists(), f"{page} names {name}"


def test_extras_are_those_of_the_package():
    """`pip install` is not run: it would change the environment of the tests."""
    setup = ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    (extras,) = [node.value for node in setup if isinstance(node, ast.keyword) and node.arg == "extras_require"]
    named = re.findall(r"msrl_diffusers\[(\w+)\]|\bextra `(\w+)`", TEXT)
    assert named
    assert {one or other for one, other in named} <= set(ast.literal_eval(extras))


@pytest.mark.parametrize("page", PAGES)
def test_every_word_in_capitals_is_replaced(page):
    for command in commands(PAGES[page]):
        assert not re.search(r"(?<!\S)(P|OUT|DIR|CONFIG|RANK|ADDRESS)(?!\S)", filled_in(command)), command
