"""Reinforcement learning of a Stable Diffusion until images show what their prompts state (RL4Med-DDPO).

On the small Stable Diffusion and the classifiers of model_cards/dermoscopy-32, which draw dermoscopy-like images: PPO with
LoRA, evaluation by a judge that nothing was trained on, augmentation study, report in outputs/dermoscopy:

    accelerate launch examples/train_ppo_text_to_image.py

The same with these models trained first: `--config examples/configs/dermoscopy/cpu.yaml`.

On given models (folders or Hub repositories), with a config of their own; what is not given is trained. Without `--data_dir`
distances are to drawn images:

    accelerate launch examples/train_ppo_text_to_image.py --config examples/configs/dermoscopy/stable_diffusion.yaml \\
        --pretrained_model_name_or_path DIR --reward_classifier DIR --judge_classifier DIR --data_dir DIR --output_dir OUT

Every field of DiffusionPPOConfig is an option and overrides the config's section `ppo`. A stage that is done is
skipped; a killed one goes on when the same command is given again. The adapter in OUT/lora loads by
`pipeline.load_lora_weights("OUT/lora")`.
"""

from pathlib import Path

from msrl_diffusers.errors import sentence_instead_of_traceback
from msrl_diffusers.processes import process_state, start_missing_processes
from msrl_diffusers.text_to_image import CHAIN
from msrl_diffusers.text_to_image.command_line import parse_text_to_image


EMBEDDED = Path(__file__).parent / "configs" / "dermoscopy" / "demo.yaml"


def main() -> None:
    config = parse_text_to_image("ppo", EMBEDDED, description=__doc__)
    CHAIN.run(config)
    if process_state().is_main_process:
        print(f"report: {Path(config.output_dir) / 'report.md'}")


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        start_missing_processes()
        main()
