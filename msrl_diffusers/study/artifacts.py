"""Where the results of stages lie, and how later stages read them: from the study's folders or from a release.

Networks are put on the device of this process; volumes stay in main memory, and batches of them follow.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.volumes import VolumeDataset
from ..errors import InputError
from ..hub.contents import SEEN_VOLUMES
from ..models.feature_extractors import PatchFeatureExtractor, SliceFeatureExtractor, VolumeFeatureExtractor
from ..models.loading import load_model
from ..models.reward_models import SliceRewardModel, VolumeRewardModel
from ..pipelines.med_volume import MedVolumePipeline
from ..processes import process_state
from .config import StudyConfig
from .sections import METHODS


REWARD_CLASSES = {"volume": VolumeRewardModel, "slice": SliceRewardModel, "heldout": VolumeRewardModel}
EXTRACTOR_CLASSES = {
    "label": SliceFeatureExtractor, "judge": VolumeFeatureExtractor, "second_judge": PatchFeatureExtractor,
}  # fmt: skip


PRIOR_STAGES = ("extractors", "vqgan", "diffusion", "samplers")
REWARD_STAGES = ("trajectories", "score", "rewards")


def pretrained_stages(config: StudyConfig) -> tuple[str, ...]:
    """The stages whose results are taken from `config.pretrained`. A release has no trajectories; a refresh of its reward
    models needs some to train on."""
    if not config.pretrained:
        return ()
    if not config.pretrained_rewards:
        return PRIOR_STAGES
    return PRIOR_STAGES + tuple(stage for stage in REWARD_STAGES if not (config.refreshes and stage == "trajectories"))


def stages_left_out(config: StudyConfig) -> tuple[str, ...]:
    """The stages whose results are given, or not asked for."""
    downstream = () if config.downstream else ("baseline_downstream", "downstream")
    curve = () if config.num_curve_points else ("curve",)
    return (*pretrained_stages(config), *downstream, *curve, *(name for name in METHODS if name != config.method))


def load_split(config: StudyConfig, split: str) -> VolumeDataset:
    """The `"train"` or `"heldout"` volumes."""
    return VolumeDataset.load(Path(config.output_dir) / "prepare" / f"{split}.safetensors")


def load_sources(config: StudyConfig) -> VolumeDataset:
    """The training volumes that reward data are made from and compared with: the first `trajectories_per_class` of every class;
    all, in their order, where no class has more."""
    train, most = load_split(config, "train"), config.trajectories_per_class
    return train if most is None or max(train.class_counts().values()) <= most else train.take_per_class(most)


def load_pipeline(config: StudyConfig) -> MedVolumePipeline:
    """The pretrained pipeline, in float32."""
    return _on_device(MedVolumePipeline, config.pretrained or Path(config.output_dir) / "diffusion" / "pipeline")


def load_reported(config: StudyConfig, arm: str) -> VolumeDataset:
    """The volumes of an arm of the report: those of `"rl"` are of stage evaluate, all others of stage baseline."""
    stage = "evaluate" if arm == "rl" else "baseline"
    return VolumeDataset.load(Path(config.output_dir) / stage / f"{arm}.safetensors")


def load_reward_models(config: StudyConfig) -> dict[str, torch.nn.Module]:
    """The reward models by role: `"volume"`, `"slice"`, and `"heldout"`, which only watches."""
    return _load(config, REWARD_CLASSES, "rewards", "reward")


def load_extractors(config: StudyConfig) -> dict[str, torch.nn.Module]:
    """The feature extractors by role: `"label"`, `"judge"` and `"second_judge"`."""
    return _load(config, EXTRACTOR_CLASSES, "extractors", "extractor")


def load_tuned_pipeline(config: StudyConfig) -> MedVolumePipeline:
    """The pipeline that the study's method has tuned, in float32."""
    return _on_device(MedVolumePipeline, Path(config.output_dir) / config.method / "pipeline")


def stage_result(config: StudyConfig, stage: str) -> dict:
    """What a finished stage recorded of itself."""
    return json.loads((Path(config.output_dir) / stage / "stage.json").read_text())["result"]


def load_scores(config: StudyConfig) -> dict:
    """FIDs and targets of the trajectory sets."""
    own = Path(config.output_dir) / "score"
    folder = Path(config.pretrained) if "score" in pretrained_stages(config) else own
    return json.loads((folder / "scores.json").read_text())


@dataclass(frozen=True)
class TrainedOn:
    """What the networks of a release have seen.

    Attributes:
        phantoms: `{"data_seed", "n"}`: the first n of that seed; None without any.
        other_volumes: whether volumes of other data too.
        unnamed_volumes: whether some of these are not among the hashes.
        hashes: of the volumes that are named, phantoms or others.
    """

    phantoms: dict | None = None
    other_volumes: bool = False
    unnamed_volumes: bool = False
    hashes: tuple[str, ...] = ()


def trained_on(config: StudyConfig) -> TrainedOn:
    """What the release that the study starts from was trained on.

    Raises:
        InputError: it has no `scores.json`, which tells.
    """
    if not config.pretrained:
        return TrainedOn()
    path = Path(config.pretrained) / "scores.json"
    if not path.is_file():
        raise InputError(f"{config.pretrained} has no scores.json; give a folder written by run_study.py --release.")
    scores = json.loads(path.read_text())
    hashes = tuple(scores.get(SEEN_VOLUMES, ()))
    if "phantoms" not in scores:  # an earlier version, of which all data count as phantoms
        n_train = scores.get("n_train", scores["n"])  # n: volumes that its reward data were compared with
        return TrainedOn({"data_seed": scores.get("data_seed", 0), "n": n_train}, hashes=hashes)
    others = scores["other_volumes"]
    unnamed = scores["unnamed_volumes"] or (others and SEEN_VOLUMES not in scores)  # on the Hub none are named
    return TrainedOn(scores["phantoms"], others, unnamed, hashes)


def load_samplers(config: StudyConfig) -> dict:
    """`{"samplers", "best_sampler"}`: samplers with their label FID, and the number of the best. In a release they are in the
    file of the scores."""
    own = Path(config.output_dir) / "samplers" / "samplers.json"
    path = Path(config.pretrained) / "scores.json" if "samplers" in pretrained_stages(config) else own
    found = json.loads(path.read_text())
    return {name: found[name] for name in ("samplers", "best_sampler")}


def best_sampler(config: StudyConfig) -> dict:
    """`{"num_inference_steps", "eta", "guidance_scale"}`: where the pretrained pipeline has its lowest label FID."""
    found = load_samplers(config)
    return without_fid(found["samplers"][found["best_sampler"]])


def without_fid(sampler: dict) -> dict:
    """The settings of one of `load_samplers`."""
    return {"guidance_scale": 1.0, **{key: value for key, value in sampler.items() if key != "fid"}}


def _load(config: StudyConfig, classes: dict, stage: str, prefix: str) -> dict[str, torch.nn.Module]:
    folders = {
        role: Path(config.pretrained) / f"{prefix}_{role}"
        if stage in pretrained_stages(config)
        else Path(config.output_dir) / stage / role
        for role in classes
    }
    return {role: _on_device(model_class, folders[role]) for role, model_class in classes.items()}


def _on_device(model_class: type, path: str | Path) -> torch.nn.Module | MedVolumePipeline:
    return load_model(model_class, path, dtype=torch.float32).to(process_state().device)
