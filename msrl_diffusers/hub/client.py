"""Requests to the Hub: repeated where that helps, and their errors in one sentence."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from ..errors import InputError
from ..models.loading import HTTPError


logger = logging.getLogger(__name__)

TRIES = 4
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that may be gone in a moment
NOTHING_TWICE = "what was uploaded is not sent twice"
LONGEST_WAIT = 60  # seconds; who is told to wait longer is told so

T = TypeVar("T")


def prepare_repository(api: HfApi, repo_id: str, private: bool, revision: str | None) -> tuple[str, bool]:
    """The repository's full name and whether it is private; it and the branch exist afterwards."""
    full_id = persistently(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    is_private = bool(persistently(lambda: api.model_info(full_id)).private)
    if private and not is_private:
        raise InputError(
            f"{full_id} exists and is public; say so if everyone may see this model (--public, hub_private_repo=False), "
            "or name another one."
        )
    if revision not in (None, "main") and not revision.startswith("refs/"):
        persistently(lambda: api.create_branch(full_id, branch=revision, exist_ok=True))
    return full_id, is_private


def persistently(call: Callable[[], T]) -> T:
    """`call()`, again after a failure that may pass. The client repeats uploads, but not these requests."""
    for attempt in range(TRIES):
        try:
            return call()
        except HTTPError as error:
            wait = _wait(error, attempt)
            if wait is None or attempt == TRIES - 1:
                raise
            logger.warning("%s. Trying again in %d s.", _text(error), wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _wait(error: Exception, attempt: int) -> int | None:
    """Seconds until another try makes sense; None where none does."""
    response = getattr(error, "response", None)
    if response is None:
        return 2**attempt  # the connection was lost
    if response.status_code not in PASSING:
        return None
    asked = _retry_after(response)
    if asked is not None and asked > LONGEST_WAIT:
        return None
    return 2**attempt if asked is None else asked


def _retry_after(response) -> int | None:
    value = response.headers.get("Retry-After", "")
    return int(value) if value.isdigit() else None


@contextmanager
def in_one_sentence(repo_id: str, revision: str | None) -> Iterator[None]:
    """Within it, errors of the client become an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # an upload's own error lies beneath a RuntimeError
            sentence = _sentence(cause, repo_id, revision)
            if sentence:
                raise InputError(sentence) from error
            cause = cause.__cause__
        if isinstance(error, RuntimeError | OSError):  # by the storage's own client
            raise InputError(
                f"The upload to {repo_id} failed ({_text(error)}); run this again: {NOTHING_TWICE}."
            ) from error
        raise


def _sentence(error: BaseException, repo_id: str, revision: str | None) -> str | None:
    if isinstance(error, HfHubHTTPError):
        return _answered(error, repo_id + (f" at {revision}" if revision else ""))
    if isinstance(error, OfflineModeIsEnabled):
        return "The Hub can't be reached while HF_HUB_OFFLINE is set; unset it and run this again."
    if isinstance(error, HTTPError):
        return f"The connection to the Hub was lost ({_text(error)}); run this again: {NOTHING_TWICE}."
    if isinstance(error, LocalTokenNotFoundError):
        return "There is no token for the Hub; log in by `hf auth login`, or give one by --token or HF_TOKEN."
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is no name of a repository; give NAME or OWNER/NAME of letters, digits, - _ and dots."
    if isinstance(error, ValueError):  # by the client, of what the Hub answered
        return f"The Hub does not take this folder as {repo_id}: {_text(error)}."
    return None


def _answered(error: HfHubHTTPError, where: str) -> str:
    status = error.response.status_code
    if status == 401:
        return f"The Hub does not accept the token for {where} (401); log in by `hf auth login`, or give a valid one by --token."
    if status == 403:
        return f"The Hub does not let this token write to {where} (403); use a token with write access, or a name of yours."
    if status == 404:
        return (
            f"The Hub knows no {where} (404), or this token may not see it; check --repo_id, --revision and the token."
        )
    if status == 409:
        return f"The Hub has another change of {where} under way (409); run this again."
    if status == 413:
        return f"The Hub says that the upload to {where} is too large (413); share fewer files, or smaller shards."
    if status == 429:
        asked = _retry_after(error.response)
        when = f"in {asked} s" if asked is not None else "later"
        return f"The Hub takes no more requests for now (429); run this again {when}: {NOTHING_TWICE}."
    if status >= 500:
        return f"The Hub is out of order ({status}); run this again later: {NOTHING_TWICE}."
    return f"The Hub refuses {where} ({status}): {error.server_message or _text(error)}."


def _text(error: BaseException) -> str:
    """An error's message on one line, without a full stop."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
    return " ".join(lines).rstrip(".") or type(error).__name__
