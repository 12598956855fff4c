"""The runs of a study over seeds and with ablations, one after another or side by side; what they share is made once."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import Busy, InputError
from ..processes import process_state
from .chain import enabled_stages, run_study
from .config import StudyConfig
from .outcomes import begin_run, end_run, record_refusal
from .side_by_side import Runs, run_side_by_side
from .variants import FULL, link_finished, shared_stages, variant_config


def run_variants(
    config: StudyConfig, seeds: Sequence[int], ablations: Sequence[str] = (), jobs: int = 1
) -> dict[str, dict[int, StudyConfig]]:
    """Run the full method and its ablations with every seed, in so many processes; the configs by variant and seed. A killed
    run goes on when this is called again.

    Raises:
        InputError: an unknown ablation, the same seed twice, or a run that was refused, when the others are done.
    """
    if len(set(seeds)) != len(seeds):
        raise InputError(f"Every seed may be given once, got {list(seeds)}.")
    configs = {
        variant: {seed: variant_config(config, variant, seed) for seed in seeds} for variant in (FULL, *ablations)
    }
    for folder, sentence in run_configs(config, configs, jobs).items():
        raise InputError(f"{Path(folder).name}: {sentence}")
    return configs


def run_configs(
    config: StudyConfig,
    configs: Mapping[str, Mapping[int, StudyConfig]],
    jobs: int = 1,
    only: Sequence[str] | None = None,
) -> dict[str, str]:
    """Run studies that differ from `config`, by variant and seed, or of their stages those in `only`; what several have in
    common is made once. A killed run goes on when this is called again.

    Returns:
        By `output_dir`, why a run was refused (rewards below their floors, say), which `refused.json` there says too; the others
        are whole.

    Raises:
        InputError: what all have in common was refused, or more than one job under `accelerate launch` with several processes.
    """
    if jobs > 1 and process_state().num_processes > 1:
        raise InputError(
            "Runs side by side are processes of their own: start them without `accelerate launch`, or set jobs to 1."
        )
    runs = [(config, shared_stages(config))]
    runs += [(run, enabled_stages(run)) for by_seed in configs.values() for run in by_seed.values()]
    runs = [(run, [stage for stage in stages if only is None or stage in only]) for run, stages in runs]
    if process_state().is_main_process:
        for run, _ in runs[1:]:
            begin_run(run)
    refused = run_side_by_side(runs, jobs) if jobs > 1 else run_in_turn(runs)
    if config.output_dir in refused:
        raise InputError(refused[config.output_dir])
    if process_state().is_main_process:
        for run, stages in runs[1:]:
            if "report" in stages and run.output_dir not in refused:
                end_run(run)
    return refused


def run_in_turn(runs: Runs) -> dict[str, str]:
    """Run studies one after another; by `output_dir`, why one was refused. Without the first, which all share, there are no
    others."""
    made, refused = [], {}
    for config, stages in runs:
        try:
            for stage in stages:
                if process_state().is_main_process:
                    link_finished(stage, config, made)
                process_state().wait_for_everyone()
                run_study(config, [stage])
        except Busy:
            raise
        except InputError as refusal:
            refused[config.output_dir] = str(refusal)
            if not made:
                break
            if process_state().is_main_process:
                record_refusal(Path(config.output_dir), str(refusal))
        made.append(config)
    return refused
