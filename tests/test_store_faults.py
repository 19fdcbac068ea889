"""Nothing that was stored is lost: kills, full disks, damage, other writers, forged files, histories.

Each of `store_stress` is tried shortly here, and at length by the tests marked slow.
"""

import os
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from modeling_memory import MemoryStore, MemoryStoreError
from modeling_memory.store.database import FILE, SHIFT
from tests.store_stress import (
    PAGE,
    at_every_growth,
    build,
    changes,
    flip_bits,
    forge,
    in_child,
    kill_at_random,
    make_text,
    state_of,
    tear_log,
    template,
    write_side_by_side,
)

CHANGES = ("append", "replace", "delete", "merge", "vacuum")


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["kill", "full disk"])
def test_a_change_is_whole_or_not_at_all_wherever_a_write_ends(tmp_path, kind, name):
    counts = at_every_growth(tmp_path, name, kind, 20 * PAGE + 100)
    assert counts["seen"] >= 1 and counts["before"] >= 1 and counts["before"] + counts["after"] == counts["tried"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["kill", "full disk"])
def test_a_change_is_whole_or_not_at_all_at_every_size(tmp_path, kind, name):
    counts = at_every_growth(tmp_path, name, kind, PAGE // 2)
    assert counts["tried"] > 30 and counts["seen"] > 5


def test_a_log_that_a_power_cut_tore_holds_the_change_or_does_not(tmp_path):
    counts = tear_log(tmp_path, 9000)
    assert counts["before"] >= 3 and counts["after"] == 1


@pytest.mark.slow
def test_a_log_that_was_torn_anywhere(tmp_path):
    assert tear_log(tmp_path, 97)["before"] > 300


def test_one_flipped_bit_is_told_or_without_effect_and_repaired(tmp_path):
    counts = flip_bits(tmp_path, 12)
    assert counts["seen"] >= 3


@pytest.mark.slow
def test_three_hundred_flipped_bits(tmp_path):
    counts = flip_bits(tmp_path, 300, seed=1)
    assert counts["seen"] > 60 and counts["lost"] <= 2 * counts["seen"] + 160  # a page of the tree may cost all


def test_what_was_acknowledged_survives_sigkill(tmp_path):
    counts = kill_at_random(tmp_path, kills=6)
    assert counts["acknowledged"] > 0 and counts["in_flight"] > 0


@pytest.mark.slow
def test_what_was_acknowledged_survives_two_hundred_sigkills(tmp_path):
    assert kill_at_random(tmp_path, kills=200, seed=1)["acknowledged"] > 200


def test_writers_side_by_side_lose_nothing(tmp_path):
    assert write_side_by_side(tmp_path, writers=3, texts=6) == 18


@pytest.mark.slow
def test_many_writers_side_by_side_lose_nothing(tmp_path):
    assert write_side_by_side(tmp_path, writers=8, texts=60) == 480


def test_a_writer_waits_for_another_only_so_long(tmp_path):
    store, other = build(tmp_path / "store", "a"), MemoryStore(tmp_path / "store")
    store.lock_seconds = 0.1
    with other._database.changing():
        with pytest.raises(MemoryStoreError, match="being written by another process"):
            store.delete("a0")
        assert len(store) == 3
        store.lock_seconds = 30.0
        thread = threading.Thread(target=store.delete, args=("a0",))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(30)
    assert store.text_ids == ["a1", "a2"]


def test_a_reader_keeps_what_it_opened_through_delete_and_vacuum(tmp_path, caplog):
    store = build(tmp_path / "store", "a", "b")
    before, reader = state_of(store), MemoryStore(tmp_path / "store")
    store.delete(["b0", "b1", "b2"])
    freed = store.vacuum()
    assert "deleted bytes stay in its write-ahead log" in caplog.text
    assert state_of(reader) == before and reader.verify() == []
    reader.reload()
    assert state_of(reader) == {one: before[one] for one in ("a0", "a1", "a2")}
    caplog.clear()
    assert store.vacuum() > max(freed, 0) and not caplog.text


def test_a_store_is_read_by_a_forked_process_and_by_threads(tmp_path):
    store = build(tmp_path / "store", "a")
    before, found = state_of(store), []

    def work():
        assert state_of(store) == before
        store.append_memories([make_text("child")])

    assert in_child(work) == 0
    threads = [threading.Thread(target=lambda: found.append(state_of(store))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [before] * 4
    store.append_memories([make_text("parent")])
    assert store.text_ids == ["a0", "a1", "a2", "child", "parent"] and store.verify() == []


def test_a_backup_is_made_while_others_write(tmp_path):
    store, writer = build(tmp_path / "store", "a"), MemoryStore(tmp_path / "store")
    before = state_of(store)
    writer.append_memories([make_text("late")])
    store.backup(tmp_path / "copy")
    copy = MemoryStore(tmp_path / "copy")
    assert state_of(copy) == before and copy.verify() == []
    copy.append_memories([make_text("own")])
    assert len(copy) == 4 and len(MemoryStore(tmp_path / "store")) == 4
    with pytest.raises(MemoryStoreError, match="holds a store already"):
        store.backup(tmp_path / "copy")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(MemoryStoreError, match=r"holds mine.txt"):
        store.backup(tmp_path / "full")


def test_what_killed_writers_left_is_removed_first_and_files_of_others_stay(tmp_path):
    store = build(tmp_path / "store", "a")
    for name in (f"{FILE}.0123.part", f"{FILE}.0123.part-wal", "notes.txt", "weights.part"):
        (store.folder / name).write_bytes(b"0" * 50_000)
    assert store.vacuum() >= 100_000
    names = {path.name for path in store.folder.iterdir()}
    assert {"notes.txt", "weights.part"} <= names and not any(name.startswith(f"{FILE}.0123") for name in names)


def test_a_disk_that_cannot_be_written_is_read_and_not_changed(tmp_path, monkeypatch):
    """As root no right is missing, so the answer of the system is a stand-in; the file is opened as on such a disk."""
    build(tmp_path / "store", "a").close()
    before, access = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}, os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    store = MemoryStore(tmp_path / "store")
    assert store.text("a0") == make_text("a0").text and store.verify() == []
    for change in (lambda: store.delete("a0"), lambda: store.append_memories([make_text("b")]), store.vacuum):
        with pytest.raises(MemoryStoreError, match="backup"):
            change()
    store.close()
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before
    with pytest.raises(MemoryStoreError, match="cannot be written"):
        build(tmp_path / "new")
    (tmp_path / "store" / f"{FILE}-wal").write_bytes(b"left by a writer that was killed")
    with pytest.raises(MemoryStoreError, match="holds changes that its last writer left"):
        MemoryStore(tmp_path / "store")


def test_what_is_no_store_is_refused_by_name(tmp_path):
    def refused(match, call=MemoryStore):
        with pytest.raises(MemoryStoreError, match=match):
            call(tmp_path / "x")
        shutil.rmtree(tmp_path / "x") if (tmp_path / "x").is_dir() else (tmp_path / "x").unlink()

    (tmp_path / "x").write_text("a file")
    refused("is a file")
    (tmp_path / "x").write_text("a file")
    refused("is a file", build)
    (tmp_path / "x" / FILE).mkdir(parents=True)
    refused("is a folder; expected the file")
    for call in (MemoryStore, build, MemoryStore.repair):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "index-000003.json").write_text("{}")
        refused(r"older format \(index-000003.json\)", call)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / FILE).write_bytes(b"not a database" * 99)
    refused("is damaged: it does not begin as")
    for wrong in (3, None, ""):
        with pytest.raises(MemoryStoreError, match="expected the path of a folder"):
            MemoryStore(wrong)
    store = build(tmp_path / "y", "a")
    shutil.rmtree(tmp_path / "y")
    with pytest.raises(MemoryStoreError, match="was removed or replaced"):
        store.append_memories([make_text("b")])
    store.close()
    with pytest.raises(MemoryStoreError, match="was closed"):
        store.chunks("a0")


def test_a_received_folder_reaches_nothing_outside(tmp_path):
    """Links, a rollback journal (whose content may name a file to be removed), triggers, views, other tables."""
    letter = tmp_path / "letter.txt"
    letter.write_text("private")
    build(tmp_path / "store", "a").close()

    def forged(*statements):
        shutil.rmtree(tmp_path / "forged", ignore_errors=True)
        shutil.copytree(tmp_path / "store", tmp_path / "forged")
        forge(tmp_path / "forged", *statements)
        return tmp_path / "forged"

    for name in ("-journal", "-wal", "-shm"):
        folder = forged()
        (folder / f"{FILE}{name}").unlink(missing_ok=True)
        (folder / f"{FILE}{name}").symlink_to(letter)
        with pytest.raises(MemoryStoreError, match=f"holds {FILE}{name}"):
            MemoryStore(folder)
    folder = forged()
    (folder / f"{FILE}-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + str(letter).encode())
    with pytest.raises(MemoryStoreError, match="which no store writes"):
        MemoryStore(folder)
    for statement in (
        f"CREATE TRIGGER t AFTER INSERT ON texts BEGIN INSERT INTO chunks VALUES (1, '{letter}', x'00'); END",
        "CREATE VIEW v AS SELECT load_extension('/tmp/x')",
        "CREATE TABLE more (x)",
        "DROP TABLE passages",
        "CREATE INDEX i ON texts(digest)",
    ):
        with pytest.raises(MemoryStoreError, match="its tables are not those of a store"):
            MemoryStore(forged((statement,)))
    folder = tmp_path / "linked"  # as in the cache of the Hub: read, never written
    folder.mkdir()
    (folder / FILE).symlink_to(tmp_path / "store" / FILE)
    before = (tmp_path / "store" / FILE).read_bytes()
    store = MemoryStore(folder)
    assert len(state_of(store)) == 3
    with pytest.raises(MemoryStoreError, match="it is a link"):
        store.delete("a0")
    assert (tmp_path / "store" / FILE).read_bytes() == before and letter.read_text() == "private"


FORGERIES = {
    "a memory of another length": ("UPDATE chunks SET memory = x'00'",),
    "a memory that is text": ("UPDATE chunks SET memory = 'text'",),
    "a checksum that is a number": ("UPDATE chunks SET checksum = 7",),
    "a checksum of null": ("UPDATE texts SET checksum = x''",),
    "places of no whole chunks": ("UPDATE texts SET places = x'000102'",),
    "places that are text": ("UPDATE texts SET places = 'abc'",),
    "an id of bytes": ("UPDATE texts SET id = x'ff00' WHERE key = 1",),
    "a text of other content": ("UPDATE passages SET content = content || '!'",),
    "a text that is bytes": ("UPDATE passages SET content = x'ff'",),
    "settings that are no JSON": ("UPDATE settings SET value = '{'",),
    "settings of another kind": ("UPDATE settings SET value = '[]'",),
    "no settings": ("DELETE FROM settings",),
    "no state": ("DELETE FROM settings WHERE name = 'state'",),
    "a passage that is gone": ("DELETE FROM passages WHERE row > ?", (1 << SHIFT,)),
    "a chunk that is gone": ("DELETE FROM chunks WHERE row > ?", (1 << SHIFT,)),
    "a text that is gone": ("DELETE FROM texts WHERE key = 2",),
    "a chunk that belongs to none": ("INSERT INTO chunks SELECT row + 9000, memory, checksum FROM chunks",),
    "a row that changed places": ("UPDATE chunks SET row = row + 1 WHERE row = (SELECT max(row) FROM chunks)",),
}


def check_reads(store, wanted):
    """Whatever is read is right, or is refused by name."""
    query, rows = make_text("a0").memories[0], sum(len(one.counts) for one in wanted.values())
    for text_id, text in wanted.items():
        for read, right in {
            lambda one: store.text(one): text.text,
            lambda one: store.memories(store.chunks(one)).tolist(): text.memories.tolist(),
            lambda one: len(store.nearest(query, 99)[0]): rows,
            lambda one: store.to_arrow().read_all().num_rows: rows,
        }.items():
            try:
                assert read(text_id) == right
            except MemoryStoreError as error:
                assert "damaged" in str(error) or "has no text" in str(error)


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_or_damaged_row_is_told_wherever_it_is_read(tmp_path, name):
    build(tmp_path / "store", "a").close()
    wanted = {text_id: make_text(text_id) for text_id in ("a0", "a1", "a2")}
    forge(tmp_path / "store", FORGERIES[name])
    try:
        store = MemoryStore(tmp_path / "store")
    except MemoryStoreError as error:
        assert "damaged" in str(error) or "format version" in str(error)
        with pytest.raises(MemoryStoreError, match="Nothing can be saved"):
            MemoryStore.repair(tmp_path / "store")
        return
    assert store.verify()
    check_reads(store, wanted)
    store.close()
    report = MemoryStore.repair(tmp_path / "store")
    assert report["set_aside"] == [f"{FILE}.damaged"]
    with MemoryStore(tmp_path / "store") as store:
        assert store.verify() == []
        assert all(store.text(one) == wanted[one].text for one in store.text_ids)
        assert len(wanted) - len(store) == len(report["lost"]) + report["lost_unnamed"]


def test_repair_changes_nothing_without_damage_and_goes_on_after_it_was_cut_off(tmp_path):
    build(tmp_path / "store", "a", "b").close()
    assert MemoryStore.repair(tmp_path / "store") == {"set_aside": [], "lost": [], "lost_unnamed": 0}
    forge(tmp_path / "store", ("UPDATE chunks SET memory = x'00' WHERE row = ?", (1 << SHIFT,)))
    reader = MemoryStore(tmp_path / "store")

    def work():
        MemoryStore._store = lambda *arguments: os._exit(99)
        MemoryStore.repair(tmp_path / "store")

    assert in_child(work) == 99
    with pytest.raises(MemoryStoreError, match="is being repaired"):
        reader.delete("a1")
    report = MemoryStore.repair(tmp_path / "store")
    assert report == {"set_aside": [f"{FILE}.damaged"], "lost": ["a0"], "lost_unnamed": 0}
    reader.append_memories([make_text("a0")])  # a store that was open meanwhile goes on
    assert sorted(reader.text_ids) == ["a0", "a1", "a2", "b0", "b1", "b2"] and reader.verify() == []
    with MemoryStore(tmp_path / "store") as store:
        assert store.search_text(re.findall(r"\w+", store.text("b1"))[0], 1)
    reader.close()
    forge(tmp_path / "store", ("UPDATE chunks SET memory = x'00'",))
    with pytest.raises(MemoryStoreError, match="damaged of an earlier repair. Move it"):
        MemoryStore.repair(tmp_path / "store")


def test_a_store_of_a_later_version_is_refused(tmp_path):
    store = build(tmp_path / "store", "a")
    from modeling_memory.store.database import write_setting

    with pytest.raises(MemoryStoreError, match="99"), store._database.changing() as database:
        write_setting(database, "store", {**store._database.settings, "format_version": 99})
    store.close()
    for use in (MemoryStore, MemoryStore.repair):
        with pytest.raises(MemoryStoreError, match="format version 99.*Update"):
            use(tmp_path / "store")


def test_a_change_that_does_nothing_writes_nothing(tmp_path):
    store = build(tmp_path / "store", "a")
    generation = store.generation
    assert store.append_memories([make_text("a0")], on_duplicate="skip") == 0 and store.append_memories([]) == 0
    assert store.delete([]) == 0 and store.generation == generation


@pytest.mark.slow
def test_costs_grow_with_what_is_done_and_not_with_its_square(tmp_path):
    """CPU seconds of a vacuum, in stores of which one is four times the other."""
    seconds = {}
    for texts in (2000, 8000):
        store = build(tmp_path / str(texts), "a", texts=texts)
        store.delete([f"a{i}" for i in range(0, texts, 2)])
        start = time.process_time()
        store.vacuum()
        seconds[texts] = time.process_time() - start
    assert seconds[8000] < 10 * max(seconds[2000], 0.02)


class Histories(RuleBasedStateMachine):
    """Any sequence of changes, reopenings and repairs leaves what a dictionary would hold."""

    names = st.sampled_from([f"t{i}" for i in range(5)])

    @initialize(dtype=st.sampled_from(["float32", "float16"]))
    def begin(self, dtype):
        self.root = tempfile.TemporaryDirectory()
        self.folder = Path(self.root.name) / "store"
        self.store = build(self.folder, dtype=dtype)
        self.expected = {}
        self.others = 0

    @rule(names=st.sets(names, min_size=1), seed=st.integers(0, 3))
    def append(self, names, seed):
        texts = [make_text(name, seed) for name in sorted(names)]
        self.store.append_memories(texts, on_duplicate="replace")
        self.expected |= {text.text_id: (text.memories.tolist(), text.text) for text in texts}

    @rule(names=st.sets(names))
    def delete(self, names):
        names = names & set(self.expected)
        self.store.delete(names)
        self.expected = {name: content for name, content in self.expected.items() if name not in names}

    @rule(names=st.sets(names, min_size=1), seed=st.integers(0, 3), by_arrow=st.booleans())
    def merge(self, names, seed, by_arrow):
        self.others += 1
        other = build(self.folder.parent / f"other{self.others}")
        other.append_memories([make_text(name, seed) for name in sorted(names)])
        self.store.merge(other.to_arrow() if by_arrow else other, on_duplicate="skip")
        self.expected = {**state_of(other), **self.expected}

    @rule()
    def vacuum(self):
        self.store.vacuum()

    @rule()
    def reopen(self):
        self.store = MemoryStore(self.folder)

    @rule()
    def repair(self):
        assert MemoryStore.repair(self.folder)["set_aside"] == []

    @invariant()
    def holds_what_was_acknowledged(self):
        if hasattr(self, "folder"):
            fresh = MemoryStore(self.folder)
            assert state_of(fresh) == self.expected and fresh.verify() == []

    def teardown(self):
        if hasattr(self, "root"):
            self.root.cleanup()


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=12, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_programs_can_fail(tmp_path):
    """A change that is not whole is seen: the check itself is checked."""
    folder, change = template(tmp_path), changes(tmp_path)["delete"]
    with MemoryStore(folder) as store:
        before = state_of(store)
        change(store)
    from tests.store_stress import outcome

    with pytest.raises(AssertionError, match="neither before nor after"):
        outcome(folder, before, {})
