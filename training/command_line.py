"""What the commands that measure share: one sentence for a user's mistake, and their own words for the record."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import transformers

from training.recipes.strict_yaml import portable_word


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, str], Any],
    arguments: Sequence[str] | None,
) -> int:
    """Run a command line.

    Args:
        parser (`argparse.ArgumentParser`): Its `prog` is the command, `python -m ...`.
        run (`Callable`): Does the work, from the options and the command line as the record shall name it.
        arguments (`Sequence[str]`, *optional*): The words behind the command; default: those of the process.

    Returns:
        `int`: The exit status: 0, 2 for a mistake of the user (a `ValueError`, told in one line), 130 if interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    transformers.utils.logging.disable_progress_bar()
    try:
        run(options, f"{parser.prog} {shlex.join(map(portable_word, words))}".rstrip())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0
