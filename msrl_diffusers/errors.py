"""InputError: what a user gave can't be used. Commands print its sentence and exit with 1. Busy: not now."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


GPU_FULL = (
    "The GPU's memory is full: make sampling_batch_size, rollout_batch_size or train_batch_size smaller, give fewer --jobs, or see 'GPUs, "
    "memory, resume' in the README; what was finished stays."
)


class InputError(ValueError):
    """A file, a setting or a checkpoint that can't be used; the message is one sentence: which, what is wrong, what to do."""


class Busy(InputError):
    """Somebody else is at work there. It says nothing of what was asked for, so nobody goes on without it, or records it."""


@contextmanager
def sentence_instead_of_traceback() -> Iterator[None]:
    """End the program with an InputError's sentence on standard error and exit code 1; other errors pass. Ctrl-C ends it by a
    sentence too, and the exit code of shells for it, and so does a GPU whose memory is full."""
    try:
        yield
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # of torch, which is not imported for a sentence
            raise
        sys.stderr.write(f"error: {GPU_FULL} (torch: {str(error).splitlines()[0]})\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write(
            "\nInterrupted. Studies, and `msrl prepare`, `generate` and `push`, go on when the same command is given again; a single "
            "trainer does with --resume_from_checkpoint latest, from the last checkpoint it saved (--save_steps).\n"
        )
        sys.exit(130)
