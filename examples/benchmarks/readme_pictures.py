"""The README's pictures, of what two finished runs left.

    make demo && accelerate launch examples/train_ppo_text_to_image.py
    python examples/benchmarks/readme_pictures.py --volumes outputs/demo --images outputs/dermoscopy

Writes examples/results/phantoms.png and dermoscopy.png, or the one whose run is given: the first samples of each class or prompt,
none picked.
"""

import argparse
from pathlib import Path

from msrl_diffusers import ImageDataset, PromptBuilder, VolumeDataset
from msrl_diffusers.errors import InputError, sentence_instead_of_traceback
from msrl_diffusers.plots import plot_volumes
from msrl_diffusers.text_to_image.figures import plot_prompts


RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=Path, help="output folder of `make demo`")
    parser.add_argument("--images", type=Path, help="of the text-to-image story")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.volumes is None and args.images is None:
        raise InputError("There is nothing to draw; give --volumes, --images or both.")
    if args.volumes is not None:
        draw_volumes(args.volumes, args.output_dir / "phantoms.png")
    if args.images is not None:
        draw_images(args.images, args.output_dir / "dermoscopy.png")


def draw_volumes(run: Path, path: Path) -> None:
    """Training phantoms, samples of the pretrained pipeline, and those after PPO; three slices of each through its tumor."""
    places = {"phantoms": "prepare/train", "generated": "baseline/standard", "after PPO": "evaluate/rl"}
    arms = {name: VolumeDataset.load(found(run, f"{place}.safetensors")) for name, place in places.items()}
    plot_volumes({name: its.take_per_class(4).pixel_values for name, its in arms.items()}, path, at_asymmetry=True)


def draw_images(run: Path, path: Path) -> None:
    """Drawn images beside samples before and after PPO, from the same noise."""
    places = {"drawn, held out": "data/heldout", "generated": "evaluate/before", "after PPO": "evaluate/after"}
    arms = {name: ImageDataset.load(found(run, f"{place}.safetensors")) for name, place in places.items()}
    prompts = PromptBuilder()
    shown = [prompts.build(diagnosis, artifact) for diagnosis in prompts.diagnoses for artifact in prompts.artifacts]
    plot_prompts(arms, shown, path)


def found(run: Path, name: str) -> Path:
    """The file of a run.

    Raises:
        InputError: it is not there.
    """
    if not (run / name).is_file():
        raise InputError(f"{run / name} is not there; run the study of that folder to its end first.")
    return run / name


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        main()
