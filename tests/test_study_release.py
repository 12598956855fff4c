"""The models of a finished study as a release, and studies that start from one."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from tiny import settings_with
from tiny_release import released_study, write_tiny_release

from msrl_diffusers import StudyConfig, load_phantoms, run_study
from msrl_diffusers.cli.study import run as run_command
from msrl_diffusers.errors import InputError
from msrl_diffusers.files import write_json
from msrl_diffusers.hub.contents import shared_json
from msrl_diffusers.study.artifacts import load_pipeline, load_split
from msrl_diffusers.study.release import write_release
from msrl_diffusers.study.report import markdown


ROLES = ("judge", "second_judge", "label")


def test_a_release_is_used_and_not_trained(finished, tmp_path):
    release = tmp_path / "release"
    write_release(settings_with(finished), release)
    scores = json.loads((release / "scores.json").read_text())
    told = {**scores, "train_volumes": ["another", *scores["train_volumes"]]}
    (release / "scores.json").write_text(json.dumps(told))
    config = settings_with(tmp_path / "out", pretrained=str(release))
    for name in ("unet", "vqvae"):
        trained, released = (
            getattr(load_pipeline(each), name).state_dict() for each in (settings_with(finished), config)
        )
        assert all(torch.equal(released[key], value.half().float()) for key, value in trained.items())
    run_study(config)
    done = {path.parent.name for path in (tmp_path / "out").glob("*/stage.json")}
    assert done == {
        "prepare", "validity", "ppo", "baseline", "evaluate", "baseline_downstream", "downstream", "report",
    }  # fmt: skip
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "out", finished))
    assert ours["extractors"] == theirs["extractors"]
    # the same seeds, and weights rounded to half precision, by which a few of the codes of a random autoencoder change
    for role in ROLES:
        for arm in ("real_floor", "limit", "limit_heldout", "standard"):
            assert ours["fid"][role][arm]["all"] == pytest.approx(theirs["fid"][role][arm]["all"], rel=0.2)
    assert "Not for clinical use" in (release / "README.md").read_text()
    assert ours["pretrained"] == "release"
    write_release(config, tmp_path / "again")  # whose networks saw what the first one's did
    again = json.loads((tmp_path / "again" / "scores.json").read_text())
    assert again["train_volumes"] == ["another", *scores["train_volumes"]]
    assert again["phantoms"] == {"data_seed": 0, "n": 8}
    assert not again["other_volumes"]


def test_a_release_of_other_volumes_is_refused(finished, tmp_path):
    """Its class 0 would be taken for theirs, and phantoms it was trained on for held-out ones."""
    release = tmp_path / "release"
    write_release(settings_with(finished), release)
    volumes = load_split(settings_with(finished), "train")
    for split, ids in (("train", volumes.subject_ids), ("heldout", [f"other-{name}" for name in volumes.subject_ids])):
        other = replace(volumes, subject_ids=ids, id2label={0: "LGG", 1: "HGG"})
        other.save(tmp_path / "prepared" / f"{split}.safetensors")
    given = {"pretrained": str(release), "dataset": "prepared", "data_dir": str(tmp_path / "prepared")}
    with pytest.raises(
        InputError, match=r"The pipeline .*release has classes .*'HGG'.*, the real training set .*'LGG'"
    ):
        run_study(settings_with(tmp_path / "out", **given), ["prepare"])
    with pytest.raises(
        InputError, match=r"was trained on 8 phantoms or more, and with num_per_class=2 .* give num_per_class=4"
    ):
        run_study(settings_with(tmp_path / "out", pretrained=str(release), num_per_class=2), ["prepare"])
    others = settings_with(tmp_path / "out", pretrained=str(release), num_per_class=2, data_seed=5)
    run_study(others, ["prepare"])
    with pytest.raises(
        InputError, match="trained on phantoms of data_seed 0, and this study's are of 5: a later study"
    ):
        write_release(others, tmp_path / "again")
    heldout = load_split(settings_with(finished), "heldout")
    for split, some in (("train", heldout), ("heldout", volumes)):  # the other way round
        some.save(tmp_path / "prepared" / f"{split}.safetensors")
    with pytest.raises(InputError, match="release was trained on 8 of the 8 volumes that are held out here"):
        run_study(settings_with(tmp_path / "out", **given), ["prepare"])
    assert "train_volumes" not in shared_json("scores.json", json.loads((release / "scores.json").read_text()))
    (release / "scores.json").unlink()
    with pytest.raises(
        InputError, match=r"release has no scores\.json; give a folder written by run_study.py --release"
    ):
        run_study(settings_with(tmp_path / "out", pretrained=str(release)), ["prepare"])


def prepared_study(folder, release, **changes) -> StudyConfig:
    """A study that starts from a release, of volumes that are no phantoms for all it knows."""
    for number, split in enumerate(("train", "heldout")):
        load_phantoms(4, 16, seed=9, first_index=4 * number).save(folder / "data" / f"{split}.safetensors")
    fields = {"dataset": "prepared", "data_dir": str(folder / "data"), "data_seed": 1, **changes}
    return StudyConfig(**released_study(folder / "study", release, **fields))


def release_told(folder, **told) -> str:
    """A tiny release whose `scores.json` says this of what it was trained on."""
    release = write_tiny_release(folder)
    path = folder / "scores.json"
    write_json(path, {**json.loads(path.read_text()), **told})
    return release


def test_phantoms_stay_told_where_later_data_are_none(tmp_path):
    config = prepared_study(tmp_path, write_tiny_release(tmp_path / "first"))  # of eight phantoms, in the oldest form
    assert run_study(config, ["prepare"])["warnings"] == []
    write_release(config, tmp_path / "second")
    scores = json.loads((tmp_path / "second" / "scores.json").read_text())
    assert scores["phantoms"] == {"data_seed": 0, "n": 8}
    assert (scores["other_volumes"], scores["unnamed_volumes"], len(scores["train_volumes"])) == (True, False, 8)
    fields = released_study(tmp_path / "phantoms", str(tmp_path / "second"), num_per_class=2)
    with pytest.raises(InputError, match="second was trained on 8 phantoms or more, and with num_per_class=2"):
        run_study(StudyConfig(**fields), ["prepare"])


def test_a_release_of_no_phantoms_names_no_seed_of_them(tmp_path):
    told = {"phantoms": None, "other_volumes": True, "unnamed_volumes": False, "train_volumes": ["another"]}
    first = release_told(tmp_path / "first", **told)
    config = prepared_study(tmp_path, first)
    run_study(config, ["prepare"])
    write_release(config, tmp_path / "second")
    assert json.loads((tmp_path / "second" / "scores.json").read_text())["phantoms"] is None
    later = StudyConfig(**released_study(tmp_path / "phantoms", str(tmp_path / "second"), num_per_class=2))
    run_study(later, ["prepare"])
    write_release(later, tmp_path / "third")
    scores = json.loads((tmp_path / "third" / "scores.json").read_text())
    assert (scores["phantoms"], scores["other_volumes"]) == ({"data_seed": 0, "n": 4}, True)


def test_a_release_that_names_no_volumes_is_warned_of(tmp_path, caplog):
    told = {"phantoms": None, "other_volumes": True, "unnamed_volumes": False, "train_volumes": ["another"]}
    named = release_told(tmp_path / "named", **told)
    assert run_study(prepared_study(tmp_path, named), ["prepare"])["warnings"] == []
    path = tmp_path / "named" / "scores.json"
    write_json(path, shared_json("scores.json", json.loads(path.read_text())))  # as on the Hub
    config = prepared_study(tmp_path, named)
    (warning,) = run_study(config, ["prepare"])["warnings"]
    assert warning.startswith("named does not say which volumes it was trained on (releases on the Hub do not): split")
    assert warning in caplog.text
    write_release(config, tmp_path / "later")  # which names its own, and still not those
    later = prepared_study(tmp_path, str(tmp_path / "later"))
    assert run_study(later, ["prepare"])["warnings"] == [warning.replace("named", "later", 1)]
    phantoms = StudyConfig(**released_study(tmp_path / "phantoms", named))
    assert run_study(phantoms, ["prepare"])["warnings"] == []


def test_a_report_repeats_what_was_warned_of(finished):
    content = json.loads((finished / "report.json").read_text())
    assert "Warning" not in markdown(content)
    page = markdown({**content, "data": {**content["data"], "warnings": ["r does not say."]}})
    assert "Not for clinical use.\n\n**Warning**: r does not say.\n\n## Frechet" in page


@pytest.mark.parametrize(
    ("place", "data_seed", "sentence"),
    [
        (
            "first",
            0,
            "The release .*first lies in .*first, which the study starts from and it would spoil; give a folder outside",
        ),
        ("first/inside", 0, "The release .*inside lies in .*first, which the study starts from"),
        ("again", 5, "first was trained on phantoms of data_seed 0, and this study's are of 5"),
    ],
)
def test_a_release_that_can_t_be_is_refused_before_anything_runs(place, data_seed, sentence, tmp_path):
    first = write_tiny_release(tmp_path / "first")
    files = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}
    fields = released_study(tmp_path / "study", first, data_seed=data_seed)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(InputError, match=sentence):
        run_command(["--config", str(tmp_path / "study.yaml"), "--release", str(tmp_path / place)])
    assert not (tmp_path / "study").exists()
    run_study(StudyConfig(**fields), ["prepare"])
    with pytest.raises(InputError, match=sentence):
        write_release(StudyConfig(**fields), tmp_path / place)
    assert {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()} == files


def test_a_release_of_an_unfinished_study_is_refused(study, tmp_path):
    (study / "samplers" / "stage.json").unlink()
    with pytest.raises(InputError, match="A release needs the result of 'samplers'; run that stage first"):
        write_release(settings_with(study), tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_a_release_of_models_of_other_settings_is_refused(study, tmp_path):
    config = settings_with(study, vqgan={"learning_rate": 0.5})
    with pytest.raises(InputError, match="A release needs 'vqgan', which was run with other settings; run it again"):
        write_release(config, tmp_path / "release")
    assert not (tmp_path / "release").exists()
