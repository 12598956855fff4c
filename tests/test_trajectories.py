import pytest
import torch
from tiny import tiny_phantoms, tiny_pipeline

from msrl_diffusers import SliceFeatureExtractor
from msrl_diffusers.pipelines.sampling import sample_volumes
from msrl_diffusers.seeding import sample_generators
from msrl_diffusers.trajectories import SetSpec, sample_set, score_set, set_specs, set_targets


@pytest.fixture(scope="module")
def volumes():
    return tiny_phantoms(2)


@pytest.fixture(scope="module")
def tiny():
    return tiny_pipeline()


def test_set_specs():
    specs = set_specs([10, 100], [1, 99])
    names = ["reconstruction-001", "reconstruction-099", "synthetic-010", "synthetic-100"]
    assert [spec.name for spec in specs] == names
    assert [spec.unet_forwards for spec in specs] == [1, 99, 10, 100]


def test_a_reconstruction_from_no_noise_is_the_plain_one(tiny, volumes):
    sampled = sample_set(tiny, volumes, SetSpec("reconstruction", 0), seed=0)
    batch = volumes.batch(range(len(volumes)))
    expected = tiny.reconstruct(batch["pixel_values"], 0, batch["class_labels"]).volumes
    torch.testing.assert_close(sampled.pixel_values, expected.half())


def test_sampling_leaves_the_progress_bar_as_it_was(volumes):
    tiny = tiny_pipeline()
    tiny.set_progress_bar_config(desc="mine")
    sample_set(tiny, volumes, SetSpec("synthetic", 1), seed=0)
    sample_volumes(tiny, 1, num_inference_steps=1, progress=False)
    assert tiny._progress_bar_config == {"desc": "mine"}
    with pytest.raises(ValueError, match="Unknown class 7"):
        sample_volumes(tiny, 1, class_labels=[7], progress=False)
    assert tiny._progress_bar_config == {"desc": "mine"}


def test_a_noised_reconstruction_draws_by_the_position_of_its_volume(tiny, volumes):
    sampled = sample_set(tiny, volumes, SetSpec("reconstruction", 3), seed=5, batch_size=3)
    batch = volumes.batch([3])
    generators = sample_generators(5, "trajectory", [3])
    expected = tiny.reconstruct(batch["pixel_values"], 3, batch["class_labels"], generator=generators).volumes
    torch.testing.assert_close(sampled.pixel_values[3:].float(), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["synthetic", "reconstruction"])
def test_sets_follow_from_their_seed(tiny, volumes, kind):
    spec = SetSpec(kind, 2)
    one, again, other = (sample_set(tiny, volumes, spec, seed) for seed in (1, 1, 2))
    assert torch.equal(one.pixel_values, again.pixel_values)
    assert not torch.equal(one.pixel_values, other.pixel_values)


@pytest.mark.parametrize("kind", ["synthetic", "reconstruction"])
def test_every_sample_keeps_class_and_subject_of_its_volume(tiny, volumes, kind):
    sampled = sample_set(tiny, volumes, SetSpec(kind, 1), seed=0, batch_size=3)
    assert sampled.pixel_values.shape == volumes.pixel_values.shape
    assert sampled.class_labels.tolist() == volumes.class_labels.tolist()
    assert sampled.subject_ids == volumes.subject_ids
    assert (sampled.id2label, sampled.spacing) == (volumes.id2label, volumes.spacing)


def test_more_noise_leads_farther_from_the_volume(tiny, volumes):
    batch = volumes.batch(range(len(volumes)))
    clean = tiny.encode_volumes(batch["pixel_values"]).detach()

    def distance(noise_step):
        latents = tiny.reconstruct(
            batch["pixel_values"], noise_step, batch["class_labels"],
            generator=sample_generators(0, "trajectory", range(len(volumes))), output_type="latent",
        ).volumes  # fmt: skip
        return (latents - clean).square().flatten(1).mean(dim=1)

    near, far = distance(1), distance(99)
    assert (near < 0.1 * far).all()
    plain = sample_set(tiny, volumes, SetSpec("reconstruction", 0), seed=0).pixel_values.float()
    errors = [
        (sample_set(tiny, volumes, SetSpec("reconstruction", step), seed=0).pixel_values.float() - plain).abs().mean()
        for step in (1, 99)
    ]
    assert errors[0] < errors[1]


def test_score_of_a_set_by_class(volumes):
    volumes = tiny_phantoms(4)
    torch.manual_seed(0)
    extractor = SliceFeatureExtractor(block_out_channels=(8, 8), num_features=4)
    same = score_set(extractor, volumes, volumes)
    assert set(same) == {"all", "HGG", "LGG"}
    assert all(abs(value) < 1e-6 for value in same.values())
    order = torch.tensor([i for i in range(8) if volumes.class_labels[i] == 0] * 2)
    only_first = volumes.select(order)
    relabelled = type(volumes)(
        only_first.pixel_values, torch.tensor([0] * 4 + [1] * 4), only_first.subject_ids, volumes.id2label,
        volumes.spacing,
    )  # fmt: skip
    scores = score_set(extractor, volumes, relabelled)
    assert abs(scores["HGG"]) < 1e-6
    assert scores["LGG"] > 100 * abs(scores["HGG"])
    assert 0 < scores["all"]


def test_targets_are_scaled_within_each_class():
    scores = {
        "best": {"all": 1.0, "HGG": 10.0, "LGG": 0.1},
        "middle": {"all": 2.0, "HGG": 15.0, "LGG": 0.4},
        "worst": {"all": 3.0, "HGG": 20.0, "LGG": 0.5},
    }
    targets = set_targets(scores, ["HGG", "LGG"])
    assert targets["best"] == {"HGG": 1.0, "LGG": 1.0}
    assert targets["worst"] == {"HGG": 0.0, "LGG": 0.0}
    assert targets["middle"] == {"HGG": pytest.approx(0.5), "LGG": pytest.approx(0.25)}
    ranks = set_targets(scores, ["HGG", "LGG"], "rank")
    assert ranks["middle"] == {"HGG": 0.5, "LGG": 0.5}
