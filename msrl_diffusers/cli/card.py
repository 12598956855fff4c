"""msrl card: the model card of a folder, from a study's report and a memorization audit.

msrl card outputs/study/pipeline_rl --report outputs/study/report.json
msrl card my_pipeline --audit audit/audit.json --data_terms "My own scans; every subject agreed to sharing."
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..arguments import parse
from ..files import write_text
from ..hub import inspect_folder, render_card
from ..hub.contents import read_json


@dataclass
class CardOptions:
    """What a card says that no file knows."""

    arm: str | None = field(
        default=None,
        metadata={
            "help": "rl or standard: which of the report's models this is. Known of pipeline_rl and pipeline_standard."
        },
    )
    license: str | None = field(
        default=None, metadata={"help": "Of the weights. apache-2.0 for phantoms, else unknown, if unset."}
    )
    data_terms: str | None = field(default=None, metadata={"help": "A sentence on the terms of the training data."})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub repository that was fine-tuned, or that an adapter belongs to."}
    )


@dataclass
class CardArguments:
    """Options of `msrl card`."""

    folder: str = field(metadata={"help": "Folder of a pipeline, a model or a LoRA adapter."})
    report: str | None = field(
        default=None, metadata={"help": "report.json of a study. That in the folder, if there is one, if unset."}
    )
    audit: str | None = field(
        default=None,
        metadata={"help": "audit.json of msrl audit. That in the folder, or the report's figures, if unset."},
    )
    repo_id: str | None = field(
        default=None,
        metadata={
            "help": "Repository it will have. The folder's name if unset, which msrl push replaces by the repository's."
        },
    )
    output: str | None = field(default=None, metadata={"help": "File to write. README.md in the folder if unset."})


def run(arguments: Sequence[str]) -> None:
    """Write the card that the command line asks for, over one that may be there."""
    args, options = parse(
        [CardArguments, CardOptions], None, arguments,
        positionals=("folder",), prog="msrl card", description=__doc__,
    )  # fmt: skip
    contents = inspect_folder(args.folder)
    report = read_json(args.report) if args.report else contents.read_json("report.json")
    audit = read_json(args.audit) if args.audit else contents.read_json("audit.json")
    card = render_card(report, contents, audit=audit, name=args.repo_id, **asdict(options))
    output = Path(args.output) if args.output else contents.folder / "README.md"
    write_text(output, card)
    sys.stdout.write(f"Card: {output}\n")
