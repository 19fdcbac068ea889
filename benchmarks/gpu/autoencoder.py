"""Part c: the paper's autoencoder, 256 tokens of a vocabulary of 8,000 in 512 numbers, for as long as there is time.

A few steps say how many there will be; rates rise for 2 % of them and fall to zero over the last 70 %. Rows begin
anywhere in the stream, so no two passes read the same ones. Everything but the text stays on the device.
"""

import time
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bundle import read_tokens
from benchmarks.gpu.job import Job, Numbers, finish, peak_gib
from benchmarks.gpu.throughput import autoencoder
from training.records.record import data_digest, read_json, write_json
from training.train.fit import Budget, Validation, fit
from training.train.trainer import compile_blocks, run_objective_chunked

RATE = 5.0e-3  # of the recipe `paper_scale`
FIRST_STEPS = 10
RESERVE = 25.0  # saving, and looking at the held-out text


@torch.no_grad()
def accuracy(model: Any, rows: torch.Tensor, size: int) -> Numbers:
    """Share of the tokens of rows `(N, L)` that come back, of any documents held out, and their loss in nats."""
    right, nats = 0.0, 0.0
    for some in rows.split(size):
        with torch.autocast(rows.device.type, dtype=torch.bfloat16):
            total, correct, _ = run_objective_chunked(model, {"input_ids": some, "labels": some}, 32768)
        right, nats = right + correct.item(), nats + total.item()
    return {"token_accuracy": right / rows.numel(), "loss": nats / rows.numel()}


def train(job: Job, model: Any, batch: int) -> Numbers:
    """Train until the part's time is all but over; a second call resumes from the last checkpoint."""
    device, length = job.device, model.config.chunk_length
    tokens, held = (read_tokens(job.payload, f"chunks_{split}").to(device) for split in ("train", "validation"))
    rows = held[: min(8 if job.toy else 2048, len(held) // length) * length].view(-1, length).long()
    kept, checkpoint = job.folder / "autoencoder.json", job.folder / "autoencoder.pt"
    budget = partial(Budget, learning_rate=RATE, muon_learning_rate=RATE, warmup=0.02, decay=0.7)

    def loss_of_step(step: int) -> torch.Tensor:
        starts = torch.randint(len(tokens) - length + 1, (batch, 1), generator=torch.Generator().manual_seed(step))
        ids = tokens[starts.to(device) + torch.arange(length, device=device)].long()
        total, _, count = run_objective_chunked(model, {"input_ids": ids, "labels": ids}, 32768, judge=False)
        return total / count

    known: Numbers = read_json(kept) or {}
    if not known:
        for _ in range(2):  # the first to compile
            finish(device)
            started = time.monotonic()
            fit(model, loss_of_step, budget(steps=1 if job.toy else FIRST_STEPS))
            finish(device)
        each = (time.monotonic() - started) / FIRST_STEPS * 1.05
        known = {"steps": 4 if job.toy else max(FIRST_STEPS, int((job.left() - RESERVE) / each)), "curve": []}
        write_json(kept, known)
    steps, curve = known["steps"], known["curve"]
    every = max(1, steps // 10)
    started = time.monotonic() - (curve[-1]["seconds"] if curve else 0.0)

    def look() -> float:
        found = accuracy(model, rows, batch)
        curve.append({"steps": every * (len(curve) + 1), "seconds": time.monotonic() - started, **found})
        job.note("curve", curve)
        write_json(kept, known)
        return float(found["loss"])

    validation = Validation(look, every=every)
    fit(model, loss_of_step, budget(steps=steps), checkpoint=checkpoint, save_steps=every, validation=validation)
    finish(device)
    seconds, read = time.monotonic() - started, steps * batch * length
    return {
        **accuracy(model, rows, batch), "steps": steps, "seconds": seconds, "tokens": read,
        "passes": read / len(tokens), "held_out_chunks": len(rows), "batch": batch, "peak_gib": peak_gib(device),
    }  # fmt: skip


def run(job: Job) -> None:
    """Measure part c; the weights go to the folder `weights/autoencoder`, in bfloat16."""
    torch.manual_seed(0)
    model = autoencoder(512, job.toy).to(job.device)
    if not job.toy:
        compile_blocks(model, dynamic=False)
    job.note("setting", {"vector": model.config.encoder.hidden_size, "rate": RATE})
    job.measure("held out", partial(train, job, model, 4 if job.toy else 512))
    folder = job.folder / "weights" / "autoencoder"
    model.to(torch.bfloat16).save_pretrained(folder)
    job.note("weights", {"folder": folder.name, "config": data_digest(model.config.to_dict())})
