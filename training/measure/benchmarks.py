"""Benchmarks in all modes side by side, on the same rows: what is left of a score when a context becomes memories.

The tasks and the ways of reading are those of `modeling_memory/harness`. A mode is compared with the full text item by
item, so intervals of a difference are those of paired items.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .metrics import bootstrap_interval

MODES = ("full", "memory", "truncated", "none")
LIBRARY = "lm_eval"
# The metric that a task is told by; of the others all numbers are in the record.
HEADLINES = (
    "acc_norm", "acc", "f1", "rouge_l", "score", "contains", "words_in_place", "exact_match", 
    "prompt_level_strict_acc", "word_perplexity",
)  # fmt: skip
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}


def task_names(given: str | None) -> list[str]:
    """Return the tasks that were asked for; all by default.

    Raises:
        ValueError: If the harness is not installed or a task is unknown.
    """
    if importlib.util.find_spec(LIBRARY) is None:
        raise ValueError('the suite benchmarks runs on lm-evaluation-harness; pip install "modeling-memory[eval]"')
    from modeling_memory.harness.__main__ import TASKS

    known = sorted(path.stem for path in TASKS.glob("*.yaml"))
    names = known if given is None else [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"--tasks names {name!r}; expected some of {', '.join(known)}")
    return names


def measure_benchmarks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    data: str,
    name: str,
    limit: int,
    batch_size: int = 1,
    clear: int | None = None,
    min_memory_chunks: int = 1,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run tasks in every mode.

    Args:
        model (`PreTrainedModel`): A memory encoder-decoder, or any causal LM, which is read in full only.
        tokenizer (`Any`): Its tokenizer or processor.
        tasks (`Sequence[str]`): Names of tasks.
        data (`str`): Folder of the benchmarks' files.
        name (`str`): Folder or Hub id of the tokenizer, by which needles are cut to their size.
        limit (`int`): Most items of a task, the first in the harness's order.
        batch_size (`int`): Requests at a time.
        clear (`int`, *optional*): Tokens of a context that are read as text. Default: the model's window.
        min_memory_chunks (`int`): Chunks of a context that become memories however short it is.
        keep (`Callable`, *optional*): Is given what is measured so far after each task.

    Returns:
        `dict`: Task -> `headline`, and `modes`: mode -> metrics with intervals, or `refused` with the reason.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from modeling_memory.harness.__main__ import TASKS
    from modeling_memory.harness.adapter import MemoryLM, NoMemoryReadError

    metadata = {"data": data, "tokenizer": name}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    measured: dict[str, Any] = {}
    for task in tasks:
        items: dict[str, dict[str, list[Any]]] = {}
        modes: dict[str, Any] = {}
        for mode in MODES if hasattr(model, "encode_memories") else MODES[:1]:
            lm = MemoryLM(
                model, tokenizer, mode, clear, min_memory_chunks, batch_size, device=str(model.device)
            )  # fmt: skip
            try:
                found = simple_evaluate(
                    lm, tasks=[task], limit=limit, task_manager=manager, bootstrap_iters=0, **SEEDS
                )
            except NoMemoryReadError as error:
                modes[mode] = {"refused": str(error)}
                continue
            items[mode] = _items(found["samples"][task])
            modes[mode] = {"scores": _scores(found["results"][task], items[mode]), "counts": dict(lm.counts[task])}
        for mode, values in items.items():
            if mode != "full":
                modes[mode]["minus_full"] = _differences(values, items["full"])
        measured[task] = {"headline": headline(modes["full"]["scores"]), "modes": modes}
        if keep is not None:
            keep(dict(measured))
    return measured


def headline(scores: dict[str, Any]) -> str:
    """Name the metric that a task is told by.

    >>> headline({"acc": {}, "acc_norm": {}})
    'acc_norm'
    """
    return next(
        (metric for wanted in HEADLINES for metric in scores if metric.split(",")[0] == wanted), next(iter(scores))
    )


def _items(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Metric -> value of each item, those of every filter."""
    found: dict[str, list[Any]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        for metric in sample["metrics"]:
            found.setdefault(metric + suffix, []).append(sample[metric])
    return found


def _scores(results: dict[str, Any], items: dict[str, list[Any]]) -> dict[str, Any]:
    """Each metric as the harness aggregates it, with an interval over items where it is their mean."""
    scores: dict[str, dict[str, Any]] = {}
    for name, value in results.items():
        metric, _, filtered = name.partition(",")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or metric.endswith("_stderr"):
            continue
        key = metric if filtered in ("", "none") else name
        if key not in items:
            continue
        scores[key] = {"value": float(value), "num_items": len(items[key])}
        numbers = _numbers(items[key])
        if numbers is not None and abs(float(numbers.mean()) - value) < 1e-9:
            scores[key]["interval"] = list(bootstrap_interval(numbers))
        elif numbers is None and metric.endswith(("perplexity", "per_byte")):
            scores[key]["nats_interval"] = list(bootstrap_interval(*_losses(items[key])))
    return scores


def _numbers(values: list[Any]) -> torch.Tensor | None:
    if not all(isinstance(value, (int, float)) for value in values):
        return None
    return torch.tensor([float(value) for value in values], dtype=torch.double)


def _losses(values: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats and units (words or bytes) of each text."""
    pairs = torch.tensor([[float(part) for part in value] for value in values], dtype=torch.double)
    return -pairs[:, 0], pairs[:, 1]


def _differences(items: dict[str, list[Any]], full: dict[str, list[Any]]) -> dict[str, Any]:
    """Mean difference to the full text with its interval, item by item; for perplexities in nats per unit."""
    found = {}
    for metric, values in items.items():
        reference = full.get(metric, [])
        if len(reference) != len(values) or not values:
            continue
        ours, theirs = _numbers(values), _numbers(reference)
        if ours is not None and theirs is not None:
            gap = ours - theirs
            found[metric] = {"value": float(gap.mean()), "interval": list(bootstrap_interval(gap))}
        elif isinstance(values[0], tuple):
            (nats, units), (other, _) = _losses(values), _losses(reference)
            value = float((nats - other).sum() / units.sum())
            found[metric] = {"value": value, "interval": list(bootstrap_interval(nats - other, units)), "unit": "nats"}
    return found


def benchmark_lines(measured: dict[str, Any]) -> list[str]:
    r"""Lines to print: each score beside the share of requests that went through memories.

    >>> score = {"scores": {"acc": {"value": 0.5, "num_items": 2}}, "counts": {"requests": 8, "memory_requests": 6}}
    >>> print("\n".join(benchmark_lines({"boolq": {"headline": "acc", "modes": {"memory": score}}})))
    task                 metric             mode           score  items  through memories
    boolq                acc                memory        0.5000      2              75%
    """
    lines = [f"{'task':20} {'metric':18} {'mode':10} {'score':>9} {'items':>6} {'through memories':>17}"]
    for task, result in measured.items():
        for mode, values in result["modes"].items():
            if "refused" in values:
                lines.append(f"{task:20} {result['headline']:18} {mode:10} refused: {values['refused']}")
                continue
            score, counts = values["scores"][result["headline"]], values["counts"]
            share = counts["memory_requests"] / max(1, counts["requests"])
            lines.append(
                f"{task:20} {result['headline']:18} {mode:10} {score['value']:9.4f} "
                f"{score['num_items']:6} {share:17.0%}"
            )
    return lines
