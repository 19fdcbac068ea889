"""Memories on disk: texts in, memories out, of one model, checked byte by byte.

A store is a folder of shards, which are never changed, and one index, which is replaced as a whole: what the newest
index names is stored. So a change is there or it is not, whatever interrupts it, and what was stored before stays.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_utils import PreTrainedModel

from .memory_codec import check_dtype, encode_vectors
from .memory_files import LOCK, PART, MemoryStoreError, write_file, writing
from .memory_fingerprint import check_same_fingerprint, fingerprint
from .memory_index import commit_index, index_files
from .memory_remembering import encode_chunk_ids, remember_texts
from .memory_shard import Chunk, StoredText, pack_texts
from .memory_store_reading import StoredMemories
from .memory_store_upkeep import repair, vacuum

ON_DUPLICATE = ("error", "skip", "replace")


class MemoryStore(StoredMemories):
    """Memories of texts on disk, of one encoder, projector and tokenizer.

    Begin or open one with [`MemoryStore.open`]. Every change is whole or not at all, and on the disk when the call
    returns; one writer at a time, any number of readers. Bytes that were deleted or replaced, or left behind by a
    writer that was killed, stay on the disk until [`vacuum`]. Memories can be turned back into text: a store is as
    sensitive as what it remembers.

    Args:
        folder (`str` or `os.PathLike`): Where it stands.
        model ([`MemoryEncoderDecoderModel`], *optional*): The model whose memories it holds. Without one the store
            can be read, merged and deleted from.
        processor ([`MemoryProcessor`], *optional*): The model's processor.
        lock_seconds (`float`): How long a change waits for another writer.

    Raises:
        MemoryStoreError: If there is no store, it is damaged, of a later version, or of another model.

    Example:
    ```python
    store = MemoryStore.open("letters", model, processor, create=True)
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
        super().__init__(folder)
        self.model, self.processor, self.lock_seconds = model, processor, lock_seconds
        if (model is None) != (processor is None):
            raise MemoryStoreError("A model and its processor belong together. Give both or neither.")
        if model is not None:
            check_same_fingerprint(self.fingerprint, fingerprint(model, processor), "this model")

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        model: PreTrainedModel | None = None,
        processor: Any = None,
        *,
        create: bool = False,
        dtype: str = "float16",
        keep_text: bool = False,
        lock_seconds: float = 60.0,
    ) -> "MemoryStore":
        """Open a store, or begin one.

        Args:
            folder (`str` or `os.PathLike`): Where it stands.
            model ([`MemoryEncoderDecoderModel`], *optional*): See the class.
            processor ([`MemoryProcessor`], *optional*): See the class.
            create (`bool`): Whether to begin a store where there is none.
            dtype (`str`): Number format of a new store: `"float32"`, `"float16"`, `"bfloat16"`, `"int8"`, or, where
                torch has them, `"float8_e4m3fn"` and `"float8_e5m2"`.
            keep_text (`bool`): Whether a new store keeps the texts, so that chunks can be expanded.
            lock_seconds (`float`): See the class.

        Raises:
            MemoryStoreError: See the class.
            ValueError: If `dtype` is unknown.
        """
        if create and not index_files(Path(folder)):
            if model is None or processor is None:
                raise MemoryStoreError("A new store belongs to a model. Give `model` and `processor`.")
            cls.create(folder, fingerprint(model, processor), dtype=dtype, keep_text=keep_text)
        return cls(folder, model, processor, lock_seconds=lock_seconds)

    @classmethod
    def create(
        cls, folder: str | os.PathLike, identity: dict[str, Any], *, dtype: str = "float16", keep_text: bool = False
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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with writing(folder, 60.0):
            if not index_files(folder):
                others = sorted(one.name for one in folder.iterdir() if one.name != LOCK and one.suffix != PART)
                if others:
                    raise MemoryStoreError(
                        f"{folder.name} holds {', '.join(others[:3])} and is no store. Choose an empty folder."
                    )
                own = getattr(sys.modules[__package__ or __name__], "__version__", None)
                versions = {"torch": torch.__version__, "transformers": transformers.__version__}
                versions["modeling_memory"] = own
                commit_index(
                    folder,
                    {
                        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                        "created_with": versions,
                        "fingerprint": identity,
                        "dtype": dtype,
                        "keeps_text": keep_text,
                        "shards": [],
                    },
                    previous=0,
                )
        return cls(folder)

    # Using

    def _model(self) -> Any:
        if self.model is None:
            raise MemoryStoreError("The store was opened without a model. Open it with `model` and `processor`.")
        return self.model

    def load(
        self, wanted: str | Iterable[str] | Iterable[Chunk] | None = None, *, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Return memories in one row, as `forward` and `generate` take them.

        Args:
            wanted (`str`, ids, or [`Chunk`]s, *optional*): A text, several in this order, or single chunks. Default:
                everything.
            dtype (`torch.dtype`, *optional*): Default: that of the model's decoder, else float32.

        Returns:
            `dict`: `memory_embeds` `(1, M, D)` and `memory_mask` `(1, M)`, on the model's device.
        """
        memory_embeds = self.memories(self.select(wanted)).flatten(0, 1)[None]
        if self.model is not None:
            memory_embeds = memory_embeds.to(self.model.device, self.model.decoder.dtype)
        memory_embeds = memory_embeds if dtype is None else memory_embeds.to(dtype)
        return {
            "memory_embeds": memory_embeds,
            "memory_mask": torch.ones_like(memory_embeds[..., 0], dtype=torch.long),
        }

    def prepare(
        self,
        text: str,
        wanted: str | Iterable[str] | Iterable[Chunk] | None = None,
        *,
        expand: Sequence[Chunk] = (),
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """Prepare a prompt that is answered from the store.

        Args:
            text (`str`): The prompt. The memories stand where its memory token stands, else in front.
            wanted (`str`, ids, or [`Chunk`]s, *optional*): What to answer from, in this order. Default: everything.
            expand (`Sequence` of [`Chunk`]): Which of these chunks stand in clear text instead, in their place.
            add_special_tokens (`bool`): Whether the decoder's tokenizer adds its own to the prompt.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` `(1, T)`, and, unless all is in clear text,
            `memory_embeds` `(1, M, D)` and `memory_mask` `(1, M)`: what `generate` and `forward` take.

        Raises:
            MemoryStoreError: If the store was opened without a model, or a chunk has no text to expand.
            ValueError: If `expand` names a chunk that is not wanted.
        """
        device, chunks = self._model().device, self.select(wanted)
        stray = [chunk for chunk in expand if chunk not in chunks]
        if stray:
            raise ValueError(
                f"`expand` names chunk {stray[0].number} of {stray[0].text_id!r}, which is not among the chunks to "
                "answer from. Expand chunks that are in `wanted`."
            )
        in_clear = dict(zip(expand, self.expand(expand), strict=True))
        slot, tokenizer = self.processor.memory_token_id, self.processor.tokenizer
        # One slot marks the place; then what really stands there.
        row = self.processor(text=text, num_memories=1, add_special_tokens=add_special_tokens)["input_ids"][0]
        place = row.index(slot)
        context: list[int] = []
        for chunk in chunks:
            if chunk in in_clear:
                context += tokenizer(in_clear[chunk], add_special_tokens=False)["input_ids"]
            else:
                context += [slot] * self.fingerprint["cut"]["memories_per_chunk"]
        input_ids = torch.tensor([row[:place] + context + row[place + 1 :]], device=device)
        kept = [chunk for chunk in chunks if chunk not in in_clear]
        memories = self.load(kept) if kept else {}
        return BatchFeature({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **memories})

    # Changing

    def append(
        self,
        texts: Mapping[str, str],
        *,
        batch_size: int = 256,
        on_duplicate: str = "error",
        progress: Callable[[int], Any] | None = None,
    ) -> int:
        """Encode texts and store their memories, all or none.

        Args:
            texts (`Mapping[str, str]`): Id -> text.
            batch_size (`int`): Chunks that the encoder reads at a time.
            on_duplicate (`str`): What to do with an id that is stored already: `"error"`, `"skip"` or `"replace"`.
            progress (`Callable`, *optional*): Called with the number of chunks after each batch.

        Returns:
            `int`: Texts that were stored.

        Raises:
            MemoryStoreError: If the store was opened without a model, or an id is stored already.
            ValueError: If a text is empty, or the model is in training mode.
            OSError: If the disk is full; nothing of this call is stored, everything before is.
        """
        model = self._model()
        texts = self._without_duplicates(texts, on_duplicate)
        keep = self.keeps_text
        stored = remember_texts(model, self.processor, texts, batch_size=batch_size, keep_text=keep, progress=progress)
        return self.append_memories(stored, on_duplicate=on_duplicate)

    def append_chunks(
        self,
        text_id: str,
        context_input_ids: torch.Tensor,
        context_attention_mask: torch.Tensor | None = None,
        *,
        batch_size: int = 256,
        on_duplicate: str = "error",
    ) -> int:
        """Encode chunks of token ids and store their memories as one text.

        Args:
            text_id (`str`): Its id.
            context_input_ids (`torch.LongTensor` of shape `(C, L)`): Chunks.
            context_attention_mask (`torch.LongTensor` of shape `(C, L)`, *optional*): 1 for tokens, 0 for padding.
            batch_size (`int`): Chunks that the encoder reads at a time.
            on_duplicate (`str`): See [`append`].

        Raises:
            ValueError: If a chunk has no token, or the shapes are others.
        """
        model = self._model()
        mask = torch.ones_like(context_input_ids) if context_attention_mask is None else context_attention_mask
        if context_input_ids.dim() != 2 or mask.shape != context_input_ids.shape or not mask.bool().any(1).all():
            raise ValueError(
                f"`context_input_ids` has shape {tuple(context_input_ids.shape)} and its mask {tuple(mask.shape)}; "
                "expected (chunks, chunk tokens) for both, with a token in every chunk."
            )
        rows = [ids[real].tolist() for ids, real in zip(context_input_ids, mask.bool(), strict=True)]
        memories = encode_chunk_ids(model, rows, batch_size)
        return self.append_memories([StoredText(text_id, memories, list(map(len, rows)))], on_duplicate=on_duplicate)

    def append_memories(self, texts: Sequence[StoredText], *, on_duplicate: str = "error") -> int:
        """Store memories that are ready, all or none.

        Args:
            texts (`Sequence` of [`StoredText`]): Texts with their memories `(n, K, D)`, of this store's model.
            on_duplicate (`str`): See [`append`].

        Returns:
            `int`: Texts that were stored.
        """
        cut = self.fingerprint["cut"]
        shape = (cut["memories_per_chunk"], cut["hidden_size"])
        for text in texts:
            given = tuple(text.memories.shape)
            if len(given) != 3 or given[1:] != shape or given[0] < 1 or len(text.counts) != given[0]:
                raise ValueError(
                    f"The memories of {text.text_id!r} have shape {given} and {len(text.counts)} counts; expected "
                    f"(chunks, {shape[0]}, {shape[1]}), at least one chunk, and a count for each."
                )
        named = {text.text_id: text if self.keeps_text else replace(text, text=None) for text in texts}
        if len(named) < len(texts):
            raise MemoryStoreError("Two texts of one call have the same id. Give each its own.")
        with self.changing():
            new = self._without_duplicates(named, on_duplicate)
            self._commit(new.values(), set(new))
            return len(new)

    def merge(self, other: "StoredMemories", *, on_duplicate: str = "error") -> int:
        """Store what another store of the same model holds, all or none; equal formats are taken over bit by bit.

        Args:
            other ([`StoredMemories`]): The other store; it is not changed.
            on_duplicate (`str`): See [`append`].

        Returns:
            `int`: Texts that were stored.

        Raises:
            MemoryStoreError: If the other store is damaged or of another model, or an id is stored already.
        """
        check_same_fingerprint(self.fingerprint, other.fingerprint, f"the store {other.folder.name}")
        with self.changing():
            new = self._without_duplicates(dict.fromkeys(other.text_ids), on_duplicate)
            options = {"recode": other.dtype != self.dtype, "keep_text": self.keeps_text}
            self._commit((shard.stored_text(number, **options) for shard, number in other._find(new)), set(new))
            return len(new)

    def delete(self, text_ids: str | Iterable[str]) -> int:
        """Delete texts. Their bytes stay on the disk until [`vacuum`].

        Args:
            text_ids (`str` or ids): Texts of the store.

        Returns:
            `int`: Texts that were deleted.
        """
        gone = {text_ids} if isinstance(text_ids, str) else set(text_ids)
        with self.changing():
            self._find(gone)
            self._commit((), gone)
        return len(gone)

    def vacuum(self) -> int:
        """Remove from the disk what the store no longer names: see [`memory_store_upkeep.vacuum`].

        Returns:
            `int`: Bytes that were freed.
        """
        return vacuum(self)

    @staticmethod
    def repair(folder: str | os.PathLike) -> dict[str, Any]:
        """Make a damaged store usable again and say what that costs: see [`memory_store_upkeep.repair`]."""
        return repair(folder)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock, on the newest state of a store of which every text is known.

        Raises:
            MemoryStoreError: If someone else writes, or a shard cannot be read.
        """
        with writing(self.folder, self.lock_seconds):
            self.reload()
            self._all()
            yield

    def _without_duplicates(self, texts: Mapping[str, Any], on_duplicate: str) -> dict[str, Any]:
        if on_duplicate not in ON_DUPLICATE:
            raise ValueError(f"`on_duplicate` is {on_duplicate!r}; expected 'error', 'skip' or 'replace'.")
        wrong = [text_id for text_id in texts if not isinstance(text_id, str) or not text_id]
        if wrong:
            raise ValueError(f"A text id is {wrong[0]!r}; expected a string of one character or more.")
        known = [text_id for text_id in texts if text_id in self]
        if known and on_duplicate == "error":
            raise MemoryStoreError(
                f"{self.folder.name} already holds the text {known[0]!r} ({len(known)} of {len(texts)}). Pass "
                "`on_duplicate='skip'` or `'replace'`, or give it another id."
            )
        return {key: text for key, text in texts.items() if on_duplicate == "replace" or key not in self}

    def _commit(self, texts: Iterable[StoredText], gone: set[str]) -> None:
        """Write shards of new texts, then the index that names them and no longer those that are gone."""
        gone_from: dict[str, set[int]] = {}
        for text_id in gone & set(self._places):
            shard, number = self._places[text_id]
            gone_from.setdefault(shard.entry["file"], set()).add(number)
        entries = []
        for entry in self._index["shards"]:
            numbers = sorted(gone_from.get(entry["file"], set()).union(entry["gone"]))
            if len(numbers) < entry["texts"]:
                entries.append({**entry, "gone": numbers})
        self.write(texts, entries)

    def write(self, texts: Iterable[StoredText], entries: list[dict[str, Any]]) -> None:
        """Write shards of texts, then an index of these and of other entries; the caller holds the lock.

        Args:
            texts (`Iterable` of [`StoredText`]): Texts to write.
            entries (`list` of `dict`): Shards that the index names beside theirs.
        """
        entries = list(entries)
        for content, entry in pack_texts(texts, partial(encode_vectors, dtype=self.dtype)):
            write_file(self.folder / entry["file"], content)
            entries.append(entry)
        if entries != self._index["shards"]:
            commit_index(self.folder, {**self._index, "shards": entries}, previous=self.generation)
            self.reload()
