"""msrl study: the published method as a chain of stages, from volumes to a report, or to tables over seeds and ablations.

msrl study --config examples/configs/phantoms/demo.yaml --output_dir outputs/study
msrl study --config examples/configs/phantoms/cpu.yaml --seeds 0 1 2 --ablations sparse_steps reward_3d_only --jobs 4
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..arguments import CONFIG_HELP, parse, take_option
from ..errors import InputError
from ..processes import check_writable, process_state
from ..study import StudyConfig, run_study
from ..study.chain import STAGES, enabled_stages
from ..study.command_line import read_study
from ..study.release import check_release, write_release
from ..study.runs import run_variants
from ..study.tables import write_tables
from ..study.variants import ABLATIONS
from ..trainers.base_config import check_positive


@dataclass
class StudyArguments:
    """What of the study is run. Every field of StudyConfig is an option too."""

    stages: str | None = field(default=None, metadata={"help": "Stages separated by commas; all of them if unset."})
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Seeds of reward models, PPO and evaluation; writes tables.md over them."}
    )
    ablations: list[str] | None = field(
        default=None, metadata={"help": f"Also without something, for the tables: {', '.join(ABLATIONS)}."}
    )
    jobs: int = field(
        default=1,
        metadata={
            "help": "Runs of --seeds and --ablations side by side, in so many processes: many small ones fill a GPU."
        },
    )
    release: str | None = field(
        default=None, metadata={"help": "Folder for the pretrained models, ready for the Hub."}
    )

    def __post_init__(self):
        if self.seeds and (self.stages or self.release):
            raise InputError("--seeds runs whole studies; give --stages and --release without it.")
        for name in ("ablations", "jobs"):
            if getattr(self, name) not in (None, 1) and not self.seeds:
                raise InputError(f"--{name} needs --seeds: a single study is one run.")
        check_positive(self, "jobs")


def run(arguments: Sequence[str]) -> None:
    """Run what the command line says."""
    config_path, rest = take_option("config", arguments)
    args, config = parse(
        [StudyArguments, StudyConfig], read_study(config_path) if config_path else None, rest,
        prog="msrl study", description=__doc__, taken=CONFIG_HELP,
    )  # fmt: skip
    if args.release or args.seeds:  # of what is written at the end; stages see to their own folders
        check_writable(args.release or config.output_dir)
    if args.release:
        check_release(config, args.release)
    if args.seeds:
        runs = run_variants(config, args.seeds, args.ablations or (), args.jobs)
        if process_state().is_main_process:
            write_tables(config, runs)
            sys.stdout.write(f"tables: {Path(config.output_dir) / 'tables.md'}\n")
        return
    stages = args.stages.split(",") if args.stages else None
    if absent := [stage for stage in stages or () if stage in STAGES and stage not in enabled_stages(config)]:
        raise InputError(f"--stages {','.join(absent)}: not in this study, whose stages are {enabled_stages(config)}.")
    run_study(config, stages)
    if not process_state().is_main_process:
        return
    if args.release:
        write_release(config, args.release)
    sys.stdout.write(f"{config.output_dir}: {args.stages or 'report.md'} done\n")
