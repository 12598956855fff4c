"""The published method as a chain of stages, from volumes to a report (also as `msrl study`).

    python examples/run_study.py --config examples/configs/phantoms/cpu.yaml
    python examples/run_study.py --config examples/configs/nifti_folder/cpu.yaml --data_dir DIR --stages prepare,vqgan

Tables over seeds, in the shape of the paper's, with what its ablations leave out:

    python examples/run_study.py --config CONFIG --seeds 0 1 2 --ablations sparse_steps reward_3d_only

The pretrained models of a study as a folder for the Hub, from which a later study can start:

    python examples/run_study.py --config examples/configs/phantoms/cpu.yaml --release DIR

A stage that is done is skipped; a killed one resumes when the same command is given again.
"""

import sys

from msrl_diffusers.cli.study import run
from msrl_diffusers.errors import sentence_instead_of_traceback
from msrl_diffusers.processes import start_missing_processes


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        start_missing_processes()
        run(sys.argv[1:])
