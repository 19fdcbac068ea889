"""Generated calls: a sensible call of something public, with one or two of its arguments replaced.

A call ends in an answer without NaN, or in an error that teaches. What no one can have meant is refused, always.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Arguments = dict[str, Any]

INNER_ERRORS = re.compile(
    r"size of tensor|out of range in self|must match the|scalar type|not implemented for|mat1|shape '\[|aten::|"
    r"cannot be (broadcast|multiplied|reshaped)|Expected (all|reduction|tensor|dim)|unpack|subscriptable|"
    r"object is not|has no attribute|'NoneType' object|unexpected keyword|positional argument|"
    r"Boolean value of|dtype\('"
)
"""What errors say that come from below, where nobody knows what was asked."""
SHORTEST_ERROR = 40
"""Characters: fewer cannot say what was given, what was expected and what to do."""


@dataclass(frozen=True)
class Change:
    """Another value of an argument.

    Attributes:
        argument: Its name; the change is made where a call has it, or `adds` says that it may be new.
        value: From the argument as it was and the source of chance, the argument as it will be.
        is_senseless: Whether the call must be refused.
        adds: Whether the argument may be new.
    """

    argument: str
    value: Callable[[Any, random.Random], Any]
    is_senseless: bool = True
    adds: bool = False


@dataclass
class Area:
    """A part of what is public: its sensible calls and what may be changed in them.

    Attributes:
        calls: Name -> function and arguments of a sensible call.
        changes: What may be changed.
        senseless_calls: Those that must be refused as they are.
        refused_with: The errors that may come.
    """

    calls: dict[str, Callable[[random.Random], tuple[Callable[..., Any], Arguments]]]
    changes: list[Change]
    senseless_calls: frozenset[str] = frozenset()
    refused_with: tuple[type[Exception], ...] = (ValueError,)

    def run(self, name: str, numbers: range) -> list[str]:
        """Make the calls of these numbers; return what went wrong, one line each."""
        return [
            line for number in numbers for line in self._call(random.Random(f"{name} {number}"), f"{name} {number}")
        ]

    def _call(self, chance: random.Random, label: str) -> Iterator[str]:
        torch.manual_seed(chance.randrange(2**31))
        name = chance.choice(list(self.calls))
        function, arguments = self.calls[name](chance)
        changes = self._choose(chance, arguments)
        for change in changes:
            arguments[change.argument] = change.value(arguments.get(change.argument), chance)
        shown = ", ".join(f"{change.argument}={_short(arguments[change.argument])}" for change in changes)
        label = f"{label}: {name}({shown})"
        try:
            answer = function(**arguments)
        except self.refused_with as error:
            message = str(error)
            if not changes and name not in self.senseless_calls:
                yield f"{label}: a sensible call was refused: {message}"
            elif len(message) <= SHORTEST_ERROR or INNER_ERRORS.search(message):
                yield f"{label}: an error that does not teach: {type(error).__name__}: {message}"
        except Exception as error:
            yield f"{label}: {type(error).__name__}: {error}"
        else:
            if name in self.senseless_calls or any(change.is_senseless for change in changes):
                yield f"{label}: accepted"
            elif has_nan(answer):
                yield f"{label}: an answer that is no number"

    def _choose(self, chance: random.Random, arguments: Arguments) -> list[Change]:
        """None, one or two changes, of different arguments."""
        possible = [one for one in self.changes if one.adds or arguments.get(one.argument) is not None]
        first = chance.choice(possible)
        others = [one for one in possible if one.argument != first.argument]
        second = [chance.choice(others)] if others and chance.random() < 0.3 else []
        return [] if chance.random() < 0.1 else [first, *second]


def has_nan(answer: Any) -> bool:
    """Whether there is NaN anywhere in an answer."""
    if isinstance(answer, torch.Tensor):
        return answer.is_floating_point() and bool(answer.isnan().any())
    if isinstance(answer, float):
        return answer != answer
    if isinstance(answer, dict):
        return any(map(has_nan, answer.values()))
    return isinstance(answer, (list, tuple)) and any(map(has_nan, answer))


def to(value: Any) -> Callable[[Any, random.Random], Any]:
    """The change to a fixed value."""
    return lambda was, chance: value


def changes(argument: str, *values: Any, **options: bool) -> list[Change]:
    """A change to each of some values; options as [`Change`] takes them."""
    return [Change(argument, to(value), **options) for value in values]


def one_cell(value: float) -> Callable[[torch.Tensor, random.Random], torch.Tensor]:
    """The change of one element of a tensor."""

    def change(was: torch.Tensor, chance: random.Random) -> torch.Tensor:
        changed = was.clone()
        changed.view(-1)[chance.randrange(changed.numel())] = value
        return changed

    return change


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        values = value.flatten()[:6].tolist() if value.numel() else []
        return f"{str(value.dtype)[6:]}{tuple(value.shape)}{values}"
    shown = " ".join(repr(value).split())
    return shown if len(shown) < 60 else f"{shown[:57]}..."
