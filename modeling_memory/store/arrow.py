"""The door to Parquet, Lance, DuckDB, Spark, Ray and the Hub: a store as Arrow batches, a row a chunk, and back.

| column | type | holds |
|---|---|---|
| `text_id`, `digest` | string | the text, and its checksum |
| `number`, `chunks`, `num_tokens`, `num_unknown` | int32 | which chunk, of how many; its tokens; unknown in the text |
| `start`, `end` | int32 | first character and the one after the last, null if not known |
| `text` | string | the chunk's part of the text, which joined are the whole; null if it was not kept |
| `comes_back` | bool | whether the model writes the chunk back; null if that was not tried |
| `original` | string | its text if it does not come back and the whole text was not kept |
| `codes` | list of float32, float16, uint16 (bfloat16), int8 or uint8 (int4) | the memories, K * D numbers |
| `scales` | list of float32 | factors of int8 and int4 codes |

The schema's metadata holds the fingerprint, so that only memories of the same model are taken back.
"""

import importlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from .codec import code_sizes
from .database import MemoryStoreError
from .texts import UNCHECKED, WHOLE, Record, check_id

KEY = b"modeling_memory"
CODES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "int8": "int8", "int4": "uint8"}
BATCH = 4096


def import_pyarrow() -> Any:
    """Import pyarrow, when it is first needed.

    Raises:
        MemoryStoreError: If it is not installed.
    """
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise MemoryStoreError("Arrow needs pyarrow: pip install pyarrow.") from error


def arrow_schema(settings: dict[str, Any]) -> Any:
    """Return the schema of a store's batches."""
    pa = import_pyarrow()
    dtype, cut = settings["dtype"], settings["fingerprint"]["cut"]
    code = getattr(pa, CODES[dtype])()
    codes, scales = code_sizes(dtype, cut["memories_per_chunk"], cut["hidden_size"])
    fields = [("text_id", pa.string()), ("number", pa.int32()), ("chunks", pa.int32()), ("digest", pa.string())]
    fields += [("num_unknown", pa.int32()), ("start", pa.int32()), ("end", pa.int32()), ("num_tokens", pa.int32())]
    fields += [("text", pa.string()), ("comes_back", pa.bool_()), ("original", pa.string())]
    fields += [("codes", pa.list_(code, codes // (code.bit_width // 8)))]
    fields += [("scales", pa.list_(pa.float32(), scales // 4))] if scales else []
    kept = {name: settings[name] for name in ("format_version", "fingerprint", "dtype", "keeps_text")}
    return pa.schema(fields, metadata={KEY: json.dumps(kept)})


def to_reader(records: Iterable[Record], settings: dict[str, Any]) -> Any:
    """Return a `pyarrow.RecordBatchReader` over records, which reads on as it is read from."""
    pa, schema = import_pyarrow(), arrow_schema(settings)

    def batches() -> Iterator[Any]:
        rows: list[tuple] = []
        for record in records:
            for number, (start, end, tokens, known) in enumerate(record.places):
                blob, original = record.memories[number]
                text = None
                if record.text is not None:
                    first = start if number else 0
                    is_last = number + 1 == len(record.places)
                    text = record.text[first : None if is_last else record.places[number + 1][0]]
                    if start < 0:
                        text = record.text if number == 0 else ""
                place = (None, None) if start < 0 else (start, end)
                head = (record.text_id, number, len(record.places), record.digest, record.num_unknown)
                back = None if known == UNCHECKED else known == WHOLE
                rows.append((*head, *place, tokens, text, back, original, blob))
                if len(rows) == BATCH:
                    yield _batch(pa, schema, rows)
                    rows = []
        if rows:
            yield _batch(pa, schema, rows)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _batch(pa: Any, schema: Any, rows: list[tuple]) -> Any:
    *columns, blobs = zip(*rows, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=False)]
    split = 0
    for field in list(schema)[len(columns) :]:  # codes, then scales
        width = field.type.list_size * field.type.value_type.bit_width // 8
        content = b"".join([blob[split : split + width] for blob in blobs])
        count = len(blobs) * field.type.list_size
        values = pa.Array.from_buffers(field.type.value_type, count, [None, pa.py_buffer(content)])
        arrays.append(pa.FixedSizeListArray.from_arrays(values, field.type.list_size))
        split += width
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def read_settings(source: Any) -> tuple[Any, dict[str, Any]]:
    """Return a reader over what offers Arrow data, and what its schema says of the memories.

    Raises:
        MemoryStoreError: If it offers none, or not the batches of a store.
    """
    if not hasattr(source, "__arrow_c_stream__") and not hasattr(source, "read_next_batch"):
        raise MemoryStoreError(
            f"`merge` was given a {type(source).__name__}; expected a MemoryStore, or Arrow data (a "
            "RecordBatchReader or a Table) that `to_arrow` made. A path is opened with `MemoryStore(path)`."
        )
    pa = import_pyarrow()
    reader = source if hasattr(source, "read_next_batch") else pa.RecordBatchReader.from_stream(source)
    try:
        settings = json.loads((reader.schema.metadata or {})[KEY])
        wanted = arrow_schema(settings)
    except (KeyError, TypeError, ValueError) as error:
        raise MemoryStoreError(
            "The Arrow schema does not say which model its memories are of (metadata `modeling_memory`). Keep the "
            "schema that `to_arrow` gave, for example `table.replace_schema_metadata(schema.metadata)`."
        ) from error
    for field in wanted:
        place = reader.schema.get_field_index(field.name)
        if place < 0 or reader.schema.field(place).type != field.type:
            found = "is missing" if place < 0 else f"is {reader.schema.field(place).type}"
            raise MemoryStoreError(
                f"The Arrow column `{field.name}` {found}; expected {field.type}, as `to_arrow` gives it."
            )
    return reader, settings


def read_records(reader: Any, settings: dict[str, Any]) -> Iterator[Record]:
    """Yield the texts of a reader whose schema was checked.

    Raises:
        MemoryStoreError: If the rows of a text are not together, in order and whole.
    """
    names = [field.name for field in arrow_schema(settings)]
    rows: list[dict[str, Any]] = []
    for batch in reader:
        columns = {name: batch.column(batch.schema.get_field_index(name)) for name in names}
        lists = [_blobs(columns.pop(name)) for name in ("codes", "scales") if name in columns]
        blobs = [b"".join(parts) for parts in zip(*lists, strict=True)]
        plain = {name: column.to_pylist() for name, column in columns.items()}
        for place, blob in enumerate(blobs):
            row = {name: values[place] for name, values in plain.items()} | {"blob": blob}
            if rows and row["text_id"] != rows[-1]["text_id"]:
                yield _record(rows)
                rows = []
            rows.append(row)
    if rows:
        yield _record(rows)


def _blobs(column: Any) -> list[bytes]:
    if column.null_count:
        raise MemoryStoreError("An Arrow row has no memories (null). Leave such rows out.")
    values, width = column.flatten(), column.type.list_size * column.type.value_type.bit_width // 8
    start = values.offset * values.type.bit_width // 8
    content = memoryview(values.buffers()[1])[start : start + len(column) * width].tobytes()
    return [content[place : place + width] for place in range(0, len(content), width)]


def _record(rows: list[dict[str, Any]]) -> Record:
    first = rows[0]
    check_id(first["text_id"])
    if [row["number"] for row in rows] != list(range(first["chunks"] or 0)):
        raise MemoryStoreError(
            f"The Arrow rows of the text {first['text_id']!r} are {len(rows)} of {first['chunks']}, or not in order. "
            "Sort them by `text_id` and `number`."
        )
    knows = first["start"] is not None
    known = [UNCHECKED if row["comes_back"] is None else int(row["comes_back"]) for row in rows]
    places = [
        (row["start"], row["end"], row["num_tokens"], back) if knows else (-1, -1, row["num_tokens"], back)
        for row, back in zip(rows, known, strict=True)
    ]
    text = None if first["text"] is None else "".join(row["text"] or "" for row in rows)
    borders = [border for start, end, _, _ in places for border in (start, end)]
    end = 2**31 - 1 if text is None else len(text)
    if any(not isinstance(number, int) for place in places for number in place) or (
        knows and (borders != sorted(borders) or borders[0] < 0 or borders[-1] > end)
    ):
        raise MemoryStoreError(
            f"The Arrow rows of the text {first['text_id']!r} do not say where its chunks stand. Keep `start`, `end` "
            "and `num_tokens` as `to_arrow` gave them."
        )
    return Record(
        first["text_id"],
        first["digest"],
        first["num_unknown"] or 0,
        places,
        [(row["blob"], row["original"]) for row in rows],
        text,
    )
