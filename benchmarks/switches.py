"""What the switches of a stage cost and save: time of a training step, in turn, and peak memory of the loss.

```bash
python -m benchmarks.switches                       # all parts, then benchmarks/results/switches.json
python -m benchmarks.switches --part steps          # one part: steps, compile, lengths, processes or loss_memory
python -m benchmarks.switches --quick               # toy sizes, to scratch/
```

Parts that were measured are kept in `runs/switches`, and the record is written when there are all; so a stopped call
goes on. What is compared runs forward and backward on the same rows with the same weights, and its loss is compared
before anything is timed. Peak memory is measured in a process of its own for each way of computing the loss.
"""

import argparse
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import UnequalPathsError, benchmark_parser, describe_run, interleave, run_benchmark, spread
from benchmarks.speed import QUICK, Sizes, build_model, random_tokens
from training.data.documents import DocumentRows
from training.data.encoded import encode_once
from training.data.objectives import BatchSpec, SpecialTokens
from training.data.rows import ObjectiveCollator, TokenRows
from training.data.sources import read_file
from training.data.texts import tokenise_documents
from training.data.tokenizer import train_tokenizer
from training.places import REPOSITORY
from training.records.record import data_digest, read_json, write_json
from training.train.chunked_loss import chunked_cross_entropy
from training.train.trainer import checkpoint_activations, compile_blocks, run_objective, run_objective_chunked

SEED, ROWS, CHUNK_OF_LOSS = 0, 16, 256
TOLERANCE = {"bf16": 2e-2, "all three": 2e-2, "compiled, all three": 2e-2}
TEXT = REPOSITORY / "training" / "corpora" / "wikinews" / "validation.parquet"


def special_tokens(sizes: Sizes) -> SpecialTokens:
    """Ids that random tokens never take, and the slot after the table."""
    return SpecialTokens(pad=0, eos=2, copy=3, blank=4, memory=sizes.vocab_size)


def step_of(
    network: nn.Module, batch: dict[str, torch.Tensor], *, bf16: bool = False, chunked: bool = False
) -> Callable[[], float]:
    """Forward and backward of a batch; returns the loss per target."""
    count = int((batch["shift_labels"] != -100).sum())

    def step() -> float:
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            if chunked:
                loss = run_objective_chunked(network, batch, CHUNK_OF_LOSS, judge=False)[0]
            else:
                loss = run_objective(network, batch)[0]
        loss.backward()
        return loss.item() / count

    return step


def batches(sizes: Sizes, model: Any, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Blank copy in the slots layout, the encoder in the step or encoded once."""
    source = sizes.window_length * sizes.train_windows
    tokens = random_tokens(sizes, ROWS * source + source, seed=SEED)
    encoded = encode_once(model, tokens, folder, bf16=False, device=torch.device("cpu"))
    collator = ObjectiveCollator(
        ["blank_copy"],
        BatchSpec(
            special_tokens(sizes),
            chunk_length=sizes.chunk_length,
            window_length=sizes.window_length,
            memories_per_chunk=sizes.memories_per_chunk,
            layout="slots",
        ),
    )
    rows = TokenRows(tokens, row_length=source, num_items=ROWS, seed=SEED, encoded=encoded)
    items = [rows[i] for i in range(ROWS)]
    return {
        "live": collator([item[:2] for item in items])["blank_copy"],
        "ready": collator(items)["blank_copy"],
    }


def switched(sizes: Sizes, *, again: bool = False, compiled: bool = False) -> Any:
    """The same model with a switch on."""
    model = build_model(sizes, SEED).train()
    if again:
        checkpoint_activations(model)
    if compiled:
        compile_blocks(model)
    return model


def compare(steps: dict[str, Callable[[], float]], repetitions: int, tokens: int) -> dict[str, Any]:
    """Time variants in turn, after a check that they compute the loss of the first."""
    first = next(iter(steps))
    began = {}
    losses = {}
    for name, step in steps.items():
        started = time.perf_counter()
        losses[name] = step()
        began[name] = time.perf_counter() - started
        if not abs(losses[name] - losses[first]) <= TOLERANCE.get(name, 1e-4) * losses[first]:
            raise UnequalPathsError(f"the loss is {losses[name]} with {name} and {losses[first]} without")
    seconds = interleave(steps, repetitions=repetitions, warmup=0)  # the comparison was one
    ratios = {
        name: [one / own for one, own in zip(seconds[first], times, strict=True)] for name, times in seconds.items()
    }
    return {
        "losses": losses,
        "seconds": seconds,
        "seconds_of_first_step": began,
        "tokens_per_second": {name: tokens / spread(times)["median"] for name, times in seconds.items()},
        "times_as_fast": {name: spread(values) for name, values in ratios.items()},
    }


def measure_steps(sizes: Sizes, repetitions: int) -> dict[str, Any]:
    """Switches one by one and together."""
    model, again = switched(sizes), switched(sizes, again=True)
    with tempfile.TemporaryDirectory() as folder:
        given = batches(sizes, model, Path(folder))
    live, ready = given["live"], given["ready"]
    steps = {
        "plain": step_of(model, live),
        "bf16": step_of(model, live, bf16=True),
        "activations computed again": step_of(again, live),
        "logits in chunks": step_of(model, live, chunked=True),
        "all three": step_of(again, live, bf16=True, chunked=True),
        "states encoded once": step_of(model, ready),
    }
    return compare(steps, repetitions, ROWS * sizes.window_length * sizes.train_windows)


def measure_compile(sizes: Sizes, repetitions: int) -> dict[str, Any]:
    """`torch.compile` of the layers, alone and with the others."""
    with tempfile.TemporaryDirectory() as folder:
        live = batches(sizes, switched(sizes), Path(folder))["live"]
    steps = {
        "plain": step_of(switched(sizes), live),
        "compiled": step_of(switched(sizes, compiled=True), live),
        "compiled, all three": step_of(switched(sizes, again=True, compiled=True), live, bf16=True, chunked=True),
    }
    return compare(steps, repetitions, ROWS * sizes.window_length * sizes.train_windows)


def measure_lengths(sizes: Sizes, repetitions: int, num_steps: int, row_length: int) -> dict[str, Any]:
    """A pass over the same documents, rows of a step of any length or of about one."""
    texts = list(read_file(TEXT))
    tokenizer = train_tokenizer(texts, sizes.vocab_size, max_bytes=400_000)
    tokens = tokenise_documents(tokenizer, texts).tokens
    model = build_model(replace(sizes, max_position_embeddings=2 * row_length), SEED).train()
    collator = ObjectiveCollator(
        ["causal"],
        BatchSpec(
            special_tokens(sizes), chunk_length=sizes.chunk_length, window_length=sizes.window_length, documents=True
        ),
    )
    passes, paddings, losses = {}, {}, {}
    for name, grouped in (("rows of any length", False), ("rows grouped by length", True)):
        rows = DocumentRows(
            tokens,
            eos_token_id=tokenizer.eos_token_id,
            row_length=row_length,
            shortest=sizes.window_length + 1,
            num_items=ROWS * num_steps,
            step_rows=ROWS,
            seed=SEED,
            group_by_length=grouped,
        )
        # One block of what is sorted together: the same rows both ways.
        rows.starts, rows.lengths = rows.starts[: ROWS * num_steps], rows.lengths[: ROWS * num_steps]
        given = [collator([rows[i + j] for j in range(ROWS)]) for i in range(0, len(rows), ROWS)]
        steps = [step_of(model, batch["causal"]) for batch in given]
        counts = [int((batch["causal"]["shift_labels"] != -100).sum()) for batch in given]
        shapes = sum(batch["causal"]["input_ids"].numel() for batch in given)
        paddings[name] = 1 - sum(int(batch["num_tokens"]) for batch in given) / shapes
        losses[name] = sum(step() * count for step, count in zip(steps, counts, strict=True)) / sum(counts)
        passes[name] = lambda steps=steps: [step() for step in steps]
        num_tokens = rows.num_tokens()
    one, other = losses.values()
    if not abs(one - other) <= 1e-4 * one:
        raise UnequalPathsError(f"the losses of one pass differ: {losses}")
    seconds = interleave(passes, repetitions=repetitions, warmup=0)
    plain, grouped_seconds = seconds.values()
    ratios = [before / after for before, after in zip(plain, grouped_seconds, strict=True)]
    return {
        "rows": ROWS * num_steps,
        "tokens": num_tokens,
        "row_length": row_length,
        "losses": losses,
        "padding": paddings,
        "seconds": seconds,
        "tokens_per_second": {name: num_tokens / spread(times)["median"] for name, times in seconds.items()},
        "times_as_fast": spread(ratios),
    }


def process(rank: int, port: int, sizes: Sizes, repetitions: int, results: Any) -> None:
    """One of two processes: the first alone on all rows, then both on half of them each, in turn."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = switched(sizes)
    both = DistributedDataParallel(switched(sizes))
    length = sizes.window_length * sizes.train_windows
    texts = random_tokens(sizes, ROWS, length, seed=SEED)
    collator = ObjectiveCollator(
        ["causal"],
        BatchSpec(special_tokens(sizes), chunk_length=sizes.chunk_length, window_length=sizes.window_length),
    )
    batch = collator(list(enumerate(texts)))["causal"]
    share = collator(list(enumerate(texts))[rank::2])["causal"]
    step_alone, step_both = step_of(model, batch), step_of(both, share)

    def alone() -> float:
        loss = step_alone() if rank == 0 else 0.0
        torch.distributed.barrier()
        return loss

    def shared() -> float:
        loss = torch.tensor(step_both() / 2)
        torch.distributed.all_reduce(loss)
        return loss.item()

    steps = {"1 process": alone, "2 processes": shared}
    losses = {name: step() for name, step in steps.items()}
    seconds = interleave(steps, repetitions=repetitions, warmup=0)
    if rank == 0:
        results.put((losses, seconds))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure_processes(sizes: Sizes, repetitions: int) -> dict[str, Any]:
    """The causal step of a memory model by one process and by two over gloo, a thread each, on the same rows."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    both = [context.Process(target=process, args=(rank, port, sizes, repetitions, results)) for rank in range(2)]
    for one in both:
        one.start()
    losses, seconds = results.get(timeout=500)
    for one in both:
        one.join()
    single, double = losses.values()
    if not abs(single - double) <= 1e-4 * single:
        raise UnequalPathsError(f"the losses differ: {losses}")
    plain, shared = seconds.values()
    ratios = [before / after for before, after in zip(plain, shared, strict=True)]
    tokens = ROWS * sizes.window_length * sizes.train_windows
    return {
        "losses": losses,
        "seconds": seconds,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "tokens_per_second": {name: tokens / spread(times)["median"] for name, times in seconds.items()},
        "times_as_fast": spread(ratios),
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


def parts(sizes: Sizes, repetitions: int, *, quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, by name."""
    memory = (1000, 8, 64, 16) if quick else (131_072, 128, 1024, CHUNK_OF_LOSS // 2)
    num_steps, row_length = (3, 32) if quick else (5, 256)
    lengths = sizes if quick else replace(sizes, hidden_size=128, intermediate_size=384)
    words = replace(sizes, vocab_size=max(sizes.vocab_size, 512))
    return {
        "loss_memory": lambda: measure_memory(*memory),
        "steps": lambda: measure_steps(sizes, repetitions),
        "compile": lambda: measure_compile(sizes, repetitions),
        "lengths": lambda: measure_lengths(
            replace(lengths, vocab_size=words.vocab_size), repetitions, num_steps, row_length
        ),
        "processes": lambda: measure_processes(sizes, repetitions),
    }


def run(options: argparse.Namespace, command: str) -> dict[str, Any] | None:
    """Measure the parts asked for that are not there yet; returns the record when there are all."""
    sizes = QUICK if options.quick else Sizes()
    record = describe_run("switches", command, {"weights": SEED})
    known = parts(sizes, options.repetitions, quick=options.quick)
    if options.part is not None and options.part not in known:
        raise ValueError(f"there is no part {options.part!r}; known: {', '.join(known)}")
    given = {"threads": torch.get_num_threads(), "repetitions": options.repetitions, "quick": options.quick}
    folder = REPOSITORY / options.folder / data_digest({"code": record["code"], **given})[:16]
    for name, measure in known.items():
        if options.part in (None, name) and not (folder / f"{name}.json").exists():
            write_json(folder / f"{name}.json", measure())
            print(f"{name} measured", flush=True)
    measured = {name: read_json(folder / f"{name}.json") for name in known}
    if None in measured.values():
        return None
    record.update(metrics=measured, repetitions=options.repetitions)
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 3 while parts are missing."""
    parser = benchmark_parser("switches", "Measure what the switches of a stage cost and save.")
    parser.set_defaults(threads=1)
    parser.add_argument("--repetitions", type=int, default=5, help="timed rounds")
    parser.add_argument("--part", help="measure only this part, if it is not there yet")
    parser.add_argument("--folder", default="runs/switches", help="where measured parts are kept")
    return run_benchmark(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
