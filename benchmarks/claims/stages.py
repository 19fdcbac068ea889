"""The models of `configuration/recipes/claims.yaml`, each scored on the same rows of text as soon as it is trained.

| kind of stage | scored on |
|---|---|
| autoencoder | retention with another text's vector and with none; news and random tokens |
| memory | copy and blank copy of 32 tokens with both controls, next tokens in rows of 128; the same of random tokens |
| causal LM | next tokens in rows of 128, read whole, or in windows where it was trained in windows |

What a stage cost and how it learnt is read from its `stage.json`.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.claims.cells import Cell, measure_cell
from benchmarks.claims.scoring import DOMAINS, SCORED_TOKENS, ClaimsText, score_rows, summarise, without_rows
from training.evaluate import load_model
from training.record import read_json
from training.suites import Scores, score_suite

COPIED, ROW_LENGTH, AUTOENCODED = 32, 128, 64
PREFIX = "stage_"


def finished_stages(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names of a run's finished stages, with how each was asked for and what `stage.json` says of it."""
    for done in sorted(run.glob("stages/*/stage.json")):
        asked, found = read_json(done.parent / "started.json"), read_json(done)
        if asked is not None and found is not None:
            yield done.parent.name, {"asked": asked["stage"], "done": found}


def score_stages(run: Path, text: ClaimsText, folder: Path) -> dict[str, Cell]:
    """Score every finished stage of a run that has no measurement yet.

    Args:
        run (`Path`): Folder of `python -m training.run claims`.
        text (`ClaimsText`): What they are scored on.
        folder (`Path`): Where the measurements are kept.

    Returns:
        `dict`: Name of a measurement, `stage_` and the stage's, -> measurement.
    """
    cells = {}
    for name, stage in finished_stages(run):
        weights = run / "stages" / name / "model" / "model.safetensors"
        asked = {
            "stage": name,
            "weights": hashlib.sha256(weights.read_bytes()).hexdigest()[:16],
            "text": text.description,
            "tokens": SCORED_TOKENS,
            "lengths": {"autoencoded": AUTOENCODED, "copied": COPIED, "causal": ROW_LENGTH},
        }

        def measure(name: str = name, stage: dict[str, Any] = stage) -> dict[str, Any]:
            metrics = score_stage(run / "stages" / name / "model", stage["asked"], text)
            done = stage["done"]
            return {"metrics": metrics, "text_tokens": done["text_tokens"], "steps": done["steps"]}

        cells[PREFIX + name] = measure_cell(folder, PREFIX + name, asked, measure)
    return cells


def score_stage(folder: Path, stage: Mapping[str, Any], text: ClaimsText) -> dict[str, Any]:
    """Score one model.

    Args:
        folder (`Path`): The model.
        stage (`Mapping`): How the recipe describes its stage.
        text (`ClaimsText`): What it is scored on.

    Returns:
        `dict`: Suite -> condition -> metrics. The condition `memory` is the model as it is meant to be used, on the
        run's own test text; `news` and `random` are the same on other text.
    """
    if stage["kind"] == "causal_lm":
        return _causal(AutoModelForCausalLM.from_pretrained(folder), text, stage["data"]["window_length"])
    model, _, _ = load_model(str(folder))
    if stage["kind"] == "autoencoder":
        return _with_domains("retention", model, text, AUTOENCODED, "reconstruction")
    copies = {"marker": stage["data"]["marker"]}
    return {
        **_with_domains("copy", model, text, COPIED, "copy", **copies),
        **_with_domains("blank_copy", model, text, COPIED, "blank_copy", **copies),
        **_with_domains("clm", model, text, ROW_LENGTH, "causal"),
    }


def _causal(model: PreTrainedModel, text: ClaimsText, window_length: int | None) -> dict[str, Any]:
    """Next tokens of whole rows, or of windows that each begin anew; the same targets either way."""
    evaluation = text.evaluation(model, window_length=window_length or ROW_LENGTH)
    found = {}
    for domain in DOMAINS:
        scores = score_rows(evaluation, "causal", text.rows(domain, ROW_LENGTH))
        found[_condition(domain)] = summarise(scores, evaluation.vocab_size, ROW_LENGTH)
    return {"clm": _only_books_by_row(found)}


def _with_domains(
    suite: str, model: PreTrainedModel, text: ClaimsText, length: int, objective: str, **options: Any
) -> dict[str, Any]:
    """A suite with its controls on the run's own text, and without them on the other domains."""
    evaluation = text.evaluation(model, **options)
    scores: dict[str, Scores] = score_suite(evaluation, suite, text.rows("books", length))
    for domain in DOMAINS[1:]:
        scores[domain] = score_rows(evaluation, objective, text.rows(domain, length))
    period = evaluation.chunk_length if suite == "retention" else length
    found = {name: summarise(part, evaluation.vocab_size, period) for name, part in scores.items()}
    return {suite: _only_books_by_row(found)}


def _condition(domain: str) -> str:
    return "memory" if domain == "books" else domain


def _only_books_by_row(found: dict[str, Any]) -> dict[str, Any]:
    """Keep numbers by row where models are compared row by row."""
    return {name: part if name in ("memory", "no_memory") else without_rows(part) for name, part in found.items()}


def describe_stages(run: Path) -> dict[str, Any]:
    """What each finished stage is, what it cost, and how it learnt.

    Returns:
        `dict`: Stage -> `kind`, `from`, `model`, `objectives`, `seed`, `parameters`, `steps`, `text_tokens`,
        `seconds`, `curve` by objective (points of step, loss and token accuracy on the training rows), and
        `gradient_norms`, their median and largest behind the warm-up.
    """
    return {name: describe_stage(stage["asked"], stage["done"]) for name, stage in finished_stages(run)}


def describe_stage(asked: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
    """Describe one finished stage; see [`describe_stages`]."""
    logged = [entry for entry in done["series"] if "grad_norm" in entry]
    curves = {
        objective: [
            [entry["step"], round(entry[f"{objective}_loss"], 4), round(entry[f"{objective}_token_accuracy"], 4)]
            for entry in logged
            if f"{objective}_loss" in entry
        ]
        for objective in done["objectives"]
    }
    norms = sorted(entry["grad_norm"] for entry in logged if entry["step"] > 0.1 * done["steps"])
    return {
        "kind": done["kind"],
        "from": asked["from"],
        "model": asked["model"],
        "objectives": done["objectives"],
        "seed": done["seed"],
        "parameters": done["parameters"],
        "steps": done["steps"],
        "text_tokens": done["text_tokens"],
        "seconds": done["seconds"],
        "curves": curves,
        "gradient_norms": {"median": norms[len(norms) // 2], "largest": norms[-1]} if norms else None,
    }


def sizes_of(model: Mapping[str, Any]) -> dict[str, float]:
    """Tokens that share a vector, width of a vector, and numbers there are for each token.

    Args:
        model (`Mapping`): An autoencoder as the recipe describes it.

    >>> sizes_of({"chunk_length": 64, "memories_per_chunk": 2, "encoder": {"hidden_size": 128}})
    {'tokens_per_vector': 32.0, 'width': 128, 'numbers_per_token': 4.0}
    """
    vectors, width = model.get("memories_per_chunk", 1), model["encoder"]["hidden_size"]
    return {
        "tokens_per_vector": model["chunk_length"] / vectors,
        "width": width,
        "numbers_per_token": vectors * width / model["chunk_length"],
    }
