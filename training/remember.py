"""Texts into a memory store: read once, encoded in batches, kept on disk.

```bash
python -m training.remember runs/quickstart/hub letters/ notes.jsonl --to runs/letters
accelerate launch --config_file configuration/accelerate/ddp.yaml -m training.remember MODEL letters/ --to runs/letters
```

A text is a `.txt` or `.md` file, or a row of a `.jsonl` or `.parquet` file or of a dataset of the Hub. Its id is the
file's path as given, with `#row` where a file holds several. What is stored is on the disk; after an interruption the
same command goes on with what is missing, and a text that has changed since is remembered anew. A row that holds no
text is named and left out. Several processes share the texts, store each their own, and are merged at the end.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_memory import MemoryProcessor, MemoryStore
from modeling_memory.store.codec import DEFAULT_DTYPE, DTYPES
from modeling_memory.store.quoting import why_not_checkable
from modeling_memory.store.remembering import ON_LOSS
from modeling_memory.store.texts import text_digest

from .command_line import MISTAKE, Parser, run_command, whole_number
from .data.sources import HUB, SUFFIXES, HubDataset, read_file
from .evaluate import find_model
from .places import program
from .publishing.hub_folder import load_checkpoint
from .remember_ray import remember_by_ray

COMMIT_CHARACTERS = 200_000
"""Characters of text that are stored by one change: what an interruption may cost, and how often the bar moves."""

Source = Path | HubDataset


def load_memory_model(name: str, device: torch.device | str = "cpu") -> tuple[PreTrainedModel, MemoryProcessor]:
    """Load a memory model with its processor, in the dtype that it was saved in.

    Args:
        name (`str`): Folder or Hub id.
        device (`torch.device` or `str`): Where to.

    Raises:
        ValueError: If there is none, or it is another kind of model.
    """
    model, processor = load_checkpoint(find_model(name))
    if not isinstance(processor, MemoryProcessor) or not hasattr(model, "encode_memories"):
        raise ValueError(
            f"{name} holds a {type(model).__name__}, which keeps no memories of a text. Give a memory "
            "encoder-decoder, such as runs/quickstart/hub."
        )
    return model.eval().to(device), processor


def find_sources(words: Sequence[str]) -> list[Source]:
    """Turn files, folders and `hub:` datasets into sources, folders into the files in them, in order of their names.

    Raises:
        ValueError: If a word names nothing, or a folder holds no file of a known ending.
    """
    sources: list[Source] = []
    for word in words:
        path = Path(word).expanduser()
        if word.startswith(HUB):
            sources.append(HubDataset.parse(word))
        elif path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
            if not found:
                raise ValueError(
                    f"{word} holds no file that ends in {', '.join(SUFFIXES)}. Give texts of these kinds."
                )
            sources += found
        elif path.is_file():
            sources.append(path)
        else:
            raise ValueError(f"{word} is no file, no folder and no hub:ID@COMMIT. Correct the path.")
    return list(dict.fromkeys(sources))


def named_texts(
    sources: Sequence[Source], text_column: str = "text", refuse: Callable[[str], None] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield each text with its id, one at a time.

    Args:
        sources (`Sequence`): From [`find_sources`].
        text_column (`str`): Column or field that holds a document's text.
        refuse (`Callable`, *optional*): Is told of rows of files that hold no text or half a character, which are then
            left out. By default such a row is an error.
    """
    for source in sources:
        if isinstance(source, HubDataset):
            name = f"{HUB}{source.name}@{source.revision}:{source.config or 'default'}:{source.split}"
            for row, text in enumerate(source.documents(text_column)):
                if text.strip():
                    yield f"{name}#{row}", text
        else:
            is_one = ".txt" in source.suffixes[-2:]
            left_out: list[str] = []  # counted, so that the rows after them keep their ids once they are mended
            texts = read_file(source, text_column, None if refuse is None else left_out.append)
            for row, text in enumerate(texts):
                yield (source.as_posix() if is_one else f"{source.as_posix()}#{row + len(left_out)}"), text
            if refuse is not None:
                for told in left_out:
                    refuse(told)


def remember(
    store: MemoryStore,
    texts: Iterator[tuple[str, str]],
    *,
    batch_size: int = 256,
    commit_characters: int = COMMIT_CHARACTERS,
    on_loss: str | None = None,
    beside: MemoryStore | None = None,
    bar: Any = None,
) -> dict[str, int]:
    """Store texts that are not in a store yet, or have changed since.

    Args:
        store ([`MemoryStore`]): Opened with its model.
        texts (`Iterator`): Ids and texts.
        batch_size (`int`): Chunks that the encoder reads at a time.
        commit_characters (`int`): Characters of one change of the store.
        on_loss (`str`, *optional*): What becomes of chunks that do not come back whole; see `MemoryStore.append`.
        beside ([`MemoryStore`], *optional*): Another store, whose texts are not stored again.
        bar (`tqdm`, *optional*): Counts characters, and shows chunks beside them.

    Returns:
        `dict`: `stored`, `changed` (of these) and `known` texts, and `chunks` that were encoded.
    """
    counts = {"stored": 0, "changed": 0, "known": 0, "chunks": 0}
    waiting: dict[str, str] = {}
    characters = 0  # of the texts that wait: counted once, not again for each text

    def progress(chunks: int) -> None:
        counts["chunks"] += chunks
        if bar is not None:
            bar.set_postfix_str(f"{counts['chunks']:,} chunks")

    def commit() -> None:
        options: dict[str, Any] = {"batch_size": batch_size, "on_duplicate": "replace", "on_loss": on_loss}
        counts["stored"] += store.append(waiting, **options, progress=progress)
        advance(sum(map(len, waiting.values())))
        waiting.clear()

    def advance(characters: int) -> None:
        if bar is not None:
            bar.update(characters)

    for text_id, text in texts:
        holders = [one for one in (store, beside) if one is not None and text_id in one]
        is_known = bool(holders)
        if any(one.digest(text_id) == text_digest(text) for one in holders):
            counts["known"] += 1
            advance(len(text))
            continue
        counts["changed"] += is_known
        characters += len(text) - len(waiting.get(text_id, ""))
        waiting[text_id] = text
        if characters >= commit_characters:
            commit()
            characters = 0
    if waiting:
        commit()
    return counts


def own_part(folder: str, number: int) -> Path:
    """Where one of several processes stores its texts until they are merged."""
    return Path(f"{folder}.part-{number}")


def merge_parts(store: MemoryStore, folder: str) -> None:
    """Take over what several processes have stored each for itself."""
    for place in sorted(Path(folder).parent.glob(f"{Path(folder).name}.part-*")):
        with MemoryStore(place) as part:
            store.merge(part, on_duplicate="replace")
        shutil.rmtree(place)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(prog=program("remember"), description="Keep texts as memories on disk.")
    add = parser.add_argument
    add("model", help="folder or Hub id of a memory model")
    add("texts", nargs="+", metavar="TEXT", help="files, folders, or hub:ID@COMMIT")
    add("--to", required=True, metavar="STORE", help="folder of the store; begun if it is not there")
    add("--dtype", choices=tuple(DTYPES), help=f"number format of a new store ({DEFAULT_DTYPE})")
    add("--keep-text", action="store_true", help="let a new store keep the texts, to show and expand chunks")
    add(
        "--on-loss",
        choices=ON_LOSS,
        help="what becomes of chunks that do not come back from their memories: they are counted (warn, the default "
        "where the model can be asked), kept as text, or split until they come back",
    )
    add("--text-column", default="text", metavar="NAME", help="column or field of the text (text)")
    add(
        "--batch-size",
        type=whole_number(),
        default=256,
        metavar="N",
        help="chunks that the encoder reads at a time (256)",
    )
    add("--engine", choices=("ray",), help="encode by Ray Data, an actor for each worker (extra `ray`)")
    add("--workers", type=whole_number(), default=1, metavar="N", help="actors of Ray (1)")
    add("--parquet", metavar="FOLDER", help="with --engine ray: keep the memories there as Parquet, do not merge them")
    add("--threads", type=whole_number(), metavar="N", help="processor threads")
    return parser


def open_store(options: argparse.Namespace, model: PreTrainedModel, processor: MemoryProcessor) -> MemoryStore:
    """Open or begin the store that the command line names.

    Raises:
        ValueError: If it was begun with another format, or without the text.
    """
    kind: dict[str, Any] = {"dtype": options.dtype or DEFAULT_DTYPE, "keep_text": options.keep_text}
    store = MemoryStore.open(options.to, model, processor, create=True, **kind)
    if options.dtype not in (None, store.dtype) or (options.keep_text and not store.keeps_text):
        raise ValueError(
            f"{options.to} was begun with the format {store.dtype} and {'the' if store.keeps_text else 'no'} text. "
            "Leave the options out, or begin another store."
        )
    return store


def encode(
    options: argparse.Namespace,
    store: MemoryStore,
    texts: Iterator[tuple[str, str]],
    state: PartialState,
    append: dict[str, Any],
    bar: Any,
) -> dict[str, int]:
    """Store texts by Ray, by this process alone, or by one of several; returns the counts of [`remember`]."""
    if options.engine == "ray":
        folder, keep_files = Path(options.parquet or f"{options.to}.parts"), options.parquet is not None
        counts: dict[str, int] = remember_by_ray(
            store, options.model, texts, folder, workers=options.workers, threads=options.threads or 1,
            keep_files=keep_files, append=append, bar=bar,
        )  # fmt: skip
        return counts
    if state.num_processes == 1:
        return remember(store, texts, **append, bar=bar)
    # A file for each process: none waits for another while the encoder works.
    like: dict[str, Any] = {"dtype": store.dtype, "keep_text": store.keeps_text}
    place = own_part(options.to, state.process_index)
    with MemoryStore.open(place, store.model, store.processor, create=True, **like) as own:
        return remember(own, texts, **append, beside=store, bar=bar)


def report_lines(store: MemoryStore, place: str, on_loss: str | None, why: str | None) -> list[str]:
    """Say what a store holds, and which of its chunks come back; `why` is why that was not tried."""
    lines = [
        f"{place}: {len(store)} texts, {store.num_tokens:,} tokens in {store.num_chunks:,} chunks, "
        f"{store.num_bytes:,} bytes ({store.num_bytes / max(store.num_tokens, 1):.1f} per token), {store.dtype}"
    ]
    if store.num_checked:
        kept = "; their text is kept" if store.num_lost and (store.keeps_text or on_loss != "warn") else ""
        lines.append(
            f"{store.num_checked - store.num_lost:,} of {store.num_checked:,} chunks come back word for word, "
            f"{store.num_lost:,} do not{kept}"
        )
    elif why is not None:
        lines.append(f"whether chunks come back word for word was not tried: {why}")
    if store.num_unknown:
        share = store.num_unknown / store.num_tokens
        lines.append(
            f"{store.num_unknown:,} tokens ({share:.1%}) are none that the encoder knows: remembered as nothing"
        )
    return lines


def run(options: argparse.Namespace, command: str) -> tuple[int, dict[str, Any]]:
    """Do what the command line says; returns the exit status, that of a mistake if a text was refused, and counts."""
    state, started = PartialState(cpu=not torch.cuda.is_available()), time.perf_counter()
    sources = find_sources(options.texts)
    model, processor = load_memory_model(options.model, state.device)
    with state.main_process_first():
        store = open_store(options, model, processor)
        if state.is_main_process:
            merge_parts(store, options.to)  # of a run that was cut off
    total = None
    if state.is_main_process and not any(isinstance(source, HubDataset) for source in sources):  # not streamed twice
        texts = named_texts(sources, options.text_column, lambda told: None)
        total = sum(len(text) for _, text in texts) // state.num_processes
    why = why_not_checkable(model, processor)
    on_loss = options.on_loss or ("warn" if why is None else None)
    refused: list[str] = []
    texts = named_texts(sources, options.text_column, refused.append)
    texts = islice(texts, state.process_index, None, state.num_processes)
    append = {"batch_size": options.batch_size, "on_loss": on_loss}
    shown = {"unit": "char", "unit_scale": True, "disable": not state.is_main_process}
    with tqdm(desc="remember", total=total, **shown) as bar:
        counts = encode(options, store, texts, state, append, bar)
    everywhere: list[dict[str, int]] = gather_object([counts])
    totals = {name: sum(one[name] for one in everywhere) for name in counts}
    if state.is_main_process:
        merge_parts(store, options.to)
    state.wait_for_everyone()
    store.reload()
    if state.is_main_process:
        print(
            f"{totals['stored']} texts remembered ({totals['changed']} of them anew), {totals['known']} were there; "
            f"{totals['chunks']:,} chunks in {time.perf_counter() - started:.1f} s"
        )
        print("\n".join(report_lines(store, options.to, on_loss, why)))
        for told in refused:
            print(f"error: {told} It is left out; the other texts are stored.", file=sys.stderr)
    size = {"texts": len(store), "tokens": store.num_tokens, "chunks": store.num_chunks, "bytes": store.num_bytes}
    return MISTAKE if refused else 0, {"remembered": totals, "store": size, "refused": refused}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
