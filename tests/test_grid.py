"""A queue runs what is missing, each in its folder, goes on after failures and interruptions, ends with a table."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from training.recipes import grid
from training.recipes.grid import Job, cell_name, expand_grid, grid_jobs, grid_table, run_jobs, table_lines
from training.run import main

SCRIPT = """
import json, pathlib, sys, time
folder, value = pathlib.Path(sys.argv[1]), float(sys.argv[2])
with (folder / "starts.txt").open("a") as file:
    file.write(str(time.monotonic()) + " ")
if value < 0:
    sys.exit("this one cannot be")
time.sleep(value)
condition = {"token_accuracy": value, "loss": 1.0, "num_rows": 3}
(folder / "record.json").write_text(json.dumps({"metrics": {"copy": {"memory": condition}}}))
"""


def job(folder: Path, name: str, value: float) -> Job:
    own = folder / name
    command = (sys.executable, "-c", SCRIPT, str(own), str(value))
    return Job(name, command, own, own / "record.json", {"value": value}, {"value": value})


def starts(one: Job) -> int:
    file = one.folder / "starts.txt"
    return len(file.read_text().split()) if file.is_file() else 0


def test_failures_do_not_stop_others_finished_ones_are_skipped_and_the_table_has_all(tmp_path: Path, capsys: Any):
    jobs = [job(tmp_path, "a", 0.1), job(tmp_path, "b", -1.0), job(tmp_path, "c", 0.2)]
    assert run_jobs(jobs, processes=1) == {"a": "done", "b": "failed", "c": "done"}
    assert "this one cannot be" in capsys.readouterr().out
    status = run_jobs(jobs, processes=2)
    assert status == {"a": "skipped", "b": "failed", "c": "skipped"}
    assert [starts(one) for one in jobs] == [1, 2, 1]
    table = grid_table(jobs, status)
    assert table["rows"][0]["metrics"] == {"copy.memory.token_accuracy": 0.1, "copy.memory.loss": 1.0}
    lines = table_lines(table)
    assert lines[2] == "| a | 10.0% | 1.0000 |" and lines[3].startswith("| b (failed) |")
    # The same place, asked for something else: its record does not count.
    assert run_jobs([job(tmp_path, "a", 0.3)]) == {"a": "done"}


def test_no_more_run_at_a_time_than_asked(tmp_path: Path):
    jobs = [job(tmp_path, str(number), 0.5) for number in range(4)]
    began = time.perf_counter()
    run_jobs(jobs, processes=2)
    assert time.perf_counter() - began >= 1.0
    with pytest.raises(ValueError, match="expected 1 or more"):
        run_jobs(jobs, processes=0)


def test_an_interruption_stops_what_runs_and_the_next_call_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jobs = [job(tmp_path, "quick", 0.0), job(tmp_path, "slow", 60.0)]
    real, calls = grid.write_json, []

    def interrupt(path: Path, data: Any) -> None:
        real(path, data)
        calls.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "write_json", interrupt)
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, processes=2)
    assert time.perf_counter() - began < 30, "the slow one was stopped, not waited for"
    monkeypatch.setattr(grid, "write_json", real)
    jobs[1] = job(tmp_path, "slow", 0.0)
    assert run_jobs(jobs) == {"quick": "skipped", "slow": "done"}


def test_a_grid_becomes_checked_recipes_in_folders_of_their_own(tmp_path: Path):
    axes = ["seed=[0, 1]", "stages.autoencoder.model.expansion=[unroll, repeat]"]
    jobs = grid_jobs("debug_cpu", ["threads=2"], axes, tmp_path)
    assert [one.name for one in jobs] == [
        f"seed-{seed}_expansion-{expansion}" for seed in (0, 1) for expansion in ("unroll", "repeat")
    ]
    assert len({one.folder for one in jobs}) == 4
    assert jobs[3].asked["seed"] == 1 and jobs[3].asked["stages"][0]["model"]["expansion"] == "repeat"
    assert jobs[0].asked["threads"] == 2 and jobs[0].command[1:4] == ("-m", "training.run", "debug_cpu")
    with pytest.raises(ValueError, match="sed"):
        grid_jobs("debug_cpu", [], ["sed=[0]"], tmp_path)


@pytest.mark.parametrize("axis", ["seed", "seed=0", "seed=[]", "=[1]"])
def test_what_is_no_axis_is_refused(axis: str, capsys: Any, tmp_path: Path):
    assert main(["debug_cpu", "--grid", axis, "--to", str(tmp_path)]) == 2
    assert "expected key=[value, value]" in capsys.readouterr().err


def test_names_and_doubles():
    assert cell_name({"a.b": True, "c": [1, "x/y"]}) == "b-true_c-1-x-y"
    with pytest.raises(ValueError, match="given twice"):
        expand_grid(["seed=[0]", "seed=[1]"])
    with pytest.raises(ValueError, match="two combinations"):
        grid_jobs("debug_cpu", [], ["name=[a, a]"], Path("runs/x"))


def test_the_command_runs_the_queue_and_writes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """The real command line, with quick jobs in the place of trainings."""
    monkeypatch.setattr(grid, "grid_jobs", lambda *_: [job(tmp_path, "a", 0.1), job(tmp_path, "b", -1.0)])
    assert main(["debug_cpu", "--grid", "seed=[0, 1]", "--to", str(tmp_path), "--processes", "2"]) == 1
    assert [row["status"] for row in json.loads((tmp_path / "table.json").read_text())["rows"]] == ["done", "failed"]
    assert "| a | 10.0% | 1.0000 |" in capsys.readouterr().out
