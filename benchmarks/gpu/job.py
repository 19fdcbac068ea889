"""One part of the benchmark: its time, its record, and what a device has to be asked for to time it."""

import gc
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from training.places import portable_paths
from training.records.record import write_json

# Dense bf16, no sparsity: NVIDIA H200 datasheet, SXM: 1,979 TFLOP/s with sparsity, which doubles it.
PEAK = 989e12
Numbers = dict[str, Any]


class OutOfTimeError(BaseException):
    """A part's time is over; no `except Exception` of a library on the way may swallow it."""


@dataclass
class Job:
    """One part on its way.

    Attributes:
        device (`torch.device`): What is measured.
        toy (`bool`): Whether sizes are those of a trial: everything runs, no number means anything.
        folder (`Path`): Of all records, and of what parts leave for each other.
        payload (`Path`): What travelled: text, packages, weights.
        seconds (`float`): The part's time limit.
        path (`Path`): Its record.
        record (`dict`): The record as far as it goes.
    """

    device: torch.device
    toy: bool
    folder: Path
    payload: Path
    seconds: float
    path: Path
    record: Numbers
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def note(self, name: str, value: Any) -> None:
        """Keep a number and say it; the record is written whole, so that a kill loses nothing that was measured."""
        self.record["metrics"][name] = value
        self.record["seconds"] = round(time.monotonic() - self.started, 2)
        write_json(self.path, portable_paths(finite(self.record)))
        print(f"  {name}: {value}", flush=True)

    def measure(self, name: str, run: Callable[[], Any]) -> Any:
        """Run one measurement by itself: when it fails, the record says how, and the others go on."""
        value: Any
        try:
            if self.left() <= 0:
                raise OutOfTimeError
            value = run()
        except OutOfTimeError:
            self.note(name, {"missing": "no time was left"})
            raise
        except Exception as error:  # whatever it is: the minutes that are left belong to the others
            value = {"failed": f"{type(error).__name__}: {str(error)[:600]}"}
            self.record["failures"].append(name)
        free_memory(self.device)
        self.note(name, value)
        return value


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise [`OutOfTimeError`] in the main thread when so many seconds are over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def finite(value: Any) -> Any:
    """Write numbers that JSON has no word for as text.

    >>> finite({"loss": float("nan"), "seconds": [1.0]})
    {'loss': 'nan', 'seconds': [1.0]}
    """
    if isinstance(value, dict):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def free_memory(device: torch.device) -> None:
    """Give the memory of what is no longer used back, and count peaks anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def finish(device: torch.device) -> None:
    """Wait until a device has done all that it was given: its work is queued, so a clock alone says nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], device: torch.device, *, repetitions: int, warmup: int = 2) -> float:
    """Return the median seconds of a call, its queued work included."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repetitions):
        finish(device)
        started = time.perf_counter()
        run()
        finish(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak_gib(device: torch.device) -> float | None:
    """GiB of the device at its fullest since memory was last freed; `None` for a CPU, whose pages are not counted."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
