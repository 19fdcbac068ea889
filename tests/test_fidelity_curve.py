"""Runs of several chunk lengths become one record, one table and one figure."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks.drawings import draw_fidelity_curve
from benchmarks.fidelity_curve import main
from benchmarks.quality_tables import fidelity_curve

RUN = {
    "run": {"recipe_name": "fidelity_curve", "created_at": "2026-11-21T00:00:00+00:00", "status": "success"},
    "code": {"commit": "0" * 40, "dirty": False, "versions": {}},
    "hardware": {"cpu": "a CPU", "device": "cpu", "threads": 2, "processes": 1},
    "inputs": {"files": {}},
    "recipe": {"stages": [{"name": "autoencoder", "model": {"chunk_length": 8, "encoder": {"hidden_size": 256}}}]},
    "stages": {"autoencoder": {"parameters": {"total": 7}, "text_tokens": 4096, "seconds": 90.0}},
}


def condition(accuracy: float) -> dict:
    interval = [accuracy - 0.01, accuracy + 0.01]
    return {
        "token_accuracy": accuracy,
        "token_accuracy_interval": interval,
        "loss": 1 - accuracy,
        "num_rows": 4,
        "num_tokens": 256,
        "num_correct": 3,
    }


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    for length, accuracy in ((16, 0.75), (4, 0.9)):  # out of order, as names sort
        record = copy.deepcopy(RUN)
        record["recipe"]["stages"][0]["model"]["chunk_length"] = length
        names = {"memory": accuracy, "wrong_memory": 0.02, "no_memory": 0.01}
        record["metrics"] = {"autoencoder": {name: condition(value) for name, value in names.items()}}
        folder = tmp_path / "grid" / f"chunk_length={length}"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(record))
    return tmp_path / "grid"


def test_runs_are_gathered_and_shown_in_order(grid: Path, tmp_path: Path):
    out = tmp_path / "curve.json"
    assert main([str(grid), "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert "num_correct" not in json.dumps(record) and str(tmp_path) not in json.dumps(record)
    rows = fidelity_curve(record).rows
    assert rows[1] == ["4", "64", "90.00% (89.00 to 91.00)", "0.1000", "2.0%", "1.0%", "256", "1.5"]
    assert rows[2][:2] == ["16", "16"]
    assert draw_fidelity_curve(record, tmp_path) == ["accuracy.png"]
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


def test_runs_of_different_code_are_not_compared(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = next(grid.glob("*/record.json"))
    record = json.loads(file.read_text())
    record["code"]["commit"] = "1" * 40
    file.write_text(json.dumps(record))
    assert main([str(grid), "--out", str(tmp_path / "curve.json")]) == 2
    assert "differ in code" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "curve.json")]) == 2
    assert "no finished run" in capsys.readouterr().err
