"""The page of the claims, from their record: what was run, the overview, each statement, the original's faults."""

import re
import textwrap
from typing import Any

from benchmarks.claims.evidence import Study, Verdict
from benchmarks.claims.figures import is_drawn
from benchmarks.claims.statements import Decided, Statement, count_parts, load_statements, verdict_of

WIDTH = 119
OWN = "Four of our own"

NOT_SETTLED = "not settled: its checkpoints are not public"
FAULTS = (
    (
        'Half of a "16-layer" autoencoder is trained; in memory models untrained layers stand above it',
        "measured, with what the statement says of it",
        "c",
    ),
    ("The attention mask of the whole text is given to every chunk's decoder call", NOT_SETTLED, None),
    ("The benchmark wrapper never calls the encoder, so benchmarks may be of the bare decoder", NOT_SETTLED, None),
    ("The copy loss is divided by all chunks and so reported halved", "losses here are means over targets", "13"),
    (
        "The first token of each chunk is never trained, and scored all the same",
        "measured, with what the statement says of it",
        "a",
    ),
    ('"Frozen" encoders are given a new, trainable token table', "frozen encoders keep their table here", "1"),
    ("The script for Qwen overwrites the pretrained weights with random ones", "Qwen was not run", "5"),
    ("FineMath was once evaluated on its train split", "splits share no text here", "4"),
    (
        "Pretrained encoders are inverted without attention mask, so that the last token may be padding",
        "the mask is passed, and the last real token read",
        "3",
    ),
    ("Seeds are not fixed", "seeds are fixed and recorded here", "18"),
    ("The recurrent baseline loses the last token of each chunk", "it keeps all tokens here", "18"),
)


def slug(heading: str) -> str:
    """The anchor that a heading gets on GitHub.

    >>> slug("1. An autoencoder's vector, and more")
    '1-an-autoencoders-vector-and-more'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def heading_of(key: str, statement: Statement) -> str:
    """The heading of a statement."""
    return f"{key}. {statement.title}" if key.isdigit() else f"({key}) {statement.title}"


def wrap(text: str, first: str = "", rest: str = "") -> list[str]:
    """Break a paragraph into lines of the width of this repository's pages, never before a percent sign."""
    return textwrap.wrap(
        " ".join(text.split()).replace(" %", "\u00a0%"),
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def decide_all(record: dict[str, Any]) -> dict[str, tuple[Statement, list[Decided]]]:
    """Decide every statement from a record."""
    study = Study(record)
    return {key: (statement, statement.decide(study)) for key, statement in load_statements().items()}


def shown_verdict(decided: list[Decided]) -> str:
    """The joint verdict in bold, with the parts behind it where they differ."""
    parts = count_parts(decided)
    return f"**{verdict_of(decided).value}**" + (f" ({parts})" if parts else "")


def overview_lines(record: dict[str, Any], link: str) -> list[str]:
    """One row a statement, and how many came to which verdict."""
    found = decide_all(record)
    lines = ["| | statement | verdict | parts |", "|---|---|---|---|"]
    for key, (statement, decided) in found.items():
        lines.append(
            f"| {key} | [{statement.title}](#{slug(heading_of(key, statement))}) | {verdict_of(decided).value} | "
            f"{count_parts(decided) or f'all {sum(one.part.counts for one in decided)}'} |"
        )
    counts = {verdict: sum(verdict_of(decided) is verdict for _, decided in found.values()) for verdict in Verdict}
    shown = ", ".join(f"{verdict.value} {count}" for verdict, count in counts.items() if count)
    return [*lines, "", f"Of {len(found)}: {shown}."]


def statement_lines(record: dict[str, Any], link: str) -> list[str]:
    """Each statement with what the paper says, what was run, what came out, and the verdict."""
    lines: list[str] = []
    for key, (statement, decided) in decide_all(record).items():
        if key == "a":
            lines += [f"## {OWN}", ""]
        lines += [f"### {heading_of(key, statement)}", "", f"Verdict: {shown_verdict(decided)}", ""]
        lines += [*wrap(f"*{'Paper' if key.isdigit() else 'Original'}.* {statement.paper}"), ""]
        lines += [*wrap(f"*Run.* {statement.ran}. *Held equal:* {statement.held}."), ""]
        for one in decided:
            came_out = "; ".join(one.lines)
            mark = "" if one.part.counts else "beside it, "
            lines += wrap(f"- {mark}{one.part.claim}: **{one.verdict.value}**. {came_out}.", rest="  ")
            if one.part.criterion:
                lines += wrap(f"*Decided by* {one.part.criterion}.", "  ", "  ")
        lines.append("")
        if statement.notes:
            lines += [*wrap(f"*Differs.* {statement.notes}"), ""]
        if statement.figure and statement.figure["shows"] and is_drawn(statement.figure["name"], record):
            lines += [f"![{statement.figure['shows']}](figures/claims_{statement.figure['name']}.png)", ""]
    return lines[:-1]


def fault_lines(record: dict[str, Any], link: str) -> list[str]:
    """Faults of the original's code that put published rows in doubt, and what is settled of them here."""
    found = decide_all(record)
    lines = ["| fault of the original's code | here |", "|---|---|"]
    for fault, here, key in FAULTS:
        seen = ""
        if key is not None:
            statement, decided = found[key]
            seen = f", see [{key}](#{slug(heading_of(key, statement))}): {verdict_of(decided).value}"
        lines.append(f"| {fault} | {here}{seen} |")
    return lines


def scale_lines(record: dict[str, Any], link: str) -> list[str]:
    """How large the study is."""
    stages, cells = record["stages"].values(), record["metrics"]["cells"].values()
    recipe = record["recipe"]
    others = [cell for cell in cells if not cell["name"].startswith("stage_") and cell["steps"]]
    tokens = sum(stage["text_tokens"] for stage in stages) + sum(cell["text_tokens"] for cell in others)
    seconds = sum(stage["seconds"] for stage in stages) + sum(cell["seconds"] for cell in cells)
    widths = sorted({stage["model"]["encoder"]["hidden_size"] for stage in stages if "encoder" in stage["model"]})
    missing = record["missing_stages"]
    text = (
        f"{len(stages)} models of the recipe and {len(others)} beside it, widths {widths[0]} to {widths[-1]}, a "
        f"vocabulary of {recipe['tokenizer']['vocab_size']:,}, {tokens / 1e6:.0f} million tokens of training in all, "
        f"{seconds / 3600:.1f} hours of training and measuring, much of it beside other work on two cores. "
        f"{len(record['metrics']['cells'])} measurements. "
    )
    if missing:
        text += f"Not trained: {', '.join(f'`{name}`' for name in missing)}. "
    return wrap(text)


def headline_lines(record: dict[str, Any], link: str) -> list[str]:
    """The README's one line."""
    found = decide_all(record)
    counts = {verdict: sum(verdict_of(decided) is verdict for _, decided in found.values()) for verdict in Verdict}
    shown = ", ".join(f"{verdict.value}: {count}" for verdict, count in counts.items() if count)
    return wrap(f"The paper's {sum(key.isdigit() for key in found)} statements and four of our own, each with its "
                f"verdict: {shown}. [All of them](docs/reproducing.md).")  # fmt: skip
