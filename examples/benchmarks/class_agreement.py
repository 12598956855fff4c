"""Do generated volumes show the class they were asked for? Read by classifiers of real volumes, before and after tuning.

    python examples/benchmarks/class_agreement.py --studies outputs/demo-0 outputs/demo-1 outputs/demo-2

A Frechet distance compares whole distributions and can hide that a lesion is missing. Here networks that saw real training volumes
alone (a 3D ResNet of MONAI, of several seeds) read the class of held-out real volumes, of reconstructions of the training volumes, and of the samples that
finished studies of the same data reported, before and after tuning. They scored no reward and picked no weights. `agreement` is
the share read as the class asked for, the mean over classifiers, with the 95 % bootstrap interval over volumes; `difference` is
that of the tuned samples from those before, paired by noise. Beside the JSON lies the same as a Markdown table.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from msrl_diffusers import VolumeDataset
from msrl_diffusers.errors import InputError, sentence_instead_of_traceback
from msrl_diffusers.files import write_json, write_text
from msrl_diffusers.seeding import fold_seed, generator_for
from msrl_diffusers.study.report import git_commit, versions
from msrl_diffusers.trainers.classifier_config import ClassifierConfig
from msrl_diffusers.trainers.classifier_trainer import ClassifierTrainer, build_classifier, predict


ARMS = {
    "real_floor": "real, held out",
    "limit": "reconstructions of training volumes, which the classifiers saw",
    "standard": "before",
    "rl": "after",
}
DRAWS = 1000


def trained_classifier(train: VolumeDataset, max_steps: int, seed: int) -> torch.nn.Module:
    """A classifier of the real volumes."""
    torch.manual_seed(fold_seed(seed, "init", "classifier"))
    model = build_classifier("resnet10", train.num_channels, train.num_classes, widen_factor=0.25)
    with tempfile.TemporaryDirectory() as folder:
        args = ClassifierConfig(
            output_dir=folder, seed=seed, network="resnet10", widen_factor=0.25, max_steps=max_steps, learning_rate=1e-3,
            report_to="none",
        )  # fmt: skip
        trainer = ClassifierTrainer(model, args, train)
        trainer.train()
    return trainer.model


@torch.no_grad()
def hits(models: list[torch.nn.Module], volumes: VolumeDataset) -> torch.Tensor:
    """Of each volume the share of classifiers `[N]` that read the class asked for."""
    read = torch.stack([predict(model, volumes.pixel_values).argmax(dim=1) for model in models])
    return (read == volumes.class_labels).double().mean(dim=0)


def share(values: torch.Tensor, seed: int) -> dict:
    """The mean and its 95 % bootstrap interval."""
    rows = torch.randint(len(values), (DRAWS, len(values)), generator=generator_for(seed, "class agreement"))
    low, high = values[rows].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return {"value": values.mean().item(), "interval": [low, high]}


def check_studies(folders: list[Path]) -> None:
    """Refuse studies that can't stand in one table.

    Raises:
        InputError: folders of one name, a study whose data were not prepared, or studies of unequal data.
    """
    first, names = folders[0], [folder.name for folder in folders]
    for folder in folders:
        if names.count(folder.name) > 1:
            raise InputError(
                f"Two of the studies are in folders called {folder.name!r}; give every study a name of its own."
            )
        if data_fingerprint(folder) != data_fingerprint(first):
            raise InputError(
                f"The studies in {first} and {folder} are of unequal data, but the classifiers learn from one; give studies of "
                "equal data."
            )


def data_fingerprint(folder: Path) -> str:
    """Hash of the volumes that a study prepared."""
    record = folder / "prepare" / "stage.json"
    if not record.is_file():
        raise InputError(f"{record} is not there; run the study of that folder to its end first.")
    return json.loads(record.read_text())["result"]["fingerprint"]


def read_study(folder: Path, models: list[torch.nn.Module], seed: int) -> dict:
    """Agreement of every arm that the study in `folder` reported, all classes and each.

    Raises:
        InputError: the study has not been evaluated.
    """
    found = {}
    for arm in ARMS:
        path = folder / ("evaluate" if arm == "rl" else "baseline") / f"{arm}.safetensors"
        if not path.is_file():
            raise InputError(f"{path} is not there; run the study of that folder to its end first.")
        volumes = VolumeDataset.load(path)
        found[arm] = (volumes, hits(models, volumes))
    rows = {}
    for arm, (volumes, values) in found.items():
        of_class = {name: values[volumes.class_labels == label] for label, name in volumes.id2label.items()}
        rows[arm] = {"all": share(values, seed), **{name: share(part, seed) for name, part in of_class.items()}}
    return {
        "agreement": rows,
        "difference": share(found["rl"][1] - found["standard"][1], seed),
        "n": len(found["rl"][1]),
    }


def markdown(content: dict) -> str:
    """The table."""
    first = next(iter(content["studies"].values()))
    classes = list(first["agreement"]["rl"])
    lines = [
        "# Is the class that was asked for to be seen?",
        "",
        f"Share of volumes read as it by {content['classifiers']} classifiers of real volumes alone (3D ResNet-10); in brackets the 95 % "
        "interval over volumes. Not for clinical use.",
        "",
        "| study | arm | " + " | ".join(classes) + " | after minus before, paired |",
        "|---" * (3 + len(classes)) + "|",
    ]
    for name, study in content["studies"].items():
        for arm, title in ARMS.items():
            cells = [_shown(study["agreement"][arm][of]) for of in classes]
            low, high = study["difference"]["interval"]
            change = f"{study['difference']['value']:+.1%} ({low:+.1%} .. {high:+.1%})" if arm == "rl" else ""
            lines.append(
                f"| {name if arm == 'real_floor' else ''} | {title} | " + " | ".join(cells) + f" | {change} |"
            )
    return "\n".join(lines) + "\n"


def _shown(figure: dict) -> str:
    return f"{figure['value']:.1%} ({figure['interval'][0]:.1%} .. {figure['interval'][1]:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=Path, nargs="+", default=[Path("outputs/demo")], help="finished studies")
    parser.add_argument("--num_classifiers", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=200, help="steps of each classifier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/class-agreement.json"))
    args = parser.parse_args()
    check_studies(args.studies)
    train = VolumeDataset.load(args.studies[0] / "prepare" / "train.safetensors")
    models = [trained_classifier(train, args.max_steps, args.seed + number) for number in range(args.num_classifiers)]
    content = {
        "classifiers": args.num_classifiers,
        "max_steps": args.max_steps,
        "seed": args.seed,
        "studies": {folder.name: read_study(folder, models, args.seed) for folder in args.studies},
        "commit": git_commit(),
        "versions": versions(),
    }
    write_text(args.output.with_suffix(".md"), markdown(content))
    write_json(args.output, content)
    sys.stdout.write(
        json.dumps({name: study["difference"] for name, study in content["studies"].items()}, indent=2) + "\n"
    )


if __name__ == "__main__":
    with sentence_instead_of_traceback():
        main()
