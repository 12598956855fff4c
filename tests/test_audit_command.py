"""msrl audit from the command line: its files, its numbers, its montage, and one sentence for bad input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tiny import tiny_pipeline

from msrl_diffusers import VolumeDataset, load_phantoms
from msrl_diffusers.cli import audit as audit_verb
from msrl_diffusers.cli import main
from msrl_diffusers.data.processor import to_nifti
from msrl_diffusers.errors import InputError
from msrl_diffusers.plots import plot_volumes


EXTRACTOR = Path(__file__).parents[1] / "model_cards" / "phantoms-32" / "extractor_label"


def save(volumes, path, prefix):
    labels = torch.zeros(len(volumes), dtype=torch.long)
    names = [f"{prefix}{row}" for row in range(len(volumes))]
    VolumeDataset(volumes.half(), labels, names, {0: "any"}, (12.0, 12.0, 12.0)).save(path)
    return str(path)


def save_nifti(volumes, folder):
    folder.mkdir()
    for row, volume in enumerate(volumes):
        to_nifti(volume.numpy(), (12.0, 12.0, 12.0)).to_filename(folder / f"made-{row}.nii.gz")
    return str(folder)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Files of 20 training volumes, 12 new ones, and 8 generated: 2 copies train4, 5 the mirror image of train6."""
    folder = tmp_path_factory.mktemp("sets")
    train, generated, held_out = (
        load_phantoms(count, 16, first_index=first).pixel_values.float()
        for count, first in ((10, 0), (4, 1000), (6, 2000))
    )
    generated[2], generated[5] = train[4], train[6].flip(-1)
    paths = {
        "train": save(train, folder / "train.safetensors", "train"),
        "generated": save(generated, folder / "generated.safetensors", "made"),
        "held_out": save(held_out, folder / "held_out.safetensors", "new"),
        "few": save(train[:9], folder / "few.safetensors", "few"),
        "larger": save(load_phantoms(2, 18).pixel_values, folder / "larger.safetensors", "larger"),
        "nifti": save_nifti(generated, folder / "nifti"),
        "missing": str(folder / "missing"),
        "empty": str(folder / "empty"),
    }
    (folder / "empty").mkdir()
    return {"volumes": (train, generated), **paths}


def test_the_report(sets, tmp_path, capsys):
    options = ["--held_out", sets["held_out"], "--extractor", str(EXTRACTOR), "--output_dir", str(tmp_path)]
    audit_verb.run([sets["train"], sets["generated"], *options])
    assert {path.name for path in tmp_path.iterdir()} == {"audit.json", "audit.md", "audit.html", "closest_pairs.png"}
    content = json.loads((tmp_path / "audit.json").read_text())
    assert content["n_generated"] == 8
    assert content["n_copies"] == len(content["copies"]) == 2
    assert {copy["generated"]: (copy["nearest"], copy["flipped"]) for copy in content["copies"]} == {
        "made2": ("train4", False),
        "made5": ("train6", True),
    }
    assert all(copy["score"] < copy["threshold"] for copy in content["copies"])
    assert set(content["spaces"]) == {"voxel", "feature"}
    assert content["null"]["kind"] == "held_out"
    assert content["extractor"]["id"].startswith("slices/SliceFeatureExtractor")
    assert len(content["extractor"]["sha256"]) == 16
    assert content["seed"] == 0
    assert content["versions"]["torch"] == torch.__version__
    assert len(content["closest"]) == 8
    assert {"commit", "interval", "threshold", "expected_false_positives", "fingerprints"} <= content.keys()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        "2 of 8 generated volumes look like copies of training volumes (95 % interval 3.2% to 65.1%;"
    )
    assert last.endswith(f"Report: {tmp_path / 'audit.html'}")
    page, text = (tmp_path / "audit.html").read_text(), (tmp_path / "audit.md").read_text()
    for part in ("made5", "train6", "share it only as you may share those", "Not for clinical use."):
        assert part in page
        assert part in text
    assert "data:image/png;base64," in page
    assert "Caveat" not in page


def test_montage_shows_pairs_with_the_flip_applied(sets, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(audit_verb, "plot_volumes", lambda rows, path: drawn.update(rows) or plot_volumes(rows, path))
    audit_verb.run([sets["train"], sets["generated"], "--output_dir", str(tmp_path)])
    pairs = json.loads((tmp_path / "audit.json").read_text())["closest"]
    assert {pairs[0]["generated"], pairs[1]["generated"]} == {"made2", "made5"}
    above, below = drawn["generated"], drawn["nearest training volume"]
    assert torch.equal(above[:2], below[:2])
    train, generated = sets["volumes"]
    for column, pair in enumerate(pairs):
        volume = generated[int(pair["generated"].removeprefix("made"))].half().float()
        assert torch.equal(above[column], volume.flip(-1) if pair["flipped"] else volume)
        assert torch.equal(below[column], train[int(pair["nearest"].removeprefix("train"))].half().float())
    assert np.ptp(imread(tmp_path / "closest_pairs.png")[..., 0]) > 0.5


def test_without_held_out_volumes_the_caveat_stands(sets, tmp_path):
    audit_verb.run([sets["train"], sets["nifti"], "--output_dir", str(tmp_path), "--image_size", "16"])
    content = json.loads((tmp_path / "audit.json").read_text())
    assert content["null"]["kind"] == "leave_one_out"
    assert content["extractor"] is None
    assert set(content["spaces"]) == {"voxel"}
    assert {copy["generated"]: copy["nearest"] for copy in content["copies"]} == {
        "made-2.nii.gz": "train4",
        "made-5.nii.gz": "train6",
    }
    assert "Caveat: no held-out volumes were given" in (tmp_path / "audit.md").read_text()


def test_options_may_stand_before_the_sets(sets, tmp_path):
    audit_verb.run(["--output_dir", str(tmp_path / "a"), sets["train"], "--seed=3", sets["generated"]])
    audit_verb.run([sets["train"], sets["generated"], "--output_dir", str(tmp_path / "b"), "--batch_size", "3"])
    one, other = (json.loads((tmp_path / name / "audit.json").read_text()) for name in "ab")
    assert (one["seed"], other["seed"]) == (3, 0)
    for key in ("copies", "threshold", "closest", "fingerprints"):
        assert one[key] == other[key]


@pytest.mark.parametrize(
    ("train", "generated", "held_out", "message"),
    [
        ("missing", "generated", None, r"missing does not exist; give a folder"),
        ("train", "empty", None, r"empty holds no \.nii or \.nii\.gz image"),
        ("train", "larger", None, r"train\.safetensors and .*larger\.safetensors have volumes of 16 x 16 x 16 and 18"),
        ("few", "generated", None, r"few\.safetensors holds 9 training volumes, .* needs at least 10"),
        ("train", "generated", "few", r"few\.safetensors holds 9 held-out volumes, too few"),
        ("train", "generated", "train", r"Only 0 of 20 volumes that should set the threshold"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(sets, tmp_path, train, generated, held_out, message):
    arguments = [sets[train], sets[generated], "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match=message) as raised:
        audit_verb.run(arguments + (["--held_out", sets[held_out]] if held_out else []))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_the_verb_and_its_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["msrl", "audit", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "TRAIN GENERATED" in " ".join(shown.split())
    assert "--held_out" in shown
    assert "--train" not in shown
    monkeypatch.setattr(sys, "argv", ["msrl", "audit", "nowhere", "nor here", "--output_dir", "x"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: nowhere does not exist")


def test_a_pipeline_is_sampled_and_audited(sets, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    options = ["--output_dir", str(tmp_path / "out"), "--num_volumes", "4", "--num_inference_steps", "2"]
    audit_verb.run([sets["train"], str(tmp_path / "pipeline"), *options])
    content = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert (content["n_generated"], content["n_copies"]) == (4, 0)
    assert VolumeDataset.load(tmp_path / "out" / "generated.safetensors").class_counts() == {"HGG": 2, "LGG": 2}
