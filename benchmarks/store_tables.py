"""Tables of what a store finds, what it can quote, and what it takes."""

from collections.abc import Mapping

from benchmarks.table import Record, Table, percent, pick


def retrieval(record: Record) -> Table:
    """A row for each way of finding the passage that answers a question."""
    rows = [["passages found by", "right one first", "among the first five", "processor time a question"]]
    for name, found in pick(record, "metrics.ways").items():
        shares = [percent(found, share) for share in ("top_1", "recall_at_5")]
        rows.append([name, *shares, f"{found['milliseconds']:.0f} ms"])
    passages, questions = (pick(record, f"metrics.{name}") for name in ("passages", "questions"))
    return Table(rows, f"{questions} questions of XQuAD to a store of {passages} passages. Intervals are of 95% over "
                 "passages. Vectors of passages are made once and kept.")  # fmt: skip


def any_text(record: Record) -> Table:
    """A row for each starter and kind of text: whole texts, however they are given back."""
    ways = {
        "copied, teacher-forced": "copied, teacher-forced",
        "copied, free-running": "copied, free-running",
        "written back": "written back in one pass",
        "quoted, keep_text": "quoted, `on_loss=\"keep_text\"`",
        "quoted, split": "quoted, `on_loss=\"split\"`",
        "lost chunks, keep_text": "chunks kept as text",
        "chunks, split": "chunks after splitting",
    }  # fmt: skip
    rows, measured = [["starter", "text", *ways.values()]], set[str]()
    for starter, found in pick(record, "metrics").items():
        for kind, lengths in found["kinds"].items():
            cells = {length: cell for length, cell in lengths.items() if "written back" in cell}
            measured.update(cells)
            if cells:
                rows.append([starter, kind, *(_worst(name, cells) for name in ways)])
    named = ", ".join(sorted(measured, key=int))
    return Table(rows, f"Share of texts of {named} tokens without an error, with 95% intervals over documents: the "
                 "worst of these lengths, named where it is not perfect. A copy must end where the text does; there "
                 "is room for 128 tokens at once. Memories in int8.")  # fmt: skip


def _worst(name: str, cells: Mapping[str, Record]) -> str:
    """The worst of the lengths at which something was measured."""
    found = {length: cell[name] for length, cell in cells.items() if name in cell}
    size = {length: -value["share"] if isinstance(value, dict) else value for length, value in found.items()}
    length = max(size, key=size.__getitem__)
    perfect = found[length] in (0.0, 1.0) or size[length] == -1
    return _cell(name, found[length]) + ("" if perfect else f", {length} tokens")


def short_chunks(record: Record) -> Table:
    """A row for each kind of text and length: texts shorter than a chunk, read as they are and filled."""
    rows = [["text", "tokens", "whole, as they are", "whole, repeated until the chunk is full"]]
    for found in pick(record, "metrics").values():
        for kind, lengths in found["kinds"].items():
            for length, cell in lengths.items():
                if "whole texts, pad" in cell:
                    shares = [_cell(how, cell[f"whole texts, {how}"]) for how in ("pad", "repeat")]
                    rows.append([kind, length, *shares])
    return Table(rows, "starter-autoencoder-64, whose chunks have 64 tokens. Intervals are of 95% over documents.")


def formats(record: Record) -> Table:
    """A row for each number format: bytes of a memory, and chunks that come back from it."""
    rows = [["number format", "bytes of memories a token", "of the file", "chunks that come back word for word"]]
    for found in pick(record, "metrics").values():
        for dtype, cell in found.get("formats", {}).items():
            sizes = [f"{cell[name]:.1f}" for name in ("bytes_a_token", "bytes_a_token_of_the_file")]
            rows.append([dtype, *sizes, f"{cell['chunks_that_come_back']:.1%}"])
            size, chunks = cell["bytes_of_text_a_token"], cell["chunks"]
    return Table(
        rows, f"starter-tiny, {chunks:,} chunks, their text not kept; it would take {size:.1f} bytes a token."
    )


def _cell(name: str, found: object) -> str:
    if isinstance(found, dict):
        return percent({"share": found["share"], "share_interval": found["interval"]}, "share", 0)
    return f"{found:.2f} times" if name.startswith("chunks") else f"{found:.1%}"


def store(*records: Record) -> Table:
    """A column for each store that was measured: processor time of what is done with it, bytes of file and memory."""
    columns: list[dict[str, str]] = []
    for record in records:
        found = pick(record, "metrics")
        times = {name: f"{value:,.{2 if value < 10 else 0}f} ms" for name, value in found["milliseconds"].items()}
        sizes = {name: f"{found['bytes'][name] / 1e6:,.0f} MB" for name in ("store", "peak memory")}
        columns.append(times | {"the file": sizes["store"], "memory at the peak": sizes["peak memory"]})
    heads = [f"{found['chunks']:,} chunks of {found['width']} numbers" for found in (r["metrics"] for r in records)]
    rows = [["", *heads], *([name, *(one.get(name, "-") for one in columns)] for name in columns[0])]
    kept = " and ".join(f"{record['metrics']['texts']:,}" for record in records)
    return Table(rows, f"{kept} texts of 8 chunks, their text kept, in {records[0]['metrics']['dtype']}; each thing "
                 "once. Processor time: the clock says several times as much where the disk is busy, since "
                 "every change is synced.")  # fmt: skip


def workers(record: Record) -> Table:
    """A row for each number of workers: how fast a corpus is remembered."""
    rows = [["workers", "tokens a second", "tokens a processor second", "start and encode", "merge", "load before"]]
    for number, found in pick(record, "metrics").items():
        speeds = [f"{found[name]:,.0f}" for name in ("tokens_a_second", "tokens_a_processor_second")]
        seconds = [f"{found['seconds'][name]:.0f} s" for name in ("start and encode", "merge")]
        rows.append([number, *speeds, *seconds, f"{found['load_average'][0]:.1f}"])
    return Table(rows, f"{found['tokens']:,} tokens in {found['chunks']:,} chunks, each written back once to see "
                 "whether it is lost. A worker has one thread; the load is what else ran on the machine's "
                 f"{pick(record, 'hardware.cores')} processors, of which the clock tells.")  # fmt: skip
