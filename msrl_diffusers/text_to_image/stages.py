"""The stages that make data and models: data, autoencoder, diffusion, classifiers, ppo."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ..data.image_folder import to_uint8
from ..evaluation.features import hash_tensors
from ..files import write_json
from ..models.image_classifiers import build_image_classifier, save_image_classifier
from ..pipelines.schedulers import check_number_of_steps
from ..processes import process_state
from ..rewards.image_text import ImageTextSimilarity
from ..seeding import fold_seed
from ..trainers.attribute_trainer import AttributeTrainer
from ..trainers.autoencoder_kl_trainer import AutoencoderKLTrainer
from ..trainers.text_to_image_trainer import TextToImageTrainer
from ..trainers.tuned_weights import LORA_TARGETS
from .artifacts import load_base, load_features, load_match, load_split, place_name
from .config import TextToImageStudyConfig
from .data import TRAINED_ON, make_splits
from .figures import plot_prompts
from .sampling import reconstruct, sample_images
from .small import make_autoencoder, make_stable_diffusion
from .tuning import split_prompts, tune


SHOWN = 8  # prompts in the pictures of a stage


def make_data(config: TextToImageStudyConfig) -> dict:
    """Images of the three splits, their counts and fingerprint."""
    folder, splits = Path(config.output_dir) / "data", make_splits(config)
    for name, images in splits.items():
        images.save(folder / f"{name}.safetensors")
    train = splits["train"]
    plot_prompts({"training images": train}, sorted(set(train.prompts)), folder / "images.png", images_per_prompt=8)
    return {
        **{name: {"images": len(its), "subjects": len(set(its.subject_ids))} for name, its in splits.items()},
        "image_size": train.image_size,
        "prompts": {prompt: train.prompts.count(prompt) for prompt in config.builder.prompts()},
        "fingerprint": hash_tensors((name, its.pixel_values) for name, its in splits.items()),
    }


def train_autoencoder(config: TextToImageStudyConfig) -> dict:
    """The small autoencoder."""
    train, heldout = load_split(config, "train"), load_split(config, "heldout")
    model = make_autoencoder(train.image_size, fold_seed(config.seed, "init", "vae"), **config.vae)
    figures = AutoencoderKLTrainer(model, config.trainer_config("autoencoder"), train, heldout).train()
    if not process_state().is_main_process:
        return figures
    folder = Path(config.output_dir) / "autoencoder"
    model.save_pretrained(folder / "vae")
    shown = config.builder.prompts()[-SHOWN:]
    real = heldout.select([row for row, prompt in enumerate(heldout.prompts) if prompt in shown])
    arms = {"held-out": real, "reconstructed": reconstruct(model, real, config.builder)}
    plot_prompts(arms, [prompt for prompt in shown if prompt in real.prompts], folder / "reconstructions.png")
    return {**figures, "scaling_factor": model.config.scaling_factor}


def train_diffusion(config: TextToImageStudyConfig) -> dict:
    """The small Stable Diffusion around it; UNet and text encoder from random weights."""
    train, folder = load_split(config, "train"), Path(config.output_dir)
    pipeline = make_stable_diffusion(
        AutoencoderKL.from_pretrained(folder / "autoencoder" / "vae"), config.builder.prompts(),
        fold_seed(config.seed, "init", "unet"), config.text_encoder, config.unet, config.scheduler,
    )  # fmt: skip
    figures = TextToImageTrainer(pipeline, config.trainer_config("diffusion"), train).train()
    if not process_state().is_main_process:
        return figures
    pipeline.save_pretrained(folder / "diffusion" / "pipeline")
    shown = [prompt for prompt in config.builder.prompts() if prompt in train.prompts][-SHOWN:]
    samples = sample_images(
        pipeline, shown * 4, config.evaluation_sampler, config.seed, config.builder, config.sampling_batch_size,
        config.mixed_precision, "diffusion",
    )  # fmt: skip
    plot_prompts({"real": train, "generated": samples}, shown, folder / "diffusion" / "samples.png")
    return figures


def train_classifiers(config: TextToImageStudyConfig) -> dict:
    """The reward, the judge, and the network of the distances: all that are not given, of different architectures, and
    the first on other images than the others.
    """
    heldout, results = load_split(config, "heldout"), {}
    for role in config.trained_classifiers:
        train = load_split(config, TRAINED_ON[role])
        settings = dict(config.classifier_models[role])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold_seed(config.seed, "init", role))
            model, processor = build_image_classifier(
                settings.pop("architecture"), config.builder.attribute_names, train.image_size, **settings
            )
        args = config.trainer_config("classifiers", role, seed=fold_seed(config.seed, role) % 2**31)
        results[role] = AttributeTrainer(model, args, train, heldout, processor).train()
        if process_state().is_main_process:
            save_image_classifier(model, processor, Path(config.output_dir) / "classifiers" / role)
    return results


def train_ppo(config: TextToImageStudyConfig) -> dict:
    """The pipeline tuned by PPO on what the reward classifier sees. The judge is watched and picks nothing.

    Raises:
        InputError: given models that can't be loaded, that of the distances too, or a number of steps that can't be sampled.
    """
    pipeline, args = load_base(config), config.trainer_config("ppo")
    # what the evaluation can't use is told now, not after the rollouts
    load_features(config)
    check_number_of_steps(pipeline.scheduler, config.evaluation_sampler["num_inference_steps"])
    train_prompts, heldout_prompts = split_prompts(config.builder, config.num_heldout_prompts, config.seed_of("ppo"))
    rewards = [load_match(config, "reward", config.reward_kind)]
    if config.image_text_model:
        similarity = ImageTextSimilarity.from_pretrained(config.image_text_model)
        similarity.model.to(pipeline.device)
        rewards.append(similarity)
    watch = {f"{role}_match": load_match(config, role) for role in ("reward", "judge")}
    figures = tune(
        pipeline, rewards, args, train_prompts, heldout_prompts, config.heldout_samples_per_prompt,
        config.select_by == "heldout_reward", {name: _rounded(match) for name, match in watch.items()},
    )  # fmt: skip
    result = {**figures, "train_prompts": train_prompts, "heldout_prompts": heldout_prompts}
    if args.use_lora and process_state().is_main_process:
        write_json(Path(args.output_dir) / "lora" / "facts.json", adapter_facts(config, figures, train_prompts))
    return result


def adapter_facts(config: TextToImageStudyConfig, figures: dict, train_prompts: list[str]) -> dict:
    """What a card of the adapter has to say, beside what the report measures."""
    args = config.trainer_config("ppo")
    targets, given = args.lora_target_modules or LORA_TARGETS, config.pretrained_model_name_or_path
    classifier = config.reward_classifier
    return {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "adapter": {"type": "lora", "rank": args.lora_rank, "target_modules": list(targets)},
        "base_model": place_name(given) if given else "pipeline_standard",  # the folder beside it
        "method": "DDPO: PPO with a KL term (arXiv 2305.13301, 2603.06173)",
        "rewards": [f"attribute match, {config.reward_kind}"]
        + ["image-text similarity"] * bool(config.image_text_model),
        "reward_classifier": place_name(classifier) if classifier else config.classifier_models["reward"],
        "prompts": train_prompts,
        "rollouts": figures["rollouts"],
        "stopped": figures["stopped"],
        "seed": config.seed_of("ppo"),
        "use": "research only; not for clinical use",
    }


def _rounded(match):
    """What `match` says of samples rounded as image files are: the figure of the evaluation."""

    def score(samples: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        rounded = to_uint8(samples).to(samples.device).float() / 127.5 - 1
        with torch.no_grad():
            return match(rounded, prompts)

    return score
