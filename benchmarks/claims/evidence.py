"""What a verdict is made of: numbers with intervals from the record, comparisons with stated bounds, verdicts.

A part of a statement is decided by one comparison. Each comparison writes its own criterion, from the same bounds that
it decides by, so that the page cannot state another one than the code applies.

| comparison | holds | does not hold |
|---|---|---|
| [`higher`], [`lower`] | the difference is beyond its margin, its interval beyond zero | so in the other direction |
| [`times`] | so many times as much even at the unfavourable ends of both intervals | not even at the favourable ends |
| [`close`] | the interval of the difference lies within the bound | it lies outside |
| [`reaches`], [`stays_under`] | the interval lies on the right side of the bound | it lies on the other |

Everything else is undecided, and what was not measured is not run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from benchmarks.claims.scoring import paired_difference, paired_share
from training.measure.metrics import uninformed_loss

MARGINS = {"accuracy": 0.02, "loss": 0.02, "ratio": 0.02}
WORDS = {"accuracy": "tokens right", "loss": "loss", "ratio": "information ratio"}
SHORT = "; less is undecided, since training was short"
UNITS = {"accuracy": "points", "loss": "nats", "ratio": "points"}
INTERVALS = {
    "accuracy": ("token_accuracy", ("token_accuracy_rows_interval", "token_accuracy_interval")),
    "loss": ("loss", ("loss_interval",)),
}


class Verdict(Enum):
    """What became of a statement, or of a part of one."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "undecided at this scale"
    NOT_RUN = "not run"


class NotMeasuredError(LookupError):
    """The record lacks something; its message names it."""


@dataclass(frozen=True)
class Number:
    """A measured number with its 95 % interval; `kind` is accuracy, loss or ratio.

    >>> str(Number(0.5, 0.49, 0.51, "accuracy")), str(Number(0.5, 0.49, 0.51, "loss"))
    ('50.0 % (49.0 to 51.0)', '0.500 nats (0.490 to 0.510)')
    """

    value: float
    low: float
    high: float
    kind: str

    def __str__(self) -> str:
        if self.kind == "accuracy":
            return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"
        if self.kind == "loss":
            return f"{self.value:.3f} nats ({self.low:.3f} to {self.high:.3f})"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"

    def as_difference(self) -> str:
        """Write the number with its sign and the unit of differences.

        >>> Number(0.05, 0.04, 0.06, "accuracy").as_difference()
        '+5.0 points (+4.0 to +6.0)'
        """
        scale, digits = (1.0, 3) if self.kind == "loss" else (100.0, 1)
        value, low, high = (f"{scale * number:+.{digits}f}" for number in (self.value, self.low, self.high))
        return f"{value} {UNITS[self.kind]} ({low} to {high})"

    def minus(self, other: "Number") -> "Number":
        """The difference of two numbers that were measured independently."""
        value = self.value - other.value
        down = math.hypot(self.value - self.low, other.high - other.value)
        up = math.hypot(self.high - self.value, other.value - other.low)
        return Number(value, value - down, value + up, self.kind)


def read_number(metrics: Mapping[str, Any], kind: str, path: str) -> Number:
    """Read a token accuracy or loss with its interval, over texts where there is one.

    Raises:
        NotMeasuredError: If it is not there.
    """
    name, intervals = INTERVALS[kind]
    for interval in intervals:
        if name in metrics and interval in metrics:
            low, high = metrics[interval]
            return Number(metrics[name], low, high, kind)
    raise NotMeasuredError(path)


@dataclass(frozen=True)
class Reading:
    """Something measured: where it stands among the cells (`cell.suite.condition`), and what to call it."""

    path: str
    label: str


class Study:
    """The record of the claims, read by the names of measurements.

    Args:
        record (`Mapping`): From `python -m benchmarks.claims`.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.paired: dict[str, Any] = dict(record["metrics"].get("paired", {}))

    def part(self, path: str) -> dict[str, Any]:
        """Return the metrics at `cell.suite.condition`.

        Raises:
            NotMeasuredError: If the cell, or what is asked of it, is not there.
        """
        cell, *keys = path.split(".")
        cells = self.record["metrics"]["cells"]
        if cell not in cells:
            raise NotMeasuredError(cell)
        found = cells[cell]["metrics"]
        for key in keys:
            if not isinstance(found, Mapping) or key not in found:
                raise NotMeasuredError(path)
            found = found[key]
        return dict(found)

    def stage(self, name: str) -> dict[str, Any]:
        """Return what a stage of the recipe is and cost."""
        if name not in self.record["stages"]:
            raise NotMeasuredError(f"stage {name}")
        return dict(self.record["stages"][name])

    def other(self, name: str) -> Any:
        """Return what was taken over from another record of this repository."""
        found = self.record["metrics"]["records"].get(name)
        if found is None:
            raise NotMeasuredError(f"{name}.json")
        return found["metrics"]

    def number(self, path: str, kind: str) -> Number:
        """Return a token accuracy, loss or information ratio (of the paper's convention) with its interval."""
        if kind == "ratio":
            loss = self.number(path, "loss")
            uninformed = uninformed_loss(self.vocab_size, "paper")
            value, low, high = (1 - nats / uninformed for nats in (loss.value, loss.high, loss.low))
            return Number(value, low, high, "ratio")
        return read_number(self.part(path), kind, path)

    @property
    def vocab_size(self) -> int:
        """Rows of the token tables of the recipe's models."""
        return int(self.record["recipe"]["tokenizer"]["vocab_size"])

    def difference(self, one: Reading, other: Reading, kind: str) -> Number:
        """How much larger one is; row by row where both were scored on the same rows.

        Differences by row are kept in `paired`, since the record holds no numbers by row.
        """
        key = f"{one.path} - {other.path}"
        parts = [self.part(reading.path) for reading in (one, other)]
        rows = [part.get("row_losses", []) for part in parts]
        if kind == "loss" and rows[0] and len(rows[0]) == len(rows[1]):
            self.paired[key] = paired_difference(rows[0], rows[1])
        if kind == "loss" and key in self.paired:
            low, high = self.paired[key]["interval"]
            return Number(self.paired[key]["mean"], low, high, kind)
        return self.number(one.path, kind).minus(self.number(other.path, kind))

    def share(self, start: Reading, here: Reading, end: Reading) -> Number:
        """Share of the way from one loss to another that a third has come, with texts drawn again for all three."""
        key = f"({start.path} - {here.path}) / ({start.path} - {end.path})"
        rows = [self.part(reading.path).get("row_losses", []) for reading in (start, here, end)]
        if rows[0] and len({len(part) for part in rows}) == 1:
            self.paired[key] = paired_share(*rows)
        if key not in self.paired:
            raise NotMeasuredError(key)
        low, high = self.paired[key]["interval"]
        return Number(self.paired[key]["mean"], low, high, "ratio")


Outcome = tuple[list[str], Verdict]


@dataclass(frozen=True)
class Part:
    """One thing that a statement says, and what decides it.

    Attributes:
        claim (`str`): In words.
        criterion (`str`): When it holds and when it does not.
        decide (`Callable[[Study], Outcome]`): Lines of what came out, and the verdict.
        counts (`bool`): False for what is shown beside a statement and not said by it.
    """

    claim: str
    criterion: str
    decide: Callable[[Study], Outcome]
    counts: bool = True

    def outcome(self, study: Study) -> Outcome:
        """Decide; what is missing gives `not run`, never an error."""
        try:
            return self.decide(study)
        except NotMeasuredError as missing:
            return [f"`{missing}` is missing"], Verdict.NOT_RUN


def beside(part: Part) -> Part:
    """Show a part with a statement without letting it decide."""
    return replace(part, counts=False)


def judge(for_it: bool, against: bool) -> Verdict:
    """A verdict from two questions that cannot both be answered with yes.

    >>> judge(True, False).value, judge(False, False).value
    ('holds', 'undecided at this scale')
    """
    if for_it:
        return Verdict.HOLDS
    return Verdict.FAILS if against else Verdict.UNDECIDED


def joint_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """One part against it and a statement does not hold; one undecided leaves it undecided; else what was run counts.

    >>> joint_verdict([Verdict.HOLDS, Verdict.NOT_RUN]).value, joint_verdict([Verdict.HOLDS, Verdict.FAILS]).value
    ('holds', 'does not hold')
    """
    for verdict in (Verdict.FAILS, Verdict.UNDECIDED, Verdict.HOLDS):
        if verdict in verdicts:
            return verdict
    return Verdict.NOT_RUN


def higher(claim: str, one: Reading, other: Reading, *, kind: str = "accuracy", by: float | None = None) -> Part:
    """One is higher than the other by more than a margin; a margin above the usual counts with the interval."""
    margin = MARGINS[kind] if by is None else by
    large = margin > MARGINS[kind]

    def decide(study: Study) -> Outcome:
        found = study.difference(one, other, kind)
        lines = [*_both(study, one, other, kind), f"difference {found.as_difference()}"]
        if large:
            return lines, judge(found.low > margin, found.high < margin)
        return lines, judge(found.low > 0 and found.value > margin, found.high < 0 and found.value < -margin)

    end = "interval included" if large else "the interval above zero; as much less speaks against it"
    return Part(claim, f"{WORDS[kind]}: more by over {_bound(margin, kind)}, {end}", decide)


def lower(claim: str, one: Reading, other: Reading, *, by: float | None = None) -> Part:
    """One has a lower loss than the other by more than a margin; see [`higher`]."""
    part = higher(claim, other, one, kind="loss", by=by)

    def decide(study: Study) -> Outcome:
        found = study.difference(one, other, "loss")
        lines = [*_both(study, one, other, "loss"), f"difference {found.as_difference()}"]
        return lines, part.decide(study)[1]

    criterion = (
        part.criterion.replace("much less", "much more").replace("more by", "less by").replace("above", "below")
    )
    return Part(claim, criterion, decide)


def times(claim: str, one: Reading, other: Reading, factor: float, *, decisive: bool = True) -> Part:
    """One has at least so many times the token accuracy of the other; see [`reaches`] for `decisive`."""

    def decide(study: Study) -> Outcome:
        a, b = (study.number(reading.path, "accuracy") for reading in (one, other))
        ratio = f"{a.value / b.value:.1f} times" if a.value < 100 * b.value else "over 100 times"
        lines = [*_both(study, one, other, "accuracy"), ratio]
        return lines, judge(a.low >= factor * b.high, decisive and a.high < factor * b.low)

    criterion = f"tokens right: at least {factor:g} times, at the unfavourable ends of both intervals"
    return Part(claim, criterion + ("" if decisive else SHORT), decide)


def close(claim: str, one: Reading, other: Reading, within: float, *, kind: str = "accuracy") -> Part:
    """The two differ by no more than a bound."""

    def decide(study: Study) -> Outcome:
        found = study.difference(one, other, kind)
        verdict = judge(max(abs(found.low), abs(found.high)) <= within, found.low > within or found.high < -within)
        return [*_both(study, one, other, kind), f"difference {found.as_difference()}"], verdict

    return Part(
        claim, f"{WORDS[kind]}: the interval of the difference within {_bound(within, kind)} either way", decide
    )


def not_lower(claim: str, one: Reading, other: Reading, *, kind: str = "accuracy", by: float | None = None) -> Part:
    """One is not lower than the other by more than a margin."""
    margin = MARGINS[kind] if by is None else by

    def decide(study: Study) -> Outcome:
        found = study.difference(one, other, kind)
        verdict = judge(found.low > -margin, found.high < -margin)
        return [*_both(study, one, other, kind), f"difference {found.as_difference()}"], verdict

    return Part(claim, f"{WORDS[kind]}: not less by over {_bound(margin, kind)}, interval included", decide)


def reaches(claim: str, one: Reading, bound: float, *, kind: str = "accuracy", decisive: bool = True) -> Part:
    """A number is at least a bound; less is undecided where it is not `decisive`, as after short training."""
    return _against_bound(claim, one, bound, kind, at_least=True, decisive=decisive)


def stays_under(claim: str, one: Reading, bound: float, *, kind: str = "accuracy") -> Part:
    """A number is at most a bound."""
    return _against_bound(claim, one, bound, kind, at_least=False)


def _against_bound(
    claim: str, one: Reading, bound: float, kind: str, *, at_least: bool, decisive: bool = True
) -> Part:
    def decide(study: Study) -> Outcome:
        found = study.number(one.path, kind)
        over, under = found.low >= bound, found.high <= bound
        verdict = judge(over, decisive and under) if at_least else judge(under, over)
        return [f"{one.label} {found}"], verdict

    side = "at least" if at_least else "at most"
    shown = f"{100 * bound:g} %" if kind == "accuracy" else f"{bound:g}{' nats' if kind == 'loss' else ''}"
    return Part(claim, f"{WORDS[kind]}: {side} {shown}, interval included{'' if decisive else SHORT}", decide)


def _both(study: Study, one: Reading, other: Reading, kind: str) -> list[str]:
    a, b = (study.number(reading.path, kind) for reading in (one, other))
    return [f"{one.label} {a}, {other.label} {b}"]


def _bound(value: float, kind: str) -> str:
    """Write a margin in the unit of its kind.

    >>> _bound(0.02, "accuracy"), _bound(0.02, "loss")
    ('2 points', '0.02 nats')
    """
    return f"{value:g} nats" if kind == "loss" else f"{100 * value:g} points"
