"""The store's benchmarks on a few texts: whole records."""

import gzip
import json

import pytest

from benchmarks import any_text, other_texts, retrieval, store, store_tables, workers
from tests.test_remember_ray import stand_in
from training import remember_ray
from training.data.texts import load_texts
from training.records.record import read_json


def test_the_record_is_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(store, "ALONE", 3)
    monkeypatch.setattr(store, "BATCH", 5)
    assert store.main(["--texts", "20", "--width", "32", "--out", str(tmp_path / "store.json")]) == 0
    metrics = read_json(tmp_path / "store.json")["metrics"]
    assert metrics["chunks"] == 160 and all(value >= 0 for value in metrics["milliseconds"].values())
    assert {"open", "fetch a chunk", "exact search", "verify", "delete half"} <= set(metrics["milliseconds"])
    assert metrics["bytes_per_chunk"]["float16"] == 64 and metrics["bytes_per_chunk"]["int8"] == 36
    assert "ms  open" in capsys.readouterr().out
    record = read_json(tmp_path / "store.json")
    metrics["milliseconds"] |= {"open": 1.234, "verify": 4321.6}
    del record["metrics"]["milliseconds"]["delete half"]  # as of a store that stays
    table = store_tables.store({"metrics": metrics}, record)
    assert table.rows[0][1] == "160 chunks of 32 numbers" and table.cell("open", 1) == "1.23 ms"
    assert table.cell("verify", 1) == "4,322 ms" and table.cell("delete half", 2) == "-"


def test_passages_are_found_by_every_way_and_intervals_are_over_passages(tmp_path, capsys):
    rows = [
        {"context": "The sign was newly painted, and the windows had red curtains.", "question": "Which curtains?"},
        {"context": "He asked for a room with a view of the sea.", "question": "What did he ask for?"},
        {"context": "He asked for a room with a view of the sea.", "question": "A view of what, the sea?"},
    ]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps({**row, "answers": []}) + "\n" for row in rows))
    out = tmp_path / "retrieval.json"
    assert retrieval.main(["model_cards/starter-tiny", str(file), "--out", str(out)]) == 0
    metrics = read_json(out)["metrics"]
    assert (metrics["passages"], metrics["questions"]) == (2, 3) and set(metrics["ways"]) == {"BM25", "memories"}
    assert metrics["ways"]["BM25"]["top_1"] == 1.0 and "BM25" in capsys.readouterr().out
    table = store_tables.retrieval(read_json(out))
    assert table.cell("BM25", "right one first") == "100.0% (100.0 to 100.0)"


def test_texts_of_any_length_are_measured_and_a_run_goes_on(tmp_path, capsys, monkeypatch):
    file = tmp_path / "two.jsonl"
    text = "The sign was newly painted, and the windows had red curtains. He asked for a room with a view. " * 3
    file.write_text("".join(json.dumps({"text": f"Title\n{i} {text}"}) + "\n" for i in range(2)))
    out, cells = tmp_path / "any.json", tmp_path / "cells.json"
    command = ["model_cards/starter-tiny", "model_cards/starter-autoencoder-64", "--text", f"prose={file}"]
    command += ["--documents", "2", "--lengths", "6", "40", "--out", str(out), "--cells", str(cells)]
    monkeypatch.setattr(any_text, "measure_formats", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        any_text.main(command)
    measured = len(read_json(cells)["cells"])
    monkeypatch.undo()
    monkeypatch.setattr(any_text, "measure_memory", lambda *_: pytest.fail("measured twice"))
    assert measured == 12 and any_text.main(command) == 0
    record = read_json(out)
    cell = record["metrics"]["starter-tiny"]["kinds"]["prose"]["40"]
    assert cell["quoted, keep_text"]["share"] == cell["quoted, split"]["share"] == 1.0
    assert cell["copied, free-running"]["documents"] == 2 and cell["chunks, split"] >= 1.0
    formats = record["metrics"]["starter-tiny"]["formats"]
    assert formats["float32"]["bytes_a_token"] >= 64 >= 4 * formats["int8"]["bytes_a_token"] - 4 * 4
    for table in (store_tables.any_text, store_tables.short_chunks, store_tables.formats):
        assert len(table(record).rows) > 3


def test_texts_of_other_kinds_are_gathered(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for name, row in (("haystack_essays", {"text": "a" * 4000}), ("qmsum_test", {"turns": ["b" * 2000, "c" * 2000]})):
        with gzip.open(tmp_path / "data" / f"{name}.jsonl.gz", "wt") as file:
            file.write(json.dumps(row) + "\n" + json.dumps({"text": "short", "turns": ["short"]}) + "\n")
    assert other_texts.main([str(tmp_path / "data"), "--to", str(tmp_path / "texts")]) == 0
    assert "code: 60 documents" in capsys.readouterr().out
    kinds = {file.stem: load_texts([file]) for file in (tmp_path / "texts").iterdir() if file.stat().st_size}
    assert kinds["essays"] == ["a" * 4000] and kinds["meetings"] == ["b" * 2000 + "\n" + "c" * 2000]
    assert all("\nName: " in text for text in kinds["lists"])
    assert all(4000 <= len(text) <= 20_000 for documents in kinds.values() for text in documents)


def test_workers_are_timed_and_what_they_store_is_whole(tmp_path, monkeypatch, capsys):
    """With a stand-in of Ray, which `tests/test_remember_ray.py` runs itself."""
    file = tmp_path / "two.jsonl"
    file.write_text("".join(json.dumps({"text": f"{place} The sign was newly painted."}) + "\n" for place in range(2)))
    monkeypatch.setattr(remember_ray, "Encode", remember_ray.Encode)  # is put back
    stand_in(monkeypatch)
    out = tmp_path / "workers.json"
    assert workers.main(["model_cards/starter-tiny", str(file), "--workers", "2", "--out", str(out)]) == 0
    assert "2 workers:" in capsys.readouterr().out
    record = read_json(out)
    found = record["metrics"]["2"]
    assert found["texts"] == 2 and found["processes"] == 1 and found["tokens_a_processor_second"] > 0
    assert store_tables.workers(record).cell("2", "tokens a second") == f"{found['tokens_a_second']:,.0f}"
