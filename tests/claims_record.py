"""A record of the claims in which everything was measured, with numbers of our choosing."""

import zlib
from typing import Any

from benchmarks.claims.evidence import Study
from benchmarks.claims.statements import load_statements
from training.recipes.recipe import find_recipe
from training.recipes.strict_yaml import parse_yaml

VOCAB = 2048
LENGTH = 127


def metrics(path: str, accuracy: float = 0.5, loss: float = 2.0) -> dict[str, Any]:
    """What `summarise` leaves in a record; a different but repeatable number for each path."""
    shift = zlib.crc32(path.encode()) % 1000 / 1e5
    accuracy, loss = accuracy + shift, loss + shift
    return {
        "token_accuracy": accuracy,
        "token_accuracy_rows_interval": [accuracy - 0.005, accuracy + 0.005],
        "loss": loss,
        "loss_interval": [loss - 0.005, loss + 0.005],
        "loss_by_position": [loss] * LENGTH,
        "bits_per_byte": loss,
        "num_tokens": 1024,
    }


def cell(name: str, found: dict[str, Any], steps: int = 300) -> dict[str, Any]:
    return {"name": name, "asked": {}, "metrics": found, "text_tokens": 1000 * steps, "steps": steps, "seconds": 1.0}


def stage_metrics(name: str, kind: str) -> dict[str, Any]:
    suites = {
        "autoencoder": {"retention": ("memory", "wrong_memory", "no_memory", "news", "random")},
        "causal_lm": {"clm": ("memory", "news", "random")},
        "memory": {
            "copy": ("memory", "wrong_memory", "no_memory", "random"),
            "blank_copy": ("memory", "wrong_memory", "no_memory"),
            "clm": ("memory", "wrong_memory", "no_memory", "news", "random"),
        },
    }[kind]
    return {
        suite: {condition: metrics(f"{name}.{suite}.{condition}") for condition in conditions}
        for suite, conditions in suites.items()
    }


def build_record() -> dict[str, Any]:
    """Build the record: each stage of the recipe, and all else that a statement reads."""
    recipe = parse_yaml(find_recipe("claims").read_text(encoding="utf-8"), "claims")
    stages, cells = {}, {}
    for stage in recipe["stages"]:
        name, kind = stage["name"], stage["kind"]
        objectives = stage.get("objectives", {"reconstruction" if kind == "autoencoder" else "causal": 1.0})
        stages[name] = {
            "kind": kind,
            "from": stage.get("from", {}),
            "model": stage.get("model", {}),
            "objectives": objectives,
            "seed": 0,
            "parameters": {"total": 10, "trainable": 10},
            "steps": 300,
            "text_tokens": 300_000,
            "seconds": 10.0,
            "curves": {objective: [[1, 7.0, 0.01], [300, 1.0, 0.5]] for objective in objectives},
            "gradient_norms": {"median": 1.0, "largest": 2.0},
        }
        cells[f"stage_{name}"] = cell(f"stage_{name}", stage_metrics(name, kind))
    record = {
        "run": {"created_at": "2026-01-02T03:04:05+00:00", "status": "success"},
        "code": {"commit": "0123456789abcdef", "dirty": False, "versions": {}},
        "hardware": {"device": "cpu", "cpu": "Some CPU", "cores": 2, "threads": 1, "processes": 1},
        "recipe": recipe,
        "stages": stages,
        "missing_stages": [],
        "metrics": {"cells": cells, "records": other_records()},
    }
    for path in sorted(paths_read(record)):
        name, *keys = path.split(".")
        if name in stages or name.startswith("stage_"):
            continue
        place = cells.setdefault(name, cell(name, {}))["metrics"]
        for key in keys:
            place = place.setdefault(key, {})
        place.update(metrics(path))
    record["metrics"]["paired"] = {SHARE: {"mean": 0.4, "interval": [0.3, 0.45]}}
    cells["random_tokens"]["metrics"]["text"] = metrics("random_tokens.text")
    cells["half_depth"]["metrics"]["cosine_whole"] = {"mean": 0.5, "smallest": 0.1}
    for name in [name for name in cells if name.startswith("half_precision")]:
        parts = {dtype: {"non_finite_share": 0.0} for dtype in ("float16", "bfloat16")}
        cells[name]["metrics"] = {"largest_activation": 50.0, **parts}
    return record


def other_records() -> dict[str, Any]:
    def probed(accuracy: float) -> dict[str, Any]:
        both = {name: {**metrics(name, accuracy), "bits_per_byte": bits}
                for name, bits in (("embedding", 2.0), ("shuffled", 2.2))}  # fmt: skip
        return both

    lengths = {"8": 0.4, "16": 0.3, "32": 0.2, "64": 0.1}
    model = {length: probed(accuracy) for length, accuracy in lengths.items()}
    first = {f"first_token/quickstart/{n}": {"given": {"tokens": n}, "cpu_ratio": {"stored_16": n / 100}}
             for n in (512, 1024, 2048)}  # fmt: skip
    columns = {"full": 16465, "memories": 1105}
    metrics_of = {
        "quickstart": {"autoencoder": {"memory": metrics("quickstart", 0.98, 0.01)}},
        "probe": {"stories260K": model, "MiniLM-L6": model},
        "speed": {"read_exponents": {"windows of 256": 1.0}},
        "rolling": {
            **first,
            "generation/quickstart/16384": {
                "given": {"tokens": 16384},
                "cache_columns": columns,
                "tokens_per_memory": 16,
            },
            "reading/1024": {"exponent": 1.1, "cpu_exponent": 1.1},
        },
    }
    return {name: {"commit": "0" * 40, "created_at": "", "metrics": found} for name, found in metrics_of.items()}


NO_MEMORY, MEMORY, FULL_CONTEXT = (f"stage_{name}.clm.memory" for name in ("no_memory", "memory", "full_context"))
SHARE = f"({NO_MEMORY} - {MEMORY}) / ({NO_MEMORY} - {FULL_CONTEXT})"


class Recorder(Study):
    """A study in which everything asked for is there, and which remembers what was asked."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(record)
        self.asked: set[str] = set()

    def part(self, path: str) -> dict[str, Any]:
        self.asked.add(path)
        found: dict[str, Any] = {**metrics(path), "mean": 0.5, "largest_activation": 50.0}
        return found | {"float16": {"non_finite_share": 0.0}, "bfloat16": {"non_finite_share": 0.0}}


def paths_read(record: dict[str, Any]) -> set[str]:
    """Paths that any statement reads."""
    study = Recorder(record)
    for statement in load_statements().values():
        statement.decide(study)
    return study.asked
