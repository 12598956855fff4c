"""benchmarks/recipes.py and objectives.py on studies of seconds, as a user runs them."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from tiny_release import released_study, write_tiny_release

from msrl_diffusers import StudyConfig
from msrl_diffusers.errors import InputError
from msrl_diffusers.study.command_line import read_study
from msrl_diffusers.study.variants import changed_config


BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"
RECIPES = BENCHMARKS.parent / "configs" / "phantoms" / "recipes"
METHOD = {
    "rollout_batch_size": 4, "num_rollout_batches": 1, "train_batch_size": 4, "num_inference_steps": 4,
    "report_to": "none",
}  # fmt: skip


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder's modules can be imported, as when one of its scripts is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def base_config(tmp_path: Path, **changes) -> str:
    """A study that trains reward models on a tiny prior, as a file."""
    release = write_tiny_release(tmp_path / "release")
    fields = released_study(tmp_path / "runs", release, pretrained_rewards=False, **changes)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(fields))
    return str(tmp_path / "base.yaml")


def run(script: str, *arguments: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")


def records(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/*/stage.json")}


def test_the_default_recipe_is_the_plain_one_with_its_remedies(benchmarks):
    import recipes

    paper, default = (read_study(RECIPES / f"{name}.yaml") for name in ("paper", "default"))
    made = changed_config(StudyConfig(**paper), "default", 0, recipes.VARIANTS["default"])
    wanted = StudyConfig(**default)
    for name in StudyConfig.__dataclass_fields__:
        if name not in ("output_dir", "rl_seed"):
            assert getattr(made, name) == getattr(wanted, name), name
    assert set(recipes.RECIPE) <= set(recipes.REMEDIES)


def test_every_variant_is_a_study(benchmarks, tmp_path):
    import objectives
    import recipes

    for module, path in ((recipes, RECIPES / "paper.yaml"), (objectives, RECIPES.parent / "objectives.yaml")):
        base = StudyConfig(**{**read_study(path), "output_dir": str(tmp_path)})
        seen = set()
        for name, changes in module.VARIANTS.items():
            config = changed_config(base, name, 3, changes(base, 3) if callable(changes) else changes)
            assert config.output_dir == str(tmp_path / f"{name}-seed3")
            seen.add(str({key: value for key, value in vars(config).items() if key != "output_dir"}))
        assert len(seen) == len(module.VARIANTS)  # no two are the same
    with pytest.raises(InputError, match="Variant 'odd' changes the unknown field 'sead'"):
        changed_config(base, "odd", 0, {"sead": 3})


def test_rows_and_tables_of_reports(benchmarks):
    import _runs

    def report(judge, method="ppo"):
        arms = {
            arm: {"all": value}
            for arm, value in (("limit", 1.0), ("limit_heldout", 1.5), ("standard", 3.0), ("rl", judge))
        }
        return {
            "method": method, method: {"rollouts": 4, "kept_after": 2, "stopped": None, "peak_memory": 2**20}, "curve": None,
            "fid": dict.fromkeys(_runs.ROLES, arms), "fid_heldout": dict.fromkeys(_runs.ROLES, arms),
            "kid": {role: {arm: value["all"] / 10 for arm, value in arms.items()} for role in _runs.ROLES},
            "gap_closed": dict.fromkeys(_runs.ROLES, (3.0 - judge) / 2.0),
            "fid_by_sampler": {"judge": {f"rl @ {sampler}": arms["rl"] for sampler in _runs.SAMPLERS}},
            "kid_by_sampler": {"judge": {"rl @ best": 0.1, "rl @ rollout": 0.2, "rl @ stochastic": 0.3}},
            "diversity": {"real": {"ms_ssim": {"value": 0.5}}, "rl": {"ms_ssim": {"value": 0.6}}},
            "memorization": {"standard": {"share": 0.0}, "rl": {"share": 0.25}},
            "downstream": {"+ RL synthetic": {"accuracy": 0.75, "f1": 0.5, "auc": judge / 2}},
            "reward": {"gain": 1.5, "parts": {"after": {"heldout": 0.5}}},
            "reward_models": {role: {"auc": 0.9, "spearman": 0.6} for role in ("volume", "slice")},
            "unet_forwards": 1000, "seconds": {method: 60.0},
        }  # fmt: skip

    row = _runs.row_of({0: report(1.0), 1: report(2.0), 2: "Reward 'volume' is no good."})
    assert row["seeds"] == [0, 1]
    assert row["refused"] == {"2": "Reward 'volume' is no good."}
    closed = row["gap_closed"]["judge"]
    assert (closed["mean"], closed["values"]) == (0.75, [1.0, 0.5])
    low, high = closed["interval"]
    assert high - 0.75 == pytest.approx(12.706 * 0.5 / 2, rel=1e-3) == 0.75 - low  # Student's t of two values
    assert row["ms_ssim_over_real"]["mean"] == pytest.approx(1.2)
    assert row["copies"]["rl"]["mean"] == 0.25
    assert row["downstream"]["+ RL synthetic"]["auc"]["values"] == [0.5, 1.0]
    assert row["judge_by_sampler"]["rollout"]["kid"]["mean"] == 0.2
    assert row["validity"]["slice"]["auc"]["mean"] == 0.9
    content = {"seeds": [0, 1], "variants": {"a": row, "b": {"seeds": [], "refused": {"0": "No."}}}}
    lines = _runs.table(content)
    assert lines[2].startswith("| a | 75% (")
    assert _runs.table({**content, "seeds": [0, 1, 2]})[2].startswith("| a (seeds 0, 1) | 75% (")
    assert "| judge | 3.0000 +- 0.0000 | 1.5000 +- 0.0000 | 1.0000 +- 0.0000 |" in lines
    assert "- b, seed 0, was refused: No." in lines
    assert _runs.row_of({0: "No."}) == {"seeds": [], "refused": {"0": "No."}}
    assert _runs.merged({"ppo": {"a": 1}}, {"ppo": {"b": 2}, "x": 1}) == {"ppo": {"a": 1, "b": 2}, "x": 1}


def test_what_is_gathered_says_where_the_runs_are_from(benchmarks, monkeypatch):
    """Not what the command line's base says, which is of other data."""
    import _runs

    origin = {
        "dataset": "nifti_folder", "data_fingerprint": "d", "pretrained": "p", "n": {"all": 8}, "extractors": {}, "commit": None,
        "versions": {},
    }  # fmt: skip
    monkeypatch.setattr(_runs, "row_of", lambda by_seed: {"seeds": list(by_seed)})
    content = _runs.gathered({"ppo": {0: origin}}, "What")
    assert StudyConfig().dataset != "nifti_folder" == content["dataset"]
    assert "cpu_count" not in content  # the gathering machine's


def test_earlier_results_stay_beside_new_runs(benchmarks, tmp_path, monkeypatch):
    import _runs

    def row_of(by_seed):
        refused = {str(seed): one for seed, one in by_seed.items() if isinstance(one, str)}
        return {"seeds": [seed for seed in by_seed if str(seed) not in refused], "refused": refused}

    monkeypatch.setattr(_runs, "row_of", row_of)
    origin = {
        "dataset": "phantoms", "data_fingerprint": "d", "pretrained": "p", "n": {"all": 8}, "extractors": {"judge": "j"},
        "commit": "new", "device": "CPU", "versions": {"torch": "2"},
    }  # fmt: skip
    old = {**origin, "commit": "old", "versions": {"torch": "1", "numpy": "2"}}
    earlier = _runs.gathered({"paper": {0: old, 3: origin}}, "What", note="on a GPU")
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(earlier))
    args = _runs.BenchmarkArguments(finished=[str(path), "runs"])
    content = _runs.gathered({"refresh": {1: origin}}, "What", "on a CPU", _runs.earlier_results(args))
    assert {name: row["seeds"] for name, row in content["variants"].items()} == {"paper": [0, 3], "refresh": [1]}
    assert content["seeds"] == [0, 1, 3]
    assert content["commits_of_runs"] == ["new", "old"]
    assert content["versions"] == {"torch": "1, 2", "numpy": "2"}
    assert content["what"] == "What; on a GPU; on a CPU"
    with pytest.raises(InputError, match=r"have 'paper' with the seeds \[3\] too: give the folder of these runs"):
        _runs.gathered({"paper": {0: origin, 1: origin}}, "What", earlier=[earlier])
    content = _runs.gathered({"paper": {0: origin, 1: origin, 3: origin}}, "What", earlier=[earlier])
    assert content["variants"]["paper"]["seeds"] == [0, 1, 3]
    one_refused = _runs.gathered({"paper": {0: origin, 7: "No."}}, "What")
    with pytest.raises(InputError, match=r"have 'paper' with the seeds \[7\] too"):
        _runs.gathered({"paper": {0: origin}}, "What", earlier=[one_refused])
    content = _runs.gathered({"refresh": {1: origin}}, "What", earlier=[earlier], untimed=["paper"])
    assert content["variants"]["paper"]["seconds"] is None
    assert "seconds" not in content["variants"]["refresh"]
    alone = _runs.gathered({}, "What", "seconds left out", [earlier], ["paper"])  # written again
    assert alone["variants"]["paper"]["seconds"] is None
    assert (alone["seeds"], alone["what"]) == ([0, 3], "What; on a GPU; seconds left out")
    with pytest.raises(InputError, match="of other runs: their pretrained differs"):
        _runs.gathered({"refresh": {1: {**origin, "pretrained": "q"}}}, "What", earlier=[earlier])
    monkeypatch.setattr(_runs, "row_of", lambda by_seed: {**row_of(by_seed), "kid": None})
    with pytest.raises(InputError, match="of an older version, which gathered less; give the folders of these runs"):
        _runs.gathered({"refresh": {1: origin}}, "What", earlier=[earlier])
    path.write_text("{")
    with pytest.raises(InputError, match=r"earlier.json can't be read .*; give a JSON that this benchmark wrote"):
        _runs.earlier_results(args)


def test_a_method_reaches_ppo_over_the_seeds_that_both_have(benchmarks):
    import _results_methods
    import objectives

    def row(**distances):
        seeds, values = [int(seed[1:]) for seed in distances], list(distances.values())
        cost = {"mean": 10.0 * len(values)}
        return {
            "seeds": seeds, "unet_forwards": cost, "seconds": cost, "peak_memory": None,
            "fid": {"judge": {"rl": {"mean": sum(values) / len(values), "values": values}}},
        }  # fmt: skip

    content = {
        "variants": {
            "ppo": row(s0=1.0, s1=2.0, s2=9.0),
            "nft": row(s1=2.5, s0=1.5),  # a lower mean than PPO's, but of PPO's easy seeds
            "draft": row(s0=1.5, s1=1.0),
            "frechet": row(s3=0.1),
            "refl": {"seeds": [], "refused": {"0": "No."}},
            "ddo": {**row(s0=1.0), "seconds": None},  # one of its runs was killed, and went on
        }
    }
    shares = objectives.shares_of_ppo(content)
    assert {name: share["reaches_ppo"] for name, share in shares.items()} == {
        "nft": False, "draft": True, "frechet": None, "ddo": True,
    }  # fmt: skip
    assert shares["frechet"]["forwards"] == shares["frechet"]["seconds"] == pytest.approx(1 / 3)
    assert shares["ddo"]["seconds"] is None
    assert _results_methods._beside_ppo(shares).endswith("; nft did not.")


def test_finished_runs_of_several_folders_are_gathered(benchmarks, tmp_path):
    import _runs

    def finish(folder, run, judge="j", count=8):
        path = tmp_path / folder / run / "report.json"
        path.parent.mkdir(parents=True)
        origin = {
            "data_fingerprint": "d",
            "extractors": {"judge": {"sha256": judge}},
            "pretrained": "p",
            "n": {"all": count},
        }
        path.write_text(json.dumps({"name": run, **origin}))

    for folder, run in (
        ("a", "nft-seed0"),
        ("a", "nft-seed10"),
        ("b", "nft-seed2"),
        ("b", "nft_awm-seed0"),
        ("b", "x-seed0"),
    ):
        finish(folder, run)
    (tmp_path / "a" / "nft-seed3").mkdir()  # not finished
    (tmp_path / "b" / "nft-seed4").mkdir()
    (tmp_path / "b" / "nft-seed4" / "refused.json").write_text(json.dumps({"sentence": "Worth nothing."}))
    folders = [tmp_path / "a", tmp_path / "b"]
    found = _runs.finished_reports(folders, ["nft", "draft", "nft_awm"])
    assert {name: list(by_seed) for name, by_seed in found.items()} == {"nft": [0, 2, 4, 10], "nft_awm": [0]}
    assert found["nft"][10]["name"] == "nft-seed10"
    assert found["nft"][4] == "Worth nothing."
    with pytest.raises(InputError, match="No finished run"):
        _runs.finished_reports(folders, ["draft"])
    finish("b", "nft-seed0")
    with pytest.raises(InputError, match="nft has two reports of seed 0"):
        _runs.finished_reports(folders, ["nft"])
    finish("c", "draft-seed0", judge="other")
    finish("d", "draft-seed0", count=4)
    for other in ("c", "d"):
        with pytest.raises(InputError, match="several data sets, judges, pretrained models or numbers of volumes"):
            _runs.finished_reports([tmp_path / "b", tmp_path / other], ["nft", "draft"])


@pytest.mark.slow
def test_recipes_run_and_resume(benchmarks, tmp_path, monkeypatch, capsys):
    config = base_config(tmp_path, num_curve_points=2, curve_per_class=3)
    output = tmp_path / "results" / "recipes.json"
    arguments = [
        "--config", config, "--output", str(output), "--seeds", "0", "1",
        "--variants", "paper", "default", "refresh", "gated_kl", "moving_reference", "hard_data", "policy_anchors",
    ]  # fmt: skip
    run("recipes.py", *arguments, monkeypatch=monkeypatch)
    content = json.loads(output.read_text())
    assert list(content["variants"]) == arguments[-7:]
    for name, row in content["variants"].items():
        assert sorted([*row["seeds"], *map(int, row["refused"])]) == [0, 1], name
        assert all("a policy would game it" in sentence for sentence in row["refused"].values())
    paper = content["variants"]["paper"]
    assert len(paper["fid"]["judge"]["rl"]["values"]) == 2
    assert paper["unet_forwards"]["sd"] == 0
    for name in ("paper", "refresh", "gated_kl", "hard_data", "policy_anchors"):
        assert content["variants"][name]["seeds"] == [0, 1]
    page = output.with_suffix(".md").read_text()
    assert "| paper |" in page
    assert "![Recipes](recipes.png)" in page
    assert output.with_suffix(".png").stat().st_size > 5000
    runs = tmp_path / "runs"
    # the gate and the leash are no part of reward models: they are trained once per seed
    assert (runs / "gated_kl-seed1" / "rewards").resolve() == (runs / "paper-seed1" / "rewards").resolve()
    assert (runs / "hard_data-seed1" / "rewards").resolve() != (runs / "paper-seed1" / "rewards").resolve()
    before = records(runs)
    capsys.readouterr()
    run("recipes.py", *arguments, monkeypatch=monkeypatch)
    assert records(runs) == before
    assert set(json.loads(capsys.readouterr().out)) >= {"paper", "gated_kl"}
    for option in ("--variants", "--untimed"):
        with pytest.raises(SystemExit):
            run("recipes.py", "--config", config, option, "magic", monkeypatch=monkeypatch)
        assert "There is no variant 'magic'" in capsys.readouterr().err


@pytest.mark.slow
def test_objectives_run(benchmarks, tmp_path, monkeypatch, capsys):
    config = base_config(
        tmp_path, nft=METHOD, draft=METHOD, ddo={**METHOD, "num_updates": 1},
        frechet={**METHOD, "queue_batches": 2, "eval_steps": 1, "eval_batches": 1, "samplers": [1.0]},
    )  # fmt: skip
    output = tmp_path / "objectives.json"
    run("objectives.py", "--config", config, "--output", str(output), "--seeds", "0", monkeypatch=monkeypatch)
    content = json.loads(output.read_text())
    names = [
        "ppo", "ppo_3d_only", "ppo_window", "ppo_gated", "ppo_adaptive", "nft", "awm", "draft", "draft_cheap",
        "draft_lv", "refl", "frechet", "frechet_50", "frechet_label", "ddo",
    ]  # fmt: skip
    assert list(content["variants"]) == names
    assert {name: row["method"] for name, row in content["variants"].items() if name == row["method"]}.keys() == {
        "ppo", "nft", "draft", "frechet", "ddo",
    }  # fmt: skip
    assert set(content["share_of_ppo"]) == set(names) - {"ppo"}
    assert json.loads(capsys.readouterr().out) == content["share_of_ppo"]
    for row in content["variants"].values():
        for sampler in ("best", "rollout", "stochastic"):
            assert row["judge_by_sampler"][sampler]["fid"]["values"]
    assert "| frechet |" in output.with_suffix(".md").read_text()
    assert output.with_suffix(".png").stat().st_size > 5000


def test_memory_that_was_measured_earlier_stays(benchmarks, tmp_path):
    import method_memory

    path = tmp_path / "memory.json"
    assert method_memory.earlier(path) == {}
    rows = {"ppo": {"peak_memory": 1, "commit": "abc"}}
    path.write_text(json.dumps({"device": "cpu", "results": rows}))
    assert method_memory.earlier(path) == rows
    path.write_text(json.dumps({"device": "another", "results": rows}))
    with pytest.raises(InputError, match=r"is of another device \(another\); give another file"):
        method_memory.earlier(path)


def test_the_ceiling_of_reward_models(benchmarks, tmp_path, monkeypatch, capsys):
    """reward_ceiling.py stops before any tuning, and goes on where it was."""
    config = base_config(tmp_path, validity_floors={"auc": 0.0})
    output = tmp_path / "results" / "ceiling.json"
    arguments = ["--config", config, "--output", str(output), "--seeds", "0", "1"]
    run("reward_ceiling.py", *arguments, monkeypatch=monkeypatch)
    content = json.loads(output.read_text())
    assert list(content["rows"]) == ["all_sets", "extremes"]
    for row in content["rows"].values():
        assert list(row) == ["volume", "slice", "heldout"]
        assert all(0 <= value <= 1 for value in row["slice"]["auc"]["values"])
    assert "| extremes |" in output.with_suffix(".md").read_text() == capsys.readouterr().out
    runs = tmp_path / "runs"
    assert not list(runs.glob("*/ppo"))
    sets = json.loads((runs / "extremes-seed1" / "trajectories" / "stage.json").read_text())["result"]["sets"]
    assert sets == ["reconstruction-001", "synthetic-100"]
    before = records(runs)
    run("reward_ceiling.py", *arguments, monkeypatch=monkeypatch)
    run("reward_ceiling.py", *arguments, "--variants", "all_sets", monkeypatch=monkeypatch)
    assert "| all_sets |" in output.with_suffix(".md").read_text()
    assert records(runs) == before


@pytest.mark.parametrize("option", ["--finished", "--note"])
def test_the_ceiling_has_no_finished_runs_and_no_note(benchmarks, option, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run("reward_ceiling.py", option, "runs", monkeypatch=monkeypatch)
    assert "leave --finished and --note out" in capsys.readouterr().err
