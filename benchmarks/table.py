"""What a table is, how its cells are written, and the one printer of all tables.

A table is made by one function, `record -> Table`: the rows, headings first, and a note. Where the numbers come from
is no business of that function: [`print_table`] ends every table with a link to its records, commit and machine.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]

TOKENS = (
    "Intervals are of 95% and take every token as independent (Wilson); errors cluster in texts, so the true ones are "
    "wider."
)
WIDTH, NUMBER_WIDTH = 100, 30
_NUMBER = re.compile(r"[-+*~]*\d")


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        rows (`list[list[str]]`): Cells; the first row is the headings.
        note (`str`): What a reader must know beside the numbers.
        text (`list[str]`): Lines that stand in the place of a table: what a program printed.
    """

    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    text: list[str] = field(default_factory=list)

    def cell(self, row: str, column: str | int) -> str:
        """Return the cell of a row, named by its first cell, under a heading.

        >>> Table([["model", "loss"], ["small", "3.2"]]).cell("small", "loss")
        '3.2'
        """
        place = self.rows[0].index(column) if isinstance(column, str) else column
        return next(cells for cells in self.rows[1:] if cells[0] == row)[place]


def print_table(table: Table, sources: Sequence[tuple[Record, str]]) -> list[str]:
    """Lines of a table in Markdown.

    Args:
        table (`Table`): The table.
        sources (`Sequence[tuple[dict, str]]`): The records it was made from, each with its link.

    >>> record = {"code": {"commit": None, "dirty": False}, "hardware": {"threads": 1, "device": "cpu", "cpu": "x"},
    ...           "run": {"created_at": "2026-01-02T"}}
    >>> print("\\n".join(print_table(Table([["model", "loss"], ["small", "3.2"]], "Nats."), [(record, "r.json")])))
    | model | loss |
    |---|---:|
    | small | 3.2 |
    <BLANKLINE>
    Nats. [Record](r.json): no commit, 1 thread on x, 2026-01-02.
    """
    lines = ["```text", *table.text, "```"] if table.text else []
    if table.rows:
        head, *body = table.rows
        if any(len(cells) != len(head) for cells in body):
            raise ValueError(f"a table has rows of {sorted({len(cells) for cells in table.rows})} cells")
        numbers = [all(map(_is_number, column)) for column in zip(*body, strict=True)]
        rule = ["---:" if place and right else "---" for place, right in enumerate(numbers or [False] * len(head))]
        lines += [f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(cells)} |" for cells in body)]
    note = " ".join([table.note, *(source(record, link) for record, link in sources)]).strip()
    return [*lines, "", *textwrap.wrap(note, WIDTH, break_long_words=False, break_on_hyphens=False)]


def _is_number(cell: str) -> bool:
    """Whether a cell is a number, with its interval perhaps, or empty; a sentence that begins with one is not."""
    return not cell or (len(cell) <= NUMBER_WIDTH and _NUMBER.match(cell) is not None)


def source(record: Record, link: str) -> str:
    """Say where the numbers of a record come from."""
    commit, hardware = record["code"]["commit"], record["hardware"]
    code = f"commit {commit[:7]}" if commit else "no commit"
    if record["code"]["dirty"]:
        code += " with uncommitted changes"
    device = hardware["cpu"] if hardware["device"] == "cpu" else hardware["device"]
    threads, day = count(hardware["threads"], "thread"), record["run"]["created_at"][:10]
    return f"[Record]({link}): {code}, {threads} on {device}, {day}."


def pick(record: Record, path: str) -> Any:
    """Return the value at a dotted path.

    Raises:
        ValueError: If the record has no such key.

    >>> pick({"a": {"b": 1}}, "a.b")
    1
    """
    value: Any = record
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"the record has no {path} (no {key!r}); another version wrote it: measure again")
        value = value[key]
    return value


def percent(values: Record, name: str = "token_accuracy", digits: int = 1) -> str:
    """A share with its interval, where the record has one.

    >>> percent({"token_accuracy": 0.987, "token_accuracy_interval": [0.98, 0.992]})
    '98.7% (98.0 to 99.2)'
    """
    shown = f"{values[name]:.{digits}%}"
    if f"{name}_interval" not in values:
        return shown
    low, high = values[f"{name}_interval"]
    return f"{shown} ({100 * low:.{digits}f} to {100 * high:.{digits}f})"


def quartiles(spread: Record, digits: int = 1) -> str:
    """A median with its quartiles.

    >>> quartiles({"median": 2.0, "first_quartile": 1.5, "third_quartile": 3.0})
    '2.0 (1.5 to 3.0)'
    """
    low, high = spread["first_quartile"], spread["third_quartile"]
    return f"{spread['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def duration(seconds: float) -> str:
    """Seconds with three digits, as milliseconds below one.

    >>> [duration(value) for value in (0.00123, 0.0456, 3.21, 123.4)]
    ['1.23 ms', '45.6 ms', '3.21 s', '123 s']
    """
    value, unit = (1000 * seconds, "ms") if seconds < 1 else (seconds, "s")
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def count(number: int, noun: str) -> str:
    """A number and its noun.

    >>> count(1, "thread"), count(2, "thread")
    ('1 thread', '2 threads')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
