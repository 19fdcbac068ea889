"""Faults of a memory store: kills at every system call, full disks, flipped bytes, cut files, writers side by side.

```bash
python -m benchmarks.store_faults
```

Counted: how many faults were tried, and how many texts that were stored before were lost or came back other than they
were written, in any bit. Every fault must be explained by an error that names the file, or cost nothing.

- *crash points*: a change is made in a process of its own that ends, without any clean-up, before its k-th system
  call that touches a file, for every k; writes also end in their middle. The store must be as it was before the change
  or as it is after it.
- *full disk*: the same calls fail one by one with "no space left on device".
- *kills*: SIGKILL at random moments of a process that appends, deletes, merges and vacuums; what it acknowledged
  counts.
- *flips*, *cuts*: every byte of every file is changed; every file is cut to every length.
- *writers*: several processes append to one store at once, with the lock and with a lock that does not hold.

Power cuts, in which synced bytes are lost by the hardware, are not tried here.
"""

import argparse
import errno
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.measure import describe_run, save_record
from modeling_memory import MemoryStore, MemoryStoreError, StoredText
from modeling_memory.memory_shard import text_digest
from training.places import REPOSITORY

WIDTH = 8
PARTS = ("encoder", "projector", "tokenizer", "cut")
IDENTITY: dict[str, Any] = {part: {"sha256": part} for part in PARTS}
IDENTITY["cut"] |= {"chunk_length": 4, "memories_per_chunk": 1, "hidden_size": WIDTH, "pooling": "last"}
CALLS = ("open", "write", "fsync", "close", "chmod", "link", "replace", "unlink")
State = dict[str, tuple[list, str]]
Change = Callable[[MemoryStore], Any]


def make_text(text_id: str, seed: int = 0) -> StoredText:
    """A text of one to four chunks whose content follows from its id and a seed."""
    dice = random.Random(f"{text_id} {seed}")
    num_chunks = dice.randint(1, 4)
    text = "".join(dice.choice("abcdefgh äß漢\n") for _ in range(4 * num_chunks))
    generator = torch.Generator().manual_seed(dice.randrange(2**31))
    memories = torch.randn(num_chunks, 1, WIDTH, generator=generator).half().float()
    spans = [(4 * i, 4 * i + 4) for i in range(num_chunks)]
    return StoredText(text_id, memories, [4] * num_chunks, spans, text, text_digest(text))


def state_of(store: MemoryStore) -> State:
    """Everything that a store says, bit by bit: id -> memories and text."""
    return {
        text_id: (store.memories(store.chunks(text_id)).tolist(), store.text(text_id)) for text_id in store.text_ids
    }


def build(folder: Path, *names: str, dtype: str = "float16") -> MemoryStore:
    """A store of one shard a name."""
    store = MemoryStore.create(folder, IDENTITY, dtype=dtype, keep_text=True)
    for name in names:
        store.append_memories([make_text(f"{name}{i}") for i in range(3)])
    return store


def changes(folder: Path) -> dict[str, Change]:
    """What can be done to the store of [`build`] with the names `a` and `b`."""
    other = build(folder / "other", "c")
    return {
        "append": lambda store: store.append_memories([make_text("n0"), make_text("n1")]),
        "replace": lambda store: store.append_memories([make_text("a1", 1), make_text("n1")], on_duplicate="replace"),
        "delete": lambda store: store.delete(["a0", "b0", "b1", "b2"]),
        "merge": lambda store: store.merge(other),
        "vacuum": lambda store: store.vacuum(),
    }


def template(folder: Path) -> Path:
    """A store that has something to vacuum."""
    store = build(folder / "template", "a", "b", "d")
    store.delete(["d0", "d1"])
    return store.folder


@contextmanager
def failing(call: int, fault: Callable[[str, tuple], None]) -> Iterator[list[str]]:
    """Let `fault` happen before the `call`-th system call that touches a file; yields the calls so far."""
    seen: list[str] = []

    def wrap(name: str, original: Callable) -> Callable:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            if len(seen) - 1 == call:
                fault(name, arguments)
            return original(*arguments, **options)

        return wrapped

    with mock.patch.multiple(os, **{name: wrap(name, getattr(os, name)) for name in CALLS}):
        yield seen


def in_child(work: Callable[[], None]) -> int:
    """Run something in a process of its own; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def crash(half: bool) -> Callable[[str, tuple], None]:
    """End the process at once, in the middle of a write if asked to."""
    write = os.write

    def fault(name: str, arguments: tuple) -> None:
        if half and name == "write":
            write(arguments[0], arguments[1][: len(arguments[1]) // 2])
        os._exit(99)

    return fault


def fill(name: str, arguments: tuple) -> None:
    """Fail as a full disk does; what takes no room does not fail."""
    is_new = name == "open" and arguments[1] & os.O_EXCL
    if is_new or name in ("write", "fsync", "link", "replace"):
        raise OSError(errno.ENOSPC, "No space left on device")


def outcome(folder: Path, before: State, after: State) -> str:
    """Say in which of two states a store is.

    Raises:
        AssertionError: If in neither, or damaged.
    """
    store = MemoryStore(folder)
    problems = store.verify()
    assert not problems, problems
    found = state_of(store)
    assert found in (before, after), f"neither before nor after: {sorted(found)}"
    return "before" if found == before else "after"


def at_every_call(folder: Path, name: str, kind: str, most: int | None = None) -> dict[str, int]:
    """Disturb one change at each of its system calls, once each.

    Args:
        folder (`Path`): An empty folder.
        name (`str`): A change of [`changes`].
        kind (`str`): `"crash"`, `"crash in a write"` or `"full disk"`.
        most (`int`, *optional*): Stop after so many calls.

    Returns:
        `dict`: `faults`, and in how many the store was as `before` or as `after`.
    """
    start, change = template(folder), changes(folder)[name]
    before = state_of(MemoryStore(start))
    shutil.copytree(start, folder / "after")
    change(MemoryStore(folder / "after"))
    after = state_of(MemoryStore(folder / "after"))
    counts = {"faults": 0, "before": 0, "after": 0}
    call = 0
    while most is None or call < most:
        place = folder / "disturbed"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(start, place)
        if kind == "full disk":
            store, told = MemoryStore(place), None
            with failing(call, fill) as seen:
                try:
                    change(store)
                except OSError as error:
                    told = error
            if len(seen) <= call:
                break
            at = outcome(place, before, after)
            assert before == after or (at == "before") == (told is not None), f"{name}, call {call}: {at}, told {told}"
            assert told is None or "intact" in str(told), told
        else:

            def work(at: Path = place, at_call: int = call) -> None:
                store = MemoryStore(at)
                with failing(at_call, crash(kind == "crash in a write")):
                    change(store)

            status = in_child(work)
            if status == 0:
                break
            assert status == 99, f"{name}, call {call}: the process ended with {status}"
            at = outcome(place, before, after)
        counts["faults"] += 1
        counts[at] += 1
        # Going on: the next change works, and nothing is left behind.
        store = MemoryStore(place)
        store.append_memories([make_text("next")])
        store.vacuum()
        outcome(place, {**before, **state_of(MemoryStore(place))}, {**after, **state_of(MemoryStore(place))})
        named = {entry["file"] for entry in store._index["shards"]}
        left = [path.name for path in place.iterdir() if path.suffix in (".part", ".safetensors")]
        assert set(left) == named, f"left behind: {set(left) - named}"
        call += 1
    return counts


def disturb_files(folder: Path, kind: str, step: int = 1) -> dict[str, int]:
    """Change bytes of files one by one, or cut files to shorter lengths.

    Args:
        folder (`Path`): An empty folder.
        kind (`str`): `"flip"` or `"cut"`.
        step (`int`): Only every so many bytes.

    Returns:
        `dict`: `faults`; how many were `refused` with an error, or `healed` by the index's second copy with a warning.
    """
    store = build(folder / "store", "a", "b")
    before = state_of(store)
    files = sorted(path for path in store.folder.iterdir() if path.name != "lock")
    counts = {"faults": 0, "refused": 0, "healed": 0}
    dice = random.Random(0)
    for path in files:
        content = path.read_bytes()
        for place in range(0, len(content), step):
            if kind == "flip":
                changed = bytearray(content)
                changed[place] ^= 1 << dice.randrange(8)
                path.write_bytes(changed)
            else:
                path.write_bytes(content[:place])
            counts["faults"] += 1
            assert any(path.name in problem for problem in MemoryStore(store.folder).verify()), f"{path.name}, {place}"
            try:
                assert state_of(MemoryStore(store.folder)) == before
                assert path.name.startswith("index-"), "a damaged shard was read"
                counts["healed"] += 1
            except MemoryStoreError as error:
                assert path.name in str(error), error
                counts["refused"] += 1
                readable = MemoryStore(store.folder)
                for text_id in before:  # the texts of other shards
                    if text_id not in _texts_of(store, path.name):
                        assert readable.memories(readable.chunks(text_id)).tolist() == before[text_id][0]
        path.write_bytes(content)
    assert state_of(MemoryStore(store.folder)) == before
    return counts


def _texts_of(store: MemoryStore, file: str) -> list[str]:
    return [text["id"] for text in store._shards[file].texts] if file in store._shards else []


def kill_at_random(folder: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill a process that changes a store again and again, and compare what is there with what it acknowledged.

    Returns:
        `dict`: `faults`, texts `acknowledged` over all sessions, `lost`, and changes that were `in_flight`, of which
        some `arrived`.
    """
    dice = random.Random(seed)
    build(folder / "store")
    counts = {"faults": 0, "acknowledged": 0, "lost": 0, "in_flight": 0, "arrived": 0}
    expected: State = {}
    other = build(folder / "other", "c", "d")
    for number in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                store = MemoryStore(folder / "store")
                for step in range(10**6):
                    act(store, other, number, step, writer)
            finally:
                os._exit(1)
        os.close(writer)
        time.sleep(dice.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader) as stream:
            words = stream.read().split("\n")[:-1]
        # Replay what was acknowledged on a plain dictionary; the last change begun may have arrived or not.
        for word in words:
            step = int(word.split()[1])
            if word.startswith("done"):
                expected = replayed(expected, other, number, step)
                counts["acknowledged"] += 1
        found = state_of(MemoryStore(folder / "store"))
        if words and words[-1].startswith("begin"):
            counts["in_flight"] += 1
            would_be = replayed(expected, other, number, int(words[-1].split()[1]))
            if found == would_be != expected:
                counts["arrived"] += 1
                expected = would_be
        counts["lost"] += sum(found.get(text_id) != content for text_id, content in expected.items())
        assert found == expected and not MemoryStore(folder / "store").verify()
        counts["faults"] += 1
    return counts


def act(store: MemoryStore, other: MemoryStore, session: int, step: int, say: int) -> None:
    """Make the change number `step` of a session, saying into a pipe when it begins and when it is done."""
    os.write(say, f"begin {step}\n".encode())
    if step % 6 == 3:
        store.delete([text_id for text_id in store.text_ids if hash_of(text_id) % 3 == step % 3])
    elif step % 6 == 4:
        store.merge(other, on_duplicate="replace")
    elif step % 6 == 5:
        store.vacuum()
    else:
        store.append_memories([make_text(f"s{session}-{step}-{i}") for i in range(3)])
    os.write(say, f"done {step}\n".encode())


def replayed(state: State, other: MemoryStore, session: int, step: int) -> State:
    """What [`act`] makes of a state, by plain means."""
    if step % 6 == 3:
        return {text_id: content for text_id, content in state.items() if hash_of(text_id) % 3 != step % 3}
    if step % 6 == 4:
        return {**state, **state_of(other)}
    if step % 6 == 5:
        return state
    new = [make_text(f"s{session}-{step}-{i}") for i in range(3)]
    return {**state, **{text.text_id: (text.memories.tolist(), str(text.text)) for text in new}}


def hash_of(text_id: str) -> int:
    """The same number for a text in every process."""
    return int(text_digest(text_id)[:8], 16)


def write_side_by_side(folder: Path, writers: int, texts: int, *, lock: bool) -> dict[str, int]:
    """Append to one store from several processes at once.

    Args:
        folder (`Path`): An empty folder.
        writers (`int`): Processes.
        texts (`int`): Texts of each, one change for each.
        lock (`bool`): Whether the lock holds; if not, a writer that is told it came second tries again.

    Returns:
        `dict`: `acknowledged` texts, `lost`, and how often a writer was `refused`.
    """
    build(folder / "store")
    children, pipes = [], []
    for writer in range(writers):
        reader, end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with nullcontext() if lock else mock.patch("modeling_memory.memory_files._try_lock", bool):
                    _append_all(folder / "store", writer, texts, end)
            finally:
                os._exit(0)
        os.close(end)
        children.append(child)
        pipes.append(reader)
    words = []
    for child, reader in zip(children, pipes, strict=True):
        with os.fdopen(reader) as stream:
            words += stream.read().split()
        os.waitpid(child, 0)
    acknowledged = [word for word in words if word != "refused"]
    found = state_of(MemoryStore(folder / "store"))
    wrong = [one for one in acknowledged if found.get(one, [None])[0] != make_text(one).memories.tolist()]
    assert not MemoryStore(folder / "store").verify()
    return {"acknowledged": len(acknowledged), "lost": len(wrong), "refused": words.count("refused")}


def _append_all(folder: Path, writer: int, texts: int, say: int) -> None:
    store = MemoryStore(folder)
    for number in range(texts):
        text = make_text(f"w{writer}-{number}")
        while True:
            try:
                store.append_memories([text])
            except MemoryStoreError:
                os.write(say, b"refused\n")
                continue
            os.write(say, f"{text.text_id}\n".encode())
            break


def measure(kills: int, folder: Path) -> dict[str, Any]:
    """Try all faults; every check that fails raises."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, Any] = {"at_every_call": {}, "files": {}, "writers": {}}

    def fresh() -> Path:
        return Path(tempfile.mkdtemp(dir=folder))

    for kind in ("crash", "crash in a write", "full disk"):
        for name in ("append", "replace", "delete", "merge", "vacuum"):
            metrics["at_every_call"].setdefault(kind, {})[name] = at_every_call(fresh(), name, kind)
        print(f"{kind}: {metrics['at_every_call'][kind]}", flush=True)
    for kind in ("flip", "cut"):
        metrics["files"][kind] = disturb_files(fresh(), kind)
        print(f"{kind}: {metrics['files'][kind]}", flush=True)
    metrics["kills"] = kill_at_random(fresh(), kills)
    print(f"kills: {metrics['kills']}", flush=True)
    for lock in (True, False):
        name = "with the lock" if lock else "without a lock"
        metrics["writers"][name] = write_side_by_side(fresh(), writers=4, texts=25, lock=lock)
        print(f"writers {name}: {metrics['writers'][name]}", flush=True)
    shutil.rmtree(folder)
    tried = sum(one["faults"] for names in metrics["at_every_call"].values() for one in names.values())
    tried += sum(one["faults"] for one in metrics["files"].values()) + metrics["kills"]["faults"]
    lost = metrics["kills"]["lost"] + sum(one["lost"] for one in metrics["writers"].values())
    return {"faults": tried, "texts_lost": lost, **metrics}  # at calls and in files a loss raises


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store_faults", description="Try to lose a memory.")
    parser.add_argument("--kills", type=int, default=300, help="kills at random moments")
    parser.add_argument("--folder", default="runs/store_faults", help="where the stores go; removed afterwards")
    parser.add_argument("--out", help="file of the record; default: benchmarks/results/store_faults.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("modeling_memory").setLevel(logging.ERROR)  # thousands of warnings are wanted here
    command = f"python -m benchmarks.store_faults --kills {options.kills}"
    record = describe_run("store_faults", command, {"moments": 0})
    record["metrics"] = measure(options.kills, REPOSITORY / options.folder)
    path = save_record(record, "store_faults", options.out)
    print(f"record: {path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
