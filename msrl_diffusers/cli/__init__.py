"""The command `msrl`: one verb a file."""

import sys
from importlib import import_module

from ..errors import InputError, sentence_instead_of_traceback


VERBS = {
    "prepare": "a data set as it was downloaded into a cache that every study runs from",
    "evaluate": "how far generated volumes are from real ones: FID, KID, floors, diversity",
    "audit": "whether generated volumes copy training volumes",
    "study": "the whole method on a data set, to a report, or to tables over seeds and ablations",
}


def main() -> None:
    """Entry point: `msrl VERB [OPTIONS]`."""
    with sentence_instead_of_traceback():
        verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
        if verb in ("-h", "--help"):
            lines = [f"  {name:<10}{purpose}" for name, purpose in VERBS.items()]
            sys.stdout.write("\n".join(["msrl VERB [OPTIONS]; --help after a verb shows its options.", *lines, ""]))
            return
        if verb not in VERBS:
            raise InputError(f"Unknown verb {verb!r}; there are {sorted(VERBS)}.")
        import_module(f".{verb}", __name__).run(sys.argv[2:])
