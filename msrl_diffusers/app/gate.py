"""Gate: lets through the requests that the page makes, and nothing else of what Gradio's server can do.

Gradio takes uploads, passes on addresses, and serves any file of its cache by its path. The page needs none of it: here the
only files are those the server made, named by a digest and a name of its own, and what a request says is compared with
patterns before anything opens a file.
"""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path


MAX_BODY = 64 * 1024  # bytes; a request holds a handful of numbers
PAGE = (
    r"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/login_check/?|"
    r"/(assets|static|svelte)(/\w[\w.@+-]*)+|"
    r"/gradio_api/(info/?|openapi\.json|app_id/?|startup-events|theme\.css|queue/(data|status)|heartbeat/\w+|call/\w+/\w+)"
)
CALLS = r"/gradio_api/(queue/join|call/\w+|cancel|reset/?)"

Message = MutableMapping[str, object]


class Gate:
    """ASGI middleware: 404 for what the page does not need, 411 and 413 for bodies without a length or too large.

    Args:
        app: the application behind it.
        folder (`str`): where the server keeps the images it made, `folder/DIGEST/NAME.nii.gz`.
    """

    def __init__(self, app: Callable, folder: str | Path):
        self.app = app
        # on Windows parts of a path are separated otherwise
        file = rf"/gradio_api/file={re.escape(str(folder))}[/\\][0-9a-f]{{64}}[/\\]\w[\w.-]*\.nii\.gz"
        self.readable, self.callable = re.compile(f"{PAGE}|{file}", re.ASCII), re.compile(CALLS, re.ASCII)

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable], send: Callable[[Message], Awaitable]):
        """Pass a request on, or answer it."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        status = self.status(scope)
        if status == 200:
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    def status(self, scope: Message) -> int:
        """200 for a request that is passed on, else the answer to it."""
        if scope["type"] != "http":
            return 404
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD"):
            return 200 if self.readable.fullmatch(path) else 404
        if method != "POST" or not self.callable.fullmatch(path):
            return 404
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        # chunks come in any number, whatever the length says
        if not length.isdigit() or b"transfer-encoding" in headers:
            return 411
        return 200 if int(length) <= MAX_BODY else 413
