"""A text that does not fit in memory, as one stream of tokens: segments on disk, written when they are first read.

A segment is the tokens of some thousands of consecutive documents, each followed by an end token. Segments lie in a
folder named by the checksums of data and tokenizer, beside the numbers of their documents. So the stream is the same
whoever reads it: a position in it never depends on which process or worker asks, nothing is lost where two segments
meet, a killed run finds what it wrote, and going on in the middle of a stream is looking at a place in a file.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .sources import Documents, HubDataset, take_bytes
from .texts import file_checksums, shared_pieces, tokenise_documents
from .tokenizer import tokenizer_checksum

STREAM_FORMAT = 1
SEGMENT_BYTES = 16_000_000
OPEN_SEGMENTS = 8


@dataclass(frozen=True)
class Segment:
    """A piece of the stream.

    Attributes:
        first_token (`int`): Position of its first token in the stream.
        num_tokens (`int`): Tokens, end tokens included.
        next_document (`int`): Number of the document that follows it in the source.
        is_last (`bool`): Whether the source ends with it.
        left_out (`int`): Documents that stand in another split as well and were left out.
    """

    first_token: int
    num_tokens: int
    next_document: int
    is_last: bool
    left_out: int

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.first_token + self.num_tokens


class TokenStream:
    """Tokens of documents, each followed by an end token, tokenised as far as they are read.

    Args:
        source (`Documents`): Where the documents come from.
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer with an end token.
        folder (`str` or `Path`): Where segments are kept, in a folder named by the checksums.
        held_out (`Iterable[str]`): Documents of the other splits: a document that is one of them, or shares a long
            line with one, is left out.
        limit (`int`, *optional*): Tokens after which the stream ends.
        segment_bytes (`int`): Text of a segment, about.

    Raises:
        ValueError: When it is read: if a source cannot be read, or there is no text at all.
    """

    def __init__(
        self,
        source: Documents,
        tokenizer: PreTrainedTokenizerBase,
        folder: str | Path,
        *,
        held_out: Iterable[str] = (),
        limit: int | None = None,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.limit = limit
        self.segment_bytes = segment_bytes
        self.held_out = {piece for text in held_out for _, piece in shared_pieces(text, 200)}
        self.identity = self._identity()
        self.folder = Path(folder) / f"stream-{self.identity}"
        self._segments: list[Segment] = []
        self._open: dict[int, safe_open] = {}

    @property
    def total(self) -> int | None:
        """Tokens of the whole stream, once its end has been seen, else `None`."""
        last = self._segments[-1] if self._segments else None
        if last is not None and self.limit is not None and last.end >= self.limit:
            return self.limit
        return last.end if last is not None and last.is_last else None

    @property
    def left_out(self) -> int:
        """Documents of the segments known so far that stand in another split as well."""
        return sum(segment.left_out for segment in self._segments)

    def reach(self, position: int) -> bool:
        """Make sure that the stream is tokenised up to a position; returns whether it is that long."""
        while self.total is None and (not self._segments or self._segments[-1].end < position):
            self._segments.append(self._segment(len(self._segments)))
        return position <= (self._segments[-1].end if self.total is None else self.total)

    def __getitem__(self, span: slice) -> torch.Tensor:
        """Return the tokens from `span.start` to `span.stop`, `torch.LongTensor` of shape `(stop - start,)`."""
        if not self.reach(span.stop):
            raise IndexError(f"the stream has {self.total} tokens, and {span.stop} were asked for")
        pieces = []
        for number, segment in enumerate(self._segments):
            start, stop = max(span.start, segment.first_token), min(span.stop, segment.end)
            if start < stop:
                tokens = self._tokens(number)
                pieces.append(tokens[start - segment.first_token : stop - segment.first_token])
        return torch.cat(pieces).long()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}

    def _identity(self) -> str:
        described = {
            "format": STREAM_FORMAT,
            "tokenizer": tokenizer_checksum(self.tokenizer),
            "eos": self.tokenizer.eos_token_id,
            "source": list(source_checksums(self.source).items()),
            "column": self.source.text_column,
            "segment_bytes": self.segment_bytes,
            "held_out": hashlib.sha256("\0".join(sorted(self.held_out)).encode()).hexdigest(),
        }
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]

    def _segment(self, number: int) -> Segment:
        """Find a segment, or write it; one process writes, the others wait and find it."""
        found = self._read(number)
        if found is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "lock"):
                found = self._read(number) or self._write(number)
        return found

    def _file(self, number: int) -> Path:
        return self.folder / f"segment-{number:06d}.safetensors"

    def _first(self, number: int) -> tuple[int, int]:
        """First token and first document of a segment."""
        if number == 0:
            return 0, 0
        before = self._segments[number - 1]
        return before.end, before.next_document

    def _read(self, number: int) -> Segment | None:
        try:
            with safe_open(self._file(number), framework="pt") as stored:
                counts = {name: int(value) for name, value in stored.metadata().items()}
                num_tokens = stored.get_slice("tokens").get_shape()[0]
        except (FileNotFoundError, SafetensorError):  # a damaged one is written again
            return None
        first_token, _ = self._first(number)
        return Segment(first_token, num_tokens, counts["next_document"], bool(counts["is_last"]), counts["left_out"])

    def _write(self, number: int) -> Segment:
        first_token, first_document = self._first(number)
        texts = take_bytes(self.source.read(first_document), self.segment_bytes)
        if not texts and number == 0:
            raise ValueError("the train split holds no document; name at least one text file")
        size = sum(len(text.encode()) for text in texts)
        is_last = size < self.segment_bytes
        kept = [text for text in texts if not self._is_held_out(text)]
        tokens = tokenise_documents(self.tokenizer, kept).tokens if kept else torch.zeros(0, dtype=torch.long)
        counts = {
            "next_document": first_document + len(texts),
            "is_last": int(is_last),
            "left_out": len(texts) - len(kept),
        }
        part = self._file(number).with_suffix(".part")
        save_file({"tokens": tokens.to(torch.int32)}, part, metadata={name: str(n) for name, n in counts.items()})
        os.replace(part, self._file(number))
        return Segment(first_token, tokens.numel(), counts["next_document"], is_last, counts["left_out"])

    def _is_held_out(self, text: str) -> bool:
        return bool(self.held_out) and any(piece in self.held_out for _, piece in shared_pieces(text, 200))

    def _tokens(self, number: int) -> Any:
        """Open a segment's tokens for slicing, without reading them; some stay open."""
        if number not in self._open:
            if len(self._open) >= OPEN_SEGMENTS:
                self._open.pop(next(iter(self._open)))
            self._open[number] = safe_open(self._file(number), framework="pt")
        return self._open[number].get_slice("tokens")


def source_checksums(source: Documents) -> dict[str, str]:
    """Return the SHA-256 of each file of a source, and the revision of each dataset, under its name."""
    files = [part for part in source.parts if isinstance(part, Path)]
    hub = [part for part in source.parts if isinstance(part, HubDataset)]
    named = {":".join(filter(None, [part.name, part.config, part.split])): part.revision for part in hub}
    return {**(file_checksums(files) if files else {}), **named}


class StreamedRows(Dataset):
    """Rows of `row_length` tokens from a stream, shuffled within blocks of rows.

    Item i depends on the seed and on i alone: rows of block b are those of the stream's places `b * shuffle_rows` to
    `(b + 1) * shuffle_rows`, in an order drawn from seed, pass and block. When the stream ends it begins anew, from
    the second pass on at an offset of its own. So resuming is exact, and processes and workers change nothing.

    Args:
        stream (`TokenStream`): The tokens.
        row_length (`int`): Tokens per row.
        num_items (`int`): Length of the dataset.
        seed (`int`): Seed of the order.
        shuffle_rows (`int`): Rows of a block; 1 reads in the stream's order.

    Raises:
        ValueError: If the stream is shorter than one row.
    """

    def __init__(
        self, stream: TokenStream, *, row_length: int, num_items: int, seed: int, shuffle_rows: int = 4096
    ) -> None:
        if not stream.reach(row_length):
            raise ValueError(
                f"the text has {stream.total} tokens, fewer than one row of {row_length}; give more text or shorten "
                "data.row_length"
            )
        self.stream = stream
        self.row_length = row_length
        self.num_items = num_items
        self.seed = seed
        self.shuffle_rows = shuffle_rows
        self._order: tuple[tuple[int, int, int], torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        number, start = self._locate(index)
        return number, self.stream[start : start + self.row_length]

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the number and the first token of an item's row."""
        block_end = (index // self.shuffle_rows + 1) * self.shuffle_rows
        passed, place, rows = 0, index, block_end
        if not self.stream.reach(block_end * self.row_length):
            rows = (self.stream.total or 0) // self.row_length  # the whole stream
            passed, place = divmod(index, rows)
        elif self.stream.total is not None:
            rows = self.stream.total // self.row_length
        block = place // self.shuffle_rows
        size = min(self.shuffle_rows, rows - block * self.shuffle_rows)
        key = passed, block, size
        if self._order is None or self._order[0] != key:
            generator = torch.Generator().manual_seed(self._seed(passed, block))
            self._order = key, torch.randperm(size, generator=generator)
        number = block * self.shuffle_rows + int(self._order[1][place % self.shuffle_rows])
        return number, self._offset(passed) + number * self.row_length

    def _offset(self, passed: int) -> int:
        """Where a pass begins, so that the tokens that fill no row at the end are not the same in every pass."""
        slack = (self.stream.total or 0) % self.row_length if passed else 0
        generator = torch.Generator().manual_seed(self._seed(passed, -1))
        return int(torch.randint(slack + 1, (), generator=generator))

    def _seed(self, passed: int, block: int) -> int:
        return int(hashlib.sha256(f"{self.seed} {passed} {block}".encode()).hexdigest()[:15], 16)
