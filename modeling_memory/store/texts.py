"""A text in a store: its chunks, its passages, and the checks that one passes before it is stored.

n chunks, K memories per chunk, D decoder width.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

PASSAGE_TOKENS = 256
"""Most tokens of a passage, but for one chunk that is longer."""
UNCHECKED, LOST, WHOLE = -1, 0, 1
"""What is known of a chunk: nothing; that the model does not write it back from its memories; that it does."""
Place = tuple[int, int, int, int]
"""First character of a chunk, the one after its last (both -1 if not known), its tokens, and what is known of it."""


@dataclass(frozen=True)
class Chunk:
    """A chunk of a stored text.

    Attributes:
        text_id (`str`): The text.
        number (`int`): Which of its chunks, from 0.
        start (`int`, *optional*): Its first character in the text; `None` if that is not known.
        end (`int`, *optional*): The character after its last.
        num_tokens (`int`): Text tokens of the encoder's tokenizer.
        comes_back (`bool`, *optional*): Whether the model wrote it back without an error when it was stored; `None`
            if that was not tried.
    """

    text_id: str
    number: int
    start: int | None
    end: int | None
    num_tokens: int
    comes_back: bool | None = None


@dataclass(frozen=True)
class Passage:
    """Chunks of a text that follow each other: what a search by words finds.

    Attributes:
        text_id (`str`): The text.
        chunks (`tuple` of [`Chunk`]): Its chunks, in reading order.
        text (`str`): Their text.
    """

    text_id: str
    chunks: tuple[Chunk, ...]
    text: str


@dataclass(frozen=True)
class StoredText:
    """A text on its way into a store.

    Attributes:
        text_id (`str`): Its id.
        memories (`torch.FloatTensor` of shape `(n, K, D)`): Its chunks' memories.
        counts (`list` of `int`): Text tokens of each chunk.
        spans (`list`, *optional*): First character of each chunk and the one after its last.
        text (`str`, *optional*): The text, to be kept.
        digest (`str`, *optional*): Checksum of the text, by which a changed one is noticed; see [`text_digest`].
        num_unknown (`int`): Tokens that the encoder's tokenizer has no word for.
        comes_back (`list` of `bool`, *optional*): Whether each chunk is written back without an error.
        originals (`list`, *optional*): Text of the chunks that are to be kept as text although the store keeps none;
            `None` for the others.
    """

    text_id: str
    memories: torch.Tensor
    counts: Sequence[int]
    spans: Sequence[tuple[int, int]] | None = None
    text: str | None = None
    digest: str | None = None
    num_unknown: int = 0
    comes_back: Sequence[bool] | None = None
    originals: Sequence[str | None] | None = None


@dataclass(frozen=True)
class Record:
    """A text as it stands in the file: memories as bytes of the store's number format, beside the chunk's own text."""

    text_id: str
    digest: str | None
    num_unknown: int
    places: list[Place]
    memories: list[tuple[bytes, str | None]]
    text: str | None


class Entry(NamedTuple):
    """A text's row: memories and the kept text stand in tables of their own."""

    text_id: str
    digest: str | None
    unknown: int
    passages: int
    places: tuple[Place, ...]


def text_digest(text: str) -> str:
    """Return a short checksum of a text.

    >>> text_digest("a") == text_digest("a"), text_digest("a") == text_digest("b")
    (True, False)
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def is_writable(text: Any) -> bool:
    """Whether something is a string that UTF-8 can write: half of a surrogate pair is not."""
    return isinstance(text, str) and not any("\ud800" <= letter <= "\udfff" for letter in text)


def check_id(text_id: Any) -> None:
    """Refuse what cannot be the id of a text.

    Raises:
        ValueError: Naming it.
    """
    if not text_id or not is_writable(text_id):
        raise ValueError(f"A text id is {text_id!r}; expected a string of one character or more, of valid Unicode.")


def check_stored_text(text: Any, cut: dict[str, Any]) -> None:
    """Refuse a text whose fields are not what they should be, or do not fit each other.

    Args:
        text ([`StoredText`]): The text.
        cut (`dict`): Of a store's fingerprint.

    Raises:
        ValueError: Naming the text, the field, what it is and what it should be.
    """
    if not isinstance(text, StoredText):
        raise ValueError(f"Memories to store came as a {type(text).__name__}; expected `StoredText`s.")
    check_id(text.text_id)

    def refuse(field: str, found: str, expected: str) -> None:
        raise ValueError(f"`{field}` of the text {text.text_id!r} {found}; expected {expected}. Nothing was stored.")

    memories, shape = text.memories, (cut["memories_per_chunk"], cut["hidden_size"])
    if not isinstance(memories, torch.Tensor) or not memories.is_floating_point():
        refuse("memories", f"is {type(memories).__name__} of no real numbers", "a floating-point tensor")
    if memories.dim() != 3 or tuple(memories.shape[1:]) != shape or not len(memories):
        refuse("memories", f"has shape {tuple(memories.shape)}", f"(chunks, {shape[0]}, {shape[1]}), a chunk or more")
    # A NaN would be nearest to nothing and stored for good.
    if not torch.isfinite(memories).all():
        refuse("memories", "holds a number that is not finite", "finite numbers")
    n, most = len(memories), cut.get("chunk_length", 2**31 - 1)
    if not _are_whole(text.counts, n) or not all(1 <= count <= most for count in text.counts):
        refuse("counts", f"is {_short(text.counts)}", f"a count for each of the {n} chunks, from 1 to {most}")
    if not isinstance(text.num_unknown, int) or not 0 <= text.num_unknown <= sum(text.counts):
        refuse("num_unknown", f"is {text.num_unknown!r}", f"at most the {sum(text.counts)} tokens of the text")
    if text.text is not None and not is_writable(text.text):
        refuse("text", f"is {_short(text.text)}", "a string of valid Unicode, or None")
    if text.comes_back is not None and not (
        isinstance(text.comes_back, (list, tuple)) and [type(one) for one in text.comes_back] == [bool] * n
    ):
        refuse("comes_back", f"is {_short(text.comes_back)}", f"True or False for each of the {n} chunks, or None")
    kept = text.originals
    if kept is not None and not (
        isinstance(kept, (list, tuple)) and len(kept) == n and all(one is None or is_writable(one) for one in kept)
    ):
        refuse("originals", f"is {_short(kept)}", f"a string or None for each of the {n} chunks, or None")
    _check_spans(text, n, refuse)
    if text.digest is not None and not (is_writable(text.digest) and text.digest):
        refuse("digest", f"is {text.digest!r}", "a string, or None")
    if text.text is not None and text.digest not in (None, text_digest(text.text)):
        refuse("digest", f"is {text.digest!r}", f"that of its text, {text_digest(text.text)!r}, or None")


def _check_spans(text: StoredText, n: int, refuse: Any) -> None:
    if text.spans is None:
        return
    end = 2**31 - 1 if text.text is None else len(text.text)
    expected = f"a pair (first character, the one after its last) for each of the {n} chunks, in reading order"
    expected += "" if text.text is None else f", within the {end} characters of the text"
    try:
        borders = [border for first, stop in text.spans for border in (first, stop)]
    except (TypeError, ValueError):
        borders = []
    if not _are_whole(borders, 2 * n) or borders != sorted(borders) or borders[0] < 0 or borders[-1] > end:
        refuse("spans", f"is {_short(text.spans)}", expected)


def _are_whole(numbers: Any, length: int) -> bool:
    return (
        isinstance(numbers, (list, tuple))
        and len(numbers) == length
        and all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def pack_places(places: Sequence[Place]) -> bytes:
    """Write where chunks stand, 16 bytes each."""
    return struct.pack(f"<{4 * len(places)}i", *(number for place in places for number in place))


def unpack_places(content: bytes) -> list[Place]:
    """Read what [`pack_places`] wrote."""
    return list(struct.iter_unpack("<4i", content))


def cut_passages(places: Sequence[Place], text: str) -> list[tuple[int, str]]:
    """Cut a text between chunks into passages of about equally many tokens, so that none is a scrap.

    Args:
        places (`Sequence`): Where its chunks stand.
        text (`str`): The text.

    Returns:
        For each passage its first chunk and its text; joined they are the whole text.

    >>> cut_passages([(0, 4, 200, 1), (4, 8, 200, 1), (8, 9, 1, 1)], "one two .")
    [(0, 'one '), (1, 'two .')]
    """
    # A tokenizer without offsets: where chunks end in the text is not known, so it cannot be cut between them.
    if places[0][0] < 0:
        return [(0, text)]
    total = sum(place[2] for place in places)
    # A number of equal parts, not parts of a size: the last of those would be a scrap that any shared word makes best.
    number = -(-total // PASSAGE_TOKENS)
    firsts, seen = [0], 0
    for chunk, (_, _, tokens, _) in enumerate(places):
        # A chunk goes where its middle lies.
        if (2 * seen + tokens) * number >= 2 * total * len(firsts) and chunk and len(firsts) < number:
            firsts.append(chunk)
        seen += tokens
    # What lies between chunks, such as spaces, belongs to the passage before it: joined they give the text again.
    borders = [0, *(places[first][0] for first in firsts[1:]), len(text)]
    return [(first, text[borders[i] : borders[i + 1]]) for i, first in enumerate(firsts)]
