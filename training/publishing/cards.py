"""Model cards: the template of `model_cards/`, filled from a model and the record of its run, never typed."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY

from training.data.sources import HUB, HubDataset
from training.places import REPOSITORY
from training.recipes.strict_yaml import parse_yaml
from training.records.sample import sample_lines
from training.train.build import count_parameters

CARDS = REPOSITORY / "model_cards"
TEMPLATE = CARDS / "template.md"
SOURCES = CARDS / "sources.yaml"
OWN_MODELS = ("memory_encoder_decoder", "memory_autoencoder", "masked_mixer")
SHOWN_METRICS = (
    "token_accuracy",
    "token_accuracy_interval",
    "exact_match",
    "loss",
    "information_ratio",
    "bits_per_byte",
    "num_tokens",
)
SECTIONS = (
    "What it does, and what it does not",
    "Use",
    "Architecture",
    "Training data",
    "Results",
    "Compute",
    "Reproduce",
    "Limits",
    "Privacy",
    "Licence",
)


def render_card(
    model: PreTrainedModel, record: Mapping[str, Any] | None = None, context: Mapping[str, Any] | None = None
) -> ModelCard:
    """Fill `model_cards/template.md` from the model, the record and what its writer adds.

    Args:
        model (`PreTrainedModel`): The model.
        record (`dict`, *optional*): Record of its run; of a run's other stages as [`stage_record`] cuts it out.
        context (`dict`, *optional*): What only the writer knows: `model_name`, `repository` (for the snippet, default
            the name), `description`, `training_data` (list of `name`, `licence`, `source`), `base_models` (ids on the
            Hub), `reproduce`, `example`, `copy_token`, `references` (of a model by reference, as its config has them).

    Returns:
        [`huggingface_hub.ModelCard`]: The card, with metadata that the Hub reads.

    Raises:
        ValueError: If the context has a key that the card does not know, or the card is not valid.
    """
    record = record or {}
    name = record.get("run", {}).get("recipe_name") or model.config.model_type.replace("_", "-")
    known = {
        "model_name": name,
        "repository": (context or {}).get("model_name") or name,
        "description": "",
        "language": "",
        "training_data": training_sources(record),
        "base_models": [],
        "reproduce": record.get("run", {}).get("command", ""),
        "example": _example(record),
        "copy_token": "",
        "references": {},
    }
    unknown = sorted(set(context or {}) - set(known))
    if unknown:
        raise ValueError(f"The card does not know {', '.join(unknown)}; expected some of {', '.join(known)}.")
    fields: dict[str, Any] = {**known, **(context or {})}
    referred = [reference["id"] for reference in fields["references"].values()]
    fields["base_models"] = list(dict.fromkeys([*referred, *fields["base_models"]]))
    sources = fields["training_data"]
    results = card_results(record)
    remote_code = model.config.model_type in OWN_MODELS
    metadata = ModelCardData(
        language=fields["language"] or _only({source["language"] for source in sources if "language" in source}),
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="feature-extraction" if model.config.model_type == "memory_autoencoder" else "text-generation",
        base_model=fields["base_models"] or None,
        datasets=list(dict.fromkeys(source["hub"] for source in sources if "hub" in source)) or None,
        tags=["memory", "context-compression", model.config.model_type, *(["custom_code"] if remote_code else [])],
        model_name=fields["model_name"],
        eval_results=_metadata_results(results, sources, record) or None,
    )
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(
        thousands=lambda number: f"{number:,}", percent=lambda share: f"{100 * share:.2f} %", spaced=_spaced
    )
    content = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        **fields,
        metadata=metadata.to_yaml(),
        config=model.config,
        remote_code=remote_code,
        parameters=_parameters(model),
        copied=copied_length(record),
        dtype=str(model.dtype).removeprefix("torch."),
        results=results,
        domains=card_domains(record),
        compute=card_compute(record),
        files=training_files(record),
        record=record,
    )
    card = ModelCard(re.sub(r"\n{3,}", "\n\n", content))
    check_card(card)
    return card


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


def training_sources(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return name, licence and source of the text that a run trained on, as `model_cards/sources.yaml` has them.

    >>> files = {"data": {"train": ["training/corpora/wikinews/train.parquet", "mine.txt"]}}
    >>> [source["licence"] for source in training_sources({"recipe": files})]
    ['CC BY 2.5', 'not recorded']
    """
    known = parse_yaml(SOURCES.read_text(encoding="utf-8"), SOURCES.name)
    patterns = list(record.get("recipe", {}).get("data", {}).get("train", []))
    files = record.get("inputs", {}).get("files", {}).get("train", {})
    sources: dict[str, dict[str, str]] = {}
    for name in [*patterns, *files]:  # a glob pattern may hide what the names of its files tell
        if name.startswith(HUB):
            data = HubDataset.parse(name)
            source = f"https://huggingface.co/datasets/{data.name} at {data.revision}"
            sources[name] = {"name": data.name, "licence": "see its card", "source": source, "hub": data.name}
            continue
        corpus = next((corpus for corpus in known if re.search(rf"(^|/){corpus}[/_]", name)), None)
        if corpus is not None:
            sources[corpus] = known[corpus]
        elif "*" not in name and not any(pattern.endswith(f"/{name}") for pattern in patterns):
            sources[name] = {"name": Path(name).name, "licence": "not recorded", "source": "not recorded"}
    return list(sources.values())


def training_files(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every file that a run read: split, name, SHA-256."""
    return [
        {"split": split, "name": name, "sha256": checksum}
        for split, files in record.get("inputs", {}).get("files", {}).items()
        if isinstance(files, Mapping)
        for name, checksum in files.items()
    ]


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


def card_results(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Flatten the metrics of a record into the rows of a table: one for each suite, condition and shorter length.

    >>> card_results({"metrics": {"copy": {"memory": {"token_accuracy": 0.98, "num_tokens": 100}}}})
    [{'suite': 'copy', 'condition': 'memory', 'token_accuracy': 0.98, 'num_tokens': 100}]
    >>> short = {"token_accuracy": 0.9, "num_tokens": 50}
    >>> card_results({"metrics": {"retention": {"memory": {"loss": 0.1, "short_chunks": {"8": short}}}}})[1]
    {'suite': 'retention', 'condition': 'memory, only 8 tokens', 'token_accuracy': 0.9, 'num_tokens': 50}
    """
    rows = []
    for suite, conditions in record.get("metrics", {}).items():
        if not isinstance(conditions, Mapping):
            continue
        for condition, values in _with_short_ones(conditions):
            if isinstance(values, Mapping) and any(name in values for name in SHOWN_METRICS[:-1]):
                kept = {name: values[name] for name in SHOWN_METRICS if values.get(name) is not None}
                rows.append({"suite": suite, "condition": condition, **kept})
    return rows


def _with_short_ones(conditions: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield a suite's conditions, each followed by what was measured of shorter texts under it."""
    for condition, values in conditions.items():
        yield condition, values
        if isinstance(values, Mapping):
            for key in ("short_chunks", "short_sources"):
                for length, found in values.get(key, {}).items():
                    yield f"{condition}, only {length} tokens", found


def card_domains(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of other domains, as `training.domains` measured them: domain and description beside results.

    >>> score = {"memory": {"token_accuracy": 0.5, "num_tokens": 9}}
    >>> card_domains({"domains": {"digits": {"description": "digits", "metrics": {"retention": score}}}})
    [{'domain': 'digits', 'description': 'digits', 'suite': 'retention', 'condition': 'memory', 'token_accuracy': 0.5, 'num_tokens': 9}]
    """  # noqa: E501 (a doctest's output is one line)
    return [
        {"domain": name, "description": domain["description"], **row}
        for name, domain in record.get("domains", {}).items()
        for row in card_results(domain)
    ]


def card_compute(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of compute: every stage with its steps, tokens, seconds and peak of memory."""
    return [
        {
            "stage": name,
            "steps": stage["steps"],
            "text_tokens": stage["text_tokens"],
            "seconds": stage["seconds"],
            "peak_bytes": stage["peak_memory_bytes"].get("gpu") or stage["peak_memory_bytes"]["process"],
        }
        for name, stage in record.get("stages", {}).items()
        if "seconds" in stage
    ]


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
    recipes = {entry["name"]: entry for entry in record["recipe"]["stages"]}
    needed = [stage]
    for name in needed:  # grows while it is read
        sources = [
            *(recipes[name].get("from") or {}).values(),
            (recipes[name].get("warm_start") or {}).get("tables_from"),
        ]
        needed += [source for source in sources if source and source not in needed]
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


def _metadata_results(
    results: Sequence[Mapping[str, Any]], sources: Sequence[Mapping[str, str]], record: Mapping[str, Any]
) -> list[EvalResult]:
    """What the model itself reached, as the Hub shows it beside a model; controls stay in the table."""
    name = ", ".join(source["name"] for source in sources) or "held-out text"
    found = []
    for row in results:
        split = "validation" if row["condition"] == "validation_split" else "test"
        if row["condition"] not in ("memory", "this_model", "validation_split"):
            continue
        files = record.get("inputs", {}).get("files", {}).get(split)
        checksums = list(files.values()) if isinstance(files, Mapping) else []
        for metric, title in (("token_accuracy", "token accuracy"), ("exact_match", "exact match")):
            if metric in row:
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type="text",
                        dataset_name=f"{name}, {split} split ({row['suite']})",
                        dataset_config=row["suite"],
                        dataset_split=split,
                        dataset_revision=checksums[0] if len(checksums) == 1 else None,
                        metric_type=metric,
                        metric_name=f"{title}, {_spaced(row['suite'])}",
                        metric_value=row[metric],
                    )
                )
    return found


def _parameters(model: PreTrainedModel) -> dict[str, int]:
    """Numbers of parameters: all, trainable, and of each part of the model."""
    parts = {name: count_parameters(part)["total"] for name, part in model.named_children()}
    return {**count_parameters(model), **{name: count for name, count in parts.items() if count}}


def _example(record: Mapping[str, Any]) -> str:
    """The sample of a run: a text, its memories, and what was regenerated from them."""
    if not record.get("sample"):
        return ""
    lines = "\n".join(sample_lines(record["sample"]))
    return f"From the run that made this model, on its test split:\n\n~~~~text\n{lines}\n~~~~"


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _only(values: set[str]) -> list[str] | str:
    ordered = sorted(values)
    return ordered[0] if len(ordered) == 1 else ordered or "en"
