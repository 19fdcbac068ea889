"""Tables of the record of `benchmarks.smollm2`."""

from typing import Any

from benchmarks.smollm2_rows import RATES, SELECTIONS
from benchmarks.table import Record, Table, duration, pick

UNITS = {4: "4 tokens", 8: "8 tokens", 16: "16 tokens"}
TITLES = {
    "full": "full text",
    "none": "nothing",
    "memories": "memories",
    "another text's": "another text's memories",
    "last": "the last tokens",
    "first": "the first tokens",
    "every": "every n-th token",
    "MiniLM": "nearest sentences by MiniLM",
    "BM25": "nearest sentences by BM25",
}


def title(row: str) -> str:
    """What a row is called on a page.

    >>> title("memories/4"), title("last/8, adapters on"), title("none")
    ('memories, 4 tokens a position', 'the last tokens, 8 tokens a position, adapters on', 'nothing')
    """
    name, comma, tuned = row.partition(", ")
    kind, _, rate = name.partition("/")
    words = TITLES[kind] + (f", {rate} tokens a position" if rate else "")
    return f"{words}{comma}{tuned}"


def number(cell: dict[str, Any] | None, digits: int = 3, unit: float = 1.0) -> str:
    """A mean with its interval; empty where there is none.

    >>> number({"mean": 0.5, "interval": [0.4, 0.6]}, 1), number(None)
    ('0.5 (0.4 to 0.6)', '')
    """
    if cell is None or cell["mean"] is None:
        return ""
    low, high = cell["interval"]
    return f"{unit * cell['mean']:.{digits}f} ({unit * low:.{digits}f} to {unit * high:.{digits}f})"


def _order(rows: set[str]) -> list[str]:
    kinds = ["full", *(f"{kind}/{r}" for kind in ("memories", *SELECTIONS, "another text's") for r in RATES), "none"]
    return [
        name for kind in kinds for name in (kind, f"{kind}, adapters on", f"{kind}, trained on it") if name in rows
    ]


def _part(record: Record, name: str) -> Any:
    return pick(record, "metrics").get(name)


def _missing(name: str) -> Table:
    return Table(text=[f"Not measured: `python -m benchmarks.smollm2 MODEL --part {name}`."])


def smollm2_continue(record: Record) -> Table:
    """Loss of every row, a column for each context."""
    part = _part(record, "continue")
    if part is None:
        return _missing("continue")
    rows = [["what stands before 64 tokens, nats per token", *part]]
    for name in _order({row for column in part.values() for row in column["loss"]}):
        rows.append([title(name), *(number(column["loss"].get(name)) for column in part.values())])
    return Table(
        rows,
        f"{record['metrics']['num_documents']} documents; intervals of 95% over documents. Rows of text are read by "
        "the plain decoder, with the adapters on that learnt to read memories, or with adapters trained as long on "
        "this very row." + _missing_rows(record),
    )  # fmt: skip


def _missing_rows(record: Record) -> str:
    rows = [name.removeprefix("control ") for name in record["missing"] if name.startswith("control ")]
    return f" No adapters were trained on {', '.join(map(title, rows))}." if rows else ""


def smollm2_gain(record: Record) -> Table:
    """How much better memories are than what else there is, document by document."""
    part = _part(record, "continue")
    if part is None:
        return _missing("continue")
    rows = [["gain of memories, nats per token", *part]]
    for name in next(iter(part.values()))["gain"]:
        own, _, other = name.partition(" over ")
        rows.append([f"{title(own)}, over {title(other)}", *(number(one["gain"][name]) for one in part.values())])
    for gap, words in (
        ("gap", "the plain decoder"),
        ("gap, trained on it", "adapters trained on nothing and full text"),
    ):
        for rate in RATES:
            shares = [one["share_of_gap_recovered"].get(gap, {}).get(f"memories/{rate}") for one in part.values()]
            if any(share is not None for share in shares):
                cells = ["" if one is None else f"{one:.0%}" for one in shares]
                rows.append([f"share of the gap recovered, {rate} tokens a memory; gap of {words}", *cells])
    return Table(rows, "The gap is between nothing and the full text.")


def smollm2_copy(record: Record) -> Table:
    """Copies, teacher-forced and free-running, and what they keep."""
    part = _part(record, "copy")
    if part is None:
        return _missing("copy")
    rates = [rate for rate in RATES if f"memories/{rate}" in part["teacher_forced"]]
    rows = [["", *(f"{rate} tokens a memory" for rate in rates)]]
    for kind, words in (("memories", "own memories"), ("another text's", "another text's memories")):
        shares = [number(part["teacher_forced"].get(f"{kind}/{rate}"), 1, 100) for rate in rates]
        rows.append([f"64 tokens teacher-forced, {words}, % right", *shares])
    for length in (32, 64, 128):
        shares = [number(part["free_running"].get(f"{length} tokens, memories/{rate}"), 0, 100) for rate in rates]
        rows.append([f"{length} tokens free-running, % without an error", *shares])
    for kind in ("digits", "dates", "names"):
        shares = [number(part["kept"].get(f"memories/{rate}", {}).get(kind), 0, 100) for rate in rates]
        rows.append([f"{kind} kept, 64 tokens free-running, %", *shares])
    controls = {name: 100 * part["teacher_forced"][name]["mean"] for name in ("full", "none")}
    return Table(
        rows,
        f"{record['metrics']['num_documents']} documents; intervals of 95% over documents. Teacher-forced with the "
        f"full text before COPY {controls['full']:.1f}%, with nothing before it {controls['none']:.1f}%.",
    )


def smollm2_questions(record: Record) -> Table:
    """Scores of answers by row."""
    part = _part(record, "questions")
    if part is None:
        return _missing("questions")
    rows = [["answered from", "F1", "exact match, %", "answer contained, %"]]
    for name in _order(set(part)):
        cells = part[name]
        rows.append([title(name), number(cells["f1"], 1, 100), number(cells["exact_match"], 1, 100),
                     number(cells["contained"], 1, 100)])  # fmt: skip
    return Table(
        rows,
        f"{record['metrics']['num_questions']} questions in the decoder's chat template, the most likely tokens, 24 "
        "at most; intervals of 95% over paragraphs.",
    )


def smollm2_first_token(record: Record) -> Table:
    """Time and bytes of a long text."""
    part = _part(record, "first_token")
    if part is None:
        return _missing("first_token")
    rows = [["", "full text", "stored memories"]]
    rows.append(
        ["CPU time to the first token", *(duration(part["cpu_seconds"][n]) for n in ("full text", "memories"))]
    )
    rows.append(["bytes of the cache", *(f"{part['cache_bytes'][name]:,}" for name in ("full text", "memories"))])
    rows.append(["stored bytes a source token", "", f"{part['stored_bytes_per_source_token']:.1f}"])
    note = f"{part['tokens']:,} tokens, {part['rate']} a memory: {part['times_faster']:.1f} times faster."
    if part["beyond_the_decoders_positions"]:
        note += " The full text is longer than the decoder was trained for, so its answers are not scored here."
    return Table(rows, note)
