"""Part b: tokens a second in training, as a share of the chip's peak, and what bounds it.

Operations are those of forward and backward, counted by torch's own counter on the model as it runs: dense products,
the causal half that is masked included; the optimizer's are left out, its time is not. The plain loop of the same run
reads one chunk (autoencoder) or one text window by window (memory models) at a time, with all logits, not compiled:
what the paper's code does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from benchmarks.gpu.job import PEAK, Job, Numbers, finish, free_memory, peak_gib, seconds_of
from benchmarks.measure import assert_equal
from modeling_memory import (
    MaskedMixerConfig,
    MemoryAutoencoder,
    MemoryAutoencoderConfig,
    MemoryEncoderDecoderConfig,
    MemoryEncoderDecoderForCausalLM,
)
from tests.reference import memory_loop
from training.data.objectives import IGNORED
from training.train.chunked_loss import chunked_cross_entropy
from training.train.optimizer import build_optimizer
from training.train.trainer import compile_blocks, run_objective_chunked

Batch = dict[str, torch.Tensor]
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0, "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}  # fmt: skip
KINDS = {"attention": ("flash", "fmha", "attention"), "products": ("gemm", "cutlass", "matmul", "nvjet", "bmm")}


def autoencoder(width: int, toy: bool) -> MemoryAutoencoder:
    """Build the paper's autoencoder: 256 tokens of 8,000 through one vector, 8 layers on each side."""
    layers, length, vocabulary = (1, 16, 300) if toy else (8, 256, 8000)
    mixer = MaskedMixerConfig(
        vocab_size=vocabulary, hidden_size=32 if toy else width, num_hidden_layers=layers, num_heads=4,
        max_position_embeddings=length,
    )  # fmt: skip
    return MemoryAutoencoder(
        MemoryAutoencoderConfig(encoder=mixer.to_dict(), decoder=mixer.to_dict(), chunk_length=length)
    )


def paper_model(toy: bool) -> MemoryEncoderDecoderForCausalLM:
    """Build the paper's memory model: mixer encoder of 8 layers, Llama of 16, width 512, windows of 256."""
    length, width, vocabulary = (16, 32, 300) if toy else (256, 512, 8000)
    encoder = MaskedMixerConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1 if toy else 8, num_heads=4,
        max_position_embeddings=length,
    )  # fmt: skip
    decoder = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=1 if toy else 16,
        num_attention_heads=4 if toy else 8, num_key_value_heads=4 if toy else 8, max_position_embeddings=2048,
    )  # fmt: skip
    return MemoryEncoderDecoderForCausalLM(
        MemoryEncoderDecoderConfig(
            encoder=encoder, decoder=decoder, chunk_length=length, window_length=length, memory_token_id=vocabulary
        )
    )


def real_pair(toy: bool) -> MemoryEncoderDecoderForCausalLM:
    """Build the sizes of SmolLM2-135M and its token table, random weights: speed does not ask what they are."""
    small = {"vocab_size": 300, "hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 2}
    decoder = LlamaConfig(**(SMOLLM2 | small if toy else SMOLLM2))
    encoder = LlamaConfig(**decoder.to_dict() | {"num_hidden_layers": 0})
    config = MemoryEncoderDecoderConfig(
        encoder=encoder, decoder=decoder, encoder_layers=0, pooling="concat", max_group=16, chunk_length=16,
        memories_per_chunk=4, window_length=64, memory_positions="source", projector_start="identity_on_last",
        freeze_decoder=True, memory_token_id=decoder.vocab_size,
    )  # fmt: skip
    model = MemoryEncoderDecoderForCausalLM(config)
    model.add_adapters(["decoder"], r=14, lora_alpha=14)
    return model


def chunk_batch(model: Any, rows: int, device: torch.device) -> Batch:
    """Chunks for the autoencoder, `(rows, L)`."""
    ids = torch.randint(5, model.config.vocab_size, (rows, model.config.chunk_length), device=device)
    return {"input_ids": ids, "labels": ids}


def text_batch(model: Any, rows: int, device: torch.device) -> Batch:
    """Texts of four windows, `(rows, 4 W)`."""
    ids = torch.randint(5, model.config.decoder.vocab_size, (rows, 4 * model.config.window_length), device=device)
    return {"input_ids": ids, "shift_labels": torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)}


def slot_batch(model: Any, rows: int, device: torch.device) -> Batch:
    """128 tokens as memories of four, and 64 tokens after them: a step of the recipe `smollm2`."""
    config = model.config
    context = torch.randint(5, config.decoder.vocab_size, (rows, 8, config.chunk_length), device=device)
    after = torch.randint(5, config.decoder.vocab_size, (rows, 64), device=device)
    slots = torch.full((rows, 8 * config.memories_per_chunk), config.memory_token_id, device=device)
    unasked = torch.full_like(slots, IGNORED)
    return {
        "input_ids": torch.cat([slots, after], 1),
        "shift_labels": torch.cat([unasked, after[:, 1:], unasked[:, :1]], 1),
        "context_input_ids": context,
    }


def plain_texts(model: Any, batch: Batch) -> torch.Tensor:
    """Return the loss of the reference loop: a text, a window, a chunk at a time."""
    with torch.device(batch["input_ids"].device):
        return memory_loop.causal_loss(model, batch["input_ids"])


def plain_rows(model: Any, batch: Batch) -> torch.Tensor:
    """Return the loss of one row at a time; a context is encoded chunk by chunk."""
    losses = []
    for row in range(len(batch["input_ids"])):
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        if "labels" in one:
            losses.append(model(**one).loss)
            continue
        targets, context = one.pop("shift_labels"), one.pop("context_input_ids")
        chunks = [model.encode_memories(context[:, n : n + 1])[0] for n in range(context.shape[1])]
        logits = model(one["input_ids"], memory_embeds=torch.cat(chunks, 1), use_cache=False).logits
        losses.append(nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten()))
    return torch.stack(losses).mean()


def text_tokens(batch: Batch) -> int:
    """Tokens of text that a batch holds; slots are none."""
    context = batch.get("context_input_ids")
    asked = batch["input_ids"].numel() if context is None else batch["shift_labels"].shape[0] * 64 + context.numel()
    return asked


class Step:
    """One optimizer step of a model in bfloat16, its weights float32, its logits never whole."""

    def __init__(self, model: Any, chunk: int) -> None:
        self.model, self.chunk = model.train(), chunk
        algorithm = "adamw" if getattr(model.config, "freeze_decoder", False) else "muon"  # as in the recipes
        self.optimizer = build_optimizer(model, optimizer=algorithm, learning_rate=1e-4, muon_learning_rate=1e-4)
        self.device = next(model.parameters()).device

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean loss of a batch by the fast path."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            total, _, count = run_objective_chunked(self.model, batch, self.chunk, judge=False)
        return total / count

    def __call__(self, batch: Batch, plain: Callable[[Any, Batch], torch.Tensor] | None = None) -> None:
        """One step, its loss by the fast path or by a plain loop that is as precise."""
        if plain is None:
            value = self.loss(batch)
        else:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                value = plain(self.model, batch)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def count_operations(step: Step, batch: Batch) -> float:
    """Operations of forward and backward on one row of text, twice the multiply-adds."""
    with FlopCounterMode(display=False) as counter:
        step.loss(batch).backward()
    step.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(batch["input_ids"])


def sweep(job: Job, step: Step, make: Callable[[int], Batch], sizes: list[int], operations: float) -> list[Numbers]:
    """Time steps of growing batches until memory ends or nothing is gained."""
    rows: list[Numbers] = []
    for size in sizes:
        batch = make(size)
        try:
            seconds = seconds_of(partial(step, batch), job.device, repetitions=1 if job.toy else 5)
        except torch.OutOfMemoryError:
            rows.append({"batch": size, "failed": "out of memory"})
            break
        rows.append({
            "batch": size, "seconds": seconds, "tokens_per_second": text_tokens(batch) / seconds,
            "share_of_peak": operations * size / seconds / PEAK, "peak_gib": peak_gib(job.device),
        })  # fmt: skip
        if len(rows) > 1 and rows[-1]["tokens_per_second"] < 1.02 * rows[-2]["tokens_per_second"]:
            break
    return rows


def best_of(rows: list[Numbers]) -> Numbers:
    """Return the fastest of the rows that could be timed."""
    return max((row for row in rows if "seconds" in row), key=lambda row: row["tokens_per_second"])


def what_bounds(step: Step, batch: Batch) -> Numbers:
    """Share of a step's time by kind of kernel, and the share in which the device had nothing to do."""
    if step.device.type != "cuda":
        return {"missing": "kernels are told apart on a GPU"}
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        seconds = seconds_of(partial(step, batch), step.device, repetitions=3, warmup=0)
    spent: dict[str, float] = {"products": 0.0, "attention": 0.0, "the rest, by memory": 0.0}
    for event in profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            known = (kind for kind, words in KINDS.items() if any(word in event.key.lower() for word in words))
            spent[next(known, "the rest, by memory")] += event.self_device_time_total / 3e6
    shares = {kind: value / seconds for kind, value in spent.items()}
    return {**shares, "idle": max(0.0, 1 - sum(shares.values()))}


def measure_training(
    job: Job,
    build: Callable[[], Any],
    make: Callable[[Any, int, torch.device], Batch],
    plain: Callable[[Any, Batch], torch.Tensor],
    sizes: list[int],
    *,
    compiles: bool = True,
) -> Numbers:
    """Measure one model: plain loop, the fast path as it is, compiled and swept over batches, and what bounds it.

    Layers that read a cache, as windows after a shared prefix do, or hold adapters that know their rows, are compiled
    one by one and not once for all of them: minutes that are not there, so those models are timed as they are.
    """
    torch.manual_seed(0)
    model = build().to(job.device)
    step = Step(model, 32 if job.toy else 32768)
    few = make(model, 2 if job.toy else 8, job.device)
    found: Numbers = {"operations_per_row": count_operations(step, few)}
    seconds = seconds_of(partial(step, few, plain), job.device, repetitions=1 if job.toy else 2, warmup=1)
    found["plain"] = {"batch": len(few["input_ids"]), "tokens_per_second": text_tokens(few) / seconds}
    free_memory(job.device)
    build_batch = partial(make, model, device=job.device)
    found["fast"] = sweep(job, step, build_batch, sizes, found["operations_per_row"])
    found["compiled"] = []
    free_memory(job.device)
    best = best_of(found["fast"])
    if compiles:  # at one batch alone: each shape is compiled anew, and that takes longer than a sweep
        compile_blocks(model, backend="aot_eager" if job.toy else "inductor", dynamic=False)
        found["compiled"] = sweep(job, step, build_batch, [best["batch"]], found["operations_per_row"])
        best = best_of([best, *found["compiled"]])
    found["best"] = {**best, "times_plain": best["tokens_per_second"] / found["plain"]["tokens_per_second"]}
    free_memory(job.device)
    found["bound"] = what_bounds(step, build_batch(best["batch"]))
    return found


def measure_loss(job: Job, vocabulary: int, width: int) -> Numbers:
    """Cross entropy over a vocabulary with all logits and a chunk at a time: equal, seconds and memory of each."""
    tokens, chunk = (64, 16) if job.toy else (16384, 2048)
    head = nn.Linear(width, vocabulary, bias=False, device=job.device, dtype=torch.bfloat16)
    states = torch.randn(tokens, width, device=job.device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device=job.device)

    def whole() -> torch.Tensor:
        return nn.functional.cross_entropy(head(states).float(), targets, reduction="sum")

    def chunked() -> torch.Tensor:
        return chunked_cross_entropy(head, states, targets, chunk, judge=False)[0]

    def gradients(loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
        head.weight.grad = states.grad = None
        value = loss()
        value.backward()
        return {"loss": value.detach(), "states": states.grad, "weight": head.weight.grad}

    # bfloat16 sums of a chunk are rounded before they are added: 2 % of the largest gradient.
    found: Numbers = {"equality": assert_equal(gradients(chunked), gradients(whole), tolerance=2e-2)}
    for name, loss in (("all logits", whole), ("chunked", chunked)):
        free_memory(job.device)
        seconds = seconds_of(partial(gradients, loss), job.device, repetitions=1 if job.toy else 5)
        found[name] = {"seconds": seconds, "peak_gib": peak_gib(job.device)}
    return {**found, "tokens": tokens, "chunk": chunk, "width": width}


def measure_ceiling(job: Job) -> Numbers:
    """One large product of random numbers in bfloat16: what any code can reach on this very card."""
    size = 64 if job.toy else 8192
    one, other = (torch.randn(size, size, device=job.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = seconds_of(partial(torch.mm, one, other), job.device, repetitions=2 if job.toy else 10, warmup=3)
    finish(job.device)
    return {
        "size": size,
        "operations_per_second": 2 * size**3 / seconds,
        "share_of_peak": 2 * size**3 / seconds / PEAK,
    }


def run(job: Job) -> None:
    """Measure part b, the most telling figures first."""
    toy = job.toy
    many, few = ([1, 2], [1, 2]) if toy else ([128, 256, 512, 1024], [16, 32, 64, 128])
    job.note("peak", {"operations_per_second": PEAK, "source": "NVIDIA H200 datasheet, dense bfloat16"})
    job.measure("matrix product", partial(measure_ceiling, job))
    cases: dict[str, tuple[Any, ...]] = {
        "autoencoder, width 1024": (partial(autoencoder, 1024, toy), chunk_batch, plain_rows, many),
        "SmolLM2-135M pair": (partial(real_pair, toy), slot_batch, plain_rows, few if toy else [64, 128, 256]),
        "autoencoder, width 512": (partial(autoencoder, 512, toy), chunk_batch, plain_rows, many[1:]),
        "memory model of the paper's size": (partial(paper_model, toy), text_batch, plain_texts, few),
    }
    for name, case in cases.items():
        job.measure(name, partial(measure_training, job, *case, compiles=case[1] is chunk_batch))
    for vocabulary in (300, 500) if toy else (49152, 128256):
        job.measure(f"cross entropy over {vocabulary}", partial(measure_loss, job, vocabulary, 32 if toy else 1024))
