"""Where this repository is, and how a path is written where others read it."""

import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
ABSOLUTE = re.compile(r"(?<=[=\[,'\" ])/[^\[\],'\"]+")


def portable_path(path: str | Path) -> str:
    """Return `path` relative to the current directory or the repository, else its last part only.

    Saved files never carry an absolute path: it would say where somebody's home is and help nobody else.

    >>> portable_path("configuration/recipes/debug_cpu.yaml")
    'configuration/recipes/debug_cpu.yaml'
    >>> portable_path("/somewhere/else/text.txt"), portable_path("untrained:/somewhere/else/model")
    ('text.txt', 'untrained:model')
    """
    prefix, colon, rest = str(path).partition(":")
    if colon and len(prefix) > 1 and prefix.isidentifier() and Path(rest).is_absolute():
        return f"{prefix}:{portable_path(rest)}"
    if not Path(path).is_absolute():
        return str(path)
    for root in (Path.cwd(), REPOSITORY):
        if Path(path).is_relative_to(root):
            return str(Path(path).relative_to(root))
    return Path(path).name


def portable_word(word: str) -> str:
    """Write a word of a command line, `PATH`, `key=PATH` or `key=[PATH, PATH]`, without absolute paths, for a record.

    >>> [portable_word(word) for word in ("output_dir=/somewhere/else/mine", "/somewhere/else/mine", "seed=1")]
    ['output_dir=mine', 'mine', 'seed=1']
    >>> portable_word("data.train=['/somewhere/a.txt', /somewhere/b.txt]")
    "data.train=['a.txt', b.txt]"
    """
    if word.startswith("/"):
        return portable_path(word)
    return ABSOLUTE.sub(lambda found: portable_path(found[0]), word)


def portable_paths(value: Any) -> Any:
    """Apply `portable_path` to every absolute path among the strings of plain data."""
    if isinstance(value, dict):
        return {key: portable_paths(element) for key, element in value.items()}
    if isinstance(value, list):
        return [portable_paths(element) for element in value]
    return portable_path(value) if isinstance(value, str) and value.startswith("/") else value
