"""Sharing a folder on the Hub: checked, with a card and an audit, in one commit. Local files stay as they are."""

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from ..errors import InputError
from ..pipelines.remote_code import remote_index
from .cards import (
    AUDITED,
    NO_AUDIT,
    audit_source,
    audited_share,
    check_metadata,
    find_arm,
    find_memorization,
    memorization_section,
    render_card,
)
from .contents import FINDINGS, Contents, inspect_folder, is_weights, read_json, shared_json


logger = logging.getLogger(__name__)

HTTPError = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, whichever the client is built on: also lost connections
TRIES = 4
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that may be gone in a moment
NOTHING_TWICE = "what was uploaded is not sent twice"
LONGEST_WAIT = 60  # seconds; who is told to wait longer is told so

T = TypeVar("T")


@dataclass(frozen=True)
class Pushed:
    """Where a folder went: `url` of the commit, full `repo_id`, `private`, paths of the `files`, those `left_out`, and those of an
    earlier model that were `removed` from the repository."""

    url: str
    repo_id: str
    private: bool
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    removed: tuple[str, ...]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    audit: str | Path | None = None,
    without_audit: bool = False,
    report: str | Path | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    arm: str | None = None,
    license: str | None = None,
    data_terms: str | None = None,
    base_model: str | None = None,
) -> Pushed:
    """Share a pipeline, a model or a LoRA adapter in one commit; what was uploaded before an interruption is not sent again.

    What else an earlier push has left stays in the repository, but for weights beside those that are pushed and findings, which
    would be taken for this model's. The folder's `README.md` is its card, with a section on memorization if it has none; without
    one a card is rendered.

    Args:
        folder: what `save_pretrained` or `save_lora_weights` wrote.
        repo_id: `NAME` or `OWNER/NAME`; made if it does not exist.
        private: of a new repository, and a safeguard: an existing public one is refused.
        audit: `audit.json`, or a study's `report.json`; by default those in the folder.
        without_audit: share without one; the card says so.
        report: a study's `report.json`, for the card; by default the one in the folder.
        revision: branch, made if it does not exist; the main one by default.
        commit_message: `Upload CLASS with msrl_diffusers` by default.
        token: by default the one of `hf auth login` or HF_TOKEN.
        arm: which of the report's models this is, `"rl"` or `"standard"`; see `render_card`.
        license, data_terms, base_model: of a card that is rendered; see `render_card`.

    Raises:
        InputError: the folder can't be shared (see `inspect_folder`), there is no audit, or the Hub refuses or is out of
            reach; one sentence says what to do.
    """
    contents = inspect_folder(folder)
    content = _report(contents, report)
    found = _audit(contents, content, audit, arm)
    if found is None and not without_audit:
        raise InputError(
            f"{folder} has no audit of memorization: run `msrl audit TRAIN {folder} --held_out OTHER --output_dir audit` and name "
            "its audit.json, or a study's report.json, by --audit; or say --without_audit, which the card will state."
        )
    options = {"license": license, "data_terms": data_terms, "base_model": base_model}
    if (contents.folder / "README.md").is_file():
        card = _own_card(contents, found, repo_id, options)
    else:
        card = render_card(content, contents, audit=found, arm=arm, name=repo_id, **options)
    files = _files(contents)
    api = HfApi(token=token, library_name="msrl_diffusers")
    with _in_one_sentence(repo_id, revision):
        full_id, is_private = _prepare_repository(api, repo_id, private, revision)
        files["README.md"] = _renamed(card, repo_id, full_id).encode()
        message = commit_message or f"Upload {contents.class_name} with msrl_diffusers"
        url, removed = _persistently(lambda: _commit(api, full_id, files, message, revision))
    return Pushed(url, full_id, is_private, tuple(sorted(files)), contents.left_out, removed)


def _report(contents: Contents, path: str | Path | None) -> dict | None:
    return read_json(path) if path is not None else contents.read_json("report.json")


def _audit(contents: Contents, report: dict | None, path: str | Path | None, arm: str | None) -> dict | None:
    """What was found about this model, out of the first of: the file named, audit.json, report.json."""
    audit = read_json(path) if path is not None else contents.read_json("audit.json")
    source = audit_source(audit, report or {})
    if source.get("memorization"):
        arm = find_arm(contents, (source,), arm)
    return find_memorization(source, arm)


def _own_card(contents: Contents, audit: dict | None, repo_id: str, options: dict) -> str:
    """The folder's own card, with what is known of memorization. It must not deny an audit that there is, nor state another.

    Raises:
        InputError: it does; its metadata can't be read; or options are given that are for a rendered one.
    """
    path = contents.folder / "README.md"
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise InputError(
            f"{path} is there already, so --{given[0]} has no effect; write it by msrl card, or remove it."
        )
    card = path.read_text(encoding="utf-8")
    check_metadata(card, path)
    if audit is not None and NO_AUDIT in card:
        raise InputError(
            f"{path} says that memorization was not audited, but there is an audit; render it anew by msrl card."
        )
    if audit is not None and AUDITED in card and audited_share(audit) not in card:
        raise InputError(
            f"{path} states another audit of memorization than this one ({audited_share(audit)}); render it anew by "
            "msrl card, or remove it: then the push renders one."
        )
    if NO_AUDIT not in card and (audit is None or "## Memorization" not in card):
        card = f"{card.rstrip()}\n\n{memorization_section(audit)}"
    card = _renamed(card, contents.folder.resolve().name, repo_id)
    title = re.search("^# (.+)$", card, re.MULTILINE)
    loaded = re.search(r'from_pretrained\("([^"]+)"', card)
    # of a folder that was copied, or rendered for another repository; an adapter's card also loads the base model
    if title and loaded and contents.kind != "adapter" and loaded[1].split("/")[-1] == title[1].strip():
        card = _renamed(card, loaded[1], repo_id)
    return card


def _renamed(card: str, name: str, other: str) -> str:
    """The card with another name to load the model from."""
    return (
        card.replace(f'from_pretrained("{name}"', f'from_pretrained("{other}"')
        .replace(f'load_lora_weights("{name}"', f'load_lora_weights("{other}"')
        .replace(f'load_lora_adapter("{name}"', f'load_lora_adapter("{other}"')
        .replace(f'from_pretrained(pipe.unet, "{name}"', f'from_pretrained(pipe.unet, "{other}"')
    )


def _files(contents: Contents) -> dict[str, Path | bytes]:
    """What the repository gets, by path: JSON without what is private, the index and code to load a pipeline with."""
    files: dict[str, Path | bytes] = {}
    for name in contents.files:
        files[name] = contents.folder / name
        if name.endswith(".json"):
            before = json.loads(files[name].read_text(encoding="utf-8"))
            after = shared_json(name, before) if isinstance(before, dict) else before
            if after != before:
                files[name] = _json(after)
    if contents.kind == "pipeline":
        index, code = remote_index(shared_json("model_index.json", contents.config))
        files["model_index.json"] = _json(index)
        files |= {name: text.encode() for name, text in code.items()}
    return files


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _prepare_repository(api: HfApi, repo_id: str, private: bool, revision: str | None) -> tuple[str, bool]:
    """The repository's full name and whether it is private; it and the branch exist afterwards."""
    full_id = _persistently(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    is_private = bool(_persistently(lambda: api.model_info(full_id)).private)
    if private and not is_private:
        raise InputError(
            f"{full_id} exists and is public; say --public if everyone may see this model, or name another one."
        )
    if revision not in (None, "main") and not revision.startswith("refs/"):
        _persistently(lambda: api.create_branch(full_id, branch=revision, exist_ok=True))
    return full_id, is_private


def _stale(there: Iterable[str], files: Iterable[str]) -> list[str]:
    """Files of an earlier model that is replaced: its findings, and its weights beside the new ones, of another variant or number
    of shards, which loaders would prefer or mix."""
    folders = {_folder(name) for name in files if is_weights(name)}
    return sorted(
        name for name in set(there) - set(files) if name in FINDINGS or (is_weights(name) and _folder(name) in folders)
    )


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _commit(
    api: HfApi, repo_id: str, files: dict[str, Path | bytes], message: str, revision: str | None
) -> tuple[str, tuple[str, ...]]:
    """Upload what the Hub does not have, and commit all, without what is stale; the commit's address, and what was removed.
    Repeated after a lost answer, it finds nothing left to commit."""
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in sorted(files.items())]
    with _in_one_sentence(repo_id, revision):  # retried by the client itself
        api.preupload_lfs_files(repo_id, operations, revision=revision, free_memory=False)
    stale = _stale(api.list_repo_files(repo_id, revision=revision), files)
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return commit.commit_url, tuple(stale)


def _persistently(call: Callable[[], T]) -> T:
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
def _in_one_sentence(repo_id: str, revision: str | None) -> Iterator[None]:
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
