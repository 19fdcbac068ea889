"""One file of a memory store: the memories of some texts, where their chunks stand, and the texts if they are kept.

A shard is a safetensors file named by its checksum; it is never changed. n chunks, K memories per chunk, D decoder
width, S texts:

| tensor | shape | holds |
|---|---|---|
| `codes` | (n, K, D) | memories as numbers of the store's format |
| `scales` | (n, K) | factors of int8 and float8 codes |
| `spans` | (n, 2) | first character of a chunk and the one behind its last; -1 for texts given as tokens |
| `counts` | (n) | text tokens of a chunk |
| `text`, `text_bytes` | (bytes), (S) | texts in UTF-8, and the length of each |

The metadata holds the texts' ids and numbers of chunks. Its checksum stands in the index beside the file's, so that a
store opens by reading a few bytes of each shard; the rest is checked when it is first needed.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .memory_codec import decode_vectors
from .memory_files import MemoryStoreError, checksum

MOST_CHUNKS = 65536
"""Chunks of a shard; a text is never cut in two, so that a longer one makes a larger shard."""

Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Chunk:
    """A chunk of a stored text.

    Attributes:
        text_id (`str`): The text.
        number (`int`): Which of its chunks, from 0.
        start (`int`, *optional*): Its first character in the text; `None` if tokens were stored.
        end (`int`, *optional*): The character behind its last.
        num_tokens (`int`): Text tokens of the encoder's tokenizer.
    """

    text_id: str
    number: int
    start: int | None
    end: int | None
    num_tokens: int


@dataclass(frozen=True)
class StoredText:
    """A text on its way into a store.

    Attributes:
        text_id (`str`): Its id.
        memories (`torch.Tensor` of shape `(n, K, D)`): Its chunks' memories; codes, if `is_coded`.
        counts (`list` of `int`): Text tokens of each chunk.
        spans (`list`, *optional*): First character of each chunk and the one behind its last.
        text (`str`, *optional*): The text, to be kept.
        digest (`str`, *optional*): Checksum of the text, by which a changed one is noticed; see [`text_digest`].
        scales (`torch.FloatTensor` of shape `(n, K)`, *optional*): Scales of the codes.
        is_coded (`bool`): Whether `memories` are codes.
    """

    text_id: str
    memories: torch.Tensor
    counts: list[int]
    spans: list[tuple[int, int]] | None = None
    text: str | None = None
    digest: str | None = None
    scales: torch.Tensor | None = None
    is_coded: bool = False


def text_digest(text: str) -> str:
    """Return a short checksum of a text.

    >>> text_digest("a") == text_digest("a"), text_digest("a") == text_digest("b")
    (True, False)
    """
    return hashlib.sha256(_to_bytes(text)).hexdigest()[:32]


def pack_texts(texts: Iterable[StoredText], encode: Encode) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the shards that hold some texts: a file's content, and its entry in the index.

    Args:
        texts (`Iterable` of [`StoredText`]): The texts, in order; only those of one shard are held at a time.
        encode (`Callable`): Memories to codes and scales.
    """
    group: list[StoredText] = []
    size = 0
    for text in texts:
        if group and size + len(text.memories) > MOST_CHUNKS:
            yield _pack_shard(group, encode)
            group, size = [], 0
        group.append(text)
        size += len(text.memories)
    if group:
        yield _pack_shard(group, encode)


def _pack_shard(texts: list[StoredText], encode: Encode) -> tuple[bytes, dict[str, Any]]:
    coded = [(text.memories, text.scales) if text.is_coded else encode(text.memories) for text in texts]
    spans = [span for text in texts for span in (text.spans or [(-1, -1)] * len(text.memories))]
    kept = [b"" if text.text is None else _to_bytes(text.text) for text in texts]
    tensors = {
        "codes": _concatenate([codes for codes, _ in coded]),
        "spans": torch.tensor(spans, dtype=torch.int64),
        "counts": torch.tensor([count for text in texts for count in text.counts], dtype=torch.int32),
        "text": torch.frombuffer(bytearray(b"".join(kept) or b"\0"), dtype=torch.uint8),
        "text_bytes": torch.tensor([len(one) for one in kept], dtype=torch.int64),
    }
    scales = [one for _, one in coded if one is not None]
    if scales:
        tensors["scales"] = torch.cat(scales)
    listed = [
        {
            "id": text.text_id,
            "chunks": len(text.memories),
            "tokens": sum(text.counts),
            "digest": text.digest,
            "keeps_text": text.text is not None,
        }
        for text in texts
    ]
    content = save(tensors, metadata={"texts": json.dumps(listed)})
    digest = hashlib.sha256(content).hexdigest()
    entry = {
        "file": f"{digest[:32]}.safetensors",
        "sha256": digest,
        "head_sha256": hashlib.sha256(content[: _head_bytes(content)]).hexdigest(),
        "bytes": len(content),
        "texts": len(texts),
        "gone": [],
    }
    return content, entry


class Shard:
    """A shard of a store: its texts are known at once, its memories mapped and checked when they are first read.

    Args:
        folder (`Path`): The store.
        entry (`dict`): The shard's entry in the index: `file`, `sha256`, `head_sha256`, `bytes`, and `gone`, the
            numbers of its texts that were deleted.

    Raises:
        MemoryStoreError: If the file is gone or its head is damaged.
    """

    def __init__(self, folder: Path, entry: dict[str, Any]):
        self.path = folder / entry["file"]
        self.entry = entry
        self.texts = self._read_head()
        self.firsts = [0]
        for text in self.texts:
            self.firsts.append(self.firsts[-1] + text["chunks"])

    def with_entry(self, entry: dict[str, Any]) -> "Shard":
        """Return the same shard under the entry of another index; what was mapped and checked stays so."""
        other = object.__new__(Shard)
        other.__dict__.update(self.__dict__, entry=entry)
        return other

    @property
    def live(self) -> list[int]:
        """Numbers of the texts that were not deleted."""
        gone = set(self.entry["gone"])
        return [number for number in range(len(self.texts)) if number not in gone]

    def rows(self, number: int) -> range:
        """Rows of a text's chunks."""
        return range(self.firsts[number], self.firsts[number + 1])

    def verify(self) -> None:
        """Read every byte again.

        Raises:
            MemoryStoreError: If the file is gone, cut short, or a byte of it has changed.
        """
        try:
            size, digest = self.path.stat().st_size, checksum(self.path)
        except FileNotFoundError:
            raise self._fault("is gone") from None
        if size != self.entry["bytes"]:
            raise self._fault(f"has {size} bytes, but {self.entry['bytes']} were written")
        if digest != self.entry["sha256"]:
            raise self._fault("is damaged: it does not agree with its checksum")

    def _fault(self, what: str) -> MemoryStoreError:
        texts = getattr(self, "texts", [])
        ids = ", ".join(repr(text["id"]) for text in texts[:3]) + (", ..." if len(texts) > 3 else "")
        return MemoryStoreError(
            f"{self.path.name} {what}. It holds {self.entry['texts']} texts{f' ({ids})' if ids else ''}; all others "
            "are intact. If another process has changed the store, open it again. Else restore the file from a copy, "
            "or let `MemoryStore.repair(folder)` set it aside and remember these texts again."
        )

    def _read_head(self) -> list[dict[str, Any]]:
        try:
            with self.path.open("rb") as stream:
                start = stream.read(8)
                size = _head_bytes(start)
                head = start + stream.read(size - 8) if size <= self.entry["bytes"] else b""
        except FileNotFoundError:
            raise self._fault("is gone") from None
        if hashlib.sha256(head).hexdigest() != self.entry["head_sha256"]:
            raise self._fault("is damaged: its head does not agree with its checksum")
        return json.loads(json.loads(head[8:])["__metadata__"]["texts"])

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, mapped: only what is taken out of them is read."""
        self.verify()
        try:
            with safe_open(self.path, framework="pt") as stream:
                return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise self._fault(f"cannot be read ({error})") from error

    def codes(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return codes `(n, K, D)` and scales `(n, K)` of some rows, as they are stored."""
        codes, scales = self._tensors["codes"], self._tensors.get("scales")
        if isinstance(rows, range) and rows.step == 1:
            place: Any = slice(rows.start, rows.stop)
            return codes[place], None if scales is None else scales[place]
        place = torch.tensor(list(rows), dtype=torch.long)
        kind = codes.dtype
        codes = codes.view(torch.uint8) if codes.element_size() == 1 else codes  # float8 knows no indexing everywhere
        return codes[place].view(kind), None if scales is None else scales[place]

    def memories(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the memories of some rows, `(n, K, D)` in float32."""
        return decode_vectors(*self.codes(rows))

    def chunk(self, row: int) -> Chunk:
        """Return the chunk that stands in a row."""
        return self.chunks(bisect_right(self.firsts, row) - 1, range(row, row + 1))[0]

    def chunks(self, number: int, rows: range | None = None) -> list[Chunk]:
        """Return the chunks of a text, or those of its chunks that stand in some rows."""
        text_id, rows = self.texts[number]["id"], rows or self.rows(number)
        spans = self._tensors["spans"][rows.start : rows.stop].tolist()
        counts = self._tensors["counts"][rows.start : rows.stop].tolist()
        places = [(None, None) if span[0] < 0 else tuple(span) for span in spans]
        return [
            Chunk(text_id, row - self.firsts[number], start, end, count)
            for row, (start, end), count in zip(rows, places, counts, strict=True)
        ]

    def text(self, number: int) -> str | None:
        """Return a text in clear; `None` if it was not kept."""
        if not self.texts[number]["keeps_text"]:
            return None
        sizes = self._tensors["text_bytes"].tolist()
        first = sum(sizes[:number])
        content = self._tensors["text"][first : first + sizes[number]].numpy().tobytes()
        return content.decode("utf-8", "surrogatepass")

    def stored_text(self, number: int, *, recode: bool = False, keep_text: bool = True) -> StoredText:
        """Return a text as it can be stored again, bit by bit; with `recode` as memories for another format."""
        codes, scales = self.codes(self.rows(number))
        spans = [(chunk.start, chunk.end) for chunk in self.chunks(number)]
        text = StoredText(
            self.texts[number]["id"],
            codes,
            [chunk.num_tokens for chunk in self.chunks(number)],
            None if spans[0][0] is None else spans,  # type: ignore[arg-type]
            self.text(number) if keep_text else None,
            self.texts[number]["digest"],
            scales,
            is_coded=True,
        )
        return replace(text, memories=decode_vectors(codes, scales), scales=None, is_coded=False) if recode else text


def _concatenate(parts: list[torch.Tensor]) -> torch.Tensor:
    """Join codes; float8 is joined as bytes, which every version of torch can."""
    kind = parts[0].dtype
    if parts[0].element_size() > 1:
        return torch.cat(parts)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts]).view(kind)


def _head_bytes(content: bytes) -> int:
    """Length of a safetensors file's head: eight bytes of length, and so many of JSON."""
    return 8 + int.from_bytes(content[:8], "little")


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
