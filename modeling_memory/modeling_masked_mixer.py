r"""The masked mixer: a transformer whose attention is a learned, masked matrix over token positions.

```
 x (B, T, D) -+- norm - project to heads - mix positions - project back -+-+- norm - up, GELU, down -+- (B, T, D)
              |__________________________________________________________| |_________________________|
```

Letters: B batch, T columns of this call (S with the cached ones), D width, H heads, Q width of a head, K kernel taps,
P positions in use, V vocabulary.

Source: Badger 2026, arXiv 2602.13466, masked mixer.
"""

import os
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

# Unused: transformers before 5.8 copies from a local folder only the files that this one imports itself.
from .configuration_checks import Fields  # noqa: F401
from .configuration_masked_mixer import MaskedMixerConfig
from .memory_checkpoint import save_whole


def check_token_ids(name: str, token_ids: torch.Tensor, vocab_size: int | None, owner: str = "the model") -> None:
    """Refuse token ids that are no `(rows, columns)` of known ids. Values are not read while compiling.

    Args:
        name (`str`): What the argument is called, for the message.
        token_ids (`torch.LongTensor` of shape `(B, T)`): The ids.
        vocab_size (`int`, *optional*): Rows of the token table; `None` leaves the values unchecked.
        owner (`str`): Whose table it is, for the message.

    Raises:
        ValueError: If there are no ids, they are not integers in two dimensions, or one is outside the table.
    """
    if not isinstance(token_ids, torch.Tensor):
        raise ValueError(
            f"`{name}` is a {type(token_ids).__name__}; expected a torch tensor of (batch, tokens). Use "
            "`torch.as_tensor`, or `return_tensors='pt'` when tokenising."
        )
    if token_ids.dim() != 2 or 0 in token_ids.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(token_ids.shape)}; expected (batch, tokens), neither of them 0. Give at least "
            "one text of at least one token."
        )
    if token_ids.dtype not in (torch.long, torch.int32):  # of other integers no table of vectors can be read
        where = "Vectors go into `inputs_embeds`." if token_ids.is_floating_point() else "Convert them: `.long()`."
        raise ValueError(f"`{name}` holds {token_ids.dtype}; expected token ids, int64 or int32. {where}")
    if vocab_size is None or token_ids.is_meta or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in torch.aminmax(token_ids))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"`{name}` holds the id {low if low < 0 else high}, but the token table of {owner} has the ids 0 to "
            f"{vocab_size - 1}. Use the tokenizer that belongs to it."
        )


def check_attention_mask(
    name: str, attention_mask: torch.Tensor | None, batch_size: int, length: int, reads_values: bool = True
) -> None:
    """Refuse an attention mask that is not one row a text and one column a token, cached tokens included.

    Args:
        name (`str`): What the argument is called, for the message.
        attention_mask (`torch.Tensor`, *optional*): The mask.
        batch_size (`int`): Expected rows.
        length (`int`): Expected columns.
        reads_values (`bool`): Whether to look at the values, which stalls an accelerator. Never while compiling.

    Raises:
        ValueError: If it is no tensor, the shape is another, or it holds anything but 1 and 0.
    """
    if attention_mask is None:
        return
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(
            f"`{name}` is a {type(attention_mask).__name__}; expected a torch tensor of (batch, tokens), 1 for tokens "
            "and 0 for padding."
        )
    if attention_mask.shape != (batch_size, length):
        raise ValueError(
            f"`{name}` has shape {tuple(attention_mask.shape)}; expected {(batch_size, length)}: one row a text, and "
            "one column a token, cached tokens included (1 = token, 0 = padding)."
        )
    if not reads_values or attention_mask.is_meta or torch.compiler.is_compiling():
        return
    wrong = (attention_mask != 0) & (attention_mask != 1)
    if bool(wrong.any()):
        raise ValueError(
            f"`{name}` holds {attention_mask[wrong][0].item()}; expected 1 for tokens and 0 for padding, and nothing "
            "else."
        )


class Positions(NamedTuple):
    """Where the tokens of rows with padding stand; -1 where there is none."""

    query: torch.Tensor  # (B, T) of the columns of this call
    key: torch.Tensor  # (B, S) of all columns
    num_positions: int  # P, above every one of them


class MaskedTokenMixing(nn.Module):
    """Mix the states of different positions by learned weights.

    `mixed[t, j] = bias[t] + sum over t' <= t and taps p of weight[p, t, t'] * states[t', j + p - offset]`, where
    `offset = (kernel_size - 1) // 2` and states outside the width are zero. Heads mix their own projections of the
    states and are projected back together. The mask acts in `forward`: weights of the future are stored, never read
    and never written.

    Args:
        config ([`MaskedMixerConfig`]): The architecture.
        layer_idx (`int`): Place of the layer, which is its place in the cache.

    Source: Badger 2026, arXiv 2602.13466, masked mixer (convolution over token channels).
    """

    def __init__(self, config: MaskedMixerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.causal = config.causal
        self.num_heads = max(1, config.num_heads)
        self.kernel_size = config.kernel_size
        length = config.max_position_embeddings
        self.weight = nn.Parameter(torch.empty(self.num_heads, config.kernel_size, length, length))
        self.bias = nn.Parameter(torch.empty(self.num_heads, length))
        projects = config.num_heads > 0
        self.in_proj = nn.Linear(config.hidden_size, config.hidden_size) if projects else nn.Identity()
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size) if projects else nn.Identity()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the weights as `nn.Conv1d` does, except that its fan-in is the number of positions in use by a row."""
        length = self.weight.shape[-1]
        fan_in = torch.full((length,), length) if not self.causal else torch.arange(1, length + 1)
        bound = (fan_in.to(self.weight) * self.kernel_size).rsqrt()
        init.uniform_(self.weight, -1.0, 1.0)
        # Loaded weights are marked so; drawing passes them over by itself, scaling would not.
        if not getattr(self.weight, "_is_hf_initialized", False):
            self.weight.mul_(bound[:, None])
        init.zeros_(self.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        present: torch.Tensor | None = None,
        positions: Positions | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """Mix `(B, T, D)` into `(B, T, D)`.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, D)`): The normalised states.
            present (`torch.Tensor` of shape `(B, T)`, *optional*): False for padding, when columns are positions.
            positions ([`Positions`], *optional*): Given when a column is not its position.
            past_key_values (`Cache`, *optional*): Keeps the mixing inputs as its keys, positions as its values.
        """
        states = self.in_proj(hidden_states).unflatten(-1, (self.num_heads, -1))  # (B, T, H, Q)
        if present is not None:
            # Weights of padding are not masked, since all rows share one product; a state of zero adds nothing.
            states = states.masked_fill(~present[:, :, None, None], 0)
        if past_key_values is not None:
            states = self._remember(states, positions, past_key_values)  # (B, S, H, Q)
        if positions is None:
            mixed = self._mix(states)
        elif positions.query.shape[1] == 1 and positions.key.shape[1] > 1:
            # One row of the weights instead of all: a step costs as much as the text is long, not its square.
            mixed = self._mix_last(states, positions)
        else:
            mixed = self._mix_at(states, positions)
        return self.out_proj(mixed.flatten(2))

    def _remember(self, states: torch.Tensor, positions: Positions | None, cache: Cache) -> torch.Tensor:
        """Append states and positions to the cache; return the states of all columns, `(B, S, H, Q)`."""
        if positions is None:
            query = torch.arange(states.shape[1], device=states.device).expand(states.shape[:2])
        else:
            query = positions.query
        # float32 counts exactly further than any mixer reaches, and the library's cache concatenates floats.
        keys, _ = cache.update(states.transpose(1, 2), query[:, None, :, None].float(), self.layer_idx)
        return keys.transpose(1, 2)

    def _taps(self, states: torch.Tensor) -> torch.Tensor:
        """Return the `kernel_size` neighbours of each element: `(B, T, H, Q)` -> `(B, T, H, K, Q)`."""
        if self.kernel_size == 1:
            return states.unsqueeze(3)
        left = (self.kernel_size - 1) // 2
        return F.pad(states, (left, self.kernel_size - 1 - left)).unfold(3, states.shape[3], 1)

    def _mix(self, states: torch.Tensor) -> torch.Tensor:
        """Mix states `(B, P, H, Q)` whose columns are their positions."""
        batch_size, length, _, width = states.shape
        weight = self.weight[:, :, :length, :length]
        if self.causal:
            # Taken anew in every call, so that what an optimiser does to the upper half is never read.
            weight = weight.tril()
        # One matrix product a head, all rows and elements side by side: on CPUs faster than a small product a row.
        weight = weight.transpose(1, 2).reshape(self.num_heads, length, -1)  # (H, P, K*P)
        taps = self._taps(states).permute(2, 3, 1, 0, 4)  # (H, K, P, B, Q)
        taps = taps.reshape(self.num_heads, -1, batch_size * width)
        mixed = torch.bmm(weight, taps)
        mixed = mixed + self.bias[:, :length, None].to(mixed.dtype)
        return mixed.view(self.num_heads, length, batch_size, width).permute(2, 1, 0, 3)  # (B, P, H, Q)

    def _mix_at(self, states: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Lay states `(B, S, H, Q)` at their positions, mix them, and take what the queries want, `(B, T, H, Q)`."""
        limit = positions.num_positions
        flat = states.flatten(2)
        places = positions.key.masked_fill(positions.key < 0, limit)[:, :, None].expand_as(flat)
        # One place too many for all padding, cut off again: scattering needs a place for every column.
        laid = flat.new_zeros(flat.shape[0], limit + 1, flat.shape[2]).scatter(1, places, flat)[:, :limit]
        mixed = self._mix(laid.unflatten(2, states.shape[2:])).flatten(2)
        # Padding has no position; it is given the first one's states, which nobody reads.
        wanted = positions.query.clamp(min=0)[:, :, None].expand(-1, -1, mixed.shape[2])
        return mixed.gather(1, wanted).unflatten(2, states.shape[2:])

    def _mix_last(self, states: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Mix cached states `(B, S, H, Q)` for one new token a row, `(B, 1, H, Q)`; nothing else is computed."""
        row = positions.query.clamp(min=0)  # (B, 1)
        weight = self.weight[:, :, row, positions.key.clamp(min=0)]  # (H, K, B, S)
        # On the weights, which are fewer numbers than the states.
        weight = weight.masked_fill(positions.key < 0, 0).to(states.dtype)
        mixed = torch.einsum("hkbs,bshkq->bhq", weight, self._taps(states))
        return (mixed + self.bias[:, row[:, 0]].t()[:, :, None].to(mixed.dtype)).unsqueeze(1)


class MaskedMixerMLP(nn.Module):
    """The feed-forward part of a layer, for each token alone.

    Args:
        config ([`MaskedMixerConfig`]): The architecture.
    """

    def __init__(self, config: MaskedMixerConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(B, T, D)` to `(B, T, D)`."""
        return self.down_proj(F.gelu(self.up_proj(hidden_states)))


class MaskedMixerLayer(GradientCheckpointingLayer):
    """Token mixing and feed-forward part, each after a layer norm and beside a residual connection.

    Args:
        config ([`MaskedMixerConfig`]): The architecture.
        layer_idx (`int`): Place of the layer.
    """

    def __init__(self, config: MaskedMixerConfig, layer_idx: int):
        super().__init__()
        self.mixing_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixing = MaskedTokenMixing(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MaskedMixerMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        present: torch.Tensor | None = None,
        positions: Positions | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """Map `(B, T, D)` to `(B, T, D)`; the arguments are those of [`MaskedTokenMixing`]."""
        mixed = self.mixing(self.mixing_norm(hidden_states), present, positions, past_key_values)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class MaskedMixerPreTrainedModel(PreTrainedModel):
    """What the masked mixers share: loading and initialisation."""

    config_class = MaskedMixerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MaskedMixerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # There is no attention to implement; composites hand these names down to their parts.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel.save_pretrained` does, whole or not at all.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            args: As in the library.
            kwargs: As in the library.
        """
        save_whole(super().save_pretrained, save_directory, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MaskedTokenMixing):
            module.initialize()
        else:
            super()._init_weights(module)


class MaskedMixerModel(MaskedMixerPreTrainedModel):
    """A masked mixer without language modelling head.

    Any length up to `max_position_embeddings`, padding anywhere: a token's position is the number of tokens before it,
    and nothing depends on padding. There is no final norm.

    Args:
        config ([`MaskedMixerConfig`]): The architecture.
    """

    def __init__(self, config: MaskedMixerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MaskedMixerLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token table."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the states of a text.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Token ids.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 for tokens, 0 for padding, on either side
                or between; S counts cached columns too. A row of padding only gives finite states.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Positions of the tokens, increasing along
                a row. Default: the number of tokens before each.
            past_key_values (`Cache`, *optional*): What an earlier call returned, or an empty `DynamicCache`.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, D)`, *optional*): Vectors instead of `input_ids`.
            use_cache (`bool`, *optional*): Whether to return a cache. Default: `config.use_cache` outside training.
            output_hidden_states (`bool`, *optional*): Whether to return the states before and after every layer.
            kwargs: Arguments that other bodies know; there is no use for them here.

        Returns:
            `BaseModelOutputWithPast`: `last_hidden_state` of shape `(B, T, D)`; states of padding are arbitrary but
            finite.

        Raises:
            ValueError: If the text is longer than `max_position_embeddings`, an id is outside the vocabulary, shapes
                differ, or positions do not increase.
        """
        inputs_embeds = self._embed(input_ids, inputs_embeds)  # (B, T, D)
        past_key_values = self._prepare_cache(past_key_values, use_cache)
        present, positions = self._place(inputs_embeds, attention_mask, position_ids, past_key_values)

        hidden_states = inputs_embeds
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        all_hidden_states = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, present=present, positions=positions, past_key_values=past_key_values)
            all_hidden_states.append(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Look up token ids, or check what was given instead of them."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`, and only one of them.")
        if inputs_embeds is None:
            assert input_ids is not None
            check_token_ids("input_ids", input_ids, self.config.vocab_size, "the masked mixer")
            return self.embed_tokens(input_ids)
        if inputs_embeds.dim() != 3 or 0 in inputs_embeds.shape or inputs_embeds.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"`inputs_embeds` has shape {tuple(inputs_embeds.shape)}; expected (batch, tokens, "
                f"{self.config.hidden_size}), none of them 0."
            )
        return inputs_embeds

    def _prepare_cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        if use_cache is None:
            # In training a cache would keep every state of the graph and serve nobody.
            use_cache = cache is not None or (self.config.use_cache and self.config.causal and not self.training)
        if not use_cache:
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(
                    "`past_key_values` holds earlier tokens, but `use_cache` is False. Leave one of them out."
                )
            return None
        if not self.config.causal:
            raise ValueError(
                "A mixer with `causal=False` cannot keep a cache: every later token changes the earlier states. Leave "
                "out `use_cache` and `past_key_values`."
            )
        if self.gradient_checkpointing and self.training:
            return None  # the layers drop it
        if cache is None:
            return DynamicCache()
        if not isinstance(cache, Cache) or getattr(cache, "is_compileable", False):
            raise ValueError(
                f"`past_key_values` is a {type(cache).__name__}; a masked mixer keeps a cache that grows. Give a "
                "`DynamicCache`."
            )
        return cache

    def _place(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor | None, Positions | None]:
        """Find where the tokens stand.

        Returns:
            `(None, None)` if every column is a token at that position; `(present, None)` if some are padding and the
            tokens still stand at their positions; `(None, positions)` otherwise. While compiling, where values cannot
            be looked at, the last whenever a mask, positions or cached tokens are given.
        """
        (batch_size, num_columns), device = inputs_embeds.shape[:2], inputs_embeds.device
        limit = self.config.max_position_embeddings
        past_length = cache.get_seq_length() if cache is not None else 0
        check_attention_mask("attention_mask", attention_mask, batch_size, past_length + num_columns, not past_length)
        if attention_mask is None and position_ids is None and past_length == 0:
            self._check_length(num_columns)
            return None, None

        past = None
        if cache is not None and past_length:
            # Positions lie in every layer alike, so that beams reorder them with the states; one copy is enough to
            # read.
            past = cache.layers[0].values[:, 0, :, 0].long()  # (B, S - T)
        query = self._query_positions(attention_mask, position_ids, past, batch_size, num_columns, device)
        key = query if past is None else torch.cat([past, query], 1)
        if attention_mask is not None:
            key = key.masked_fill(attention_mask == 0, -1)
        if torch.compiler.is_compiling():
            # Ranks stay under the number of columns; only positions of the caller's own choice may leave gaps.
            return None, Positions(query, key, min(limit, num_columns) if position_ids is past is None else limit)

        self._check_length(int(query.max()) + 1)
        if position_ids is not None or past is not None:
            self._check_order(key, num_columns)
        columns = torch.arange(num_columns, device=device)
        if past is None and num_columns <= limit:
            # Worth a look at the device: a text without gaps needs neither scattering nor masks.
            if bool((query == columns).all()):
                return None, None
            if bool(((query == columns) | (query < 0)).all()):
                return query >= 0, None
        return None, Positions(query, key, max(1, int(key.max()) + 1))

    @staticmethod
    def _query_positions(
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past: torch.Tensor | None,
        batch_size: int,
        num_columns: int,
        device: torch.device,
    ) -> torch.Tensor:
        """Return the positions `(B, T)` of the columns of this call, -1 for padding."""
        if position_ids is not None:
            if tuple(position_ids.shape) not in ((batch_size, num_columns), (1, num_columns)):
                raise ValueError(
                    f"`position_ids` has shape {tuple(position_ids.shape)}; expected {(batch_size, num_columns)}, one "
                    "position a token of this call."
                )
            if not torch.compiler.is_compiling() and bool((position_ids < 0).any()):
                raise ValueError("`position_ids` holds a negative position. Mark padding in `attention_mask` instead.")
            query = position_ids.expand(batch_size, num_columns)
        elif attention_mask is not None:
            query = ((attention_mask != 0).long().cumsum(1) - 1)[:, -num_columns:]
        else:
            query = torch.arange(num_columns, device=device).expand(batch_size, num_columns)
            if past is not None:
                # After the furthest token of the row, wherever its padding stands.
                query = query + past.amax(1, keepdim=True) + 1
        if attention_mask is not None:
            query = query.masked_fill(attention_mask[:, -num_columns:] == 0, -1)
        return query

    def _check_length(self, length: int) -> None:
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"The text needs {length} positions, but this masked mixer has {self.config.max_position_embeddings} "
                "(`max_position_embeddings`). Shorten the text."
            )

    @staticmethod
    def _check_order(key: torch.Tensor, num_columns: int) -> None:
        """Refuse new tokens that do not follow all tokens before them, as in packed rows."""
        # A place holds one token: of two at one position one would take the other's place.
        reached = F.pad(key.cummax(1).values[:, :-1], (1, 0), value=-1)
        wrong = ((key <= reached) & (key >= 0))[:, -num_columns:]
        if bool(wrong.any()):
            row, column = (int(place) for place in wrong.nonzero()[0])
            raise ValueError(
                f"The position {int(key[:, -num_columns:][row, column])} of token {column} in row {row} does not "
                "follow the positions before it. Positions must increase along a row; give packed texts as rows of "
                "their own."
            )


class MaskedMixerForCausalLM(MaskedMixerPreTrainedModel, GenerationMixin):
    """A masked mixer with a language modelling head without bias.

    Args:
        config ([`MaskedMixerConfig`]): The architecture; `causal` must be True.

    Raises:
        ValueError: If the mixer is not causal.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MaskedMixerConfig):
        super().__init__(config)
        if not config.causal:
            raise ValueError(
                "A causal language model needs a config with `causal=True`; a mixer that sees the next token need not "
                "predict it. Use `MaskedMixerModel` for the non-causal one."
            )
        self.model = MaskedMixerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Refuse prompts padded on the right, then do what the library does."""
        if is_first_iteration and attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
            row = int((attention_mask[:, -1] == 0).nonzero()[0])
            raise ValueError(
                f"Row {row} of the prompts ends in padding, and generation would continue from there. Pad on the left "
                "(`padding_side='left'`)."
            )
        return super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, is_first_iteration=is_first_iteration, **kwargs
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the token that follows each column.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Token ids.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Positions of the tokens.
            past_key_values (`Cache`, *optional*): What an earlier call returned.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, D)`, *optional*): Vectors instead of `input_ids`.
            use_cache (`bool`, *optional*): Whether to return a cache.
            output_hidden_states (`bool`, *optional*): Whether to return the states before and after every layer.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): Targets, usually `input_ids`; the shift is done
                here. -100 has no loss.
            logits_to_keep (`int` or `torch.Tensor`): Compute logits of so many last columns (0: all), or of these
                columns.
            kwargs: `num_items_in_batch` and `shift_labels` reach the loss.

        Returns:
            `CausalLMOutputWithPast`: `loss` in nats per target and `logits` of shape `(B, T, V)`.

        Raises:
            ValueError: As [`MaskedMixerModel`], and if `labels` have another shape than the text or logits are left
                out.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # Columns are cut before the head, which is the widest product of a step.
        logits = self.lm_head(hidden_states[:, columns]).contiguous()  # (B, T, V)

        return CausalLMOutputWithPast(
            loss=self._loss(logits, labels, kwargs),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor | None:
        targets = kwargs.get("shift_labels") if labels is None else labels
        if targets is None:
            return None
        if targets.shape != logits.shape[:2]:
            raise ValueError(
                f"The labels have shape {tuple(targets.shape)}, but the logits are of {tuple(logits.shape[:2])} "
                "tokens. Give one label a token (-100 for none), and no `logits_to_keep` beside them."
            )
        return self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
