"""What the study's arms say of the paper's statements, in five words, and the tables of `docs/reproducing.md`.

A statement has parts; a part is one number of a seed's arms and the side of a threshold that it must be on. A seed
counts if all arms that the number is of are there and, with the arms they took a model of, at their plateau.
From its parts [`word`] gives a statement one of five words; `docs/reproducing.md` says what they mean.
"""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality_tables import lowest, worst_free
from benchmarks.table import Record, Table, pick

WORDS = ("reproduced", "reproduced in part", "not reproduced", "not converged here", "not tested")
SEEDS = 3
STATEMENTS = Path(__file__).with_name("study_statements.yaml")
SHORT = {"": "accuracy", "blank": "blank_copy_accuracy", "copy": "copy_accuracy", "next": "causal_loss"}
METRICS = {
    **{"accuracy": "right", "copy_accuracy": "copy", "free_accuracy": "free-running", "free_exact": "texts exact"},
    **{"blank_copy_accuracy": "blank copy", "causal_loss": "nats, next token", "loss": "nats"},
}
Get = Callable[[str, str], float]


@dataclass(frozen=True)
class Part:
    """One comparison, written as `what | number > threshold` or `what | number in low high`.

    A number is `arm:metric` (accuracy, if none is named; see `SHORT`), a constant, `a - b`, or `a / b` of these or of
    differences in brackets; `K` in it stands for mixers and transformers, a part each.

    >>> part = Part.read("copy over guessing | copy.K:copy - none.K > 0.2")[0]
    >>> part.text, part.number, part.low, part.high
    ('copy over guessing, mixers', 'copy.m:copy - none.m', 0.2, inf)
    >>> round(part.value(lambda arm, metric: {"copy.m": 0.9, "none.m": 0.3}[arm]), 3)
    0.6
    """

    text: str
    number: str
    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def read(cls, line: str) -> list["Part"]:
        """Read a line."""
        text, _, rest = line.partition(" | ")
        number, sign, limits = re.split(r" (<|>|in) ", rest)
        bounds = [float(limit) for limit in limits.split()]
        low, high = {"<": (-math.inf, bounds[0]), ">": (bounds[0], math.inf), "in": (bounds[0], bounds[-1])}[sign]
        if ".K" not in number:
            return [cls(text, number, low, high)]
        names = {"m": "mixers", "t": "transformers"}
        return [cls(f"{text}, {name}", number.replace(".K", f".{k}"), low, high) for k, name in names.items()]

    def value(self, get: Get, number: str | None = None) -> float:
        """Work the number out, from `get(arm, metric)`."""
        number = self.number if number is None else number
        over, slash, under = number.partition(" / ")
        if slash:
            return self.value(get, over.strip("()")) / self.value(get, under.strip("()"))
        if " - " in number:
            first, _, rest = number.partition(" - ")
            return self.value(get, first) - self.value(get, rest)
        if re.fullmatch(r"[\d.]+", number):
            return float(number)
        arm, _, metric = number.partition(":")
        return get(arm, SHORT.get(metric, metric))

    def holds(self, value: float) -> bool:
        """Whether a seed's number speaks for the statement."""
        return self.low < value < self.high


@dataclass(frozen=True)
class Statement:
    """An entry of `study_statements.yaml`.

    Attributes:
        number, text (`str`): Its number, or a letter for a question of our own, and what is said.
        paper, load, here (`str`): The paper's figures; numbers a token, vocabulary and text of these, and of ours.
        parts (`list[str]`): What decides, see [`Part`].
        about_load (`bool`): Whether it is reproduced at the paper's load only, which no arm here has.
    """

    number: str
    text: str
    paper: str
    load: str
    here: str
    parts: list[str] = field(default_factory=list)
    about_load: bool = False


def statements() -> list[Statement]:
    """Read all statements."""
    return [Statement(**entry) for entry in yaml.safe_load(STATEMENTS.read_text(encoding="utf-8"))]


@dataclass(frozen=True)
class Found:
    """What was found of a part: its numbers by seed, and how many seeds are there but not at their plateau."""

    part: Part
    values: tuple[float, ...]
    falling: int

    @property
    def holds(self) -> bool | None:
        """Whether all seeds speak for it; `None` if they disagree or there is none."""
        said = {self.part.holds(value) for value in self.values}
        return said.pop() if len(said) == 1 else None

    @property
    def text(self) -> str:
        """The part as the page shows it."""
        if not self.values:
            return f"{self.part.text}: {'not converged' if self.falling else 'not run'}"
        spelt = "{:.2f} times" if " / " in self.part.number else "{:+.3f}" if "loss" in self.part.number else "{:+.1%}"
        spelt = spelt if " - " in self.part.number else spelt.replace("+", "")
        mean, *ends = (
            spelt.format(value) for value in (statistics.fmean(self.values), min(self.values), max(self.values))
        )
        spread = " (one seed)" if len(self.values) == 1 else f" ({ends[0]} to {ends[1]}, {len(self.values)} seeds)"
        said = {True: "holds", False: "does not hold", None: "seeds disagree"}[self.holds]
        return f"{self.part.text}: {mean}{spread}, {said}"


def find(arms: dict[str, Any], parents: dict[str, list[str]], part: Part) -> Found:
    """Evaluate a part on every seed whose arms are there."""
    values, falling = [], 0
    for seed in sorted({seed for runs in arms.values() for seed in runs}):
        used: list[str] = []

        def get(arm: str, metric: str, seed: str = seed, used: list[str] = used) -> float:
            used.append(arm)
            return arms[arm][seed]["metrics"][metric]

        try:
            value = part.value(get)
        except KeyError:
            continue
        needed = {*used, *(parent for arm in used for parent in parents.get(arm, ()))}
        if all(arms.get(arm, {}).get(seed, {}).get("converged") for arm in needed):
            values.append(value)
        else:
            falling += 1
    return Found(part, tuple(values), falling)


def word(statement: Statement, found: list[Found]) -> str:
    """One of [`WORDS`] for a statement."""
    run = [one for one in found if one.values or one.falling]
    if not run:
        return "not tested"
    whole = len(run) == len(found) and all(one.holds and len(one.values) >= SEEDS for one in found)
    if whole and not statement.about_load:
        return "reproduced"
    if any(one.holds or (one.values and one.holds is None) for one in run):
        return "reproduced in part"
    if any(one.falling for one in run):
        return "not converged here"
    return "not reproduced" if all(len(one.values) >= SEEDS for one in found) else "not tested"


def reproduced(study: Record, shipped: Record, rolling: Record) -> Table:
    """What the paper says beside what stands here, load, vocabulary and text with each figure, and one word."""
    metrics, starters = pick(study, "metrics"), pick(shipped, "metrics.starters")
    share = pick(rolling, "metrics")["generation/quickstart/16384"]["cache_share"]["memories"]
    auto, memory = starters["starter-autoencoder-64"], starters["starter-tiny"]
    beside = {
        "6": f"a starter, 6 numbers a token: {lowest(auto, 'retention')}",
        "13": f"a starter, {memory['width'] // memory['chunk_length']} numbers a token, {memory['source_length']} "
        f"tokens: {lowest(memory, 'copy')}, free-running {worst_free(memory)} texts",
        "23": f"1/{1 / share:.1f} of the bytes, counted",
    }
    rows = [["", "statement", "the paper", "here", "word"]]
    counts = dict.fromkeys(WORDS, 0)
    for statement in statements():
        parts = [part for line in statement.parts for part in Part.read(line)]
        found = [find(metrics["arms"], metrics["parents"], part) for part in parts]
        verdict = "reproduced" if statement.number == "23" else word(statement, found)
        counts[verdict] += 1
        shown = filter(None, [*(one.text for one in found), beside.get(statement.number)])
        here = f"*{statement.here}.* {'; '.join(shown)}".strip()
        rows.append(
            [statement.number, statement.text, f"{statement.paper} (*{statement.load}*)", here, f"**{verdict}**"]
        )
    done = sum(len(runs) for runs in metrics["arms"].values())
    return Table(
        rows,
        f"Of 27: {', '.join(f'{word} {number}' for word, number in counts.items())}. {done} of "
        f"{metrics['planned_runs']} planned runs are done. A mean over seeds, in brackets the lowest and the highest "
        "seed. The letters are questions of our own.",
    )


def study_arms(study: Record) -> Table:
    """A row for each arm: seeds, steps, whether it came to rest, and what it reached."""
    rows = [["arm", "seeds", "steps", "last fall", "at its plateau", "test"]]
    for name, runs in pick(study, "metrics.arms").items():
        results = list(runs.values())
        told = []
        for metric, label in METRICS.items():
            values = [result["metrics"][metric] for result in results if metric in result["metrics"]]
            if values:
                told.append(f"{label} {span(values, '{:.3f}' if label.startswith('nats') else '{:.1%}')}")
        rested = f"{sum(result['converged'] for result in results)} of {len(results)}"
        fall = f"{max(result['fall'] for result in results):.2%}"
        steps = span([result["steps"] for result in results], "{:,}")
        rows.append([name, str(len(results)), steps, fall, rested, ", ".join(told)])
    return Table(
        rows,
        "Of the test split of books. Last fall: by how much validation loss fell over the last 20% of the steps, the "
        "worst seed. `@` and a number: a sweep of the rates, 240 steps on one seed, which no statement rests upon. "
        "Letters: m mixers, t transformers, two of them encoder and decoder.",
    )


def span(values: Sequence[float], spelt: str) -> str:
    """The lowest and the highest of some numbers; one, if they are spelt alike.

    >>> span([0.5, 0.25], "{:.0%}"), span([3, 3], "{:,}")
    ('25% to 50%', '3')
    """
    return " to ".join(dict.fromkeys(spelt.format(value) for value in (min(values), max(values))))
