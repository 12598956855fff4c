"""Reinforcement learning of a volume generator by PPO with a KL penalty.

The main job on the embedded phantoms pipeline, with its report in outputs/demo:

    accelerate launch examples/train_ppo.py

On given checkpoints (folders or Hub repositories); writes OUTPUT_DIR/pipeline_rl and the curves:

    accelerate launch examples/train_ppo.py --pipeline P --reward_volume R3 --reward_slice R2 --output_dir OUT

Rewards go on rising when samples get worse. With real volumes (a file of `msrl prepare`) and the extractor by which the
reward data were scored (a study's `extractors/label`), the weights of the lowest Frechet distance are kept, and `--patience` stops the run:

    accelerate launch examples/train_ppo.py --pipeline P --reward_volume R3 --real data/mine/train.safetensors --extractor E --output_dir OUT

On a study, whose earlier stages run first:

    accelerate launch examples/train_ppo.py --config examples/configs/nifti_folder/cpu.yaml --data_dir DIR

Every field of DiffusionPPOConfig is an option and overrides the config's section `ppo`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from msrl_diffusers import (
    DiffusionPPOConfig,
    DiffusionPPOTrainer,
    FrechetWatchdog,
    LearnedReward,
    MedVolumePipeline,
    SliceFeatureExtractor,
    SliceRewardModel,
    VolumeDataset,
    VolumeRewardModel,
)
from msrl_diffusers.arguments import parse
from msrl_diffusers.errors import InputError, sentence_instead_of_traceback
from msrl_diffusers.models.loading import load_model
from msrl_diffusers.plots import plot_history
from msrl_diffusers.processes import check_writable, process_state, start_missing_processes
from msrl_diffusers.study import run_study
from msrl_diffusers.study.command_line import parse_study
from msrl_diffusers.study.kinds import check_makes_same_kind


EMBEDDED = Path(__file__).parent / "configs" / "phantoms" / "demo.yaml"


@dataclass
class CheckpointArguments:
    """Given checkpoints to train on."""

    pipeline: str = field(metadata={"help": "A pipeline to tune, in place of a study's; needs a reward."})
    reward_volume: str | None = field(default=None, metadata={"help": "With --pipeline: a VolumeRewardModel."})
    reward_slice: str | None = field(default=None, metadata={"help": "With --pipeline: a SliceRewardModel."})
    real: str | None = field(
        default=None,
        metadata={"help": "With --pipeline and --extractor: real volumes, whose Frechet distance picks the weights."},
    )
    extractor: str | None = field(
        default=None, metadata={"help": "With --real: the SliceFeatureExtractor of that distance."}
    )


def main() -> None:
    if any(argument.split("=")[0] == "--pipeline" for argument in sys.argv[1:]):
        train_on_checkpoints(*parse([CheckpointArguments, DiffusionPPOConfig], description=__doc__))
    else:
        checkpoints = {
            name: given.metadata["help"] for name, given in CheckpointArguments.__dataclass_fields__.items()
        }
        config = parse_study("ppo", EMBEDDED, description=__doc__, taken=checkpoints)
        run_study(config)
        if process_state().is_main_process:
            print(f"report: {Path(config.output_dir) / 'report.md'}")


def train_on_checkpoints(script_args: CheckpointArguments, ppo_args: DiffusionPPOConfig) -> None:
    classes = {"volume": VolumeRewardModel, "slice": SliceRewardModel}
    paths = {name: getattr(script_args, f"reward_{name}") for name in classes}
    given = {name: path for name, path in paths.items() if path}
    if not given:
        raise InputError("--pipeline needs a reward: give --reward_volume, --reward_slice or both.")
    if bool(script_args.real) != bool(script_args.extractor):
        raise InputError(
            "--real and --extractor go together: the distance is to the one by the features of the other."
        )
    if ppo_args.patience is not None and not script_args.real:
        raise InputError("--patience counts rollouts without a lower distance: give --real and --extractor as well.")
    check_writable(ppo_args.output_dir)
    pipeline = load_model(MedVolumePipeline, script_args.pipeline, dtype=torch.float32)
    rewards = [
        LearnedReward(name, load_model(classes[name], path, dtype=torch.float32)) for name, path in given.items()
    ]
    selection = {}
    if script_args.real:
        selection = {"watchdogs": {"label_fid": frechet_watchdog(script_args, pipeline)}, "select_by": "-label_fid"}
    figures = DiffusionPPOTrainer(pipeline, rewards, ppo_args, **selection).train()
    if not process_state().is_main_process:
        return
    pipeline.save_pretrained(Path(ppo_args.output_dir) / "pipeline_rl")
    watched = [f"watch/{name}" for name in selection.get("watchdogs", ())]
    plot_history(ppo_args.output_dir, ["reward/mean", *(f"reward/{name}" for name in given), *watched, "ppo/kl"])
    if selection:
        kept = figures["kept_after"]
        print(
            "weights kept:", f"those after {kept} of {figures['rollouts']} rollouts" if kept else "the pretrained ones"
        )
    print(f"pipeline: {Path(ppo_args.output_dir) / 'pipeline_rl'}")


def frechet_watchdog(script_args: CheckpointArguments, pipeline: MedVolumePipeline) -> FrechetWatchdog:
    """Of the given real volumes by the given extractor."""
    real = VolumeDataset.load(script_args.real)
    check_makes_same_kind(real, pipeline, f"--pipeline {script_args.pipeline}", f"--real {script_args.real}")
    extractor = load_model(SliceFeatureExtractor, script_args.extractor, dtype=torch.float32)
    return FrechetWatchdog(extractor.to(process_state().device), real)


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        start_missing_processes()
        main()
