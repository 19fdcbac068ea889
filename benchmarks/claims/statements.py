"""All statements: their words from `statements.yaml`, their parts from the code, their verdicts from the record."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.claims import on_information, on_memory
from benchmarks.claims.evidence import Part, Study, Verdict, joint_verdict
from training.recipes.strict_yaml import parse_yaml

WORDS = Path(__file__).with_name("statements.yaml")
FIELDS = {"title", "paper", "ran", "held", "notes", "figure"}


@dataclass(frozen=True)
class Decided:
    """A part with its outcome."""

    part: Part
    lines: list[str]
    verdict: Verdict


@dataclass(frozen=True)
class Statement:
    """A statement of the paper, or one of our own.

    Attributes:
        title (`str`): In one line.
        paper (`str`): What the paper says, with its figures; of our own, what the original does.
        ran (`str`): Stages of the recipe, or measurements.
        held (`str`): Whether tokens or compute were equal.
        parts (`tuple[Part, ...]`): What decides it.
        notes (`str`): Where this setting differs from the paper's.
        figure (`dict`, *optional*): `name` of a figure of the record and what it `shows`; nothing if it was shown.
    """

    title: str
    paper: str
    ran: str
    held: str
    parts: tuple[Part, ...]
    notes: str = ""
    figure: dict[str, str] | None = None

    def decide(self, study: Study) -> list[Decided]:
        """Decide every part from a record."""
        return [Decided(part, *part.outcome(study)) for part in self.parts]


@functools.cache
def load_statements() -> dict[str, Statement]:
    """Put words and parts together, in the order of the page.

    Raises:
        ValueError: If one has no words or no parts, or a field is unknown.
    """
    words = parse_yaml(WORDS.read_text(encoding="utf-8"), WORDS.name)
    parts = {**on_information.PARTS, **on_memory.PARTS}
    if list(words) != list(parts):
        raise ValueError(f"{WORDS.name} has the statements {list(words)}, the code {list(parts)}")
    unknown = {key: sorted(set(fields) - FIELDS) for key, fields in words.items() if set(fields) - FIELDS}
    if unknown:
        raise ValueError(f"{WORDS.name} has unknown fields: {unknown}")
    return {key: Statement(parts=parts[key], **fields) for key, fields in words.items()}


def verdict_of(decided: Sequence[Decided]) -> Verdict:
    """The joint verdict of the parts that count."""
    return joint_verdict([one.verdict for one in decided if one.part.counts])


def count_parts(decided: Sequence[Decided]) -> str:
    """Say how many of the parts that count came to which verdict; empty where all agree."""
    counts = {verdict: sum(one.verdict is verdict and one.part.counts for one in decided) for verdict in Verdict}
    shown = [f"{verdict.value}: {count}" for verdict, count in counts.items() if count]
    return "" if len(shown) < 2 else ", ".join(shown)
