"""What a study makes of its data: folders, one class, prepared volumes, splits that it refuses."""

import json
from dataclasses import replace

import pytest
from layouts import write_brats
from tiny import settings_with, tiny_study, tiny_vqvae

from msrl_diffusers import MedVolumePipeline, StudyConfig, VolumeProcessor, load_phantoms, run_study, write_phantoms
from msrl_diffusers.data.cases import list_cases
from msrl_diffusers.data.preparation import prepare_cases
from msrl_diffusers.data.splits import SplitPlan
from msrl_diffusers.errors import InputError
from msrl_diffusers.study.chain import stages_up_to
from msrl_diffusers.study.stages import train_diffusion


def test_prepare_from_a_folder_of_images(tmp_path):
    write_phantoms(tmp_path / "data", 4, image_size=16)
    config = settings_with(
        tmp_path / "out", dataset="nifti_folder", data_dir=str(tmp_path / "data"), holdout_fraction=0.5,
        label_column="grade",
    )  # fmt: skip
    result = run_study(config, ["prepare"])
    assert result["train"] == result["heldout"] == {"HGG": 2, "LGG": 2}
    assert (result["shape"], result["warnings"]) == ([1, 16, 16, 16], [])
    table = tmp_path / "data" / "metadata.csv"
    table.write_text(table.read_text().replace("subject_id", "person", 1))
    (warning,) = run_study(config, ["prepare"])["warnings"]
    assert "names no subjects" in warning


def test_a_study_of_one_class(tmp_path):
    """Brains of which nothing is known."""
    write_phantoms(tmp_path / "data", 3, image_size=16)
    settings = tiny_study() | {
        "dataset": "nifti_folder", "data_dir": str(tmp_path / "data"), "holdout_fraction": 0.5,
        "conditional_rewards": True, "label_column": "none",
    }  # fmt: skip
    with pytest.raises(InputError, match="'downstream' trains classifiers, and these data have one class; remove it"):
        run_study(StudyConfig(output_dir=str(tmp_path / "out"), **settings))
    settings.pop("downstream")
    run_study(StudyConfig(output_dir=str(tmp_path / "out"), **settings))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["n"] == {"all": 3, "unlabelled": 3}
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "out" / "pipeline_rl")
    assert pipe("unlabelled", num_inference_steps=2, output_type="pt").volumes.shape == (1, 1, 16, 16, 16)


def test_a_study_runs_from_a_prepared_cache(tmp_path):
    """With two modalities as channels."""
    write_brats(tmp_path / "data", per_class=4)
    listing = list_cases("brats2019", tmp_path / "data", modality=["t1ce", "flair"])
    prepare_cases(listing, VolumeProcessor(16), SplitPlan(0.5), tmp_path / "cache")
    config = settings_with(tmp_path / "out", dataset="prepared", data_dir=str(tmp_path / "cache"))
    result = run_study(config, ["prepare"])
    assert (result["train"], result["shape"]) == ({"HGG": 2, "LGG": 2}, [2, 16, 16, 16])
    assert result["dataset"] == "brats2019"
    run_study(config, stages_up_to(config, "diffusion"))
    pipeline = MedVolumePipeline.from_pretrained(tmp_path / "out" / "diffusion" / "pipeline")
    assert pipeline("LGG", 2).volumes.shape == (1, 2, 16, 16, 16)
    summary = tmp_path / "cache" / "summary.json"
    summary.write_text(summary.read_text().replace('"dataset": "brats2019"', '"dataset": null'))
    assert run_study(config, ["prepare"])["dataset"] == "prepared"  # as of what was prepared before summaries said it
    missing = settings_with(tmp_path / "no", dataset="prepared", data_dir=str(tmp_path / "data"))
    with pytest.raises(InputError, match=r"train\.safetensors can't be read as prepared volumes"):
        run_study(missing, ["prepare"])


def test_a_denoiser_is_trained_on_what_an_earlier_version_prepared(tmp_path):
    """Its record does not name the data set."""
    config = settings_with(tmp_path, mixed_precision="no")
    run_study(config, ["prepare"])
    tiny_vqvae().save_pretrained(tmp_path / "vqgan" / "vqvae")
    path = tmp_path / "prepare" / "stage.json"
    record = json.loads(path.read_text())
    del record["result"]["dataset"], record["result"]["warnings"]
    path.write_text(json.dumps(record))
    train_diffusion(config)
    assert (tmp_path / "diffusion" / "samples.png").is_file()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda train, heldout: train, "4 subjects are in the training set and in the hold-out"),
        (lambda train, heldout: heldout.take_per_class(1), "Class 'HGG' needs 2 volumes or more in the hold-out and has 1"),
        (lambda train, heldout: replace(heldout, pixel_values=heldout.pixel_values[..., :8]), "The hold-out has volumes of shape"),
        (lambda train, heldout: replace(heldout, id2label={0: "LGG", 1: "HGG"}), "The hold-out has classes"),
        (lambda train, heldout: replace(heldout, spacing=(1.0, 1.0, 1.0)), "The hold-out has voxels of"),
    ],
    ids=["leak", "few", "shape", "classes", "spacing"],
)  # fmt: skip
def test_a_split_that_later_stages_can_not_use_is_refused_at_once(change, sentence, tmp_path):
    train, heldout = load_phantoms(2, 16), load_phantoms(2, 16, first_index=2)
    train.save(tmp_path / "cache" / "train.safetensors")
    change(train, heldout).save(tmp_path / "cache" / "heldout.safetensors")
    config = settings_with(tmp_path / "out", dataset="prepared", data_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=sentence):
        run_study(config, ["prepare"])
    heldout.save(tmp_path / "cache" / "heldout.safetensors")
    assert run_study(config, ["prepare"])["heldout"] == {"HGG": 2, "LGG": 2}
