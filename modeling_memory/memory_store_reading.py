"""Reading a memory store: its texts, chunks and memories, from mapped files.

n chunks, K memories per chunk, D decoder width, M memories of a row, Q queries.
"""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .memory_files import MemoryStoreError
from .memory_index import index_files, read_generation, read_index
from .memory_search import build_search
from .memory_shard import Chunk, Shard

logger = logging.get_logger(__name__)


class StoredMemories:
    """A memory store as it was when it was opened: nothing that others write later is seen before [`reload`].

    Args:
        folder (`str` or `os.PathLike`): Where it stands.

    Attributes:
        folder (`Path`): Where it stands.
        dtype (`str`): Number format of the memories, see `memory_codec.DTYPES`.
        keeps_text (`bool`): Whether the texts are kept beside their memories.

    Raises:
        MemoryStoreError: If there is no store, its index is damaged, or a later version wrote it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._shards: dict[str, Shard] = {}
        self.reload()

    def reload(self) -> None:
        """Read the index again; what was mapped and checked stays so.

        Raises:
            MemoryStoreError: If the index is damaged.
        """
        self._index = read_index(self.folder)
        self.dtype: str = self._index["dtype"]
        self.keeps_text: bool = self._index["keeps_text"]
        known, self._shards = self._shards, {}
        self._places: dict[str, tuple[Shard, int]] = {}
        self._faults: list[MemoryStoreError] = []
        for entry in self._index["shards"]:
            try:
                shard = known[entry["file"]].with_entry(entry) if entry["file"] in known else Shard(self.folder, entry)
            except MemoryStoreError as fault:
                logger.warning(str(fault))
                self._faults.append(fault)
                continue
            self._shards[entry["file"]] = shard
            for number in shard.live:
                self._places[shard.texts[number]["id"]] = shard, number

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the memories depend on: encoder, projector, tokenizer, and how text is cut."""
        return self._index["fingerprint"]

    @property
    def created_with(self) -> dict[str, str]:
        """Versions of this package, torch and transformers that began the store."""
        return self._index["created_with"]

    @property
    def generation(self) -> int:
        """Number of the change that led to this state."""
        return self._index["generation"]

    def _all(self) -> dict[str, tuple[Shard, int]]:
        """All texts; a store of which texts are unreadable must not look like one that never had them."""
        if self._faults:
            raise self._faults[0]
        return self._places

    def _find(self, text_ids: str | Iterable[str] | None) -> list[tuple[Shard, int]]:
        if text_ids is None:
            return list(self._all().values())
        wanted = [text_ids] if isinstance(text_ids, str) else list(text_ids)
        missing = [text_id for text_id in wanted if text_id not in self._places]
        if missing:
            self._all()
            raise MemoryStoreError(
                f"{self.folder.name} has no text {missing[0]!r} ({len(missing)} of {len(wanted)} are missing). "
                "`store.text_ids` lists what it has."
            )
        return [self._places[text_id] for text_id in wanted]

    def __len__(self) -> int:
        """Texts in the store."""
        return len(self._all())

    def __contains__(self, text_id: str) -> bool:
        return text_id in self._places or text_id in self._all()

    @property
    def text_ids(self) -> list[str]:
        """Ids of the texts, in the order in which they were stored."""
        return list(self._all())

    @property
    def num_chunks(self) -> int:
        """Chunks of all texts."""
        return self._total("chunks")

    @property
    def num_tokens(self) -> int:
        """Text tokens of all chunks, as the encoder's tokenizer counts them."""
        return self._total("tokens")

    def _total(self, field: str) -> int:
        return sum(shard.texts[number][field] for shard, number in self._all().values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the store's files on disk: shards, texts if they are kept, and indexes."""
        indexes = [path.stat().st_size for files in index_files(self.folder).values() for path in files]
        return sum(entry["bytes"] for entry in self._index["shards"]) + sum(indexes)

    def digest(self, text_id: str) -> str | None:
        """Return the checksum of a text, as [`text_digest`] makes it; `None` if it was given as tokens."""
        ((shard, number),) = self._find(text_id)
        return shard.texts[number]["digest"]

    def chunks(self, text_ids: str | Iterable[str] | None = None) -> list[Chunk]:
        """Return the chunks of some texts, or of all, in reading order."""
        return [chunk for shard, number in self._find(text_ids) for chunk in shard.chunks(number)]

    def text(self, text_id: str) -> str:
        """Return a text in clear.

        Raises:
            MemoryStoreError: If there is no such text, or it was not kept.
        """
        ((shard, number),) = self._find(text_id)
        text = shard.text(number)
        if text is None:
            raise MemoryStoreError(
                f"The text {text_id!r} was not kept beside its memories. Begin the store with `MemoryStore.open(..., "
                "create=True, keep_text=True)` to keep texts."
            )
        return text

    def expand(self, chunks: Chunk | Sequence[Chunk]) -> list[str]:
        """Return chunks in clear text.

        Raises:
            MemoryStoreError: If the text was not kept, or was given as tokens.
        """
        chunks = [chunks] if isinstance(chunks, Chunk) else chunks
        texts = {text_id: self.text(text_id) for text_id in {chunk.text_id for chunk in chunks}}
        for chunk in chunks:
            if chunk.start is None:
                raise MemoryStoreError(
                    f"The text {chunk.text_id!r} was stored by a tokenizer that knows no offsets, so where its chunks "
                    "stand is not known. `store.text(text_id)` returns it whole."
                )
        return [texts[chunk.text_id][chunk.start : chunk.end] for chunk in chunks]

    def memories(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Return the memories of some chunks, read from the mapped files.

        Args:
            chunks (`Sequence` of [`Chunk`]): From [`chunks`], [`nearest`] or [`iterate`].

        Returns:
            `torch.FloatTensor` of shape `(n, K, D)` in float32.

        Raises:
            MemoryStoreError: If a file is damaged, or the store has no such chunk.
        """
        cut = self.fingerprint["cut"]
        memories = torch.empty(len(chunks), cut["memories_per_chunk"], cut["hidden_size"])
        by_shard: dict[Path, tuple[Shard, list[int], list[int]]] = {}
        for place, chunk in enumerate(chunks):
            ((shard, number),) = self._find(chunk.text_id)
            if chunk.number not in range(len(shard.rows(number))):
                raise MemoryStoreError(
                    f"The text {chunk.text_id!r} has {len(shard.rows(number))} chunks, but chunk {chunk.number} was "
                    "asked for. Take chunks from this store's `chunks`."
                )
            _, places, rows = by_shard.setdefault(shard.path, (shard, [], []))
            places.append(place)
            rows.append(shard.rows(number)[chunk.number])
        for shard, places, rows in by_shard.values():
            memories[places] = shard.memories(rows)
        return memories

    def select(self, wanted: str | Iterable[str] | Iterable[Chunk] | None) -> list[Chunk]:
        """Return chunks as they are given, or those of the texts that are named; `None` means all."""
        if wanted is None or isinstance(wanted, str):
            return self.chunks(wanted)
        return [chunk for one in wanted for chunk in ([one] if isinstance(one, Chunk) else self.chunks(one))]

    def iterate(
        self, text_ids: str | Iterable[str] | None = None, *, batch_size: int = 4096
    ) -> Iterator[tuple[list[Chunk], torch.Tensor]]:
        """Yield chunks with their memories `(n, K, D)` in float32, at most `batch_size` chunks of a text at a time."""
        for shard, number in self._find(text_ids):
            rows = shard.rows(number)
            for start in range(rows.start, rows.stop, batch_size):
                block = range(start, min(start + batch_size, rows.stop))
                yield shard.chunks(number, block), shard.memories(block)

    def nearest(
        self,
        queries: torch.Tensor,
        k: int,
        *,
        text_ids: str | Iterable[str] | None = None,
        backend: str = "torch",
        block_size: int = 16384,
    ) -> list[list[tuple[Chunk, float]]]:
        """Return the chunks nearest to each query: exactly, by the cosine to a chunk's nearest memory.

        Args:
            queries (`torch.FloatTensor` of shape `(Q, D)`): Memories to look for.
            k (`int`): Chunks for each query; fewer if the store has fewer.
            text_ids (`str` or ids, *optional*): Texts to look in. Default: all.
            backend (`str`): `"torch"`, block by block from the mapped files, or `"faiss"` (the extra `faiss`), which
                holds all vectors in memory.
            block_size (`int`): Chunks of a block.

        Returns:
            For each query its chunks with their cosines, nearest first.

        Raises:
            ValueError: If a query has another width, `k` is below 1, or faiss is not installed.
        """
        width = self.fingerprint["cut"]["hidden_size"]
        if queries.dim() != 2 or queries.shape[1] != width:
            raise ValueError(
                f"`queries` has shape {tuple(queries.shape)}; expected (queries, {width}): memories of this store's "
                "model, as `encode_memories` makes them, one a row."
            )
        search = build_search(backend, queries, k)
        rows: dict[Path, tuple[Shard, set[int]]] = {}
        for shard, number in self._find(text_ids):
            rows.setdefault(shard.path, (shard, set()))[1].update(shard.rows(number))
        blocks = []
        for shard, wanted in rows.values():
            own = sorted(wanted)
            for start in range(0, len(own), block_size):
                blocks.append((shard, _as_range(own[start : start + block_size])))
                search.add(shard.memories(blocks[-1][1]))
        firsts = [0]
        for _, block in blocks:
            firsts.append(firsts[-1] + len(block))

        def chunk(number: int) -> Chunk:
            place = bisect_right(firsts, number) - 1
            shard, block = blocks[place]
            return shard.chunk(block[number - firsts[place]])

        return [[(chunk(number), score) for number, score in found] for found in search.results()]

    def verify(self) -> list[str]:
        """Read every byte of the store again.

        Returns:
            What is wrong, a line for each file; empty if nothing is.
        """
        problems = []
        for generation, files in index_files(self.folder).items():
            _, damaged = read_generation(files, generation)
            problems += [f"{name} is damaged: it does not agree with its checksum." for name in damaged]
        for fault in self._faults:
            problems.append(str(fault))
        for shard in self._shards.values():
            try:
                shard.verify()
            except MemoryStoreError as error:
                problems.append(str(error))
        return problems


def _as_range(rows: list[int]) -> Sequence[int]:
    """Return sorted rows as a range if they follow each other: a range is read without copying."""
    return range(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else rows
