"""Where the results of stages lie, and how later stages read them: from the study's folders or from given models."""

from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from huggingface_hub import metadata_load
from yaml import YAMLError

from ..data.image_folder import ImageDataset
from ..errors import InputError
from ..evaluation.extractors import Extractor
from ..models.loading import check_whole
from ..processes import process_state
from ..rewards.attribute_match import AttributeMatch
from ..trainers.lora import LORA_FILE, merge_lora
from .config import TextToImageStudyConfig
from .extractors import load_image_extractor


def stages_left_out(config: TextToImageStudyConfig) -> list[str]:
    """Stages whose results are given, or not asked for."""
    without = ["autoencoder", "diffusion"] if config.pretrained_model_name_or_path else []
    if not config.trained_classifiers:
        without.append("classifiers")
    return without if config.augmentation else [*without, "augmentation"]


def load_split(config: TextToImageStudyConfig, split: str) -> ImageDataset:
    """The `"train"`, `"judge"` or `"heldout"` images."""
    return ImageDataset.load(Path(config.output_dir) / "data" / f"{split}.safetensors")


def load_stable_diffusion(path: str | Path, **kwargs) -> StableDiffusionPipeline:
    """`StableDiffusionPipeline.from_pretrained` of a folder or Hub repository, in float32, from safetensors only.

    Raises:
        InputError: there is none, or it lacks weights (transformers fills those of a text encoder with random ones, and warns).
    """
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(path), dtype=torch.float32, use_safetensors=True, **kwargs
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{path} holds no StableDiffusionPipeline: {str(error).splitlines()[0]}") from error
    check_whole(pipeline, path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(path: str | Path) -> StableDiffusionPipeline:
    """A pipeline on the device of this process, with the DDIM sampler that rollouts have.

    Raises:
        InputError: there is none, or it lacks weights.
    """
    # nothing is shown to anybody unseen, and the checker's network is larger than a small UNet
    pipeline = load_stable_diffusion(path, safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return pipeline.to(process_state().device)


def dataset_name(config: TextToImageStudyConfig) -> str:
    """The data set's name, as cards know it."""
    return "image_folder" if config.data_dir else "dermoscopy"


def data_facts(config: TextToImageStudyConfig, roles: Collection[str] = ("reward",)) -> dict:
    """What a card says of data and sampler. Of a given pipeline its own card says what it was trained on, if it names one data set;
    the study's images may have been kept apart from it. No data set is named where those of the two differ.

    Args:
        roles: the classifiers that what is shared holds or learned from; the adapter's by default.
    """
    sources = {
        "dermoscopy": "procedurally drawn dermoscopy-like images, of no patient",
        "image_folder": "a folder of images",
        None: "not stated by the pipeline that was given",
    }
    given, own = config.pretrained_model_name_or_path, dataset_name(config)
    dataset = _named_by_card(Path(given) / "README.md") if given else own
    data = sources.get(dataset, dataset)
    if dataset not in (None, own) and not set(roles).isdisjoint(config.trained_classifiers):
        dataset, data = None, f"{data}; of classifiers trained here: {sources[own]}"
    return {"dataset": dataset, "data": data, "sampler": config.evaluation_sampler}


def _named_by_card(path: Path) -> str | None:
    """The one data set that a model card names; None where there is no card that can be read, or where it names none or several."""
    try:
        named = metadata_load(path)["datasets"]
    except (OSError, TypeError, KeyError, ValueError, YAMLError):  # of metadata that are not there, or no mapping
        return None
    return named[0] if isinstance(named, list) and len(named) == 1 else None


def place_name(place: str) -> str:
    """A model's name, for reports: that of its folder, or its Hub repository."""
    return Path(place).resolve().name if Path(place).is_dir() else place


def base_path(config: TextToImageStudyConfig) -> str:
    """The fine-tuned pipeline that PPO starts from."""
    return config.pretrained_model_name_or_path or str(Path(config.output_dir) / "diffusion" / "pipeline")


def load_base(config: TextToImageStudyConfig) -> StableDiffusionPipeline:
    """The pipeline before reinforcement learning."""
    return load_pipeline(base_path(config))


def load_tuned(config: TextToImageStudyConfig) -> StableDiffusionPipeline:
    """The pipeline after it: the base with its adapter, merged, or a pipeline all of whose weights were tuned."""
    folder = Path(config.output_dir) / "ppo"
    if not (folder / "lora" / LORA_FILE).is_file():
        return load_pipeline(folder / "pipeline")
    pipeline = load_base(config)
    # what pipeline.load_lora_weights does for the UNet, without its note that there is nothing for the text encoder
    pipeline.unet.load_lora_adapter(str(folder / "lora"), prefix="unet", weight_name=LORA_FILE)
    merge_lora(pipeline.unet)
    return pipeline


def load_match(config: TextToImageStudyConfig, role: str, kind: str = "exact") -> AttributeMatch:
    """The `"reward"` or `"judge"` classifier as a reward of that kind, on the device of this process."""
    given = {"reward": config.reward_classifier, "judge": config.judge_classifier}[role]
    match = AttributeMatch.from_pretrained(
        given or Path(config.output_dir) / "classifiers" / role, config.builder, kind=kind,
        batch_size=config.sampling_batch_size,
    )  # fmt: skip
    match.model.to(process_state().device)
    return match


def load_features(config: TextToImageStudyConfig) -> Extractor:
    """The network of the Frechet distances, on the device of this process."""
    spec = config.fid_extractor or Path(config.output_dir) / "classifiers" / "features"
    return load_image_extractor(spec).to(process_state().device)
