"""Texts into a memory store by Ray Data: an actor for each worker, Parquet in between, on one machine or many.

Each batch of texts becomes one Parquet file, whole or not there, so a command that was cut off goes on with the texts
that are in none. At the end the files are merged into the store, or kept for DuckDB, Lance, Spark and the like. On
several machines the folder of the files must be one that all of them see.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet

from modeling_memory import MemoryStore
from modeling_memory.store.texts import text_digest

TEXTS = 64
"""Texts of a file."""
STARTS = 3
"""How often Ray is started before it is given up."""


class Encode:
    """An actor: it loads the model once, and writes the memories of each batch of texts to a file.

    Args:
        model (`str`): Folder or Hub id.
        folder (`str`): Where the files go.
        options (`dict`): `store`: `dtype` and `keep_text` of the store; `append`: `batch_size` and `on_loss`.
        threads (`int`): Processor threads of a worker.
    """

    def __init__(self, model: str, folder: str, options: Mapping[str, Any], threads: int):
        import torch

        from .remember import load_memory_model

        torch.set_num_threads(threads)
        self.model = load_memory_model(model, "cuda" if torch.cuda.is_available() else "cpu")
        self.folder, self.options = Path(folder), options

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list]:
        """Write the memories of a batch, and tell how many texts and chunks they are of."""
        texts = dict(zip(map(str, batch["text_id"]), map(str, batch["text"]), strict=True))
        with (
            tempfile.TemporaryDirectory() as place,
            MemoryStore.open(place, *self.model, create=True, **self.options["store"]) as store,
        ):
            store.append(texts, **self.options["append"])
            table, chunks = store.to_arrow().read_all(), store.num_chunks
        name = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:24]
        part = self.folder / f".{name}.{os.getpid()}.part"
        pyarrow.parquet.write_table(table, part)
        part.replace(self.folder / f"{name}.parquet")
        return {"texts": [len(texts)], "chunks": [chunks], "characters": [sum(map(len, texts.values()))]}


def digests(folder: Path) -> dict[str, str]:
    """The texts in the files of a folder, each with its checksum."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.parquet")):
        table = pyarrow.parquet.read_table(file, columns=["text_id", "digest"])
        found |= dict(zip(table["text_id"].to_pylist(), table["digest"].to_pylist(), strict=True))
    return found


def start(ray: Any, workers: int) -> None:
    """Start Ray on this machine, with one worker a processor that it is told of.

    Raises:
        ValueError: If its processes do not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers what is run
    # Workers find what this process finds, also in a checkout that is not installed.
    paths = os.pathsep.join(str(Path(place or ".").resolve()) for place in sys.path)
    settings: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False, "log_to_driver": False}
    settings |= {"logging_level": "ERROR", "runtime_env": {"env_vars": {"PYTHONPATH": paths}}}
    for left in reversed(range(STARTS)):
        try:
            ray.init(**settings)
            return
        except Exception as error:  # Ray raises this very class: it waits 30 seconds for its processes, no longer
            ray.shutdown()
            if not left:
                raise ValueError(
                    f"Ray did not start in {STARTS} tries: {error} Where other work takes all processors, what Ray "
                    "starts does not answer in time. Give the same command again later; what is encoded is kept."
                ) from error


def remember_by_ray(
    store: MemoryStore,
    model: str,
    texts: Iterator[tuple[str, str]],
    folder: Path,
    *,
    workers: int,
    threads: int = 1,
    keep_files: bool = False,
    append: Mapping[str, Any] | None = None,
    bar: Any = None,
) -> dict[str, int]:
    """Store texts that are neither in a store nor in the files of an earlier try, or have changed since.

    Args:
        store ([`MemoryStore`]): Where they go; its number format and whether it keeps texts are those of the files.
        model (`str`): Folder or Hub id of its model.
        texts (`Iterator`): Ids and texts.
        folder (`Path`): Of the files.
        workers (`int`): Actors.
        threads (`int`): Processor threads of an actor.
        keep_files (`bool`): Whether to leave the files there instead of merging them into the store.
        append (`Mapping`, *optional*): Options of `MemoryStore.append`.
        bar (`tqdm`, *optional*): Counts characters.

    Returns:
        `dict`: As [`training.remember.remember`].

    Raises:
        ValueError: If Ray is not installed, or does not start.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--engine ray needs Ray: pip install 'modeling-memory[ray]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"stored": 0, "changed": 0, "known": 0, "chunks": 0}
    there, rows = digests(folder), []
    for text_id, text in texts:
        digest = text_digest(text)
        in_store = text_id in store
        if there.get(text_id) == digest or (in_store and store.digest(text_id) == digest):
            counts["known"] += 1
            continue
        counts["changed"] += in_store
        rows.append({"text_id": text_id, "text": text})
    options = {"store": {"dtype": store.dtype, "keep_text": store.keeps_text}, "append": dict(append or {})}
    if rows:
        started_here = not ray.is_initialized()
        if started_here:
            start(ray, workers)
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            encoded = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // TEXTS)).map_batches(
                Encode,
                fn_constructor_args=(str(Path(model).resolve() if Path(model).exists() else model),
                                     str(folder.resolve()), options, threads),
                batch_size=TEXTS,
                concurrency=workers,
                num_cpus=1,
            )  # fmt: skip
            for done in encoded.iter_rows():
                counts["stored"] += int(done["texts"])
                counts["chunks"] += int(done["chunks"])
                if bar is not None:
                    bar.update(int(done["characters"]))
        finally:
            if started_here:
                ray.shutdown()
    if not keep_files:
        for file in sorted(folder.glob("*.parquet")):
            store.merge(pyarrow.parquet.read_table(file), on_duplicate="replace")
            file.unlink()
        shutil.rmtree(folder)
    return counts
