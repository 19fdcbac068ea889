"""`remember --engine ray` stores what `remember` stores, and goes on where it was cut off. Needs Ray: `-m ray`."""

import sys
import types

import pyarrow.parquet
import pytest
import torch

from modeling_memory import MemoryProcessor, MemoryStore
from tests.conftest import build_tiny_tokenizer
from tests.memory_models import CHUNK, WINDOW, build_model
from training import remember, remember_ray

TEXTS = {f"{place}.txt": f"the cat sat on the mat {place} times, over the hills and the sea." for place in range(7)}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    build_model().save_pretrained(tmp_path / "model")
    MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK, window_length=WINDOW).save_pretrained(
        tmp_path / "model"
    )
    monkeypatch.chdir(tmp_path)
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    return "model"


def test_a_batch_becomes_a_file_that_a_store_takes_over(saved, tmp_path):
    """What an actor does, without Ray."""
    (tmp_path / "parts").mkdir()
    options = {"store": {"dtype": "int8", "keep_text": True}, "append": {"on_loss": "warn"}}
    encode = remember_ray.Encode(saved, "parts", options, 1)
    done = encode({"text_id": list(TEXTS), "text": list(TEXTS.values())})
    assert done["texts"] == [7] and [file.suffix for file in (tmp_path / "parts").iterdir()] == [".parquet"]
    model = remember.load_memory_model(saved)
    plain, merged = (
        MemoryStore.open(n, *model, create=True, dtype="int8", keep_text=True) for n in ("plain", "merged")
    )
    plain.append(TEXTS, on_loss="warn")
    assert remember_ray.digests(tmp_path / "parts") == {one: plain.digest(one) for one in TEXTS}
    merged.merge(pyarrow.parquet.read_table(next((tmp_path / "parts").iterdir())))
    assert merged.chunks() == plain.chunks() and done["chunks"] == [plain.num_chunks]
    assert torch.equal(merged.memories(merged.chunks()), plain.memories(plain.chunks()))


def test_without_ray_the_extra_is_named(saved, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert remember.main([saved, "0.txt", "--to", "store", "--engine", "ray"]) == 2
    assert "needs Ray: pip install 'modeling-memory[ray]'" in capsys.readouterr().err


def test_ray_that_does_not_start_is_started_again_and_then_explained():
    """It waits 30 seconds for its processes, which is too short where others take all processors."""
    tries: list[dict] = []

    def init(**settings):
        tries.append(settings)
        if len(tries) != 2:
            raise Exception("The current node timed out during startup.")

    ray = types.SimpleNamespace(init=init, shutdown=lambda: None)
    remember_ray.start(ray, 2)
    assert len(tries) == 2 and tries[0]["num_cpus"] == 2
    tries[1:] = [{}, {}]
    with pytest.raises(ValueError, match="did not start in 3 tries: The current node timed out.*same command again"):
        remember_ray.start(ray, 2)


class Rows(list):
    """What is used of a dataset of Ray, in this process."""

    def map_batches(self, actor, *, fn_constructor_args, batch_size, concurrency, num_cpus):
        assert concurrency == 2 and num_cpus == 1
        work, found = actor(*fn_constructor_args), Rows()
        for start in range(0, len(self), batch_size):
            some = self[start : start + batch_size]
            done = work({name: [row[name] for row in some] for name in ("text_id", "text")})
            found += [{name: values[0] for name, values in done.items()}]
        return found

    def iter_rows(self):
        return iter(self)


def stand_in(monkeypatch):
    """Put a Ray that works in this process in the place of the real one."""
    context = types.SimpleNamespace(get_current=lambda: types.SimpleNamespace())
    data = types.SimpleNamespace(DataContext=context, from_items=lambda rows, override_num_blocks: Rows(rows))
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(data=data, is_initialized=lambda: True))


@pytest.fixture(params=["stand-in", pytest.param("ray", marks=pytest.mark.ray)])
def engine(request, monkeypatch):
    if request.param == "stand-in":
        stand_in(monkeypatch)


def test_workers_store_what_one_process_stores_and_go_on(saved, engine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(remember_ray, "TEXTS", 2)
    command = [saved, *TEXTS, "--to", "store", "--keep-text", "--engine", "ray", "--workers", "2"]
    assert remember.main([*command, "--parquet", "kept"]) == 0
    files = sorted((tmp_path / "kept").glob("*.parquet"))
    assert len(files) == 4 and len(MemoryStore("store")) == 0
    (tmp_path / "store.parts").mkdir()
    done = {one: None for file in files[:3] for one in pyarrow.parquet.read_table(file)["text_id"].to_pylist()}
    for file in files[:3]:  # a run that was cut off after three files
        file.rename(tmp_path / "store.parts" / file.name)
    (tmp_path / "store.parts" / ".half.1.part").write_bytes(b"half")
    capsys.readouterr()
    assert remember.main(command) == 0
    assert not (tmp_path / "store.parts").exists()
    told = f"{7 - len(done)} texts remembered (0 of them anew), {len(done)} were there"
    assert told in capsys.readouterr().out
    assert remember.main([saved, *TEXTS, "--to", "plain", "--keep-text"]) == 0
    ray, plain = MemoryStore("store"), MemoryStore("plain")
    for text_id, text in TEXTS.items():
        assert ray.text(text_id) == text and ray.chunks(text_id) == plain.chunks(text_id)
        torch.testing.assert_close(ray.memories(ray.chunks(text_id)), plain.memories(plain.chunks(text_id)))
    assert ray.verify() == []
    (tmp_path / "0.txt").write_text("the dog sat.")
    assert remember.main(command) == 0
    assert "1 texts remembered (1 of them anew), 6 were there" in capsys.readouterr().out
    assert MemoryStore("store").text("0.txt") == "the dog sat."
