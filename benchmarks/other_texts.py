"""Text of kinds that no starter was trained on, gathered from what lies on a machine, for measuring only.

```bash
python -m benchmarks.other_texts DATA --to runs/other_texts      # a .jsonl file a kind, a document a line
```

Code is of the Python that runs this and of the system's headers, lists are what installed packages say of themselves,
six languages are the messages of the system's programs. Not all of it is free, so none of it is kept here. `DATA` is a
folder with `haystack_essays.jsonl.gz` (Emerson's essays) and `qmsum_test.jsonl.gz` (meetings, as people spoke there).
"""

import argparse
import gettext
import gzip
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

DOCUMENTS, SHORTEST, LONGEST = 60, 4000, 20_000  # characters
LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "pl": "Polish", "ru": "Russian", "ja": "Japanese"}


def rows(file: Path) -> Iterator[dict]:
    """Objects of a packed .jsonl file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def files(folder: str, pattern: str) -> Iterator[str]:
    """Text files under a folder in an order that mixes them, the same everywhere."""
    found = [path for path in Path(folder).rglob(pattern) if path.is_file() and not path.is_symlink()]
    for path in sorted(found, key=lambda path: hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest()):
        yield path.read_text("utf-8", "ignore")


def messages(language: str) -> Iterator[str]:
    """What the system's programs say in a language: a document a program, sentences only, none left in English."""
    for file in sorted(Path("/usr/share/locale", language, "LC_MESSAGES").glob("*.mo")):
        try:
            with file.open("rb") as source:
                catalog: dict = vars(gettext.GNUTranslations(source))["_catalog"]
        except UnicodeDecodeError:  # some name another encoding than they have
            continue
        said = (text for key, text in sorted(catalog.items(), key=str) if key and text not in (key, key[0]))
        yield "\n".join(text.strip() for text in said if len(text) > 40)


def package_list(headers: Any) -> str:
    """What a package says of itself, a line a fact."""
    return "\n".join(f"{name}: {value}" for name, value in headers.items() if name != "Description")


def kinds(data: Path) -> dict[str, Iterable[str]]:
    """Documents of each kind."""
    packages = {one.metadata["Name"]: one.metadata for one in metadata.distributions() if one.metadata["Name"]}
    lists = [package_list(packages[name]) for name in sorted(packages)]
    return {
        "essays": (row["text"] for row in rows(data / "haystack_essays.jsonl.gz")),
        "meetings": ("\n".join(row["turns"]) for row in rows(data / "qmsum_test.jsonl.gz")),
        "code": files(sysconfig.get_paths()["stdlib"], "[a-z]*.py"),
        "headers": files("/usr/include", "*.h"),
        "lists": ("\n".join(lists[first : first + 4]) for first in range(0, len(lists), 4)),
        **{name: messages(code) for code, name in LANGUAGES.items()},
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.other_texts", description="Gather text of all kinds.")
    parser.add_argument("data", type=Path, help="folder of essays and meetings")
    parser.add_argument("--to", type=Path, required=True, help="folder of the .jsonl files")
    options = parser.parse_args(arguments)
    options.to.mkdir(parents=True, exist_ok=True)
    for name, documents in kinds(options.data).items():
        kept = list(islice((text[:LONGEST] for text in documents if len(text) >= SHORTEST), DOCUMENTS))
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in kept)
        (options.to / f"{name.lower()}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(kept)} documents, {sum(map(len, kept)):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
