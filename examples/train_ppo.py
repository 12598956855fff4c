"""Reinforcement learning of a volume generator by PPO with a KL leash.

The main job on the embedded phantoms pipeline, with its report in outputs/demo:

    accelerate launch examples/train_ppo.py

On given checkpoints (folders or Hub repositories); writes OUTPUT_DIR/pipeline_rl and the curves:

    accelerate launch examples/train_ppo.py --pipeline P --reward_volume R3 --reward_slice R2 --output_dir OUT

On a study, whose earlier stages run first:

    accelerate launch examples/train_ppo.py --config examples/configs/nifti_folder/cpu.yaml --data_dir DIR

Every field of DiffusionPPOConfig is an option and overrides the config's section `ppo`.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from msrl_diffusers import (
    DiffusionPPOConfig,
    DiffusionPPOTrainer,
    LearnedReward,
    MedVolumePipeline,
    SliceRewardModel,
    VolumeRewardModel,
)
from msrl_diffusers.arguments import parse, read_yaml, take_option
from msrl_diffusers.errors import InputError, sentence_instead_of_traceback
from msrl_diffusers.plots import plot_history
from msrl_diffusers.study import StudyConfig, run_study
from msrl_diffusers.study.artifacts import load_model


EMBEDDED = Path(__file__).parent / "configs" / "phantoms" / "demo.yaml"


@dataclass
class ScriptArguments:
    """What to train on; a study unless `pipeline` is given."""

    pipeline: str | None = field(default=None, metadata={"help": "A pipeline to tune."})
    reward_volume: str | None = field(default=None, metadata={"help": "A VolumeRewardModel for it."})
    reward_slice: str | None = field(default=None, metadata={"help": "A SliceRewardModel for it."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the study's data set."})


def main() -> None:
    config_path, arguments = take_option("config", sys.argv[1:])
    on_checkpoints = any(argument.split("=")[0] == "--pipeline" for argument in arguments)
    study = {} if on_checkpoints else read_yaml(config_path or EMBEDDED)
    shared = {name: study[name] for name in ("output_dir", "seed", "mixed_precision", "data_dir") if name in study}
    script_args, ppo_args = parse([ScriptArguments, DiffusionPPOConfig], {**study.get("ppo", {}), **shared}, arguments)
    if on_checkpoints:
        train_on_checkpoints(script_args, ppo_args)
    else:
        ppo = asdict(ppo_args)
        general = {name: ppo.pop(name) for name in ("output_dir", "seed", "mixed_precision")}
        if study.get("pretrained"):  # relative to the project, wherever the command is given
            study["pretrained"] = str(EMBEDDED.parents[3] / study["pretrained"])
        run_study(StudyConfig(**{**study, **general, "data_dir": script_args.data_dir, "ppo": ppo}))
        print(f"report: {Path(ppo_args.output_dir) / 'report.md'}")


def train_on_checkpoints(script_args: ScriptArguments, ppo_args: DiffusionPPOConfig) -> None:
    classes = {"reward_volume": VolumeRewardModel, "reward_slice": SliceRewardModel}
    given = {name: getattr(script_args, name) for name in classes if getattr(script_args, name)}
    if not given:
        raise InputError("--pipeline needs a reward: give --reward_volume, --reward_slice or both.")
    pipeline = load_model(MedVolumePipeline, script_args.pipeline, dtype=torch.float32)
    rewards = [
        LearnedReward(name, load_model(classes[name], path, dtype=torch.float32)) for name, path in given.items()
    ]
    DiffusionPPOTrainer(pipeline, rewards, ppo_args).train()
    pipeline.save_pretrained(Path(ppo_args.output_dir) / "pipeline_rl")
    plot_history(ppo_args.output_dir, ["reward", *given, "kl"])
    print(f"pipeline: {Path(ppo_args.output_dir) / 'pipeline_rl'}")


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        main()
