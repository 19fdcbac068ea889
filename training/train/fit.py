"""A plain training loop for measuring instruments: one module, one loss a step, resumable from a checkpoint.

Models are trained by `training/train/trainer.py`; here are the small decoders and readers that measurements train by
the dozen, on tensors that are already in memory.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
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
        decay (`float`): Share of the steps, before the rest, in which they fall to `floor` of the peak.
        rest (`float`): Share of the steps, at the end, in which they stay there.
        floor (`float`): What the rates fall to, as a share of the peak.
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
    rest: float = 0.0
    floor: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")


PLATEAU_SHARE, PLATEAU_FALL, PLATEAU_NATS = 0.2, 0.005, 0.005
"""At a plateau the validation loss fell by under 0.5 % over the last 20 % of the steps, or by under 0.005 nats: of a
loss that tends to zero no share ever stays small."""


@dataclass
class Validation:
    """The validation loss of a training, by steps, and whether it still falls.

    Attributes:
        measure (`Callable`): Gives the loss, in nats per token; the module is in `eval()` and without gradients.
        every (`int`): Steps between two measurements.
        stop_after (`int`, *optional*): From this step on training ends at the first plateau. Default: it never does.
        points (`list`): Pairs of a step and the loss after it.

    >>> falling = Validation(lambda: 0.0, every=1, points=[(80, 2.0), (90, 1.9), (100, 1.8)])
    >>> round(falling.fall, 3), falling.at_plateau
    (0.1, False)
    >>> Validation(lambda: 0.0, every=1, points=[(80, 2.0), (100, 1.995)]).at_plateau
    True
    """

    measure: Callable[[], float]
    every: int
    stop_after: int | None = None
    points: list[tuple[int, float]] = field(default_factory=list)

    @property
    def fall(self) -> float | None:
        """By what share of itself the loss fell over the last 20 % of the steps; `None` before there are as many."""
        before = self._before()
        return None if before is None else (before - self.points[-1][1]) / max(before, 1e-9)

    @property
    def at_plateau(self) -> bool:
        """Whether it fell by under 0.5 %, or by under 0.005 nats."""
        before = self._before()
        return before is not None and before - self.points[-1][1] < max(PLATEAU_FALL * before, PLATEAU_NATS)

    def _before(self) -> float | None:
        """Return the loss after 80 % of the steps so far, on the line between the measurements around it."""
        place = (1 - PLATEAU_SHARE) * (self.points[-1][0] if self.points else 0)
        for (start, first), (end, second) in zip(self.points, self.points[1:], strict=False):
            if start <= place <= end:
                return first + (second - first) * (place - start) / (end - start)
        return None

    @torch.no_grad()
    def after(self, step: int, module: nn.Module, autocast: Any) -> bool:
        """Measure if it is time to; returns whether training may end."""
        if step % self.every:
            return False
        module.eval()
        with autocast:
            self.points.append((step, self.measure()))
        module.train()
        return self.stop_after is not None and step >= self.stop_after and self.at_plateau


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
    validation: Validation | None = None,
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
        validation (`Validation`, *optional*): Measured on the way; may end training before the last step.
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
        if validation is not None:
            validation.points = [(step, loss) for step, loss in state["validation"]]
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
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=budget.bf16)
        if validation is not None and validation.after(len(losses), module, autocast):
            break
        if checkpoint is not None and len(losses) % save_steps == 0 and len(losses) < budget.steps:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            part_file = checkpoint.with_suffix(".part")
            curve = [] if validation is None else validation.points
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save(states | {"losses": losses, "validation": curve}, part_file)
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
        num_training_steps=budget.steps - round(budget.rest * budget.steps),  # after these the rates stay
        scheduler_specific_kwargs={
            "num_decay_steps": round(budget.decay * budget.steps),
            "decay_type": "linear",
            "min_lr_ratio": budget.floor,
        },
    )
    return optimizer, scheduler
