"""The store's benchmark on a few texts: a whole record."""

from benchmarks import store
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
