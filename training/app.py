"""A page to try a memory model in the browser: paste a document, quote it, ask it, see what was lost.

```bash
python -m training.app model_cards/starter-tiny
```
"""

import argparse
import sys

from .command_line import INTERRUPTED, Parser, device, run_command, whole_number
from .places import program
from .remember import load_memory_model


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(prog=program("app"), description="Open a page to try a memory model in the browser.")
    add = parser.add_argument
    add("model", help="folder or Hub id of a memory model, or the name of a starter")
    add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    add("--port", type=whole_number(), metavar="N", help="port (default: the first free one from 7860 on)")
    add("--device", type=device, default="cpu", help="where the model runs (cpu)")
    add("--threads", type=whole_number(), metavar="N", help="processor threads")
    return parser


def run(options: argparse.Namespace, command: str) -> int:
    """Show the page until interrupted."""
    from modeling_memory.serving.page import page

    model, processor = load_memory_model(options.model, options.device)
    blocks = page(model, processor)
    _, address, _ = blocks.launch(
        server_name=options.host, server_port=options.port, prevent_thread_lock=True, quiet=True
    )
    print(f"the page is at {address}", flush=True)
    blocks.block_thread()  # it returns when interrupted
    return INTERRUPTED


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
