"""What watches the tuning of a study: at which samples it looks, and what that costs."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_phantoms
from tiny_release import released_study, write_tiny_release

from msrl_diffusers import FrechetWatchdog, SliceFeatureExtractor, StudyConfig, run_study
from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.features import extract_features
from msrl_diffusers.evaluation.fidelity import frechet_distance
from msrl_diffusers.seeding import fold_seed
from msrl_diffusers.study.artifacts import (
    best_sampler,
    load_extractors,
    load_pipeline,
    load_reward_models,
    load_split,
)
from msrl_diffusers.study.stages import sample_with
from msrl_diffusers.study.tuning import watchdogs
from msrl_diffusers.trainers.base import read_log
from msrl_diffusers.trajectories import score_set


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_tiny_release(tmp_path_factory.mktemp("release"))


@pytest.mark.parametrize("per_class", [0, 3])
def test_the_label_distance_is_of_the_rollout_or_of_the_best_sampler(per_class, release, tmp_path):
    config = StudyConfig(**released_study(tmp_path, release, watch_per_class=per_class))
    run_study(config, ["prepare"])
    train, extractor = load_split(config, "train"), load_extractors(config)["label"]
    pipeline = load_pipeline(config)
    watched = watchdogs(config, pipeline, load_reward_models(config)["heldout"], extractor, train)["label_fid"]

    def distance(values: torch.Tensor) -> float:
        return watched(SimpleNamespace(samples=values.float(), conditions=train.class_labels))

    real, noise = train.pixel_values, torch.rand(train.pixel_values.shape)
    if per_class == 0:
        assert distance(real) == pytest.approx(0, abs=1e-4)
        assert distance(noise) > 1e-2
        return
    before = distance(real)
    assert before == distance(noise)  # the same noise every time, whatever the rollout was
    wanted = train.take_per_class(per_class)
    sampled = sample_with(pipeline, wanted, best_sampler(config), config, fold_seed(config.seed, "watch"))
    by_class = score_set(extractor, wanted, sampled)
    assert before == pytest.approx((by_class["HGG"] + by_class["LGG"]) / 2, rel=1e-4)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.mul_(1.2)
    assert distance(real) != before


def test_watching_counts_as_forwards(release, tmp_path):
    settings = {"watch_per_class": 3, "max_steps": 3, "ppo": {"max_steps": 3, "watch_steps": 2}}
    config = StudyConfig(**released_study(tmp_path / "watched", release, **settings))
    run_study(config, ["prepare", "ppo"])
    run_study(
        StudyConfig(**released_study(tmp_path / "plain", release, **settings | {"watch_per_class": 0})),
        ["prepare", "ppo"],
    )
    forwards = [
        json.loads((tmp_path / name / "ppo" / "stage.json").read_text())["result"]["unet_forwards"]
        for name in ("watched", "plain")
    ]
    assert forwards[0] - forwards[1] == 2 * 6 * 2  # looks x volumes x steps of the release's best sampler
    wanted = load_split(config, "train").take_per_class(3)
    seed = fold_seed(config.seed_of("ppo"), "watch")
    sampled = sample_with(load_pipeline(config), wanted, best_sampler(config), config, seed)
    by_class = score_set(load_extractors(config)["label"], wanted, sampled)  # and of no judge
    first = read_log(tmp_path / "watched" / "ppo")[0]["watch/label_fid"]  # of the pretrained weights
    assert first == pytest.approx((by_class["HGG"] + by_class["LGG"]) / 2, rel=1e-4)


def test_a_frechet_watchdog_compares_as_many_of_every_class():
    real = tiny_phantoms(4)
    torch.manual_seed(0)
    extractor = SliceFeatureExtractor(block_out_channels=(8, 8), num_features=3).eval()
    watchdog = FrechetWatchdog(extractor, real)
    assert watchdog.distance(real.pixel_values, real.class_labels) == pytest.approx(0, abs=1e-6)
    few = torch.cat([(real.class_labels == label).nonzero()[:3, 0] for label in (1, 0)])
    samples, labels = real.pixel_values[few].float() * 0.5, real.class_labels[few]
    features = extract_features(extractor, samples)
    of_real = extract_features(extractor, real.pixel_values)
    by_hand = [
        frechet_distance(of_real[real.class_labels == label][:3], features[labels == label]) for label in (0, 1)
    ]
    assert watchdog.distance(samples, labels) == pytest.approx(sum(by_hand) / 2)
    with pytest.raises(InputError, match=r"of 'LGG' there are 0 and 4: make rollouts larger"):
        watchdog.distance(samples[3:], labels[3:])


def test_a_label_distance_is_of_the_classes_that_there_are_real_volumes_of():
    extractor, real = SliceFeatureExtractor(block_out_channels=(8, 8), num_features=3, num_slices=3), tiny_phantoms(6)
    of_one = real.select((real.class_labels == 1).nonzero()[:, 0])
    samples, labels = of_one.pixel_values.float(), of_one.class_labels
    with pytest.raises(
        InputError, match="of 'HGG' there are 0 and 6: make rollouts larger, or leave out real volumes of a class"
    ):
        FrechetWatchdog(extractor, real).distance(samples, labels)
    assert FrechetWatchdog(extractor, of_one).distance(samples, labels) == pytest.approx(0, abs=1e-4)
