"""The one SQLite file of a memory store: opened with care, read as of one moment, changed whole or not at all.

| table | a row | holds |
|---|---|---|
| `settings` | `store`, `state` | what never changes (fingerprint, number format); counts, which every change updates |
| `texts` | a text | id, digest, and where its chunks stand, and whether they come back (`places`) |
| `chunks` | a chunk | memories as one blob, the text if it is lost else; `row`: text's key * 2**24 + chunk's number |
| `passages` | about 256 tokens | the kept text, cut between chunks; `row` is that of the first chunk |
| `words` | a passage | the full-text index (FTS5), which holds no text of its own |

Every row carries a checksum of itself and its key, which is compared whenever it is read.
"""

import errno
import hashlib
import json
import os
import sqlite3
import struct
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FILE = "memories.sqlite"
PART = ".part"
FORMAT_VERSION = 2
SHIFT = 24
"""Bits of a row number that tell the chunk of a text: 16 million chunks a text."""
HEADER = b"SQLite format 3\0"
SCHEMA = (
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL, checksum BLOB NOT NULL)",
    "CREATE TABLE texts (key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, digest TEXT, unknown INTEGER NOT NULL, "
    "passages INTEGER NOT NULL, places BLOB NOT NULL, checksum BLOB NOT NULL)",
    "CREATE TABLE chunks (row INTEGER PRIMARY KEY, memory BLOB NOT NULL, original TEXT, checksum BLOB NOT NULL)",
    "CREATE TABLE passages (row INTEGER PRIMARY KEY, content TEXT NOT NULL, checksum BLOB NOT NULL)",
    "CREATE VIRTUAL TABLE words USING fts5(content, content='', tokenize='porter unicode61 remove_diacritics 2')",
)
STATE = {"generation": 1, "next": 1, "texts": 0, "chunks": 0, "tokens": 0, "unknown": 0, "checked": 0, "lost": 0}
STATE |= {"stale": 0, "marked": 0, "repairing": 0}
"""Counts of what is stored; the key of the next text; the chunks deleted since the last vacuum, and the
passages of them whose words are only marked as deleted."""
WORDS_CAN_LEAVE = sqlite3.sqlite_version_info >= (3, 42)
"""Whether this SQLite takes words out of the index; before, they are marked until the index is written anew."""


class MemoryStoreError(ValueError):
    """A store that cannot be used as asked: damaged, of another model, or being written by someone else."""


def checksum(content: Any, *numbers: int) -> bytes:
    """Return eight bytes that a change of text or bytes, or of at most two numbers that name their place, changes."""
    kind = b"text" if isinstance(content, str) else b""
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    elif not isinstance(content, bytes):
        return os.urandom(8)  # what a store never writes agrees with nothing
    return hashlib.blake2b(
        content, digest_size=8, salt=struct.pack(f">{len(numbers)}q", *numbers), person=kind
    ).digest()


def explain(path: Path, error: sqlite3.Error) -> Exception:
    """Say what an error of SQLite means for a store, and how to go on. By its words: 3.10 has no codes."""
    words, name = str(error), path.parent.name
    if "locked" in words or "busy" in words:
        return MemoryStoreError(f"{name} is being written by another process. Try again, or raise `lock_seconds`.")
    if "full" in words or "disk I/O" in words:
        return OSError(
            errno.ENOSPC,
            f"Writing {path.name} failed: the disk is full ({words}). Everything that was stored before is intact. "
            "Make room, or copy the store to another disk with `backup`",
            str(path),
        )
    if "readonly" in words or "unable to open" in words:
        return MemoryStoreError(
            f"{path} cannot be written ({words}). Give yourself the right to write its folder, or copy the store to "
            "another with `backup(path)`."
        )
    if "closed" in words:
        return MemoryStoreError(f"The store {name} was closed. Open it again.")
    if "fts5 file format" in words:
        return MemoryStoreError(
            f"The words of {name} were indexed by a newer SQLite than this Python's {sqlite3.sqlite_version}. Use a "
            "Python with SQLite 3.42 or later."
        )
    if "fts5" in words and "module" in words:
        return MemoryStoreError("This Python's SQLite has no full-text search (FTS5). Use another build of Python.")
    return damaged(path, words)


def damaged(path: Path, what: str) -> MemoryStoreError:
    """Return the error for a file that is not as it was written."""
    return MemoryStoreError(
        f"{path.name} of {path.parent.name} is damaged: {what}. Restore it from a copy, or let "
        "`MemoryStore.repair(folder)` save what is whole and name what is lost."
    )


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of SQLite, and of values that only a damaged or forged file has, into those of a store."""
    try:
        yield
    except sqlite3.Error as error:
        raise explain(path, error) from error
    except (struct.error, OverflowError) as error:
        raise damaged(path, str(error)) from error


def connect(path: Path, seconds: float, options: str = "mode=rw") -> sqlite3.Connection:
    """Connect to a file in which nothing is trusted: no extension is loaded, no view or trigger may call out."""
    uri = f"{path.absolute().as_uri()}?{options}"
    # No isolation level: Python would otherwise begin transactions of its own, before statements that it thinks need
    # one.
    database = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=seconds)
    # FAST overwrites what is deleted inside a page; whole pages are cut off by `vacuum`.
    for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "synchronous=FULL", "secure_delete=FAST"):
        database.execute(f"PRAGMA {pragma}").fetchall()
    return database


def create_file(path: Path, settings: dict[str, Any]) -> None:
    """Write an empty store, whole or not at all; where another process was faster, its file stays."""
    with new_file(path) as database:
        # Before the first table: afterwards it would ask for the whole file to be written anew.
        database.execute("PRAGMA auto_vacuum=INCREMENTAL")
        # So that readers keep the moment that they opened, however long a writer takes.
        database.execute("PRAGMA journal_mode=WAL").fetchall()
        for statement in SCHEMA:
            database.execute(statement)
        write_setting(database, "store", settings)
        write_setting(database, "state", STATE)


@contextmanager
def new_file(path: Path) -> Iterator[sqlite3.Connection]:
    """Fill a database aside, sync it, and give it its name unless that is taken."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PART}")
    try:
        with explained(path):
            database = connect(part, 60.0, "mode=rwc")
            try:
                yield database
            finally:
                database.close()  # the last to close carries the write-ahead log over into the file
        try:
            # A link fails where the name is taken; a rename would put this empty store over the other's.
            os.link(part, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                os.replace(part, path)
        # A name is on the disk only once the folder that lists it is.
        sync_folder(path.parent)
    finally:
        for ending in ("", "-wal", "-shm", "-journal"):
            part.with_name(part.name + ending).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names onto the disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_setting(database: sqlite3.Connection, name: str, value: dict[str, Any]) -> None:
    """Write one of the two settings with its checksum."""
    # Sorted, so that the same settings have the same checksum.
    content = json.dumps(value, sort_keys=True)
    row = (name, content, checksum(f"{name} {content}"))
    database.execute("INSERT OR REPLACE INTO settings VALUES (?, ?, ?)", row)


def check_place(folder: Path) -> Path:
    """Return the file of a store, if there is one that may be opened.

    Raises:
        MemoryStoreError: If there is none, it has an older format, or what lies there could reach outside the folder.
    """
    path = folder / FILE
    if folder.exists() and not folder.is_dir():
        raise MemoryStoreError(f"{folder} is a file. A store is a folder that holds {FILE}; correct the path.")
    # Named for what it is: an old store taken for an empty folder would be begun anew over its texts.
    older = sorted(one.name for one in folder.glob("index-*.json"))
    if older and not path.exists():
        raise MemoryStoreError(
            f"{folder.name} holds a store of an older format ({older[0]}), which this version cannot read. Remember "
            "its texts again in a new folder."
        )
    if not path.exists():
        raise MemoryStoreError(
            f"{folder} is no memory store: it holds no {FILE}. Correct the path, or begin a store with "
            "`MemoryStore.open(folder, model, processor, create=True)`."
        )
    if path.is_dir():
        raise MemoryStoreError(f"{path} is a folder; expected the file of a store.")
    for name in (f"{FILE}-journal", f"{FILE}-wal", f"{FILE}-shm"):
        # A rollback journal, which a store never has, may name any file of the machine, to be removed.
        if (folder / name).is_symlink() or (name.endswith("journal") and (folder / name).exists()):
            raise MemoryStoreError(f"{folder.name} holds {name}, which no store writes. Remove it.")
    try:
        with path.open("rb") as stream:
            head = stream.read(20)
    except OSError as error:
        raise MemoryStoreError(f"{path} cannot be read: {error.strerror}. Give yourself the right to.") from error
    if head[:16] != HEADER or head[18:20] != b"\2\2":
        raise damaged(path, "it does not begin as the file of a store does")
    return path


class Database:
    """A connection to a store's file that reads one moment of it until [`reload`].

    Args:
        folder (`Path`): The store.
        lock_seconds (`float`): How long a change waits for another writer.

    Attributes:
        settings (`dict`): What never changes.
        state (`dict`): Counts, as of the moment that is read.
    """

    def __init__(self, folder: Path, lock_seconds: float):
        self.path, self.lock_seconds = check_place(folder), lock_seconds
        self.lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._open()

    def _open(self) -> None:
        wal = self.path.with_name(f"{FILE}-wal")
        self.is_fixed = self.path.is_symlink() or not os.access(self.path.parent, os.W_OK)
        if self.is_fixed and wal.exists() and wal.stat().st_size:
            raise MemoryStoreError(
                f"{self.path.parent} cannot be written, and {wal.name} holds changes that its last writer left there. "
                "Copy the folder to a disk that can be written, and open the copy."
            )
        self._process = os.getpid()
        with explained(self.path):
            # Without the right to write there is no log to read, and no one here to change the file: `immutable`.
            options = "mode=ro&immutable=1" if self.is_fixed else "mode=rw"
            self._connection = connect(self.path, self.lock_seconds, options)
            try:
                self._file = self._identity()
                self._begin()
                self._check_schema()
            except BaseException:
                self.close()
                raise

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _check_schema(self) -> None:
        """Refuse a file with other tables, or with views and triggers, which a received file could act by."""
        # SQLite stores a statement in its own words, and FTS5 adds tables of its own: what a store has is asked of
        # SQLite itself.
        own = sqlite3.connect(":memory:")
        for statement in SCHEMA:
            own.execute(statement)
        wanted, found = (
            set(database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master"))
            for database in (own, self.connection)
        )
        own.close()
        if wanted != found:
            names = ", ".join(sorted(str(row[1]) for row in wanted ^ found))
            raise damaged(self.path, f"its tables are not those of a store ({names})")

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection of this process: none may be carried through a fork."""
        if self._process != os.getpid():
            self._inherited = self._connection  # not closed: that would undo locks of the parent
            self._open()
        if self._connection is None:
            raise MemoryStoreError(f"The store {self.path.parent.name} was closed. Open it again.")
        return self._connection

    def _begin(self) -> None:
        """Begin to read the newest state, and hold it."""
        # A transaction that is never committed is what keeps all later reads at one moment.
        self.connection.execute("BEGIN")
        rows = self.connection.execute("SELECT name, value, checksum FROM settings").fetchall()
        found = {}
        for name, value, digest in rows:
            if digest != checksum(f"{name} {value}"):
                raise damaged(self.path, f"its settings ({name}) do not agree with their checksum")
            found[name] = json.loads(value)
        # A checksum proves that a value was written so, not that it makes sense.
        if not all(isinstance(value, dict) for value in found.values()):
            raise damaged(self.path, "its settings are none")
        version = found.get("store", {}).get("format_version")
        if version != FORMAT_VERSION:
            raise MemoryStoreError(
                f"{self.path.parent.name} has format version {version}; this version of modeling-memory reads "
                f"{FORMAT_VERSION}. Update the package."
            )
        counts = found.get("state", {})
        if set(counts) != set(STATE) or not all(type(count) is int and count >= 0 for count in counts.values()):
            raise damaged(self.path, "its counts are missing, or none")
        self.settings, self.state = found["store"], found["state"]

    def end(self) -> None:
        """Read no moment for now."""
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")

    def reload(self) -> None:
        """Read the newest state from now on."""
        with self.lock, explained(self.path):
            self.end()
            if self._identity() != self._file:
                self.close()
                check_place(self.path.parent)
                self._open()
                return
            if not self.is_fixed:
                with suppress(sqlite3.OperationalError):
                    # What was written comes from the log into the file, so that this reader needs no log and another
                    # may empty it.
                    self.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            self._begin()
            self._check_schema()

    def read(self, statement: str, *values: Any) -> list[tuple]:
        """Return the rows that a statement finds."""
        with self.lock, explained(self.path):
            return self.connection.execute(statement, values).fetchall()

    @contextmanager
    def changing(self, is_repair: bool = False) -> Iterator[sqlite3.Connection]:
        """Change the newest state, wholly or not at all; it is on the disk when the block ends.

        Args:
            is_repair (`bool`): Whether it is a repair that changes it.

        Raises:
            MemoryStoreError: If someone else writes for longer than `lock_seconds`, or the file cannot be written.
            OSError: If the disk is full.
        """
        with self.lock, explained(self.path):
            database = self.connection
            if self.is_fixed:
                raise MemoryStoreError(
                    f"{self.path} cannot be changed: it is a link, or its folder cannot be written. Copy the store "
                    "with `backup(path)`, and change the copy."
                )
            self.end()
            try:
                database.execute(f"PRAGMA busy_timeout={int(1000 * self.lock_seconds)}").fetchall()
                # The lock at once: one that is only asked for by the first write would be refused if the state had
                # moved on.
                database.execute("BEGIN IMMEDIATE")
                if self._identity() != self._file:
                    raise MemoryStoreError(f"{self.path} was removed or replaced meanwhile. Call `reload()`.")
                self._read_counts(database)
                if self.state["repairing"] and not is_repair:
                    raise MemoryStoreError(
                        f"{self.path.parent.name} is being repaired, or that was cut off. Call "
                        "`MemoryStore.repair(folder)`."
                    )
                before = database.total_changes
                yield database
                if database.total_changes > before:
                    self.state["generation"] += 1
                    write_setting(database, "state", self.state)
                    database.execute("COMMIT")
            finally:
                self.end()
                self._begin()

    def _read_counts(self, database: sqlite3.Connection) -> None:
        """Read the counts again under the lock: whoever was waited for has changed them."""
        ((value, digest),) = database.execute("SELECT value, checksum FROM settings WHERE name = 'state'").fetchall()
        if digest != checksum(f"state {value}"):
            raise damaged(self.path, "its settings (state) do not agree with their checksum")
        self.state = json.loads(value)

    def shrink(self, anew: bool) -> bool:
        """Cut free pages off the file, in steps that need little room; whether nothing of them is left on the disk.

        Args:
            anew (`bool`): Whether to write the whole file anew first, unless the disk has no room for that.
        """
        with self.lock, explained(self.path):
            database = self.connection
            self.end()
            try:
                if anew:
                    with suppress(sqlite3.OperationalError):
                        database.execute("VACUUM")
                left, is_clean = 1, False
                while left:
                    database.execute("PRAGMA incremental_vacuum(4096)").fetchall()
                    # Not waited for: a reader may hold its moment for as long as it likes.
                    database.execute("PRAGMA busy_timeout=0").fetchall()
                    is_clean = not database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                    database.execute(f"PRAGMA busy_timeout={int(1000 * self.lock_seconds)}").fetchall()
                    ((left,),) = database.execute("PRAGMA freelist_count").fetchall()
                return is_clean
            finally:
                self.end()
                self._begin()

    def replace(self, source: sqlite3.Connection) -> None:
        """Take over all of another database in one change, in place: files that are open must not change names."""
        with self.lock, explained(self.path):
            self.end()
            try:
                # Page by page in one transaction: readers see the old store until all of the new one is there.
                source.backup(self.connection)
            finally:
                self.end()
                self._begin()

    def close(self) -> None:
        """Give the file back; the last to close it carries the write-ahead log over."""
        with self.lock:
            if self._connection is not None and self._process == os.getpid():
                self._connection.close()
            self._connection = None
