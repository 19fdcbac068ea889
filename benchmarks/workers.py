"""Tokens a second of `remember --engine ray` on local workers.

```bash
pip install -c constraints.txt -e ".[ray]"
python -m benchmarks.workers model_cards/starter-tiny books_test.parquet --workers 1 2
```

Every worker has one processor thread. The time of the encoding is from the first batch's begin to the last one's end,
without the start of Ray and of its workers, which is in the time of the whole command. Where a worker shares its
processor with other work, processor time says what a free one would do: it is of the workers, loading left out.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import benchmark_parser, describe_run, load_average, run_benchmark
from modeling_memory import MemoryStore
from training import remember_ray
from training.data.texts import file_checksums
from training.remember import load_memory_model, named_texts


class Timed(remember_ray.Encode):
    """Encodes, and writes down when."""

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list]:
        """As of an actor, with a file of times beside the memories'."""
        began, processor = time.time(), time.process_time()
        done = super().__call__(batch)
        times = {"began": began, "ended": time.time(), "processor": time.process_time() - processor}
        (self.folder / f"{os.getpid()}-{began}.json").write_text(json.dumps(times))
        return done


def measure_workers(model: str, files: list[Path], workers: int, folder: Path) -> dict[str, Any]:
    """Remember files with so many workers, merge what they wrote, and say what it took."""
    parts, before = folder / "parts", load_average()
    with MemoryStore.open(folder / "store", *load_memory_model(model), create=True, keep_text=True) as store:
        options: dict[str, Any] = {"workers": workers, "append": {"on_loss": "warn"}}
        started = time.perf_counter()
        remember_ray.remember_by_ray(store, model, named_texts(files), parts, keep_files=True, **options)
        files_of_times = sorted(parts.glob("*.json"))
        times = [json.loads(file.read_text()) for file in files_of_times]
        pids = {file.name.partition("-")[0] for file in files_of_times}
        encoded = time.perf_counter()
        counts = remember_ray.remember_by_ray(store, model, named_texts(files), parts, **options)
        ended = time.perf_counter()
        if store.verify() or counts["stored"]:
            raise ValueError(f"what {workers} workers stored is not whole, or was encoded twice")
        encoding = max(one["ended"] for one in times) - min(one["began"] for one in times)
        return {
            "texts": len(store),
            "chunks": store.num_chunks,
            "tokens": store.num_tokens,
            "processes": len(pids),
            "seconds": {"start and encode": encoded - started, "encode": encoding, "merge": ended - encoded},
            "tokens_a_second": store.num_tokens / encoding,
            "tokens_a_processor_second": store.num_tokens / sum(one["processor"] for one in times),
            "load_average": [before, load_average()],
        }


def measure(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure what the options ask for; return the record."""
    remember_ray.Encode = Timed  # type: ignore[misc]
    record = {**describe_run("workers", command, {}), "inputs": {"files": file_checksums(options.texts)}}
    record["metrics"] = {}
    for workers in options.workers:
        with tempfile.TemporaryDirectory() as folder:
            found = measure_workers(options.model, options.texts, workers, Path(folder))
        record["metrics"][str(workers)] = found
        print(f"{workers} workers: {found['tokens_a_second']:,.0f} tokens a second", flush=True)
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = benchmark_parser("workers", "Measure how fast workers of Ray remember texts.", quick=False)
    parser.add_argument("model", help="folder of a memory model")
    parser.add_argument("texts", nargs="+", type=Path, help="files of texts")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="how many (1 and 2)")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
