"""A Hub on this machine: as much of its HTTP protocol as `huggingface_hub` uses to make repositories, commit files to them
(large ones by LFS, in one part or several) and load them again, and it fails when it is told to. It speaks no Xet."""

import base64
import hashlib
import json
import math
import os
import re
import socket
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import RLock, Thread
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import constants, hf_api


LFS_SUFFIXES = (".safetensors", ".bin", ".pt")  # as a new repository's .gitattributes has them
LFS_SIZE = 10 * 1024**2
TOKEN = "hf_local"


@dataclass
class Failure:
    """What happens to the next requests instead of an answer. `cut`: `"request"` hangs up halfway through the request's
    body, `"answer"` carries the request out and hangs up, `"body"` hangs up halfway through the answer's body."""

    method: str
    path: str
    status: int | None = None
    headers: dict = field(default_factory=dict)
    cut: str | None = None
    times: float = 1
    happened: int = 0


@dataclass
class Answer:
    status: int = 200
    content: dict | list | bytes = b""
    headers: dict = field(default_factory=dict)


class HubServer:
    """Context manager. `url` is what HF_ENDPOINT is set to; `repositories[name]` holds `{"private", "files": {path: bytes}}`
    of the main branch, and `branches` and `commits`. The environment's HF_HUB_DISABLE_XET is set within it.

    Args:
        part_size: larger LFS files are uploaded in parts of so many bytes.
        public: names of repositories that exist already, and are public.
    """

    def __init__(self, part_size: float = math.inf, public: tuple[str, ...] = ()):
        self.repositories: dict[str, dict] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.failures: list[Failure] = []
        self.part_size = part_size
        self._lock = RLock()
        for name in public:
            self._create(name, private=False)

    def __enter__(self) -> "HubServer":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def handle_request(self):
                hub.handle(self)

            do_GET = do_HEAD = do_POST = do_PUT = handle_request

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self._xet = os.environ.get("HF_HUB_DISABLE_XET")
        os.environ["HF_HUB_DISABLE_XET"] = "1"
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._xet is None:
            del os.environ["HF_HUB_DISABLE_XET"]
        else:
            os.environ["HF_HUB_DISABLE_XET"] = self._xet

    def environment(self, cache: Path) -> dict[str, str]:
        """For another process: this Hub, a token, caches in `cache`, and the helpers of the tests."""
        inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        return inherited | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(cache),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
        }

    def connect(self, monkeypatch, cache: Path) -> list[float]:
        """Let this process' client speak to this Hub, with a token and a cache of its own. Returns the list of its pauses in
        seconds, none of which it really makes."""
        pauses: list[float] = []
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in (
            ("ENDPOINT", self.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", template),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_CACHE", str(cache)),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(time, "sleep", pauses.append)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        return pauses

    def fail(self, method: str, path: str, **how) -> Failure:
        """Let requests fail whose path has `path` in it; see `Failure`."""
        self.failures.append(Failure(method, path, **how))
        return self.failures[-1]

    def count(self, method: str, path: str) -> int:
        """Requests so far by `method` to paths with `path` in them."""
        return sum(line.startswith(f"{method} ") and path in line for line in self.requests)

    # ------------------------------------------------------------------------------------------------------- transport

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        with self._lock:
            self.requests.append(f"{request.command} {path}")
            failure = self._failure(request.command, path)
        length = int(request.headers.get("Content-Length", 0))
        if failure and failure.cut == "request":
            request.rfile.read(length // 2)
            return _hang_up(request)
        body = request.rfile.read(length)
        if failure and failure.status:
            answer = Answer(failure.status, {"error": f"told to answer {failure.status}"}, failure.headers)
        else:
            with self._lock:
                answer = self._answer(request.command, path, body, request.headers)
        if failure and failure.cut == "answer":
            return _hang_up(request)
        content = answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
        status, headers = answer.status, dict(answer.headers)
        span = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if span and status == 200:
            headers["Content-Range"] = f"bytes {span[1]}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[int(span[1]) :]
        request.send_response(status)
        kind = "application/octet-stream" if isinstance(answer.content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return None
        if failure and failure.cut == "body":
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            return _hang_up(request)
        request.wfile.write(content)
        return None

    def _failure(self, method: str, path: str) -> Failure | None:
        for failure in self.failures:
            if failure.method == method and failure.path in path and failure.happened < failure.times:
                failure.happened += 1
                return failure
        return None

    # -------------------------------------------------------------------------------------------------------- protocol

    def _answer(self, method: str, path: str, body: bytes, headers) -> Answer:
        for pattern, handler in (
            (r"/lfs/(?P<oid>\w+)(/(?P<part>\d+))?", self._store),  # signed addresses: they need no token
            (r"/cdn/(?P<oid>\w+)", self._download),
        ):
            found = re.fullmatch(pattern, path)
            if found:
                return handler(method, body, **found.groupdict())
        authorized = headers.get("Authorization", "") == f"Bearer {TOKEN}"
        if method in ("GET", "HEAD"):
            return self._read(path, authorized)
        if not authorized and path != "/api/validate-yaml":
            return Answer(401, {"error": "Invalid credentials in Authorization header"})
        return self._write(path, json.loads(body) if "/commit/" not in path else body)

    def _read(self, path: str, authorized: bool) -> Answer:
        if path == "/api/whoami-v2":
            return Answer(200 if authorized else 401, {"name": "somebody", "type": "user", "orgs": []})
        found = re.fullmatch(
            r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>.+)|/tree/(?P<tree>.+))?", path
        ) or re.fullmatch(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path)
        if found is None:
            return Answer(404, {"error": "not found"})
        parts = found.groupdict()
        repository = self.repositories.get(parts["name"])
        if repository is None or (repository["private"] and not authorized):
            code = 404 if authorized else 401
            return Answer(code, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        revision = parts.get("tree") or parts.get("revision") or "main"
        commit = repository["branches"].get(revision, revision)
        if commit not in repository["commits"]:
            return Answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        files = repository["commits"][commit]
        if parts.get("tree"):
            return Answer(200, [_entry(name, content) for name, content in sorted(files.items())])
        if parts.get("file"):
            return self._resolve(parts["file"], files, commit)
        return Answer(
            200,
            {
                "id": parts["name"],
                "sha": commit,
                "private": repository["private"],
                "siblings": [{"rfilename": name} for name in sorted(files)],
                "tags": [],
            },
        )

    def _resolve(self, name: str, files: dict[str, bytes], commit: str) -> Answer:
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            return Answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        content = files[name]
        if not _is_large(name, len(content)):
            return Answer(200, content, {**headers, "ETag": f'"{_git_hash(content)}"'})
        oid = _sha256(content)
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content)), "Location": f"/cdn/{oid}"}
        return Answer(302, b"", {**headers, **linked})

    def _download(self, method: str, body: bytes, oid: str) -> Answer:
        commit = next(  # carried along, as the client follows redirects that stay on this host
            commit
            for repository in self.repositories.values()
            for commit, files in repository["commits"].items()
            if any(_sha256(content) == oid for content in files.values())
        )
        return Answer(200, self.lfs[oid], {"ETag": f'"{oid}"', "X-Repo-Commit": commit})

    def _write(self, path: str, body) -> Answer:
        if path == "/api/repos/create":
            name = f"{body.get('organization') or 'somebody'}/{body['name']}"
            known = name in self.repositories
            if not known:  # the field's name changed with huggingface_hub 1.0
                self._create(name, private=bool(body.get("private") or body.get("visibility") == "private"))
            return Answer(409 if known else 200, {"url": f"{self.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            errors = [{"message": message} for message in _metadata_errors(body["content"])]
            return Answer(400 if errors else 200, {"errors": errors, "warnings": []})
        found = re.fullmatch(
            r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<action>preupload|commit|branch)/(?P<branch>.+)", path
        ) or re.fullmatch(r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/(?P<action>batch|verify)", path)
        if found is None:
            return Answer(404, {"error": f"unknown: {path}"})
        repository = self.repositories.get(found["name"])
        if repository is None:
            return Answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if found["action"] in ("batch", "verify"):
            return getattr(self, f"_{found['action']}")(found["name"], body)
        if found["action"] == "branch":
            known = found["branch"] in repository["branches"]
            repository["branches"].setdefault(found["branch"], repository["branches"]["main"])
            return Answer(409 if known else 200, {})
        if found["branch"] not in repository["branches"]:
            return Answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        return getattr(self, f"_{found['action']}")(repository, found["name"], found["branch"], body)

    def _create(self, name: str, private: bool) -> None:
        files = {".gitattributes": "".join(f"*{suffix} filter=lfs\n" for suffix in LFS_SUFFIXES).encode()}
        self.repositories[name] = {"private": private, "files": files, "branches": {}, "commits": {}}
        self._record(self.repositories[name], "main", files)

    def _preupload(self, repository: dict, name: str, branch: str, body: dict) -> Answer:
        files, answers = repository["commits"][repository["branches"][branch]], []
        for file in body["files"]:
            large, content = _is_large(file["path"], file["size"]), files.get(file["path"])
            digest = _sha256 if large else _git_hash
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None if content is None else digest(content),
                }
            )
        return Answer(200, {"files": answers})

    def _batch(self, name: str, body: dict) -> Answer:
        objects = []
        for wanted in body["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            address, header = f"{self.url}/lfs/{oid}", {}
            if size > self.part_size:
                count = math.ceil(size / self.part_size)
                header = {f"{part:05d}": f"{address}/{part}" for part in range(1, count + 1)}
                header["chunk_size"] = str(self.part_size)
            actions = {
                "upload": {"href": address, "header": header},
                "verify": {"href": f"{self.url}/{name}.git/info/lfs/objects/verify"},
            }
            objects.append({"oid": oid, "size": size, **({} if oid in self.lfs else {"actions": actions})})
        return Answer(200, {"transfer": "multipart" if math.isfinite(self.part_size) else "basic", "objects": objects})

    def _store(self, method: str, body: bytes, oid: str, part: str | None) -> Answer:
        if method == "PUT" and part:
            self.parts.setdefault(oid, {})[int(part)] = body
            return Answer(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        content = body
        if method == "POST":  # all parts are there
            wanted = json.loads(body)["parts"]
            content = b"".join(self.parts[oid][part["partNumber"]] for part in wanted)
        if _sha256(content) != oid:
            return Answer(400, {"error": "this is not what was announced"})
        self.lfs[oid] = content
        return Answer(200, {})

    def _verify(self, name: str, body: dict) -> Answer:
        whole = len(self.lfs.get(body["oid"], b"")) == body["size"]
        return Answer(200 if whole else 404, {} if whole else {"error": "not uploaded"})

    def _commit(self, repository: dict, name: str, branch: str, body: bytes) -> Answer:
        files = dict(repository["commits"][repository["branches"][branch]])
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile" and value["oid"] not in self.lfs:
                return Answer(400, {"error": f"{value['path']} was not uploaded"})
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.lfs[value["oid"]]
        commit = self._record(repository, branch, files)
        return Answer(200, {"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit})

    def _record(self, repository: dict, branch: str, files: dict[str, bytes]) -> str:
        commit = hashlib.sha1(f"{len(repository['commits'])}{branch}".encode()).hexdigest()
        repository["commits"][commit] = files
        repository["branches"][branch] = commit
        if branch == "main":
            repository["files"] = files
        return commit


def _hang_up(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True
    request.connection.shutdown(socket.SHUT_RDWR)


def _is_large(name: str, size: int) -> bool:
    return name.endswith(LFS_SUFFIXES) or size > LFS_SIZE


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(name: str, content: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(content), "oid": _git_hash(content)}
    if _is_large(name, len(content)):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def _metadata_errors(card: str) -> list[str]:
    """What is wrong with a card's metadata, by the Hub's rules for the fields that cards here have."""
    block = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    if block is None:
        return []
    try:
        metadata = yaml.safe_load(block[1]) or {}
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    errors = [
        f'"{name}" must be a string' for name in ("license", "library_name", "pipeline_tag") if not isinstance(metadata.get(name, ""), str)
    ]  # fmt: skip
    for name in ("tags", "datasets", "metrics"):
        value = metadata.get(name, [])
        if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            errors.append(f'"{name}" must be a list of strings')
    for model in metadata.get("model-index", []):
        for result in model.get("results", []):
            complete = "type" in result.get("task", {}) and {"type", "name"} <= result.get("dataset", {}).keys()
            if not (complete and all({"type", "value"} <= metric.keys() for metric in result.get("metrics", [{}]))):
                errors.append('"model-index" has an incomplete result')
    return errors
