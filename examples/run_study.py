"""The published method as a chain of stages, from volumes to a report.

    python examples/run_study.py --config examples/configs/phantoms/cpu.yaml
    python examples/run_study.py --config examples/configs/nifti_folder/cpu.yaml --data_dir DIR --stages prepare,vqgan

    python examples/run_study.py --config examples/configs/phantoms/cpu.yaml --stages prepare,rewards --release DIR

A stage that is done is skipped; a killed one resumes when the same command is given again.
"""

import sys

from msrl_diffusers.arguments import parse, take_option
from msrl_diffusers.errors import sentence_instead_of_traceback
from msrl_diffusers.processes import process_state, start_missing_processes
from msrl_diffusers.study import StudyConfig, run_study
from msrl_diffusers.study.command_line import read_study
from msrl_diffusers.study.release import write_release


def main() -> None:
    config_path, arguments = take_option("config", sys.argv[1:])
    stages, arguments = take_option("stages", arguments)
    release, arguments = take_option("release", arguments)
    (config,) = parse([StudyConfig], read_study(config_path) if config_path else None, arguments)
    run_study(config, stages.split(",") if stages else None)
    if not process_state().is_main_process:
        return
    if release:
        write_release(config, release)
    print(f"{config.output_dir}: {stages or 'report.md'} done")


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        start_missing_processes()
        main()
