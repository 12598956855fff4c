"""Scenes of what is done with models: text to image, evaluation, the Hub, Python, the tutorial."""

import json
import re
from collections.abc import Callable
from functools import partial

import nibabel as nib
import pytest
import torch
import yaml
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from documented import (
    ROOT,
    Stage,
)
from layouts import write_brats
from peft import LoraConfig
from scenes import scene
from tiny import copied, differing, tiny_phantoms, tiny_pipeline, tiny_stable_diffusion
from tiny_text_to_image import tiny_text_to_image_study

import msrl_diffusers
from msrl_diffusers import MedVolumePipeline, VolumeRewardModel
from msrl_diffusers.data.phantoms import load_phantoms, write_phantoms
from msrl_diffusers.evaluation import extractors
from msrl_diffusers.hub import push_folder
from msrl_diffusers.policies import make_policy
from msrl_diffusers.text_to_image.command_line import MODELS
from msrl_diffusers.trainers.base import read_log
from msrl_diffusers.trainers.lora import save_lora


RESULTS = ROOT / "examples" / "results"
REPORT = RESULTS / "phantoms-demo-seed0.json"
AUDIT = {
    "n_generated": 20, "n_train": 12, "n_copies": 1, "interval": [0.001, 0.249], "expected_false_positives": 0.5,
    "copies": [{"generated": "made-3", "nearest": "patient-17"}], "null": {"kind": "held_out", "n": 12},
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ text to image


@scene("accelerate launch examples/train_ppo_text_to_image.py")
def dermoscopy(stage: Stage) -> None:
    """With all models trained, in place of the embedded ones."""
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
                "error: The (extractor inception needs torch-fidelity; pip install -e"
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


PUSH = "msrl push my_pipeline --repo_id OWNER/NAME --audit outputs/audit/audit.json"


@scene("msrl audit TRAIN my_pipeline --held_out OTHER_REAL --output_dir outputs/audit")
def audit_of_a_pipeline(stage: Stage) -> None:
    """And what it left is what `msrl push` asks for."""
    write_sets(stage)
    tiny_pipeline().save_pretrained(stage.folder / "my_pipeline")
    stage.carry_out()
    found = json.loads((stage.folder / "outputs/audit/audit.json").read_text())
    assert (found["n_generated"], found["n_train"]) == (256, 12)
    hub = stage.open_hub()
    stage.bash(PUSH)
    files = hub.repositories["OWNER/NAME"]["files"]
    assert b" of 256 generated volumes look like copies" in files["README.md"]
    assert not any("audit" in name or "generated" in name or "pairs" in name for name in files)


@scene(PUSH, here=True)
def push(stage: Stage) -> None:
    hub = stage.open_hub()
    tiny_pipeline().save_pretrained(stage.folder / "my_pipeline")
    with pytest.raises((SystemExit, AssertionError)):  # there is no such audit yet
        stage.carry_out()
    assert "OWNER/NAME" not in hub.repositories
    stage.write("outputs/audit/audit.json", json.dumps(AUDIT))
    stage.carry_out()
    repository = hub.repositories["OWNER/NAME"]
    assert repository["private"]
    assert {"README.md", "model_index.json"} <= set(repository["files"])
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
    pipe = tiny_pipeline()
    stage.execute(pipe=pipe)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    assert pipe.vqvae.use_tiling
    assert torch.isfinite(pipe("HGG", 2).volumes).all()


@scene("pipe.enable_model_cpu_offload()  # needs a GPU", here=True, slow=False)
def offload(stage: Stage) -> None:
    """Where there is no accelerator, the CPU stands in for it: diffusers refuses to offload without one."""
    pipe = tiny_pipeline()
    on_cpu = partial(pipe.enable_model_cpu_offload, device="cpu")
    stage.monkeypatch.setattr(pipe, "enable_model_cpu_offload", on_cpu, raising=False)
    stage.execute(pipe=pipe)
    assert len(pipe._all_hooks) == 2
    assert torch.isfinite(pipe("HGG", 2).volumes).all()


@scene(
    'pipe.load_lora_weights("OWNER/ADAPTER", adapter_name="tuned")  # your own, from the Hub or a folder',
    here=True,
    slow=False,
)
def adapter(stage: Stage) -> None:
    stage.open_hub()
    tuned, pipe = tiny_pipeline(), tiny_pipeline()
    tuned.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    tuned.save_lora_weights(stage.folder / "adapter")
    push_folder(stage.folder / "adapter", "OWNER/ADAPTER", without_audit=True)
    stage.execute(pipe=pipe)
    assert pipe.get_active_adapters() == ["tuned"]
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
    "from msrl_diffusers import DiffusionPPOConfig, DiffusionPPOTrainer, LearnedReward, MedVolumePipeline",
    here=True,
    slow=False,
)
def tune_in_python(stage: Stage) -> None:
    stage.monkeypatch.setattr(msrl_diffusers, "DiffusionPPOConfig", make_ppo_small(stage), raising=False)
    few = partial(load_phantoms, 4)
    stage.monkeypatch.setattr(msrl_diffusers, "load_phantoms", lambda number, size: few(size), raising=False)
    names = stage.execute()
    assert isinstance(names["reward"].model, VolumeRewardModel)
    lines = read_log(stage.folder / "out")
    assert [line["step"] for line in lines] == list(range(1, 9))
    distances = [line["watch/fid"] for line in lines]
    before = MedVolumePipeline.from_pretrained(names["home"])
    # a line is of the weights before its update
    assert bool(differing(copied(names["pipe"].unet), copied(before.unet))) == (min(distances) < distances[0])


@scene("from diffusers import DDIMScheduler", here=True, slow=False)
def train_without_a_yaml_file(stage: Stage) -> None:
    """With two steps of four small volumes; the networks are those of the page."""
    tiny_phantoms(2).save(stage.folder / "data/mine/train.safetensors")
    for name in ("VQGANConfig", "LatentDiffusionConfig"):
        config_class = getattr(msrl_diffusers, name)
        few = {"max_steps": 2, "train_batch_size": 2, "report_to": "none"}
        shrunk = partial(lambda config_class, few, **fields: config_class(**{**fields, **few}), config_class, few)
        stage.monkeypatch.setattr(msrl_diffusers, name, shrunk, raising=False)
    stage.execute()
    pipe = MedVolumePipeline.from_pretrained(stage.folder / "out/pipeline")
    assert pipe.vqvae.config.scaling_factor != 1  # that of these volumes
    assert pipe("LGG", num_inference_steps=2, output_type="pt").volumes.shape == (1, 1, 16, 16, 16)
    make_policy(pipe)  # as trainers do: refuses what no rollout can use


@scene("from diffusers import StableDiffusionPipeline", here=True, slow=False)
def tune_stable_diffusion(stage: Stage) -> None:
    stage.write("my_package/__init__.py", "")
    stage.write(
        "my_package/rewards.py",
        "def sharpness(samples, conditions):\n    return samples.diff(dim=-1).abs().flatten(1).mean(dim=1)\n",
    )
    stage.monkeypatch.syspath_prepend(str(stage.folder))
    pipe = tiny_stable_diffusion()
    stage.monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda name: pipe)
    trainer = msrl_diffusers.DiffusionPPOTrainer
    stage.execute(DiffusionPPOConfig=make_ppo_small(stage, max_steps=2), DiffusionPPOTrainer=trainer)
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
                "NUM_STEPS = 8": "NUM_STEPS = 4",
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
