"""The record of a run: every number together with what it takes to believe and repeat it."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..places import REPOSITORY, portable_paths

FORMAT_VERSION = 1
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "datasets", "numpy")
REQUIRED = {
    "run": ("recipe_name", "command", "created_at", "status"),
    "code": ("commit", "dirty", "versions"),
    "hardware": ("device", "cpu", "threads", "processes"),
    "inputs": ("files",),
    "recipe": (),
    "metrics": (),
}


def write_json(path: Path, data: Any) -> None:
    """Write JSON beside its place and rename it there, so that a reader never sees half a file."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as part:
        part.write(text)
    os.chmod(part.name, 0o644)
    os.replace(part.name, path)


def read_json(path: Path) -> Any:
    """Read JSON; `None` if the file is not there.

    Raises:
        ValueError: If the file is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); delete it and run again") from error


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Check a record and write it, without absolute paths.

    Raises:
        ValueError: If a required part is missing or a path of this machine would be published.
    """
    record = portable_paths({"format_version": FORMAT_VERSION, **record})
    check_record(record)
    write_json(path, record)


class Measurement:
    """A measurement from its start on, for its record: the tree may change while it runs.

    Args:
        command (`str`): The command line.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.code = describe_code()
        self.started = time.perf_counter()
        self.created_at = datetime.now(timezone.utc)

    def record(self, device: torch.device, status: str = "success", **parts: Any) -> dict[str, Any]:
        """Return a record of `parts`: `inputs`, `recipe`, `metrics` and whatever else there is to tell."""
        return {
            "run": {
                "recipe_name": None,
                "command": self.command,
                "created_at": self.created_at.isoformat(timespec="seconds"),
                "status": status,
            },
            "code": self.code,
            "hardware": describe_hardware(device),
            "seconds": round(time.perf_counter() - self.started, 2),
            "peak_memory_bytes": peak_memory_bytes(),
            **parts,
        }


class Cells:
    """What a benchmark has measured so far, in a file; a cell that is there is not measured again.

    Args:
        path (`str` or `Path`): The file.
        identity (`str`): Of code, model, data and settings: cells of others are dropped, so that a record is of one
            commit, as it says.
    """

    def __init__(self, path: str | Path, identity: str) -> None:
        self.path, self.identity = Path(path), identity
        before = read_json(self.path) or {}
        self.values: dict[str, Any] = before["cells"] if before.get("identity") == identity else {}

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return a cell, measuring it first if need be."""
        if key not in self.values:
            started = time.process_time()
            self.values[key] = measure()
            print(f"{key}: {time.process_time() - started:.0f} s of CPU time", flush=True)
            write_json(self.path, {"identity": self.identity, "cells": self.values})
        return self.values[key]


def check_record(record: dict[str, Any]) -> None:
    """Check that a record has its parts and names no place on the machine that wrote it.

    Raises:
        ValueError: Naming the missing key or the offending text.
    """
    for part, keys in REQUIRED.items():
        if part not in record:
            raise ValueError(f"the record has no {part!r}; expected the parts {', '.join(REQUIRED)}")
        for key in keys:
            if key not in record[part]:
                raise ValueError(f"the record has no {part}.{key}")
    text = json.dumps(record, ensure_ascii=False)
    for place in {str(REPOSITORY), str(Path.cwd()), str(Path.home()), tempfile.gettempdir()}:
        if len(place) > 1 and re.search(re.escape(place) + r"[/\"\s]", text):
            raise ValueError(f"the record holds the absolute path {place}; write paths relative to the repository")


def describe_code() -> dict[str, Any]:
    """Commit, whether tracked files differ from it, and the versions of what was used.

    Outside a git checkout the commit is `None` and `dirty` is true: such a number cannot be traced.
    """
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"commit": commit, "dirty": commit is None or bool(changes), "versions": versions}


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def describe_hardware(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Device, processor, cores, threads and processes of a run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "system": platform.system(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak_memory_bytes() -> dict[str, int]:
    """Largest resident size so far: of this process, of the largest child, and of the GPU's allocations."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "largest_child": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit,
    }
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def data_digest(data: Any) -> str:
    """Return a short digest of plain data, equal whenever the data are.

    >>> data_digest({"a": 1, "b": [2]}) == data_digest({"b": [2], "a": 1})
    True
    """
    text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
