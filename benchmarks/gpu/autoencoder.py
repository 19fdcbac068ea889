"""Part c: the paper's autoencoder, 256 tokens of 8,000 in 512 numbers, trained for as long as there is time.

Rates follow the clock, not a number of steps: they rise for 2 % of the time and fall to zero over its last 70 %. Rows
begin anywhere in the stream, so no two passes read the same ones. Everything but the text stays on the device.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bundle import read_tokens
from benchmarks.gpu.job import Job, Numbers, finish, peak_gib
from benchmarks.gpu.throughput import autoencoder
from training.records.record import data_digest
from training.train.optimizer import build_optimizer
from training.train.trainer import compile_blocks, run_objective_chunked

WARMUP, DECAY = 0.02, 0.7
RATE = 5.0e-3  # of the recipe `paper_scale`


def rate_at(share: float) -> float:
    """Return the factor on the learning rates after a share of the time.

    >>> [round(rate_at(share), 3) for share in (0.0, 0.01, 0.3, 0.65, 1.0)]
    [0.01, 0.5, 1.0, 0.5, 0.0]
    """
    return max(0.0, min(1.0, max(share, WARMUP / 100) / WARMUP, (1 - share) / DECAY))


def draw(tokens: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Draw rows `(rows, length)` from anywhere in a stream, on its device."""
    starts = torch.randint(len(tokens) - length + 1, (rows, 1), device=tokens.device)
    return tokens[starts + torch.arange(length, device=tokens.device)].long()


@torch.no_grad()
def accuracy(model: Any, rows: torch.Tensor, size: int) -> Numbers:
    """Share of the tokens of rows `(N, L)` that come back, of any documents held out, and their loss in nats."""
    model.eval()
    right, nats = 0.0, 0.0
    for some in rows.split(size):
        with torch.autocast(rows.device.type, dtype=torch.bfloat16):
            total, correct, _ = run_objective_chunked(model, {"input_ids": some, "labels": some}, 32768)
        right, nats = right + correct.item(), nats + total.item()
    model.train()
    return {"token_accuracy": right / rows.numel(), "loss": nats / rows.numel()}


class Training:
    """The model on its way; its state lies in a file, from which a second call goes on.

    Args:
        job (`Job`): Its device, time and folder.
        state (`Path`): The file.
    """

    def __init__(self, job: Job, state: Path) -> None:
        torch.manual_seed(0)
        self.job, self.state = job, state
        self.model = autoencoder(512, job.toy).to(job.device).train()
        self.optimizer = build_optimizer(self.model, learning_rate=RATE, muon_learning_rate=RATE)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps, self.spent, self.curve = 0, 0.0, []
        if state.is_file():
            before = torch.load(state, map_location=job.device, weights_only=True)
            self.model.load_state_dict(before["model"])
            self.optimizer.load_state_dict(before["optimizer"])
            self.steps, self.spent, self.curve = before["steps"], before["spent"], before["curve"]
        if not job.toy:
            compile_blocks(self.model)

    def step(self, rows: torch.Tensor, share: float) -> None:
        """One step on rows `(B, L)`, after a share of the time."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * rate_at(share)
        with torch.autocast(rows.device.type, dtype=torch.bfloat16):
            total, _, count = run_objective_chunked(
                self.model, {"input_ids": rows, "labels": rows}, 32768, judge=False
            )
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def save(self) -> None:
        """Write the state beside its place and rename it."""
        part = self.state.with_suffix(".part")
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**parts, "steps": self.steps, "spent": self.spent, "curve": self.curve}, part)
        part.replace(self.state)


def train(job: Job, training: Training, batch: int) -> Numbers:
    """Train until the part's time is all but over; keep the accuracy against time as it grows."""
    device, length = job.device, training.model.config.chunk_length
    tokens, held = (read_tokens(job.payload, f"chunks_{split}").to(device) for split in ("train", "validation"))
    number = min(8 if job.toy else 2048, len(held) // length)
    rows = held[: number * length].view(number, length).long()
    reserve = 1.0 if job.toy else 15.0  # saving and one more look at the held-out text
    limit = training.spent + job.left() - reserve
    started, looked, before = time.monotonic(), time.monotonic(), training.spent
    while training.spent < limit and not (job.toy and training.steps >= 4):
        training.step(draw(tokens, batch, length), training.spent / limit)
        if training.steps % 10 == 0:
            finish(device)
        training.spent = before + time.monotonic() - started
        if time.monotonic() - looked > (0.0 if job.toy else 15.0):
            looked = time.monotonic()
            training.curve.append(
                {"seconds": training.spent, "steps": training.steps, **accuracy(training.model, rows, batch)}
            )
            job.note("curve", training.curve)
            training.save()
    finish(device)
    read = training.steps * batch * length
    return {
        **accuracy(training.model, rows, batch), "steps": training.steps, "seconds": training.spent,
        "tokens": read, "tokens_per_second": read / max(training.spent, 1e-9), "passes": read / len(tokens),
        "held_out_chunks": number, "batch": batch, "peak_gib": peak_gib(device),
    }  # fmt: skip


def run(job: Job) -> None:
    """Measure part c; the weights go to the folder `weights/autoencoder`, in bfloat16."""
    training = Training(job, job.folder / "autoencoder.pt")
    job.note(
        "setting",
        {"vector": training.model.config.encoder.hidden_size, "rate": RATE, "warmup": WARMUP, "decay": DECAY},
    )
    job.measure("held out", partial(train, job, training, 4 if job.toy else 512))
    training.save()
    folder = job.folder / "weights" / "autoencoder"
    training.model.to(torch.bfloat16).save_pretrained(folder)
    job.note("weights", {"folder": folder.name, "config": data_digest(training.model.config.to_dict())})
