"""What a memory store costs: processor time of each thing done with it, bytes, and memory at the peak.

```bash
python -m benchmarks.store                 # 20,000 texts of 8 chunks, minutes
python -m benchmarks.store --texts 125000 --width 128 --folder /big/disk --out benchmarks/results/store_million.json
```

With `--folder` the store stays there, and the same command goes on where it was cut off; nothing is deleted then.

Memories are random numbers, texts random words: neither changes what storing them costs. Seconds are of the processor
(`process_time`), which other programs on the machine disturb less than the clock.
"""

import argparse
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import describe_run, save_record
from modeling_memory import MemoryStore, StoredText
from modeling_memory.store.codec import DTYPES, code_sizes
from training.places import REPOSITORY

CHUNKS, CHUNK, WORDS, ALONE, BATCH, ASKED = 8, 16, 80, 500, 1000, 200


def identity(width: int) -> dict[str, Any]:
    """A fingerprint of no model."""
    parts: dict[str, Any] = {part: {"sha256": part} for part in ("encoder", "projector", "tokenizer", "cut")}
    parts["cut"] |= {"chunk_length": CHUNK, "memories_per_chunk": 1, "hidden_size": width}
    return parts


def make_texts(number: int, width: int, words: list[str], first: int = 0) -> Iterator[StoredText]:
    """Texts of eight chunks, one at a time; each is the same wherever it is begun."""
    for place in range(first, number):
        dice, generator = random.Random(place), torch.Generator().manual_seed(place)
        text = " ".join(dice.choices(words, k=WORDS))
        step = len(text) // CHUNKS
        spans = [(i * step, (i + 1) * step) for i in range(CHUNKS)]
        memories = torch.randn(CHUNKS, 1, width, generator=generator)
        yield StoredText(f"text {place}", memories, [CHUNK] * CHUNKS, spans, text)


def measure(texts: int, width: int, folder: Path, dtype: str = "float16", stays: bool = False) -> dict[str, Any]:
    """Milliseconds of the processor for each thing, once, on a store of so many texts with their text kept."""
    dice = random.Random(1)
    words = ["".join(dice.choices("abcdefghijklmnop", k=dice.randint(3, 9))) for _ in range(20_000)]
    milliseconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any], number: int = 1) -> None:
        started = time.process_time()
        work()
        milliseconds[name] = 1000 * (time.process_time() - started) / number

    store = MemoryStore.create(folder / "store", identity(width), dtype=dtype, keep_text=True)
    source = make_texts(texts, width, words, len(store))
    alone = list(islice(source, ALONE))
    if alone:
        timed("append a text, one a call", lambda: [store.append_memories([text]) for text in alone], len(alone))
    waiting: list[StoredText] = []
    for text in source:
        waiting.append(text)
        if len(waiting) == BATCH:
            batch = list(waiting)
            timed(f"append a text, {BATCH:,} a call", lambda: store.append_memories(batch), BATCH)  # noqa: B023
            waiting.clear()
    store.append_memories(waiting)
    size = store.num_bytes
    timed("open", lambda: MemoryStore(store.folder).close())
    reader = MemoryStore(store.folder)
    chunks = [dice.choice(reader.chunks(f"text {dice.randrange(texts)}")) for _ in range(ASKED)]
    timed("fetch a chunk", lambda: [reader.memories([chunk]) for chunk in chunks], ASKED)
    query = torch.randn(1, width)
    timed("exact search, the first: every row checked", lambda: reader.nearest(query, 8))
    timed("exact search", lambda: reader.nearest(query, 8))
    questions = [" ".join(dice.choices(words, k=8)) for _ in range(50)]
    timed("search by words (BM25)", lambda: [reader.search_text(question) for question in questions], len(questions))
    timed("verify", reader.verify)
    reader.close()
    if not stays:
        _measure_deleting(store, texts, timed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "texts": texts,
        "chunks": texts * CHUNKS,
        "width": width,
        "dtype": dtype,
        "milliseconds": milliseconds,
        "bytes": {"store": size, "at the end": store.num_bytes, "peak memory": peak},
        "bytes_per_chunk": {dtype: sum(code_sizes(dtype, 1, width)) for dtype in DTYPES},
    }


def _measure_deleting(store: MemoryStore, texts: int, timed: Callable[..., None]) -> None:
    timed("delete a text", lambda: store.delete("text 0"))
    timed("vacuum after that", store.vacuum)
    timed("delete half", lambda: store.delete([f"text {place}" for place in range(2, texts, 2)]))
    timed("vacuum after that half", store.vacuum)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description="What a memory store costs.")
    parser.add_argument("--texts", type=int, default=20_000, help="texts of 8 chunks (20,000)")
    parser.add_argument("--width", type=int, default=256, help="numbers of a memory (256)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="number format (float16)")
    parser.add_argument("--folder", help="where the store stays; default: it is removed")
    parser.add_argument("--out", help="file of the record; default: benchmarks/results/store.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    command = f"python -m benchmarks.store --texts {options.texts} --width {options.width} --dtype {options.dtype}"
    record = describe_run("store", command, {})
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(options.folder or aside)
        folder.mkdir(parents=True, exist_ok=True)
        record["metrics"] = measure(options.texts, options.width, folder, options.dtype, options.folder is not None)
    for name, value in record["metrics"]["milliseconds"].items():
        print(f"{value:10.3f} ms  {name}")
    for name, value in record["metrics"]["bytes"].items():
        print(f"{value / 1e6:10.1f} MB  {name}")
    path = save_record(record, "store", options.out)
    print(f"record: {path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
