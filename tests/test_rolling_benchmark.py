"""The benchmark of memories at use compares what it says, keeps finished cells, and its record can be rendered."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cost_tables, rolling
from benchmarks.drawings import draw_rolling
from benchmarks.measure import fit_exponent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rolling")
    assert run(folder) == 0
    return folder


def run(folder: Path, *options: str) -> int:
    return rolling.main(["--quick", "--cells", str(folder / "cells"), "--out", str(folder / "rolling.json"), *options])


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "rolling.json").read_text())


def test_the_record_holds_every_cell_and_how_it_came_about(folder: Path, record: dict[str, Any]):
    assert set(record["metrics"]) == set(rolling.QUICK_CELLS) and record["not_measured"] == []
    assert record["quick"] is True and record["code"]["versions"]["torch"]
    for cell in record["metrics"].values():
        assert {"commit", "dirty", "threads", "load_before", "peak_memory_bytes"} <= set(cell)
        for name, seconds in cell["seconds"].items():
            assert len(seconds) == len(cell["cpu_seconds"][name]) > 0 and min(seconds) > 0
    assert str(folder) not in json.dumps(record)


def test_ratios_are_of_medians_and_few_layers_are_counted_for_all(record: dict[str, Any]):
    whole, part = (record["metrics"][f"first_token/tiny/{n}"] for n in (128, 256))
    assert whole["full_is_scaled_by_layers"] is False and part["full_is_scaled_by_layers"] is True
    for cell in (whole, part):
        for name, ratio in cell["ratio"].items():
            assert ratio == pytest.approx(cell["median"]["full"] / cell["median"][name])
    one, none = part["seconds"]["full"][0], part["seconds"]["full_without_layers"][0]
    assert part["median"]["full"] == pytest.approx(none + 2 * (one - none))


def test_the_cache_has_a_column_for_each_memory_and_token(record: dict[str, Any]):
    cell = record["metrics"]["generation/tiny/128"]
    written = 64 + 1 + 2  # prompt, warm-up, steps
    assert cell["cache_columns"] == {"full": 128 + written, "memories": 8 + written, "bounded": 4 + written}
    for name, columns in cell["cache_columns"].items():
        assert cell["cache_bytes"][name] == columns * 2 * 2 * 8 * 4  # keys and values, layers, width, float32
        assert cell["cache_share"][name] == pytest.approx(columns / (128 + written))


def test_every_token_of_rolling_text_is_timed_once_and_folds_apart(record: dict[str, Any]):
    cell = record["metrics"]["folding/tiny/128"]
    counts = {name: len(seconds) for name, seconds in cell["seconds"].items()}
    assert cell["window_length"] == 64
    # The first token came with the memories; two windows of 64 follow it, and so two roll-overs.
    assert counts == {"memories_step": 126, "memories_fold": 2, "newest_step": 126, "newest_fold": 2}
    for name, seconds in cell["per_token"].items():
        steps, fold = cell["median"][f"{name}_step"], cell["median"][f"{name}_fold"]
        assert seconds == pytest.approx((63 * steps + fold) / 64)


def test_exponents_are_fitted_to_the_medians(record: dict[str, Any]):
    cell = record["metrics"]["reading/64"]
    assert cell["fit"] == pytest.approx(
        fit_exponent([64, 128, 256], [cell["median"][n] for n in ("64", "128", "256")])
    )


def test_finished_cells_are_not_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    measured = []

    def measure(cell: Any, *_: Any) -> dict[str, Any]:
        measured.append(cell)
        return {"seconds": {"full": [1.0]}, "cpu_seconds": {"full": [1.0]}}

    monkeypatch.setattr(rolling, "measure_cell", measure)
    before = json.loads((folder / "rolling.json").read_text())["metrics"]
    assert run(folder) == 0 and measured == []
    assert json.loads((folder / "rolling.json").read_text())["metrics"] == before
    monkeypatch.setitem(rolling.QUICK_CELLS, "generation/tiny/64", rolling.Generation("tiny", 64))
    other = folder.parent / f"{folder.name}_other"
    assert run(other, "--only", "generation/tiny/64") == 0
    assert measured == [rolling.Generation("tiny", 64)]
    assert "first_token/tiny/128" in json.loads((other / "rolling.json").read_text())["not_measured"]


def test_no_time_means_no_cell_and_unknown_cells_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tmp_path, "--only", "nothing") == 2
    assert "no cell is called nothing; known: first_token/tiny/128" in capsys.readouterr().err
    assert run(tmp_path, "--threads", "0") == 2


@torch.no_grad()
def test_memories_encoded_first_give_the_logits_of_stored_ones():
    model = rolling.build_model(rolling.QUICK_SHAPES["tiny"], 0)
    paths = rolling.first_token_paths(model, 128)
    assert torch.equal(paths["encode"](), paths["stored_16"]())
    assert all(path().shape == (1, 1, 64) for path in paths.values())
    whole = paths["full"]()
    assert not torch.equal(rolling.first_token_paths(model, 128, layers=1)["full"](), whole)
    assert torch.equal(paths["full"](), whole)  # all layers are back


def test_the_record_can_be_rendered(record: dict[str, Any], tmp_path: Path):
    cells = dict(record["metrics"])
    cells["reading/1024"] = cells.pop("reading/64")
    record = {**record, "metrics": cells, "not_measured": ["first_token/tiny/512"]}
    first, newest = cost_tables.rolling_first_token(record), cost_tables.rolling_folding(record)
    assert [row[:2] for row in first.rows[1:]] == [["a tiny shape", "128"], ["a tiny shape", "256"]]
    assert first.rows[2][2].endswith("\\*") and "not measured: 1 combination of" in first.note
    assert newest.rows[1][:3] == ["a tiny shape", "64", "128"]
    assert len(cost_tables.rolling_reading(record).rows) == 3 and len(cost_tables.rolling_generation(record).rows) == 2
    assert draw_rolling(record, tmp_path) == ["first_token.png"]
    assert (tmp_path / "first_token.png").stat().st_size > 3000


def test_full_sizes_are_those_asked_for():
    cells = rolling.cells()
    for shape, heads in {"small": (9, 3, 30), "large": (32, 8, 16)}.items():
        decoder = rolling.SHAPES[shape].decoder
        assert heads == tuple(
            decoder[name] for name in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers")
        )
        assert f"first_token/{shape}/16384" in cells
    assert [rolling.SHAPES[name].target_ratio for name in ("small", "large")] == [30, 20]
    assert rolling.PROMPT == 64 and rolling.TARGETS == {"exponent": 1.1, "cache_share": 1 / 14, "tokens": 16384}
    reading = cells["reading/1024"]
    assert (reading.chunk_length, reading.window_length) == (1024, 1024)
    assert (reading.lengths[0], reading.lengths[-1]) == (1024, 65536)
