"""A measurement of the claims is made once, read back as written, and made again when something else is asked."""

from pathlib import Path

import pytest

from benchmarks.claims.cells import KEYS, cell_path, measure_cell, read_cell, read_cells
from training.records.record import write_json


def test_a_cell_is_measured_once_and_again_when_asked_differently(tmp_path: Path) -> None:
    calls = []

    def measure() -> dict:
        calls.append(1)
        return {"metrics": {"memory": {"loss": float(len(calls))}}, "text_tokens": 64, "steps": 2}

    first = measure_cell(tmp_path, "oracle", {"widths": (64, 128), 1: "x"}, measure)
    assert tuple(first) == KEYS and first["metrics"]["memory"]["loss"] == 1.0
    assert measure_cell(tmp_path, "oracle", {"widths": [64, 128], "1": "x"}, measure) == first
    assert read_cell(tmp_path, "oracle", {"widths": (64,)}) is None
    again = measure_cell(tmp_path, "oracle", {"widths": (64,)}, measure)
    assert len(calls) == 2 and read_cells(tmp_path) == {"oracle": again}


def test_nothing_measured_is_no_error(tmp_path: Path) -> None:
    assert read_cells(tmp_path) == {} and read_cell(tmp_path, "oracle") is None


def test_a_failed_measurement_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"oracle: a measurement returns metrics"):
        measure_cell(tmp_path, "oracle", {}, lambda: {"loss": 1.0})
    assert read_cells(tmp_path) == {}


@pytest.mark.parametrize("change", [{"name": "other"}, {"metrics": None}])
def test_a_file_that_is_no_cell_is_named(tmp_path: Path, change: dict) -> None:
    cell = measure_cell(tmp_path, "oracle", {}, lambda: {"metrics": {}})
    broken = {key: value for key, value in {**cell, **change}.items() if value is not None}
    write_json(cell_path(tmp_path, "oracle"), broken)
    with pytest.raises(ValueError, match=r"oracle\.json.*measure again"):
        read_cell(tmp_path, "oracle")
