"""What the benchmarks share: interleaved timing, equality of what is compared, spread, and where a record goes."""

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from training.places import REPOSITORY, portable_path, portable_paths, portable_word
from training.records.record import FORMAT_VERSION, describe_code, describe_hardware, write_json

RESULTS = REPOSITORY / "benchmarks" / "results"


class UnequalPathsError(RuntimeError):
    """Two ways of computing the same give different results: their times say nothing about each other."""


def interleave(runs: Mapping[str, Callable[[], Any]], *, repetitions: int, warmup: int = 1) -> dict[str, list[float]]:
    """Time functions in turn, A B A B ..., so that whatever slows the machine down slows all of them.

    Args:
        runs (`Mapping[str, Callable]`): Name -> what to time.
        repetitions (`int`): Timed rounds.
        warmup (`int`): Rounds before them that are not timed.

    Returns:
        `dict[str, list[float]]`: Name -> seconds of each repetition.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and quartiles.

    >>> spread([4.0, 1.0, 3.0, 2.0, 5.0])
    {'median': 3.0, 'min': 1.0, 'max': 5.0, 'first_quartile': 2.0, 'third_quartile': 4.0}
    """
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "first_quartile": quartiles[0],
        "third_quartile": quartiles[2],
    }


def assert_equal(
    fast: Mapping[str, torch.Tensor], plain: Mapping[str, torch.Tensor], *, tolerance: float
) -> dict[str, float]:
    """Compare the results of two paths.

    Args:
        fast (`Mapping[str, torch.Tensor]`): Name -> result of the fast path.
        plain (`Mapping[str, torch.Tensor]`): Name -> result of the plain one.
        tolerance (`float`): Largest difference allowed, as a share of the result's largest absolute value (of 1e-3 if
            that is smaller); integers must be identical.

    Returns:
        `dict`: `tolerance` and `largest_difference`, the largest share that was found.

    Raises:
        UnequalPathsError: If something differs, naming what and by how much.
    """
    if fast.keys() != plain.keys():
        raise UnequalPathsError(f"the paths give {sorted(fast)} and {sorted(plain)}; they must give the same")
    largest = 0.0
    for name, one in fast.items():
        other = plain[name]
        if one.shape != other.shape:
            raise UnequalPathsError(f"{name} has the shapes {tuple(one.shape)} and {tuple(other.shape)}")
        if not one.is_floating_point():
            if not torch.equal(one, other):
                wrong = int((one != other).sum())
                raise UnequalPathsError(f"{name}: {wrong} of {one.numel()} numbers differ between the two paths")
            continue
        scale = max(other.abs().max().item(), 1e-3)
        difference = (one - other).abs().max().item() / scale
        if not difference <= tolerance:  # also when it is no number
            raise UnequalPathsError(f"{name} differs by {difference:.2e} of its size, more than {tolerance:.0e}")
        largest = max(largest, difference)
    return {"tolerance": tolerance, "largest_difference": largest}


def compare(
    fast: Callable[[], Mapping[str, torch.Tensor]],
    plain: Callable[[], Mapping[str, torch.Tensor]],
    *,
    tolerance: float,
    repetitions: int,
    warmup: int = 1,
) -> dict[str, Any]:
    """Check that two paths give the same, then time them in turn.

    Args:
        fast (`Callable`): Runs the fast path; returns its results by name.
        plain (`Callable`): Runs the plain path.
        tolerance (`float`): As in [`assert_equal`].
        repetitions (`int`): Timed rounds.
        warmup (`int`): Rounds before them, beside the one that is compared.

    Returns:
        `dict`: `equality`; `seconds` of every repetition and their `spread`, by path; `ratio`, the spread of plain
        over fast, one ratio a round.

    Raises:
        UnequalPathsError: If the results differ. Nothing is timed then.
    """
    equality = assert_equal(fast(), plain(), tolerance=tolerance)
    seconds = interleave({"fast": fast, "plain": plain}, repetitions=repetitions, warmup=warmup)
    ratios = [plain_one / fast_one for fast_one, plain_one in zip(seconds["fast"], seconds["plain"], strict=True)]
    return {
        "equality": equality,
        "seconds": seconds,
        "spread": {name: spread(values) for name, values in seconds.items()},
        "ratio": spread(ratios),
    }


def describe_run(benchmark: str, command: str, seeds: Mapping[str, int]) -> dict[str, Any]:
    """Begin a record: what was run, by which code, on which machine, from which seeds."""
    return {
        "format_version": FORMAT_VERSION,
        "run": {
            "benchmark": benchmark,
            "command": command,
            "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "status": "success",
        },
        "code": describe_code(),
        "hardware": describe_hardware(torch.device("cpu")),
        "seeds": dict(seeds),
    }


def save_record(record: dict[str, Any], name: str, out: str | None, *, publish: bool = True) -> Path:
    """Write a record and return where it went.

    Args:
        record (`dict`): From [`describe_run`], with what was measured.
        name (`str`): File name without ending.
        out (`str`, *optional*): The file asked for. Without it the record goes to `benchmarks/results/`, or to its
            `scratch/`, which git ignores, if files differ from the commit that the record names.
        publish (`bool`): False sends it to `scratch/` in any case.
    """
    if out is not None:
        path = Path(out)
    elif publish and not record["code"]["dirty"]:
        path = RESULTS / f"{name}.json"
    else:
        path = RESULTS / "scratch" / f"{name}.json"
        if publish:
            print("tracked files differ from the commit, so the record goes to scratch/; commit and measure again")
    write_json(path, portable_paths(record))
    return path


def scratch(name: str) -> Path:
    """Where a benchmark keeps what is no record yet."""
    return RESULTS / "scratch" / name


def benchmark_parser(name: str, description: str, *, quick: bool = True) -> argparse.ArgumentParser:
    """Begin the command line of a benchmark with the options that all have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--out", help=f"where the record goes (default: benchmarks/results/{name}.json)")
    if quick:
        parser.add_argument("--quick", action="store_true", help="toy sizes: does it run? The record goes to scratch/")
    return parser


def run_benchmark(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace, str], dict[str, Any] | None],
    arguments: Sequence[str] | None,
) -> int:
    """Run the command line of a benchmark and save what it measured.

    Args:
        parser (`argparse.ArgumentParser`): From [`benchmark_parser`]; whole numbers must be 1 or more, a seed aside.
        measure (`Callable`): From the options and the command, as the record shall name it, to the record; `None` if
            not everything is measured yet.
        arguments (`Sequence[str]`, *optional*): The words after the command; default: those of the process.

    Returns:
        `int`: The exit status: 0, 1 if there is nothing to report, 2 for a user's mistake, 3 if parts are missing.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    transformers.utils.logging.disable_progress_bar()
    try:
        for name, value in vars(options).items():
            if type(value) is int and value < 1 and name != "seed":
                raise ValueError(f"--{name.replace('_', '-')} is {value}, expected 1 or more")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        record = measure(options, f"{parser.prog} {shlex.join(map(portable_word, words))}".rstrip())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except UnequalPathsError as error:
        print(f"error: {error}; nothing is reported", file=sys.stderr)
        return 1
    if record is None:
        print("not all is measured yet: rerun the same command to resume")
        return 3
    reached = record["run"]["status"] == "success"
    publish = reached and not getattr(options, "quick", False)
    path = save_record(record, record["run"]["benchmark"], options.out, publish=publish)
    print(f"record: {portable_path(path)}")
    return 0 if reached else 1


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values of a cache of the library."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def load_average() -> float | None:
    """Other work on the machine, where the system says."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
