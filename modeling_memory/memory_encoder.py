"""From chunks to memory states: encoder bodies, and poolings that read K vectors out of a chunk's states.

Letters: N chunks, L columns of a chunk, K memories per chunk, E encoder width.
"""

import inspect

import torch
from torch import nn
from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .modeling_masked_mixer import MaskedMixerModel, check_attention_mask, check_token_ids

# By name, not through the Auto registry: in a folder loaded with `trust_remote_code` the registry holds other copies.
BODIES = {"masked_mixer": MaskedMixerModel}


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a fresh body, without language modelling head, of any model type.

    Args:
        config (`PreTrainedConfig`): Its architecture.

    Returns:
        `PreTrainedModel`: A masked mixer, or what `AutoModel.from_config` gives.

    Raises:
        ValueError: If the model has an encoder and a decoder of its own.
    """
    check_single_body(config)
    if config.model_type in BODIES:
        return BODIES[config.model_type]._from_config(config)
    return AutoModel.from_config(config)


def check_single_body(config: PreTrainedConfig) -> None:
    """Refuse a model that has an encoder and a decoder of its own."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"A {config.model_type!r} model has an encoder and a decoder of its own and wants inputs for both. Give "
            "a single body, such as a BERT, a Llama or a masked mixer."
        )


def group_bounds(num_tokens: torch.Tensor, memories_per_chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the tokens of each chunk into K groups of ranks, overlapping by one where K does not divide their number.

    Args:
        num_tokens (`torch.LongTensor` of shape `(N,)`): Real tokens of each chunk.
        memories_per_chunk (`int`): Groups (K).

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
    return group * num_tokens // memories_per_chunk, -(-(group + 1) * num_tokens // memories_per_chunk)


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

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Pool the states of each chunk.

        Args:
            hidden_states (`torch.Tensor` of shape `(N, L, E)`): States of all columns.
            attention_mask (`torch.Tensor` of shape `(N, L)`): 1 for tokens, 0 for padding, anywhere.

        Returns:
            `torch.Tensor` of shape `(N, K, E)`. A chunk without tokens gives the state of a column of padding.
        """
        real = attention_mask != 0
        _, end = group_bounds(real.sum(1), self.memories_per_chunk)
        column_of_rank = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)  # (N, L)
        columns = column_of_rank.gather(1, (end - 1).clamp(min=0))  # (N, K)
        return hidden_states.gather(1, columns[:, :, None].expand(-1, -1, hidden_states.shape[2]))


class MeanPooling(nn.Module):
    """Average the states of each of K groups of a chunk's tokens.

    Args:
        memories_per_chunk (`int`): Groups (K).
    """

    def __init__(self, memories_per_chunk: int):
        super().__init__()
        self.memories_per_chunk = memories_per_chunk

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Pool the states of each chunk.

        Args:
            hidden_states (`torch.Tensor` of shape `(N, L, E)`): States of all columns.
            attention_mask (`torch.Tensor` of shape `(N, L)`): 1 for tokens, 0 for padding, anywhere.

        Returns:
            `torch.Tensor` of shape `(N, K, E)`. A chunk without tokens gives zeros.
        """
        real = attention_mask != 0
        rank = real.long().cumsum(1)[:, None] - 1  # (N, 1, L)
        first, end = (bound[:, :, None] for bound in group_bounds(real.sum(1), self.memories_per_chunk))
        member = (rank >= first) & (rank < end) & real[:, None]  # (N, K, L)
        # Sums of ones and zeros are exact in low precision; a matrix of 1/count would not be.
        total = torch.bmm(member.to(hidden_states.dtype), hidden_states.masked_fill(~real[:, :, None], 0))
        return total / member.sum(2, keepdim=True).clamp(min=1).to(total.dtype)


POOLINGS = {"last": LastPooling, "mean": MeanPooling}


def build_pooling(name: str, memories_per_chunk: int) -> nn.Module:
    """Build a pooling: a module that maps states `(N, L, E)` and a mask `(N, L)` to `(N, K, E)`.

    Args:
        name (`str`): `"last"` or `"mean"`.
        memories_per_chunk (`int`): Vectors per chunk (K).

    Raises:
        ValueError: If the name is unknown or the number is not positive.
    """
    if name not in POOLINGS:
        raise ValueError(f"The pooling {name!r} is unknown; expected one of {', '.join(map(repr, POOLINGS))}.")
    if memories_per_chunk < 1:
        raise ValueError(f"`memories_per_chunk` is {memories_per_chunk}; expected 1 or more.")
    return POOLINGS[name](memories_per_chunk)


def encode_chunks(
    encoder: PreTrainedModel,
    pooling: nn.Module,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn chunks into memory states: one batched encoder call, then the pooling.

    Every chunk is read from position 0: padding in front of tokens is moved behind them first, since not every encoder
    counts positions by its mask.

    Args:
        encoder (`PreTrainedModel`): A body that returns `last_hidden_state`.
        pooling (`nn.Module`): From [`build_pooling`].
        input_ids (`torch.LongTensor` of shape `(N, L)`): Token ids of the chunks.
        attention_mask (`torch.Tensor` of shape `(N, L)`, *optional*): 1 for tokens, 0 for padding, anywhere. A chunk
            of padding only gives finite states, to be masked by the caller.

    Returns:
        `torch.Tensor` of shape `(N, K, E)`: the memory states.

    Raises:
        ValueError: If shapes differ, an id is outside the encoder's vocabulary, or a chunk is longer than it takes.
    """
    config = encoder.config
    check_token_ids("input_ids", input_ids, getattr(config, "vocab_size", None), "the encoder")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and input_ids.shape[1] > limit:
        raise ValueError(
            f"A chunk has {input_ids.shape[1]} tokens, but the encoder takes {limit} (`max_position_embeddings`). Cut "
            "the text into shorter chunks."
        )
    check_attention_mask("attention_mask", attention_mask, *input_ids.shape)
    if attention_mask is None:
        real = visible = torch.ones_like(input_ids)
    else:
        real = (attention_mask != 0).long()
        order = torch.argsort(1 - real, dim=1, stable=True)
        input_ids, real = input_ids.gather(1, order), real.gather(1, order)
        # Attention over nothing is not a number, so a chunk of padding only reads its padding.
        visible = torch.where(real.any(1, keepdim=True), real, torch.ones_like(real))
    options = {"use_cache": False} if "use_cache" in inspect.signature(encoder.forward).parameters else {}
    outputs = encoder(input_ids=input_ids, attention_mask=visible, return_dict=True, **options)
    return pooling(outputs.last_hidden_state, real)
