"""One measurement, one file: `FOLDER/cells/NAME.json`, so that an interrupted study goes on where it stopped.

| key | holds |
|---|---|
| `name` | of the measurement; the file's name |
| `asked` | all that decides the result: model, text, budget, seed; another description measures again |
| `metrics` | as [`training.measure.suites.summarise_scores`] gives them, by condition where there are several |
| `text_tokens`, `steps` | of training; 0 where nothing was trained |
| `seconds` | of the whole measurement |
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.records.record import read_json, write_json

Cell = dict[str, Any]
KEYS = ("name", "asked", "metrics", "text_tokens", "steps", "seconds")


def cell_path(folder: Path, name: str) -> Path:
    """Where a measurement stands.

    >>> cell_path(Path("runs/claims"), "oracle_token").as_posix()
    'runs/claims/cells/oracle_token.json'
    """
    return folder / "cells" / f"{name}.json"


def read_cell(folder: Path, name: str, asked: Mapping[str, Any] | None = None) -> Cell | None:
    """Read a measurement.

    Args:
        folder (`Path`): Of the study.
        name (`str`): Of the measurement.
        asked (`Mapping`, *optional*): Its description; one that was made from another does not count.

    Returns:
        `dict`, or `None` if it was not made yet.

    Raises:
        ValueError: If the file is no measurement of this name.
    """
    path = cell_path(folder, name)
    cell = read_json(path)
    if cell is None:
        return None
    missing = [key for key in KEYS if key not in cell]
    if missing or cell["name"] != name:
        wrong = f"lacks {', '.join(missing)}" if missing else f"is named {cell['name']!r} inside"
        raise ValueError(f"{path} {wrong}; delete it and measure again")
    return cell if asked is None or cell["asked"] == _plain(asked) else None


def read_cells(folder: Path) -> dict[str, Cell]:
    """Read all measurements of a folder, by name; none is a valid answer."""
    names = sorted(path.stem for path in (folder / "cells").glob("*.json"))
    return {name: cell for name in names if (cell := read_cell(folder, name)) is not None}


def measure_cell(folder: Path, name: str, asked: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> Cell:
    """Return a measurement: the one that is there if it was made from the same description, else a new one.

    Args:
        folder (`Path`): Of the study.
        name (`str`): Of the measurement.
        asked (`Mapping`): All that decides the result, as plain data.
        measure (`Callable`): Returns `metrics` and, where something was trained, `text_tokens` and `steps`.
    """
    found = read_cell(folder, name, asked)
    if found is not None:
        return found
    started = time.perf_counter()
    result = {"text_tokens": 0, "steps": 0, **measure()}
    unknown = sorted(result.keys() - {"metrics", "text_tokens", "steps"})
    if unknown or "metrics" not in result:
        raise ValueError(f"{name}: a measurement returns metrics, text_tokens and steps; got {sorted(result)}")
    seconds = round(time.perf_counter() - started, 2)
    cell = {"name": name, "asked": _plain(asked), **result, "seconds": seconds}
    cell = {key: cell[key] for key in KEYS}
    write_json(cell_path(folder, name), cell)
    return cell


def _plain(asked: Mapping[str, Any]) -> Any:
    """Bring a description into the form that it has in a file, where tuples are lists and keys are strings."""
    return json.loads(json.dumps(asked, ensure_ascii=False))
