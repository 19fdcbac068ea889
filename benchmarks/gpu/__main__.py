"""What one GPU makes of this package: parts a to e, most valuable first, each with its own time and record.

```bash
python -m benchmarks.gpu --to runs/gpu_toy --toy --parts a,b      # does it run? on any machine
python -m benchmarks.gpu --to runs/gpu --payload runs/gpu_bundle/call1 --ship OUT
```

A part that is done is not measured again, so the same command goes on where it was stopped; a part whose text or
weights have not come yet waits. `python -m benchmarks.gpu.bundle` makes what comes and prints the commands.
"""

import argparse
import functools
import importlib
import shutil
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.gpu.bundle import packed, receive
from benchmarks.gpu.job import Job, OutOfTimeError, alarm, free_memory
from benchmarks.gpu.parts import PARTS
from benchmarks.measure import describe_run
from training.command_line import Parser, positive_number, run_command
from training.records.record import describe_hardware, peak_memory_bytes, read_json, write_json

# What comes back from one call: 8 files of 16 MiB, 64 MiB in all; a little less, for logs beside them.
SHARD_BYTES, SHIP_BYTES, SHIP_FILES = 15 * 2**20, 62 * 2**20, 8
WEIGHTS = ("pair", "autoencoder")  # the smaller first


def run_part(name: str, options: argparse.Namespace, command: str, job_of: Callable[[float, Path, Any], Job]) -> str:
    """Run one part and write its record; returns how it ended: success, failed, out of time, waiting or done."""
    part, path, payload = PARTS[name], options.to / f"gpu_{name}.json", options.to / "payload"
    seconds = options.limit.get(name, part.seconds)
    record = describe_run("gpu", command, {"weights": 0})
    job = job_of(seconds, path, record)
    before = read_json(path)
    if before is not None and before["run"]["status"] == "success" and before["toy"] == job.toy:
        return "done"
    if part.missing(payload):
        print(f"  waits for {', '.join(part.missing(payload))}", flush=True)
        return "waiting"
    record |= {"part": name, "asks": part.asks, "limit_seconds": seconds, "metrics": {}, "failures": []}
    record["run"]["status"] = "unfinished"
    if job.toy:  # a trial asks whether all runs, on whatever machine: not how fast
        seconds = job.seconds = 20 * seconds
    record |= {"toy": job.toy, "hardware": describe_hardware(job.device)}
    if record["code"]["commit"] is None and (payload / "manifest.json").is_file():
        record["code"] |= {"commit": packed(payload)["code"]["commit"], "dirty": packed(payload)["code"]["dirty"]}
    job.note("device", str(job.device))
    status = "success"
    try:
        with alarm(seconds + 10):
            part.run(job)
    except OutOfTimeError:
        status = "out of time"
    except Exception as error:  # the other parts still have their minutes
        status = "failed"
        record["failures"].append(f"{type(error).__name__}: {str(error)[:600]}")
    record["run"]["status"] = "failed" if record["failures"] else status
    record["peak_memory_bytes"] = peak_memory_bytes()
    job.note("seconds", round(seconds - job.left(), 1))
    free_memory(job.device)
    return record["run"]["status"]


def pack_weights(folder: Path) -> None:
    """Cut each folder of weights into shards that may travel, `NAME.tar.00` and so on; `cat` joins them."""
    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    for name in WEIGHTS:
        weights = folder / "weights" / name
        if not weights.is_dir() or list(shards.glob(f"{name}.tar.*")):
            continue
        archive = shards / f"{name}.part"
        with tarfile.open(archive, "w") as written:
            written.add(weights, arcname=name)
        with archive.open("rb") as stream:
            for number, content in enumerate(iter(functools.partial(stream.read, SHARD_BYTES), b"")):
                (shards / f"{name}.tar.{number:02d}").write_bytes(content)
        archive.unlink()


def ship(folder: Path, out: Path) -> list[str]:
    """Put all records, and shards as far as there is room, where this call brings them back from.

    Returns:
        `list` of `str`: Shards that are left for a later call.
    """
    out.mkdir(parents=True, exist_ok=True)
    pack_weights(folder)
    with tarfile.open(out / "records.tar", "w") as archive:
        for record in sorted(folder.glob("gpu_*.json")):
            archive.add(record, arcname=record.name)
    left = []
    for shard in sorted(
        folder.glob("shards/*.tar.[0-9][0-9]"),
        key=lambda file: (WEIGHTS.index(file.name.partition(".")[0]), file.name),
    ):
        inside = [file.stat().st_size for file in out.iterdir() if file.is_file()]
        if len(inside) == SHIP_FILES or sum(inside) + shard.stat().st_size > SHIP_BYTES:
            left.append(shard.name)
            continue
        shutil.copyfile(shard, out / shard.name)
        shard.rename(shard.with_name(f"{shard.name}.sent"))
    return left


def run(options: argparse.Namespace, command: str) -> None:
    """Receive what came, run the parts and send back what there is.

    Raises:
        ValueError: If a part is none, or nothing of what was asked for could be measured.
    """
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        raise ValueError(f"--parts has {', '.join(unknown)}; expected some of {','.join(PARTS)}")
    options.to.mkdir(parents=True, exist_ok=True)
    payload, toy = options.to / "payload", options.toy
    if options.payload is not None:
        came = receive(options.payload, payload)
        toy = toy or came["toy"]
        print(f"received; not whole yet: {', '.join(came['missing']) or 'nothing'}", flush=True)
    sys.path.append(str(payload / "site"))  # what is installed goes first
    importlib.invalidate_caches()
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    if device.type == "cpu" and not toy:
        raise ValueError("there is no GPU here, and these sizes take one: add --toy to try whether all runs")
    torch.set_float32_matmul_precision("highest")

    def job_of(seconds: float, path: Path, record: Any) -> Job:
        return Job(device, toy, options.to, payload, seconds, path, record)

    ended: dict[str, str] = {}
    for name in options.parts:
        print(f"== {name}: {PARTS[name].asks}", flush=True)
        ended[name] = run_part(name, options, command, job_of)
        if options.ship is not None:
            ship(options.to, options.ship)
    if options.ship is not None:
        left = ship(options.to, options.ship)
        print(f"left for a later call: {', '.join(left) or 'nothing'}")
    write_json(options.to / "ended.json", ended)
    print("; ".join(f"{name} {how}" for name, how in ended.items()))
    bad = [name for name, how in ended.items() if how == "failed"]
    if bad:
        raise ValueError(f"{', '.join(bad)} failed: see `failures` in the record; the others are measured")


def limits(text: str) -> dict[str, float]:
    """Read time limits, `a=60,c=200`.

    >>> limits("a=60,c=2.5")
    {'a': 60.0, 'c': 2.5}
    """
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    return {name: positive_number(value) for name, _, value in pairs}


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    asked = "; ".join(f"{name}: {part.asks} ({part.seconds} s)" for name, part in PARTS.items())
    parser = Parser(prog="python -m benchmarks.gpu", description="Measure on one GPU.", epilog=asked)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where records and weights are kept")
    parser.add_argument("--payload", type=Path, metavar="FOLDER", help="what came with this call")
    parser.add_argument("--ship", type=Path, metavar="FOLDER", help="from where this call brings files back")
    parser.add_argument(
        "--parts", type=lambda text: [part for part in text.split(",") if part], default=list(PARTS), metavar="a,b,..."
    )
    parser.add_argument("--limit", type=limits, default={}, metavar="a=SECONDS,...", help="other time limits")
    parser.add_argument("--toy", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
