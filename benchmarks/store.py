"""What a memory store costs and keeps: bytes for each token of text, what survives in each number format, and speed.

```bash
python -m benchmarks.store                 # the quickstart's model on its test text, minutes
```

*Speed*: the same texts by one `MemoryStore.append`, in batches of 256 chunks, and by a loop that encodes one chunk
after the other and stores each text when it is done, in turn; files written included. The memories must be equal
first. *Formats*: memories of texts in every number format; bytes are those of all files of the store, without
the text. What a format keeps is measured by blank copy (the text written from stored memories alone) and by the loss
of the text that follows stored memories, beside the same with the memories as they were encoded. *Search*: nearest
neighbours of one query among all chunks, exact.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import compare, describe_run, interleave, save_record, spread
from modeling_memory import MemoryStore, quantization_report
from modeling_memory.store.codec import DTYPES
from modeling_memory.store.fingerprint import fingerprint
from training.data import file_checksums, load_texts
from training.objectives import IGNORED, SpecialTokens
from training.recipe import resolve_files
from training.remember import load_memory_model
from training.strict_yaml import REPOSITORY, portable_path
from training.suites import spread_rows
from training.tokenizer import special_tokens_of

BATCH = 256
TEXT = "training/corpora/books/test.parquet"
TARGET_SPEED, TARGET_COST = 4.0, 0.01
# float32 sums in another order; and float16 is what the stores hold: one step of it is 1e-3.
TOLERANCE = 2e-3


def cut_texts(documents: list[str], characters: int, number: int) -> dict[str, str]:
    """The first pieces of so many characters of all documents, by turns, under names of their own."""
    pieces = [text[i : i + characters] for text in documents for i in range(0, len(text) - characters + 1, characters)]
    step = max(len(pieces) // number, 1)
    return {f"text {place}": piece for place, piece in enumerate(pieces[::step][:number])}


def measure_speed(model: Any, processor: Any, texts: dict[str, str], repetitions: int, folder: Path) -> dict[str, Any]:
    """Time batches against single chunks, into a new store each time."""

    def into_a_store(append: Callable[[MemoryStore], Any]) -> Callable[[], dict[str, torch.Tensor]]:
        def run() -> dict[str, torch.Tensor]:
            store = MemoryStore.create(tempfile.mkdtemp(dir=folder), identity)
            store.model, store.processor = model, processor  # the store of this very model: no need to compare
            append(store)
            return {text_id: store.memories(store.chunks(text_id)) for text_id in texts}

        return run

    def one_by_one(store: MemoryStore) -> None:
        for text_id, text in texts.items():
            store.append({text_id: text}, batch_size=1)

    identity = fingerprint(model, processor)
    batched = into_a_store(lambda store: store.append(texts, batch_size=BATCH))
    result = compare(batched, into_a_store(one_by_one), tolerance=TOLERANCE, repetitions=repetitions)
    store = MemoryStore.open(folder / "speed", model, processor, create=True)
    store.append(texts)
    seconds = {name: result["spread"][name]["median"] for name in ("fast", "plain")}
    given = {"texts": len(texts), "tokens": store.num_tokens, "chunks": store.num_chunks, "batch_size": BATCH}
    return {
        "given": given,
        "target": TARGET_SPEED,
        "tokens_per_second": {name: store.num_tokens / value for name, value in seconds.items()},
        **result,
    }


def copy_inputs(model: Any, special: SpecialTokens, sources: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Blank copy of sources `(B, H)`, window by window, each behind the memories of all that stands before it.

    In the model's own layout the source is followed by blank windows, of which each reads the memories of the source
    and of the blank windows before it. Here these memories are given, so that they can have been stored.
    """
    window = model.config.window_length
    blanks = torch.full_like(sources, special.blank)
    parts = []
    for first in range(0, sources.shape[1], window):
        context = torch.cat([sources, blanks[:, :first]], 1)
        text, targets = blanks[:, :window], sources[:, first : first + window]
        parts.append(behind_memories(model, special, context, text, targets))
    return parts


def causal_inputs(model: Any, special: SpecialTokens, rows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Next tokens of the last window of rows `(B, T)`, behind the memories of all before."""
    context, text = rows[:, : -model.config.window_length], rows[:, -model.config.window_length :]
    targets = torch.cat([text[:, 1:], torch.full_like(text[:, :1], IGNORED)], 1)
    return [behind_memories(model, special, context, text, targets)]


def behind_memories(
    model: Any, special: SpecialTokens, context: torch.Tensor, text: torch.Tensor, targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Encode contexts `(B, C*L)` and put a slot for each memory in front of texts `(B, W)`."""
    with torch.no_grad():
        memory_embeds, _ = model.encode_memories(context.unflatten(1, (-1, model.config.chunk_length)))  # (B, M, D)
    slots = torch.full(memory_embeds.shape[:2], special.memory)
    return {
        "memory_embeds": memory_embeds,
        "input_ids": torch.cat([slots, text], 1),
        "shift_labels": torch.cat([torch.full_like(slots, IGNORED), targets], 1),
    }


def report(model: Any, parts: list[dict[str, torch.Tensor]]) -> dict[str, dict[str, float]]:
    """One report of several batches with equally many targets."""
    reports = [quantization_report(model, **part) for part in parts]
    joined = {}
    for dtype in reports[0]:
        own = [one[dtype] for one in reports]
        joined[dtype] = {
            "loss": sum(one["loss"] for one in own) / len(own),
            "token_accuracy": sum(one["token_accuracy"] for one in own) / len(own),
            "num_tokens": sum(one["num_tokens"] for one in own),
            "bytes_per_memory": own[0]["bytes_per_memory"],
        }
        joined[dtype]["loss_increase"] = joined[dtype]["loss"] / joined["encoded"]["loss"] - 1
    return joined


def measure_formats(
    model: Any, processor: Any, texts: dict[str, str], rows: torch.Tensor, source_length: int, folder: Path
) -> dict[str, Any]:
    """Store texts in every format, and measure what each keeps."""
    special = special_tokens_of(processor.tokenizer)
    whole = MemoryStore.open(folder / "whole", model, processor, create=True, dtype="float32")
    whole.append(texts)
    reports = {
        "blank_copy": report(model, copy_inputs(model, special, rows[:, :source_length])),
        "causal": report(model, causal_inputs(model, special, rows)),
    }
    formats: dict[str, Any] = {}
    for dtype in DTYPES:
        store = MemoryStore.create(folder / dtype, whole.fingerprint, dtype=dtype)
        store.merge(whole)
        formats[dtype] = {
            "bytes": store.num_bytes,
            "bytes_per_token": store.num_bytes / store.num_tokens,
            "bytes_of_memories_per_token": reports["causal"][dtype]["bytes_per_memory"]
            * model.config.memories_per_chunk
            / model.config.chunk_length,
            **{name: report[dtype] for name, report in reports.items()},
        }
    return {
        "target_loss_increase": TARGET_COST,
        "tokens": whole.num_tokens,
        "chunks": whole.num_chunks,
        "text_bytes_per_token": sum(len(text.encode()) for text in texts.values()) / whole.num_tokens,
        "encoded": {name: report["encoded"] for name, report in reports.items()},
        "formats": formats,
    }


def measure_search(model: Any, processor: Any, folder: Path, repetitions: int) -> dict[str, Any]:
    """Time opening, the first and a later search, and loading sixteen chunks, on the float16 store of the formats."""
    place = folder / "float16"
    warm = MemoryStore(place)
    chunks = warm.chunks()[:16]
    query = warm.memories(chunks[:1])[:, 0]
    runs = {
        "open": lambda: MemoryStore(place),
        "open with its model": lambda: MemoryStore(place, model, processor),
        "open, first search": lambda: MemoryStore(place).nearest(query, 8),
        "search": lambda: warm.nearest(query, 8),
        "load 16 chunks": lambda: warm.load(chunks),
    }
    seconds = interleave(runs, repetitions=repetitions)
    return {"chunks": warm.num_chunks, "seconds": {name: spread(values) for name, values in seconds.items()}}


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description="Cost and quality of a store.")
    add = parser.add_argument
    add("--model", default="runs/quickstart/hub", help="folder or Hub id of a memory model with one tokenizer")
    add("--text", default=TEXT, metavar="FILE", help="text that the model never saw")
    add("--texts", type=int, default=64, help="texts of the comparison of speed")
    add("--stored", type=int, default=128, help="texts of 2,000 characters that are stored in every format")
    add("--rows", type=int, default=512, help="rows of text that formats are measured on")
    add("--row-length", type=int, default=128, help="tokens of a row")
    add("--source-length", type=int, default=32, help="tokens of a row that are copied")
    add("--repetitions", type=int, default=5, help="timed rounds")
    add("--threads", type=int, default=1, help="processor threads")
    add("--out", help="file of the record; default: benchmarks/results/store.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = build_parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    files = resolve_files([options.text], "--text")
    documents = load_texts(files)
    model, processor = load_memory_model(options.model)
    model = model.float()
    words = f"--model {portable_path(options.model)} --texts {options.texts} --rows {options.rows} "
    words += f"--stored {options.stored} --repetitions {options.repetitions}"
    record = describe_run("store", f"python -m benchmarks.store {words}", {})
    record["inputs"] = {"files": file_checksums(files), "model": portable_path(options.model)}
    record["repetitions"] = options.repetitions
    tokens = torch.tensor(processor.tokenizer("\n".join(documents))["input_ids"])
    rows = spread_rows(tokens, row_length=options.row_length, limit=options.rows)
    given = {"rows": len(rows), "row_length": options.row_length, "source_length": options.source_length}
    (REPOSITORY / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=REPOSITORY / "runs") as name:
        folder = Path(name)
        texts, stored = (cut_texts(documents, 2000, number) for number in (options.texts, options.stored))
        record["metrics"] = {
            "speed": measure_speed(model, processor, texts, options.repetitions, folder),
            "formats": measure_formats(model, processor, stored, rows, options.source_length, folder),
            "search": measure_search(model, processor, folder, options.repetitions),
        }
    record["given"] = {**given, "tokens_per_memory": model.config.chunk_length // model.config.memories_per_chunk}
    path = save_record(record, "store", options.out)
    print(f"record: {path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
