"""By which sampler is the small Stable Diffusion at its best? Reward classifier's match and Frechet distance by sampler.

    python examples/benchmarks/text_to_image_samplers.py --output examples/results/text-to-image-samplers.json

Of model_cards/dermoscopy-32, before any tuning: images of every prompt from the same noise, compared with drawn images that
no model was trained on. The judge has no part in it. Beside the JSON lies the same as a Markdown table. Of a model that was
trained for guidance, and for longer (examples/results/text-to-image-samplers-guided.json):

    accelerate launch examples/train_text_to_image.py --max_steps 4000 --prompt_dropout 0.1 --output_dir outputs/guided \\
        --release outputs/guided-release
    python examples/benchmarks/text_to_image_samplers.py --model outputs/guided-release --output OUT.json
"""

import argparse
import os
import sys
import time
from pathlib import Path

from msrl_diffusers.data.dermoscopy import load_dermoscopy
from msrl_diffusers.data.prompts import PromptBuilder
from msrl_diffusers.errors import sentence_instead_of_traceback
from msrl_diffusers.evaluation.fidelity import frechet_distance
from msrl_diffusers.files import folder_mark, write_json, write_text
from msrl_diffusers.rewards.attribute_match import AttributeMatch
from msrl_diffusers.study.report import git_commit, versions
from msrl_diffusers.text_to_image.artifacts import load_pipeline
from msrl_diffusers.text_to_image.evaluate import attribute_hits, matched_rows
from msrl_diffusers.text_to_image.extractors import image_features, load_image_extractor
from msrl_diffusers.text_to_image.sampling import sample_images


MODELS = Path(__file__).parents[2] / "model_cards" / "dermoscopy-32"
IMAGE_SIZE = 32
UNSEEN = 10_000  # first index of drawn images that lie beyond those of every split
SAMPLERS = [(steps, 0.0, scale) for steps in (8, 16, 25) for scale in (1.0, 1.5, 2.0, 3.0)]  # steps, eta, guidance
SAMPLERS += [(steps, 1.0, 1.0) for steps in (8, 16, 25)]


def measure(model: Path, num_per_prompt: int, seed: int) -> dict:
    """Match by the reward classifier and distance, by sampler, of the released model or another."""
    builder, pipeline = PromptBuilder(), load_pipeline(model)
    prompts = [prompt for prompt in builder.prompts() for _ in range(num_per_prompt)]
    match = AttributeMatch.from_pretrained(model / "classifier_reward", builder, kind="exact")
    extractor = load_image_extractor(model / "classifier_features")
    unseen = load_dermoscopy(num_per_prompt, IMAGE_SIZE, first_index=UNSEEN)
    real, rows = image_features(extractor, unseen), []
    for steps, eta, guidance in SAMPLERS:
        sampler = {"num_inference_steps": steps, "eta": eta, "guidance_scale": guidance}
        images = sample_images(
            pipeline, prompts, sampler, seed, builder, name=f"{steps} steps, eta {eta:g}, {guidance:g}"
        )
        ours, theirs = matched_rows(images.prompts, unseen.prompts)
        rows.append(
            {
                **sampler,
                "reward_match": attribute_hits(match, images).all(dim=1).double().mean().item(),
                "fid": frechet_distance(real[theirs], image_features(extractor, images.select(ours))),
            }
        )
    return {
        "model_mark": folder_mark(model / "unet"),
        "n": len(prompts),
        "extractor": extractor.identity,
        "rows": rows,
    }


def markdown(content: dict) -> str:
    """The rows as a page."""
    lines = [
        f"# Samplers of {content['model']}, before tuning",
        "",
        f"Model `{content['model_mark']}`. {content['n']} images, seed {content['seed']}; exact match by the reward classifier; FID to as many drawn images, by the extractor `{content['extractor']['sha256']}`.",
        "",
        "| steps | eta | guidance | exact match | FID |",
        "|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        lines.append(
            f"| {row['num_inference_steps']} | {row['eta']:g} | {row['guidance_scale']:g} | {row['reward_match']:.1%} | "
            f"{row['fid']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODELS, help="release of train_text_to_image.py")
    parser.add_argument("--num_per_prompt", type=int, default=16)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("outputs/text-to-image-samplers.json"))
    args = parser.parse_args()
    started = time.monotonic()
    content = {
        "what": "match and Frechet distance by sampler",
        "model": args.model.resolve().name,
        "seed": args.seed,
        **measure(args.model, args.num_per_prompt, args.seed),
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
