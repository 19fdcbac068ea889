"""How much faster the batched model is than the plain loop.

```bash
python -m benchmarks.speed                 # quickstart sizes, minutes
python -m benchmarks.speed --quick         # toy sizes, seconds: does it run?
```

Everything is float32 on the CPU, in one process. The two paths share their weights, must give equal results before
anything is timed, and are timed in turn (A B A B ...). A ratio is plain over fast of one round; its median and spread
over the rounds are reported. What is not counted: building the model, tokenising, the optimizer's step.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.measure import benchmark_parser, compare, describe_run, load_average, run_benchmark
from modeling_memory import MaskedMixerConfig, MemoryEncoderDecoderConfig, MemoryEncoderDecoderForCausalLM
from tests.reference import memory_loop
from training.records.record import peak_memory_bytes

# float32 sums in another order: 4e-6 of the largest value measured, gradients included.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Sizes:
    """What is built and how much it is given. Lengths in tokens."""

    hidden_size: int = 256
    intermediate_size: int = 768
    encoder_layers: int = 3
    decoder_layers: int = 4
    num_heads: int = 4
    vocab_size: int = 2048
    chunk_length: int = 32
    window_length: int = 64
    memories_per_chunk: int = 1
    max_position_embeddings: int = 1024
    encode_batch: int = 64
    encode_chunks: int = 8
    train_batch: int = 16
    train_windows: int = 4
    prompt_length: int = 96
    new_tokens: int = 96


QUICK = Sizes(
    hidden_size=16,
    intermediate_size=32,
    encoder_layers=1,
    decoder_layers=1,
    num_heads=2,
    vocab_size=64,
    chunk_length=4,
    window_length=8,
    max_position_embeddings=64,
    encode_batch=2,
    encode_chunks=2,
    train_batch=2,
    train_windows=3,
    prompt_length=12,
    new_tokens=10,
)


def build_model(sizes: Sizes, seed: int) -> MemoryEncoderDecoderForCausalLM:
    """Build a memory model with random weights: a mixer encoder, frozen, and a Llama decoder."""
    torch.manual_seed(seed)
    tokens: dict[str, Any] = {
        "vocab_size": sizes.vocab_size,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    encoder = MaskedMixerConfig(
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.encoder_layers,
        num_heads=sizes.num_heads,
        max_position_embeddings=sizes.chunk_length,
        **tokens,
    )
    decoder = LlamaConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.decoder_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads,
        max_position_embeddings=sizes.max_position_embeddings,
        initializer_range=0.1,  # wide enough that the likeliest token is no tie
        **tokens,
    )
    config = MemoryEncoderDecoderConfig(
        encoder=encoder,
        decoder=decoder,
        chunk_length=sizes.chunk_length,
        window_length=sizes.window_length,
        memories_per_chunk=sizes.memories_per_chunk,
        memory_token_id=sizes.vocab_size,
        initializer_range=0.1,
    )
    return MemoryEncoderDecoderForCausalLM(config).eval()


def random_tokens(sizes: Sizes, *shape: int, seed: int) -> torch.Tensor:
    """Draw token ids, none of them padding."""
    return torch.randint(5, sizes.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def train_step(model: MemoryEncoderDecoderForCausalLM, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run forward and backward; return the loss and all gradients."""
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.detach(), **gradients}


def measure_encode(model: MemoryEncoderDecoderForCausalLM, sizes: Sizes, **timing: Any) -> dict[str, Any]:
    """Contexts to memories: one batched call against one call a chunk."""
    shape = (sizes.encode_batch, sizes.encode_chunks, sizes.chunk_length)
    context = random_tokens(sizes, *shape, seed=1)

    @torch.no_grad()
    def fast() -> dict[str, torch.Tensor]:
        return {"memory_embeds": model.encode_memories(context)[0]}

    @torch.no_grad()
    def plain() -> dict[str, torch.Tensor]:
        rows = [torch.stack(memory_loop.encode_context(model, list(chunks))) for chunks in context]
        return {"memory_embeds": torch.stack(rows)}

    result = compare(fast, plain, tolerance=TOLERANCE, **timing)
    return {"given": {"contexts": shape[0], "chunks": shape[1], "chunk_length": shape[2]}, **result}


def measure_train_step(model: MemoryEncoderDecoderForCausalLM, sizes: Sizes, **timing: Any) -> dict[str, Any]:
    """Forward and backward of the causal loss on texts of several windows."""
    shape = (sizes.train_batch, sizes.train_windows * sizes.window_length)
    texts = random_tokens(sizes, *shape, seed=2)
    result = compare(
        lambda: train_step(model, lambda: model(texts, labels=texts, use_cache=False).loss),
        lambda: train_step(model, lambda: memory_loop.causal_loss(model, texts)),
        tolerance=TOLERANCE,
        **timing,
    )
    model.zero_grad(set_to_none=True)
    return {"given": {"texts": shape[0], "tokens": shape[1], "windows": sizes.train_windows}, **result}


def measure_generate(model: MemoryEncoderDecoderForCausalLM, sizes: Sizes, **timing: Any) -> dict[str, Any]:
    """Greedy generation that folds windows while it writes: with the cache, against reading all for every token."""
    prompt = random_tokens(sizes, 1, sizes.prompt_length, seed=3)
    count = sizes.new_tokens

    def fast() -> dict[str, torch.Tensor]:
        return {"tokens": model.generate(prompt, max_new_tokens=count, do_sample=False)[0]}

    def plain() -> dict[str, torch.Tensor]:
        return {"tokens": memory_loop.generate_greedily(model, prompt[0], count)}

    rolls = (sizes.prompt_length + count - 1) // sizes.window_length - (sizes.prompt_length - 1) // sizes.window_length
    result = compare(fast, plain, tolerance=0.0, **timing)
    given = {"texts": 1, "prompt_tokens": sizes.prompt_length, "new_tokens": count, "roll_overs": rolls}
    return {"given": given, **result}


def measure(sizes: Sizes, *, repetitions: int, seed: int) -> dict[str, Any]:
    """Run all measurements; returns the measured part of the record."""
    model = build_model(sizes, seed)
    timing = {"repetitions": repetitions}
    metrics: dict[str, Any] = {}
    comparisons = {"encode": measure_encode, "train_step": measure_train_step, "generate": measure_generate}
    for name, function in comparisons.items():
        metrics[name] = function(model, sizes, **timing)
        print(comparison_line(name, metrics[name]), flush=True)
    return metrics


def comparison_line(name: str, result: dict[str, Any]) -> str:
    """Say one comparison in a line."""
    fast, plain, ratio = result["spread"]["fast"], result["spread"]["plain"], result["ratio"]
    return (
        f"{name:<12} plain {plain['median']:.4f} s, fast {fast['median']:.4f} s, ratio {ratio['median']:.2f} "
        f"(quartiles {ratio['first_quartile']:.2f} to {ratio['third_quartile']:.2f}, extremes {ratio['min']:.2f} to "
        f"{ratio['max']:.2f})"
    )


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure and return the record."""
    sizes = QUICK if options.quick else Sizes()
    record = describe_run("speed", command, {"weights": options.seed})
    record["hardware"]["load_before"] = load_average()
    metrics = measure(sizes, repetitions=options.repetitions, seed=options.seed)
    record.update(
        quick=options.quick,
        dtype="float32",
        repetitions=options.repetitions,
        sizes=asdict(sizes),
        metrics=metrics,
        peak_memory_bytes=peak_memory_bytes(),
    )
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = benchmark_parser("speed", "Time the batched memory model against the plain loop.")
    parser.add_argument("--repetitions", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    return run_benchmark(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
