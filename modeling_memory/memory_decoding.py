"""What all ways of reading share: embedding a text, and putting memories before the decoder.

B rows, T columns, K memories per chunk, M memories of a row, N windows of a row, W window length, P windows of all
rows, R room for memories in front, D decoder width, X features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .memory_text import Text, is_compiling
from .memory_windows import has_inner_padding, predicting_column

TOKENS_PER_GROUP = {"cpu": 4096}
"""Most tokens, memories among them, that are read at a time where no gradient is asked for, by type of device."""
TOKENS_PER_GROUP_ELSEWHERE = 65536
"""The same on other devices, which want large batches: bounds memory only."""


@dataclass
class Reading:
    """What one call read.

    Attributes:
        features (`torch.FloatTensor` of shape `(B, T, X)`): What the model's `_decode` gives for the wanted columns:
            hidden states, or logits in the causal LM.
        cache (`Cache`, *optional*): What the next call continues from.
        hidden_states (`tuple` of `torch.FloatTensor` of shape `(B, T, D)`, *optional*): States of all layers.
        attentions (`tuple`, *optional*): The decoder's attentions.
        memory_embeds (`torch.FloatTensor` of shape `(B, M, D)`, *optional*): The memories that were read.
        memory_mask (`torch.LongTensor` of shape `(B, M)`, *optional*): 1 for present memories.
    """

    features: torch.Tensor
    cache: Any = None
    hidden_states: Any = None
    attentions: tuple[torch.Tensor, ...] | None = None
    memory_embeds: torch.Tensor | None = None
    memory_mask: torch.Tensor | None = None


class MemoryDecodingMixin:
    """The decoder's side of a memory model.

    Throughout, `columns` are the text columns whose features are wanted (`None` is all), `cache` is what an earlier
    call returned or an empty cache to fill, and `options` are passed to the decoder.
    """

    config: Any
    decoder: PreTrainedModel
    training: bool
    window_positions: nn.Embedding | None
    _takes_position_ids: bool

    def _decode(self, *, columns: torch.Tensor | None = None, **inputs: Any) -> tuple[torch.Tensor, ModelOutput]:
        """Run the decoder; returns features `(rows, columns, X)` and the decoder's output."""
        raise NotImplementedError

    def _encode(
        self, chunk_ids: torch.Tensor, chunk_mask: torch.Tensor | None, num_memories: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Turn chunks `(n, L)` into memories `(n, K, D)`, of which the first `num_memories` `(n,)` count."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's token table."""
        raise NotImplementedError

    def _read_clear(
        self, text: Text, cache: Cache | None, use_cache: bool, columns: torch.Tensor | None = None, **options: Any
    ) -> Reading:
        """Read a text as the plain decoder does."""
        mask = text.attention_mask
        holes = not is_compiling() and text.has_own_mask and has_inner_padding(mask)
        features, outputs = self._decode(
            columns=None if holes else columns,
            input_ids=text.input_ids,
            inputs_embeds=text.inputs_embeds,
            attention_mask=mask,
            position_ids=text.positions(),
            past_key_values=cache,
            use_cache=use_cache,
            **options,
        )
        if holes:  # what predicts the token after a hole stands before the hole
            row = torch.arange(text.batch_size, device=mask.device)[:, None]
            features = features[row, predicting_column(mask)]
            features = features if columns is None else features[:, columns]
        return Reading(features, outputs.past_key_values, outputs.hidden_states, outputs.attentions)

    def _memory_block(
        self, memory_embeds: torch.Tensor, visible: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Lay memories `(P, M, D)` out in columns before a text; absent ones are masked or constant fillers.

        Returns:
            Embeds `(P, R, D)`, mask `(P, R)` and positions `(P, R)`.
        """
        rank = (visible.cumsum(1) - 1).clamp(min=0)
        span = self.config.memory_span
        if self.config.absent_memories == "mask":
            return memory_embeds, visible, span * rank
        rows, room = len(visible), self.config.max_memories
        filler = float(self.config.absent_memories == "ones")
        block = memory_embeds.new_full((rows, room, memory_embeds.shape[2]), filler)
        row, column = visible.nonzero(as_tuple=True)
        block = block.index_put((row, rank[row, column]), memory_embeds[row, column])
        positions = span * torch.arange(room, device=visible.device).expand(rows, room)
        return block, torch.ones_like(positions), positions

    def _text_start(self, num_in_front: torch.Tensor) -> torch.Tensor:
        """Return the positions `(rows,)` at which texts start behind so many memories and tokens each."""
        start = self.config.text_start
        return num_in_front if start is None else torch.full_like(num_in_front, start)

    def _decode_behind(
        self,
        block: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        embeds: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache | None,
        **options: Any,
    ) -> tuple[torch.Tensor, ModelOutput, torch.Tensor]:
        """Decode `[block | text]`; returns features of all columns, the decoder's output and the column mask."""
        block_embeds, block_mask, block_positions = block
        column_mask = torch.cat([block_mask.to(mask), mask], 1)
        features, outputs = self._decode(
            inputs_embeds=torch.cat([block_embeds.to(embeds), embeds], 1),
            attention_mask=column_mask,
            position_ids=torch.cat([block_positions, positions], 1),
            past_key_values=cache,
            **options,
        )
        return features, outputs, column_mask

    def _no_memories(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return memories `(B, 0, D)` and their mask `(B, 0)`."""
        weight: Any = self.get_input_embeddings().weight
        memory_embeds = weight.new_zeros(batch_size, 0, self.config.decoder.hidden_size)
        return memory_embeds, torch.zeros(batch_size, 0, dtype=torch.long, device=weight.device)

    def _markers(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Whether a token, not padding, asks for what the memories hold: COPY or BLANK."""
        markers = [self.config.copy_token_id, self.config.blank_token_id]
        marked = sum((input_ids == marker for marker in markers if marker is not None), torch.zeros_like(input_ids))
        return (marked > 0) & mask.bool()

    def _places(self, rank: torch.Tensor, visible: torch.Tensor, asked: torch.Tensor) -> torch.Tensor | None:
        """Return places in the window, or in its chunk, `(B, T)` from ranks, -1 where a token is not told its place.

        It is told in rows that see some of the memories `(B, M)`, from the text's first marker on (`asked`, `(B, T)`).
        """
        if self.window_positions is None:
            return None
        told = visible.bool().any(1, keepdim=True) & asked
        return torch.where(told, rank.clamp(min=0) % self.config.num_places, -1)

    def _tell_places(self, embeds: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
        """Add to embeddings `(B, T, D)` what tells tokens their places."""
        if self.window_positions is None or places is None:
            return embeds
        told = self.window_positions(places.clamp(min=0)) * (places >= 0)[..., None]
        return embeds + told.to(embeds)

    def _token_inputs(self, input_ids: torch.Tensor, places: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Give the decoder tokens as they are, or embedded where they are told their places."""
        return {"input_ids": input_ids} if places is None else {"inputs_embeds": self._embed(input_ids, places)}

    def _embed(
        self, input_ids: torch.Tensor, places: torch.Tensor | None, slots: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embed tokens and tell them their places; a slot, whose id need not be in the table, is embedded as id 0."""
        if slots is not None:
            input_ids = input_ids.masked_fill(slots, 0)
        return self._tell_places(self.get_input_embeddings()(input_ids), places)

    @property
    def _has_slots(self) -> bool:
        return self.config.memory_token_id is not None


def row_groups(num_rows: int, tokens_per_row: int, device: torch.device) -> list[slice]:
    """Cut rows into groups of at most `TOKENS_PER_GROUP` tokens, or of one row.

    All rows are one group where gradients are asked for, since the graph keeps what every row needs anyway, and where
    the code is compiled.

    Args:
        num_rows (`int`): Rows: chunks to encode or windows to decode, which do not see each other.
        tokens_per_row (`int`): Tokens of a row, memories among them.
        device (`torch.device`): Where they are read.

    Returns:
        `list[slice]`: The groups, in order.
    """
    if torch.is_grad_enabled() or is_compiling():
        return [slice(num_rows)]
    step = max(1, TOKENS_PER_GROUP.get(device.type, TOKENS_PER_GROUP_ELSEWHERE) // tokens_per_row)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether the library switches the model's cache off to recompute activations."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
