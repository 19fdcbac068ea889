"""All that the statements are decided from, as one record: measurements, stages, and what other records hold."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.cells import Cell, read_cells
from benchmarks.claims.evidence import Study
from benchmarks.claims.scoring import TEXTS, ClaimsText
from benchmarks.claims.stages import PREFIX, describe_stages
from benchmarks.claims.statements import load_statements
from benchmarks.measure import RESULTS, describe_run
from training.recipes.recipe import Recipe, find_recipe
from training.recipes.strict_yaml import parse_yaml
from training.records.record import read_json

Record = dict[str, Any]

LEFT_OUT = ("row_losses", "token_accuracy_by_position", "num_correct", "information_ratio", "num_bytes",
            "bits_per_byte_with_memory", "train_texts", "train_tokens_read", "num_vectors", "as_stages")  # fmt: skip
BY_POSITION = ("clm.memory", "clm.no_memory", "all")
"""Conditions whose loss by position is kept."""


def _quickstart(metrics: Record) -> Record:
    return {"autoencoder": metrics["autoencoder"]}


def _probe(metrics: Record) -> Record:
    return {model["name"]: model["lengths"] for model in metrics["models"]}


def _speed(metrics: Record) -> Record:
    exponents = {}
    for key in ("scaling", "scaling_short_chunks"):
        given = metrics[key]["given"]
        name = f"windows of {given['window_length']}, {given['chunk_length']} tokens per memory"
        exponents[name] = metrics[key]["read"]["fit"]["exponent"]
    return {"read_exponents": exponents}


def _rolling(metrics: Record) -> Record:
    kept: Record = {}
    for name, cell in metrics.items():
        given = cell.get("given", {})
        if name.startswith("generation/"):
            kept[name] = {"given": given, "cache_columns": cell["cache_columns"], "tokens_per_memory": 16}
        elif name.startswith("first_token/") and not cell["full_is_scaled_by_layers"]:
            kept[name] = {"given": given, "ratio": cell["ratio"], "cpu_ratio": cell["cpu_ratio"]}
        elif name == "reading/1024":
            kept[name] = {"exponent": cell["fit"]["exponent"], "cpu_exponent": cell["cpu_fit"]["exponent"]}
    return kept


def _fidelity_curve(metrics: Record) -> Record:
    return dict(metrics)


OTHERS: dict[str, Callable[[Record], Record]] = {
    "quickstart": _quickstart,
    "probe": _probe,
    "speed": _speed,
    "rolling": _rolling,
    "fidelity_curve": _fidelity_curve,
}


def other_records(folder: Path = RESULTS) -> Record:
    """Take over what the statements read of other records, with the commit of each."""
    found = {}
    for name, take in OTHERS.items():
        record = read_json(folder / f"{name}.json")
        if record is not None:
            source = {"commit": record["code"]["commit"], "created_at": record["run"]["created_at"]}
            found[name] = {**source, "metrics": slim(take(record["metrics"]))}
    return found


def slim(data: Any, path: str = "") -> Any:
    """Leave out what no page shows, and round to six digits.

    >>> slim({"loss": 1 / 3, "row_losses": [0.1], "token_accuracy_by_position": [0.5]})
    {'loss': 0.333333}
    """
    if isinstance(data, Mapping):
        left_out = set(LEFT_OUT)
        if not path.endswith(BY_POSITION):
            left_out.add("loss_by_position")
        if "token_accuracy_rows_interval" in data:
            left_out.add("token_accuracy_interval")  # texts are the better unit
        return {key: slim(value, f"{path}.{key}") for key, value in data.items() if key not in left_out}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [slim(value, path) for value in data]
    return float(f"{data:.6g}") if isinstance(data, float) else data


def gather_cells(folders: Sequence[Path], own: Mapping[str, Cell]) -> dict[str, Cell]:
    """Collect measurements of several folders.

    Raises:
        ValueError: If two folders hold different measurements of one name.
    """
    cells: dict[str, Cell] = dict(own)
    for folder in folders:
        for name, cell in read_cells(folder).items():
            if name.startswith(PREFIX):
                continue  # those of this run are in `own`; an older run's would be mistaken for them
            if name in cells and cells[name] != cell:
                raise ValueError(f"{folder} holds another {name} than a folder before it; delete one of the two")
            cells[name] = cell
    return dict(sorted(cells.items()))


def gather(
    run: Path, recipe: Recipe, text: ClaimsText, own: Mapping[str, Cell], folders: Sequence[Path], command: str
) -> Record:
    """Put the record together.

    Args:
        run (`Path`): Folder of `python -m training.run claims`.
        recipe (`Recipe`): Its recipe.
        text (`ClaimsText`): What its stages were scored on.
        own (`Mapping`): Measurements of its stages.
        folders (`Sequence[Path]`): Where the other measurements are.
        command (`str`): The command line.
    """
    stages, cells = describe_stages(run), gather_cells(folders, own)
    finished = read_json(run / "record.json")
    missing = [stage.name for stage in recipe.stages if stage.name not in stages]
    record = {
        **describe_run("claims", command, {"run": recipe.seed, **{name: one["seed"] for name, one in stages.items()}}),
        "inputs": {"files": {TEXTS[name]: value for name, value in text.description["files"].items()},
                   "tokenizer": text.description["tokenizer"]},
        "recipe": parse_yaml(find_recipe(recipe.name).read_text(encoding="utf-8"), recipe.name),
        "trained_by": None if finished is None else finished["code"],
        "missing_stages": missing,
        "stages": slim(stages),
        "metrics": {"cells": cells, "records": other_records()},
    }  # fmt: skip
    record["run"]["recipe_name"] = recipe.name
    study = Study(record)
    for statement in load_statements().values():
        statement.decide(study)  # leaves the differences by row in `paired`
    record["metrics"] = slim({**record["metrics"], "paired": study.paired})
    return record
