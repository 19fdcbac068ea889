"""A real pair: what SmolLM2-135M makes of memories, beside all else that their positions could hold.

```bash
python -m benchmarks.smollm2 model_cards/starter-smollm2 --questions xquad_en.jsonl.gz --limit 64
python -m benchmarks.smollm2 MODEL --limit 8 --part continue --part copy --out /tmp/small.json
```

| part | asks |
|---|---|
| continue | loss of 64 tokens after 64, 256 and 1,024 tokens of context, with 64 of them as text and with none |
| copy | 64 tokens teacher-forced; 32, 64 and 128 free-running; digits, dates and names kept |
| questions | SQuAD's exact match and F1 in the decoder's chat template |
| first_token | CPU time to the first token after a long text, and bytes |

Rows are those of `benchmarks/smollm2_rows.py`. Every cell is kept as soon as it is measured, so the same command goes
on where it was stopped. Intervals are over documents. Text and questions must be such that no training has seen.
"""

import argparse
import gzip
import json
import re
import string
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import benchmark_parser, cache_bytes, describe_run, run_benchmark, scratch
from benchmarks.smollm2_rows import RATES, SELECTIONS, NearestByMiniLM, Reader, Reading, Selector, nats, readings
from modeling_memory.memory_adapters import adapters_on
from training.data.texts import file_checksums, load_texts
from training.fidelity import details_of
from training.measure.metrics import bootstrap_interval
from training.recipes.recipe import resolve_files
from training.records.record import Cells, data_digest
from training.remember import load_memory_model

PARTS = ("continue", "copy", "questions", "first_token")
CONTEXTS, FRONTS, TARGET = (64, 256, 1024), (0, 64), 64
COPIES = (32, 64, 128)
HINT = " Answer with a few words from the text."
TEXT = ["training/corpora/wikinews/test.parquet", "training/corpora/books/test.parquet"]
CONTROLS = ("full", "none", "last/4")
Cell = dict[str, Any]


def cell(numerators: Sequence[float], denominators: Sequence[float]) -> Cell:
    """A mean over documents with its interval; documents that have nothing to count are left out.

    >>> cell([6.0, 2.0, 0.0], [3.0, 1.0, 0.0])
    {'mean': 2.0, 'interval': [2.0, 2.0], 'num_documents': 2, 'count': 4.0}
    """
    kept = [(top, bottom) for top, bottom in zip(numerators, denominators, strict=True) if bottom > 0]
    if not kept:
        return {"mean": None, "interval": None, "num_documents": 0, "count": 0.0}
    tops, bottoms = (torch.tensor(column, dtype=torch.float64) for column in zip(*kept, strict=True))
    return {
        "mean": (tops.sum() / bottoms.sum()).item(),
        "interval": list(bootstrap_interval(tops, bottoms)),
        "num_documents": len(kept),
        "count": bottoms.sum().item(),
    }


def batched(function: Callable[[int, int], torch.Tensor], count: int, size: int) -> list[float]:
    """Call a function on ranges of documents and join what it returns."""
    return [value for start in range(0, count, size) for value in function(start, min(start + size, count)).tolist()]


def documents(tokenizer: Any, texts: list[str], limit: int, length: int) -> torch.Tensor:
    """Cut one stretch from the middle of each of so many documents; returns `(N, length)`.

    Raises:
        ValueError: If too few are long enough.
    """
    rows: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if len(ids) >= length and len(rows) < limit:
            rows.append(ids[(len(ids) - length) // 2 :][:length])
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} documents have {length} tokens; give text with 2 or more such (--text)")
    return torch.tensor(rows)


# ---------------------------------------------------------------------------------------------------------------------
# continue


def continue_losses(reading: Reading, selector: Selector, ids: torch.Tensor, context: int, front: int) -> list[float]:
    """Nats of the last tokens of each document after a context of which a row keeps what it keeps."""
    ids = ids[:, -context - TARGET :]
    source, after = ids[:, : context - front], ids[:, context - front :]
    reader, kind = reading.reader, reading.kind

    def run(start: int, end: int) -> torch.Tensor:
        targets = after[start:end, 1 - TARGET :]
        if reading.has_memories:
            own = source if kind == "memories" else source.roll(1, 0)
            logits = reader.memories(own[start:end], reading.rate, after[start:end], TARGET)
        else:
            rows = []
            for place in range(start, end):
                tokens = source[place].tolist()
                if kind in SELECTIONS:
                    query = reader.tokenizer.decode(after[place, :front])
                    tokens = selector.choose(tokens, kind, reading.rate, query)
                rows.append(([] if kind == "none" else tokens) + after[place].tolist())
            logits = reader.text(rows, TARGET, reading.adapters)
        return nats(logits[:, :-1], targets)

    return batched(run, len(ids), 8)


def measure_continue(rows: Sequence[Reading], selector: Selector, ids: torch.Tensor, cells: Cells) -> Cell:
    """Loss of every row at every context; memories also as gains over what stands beside them."""
    found: Cell = {}
    for context in CONTEXTS:
        for front in FRONTS:
            if front >= context:
                continue
            sums = {
                one.name: cells.get(
                    f"continue {context} {front} {one.key}",
                    partial(continue_losses, one, selector, ids, context, front),
                )
                for one in rows
                # MiniLM and BM25 need something to be near to: text that is read after the context.
                if front or one.kind not in ("MiniLM", "BM25")
            }
            found[f"{context} tokens, {front} as text"] = summary(sums)
    return found


def summary(sums: dict[str, list[float]]) -> Cell:
    """Cells of all rows, and how much better memories are than other rows, document by document."""
    count = [TARGET - 1.0] * len(sums["none"])
    rows = {name: cell(values, count) for name, values in sums.items()}
    gains = {}
    for own in [name for name in sums if name.startswith("memories/")]:
        rate = own.partition("/")[2]
        for other in [name for name in sums if name.startswith((f"another text's/{rate}", f"last/{rate}", "none"))]:
            pairs = zip(sums[own], sums[other], strict=True)
            gains[f"{own} over {other}"] = cell([b - a for a, b in pairs], count)
    recovered = {}
    for readers in ("", ", trained on it"):
        ends = [rows.get(f"{name}{readers}") for name in ("none", "full")]
        if all(ends) and (gap := ends[0]["mean"] - ends[1]["mean"]):
            recovered[f"gap{readers}"] = {name: (ends[0]["mean"] - one["mean"]) / gap for name, one in rows.items()}
    return {"loss": rows, "gain": gains, "share_of_gap_recovered": recovered}


# ---------------------------------------------------------------------------------------------------------------------
# copy


def measure_copy(reader: Reader, ids: torch.Tensor, rates: Sequence[int], cells: Cells) -> Cell:
    """Copies of a source from its memories, teacher-forced with controls and free-running."""
    copy = reader.model.config.copy_token_id
    if copy is None:
        raise ValueError("the model has no COPY token, so it cannot be asked for a copy; leave --part copy out")
    found: Cell = {"teacher_forced": {}, "free_running": {}, "kept": {}}
    source = ids[:, :TARGET]
    shown = torch.cat([torch.full_like(source[:, :1], copy), source[:, :-1]], 1)

    def right(row: str) -> list[float]:
        kind, _, rate = row.partition("/")

        def run(start: int, end: int) -> torch.Tensor:
            if kind in ("memories", "another text's"):
                own = source if kind == "memories" else source.roll(1, 0)
                logits = reader.memories(own[start:end], int(rate), shown[start:end], TARGET)
            else:
                front = source[start:end].tolist() if kind == "full" else [[]] * (end - start)
                rows = [one + two for one, two in zip(front, shown[start:end].tolist(), strict=True)]
                logits = reader.text(rows, TARGET, adapters=True)
            return (logits.argmax(-1) == source[start:end]).double().sum(1)

        return batched(run, len(source), 8)

    for row in ("full", "none", *(f"{kind}/{r}" for kind in ("memories", "another text's") for r in rates)):
        values = cells.get(f"copy teacher-forced {row}", partial(right, row))
        found["teacher_forced"][row] = cell(values, [float(TARGET)] * len(values))

    def written(length: int, rate: int) -> list[list[int]]:
        own, parts = ids[:, :length], []
        for start in range(0, len(own), 8):
            part = own[start : start + 8]
            parts += reader.write(part, rate, torch.full_like(part[:, :1], copy), length).tolist()
        return parts

    for rate in rates:
        for length in COPIES:
            copies = cells.get(f"copy free-running {length} memories/{rate}", partial(written, length, rate))
            sources = ids[:, :length].tolist()
            exact = [float(one == two) for one, two in zip(copies, sources, strict=True)]
            found["free_running"][f"{length} tokens, memories/{rate}"] = cell(exact, [1.0] * len(exact))
            if length == TARGET:
                found["kept"][f"memories/{rate}"] = kept_details(reader.tokenizer, sources, copies)
    return found


def kept_details(tokenizer: Any, sources: list[list[int]], copies: list[list[int]]) -> Cell:
    """Share of the digits, dates and names of sources that stand in their copies."""
    found = {}
    texts = [(tokenizer.decode(one), tokenizer.decode(two)) for one, two in zip(sources, copies, strict=True)]
    for kind in ("digits", "dates", "names"):
        wanted = [details_of(source, kind) for source, _ in texts]
        kept = [(own & details_of(copy, kind)).total() for own, (_, copy) in zip(wanted, texts, strict=True)]
        found[kind] = cell([float(one) for one in kept], [float(own.total()) for own in wanted])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# questions


def normalise(text: str) -> str:
    """SQuAD's normal form of an answer.

    >>> normalise(" The  Broncos, of 1,985!")
    'broncos of 1985'
    """
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer: str, wanted: str) -> float:
    """Overlap of words of an answer and a wanted one.

    >>> f1("the Denver Broncos", "Broncos"), f1("Carolina", "Broncos")
    (0.6666666666666666, 0.0)
    """
    own, other = normalise(answer).split(), normalise(wanted).split()
    same = (Counter(own) & Counter(other)).total()
    return 2 * same / (len(own) + len(other)) if same else 0.0


def read_squad(file: Path) -> list[dict[str, Any]]:
    """Read rows with `context`, `question` and `answers`, a list of texts or of `{"text": ...}`."""
    content = file.read_bytes()
    text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    for row in rows:
        answers = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]
        row["answers"] = [one["text"] if isinstance(one, dict) else one for one in answers]
    return rows


def chosen_questions(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Spread so many questions over all paragraphs: the first of each, then the second, and so on."""
    places: Counter[str] = Counter()
    ranked = []
    for number, row in enumerate(rows):
        ranked.append((places[row["context"]], number))
        places[row["context"]] += 1
    return [rows[number] for _, number in sorted(ranked)[:limit]]


@torch.no_grad()
def answers_of(reading: Reading, selector: Selector, asked: list[dict[str, Any]]) -> list[str]:
    """Answer questions from what a row keeps of their contexts."""
    reader, kind = reading.reader, reading.kind
    contexts = [one["context"] for one in asked]
    if kind == "another text's":
        others = list(dict.fromkeys(contexts))
        contexts = [others[others.index(one) - 1] for one in contexts]
    found: list[str] = []
    for start in range(0, len(asked), 8):
        own, batch = contexts[start : start + 8], asked[start : start + 8]
        inputs, model = (
            (_memory_chats(reading, own, batch), reader.model)
            if reading.has_memories
            else (_text_chats(reading, selector, own, batch), reader.model.decoder)
        )
        with adapters_on(reader.model.decoder, reading.adapters or reading.has_memories, memories=False):
            output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        columns = inputs["input_ids"].shape[1]
        found += reader.tokenizer.batch_decode(output[:, columns:], skip_special_tokens=True)
    return [answer.strip() for answer in found]


CHAT = {"tokenize": True, "add_generation_prompt": True, "padding_side": "left", "return_tensors": "pt"}


def _memory_chats(reading: Reading, contexts: list[str], asked: list[dict[str, Any]]) -> Any:
    asks = [[{"type": "memory"}, {"type": "text", "text": f"\n\n{one['question']}{HINT}"}] for one in asked]
    chats = [[{"role": "user", "content": one}] for one in asks]
    budget = reading.reader.chunk // reading.rate
    return reading.reader.processor.apply_chat_template(chats, context=contexts, context_num_memories=budget, **CHAT)


def _text_chats(reading: Reading, selector: Selector, contexts: list[str], asked: list[dict[str, Any]]) -> Any:
    chats = []
    for text, one in zip(contexts, asked, strict=True):
        kept = _kept_text(selector, text, reading, one["question"])
        content = (f"{kept}\n\n" if kept else "") + one["question"] + HINT
        chats.append([{"role": "user", "content": content}])
    # A processor without contexts is the decoder's tokenizer, and pads on the side that it is told.
    return reading.reader.processor.apply_chat_template(chats, **CHAT)


def _kept_text(selector: Selector, text: str, reading: Reading, question: str) -> str:
    if reading.kind not in SELECTIONS:
        return text if reading.kind == "full" else ""
    ids = selector.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return selector.tokenizer.decode(selector.choose(ids, reading.kind, reading.rate, question)).strip()


def measure_questions(rows: Sequence[Reading], selector: Selector, asked: list[dict[str, Any]], cells: Cells) -> Cell:
    """Exact match and F1 of every row; intervals over paragraphs."""
    return {
        one.name: squad_scores(asked, cells.get(f"questions {one.key}", partial(answers_of, one, selector, asked)))
        for one in rows
    }


def squad_scores(asked: list[dict[str, Any]], answers: list[str]) -> Cell:
    """Scores of answers, summed by paragraph."""
    sums: dict[str, list[float]] = {}
    for row, answer in zip(asked, answers, strict=True):
        one = sums.setdefault(row["context"], [0.0, 0.0, 0.0, 0.0])
        one[0] += 1
        one[1] += max(float(normalise(answer) == normalise(wanted)) for wanted in row["answers"])
        one[2] += max(f1(answer, wanted) for wanted in row["answers"])
        one[3] += max(float(normalise(wanted) in normalise(answer)) for wanted in row["answers"])
    counts, *scores = zip(*sums.values(), strict=True)
    names = ("exact_match", "f1", "contained")
    return {name: cell(values, counts) for name, values in zip(names, scores, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# first token


@torch.no_grad()
def first_token(reader: Reader, length: int, rate: int) -> Cell:
    """CPU time from a stored text of so many tokens and a question to the first token of the answer."""
    model = reader.model
    question = reader.tokenizer("\n\nWhat is this about?", return_tensors="pt")["input_ids"]
    source = torch.randint(100, 40_000, (1, length), generator=torch.Generator().manual_seed(0))
    source = source % model.config.decoder.vocab_size
    given = reader.slots(source, rate)
    slots = given.pop("slots")
    memories, _, num_tokens = model.encode_memories(
        given["context_input_ids"], num_memories=given["context_num_memories"], return_num_tokens=True
    )
    own = model.config.decoder.max_position_embeddings
    # Rotary positions have no table; where the text is longer than the decoder was trained for, only time is told.
    model.config.decoder.max_position_embeddings = max(own, length + 128)
    seconds: dict[str, list[float]] = {"full text": [], "memories": []}
    sizes: dict[str, int] = {}
    try:
        for _ in range(3):
            started = time.process_time()
            ids = torch.cat([slots, question], 1)
            model(ids, memory_embeds=memories, memory_num_tokens=num_tokens, use_cache=True, logits_to_keep=1)
            seconds["memories"].append(time.process_time() - started)
        started = time.process_time()
        with adapters_on(model.decoder, False):
            output = model.decoder(torch.cat([source, question], 1), use_cache=True, logits_to_keep=1)
        seconds["full text"].append(time.process_time() - started)
        sizes["full text"] = cache_bytes(output.past_key_values)
    finally:
        model.config.decoder.max_position_embeddings = own
    columns = length + question.shape[1]
    sizes["memories"] = sizes["full text"] // columns * (slots.shape[1] + question.shape[1])
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "cpu_seconds": best,
        "times_faster": best["full text"] / best["memories"],
        "cache_bytes": sizes,
        "stored_bytes_per_source_token": memories.numel() * memories.element_size() / length,
        "beyond_the_decoders_positions": columns > own,
    }


# ---------------------------------------------------------------------------------------------------------------------


class Control(argparse.Action):
    """Collects `ROW=MODEL` in a dictionary."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any) -> None:
        row, _, model = value.partition("=")
        if row not in CONTROLS or not model:
            parser.error(f"--control {value}: expected ROW=MODEL with a row of {', '.join(CONTROLS)}")
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), row: model})


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    description = "Measure a memory model of a real decoder beside what else it could be given."
    parser = benchmark_parser("smollm2", description, quick=False)
    parser.add_argument("model", help="folder or Hub id of the memory model")
    parser.add_argument(
        "--text", nargs="+", default=TEXT, metavar="FILE", help="held-out text (the shipped test text)"
    )
    parser.add_argument("--questions", metavar="FILE", help="questions as SQuAD's, .jsonl or .jsonl.gz")
    parser.add_argument(
        "--rates", nargs="+", type=int, choices=RATES,
        help="tokens a memory (those of 4, 8 and 16 that the model can have)",
    )  # fmt: skip
    parser.add_argument(
        "--control", action=Control, default={}, metavar="ROW=MODEL",
        help=f"a model whose adapters were trained as long on this row, of {', '.join(CONTROLS)}; may be repeated",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, default=64, metavar="N", help="documents (64)")
    parser.add_argument("--question-limit", type=int, default=400, metavar="N", help="questions (400)")
    parser.add_argument("--first-token", type=int, default=16384, metavar="N", help="tokens of the long text (16384)")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be repeated")
    parser.add_argument("--cells", metavar="FILE", help="where cells are kept (default: benchmarks/results/scratch)")
    return parser


def measure(options: argparse.Namespace, command: str) -> Cell:
    """Measure what the options ask for; return the record."""
    record = describe_run("smollm2", command, {"first_token": 0})
    model, processor = load_memory_model(options.model, "cpu")
    reader = Reader(model.eval(), processor)
    selector = Selector(processor.tokenizer, NearestByMiniLM())
    files = resolve_files(options.text, "--text")
    asked_files = [Path(options.questions)] if options.questions else []
    checksums = file_checksums([*files, *asked_files])
    settings = {name: getattr(options, name) for name in ("limit", "question_limit", "first_token")}
    identity = data_digest({"files": checksums, "weights": reader.weights, "code": record["code"], **settings})
    cells = Cells(options.cells or scratch("smollm2_cells.json"), identity)
    parts = options.part or [part for part in PARTS if part != "questions" or asked_files]
    missing = {part: "not asked for" for part in PARTS if part not in parts}
    controls = {}
    for name in CONTROLS:
        if name in options.control:
            controls[name] = Reader(load_memory_model(options.control[name], "cpu")[0].eval(), processor)
        else:
            missing[f"control {name}"] = "no adapters trained as long on this row were given (--control)"
    least, most = model.config.least_memories, model.config.memories_per_chunk
    rates = options.rates or [rate for rate in RATES if least <= model.config.chunk_length // rate <= most]
    rows = readings(reader, controls, rates)
    metrics: Cell = {}
    if {"continue", "copy"} & set(parts):
        ids = documents(processor.tokenizer, load_texts(files), options.limit, max(CONTEXTS) + TARGET)
        metrics["num_documents"] = len(ids)
    if "continue" in parts:
        metrics["continue"] = measure_continue(rows, selector, ids, cells)
    if "copy" in parts:
        metrics["copy"] = measure_copy(reader, ids, rates, cells)
    if "questions" in parts:
        if not asked_files:
            raise ValueError("--part questions needs questions: --questions FILE")
        asked = chosen_questions(read_squad(asked_files[0]), options.question_limit)
        metrics["questions"] = measure_questions(rows, selector, asked, cells)
        metrics["num_questions"] = len(asked)
    if "first_token" in parts:
        key = f"first_token {options.first_token}"
        metrics["first_token"] = {
            "tokens": options.first_token, "rate": rates[-1],
            **cells.get(key, partial(first_token, reader, options.first_token, rates[-1])),
        }  # fmt: skip
    return {**record, "inputs": {"files": checksums}, "settings": settings, "missing": missing, "metrics": metrics}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_benchmark(build_parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
