"""Nothing that was stored is lost: kills at every system call, full disks, damage, other writers, histories.

`benchmarks/store_faults.py` tries all of it; here are samples, and what hypothesis finds.
"""

import logging
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from benchmarks.store_faults import (
    at_every_call,
    build,
    disturb_files,
    failing,
    fill,
    kill_at_random,
    make_text,
    state_of,
    write_side_by_side,
)
from modeling_memory import MemoryStore, MemoryStoreError
from modeling_memory.memory_files import seal, unseal, write_file, writing


@pytest.mark.parametrize("name", ["append", "vacuum"])
@pytest.mark.parametrize("kind", ["crash", "crash in a write", "full disk"])
def test_a_change_is_whole_or_not_at_all_wherever_it_is_cut_off(tmp_path, kind, name):
    counts = at_every_call(tmp_path, name, kind, most=14)
    assert counts["faults"] == 14 and counts["before"] + counts["after"] >= 14


def test_a_change_that_is_cut_off_late_is_there(tmp_path):
    counts = at_every_call(tmp_path, "delete", "crash")
    assert counts["before"] >= 5 and counts["after"] >= 5 and counts["faults"] == counts["before"] + counts["after"]


@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_damage_is_found_and_explained(tmp_path, kind):
    counts = disturb_files(tmp_path, kind, step=29)
    assert counts["faults"] > 100 and counts["refused"] > 20 and counts["healed"] > 20
    assert counts["faults"] == counts["refused"] + counts["healed"]


def test_what_was_acknowledged_survives_sigkill(tmp_path):
    counts = kill_at_random(tmp_path, kills=12)
    assert counts["lost"] == 0 and counts["acknowledged"] > 0 and counts["in_flight"] > 0


@pytest.mark.parametrize("lock", [True, False])
def test_writers_side_by_side_lose_nothing(tmp_path, lock):
    counts = write_side_by_side(tmp_path, writers=3, texts=6, lock=lock)
    assert counts["acknowledged"] == 18 and counts["lost"] == 0 and (not lock or counts["refused"] == 0)


def test_a_writer_waits_for_another_only_so_long(tmp_path):
    store = build(tmp_path / "store", "a")
    store.lock_seconds = 0.1
    with writing(store.folder, 1.0), pytest.raises(ValueError, match="being written by another process"):
        store.delete("a0")
    store.delete("a0")
    assert store.text_ids == ["a1", "a2"]


def test_both_files_of_the_index_damaged_is_refused_and_repaired_by_going_back(tmp_path):
    store = build(tmp_path / "store", "a")
    before = state_of(store)
    store.append_memories([make_text("late")])
    for path in store.folder.glob(f"index-{store.generation:06d}*"):
        path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="index-000003.json and index-000003.copy.json .* go back to generation 2"):
        MemoryStore(store.folder)
    with pytest.raises(ValueError, match="index-000003"):
        store.delete("a0")
    report = MemoryStore.repair(store.folder)
    assert report["went_back"] and report["lost"] == [] and len(report["set_aside"]) == 2
    again = MemoryStore(store.folder)
    assert state_of(again) == before and again.verify() == []
    assert (
        sum(path.suffix == ".safetensors" for path in store.folder.iterdir()) == 2
    )  # what was late is not thrown away
    again.append_memories([make_text("late")])
    assert len(MemoryStore(store.folder)) == 4


def test_one_damaged_index_file_is_told_and_repaired(tmp_path, caplog):
    store = build(tmp_path / "store", "a")
    before = state_of(store)
    path = store.folder / f"index-{store.generation:06d}.json"
    path.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert state_of(MemoryStore(store.folder)) == before
    assert f"{path.name} of store is damaged" in caplog.text
    report = MemoryStore.repair(store.folder)
    assert report == {"set_aside": [path.name], "lost": [], "lost_unnamed": 0, "went_back": False}
    assert state_of(MemoryStore(store.folder)) == before and MemoryStore(store.folder).verify() == []


@pytest.mark.parametrize("place", [20, -20])
def test_repair_sets_a_damaged_shard_aside_and_names_what_it_held(tmp_path, place):
    """In the head of the file, where the ids stand, and in its body."""
    store = build(tmp_path / "store", "a", "b")
    before = state_of(store)
    store.delete("b1")
    path = store._places["b0"][0].path
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        state_of(MemoryStore(store.folder))
    if place > 0:  # without its ids a text could be stored twice
        with pytest.raises(ValueError, match=path.name):
            MemoryStore(store.folder).append_memories([make_text("b0")])
    report = MemoryStore.repair(store.folder)
    assert report["set_aside"] == [path.name] and not report["went_back"]
    assert (report["lost"], report["lost_unnamed"]) == ((["b0", "b2"], 0) if place < 0 else ([], 2))
    again = MemoryStore(store.folder)
    assert state_of(again) == {text_id: before[text_id] for text_id in ("a0", "a1", "a2")}  # b1 stays deleted
    assert (store.folder / f"{path.name}.damaged").exists()
    again.append_memories([make_text("b0")])
    again.vacuum()
    assert MemoryStore(store.folder).verify() == [] and (store.folder / f"{path.name}.damaged").exists()


def test_a_missing_shard_is_named(tmp_path):
    store = build(tmp_path / "store", "a", "b")
    path = store._places["b0"][0].path
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} is gone"):
        MemoryStore(store.folder).chunks()
    assert MemoryStore(store.folder).chunks("a0")


def test_a_reader_whose_file_was_vacuumed_is_told(tmp_path):
    store = build(tmp_path / "store", "a", "b")
    reader = MemoryStore(store.folder)
    store.delete(["b0", "b1", "b2"])
    store.vacuum()
    with pytest.raises(ValueError, match="is gone.*open it again"):
        reader.memories(reader.chunks("b0"))


def test_a_store_of_a_later_version_is_refused(tmp_path):
    store = build(tmp_path / "store", "a")
    for path in store.folder.glob(f"index-{store.generation:06d}*"):
        path.write_bytes(seal({**unseal(path.read_bytes(), path.name), "format_version": 99}))
    for use in (MemoryStore, MemoryStore.repair):
        with pytest.raises(ValueError, match="format version 99.*Update"):
            use(store.folder)


def test_files_of_others_stay(tmp_path):
    store = build(tmp_path / "store", "a")
    (store.folder / "notes.txt").write_text("mine")
    (store.folder / "weights.safetensors").write_text("mine")
    store.delete(["a0", "a1", "a2"])
    store.vacuum()
    assert {path.name for path in store.folder.iterdir()} >= {"notes.txt", "weights.safetensors"}
    assert not [path for path in store.folder.glob("*.safetensors") if path.name != "weights.safetensors"]


def test_a_full_disk_is_called_by_its_name(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    for call in range(3):
        with failing(call, fill), pytest.raises(OSError, match="disk is full.*intact") as caught:
            write_file(tmp_path / "file", b"new")
        assert caught.value.errno == 28
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


class Histories(RuleBasedStateMachine):
    """Any sequence of changes, kills of one, reopenings and repairs leaves what a dictionary would hold."""

    names = st.sampled_from([f"t{i}" for i in range(5)])

    @initialize(dtype=st.sampled_from(["float32", "float16"]))
    def begin(self, dtype):
        self.root = tempfile.TemporaryDirectory()
        self.folder = Path(self.root.name) / "store"
        self.store = build(self.folder, dtype=dtype)
        self.expected = {}
        self.others = 0

    @rule(names=st.sets(names, min_size=1), seed=st.integers(0, 3), cut=st.none() | st.integers(0, 40))
    def append(self, names, seed, cut):
        texts = [make_text(name, seed) for name in sorted(names)]
        after = {**self.expected, **{text.text_id: (text.memories.tolist(), text.text) for text in texts}}
        self.change(lambda: self.store.append_memories(texts, on_duplicate="replace"), after, cut)

    @rule(names=st.sets(names), cut=st.none() | st.integers(0, 40))
    def delete(self, names, cut):
        names = names & set(self.expected)
        after = {name: content for name, content in self.expected.items() if name not in names}
        self.change(lambda: self.store.delete(names), after, cut)

    @rule(names=st.sets(names, min_size=1), seed=st.integers(0, 3), cut=st.none() | st.integers(0, 40))
    def merge(self, names, seed, cut):
        self.others += 1
        other = build(self.folder.parent / f"other{self.others}")
        other.append_memories([make_text(name, seed) for name in sorted(names)])
        kept = {name: content for name, content in state_of(other).items() if name not in self.expected}
        self.change(lambda: self.store.merge(other, on_duplicate="skip"), {**self.expected, **kept}, cut)

    @rule(cut=st.none() | st.integers(0, 40))
    def vacuum(self, cut):
        self.change(self.store.vacuum, self.expected, cut)

    def change(self, make, after, cut):
        """Make a change; with `cut`, on a disk that is full from that call on."""
        if cut is None:
            make()
            self.expected = after
            return
        try:
            with failing(cut, fill):
                make()
            self.expected = after
        except OSError:
            pass

    @rule()
    def reopen(self):
        self.store = MemoryStore(self.folder)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def damage(self, data):
        """One byte of one file changes; it is found; the byte is put back."""
        files = sorted(path for path in self.folder.iterdir() if path.suffix in (".json", ".safetensors"))
        named = {entry["file"] for entry in self.store._index["shards"]}
        path = data.draw(st.sampled_from([path for path in files if path.suffix == ".json" or path.name in named]))
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        whole = path.read_bytes()
        path.write_bytes(content)
        try:  # an index whose second copy did not fit on the disk is refused when it is opened
            store = MemoryStore(self.folder)
            assert any(path.name in problem for problem in store.verify())
            assert state_of(store) == self.expected and path.suffix == ".json"
        except MemoryStoreError as error:
            assert path.name in str(error)
        path.write_bytes(whole)

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
