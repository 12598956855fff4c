"""Serving the page: on one machine, offline, from one temporary folder that is gone afterwards."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from ..errors import InputError
from .comparison import Comparison
from .gate import Gate
from .page import THEME, build_page


@contextmanager
def serving(comparison: Comparison, host: str = "127.0.0.1", port: int = 7860) -> Iterator[tuple[str, gr.Blocks]]:
    """Within it the page is served in a thread of its own; gives its address, and the page.

    Raises:
        InputError: the address can't be listened on.
    """
    _check_free(host, port)
    with _folder() as folder:
        page = build_page(comparison, folder)
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                run_history=False,
                enable_monitoring=False,
                footer_links=[],
                theme=THEME,
                app_kwargs={"middleware": [Middleware(Gate, folder=folder)]},
            )
            yield url, page
        finally:
            page.close(verbose=False)


@contextmanager
def _folder() -> Iterator[str]:
    """A temporary folder that Gradio takes for its own, with its statistics switched off."""
    with tempfile.TemporaryDirectory(prefix="msrl-demo-") as made:
        folder = str(Path(made).resolve())
        settings = {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield folder
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _check_free(host: str, port: int) -> None:
    """Raise InputError where nothing can listen."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"Nothing can listen on {host}, port {port}: {reason}; give another --host or --port."
        ) from error
