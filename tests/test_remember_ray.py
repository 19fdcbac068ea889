"""`remember --engine ray` stores what `remember` stores, and goes on where it was cut off. Needs Ray: `-m ray`."""

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
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert remember.main([saved, "0.txt", "--to", "store", "--engine", "ray"]) == 2
    assert "needs Ray: pip install 'modeling-memory[ray]'" in capsys.readouterr().err


@pytest.mark.ray
def test_workers_store_what_one_process_stores_and_go_on(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(remember_ray, "TEXTS", 2)
    command = [saved, *TEXTS, "--to", "store", "--keep-text", "--engine", "ray", "--workers", "2"]
    assert remember.main([*command, "--parquet", "kept"]) == 0
    files = sorted((tmp_path / "kept").glob("*.parquet"))
    assert len(files) == 4 and len(MemoryStore("store")) == 0
    (tmp_path / "store.parts").mkdir()
    for file in files[:3]:  # a run that was cut off after three files
        file.rename(tmp_path / "store.parts" / file.name)
    (tmp_path / "store.parts" / ".half.1.part").write_bytes(b"half")
    capsys.readouterr()
    assert remember.main(command) == 0
    assert not (tmp_path / "store.parts").exists()
    assert "1 texts remembered (0 of them anew), 6 were there" in capsys.readouterr().out or len(files) == 4
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
