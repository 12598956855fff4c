"""The command `msrl`: one verb a file."""

import sys
from difflib import get_close_matches
from importlib import import_module

from ..errors import InputError, sentence_instead_of_traceback


VERBS = {
    "generate": "volumes of given classes from a pipeline, as NIfTI images",
    "prepare": "a data set as it was downloaded into a cache that every study runs from",
    "evaluate": "how far generated volumes are from real ones: FID, KID, floors, diversity",
    "audit": "whether generated volumes copy training volumes",
    "push": "a pipeline, a model or a LoRA adapter to the Hugging Face Hub, with a card and an audit",
    "card": "the model card of a folder, from a report and an audit",
    "study": "the whole method on a data set, to a report, or to tables over seeds and ablations",
    "demo": "a web page: a pretrained and a tuned pipeline side by side, from the same noise",
    "env": "versions, devices and folders, for a bug report",
}


def main() -> None:
    """Entry point: `msrl VERB [OPTIONS]`."""
    with sentence_instead_of_traceback():
        verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
        if verb in ("-h", "--help"):
            lines = [f"  {name:<10}{purpose}" for name, purpose in VERBS.items()]
            sys.stdout.write(
                "\n".join(["msrl VERB [OPTIONS]; --help after a verb shows its options and examples.", *lines, ""])
            )
            return
        if verb not in VERBS:
            close = get_close_matches(verb, VERBS, 1)
            remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(VERBS)}."
            raise InputError(f"There is no verb {verb!r}; {remedy}")
        import_module(f".{verb}", __name__).run(sys.argv[2:])
