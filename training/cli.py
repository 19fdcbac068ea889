"""The command `modeling-memory`, as pip installs it: every verb is a module with a command line of its own.

```bash
modeling-memory remember starter-tiny notes.txt --to notes --keep-text
modeling-memory ask starter-tiny notes "<copy>"
```
"""

import sys
from importlib import import_module

import typer

from modeling_memory import __version__

from .command_line import MISTAKE
from .places import COMMAND, INSTALLED, PACKAGE

app = typer.Typer(
    name=COMMAND,
    help="Long texts as a few vectors: keep them, ask them, measure, train and serve the models that make them.",
    epilog="Each command has --help, --json and --traceback; the same from a checkout: python -m training.COMMAND",
    add_completion=False,
    pretty_exceptions_enable=False,  # errors that are told are one line, and a fault shows all of its traceback
)


def _add(verb: str, told: str) -> None:
    # All words go on to the verb's own parser, which serves `python -m` as well: one set of options and of errors.
    taken = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}

    @app.command(verb, help=told, add_help_option=False, context_settings=taken)
    def call(words: typer.Context) -> None:
        raise typer.Exit(import_module(f".{verb}", PACKAGE).main(words.args))


for _verb, _told in INSTALLED.items():
    _add(_verb, _told)


@app.callback(invoke_without_command=True)
def version(shown: bool = typer.Option(False, "--version", help="Show the version.")) -> None:
    """Show the version of the package."""
    if shown:
        typer.echo(__version__)
        raise typer.Exit()


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if words[0] not in (*INSTALLED, "--help", "--version"):
        print(
            f"error: {words[0]!r} is no command; known: {', '.join(INSTALLED)}; see {COMMAND} --help", file=sys.stderr
        )
        return MISTAKE
    return int(app(words, prog_name=COMMAND, standalone_mode=False) or 0)


if __name__ == "__main__":
    sys.exit(main())
