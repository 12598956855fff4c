"""Studies over seeds and with ablations: what is shared, what differs, and the tables made of them."""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_study

from msrl_diffusers import StudyConfig, run_study
from msrl_diffusers.cli.study import StudyArguments
from msrl_diffusers.cli.study import run as run_command
from msrl_diffusers.errors import Busy, InputError
from msrl_diffusers.files import write_json
from msrl_diffusers.study import published, side_by_side
from msrl_diffusers.study import runs as runs_module
from msrl_diffusers.study.chain import enabled_stages, fingerprint
from msrl_diffusers.study.outcomes import outcome
from msrl_diffusers.study.runs import run_variants
from msrl_diffusers.study.side_by_side import plan_jobs
from msrl_diffusers.study.tables import findings, markdown, summary, verdict, write_tables
from msrl_diffusers.study.variants import FULL, link_finished, shared_stages, variant_config


QUICK = ["reward_3d_only"]
PRIOR = ("prepare", "extractors", "vqgan", "diffusion", "samplers", "trajectories", "score")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Config and runs of a study of two seeds with the ablation that is quick; not to be written to."""
    config = StudyConfig(output_dir=str(tmp_path_factory.mktemp("study")), **tiny_study())
    return config, run_variants(config, [0, 1], QUICK)


@pytest.fixture(scope="module")
def tables(finished):
    return write_tables(*finished)


def stage_folder(config: StudyConfig, stage: str) -> Path:
    return (Path(config.output_dir) / stage).resolve()


def test_a_prior_is_made_once(finished):
    config, runs = finished
    home = Path(config.output_dir).resolve()
    for stage in PRIOR:
        assert stage_folder(runs[FULL][0], stage) == stage_folder(runs[FULL][1], stage) == home / stage
    for stage in ("rewards", "ppo", "baseline", "evaluate", "report"):
        assert stage_folder(runs[FULL][0], stage).parent == home / "full-seed0"
        assert stage_folder(runs[FULL][1], stage).parent == home / "full-seed1"


def test_an_ablation_shares_what_it_does_not_change(finished):
    _, runs = finished
    for seed in (0, 1):
        for stage in ("rewards", "validity", "baseline", "baseline_downstream"):
            assert stage_folder(runs["reward_3d_only"][seed], stage) == stage_folder(runs[FULL][seed], stage)
        assert stage_folder(runs["reward_3d_only"][seed], "ppo") != stage_folder(runs[FULL][seed], "ppo")


@pytest.mark.slow
def test_sparse_steps_are_sampled_once_for_all_seeds(tmp_path):
    config = StudyConfig(output_dir=str(tmp_path), **tiny_study())
    runs = run_variants(config, [0, 1], ["sparse_steps"])
    sparse, full = runs["sparse_steps"], runs[FULL]
    assert stage_folder(sparse[0], "rewards") != stage_folder(full[0], "rewards")
    assert stage_folder(sparse[1], "trajectories") == stage_folder(sparse[0], "trajectories")
    sets = {path.stem for path in stage_folder(sparse[0], "trajectories").glob("*.safetensors")}
    assert sets == {f"{kind}-{step:03d}" for kind in ("synthetic", "reconstruction") for step in (1, 50, 99)}
    for stage in PRIOR[:4]:
        assert stage_folder(sparse[0], stage) == stage_folder(full[0], stage)
    assert write_tables(config, runs)["ablations"]["sparse_steps"]["fid_judge"]["values"]


def test_jobs_wait_for_what_they_read(tmp_path):
    """Every job for the stage before it, for the first run that makes the very same, and for volumes its config names."""
    config = StudyConfig(output_dir=str(tmp_path), **tiny_study(), pretrained_rewards=False)
    first, second = (variant_config(config, FULL, seed) for seed in (0, 1))
    same = variant_config(config, "reward_3d_only", 0)
    samples = Path(first.output_dir) / "evaluate" / "rl.safetensors"
    anchored = replace(variant_config(config, FULL, 2), policy_anchors={"first": str(samples)})
    runs = [(config, shared_stages(config)), *[(run, enabled_stages(run)) for run in (first, second, same, anchored)]]
    jobs = plan_jobs(runs)

    def needs(run: StudyConfig, stage: str) -> set[str]:
        (job,) = (job for job in jobs if job.config is run and job.stage == stage)
        return {jobs[number].name for number in job.needs}

    home = tmp_path.name
    assert needs(config, "prepare") == set()
    assert needs(config, "vqgan") == {f"{home}/prepare"}  # nor does it wait for the extractors
    assert needs(second, "vqgan") == {"full-seed1/prepare", f"{home}/vqgan"}
    assert needs(second, "rewards") == {"full-seed1/trajectories", "full-seed1/score"}  # of another seed
    assert needs(same, "rewards") == {f"reward_3d_only-seed0/{name}" for name in ("trajectories", "score")} | {
        "full-seed0/rewards"
    }
    assert "full-seed0/ppo" not in needs(same, "ppo") >= {"reward_3d_only-seed0/rewards"}
    assert needs(anchored, "prepare") == {f"{home}/prepare", "full-seed0/evaluate"}
    assert needs(first, "report") == {"full-seed0/evaluate", "full-seed0/downstream"}


def test_runs_side_by_side(tmp_path):
    """Two processes make what one makes: linked stages and reports; called again, nothing."""
    config = StudyConfig(output_dir=str(tmp_path), **tiny_study())
    runs = run_variants(config, [0, 1], QUICK, jobs=2)
    for variant in (FULL, *QUICK):
        for seed in (0, 1):
            report = json.loads((Path(runs[variant][seed].output_dir) / "report.json").read_text())
            assert report["seed"] == seed
    for seed in (0, 1):
        assert stage_folder(runs[QUICK[0]][seed], "rewards") == stage_folder(runs[FULL][seed], "rewards")
        assert "SliceRewardModel" in (tmp_path / f"full-seed{seed}" / "rewards.log").read_text()
    records = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/stage.json")}
    assert len(records) == 4 * len(enabled_stages(config))
    run_variants(config, [0, 1], QUICK, jobs=2)
    assert {path: path.stat().st_mtime_ns for path in records} == records
    strict = replace(config, validity_floors={"auc": 1.0, "spearman": 1.0})
    with pytest.raises(InputError, match=r"full-seed0: Reward 'volume' has .*a policy would game it"):
        run_variants(strict, [0, 1], jobs=2)
    for seed in (0, 1):  # both were tried
        folder = tmp_path / f"full-seed{seed}"
        assert (folder / "validity" / "stage.json").is_file()
        assert "a policy would game it" in outcome(folder)
        (folder / "refused.json").rename(folder / "kept.json")
        assert outcome(folder) is None  # the report is of other settings
        (folder / "kept.json").rename(folder / "refused.json")
    again = {FULL: {seed: variant_config(strict, FULL, seed) for seed in (0, 1)}}
    assert runs_module.run_configs(strict, again, only=["prepare"]) == {}
    assert not list(tmp_path.glob("*/refused.json"))
    run_variants(config, [0, 1], QUICK, jobs=2)
    assert [outcome(tmp_path / f"full-seed{seed}")["seed"] for seed in (0, 1)] == [0, 1]


def test_a_refusal_outlasts_a_batch_that_is_killed(monkeypatch, tmp_path):
    config = StudyConfig(output_dir=str(tmp_path), **tiny_study())
    configs = {FULL: {seed: variant_config(config, FULL, seed) for seed in (0, 1)}}
    refused, other = (Path(run.output_dir) for run in configs[FULL].values())

    def stop(config, stages):
        if config.output_dir == str(refused):
            raise InputError("Worth nothing.")
        if config.output_dir == str(other):
            raise KeyboardInterrupt

    monkeypatch.setattr(runs_module, "run_study", stop)
    monkeypatch.setattr(runs_module, "link_finished", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        runs_module.run_configs(config, configs)
    assert (outcome(refused), outcome(other)) == ("Worth nothing.", None)


def test_what_jobs_are_refused(monkeypatch, tmp_path):
    config = StudyConfig(output_dir=str(tmp_path), **tiny_study())
    with pytest.raises(InputError, match="--jobs needs --seeds"):
        StudyArguments(jobs=2)
    with pytest.raises(
        InputError, match=r"--stages downstream: not in this study, whose stages are \['prepare', 'ext"
    ):
        run_command(["--output_dir", str(tmp_path), "--stages", "prepare,downstream"])
    with pytest.raises(InputError, match="jobs must be"):
        StudyArguments(seeds=[0], jobs=0)
    killed = Future()
    killed.set_exception(BrokenProcessPool("terminated abruptly"))
    with pytest.raises(InputError, match="One of the processes was killed"):
        list(side_by_side._finished({killed: 0}))
    unreadable = replace(config, dataset="prepared", data_dir=str(tmp_path / "nowhere"))
    for jobs in (1, 2):
        with pytest.raises(InputError, match="nowhere"):
            run_variants(unreadable, [0, 1], jobs=jobs)
        assert not list(tmp_path.glob("full-seed*/prepare"))
    monkeypatch.setattr(runs_module, "process_state", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(InputError, match="without `accelerate launch`"):
        run_variants(config, [0], jobs=2)


COMMAND = """
import os, time
from msrl_diffusers.study.side_by_side import _workers

if __name__ == "__main__":
    with _workers(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


@pytest.mark.skipif(os.name == "nt", reason="has no signals")
def test_the_processes_of_a_command_that_is_killed_end_with_it(tmp_path):
    """They would keep their stages locked for the command that is to go on."""
    (tmp_path / "command.py").write_text(COMMAND)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "command.py")], stdout=subprocess.PIPE, text=True
    ) as command:
        worker = int(command.stdout.readline())
        command.kill()
    with contextlib.suppress(ProcessLookupError):
        for _ in range(100):
            os.kill(worker, 0)  # raises once it has ended
            time.sleep(0.1)
        os.kill(worker, signal.SIGKILL)
        pytest.fail("The process went on.")


def test_a_stage_that_another_command_runs_ends_this_one(monkeypatch, tmp_path):
    """It is no run that was refused: that would be reported, and the other seeds be taken from the other command."""
    config = StudyConfig(output_dir=str(tmp_path), **tiny_study())

    def busy(config, stages):
        raise Busy(f"Another command is at work in {config.output_dir}.")

    for module in (runs_module, side_by_side):
        monkeypatch.setattr(module, "run_study", busy)
    with pytest.raises(Busy):
        run_variants(config, [0, 1])
    with pytest.raises(Busy):
        side_by_side._run_job(plan_jobs([(config, ["prepare"])])[0], [])
    assert not list(tmp_path.glob("**/refused.json"))


def test_seeds_differ_and_a_finished_study_is_not_run_again(finished):
    config, runs = finished
    reports = [json.loads((Path(runs[FULL][seed].output_dir) / "report.json").read_text()) for seed in (0, 1)]
    assert [report["seed"] for report in reports] == [0, 1]
    assert reports[0]["fid"]["judge"]["rl"] != reports[1]["fid"]["judge"]["rl"]
    records = {path: path.stat().st_mtime_ns for path in Path(config.output_dir).glob("*/*/stage.json")}
    assert len(records) == 4 * len(enabled_stages(config))  # links are followed
    run_variants(config, [0, 1], QUICK)
    assert {path: path.stat().st_mtime_ns for path in records} == records


def test_a_link_that_no_longer_fits_is_made_anew(tmp_path):
    """Other settings must neither follow an old link nor remove what it leads to."""
    configs = [StudyConfig(output_dir=str(tmp_path / name), rl_seed=1, **tiny_study()) for name in ("home", "run")]
    run_study(configs[0], ["prepare"])
    link_finished("prepare", configs[1], configs[:1])
    assert stage_folder(configs[1], "prepare") == stage_folder(configs[0], "prepare")
    other = replace(configs[1], num_per_class=3)
    link_finished("prepare", other, configs[:1])
    run_study(other, ["prepare"])
    assert stage_folder(other, "prepare").parent == tmp_path / "run"
    assert json.loads((tmp_path / "home" / "prepare" / "stage.json").read_text())["result"]["train"]["HGG"] == 4
    assert json.loads((tmp_path / "run" / "prepare" / "stage.json").read_text())["result"]["train"]["HGG"] == 3


def test_without_links_there_are_copies(monkeypatch, tmp_path):
    """Windows grants links to developers alone."""

    def refused(*_, **__):
        raise OSError("A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refused)
    home, run = (StudyConfig(output_dir=str(tmp_path / name), rl_seed=1, **tiny_study()) for name in ("home", "run"))
    run_study(home, ["prepare"])
    (tmp_path / "run" / ".prepare.tmp").mkdir(parents=True)  # of a copy that was killed
    link_finished("prepare", run, [home])
    names = [sorted(path.name for path in (tmp_path / name / "prepare").iterdir()) for name in ("home", "run")]
    assert names[0] == names[1]
    assert not (tmp_path / "run" / ".prepare.tmp").exists()
    assert run_study(run, ["prepare"])["train"] == {"HGG": 4, "LGG": 4}


def test_what_another_run_is_about_to_make_anew_is_not_linked(tmp_path):
    """Its folder holds the very stage that is wanted, but of its settings before."""
    other, config = (StudyConfig(output_dir=str(tmp_path / name), **tiny_study()) for name in ("other", "run"))
    run_study(other, ["prepare"])
    for changed in (replace(other, num_per_class=3), replace(other, image_size=32)):
        link_finished("prepare", config, [changed])
        assert not (tmp_path / "run" / "prepare").exists()
    link_finished("prepare", config, [replace(other, num_per_class=3), other])
    assert stage_folder(config, "prepare") == stage_folder(other, "prepare")
    write_json(tmp_path / "other" / "ppo" / "stage.json", {"fingerprint": fingerprint(config, "ppo"), "result": {}})
    link_finished("ppo", config, [replace(other, method="nft")])  # which has no such stage
    assert not (tmp_path / "run" / "ppo").exists()


def test_tables_gather_the_reports(finished, tables):
    _, runs = finished
    reports = [json.loads((Path(run.output_dir) / "report.json").read_text()) for run in runs[FULL].values()]
    assert tables["seeds"] == [0, 1]
    cell = tables["fid"]["judge"]["rl"]["HGG"]
    assert cell["values"] == [report["fid"]["judge"]["rl"]["HGG"] for report in reports]
    assert cell["mean"] == pytest.approx(sum(cell["values"]) / 2)
    assert set(tables["ablations"]) == {FULL, *QUICK}
    assert tables["ablations"][FULL]["fid_label"]["values"] == [
        report["fid"]["label"]["rl"]["all"] for report in reports
    ]
    assert json.loads((Path(finished[0].output_dir) / "tables.json").read_text()) == tables
    page = (Path(finished[0].output_dir) / "tables.md").read_text()
    assert "![Samples](tables.png)" in page
    assert (Path(finished[0].output_dir) / "tables.png").stat().st_size > 5000
    for text in (
        "38.05",
        "reward 3d only",
        "Table 5",
        "mean and deviation over 2 seeds of: reward models, PPO, evaluation.",
        "Not for clinical use",
    ):
        assert text in page


def test_every_finding_has_its_differences(tables):
    first, *others = tables["findings"]
    fids = tables["fid"]["judge"]
    pairs = zip(fids["standard"]["all"]["values"], fids["rl"]["all"]["values"], strict=True)
    assert first["values"] == pytest.approx([standard - tuned for standard, tuned in pairs])
    assert [len(finding["values"]) for finding in others] == [2, 0, 2, 2]  # nothing was run with sparse steps


@pytest.mark.parametrize(
    ("differences", "holds"), [([1.0, 1.1, 0.9], True), ([-1.0, -1.1, -0.9], False), ([1.0, -1.0, 0.5], None), ([2.0], None)]
)  # fmt: skip
def test_a_finding_holds_where_its_interval_excludes_zero(differences, holds):
    found = verdict(differences)
    assert found["holds"] is holds
    assert found["mean"] == pytest.approx(sum(differences) / len(differences))


def test_the_interval_is_student_s():
    low, high = verdict([1.0, 2.0, 3.0])["interval"]
    assert (high - low) / 2 == pytest.approx(4.302653 / 3**0.5, rel=1e-5)


def test_a_summary_of_missing_figures_is_none():
    assert summary([1.0, None]) is None
    assert summary([1.5]) == {"mean": 1.5, "sd": None, "values": [1.5]}
    assert summary([1.0, 3.0])["sd"] == pytest.approx(2**0.5)


def test_findings_of_a_downstream_study(finished):
    """Accuracies, and distances of an ablation, made up, so that two claims hold and one is contradicted."""
    _, runs = finished
    reports = {}
    for variant, by_seed in runs.items():
        reports[variant] = {}
        for seed, run in by_seed.items():
            report = json.loads((Path(run.output_dir) / "report.json").read_text())
            accuracies = {"real only": 0.5, "+ standard synthetic": 0.7, "+ RL synthetic": 0.6}
            report["downstream"] = {
                arm: {"accuracy": value + 0.01 * seed * (arm != "real only"), "f1": value, "auc": value}
                for arm, value in accuracies.items()
            }
            if variant == "reward_3d_only":
                report["fid"]["judge"]["rl"]["all"] += 1 + 0.1 * seed
            reports[variant][seed] = report
    by_claim = {finding["claim"]: finding["holds"] for finding in findings(reports)}
    assert [holds for claim, holds in by_claim.items() if "classifier" in claim] == [True]
    assert by_claim["pretraining on RL-tuned volumes raises it more than on standard ones"] is False
    assert by_claim["2D and 3D rewards together give a lower distance (judge) than the 3D reward alone"] is True


def test_the_page_of_results_says_what_the_tables_say(tables, monkeypatch):
    benchmarks = Path(__file__).parents[1] / "examples" / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    script = runpy.run_path(str(benchmarks / "_results_volumes.py"))
    lines = script["paper_lines"](tables, "study-phantoms-32")
    fid = tables["ablations"]["reward_3d_only"]["fid_judge"]
    assert any(line.startswith(f"| RL, reward 3d only | {fid['mean']:.3f} +- {fid['sd']:.3f} |") for line in lines)
    assert sum(line.startswith("- ") for line in lines) == len(tables["findings"])
    (unseen,) = [line for line in lines if "of many noise steps" in line]
    assert unseen.endswith("not shown, not measured over seeds.")


def test_a_page_without_ablations_or_classifier(finished, tables):
    alone = {**tables, "ablations": {FULL: tables["ablations"][FULL]}, "downstream": None}
    assert "Not measured: the config has no section `downstream`." in markdown(alone)


def test_published_gaps_are_those_of_the_paper():
    closed = {}
    for data, arms in published.FID.items():
        fids = {arm: values["all"] for arm, values in arms.items()}
        closed[data] = (fids["standard"] - fids["rl"]) / (fids["standard"] - fids["limit"])
    assert closed == {"BraTS 2019": pytest.approx(0.479, abs=1e-3), "OASIS-1": pytest.approx(0.162, abs=1e-3)}


def test_unusable_variants_are_refused(tmp_path):
    config = StudyConfig(output_dir=str(tmp_path), **tiny_study())
    with pytest.raises(InputError, match="Unknown ablation 'teapot'"):
        variant_config(config, "teapot", 0)
    with pytest.raises(InputError, match="Every seed may be given once"):
        run_variants(config, [1, 1])
    assert list(tmp_path.iterdir()) == []


def test_the_prior_alone_can_be_taken_from_a_release(tmp_path):
    """Then reward models are trained, and with them the ablation of their data is possible."""
    (tmp_path / "model_index.json").write_text("{}")
    whole = StudyConfig(output_dir="out", pretrained=str(tmp_path), **tiny_study())
    prior = StudyConfig(output_dir="out", pretrained=str(tmp_path), pretrained_rewards=False, **tiny_study())
    assert set(enabled_stages(prior)) - set(enabled_stages(whole)) == {"trajectories", "score", "rewards"}
    assert not {"vqgan", "diffusion", "extractors"} & set(enabled_stages(prior))
    assert fingerprint(whole, "ppo") != fingerprint(prior, "ppo")
    assert variant_config(prior, "sparse_steps", 0).synthetic_steps == [1, 50, 99]
    with pytest.raises(InputError, match="set pretrained_rewards: false"):
        variant_config(whole, "sparse_steps", 0)
