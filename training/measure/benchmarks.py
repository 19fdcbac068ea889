"""Benchmarks in all modes side by side, on the same rows: what is left of a score when a context becomes memories.

The tasks and the ways of reading are those of `modeling_memory/harness`. Modes are compared item by item, so intervals
of a difference or a share are those of paired items.
"""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..data.tokenizer import tokenizer_checksum
from ..records.record import Cells, data_digest, describe_code
from .metrics import bootstrap_interval

MODES = ("full", "memory", "truncated", "none")
LANGUAGE = ("hellaswag", "arc_easy", "lambada_openai")
"""Tasks that are also read in full after a memory of another text: what it takes from the decoder's language."""
LIBRARY = "lm_eval"
PER_UNIT = ("perplexity", "per_byte")
# The metric that a task is told by; of the others all numbers are in the record.
HEADLINES = (
    "acc_norm", "acc", "f1", "rouge_l", "score", "contains", "words_in_place", "exact_match", 
    "prompt_level_strict_acc", "word_perplexity",
)  # fmt: skip
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
CHANCE = {
    **dict.fromkeys(("hellaswag", "arc_easy", "arc_challenge", "openbookqa", "mmlu"), 0.25),
    "winogrande": 0.5,
    "boolq": 0.622,  # of the validation file, who always says yes
}
WRITTEN = 0.1
"""What a task that is answered freely must reach before its memories are said to retain something."""


def chosen_tasks(given: str | None, limit: int) -> dict[str, int]:
    """Return the tasks that were asked for, all by default, with the most items of each: `NAME` or `NAME=ITEMS`.

    Raises:
        ValueError: If the harness is not installed, a task is unknown or its number none.
    """
    if importlib.util.find_spec(LIBRARY) is None:
        raise ValueError('the suite benchmarks runs on lm-evaluation-harness; pip install "modeling-memory[eval]"')
    from modeling_memory.harness.__main__ import TASKS

    known = sorted(path.stem for path in TASKS.glob("*.yaml"))
    words = known if given is None else [word.strip() for word in given.split(",") if word.strip()]
    chosen: dict[str, int] = {}
    for word in words:
        name, _, number = word.partition("=")
        if name not in known:
            raise ValueError(f"--tasks names {name!r}; expected some of {', '.join(known)}")
        if not (number or "1").isdigit() or number == "0":
            raise ValueError(f"--tasks asks for {number!r} items of {name}; expected a whole number of 1 or more")
        chosen[name] = int(number or limit)
    return chosen


def measure_benchmarks(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, int],
    *,
    data: str,
    name: str,
    cells: Cells,
    inputs: Any = None,
    modes: Sequence[str] = MODES,
    sizes: Sequence[int] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
    **cut: Any,
) -> dict[str, Any]:
    """Run tasks in every mode.

    What is measured is kept by what it depends on: the weights (those of the decoder alone where no memory is read),
    tokenizer, files, items and the cut. So a decoder that others have measured, or another state of the same memory
    model, is not measured again.

    Args:
        model (`PreTrainedModel`): A memory encoder-decoder, or any causal LM, which is read in full only.
        tokenizer (`Any`): Its tokenizer or processor.
        tasks (`Mapping[str, int]`): Names of tasks, with the most items of each: the first in the harness's order.
        data (`str`): Folder of the benchmarks' files.
        name (`str`): Folder or Hub id of the tokenizer, by which needles are cut to their size.
        cells (`Cells`): What has been measured before.
        inputs (`Any`): Checksums of the files.
        modes (`Sequence[str]`): Ways of reading; those that need memories are left out without any.
        sizes (`Sequence[int]`, *optional*): Tokens of needle prompts. Default: all.
        keep (`Callable`, *optional*): Is given what is measured so far after each task.
        cut (`Any`): `clear`, `min_memory_chunks`, `begin` and `batch_size` of the adapter.

    Returns:
        `dict`: Task -> `headline`, `solved`, and `modes`: mode -> metrics with intervals, or the reason why it was
        `refused`.
    """
    hashes, code = weight_hashes(model), describe_code()
    depends = [tokenizer_checksum(getattr(tokenizer, "tokenizer", tokenizer)), inputs, cut]
    metadata = {"data": data, "tokenizer": name, **({"sizes": list(sizes)} if sizes else {})}
    measured: dict[str, Any] = {}
    for task, limit in tasks.items():
        found: dict[str, Any] = {}
        for mode in modes if hasattr(model, "encode_memories") else ("full",):
            if mode == "unrelated" and task not in LANGUAGE:
                continue
            weights = hashes["model" if mode in ("memory", "unrelated") else "decoder"]
            key = data_digest([weights, *depends, limit, metadata.get("sizes") if task.startswith("needle") else None])
            run = partial(run_mode, model, tokenizer, task, mode, limit, metadata, cut, code)
            found[mode] = cells.get(f"{task} {mode} {key}", run)
        measured[task] = compare_modes(task, found)
        if keep is not None:
            keep(dict(measured))
    return measured


def weight_hashes(model: Any) -> dict[str, str]:
    """SHA-256 of all weights, and of the decoder's without adapters."""
    from modeling_memory.memory_saving import state_hash

    decoder = model.decoder if hasattr(model, "encode_memories") else model
    plain = {name: value for name, value in decoder.state_dict().items() if "lora_" not in name}
    return {"model": state_hash(dict(model.state_dict())), "decoder": state_hash(plain)}


def run_mode(
    model: Any, tokenizer: Any, task: str, mode: str, limit: int, metadata: dict[str, Any], cut: Any, code: Any
) -> dict[str, Any]:
    """Run one task in one mode: scores, counts, and each item's values."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from modeling_memory.harness.__main__ import TASKS
    from modeling_memory.harness.adapter import MemoryLM, NoMemoryReadError

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    lm = MemoryLM(model, tokenizer, mode, device=str(model.device), **cut)
    started = time.process_time()
    try:
        found = simple_evaluate(lm, tasks=[task], limit=limit, task_manager=manager, bootstrap_iters=0, **SEEDS)
    except NoMemoryReadError as error:
        return {"refused": str(error)}
    assert found is not None
    items = _items(found["samples"][task])
    return {
        "scores": _scores(found["results"][task], items),
        "counts": dict(lm.counts[task]),
        "items": items,
        "code": {"commit": code["commit"], "dirty": code["dirty"]},
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def compare_modes(task: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of all modes of a task, and what is left of the full text's, by paired items.

    A share of the full text's score is told only where the decoder solves the task with the full text: where the whole
    interval of its score is above `CHANCE`, or above `WRITTEN` where answers are free.
    """
    metric = headline(next(values["scores"] for values in found.values() if "scores" in values))
    items = {mode: values["items"] for mode, values in found.items() if "items" in values}
    scores = found.get("full", {}).get("scores", {}).get(metric, {})
    solved = scores.get("interval", [0.0])[0] > CHANCE.get(task, WRITTEN)
    modes: dict[str, Any] = {}
    for mode, values in found.items():
        modes[mode] = {**values}
        if "items" not in values:
            continue
        modes[mode]["items"] = {metric: _written(values["items"][metric])}
        others = [other for other in ("full", "truncated", "none") if other != mode and other in items]
        modes[mode]["minus"] = {other: _differences(items[mode], items[other]) for other in others}
        if solved and mode != "full":
            modes[mode]["of_full"] = _share(items[mode][metric], items["full"][metric])
    return {"headline": metric, "solved": solved, "modes": modes}


def _written(values: list[Any]) -> str:
    """Items on one line: a record holds thousands of them."""
    return " ".join(
        f"{value:.4g}" if isinstance(value, (int, float)) else f"{value[0]:.6g}/{value[1]}" for value in values
    )


def _share(ours: list[Any], full: list[Any]) -> dict[str, Any]:
    """What of the full text's score is left, with an interval over paired items."""
    top, bottom = torch.tensor(ours, dtype=torch.double), torch.tensor(full, dtype=torch.double)
    # An item that the full text does not solve counts nothing, and the interval wants positive numbers.
    interval = bootstrap_interval(top, bottom + 1e-9)
    return {"value": float(top.sum() / bottom.sum()), "interval": list(interval)}


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
        elif numbers is None and metric.endswith(PER_UNIT):
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


def _differences(items: dict[str, list[Any]], others: dict[str, list[Any]]) -> dict[str, Any]:
    """Mean difference to another mode with its interval, item by item; for perplexities in nats per unit."""
    found = {}
    for metric, values in items.items():
        reference = others.get(metric, [])
        if len(reference) != len(values) or not values:
            continue
        ours, theirs = _numbers(values), _numbers(reference)
        if ours is not None and theirs is not None:
            gap = ours - theirs
            found[metric] = {"value": float(gap.mean()), "interval": list(bootstrap_interval(gap))}
        elif metric.endswith(PER_UNIT):
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
