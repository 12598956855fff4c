"""msrl demo: a web page that generates a volume by a pretrained and by a tuned pipeline, from the same noise, side by side.

What `make demo` left, or else the embedded pipeline; then two of your own, and a pipeline beside itself with an adapter:

    msrl demo
    msrl demo --standard outputs/demo/pipeline_standard --rl outputs/demo/pipeline_rl
    msrl demo --standard outputs/demo/pipeline_standard --lora outputs/lora --port 8000

The page is at http://127.0.0.1:7860, needs no connection to the internet, and is seen on this machine only, unless --host
says otherwise. It has no password and is not for clinical use. Ctrl-C ends it. It needs the extra `demo`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..app.comparison import Comparison
from ..arguments import parse
from ..errors import InputError
from .generate import DTYPES, open_pipeline
from .sets import is_pipeline


EMBEDDED = {"outputs/demo/pipeline_standard": "outputs/demo/pipeline_rl", "model_cards/phantoms-32": None}


@dataclass
class DemoArguments:
    """Options of `msrl demo`."""

    standard: str | None = field(
        default=None,
        metadata={"help": f"The pretrained pipeline's folder or Hub repository; if unset {' or '.join(EMBEDDED)}."},
    )
    rl: str | None = field(default=None, metadata={"help": "The tuned pipeline's, to be shown beside it."})
    lora: str | None = field(default=None, metadata={"help": "Instead of --rl: a LoRA adapter of the pretrained one."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 lets others in."})
    port: int = field(default=7860, metadata={"help": "Port to listen on."})
    dtype: str = field(default="float32", metadata={"help": f"Precision of the weights: {', '.join(DTYPES)}."})

    def __post_init__(self):
        if not 1 <= self.port <= 65535:
            raise InputError(f"port must lie in 1 .. 65535, got {self.port}.")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {list(DTYPES)}, got {self.dtype!r}.")
        if self.rl and self.lora:
            raise InputError("Give --rl or --lora, not both.")
        if self.standard is None:
            self._take_embedded()

    def _take_embedded(self) -> None:
        """The first of the pipelines of a checkout that is here, beside the tuned one that belongs to it."""
        self.standard = next((place for place in EMBEDDED if is_pipeline(place) and Path(place).is_dir()), None)
        if self.standard is None:
            raise InputError(f"There is no {' nor '.join(EMBEDDED)} here; name a pipeline with --standard.")
        tuned = EMBEDDED[self.standard]
        if tuned and Path(tuned).is_dir() and not (self.rl or self.lora):
            self.rl = tuned


def run(arguments: Sequence[str]) -> None:
    """Serve the page until it is interrupted."""
    (args,) = parse([DemoArguments], None, arguments, prog="msrl demo", description=__doc__)
    try:
        from ..app.server import serving
    except ModuleNotFoundError as error:
        raise InputError(
            f"msrl demo needs {error.name}; pip install -e '.[demo]' in the clone of the repository brings it."
        ) from error
    pipelines = {"standard": open_pipeline(args.standard, args.dtype)}
    if args.rl:
        pipelines["RL-tuned"] = open_pipeline(args.rl, args.dtype)
    elif args.lora:
        pipelines["RL-tuned"] = open_pipeline(args.standard, args.dtype, args.lora)
    comparison = Comparison(pipelines)
    comparison.to("cuda" if torch.cuda.is_available() else "cpu")
    with serving(comparison, args.host, args.port) as (url, page):
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            sys.stderr.write("warning: everybody who reaches this machine can use the page; it has no password.\n")
        sys.stdout.write(f"The page is at {url}; Ctrl-C ends it.\n")
        sys.stdout.flush()
        page.block_thread()
