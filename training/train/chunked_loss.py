"""Cross entropy without the logits: the output head runs on a few tokens at a time, forward and backward.

The logits of N tokens over a vocabulary of V take 4 N V bytes, several times over: at V = 128k they outweigh a small
model. Here the model returns its last states instead, and for each chunk of tokens the head, the softmax and the sum
are computed and, in the backward pass, computed again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..data.objectives import IGNORED


def chunked_cross_entropy(
    head: nn.Module, states: torch.Tensor, targets: torch.Tensor, chunk: int, *, judge: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the cross entropy of targets, with the logits of `chunk` tokens at a time.

    Args:
        head (`nn.Module`): Output head, whose class maps states `(n, D)` to logits `(n, V)`.
        states (`torch.Tensor` of shape `(..., D)`): What the head reads.
        targets (`torch.LongTensor` of shape `(...)`): Token ids, -100 where nothing is asked; these cost nothing.
        chunk (`int`): Tokens whose logits exist at once.
        judge (`bool`): Whether to count right tokens, which takes an argmax over the vocabulary.

    Returns:
        The sum in nats, a scalar with gradient, and the number of targets that have the highest logit.
    """
    present = targets != IGNORED
    states, targets = states[present], targets[present]  # (N, D), (N,)
    total = states.sum(dtype=torch.float32) * 0.0  # a batch without a target still reaches every parameter below
    correct = torch.zeros((), dtype=torch.long, device=targets.device)
    for some, wanted in zip(states.split(chunk), targets.split(chunk), strict=True):
        loss, right = checkpoint(_chunk, head, some, wanted, judge, use_reentrant=False)
        total, correct = total + loss, correct + right
    return total, correct


def _chunk(head: nn.Module, states: torch.Tensor, targets: torch.Tensor, judge: bool) -> tuple[Any, torch.Tensor]:
    logits = type(head).forward(head, states).float()  # the instance's own forward may be switched off
    right = (logits.detach().argmax(-1) == targets).sum() if judge else torch.zeros_like(targets[0])
    return nn.functional.cross_entropy(logits, targets, reduction="sum"), right


@contextmanager
def without_head(model: nn.Module) -> Iterator[nn.Module]:
    """Let a model return its last states in the place of logits; yields the head.

    Args:
        model (`nn.Module`): With `get_output_embeddings`.
    """
    head = model.get_output_embeddings()
    if "forward" in vars(head):  # switched off already, further out
        yield head
        return
    head.forward = lambda states: states
    try:
        yield head
    finally:
        del head.forward


@torch.no_grad()
def check_head(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Check that a model's logits are its head's output and nothing more.

    Args:
        model (`nn.Module`): A causal LM or an autoencoder.
        inputs (`dict`): Arguments of its `forward`, without labels.

    Raises:
        ValueError: If it has no head, or scales or caps the logits after it.
    """
    head = model.get_output_embeddings()
    if head is not None:
        training = model.training
        model.eval()
        logits = model(**inputs).logits
        with without_head(model):
            states = model(**inputs).logits
        model.train(training)
        if torch.allclose(head(states), logits, rtol=1e-3, atol=1e-4):
            return
    raise ValueError(
        f"training.loss_chunk is set, but {type(model).__name__} does more to its logits than its output head (a cap, "
        "a scale) or has none; leave loss_chunk out"
    )
