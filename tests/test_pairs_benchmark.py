"""Records of pairs are gathered whole or not at all, and shown."""

import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure import gather_runs
from benchmarks.pairs import main, show
from benchmarks.quality_tables import decoder_sizes, pairs
from training.records.record import read_json, write_json


def condition(loss: float, gain: float | None = None) -> dict[str, Any]:
    found = {"loss": loss, "loss_interval": [loss - 0.1, loss + 0.1], "token_accuracy": 0.25, "num_rows": 4,
             "token_accuracy_interval": [0.2, 0.3], "num_tokens": 90, "num_correct": 22}  # fmt: skip
    return (
        found if gain is None else {**found, "gain_of_memory": gain, "gain_of_memory_interval": [gain - 1, gain + 1]}
    )


@pytest.fixture
def records(tmp_path: Path) -> Path:
    for name, adapters in (("a", {}), ("b", {"r": 8})):
        suite = {"memory": condition(3.0), "wrong_memory": condition(3.5, 0.5), "no_memory": condition(3.25, 0.25),
                 "plain_full_context": condition(2.5, -0.5)}  # fmt: skip
        if adapters:
            suite["plain_no_memory"] = condition(3.75, 0.75)
        record = {
            "run": {"recipe_name": "x", "command": "c", "created_at": "2026-11-21T00:00:00", "status": "success"},
            "code": {"commit": "abc", "dirty": False, "versions": {}}, "inputs": {"files": {}}, "published_stage": "m",
            "hardware": {"device": "cpu", "cpu": "x", "threads": 1, "processes": 1},
            "recipe": {"stages": [{"name": "m", "adapters": adapters}]},
            "stages": {"m": {"parameters_by_part": {}, "steps": 5, "rows": 40, "seconds": 1.0,
                             "series": [{"projector_norm": 1.5}, {"loss": 2.0}, {"projector_norm": 2.5}]}},
            "metrics": {"clm, 1 memories a chunk": suite, "copy, 4 memories a chunk": copy.deepcopy(suite)},
        }  # fmt: skip
        write_json(tmp_path / "grid" / name / "record.json", record)
    return tmp_path / "grid"


def test_the_table_has_a_row_for_each_run_task_and_budget(records: Path, tmp_path: Path):
    record = gather_runs([records], "python -m benchmarks.pairs", show)
    assert record["metrics"]["runs"]["a"]["projector_norm"] == {"first": 1.5, "last": 2.5}
    _, first, *_, last = pairs(record).rows
    losses = [f"{loss}, 25.0%" for loss in ("3.000", "3.500", "3.250", "3.250", "2.500")]
    assert len(pairs(record).rows) == 5
    assert first == ["projector", "continue", "1", *losses, "+0.500 (-0.500 to +1.500)"]
    assert last[:3] == ["projector and LoRA", "copy", "4"] and last[6] == "3.750, 25.0%"
    assert "5 steps of 8 rows each; 4 rows" in pairs(record).note
    assert main([str(records), "--out", str(tmp_path / "out.json")]) == 0 and (tmp_path / "out.json").is_file()


def test_decoders_of_several_sizes_stand_in_the_order_of_their_sizes(records: Path):
    for name, model, size in (("a", {"hidden_size": 64}, 2000), ("b", {}, 1000)):
        file = records / name / "record.json"
        record = read_json(file)
        decoder = {"name": "d", "kind": "causal_lm", "model": model, "training": {"max_steps": 7}}
        record["recipe"]["stages"].insert(0, decoder)
        record["stages"]["m"]["parameters_by_part"] = {"decoder": {"total": size}}
        write_json(file, record)
    made = decoder_sizes(gather_runs([records], "python -m benchmarks.pairs", show))
    assert made.rows[1][:5] == ["stories260K, pretrained", "1,000", "linear", "3.000, 25.0%", "3.500, 25.0%"]
    assert made.rows[2][:2] == ["fresh, width 64", "2,000"] and made.rows[2][-1] == "+0.500 (-0.500 to +1.500)"
    assert "7 steps of next-token training, then 5 steps of 8 rows" in made.note


def test_runs_of_two_commits_are_not_mixed(records: Path, capsys: pytest.CaptureFixture[str]):
    file = records / "b" / "record.json"
    file.write_text(file.read_text().replace('"abc"', '"abd"'))
    assert main([str(records)]) == 2
    assert "differ in code" in capsys.readouterr().err
    assert main([str(records / "nothing")]) == 2
    assert "no finished run" in capsys.readouterr().err
