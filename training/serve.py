"""A memory model behind OpenAI's protocol: requests bring a context, or name texts of a store.

```bash
python -m training.serve model_cards/starter-tiny --store runs/notes
curl http://127.0.0.1:8000/v1/completions -H "content-type: application/json" \
    -d '{"prompt": "<copy>", "context": "The sign was newly painted.", "max_tokens": 64}'
```
"""

import argparse
import os
import socket
import sys
from pathlib import Path
from typing import Any

from modeling_memory import MemoryStore
from modeling_memory.serving import Engine, Limits

from .command_line import Parser, device, run_command, whole_number
from .places import program
from .remember import load_memory_model

API_KEY = "MODELING_MEMORY_API_KEY"


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(prog=program("serve"), description="Answer requests of OpenAI clients, with contexts.")
    add = parser.add_argument
    add("model", help="folder or Hub id of a memory model, or the name of a starter")
    add("--store", help="folder of a store, from `remember`, whose texts requests may name")
    add("--name", help="the model's name in requests (default: the last part of MODEL)")
    add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    add("--port", type=whole_number(0), default=8000, metavar="N", help="port (8000; 0 takes a free one)")
    key = os.environ.get(API_KEY)
    add("--api-key", metavar="KEY", default=key, help=f"refuse requests without this key (default: ${API_KEY})")
    add("--requests", type=whole_number(), default=Limits.requests, metavar="N", help="requests at a time (8)")
    add("--context-tokens", type=whole_number(), default=Limits.context_tokens, metavar="N", help="most tokens of "
        "a request's contexts (131072)")  # fmt: skip
    add("--new-tokens", type=whole_number(), default=Limits.new_tokens, metavar="N", help="most tokens of an answer "
        "(1024)")  # fmt: skip
    add("--device", type=device, default="cpu", help="where the model runs (cpu)")
    add("--threads", type=whole_number(), metavar="N", help="processor threads")
    return parser


def serve_until_interrupted(app: Any, listening: socket.socket, told: str) -> None:
    """Say where an application is, and serve it."""
    import uvicorn

    host, port = listening.getsockname()[:2]
    print(told.format(f"http://{host}:{port}"), flush=True)
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    uvicorn.Server(settings).run(sockets=[listening])
    # It returns when it was told to stop. Where the caller's shell ignores Ctrl-C, as for jobs in the background,
    # nothing else says so.
    raise KeyboardInterrupt


def run(options: argparse.Namespace, command: str) -> int:
    """Serve until interrupted."""
    from modeling_memory.serving.api import build_app

    with socket.create_server((options.host, options.port)) as listening:  # a port that is taken is told first
        model, processor = load_memory_model(options.model, options.device)
        store = None if options.store is None else MemoryStore(options.store, model, processor)
        asked = Limits(requests=options.requests, context_tokens=options.context_tokens, new_tokens=options.new_tokens)
        name = options.name or Path(options.model).name
        app = build_app(Engine(model, processor, store, asked), name, options.api_key)
        serve_until_interrupted(app, listening, name + " at {}/v1")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
