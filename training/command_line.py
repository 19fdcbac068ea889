"""What all commands share: how options are read, and how a command ends.

| ends | status | on standard error |
|---|---|---|
| done | 0, or what the command returns | |
| a user's mistake: a wrong option, file, recipe or model | 2 | one line: what was given, expected, to be done |
| a failure: a loss that is no number, a folder that does not load back, memory that runs out | 1 | one line |
| SIGTERM, Ctrl-C | 143, 130 | one line |
| a fault of this package | 1 | a traceback |

With `--json` standard output holds one JSON object and nothing else: the result, or `error` and `status`.
`--traceback`, or `MODELING_MEMORY_TRACEBACK=1` in the environment, shows where any of them came from.
"""

import argparse
import errno
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from safetensors import SafetensorError

from .places import portable_word

INTERRUPTED = 130
MISTAKE = 2
TRACEBACK = "MODELING_MEMORY_TRACEBACK"
OWN_CODE = ("training", "modeling_memory", "benchmarks")
# Which extra of the package brings a module that may be missing.
EXTRAS = {
    "train": ("accelerate", "datasets", "matplotlib", "peft", "pyarrow", "sacrebleu"),
    "eval": ("lm_eval", "immutabledict", "langdetect", "nltk"),
    "serve": ("fastapi", "starlette", "uvicorn"),
    "app": ("gradio",),
    "gguf": ("gguf",),
}
# What can be done about an operating system's refusal; the rest speak for themselves.
REMEDIES = {
    errno.ENOENT: "correct the path",
    errno.ENOTDIR: "a part of the path is a file; correct the path",
    errno.EISDIR: "that is a folder; name a file",
    errno.EACCES: "choose a place that you may read and write",
    errno.EPERM: "choose a place that you may read and write",
    errno.EROFS: "choose a place that can be written",
    errno.ENOSPC: "free space on the disk and rerun the same command to resume",
}


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, shown as every other mistake of a user is."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{message}; see {self.prog} --help")


def whole_number(minimum: int = 1) -> Callable[[str], int]:
    """Return a reader of whole numbers from `minimum` on, for `add_argument(type=...)`.

    >>> whole_number()("12")
    12
    >>> whole_number()("-1")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: '-1': expected a whole number of 1 or more
    """

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of {minimum} or more")
        return value

    return read


def positive_number(text: str) -> float:
    """Read a number above 0, for `add_argument(type=...)`.

    >>> positive_number("1e-4")
    0.0001
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:  # nan is not, either
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value


def device(text: str) -> torch.device:
    """Read a device that is there, for `add_argument(type=...)`.

    >>> device("cpu")
    device(type='cpu')
    """
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's three ways to say no
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine; try cpu or cuda") from error
    return found


def named_file(text: str) -> tuple[str, str]:
    """Read `NAME=FILE`, for `add_argument(type=...)`.

    >>> named_file("news=news.txt")
    ('news', 'news.txt')
    """
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=FILE, for example news=news.parquet")
    return name, file


def check_place(path: str | Path) -> Path:
    """Check that a file or folder of results can be made at `path`, before anything is measured.

    Raises:
        ValueError: If it cannot.
    """
    place = Path(path).expanduser()
    above = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
    if above != place and not above.is_dir():
        raise ValueError(f"{path} cannot be made: {above} is a file; name another place for the results")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{path} cannot be written; name another place for the results")
    return place


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, str], Any],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a command line and say how it ended; every command ends here.

    An option `--threads` is obeyed here as well.

    Args:
        parser (`argparse.ArgumentParser`): Its `prog` is the command; gets `--json` and `--traceback`.
        run (`Callable`): Does the work, from the options and the command line as the record shall name it. A whole
            number that it returns is the exit status, a mapping is the result that `--json` prints, a pair both.
        arguments (`Sequence[str]`, *optional*): The words after the command; default: those of the process.

    Returns:
        `int`: The exit status, as the table above has it.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, all else on stderr")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    as_json = "--json" in words
    show = "--traceback" in words or bool(os.environ.get(TRACEBACK))
    transformers.utils.logging.disable_progress_bar()
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            options = parser.parse_args(words)
            if getattr(options, "threads", None):
                torch.set_num_threads(options.threads)
            recorded = [portable_word(word) for word in words if word not in ("--json", "--traceback")]
            ended = run(options, f"{parser.prog} {shlex.join(recorded)}".rstrip())
        status, result = ended if isinstance(ended, tuple) else (ended if type(ended) is int else 0, ended)
        if as_json:
            print(json.dumps(result, ensure_ascii=False, default=str))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of a pipe has had enough: no error, and no complaint at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        explained = explain(error)
        if explained is None or show:
            raise
        line, status = explained
        print(line, file=sys.stderr)
        if as_json:
            print(json.dumps({"error": line.strip().removeprefix("error: "), "status": status}, ensure_ascii=False))
        return status


def explain(error: BaseException) -> tuple[str, int] | None:
    r"""Return the line and the exit status that an error ends a command with; `None` for a fault of this package.

    >>> explain(ValueError("seed is 'a',\n  expected a number"))
    ("error: seed is 'a', expected a number", 2)
    >>> explain(FileNotFoundError(2, "No such file or directory", "text.txt"))
    ('error: text.txt: No such file or directory; correct the path', 2)
    >>> explain(KeyError("hidden_size")) is None
    True
    """
    if isinstance(error, KeyboardInterrupt):
        return "\ninterrupted: rerun the same command to resume", INTERRUPTED
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        remedy = REMEDIES.get(error.errno)
        named = "" if error.filename is None else f"{error.filename}: "
        text = f"{named}{error.strerror}" + (f"; {remedy}" if remedy else "")
    if isinstance(error, (ValueError, OSError, SafetensorError)):
        return f"error: {text}", MISTAKE
    if isinstance(error, ImportError) and not str(error.name).startswith(OWN_CODE):
        extra = next((name for name, modules in EXTRAS.items() if str(error.name).partition(".")[0] in modules), None)
        named = "what is missing with pip" if extra is None else f'it with: pip install "modeling-memory[{extra}]"'
        return f"error: {text}; install {named}", MISTAKE
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in text:
        return f"error: memory ran out ({text}); take a smaller batch, shorter rows or a smaller model", 1
    # Errors of our own classes are written for a reader; any other is a bug, and its traceback is wanted.
    if isinstance(error, RuntimeError) and type(error).__module__.startswith(OWN_CODE):
        return f"error: {text}", getattr(error, "exit_status", 1)
    return None
