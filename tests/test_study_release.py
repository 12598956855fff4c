"""The models of a finished study as a release, and studies that start from one."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import settings_with

from msrl_diffusers import run_study
from msrl_diffusers.errors import InputError
from msrl_diffusers.hub.contents import shared_json
from msrl_diffusers.study.artifacts import load_pipeline, load_split
from msrl_diffusers.study.release import write_release


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
    assert (again["train_volumes"], again["n_train"]) == (["another", *scores["train_volumes"]], 8)


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
