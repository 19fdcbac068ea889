"""Where this repository, or the installed copy of it, is, and how a path is written where others read it."""

import re
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
"""The checkout; installed, the folder of the package, where recipes, texts and cards lie as in a checkout."""
PACKAGE = __package__ or "training"
"""`training` from a checkout, `modeling_memory.training` where installed."""
INSTALLED = {  # what the command offers, and what it says of each
    "ask": "Answer a prompt from a store.",
    "remember": "Keep texts as memories in a store.",
    "probe": "Measure how much of its input an embedding holds.",
    "evaluate": "Measure a model on held-out text, with controls.",
    "publish": "Write, check and push a model's Hub folder.",
    "run": "Run a recipe: train, evaluate, publish.",
    "serve": "Answer requests of OpenAI clients, with contexts.",
    "app": "Open a page to try a model in the browser.",
}
COMMAND = "modeling-memory"
ABSOLUTE = re.compile(r"(?<=[=\[,'\" ])/[^\[\],'\"]+")


def program(verb: str) -> str:
    """Return the words that a command is called by.

    >>> program("ask")
    'python -m training.ask'
    """
    return f"python -m {PACKAGE}.{verb}" if PACKAGE == "training" or verb not in INSTALLED else f"{COMMAND} {verb}"


def licence_text() -> str:
    """Return the licence of this code; an installed package keeps it with its metadata."""
    file = REPOSITORY / "LICENSE"
    kept = None if file.is_file() else metadata.distribution(COMMAND).read_text("licenses/LICENSE")
    return file.read_text("utf-8") if kept is None else kept


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
