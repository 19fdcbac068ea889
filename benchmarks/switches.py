"""What the switches of a stage cost and save: time of a training step, in turn, and peak memory of the loss.

```bash
python -m benchmarks.switches            # writes benchmarks/results/switches.json
python -m benchmarks.switches --quick    # toy sizes, to scratch/
```

Each variant runs forward and backward on the same rows with the same weights; its loss is compared with the first
one's before anything is timed. Peak memory is measured in a process of its own for each way of computing the loss.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import UnequalPathsError, describe_run, interleave, save_record, spread
from benchmarks.speed import QUICK, Sizes, build_model, random_tokens
from training.chunked_loss import chunked_cross_entropy
from training.encoded import encode_once
from training.objectives import SpecialTokens
from training.rows import ObjectiveCollator, TokenRows
from training.strict_yaml import REPOSITORY
from training.trainer import checkpoint_activations, run_objective, run_objective_chunked

SEED, ROWS, CHUNK_OF_LOSS = 0, 16, 256
VARIANTS = ("plain", "bf16", "activations computed again", "logits in chunks", "all three", "states encoded once")
TOLERANCE = {"bf16": 2e-2, "all three": 2e-2}


def training_steps(sizes: Sizes, folder: Path) -> dict[str, Callable[[], float]]:
    """One training step of blank copy in the slots layout, by variant; each returns its loss per target."""
    model = build_model(sizes, SEED).train()
    again = build_model(sizes, SEED).train()
    checkpoint_activations(again)
    source = sizes.window_length * sizes.train_windows
    tokens = random_tokens(sizes, ROWS * source + source, seed=SEED)
    encoded = encode_once(model, tokens, folder, bf16=False, device=torch.device("cpu"))
    special = SpecialTokens(pad=0, eos=2, copy=3, blank=4, memory=sizes.vocab_size)
    collator = ObjectiveCollator(
        ["blank_copy"],
        special,
        chunk_length=sizes.chunk_length,
        window_length=sizes.window_length,
        memories_per_chunk=sizes.memories_per_chunk,
        layout="slots",
    )
    rows = TokenRows(tokens, row_length=source, num_items=ROWS, seed=SEED, encoded=encoded)
    items = [rows[i] for i in range(ROWS)]
    ready = collator(items)["blank_copy"]
    live = collator([item[:2] for item in items])["blank_copy"]
    count = int((live["shift_labels"] != -100).sum())

    def step(
        network: nn.Module, batch: dict[str, torch.Tensor], *, bf16: bool = False, chunked: bool = False
    ) -> float:
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            if chunked:
                loss = run_objective_chunked(network, batch, CHUNK_OF_LOSS, judge=False)[0]
            else:
                loss = run_objective(network, batch)[0]
        loss.backward()
        return loss.item() / count

    return {
        "plain": lambda: step(model, live),
        "bf16": lambda: step(model, live, bf16=True),
        "activations computed again": lambda: step(again, live),
        "logits in chunks": lambda: step(model, live, chunked=True),
        "all three": lambda: step(again, live, bf16=True, chunked=True),
        "states encoded once": lambda: step(model, ready),
    }


def measure_steps(sizes: Sizes, repetitions: int) -> dict[str, Any]:
    """Time the variants in turn, after a check that they compute the same loss."""
    with tempfile.TemporaryDirectory() as folder:
        steps = training_steps(sizes, Path(folder))
        losses = {name: step() for name, step in steps.items()}
        for name, loss in losses.items():
            if not abs(loss - losses["plain"]) <= TOLERANCE.get(name, 1e-4) * losses["plain"]:
                raise UnequalPathsError(f"the loss is {loss} with {name} and {losses['plain']} without")
        seconds = interleave(steps, repetitions=repetitions)
    ratios = {
        name: [one / own for one, own in zip(seconds["plain"], times, strict=True)] for name, times in seconds.items()
    }
    tokens = ROWS * sizes.window_length * sizes.train_windows
    return {
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second": {name: tokens / spread(times)["median"] for name, times in seconds.items()},
        "times_as_fast": {name: spread(values) for name, values in ratios.items()},
    }


def loss_memory(vocab_size: int, width: int, num_tokens: int, chunk: int | None) -> dict[str, float]:
    """Forward and backward of the loss alone; bytes of the peak above what stood before, and the loss."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    head = nn.Linear(width, vocab_size, bias=False)
    states = torch.randn(num_tokens, width, requires_grad=True)
    targets = torch.randint(0, vocab_size, (num_tokens,))
    head.weight.grad = torch.zeros_like(head.weight)  # stands in any case
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if chunk is None:
        loss = nn.functional.cross_entropy(head(states).float(), targets, reduction="sum")
    else:
        loss, _ = chunked_cross_entropy(head, states, targets, chunk, judge=False)
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"bytes": (peak - before) * 1024, "loss": loss.item()}


def measure_memory(vocab_size: int, width: int, num_tokens: int, chunk: int) -> dict[str, Any]:
    """Peak memory of the loss whole and in chunks, each in a process of its own."""
    results = {}
    for name, size in (("whole", None), ("chunked", chunk)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[name] = pool.apply(loss_memory, (vocab_size, width, num_tokens, size))
    if not abs(results["whole"]["loss"] - results["chunked"]["loss"]) <= 1e-5 * results["whole"]["loss"]:
        raise UnequalPathsError(f"the losses differ: {results}")
    return {"vocab_size": vocab_size, "width": width, "tokens": num_tokens, "chunk": chunk, **results}


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.switches", description="Measure the switches.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repetitions", type=int, default=5, help="timed rounds")
    parser.add_argument("--quick", action="store_true", help="toy sizes; the record goes to scratch/")
    parser.add_argument("--out", help="file of the record; default: benchmarks/results/switches.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = build_parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    sizes = QUICK if options.quick else Sizes()
    record = describe_run("switches", f"python -m benchmarks.switches --threads {options.threads}", {"weights": SEED})
    memory = (1000, 8, 64, 16) if options.quick else (131_072, 128, 1024, CHUNK_OF_LOSS // 2)
    record["metrics"] = {"loss_memory": measure_memory(*memory), "steps": measure_steps(sizes, options.repetitions)}
    record["repetitions"] = options.repetitions
    path = save_record(record, "switches", options.out, publish=not options.quick)
    print(f"record: {path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
