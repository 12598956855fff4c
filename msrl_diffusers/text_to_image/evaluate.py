"""The stage evaluate: images before and after, from the same noise, by classifiers, distances and diversity."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from ..data.image_folder import ImageDataset
from ..evaluation.fidelity import bootstrap_frechet, centred_interval, frechet_distance, kernel_distance
from ..rewards.attribute_match import AttributeMatch
from ..seeding import fold_seed
from .artifacts import load_base, load_features, load_match, load_split, load_tuned
from .config import TextToImageStudyConfig
from .diversity import diversity_of_sets
from .extractors import image_features
from .match import by_prompt, match_figures
from .sampling import reconstruct, sample_images
from .tuning import split_prompts


ROLES = ("reward", "judge")
ARMS = ("before", "after")


def evaluate(config: TextToImageStudyConfig) -> dict:
    """All figures of the report that need models or images. Saves the images of both arms.

    As many images of every prompt, from the same noise in both arms. Distances are to held-out images, of which, and
    of either arm, as many of every prompt are taken as the rarer set has. Match rates of held-out images and of their
    reconstructions are means over the prompts that these show (`real_prompts` of them), as those of the arms are.
    """
    builder, seed, folder = config.builder, config.seed_of("evaluate"), Path(config.output_dir) / "evaluate"
    prompts = [prompt for prompt in builder.prompts() for _ in range(config.num_samples_per_prompt)]
    pipelines, arms = {"before": load_base, "after": load_tuned}, {}
    for arm, load in pipelines.items():
        path = folder / f"{arm}.safetensors"
        if not path.is_file():  # else left by a killed run of this very stage: files are written whole
            sample_images(
                load(config), prompts, config.evaluation_sampler, fold_seed(seed, "evaluate"), builder,
                config.sampling_batch_size, config.mixed_precision, arm,
            ).save(path)  # fmt: skip
        arms[arm] = ImageDataset.load(path)
    train, heldout = load_split(config, "train"), load_split(config, "heldout")
    limit = reconstruct(load_base(config).vae, heldout, builder, config.sampling_batch_size)
    _, heldout_prompts = split_prompts(builder, config.num_heldout_prompts, config.seed_of("ppo"))
    diversity = diversity_of_sets({"real": heldout, **arms}, seed=fold_seed(seed, "diversity"))
    matches = {role: load_match(config, role) for role in ROLES}
    hits = {
        role: {arm: attribute_hits(match, images) for arm, images in arms.items()} for role, match in matches.items()
    }
    figures = {}
    for role, match in matches.items():
        figures[role] = match_figures(
            hits[role], prompts, builder.attribute_names, heldout_prompts, config.bootstrap_draws, seed
        )
        figures[role] |= {
            "architecture": match.model.config.model_type,
            "real": mean_over_prompts(match, heldout),
            "reconstruction": mean_over_prompts(match, limit),
        }
    return {
        "n": len(prompts),
        "real_prompts": len(set(heldout.prompts)),
        "sampler": config.evaluation_sampler,
        "attribute_match": figures,
        "fid": fidelity(load_features(config), arms, heldout, {"reconstruction": limit, "real": train}, config),
        "diversity": {
            name: found and {key: value for key, value in found.items() if key != "by_prompt"}
            for name, found in diversity.items()
        },
        "prompts": _prompt_table(hits, prompts, diversity, heldout_prompts),
    }  # fmt: skip


@torch.no_grad()
def attribute_hits(match: AttributeMatch, images: ImageDataset) -> torch.Tensor:
    """Which attributes are as the prompts state them, `[N, A]` bool, on the CPU."""
    device = next(match.model.parameters()).device
    parts = []
    for indices in torch.arange(len(images)).split(match.batch_size):
        batch = images.batch(indices, device)
        parts.append(match.matches(batch["pixel_values"], batch["prompt"]).cpu())
    return torch.cat(parts)


def mean_over_prompts(match: AttributeMatch, images: ImageDataset) -> float:
    """Share of images all of whose attributes are as their prompts state them, every prompt that there is counting the same."""
    return mean(by_prompt(attribute_hits(match, images).all(dim=1), images.prompts).values())


def matched_rows(one: Sequence[str], other: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of two sets with these prompts so that each has every prompt as often as the set that has less of it."""
    places = [{}, {}]
    for found, prompts in zip(places, (one, other), strict=True):
        for row, prompt in enumerate(prompts):
            found.setdefault(prompt, []).append(row)
    rows = ([], [])
    for prompt in sorted(set(places[0]) & set(places[1])):
        count = min(len(found[prompt]) for found in places)
        for its, found in zip(rows, places, strict=True):
            its += found[prompt][:count]
    return torch.tensor(rows[0], dtype=torch.long), torch.tensor(rows[1], dtype=torch.long)


def fidelity(
    extractor: nn.Module,
    arms: dict[str, ImageDataset],
    heldout: ImageDataset,
    references: dict[str, ImageDataset],
    config: TextToImageStudyConfig,
) -> dict:
    """Frechet and kernel distances of both arms to held-out images, of equal N and equal prompts, by features that
    neither the reward nor the judge has a part in.

    Returns:
        `before`, `after` and their `interval`; `difference` (after minus before), `{"value", "interval"}`, of pairs;
        `kid`; `{"value", "kid", "n"}` of each of `references` (training images: the floor; reconstructions: what the autoencoder
        allows) to the same held-out images, or to those of them whose prompts it has often enough: then its `n` is less, and its
        distance not comparable; `n`, `extractor`, and `drawn_within`, what the intervals' draws keep as it is. All None but the
        last three for fewer than 2 images.
    """
    size, seed = config.sampling_batch_size, config.seed_of("evaluate")
    rows, real_rows = matched_rows(arms["before"].prompts, heldout.prompts)
    result = {"extractor": extractor.identity, "n": len(rows), "drawn_within": "prompts"}
    if len(rows) < 2:
        return {**dict.fromkeys([*ARMS, "interval", "difference", "kid", *references]), **result}
    features = {arm: image_features(extractor, images.select(rows), size) for arm, images in arms.items()}
    compared = heldout.select(real_rows)
    near, shown = image_features(extractor, compared, size), compared.prompts
    strata = torch.tensor([shown.index(prompt) for prompt in shown])
    values = {arm: frechet_distance(near, features[arm]) for arm in arms}
    replicates = bootstrap_frechet(near, features, min(config.bootstrap_draws, 200), seed, strata)
    difference = values["after"] - values["before"]
    result |= {
        **values,
        "interval": {arm: centred_interval(values[arm], replicates[arm]) for arm in arms},
        "difference": {
            "value": difference,
            "interval": centred_interval(difference, replicates["after"] - replicates["before"]),
        },
        "kid": {arm: kernel_distance(near, features[arm], seed) for arm in arms},
    }
    for name, images in references.items():
        its, near_its = matched_rows(images.prompts, shown)
        if len(its) < 2:
            result[name] = None
            continue
        found, target = image_features(extractor, images.select(its), size), near[near_its]
        result[name] = {
            "value": frechet_distance(target, found), "kid": kernel_distance(target, found, seed), "n": len(its),
        }  # fmt: skip
    return result


def _prompt_table(hits: dict, prompts: list[str], diversity: dict, heldout_prompts: Sequence[str]) -> list[dict]:
    """One row per prompt: exact match by both classifiers and MS-SSIM of pairs, before and after."""
    exact = {
        role: {arm: by_prompt(values.all(dim=1), prompts) for arm, values in by_arm.items()}
        for role, by_arm in hits.items()
    }
    return [
        {
            "prompt": prompt,
            "held_out": prompt in heldout_prompts,
            **{role: {arm: exact[role][arm][prompt] for arm in ARMS} for role in hits},
            "ms_ssim": {arm: diversity[arm] and diversity[arm]["by_prompt"].get(prompt) for arm in ARMS},
        }
        for prompt in dict.fromkeys(prompts)
    ]
