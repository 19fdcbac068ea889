"""Memories on disk: texts in, memories out, of one model, checked byte by byte.

n chunks, K memories per chunk, D decoder width, M memories of a row, Q queries.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..memory_chunking import special_frame
from ..memory_layout import filled_length, tokens_of_groups
from .arrow import read_records, read_settings, to_reader
from .codec import DEFAULT_DTYPE, ROUGH, check_dtype, decode_vectors, encode_vectors, rounding_error
from .database import (
    FILE,
    FORMAT_VERSION,
    PART,
    SHIFT,
    MemoryStoreError,
    check_place,
    create_file,
    damaged,
    explained,
    new_file,
)
from .fingerprint import check_fingerprint, check_same_fingerprint, fingerprint, quick_fingerprint
from .quoting import LONGEST_CHARACTER, as_texts, why_not_checkable, write_back
from .remembering import remember_texts
from .search import BlockSearch, fuse, normalize
from .tables import Tables, chunks_of
from .texts import (
    UNCHECKED,
    Chunk,
    Entry,
    Passage,
    Record,
    StoredText,
    check_id,
    check_stored_text,
    is_writable,
    text_digest,
)

logger = logging.get_logger(__name__)

CANDIDATES = 50
"""Passages found by words that a sentence encoder orders anew."""
FEW = 10
"""Deleted texts up to which taking their words out one by one costs less than writing the index of words anew."""
ON_DUPLICATE = ("error", "skip", "replace")
Wanted = str | Chunk | Passage | Iterable[str | Chunk | Passage] | None


class MemoryStore(Tables):
    """Memories of texts on disk, of one encoder, projector and tokenizer: a folder with one SQLite file.

    Begin or open one with [`MemoryStore.open`]. Every change is whole or not at all, and on the disk when the call
    returns. Writers wait for each other. A reader sees the store as it was when it was opened, until [`reload`] or a
    change of its own; as long as it does, the write-ahead log beside the file cannot be emptied and grows with every
    change, so reload readers that live long. Memories can be turned back into text: a store is as sensitive as what it
    remembers.

    Args:
        folder (`str` or `os.PathLike`): Where it stands.
        model ([`MemoryEncoderDecoderModel`], *optional*): The model whose memories it holds. Without one the store
            can be read, merged and deleted from.
        processor ([`MemoryProcessor`], *optional*): The model's processor.
        lock_seconds (`float`): How long a change waits for another writer.

    Attributes:
        folder (`Path`): Where it stands.
        dtype (`str`): Number format of the memories, see `store.codec.DTYPES`.
        keeps_text (`bool`): Whether the texts are kept beside their memories.

    Raises:
        MemoryStoreError: If there is no store, it is damaged, of another format version, or of another model.

    Example:
    ```python
    store = MemoryStore.open("letters", model, processor, create=True, keep_text=True)
    store.append({"first": text})  # encoded once, kept
    inputs = store.prepare("<copy>", "first")  # its memories in slots, then the prompt
    print(processor.decode(model.generate(**inputs)[0]))
    ```
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: PreTrainedModel | None = None,
        processor: Any = None,
        *,
        lock_seconds: float = 60.0,
    ):
        if (model is None) != (processor is None):
            raise MemoryStoreError("A model and its processor belong together. Give both or neither.")
        super().__init__(_as_folder(folder), _check_seconds(lock_seconds))
        self.model, self.processor = model, processor
        self._told_of_rounding = False
        if model is not None:
            check_same_fingerprint(self.fingerprint, fingerprint(model, processor), "this model")
            # Hashing all weights takes seconds, and every later call only has to notice that one has changed.
            self._quick = quick_fingerprint(model, processor)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        model: PreTrainedModel | None = None,
        processor: Any = None,
        *,
        create: bool = False,
        dtype: str = DEFAULT_DTYPE,
        keep_text: bool = False,
        lock_seconds: float = 60.0,
    ) -> "MemoryStore":
        """Open a store, or begin one.

        Args:
            folder (`str` or `os.PathLike`): Where it stands.
            model ([`MemoryEncoderDecoderModel`], *optional*): See the class.
            processor ([`MemoryProcessor`], *optional*): See the class.
            create (`bool`): Whether to begin a store where there is none.
            dtype (`str`): Number format of a new store: `"float32"`, `"float16"`, `"bfloat16"`, `"int8"` or `"int4"`;
                [`quantization_report`] says what each costs a model.
            keep_text (`bool`): Whether a new store keeps the texts, so that chunks can be expanded and searched by
                words.
            lock_seconds (`float`): See the class.

        Raises:
            MemoryStoreError: See the class.
            ValueError: If `dtype` is unknown.
        """
        # What is there is opened as it is, so that a command can be given again.
        if create and not (_as_folder(folder) / FILE).exists():
            if model is None or processor is None:
                raise MemoryStoreError("A new store belongs to a model. Give `model` and `processor`.")
            cls.create(folder, fingerprint(model, processor), dtype=dtype, keep_text=keep_text).close()
        return cls(folder, model, processor, lock_seconds=lock_seconds)

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike,
        identity: dict[str, Any],
        *,
        dtype: str = DEFAULT_DTYPE,
        keep_text: bool = False,
    ) -> "MemoryStore":
        """Begin an empty store; if another process has just begun it, open that.

        Args:
            folder (`str` or `os.PathLike`): A folder that is empty or not there yet.
            identity (`dict`): From [`fingerprint`]: the model whose memories it will hold.
            dtype (`str`): See [`open`].
            keep_text (`bool`): See [`open`].

        Raises:
            MemoryStoreError: If the folder holds something else.
        """
        check_dtype(dtype)
        check_fingerprint(identity)
        folder = _as_folder(folder)
        if not (folder / FILE).exists():
            _empty_folder(folder)
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            versions["modeling_memory"] = getattr(sys.modules["modeling_memory"], "__version__", None)
            settings = {
                "format_version": FORMAT_VERSION,
                "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "created_with": versions,
                "fingerprint": identity,
                "dtype": dtype,
                "keeps_text": bool(keep_text),
            }
            # Another process may have been faster since; its file stays, and is opened.
            create_file(folder / FILE, settings)
        return cls(folder)

    def close(self) -> None:
        """Give the file back. A store that is no longer used does so by itself."""
        self._database.close()

    def __enter__(self) -> "MemoryStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_database"):
            self.close()

    # What it holds

    @property
    def created_with(self) -> dict[str, str]:
        """Versions of this package, torch and transformers that began the store."""
        return self._database.settings.get("created_with", {})

    @property
    def lock_seconds(self) -> float:
        """How long a change waits for another writer."""
        return self._database.lock_seconds

    @lock_seconds.setter
    def lock_seconds(self, seconds: float) -> None:
        self._database.lock_seconds = _check_seconds(seconds)

    def reload(self) -> None:
        """See what others have changed.

        Raises:
            MemoryStoreError: If the file is damaged.
        """
        self._database.reload()

    def __len__(self) -> int:
        """Texts in the store."""
        return self._database.state["texts"]

    def __contains__(self, text_id: object) -> bool:
        return isinstance(text_id, str) and bool(self._read("SELECT 1 FROM texts WHERE id = ?", text_id))

    @property
    def text_ids(self) -> list[str]:
        """Ids of the texts, in the order in which they were stored."""
        found = [text_id for (text_id,) in self._read("SELECT id FROM texts ORDER BY key")]
        if len(found) != len(self) or not all(map(is_writable, found)):
            raise damaged(self.folder / FILE, f"it holds {len(found)} texts, but {len(self)} were stored")
        return found

    @property
    def num_chunks(self) -> int:
        """Chunks of all texts."""
        return self._database.state["chunks"]

    @property
    def num_tokens(self) -> int:
        """Text tokens of all chunks, as the encoder's tokenizer counts them."""
        return self._database.state["tokens"]

    @property
    def num_unknown(self) -> int:
        """Tokens that the encoder's tokenizer has no word for; they are remembered as nothing."""
        return self._database.state["unknown"]

    @property
    def num_bytes(self) -> int:
        """Bytes of the store on disk, its write-ahead log included."""
        return sum(path.stat().st_size for path in self.folder.glob(f"{FILE}*") if path.is_file())

    @property
    def num_checked(self) -> int:
        """Chunks that the model was asked to write back when they were stored; see `on_loss` of [`append`]."""
        return self._database.state["checked"]

    @property
    def num_lost(self) -> int:
        """Chunks that it did not write back without an error."""
        return self._database.state["lost"]

    def digest(self, text_id: str) -> str | None:
        """Return the checksum of a text, as [`text_digest`] makes it; `None` if none was given."""
        return self._find(text_id)[1].digest

    def chunks(self, text_ids: str | Iterable[str] | None = None) -> list[Chunk]:
        """Return the chunks of some texts, or of all, in reading order."""
        found = self._entries() if text_ids is None else map(self._find, _as_ids(text_ids))
        return [chunk for _, entry in found for chunk in chunks_of(entry)]

    def text(self, text_id: str) -> str:
        """Return a text.

        Raises:
            MemoryStoreError: If there is no such text, or it was not kept.
        """
        key, entry = self._find(text_id)
        return "".join(content for _, content in self._passages(key, entry))

    def expand(self, chunks: Chunk | Passage | Sequence[Chunk]) -> list[str]:
        """Return the text of chunks.

        Raises:
            MemoryStoreError: If the text was not kept, or its tokenizer knows no characters.
        """
        chunks = self.select(chunks)
        if not self.keeps_text and chunks and all(chunk.comes_back is False for chunk in chunks):
            return [self._original(chunk) for chunk in chunks]
        # Each text once, however many of its chunks are asked for.
        texts = {text_id: self.text(text_id) for text_id in dict.fromkeys(chunk.text_id for chunk in chunks)}
        for chunk in chunks:
            if chunk.start is None:
                raise MemoryStoreError(
                    f"The text {chunk.text_id!r} was stored by a tokenizer that knows no offsets, so where its chunks "
                    "stand is not known. `store.text(text_id)` returns it whole."
                )
        return [texts[chunk.text_id][chunk.start : chunk.end] for chunk in chunks]

    def _original(self, chunk: Chunk) -> str:
        row = (self._find(chunk.text_id)[0] << SHIFT) + chunk.number
        original = self._blobs(range(row, row + 1))[0][1]
        if original is None:
            raise MemoryStoreError(
                f"Chunk {chunk.number} of {chunk.text_id!r} does not come back from its memories, and its text was "
                "not kept. Remember the text again with `on_loss='keep_text'`, or in a store that keeps texts."
            )
        return original

    def regenerate(self, chunks: Chunk | Passage | Sequence[Chunk]) -> list[str]:
        """Return what the model writes of chunks from their memories alone, right or wrong; see [`regenerate_ids`]."""
        chunks = self.select(chunks)
        reach = range(1 - LONGEST_CHARACTER, LONGEST_CHARACTER)
        wanted = {text_id: set[int]() for text_id in dict.fromkeys(chunk.text_id for chunk in chunks)}
        for chunk in chunks:
            # Its first or last character may have tokens in the chunks beside it.
            wanted[chunk.text_id].update(chunk.number + step for step in reach)
        texts: dict[Chunk, str] = {}
        for text_id, numbers in wanted.items():
            beside = [chunk for chunk in self.chunks(text_id) if chunk.number in numbers]
            written = self.regenerate_ids(beside)
            for run in _runs([chunk.number for chunk in beside]):
                own, lines = beside[: len(run)], written[: len(run)]
                beside, written = beside[len(run) :], written[len(run) :]
                sizes = [None if one.start is None else one.end - one.start for one in own]  # type: ignore[operator]
                texts |= zip(own, as_texts(self.processor.tokenizer, lines, sizes), strict=True)
        return [texts[chunk] for chunk in chunks]

    def regenerate_ids(self, chunks: Chunk | Passage | Sequence[Chunk]) -> list[list[int]]:
        """Return the tokens that the model writes of chunks from their memories alone, all in one pass.

        Args:
            chunks ([`Chunk`], [`Passage`] or a sequence of chunks): Of this store.

        Returns:
            `list` of `list` of `int`: For each chunk as many tokens as it has, right or wrong.

        Raises:
            MemoryStoreError: If the store was opened without a model.
            ValueError: If the model cannot be asked, saying why.
        """
        why = why_not_checkable(self._model(), self.processor)
        if why is not None:
            raise ValueError(f"The model cannot be asked what a memory holds: {why}.")
        chunks = self.select(chunks)
        per_window = self.processor.window_length // self.processor.chunk_length
        places = dict.fromkeys((chunk.text_id, chunk.number // per_window) for chunk in chunks)
        # Whole windows, as when they were checked: what a chunk becomes depends on its neighbours a little.
        windows = [self.chunks(one)[i * per_window : (i + 1) * per_window] for one, i in places]
        beside = [chunk for window in windows for chunk in window]
        lines = write_back(self._model(), self.memories(beside), [len(window) for window in windows]).tolist()
        written = {chunk: line[: chunk.num_tokens] for chunk, line in zip(beside, lines, strict=True)}
        return [written[chunk] for chunk in chunks]

    def quote(self, chunks: Chunk | Passage | Sequence[Chunk]) -> list[str]:
        """Return the text of chunks word for word: as it was kept, else as the model writes it back.

        Raises:
            MemoryStoreError: If a chunk's text was not kept and it is not known to come back: nothing is quoted that
                may be wrong.
        """
        chunks = self.select(chunks)
        if self.keeps_text:
            return self.expand(chunks)
        for chunk in chunks:
            if chunk.comes_back is None:
                raise MemoryStoreError(
                    f"It was not tried whether chunk {chunk.number} of {chunk.text_id!r} comes back from its "
                    "memories. Remember the text again with `on_loss`, or call `regenerate`, which promises nothing."
                )
        whole = [chunk for chunk in chunks if chunk.comes_back]
        written = dict(zip(whole, self.regenerate(whole), strict=True)) if whole else {}
        return [written[chunk] if chunk.comes_back else self._original(chunk) for chunk in chunks]

    def memories(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Return the memories of some chunks, each row compared with its checksum.

        Args:
            chunks (`Sequence` of [`Chunk`]): From [`chunks`], [`nearest`] or [`iterate`].

        Returns:
            `torch.FloatTensor` of shape `(n, K, D)` in float32: the caller's own.

        Raises:
            MemoryStoreError: If a row is damaged, or the store has no such chunk.
        """
        found: dict[str, tuple[int, Entry]] = {}
        rows = []
        for chunk in chunks if isinstance(chunks, Iterable) else [chunks]:
            if not isinstance(chunk, Chunk):
                raise MemoryStoreError(f"A chunk is {chunk!r}; take chunks from this store's `chunks`.")
            if chunk.text_id not in found:
                found[chunk.text_id] = self._find(chunk.text_id)
            key, entry = found[chunk.text_id]
            if chunk.number not in range(len(entry.places)):
                raise MemoryStoreError(
                    f"The text {chunk.text_id!r} has {len(entry.places)} chunks, but chunk {chunk.number} was asked "
                    "for. Take chunks from this store's `chunks`."
                )
            # In the order asked for: memories stand in a prompt as they were found, not as they were stored.
            rows.append((key << SHIFT) + chunk.number)
        return self._decode([blob for run in _runs(rows) for blob, _ in self._blobs(run)])

    def select(self, wanted: Wanted) -> list[Chunk]:
        """Return chunks as they are given, also those of passages, or those of texts that are named; `None`: all."""
        if wanted is None or isinstance(wanted, str):
            return self.chunks(wanted)
        single = isinstance(wanted, (Chunk, Passage))
        named: Any = [*wanted] if isinstance(wanted, Iterable) and not single else wanted
        if not single and (not isinstance(named, list) or None in named):
            raise MemoryStoreError(
                f"What is wanted is {wanted!r:.80}; expected an id, or ids, chunks or passages, or None for all."
            )
        chunks: list[Chunk] = []
        for one in [named] if single else named:
            chunks += [one] if isinstance(one, Chunk) else one.chunks if isinstance(one, Passage) else self.chunks(one)
        return chunks

    def iterate(
        self, text_ids: str | Iterable[str] | None = None, *, batch_size: int = 4096
    ) -> Iterator[tuple[list[Chunk], torch.Tensor]]:
        """Yield chunks with their memories `(n, K, D)` in float32, at most `batch_size` chunks of a text at a time."""
        _check_positive(batch_size=batch_size)
        for text_id in self.text_ids if text_ids is None else _as_ids(text_ids):
            chunks = self.chunks(text_id)
            for start in range(0, len(chunks), batch_size):
                block = chunks[start : start + batch_size]
                yield block, self.memories(block)

    def load(self, wanted: Wanted = None, *, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Return memories in one row, as `forward` and `generate` take them.

        Args:
            wanted (`str`, ids, [`Chunk`]s or [`Passage`]s, *optional*): A text, several in this order, or parts of
                texts. Default: everything.
            dtype (`torch.dtype`, *optional*): Default: that of the model's decoder, else float32.

        Returns:
            `dict`: `memory_embeds` `(1, M, D)` and `memory_mask` `(1, M)`, on the model's device; of a model with
            `memory_positions="source"` also `memory_num_tokens` `(1, M)`.
        """
        chunks = self.select(wanted)
        memory_embeds = self.memories(chunks).flatten(0, 1)[None]
        if self.model is not None:
            memory_embeds = memory_embeds.to(self.model.device, self.model.decoder.dtype)
        # After the model's own type, so that a caller who names one has the last word.
        memory_embeds = memory_embeds if dtype is None else memory_embeds.to(dtype)
        memory_mask = torch.ones_like(memory_embeds[..., 0], dtype=torch.long)
        loaded = {"memory_embeds": memory_embeds, "memory_mask": memory_mask}
        if self.model is not None and self.model.config.memory_positions == "source":
            # Not all chunks are full: without their lengths each would stand where a full one does.
            encoder_tokenizer = self.processor.encoder_tokenizer
            frame = 0 if encoder_tokenizer is None else sum(map(len, special_frame(encoder_tokenizer)))
            lengths = torch.tensor([chunk.num_tokens + frame for chunk in chunks], device=memory_mask.device)
            # Special tokens count, as they do where the model encodes a context itself.
            filled_to = filled_length(self.model.config)
            loaded["memory_num_tokens"] = tokens_of_groups(lengths, self._shape[0], filled_to=filled_to).flatten()[
                None
            ]
        return loaded

    def prepare(
        self, text: str, wanted: Wanted = None, *, expand: Sequence[Chunk] = (), add_special_tokens: bool = True
    ) -> BatchFeature:
        """Prepare a prompt that is answered from the store.

        Args:
            text (`str`): The prompt. The memories stand where its memory token stands, else in front.
            wanted (`str`, ids, [`Chunk`]s or [`Passage`]s, *optional*): What to answer from, in this order. Default:
                everything.
            expand (`Sequence` of [`Chunk`]): Which of these chunks stand there as text instead, in their place. Text
                is data: a marker's name in it is read as its letters.
            add_special_tokens (`bool`): Whether the decoder's tokenizer adds its own to the prompt.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` `(1, T)`, and, unless all is text, `memory_embeds`
            `(1, M, D)` and `memory_mask` `(1, M)`: what `generate` and `forward` take.

        Raises:
            MemoryStoreError: If the store was opened without a model, or a chunk has no text to expand.
            ValueError: If `expand` names a chunk that is not wanted.
        """
        if not isinstance(text, str):
            raise ValueError(f"`text` is a {type(text).__name__}; expected a string: one prompt at a time.")
        device, chunks, expand = self._model().device, self.select(wanted), self.select(expand)
        known = set(chunks)
        stray = [chunk for chunk in expand if chunk not in known]
        if stray:
            raise ValueError(
                f"`expand` names chunk {stray[0].number} of {stray[0].text_id!r}, which is not among the chunks to "
                "answer from. Expand chunks that are in `wanted`."
            )
        as_text = dict(zip(expand, self.expand(expand), strict=True))
        slot = self.processor.memory_token_id
        # One slot marks the place; then what really stands there.
        # By the processor, so that a memory token in the prompt is found as it is in any other.
        row = self.processor(text=text, num_memories=1, add_special_tokens=add_special_tokens)["input_ids"][0]
        place = row.index(slot)
        context: list[int] = []
        for chunk in chunks:
            if chunk not in as_text:
                context += [slot] * self._shape[0]
                continue
            context += self.processor.text_ids(as_text[chunk])
        input_ids = torch.tensor([row[:place] + context + row[place + 1 :]], device=device)
        kept = [chunk for chunk in chunks if chunk not in as_text]
        # A prompt whose chunks are all text is a plain one, and no empty memories are passed on.
        memories = self.load(kept) if kept else {}
        return BatchFeature({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **memories})

    # Searching

    def nearest(
        self,
        queries: torch.Tensor,
        k: int,
        *,
        text_ids: str | Iterable[str] | None = None,
        block_size: int = 16384,
    ) -> list[list[tuple[Chunk, float]]]:
        """Return the chunks nearest to each query: exactly, by the cosine to a chunk's nearest memory.

        A question is no memory of its answer, and the memory of a chunk of few tokens is near to many: this finds what
        was remembered in the same words. For questions there is [`search`].

        Args:
            queries (`torch.FloatTensor` of shape `(Q, D)`): Memories to look for.
            k (`int`): Chunks for each query; fewer if the store has fewer.
            text_ids (`str` or ids, *optional*): Texts to look in. Default: all.
            block_size (`int`): Chunks of a block.

        Returns:
            For each query its chunks with their cosines, nearest first.

        Raises:
            ValueError: If a query has another width or is not finite, or a number is below 1.
        """
        _check_positive(k=k, block_size=block_size)
        width = self._shape[1]
        if not isinstance(queries, torch.Tensor) or queries.dim() != 2 or queries.shape[1] != width:
            raise ValueError(
                f"`queries` is {tuple(queries.shape) if isinstance(queries, torch.Tensor) else type(queries).__name__}"
                f"; expected a tensor (queries, {width}): memories of this store's model, as `encode_memories` makes "
                "them, one a row."
            )
        # A NaN is neither near nor far: it would be answered by whatever comes first.
        if not torch.isfinite(queries).all():
            raise ValueError("A query holds a number that is not finite. Check what it was made from.")
        search = BlockSearch(normalize(queries.detach().cpu()), k)
        if text_ids is None:
            for rows, blobs in self._blocks(block_size):
                search.add(self._decode(blobs), rows)
        else:
            # In the order of the file, so that neighbouring rows are read in one go.
            wanted = sorted({self._find(text_id) for text_id in _as_ids(text_ids)})
            rows = [(key << SHIFT) + i for key, entry in wanted for i in range(len(entry.places))]
            for start in range(0, len(rows), block_size):
                block = rows[start : start + block_size]
                search.add(self._decode([blob for run in _runs(block) for blob, _ in self._blobs(run)]), block)
        found = search.results()
        chunks = self._chunks_of({row for pairs in found for row, _ in pairs})
        return [[(chunks[row], score) for row, score in pairs] for pairs in found]

    def search_text(
        self, query: str, k: int = 5, *, text_ids: str | Iterable[str] | None = None
    ) -> list[tuple[Passage, float]]:
        """Return the passages that share most words with a question, by BM25 over the kept texts.

        Passages of a text are about equally long, so a short last chunk is never one by itself.

        Args:
            query (`str`): What to look for. It is data: words are looked for, operators in it mean nothing.
            k (`int`): Passages; fewer if fewer share a word.
            text_ids (`str` or ids, *optional*): Texts to look in. Default: all.

        Returns:
            Passages with their scores, best first. What [`load`] and [`prepare`] take.

        Raises:
            MemoryStoreError: If the texts were not kept.
        """
        _check_positive(k=k)
        if not isinstance(query, str):
            raise ValueError(f"`query` is a {type(query).__name__}; expected a string.")
        if not self.keeps_text:
            raise MemoryStoreError(
                f"{self.folder.name} keeps no texts to search. Begin a store with `keep_text=True`, or use `nearest`."
            )
        words = dict.fromkeys(re.findall(r"\w+", query.casefold()))
        if not words:
            return []
        # Quoted, since a bare word may be an operator of the query language.
        expression = " OR ".join(f'"{word}"' for word in words)
        statement = "SELECT rowid, -bm25(words) FROM words WHERE words MATCH ? ORDER BY 2 DESC, 1"
        if text_ids is None:
            rows = self._read(f"{statement} LIMIT ?", expression, k)
        else:
            # Filtered here: the index knows row numbers only, and a list of ids may be longer than a statement takes.
            keys = {self._find(text_id)[0] for text_id in _as_ids(text_ids)}
            found = (row for row in self._read(statement, expression) if row[0] >> SHIFT in keys)
            rows = list(islice(found, k))
        return [(self._passage(row), score) for row, score in rows]

    def search(
        self,
        query: str,
        k: int = 5,
        *,
        text_ids: str | Iterable[str] | None = None,
        embed: Callable[[list[str]], torch.Tensor] | None = None,
    ) -> list[tuple[Passage, float]]:
        """Return what answers a question best: by its words where text is kept, else by its memories.

        Args:
            query (`str`): What to look for.
            k (`int`): Passages, or chunks, as passages of one.
            text_ids (`str` or ids, *optional*): Texts to look in. Default: all.
            embed (`Callable`, *optional*): A sentence encoder, texts -> vectors `(n, E)`. It orders the best 50 by
                words anew, and both orders are fused (reciprocal ranks, which are the scores then).

        Raises:
            MemoryStoreError: If the text is not kept and the store was opened without a model.
            ValueError: If the question is empty.
        """
        if self.keeps_text and embed is not None:
            found = self.search_text(query, max(k, CANDIDATES), text_ids=text_ids)
            if not found:
                return []
            asked, *vectors = normalize(embed([query, *(passage.text for passage, _ in found)]))
            cosines = torch.stack(vectors) @ asked  # (passages,)
            fused = fuse([range(len(found)), cosines.argsort(descending=True).tolist()])
            return [(found[place][0], score) for place, score in fused[:k]]
        if self.keeps_text:
            return self.search_text(query, k, text_ids=text_ids)
        (text,) = remember_texts(self._model(), self.processor, {"query": query}, batch_size=256, keep_text=False)
        best: dict[Chunk, float] = {}
        # The short chunk at a text's end is near to anything: it stands for less than half of what is looked for.
        sizes = [tokens for tokens in text.counts for _ in range(self._shape[0])]
        near = self.nearest(text.memories.flatten(0, 1), 4 * k + 16, text_ids=text_ids)
        for tokens, pairs in zip(sizes, near, strict=True):
            for chunk, score in pairs if 2 * tokens >= max(sizes) else ():
                # A question may be several memories; a chunk that answers one of them well is an answer.
                if 2 * chunk.num_tokens >= tokens:
                    best[chunk] = max(score, best.get(chunk, -1.0))
        order = sorted(best, key=lambda chunk: -best[chunk])[:k]
        return [(Passage(chunk.text_id, (chunk,), ""), best[chunk]) for chunk in order]

    # Changing

    def append(
        self,
        texts: Mapping[str, str],
        *,
        batch_size: int = 256,
        on_duplicate: str = "error",
        on_loss: str | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> int:
        """Encode texts and store their memories, all or none.

        Args:
            texts (`Mapping[str, str]`): Id -> text.
            batch_size (`int`): Chunks that the encoder reads at a time.
            on_duplicate (`str`): What to do with an id that is stored already: `"error"`, `"skip"` or `"replace"`.
            on_loss (`str`, *optional*): Let the model write every chunk back from its memories as they are stored, and
                say what becomes of those that it does not write back whole: `"warn"` (they are counted, see
                [`num_lost`]), `"keep_text"` (their text is kept as well) or `"split"` (they are cut until they come
                back, and kept as text where that does not help). Default: that is not tried.
            progress (`Callable`, *optional*): Called with the number of chunks after each batch.

        Returns:
            `int`: Texts that were stored.

        Raises:
            MemoryStoreError: If the store was opened without a model, the model has changed since, or an id is stored
                already.
            ValueError: If a text is empty, or the model is in training mode.
            OSError: If the disk is full; nothing of this call is stored, everything before is.
        """
        if not isinstance(texts, Mapping):
            raise ValueError(f"`texts` is a {type(texts).__name__}; expected a mapping, id -> text.")
        model = self._model()
        # A model that was trained on since the store was opened makes memories of another kind.
        if quick_fingerprint(model, self.processor) != self._quick:
            now = fingerprint(model, self.processor)
            check_same_fingerprint(self.fingerprint, now, "this model, which has changed since the store was opened")
            self._quick = quick_fingerprint(model, self.processor)
        # Before encoding, which is what takes time.
        texts = {key: texts[key] for key in self._new_ids(texts, on_duplicate)}
        stored = remember_texts(
            model,
            self.processor,
            texts,
            batch_size=batch_size,
            keep_text=self.keeps_text,
            progress=progress,
            on_loss=on_loss,
            dtype=self.dtype,
        )
        lost = sum(list(text.comes_back).count(False) for text in stored if text.comes_back is not None)
        if lost and on_loss == "warn":
            total = sum(len(text.counts) for text in stored)
            logger.warning(f"{lost} of {total} chunks do not come back from their memories without an error.")
        return self.append_memories(stored, on_duplicate=on_duplicate)

    def append_memories(self, texts: Sequence[StoredText], *, on_duplicate: str = "error") -> int:
        """Store memories that are ready, all or none.

        Args:
            texts (`Sequence` of [`StoredText`]): Texts with their memories `(n, K, D)`, of this store's model.
            on_duplicate (`str`): See [`append`].

        Returns:
            `int`: Texts that were stored.

        Raises:
            ValueError: If a field of a text is not what it should be, naming both; nothing is stored.
        """
        if isinstance(texts, (str, bytes, StoredText, Mapping)) or not isinstance(texts, Iterable):
            raise ValueError(f"`texts` is a {type(texts).__name__}; expected a list of `StoredText`s.")
        texts = list(texts)
        for text in texts:
            # All before the first is written: the change is whole or not there, and so is the refusal.
            check_stored_text(text, self.fingerprint["cut"])
        if len({text.text_id for text in texts}) < len(texts):
            raise MemoryStoreError("Two texts of one call have the same id. Give each its own.")
        return self._store(map(self._record, texts), [text.text_id for text in texts], on_duplicate)

    def merge(self, other: Any, *, on_duplicate: str = "error") -> int:
        """Store what another store of the same model holds, all or none; equal formats are taken over bit by bit.

        Args:
            other ([`MemoryStore`], or Arrow data): The other store, or what [`to_arrow`] made of one: a
                `RecordBatchReader`, a `Table`, or anything with `__arrow_c_stream__`, the rows of a text together.
            on_duplicate (`str`): See [`append`].

        Returns:
            `int`: Texts that were stored.

        Raises:
            MemoryStoreError: If the other is damaged, of another model or no store, or an id is stored already.
        """
        if isinstance(other, MemoryStore):
            check_same_fingerprint(self.fingerprint, other.fingerprint, f"the store {other.folder.name}")
            if other.folder.resolve() == self.folder.resolve():
                raise MemoryStoreError(f"{self.folder.name} cannot be merged into itself. Give another store.")
            new = self._new_ids(other.text_ids, on_duplicate)
            return self._store(
                (self._recoded(other._whole(*other._find(one)), other.dtype) for one in new), new, on_duplicate
            )
        # Vectors alone look alike for any model of a width; what they depend on travels beside them.
        reader, settings = read_settings(other)
        check_fingerprint(settings["fingerprint"])
        check_same_fingerprint(self.fingerprint, settings["fingerprint"], "the Arrow data")
        records = read_records(reader, settings)
        return self._store((self._recoded(one, settings["dtype"]) for one in records), None, on_duplicate)

    def delete(self, text_ids: str | Iterable[str]) -> int:
        """Delete texts. Their bytes stay on the disk until [`vacuum`].

        Args:
            text_ids (`str` or ids): Texts of the store.

        Returns:
            `int`: Texts that were deleted.
        """
        gone = list(dict.fromkeys(_as_ids(text_ids)))
        with self._database.changing() as database:
            for text_id in gone:
                self._drop(database, text_id, few=len(gone) <= FEW)
        return len(gone)

    def vacuum(self) -> int:
        """Take deleted and replaced texts, and what killed writers left, off the disk.

        Costs grow with what was deleted; before SQLite 3.42, where text is kept, also with the kept text: its index of
        words is written anew. While a reader still holds an
        earlier state, the bytes stay in the write-ahead log, of which a warning tells.

        Returns:
            `int`: Bytes that were freed; below 0 if a reader keeps them from it.
        """
        before, gone = self.num_bytes, self._database.state["stale"]
        if self._database.is_fixed:
            raise MemoryStoreError(f"{self.folder} cannot be written. Copy the store with `backup(path)`.")
        for path in self.folder.glob(f"{FILE}.*{PART}*"):
            path.unlink(missing_ok=True)
        if gone:
            with self._database.changing() as database:
                if self._database.state["marked"]:
                    database.execute("INSERT INTO words(words) VALUES ('optimize')")  # words of deleted texts leave it
                self._database.state |= {"stale": 0, "marked": 0}
        # Built anew only where that costs no more than what was deleted took.
        if not self._database.shrink(anew=gone > self.num_chunks // 4):
            logger.warning(
                f"{self.folder.name} is being read as it was before: deleted bytes stay in its write-ahead log until "
                "these readers reload or close, and `vacuum` is called again."
            )
        return before - self.num_bytes

    # Copying and mending

    def backup(self, path: str | os.PathLike) -> None:
        """Copy the store as it is seen here into a new folder, while others may write.

        Args:
            path (`str` or `os.PathLike`): A folder that is empty or not there yet.

        Raises:
            MemoryStoreError: If the folder holds something.
            OSError: If the disk is full.
        """
        folder = _as_folder(path)
        if (folder / FILE).exists():
            raise MemoryStoreError(f"{folder.name} holds a store already. Choose an empty folder.")
        _empty_folder(folder)
        with self._database.lock, new_file(folder / FILE) as target, explained(self.folder / FILE):
            self._database.connection.backup(target)

    def to_arrow(self) -> Any:
        """Return the store as a `pyarrow.RecordBatchReader`, a row a chunk; see [`store.arrow`] for its columns.

        `pyarrow.parquet.write_table(store.to_arrow().read_all(), "store.parquet")`, DuckDB, Lance, Spark and Ray take
        it; [`merge`] takes it back, bit by bit.
        """
        return to_reader((self._whole(*self._find(text_id)) for text_id in self.text_ids), self._database.settings)

    def verify(self) -> list[str]:
        """Read every byte of the store again.

        Returns:
            What is wrong, a line each; empty if nothing is.
        """
        from .mending import verify

        return verify(self)

    @staticmethod
    def repair(folder: str | os.PathLike) -> dict[str, Any]:
        """Make a damaged store usable again and say what that costs: see `store.mending.repair`."""
        from .mending import repair

        return repair(_as_folder(folder))

    # Inside

    def _model(self) -> Any:
        if self.model is None:
            raise MemoryStoreError("The store was opened without a model. Open it with `model` and `processor`.")
        return self.model

    def _record(self, text: StoredText) -> Record:
        spans = [(-1, -1)] * len(text.counts) if text.spans is None else text.spans
        known = [UNCHECKED] * len(spans) if text.comes_back is None else map(int, text.comes_back)
        places = [(*span, count, back) for span, count, back in zip(spans, text.counts, known, strict=True)]
        digest = text.digest if text.digest or text.text is None else text_digest(text.text)
        try:
            memories = encode_vectors(text.memories, self.dtype)
        except ValueError as error:
            raise ValueError(f"`memories` of the text {text.text_id!r}: {error}") from error
        self._tell_of_rounding(text.memories, memories)
        originals = text.originals or [None] * len(memories)
        kept = list(zip(memories, originals, strict=True))
        return Record(text.text_id, digest, text.num_unknown, places, kept, text.text)

    def _tell_of_rounding(self, memories: torch.Tensor, rows: list[bytes]) -> None:
        """Say once that the default format, which nobody may have chosen, costs memories of this kind something."""
        if self._told_of_rounding or self.dtype != DEFAULT_DTYPE:
            return
        missed = rounding_error(memories, rows, self.dtype)
        self._told_of_rounding = missed > ROUGH
        if self._told_of_rounding:
            logger.warning(
                f"{self.dtype} rounds the numbers of these memories by {missed:.0%} of their mean size, more than was "
                "found to cost nothing: a few are far larger than the others. See `quantization_report`, and begin "
                "stores for this model with `dtype='float16'`."
            )

    def _recoded(self, record: Record, dtype: str) -> Record:
        """The record in this store's number format."""
        if dtype == self.dtype:
            return record
        blobs, originals = zip(*record.memories, strict=True)
        memories = encode_vectors(decode_vectors(list(blobs), dtype, *self._shape), self.dtype)
        # Other numbers: whether chunks come back from them was not tried.
        places = [(*place[:3], UNCHECKED) for place in record.places]
        return replace(record, places=places, memories=list(zip(memories, originals, strict=True)))

    def _new_ids(self, text_ids: Iterable[str], on_duplicate: str) -> list[str]:
        """Those of some ids that are to be stored."""
        if on_duplicate not in ON_DUPLICATE:
            raise ValueError(f"`on_duplicate` is {on_duplicate!r}; expected 'error', 'skip' or 'replace'.")
        given = list(text_ids)
        for text_id in given:
            check_id(text_id)
        if on_duplicate == "replace":
            return given
        known = [text_id for text_id in given if text_id in self]
        if known and on_duplicate == "error":
            raise MemoryStoreError(
                f"{self.folder.name} already holds the text {known[0]!r} ({len(known)} of {len(given)}). Pass "
                "`on_duplicate='skip'` or `'replace'`, or give it another id."
            )
        taken = set(known)
        return [text_id for text_id in given if text_id not in taken]

    def _store(self, records: Iterable[Record], text_ids: list[str] | None, on_duplicate: str) -> int:
        """Write records in one change; duplicates of ids known beforehand are reported before any is made."""
        stored: set[str] = set()
        with self._database.changing() as database:
            wanted = set(self._new_ids(text_ids or (), on_duplicate))
            for record in records:
                if record.text_id in stored:
                    raise MemoryStoreError(
                        f"The text {record.text_id!r} comes twice. Keep the rows of a text together, and texts apart."
                    )
                if text_ids is None:
                    wanted.update(self._new_ids([record.text_id], on_duplicate))
                if record.text_id in wanted:
                    self._insert(database, record)
                    stored.add(record.text_id)
        return len(stored)


def _runs(rows: list[int]) -> Iterator[range]:
    """Numbers as ranges, in their order: rows that follow each other are read together."""
    start = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield range(rows[start], rows[place - 1] + 1)
            start = place


def _as_folder(folder: Any) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or not str(folder):
        raise MemoryStoreError(f"`folder` is {folder!r}; expected the path of a folder.")
    return Path(folder)


def _empty_folder(folder: Path) -> None:
    """Make a folder, or take one that is empty but for what a killed writer left.

    Raises:
        MemoryStoreError: If that cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise MemoryStoreError(f"{folder} is a file, or stands in one. Choose a folder.") from None
    except OSError as error:
        raise MemoryStoreError(f"{folder} cannot be made: {error.strerror}. Choose another folder.") from error
    if not os.access(folder, os.W_OK):
        raise MemoryStoreError(f"{folder} cannot be written: its disk is read-only, or it is another user's.")
    others = sorted(one.name for one in folder.iterdir() if PART not in one.name)
    if FILE in others:
        return  # another process was faster
    if any(name.startswith("index-") for name in others):
        check_place(folder)
    if others:
        raise MemoryStoreError(f"{folder.name} holds {', '.join(others[:3])} and is no store. Choose an empty folder.")


def _as_ids(text_ids: str | Iterable[str]) -> list[str]:
    if not isinstance(text_ids, (str, Iterable)):
        raise MemoryStoreError(f"Ids of texts were given as {text_ids!r}; expected a string, or several.")
    return [text_ids] if isinstance(text_ids, str) else list(text_ids)


def _check_seconds(seconds: Any) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e6:
        raise ValueError(
            f"`lock_seconds` is {seconds!r}; expected how many seconds a change waits for others, 0 to a million."
        )
    return seconds


def _check_positive(**numbers: Any) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"`{name}` is {number!r}; expected a whole number, 1 or more.")
