"""A queue of runs: a recipe over a grid of values, or any commands that leave a record, one process a core.

```bash
python -m training.run debug_cpu --grid 'seed=[0, 1, 2]' --grid 'stages.autoencoder.model.expansion=[unroll, repeat]'
```

Each run is a process of its own in a folder of its own. What has its record is skipped; what was interrupted goes on
from its checkpoints; what fails does not stop the others. The table at the end is made from the records.
"""

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from training.recipes.recipe import load_recipe
from training.recipes.strict_yaml import parse_yaml
from training.records.record import data_digest, read_json, write_json

METRICS = ("token_accuracy", "loss", "exact_match")


@dataclass(frozen=True)
class Job:
    """One run of the queue.

    Attributes:
        name (`str`): Names it in the table.
        command (`tuple[str, ...]`): Program and arguments.
        folder (`Path`): Its own; the output goes to `log.txt` in it.
        record (`Path`): The file whose presence says that it is done.
        values (`dict`): What tells it from the others, for the table.
        asked (`dict`): What decides its results; a record that was made from something else does not count.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    record: Path
    values: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether its record is there, made from the same command."""
        return self.record.is_file() and read_json(self.folder / "job.json") == self.description

    @property
    def description(self) -> dict[str, Any]:
        """What is kept beside the record, to tell whether it is this job's."""
        return {"name": self.name, "asked": data_digest(self.asked)}


def expand_grid(axes: Sequence[str]) -> list[dict[str, Any]]:
    """Turn `key=[value, value]` into all combinations, the last axis fastest.

    Args:
        axes (`Sequence[str]`): Dotted key of a recipe, and a YAML list of values.

    Raises:
        ValueError: If an axis is no such thing, is empty, or two have one key.

    >>> expand_grid(["seed=[0, 1]", "expansion=[unroll]"])
    [{'seed': 0, 'expansion': 'unroll'}, {'seed': 1, 'expansion': 'unroll'}]
    """
    grid: dict[str, list[Any]] = {}
    for axis in axes:
        key, equals, text = axis.partition("=")
        values = parse_yaml(text, f"--grid {axis}") if equals else None
        if not isinstance(values, list) or not values or not key:
            raise ValueError(f"--grid {axis}: expected key=[value, value], e.g. 'seed=[0, 1, 2]'")
        if key in grid:
            raise ValueError(f"--grid {key} is given twice; put all its values into one list")
        grid[key] = values
    return [dict(zip(grid, combination, strict=True)) for combination in itertools.product(*grid.values())]


def cell_name(values: Mapping[str, Any]) -> str:
    """Name a combination by the last parts of its keys and its values, as a folder may be called.

    >>> cell_name({"stages.autoencoder.model.chunk_length": 8, "data.train": ["a/b.txt"]})
    'chunk_length-8_train-a-b.txt'
    """
    parts = []
    for key, value in values.items():
        parts.append(f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9.]+', '-', _one_line(value)).strip('-')}")
    return "_".join(parts)


def _one_line(value: Any) -> str:
    """Write a value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()


def grid_jobs(recipe: str, overrides: Sequence[str], axes: Sequence[str], folder: Path) -> list[Job]:
    """Make a job of each combination of a recipe's values.

    Every recipe is read and checked before the first job runs.

    Args:
        recipe (`str`): As for `python -m training.run`.
        overrides (`Sequence[str]`): `key=value` for all jobs.
        axes (`Sequence[str]`): See [`expand_grid`].
        folder (`Path`): Where each gets a folder.

    Raises:
        ValueError: If a combination is no valid recipe, or two would share a folder.
    """
    jobs: dict[str, Job] = {}
    for values in expand_grid(axes):
        name = cell_name(values)
        if name in jobs:
            raise ValueError(f"two combinations are called {name}; give values that differ in letters or digits")
        own = folder / name
        words = [f"{key}={_one_line(value)}" for key, value in values.items()]
        given = ["threads=1", *overrides, *words, f"output_dir={own}"]
        asked = load_recipe(recipe, given).to_mapping()
        command = (sys.executable, "-m", "training.run", recipe, *given)
        jobs[name] = Job(name, command, own, own / "record.json", values, asked)
    return list(jobs.values())


def run_jobs(jobs: Sequence[Job], *, processes: int | None = None) -> dict[str, str]:
    """Run jobs, some at a time.

    Args:
        jobs (`Sequence[Job]`): What to run, in this order.
        processes (`int`, *optional*): At a time. Default: one for each core that this process may use.

    Returns:
        `dict[str, str]`: Name -> `"done"`, `"skipped"` (it was done before) or `"failed"`.

    Raises:
        ValueError: If `processes` is not positive.
        KeyboardInterrupt: After all jobs that run were asked to stop; a second call resumes them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = cores if processes is None else processes
    if processes < 1:
        raise ValueError(f"processes is {processes}; expected 1 or more")
    status = {job.name: "skipped" for job in jobs if job.finished}
    waiting = [job for job in jobs if job.name not in status]
    print(f"{len(jobs)} runs, {len(status)} of them done before, {processes} at a time", flush=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    with ThreadPoolExecutor(processes) as pool:
        futures: dict[Future[int], tuple[Job, float]] = {}
        try:
            while waiting or futures:
                while waiting and len(futures) < processes:
                    job = waiting.pop(0)
                    running[job.name] = _start(job)
                    futures[pool.submit(running[job.name].wait)] = (job, time.perf_counter())
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    job, started = futures.pop(future)
                    del running[job.name]
                    good = future.result() == 0 and job.record.is_file()
                    status[job.name] = "done" if good else "failed"
                    if good:
                        write_json(job.folder / "job.json", job.description)
                    seconds = time.perf_counter() - started
                    print(
                        f"{job.name}: {status[job.name]} after {seconds:.0f} s{'' if good else _reason(job)}",
                        flush=True,
                    )
        except BaseException:
            for process in running.values():
                process.terminate()
            raise
    return {job.name: status[job.name] for job in jobs}


def _start(job: Job) -> "subprocess.Popen[bytes]":
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )


def _reason(job: Job) -> str:
    lines = (job.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f" ({lines[-1] if lines else 'no message'}; see {job.folder / 'log.txt'})"


def flatten_metrics(metrics: Mapping[str, Any], path: str = "") -> dict[str, float]:
    """Pick the figures of a record that are compared, under dotted names.

    >>> flatten_metrics({"copy": {"memory": {"token_accuracy": 0.9, "num_rows": 3}}})
    {'copy.memory.token_accuracy': 0.9}
    """
    found: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            found |= flatten_metrics(value, f"{path}{key}.")
        elif key in METRICS and isinstance(value, (int, float)):
            found[f"{path}{key}"] = value
    return found


def grid_table(jobs: Sequence[Job], status: Mapping[str, str]) -> dict[str, Any]:
    """Collect values, status and metrics of all jobs, in their order."""
    rows = []
    for job in jobs:
        record = read_json(job.record) if status[job.name] != "failed" else None
        metrics = {} if record is None else flatten_metrics(record["metrics"])
        rows.append({"name": job.name, "values": job.values, "status": status[job.name], "metrics": metrics})
    return {"rows": rows}


def table_lines(table: Mapping[str, Any]) -> list[str]:
    """Lay a table out in Markdown: a row for each run, a column for each figure of memories that any of them has."""
    names: list[str] = []
    for row in table["rows"]:
        names += [name for name in row["metrics"] if name not in names]
    own = [name for name in names if ".memory." in name]
    names = own or names
    heads = [name.replace(".memory", "").replace("_", " ") for name in names]
    lines = [f"| run | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for row in table["rows"]:
        cells = [
            "" if name not in row["metrics"]
            else f"{row['metrics'][name]:.4f}" if name.endswith("loss") else f"{row['metrics'][name]:.1%}"
            for name in names
        ]  # fmt: skip
        note = "" if row["status"] != "failed" else " (failed)"
        lines.append(f"| {row['name']}{note} | {' | '.join(cells)} |")
    return lines


def run_grid(
    recipe: str, overrides: Sequence[str], axes: Sequence[str], folder: Path, *, processes: int | None = None
) -> dict[str, Any]:
    """Run a recipe over a grid of values; writes `table.json` and prints the table.

    Args:
        recipe (`str`): As for `python -m training.run`.
        overrides (`Sequence[str]`): `key=value` for all runs.
        axes (`Sequence[str]`): See [`expand_grid`].
        folder (`Path`): Where runs and table go.
        processes (`int`, *optional*): Runs at a time.

    Returns:
        `dict`: The table.

    Raises:
        ValueError: If the grid or a recipe is wrong.
    """
    jobs = grid_jobs(recipe, overrides, axes, folder)
    table = grid_table(jobs, run_jobs(jobs, processes=processes))
    write_json(folder / "table.json", table)
    print("\n".join(table_lines(table)) + f"\ntable: {folder / 'table.json'}")
    return table
