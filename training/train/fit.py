"""A plain training loop for measuring instruments: one module, one loss a step, resumable from a checkpoint.

Models are trained by `training/train/trainer.py`; here are the small decoders and readers that measurements train by
the dozen, on tensors that are already in memory.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm
from transformers import get_scheduler

from .optimizer import build_optimizer


@dataclass(frozen=True)
class Budget:
    """What a measurement may spend on training.

    Attributes:
        steps (`int`): Optimizer steps.
        batch_tokens (`int`): Tokens of text in a step.
        optimizer (`str`): `"muon"` (hidden matrices by Muon, the rest by AdamW) or `"adamw"`.
        learning_rate (`float`): Peak learning rate of AdamW.
        muon_learning_rate (`float`): Peak learning rate of Muon.
        warmup (`float`): Share of the steps in which the rates rise.
        decay (`float`): Share of the steps, at the end, in which they fall to zero.
        max_grad_norm (`float`): Largest norm of a step's gradient.
        bf16 (`bool`): Whether matrix products are computed in bfloat16; weights stay in float32.
        seed (`int`): Of fresh weights and of the order of texts.
    """

    steps: int = 400
    batch_tokens: int = 2048
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 5.0e-3
    muon_learning_rate: float = 1.0e-2
    warmup: float = 0.05
    decay: float = 0.7
    max_grad_norm: float = 1.0
    bf16: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")


@dataclass(frozen=True)
class Order:
    """The order in which texts are read: every text once an epoch, in another order each time.

    Attributes:
        num_rows (`int`): Texts.
        batch_size (`int`): Texts of a step.
        seed (`int`): Equal seeds give equal orders.

    >>> order = Order(num_rows=4, batch_size=2)
    >>> sorted(torch.cat([order.rows(0), order.rows(1)]).tolist())
    [0, 1, 2, 3]
    """

    num_rows: int
    batch_size: int
    seed: int = 0

    def rows(self, step: int) -> torch.Tensor:
        """Return the numbers of the texts of a step, `(min(batch_size, num_rows),)`."""
        size = min(self.batch_size, self.num_rows)
        epoch, place = divmod(step, self.num_rows // size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_rows, generator=generator)[place * size : (place + 1) * size]


def fit(
    module: nn.Module,
    loss_of_step: Callable[[int], torch.Tensor],
    budget: Budget,
    *,
    checkpoint: Path | None = None,
    save_steps: int = 100,
    label: str = "",
) -> list[float]:
    """Train a module.

    Args:
        module (`nn.Module`): What is trained: its parameters with `requires_grad`.
        loss_of_step (`Callable`): Number of the step -> loss, a scalar. It must depend on nothing but the number and
            the module, so that a run that was interrupted repeats nothing and skips nothing.
        budget (`Budget`): Steps and rates.
        checkpoint (`Path`, *optional*): File that the state is kept in; a second call resumes from it.
        save_steps (`int`): Steps between two savings.
        label (`str`): What the progress bar is headed by.

    Returns:
        `list[float]`: The loss of each step, in nats per token.

    Raises:
        ValueError: If the loss is not finite.
    """
    optimizer, scheduler = _optimizer_and_schedule(module, budget)
    device = next(module.parameters()).device
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    losses: list[float] = []
    parts: dict[str, Any] = {"module": module, "optimizer": optimizer, "scheduler": scheduler}
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        losses = state["losses"]
    module.train()
    shown: dict[str, Any] = {"leave": False, "disable": None, "file": sys.stderr, "mininterval": 1}
    bar = tqdm(total=budget.steps, initial=len(losses), desc=label, **shown)
    for step in range(len(losses), budget.steps):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=budget.bf16):
            loss = loss_of_step(step)
        value = loss.item()
        if not torch.isfinite(loss):
            raise ValueError(f"{label}: the loss is {value} at step {step + 1}; lower the learning rates")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, budget.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value)
        bar.update(1)
        if checkpoint is not None and len(losses) % save_steps == 0 and len(losses) < budget.steps:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            part_file = checkpoint.with_suffix(".part")
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"losses": losses}, part_file)
            part_file.replace(checkpoint)
    bar.close()
    module.eval()
    return losses


def _optimizer_and_schedule(module: nn.Module, budget: Budget) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = build_optimizer(
        module,
        optimizer=budget.optimizer,
        learning_rate=budget.learning_rate,
        muon_learning_rate=budget.muon_learning_rate,
    )
    scheduler = get_scheduler(
        "warmup_stable_decay",
        optimizer,
        num_warmup_steps=round(budget.warmup * budget.steps),
        num_training_steps=budget.steps,
        scheduler_specific_kwargs={"num_decay_steps": round(budget.decay * budget.steps), "decay_type": "linear"},
    )
    return optimizer, scheduler
