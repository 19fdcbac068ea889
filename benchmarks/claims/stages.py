"""The models of `configuration/recipes/claims.yaml`, each scored on the same rows of text as soon as it is trained.

| kind of stage | scored on |
|---|---|
| autoencoder | retention with another text's vector and with none; news and random tokens |
| memory | copy and blank copy of 32 tokens with both controls, next tokens in rows of 128; the same of random tokens |
| causal LM | next tokens in rows of 128, read whole, or in windows where it was trained in windows |

What a stage cost and how it learnt is read from its `stage.json`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.claims.cells import Cell, measure_cell
from benchmarks.claims.scoring import DOMAINS, SCORED_TOKENS, ClaimsText, score_rows, summarise, without_rows
from training.evaluate import load_model
from training.measure.suites import Evaluation, score_suite
from training.records.record import read_json

COPIED, ROW_LENGTH, AUTOENCODED = 32, 128, 64
COPIED_TOKENS = 16_384
OTHER_DOMAINS = DOMAINS[1:]
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
            "tokens": {"copied": COPIED_TOKENS, "others": SCORED_TOKENS},
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
        evaluation = text.evaluation(model)
        return {"retention": _with_domains("retention", evaluation, text, "reconstruction", AUTOENCODED)}
    evaluation = text.evaluation(model, marker=stage["data"]["marker"])
    # The controls of next tokens read every window behind all of another text's: only where they are asked for.
    controls = "causal" in stage["objectives"]
    return {
        "copy": _with_domains("copy", evaluation, text, "copy", COPIED, ["random"], num_tokens=COPIED_TOKENS),
        "blank_copy": _with_domains(
            "blank_copy", evaluation, text, "blank_copy", COPIED, [], num_tokens=COPIED_TOKENS
        ),
        "clm": _with_domains("clm", evaluation, text, "causal", ROW_LENGTH, controls=controls),
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
    suite: str,
    evaluation: Evaluation,
    text: ClaimsText,
    objective: str,
    length: int,
    domains: Sequence[str] = OTHER_DOMAINS,
    *,
    num_tokens: int = SCORED_TOKENS,
    controls: bool = True,
) -> dict[str, Any]:
    """A suite with its controls on the run's own text, and without them on other domains."""
    rows = text.rows("books", length, num_tokens)
    scores = score_suite(evaluation, suite, rows) if controls else {"memory": score_rows(evaluation, objective, rows)}
    for domain in domains:
        scores[domain] = score_rows(evaluation, objective, text.rows(domain, length, num_tokens))
    period = evaluation.chunk_length if suite == "retention" else length
    return _only_books_by_row({name: summarise(part, evaluation.vocab_size, period) for name, part in scores.items()})


def _condition(domain: str) -> str:
    return "memory" if domain == "books" else domain


def _only_books_by_row(found: dict[str, Any]) -> dict[str, Any]:
    """Keep numbers by row where models are compared row by row."""
    by_row = ("memory", "wrong_memory", "no_memory")
    return {name: part if name in by_row else without_rows(part) for name, part in found.items()}


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
