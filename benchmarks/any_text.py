"""What a starter gives back of texts of any length and kind, free-running beside teacher-forced, and what it quotes.

```bash
python -m benchmarks.any_text model_cards/starter-tiny model_cards/starter-autoencoder-64 \
    --text "books=books_test.parquet" --text "web pages=c4_web_test.parquet"
```

Each document gives one text of each length, from its beginning. Beside the documents of files there are made-up lines
of what people type. Intervals resample documents.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import benchmark_parser, describe_run, run_benchmark, scratch
from modeling_memory import MemoryStore
from modeling_memory.store.codec import DTYPES
from training.command_line import named_file
from training.data.objectives import build_batch
from training.data.texts import file_checksums, load_texts
from training.data.tokenizer import special_tokens_of
from training.data.typed import fold_to_ascii, typed_documents
from training.measure.metrics import bootstrap_interval
from training.measure.suites import Evaluation
from training.publishing.hub_folder import load_checkpoint, load_processor
from training.records.record import Cells, data_digest

SEED = 1
"""Of the made-up lines: training has 0."""


def made_up(texts: Mapping[str, Sequence[str]], number: int) -> dict[str, list[str]]:
    """The documents of all kinds, `number` of each."""
    kinds = {name: list(documents[:number]) for name, documents in texts.items()}
    first = next(iter(kinds.values()))
    kinds["the first kind on a plain keyboard"] = [fold_to_ascii(text[:4000]) for text in first]
    kinds["lists, code, numbers, addresses"] = list(typed_documents(number * 4000, SEED))
    return kinds


def excerpts(tokenizer: Any, documents: Sequence[str], length: int) -> list[list[int]]:
    """The first tokens of documents, after their first line, which is often a title; too short ones are left out."""
    found = []
    for text in documents:
        ids = tokenizer(
            text[text.find("\n") + 1 :][: 12 * length], add_special_tokens=False, split_special_tokens=True
        )
        if len(ids["input_ids"]) >= length:
            found.append(ids["input_ids"][:length])
    return found


def shares(hits: Sequence[bool]) -> dict[str, Any]:
    """A share of documents with its interval."""
    right = torch.tensor(hits, dtype=torch.double)
    return {"share": right.mean().item(), "interval": list(bootstrap_interval(right)), "documents": len(hits)}


@torch.no_grad()
def measure_autoencoder(model: Any, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Texts of at most a chunk, given back in one pass, read as they are and filled."""
    found = {}
    ids, shipped = torch.tensor(rows), model.config.short_chunks
    for how in ("pad", "repeat"):
        model.config.short_chunks = how
        same = model.reconstruct(ids)[:, : ids.shape[1]] == ids
        found[f"whole texts, {how}"] = shares(same.all(1).tolist())
        found[f"tokens, {how}"] = same.double().mean().item()
    model.config.short_chunks = shipped
    return found


@torch.no_grad()
def measure_memory(model: Any, processor: Any, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Texts through a store: written back in one pass, and quoted after the self-check."""
    with tempfile.TemporaryDirectory() as folder:
        return _through_stores(model, processor, rows, Path(folder))


def _through_stores(model: Any, processor: Any, rows: Sequence[Sequence[int]], folder: Path) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    texts = {f"text {place}": tokenizer.decode(row) for place, row in enumerate(rows)}
    found: dict[str, Any] = {}
    for on_loss in ("warn", "keep_text", "split"):
        store = MemoryStore.open(folder / on_loss, model, processor, create=True, dtype="int8")
        store.append(texts, on_loss=on_loss)
        if on_loss == "warn":
            written = {one: "".join(store.regenerate(one)) for one in texts}
            found["written back"] = shares([written[one] == text for one, text in texts.items()])
            chunks = store.num_chunks
        else:
            quoted = [("".join(store.quote(one)) == text) for one, text in texts.items()]
            found[f"quoted, {on_loss}"] = shares(quoted)
        found[f"lost chunks, {on_loss}"] = store.num_lost / store.num_chunks
        found[f"chunks, {on_loss}"] = store.num_chunks / chunks
    return found


@torch.no_grad()
def measure_copies(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Texts copied teacher-forced and free-running, if the model has room for all of their memories."""
    config, found = model.config, {}
    ids = special_tokens_of(tokenizer)
    evaluation = Evaluation(model, ids, config.chunk_length, config.window_length)
    length = len(rows[0])
    if config.fits(-(-length // config.chunk_length) * config.memories_per_chunk, length + 1):
        own = torch.tensor(rows)
        batch = build_batch("copy", own, evaluation.spec("slots"), end=True)
        wanted = torch.nn.functional.pad(own, (0, 1), value=ids.eos)
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "shift_labels")}
        forced = model(**inputs, use_cache=False).logits.argmax(-1)
        targets = batch["shift_labels"]
        right = (forced == targets) | (targets == -100)
        found["copied, teacher-forced"] = shares(right.all(1).tolist())
        start = int((inputs["input_ids"][0] == ids.copy).nonzero()[0]) + 1
        prompt = {name: t if name.startswith("context") else t[:, :start] for name, t in inputs.items()}
        copy = model.generate(**prompt, max_new_tokens=length + 1, do_sample=False)[:, start:]
        copy = torch.nn.functional.pad(copy, (0, length + 1 - copy.shape[1]), value=ids.pad)
        found["copied, free-running"] = shares((copy == wanted).all(1).tolist())
    return found


@torch.no_grad()
def measure_formats(model: Any, processor: Any, documents: Sequence[str]) -> dict[str, Any]:
    """What each number format takes for a token of text, and how many chunks come back from it."""
    found = {}
    texts = {f"text {place}": text[:2000] for place, text in enumerate(documents)}
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            store = MemoryStore.open(folder, model, processor, create=True, dtype=dtype)
            store.append(texts, on_loss="warn")
            found[dtype] = {
                "bytes_a_token": store.chunk_bytes * store.num_chunks / store.num_tokens,
                "bytes_a_token_of_the_file": store.num_bytes / store.num_tokens,
                "bytes_of_text_a_token": sum(len(text.encode()) for text in texts.values()) / store.num_tokens,
                "chunks": store.num_chunks,
                "chunks_that_come_back": 1 - store.num_lost / store.num_chunks,
            }
    return found


def measure_starter(
    folder: Path, texts: Mapping[str, Sequence[str]], lengths: Sequence[int], number: int, cells: Cells
) -> dict[str, Any]:
    """Measure one starter on texts of each kind and length."""
    model, _ = load_checkpoint(folder)
    processor = load_processor(folder)
    tokenizer, model = getattr(processor, "tokenizer", processor), model.eval()
    is_autoencoder = model.config.model_type == "memory_autoencoder"
    found: dict[str, Any] = {"short_chunks": model.config.short_chunks, "kinds": {}}
    for kind, documents in made_up(texts, number).items():
        for length in lengths:
            rows = excerpts(tokenizer, documents, length)
            if not rows or (is_autoencoder and length > model.config.chunk_length):
                continue
            name = f"{folder.name}, {kind}, {length}"
            if is_autoencoder:
                cell = cells.get(name, partial(measure_autoencoder, model, rows))
            else:
                cell = {
                    **cells.get(name, partial(measure_memory, model, processor, rows)),
                    **cells.get(f"{name}, copies", partial(measure_copies, model, tokenizer, rows)),
                }
            found["kinds"].setdefault(kind, {})[str(length)] = cell
    if not is_autoencoder:
        documents = next(iter(texts.values()))[:number]
        found["formats"] = cells.get(f"{folder.name}, formats", partial(measure_formats, model, processor, documents))
    return found


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = benchmark_parser("any_text", "Measure what a starter gives back of texts of any length.", quick=False)
    add = parser.add_argument
    add("starters", nargs="+", help="folders of starters")
    add("--text", action="append", type=named_file, required=True, metavar="NAME=FILE", help="documents of a kind")
    add("--lengths", type=int, nargs="+", default=[5, 12, 40, 120, 500], metavar="N", help="tokens of the texts")
    add("--documents", type=int, default=40, metavar="N", help="documents of each kind (40)")
    add("--cells", metavar="FILE", help="where cells are kept (default: benchmarks/results/scratch)")
    return parser


def measure(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure what the options ask for; return the record."""
    record = describe_run("any_text", command, {"made-up lines": SEED})
    texts = {name: load_texts([file]) for name, file in options.text}
    inputs = {"files": {name: file_checksums([file]) for name, file in options.text}}
    weights = {folder: file_checksums(sorted(Path(folder).glob("*.safetensors"))) for folder in options.starters}
    identity = data_digest({"code": record["code"], **inputs, "weights": weights, "documents": options.documents})
    cells = Cells(options.cells or scratch("any_text_cells.json"), identity)
    metrics = {
        Path(folder).name: measure_starter(Path(folder), texts, options.lengths, options.documents, cells)
        for folder in options.starters
    }
    return {**record, "inputs": inputs, "metrics": metrics}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_benchmark(build_parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
