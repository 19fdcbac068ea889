"""Model cards: the template of `model_cards/`, filled from a model and the record of its run, never typed."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY

from ..places import REPOSITORY
from ..train.build import count_parameters
from .provenance import (
    OWN,
    Licence,
    is_hub_id,
    record_licence,
    recorded_bases,
    short_name,
    stage_sources,
    training_sources,
)

CARDS = REPOSITORY / "model_cards"
TEMPLATE = CARDS / "template.md"
# Where the project lives, unless pyproject.toml names another place or its publisher does.
PROJECT = "https://github.com/modeling-memory/modeling-memory"
OWN_MODELS = ("memory_encoder_decoder", "memory_autoencoder", "masked_mixer")
SECTIONS = ("What it does", "Use", "Results", "Limits", "Origin")
# Suites that show no text to the model that writes it, and those that ask for the next token.
ALONE = ("blank_copy", "retention", "autoencoder", "reconstruction")
NEXT_TOKEN = ("clm", "causal")
PIECES = ("autoencoder", "retention")  # of a text: a chunk, a window
SHOWN_TOKENS = 12
OWN_RESULTS = ("memory", "this_model", "validation_split")
CONDITIONS = {
    "memory": "",
    "this_model": "",
    "validation_split": "",
    "wrong_memory": ", another text's memories",
    "no_memory": ", no memories",
    "no_memory_model": ", a model trained without memories",
    "full_context_model": ", a model that reads the full text",
}


def render_card(
    model: PreTrainedModel, record: Mapping[str, Any] | None = None, context: Mapping[str, Any] | None = None
) -> ModelCard:
    """Fill `model_cards/template.md` from the model, the record and what its writer adds.

    Args:
        model (`PreTrainedModel`): The model.
        record (`dict`, *optional*): Record of its run; of a run's other stages as [`stage_record`] cuts it out. Its
            `card` is what an earlier writer added.
        context (`dict`, *optional*): What only the writer knows: `model_name`, `repository` (for the snippet, default
            the name), `description`, `training_data` (list of `name`, `licence`, `source`, and `license` as
            `licences.yaml` has it), `base_models` (Hub ids, folders or `package:MODULE/FOLDER`), `language` (codes),
            `licence` (of the weights, `ID` or `NAME=LINK`), `project` (its address), `reproduce`, `copy_token`,
            `references` (of a model by reference, as its config has them).

    Returns:
        [`huggingface_hub.ModelCard`]: The card, with metadata that the Hub reads.

    Raises:
        ValueError: If the context has a key that the card does not know, or the card is not valid.
    """
    record = record or {}
    fields = card_fields(model, record, context or {})
    licence = _licence(fields)
    results = result_table(record)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(thousands=lambda number: f"{number:,}")
    content = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        **{**fields, "base_models": [short_name(name) for name in fields["base_models"]], "licence": licence},
        licence_file=licence_file(licence),
        metadata=_metadata(model, record, fields, licence).to_yaml(),
        config=model.config,
        remote_code=model.config.model_type in OWN_MODELS,
        parameters=count_parameters(model)["total"],
        copied=copied_length(record),
        dtype=str(model.dtype).removeprefix("torch."),
        results=results,
        columns=list(dict.fromkeys(column for row in results.values() for column in row)),
        losses=losses(record),
        lost=lost_tokens(record),
        domains=bool(record.get("domains")),
        code={"commit": None, **record.get("code", {})},
    )
    card = ModelCard(re.sub(r"\n{3,}", "\n\n", content))
    check_card(card)
    return card


def _metadata(
    model: PreTrainedModel, record: Mapping[str, Any], fields: Mapping[str, Any], licence: Licence
) -> ModelCardData:
    """What the Hub reads: bases by their ids only, and a language only where the text's source or a writer has it."""
    sources, kind = fields["training_data"], model.config.model_type
    said = [fields["language"]] if isinstance(fields["language"], str) else list(fields["language"])
    known = sorted({source["language"] for source in sources if "language" in source})
    languages = [code for code in said if code] or known
    task = "feature-extraction" if kind == "memory_autoencoder" else "text-generation"
    return ModelCardData(
        language=languages[0] if len(languages) == 1 else languages or None,
        library_name="transformers",
        pipeline_tag=task,
        base_model=[name for name in fields["base_models"] if is_hub_id(name)] or None,
        datasets=list(dict.fromkeys(source["hub"] for source in sources if "hub" in source)) or None,
        tags=["memory", "context-compression", kind, *(["custom_code"] if kind in OWN_MODELS else [])],
        model_name=fields["model_name"],
        eval_results=metadata_results(record, sources, task) or None,
        **licence.metadata,
    )


def card_fields(model: PreTrainedModel, record: Mapping[str, Any], context: Mapping[str, Any]) -> dict[str, Any]:
    """Fill what the writer of a card did not say from its record; arguments and errors are [`render_card`]'s."""
    run = record.get("run", {})
    said = {**record.get("card", {}), **context}
    name = said.get("model_name") or run.get("recipe_name") or model.config.model_type.replace("_", "-")
    known = {
        "model_name": name,
        "repository": name,
        "description": run.get("description", ""),
        "language": [],
        "licence": "",
        "project": project_address(),
        "training_data": training_sources(record),
        "base_models": [],
        "reproduce": run.get("command", ""),
        "copy_token": "",
        "references": {},
    }
    unknown = sorted(set(said) - set(known))
    if unknown:
        raise ValueError(f"The card does not know {', '.join(unknown)}; expected some of {', '.join(known)}.")
    fields = {**known, **said}
    referred = [reference["id"] for reference in fields["references"].values()]
    return {**fields, "base_models": list(dict.fromkeys([*referred, *recorded_bases(record), *fields["base_models"]]))}


def card_licence(
    model: PreTrainedModel, record: Mapping[str, Any] | None = None, context: Mapping[str, Any] | None = None
) -> Licence:
    """Say which licence the weights have on the card that [`render_card`] makes of the same arguments."""
    return _licence(card_fields(model, record or {}, context or {}))


def _licence(fields: Mapping[str, Any]) -> Licence:
    return record_licence({}, fields["base_models"], fields["training_data"], fields["licence"])


def licence_file(licence: Licence) -> str:
    """Name the file of the code's licence: where weights have another, it must not be taken for theirs."""
    return "LICENSE" if licence.id == OWN else "LICENSE.code"


def project_address() -> str:
    """Where the project lives: as pyproject.toml says, else the constant."""
    project = REPOSITORY / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.is_file() else ""
    found = re.search(r'^(?:Repository|Source|Homepage) *= *"(https?://[^"]+)"', text, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else PROJECT


def check_card(card: ModelCard) -> None:
    """Check a card as far as that goes without the Hub: the client's parsing, sections, task, ids, results.

    Raises:
        ValueError: Naming what is wrong.
    """
    again = ModelCard(str(card))  # parses the metadata as the client does, `model-index` included
    data: Any = again.data
    missing = [key for key in ("license", "library_name", "pipeline_tag", "tags") if not getattr(data, key, None)]
    if missing:
        raise ValueError(f"the card's metadata lacks {', '.join(missing)}")
    if data.pipeline_tag not in PIPELINE_REGISTRY.get_supported_tasks():
        raise ValueError(f"the card's pipeline_tag is {data.pipeline_tag!r}, a task that the library does not know")
    base_models = data.base_model or []
    for repo_id in [*([base_models] if isinstance(base_models, str) else base_models), *(data.datasets or [])]:
        validate_repo_id(repo_id)
    for result in data.eval_results or []:
        if not isinstance(result.metric_value, int | float) or not math.isfinite(result.metric_value):
            raise ValueError(f"the card's result {result.metric_type} is {result.metric_value!r}, expected a number")
    headings = re.findall(r"^## (.+)$", again.text, re.MULTILINE)
    lacking = [section for section in SECTIONS if section not in headings]
    if lacking:
        raise ValueError(f"the card has no section {', '.join(lacking)}; they belong into {TEMPLATE.name}")
    left = re.search(r"\{\{|\{%|More Information Needed", again.text)
    if left:
        raise ValueError(f"the card still holds {left.group()!r}; the template was not filled")


def copied_length(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how many tokens the published stage learnt to copy: `exactly`, whole `windows` up to, or `any` up to.

    >>> stage = {"name": "copy", "objectives": {"copy": 1.0}, "data": {"row_length": 64, "vary_source": True}}
    >>> copied_length({"published_stage": "copy", "recipe": {"stages": [stage]}})
    {'tokens': 64, 'lengths': 'windows'}
    """
    stages = {stage["name"]: stage for stage in record.get("recipe", {}).get("stages", [])}
    stage = stages.get(record.get("published_stage"))
    if stage is None or not {"copy", "blank_copy"} & set(stage.get("objectives") or {}):
        return None
    data = stage["data"]
    lengths = "any" if data.get("shortened") else "windows" if data.get("vary_source") else "exactly"
    tokens = data.get("source_length") or data["row_length"]
    earlier = copied_length({**record, "published_stage": (stage.get("from") or {}).get("model")})
    if (
        lengths == "any" and earlier is not None
    ):  # of any length, so what an earlier stage learnt of longer ones counts
        tokens = max(tokens, earlier["tokens"])
    return {"tokens": tokens, "lengths": lengths}


def result_table(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """A card's table of results: a text and condition -> way of asking -> what came back of it.

    >>> copy = {"memory": {"token_accuracy": 0.98, "generated_token_accuracy": 0.7, "exact_match": 0.5}}
    >>> result_table({"metrics": {"copy": copy}})["test split"]
    {'teacher-forced': '98.00', 'free-running': '70.00', 'whole texts': '50 %'}
    """
    rows: dict[str, dict[str, str]] = {}
    measured = list(_measured_texts(record))
    asked = {suite for _, suites in measured for suite in suites}
    copies = bool({"blank_copy", "copy"} & asked)
    # What is asked for beside whole copies is in the record.
    left_out = (*NEXT_TOKEN, *(ALONE if "copy" in asked else PIECES if copies else ()))
    for text, suites in measured:
        for suite, condition, values in _conditions(suites):
            if suite in left_out or (condition not in OWN_RESULTS and text != "test split"):
                continue
            row = rows.setdefault(_label(text, condition), {})
            if suite == "copy":
                row |= _copy_cells(values)
            elif "token_accuracy" in values:
                row["memories alone" if copies else "tokens right"] = _share(values, "token_accuracy")
                for length, found in ({} if copies else values.get("short_chunks", {})).items():
                    row[f"only {length} tokens"] = _share(found, "token_accuracy")
    return {label: row for label, row in rows.items() if row}


def losses(record: Mapping[str, Any]) -> list[str]:
    """A card's next-token losses, each with the text and condition that it is of.

    >>> losses({"metrics": {"clm": {"memory": {"loss": 3.0}, "no_memory": {"loss": 3.5}}}})
    ['test split 3.000', 'test split, no memories 3.500']
    """
    return [
        f"{_label(text, condition)} {values['loss']:.3f}{_around(values, 'loss', 3)}"
        for text, suites in _measured_texts(record)
        for suite, condition, values in _conditions(suites)
        if suite in NEXT_TOKEN and "loss" in values
    ]


def lost_tokens(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a record knows of tokens that never come back: how many of which, in how many tries, and `shown` ones.

    >>> domain = {"description": "all", "metrics": {}, "lost_tokens": ["x", "Ð"], "tries": 4, "num_tokens": 9}
    >>> lost_tokens({"domains": {"every_token": domain}})
    {'count': 2, 'num_tokens': 9, 'tries': 4, 'shown': ['x']}
    """
    for domain in record.get("domains", {}).values():
        if "lost_tokens" in domain:
            readable = [token for token in domain["lost_tokens"] if token.isascii() and token.strip().isprintable()]
            shown = sorted(dict.fromkeys(filter(None, map(str.strip, readable))), key=len)[:SHOWN_TOKENS]
            numbers = {name: domain[name] for name in ("num_tokens", "tries")}
            return {"count": len(domain["lost_tokens"]), **numbers, "shown": shown}
    return None


def metadata_results(
    record: Mapping[str, Any], sources: Sequence[Mapping[str, str]], task: str = "text-generation"
) -> list[EvalResult]:
    """What the model itself reached on its test split, as the Hub shows it: one dataset, many metrics."""
    name = "; ".join(source["name"] for source in sources) or "held-out text"
    titles = {
        "token_accuracy": "token accuracy",
        "generated_token_accuracy": "token accuracy, free-running",
        "exact_match": "exact match, free-running",
    }
    found = []
    suites = record.get("metrics", {})
    copies = bool({"blank_copy", "copy"} & set(suites))
    for suite, condition, values in _conditions(suites):
        if copies and suite in PIECES:
            continue
        split = "validation" if condition == "validation_split" else "test"
        task_name = "next token" if suite in NEXT_TOKEN else suite.replace("_", " ")
        for metric, title in titles.items():
            if condition in OWN_RESULTS and metric in values:
                forced = ", teacher-forced" if metric == "token_accuracy" and suite not in ALONE else ""
                found.append(
                    EvalResult(
                        task_type=task,
                        dataset_type="text",
                        dataset_name=f"{name}, {split} split",
                        dataset_split=split,
                        metric_type=metric.removeprefix("generated_"),
                        metric_name=f"{task_name}: {title}{forced}",
                        metric_value=values[metric],
                    )
                )
    return found


def _measured_texts(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield what a record measured: of the test split, then of other text."""
    yield "test split", record.get("metrics", {})
    for domain in record.get("domains", {}).values():
        yield domain["description"], domain["metrics"]


def _conditions(suites: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield suite, condition and metrics of what a card can name."""
    for suite, conditions in suites.items():
        if suite in (*ALONE, *NEXT_TOKEN, "copy") and isinstance(conditions, Mapping):
            for condition, values in conditions.items():
                if condition in CONDITIONS and isinstance(values, Mapping):
                    yield suite, condition, values


def _label(text: str, condition: str) -> str:
    return ("validation split" if condition == "validation_split" else text) + CONDITIONS[condition]


def _copy_cells(values: Mapping[str, Any]) -> dict[str, str]:
    shares = {"teacher-forced": "token_accuracy", "free-running": "generated_token_accuracy"}
    cells = {title: _share(values, name) for title, name in shares.items() if name in values}
    return cells | ({"whole texts": _whole(values)} if "exact_match" in values else {})


def _whole(values: Mapping[str, Any]) -> str:
    """How many texts came back without an error."""
    total, share = values.get("num_generated_rows"), values["exact_match"]
    return f"{round(share * total)} of {total}" if total else f"{share:.0%}".replace("%", " %")


def _share(values: Mapping[str, Any], name: str) -> str:
    """A share in percent, with its interval where there is one."""
    return f"{100 * values[name]:.2f}{_around(values, name, 2, 100)}"


def _around(values: Mapping[str, Any], name: str, digits: int, scale: float = 1.0) -> str:
    """The wider side of a value's interval, where there is one."""
    ends = values.get(f"{name}_interval")
    return f" ±{scale * max(abs(end - values[name]) for end in ends):.{digits}f}" if ends else ""


def stage_record(record: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Cut out of a run's record what is true of one of its stages.

    The published stage has the metrics of the run. An autoencoder that the run measured has those, the baselines of
    `clm` have their own row, and a stage that the test split was not asked of has what was last measured on the
    validation split while it trained.

    Args:
        record (`dict`): Record of a run.
        stage (`str`): Name of the stage.

    Returns:
        `dict`: A record with the stages that led to this one, and the metrics of this one.

    Raises:
        ValueError: If the run has no such stage.
    """
    stages = record.get("stages", {})
    if stage not in stages:
        raise ValueError(f"the record has no stage {stage!r}; it has {', '.join(stages) or 'none'}")
    needed = stage_sources(record["recipe"], stage)
    cut: dict[str, Any] = {
        **record,
        "published_stage": stage,
        "parameters": stages[stage]["parameters"],
        "stages": {name: entry for name, entry in stages.items() if name in needed},
        "metrics": _stage_metrics(record, stage),
    }
    if stage != record.get("published_stage"):
        cut["sample"] = None
        cut.pop("hub", None)
        cut.pop("domains", None)
    return cut


def _stage_metrics(record: Mapping[str, Any], stage: str) -> dict[str, Any]:
    metrics, evaluation = record.get("metrics", {}), record["recipe"].get("evaluation", {})
    if stage == record.get("published_stage"):
        return dict(metrics)
    if stage == evaluation.get("autoencoder") and "autoencoder" in metrics:
        return {"retention": metrics["autoencoder"]}
    for baseline in ("no_memory", "full_context"):
        if stage == evaluation.get(baseline) and f"{baseline}_model" in metrics.get("clm", {}):
            return {"clm": {"this_model": metrics["clm"][f"{baseline}_model"]}}
    logs = [log for log in record["stages"][stage].get("series", []) if "eval_loss" in log]
    if not logs:
        return {}
    shown = ("loss", "token_accuracy")
    return {
        objective: {
            "validation_split": {
                name: logs[-1][f"eval_{objective}_{name}"] for name in shown if f"eval_{objective}_{name}" in logs[-1]
            }
        }
        for objective in record["stages"][stage]["objectives"]
    }
