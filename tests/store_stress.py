"""What tries to lose a memory: kills, full disks, damage, several writers. Used short and, marked slow, at length."""

import os
import random
import resource
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import torch

from modeling_memory import MemoryStore, MemoryStoreError, StoredText
from modeling_memory.store.database import FILE
from modeling_memory.store.texts import text_digest

WIDTH = 8
IDENTITY: dict[str, Any] = {part: {"sha256": part} for part in ("encoder", "projector", "tokenizer", "cut")}
IDENTITY["cut"] |= {"chunk_length": 4, "memories_per_chunk": 1, "hidden_size": WIDTH, "pooling": "last"}
PAGE = 4096


def make_text(text_id: str, seed: int = 0, most: int = 4) -> StoredText:
    """A text of some chunks whose content follows from its id and a seed."""
    dice = random.Random(f"{text_id} {seed}")
    num_chunks = dice.randint(1, most)
    text = "".join(dice.choice("abcdefgh äß漢\n") for _ in range(4 * num_chunks))
    generator = torch.Generator().manual_seed(dice.randrange(2**31))
    memories = torch.randn(num_chunks, 1, WIDTH, generator=generator).half().float()
    spans = [(4 * i, 4 * i + 4) for i in range(num_chunks)]
    return StoredText(text_id, memories, [4] * num_chunks, spans, text, text_digest(text))


def state_of(store: MemoryStore) -> dict[str, tuple[list, str]]:
    """Everything that a store says, bit by bit: id -> memories and text."""
    return {one: (store.memories(store.chunks(one)).tolist(), store.text(one)) for one in store.text_ids}


def build(folder: Path, *names: str, dtype: str = "float16", texts: int = 3) -> MemoryStore:
    """A store of some texts a name."""
    store = MemoryStore.create(folder, IDENTITY, dtype=dtype, keep_text=True)
    for name in names:
        store.append_memories([make_text(f"{name}{i}") for i in range(texts)])
    return store


def changes(folder: Path) -> dict[str, Any]:
    """What can be done to the store of [`template`]."""
    other = build(folder / "other", "c", texts=40)
    return {
        "append": lambda store: store.append_memories([make_text(f"n{i}") for i in range(40)]),
        "replace": lambda store: store.append_memories([make_text("a1", 1), make_text("n1")], on_duplicate="replace"),
        "delete": lambda store: store.delete(["a0", *(f"b{i}" for i in range(30))]),
        "merge": lambda store: store.merge(other),
        "vacuum": lambda store: store.vacuum(),
    }


def template(folder: Path) -> Path:
    """A store that has something to vacuum, closed."""
    with build(folder / "template", "a", "b", "d", texts=30) as store:
        store.delete([f"d{i}" for i in range(25)])
        return store.folder


def in_child(work: Any) -> int:
    """Run something in a process of its own; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(folder: Path, before: dict, after: dict) -> str:
    """Say in which of two states a store is, and that it is whole."""
    with MemoryStore(folder) as store:
        assert not (problems := store.verify()), problems
        found = state_of(store)
        store.append_memories([make_text("next")], on_duplicate="replace")  # and it goes on
    assert found in (before, after), f"neither before nor after: {sorted(found)}"
    return "before" if found == before else "after"


def at_every_growth(folder: Path, name: str, kind: str, step: int = PAGE) -> dict[str, int]:
    """Let no file grow beyond a size, for every size up to what one change needs.

    Args:
        folder: An empty folder.
        name: A change of [`changes`].
        kind: `"kill"`: the write that would go beyond kills the process. `"full disk"`: it fails.
        step: Bytes between the sizes; a size that is no multiple of a page tears a write.

    Returns:
        How many sizes were tried, in how many the store was as before or as after, and how many showed damage.
    """
    start, change = template(folder), changes(folder)[name]
    with MemoryStore(start) as store:
        before = state_of(store)
    shutil.copytree(start, folder / "after")
    with MemoryStore(folder / "after") as store:
        change(store)
        after = state_of(store)
        most = max(path.stat().st_size for path in store.folder.iterdir() if not path.name.endswith("-shm"))
    counts = {"tried": 0, "before": 0, "after": 0, "seen": 0}
    for size in range(0, most + step, step):
        place = folder / "disturbed"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(start, place)

        def work(place: Path = place, size: int = size) -> None:
            store = MemoryStore(place)
            if kind == "kill":
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            try:
                change(store)
            except OSError as error:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                os._exit(3 if "intact" in str(error) and state_of(store) in (before, after) else 4)

        status = in_child(work)
        assert status in ((0, -signal.SIGXFSZ) if kind == "kill" else (0, 3)), f"{name} at {size}: status {status}"
        at = outcome(place, before, after)
        assert status != 0 or at == "after" or before == after, f"{name} at {size}: said to be done, but is not"
        counts["tried"] += 1
        counts[at] += 1
        counts["seen"] += status != 0
    return counts


def tear_log(folder: Path, step: int) -> dict[str, int]:
    """Cut the write-ahead log after a change at every length, as a power cut may leave it."""
    counts = {"before": 0, "after": 0}
    store = build(folder / "store", "a", "b")
    before, start = state_of(store), (store.folder / f"{FILE}-wal").stat().st_size
    store.append_memories([make_text("late", most=9)])
    after, log = state_of(store), (store.folder / f"{FILE}-wal").read_bytes()
    main = (store.folder / FILE).read_bytes()
    for length in [*range(start, len(log), step), len(log)]:
        place = folder / "torn"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / FILE).write_bytes(main)
        (place / f"{FILE}-wal").write_bytes(log[:length])
        counts[outcome(place, before, after)] += 1
    return counts


def flip_bits(folder: Path, flips: int, seed: int = 0) -> dict[str, int]:
    """Change one bit of the file at random: what is read afterwards is right, or refused by name; then repair.

    Returns:
        `seen`: reading or `verify` said so; `silent`: neither, and all was right; `lost`: texts that repair gave up.
    """
    with build(folder / "store", *"abcdefgh", texts=20) as store:
        before = state_of(store)
    content = (folder / "store" / FILE).read_bytes()
    counts = {"seen": 0, "silent": 0, "lost": 0, "refused": 0}
    dice = random.Random(seed)
    for _ in range(flips):
        place = folder / "damaged"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        changed = bytearray(content)
        changed[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        (place / FILE).write_bytes(changed)
        try:
            with MemoryStore(place) as store:
                seen = reads_say_so(store, before)
        except MemoryStoreError:
            counts["refused"] += 1
            continue
        counts["seen" if seen else "silent"] += 1
        if seen:
            counts["lost"] += lost_by_repair(place, before)
    return counts


def reads_say_so(store: MemoryStore, before: dict[str, Any]) -> bool:
    """Read all texts: each is as it was, or reading or `verify` says that something is wrong."""
    seen = False
    for text_id, (memories, text) in before.items():
        try:
            assert store.memories(store.chunks(text_id)).tolist() == memories, "wrong in silence"
            assert store.text(text_id) == text, "wrong in silence"
        except MemoryStoreError:
            seen = True
    return bool(store.verify()) or seen


def lost_by_repair(place: Path, before: dict[str, Any]) -> int:
    """Repair a store: what it keeps is as it was. Returns how many texts it gave up."""
    report = MemoryStore.repair(place)
    with MemoryStore(place) as store:
        found = state_of(store)
        assert store.verify() == []
    assert all(before.get(text_id) == one for text_id, one in found.items())
    lost = len(before) - len(found)
    assert lost == len(report["lost"]) + report["lost_unnamed"]
    return lost


def hash_of(text_id: str) -> int:
    """The same number for a text in every process."""
    return int(text_digest(text_id)[:8], 16)


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


def replayed(state: dict, other: dict, session: int, step: int) -> dict:
    """What [`act`] makes of a state, by plain means."""
    if step % 6 == 3:
        return {text_id: content for text_id, content in state.items() if hash_of(text_id) % 3 != step % 3}
    if step % 6 == 4:
        return {**state, **other}
    if step % 6 == 5:
        return state
    new = [make_text(f"s{session}-{step}-{i}") for i in range(3)]
    return {**state, **{text.text_id: (text.memories.tolist(), str(text.text)) for text in new}}


def kill_at_random(folder: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill a process that changes a store again and again, and compare what is there with what it acknowledged."""
    dice = random.Random(seed)
    build(folder / "store").close()
    counts = {"acknowledged": 0, "in_flight": 0, "arrived": 0}
    expected: dict = {}
    with build(folder / "other", "c", "d") as other:
        others = state_of(other)
    for session in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                store, other = MemoryStore(folder / "store"), MemoryStore(folder / "other")
                for step in range(10**6):
                    act(store, other, session, step, writer)
            finally:
                os._exit(1)
        os.close(writer)
        time.sleep(dice.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader) as stream:
            words = [line.split() for line in stream.read().split("\n")[:-1]]
        for word, step in words:
            if word == "done":
                expected = replayed(expected, others, session, int(step))
                counts["acknowledged"] += 1
        with MemoryStore(folder / "store") as store:
            found = state_of(store)
            assert store.verify() == []
        if words and words[-1][0] == "begin":  # the last change begun may have arrived or not
            counts["in_flight"] += 1
            would_be = replayed(expected, others, session, int(words[-1][1]))
            if found == would_be != expected:
                counts["arrived"] += 1
                expected = would_be
        assert found == expected
    return counts


def write_side_by_side(folder: Path, writers: int, texts: int) -> int:
    """Append to one store from several processes, one text at a time; how many of their texts are there, and right."""
    build(folder / "store").close()
    children = []
    for writer in range(writers):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                store = MemoryStore(folder / "store")
                for number in range(texts):
                    store.append_memories([make_text(f"w{writer}-{number}")])
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * writers
    with MemoryStore(folder / "store") as store:
        found = state_of(store)
        assert store.verify() == []
    wanted = [make_text(f"w{writer}-{number}") for writer in range(writers) for number in range(texts)]
    return sum(found.get(one.text_id) == (one.memories.tolist(), one.text) for one in wanted)


def forge(folder: Path, *statements: tuple) -> None:
    """Change the file of a closed store by SQL, past everything that keeps it in order."""
    database = sqlite3.connect(folder / FILE, isolation_level=None)
    database.execute("PRAGMA writable_schema=ON")
    for statement in statements:
        database.execute(*statement)
    database.close()
