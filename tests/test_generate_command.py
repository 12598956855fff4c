"""msrl generate: what it writes, that it goes on where it was killed, and one sentence for what can't be."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from peft import LoraConfig
from tiny import tiny_pipeline, tiny_unet

from msrl_diffusers import MedVolumePipeline, VQModel3D, sample_volumes
from msrl_diffusers.app.volume_files import decode_checked, file_stems, nifti_bytes
from msrl_diffusers.cli import evaluate as evaluate_verb
from msrl_diffusers.cli import generate as generate_verb
from msrl_diffusers.data.cases import list_cases
from msrl_diffusers.errors import Busy, InputError
from msrl_diffusers.evaluation.sources import open_source
from msrl_diffusers.processes import alone_in


QUICK = ["--num_inference_steps", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def generate(model, output_dir, *arguments):
    generate_verb.run(["--model", str(model), "--output_dir", str(output_dir), *QUICK, *arguments])
    return output_dir


def images(folder) -> dict[str, np.ndarray]:
    return {path.name: nib.load(path).get_fdata() for path in sorted(folder.glob("*.nii.gz"))}


@pytest.fixture(scope="module")
def five(model, tmp_path_factory):
    return generate(model, tmp_path_factory.mktemp("five"), "--num_volumes", "5", "--batch_size", "2", "--seed", "3")


def test_images_table_and_record(five, model):
    names = [f"{'HL'[index % 2]}GG-3-0000{index}.nii.gz" for index in range(5)]
    assert sorted(path.name for path in five.iterdir()) == sorted(
        [*names, "generation.json", "metadata.csv", "sheet.png"]
    )
    image = nib.load(five / names[0])
    assert image.shape == (16, 16, 16)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert np.allclose(image.affine[:3, :3], np.diag([12.0, 12.0, 12.0]))
    assert np.allclose(image.affine @ [7.5, 7.5, 7.5, 1], [0, 0, 0, 1])  # the origin is the middle
    assert 0 <= image.get_fdata().min() < image.get_fdata().max() <= 1
    rows = [f"{name},{name[:3]}" for name in names]
    assert (five / "metadata.csv").read_text().splitlines() == ["file_name,label", *rows]
    record = json.loads((five / "generation.json").read_text())
    assert record["num_volumes"] == 5
    (made_by,) = record["made_by"]
    assert made_by["versions"]["torch"] == torch.__version__
    assert "commit" in made_by
    settings = record["settings"]
    assert (settings["model"], settings["seed"], settings["num_inference_steps"]) == (model, 3, 2)
    assert settings["class_labels"] == ["HGG", "LGG"]
    assert settings["scheduler"]["class"] == "DDIMScheduler"
    assert settings["scheduler"]["prediction_type"] == "v_prediction"
    assert len(settings["weights"]) == 16


def test_a_volume_depends_on_seed_and_number_alone(five, model, tmp_path):
    kept = images(five)
    again = images(generate(model, tmp_path / "a", "--num_volumes", "3", "--batch_size", "3", "--seed", "3"))
    assert len(again) == 3
    for name, array in again.items():
        assert np.allclose(array, kept[name], atol=1e-5)
    other = images(generate(model, tmp_path / "b", "--num_volumes", "1"))
    assert np.abs(other["HGG-0-00000.nii.gz"] - kept["HGG-3-00000.nii.gz"]).max() > 0.05
    samples = sample_volumes(tiny_pipeline(), 2, 2, seed=3, progress=False)  # as msrl evaluate draws them
    array = samples.pixel_values[1, 0].float().numpy().transpose(2, 1, 0) / 2 + 0.5
    assert np.allclose(array, kept["LGG-3-00001.nii.gz"], atol=1e-3)


def test_the_folder_is_a_set_and_a_data_set(five, tmp_path):
    source = open_source(five)
    assert source.class_names == ["HGG", "HGG", "HGG", "LGG", "LGG"]
    assert source.shape == (1, 16, 16, 16)
    assert source.spacing == (12.0, 12.0, 12.0)
    listing = list_cases("nifti_folder", five)
    assert [case.label for case in listing.cases] == ["HGG", "LGG", "HGG", "LGG", "HGG"]
    assert not listing.rejected
    evaluate_verb.run([str(five), str(five), "--output_dir", str(tmp_path), "--bootstrap_draws", "2"])
    assert json.loads((tmp_path / "evaluate.json").read_text())["counts"] == {
        "real": 5, "generated": 5, "held_out": None,
    }  # fmt: skip


@pytest.mark.parametrize("image_size", [None, 16])
def test_the_folder_holds_the_samples_as_they_are(five, image_size):
    """Whoever judges a generator by its files gives it neither another brightness nor another contrast."""
    samples = sample_volumes(tiny_pipeline(), 5, 2, seed=3, progress=False)
    volumes = open_source(five, image_size).take(range(5))
    torch.testing.assert_close(volumes, samples.pixel_values[[0, 2, 4, 1, 3]].float(), rtol=0, atol=1e-3)  # float16


def test_a_killed_run_goes_on(model, tmp_path, monkeypatch, capsys):
    whole = images(generate(model, tmp_path / "whole", "--num_volumes", "4", "--batch_size", "1"))
    written = []

    def write_three(path, content):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(generate_verb, "write_bytes", write_three)
        with pytest.raises(KeyboardInterrupt):
            generate(model, tmp_path / "out", "--num_volumes", "4", "--batch_size", "1")
    assert len(images(tmp_path / "out")) == len(open_source(tmp_path / "out")) == 3
    assert open_source(tmp_path / "out").class_names == ["HGG", "HGG", "LGG"]
    before = {path: path.stat().st_mtime_ns for path in written}
    capsys.readouterr()
    generate(model, tmp_path / "out", "--num_volumes", "4", "--batch_size", "3")
    assert capsys.readouterr().out == f"4 volumes (2 HGG, 2 LGG) in {tmp_path / 'out'}; 3 were there already.\n"
    assert {path: path.stat().st_mtime_ns for path in written} == before
    resumed = images(tmp_path / "out")
    assert resumed.keys() == whole.keys()
    assert all(np.allclose(resumed[name], whole[name], atol=1e-5) for name in whole)


def test_the_table_of_a_killed_run_that_was_to_add_images_names_them(model, tmp_path, monkeypatch):
    out = generate(model, tmp_path / "out", "--num_volumes", "2")
    batches = []

    def decode_two(pipeline, latents):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(latents))
        return decode_checked(pipeline, latents)

    monkeypatch.setattr(generate_verb, "decode_checked", decode_two)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            generate(model, out, "--num_volumes", "6", "--batch_size", "1")
        assert len(images(out)) == len(open_source(out)) == 4
        # killed between images and table, and once more before the next batch
        (out / "metadata.csv").write_text("file_name,label\nHGG-0-00000.nii.gz,HGG\n")


def test_more_are_added_and_fewer_take_none_away(model, tmp_path, monkeypatch):
    out = generate(model, tmp_path / "out")  # one of each class
    assert list(images(out)) == ["HGG-0-00000.nii.gz", "LGG-0-00001.nii.gz"]
    first = (out / "HGG-0-00000.nii.gz").stat().st_mtime_ns
    monkeypatch.setattr(generate_verb, "git_commit", lambda: "another")
    generate(model, out)
    record = out / "generation.json"
    (of_both,) = json.loads(record.read_text())["made_by"]  # nothing was made now
    generate(model, out, "--num_volumes", "3")
    generate(model, out, "--num_volumes", "1")
    assert json.loads(record.read_text())["made_by"] == [of_both, {**of_both, "commit": "another"}]
    assert len(images(out)) == len((out / "metadata.csv").read_text().splitlines()) - 1 == 3
    assert (out / "HGG-0-00000.nii.gz").stat().st_mtime_ns == first
    found = json.loads(record.read_text())
    earlier = {
        **{name: found[name] for name in found if name != "made_by"},
        **of_both,
    }  # as the last version but one wrote it
    record.write_text(json.dumps(earlier))
    generate(model, out, "--num_volumes", "4")
    assert json.loads(record.read_text())["made_by"] == [of_both, {**of_both, "commit": "another"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "1"], r"holds volumes with seed 0, not 1; give another --output_dir\."),
        (["--num_inference_steps", "3"], "with num_inference_steps 2, not 3;"),
        (["--guidance_scale", "2"], "with guidance_scale 1.0, not 2.0;"),
        (["--class_label", "LGG"], r"with class_labels \['HGG', 'LGG'\], not \['LGG'\];"),
        (["--dtype", "bfloat16"], "(other weights|with dtype float32, not bfloat16);"),
    ],
)
def test_other_settings_are_refused(model, five, tmp_path, options, message):
    out = generate(model, tmp_path / "out", "--num_volumes", "1")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match=message):
        generate(model, out, *options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_refused_run_leaves_the_folder_to_the_corrected_command(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.register_to_config(supports_guidance=False)
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="it can't be guided: use guidance_scale=1"):
        generate(tmp_path / "model", tmp_path / "out", "--guidance_scale", "2")
    assert len(images(generate(tmp_path / "model", tmp_path / "out"))) == 2
    assert json.loads((tmp_path / "out" / "generation.json").read_text())["settings"]["guidance_scale"] == 1.0


@pytest.mark.parametrize("place", ["out", "."])
def test_of_two_commands_in_one_folder_the_second_is_refused(model, tmp_path, monkeypatch, place):
    """Both would find no volumes yet, and mix those of their settings."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out" if place == "." else tmp_path)
    with alone_in(tmp_path / "out"), pytest.raises(Busy, match=f"Another command is at work in {re.escape(place)};"):
        generate(model, place)
    assert not images(tmp_path / "out")
    assert len(images(Path(generate(model, place)))) == 2


def test_a_folder_of_volumes_that_do_not_say_their_intensities_are_final_is_refused(model, tmp_path):
    """Readers would scale these, and not those that came beside them."""
    out = generate(model, tmp_path / "out", "--num_volumes", "1")
    record = json.loads((out / "generation.json").read_text())
    del record["settings"]["intensities"]
    (out / "generation.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="with intensities None, not final; give another --output_dir"):
        generate(model, out, "--num_volumes", "2")


def test_other_weights_are_refused_and_a_moved_model_is_not(model, tmp_path):
    out = generate(model, tmp_path / "out", "--num_volumes", "1")
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="of a model with other weights;"):
        generate(tmp_path / "other", out)
    tiny_pipeline().save_pretrained(tmp_path / "moved")
    assert len(images(generate(tmp_path / "moved", out, "--num_volumes", "2"))) == 2


@pytest.mark.parametrize(
    ("wanted", "names"),
    [(["LGG"], ["LGG", "LGG"]), (["1", "HGG"], ["LGG", "HGG"]), (["0"], ["HGG", "HGG"])],
)
def test_classes_by_name_or_number(model, tmp_path, wanted, names):
    out = generate(model, tmp_path, "--class_label", *wanted, "--num_volumes", "2")
    rows = (out / "metadata.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == names


def test_a_class_whose_name_is_a_number_goes_by_its_name(model):
    pipeline = tiny_pipeline()
    pipeline.register_to_config(id2label={0: "1", 1: "0"})
    assert generate_verb.chosen_classes(pipeline, ["1", "0"]) == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class_label", "MS"], r"The model knows no class 'MS'; it has 0 \(HGG\), 1 \(LGG\)\."),
        (["--num_volumes", "0"], "num_volumes must be at least 1, got 0"),
        (["--batch_size", "-1"], "batch_size must be at least 1, got -1"),
        (["--seed", "-1"], "seed must not be negative, got -1"),
        (["--eta", "2"], r"eta must lie in 0 \.\. 1, got 2.0"),
        (["--guidance_scale", "nan"], "guidance_scale must be a finite number, got nan"),
        (["--guidance_scale", "0"], "guidance_scale must be above 0, got 0.0: at 0 the class is ignored"),
        (["--dtype", "int8"], r"dtype must be one of \['float32', 'bfloat16', 'float16'\], got 'int8'"),
        (["--num_inference_steps", "2000"], "num_inference_steps must be at most 1000"),
        (["--lora", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--stepz", "3"], "There is no option --stepz"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(model, tmp_path, options, message):
    with pytest.raises(InputError, match=message) as caught:
        generate(model, tmp_path / "out", *options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_no_pipeline_is_said(tmp_path):
    with pytest.raises(InputError, match=r"/no/where is neither the folder of a pipeline .* nor a Hub repository"):
        generate("/no/where", tmp_path / "out")


def test_a_folder_of_another_origin_is_refused(model, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "scan.nii").write_bytes(b"")
    with pytest.raises(InputError, match=r"scan\.nii was not written by msrl generate; give an empty folder"):
        generate(model, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "generation.json").write_text("{}")
    with pytest.raises(InputError, match=r"generation\.json can't be read"):
        generate(model, tmp_path / "b")


def test_nan_is_refused(tmp_path):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        next(pipeline.unet.parameters()).fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "broken")
    with pytest.raises(InputError, match="The model made NaN or infinite values; use --dtype float32"):
        generate(tmp_path / "broken", tmp_path / "out")
    assert not images(tmp_path / "out")


def test_half_precision_is_near(model, five, tmp_path):
    half = images(generate(model, tmp_path, "--num_volumes", "1", "--seed", "3", "--dtype", "bfloat16"))
    difference = np.abs(half["HGG-3-00000.nii.gz"] - images(five)["HGG-3-00000.nii.gz"])
    assert 0 < difference.mean() < 0.05


def test_an_adapter(model, tmp_path):
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights=False))
    pipeline.save_lora_weights(tmp_path / "lora")
    plain, none, full = (
        images(generate(model, tmp_path / name, "--num_volumes", "1", *options))["HGG-0-00000.nii.gz"]
        for name, options in {
            "plain": [],
            "none": ["--lora", str(tmp_path / "lora"), "--lora_scale", "0"],
            "full": ["--lora", str(tmp_path / "lora")],
        }.items()
    )
    assert np.allclose(plain, none, atol=1e-5)
    assert np.abs(plain - full).max() > 0.01
    with pytest.raises(InputError, match="other weights"):
        generate(model, tmp_path / "full")


def test_channels_are_images_of_their_own(tmp_path):
    torch.manual_seed(0)
    vqvae = VQModel3D(
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        latent_channels=2,
        quantizer="fsq",
        norm_num_groups=4,
    )
    MedVolumePipeline(vqvae, tiny_unet(), tiny_pipeline().scheduler, (1.0, 2.0, 3.0)).save_pretrained(tmp_path / "m")
    out = generate(tmp_path / "m", tmp_path / "out", "--num_volumes", "2")
    assert list(images(out)) == [
        "0-0-00000-channel1.nii.gz", "0-0-00000.nii.gz", "1-0-00001-channel1.nii.gz", "1-0-00001.nii.gz",
    ]  # fmt: skip
    header, first, _ = (out / "metadata.csv").read_text().splitlines()
    assert header == "file_name,channel1_file_name,label"
    assert first == "0-0-00000.nii.gz,0-0-00000-channel1.nii.gz,0"
    assert nib.load(out / "0-0-00000.nii.gz").header.get_zooms() == (3.0, 2.0, 1.0)  # x, y, z of D, H, W
    (case, _) = list_cases("nifti_folder", out).cases
    assert list(case.images) == ["image", "channel1"]
    (out / "0-0-00000-channel1.nii.gz").unlink()
    generate(tmp_path / "m", out, "--num_volumes", "2")
    assert len(images(out)) == 4


@pytest.mark.parametrize(
    ("names", "stems"),
    [
        ({0: "HGG", 1: "LGG"}, {0: "HGG", 1: "LGG"}),
        ({0: "../../etc/passwd", 1: "a b"}, {0: "etc_passwd", 1: "a_b"}),
        ({0: "a b", 1: "a/b", 2: "A_B"}, {0: "0", 1: "1", 2: "2"}),
        ({0: "", 1: "..", 2: "脳"}, {0: "0", 1: "1", 2: "2"}),
        ({0: "x" * 300}, {0: "x" * 64}),
    ],
)
def test_class_names_as_file_names(names, stems):
    assert file_stems(names) == stems


def test_equal_volumes_are_equal_files():
    volume = tiny_pipeline()("HGG", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).volumes[0]
    content = nifti_bytes(volume, (12.0, 12.0, 12.0))
    assert content == nifti_bytes(volume.clone(), (12.0, 12.0, 12.0))
    assert content[4:8] == bytes(4)  # no time of writing


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        generate_verb.run(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: msrl generate ")
    assert "\n    msrl generate --model model_cards/phantoms-32 --num_volumes 8 --output_dir outputs/brains\n" in shown
