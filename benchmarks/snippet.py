"""Run a snippet of the README as a reader would, and record what it printed.

```bash
python -m benchmarks.snippet use        # the code after <!-- snippet:use -->; record: benchmarks/results/use.json
```

The code runs in a process of its own in the repository's root, without network, exactly as it stands on the page.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import describe_run, save_record
from training.places import REPOSITORY, portable_path
from training.records.record import read_json

# Of a run whose models a snippet loads: what tells which run it was.
RUN_RECORD = "model_cards/starter-tiny/record.json"


def find_snippet(page: str, name: str) -> str:
    """Return the code block after a marker.

    Raises:
        ValueError: If there is none.

    >>> find_snippet("<!-- snippet:use -->\\n```python\\nprint(1)\\n```\\n", "use")
    'print(1)\\n'
    """
    found = re.search(rf"^<!-- snippet:{re.escape(name)} -->\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no python block after <!-- snippet:{name} -->")
    return found[1]


def run_snippet(code: str, folder: Path) -> str:
    """Run code in a fresh process and return what it printed.

    Raises:
        ValueError: If it fails; the message ends with its last line of error.
    """
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"the snippet ended with status {done.returncode}: {last}")
    return done.stdout


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.snippet", description="Run a snippet of the README and record what it printed."
    )
    parser.add_argument("name", help="name in the marker <!-- snippet:NAME -->")
    parser.add_argument("--page", default=str(REPOSITORY / "README.md"), help="the page (default: README.md)")
    parser.add_argument("--out", help="where the record goes (default: benchmarks/results/NAME.json)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 2 if there is no such snippet or it fails."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments)
    words = ["python", "-m", "benchmarks.snippet", *map(portable_path, arguments)]
    try:
        code = find_snippet(Path(options.page).read_text(encoding="utf-8"), options.name)
        record: dict[str, Any] = describe_run("snippet", shlex.join(words), {})
        output = run_snippet(code, REPOSITORY)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    trained = read_json(REPOSITORY / RUN_RECORD)
    record.update(
        snippet=code,
        output=output,
        trained_by=None if trained is None else {key: trained[key] for key in ("identity", "code") if key in trained},
    )
    print(output, end="")
    print(f"record: {portable_path(save_record(record, options.name, options.out))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
