"""The index of a memory store: the one small file that says what is stored.

A store changes by writing the index of the next generation, `index-000012.json`, in one rename; what the newest index
names is stored, nothing else is. A second copy stands beside it, `index-000012.copy.json`, so that one damaged file
costs nothing, and the generation before is kept. Each carries a checksum of itself.
"""

import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .memory_files import MemoryStoreError, seal, unseal, write_file

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
NAME = re.compile(r"index-(\d{6,})(\.copy)?\.json")
ATTEMPTS = 100


def index_files(folder: Path) -> dict[int, list[Path]]:
    """Return the index files of a folder, generation -> the index and its copy, whichever are there."""
    found: dict[int, list[Path]] = defaultdict(list)
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            found[int(match[1])].append(path)
    return {generation: sorted(found[generation], key=lambda path: len(path.name)) for generation in sorted(found)}


def read_index(folder: Path) -> dict[str, Any]:
    """Read the newest index; where one of its two files is damaged, the other, with a warning.

    Raises:
        MemoryStoreError: If there is none, both files are damaged, or a later version wrote it.
    """
    for _ in range(ATTEMPTS):
        files = index_files(folder)
        if not files:
            raise MemoryStoreError(
                f"{folder} is no memory store: it holds no index-*.json. Correct the path, or begin a store with "
                "`MemoryStore.open(folder, model, processor, create=True)`."
            )
        newest = max(files)
        data, damaged = read_generation(files[newest], newest)
        if data is not None:
            if damaged:
                logger.warning(
                    f"{', '.join(damaged)} of {folder.name} is damaged; the copy beside it is intact, so nothing is "
                    "lost. `MemoryStore.repair(folder)` writes both again."
                )
            return data
        if damaged:
            older = max((generation for generation in files if generation < newest), default=None)
            remedy = (
                "Restore a file from a copy."
                if older is None
                else f"Restore one of them from a copy, or let `MemoryStore.repair(folder)` go back to generation "
                f"{older}, the state before the last change; it says what that costs and removes nothing."
            )
            raise MemoryStoreError(
                f"The index of {folder.name} is damaged: {' and '.join(damaged)} of generation {newest} do not agree "
                f"with their checksums. The shards are untouched. {remedy}"
            )
    raise MemoryStoreError(f"The index of {folder.name} changed {ATTEMPTS} times while it was read. Read it again.")


def read_generation(files: list[Path], generation: int) -> tuple[dict[str, Any] | None, list[str]]:
    """Read one generation: its data, or `None`, and the names of damaged files; a file that is gone is none of them.

    Raises:
        MemoryStoreError: If a later version wrote it.
    """
    data, damaged = None, []
    for path in files:
        try:
            found = unseal(path.read_bytes(), path.name)
        except FileNotFoundError:
            continue
        except MemoryStoreError:
            damaged.append(path.name)
            continue
        if found["format_version"] > FORMAT_VERSION:
            raise MemoryStoreError(
                f"{path.name} has format version {found['format_version']}; this code reads up to {FORMAT_VERSION}. "
                "Update the package."
            )
        if found["generation"] != generation:  # a file under another's name
            damaged.append(path.name)
        else:
            data = found
    return data, damaged


def commit_index(folder: Path, data: dict[str, Any], previous: int) -> None:
    """Make a new state of the store the valid one; the caller holds the lock.

    Args:
        folder (`Path`): The store.
        data (`dict`): The index; it gets the next generation.
        previous (`int`): Generation of the newest index that was there when the lock was taken, 0 for none.

    Raises:
        MemoryStoreError: If another writer committed in between, which a lock that works prevents.
        OSError: If the index could not be written; the state before is the valid one.
    """
    generation = previous + 1
    content = seal({**data, "format_version": FORMAT_VERSION, "generation": generation})
    path = folder / f"index-{generation:06d}.json"
    try:
        write_file(path, content, exclusive=True)
        came_second = max(index_files(folder)) != generation
    except FileExistsError:
        came_second = True
    except OSError:
        if not path.exists():
            raise
        logger.warning(f"{path.name} is in its place, but the system could not confirm that it is on the disk.")
        came_second = False
    if came_second:
        raise MemoryStoreError(
            f"Another process has just changed {folder.name}: this file system's locks do not hold. Nothing of this "
            "change is stored. Do it again, with one writer at a time."
        )
    # From here on the change is stored: what fails now costs redundancy only.
    try:
        write_file(folder / f"index-{generation:06d}.copy.json", content)
    except OSError as error:
        logger.warning(f"The change is stored, but the second copy of the index is not: {error}")
    drop_generations(folder, [old for old in index_files(folder) if old < generation - 1])


def drop_generations(folder: Path, generations: list[int]) -> None:
    """Remove the indexes of some generations, oldest first; one that cannot be removed stays."""
    files = index_files(folder)
    for generation in sorted(generations):
        for path in files.get(generation, ()):
            with suppress(OSError):
                path.unlink()
