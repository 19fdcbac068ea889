"""`concat` and its projector as a plain loop: the definition that the fast path must equal."""

import math

import torch


def concat_loop(
    states: torch.Tensor,
    mask: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    lookback: int = 0,
    bos: torch.Tensor | None = None,
) -> torch.Tensor:
    """Project groups of states: the last token of a group is read by the last block of the weight, and so on.

    Args:
        states (`torch.Tensor` of shape `(N, L, E)`): States of the columns of each chunk.
        mask (`torch.BoolTensor` of shape `(N, L)`): Which columns are tokens.
        num_groups (`int`): Memories of each chunk (k).
        weight (`torch.Tensor` of shape `(D, R*E)`): Of the projector, one block of E columns for each place.
        bias (`torch.Tensor` of shape `(D,)`): Of the projector.
        lookback (`int`): Tokens before a group that are read with it.
        bos (`torch.Tensor` of shape `(N, E)`, *optional*): State of what stands before each chunk.

    Returns:
        `torch.Tensor` of shape `(N, k, D)`.
    """
    width = states.shape[2]
    rows = []
    for number, (row, present) in enumerate(zip(states, mask, strict=True)):
        tokens = list(row[present])
        before = [] if bos is None or not tokens else [bos[number]]
        end, memories = 0, []
        for group in range(num_groups):
            start, end = end, math.ceil((group + 1) * len(tokens) / num_groups)
            start = min(start, max(end - 1, 0))  # with fewer tokens than groups the last one is read again
            memory = bias
            read = (before + tokens)[max(start - lookback + len(before), 0) : end + len(before)]
            for place, state in enumerate(reversed(read), 1):
                columns = slice(weight.shape[1] - place * width, weight.shape[1] - (place - 1) * width)
                memory = memory + weight[:, columns] @ state
            memories.append(memory)
        rows.append(torch.stack(memories))
    return torch.stack(rows)
