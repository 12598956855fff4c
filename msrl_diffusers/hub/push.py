"""Sharing a folder on the Hub: checked, with a card and an audit, in one commit. Local files stay as they are."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from ..errors import InputError
from ..pipelines.remote_code import remote_index
from .cards import (
    AUDITED,
    NO_AUDIT,
    TEXT_TO_IMAGE,
    audit_source,
    audited_share,
    find_arm,
    find_memorization,
    memorization_section,
    read_card,
    render_card,
    task_of,
    with_audit,
)
from .client import in_one_sentence, persistently, prepare_repository
from .contents import FINDINGS, Contents, inspect_folder, is_weights, read_json, shared_json


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
    would be taken for this model's. The folder's `README.md` is its card, with a section on memorization if it has none, or one
    by this package that says there was no audit; without one, or with the empty template that PEFT writes, a card is rendered.

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
    if found is None and not without_audit and task_of(contents) == TEXT_TO_IMAGE:
        raise InputError(
            f"{folder} has no audit of memorization, and `msrl audit` reads volumes only: say --without_audit, which the card will "
            "state."
        )
    if found is None and not without_audit:
        option = f" --variant {contents.variant}" if contents.variant else ""
        raise InputError(
            f"{folder} has no audit of memorization: run `msrl audit TRAIN {folder}{option} --held_out OTHER --output_dir audit` and name "
            "its audit.json, or a study's report.json, by --audit; or say --without_audit, which the card will state."
        )
    options = {"license": license, "data_terms": data_terms, "base_model": base_model}
    own = read_card(contents.folder / "README.md")
    if own is None:
        card = render_card(content, contents, audit=found, arm=arm, name=repo_id, **options)
    else:
        card = _own_card(own, contents, found, repo_id, options)
    files = _files(contents)
    api = HfApi(token=token, library_name="msrl_diffusers")
    with in_one_sentence(repo_id, revision):
        full_id, is_private = prepare_repository(api, repo_id, private, revision)
        files["README.md"] = _renamed(card, repo_id, full_id, revision).encode()
        message = commit_message or f"Upload {contents.class_name} with msrl_diffusers"
        url, removed = persistently(lambda: _commit(api, full_id, files, message, revision))
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


def _own_card(card: str, contents: Contents, audit: dict | None, repo_id: str, options: dict) -> str:
    """The folder's own card, with what is known of memorization. It must not deny an audit that there is, but in the words of this
    package, which the audit replaces, nor state another.

    Raises:
        InputError: it does; or options are given that are for a rendered one.
    """
    path = contents.folder / "README.md"
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise InputError(
            f"{path} is there already, so --{given[0]} has no effect; write it by msrl card, or remove it."
        )
    if audit is not None:
        card = with_audit(card, audit)
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


LOADS = r'(from_pretrained\((?:pipe\.unet, )?|load_lora_weights\(|load_lora_adapter\()"{}"(?:, revision="[^"]*")?'


def _renamed(card: str, name: str, other: str, revision: str | None = None) -> str:
    """The card with another name to load the model from, and the branch where it is not the main one."""
    option = "" if revision in (None, "main") else f', revision="{revision}"'
    return re.sub(LOADS.format(re.escape(name)), lambda found: f'{found[1]}"{other}"{option}', card)


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
    with in_one_sentence(repo_id, revision):  # retried by the client itself
        api.preupload_lfs_files(repo_id, operations, revision=revision, free_memory=False)
    stale = _stale(api.list_repo_files(repo_id, revision=revision), files)
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return commit.commit_url, tuple(stale)
