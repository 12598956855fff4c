"""msrl generate: volumes of given classes from a pipeline, as NIfTI images that any viewer opens.

Eight volumes, classes in turn, and two of one class by few steps:

    msrl generate --model model_cards/phantoms-32 --num_volumes 8 --output_dir outputs/brains
    msrl generate --model model_cards/phantoms-32 --class_label HGG --num_volumes 2 --num_inference_steps 8 --output_dir outputs/hgg

OUTPUT_DIR gets CLASS-SEED-INDEX.nii.gz (RAS+, millimetres, intensities in [0, 1]), a metadata.csv that `msrl evaluate`,
`msrl audit` and the nifti_folder loader read, sheet.png (slices of the first ones of every class, where their halves differ
most), and generation.json with all that shaped the volumes. Volume number i depends on the seed, i and its class alone, not on
batch or number. A killed run goes on; a larger --num_volumes adds to the folder.
"""

import csv
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import torch
from tqdm import tqdm

from ..app.volume_files import decode_checked, file_stems, nifti_bytes, write_bytes
from ..arguments import parse
from ..data.processor import from_nifti
from ..errors import InputError
from ..evaluation.features import hash_tensors
from ..files import write_json, write_text
from ..models.loading import load_model
from ..pipelines.med_volume import MedVolumePipeline
from ..plots import plot_volumes
from ..processes import alone_in, keep_freed_memory
from ..seeding import sample_generators
from ..study.report import git_commit, versions
from .sets import is_pipeline


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECORD = "generation.json"
WHERE_FROM = ("model", "lora")  # of the settings: names, which may change while the weights do not
ADAPTER = "generate"
SHEET_COLUMNS = 8


@dataclass
class GenerateArguments:
    """Options of `msrl generate`."""

    model: str = field(metadata={"help": "The pipeline's folder or Hub repository."})
    output_dir: str = field(metadata={"help": "Folder to write the images to; a killed run goes on in it."})
    class_label: list[str] | None = field(
        default=None, metadata={"help": "Names or numbers of classes, taken in turn; all of the model's if unset."}
    )
    num_volumes: int | None = field(
        default=None, metadata={"help": "Volumes in all; one of every class asked for if unset."}
    )
    seed: int = field(default=0, metadata={"help": "Of the noise."})
    num_inference_steps: int = field(default=25, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance, above 0; 1 is none."})
    eta: float = field(default=1.0, metadata={"help": "Noise on the way: 0 is DDIM, 1 as much as DDPM."})
    batch_size: int = field(default=4, metadata={"help": "Volumes sampled at once."})
    lora: str | None = field(default=None, metadata={"help": "Folder or Hub repository of a LoRA adapter to add."})
    lora_scale: float = field(default=1.0, metadata={"help": "How much of the adapter: 0 is none, 1 all."})
    dtype: str = field(default="float32", metadata={"help": f"Precision of the weights: {', '.join(DTYPES)}."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub repository."})
    variant: str | None = field(default=None, metadata={"help": "Variant of the weights' files, such as fp16."})

    def __post_init__(self):
        for name in ("num_volumes", "num_inference_steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        if self.seed < 0:
            raise InputError(f"seed must not be negative, got {self.seed}.")
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta must lie in 0 .. 1, got {self.eta}.")
        for name in ("guidance_scale", "lora_scale"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} must be a finite number, got {getattr(self, name)}.")
        if self.guidance_scale <= 0:
            raise InputError(
                f"guidance_scale must be above 0, got {self.guidance_scale}: at 0 the class is ignored, and images are named by it; "
                "1 is no guidance."
            )
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {list(DTYPES)}, got {self.dtype!r}.")


def run(arguments: Sequence[str]) -> None:
    """Generate what the command line says."""
    (args,) = parse([GenerateArguments], None, arguments, prog="msrl generate", description=__doc__)
    keep_freed_memory()
    with alone_in(args.output_dir):
        _generate_missing(args)


def _generate_missing(args: GenerateArguments) -> None:
    """Generate the volumes that the folder lacks; its record, table and sheet are of all."""
    output_dir = Path(args.output_dir)
    record = _read_record(output_dir)
    pipeline = open_pipeline(args.model, args.dtype, args.lora, args.lora_scale, args.revision, args.variant)
    classes = chosen_classes(pipeline, args.class_label)
    settings = _settings(pipeline, classes, args)
    if record is not None:
        _check_settings(record["settings"], settings, output_dir)
    num_volumes = args.num_volumes or len(classes)
    num_recorded = max(num_volumes, record["num_volumes"] if record else 0)
    names = [image_names(pipeline, classes, args.seed, index) for index in range(num_recorded)]
    missing = [index for index in range(num_volumes) if not _there(output_dir, names[index])]
    made_by, this = record["made_by"] if record else [], {"versions": versions(), "commit": git_commit()}
    if missing and this not in made_by:
        made_by = [*made_by, this]
    write_json(output_dir / RECORD, {"settings": settings, "num_volumes": num_recorded, "made_by": made_by})
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    _write_table(pipeline, classes, names, output_dir)  # a killed run may have left images that it does not name
    _generate(pipeline, classes, missing, names, args)
    _draw_sheet(pipeline, classes, names[:num_volumes], output_dir)
    counts = Counter(pipeline.id2label[classes[index % len(classes)]] for index in range(num_volumes))
    made = f"{num_volumes} volumes ({', '.join(f'{count} {name}' for name, count in counts.items())}) in {output_dir}"
    kept = num_volumes - len(missing)
    sys.stdout.write(f"{made}{f'; {kept} were there already' if kept else ''}.\n")


def open_pipeline(
    place: str,
    dtype: str = "float32",
    lora: str | None = None,
    lora_scale: float = 1.0,
    revision: str | None = None,
    variant: str | None = None,
) -> MedVolumePipeline:
    """The pipeline of a folder or a Hub repository, with an adapter added where one is given, on the CPU.

    Raises:
        InputError: there is none, or the adapter does not fit.
    """
    if not is_pipeline(place):
        raise InputError(
            f"{place} is neither the folder of a pipeline (with a model_index.json) nor a Hub repository."
        )
    given = {name: value for name, value in (("revision", revision), ("variant", variant)) if value is not None}
    pipeline = load_model(MedVolumePipeline, place, dtype=DTYPES[dtype], **given)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora, adapter_name=ADAPTER)
        pipeline.set_adapters([ADAPTER], [lora_scale])
        pipeline.to(dtype=DTYPES[dtype])  # the adapter, too
    return pipeline


def chosen_classes(pipeline: MedVolumePipeline, wanted: Sequence[str] | None) -> list[int]:
    """The labels of classes given by name or number; of all classes if none is given.

    Raises:
        InputError: a class that the model does not know.
    """
    if not wanted:
        return sorted(pipeline.id2label)
    labels = {str(label): label for label in pipeline.id2label}
    labels |= {name: label for label, name in pipeline.id2label.items()}  # a name that is a number is a name
    for word in wanted:
        if word not in labels:
            known = ", ".join(f"{label} ({name})" for label, name in sorted(pipeline.id2label.items()))
            raise InputError(f"The model knows no class {word!r}; it has {known}.")
    return [labels[word] for word in wanted]


def image_names(pipeline: MedVolumePipeline, classes: Sequence[int], seed: int, index: int) -> list[str]:
    """Names of the images of volume number `index`, one per channel."""
    stem = f"{file_stems(pipeline.id2label)[classes[index % len(classes)]]}-{seed}-{index:05d}"
    further = [f"{stem}-channel{channel}.nii.gz" for channel in range(1, pipeline.vqvae.config.out_channels)]
    return [f"{stem}.nii.gz", *further]


def _generate(
    pipeline: MedVolumePipeline,
    classes: Sequence[int],
    indices: Sequence[int],
    names: Sequence[Sequence[str]],
    args: GenerateArguments,
) -> None:
    """Sample the volumes of these numbers and write their images and the table with them, batch after batch."""
    with tqdm(total=len(indices), desc="generate", unit="volume") as bar:
        for start in range(0, len(indices), args.batch_size):
            batch = indices[start : start + args.batch_size]
            latents = pipeline(
                [classes[index % len(classes)] for index in batch],
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                eta=args.eta,
                generator=sample_generators(args.seed, "generated", batch),
                output_type="latent",
            ).volumes
            for index, volume in zip(batch, decode_checked(pipeline, latents), strict=True):
                for name, channel in zip(names[index], volume, strict=True):
                    write_bytes(Path(args.output_dir) / name, nifti_bytes(channel[None], pipeline.spacing))
            _write_table(pipeline, classes, names, Path(args.output_dir))
            bar.update(len(batch))


def _settings(pipeline: MedVolumePipeline, classes: Sequence[int], args: GenerateArguments) -> dict:
    """All that a volume of a number depends on."""
    if args.num_inference_steps > pipeline.scheduler.config.num_train_timesteps:
        raise InputError(
            f"num_inference_steps must be at most {pipeline.scheduler.config.num_train_timesteps}, the steps of the training, "
            f"got {args.num_inference_steps}."
        )
    tensors = [
        (f"{part}.{name}", tensor.float())
        for part in ("vqvae", "unet")
        for name, tensor in getattr(pipeline, part).state_dict().items()
    ]
    scheduler = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    settings = {
        "model": args.model,
        "lora": args.lora,
        "weights": hash_tensors(tensors),
        "lora_scale": args.lora_scale if args.lora else None,
        "scheduler": {"class": type(pipeline.scheduler).__name__, **scheduler},
        "class_labels": [pipeline.id2label[label] for label in classes],
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "eta": args.eta,
        "seed": args.seed,
        "dtype": args.dtype,
        "spacing": pipeline.spacing,
        "intensities": "final",  # earlier versions did not mark them so, and readers would scale half of a folder
    }
    return json.loads(json.dumps(settings))  # as it will be read


def _read_record(output_dir: Path) -> dict | None:
    """What an earlier run left in the folder; None where that made no image, so that none is of other settings.

    Raises:
        InputError: images of another origin, or a record that can't be read.
    """
    path = output_dir / RECORD
    if not path.exists():
        others = [*output_dir.glob("*.nii*"), *output_dir.glob("metadata.csv")]
        if others:
            raise InputError(f"{others[0]} was not written by msrl generate; give an empty folder to --output_dir.")
        return None
    try:
        content = json.loads(path.read_text())
        record = {
            "settings": dict(content["settings"]),
            "num_volumes": int(content["num_volumes"]),
            # earlier versions named the last that was at work alone
            "made_by": list(content.get("made_by") or [{name: content.get(name) for name in ("versions", "commit")}]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} can't be read ({error}); give another --output_dir.") from error
    return record if any(output_dir.glob("*.nii.gz")) else None


def _check_settings(old: dict, new: dict, output_dir: Path) -> None:
    """Raise InputError where the folder holds volumes of other settings."""
    for name in new:
        if name in WHERE_FROM or old.get(name) == new[name]:
            continue
        if name in ("weights", "scheduler"):
            difference = f"volumes of a model with other {name}"
        else:
            difference = f"volumes with {name} {old.get(name)}, not {new[name]}"
        raise InputError(f"{output_dir} holds {difference}; give another --output_dir.")


def _there(output_dir: Path, names: Sequence[str]) -> bool:
    return all((output_dir / name).is_file() for name in names)


def _write_table(
    pipeline: MedVolumePipeline, classes: Sequence[int], names: Sequence[Sequence[str]], output_dir: Path
) -> None:
    """metadata.csv of all images that are there, also those of an earlier run that asked for more."""
    further = [f"channel{channel}_file_name" for channel in range(1, len(names[0]))]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file_name", *further, "label"])
    for index, images in enumerate(names):
        if _there(output_dir, images):
            writer.writerow([*images, pipeline.id2label[classes[index % len(classes)]]])
    write_text(output_dir / "metadata.csv", table.getvalue())


def _draw_sheet(
    pipeline: MedVolumePipeline, classes: Sequence[int], names: Sequence[Sequence[str]], output_dir: Path
) -> None:
    """sheet.png: a band of rows per class, of its first volumes (first channel)."""
    bands = {}
    for position, label in enumerate(classes[: len(names)]):
        first = names[position :: len(classes)][:SHEET_COLUMNS]
        bands[pipeline.id2label[label]] = torch.stack([from_nifti(nib.load(output_dir / files[0])) for files in first])
    plot_volumes(bands, output_dir / "sheet.png", SHEET_COLUMNS, at_asymmetry=True)
