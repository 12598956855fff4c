"""A Hub on this machine: as much of its HTTP protocol as creating a repository and committing files to it takes."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class HubServer:
    """Context manager. `url` is what HF_ENDPOINT is set to; `repositories[name]` holds `{"private", "files": {path: bytes}}`."""

    def __enter__(self) -> "HubServer":
        self.repositories = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer(*hub.post(self.path.split("?")[0], body, self.headers))

            def do_GET(self):
                self._answer(*hub.get(self.path.split("?")[0]))

            do_HEAD = do_GET

            def _answer(self, status: int, content: dict, headers: dict | None = None):
                text = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def post(self, path: str, body: bytes, headers) -> tuple:
        if not headers.get("Authorization", "").startswith("Bearer hf_"):
            return 401, {"error": "no token"}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, [wanted.get("organization"), wanted["name"]]))
            private = wanted.get("private") or wanted.get("visibility") == "private"  # the name changed with 1.0
            self.repositories.setdefault(name, {"private": private, "files": {}})
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        *_, owner, name, action, _ = path.split("/")
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if action == "commit":
            stored = self.repositories[f"{owner}/{name}"]["files"]
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    stored[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/{owner}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 404, {"error": f"unknown: {path}"}

    def get(self, path: str) -> tuple:
        return 404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"}
