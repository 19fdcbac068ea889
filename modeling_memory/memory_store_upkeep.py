"""Upkeep of a memory store: taking back room on the disk, and going on after damage."""

import os
import re
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .memory_files import PART, MemoryStoreError, writing
from .memory_index import commit_index, drop_generations, index_files, read_generation
from .memory_shard import Shard

logger = logging.get_logger(__name__)

OWN_FILE = re.compile(rf"[0-9a-f]{{32}}\.safetensors|([0-9a-f]{{32}}\.safetensors|index-\d+(\.copy)?\.json).*\{PART}")
LOCK_SECONDS = 60.0


def vacuum(store: Any) -> int:
    """Remove what a store no longer names: deleted and replaced texts, and what killed writers left behind.

    Shards of which some texts are gone are written anew without them; then the older index goes, then all files of
    the store that the index does not name. Files of others, and those that [`repair`] set aside, stay.

    Args:
        store ([`MemoryStore`]): The store.

    Returns:
        `int`: Bytes that were freed.
    """
    with store.changing():
        before = _size(store.folder)
        entries = store._index["shards"]
        torn = [store._shards[entry["file"]] for entry in entries if entry["gone"]]
        store.write(
            (shard.stored_text(number) for shard in torn for number in shard.live),
            [entry for entry in entries if not entry["gone"]],
        )
        drop_generations(store.folder, [old for old in index_files(store.folder) if old < store.generation])
        named = {entry["file"] for entry in store._index["shards"]}
        for path in store.folder.iterdir():
            if OWN_FILE.fullmatch(path.name) and path.name not in named:
                path.unlink()
        return before - _size(store.folder)


def repair(folder: str | os.PathLike) -> dict[str, Any]:
    """Make a damaged store usable again: it holds what the newest readable index names and is intact, nothing else.

    Damaged files are set aside under the ending `.damaged`; nothing is removed. A store without damage is not changed.

    Args:
        folder (`str` or `os.PathLike`): The store.

    Returns:
        `dict`: `set_aside`, names of damaged files; `lost`, ids of texts that stood in damaged shards; `lost_unnamed`,
        how many more of which not even the id is readable; `went_back`, whether both files of the newest index were
        damaged, so that the last change is undone.

    Raises:
        MemoryStoreError: If there is no store, no index is readable, or someone writes.
    """
    folder = Path(folder)
    if not index_files(folder):
        raise MemoryStoreError(f"{folder} is no memory store: it holds no index-*.json. Correct the path.")
    with writing(folder, LOCK_SECONDS):
        files = index_files(folder)
        data, damaged = None, []
        for generation in sorted(files, reverse=True):
            found, wrong = read_generation(files[generation], generation)
            damaged += wrong
            data = found if data is None else data
        if data is None:
            raise MemoryStoreError(
                f"No index of {folder.name} is readable ({', '.join(damaged)}). Restore one of them from a copy."
            )
        report: dict[str, Any] = {"set_aside": damaged, "lost": [], "lost_unnamed": 0}
        report["went_back"] = data["generation"] < max(files)
        intact = []
        for entry in data["shards"]:
            shard = None
            try:
                shard = Shard(folder, entry)
                shard.verify()
                intact.append(entry)
            except MemoryStoreError as fault:
                logger.warning(str(fault))
                if shard is None:
                    report["lost_unnamed"] += entry["texts"] - len(entry["gone"])
                else:
                    report["lost"] += [shard.texts[number]["id"] for number in shard.live]
                damaged.append(entry["file"])
        if damaged or report["went_back"]:
            commit_index(folder, {**data, "shards": intact}, previous=max(files))
            for name in damaged:
                if (folder / name).exists():
                    os.replace(folder / name, folder / f"{name}.damaged")
    return report


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
