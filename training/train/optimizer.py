"""Muon for hidden matrices, AdamW for everything else, in one optimizer object.

`torch.optim.Muon` orthogonalises the update of a matrix and is only meant for the matrices between the
token table and the output head. Tables, heads, norms, biases and the mixer's stacked token-mixing weights
go to AdamW. Both share one list of parameter groups and one state, so schedulers, `Trainer` checkpoints and
resuming see a single ordinary optimizer.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

ALGORITHMS = ("muon", "adamw")


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer whose groups carry an `algorithm`: `"muon"` or `"adamw"`.

    Args:
        params (`Iterable[dict]`): Parameter groups; each has `params` and `algorithm`, and may override `lr`,
            `weight_decay`, and `betas` (AdamW) or `momentum` (Muon).
        lr (`float`): Learning rate of groups that give none.
        weight_decay (`float`): Decoupled weight decay of groups that give none.

    Muon uses `adjust_lr_fn="match_rms_adamw"`, so that an update has the size an AdamW update would have
    (Liu et al. 2025, arXiv 2502.16982).

    Raises:
        ValueError: If a group names no known algorithm, or a Muon group holds a parameter that is no matrix.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, params: Iterable[dict[str, Any]], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        groups = [dict(group) for group in params]
        for group in groups:
            given = group.get("algorithm")
            if given not in ALGORITHMS:
                raise ValueError(f"a parameter group has algorithm {given!r}, expected muon or adamw")
        # The inner optimizers fill in and check the defaults of their own groups; then the groups are shared.
        self._inner: dict[str, torch.optim.Optimizer] = {}
        for algorithm in ALGORITHMS:
            own = [group for group in groups if group["algorithm"] == algorithm]
            if own:
                self._inner[algorithm] = _build_inner(algorithm, own, lr, weight_decay)
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.param_groups = [self._filled(group) for group in self.param_groups]
        self._share()

    def _filled(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the inner optimizer's version of a group, with all its algorithm's settings."""
        first = group["params"][0]
        inner = self._inner[group["algorithm"]]
        return next(other for other in inner.param_groups if any(first is p for p in other["params"]))

    def _share(self) -> None:
        """Point the inner optimizers at this object's groups and state, again after each load."""
        for algorithm, inner in self._inner.items():
            inner.param_groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            inner.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; return the closure's loss if one was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner in self._inner.values():
            inner.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state written by `state_dict`, keeping the inner optimizers attached to it."""
        super().load_state_dict(state_dict)
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_inner" in self.__dict__:
            self._share()


def _build_inner(
    algorithm: str, groups: list[dict[str, Any]], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    if algorithm == "muon":
        return torch.optim.Muon(groups, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def build_optimizer(
    model: nn.Module,
    *,
    optimizer: str = "muon",
    learning_rate: float,
    muon_learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    lr_multipliers: dict[str, float] | None = None,
) -> MuonAdamW:
    """Build the optimizer of a model's trainable parameters; frozen ones are left out and get no state.

    Args:
        model (`nn.Module`): Model whose parameters with `requires_grad` are trained.
        optimizer (`str`): `"muon"` (hidden matrices by Muon, the rest by AdamW) or `"adamw"` (all by AdamW).
        learning_rate (`float`): Peak learning rate of AdamW.
        muon_learning_rate (`float`): Peak learning rate of Muon.
        weight_decay (`float`): Decay of matrices; vectors (norms, biases) are never decayed.
        betas (`tuple`): AdamW's moment decay rates.
        lr_multipliers (`dict`, *optional*): Regular expression -> factor on the learning rate of parameters
            whose name it is found in; the first that matches counts.

    Raises:
        ValueError: If nothing is trainable, the optimizer is unknown or an expression matches no parameter.
    """
    if optimizer not in ("muon", "adamw"):
        raise ValueError(f"optimizer is {optimizer!r}, expected muon or adamw")
    multipliers = lr_multipliers or {}
    matrices = hidden_matrix_names(model)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter; unfreeze the encoder or the decoder")
    for pattern in multipliers:
        if not any(re.search(pattern, name) for name, _ in named):
            raise ValueError(
                f"lr_multipliers: {pattern!r} matches no trainable parameter; names look like {named[0][0]}"
            )
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for name, parameter in named:
        algorithm = "muon" if optimizer == "muon" and name in matrices else "adamw"
        factor = next((value for pattern, value in multipliers.items() if re.search(pattern, name)), 1.0)
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        peak = muon_learning_rate if algorithm == "muon" else learning_rate
        group = {"params": [], "algorithm": algorithm, "lr": peak * factor, "weight_decay": decay}
        if algorithm == "adamw":
            group["betas"] = betas
        groups.setdefault((algorithm, factor, decay), group)["params"].append(parameter)
    return MuonAdamW(groups.values(), lr=learning_rate, weight_decay=weight_decay)


def hidden_matrix_names(model: nn.Module) -> set[str]:
    """Names of the matrices between token table and head: 2-D, no embedding table, no output head, no stacked biases.

    A weight that is tied to a table counts as the table. Weights with three dimensions (the mixer's
    per-head token mixing, convolution kernels) are not matrices.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        if head is not None:
            tables.add(id(head.weight))
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not name.endswith("bias") and id(parameter) not in tables
    }
