"""Records of pairs are gathered whole or not at all, and shown."""

import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure import gather_runs
from benchmarks.pairs import decoder_sizes_lines, main, pairs_lines, show
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
    lines = pairs_lines(record, "x.json")
    assert len([line for line in lines if line.startswith("| projector")]) == 4
    first, *_, last = (line for line in lines if line.startswith("| projector"))
    assert "| go on | 1 | [3.000, 25.0%](x.json) | 3.500, 25.0% | 3.250, 25.0% | 3.250, 25.0% | 2.500" in first
    assert last.startswith("| projector and LoRA | write it again | 4 |") and "3.750, 25.0% | 2.500" in last
    assert "+0.500 (-0.500 to +1.500)" in last and "5 steps of 8 rows each; 4 rows" in lines[-1]
    assert main([str(records), "--out", str(tmp_path / "out.json")]) == 0 and (tmp_path / "out.json").is_file()


def test_decoders_of_several_sizes_stand_in_the_order_of_their_sizes(records: Path):
    for name, model, size in (("a", {"hidden_size": 64}, 2000), ("b", {}, 1000)):
        file = records / name / "record.json"
        record = read_json(file)
        decoder = {"name": "d", "kind": "causal_lm", "model": model, "training": {"max_steps": 7}}
        record["recipe"]["stages"].insert(0, decoder)
        record["stages"]["m"]["parameters_by_part"] = {"decoder": {"total": size}}
        write_json(file, record)
    lines = decoder_sizes_lines(gather_runs([records], "python -m benchmarks.pairs", show), "x.json")
    assert lines[2].startswith("| stories260K, pretrained | 1,000 | linear | [3.000, 25.0%](x.json) | 3.500, 25.0% |")
    assert lines[3].startswith("| fresh, width 64 | 2,000 |") and "+0.500 (-0.500 to +1.500)" in lines[3]
    assert "7 steps of next-token training, then 5 steps of 8 rows" in lines[-1]


def test_runs_of_two_commits_are_not_mixed(records: Path, capsys: pytest.CaptureFixture[str]):
    file = records / "b" / "record.json"
    file.write_text(file.read_text().replace('"abc"', '"abd"'))
    assert main([str(records)]) == 2
    assert "differ in code" in capsys.readouterr().err
    assert main([str(records / "nothing")]) == 2
    assert "no finished run" in capsys.readouterr().err
