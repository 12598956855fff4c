"""A classifier that reads attributes off images: the reward of text-to-image fine-tuning, or its judge.

A small one on the embedded dermoscopy-like images; writes OUT/classifier, for `AttributeMatch.from_pretrained`:

    accelerate launch examples/train_attribute_classifier.py --architecture resnet --output_dir OUT

Pretrained weights on a folder of images with a metadata.csv (file_name, diagnosis, hair, gel_bubble, ruler, ink):

    accelerate launch examples/train_attribute_classifier.py --model_name_or_path google/efficientnet-b0 \\
        --data_dir DIR --image_size 256 --output_dir OUT

Reward and judge should be of different architecture. Every field of AttributeConfig is an option.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from msrl_diffusers.arguments import is_given, parse
from msrl_diffusers.data.dermoscopy import load_dermoscopy
from msrl_diffusers.data.image_folder import load_image_folder
from msrl_diffusers.data.prompts import ARTIFACTS, DIAGNOSES, PromptBuilder
from msrl_diffusers.errors import InputError, sentence_instead_of_traceback
from msrl_diffusers.files import write_json
from msrl_diffusers.models.image_classifiers import (
    build_image_classifier,
    load_image_classifier,
    save_image_classifier,
)
from msrl_diffusers.plots import plot_history
from msrl_diffusers.processes import process_state, start_missing_processes
from msrl_diffusers.trainers.attribute_config import AttributeConfig
from msrl_diffusers.trainers.attribute_trainer import AttributeTrainer


OF_RANDOM_WEIGHTS = {"learning_rate": 1e-3}


@dataclass
class ScriptArguments:
    """The network and the images."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "An image classifier of transformers to start from: a folder or a Hub repository."},
    )
    architecture: str = field(
        default="resnet", metadata={"help": "Without that, a small one: resnet, vit, convnext or efficientnet."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder of images with metadata.csv; unset: drawn dermoscopy images."}
    )
    image_size: int = field(default=64, metadata={"help": "Edge in pixels of the images, as the network sees them."})
    num_per_prompt: int = field(default=64, metadata={"help": "Drawn images of each of the 32 prompts."})
    data_seed: int = field(default=0, metadata={"help": "Seed of the drawn images and of the split by subject."})
    holdout_fraction: float = field(default=0.2, metadata={"help": "Share of the subjects that only the figures see."})
    diagnoses: list[str] = field(
        default_factory=lambda: list(DIAGNOSES), metadata={"help": "Of which an image has one."}
    )
    artifacts: list[str] = field(default_factory=lambda: list(ARTIFACTS), metadata={"help": "Of which it has any."})
    diagnosis_column: str = field(default="diagnosis", metadata={"help": "Column of the diagnosis in metadata.csv."})
    diagnosis_names: dict = field(default_factory=dict, metadata={"help": "{what stands in the table: diagnosis}."})
    artifact_columns: dict = field(default_factory=dict, metadata={"help": "{artifact: its column}."})
    subject_column: str | None = field(
        default=None,
        metadata={"help": "Column that names the subject: subject_id or participant_id, or each file, if unset."},
    )


def main() -> None:
    defaults = {} if is_given("model_name_or_path", sys.argv[1:]) else OF_RANDOM_WEIGHTS
    script_args, args = parse([ScriptArguments, AttributeConfig], defaults, description=__doc__)
    builder = PromptBuilder(script_args.diagnoses, script_args.artifacts)
    images = load_images(script_args, builder)
    train, heldout = images.split(script_args.holdout_fraction, script_args.data_seed)
    torch.manual_seed(args.seed)
    if script_args.model_name_or_path:
        model, processor = load_image_classifier(
            script_args.model_name_or_path, builder.attribute_names, script_args.image_size
        )
    else:
        model, processor = build_image_classifier(
            script_args.architecture, builder.attribute_names, script_args.image_size
        )
    figures = AttributeTrainer(model, args, train, heldout, processor).train()
    if not process_state().is_main_process:
        return
    folder = Path(args.output_dir)
    save_image_classifier(model, processor, folder / "classifier")
    write_json(folder / "metrics.json", {"num_train": len(train), "num_heldout": len(heldout), **figures})
    plot_history(folder, ["loss", "accuracy", "exact_match"])
    print(f"classifier: {folder / 'classifier'}, exact match on held-out images {figures['heldout_exact_match']:.3f}")


def load_images(script_args: ScriptArguments, builder: PromptBuilder):
    if script_args.data_dir:
        return load_image_folder(
            script_args.data_dir,
            builder,
            script_args.image_size,
            script_args.diagnosis_column,
            script_args.artifact_columns,
            script_args.diagnosis_names,
            script_args.subject_column,
        )
    if builder != PromptBuilder():
        raise InputError("Drawn images have the diagnoses and artifacts of dermoscopy; give a data_dir for others.")
    return load_dermoscopy(script_args.num_per_prompt, script_args.image_size, script_args.data_seed)


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        start_missing_processes()
        main()
