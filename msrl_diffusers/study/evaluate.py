"""The stage evaluate: the tuned policy beside what stage baseline measured, by every extractor, and the rewards before and after."""

from pathlib import Path

from accelerate.utils import merge_dicts

from ..data.volumes import VolumeDataset
from ..evaluation.features import extractor_identity
from ..evaluation.fidelity import bootstrap_frechet, centred_interval
from ..rewards import LearnedReward, WeightedSum
from .artifacts import load_reported, load_reward_models, load_tuned_pipeline, stage_result
from .baseline import ARMS, AT_ROLLOUTS, Features, Yardstick, at_samplers, choose_among, load_baseline
from .config import StudyConfig


REPORTED = (*ARMS, "rl")
NO_FIGURES = ("n", "samplers", "standard_sampler", "memorization")  # of a baseline


def evaluate(config: StudyConfig) -> dict:
    """All figures of the report that need models or volumes. Saves the volumes of the tuned arm.

    Each arm stands at the sampler that the label extractor chooses for it on other samples than these, among the same three (see
    `samplers_of`); the standard arm's was chosen in stage baseline.
    """
    baseline, known = load_baseline(config)
    yardstick, samplers = Yardstick.of(config, known), baseline["samplers"]
    pipeline = load_tuned_pipeline(config)
    chosen = {**{arm: arm for arm in ARMS}, "standard": f"standard @ {baseline.get('standard_sampler', 'best')}"}
    chosen["rl"] = f"rl @ {choose_among(pipeline, samplers, yardstick.extractors['label'], config)}"
    arms = at_samplers("rl", samplers, lambda sampler: yardstick.sample(pipeline, sampler))
    features, tuned = yardstick.features(arms), arms[chosen["rl"]]
    for found in features.values():
        found["rl"] = found[chosen["rl"]]
    tuned.save(Path(config.output_dir) / "evaluate" / "rl.safetensors")
    audit = yardstick.audit(tuned)
    measured = {name: baseline[name] for name in baseline if name not in NO_FIGURES}
    for figures in (yardstick.distances(arms, features), yardstick.portraits({"rl": tuned}, features)):
        merge_dicts(figures, measured)
    roles, fids, kids = list(yardstick.extractors), measured["fid_by_sampler"], measured["kid_by_sampler"]
    return {
        "n": baseline["n"],
        "samplers": samplers,
        "chosen": chosen,
        "fid": {role: {arm: fids[role][chosen[arm]] for arm in REPORTED} for role in roles},
        "kid": {role: {arm: kids[role][chosen[arm]] for arm in REPORTED} for role in roles},
        **measured,
        **_intervals(yardstick, features, fids, chosen),
        "memorization": audit and {**baseline["memorization"], "rl": audit},
        "reward": _rewards(config, load_reported(config, AT_ROLLOUTS), arms["rl @ rollout"]),
        "reward_models": stage_result(config, "validity"),
        "extractors": {role: extractor_identity(extractor) for role, extractor in yardstick.extractors.items()},
    }


def _intervals(yardstick: Yardstick, features: Features, fids: dict, chosen: dict) -> dict:
    """95 % bootstrap intervals of every distance, and of the paired difference between the arms, over all classes."""
    intervals, differences, draws = {}, {}, yardstick.config.bootstrap_draws
    for role, found in yardstick.real.items():
        arms = {**{arm: found[arm] for arm in ARMS}, "rl": features[role]["rl"]}
        replicates = bootstrap_frechet(
            found["train"], arms, draws, yardstick.seed, yardstick.train.class_labels, made_from_real=("limit",)
        )
        values = {arm: fids[role][chosen[arm]]["all"] for arm in REPORTED}
        intervals[role] = {arm: centred_interval(values[arm], replicates[arm]) for arm in REPORTED}
        difference = values["rl"] - values["standard"]
        interval = centred_interval(difference, replicates["rl"] - replicates["standard"])
        differences[role] = {"value": difference, "interval": interval}
    return {"fid_interval": intervals, "fid_rl_minus_standard": differences}


def _rewards(config: StudyConfig, before: VolumeDataset, after: VolumeDataset) -> dict:
    """Mean and deviation of the reward that was trained on, and of its parts, before and after, at the rollouts' sampler.

    Parts are in units of the reference policy's deviation; `gain` is in units of the whole reward's deviation before.
    """
    rewards = {role: LearnedReward(role, model) for role, model in load_reward_models(config).items()}
    trained = WeightedSum([rewards["volume"], rewards["slice"]], config.trainer_config(config.method).reward_weights)
    scores = {
        name: {role: reward(volumes.pixel_values, volumes.class_labels) for role, reward in rewards.items()}
        for name, volumes in (("before", before), ("after", after))
    }
    trained.fit(scores["before"])
    result = {"parts": {}}
    for name, parts in scores.items():
        total = trained.combine(parts)
        result[name] = {"mean": total.mean().item(), "std": total.std().item()}
        result["parts"][name] = {
            role: trained.scales[role].standardise(values).mean().item() for role, values in parts.items()
        }
    result["gain"] = (result["after"]["mean"] - result["before"]["mean"]) / result["before"]["std"]
    return result
