"""Is a reward valid where the policy is? Distances of the samples that it likes best, beside as many drawn at random.

    python examples/benchmarks/selection.py --output examples/results/selection-phantoms.json

Of every class the pretrained pipeline of a study with `pretrained` draws many samples; a share of them is chosen by the sum of
the standardized rewards, best or worst, or at random (mean and deviation of several draws). A reward whose best samples lie
nearer to the real volumes can be followed without being gamed: selection among 1/share samples is what reinforcement learning
approaches under a small divergence. One whose best are no nearer will be gamed from the first step. Each chosen set is compared
with as many real volumes, by both extractors; the judge is reported and decides nothing. Beside the JSON lies the same as a
Markdown table.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from tqdm import tqdm

from msrl_diffusers.data.volumes import VolumeDataset
from msrl_diffusers.errors import InputError, sentence_instead_of_traceback
from msrl_diffusers.evaluation.features import extract_features, extractor_identity
from msrl_diffusers.evaluation.fidelity import frechet_distance
from msrl_diffusers.files import write_json, write_text
from msrl_diffusers.rewards import LearnedReward
from msrl_diffusers.seeding import fold_seed, generator_for
from msrl_diffusers.study import StudyConfig, run_study
from msrl_diffusers.study.artifacts import (
    load_extractors,
    load_pipeline,
    load_reward_models,
    load_split,
)
from msrl_diffusers.study.command_line import read_study
from msrl_diffusers.study.report import git_commit, versions
from msrl_diffusers.study.stages import sample_with


CONFIG = Path(__file__).parents[1] / "configs" / "phantoms" / "demo.yaml"
TRAINED_ON = ("volume", "slice")
RANDOM_DRAWS = 10


def rewards_of(config: StudyConfig, samples: VolumeDataset) -> torch.Tensor:
    """The standardized rewards' sum `[N]`."""
    total = torch.zeros(len(samples))
    for role, model in load_reward_models(config).items():
        if role in TRAINED_ON:
            reward, parts = LearnedReward(role, model), torch.arange(len(samples)).split(config.sampling_batch_size)
            with torch.no_grad():
                values = torch.cat(
                    [reward(samples.pixel_values[rows], samples.class_labels[rows]) for rows in parts]
                ).cpu()
            total += (values - values.mean()) / values.std()
    return total


def chosen_rows(rewards: torch.Tensor, count: int, seed: int) -> dict[str, list[torch.Tensor]]:
    """Rows `[count]` of the best, of the worst, and of several random draws."""
    order = rewards.argsort(descending=True)
    draws = [
        torch.randperm(len(rewards), generator=generator_for(seed, "draw", number))[:count]
        for number in range(RANDOM_DRAWS)
    ]
    return {"best": [order[:count]], "random": draws, "worst": [order[-count:]]}


def measure(config: StudyConfig, train: VolumeDataset, sampler: dict, shares: list[float], seed: int) -> dict:
    """Distances to `train` by class, share, choice and extractor."""
    extractors = load_extractors(config)
    samples = sample_with(load_pipeline(config), train, sampler, config, fold_seed(seed, "selection"))
    rewards, rows = rewards_of(config, samples), []
    features = {
        role: (extract_features(extractor, train.pixel_values), extract_features(extractor, samples.pixel_values))
        for role, extractor in extractors.items()
    }
    for label, name in tqdm(train.id2label.items(), desc="classes"):
        of_class, real_rows = ((data.class_labels == label).nonzero()[:, 0] for data in (samples, train))
        for share in shares:
            count = int(share * len(of_class))
            for choice, draws in chosen_rows(rewards[of_class], count, seed).items():
                found = {
                    role: [frechet_distance(real[real_rows[:count]], fake[of_class[draw]]) for draw in draws]
                    for role, (real, fake) in features.items()
                }
                rows.append(
                    {
                        "class": name,
                        "share": share,
                        "n": count,
                        "choice": choice,
                        "reward": mean(rewards[of_class[draw]].mean().item() for draw in draws),
                        "fid": {role: mean(values) for role, values in found.items()},
                        "sd": {role: stdev(values) if len(values) > 1 else None for role, values in found.items()},
                    }
                )
    return {
        "n": len(samples),
        "rows": rows,
        "sampler": sampler,
        "extractors": {role: extractor_identity(extractor) for role, extractor in extractors.items()},
    }


def markdown(content: dict) -> str:
    """The distances as a page."""
    lines = [
        "# Selection by the rewards",
        "",
        f"{content['n']} samples of the pretrained pipeline ({json.dumps(content['sampler'])}), seed {content['seed']}; the Frechet "
        "distance of the share that the rewards like best or least, of its class, beside random shares of that size (mean, "
        "deviation).",
        "",
        "| class | share | chosen | reward | label distance | judge distance |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        cells = [
            f"{row['fid'][role]:.4f}" + (f" ({row['sd'][role]:.4f})" if row["sd"][role] is not None else "")
            for role in ("label", "judge")
        ]
        lines.append(
            f"| {row['class']} | {row['share']:g} | {row['choice']} | {row['reward']:+.2f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, help="a study with `pretrained`")
    parser.add_argument("--num_per_class", type=int, help="samples of a class; as many as there are training volumes")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/selection", help="folder of the prepared volumes")
    parser.add_argument("--output", type=Path, default=Path("outputs/selection.json"))
    args = parser.parse_args()
    config = StudyConfig(**{**read_study(args.config), "output_dir": args.output_dir})
    if not (config.pretrained and config.pretrained_rewards):
        raise InputError(f"{args.config} names no release whose rewards could be tried: set pretrained.")
    started = time.monotonic()
    run_study(config, ["prepare"])
    sampler = {name: getattr(args, name) for name in ("num_inference_steps", "eta", "guidance_scale")}
    train = load_split(config, "train")
    if args.num_per_class:
        train = train.take_per_class(args.num_per_class)
    measured = measure(config, train, sampler, args.shares, args.seed)
    content = {
        "what": "Frechet distance of the samples that the rewards like best",
        "seed": args.seed,
        "pretrained": Path(config.pretrained).name,
        **measured,
        "seconds": round(time.monotonic() - started, 1),
        "cpu_count": os.cpu_count(),
        "commit": git_commit(),
        "versions": versions(),
    }
    write_json(args.output, content)
    write_text(args.output.with_suffix(".md"), markdown(content))
    sys.stdout.write(markdown(content))


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        main()
