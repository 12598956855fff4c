"""Fine-tuning of a Stable Diffusion on images and prompts.

A small one of random weights, on drawn dermoscopy images (data and autoencoder first, where they are missing); writes
OUT/diffusion/pipeline:

    accelerate launch examples/train_text_to_image.py --output_dir OUT

With `--release DIR` the classifiers too are trained, and all models are written to DIR as one folder for the Hub. A study
starts from it by `pretrained_model_name_or_path: DIR`, `reward_classifier: DIR/classifier_reward` and so on in its file.

Stable Diffusion 1.5 and its kin, from a folder or the Hub, on a folder of images with a metadata.csv: of attributes,
from which the prompts are built, or of captions (`--caption_column text`); writes OUT/pipeline, and with `--use_lora`
beside it the adapter that is merged into it, OUT/lora:

    accelerate launch examples/train_text_to_image.py --pretrained_model_name_or_path M --data_dir DIR --output_dir OUT

Every field of TextToImageConfig is an option; in the first form it overrides the config's section `diffusion`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from msrl_diffusers.arguments import is_given, parse, take_option
from msrl_diffusers.data.dermoscopy import load_dermoscopy
from msrl_diffusers.data.image_folder import ImageDataset, load_image_folder
from msrl_diffusers.data.prompts import ARTIFACTS, DIAGNOSES, OPENING, PromptBuilder
from msrl_diffusers.errors import InputError, sentence_instead_of_traceback
from msrl_diffusers.plots import plot_history
from msrl_diffusers.processes import process_state, start_missing_processes
from msrl_diffusers.study.release import check_outside
from msrl_diffusers.text_to_image import CHAIN
from msrl_diffusers.text_to_image.artifacts import load_stable_diffusion
from msrl_diffusers.text_to_image.command_line import parse_text_to_image
from msrl_diffusers.text_to_image.data import load_captioned_folder
from msrl_diffusers.text_to_image.release import write_release
from msrl_diffusers.trainers.text_to_image_config import TextToImageConfig
from msrl_diffusers.trainers.text_to_image_trainer import TextToImageTrainer, pipeline_image_size


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "dermoscopy" / "cpu.yaml"
RELEASE_HELP = {"release": "Also the classifiers, and all as one folder of this name, ready for the Hub."}


@dataclass
class FineTuneArguments:
    """What is tuned, and on what."""

    pretrained_model_name_or_path: str = field(metadata={"help": "A StableDiffusionPipeline to fine-tune."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder of images with metadata.csv; unset: drawn dermoscopy images."}
    )
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the prompts; unset: prompts are built from columns of attributes."}
    )
    num_per_prompt: int = field(default=32, metadata={"help": "Drawn images of each prompt, without data_dir."})
    diagnoses: list[str] = field(
        default_factory=lambda: list(DIAGNOSES), metadata={"help": "Of which an image has one."}
    )
    artifacts: list[str] = field(default_factory=lambda: list(ARTIFACTS), metadata={"help": "Of which it has any."})
    opening: str = field(default=OPENING, metadata={"help": "How a prompt begins that is built from these."})
    diagnosis_column: str = field(default="diagnosis", metadata={"help": "Column of the diagnosis in metadata.csv."})
    diagnosis_names: dict = field(default_factory=dict, metadata={"help": "{what stands in the table: diagnosis}."})
    artifact_columns: dict = field(default_factory=dict, metadata={"help": "{artifact: its column}."})
    subject_column: str | None = field(
        default=None,
        metadata={"help": "Column that names the subject: subject_id or participant_id, or each file, if unset."},
    )


def main() -> None:
    if is_given("pretrained_model_name_or_path", sys.argv[1:]):
        fine_tune(*parse([FineTuneArguments, TextToImageConfig], description=__doc__))
    else:
        release, arguments = take_option("release", sys.argv[1:])
        config = parse_text_to_image("diffusion", DEFAULT_CONFIG, arguments, description=__doc__, taken=RELEASE_HELP)
        if not release and "diffusion" not in CHAIN.enabled(config):
            raise InputError(
                "The config gives a fine-tuned pipeline, so none would be trained; take pretrained_model_name_or_path out of it, or "
                "give it as an option to fine-tune that one further."
            )
        if release:
            check_outside(release, config.pretrained_model_name_or_path)
        CHAIN.run(config, [*CHAIN.up_to("diffusion"), *(["classifiers"] if release else [])])
        if process_state().is_main_process:
            if release:
                write_release(config, release)
            print(f"{release or Path(config.output_dir) / 'diffusion/pipeline'} written")


def fine_tune(script_args: FineTuneArguments, args: TextToImageConfig) -> None:
    pipeline = load_stable_diffusion(script_args.pretrained_model_name_or_path)
    images = load_images(script_args, pipeline_image_size(pipeline))
    TextToImageTrainer(pipeline, args, images).train()
    if not process_state().is_main_process:
        return
    written = Path(args.output_dir) / "pipeline"
    pipeline.save_pretrained(written)
    plot_history(args.output_dir, ["loss", "grad_norm"])
    print(f"{written} written")


def load_images(script_args: FineTuneArguments, image_size: int) -> ImageDataset:
    builder = PromptBuilder(script_args.diagnoses, script_args.artifacts, script_args.opening)
    if script_args.data_dir is None:
        if script_args.caption_column:
            raise InputError("--caption_column needs --data_dir: the folder whose metadata.csv has that column.")
        if builder != PromptBuilder():
            raise InputError("Drawn images have the prompts of dermoscopy; give a data_dir for others.")
        return load_dermoscopy(script_args.num_per_prompt, image_size)
    if script_args.caption_column:
        return load_captioned_folder(
            script_args.data_dir, script_args.caption_column, image_size, script_args.subject_column
        )
    return load_image_folder(
        script_args.data_dir, builder, image_size, script_args.diagnosis_column, script_args.artifact_columns,
        script_args.diagnosis_names, script_args.subject_column, both_classes=False,
    )  # fmt: skip


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        start_missing_processes()
        main()
