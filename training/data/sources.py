"""Where documents come from: local files, plain or compressed, and datasets of the Hub; read one document at a time.

Nothing here holds more than one document, or one batch of a parquet file, in memory. A source can begin at
any document.
"""

import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (".parquet", *(f"{kind}{end}" for kind in (".jsonl", ".txt", ".md") for end in ("", *COMPRESSIONS)))
HUB = "hub:"
READ_ERRORS = (OSError, EOFError, zlib.error, UnicodeDecodeError)


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hub, or a folder in its form, at one revision.

    Attributes:
        name (`str`): Its id, such as `allenai/c4`.
        revision (`str`): Commit, tag or branch; a commit makes a run repeatable.
        config (`str`, *optional*): Its configuration.
        split (`str`): Its split.

    >>> HubDataset.parse("hub:allenai/c4@1588ec4:en:validation")
    HubDataset(name='allenai/c4', revision='1588ec4', config='en', split='validation')
    >>> HubDataset.parse("hub:allenai/c4")
    Traceback (most recent call last):
    ValueError: 'hub:allenai/c4' names no revision; write hub:ID@COMMIT, hub:ID@COMMIT:SPLIT or ...
    """

    name: str
    revision: str
    config: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, text: str) -> "HubDataset":
        """Read `hub:ID@REVISION[:CONFIG][:SPLIT]`.

        Raises:
            ValueError: If there is no revision: next week's data under the same name would be other data.
        """
        name, *rest = text.removeprefix(HUB).split(":")
        name, at, revision = name.partition("@")
        if not name or not revision or len(rest) > 2:
            raise ValueError(
                f"{text!r} names no revision; write hub:ID@COMMIT, hub:ID@COMMIT:SPLIT or hub:ID@COMMIT:CONFIG:SPLIT"
            )
        return cls(name, revision, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train")

    def documents(self, text_column: str, start: int = 0) -> Iterator[str]:
        """Stream the documents, from document number `start` on."""
        import datasets

        data = datasets.load_dataset(self.name, self.config, split=self.split, revision=self.revision, streaming=True)
        for number, row in enumerate(data.skip(start) if start else data, start=start):
            if text_column not in row:
                raise ValueError(f"{self.name} has the columns {', '.join(row)}, but no {text_column!r}. "
                                 "Set text_column.")  # fmt: skip
            yield _checked_text(row[text_column], f"{self.name}, row {number}", text_column)


@dataclass(frozen=True)
class Documents:
    """Documents of several files and datasets, one after the other, in the order given.

    Attributes:
        parts (`tuple`): Files and datasets.
        text_column (`str`): Column or field that holds a document's text.
    """

    parts: tuple[Path | HubDataset, ...]
    text_column: str = "text"

    def read(self, start: int = 0) -> Iterator[str]:
        """Yield documents with visible text, from number `start` on; the ones before are read and left out.

        Raises:
            ValueError: If a file is missing, of another kind, damaged or without text, or lacks the column.
        """
        if len(self.parts) == 1 and isinstance(self.parts[0], HubDataset):
            documents: Iterator[str] = self.parts[0].documents(self.text_column, start)
            return documents  # the Hub's own skipping; blank documents are counted there, and tokenise to an end token
        return islice(chain.from_iterable(self._part(part) for part in self.parts), start, None)

    def _part(self, part: Path | HubDataset) -> Iterator[str]:
        if isinstance(part, HubDataset):
            yield from part.documents(self.text_column)
        else:
            yield from read_file(part, self.text_column)


def read_file(file: Path, text_column: str = "text", skip: Callable[[str], None] | None = None) -> Iterator[str]:
    """Yield the documents of a file that have a visible character.

    Args:
        file (`Path`): `.parquet`, `.jsonl` (one object a line), `.txt` or `.md` (one document each), all but the
            first also with `.gz` or `.zst`.
        text_column (`str`): Column or field that holds a document's text.
        skip (`Callable`, *optional*): Is given what is wrong with a row that holds no text or half a character; the
            rows after it are read all the same. By default such a row is an error.

    Raises:
        ValueError: If the file is missing, of another kind, damaged, lacks the column, or holds no text.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no file. Correct the path in the recipe's data section, or build the file first.")
    found = False
    try:
        for where, value in _read(file, text_column):
            try:
                text = _checked_text(value, where, text_column)
            except ValueError as error:
                if skip is None:
                    raise
                skip(str(error))
                continue
            if text.strip():
                found = True
                yield text
    except _read_errors() as error:
        raise ValueError(
            f"{file} cannot be read as UTF-8 text in its format: {error}. Replace the damaged file."
        ) from error
    if not found:
        raise ValueError(f"{file} holds no text. Leave it out, or check the column {text_column!r}.")


def take_bytes(documents: Iterable[str], max_bytes: int) -> list[str]:
    """Return the first documents, about `max_bytes` of text in all, at least one.

    >>> take_bytes(["aa", "bb", "cc"], 3)
    ['aa', 'bb']
    """
    taken: list[str] = []
    size = 0
    for text in documents:
        taken.append(text)
        size += len(text.encode())
        if size >= max_bytes:
            break
    return taken


def _read_errors() -> tuple[type[BaseException], ...]:
    pyarrow = sys.modules.get("pyarrow")  # plain files are read without it; where it is not loaded it raised nothing
    return READ_ERRORS if pyarrow is None else (*READ_ERRORS, pyarrow.ArrowInvalid)


def _read(file: Path, text_column: str) -> Iterator[tuple[str, Any]]:
    """Yield where each row stands, and what is in it."""
    compression = COMPRESSIONS.get(file.suffix)
    name = file.name.removesuffix(file.suffix) if compression else file.name
    if name.endswith(".parquet") and not compression:
        yield from _read_parquet(file, text_column)
        return
    if not name.endswith((".jsonl", ".txt", ".md")):
        raise ValueError(f"{file} has no known ending; known: {', '.join(SUFFIXES)}. Convert it to one of these.")
    with _open(file, compression) as content:
        if name.endswith((".txt", ".md")):
            yield str(file), content.read()
        else:
            yield from _read_json_lines(file, content, text_column)


def _open(file: Path, compression: str | None) -> Any:
    """Open a text file, decompressing it as it is read; only line feeds end lines."""
    raw: Any = file.open("rb")
    if compression == "gzip":
        raw = gzip.GzipFile(fileobj=raw)
    elif compression == "zstd":
        import pyarrow

        raw = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n")


def _read_parquet(file: Path, text_column: str) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(file)
    columns = parquet.schema_arrow.names
    if text_column not in columns:
        raise ValueError(f"{file} has the columns {', '.join(columns)}, but no {text_column!r}. Set text_column.")
    row = 0
    for batch in parquet.iter_batches(batch_size=1024, columns=[text_column]):
        for text in batch.column(0).to_pylist():
            yield f"{file}, row {row}", text
            row += 1


def _read_json_lines(file: Path, lines: Iterable[str], text_column: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number} is no JSON object: {error}. Correct the line.") from error
            if not isinstance(record, dict) or text_column not in record:
                fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"{file}, line {number} has {fields}, but no {text_column!r}. Set text_column.")
            yield f"{file}, line {number}", record[text_column]


def _checked_text(text: object, where: str, text_column: str) -> str:
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: {text_column!r} is {text!r}, expected text. Remove the row or name another column."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {text_column!r} holds half a character ({text[error.start : error.end]!r} at {error.start}), "
            "which no tokenizer can read. Correct the row."
        ) from error
    return text
