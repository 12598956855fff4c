"""msrl evaluate from the command line, and the comparison of sets behind it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline

from msrl_diffusers import VolumeDataset, load_phantoms, write_phantoms
from msrl_diffusers.cli import evaluate as evaluate_verb
from msrl_diffusers.cli.sets import class_shares, is_pipeline, labels_in_proportion
from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.comparison import _halves, compare_sets, ms_ssim_of, ms_ssim_of_sets
from msrl_diffusers.evaluation.diversity import ms_ssim_diversity
from msrl_diffusers.evaluation.extractors import load_extractor
from msrl_diffusers.evaluation.features import source_features
from msrl_diffusers.evaluation.fidelity import frechet_distance
from msrl_diffusers.evaluation.sources import open_source
from msrl_diffusers.pipelines.sampling import sample_volumes
from msrl_diffusers.seeding import generator_for


EXTRACTOR = Path(__file__).parents[1] / "model_cards" / "phantoms-32" / "extractor_label"


def blurred(volumes: VolumeDataset) -> VolumeDataset:
    smooth = torch.nn.functional.avg_pool3d(volumes.pixel_values.float(), 3, stride=1, padding=1)
    return VolumeDataset(smooth.half(), volumes.class_labels, volumes.subject_ids, volumes.id2label, volumes.spacing)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Files of 16 training and 12 held-out phantoms, of 20 new ones, and of these blurred; and a folder of NIfTI."""
    folder = tmp_path_factory.mktemp("sets")
    made = {"train": (8, 0), "held_out": (6, 100), "sharp": (10, 200)}
    paths = {name: str(folder / f"{name}.safetensors") for name in (*made, "blurred", "larger")}
    for name, (count, first) in made.items():
        load_phantoms(count, 16, first_index=first).save(paths[name])
    blurred(load_phantoms(10, 16, first_index=200)).save(paths["blurred"])
    load_phantoms(4, 18).save(paths["larger"])
    write_phantoms(folder / "nifti", 8, image_size=16, seed=5)
    (folder / "empty").mkdir()
    return {
        **paths,
        "nifti": str(folder / "nifti"),
        "empty": str(folder / "empty"),
        "missing": str(folder / "missing"),
    }


def evaluated(output_dir, *arguments) -> dict:
    evaluate_verb.run([*arguments, "--output_dir", str(output_dir), "--bootstrap_draws", "20"])
    return json.loads((output_dir / "evaluate.json").read_text())


def test_the_report(sets, tmp_path, capsys):
    options = ["--held_out", sets["held_out"], "--extractor", str(EXTRACTOR)]
    content = evaluated(tmp_path, sets["train"], sets["blurred"], *options)
    assert {path.name for path in tmp_path.iterdir()} == {
        "evaluate.json", "evaluate.md", "evaluate.html", "volumes.png",
    }  # fmt: skip
    for figure in (content["fid"], content["kid"], content["fid_floor"], content["held_out"]["fid"]):
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert content["n"] == 16
    assert content["counts"] == {"real": 16, "generated": 20, "held_out": 12}
    assert content["held_out"]["n"] == content["fid_floor"]["n"] == 12
    assert content["fid_floor"]["kind"] == "held_out"
    assert set(content["by_class"]) == {"HGG", "LGG"}
    assert content["by_class"]["HGG"]["n"] == 8
    assert content["extractor"]["id"].startswith("slices/SliceFeatureExtractor")
    assert len(content["extractor"]["sha256"]) == 16
    assert content["ms_ssim"]["real"]["value"] < content["ms_ssim"]["generated"]["value"]
    assert all(figures["within_classes"] for figures in content["ms_ssim"].values())
    assert content["statistics"]["difference"]["spectrum"]["log_spectral_distance_db"][0] > 3
    out, err = capsys.readouterr()
    assert out.startswith("FID ")
    assert out.endswith(f"Report: {tmp_path / 'evaluate.html'}\n")
    assert err.splitlines()[-1].startswith("warning: 16 volumes a side are fewer than the 48 features")
    page = (tmp_path / "evaluate.html").read_text()
    assert "Not for clinical use." in page
    assert "MS-SSIM, 56 pairs of real, within classes" in page
    assert not any("Classes have other shares" in warning for warning in content["warnings"])


def test_blur_is_worse_than_new_volumes_and_both_worse_than_the_real_ones_themselves(sets, tmp_path):
    values = {
        name: evaluated(tmp_path / name, sets["train"], sets[name])["fid"]["value"]
        for name in ("train", "sharp", "blurred")
    }
    assert values["train"] == pytest.approx(0, abs=1e-6)
    assert values["train"] < values["sharp"] < values["blurred"]


def test_differences_are_generated_less_real_and_precision_is_of_the_generated():
    real = load_phantoms(8, 16)
    two = real.take_per_class(1)
    few = two.select(torch.arange(len(two)).repeat(8))
    found = compare_sets(open_source(real), open_source(few), load_extractor("random"), bootstrap_draws=2)
    assert found["manifold"]["precision"] == 1 > found["manifold"]["recall"]
    dark = replace(real, pixel_values=(real.pixel_values.float() - 0.2).clamp(-1, 1).to(real.pixel_values.dtype))
    found = compare_sets(open_source(real), open_source(dark), load_extractor("random"), bootstrap_draws=2)
    assert found["statistics"]["difference"]["intensity"]["mean_difference"][0] < 0


def test_the_distance_is_that_of_the_features(sets):
    extractor = load_extractor("random")
    real, other = (load_phantoms(8, 16, first_index=first) for first in (0, 50))
    found = compare_sets(open_source(real), open_source(other), extractor, bootstrap_draws=2)
    features = [extractor(volumes.pixel_values.float()) for volumes in (real, other)]
    assert found["fid"]["value"] == pytest.approx(frechet_distance(*(part.double() for part in features)), rel=1e-4)
    assert found["fid_floor"]["kind"] == "halves"
    assert found["fid_floor"]["n"] == 8


def test_the_floor_of_two_halves_holds_that_of_other_halves():
    """Honest volumes must not look worse than real ones: the interval of one division contains the mean of others."""
    real, extractor = open_source(load_phantoms(48, 16)), load_extractor("random")
    floor = compare_sets(real, real.select(range(48)), extractor, bootstrap_draws=200)["fid_floor"]
    features = source_features(extractor, real, progress=False)
    others = []
    for seed in range(1, 21):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(seed))
        others.append(frechet_distance(features[order[:48]], features[order[48:]]))
    assert floor["n"] == 48
    assert floor["low"] < sum(others) / len(others) < floor["high"]
    assert floor["high"] - floor["low"] < 2 * floor["value"]  # an interval that holds everything says nothing


def test_no_subject_is_in_both_halves():
    names = [f"subject-{number // 3}" for number in range(30)]
    one, two = _halves(names, seed=0)
    assert sorted([*one, *two]) == list(range(30))
    assert 12 <= len(one) <= 15
    assert not {names[row] for row in one} & {names[row] for row in two}
    order = torch.randperm(8, generator=generator_for(0, "halves")).tolist()
    assert _halves(list("abcdefgh"), seed=0) == (order[:4], order[4:])
    with pytest.raises(InputError, match=r"volumes of 1 names only, .*; give held_out\."):
        _halves(["one"] * 8, seed=0)


def test_the_floor_is_of_no_more_volumes_than_were_generated():
    """A distance of few volumes is mostly bias: the floor beside it must have the same."""
    real = open_source(load_phantoms(24, 16))
    for held_out in (None, open_source(load_phantoms(16, 16, first_index=50))):
        found = compare_sets(real, real.select(range(8)), load_extractor("random"), held_out, bootstrap_draws=2)
        assert found["fid_floor"]["n"] == found["n"] == 8
        assert found["fid_at_floor_n"] == pytest.approx(found["fid"]["value"], rel=1e-4)


def test_the_floor_s_size_is_drawn_from_all_classes():
    """Sets sorted by class, one from the front and one from the back: their first rows would be of different classes."""
    sharp, soft = load_phantoms(24, 16), blurred(load_phantoms(24, 16))
    volumes = torch.cat([sharp.pixel_values[::2], soft.pixel_values[1::2]])
    labels, names = torch.arange(48) // 24, [str(row) for row in range(48)]
    real = VolumeDataset(volumes, labels, names, {0: "sharp", 1: "soft"}, sharp.spacing)
    found = compare_sets(
        open_source(real), open_source(real.select(range(47, -1, -1))), load_extractor("random"), bootstrap_draws=2
    )
    assert found["fid"]["value"] == pytest.approx(0, abs=1e-6)
    features = load_extractor("random")(volumes.float())
    assert found["fid_at_floor_n"] < 0.5 * frechet_distance(features[:24], features[24:])
    assert found["fid_floor"]["value"] < 0.5 * frechet_distance(features[:24], features[24:])


def test_a_folder_against_prepared_volumes(sets, tmp_path):
    content = evaluated(tmp_path, sets["nifti"], sets["sharp"], "--image_size", "16", "--infinity")
    assert content["counts"]["real"] == 16
    assert content["by_class"] == {}  # the folder's table names no classes
    assert [figures["within_classes"] for figures in content["ms_ssim"].values()] == [False, False]
    similarity = ms_ssim_of(replace(open_source(sets["sharp"]), class_names=None), content["seed"])
    assert content["ms_ssim"]["generated"] == similarity  # pairs across classes too, as those of the folder are
    assert {"value", "standard_error", "sizes", "distances"} == set(content["fid_infinity"])
    assert "for publication" in (tmp_path / "evaluate.md").read_text()


def test_the_only_volume_of_a_class_is_in_no_pair():
    phantoms = load_phantoms(4, 16)
    labels, names = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2]), {0: "a", 1: "alone", 2: "c"}
    volumes = VolumeDataset(phantoms.pixel_values, labels, phantoms.subject_ids, names, phantoms.spacing)
    others = labels != 1
    expected = ms_ssim_diversity(volumes.pixel_values[others].float(), labels=labels[others])
    assert ms_ssim_of(open_source(volumes), 0) == {**expected, "within_classes": True}
    all_alone = volumes.select([0, 3, 4])
    expected = ms_ssim_diversity(all_alone.pixel_values.float())
    assert ms_ssim_of(open_source(all_alone), 0) == {**expected, "within_classes": False}
    assert ms_ssim_of(open_source(volumes.select([0])), 0) is None


def of_classes(volumes: VolumeDataset, *names: str) -> VolumeDataset:
    """The same volumes, of these classes, one after the other."""
    labels = {name: label for label, name in enumerate(sorted(set(names)))}
    classes = torch.tensor([labels[name] for name in names])
    return replace(volumes, class_labels=classes, id2label={label: name for name, label in labels.items()})


def test_a_rare_class_leaves_the_others_their_pairs():
    common = load_phantoms(10, 16)
    volumes = of_classes(common, *["common"] * 12, *["other"] * 6, *["rare"] * 2)
    found = ms_ssim_of(open_source(volumes), 0)
    assert found == ms_ssim_of(open_source(volumes.select(range(12))), 0)
    assert found["pairs"] == 66
    assert found["interval"][0] < found["value"] < found["interval"][1]


def test_similarities_of_two_sets_are_of_the_same_classes():
    phantoms = load_phantoms(14, 16)
    real = open_source(of_classes(phantoms, *["a"] * 14, *["b"] * 14))
    only = open_source(of_classes(phantoms, *["b"] * 28))
    found = ms_ssim_of_sets({"real": real, "generated": only}, 0)
    assert found["real"] == ms_ssim_of(real.select(range(14, 28)), 0)
    assert found["generated"] == ms_ssim_of(only, 0)
    rare = open_source(of_classes(phantoms, *["a"] * 4, *["b"] * 24))  # in one set, and left out of both
    assert ms_ssim_of_sets({"real": real, "generated": rare}, 0)["real"] == found["real"]
    others = open_source(of_classes(phantoms, *["c"] * 28))
    found = ms_ssim_of_sets({"real": real, "generated": others}, 0)
    assert [figures["within_classes"] for figures in found.values()] == [False, False]
    compared = compare_sets(real, only, load_extractor("random"), bootstrap_draws=2)
    assert compared["ms_ssim"] == ms_ssim_of_sets({"real": real, "generated": only}, 0)


def test_no_interval_is_an_empty_cell(sets, tmp_path):
    few = of_classes(load_phantoms(2, 16), "a", "a", "b", "b")
    few.save(tmp_path / "few.safetensors")
    content = evaluated(tmp_path / "out", str(tmp_path / "few.safetensors"), str(tmp_path / "few.safetensors"))
    assert content["ms_ssim"]["real"]["interval"] is None
    assert "| MS-SSIM, 2 pairs of real, within classes | " in (tmp_path / "out" / "evaluate.md").read_text()


def test_a_pipeline_is_sampled(sets, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline", variant="bf16")
    options = ["--num_volumes", "6", "--num_inference_steps", "2", "--batch_size", "4", "--variant", "bf16"]
    content = evaluated(tmp_path / "out", sets["train"], str(tmp_path / "pipeline"), *options)
    assert content["n"] == 6
    kept = VolumeDataset.load(tmp_path / "out" / "generated.safetensors")
    assert kept.class_counts() == {"HGG": 3, "LGG": 3}
    same = sample_volumes(tiny_pipeline(), 6, 2, batch_size=4, progress=False)
    assert torch.equal(same.pixel_values, kept.pixel_values)
    assert torch.equal(same.class_labels, kept.class_labels)
    again = sample_volumes(tiny_pipeline(), 6, 2, batch_size=3, progress=False)  # other batches, the same volumes
    assert (again.pixel_values - kept.pixel_values).abs().max() < 1e-2


def test_a_pipeline_is_sampled_in_the_proportions_of_the_real_classes(sets, tmp_path):
    """How often a pipeline was asked for a class is no quality of it."""
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    mixed = of_classes(load_phantoms(8, 16), *["HGG"] * 12, *["LGG"] * 4)
    mixed.save(tmp_path / "mixed.safetensors")
    options = ["--num_volumes", "8", "--num_inference_steps", "1", "--held_out", sets["held_out"]]
    content = evaluated(tmp_path / "out", str(tmp_path / "mixed.safetensors"), str(tmp_path / "pipeline"), *options)
    assert VolumeDataset.load(tmp_path / "out" / "generated.safetensors").class_counts() == {"HGG": 6, "LGG": 2}
    (warning,) = (warning for warning in content["warnings"] if "other shares" in warning)
    assert warning.startswith("Classes have other shares in the held-out than in the real volumes (HGG: 50% and 75%)")


def test_sets_of_other_mixes_are_pointed_out(sets, tmp_path):
    mixed = of_classes(load_phantoms(8, 16), *["HGG"] * 15, "MS")
    mixed.save(tmp_path / "mixed.safetensors")
    content = evaluated(tmp_path / "out", sets["train"], str(tmp_path / "mixed.safetensors"))
    warning = content["warnings"][-1]
    assert warning.startswith("Classes have other shares in the generated than in the real volumes (LGG: 0% and 50%)")


def test_labels_in_proportion():
    id2label = {0: "HGG", 1: "LGG"}
    shares = class_shares(id2label, ["HGG"] * 229 + ["LGG"] * 46)
    labels = labels_in_proportion(shares, 275)
    assert [labels.count(label) for label in (0, 1)] == [229, 46]
    assert labels_in_proportion(shares, 100) == labels[:100]
    assert [labels[:100].count(label) for label in (0, 1)] == [83, 17]
    for names in (None, ["LGG", "HGG"] * 8, ["HGG", "MS"]):  # none, as many of each, and others
        assert labels_in_proportion(class_shares(id2label, names), 5) == [0, 1, 0, 1, 0]
    assert labels_in_proportion(class_shares(id2label, ["LGG"]), 2) == [1, 1]
    assert labels_in_proportion({2: 5, 4: 5, 7: 5}, 7) == [2, 4, 7, 2, 4, 7, 2]


def test_a_pipeline_is_not_sampled_in_vain(sets, tmp_path, monkeypatch):
    """What is wrong is said before the samples, which may take hours."""
    monkeypatch.setattr("msrl_diffusers.cli.sets.sample_volumes", None)
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    for options, message in (
        ([sets["larger"], str(tmp_path / "pipeline")], r"have volumes of 18 x 18 x 18 and 16 x 16 x 16 voxels"),
        (
            [sets["train"], str(tmp_path / "pipeline"), "--held_out", sets["larger"]],
            r"have volumes of 16 x 16 x 16 and 18 x 18 x 18",
        ),
        (
            [sets["train"], str(tmp_path / "pipeline"), "--num_inference_steps", "1001"],
            "num_inference_steps is at most 1000 with",
        ),
        (
            [sets["train"], str(tmp_path / "pipeline"), "--num_inference_steps", "0"],
            "num_inference_steps must be positive, got 0",
        ),
        ([sets["train"], str(tmp_path / "pipeline"), "--eta", "1.2"], r"eta is 0 to 1, got 1\.2"),
    ):
        with pytest.raises(InputError, match=message):
            evaluated(tmp_path / "out", *options)
    with pytest.raises(InputError, match="bootstrap_draws must be positive, got 0"):
        evaluate_verb.EvaluateArguments("real", "generated", "out", bootstrap_draws=0)


def test_what_counts_as_a_pipeline(tmp_path):
    assert is_pipeline("somebody/brains-32")
    assert not is_pipeline(str(tmp_path))
    assert not is_pipeline("no/such/folder")
    (tmp_path / "model_index.json").write_text("{}")
    assert is_pipeline(str(tmp_path))


@pytest.mark.parametrize(
    ("real", "generated", "options", "message"),
    [
        ("missing", "sharp", [], r"missing does not exist; give a folder"),
        ("train", "empty", [], r"empty holds no \.nii or \.nii\.gz image"),
        ("train", "larger", [], r"have volumes of 16 x 16 x 16 and 18 x 18 x 18 voxels"),
        ("train", "sharp", ["--extractor", "vgg"], r"The extractor 'vgg' is no folder"),
        ("train", "sharp", ["--extractor", "medicalnet:{missing}"], r"missing"),
        ("train", "sharp", ["--infinity", "--extractor", str(EXTRACTOR.parent / "extractor_judge")], r"16 volumes are too few"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(sets, tmp_path, real, generated, options, message):
    options = [option.format(**sets) for option in options]
    with pytest.raises(InputError, match=message) as raised:
        evaluated(tmp_path / "out", sets[real], sets[generated], *options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out" / "evaluate.json").exists()


def test_too_few_volumes_are_refused(sets):
    few = open_source(load_phantoms(1, 16))
    with pytest.raises(InputError, match="The set generated has 2 volumes"):
        compare_sets(open_source(sets["train"]), few, load_extractor("random"))
    with pytest.raises(InputError, match="num_volumes must be at least 1"):
        sample_volumes(tiny_pipeline(), 0)


def test_too_few_to_extrapolate_is_said_before_what_is_slow(sets, monkeypatch):
    monkeypatch.setattr("msrl_diffusers.evaluation.comparison.bootstrap_frechet", None)
    extractor = load_extractor(str(EXTRACTOR.parent / "extractor_judge"))
    with pytest.raises(InputError, match="16 volumes are too few"):
        compare_sets(open_source(sets["train"]), open_source(sets["sharp"]), extractor, infinity=True)
