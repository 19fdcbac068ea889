"""From chunks to memories: an encoder body, a pooling of what it gives, and the projector into the decoder's input.

```
 chunk ids (N, L) -> encoder -> states (N, L, E) -> pooling -> (N, K, E) -> projector -> memories (N, K, D)
```

Letters: N chunks, L columns of a chunk, K memories per chunk, E encoder width, R places of `concat`, D decoder width.

A pooling maps states `(N, L, E)` and a mask `(N, L)`, 1 for tokens and 0 for padding anywhere, to `(N, K, E)`. With a
budget `num_memories` `(N,)` a chunk gets so many vectors, 1 to K, as if that were its K; those after them are to be
masked by the caller.
"""

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForTextEncoding
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .configuration_checks import encoder_limit
from .memory_parts import check_text_encoder, first_layers
from .modeling_masked_mixer import MaskedMixerModel, check_attention_mask, check_token_ids

OTHERS = 0.3
"""Size of the rotations that `identity_on_last` puts beside the identity; the value of the first runs that learned."""

# By name, not through the Auto registry: in a folder loaded with `trust_remote_code` the registry holds other copies.
BODIES = {"masked_mixer": MaskedMixerModel}


def build_encoder(config: PreTrainedConfig, layers: int | None = None) -> PreTrainedModel:
    """Build a fresh body, without language modelling head or pooling layer, of any model type.

    Args:
        config (`PreTrainedConfig`): Its architecture.
        layers (`int`, *optional*): How many of its first layers a pretrained body was cut to. 0 leaves its token
            table, as [`first_layers`] does.

    Returns:
        `PreTrainedModel`: A masked mixer, the encoder of a T5, or what `AutoModel.from_config` gives.

    Raises:
        ValueError: If the model has an encoder and a decoder of its own that the library cannot part.
    """
    if config.model_type in BODIES:
        body = BODIES[config.model_type]._from_config(config)
        return body if layers is None else first_layers(body, layers)
    if getattr(config, "is_encoder_decoder", False):
        check_text_encoder(config)
    # The encoder of a T5 says in its config that it is no encoder-decoder, and yet AutoModel would build both.
    auto_class = AutoModelForTextEncoding if type(config) in AutoModelForTextEncoding._model_mapping else AutoModel
    body = auto_class.from_config(config)
    if getattr(body, "pooler", None) is not None:
        body.pooler = None  # what is read are the states of the tokens
    return body if layers is None else first_layers(body, layers)


class NoCache(DynamicCache):
    """A cache that keeps nothing; without one a Llama waits for the device, to look for packed texts in positions."""

    update: Any = staticmethod(lambda keys, values, *_, **__: (keys, values))


def encode_chunks(
    encoder: PreTrainedModel,
    pooling: nn.Module,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    num_memories: torch.Tensor | None = None,
    checked: bool = False,
    config: PreTrainedConfig | None = None,
) -> torch.Tensor:
    """Turn chunks into memory states: one batched encoder call, then the pooling.

    A frozen encoder keeps nothing for a backward pass; the pooling is trained all the same.

    Every chunk is read from position 0: padding before tokens is moved after them first, since not every encoder
    counts positions by its mask.

    Args:
        encoder (`PreTrainedModel`): A body that returns `last_hidden_state`.
        pooling (`nn.Module`): From [`build_pooling`].
        input_ids (`torch.LongTensor` of shape `(N, L)`): Token ids of the chunks.
        attention_mask (`torch.Tensor` of shape `(N, L)`, *optional*): 1 for tokens, 0 for padding, anywhere. A chunk
            of padding only gives finite states, to be masked by the caller.
        num_memories (`torch.LongTensor` of shape `(N,)`, *optional*): Memories of each chunk, 1 to K. Default: K.
        checked (`bool`): Whether the caller has looked at ids and mask, so that the device is not asked again.
        config (`PreTrainedConfig`, *optional*): The memory model's, whose `short_chunks` says how chunks that are not
            full are filled, see [`fill_short_chunks`], and whose `encoder_bos_token_id` stands before each. Default:
            neither.

    Returns:
        `torch.Tensor` of shape `(N, K, E)`, with [`ConcatPooling`] `(N, K, r*E)`: the memory states.

    Raises:
        ValueError: If shapes differ, an id is outside the encoder's vocabulary, or a chunk is longer than it takes.
    """
    bos_token_id = getattr(config, "encoder_bos_token_id", None)  # an autoencoder's config has none
    if not checked:
        check_token_ids("input_ids", input_ids, getattr(encoder.config, "vocab_size", None), "the encoder")
        limit = encoder_limit(encoder.config, bos_token_id)
        if limit is not None and input_ids.shape[1] > limit:
            raise ValueError(
                f"A chunk has {input_ids.shape[1]} tokens, but the encoder takes {limit}. Cut the text into shorter "
                "chunks."
            )
        check_attention_mask("attention_mask", attention_mask, *input_ids.shape)
    if config is not None and config.short_chunks != "pad":
        input_ids, attention_mask = fill_short_chunks(input_ids, attention_mask, config)
    if attention_mask is None:
        # A mask of ones would be read to find that out.
        real, visible = torch.ones_like(input_ids), None
    else:
        real = (attention_mask != 0).long()
        order = torch.argsort(1 - real, dim=1, stable=True)
        input_ids, real = input_ids.gather(1, order), real.gather(1, order)
        # Attention over nothing is not a number, so a chunk of padding only reads its padding.
        visible = torch.where(real.any(1, keepdim=True), real, torch.ones_like(real))
    if bos_token_id is not None:
        input_ids = F.pad(input_ids, (1, 0), value=bos_token_id)
        visible = None if visible is None else F.pad(visible, (1, 0), value=1)
    takes = inspect.signature(encoder.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    trained = any(parameter.requires_grad for parameter in encoder.parameters())  # adapters, for example
    # Layers with a running state instead of keys and values would look into it.
    attends = {*(getattr(encoder.config, "layer_types", None) or ())} <= {"full_attention", "sliding_attention"}
    if visible is None and not trained and "past_key_values" in takes and attends and not encoder._is_stateful:
        options["past_key_values"] = NoCache()
    with nullcontext() if trained else torch.no_grad():
        outputs = encoder(input_ids=input_ids, attention_mask=visible, return_dict=True, **options)
    states = outputs.last_hidden_state
    if bos_token_id is None:
        return pooling(states, real, num_memories)
    bos = {"bos": states[:, 0]} if isinstance(pooling, ConcatPooling) else {}
    return pooling(states[:, 1:], real, num_memories, **bos)


def fill_short_chunks(
    input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, config: PreTrainedConfig
) -> tuple[torch.LongTensor, torch.Tensor | None]:
    """Fill chunks that are not full, so that an encoder that mixes whole chunks only ever reads whole ones.

    Args:
        input_ids (`torch.LongTensor` of shape `(N, L)`): Token ids of the chunks.
        attention_mask (`torch.Tensor` of shape `(N, L)`, *optional*): 1 for tokens, 0 for padding, anywhere.
        config (`PreTrainedConfig`): Its `chunk_length` is that of a full chunk. `short_chunks="repeat"` repeats a
            chunk's tokens from its first; `"end"` puts end tokens after them, so that the memory tells where its text
            ends.

    Returns:
        Ids and mask of shape `(N, max(L, chunk_length))`: each chunk's tokens in front, what fills it after them; a
        chunk of padding only stays one.

    Example:
    ```python
    >>> ids, mask = torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    >>> config = PreTrainedConfig(chunk_length=4, short_chunks="repeat", eos_token_id=2)
    >>> fill_short_chunks(ids, mask, config)[0].tolist()
    [[5, 6, 5, 6], [7, 8, 9, 7]]
    >>> config.short_chunks = "end"
    >>> fill_short_chunks(ids, mask, config)[0].tolist()
    [[5, 6, 2, 2], [7, 8, 9, 2]]

    ```
    """
    length, end = config.chunk_length, config.eos_token_id
    if attention_mask is None and input_ids.shape[1] >= length:
        return input_ids, attention_mask
    real = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    # Tokens first: padding may stand anywhere.
    input_ids = input_ids.gather(1, torch.argsort(1 - real, dim=1, stable=True))
    num_tokens = real.sum(1, keepdim=True)  # (N, 1)
    columns = torch.arange(max(length, input_ids.shape[1]), device=input_ids.device)
    rank = (
        columns % num_tokens.clamp(min=1)
        if config.short_chunks == "repeat"
        else columns.expand(input_ids.shape[0], -1)
    )
    filled = input_ids.gather(1, rank.clamp(max=input_ids.shape[1] - 1))
    if config.short_chunks == "end":
        filled = torch.where(columns < num_tokens, filled, end[0] if isinstance(end, list) else end)
    # Special tokens around a chunk may make it longer than `length`.
    return filled, (columns < num_tokens.clamp(min=length) * (num_tokens > 0)).long()


def group_bounds(
    num_tokens: torch.Tensor, memories_per_chunk: int, num_memories: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the tokens of each chunk into K groups of ranks, overlapping by one where K does not divide their number.

    Args:
        num_tokens (`torch.LongTensor` of shape `(N,)`): Real tokens of each chunk.
        memories_per_chunk (`int`): Groups (K).
        num_memories (`torch.LongTensor` of shape `(N,)`, *optional*): Groups of each chunk, 1 to K. Default: K.

    Returns:
        First rank of each group and the rank after its last, both of shape `(N, K)`: group i of n tokens holds the
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


class ConcatPooling(nn.Module):
    """Lay the states of each of K groups of a chunk's tokens side by side: nothing is lost before the projector.

    A group of r tokens is right-aligned, so that its last token's state is always in the last place; missing places
    are zero. Unlike those of other poolings, groups share no token unless there are fewer tokens than groups: here a
    token that is read twice would only take a place from the others. With `lookback` the states of the tokens before
    a group stand before its own, so that a decoder that looks for what came before a token finds it in one memory.

    Args:
        memories_per_chunk (`int`): Groups (K).
        max_group (`int`): Tokens of the largest group, also under the smallest budget to be asked for.
        lookback (`int`): Tokens of the chunk before a group that have places, too; R is `max_group + lookback`.
    """

    def __init__(self, memories_per_chunk: int, max_group: int, lookback: int = 0):
        super().__init__()
        self.memories_per_chunk = memories_per_chunk
        self.max_group = max_group
        self.lookback = lookback

    @property
    def places(self) -> int:
        """Places (R) of a memory."""
        return self.max_group + self.lookback

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        num_memories: torch.Tensor | None = None,
        bos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pool the states of each chunk to `(N, K, r*E)`, r the places that its columns can fill, with a budget all R.

        A chunk without tokens gives zeros. `bos` `(N, E)` is the state of what stands before each chunk, if anything
        does; it has a place where a chunk's first group looks back.

        Raises:
            ValueError: If a group has more tokens than places.
        """
        real = attention_mask != 0
        num_tokens = real.sum(1)  # (N,)
        self._check_groups(num_tokens, real.shape[1], num_memories)
        _, end = group_bounds(num_tokens, self.memories_per_chunk, num_memories)  # (N, K)
        first = torch.minimum(
            F.pad(end[:, :-1], (1, 0)), (end - 1).clamp(min=0)
        )  # after the group before, or the last
        places = self.places  # the number of columns is known on the host, a budget is not
        if num_memories is None:
            places = min(self.max_group, -(-real.shape[1] // self.memories_per_chunk)) + self.lookback
        first = torch.where(num_tokens[:, None] > 0, first - self.lookback, 0).clamp(min=0 if bos is None else -1)
        rank = end[..., None] - places + torch.arange(places, device=end.device)  # (N, K, r)
        states = read_columns(hidden_states, real, rank.flatten(1)).unflatten(1, rank.shape[1:])  # (N, K, r, E)
        if bos is not None:
            states = torch.where((rank == -1)[..., None], bos[:, None, None], states)
        return states.masked_fill((rank < first[..., None])[..., None], 0).flatten(2)

    def _check_groups(self, num_tokens: torch.Tensor, num_columns: int, num_memories: torch.Tensor | None) -> None:
        if num_memories is None:
            if num_columns <= self.max_group * self.memories_per_chunk:
                return  # whatever the masks say: no look at the device
            num_memories = torch.full_like(num_tokens, self.memories_per_chunk)
        if torch.compiler.is_compiling() or num_tokens.is_meta:
            return
        too_long = num_tokens > self.max_group * num_memories.clamp(min=1)
        if bool(too_long.any()):
            row = int(too_long.nonzero()[0])
            raise ValueError(
                f"A chunk of {int(num_tokens[row])} tokens was asked for {int(num_memories[row])} memories, so that a "
                f"group has more than the {self.max_group} tokens that `concat` has places for (`max_group`). Ask "
                "for more memories, give shorter chunks, or join a model with a larger `max_group`."
            )


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
        self.apply(initialize_leaf)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, num_memories: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pool the states of each chunk; a chunk without tokens gives zeros."""
        queries = self.queries.expand(hidden_states.shape[0], -1, -1)
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
        self.apply(initialize_leaf)

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


@torch.no_grad()
def initialize_leaf(module: nn.Module, gain: float = 1.0) -> None:
    """Draw the fresh weights of one module without children, such that inputs of unit scale give outputs of `gain`.

    By leaves, because the library passes over a module that has no parameters of its own.

    Args:
        module (`nn.Module`): A leaf of a pooling or projector, or a [`QueryPooling`]; others are left as they are.
        gain (`float`): Root mean square of a linear map's outputs.
    """
    if isinstance(module, QueryPooling):
        init.normal_(module.queries, mean=0.0, std=1.0)
    elif isinstance(module, nn.RMSNorm):
        init.ones_(module.weight)
    elif isinstance(module, nn.Linear):
        fan_in = getattr(module, "usual_features", module.in_features)
        init.normal_(module.weight, mean=0.0, std=gain * fan_in**-0.5)
        if module.bias is not None:
            init.zeros_(module.bias)


POOLINGS = {"last": LastPooling, "mean": MeanPooling, "first": FirstPooling}
LEARNED = {"queries": QueryPooling, "pooled_queries": PooledQueryPooling}


def build_pooling(
    name: str,
    memories_per_chunk: int,
    hidden_size: int | None = None,
    max_group: int | None = None,
    lookback: int = 0,
) -> nn.Module:
    """Build a pooling: a module that maps states `(N, L, E)` and a mask `(N, L)` to `(N, K, E)`.

    Args:
        name (`str`): `"concat"`, or one of `POOLINGS` or `LEARNED`.
        memories_per_chunk (`int`): Vectors per chunk (K).
        hidden_size (`int`, *optional*): Width of the states (E); needed by those that learn.
        max_group (`int`, *optional*): Tokens of the largest group; needed by `"concat"`, which gives `(N, K, r*E)`.
        lookback (`int`): Tokens before a group that `"concat"` has places for, too.

    Raises:
        ValueError: If the name is unknown, the number is not positive, or what the pooling needs is not given.
    """
    if name not in (*POOLINGS, *LEARNED, "concat"):
        known = ", ".join(map(repr, (*POOLINGS, *LEARNED, "concat")))
        raise ValueError(f"The pooling {name!r} is unknown; expected one of {known}.")
    if memories_per_chunk < 1:
        raise ValueError(f"`memories_per_chunk` is {memories_per_chunk}; expected 1 or more.")
    if name == "concat":
        if max_group is None:
            raise ValueError("The pooling 'concat' has a place for each token of a group; give `max_group`.")
        return ConcatPooling(memories_per_chunk, max_group, lookback)
    if name not in LEARNED:
        return POOLINGS[name](memories_per_chunk)
    if hidden_size is None:
        raise ValueError(f"The pooling {name!r} has weights of the encoder's width; give `hidden_size`.")
    return LEARNED[name](memories_per_chunk, hidden_size)


class PlacesLinear(nn.Linear):
    """A linear map of R places of width E that costs no more than the places given: zeros in front are left out.

    Args:
        num_places (`int`): Places (R).
        hidden_size (`int`): Width of a place (E).
        out_features (`int`): Width of the result.
        usual_places (`int`): Places that a full chunk fills without a budget; fresh weights are drawn for these.
    """

    def __init__(self, num_places: int, hidden_size: int, out_features: int, usual_places: int):
        super().__init__(num_places * hidden_size, out_features)
        self.usual_features = usual_places * hidden_size

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map the last r places `(..., r*E)` to `(..., out_features)`."""
        return F.linear(states, self.weight[:, self.in_features - states.shape[-1] :], self.bias)


class MemoryProjector(nn.Module):
    """Carry memory states of encoder width into the decoder's input space.

    `linear` is the paper's affine map; `mlp` is RMSNorm, linear, GELU, linear; `bottleneck` is down, noise (only while
    training), up, linear; `identity` changes nothing. `projector_norm` puts an RMSNorm before any of them, over each
    state. With `concat` the first linear map reads all states of a group.

    Args:
        config ([`MemoryEncoderDecoderConfig`]): Widths and kind.

    Source: Badger 2026, arXiv 2602.13466, projection adapter; the noise follows its quantisation study, but is
    centred.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        encoder_size, decoder_size = config.encoder.hidden_size, config.decoder.hidden_size
        self.encoder_size = encoder_size
        self.start = config.projector_start
        self.noise = config.projector_noise
        self.norm = nn.RMSNorm(encoder_size, eps=1e-6) if config.projector_norm else nn.Identity()
        self.down = self.up = self.hidden = nn.Identity()

        def first_map(out_features: int) -> nn.Linear:
            if config.pooling != "concat":
                return nn.Linear(encoder_size, out_features)
            usual_places = -(-config.chunk_length // config.memories_per_chunk)
            places = config.max_group + config.lookback
            return PlacesLinear(places, encoder_size, out_features, usual_places + config.lookback)

        if config.projector_type == "bottleneck":
            bottleneck_size = config.projector_hidden_size or max(1, encoder_size // 4)
            self.down, self.up = first_map(bottleneck_size), nn.Linear(bottleneck_size, encoder_size)
            self.out: nn.Module = nn.Linear(encoder_size, decoder_size)
        elif config.projector_type == "mlp":
            inner_size = config.projector_hidden_size or decoder_size
            self.hidden = nn.Sequential(first_map(inner_size), nn.GELU())
            self.out = nn.Linear(inner_size, decoder_size)
        else:
            self.out = nn.Identity() if config.projector_type == "identity" else first_map(decoder_size)

    def forward(self, memory_states: torch.Tensor) -> torch.Tensor:
        """Project memory states `(..., E)`, of `concat` `(..., r*E)`, to memory embeds `(..., D)`."""
        return self.out(self.features(memory_states))

    def features(self, memory_states: torch.Tensor) -> torch.Tensor:
        """Give what the last affine map reads of memory states."""
        if not isinstance(self.norm, nn.Identity):
            memory_states = self.norm(memory_states.unflatten(-1, (-1, self.encoder_size))).flatten(-2)
        code = self.down(memory_states)
        if self.training and self.noise:
            code = code + torch.empty_like(code).uniform_(-self.noise, self.noise)
        return self.hidden(self.up(code))

    def initialize(self, gain: float) -> None:
        """Draw all weights anew; see [`initialize_leaf`]."""
        for module in self.modules():
            self.initialize_leaf(module, gain)

    @torch.no_grad()
    def initialize_leaf(self, module: nn.Module, gain: float) -> None:
        """Draw the fresh weights of one of the projector's leaves.

        Args:
            module (`nn.Module`): The leaf.
            gain (`float`): Root mean square of the projector's outputs for inputs of unit scale.
        """
        initialize_leaf(module, gain if module is self.out else 1.0)
        if self.start == "identity_on_last" and module is self.out and not self.out.weight.is_meta:
            init.copy_(self.out.weight, gain * self._identity_on_last())

    def _identity_on_last(self) -> torch.Tensor:
        """Give `(D, R*E)`: the identity on the last place, small random rotations on those before it."""
        weight = self.out.weight
        size = len(weight)
        # Rotations keep the other states apart from the last one without drowning it: training starts from the
        # embedding of one token, which the decoder can read already.
        rotations = [
            OTHERS * nn.init.orthogonal_(torch.empty(size, size, device=weight.device))
            for _ in range(weight.shape[1] // size - 1)
        ]
        return torch.cat([*rotations, torch.eye(size, device=weight.device)], 1).to(weight.dtype)
