"""A volume generator tuned by any of the methods, as the last part of a study, with its report.

    accelerate launch examples/train_rl.py --method frechet --config examples/configs/phantoms/objectives.yaml

- `ppo`: PPO with a KL penalty, from learned rewards; nothing needs a gradient.
- `nft`: DiffusionNFT, from learned rewards; only final samples are needed.
- `draft`: gradients of learned rewards through the decoder and the last denoising steps.
- `frechet`: the Frechet distance as the loss, in features of the label extractor, and of reward models where `frechet_features`
  names them.
- `ddo`: discriminative self-play: real volumes against its own samples, without rewards or features.

Every field of the method's config is an option and overrides the config's section of that name. Earlier stages run first;
one that is done is skipped, a killed one resumes when the same command is given again.
"""

import sys
from pathlib import Path

from msrl_diffusers.arguments import take_option
from msrl_diffusers.errors import InputError, sentence_instead_of_traceback
from msrl_diffusers.processes import process_state, start_missing_processes
from msrl_diffusers.study import run_study
from msrl_diffusers.study.command_line import parse_study
from msrl_diffusers.study.sections import METHODS


EMBEDDED = Path(__file__).parent / "configs" / "phantoms" / "objectives.yaml"


def main() -> None:
    method, rest = take_option("method", sys.argv[1:])
    if method is None and {"-h", "--help"} & set(rest):
        method = "ppo"
    if method not in METHODS:
        raise InputError(f"--method must be one of {list(METHODS)}, got {method!r}.")
    methods = {"method": f"One of {', '.join(METHODS)}; the options below are those of {method}."}
    config = parse_study(method, EMBEDDED, rest, description=__doc__, taken=methods)
    run_study(config)
    if process_state().is_main_process:
        print(f"report: {Path(config.output_dir) / 'report.md'}")


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        start_missing_processes()
        main()
