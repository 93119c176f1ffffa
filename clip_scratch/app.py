"""Search an index in the browser: `python -m clip_scratch.app INDEX`. A local page; nothing leaves the machine."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass

from tyro.conf import Positional

from .errors import UserError, run_command

HOST = "127.0.0.1"


@dataclass
class Arguments:
    """Search an index in the browser, at http://127.0.0.1:PORT."""

    index: Positional[str] = ""  # folder of the index; empty: drawn scenes and the model that comes with the package
    port: int = 7860  # port of the page
    device: str = "auto"  # device for images in queries and for explanations


def main(arguments: Arguments) -> None:
    """Serve the page until Ctrl-C."""
    from .retrieval.index import Index

    _check_port(arguments.port)
    with tempfile.TemporaryDirectory(prefix="clip-scratch-uploads-") as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        try:
            import gradio  # noqa: F401
            import uvicorn
        except ImportError as error:
            raise UserError("the page needs another library: pip install 'clip_scratch[app]'") from error
        from .retrieval.page import build_page

        index = Index.open(arguments.index or _demo(), arguments.device)
        page = build_page(index)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the uploads are deleted
        print(f"{len(index):,} images in {index.folder}: http://{HOST}:{arguments.port} (Ctrl-C stops the page)")
        uvicorn.run(page, host=HOST, port=arguments.port, log_level="warning")


def _demo() -> str:
    """An index of 500 drawn scenes that the model `scenes-tiny` has not seen, in the current folder."""
    from .data.scenes.write import write_scenes
    from .retrieval.indexing import update_index

    folder = "indexes/scenes-demo"
    print(f"no index is given: drawing 500 scenes, and indexing them in {folder}")
    write_scenes("data/scenes-demo", 500, seed=1, exist_ok=True)
    update_index("scenes-tiny", "data/scenes-demo/Images", folder)
    return folder


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} cannot be used ({error}): choose another --port") from error


if __name__ == "__main__":
    import tyro

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m clip_scratch.app")))
