"""The parts, most valuable first, and what each has to wait for."""

import importlib
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.job import Job


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
        asks (`str`): What it answers.
        seconds (`int`): Its time limit.
        function (`str`): Module and function in this package.
        needs (`tuple` of `str`): Files of the payload.
    """

    asks: str
    seconds: int
    function: str
    needs: tuple[str, ...] = ()

    def missing(self, payload: Path) -> list[str]:
        """Return the files that have not come."""
        return [name for name in self.needs if not (payload / name).is_file()]

    def run(self, job: Job) -> None:
        """Measure it."""
        module, _, function = self.function.partition(":")
        getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(job)


CHUNKS = ("chunks_train.u16.zst", "chunks_validation.u16.zst")
PAIR = ("site.tar", "warm.tar")
ASKED = ("pair_train.u16.zst", "pair_validation.u16.zst", "questions.jsonl", "validation_questions.jsonl")
PARTS = {
    "a": Part("is it right on this device", 60, "correctness:run"),
    "b": Part("how fast does it train, and what bounds it", 150, "throughput:run"),
    "c": Part("the paper's autoencoder: accuracy against time", 180, "autoencoder:run", CHUNKS),
    "d": Part("the real pair, trained for three minutes", 180, "pair:train", (*PAIR, *ASKED)),
    "e": Part("first token and step after 16k and 64k tokens", 60, "pair:read", PAIR),
}
