"""Class-conditional latent diffusion over a trained autoencoder (trained first, where it is missing).

    accelerate launch examples/train_diffusion.py --config examples/configs/phantoms/cpu.yaml --output_dir OUT

Every field of the trainer's config is an option and overrides the config's section `diffusion`. Writes OUT/diffusion/pipeline.
"""

from pathlib import Path

from msrl_diffusers.errors import sentence_instead_of_traceback
from msrl_diffusers.processes import process_state, start_missing_processes
from msrl_diffusers.study.chain import run_up_to
from msrl_diffusers.study.command_line import parse_study


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "phantoms" / "cpu.yaml"


def main() -> None:
    config = parse_study("diffusion", DEFAULT_CONFIG, description=__doc__)
    run_up_to(config, "diffusion")
    if process_state().is_main_process:
        print(f"{Path(config.output_dir) / 'diffusion/pipeline'} written")


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        start_missing_processes()
        main()
