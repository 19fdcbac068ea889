"""A page to try a memory model in the browser: paste a document, quote it, ask it, see what was lost.

```bash
python -m training.app model_cards/starter-tiny
```
"""

import argparse
import socket
import sys

from .command_line import Parser, device, run_command, whole_number
from .places import program
from .remember import load_memory_model
from .serve import serve_until_interrupted


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(prog=program("app"), description="Open a page to try a memory model in the browser.")
    add = parser.add_argument
    add("model", help="folder or Hub id of a memory model, or the name of a starter")
    add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    add("--port", type=whole_number(0), default=7860, metavar="N", help="port (7860; 0 takes a free one)")
    add("--device", type=device, default="cpu", help="where the model runs (cpu)")
    add("--threads", type=whole_number(), metavar="N", help="processor threads")
    return parser


def run(options: argparse.Namespace, command: str) -> int:
    """Show the page until interrupted."""
    import gradio
    from fastapi import FastAPI

    from modeling_memory.serving.page import page

    with socket.create_server((options.host, options.port)) as listening:  # a port that is taken is told first
        blocks = page(*load_memory_model(options.model, options.device))
        # Gradio's own launch gives up on a busy machine, where the first answer takes more than three seconds.
        app = gradio.mount_gradio_app(FastAPI(), blocks, path="/")
        serve_until_interrupted(app, listening, "the page is at {}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
