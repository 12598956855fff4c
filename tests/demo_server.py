"""`msrl demo` in a process of its own, as a user starts it, and what a test asks of it.

Not in the process of the tests: Gradio leaves sockets and event loops open, which pytest takes for errors.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tiny import tiny_pipeline


INTERRUPTIBLE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # tests in the background ignore it
)
VERB = INTERRUPTIBLE + "import sys; from msrl_diffusers.cli import demo; demo.run(sys.argv[1:])"


class Served:
    """A running demo: its address, and the folder that its temporary one lies in."""

    def __init__(self, url: str, folder: Path):
        self.url, self.address, self.folder = url, urlsplit(url).netloc, folder

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and content; the path goes out as it is, with its dots."""
        connection = http.client.HTTPConnection(self.address, timeout=300)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def generate(self, *values) -> tuple[str, object]:
        """The event that answers a call ("complete" or "error"), and its data."""
        status, content = self.ask("POST", "/gradio_api/call/generate", json.dumps({"data": values}).encode())
        assert status == 200, content
        status, content = self.ask("GET", f"/gradio_api/call/generate/{json.loads(content)['event_id']}")
        assert status == 200
        event, data = content.decode().strip().split("\n\n")[-1].split("\n")
        return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running_demo(folder: Path, code: str = VERB) -> Iterator[Served]:
    """A demo of two tiny pipelines that are saved in `folder`, ended as Ctrl-C ends it; `code` gets its options."""
    for name, seed in (("standard", 0), ("rl", 1)):
        tiny_pipeline(seed).save_pretrained(folder / name)
    (folder / "tmp").mkdir()
    port = str(free_port())
    options = ["--standard", str(folder / "standard"), "--rl", str(folder / "rl"), "--port", port]
    with subprocess.Popen(
        [sys.executable, "-c", code, *options],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "TMPDIR": str(folder / "tmp")},
    ) as process:  # fmt: skip
        try:
            line = process.stdout.readline()
            assert line == f"The page is at http://127.0.0.1:{port}/; Ctrl-C ends it.\n"
            yield Served(line.split()[4].rstrip(";"), folder / "tmp")
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=300)
            assert process.returncode == 0
            assert not list((folder / "tmp").glob("msrl-demo-*")), "the temporary folder is gone"
        finally:
            process.kill()
