"""Files that are whole or not there: written beside their place, synced, renamed; sealed JSON; one writer at once."""

import errno
import hashlib
import importlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PART = ".part"
LOCK = "lock"
BLOCK_BYTES = 1 << 24
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class MemoryStoreError(ValueError):
    """A store that cannot be used as asked: damaged, of another model, or being written by someone else."""


def write_file(path: Path, content: bytes, *, exclusive: bool = False) -> None:
    """Write a file so that it is there whole or not at all: beside its place, synced, renamed, the folder synced.

    Args:
        path (`Path`): Its place.
        content (`bytes`): All of it.
        exclusive (`bool`): Whether to refuse a place that is taken, even if it was taken a moment ago.

    Raises:
        FileExistsError: If the place is taken and `exclusive` is set.
        OSError: If the disk is full or the file cannot be written. What was in its place before is still there.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=PART)
        try:
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(handle, view[:BLOCK_BYTES]) :]
                os.fsync(handle)
            finally:
                os.close(handle)
            os.chmod(name, 0o644)
            if not (exclusive and _link(name, path)):
                os.replace(name, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)
        sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        reason = "the disk is full" if error.errno in NO_SPACE else str(error)
        raise OSError(
            error.errno,
            f"Writing {path.name} failed: {reason}. Everything that was stored before is intact. Make room, or choose "
            "another place, and do it again.",
        ) from error


def _link(name: str, path: Path) -> bool:
    """Give a written file its place unless that is taken; `False` on a file system without links."""
    try:
        os.link(name, path)
    except FileExistsError:
        raise
    except (OSError, AttributeError):
        if path.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(path)) from None
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder last, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that sync no folders
            raise
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def seal(data: dict[str, Any]) -> bytes:
    """Turn data into the one JSON text that stands for it, with a checksum of itself.

    >>> unseal(seal({"a": 1}), "index.json")
    {'a': 1}
    """
    body = json.dumps(data, sort_keys=True, ensure_ascii=False)
    sealed = {**data, "checksum": hashlib.sha256(body.encode()).hexdigest()}
    return (json.dumps(sealed, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode()


def unseal(content: bytes, name: str) -> dict[str, Any]:
    """Turn sealed JSON back into data.

    Args:
        content (`bytes`): From [`seal`].
        name (`str`): The file it came from, for the error.

    Raises:
        MemoryStoreError: If any byte is not as it was written.
    """
    try:
        data = json.loads(content)
        del data["checksum"]
        intact = seal(data) == content
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise MemoryStoreError(f"{name} is damaged: its content does not agree with its checksum.")
    return data


def _try_lock(handle: int) -> bool:
    """Lock an open file for this process alone; the system frees it when the process ends, however it ends."""
    try:
        if os.name == "nt":
            windows = importlib.import_module("msvcrt")
            windows.locking(handle, windows.LK_NBLCK, 1)
        else:
            posix = importlib.import_module("fcntl")
            posix.flock(handle, posix.LOCK_EX | posix.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def writing(folder: Path, seconds: float) -> Iterator[None]:
    """Hold a folder's lock: one writer at a time.

    Args:
        folder (`Path`): The folder.
        seconds (`float`): How long to wait for another writer.

    Raises:
        MemoryStoreError: If someone else still writes.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + seconds
        while not _try_lock(handle):
            if time.monotonic() > deadline:
                raise MemoryStoreError(
                    f"{folder.name} is being written by another process, and was still after {seconds:g} seconds. "
                    "Wait until it is done, or give every writer a store of its own and merge them."
                )
            time.sleep(0.01)
        yield
    finally:
        os.close(handle)
