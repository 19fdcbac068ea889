"""Looking for damage in a store, and going on after it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .database import FILE, PART, MemoryStoreError, check_place, explained, new_file, write_setting
from .memory_store import MemoryStore
from .texts import Record

logger = logging.get_logger(__name__)


def verify(store: MemoryStore) -> list[str]:
    """Read every byte of a store again: SQLite's own checks, every row's checksum, and that no row is too many.

    Returns:
        What is wrong, a line each.
    """
    problems: list[str] = []

    def attempt(work: Any, *values: Any) -> Any:
        try:
            return work(*values)
        except (MemoryStoreError, OSError) as error:
            # One broken page is met by every row that stands on it.
            if str(error) not in problems:
                problems.append(str(error))
            return None

    for (line,) in attempt(store._read, "PRAGMA integrity_check") or ():
        if line != "ok":
            problems.append(f"{FILE} of {store.folder.name} is damaged: {line}")
    rows = attempt(lambda: store._in_order(-1, store._read("SELECT * FROM texts ORDER BY key"))) or []
    found = {"texts": len(rows), "chunks": 0, "passages": 0}
    for row in rows:
        entry = attempt(store._entry, row)
        if entry is not None:
            attempt(store._whole, *entry)
            found["chunks"] += len(entry[1].places)
            found["passages"] += entry[1].passages
    counts = {table: attempt(store._read, f"SELECT count(*) FROM {table}") for table in ("chunks", "passages")}
    state = store._database.state
    wanted = {"texts": state["texts"], "chunks": state["chunks"]}
    wanted |= {table: count[0][0] for table, count in counts.items() if count}
    for name, number in found.items():
        if number != wanted.get(name, number):
            problems.append(f"{FILE} of {store.folder.name} is damaged: {number} {name} are whole, of {wanted[name]}")
    return problems


def repair(folder: Path) -> dict[str, Any]:
    """Make a damaged store usable again: what is whole is copied aside and takes the place of all.

    The damaged file is kept beside it under the ending `.damaged`. A store without damage is not changed. While it is
    mended readers read on and writers are refused.

    Args:
        folder (`Path`): The store.

    Returns:
        `dict`: `set_aside`, names of damaged files; `lost`, ids of texts that could not be saved; `lost_unnamed`, how
        many more of which not even the id is readable.

    Raises:
        MemoryStoreError: If there is no store, someone writes, or not even its settings can be read.
    """
    report: dict[str, Any] = {"set_aside": [], "lost": [], "lost_unnamed": 0}
    check_place(folder)
    try:
        store = MemoryStore(folder)
    except MemoryStoreError as error:
        raise MemoryStoreError(f"{error} Nothing can be saved of {folder.name}: use a copy.") from error
    with store, tempfile.TemporaryDirectory(prefix=f"{FILE}.", suffix=PART, dir=folder) as aside:
        database, kept = store._database, folder / f"{FILE}.damaged"
        was_cut_off = bool(database.state["repairing"])
        # A repair that was killed may have left a sound file, and writers locked out of it.
        if not verify(store) and not was_cut_off:
            return report
        if kept.exists() and not was_cut_off:
            raise MemoryStoreError(f"{folder.name} holds {kept.name} of an earlier repair. Move it elsewhere first.")
        with database.changing(is_repair=True):
            # On the disk before anything else, so that whoever comes after a kill knows that a repair has to be
            # finished.
            database.state["repairing"] = 1
            write_setting(database.connection, "state", database.state)
        with new_file(kept) as copy, database.lock, explained(database.path):
            database.connection.backup(copy)  # page by page, whatever they hold
        with MemoryStore.create(aside, store.fingerprint, dtype=store.dtype, keep_text=store.keeps_text) as whole:
            whole._store(_whole_records(store, report["lost"]), None, "skip")
            report["lost_unnamed"] = max(len(store) - len(whole) - len(report["lost"]), 0)
            generation = database.state["generation"]
            # Readers know states by this number, and one that went backwards would be taken for one already seen.
            with whole._database.changing() as changed:
                whole._database.state["generation"] = generation
                write_setting(changed, "store", database.settings)
            whole._database.end()
            database.replace(whole._database.connection)
    report["set_aside"] = [kept.name]
    return report


def _whole_records(store: MemoryStore, lost: list[str]) -> Iterator[Record]:
    """Yield every text of which each row is as it was written, found by its key and not by the index of ids."""
    # By number, since the index that lists keys may be what is broken.
    for key in range(1, store._database.state["next"]):
        text_id = None
        try:
            for row in store._read("SELECT * FROM texts WHERE key = ?", key):
                text_id = row[1] if isinstance(row[1], str) and row[0] == key else None
                if row[0] == key:  # a damaged tree may answer with another row
                    yield store._whole(*store._entry(row))
        except (MemoryStoreError, OSError) as fault:
            logger.warning(str(fault))
            lost += [text_id] if text_id is not None else []
