"""Poolings: small modules that read K vectors out of the states of a chunk's tokens.

Letters: N chunks, L columns of a chunk, K memories per chunk, E encoder width.

Each maps states `(N, L, E)` and a mask `(N, L)`, 1 for tokens and 0 for padding anywhere, to `(N, K, E)`. With a
budget `num_memories` `(N,)` a chunk gets so many vectors, 1 to K, as if that were its K; those behind them are to be
masked by the caller.
"""

import torch
from torch import nn
from transformers import initialization as init


def group_bounds(
    num_tokens: torch.Tensor, memories_per_chunk: int, num_memories: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the tokens of each chunk into K groups of ranks, overlapping by one where K does not divide their number.

    Args:
        num_tokens (`torch.LongTensor` of shape `(N,)`): Real tokens of each chunk.
        memories_per_chunk (`int`): Groups (K).
        num_memories (`torch.LongTensor` of shape `(N,)`, *optional*): Groups of each chunk, 1 to K. Default: K.

    Returns:
        First rank of each group and the rank behind its last, both of shape `(N, K)`: group i of n tokens holds the
        ranks floor(i * n / K) to ceil((i + 1) * n / K) - 1, so that with fewer tokens than groups none is empty.

    Example:
    ```python
    >>> first, end = group_bounds(torch.tensor([4, 3]), 2)
    >>> first.tolist(), end.tolist()
    ([[0, 2], [0, 1]], [[2, 4], [2, 3]])

    ```
    """
    group = torch.arange(memories_per_chunk, device=num_tokens.device)
    num_tokens = num_tokens[:, None]
    num_groups = torch.full_like(num_tokens, memories_per_chunk) if num_memories is None else num_memories[:, None]
    first, end = group * num_tokens // num_groups, -(-(group + 1) * num_tokens // num_groups)
    return torch.minimum(first, num_tokens), torch.minimum(end, num_tokens)


def read_columns(hidden_states: torch.Tensor, real: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Read the states `(N, K, E)` of the tokens with the given ranks `(N, K)` among the real ones of each chunk."""
    column_of_rank = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)  # (N, L)
    columns = column_of_rank.gather(1, rank.clamp(0, real.shape[1] - 1))  # (N, K)
    return hidden_states.gather(1, columns[:, :, None].expand(-1, -1, hidden_states.shape[2]))


class LastPooling(nn.Module):
    """Read the state of the last token of each of K groups of a chunk's tokens.

    Args:
        memories_per_chunk (`int`): Groups (K).

    Source: Badger 2026, arXiv 2602.13466, information-retention autoencoder (last position). Here the last *real*
    token is read, also in frozen language models, where the paper's mixer probes read the last but one.
    """

    def __init__(self, memories_per_chunk: int):
        super().__init__()
        self.memories_per_chunk = memories_per_chunk

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, num_memories: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pool the states of each chunk; a chunk without tokens gives the state of a column of padding."""
        real = attention_mask != 0
        _, end = group_bounds(real.sum(1), self.memories_per_chunk, num_memories)
        return read_columns(hidden_states, real, end - 1)


class FirstPooling(LastPooling):
    """Read the state of the first token of each of K groups: with K = 1, what a BERT calls CLS."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, num_memories: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pool the states of each chunk; a chunk without tokens gives the state of a column of padding."""
        real = attention_mask != 0
        first, _ = group_bounds(real.sum(1), self.memories_per_chunk, num_memories)
        return read_columns(hidden_states, real, first)


class MeanPooling(LastPooling):
    """Average the states of each of K groups of a chunk's tokens, over the true size of each group."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, num_memories: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pool the states of each chunk; a chunk without tokens gives zeros."""
        real = attention_mask != 0
        rank = real.long().cumsum(1)[:, None] - 1  # (N, 1, L)
        bounds = group_bounds(real.sum(1), self.memories_per_chunk, num_memories)
        first, end = (bound[:, :, None] for bound in bounds)
        member = (rank >= first) & (rank < end) & real[:, None]  # (N, K, L)
        # Sums of ones and zeros are exact in low precision; a matrix of 1/count would not be.
        total = torch.bmm(member.to(hidden_states.dtype), hidden_states.masked_fill(~real[:, :, None], 0))
        return total / member.sum(2, keepdim=True).clamp(min=1).to(total.dtype)


class QueryPooling(nn.Module):
    """Let K learned queries attend to the states of a chunk's tokens.

    A budget of k memories takes the first k queries, so that queries trained under sampled budgets are ordered by use.

    Args:
        memories_per_chunk (`int`): Queries (K).
        hidden_size (`int`): Width of the states (E).

    Source: Jaegle et al. 2021, arXiv 2103.03206 (latent queries), with one head and the states as values.
    """

    def __init__(self, memories_per_chunk: int, hidden_size: int):
        super().__init__()
        self.memories_per_chunk = memories_per_chunk
        self.queries = nn.Parameter(torch.empty(memories_per_chunk, hidden_size))
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw queries and keys such that states of unit scale get scores of unit scale."""
        init.normal_(self.queries, mean=0.0, std=1.0)
        init.normal_(self.key.weight, mean=0.0, std=self.key.in_features**-0.5)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, num_memories: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pool the states of each chunk; a chunk without tokens gives zeros."""
        queries = self.queries.expand(len(hidden_states), -1, -1)
        return attend(queries, self.key(hidden_states), hidden_states, attention_mask)


class PooledQueryPooling(nn.Module):
    """Let the mean of each of K groups ask all tokens of the chunk: one more attention with pooled queries.

    Args:
        memories_per_chunk (`int`): Groups (K).
        hidden_size (`int`): Width of the states (E).

    Source: ARC-Encoder 2025, arXiv 2510.20535, which averages the queries of the encoder's own last layer. This is a
    layer of its own above the last, so that it serves any encoder, frozen too; it starts near the group's mean.
    """

    def __init__(self, memories_per_chunk: int, hidden_size: int):
        super().__init__()
        self.mean = MeanPooling(memories_per_chunk)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw queries and keys such that states of unit scale get scores of unit scale."""
        for linear in (self.query, self.key):
            init.normal_(linear.weight, mean=0.0, std=linear.in_features**-0.5)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, num_memories: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pool the states of each chunk; a chunk without tokens gives zeros."""
        mean = self.mean(hidden_states, attention_mask, num_memories)  # (N, K, E)
        return mean + attend(self.query(mean), self.key(hidden_states), hidden_states, attention_mask)


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Attend from queries `(N, K, E)` to the real ones of keys and values `(N, L, E)`; returns `(N, K, E)`."""
    scores = torch.bmm(queries.to(keys), keys.transpose(1, 2)) * keys.shape[2] ** -0.5  # (N, K, L)
    # The smallest number instead of minus infinity: a chunk without tokens stays finite.
    scores = scores.float().masked_fill((attention_mask == 0)[:, None], torch.finfo(torch.float32).min)
    values = values.masked_fill((attention_mask == 0)[:, :, None], 0)
    return torch.bmm(scores.softmax(-1).to(values.dtype), values)


POOLINGS = {"last": LastPooling, "mean": MeanPooling, "first": FirstPooling}
LEARNED = {"queries": QueryPooling, "pooled_queries": PooledQueryPooling}


def build_pooling(name: str, memories_per_chunk: int, hidden_size: int | None = None) -> nn.Module:
    """Build a pooling: a module that maps states `(N, L, E)` and a mask `(N, L)` to `(N, K, E)`.

    Args:
        name (`str`): One of `POOLINGS` or `LEARNED`.
        memories_per_chunk (`int`): Vectors per chunk (K).
        hidden_size (`int`, *optional*): Width of the states (E); needed by those that learn.

    Raises:
        ValueError: If the name is unknown, the number is not positive, or a width is needed and not given.
    """
    if name not in POOLINGS and name not in LEARNED:
        known = ", ".join(map(repr, (*POOLINGS, *LEARNED)))
        raise ValueError(f"The pooling {name!r} is unknown; expected one of {known}.")
    if memories_per_chunk < 1:
        raise ValueError(f"`memories_per_chunk` is {memories_per_chunk}; expected 1 or more.")
    if name not in LEARNED:
        return POOLINGS[name](memories_per_chunk)
    if hidden_size is None:
        raise ValueError(f"The pooling {name!r} has weights of the encoder's width; give `hidden_size`.")
    return LEARNED[name](memories_per_chunk, hidden_size)
