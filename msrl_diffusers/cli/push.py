"""msrl push: a pipeline, a model or a LoRA adapter to the Hugging Face Hub: checked, with a card and an audit, private.

msrl audit data/brats/train.safetensors my_pipeline --held_out data/brats/heldout.safetensors --output_dir outputs/audit
msrl push my_pipeline --repo_id OWNER/NAME --audit outputs/audit/audit.json
msrl push outputs/study/pipeline_rl --repo_id OWNER/NAME --report outputs/study/report.json --public
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from ..arguments import parse
from ..hub import push_folder
from .card import CardOptions


@dataclass
class PushArguments:
    """Options of `msrl push`."""

    folder: str = field(metadata={"help": "Folder of a pipeline, a model or a LoRA adapter. It stays as it is."})
    repo_id: str = field(metadata={"help": "NAME or OWNER/NAME of the repository; made if it does not exist."})
    public: bool = field(default=False, metadata={"help": "Everyone may see it. Private if unset."})
    audit: str | None = field(
        default=None,
        metadata={"help": "audit.json of msrl audit, or a study's report.json. Those in the folder if unset."},
    )
    without_audit: bool = field(
        default=False, metadata={"help": "Share without an audit of memorization; the card says so."}
    )
    report: str | None = field(
        default=None, metadata={"help": "A study's report.json, for the card. That in the folder if unset."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch; made if it does not exist. main if unset."})
    commit_message: str | None = field(default=None, metadata={"help": "Message of the commit."})
    token: str | None = field(
        default=None, metadata={"help": "Token with write access. That of `hf auth login` or HF_TOKEN if unset."}
    )


def run(arguments: Sequence[str]) -> None:
    """Share what the command line says, and print where it is."""
    args, options = parse(
        [PushArguments, CardOptions], None, arguments,
        positionals=("folder",), prog="msrl push", description=__doc__,
    )  # fmt: skip
    settings = asdict(args)
    folder, repo_id, public = (settings.pop(name) for name in ("folder", "repo_id", "public"))
    pushed = push_folder(folder, repo_id, private=not public, **settings, **asdict(options))
    if pushed.left_out:
        sys.stdout.write(f"Not shared, as they show or name training volumes: {', '.join(pushed.left_out)}\n")
    if pushed.removed:
        sys.stdout.write(f"Removed there, as of an earlier model: {', '.join(pushed.removed)}\n")
    access = "private" if pushed.private else "public"
    sys.stdout.write(f"{len(pushed.files)} files in {pushed.repo_id} ({access}): {pushed.url}\n")
