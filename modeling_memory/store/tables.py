"""The rows of a store's tables, as texts and memories, and back.

n chunks, K memories per chunk, D decoder width.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .codec import check_dtype, code_sizes, decode_vectors
from .database import FILE, SHIFT, WORDS_CAN_LEAVE, Database, MemoryStoreError, checksum, damaged
from .fingerprint import check_fingerprint
from .texts import (
    LOST,
    UNCHECKED,
    WHOLE,
    Chunk,
    Entry,
    Passage,
    Place,
    Record,
    check_id,
    cut_passages,
    is_writable,
    pack_places,
    unpack_places,
)


class Tables:
    """An open store, row by row: every row is compared with its checksum when it is read.

    Args:
        folder (`Path`): Where it stands.
        lock_seconds (`float`): How long a change waits for another writer.
    """

    def __init__(self, folder: Path, lock_seconds: float):
        self.folder = folder
        self._database = Database(self.folder, lock_seconds)
        settings = self._database.settings
        try:
            # A received file may hold anything; sizes are read from here before memory is taken for them.
            check_fingerprint(settings.get("fingerprint"))
            check_dtype(settings.get("dtype"))
        except ValueError as error:
            raise damaged(self.folder / FILE, str(error)) from error
        self.dtype: str = settings["dtype"]
        self.keeps_text = bool(settings.get("keeps_text"))
        cut = self.fingerprint["cut"]
        self._shape = (cut["memories_per_chunk"], cut["hidden_size"])
        # No change has this number, so that the first look at anything compares checksums.
        self._checked = self._known_at = -1
        self._known: dict[str, tuple[int, Entry]] = {}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the memories depend on: encoder, projector, tokenizer, and how text is cut."""
        return self._database.settings["fingerprint"]

    @property
    def generation(self) -> int:
        """Number of the change that led to this state."""
        return self._database.state["generation"]

    def _read(self, statement: str, *values: Any) -> list[tuple]:
        return self._database.read(statement, *values)

    def _find(self, text_id: str) -> tuple[int, Entry]:
        """Key and row of a text."""
        check_id(text_id)
        # Bounded, since whoever walks through a large store asks for every id once.
        if self._known_at != self.generation or len(self._known) > 1000:
            self._known, self._known_at = {}, self.generation
        if text_id in self._known:
            return self._known[text_id]
        found = self._read("SELECT * FROM texts WHERE id = ?", text_id)
        if not found:
            raise MemoryStoreError(
                f"{self.folder.name} has no text {text_id!r}. `store.text_ids` lists those that it has."
            )
        key, entry = self._entry(found[0])
        # A damaged index leads to a sound row of another text, whose own checksum is right.
        if entry.text_id != text_id:
            raise damaged(self.folder / FILE, f"its index of ids leads from {text_id!r} to {entry.text_id!r}")
        self._known[text_id] = key, entry
        return key, entry

    def _by_key(self, key: int) -> Entry:
        """Row of the text to which chunks or passages belong."""
        found = self._read("SELECT * FROM texts WHERE key = ?", key)
        # SQLite finds a row by walking a tree; where that is damaged it may hand out another.
        if not found or found[0][0] != key:
            raise damaged(self.folder / FILE, f"the text of the chunks {key << SHIFT} and following is gone")
        return self._entry(found[0])[1]

    def _in_order(self, before: int, rows: list[tuple]) -> list[tuple]:
        """Rows as they are, if each number is above the one before: a damaged tree may give one row twice."""
        numbers = [before, *(row[0] for row in rows)]
        # Each row would agree with its checksum, and yet a text be counted twice.
        if any(one >= other for one, other in zip(numbers, numbers[1:], strict=False)):
            raise damaged(self.folder / FILE, f"rows after {before} are not in order")
        return rows

    def _entries(self, size: int = 1000) -> Iterator[tuple[int, Entry]]:
        """All texts, some at a time, so that a change in between does no harm."""
        key, seen = -1, 0
        # By key, not by OFFSET, which would skip a row for each one that is deleted meanwhile.
        while rows := self._read("SELECT * FROM texts WHERE key > ? ORDER BY key LIMIT ?", key, size):
            for row in self._in_order(key, rows):
                yield self._entry(row)
            key, seen = rows[-1][0], seen + len(rows)
        stored = self._database.state["texts"]
        if seen != stored:
            raise damaged(self.folder / FILE, f"it holds {seen} texts, but {stored} were stored")

    def _entry(self, row: tuple) -> tuple[int, Entry]:
        key, text_id, digest, unknown, passages, places, stored = row
        # Types first: SQLite keeps any type in any column, and the checksum reads them.
        is_sound = is_writable(text_id) and isinstance(places, bytes) and places and len(places) % 16 == 0
        is_sound = is_sound and isinstance(passages, int) and isinstance(unknown, int)
        if not is_sound or stored != _text_checksum(key, text_id, digest, unknown, passages, places):
            raise damaged(self.folder / FILE, f"the row of the text {text_id!r:.60} does not agree with its checksum")
        return key, Entry(text_id, digest, unknown, passages, tuple(unpack_places(places)))

    def _blobs(self, rows: range) -> list[tuple[bytes, str | None]]:
        """Memories of rows that follow each other, as they are stored, beside the text of those that have one."""
        found = self._read("SELECT * FROM chunks WHERE row BETWEEN ? AND ?", rows.start, rows.stop - 1)
        # Compared as a whole, so that a missing row, a foreign one and a wrong order are all found.
        if [row[0] for row in found] != list(rows):
            missing = sorted(set(rows) - {row[0] for row in found})
            raise damaged(self.folder / FILE, f"{self._name((missing or rows)[0])} is gone or out of order")
        return [self._checked_chunk(*row) for row in found]

    def _checked_chunk(self, row: int, blob: Any, original: Any, stored: Any) -> tuple[bytes, str | None]:
        is_sound = isinstance(blob, bytes) and (original is None or isinstance(original, str))
        if not is_sound or stored != _chunk_checksum(row, blob, original) or len(blob) != self.chunk_bytes:
            raise damaged(self.folder / FILE, f"{self._name(row)} does not agree with its checksum")
        return blob, original

    @property
    def chunk_bytes(self) -> int:
        """Bytes that the memories of a chunk take."""
        return sum(code_sizes(self.dtype, *self._shape))

    def _name(self, row: int) -> str:
        found = self._read("SELECT id FROM texts WHERE key = ?", row >> SHIFT)
        return f"chunk {row & (1 << SHIFT) - 1} of {found[0][0] if found else 'a text that is gone'!r}"

    def _blocks(self, block_size: int) -> Iterator[tuple[list[int], list[bytes]]]:
        """All memories, block by block; compared with their checksums once for each state of the store."""
        # Hashing all blobs takes longer than reading them, so a search pays for it once a state.
        is_checked, row, seen = self._checked == self.generation, -1, 0
        while found := self._read("SELECT * FROM chunks WHERE row > ? ORDER BY row LIMIT ?", row, block_size):
            self._in_order(row, found)
            if not is_checked:
                for one in found:
                    self._checked_chunk(*one)
            row, seen = found[-1][0], seen + len(found)
            yield [one[0] for one in found], [one[1] for one in found]
        stored = self._database.state["chunks"]
        if seen != stored:
            raise damaged(self.folder / FILE, f"it holds {seen} chunks, but {stored} were stored")
        self._checked = self.generation

    def _chunks_of(self, rows: set[int]) -> dict[int, Chunk]:
        # A row's number holds its text's key above and the chunk's number below, so that no join is needed.
        entries = {key: chunks_of(self._by_key(key)) for key in {row >> SHIFT for row in rows}}
        if any(row & (1 << SHIFT) - 1 >= len(entries[row >> SHIFT]) for row in rows):
            raise damaged(self.folder / FILE, "it holds chunks that belong to no text")
        return {row: entries[row >> SHIFT][row & (1 << SHIFT) - 1] for row in rows}

    def _passages(self, key: int, entry: Entry) -> list[tuple[int, str]]:
        """First chunk and text of each passage of a text."""
        if not entry.passages:
            raise MemoryStoreError(
                f"The text {entry.text_id!r} was not kept beside its memories. Begin the store with `MemoryStore.open("
                "..., create=True, keep_text=True)` to keep texts."
            )
        first = key << SHIFT
        found = self._read("SELECT * FROM passages WHERE row BETWEEN ? AND ?", first, first + (1 << SHIFT) - 1)
        whole = len(self._in_order(first - 1, found)) == entry.passages and found[0][0] == first
        if not whole or any(stored != checksum(content, row) for row, content, stored in found):
            raise damaged(self.folder / FILE, f"the kept text of {entry.text_id!r} does not agree with its checksum")
        return [(row - first, content) for row, content, _ in found]

    def _passage(self, row: int) -> Passage:
        key, number = row >> SHIFT, row & (1 << SHIFT) - 1
        entry = self._by_key(key)
        content = self._read("SELECT content, checksum FROM passages WHERE row = ?", row)
        after = self._read("SELECT min(row) FROM passages WHERE row BETWEEN ? AND ?", row + 1, (key + 1 << SHIFT) - 1)
        # The number is part of the checksum: a sound passage in another's place is as wrong as a broken one.
        if not content or content[0][1] != checksum(content[0][0], row):
            raise damaged(self.folder / FILE, f"the kept text of {self._name(row)} does not agree with its checksum")
        stop = len(entry.places) if after[0][0] is None else after[0][0] - (key << SHIFT)
        return Passage(entry.text_id, tuple(chunks_of(entry)[number:stop]), content[0][0])

    def _decode(self, blobs: list[bytes]) -> torch.Tensor:
        return decode_vectors(blobs, self.dtype, *self._shape)

    def _whole(self, key: int, entry: Entry) -> Record:
        """All of a text, every row compared with its checksum."""
        first = key << SHIFT
        blobs = self._blobs(range(first, first + len(entry.places)))
        text = "".join(content for _, content in self._passages(key, entry)) if entry.passages else None
        return Record(entry.text_id, entry.digest, entry.unknown, list(entry.places), blobs, text)

    def _insert(self, database: sqlite3.Connection, record: Record) -> None:
        # The caller has settled what happens to duplicates; here one is replaced in the same change.
        if database.execute("SELECT 1 FROM texts WHERE id = ?", (record.text_id,)).fetchone():
            self._drop(database, record.text_id)
        state = self._database.state
        # Never a key that was used before: a reader of an older state may still hold rows of that number.
        key, places = state["next"], pack_places(record.places)
        if len(record.places) >= 1 << SHIFT:
            raise ValueError(f"The text {record.text_id!r} has {len(record.places):,} chunks. Cut it into several.")
        kept = cut_passages(record.places, record.text) if self.keeps_text and record.text is not None else []
        fields = (key, record.text_id, record.digest, record.num_unknown, len(kept), places)
        database.execute("INSERT INTO texts VALUES (?, ?, ?, ?, ?, ?, ?)", (*fields, _text_checksum(*fields)))
        first = key << SHIFT
        rows = ((first + i, blob, None if kept else original) for i, (blob, original) in enumerate(record.memories))
        chunks = ((*row, _chunk_checksum(*row)) for row in rows)
        database.executemany("INSERT INTO chunks VALUES (?, ?, ?, ?)", chunks)
        passages = ((first + i, content, checksum(content, first + i)) for i, content in kept)
        database.executemany("INSERT INTO passages VALUES (?, ?, ?)", passages)
        # The index keeps words only, not the text: that is there once, in `passages`.
        words = ((first + i, content) for i, content in kept)
        database.executemany("INSERT INTO words(rowid, content) VALUES (?, ?)", words)
        # Counted in the transaction that wrote the rows, so that both are there or neither.
        state["next"] += 1
        self._count(record.places, record.num_unknown, 1)

    def _drop(self, database: sqlite3.Connection, text_id: str, few: bool = False) -> None:
        """Delete a text; its words leave the index by being named again, at once where few texts are deleted."""
        key, entry = self._find(text_id)
        first = key << SHIFT
        if entry.passages:
            # The index can take out only words that it is given again, since it has not kept the text.
            words = [(first + number, content) for number, content in self._passages(key, entry)]
            at_once = few and WORDS_CAN_LEAVE
            if WORDS_CAN_LEAVE:
                database.execute("INSERT INTO words(words, rank) VALUES ('secure-delete', ?)", (at_once,))
            self._database.state["marked"] += 0 if at_once else entry.passages
            database.executemany("INSERT INTO words(words, rowid, content) VALUES ('delete', ?, ?)", words)
        for table in ("passages", "chunks"):
            rows = (first, first + (1 << SHIFT) - 1)
            database.execute(f"DELETE FROM {table} WHERE row BETWEEN ? AND ?", rows)
        database.execute("DELETE FROM texts WHERE key = ?", (key,))
        # What deleted rows leave behind in the file, until `vacuum` takes it off the disk.
        self._database.state["stale"] += len(entry.places)
        self._count(entry.places, entry.unknown, -1)

    def _count(self, places: Sequence[Place], unknown: int, sign: int) -> None:
        state = self._database.state
        state["texts"] += sign
        state["chunks"] += sign * len(places)
        state["tokens"] += sign * sum(place[2] for place in places)
        state["unknown"] += sign * unknown
        state["checked"] += sign * sum(place[3] != UNCHECKED for place in places)
        state["lost"] += sign * sum(place[3] == LOST for place in places)


def _text_checksum(key: int, *fields: Any) -> bytes:
    return checksum(repr(fields), key)


def _chunk_checksum(row: int, blob: bytes, original: str | None) -> bytes:
    return (
        checksum(blob, row) if original is None else checksum(blob + original.encode("utf-8", "surrogatepass"), row, 1)
    )


def chunks_of(entry: Entry) -> list[Chunk]:
    """Return the chunks of a text, in reading order."""
    return [
        Chunk(
            entry.text_id,
            number,
            start if start >= 0 else None,
            end if start >= 0 else None,
            tokens,
            None if known == UNCHECKED else known == WHOLE,
        )
        for number, (start, end, tokens, known) in enumerate(entry.places)
    ]
