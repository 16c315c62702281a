"""`python -m accelerated.serve --weights FILE`: serve the page on this computer, until Ctrl-C.

It listens on the loopback address 127.0.0.1 and on no other, answers only requests that name this computer as their host, and the
page may fetch nothing from elsewhere: it works without a network. Uploads and results are kept in a folder of this process, of
which nothing is left when it ends.

Exit status: 0 when it was ended by Ctrl-C, 1 when it could not begin, 2 for a command line that makes no sense.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerated.command_line import Parser, add_model_options, check_model, matched, sentence

if TYPE_CHECKING:
    from accelerated.predictor import Predictor

ADDRESS = "127.0.0.1"
MAX_FILE_SIZE = 200 * 1024 * 1024  # bytes of an upload: more than 100 megapixels take as JPEG, and most as PNG

# The page's own server, and what the page makes itself; Gradio evaluates the script of a component.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'"
)


def _port(text: str) -> int:
    expected = "a number from 0, which takes any free port, to 65535"
    port = int(matched("[0-9]{1,5}", text, expected)[0])
    if port > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return port


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m accelerated.serve",
        description="Serve a page, on this computer only, that shows what a model sees in a picture.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    parser.add_argument("--port", metavar="N", type=_port, default=7860, help="default: 7860; 0 takes any free one")
    options = parser.parse_args(argv)
    check_model(parser, options)
    return options


def listen(port: int) -> socket.socket:
    """Return a socket that listens on `ADDRESS`. Raises OSError, in one sentence."""
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((ADDRESS, port))
        server.listen(128)
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} of {ADDRESS} is in use: choose another with --port, or 0 for any free one") from None
        raise OSError(f"port {port} of {ADDRESS} cannot be listened on ({error.strerror}): choose another with --port") from None
    return server


def application(predictor: Predictor, port: int) -> Callable[..., Awaitable[None]]:
    """Return the whole ASGI application: the page behind the guard."""
    import gradio as gr
    from fastapi import FastAPI

    from accelerated.serve.page import build

    # The system's own fonts, and small print that is dark enough to read.
    fonts = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme = fonts.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        build(predictor),
        path="/",
        server_name=ADDRESS,
        server_port=port,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MAX_FILE_SIZE,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css_paths=Path(__file__).parent / "page.css",
    )
    return guarded(app, port)


def guarded(app: Callable[..., Awaitable[None]], port: int) -> Callable[..., Awaitable[None]]:
    """Let only pages of this server speak to it, and let its pages fetch from nowhere else.

    A page of a foreign site, open in the same browser, could otherwise send requests here: under its own name (Origin), or
    under a name of its own that it has made to mean 127.0.0.1 (Host).
    """
    hosts = {f"{name}:{port}" for name in (ADDRESS, "localhost")}
    origins = {f"http://{host}" for host in hosts}

    async def guard(scope: MutableMapping[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        async def with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY.encode("ascii"))]
            await send(message)

        if scope["type"] == "http":
            headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
            if headers.get(b"host") not in hosts or headers.get(b"origin", min(origins)) not in origins:
                await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
                await send({"type": "http.response.body", "body": b"This page answers only to its own address.\n"})
                return
        await app(scope, receive, with_policy)

    return guard


def serve(server: socket.socket, predictor: Predictor) -> None:
    """Answer on the listening socket until KeyboardInterrupt, which is raised when everything is put away."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            logging.getLogger("uvicorn.error").disabled = True  # a page that is still open is cut off: no error
            await super().shutdown(sockets)

    port = server.getsockname()[1]
    config = uvicorn.Config(application(predictor, port), log_level="warning", timeout_graceful_shutdown=1)
    print(f"http://{ADDRESS}:{port}  (Ctrl-C ends it)", flush=True)
    Server(config).run(sockets=[server])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    options = _options(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, so that the folder below is deleted
    try:
        # The port first: that it is in use should not be said only after a large model was loaded.
        with tempfile.TemporaryDirectory(prefix="dpt-serve-") as folder, listen(options.port) as server:
            os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}  # read when Gradio is imported
            serve(server, _predictor(options))
    except KeyboardInterrupt:
        return 0
    except (OSError, ValueError, ImportError, MemoryError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1
    return 0


def _predictor(options: argparse.Namespace) -> Predictor:
    """Raise ImportError without Gradio; OSError, ValueError or MemoryError without a usable model; in one sentence each."""
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the page needs Gradio, and {error.name} is not installed: install the project with its extra, "
            "as in pip install '.[serve]'"
        ) from None
    import accelerated

    weights = accelerated.published_file(options.model) if options.weights is None else options.weights
    return accelerated.Predictor(weights, name=options.model, device=options.device, dtype=options.dtype, size=options.size)


if __name__ == "__main__":
    sys.exit(main())
