"""What memories cost and save at use: time to first token, time per token, cache, and reading of long texts.

```bash
python -m benchmarks.rolling --threads 2                    # every cell that is not measured yet, then the record
python -m benchmarks.rolling --only 'first_token/small/*'   # some cells
python -m benchmarks.rolling --quick                        # toy sizes, seconds: does it run?
```

A *cell* is one comparison: its paths run in turn in one process. A finished cell is kept under `runs/rolling/` and not
measured again, so that the benchmark can be stopped and continued; the record is put together from all of them. The
decoders have random weights and real shapes (for cost only), but for the quickstart's, which is read from its run.
Wall-clock and CPU seconds are kept of every run. Not counted: building, tokenising, loading memories from disk.
"""

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig

from benchmarks.measure import (
    benchmark_parser,
    cache_bytes,
    describe_run,
    fit_exponent,
    interleave,
    load_average,
    run_benchmark,
    spread,
)
from modeling_memory import (
    MaskedMixerConfig,
    MemoryEncoderDecoderConfig,
    MemoryEncoderDecoderForCausalLM,
    MemoryEncoderDecoderModel,
)
from training.places import REPOSITORY
from training.records.record import describe_code, peak_memory_bytes, read_json, write_json

PROMPT = 64
TARGETS = {"exponent": 1.1, "cache_share": 1 / 14, "tokens": 16384}


@dataclass(frozen=True)
class Shape:
    """A decoder's shape; the encoder is a mixer of the same width. `folder` names a trained model instead."""

    title: str
    dtype: str = "bfloat16"
    target_ratio: float | None = None
    encoder_layers: int = 4
    decoder: Mapping[str, Any] = field(default_factory=dict)
    folder: str | None = None


@dataclass(frozen=True)
class FirstToken:
    """Time to first token after `tokens` of context. `layers` of the decoder for the full text; None is all."""

    shape: str
    tokens: int
    repetitions: int
    layers: int | None = None


@dataclass(frozen=True)
class Generation:
    """Time per token and cache bytes after `tokens` of context."""

    shape: str
    tokens: int
    steps: int = 16
    bound: int = 256


@dataclass(frozen=True)
class Folding:
    """Time per token of plain text, after the memories of `tokens` of it, while so many windows are compressed."""

    shape: str
    tokens: int
    windows: int = 4
    bound: int = 256


@dataclass(frozen=True)
class Reading:
    """Cost of reading texts of several lengths, in windows; `bound` keeps the newest memories only."""

    shape: str
    chunk_length: int
    window_length: int
    lengths: tuple[int, ...]
    repetitions: int
    bound: int | None = None


Cell = FirstToken | Generation | Folding | Reading

SHAPES = {
    "quickstart": Shape("quickstart's model", "float32", folder="runs/quickstart/hub"),
    "quickstart_shape": Shape(
        "quickstart's shape",
        "float32",
        decoder={
            "vocab_size": 2048,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
    ),
    "small": Shape(
        "SmolLM2-135M's shape",
        target_ratio=30,
        decoder={
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
    ),
    "large": Shape(
        "Llama-3.2-1B's shape",
        target_ratio=20,
        decoder={
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
    ),
}

LENGTHS = tuple(1024 * 2**i for i in range(7))


def cells() -> dict[str, Cell]:
    """All cells by name, those that matter most first.

    A cell with `layers` runs the full text through so many layers only and takes their time as often as the decoder
    has them; where both kinds are measured, tables show the one that ran all of them.
    """
    plan: dict[str, Cell] = {
        "first_token/small/16384": FirstToken("small", 16384, 1),
        "generation/small/16384": Generation("small", 16384),
        "reading/1024": Reading("quickstart_shape", 1024, 1024, LENGTHS, 1),
        "first_token/quickstart/16384": FirstToken("quickstart", 16384, 3),
        "generation/quickstart/16384": Generation("quickstart", 16384),
        "folding/quickstart/16384": Folding("quickstart", 16384),
        "folding/small/16384": Folding("small", 16384, windows=2),
        "first_token/small/16384/part": FirstToken("small", 16384, 1, layers=3),
        "first_token/large/16384/part": FirstToken("large", 16384, 1, layers=1),
        "generation/large/16384": Generation("large", 16384),
    }
    for shape, lengths in {
        "quickstart": {512: 5, 1024: 5, 2048: 5, 4096: 3, 8192: 3},
        "small": {512: 3, 1024: 3, 2048: 1, 4096: 1},
        "large": {512: 1, 1024: 1, 2048: 1, 4096: 1},
    }.items():
        for tokens, repetitions in lengths.items():
            plan[f"first_token/{shape}/{tokens}"] = FirstToken(shape, tokens, repetitions)
    plan["reading/16_bounded"] = Reading("quickstart_shape", 16, 1024, LENGTHS, 1, bound=256)
    plan["first_token/large/16384"] = FirstToken("large", 16384, 1)
    for shape in ("quickstart", "small", "large"):
        plan |= {f"generation/{shape}/{n}": Generation(shape, n) for n in (1024, 4096, 65536)}
    plan |= {f"folding/quickstart/{n}": Folding("quickstart", n) for n in (1024, 4096, 65536)}
    plan["first_token/small/8192"] = FirstToken("small", 8192, 1)
    plan["reading/16"] = Reading("quickstart_shape", 16, 1024, LENGTHS, 1)
    for tokens in (32768, 65536):
        plan[f"first_token/quickstart/{tokens}"] = FirstToken("quickstart", tokens, 1)
        plan[f"first_token/small/{tokens}"] = FirstToken("small", tokens, 1, layers=1)
    plan["first_token/large/8192"] = FirstToken("large", 8192, 1)
    for tokens in (32768, 65536):
        plan[f"first_token/large/{tokens}"] = FirstToken("large", tokens, 1, layers=1)
    return plan


TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
QUICK_SHAPES = {"tiny": Shape("a tiny shape", "float32", target_ratio=1, encoder_layers=1, decoder=TINY)}
QUICK_CELLS: dict[str, Cell] = {
    "first_token/tiny/128": FirstToken("tiny", 128, 2),
    "first_token/tiny/256": FirstToken("tiny", 256, 1, layers=1),
    "generation/tiny/128": Generation("tiny", 128, steps=2, bound=4),
    "folding/tiny/128": Folding("tiny", 128, windows=2, bound=4),
    "reading/64": Reading("tiny", 64, 64, (64, 128, 256), 2),
    "reading/16_bounded": Reading("tiny", 16, 64, (64, 128, 256), 2, bound=4),
}


def joined_config(shape: Shape, *, chunk_length: int = 16, window_length: int = PROMPT) -> MemoryEncoderDecoderConfig:
    """Config of a shape's decoder, for texts of any length, with a mixer encoder of its width."""
    tokens: dict[str, Any] = {
        "vocab_size": shape.decoder["vocab_size"],
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    decoder = LlamaConfig(**{"max_position_embeddings": 2**17, **shape.decoder, **tokens})
    encoder = MaskedMixerConfig(
        hidden_size=decoder.hidden_size,
        num_hidden_layers=shape.encoder_layers,
        num_heads=4,
        max_position_embeddings=chunk_length,
        **tokens,
    )
    return MemoryEncoderDecoderConfig(
        encoder=encoder,
        decoder=decoder,
        chunk_length=chunk_length,
        window_length=window_length,
        memory_token_id=decoder.vocab_size,
    )


def build_model(shape: Shape, seed: int) -> MemoryEncoderDecoderForCausalLM:
    """Build a shape with random weights, or load its folder and let it take more positions than it was trained on."""
    torch.manual_seed(seed)
    dtype = getattr(torch, shape.dtype)
    if shape.folder is None:
        return MemoryEncoderDecoderForCausalLM._from_config(joined_config(shape), dtype=dtype).eval()
    model = MemoryEncoderDecoderForCausalLM.from_pretrained(REPOSITORY / shape.folder, dtype=dtype).eval()
    model.config.decoder.max_position_embeddings = 2**17
    return model


def random_ids(vocab_size: int, *size: int) -> torch.Tensor:
    """Draw token ids of shape `size`, none of them a marker or padding."""
    return torch.randint(5, vocab_size, size, generator=torch.Generator().manual_seed(len(size)))


def time_paths(runs: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, Any]:
    """Time paths in turn, without a warm-up; wall-clock seconds, CPU seconds of the process, and their medians."""
    cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}

    def counted(name: str, run: Callable[[], Any]) -> Callable[[], None]:
        def timed() -> None:
            started = time.process_time()
            run()
            cpu_seconds[name].append(time.process_time() - started)

        return timed

    seconds = interleave({name: counted(name, run) for name, run in runs.items()}, repetitions=repetitions, warmup=0)
    return with_medians(seconds, cpu_seconds)


def with_medians(seconds: dict[str, list[float]], cpu_seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Put the medians beside the times."""
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "median": {name: spread(values)["median"] for name, values in seconds.items()},
        "cpu_median": {name: spread(values)["median"] for name, values in cpu_seconds.items()},
    }


def first_token_paths(
    model: MemoryEncoderDecoderForCausalLM, tokens: int, layers: int | None = None
) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways from `tokens` of context and a prompt to the logits of the next token, each with its cache.

    `full` reads all as text; `stored_16` and `stored_64` have a memory for so many tokens; `encode` makes the
    memories of 16 first, `encode_own` with an encoder as large as the decoder: its own body.
    """
    config = model.config
    text = random_ids(config.vocab_size, 1, tokens + PROMPT)
    chunks = text[:, :tokens].view(1, -1, 16)
    stored, _ = model.encode_memories(chunks)  # (1, tokens / 16, D)
    body = model.decoder.base_model

    def full() -> torch.Tensor:
        depth = config.decoder.num_hidden_layers
        config.decoder.num_hidden_layers = depth if layers is None else layers
        try:
            return model.decoder(text, logits_to_keep=1, use_cache=True).logits
        finally:
            config.decoder.num_hidden_layers = depth

    def read(memory_embeds: torch.Tensor) -> torch.Tensor:
        slots = torch.full((1, memory_embeds.shape[1]), config.memory_token_id)
        prompt = torch.cat([slots, text[:, tokens:]], 1)
        return model(prompt, memory_embeds=memory_embeds, logits_to_keep=1, use_cache=True).logits

    def encode_own() -> torch.Tensor:
        states = body(chunks[0], use_cache=False).last_hidden_state[:, -1]  # (chunks, D)
        return read(states[None])

    return {
        "full": full,
        "stored_16": lambda: read(stored),
        "stored_64": lambda: read(stored[:, ::4]),
        "encode": lambda: read(model.encode_memories(chunks)[0]),
        "encode_own": encode_own,
    }


@torch.no_grad()
def measure_first_token(cell: FirstToken, model: MemoryEncoderDecoderForCausalLM) -> dict[str, Any]:
    """Time to the first token, full text against memories."""
    for run in first_token_paths(model, min(cell.tokens, 128)).values():
        run()  # warm up on a short text: a long one costs minutes
    paths = first_token_paths(model, cell.tokens, cell.layers)
    if cell.layers is not None:
        paths.pop("encode_own")  # as dear as what is not run whole
        paths["full_without_layers"] = first_token_paths(model, cell.tokens, 0)["full"]
    result = time_paths(paths, cell.repetitions)
    depth = model.config.decoder.num_hidden_layers
    for median in (result["median"], result["cpu_median"]):
        if cell.layers is not None:  # what one layer takes, so many times
            rest = median.pop("full_without_layers")
            median["full"] = rest + (median["full"] - rest) * depth / cell.layers
    result["ratio"], result["cpu_ratio"] = (
        {name: result[key]["full"] / value for name, value in result[key].items() if name != "full"}
        for key in ("median", "cpu_median")
    )
    return {**result, "layers": depth, "full_is_scaled_by_layers": cell.layers is not None}


def random_cache(model: MemoryEncoderDecoderForCausalLM, columns: int) -> DynamicCache:
    """Build the decoder's cache of a text of so many columns, with random keys and values."""
    decoder = model.config.decoder
    width = decoder.head_dim or decoder.hidden_size // decoder.num_attention_heads
    cache = DynamicCache(config=decoder)
    for layer in range(decoder.num_hidden_layers):
        shape = 1, decoder.num_key_value_heads, columns, width
        cache.update(torch.randn(shape, dtype=model.dtype), torch.randn(shape, dtype=model.dtype), layer)
    return cache


@torch.no_grad()
def measure_generation(cell: Generation, model: MemoryEncoderDecoderForCausalLM) -> dict[str, Any]:
    """Time per token and cache bytes: the full text, a memory for 16 tokens, and the newest memories only."""
    config = model.config
    context = random_ids(config.vocab_size, 1, cell.tokens)
    prompt = random_ids(config.vocab_size, 1, PROMPT)
    stored, _ = model.encode_memories(context.view(1, -1, 16))

    def open_cache(memory_embeds: torch.Tensor) -> Any:
        slots = torch.full((1, memory_embeds.shape[1]), config.memory_token_id)
        text = torch.cat([slots, prompt], 1)
        return model(text, memory_embeds=memory_embeds, logits_to_keep=1, use_cache=True).past_key_values

    caches = {
        "full": random_cache(model, cell.tokens + PROMPT),
        "memories": open_cache(stored),
        "bounded": open_cache(stored[:, -cell.bound :]),
    }

    def step(name: str) -> Callable[[], Any]:
        reader = model.decoder if name == "full" else model
        return lambda: reader(prompt[:, :1], past_key_values=caches[name], use_cache=True)

    steps = {name: step(name) for name in caches}
    for run in steps.values():
        run()
    result = time_paths(steps, cell.steps)
    sizes = {name: cache_bytes(cache) for name, cache in caches.items()}
    columns = {name: cache.layers[0].keys.shape[2] for name, cache in caches.items()}
    shares = {name: size / sizes["full"] for name, size in sizes.items()}
    return {**result, "cache_bytes": sizes, "cache_columns": columns, "cache_share": shares}


@torch.no_grad()
def measure_folding(cell: Folding, model: MemoryEncoderDecoderForCausalLM) -> dict[str, Any]:
    """Time each token of plain text through roll-overs, all memories kept and the newest only, in turn.

    `step` are tokens that an open window takes, `fold` those that fold a full one: its encoding and the new cache.
    """
    config = model.config
    context = random_ids(config.vocab_size, 1, cell.tokens)
    text = random_ids(config.vocab_size, 1, cell.windows * config.window_length + 1)
    stored, _ = model.encode_memories(context.view(1, -1, config.chunk_length))
    paths = {"memories": stored, "newest": stored[:, -cell.bound :]}

    def read(name: str, ids: torch.Tensor, **inputs: Any) -> Any:
        before = config.max_memories, config.memory_policy
        if name == "newest":
            config.max_memories, config.memory_policy = cell.bound, "drop_oldest"
        try:
            return model(ids, logits_to_keep=1, use_cache=True, **inputs).past_key_values
        finally:
            config.max_memories, config.memory_policy = before

    caches = {}
    for name, memory_embeds in paths.items():
        slots = torch.full((1, memory_embeds.shape[1]), config.memory_token_id)
        ids = torch.cat([slots, text[:, :1]], 1)
        caches[name] = read(name, ids, memory_embeds=memory_embeds, rolling_memory=True)
        memories = caches[name].memories  # those of a text that was compressed before
        caches[name].memories = replace(memories, num_pinned=torch.zeros_like(memories.num_pinned))
    kinds = [f"{name}_{kind}" for name in paths for kind in ("step", "fold")]
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for column in range(1, text.shape[1]):
        for name, cache in caches.items():
            kind = f"{name}_{'fold' if int(cache.window_fill) == config.window_length else 'step'}"
            started, cpu_started = time.perf_counter(), time.process_time()
            read(name, text[:, column : column + 1], past_key_values=cache)
            cpu_seconds[kind].append(time.process_time() - cpu_started)
            seconds[kind].append(time.perf_counter() - started)
    result, window = with_medians(seconds, cpu_seconds), config.window_length
    for key in ("median", "cpu_median"):
        per_token = {
            name: (result[key][f"{name}_step"] * (window - 1) + result[key][f"{name}_fold"]) / window for name in paths
        }
        result[key.replace("median", "per_token")] = per_token
    return {**result, "window_length": window}


@torch.no_grad()
def measure_reading(cell: Reading, shape: Shape, seed: int) -> dict[str, Any]:
    """Time to read texts in windows, the states of every token given; cost = factor * tokens ** exponent."""
    torch.manual_seed(seed)
    config = joined_config(shape, chunk_length=cell.chunk_length, window_length=cell.window_length)
    if cell.bound is not None:
        config.max_memories, config.memory_policy = cell.bound, "drop_oldest"
    model = MemoryEncoderDecoderModel._from_config(config, dtype=getattr(torch, shape.dtype)).eval()

    texts = {str(n): random_ids(shape.decoder["vocab_size"], 1, n) for n in cell.lengths}
    runs = {n: partial(model, text, use_cache=False) for n, text in texts.items()}
    for run in list(runs.values())[:2]:
        run()
    result = time_paths(runs, cell.repetitions)
    fits = {
        name: fit_exponent(cell.lengths, [result[key][n] for n in texts])
        for name, key in (("fit", "median"), ("cpu_fit", "cpu_median"))
    }
    return {**result, **fits}


def measure_cell(cell: Cell, shapes: Mapping[str, Shape], models: dict[str, Any], seed: int) -> dict[str, Any]:
    """Measure one cell; models are built once a process, one at a time."""
    if isinstance(cell, Reading):
        return measure_reading(cell, shapes[cell.shape], seed)
    if cell.shape not in models:
        models.clear()
        models[cell.shape] = build_model(shapes[cell.shape], seed)
    model = models[cell.shape]
    if isinstance(cell, FirstToken):
        return measure_first_token(cell, model)
    if isinstance(cell, Folding):
        return measure_folding(cell, model)
    return measure_generation(cell, model)


def cell_line(name: str, result: Mapping[str, Any]) -> str:
    """Say one cell in a line."""
    shown = []
    for key in ("ratio", "median", "cpu_median", "cache_share"):
        if key in result:
            shown.append(f"{key} " + ", ".join(f"{path} {value:.4g}" for path, value in result[key].items()))
    if "fit" in result:
        shown.append(f"exponent {result['fit']['exponent']:.3f}, of CPU time {result['cpu_fit']['exponent']:.3f}")
    return f"{name}: {'; '.join(shown)}"


def measure_cells(options: argparse.Namespace, plan: Mapping[str, Cell], shapes: Mapping[str, Shape]) -> Path:
    """Measure the cells asked for that are not there yet; returns the folder that holds them.

    Raises:
        ValueError: If no cell is asked for.
    """
    patterns = options.only or ["*"]
    chosen = [name for name in plan if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(f"no cell is called {' or '.join(patterns)}; known: {', '.join(plan)}")
    folder = Path(options.cells) / ("quick" if options.quick else "cells")
    started, models = time.monotonic(), dict[str, Any]()
    for name in chosen:
        path = folder / f"{name}.json"
        given = json.loads(json.dumps(asdict(plan[name])))  # as it is read back: no tuples
        kept = read_json(path)
        if kept is not None and kept["given"] == given:
            continue
        if options.seconds is not None and time.monotonic() - started > options.seconds:
            break
        load = load_average()
        result = measure_cell(plan[name], shapes, models, options.seed)
        code = describe_code()
        around = {"load_before": load, "commit": code["commit"], "dirty": code["dirty"],
                  "threads": torch.get_num_threads(), "peak_memory_bytes": peak_memory_bytes()["process"]}  # fmt: skip
        write_json(path, {"given": given, **result, **around})
        print(cell_line(name, result), flush=True)
    return folder


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure what is missing and return the record of all finished cells."""
    plan, shapes = (QUICK_CELLS, QUICK_SHAPES) if options.quick else (cells(), SHAPES)
    folder = measure_cells(options, plan, shapes)
    measured = {name: read_json(folder / f"{name}.json") for name in plan}
    finished = {name: result for name, result in measured.items() if result is not None}
    record = describe_run("rolling", command, {"weights": options.seed})
    record["code"]["dirty"] = record["code"]["dirty"] or any(result["dirty"] for result in finished.values())
    record.update(
        quick=options.quick,
        prompt_tokens=PROMPT,
        targets=TARGETS,
        shapes={name: asdict(shape) for name, shape in shapes.items()},
        metrics=finished,
        not_measured=[name for name, result in measured.items() if result is None],
        peak_memory_bytes={"process": max(result["peak_memory_bytes"] for result in finished.values())},
    )
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = benchmark_parser("rolling", "Time memories against the full text: first token, each token, long texts.")
    parser.add_argument("--only", action="append", help="cells to measure, as a pattern; may be given more than once")
    parser.add_argument("--seconds", type=float, help="begin no further cell after so many seconds")
    parser.add_argument("--cells", default="runs/rolling", help="where finished cells are kept")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    return run_benchmark(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
