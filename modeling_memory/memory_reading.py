"""The ways of reading: in slots, by windows, behind a block, continuing a cache, and in clear.

B rows, T columns, K memories per chunk, M memories of a row, N windows of a row, W window length, P windows of all
rows, R room for memories in front, D decoder width, X features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_memory import smallest_attention_window
from .memory_cache import MemoryCache
from .memory_text import (
    Text,
    check_capacity,
    check_clear,
    check_memories,
    check_no_slots,
    check_text,
    check_view,
    is_compiling,
)
from .memory_windows import Windows, has_inner_padding, predicting_column, split_windows


@dataclass
class Reading:
    """What one call read.

    Attributes:
        features (`torch.FloatTensor` of shape `(B, T, X)`): What the model's `_decode` gives for the wanted columns:
        hidden
            states, or logits in the causal LM.
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


class MemoryReadingMixin:
    """The ways in which a memory model puts memories and text before its decoder.

    Throughout, `columns` are the text columns whose features are wanted (`None` is all), `cache` is what an earlier
    call
    returned or an empty cache to fill, and `options` are passed to the decoder.
    """

    config: Any
    decoder: PreTrainedModel
    training: bool
    window_positions: nn.Embedding | None
    _takes_position_ids: bool

    def _decode(self, *, columns: torch.Tensor | None = None, **inputs: Any) -> tuple[torch.Tensor, ModelOutput]:
        """Run the decoder; returns features `(rows, columns, X)` and the decoder's output."""
        raise NotImplementedError

    def _encode(self, chunk_ids: torch.Tensor, chunk_mask: torch.Tensor | None) -> torch.Tensor:
        """Turn chunks `(n, L)` into memories `(n, K, D)`."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's token table."""
        raise NotImplementedError

    def _read(
        self,
        text: Text,
        memory_embeds: torch.Tensor | None,
        memory_mask: torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        rolling_memory: bool | None = None,
        **options: Any,
    ) -> Reading:
        """Put memories and text before the decoder: in slots, by windows, continuing a cache, or in clear."""
        check_text(self.config, text, cache)
        first_memory = getattr(cache, "first_memory", None)
        if cache is not None and first_memory is not None:
            check_view(self.config, cache.get_seq_length() + text.length - first_memory)
        if use_cache is None:
            use_cache = cache is not None or (not self.training and getattr(self.decoder.config, "use_cache", True))
        if _is_checkpointing(self.decoder):
            _check_empty(cache)
            cache, use_cache = None, False
        fixed = self.config.memory_positions == "fixed"
        if memory_embeds is not None:
            memory_embeds, memory_mask = check_memories(self.config, text, memory_embeds, memory_mask)
            if self._rolls_behind(text, cache, rolling_memory):
                reading = self._read_context(text, memory_embeds, memory_mask, cache, use_cache, **options)
            elif fixed or text.input_ids is None:
                reading = self._read_behind(text, memory_embeds, memory_mask, cache, use_cache, **options)
            else:
                reading = self._read_slots(text, memory_embeds, memory_mask, cache, use_cache, **options)
            reading.memory_embeds, reading.memory_mask = memory_embeds, memory_mask
            return reading
        check_no_slots(self.config, text)
        if isinstance(cache, MemoryCache) and cache.num_columns > 0:
            return self._read_on(text, cache, **options)
        if (
            self.config.self_memory
            and text.input_ids is not None
            and (cache is None or isinstance(cache, MemoryCache))
        ):
            if cache is None and use_cache:
                cache = MemoryCache()
            return self._read_windows(text, cache, **options)
        check_clear(self.config, text, cache)
        if fixed:
            return self._read_behind(text, *self._no_memories(text.batch_size), cache, use_cache, **options)
        reading = self._read_clear(text, cache, use_cache, **options)
        if text.input_ids is None:
            _mark_clear(reading.cache)
        return reading

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

    def _read_slots(
        self,
        text: Text,
        memory_embeds: torch.Tensor,
        memory_mask: torch.Tensor,
        cache: Cache | None,
        use_cache: bool,
        **options: Any,
    ) -> Reading:
        """Read a text in which memories stand in the slots."""
        slots = text.input_ids == self.config.memory_token_id  # (B, T)
        first_memory = self._first_memory(slots)
        if first_memory is not None:
            check_view(self.config, text.length - first_memory)
        embeds = self._embed_slots(text, slots, memory_embeds, memory_mask)
        own_cache = self._slot_cache(cache, use_cache)
        decoder_cache = cache if own_cache is None else own_cache.decoder_cache()
        reading = self._read_clear(
            Text(None, text.attention_mask, embeds, text.position_ids), decoder_cache, use_cache, **options
        )
        _mark_clear(reading.cache)
        if own_cache is not None:
            mask = text.mask()
            asked = self._markers(text.input_ids, mask).any(1)
            own_cache.start(
                reading.cache,
                column_mask=mask,
                window_input_ids=mask.new_zeros(text.batch_size, 0),
                window_fill=(mask * ~slots).sum(1),
                memory_embeds=memory_embeds,
                memory_mask=memory_mask,
                asked=asked,
                num_pinned=memory_mask.sum(1),
                num_clear=torch.zeros_like(mask[:, 0]),
            )
            own_cache.num_columns = text.length
            reading.cache = own_cache
        if first_memory is not None and reading.cache is not None:
            reading.cache.first_memory = first_memory
        return reading

    def _embed_slots(
        self,
        text: Text,
        slots: torch.Tensor,
        memory_embeds: torch.Tensor,
        memory_mask: torch.Tensor,
        rolling: bool = False,
    ) -> torch.Tensor:
        """Embed a text, memories in its slots `(B, T)`; if it is `rolling`, windows begin behind the last slot."""
        places = None
        if self.window_positions is not None:  # otherwise the mask may be one of four dimensions, of a static cache
            mask = text.mask()
            asked = self._markers(text.input_ids, mask).cumsum(1) > 0  # (B, T)
            rank = (mask * ~slots).cumsum(1) - 1
            if rolling:
                ahead = ((rank + 1) * slots).amax(1, keepdim=True)  # tokens before the last slot
                rank = torch.where(rank >= ahead, rank - ahead, rank)
            places = self._places(rank, memory_mask, asked)
        embeds = self._embed(text.input_ids, places, slots)
        return embeds.masked_scatter(slots[..., None], memory_embeds[memory_mask.bool()].to(embeds))

    def _rolls_behind(self, text: Text, cache: Cache | None, rolling_memory: bool | None) -> bool:
        """Whether full windows behind the slots are to fold: asked for, or told by the empty cache to fill."""
        told = isinstance(cache, MemoryCache) and cache.rolling and cache.rolls_behind_slots
        if not (rolling_memory or told):
            return False
        if text.input_ids is None or not self.config.self_memory:
            raise ValueError(
                "`rolling_memory=True` folds token ids of the encoder's own tokenizer, but "
                + ("`inputs_embeds` were given." if text.input_ids is None else "`config.self_memory` is False.")
                + " Leave it out."
            )
        return True

    def _read_context(
        self,
        text: Text,
        memory_embeds: torch.Tensor,
        memory_mask: torch.Tensor,
        cache: MemoryCache | None,
        use_cache: bool,
        columns: torch.Tensor | None = None,
        **options: Any,
    ) -> Reading:
        """Read a text behind a context that stays: what follows the last slot is cut into windows, which fold.

        All up to a row's last slot, memories and tokens alike, stands before each of its windows.
        """
        if use_cache and cache is None:
            cache = MemoryCache()
        if cache is not None:
            cache.rolls_behind_slots = True
        mask = text.mask()
        slots = (text.input_ids == self.config.memory_token_id) & mask.bool()  # (B, T)
        behind = mask * (slots.flip(1).cumsum(1).flip(1) == 0)
        ahead = mask - behind
        num_clear = ahead.sum(1) - memory_mask.sum(1)
        if self.config.max_memories is None:  # the limit is one of positions, which tokens take as memories do
            num_clear = torch.zeros_like(num_clear)
        fixed = self.config.memory_positions == "fixed"
        if fixed and num_clear.any():
            raise ValueError(
                "With `memory_positions='fixed'` all memories stand before the text, but a slot stands behind a "
                "token. Put the slots in front or use `memory_positions='contiguous'`."
            )
        embeds = self._embed_slots(text, slots, memory_embeds, memory_mask, rolling=True)
        before, before_mask = pack_present(embeds, ahead)  # (B, R, D), (B, R)
        asked = self._markers(text.input_ids, ahead).any(1)
        if behind.sum(1).max() <= self.config.window_length and not fixed:
            check_view(self.config, before.shape[1] + self.config.window_length)
            decoder_cache = None if cache is None else cache.decoder_cache()
            reading = self._read_clear(
                Text(None, text.attention_mask, embeds, text.position_ids),
                decoder_cache,
                use_cache,
                columns=columns,
                **options,
            )
            if cache is not None:
                packed, _ = pack_present(text.input_ids[..., None], behind)
                cache.start(
                    reading.cache,
                    column_mask=mask,
                    window_input_ids=packed[..., 0],
                    window_fill=behind.sum(1),
                    memory_embeds=before.detach(),
                    memory_mask=before_mask,
                    asked=asked,
                    num_pinned=before_mask.sum(1),
                    num_clear=num_clear,
                )
                cache.num_columns = text.length
            reading.cache = cache
            return reading
        if not behind.any(1).all():
            row = int((~behind.bool().any(1)).nonzero()[0])
            raise ValueError(
                f"Row {row} ends in a memory slot, while the text of another row is longer than a window and folds. "
                "Let each row have a token behind its memories, such as COPY, or give them one by one."
            )
        prior = before, before_mask, asked, before_mask.sum(1), num_clear
        inner = Text(text.input_ids.masked_fill(slots, 0), behind, None, text.position_ids)
        wanted = ahead if columns is None else ahead[:, columns]
        if not wanted.any():
            return self._read_windows(inner, cache, prior, columns=columns, **options)
        reading = self._read_windows(inner, cache, prior, **options)
        places = (before_mask.cumsum(1) - 1).clamp(min=0)
        features, outputs = self._decode(
            inputs_embeds=before, attention_mask=before_mask, position_ids=places, use_cache=False, **options
        )
        column = (ahead.cumsum(1) - 1).clamp(min=0)
        row = torch.arange(text.batch_size, device=mask.device)[:, None]
        started = behind.cumsum(1)[..., None] > 0  # padding shows what stands before it
        reading.features = torch.where(started, reading.features, features[row, column])
        if reading.hidden_states is not None:
            pairs = zip(reading.hidden_states, outputs.hidden_states, strict=True)
            reading.hidden_states = tuple(torch.where(started, inside, front[row, column]) for inside, front in pairs)
        if columns is not None:
            reading.features = reading.features[:, columns]
        return reading

    def _first_memory(self, slots: torch.Tensor) -> int | None:
        """Return the first column of slots `(B, T)`; `None` where nothing depends on it: no layer is short-sighted."""
        if is_compiling() or smallest_attention_window(self.config.decoder) is None or not bool(slots.any()):
            return None
        return int(slots.any(0).long().argmax())

    def _slot_cache(self, cache: Cache | None, use_cache: bool) -> MemoryCache | None:
        """Give a cache that knows which columns are memories, where later tokens must be told their places."""
        if self.window_positions is None or not use_cache:
            return None
        if cache is None or (isinstance(cache, MemoryCache) and cache.get_seq_length() == 0):
            own_cache = MemoryCache() if cache is None else cache
            own_cache.rolling = False
            return own_cache
        raise ValueError(
            f"A {type(cache).__name__} of {cache.get_seq_length()} columns was given with memories, but with "
            "`window_positions` the cache must know which columns are memories. Pass `past_key_values=None`, or an "
            "empty `MemoryCache`."
        )

    def _read_windows(
        self,
        text: Text,
        cache: MemoryCache | None,
        prior: tuple[torch.Tensor, ...] | None = None,
        columns: torch.Tensor | None = None,
        **options: Any,
    ) -> Reading:
        """Read a text by windows: each in clear, behind the memories of all windows before it.

        Args:
            text (`Text`): Token ids of shape `(B, T)`.
            cache ([`MemoryCache`], *optional*): An empty cache to fill with each row's last window.
            prior (`tuple`, *optional*): What stands before the whole text: memories `(B, M, D)`, their mask `(B, M)`,
                whether a marker has been read `(B,)`, how many of them belong to a context that stays `(B,)`, and how
                many of those are tokens in clear `(B,)`.
            columns (`torch.LongTensor`, *optional*): Text columns whose features are wanted.
            options: Passed to the decoder.
        """
        contiguous = self.config.memory_positions == "contiguous"
        if text.length <= self.config.window_length and prior is None and contiguous:
            return self._read_one_window(text, cache, columns=columns, **options)
        windows = split_windows(text.input_ids, text.attention_mask, self.config.window_length)
        if windows.num_windows == 1 and prior is None and contiguous:
            return self._read_one_window(text, cache, columns=columns, **options)
        if text.position_ids is not None:
            raise ValueError(
                f"`position_ids` were given for a text of {windows.num_windows} windows, but a window's positions "
                "follow from its "
                "memories. Leave them out."
            )
        if options.pop("output_attentions", None):
            raise ValueError(
                f"`output_attentions` was asked of a text of {windows.num_windows} windows, whose attentions have no "
                "layout over "
                f"the text. Ask for a text of at most {self.config.window_length} tokens."
            )

        memory_embeds, memory_mask = self._fold(windows)  # (B, M, D), (B, M)
        num_prior = num_pinned = num_clear = torch.zeros_like(windows.counts)
        if prior is not None:
            num_prior, num_pinned, num_clear = prior[1].sum(1), prior[3], prior[4]
            memory_embeds, memory_mask = pack_present(
                torch.cat([prior[0].to(memory_embeds), memory_embeds], 1),
                torch.cat([prior[1].to(memory_mask), memory_mask], 1),
            )
        room = self._check_room(memory_mask, num_clear)
        first_marker = self._first_marker(windows)  # (B,)
        if prior is not None:
            first_marker = first_marker.masked_fill(prior[2], -1)
        if columns is not None and not options.get("output_hidden_states") and not is_compiling():
            windows, columns = windows.keep(columns), None

        num_visible = num_prior[windows.row] + windows.index * self.config.memories_per_window  # (P,)
        number = torch.arange(memory_mask.shape[1], device=num_visible.device)
        visible = number < num_visible[:, None]  # (P, M)
        if room is not None:  # the oldest make room, but for those of the context
            pinned, clear = num_pinned[windows.row, None], num_clear[windows.row, None]
            visible &= (number < pinned) | (number >= num_visible[:, None] - room + pinned - clear)
        features, outputs, column_mask = self._decode_windows(
            windows, memory_embeds, visible.long(), first_marker, shared=room is None, **options
        )
        if cache is not None:
            last = windows.last
            if room is not None:
                memory_embeds, memory_mask = pack_present(memory_embeds, visible[last].long())
            decoder_cache = outputs.past_key_values
            decoder_cache.batch_select_indices(last)
            cache.start(
                decoder_cache,
                column_mask=column_mask[last],
                window_input_ids=windows.input_ids[last],
                window_fill=windows.attention_mask[last].sum(1),
                memory_embeds=memory_embeds.detach(),
                memory_mask=memory_mask,
                asked=first_marker < (windows.counts - 1) * self.config.window_length,
                num_pinned=num_pinned,
                num_clear=num_clear,
            )
            cache.num_columns = text.length
        hidden_states = outputs.hidden_states
        if hidden_states is not None:
            length = windows.input_ids.shape[1]
            hidden_states = tuple(windows.lay_back(states[:, -length:]) for states in hidden_states)
        features = windows.lay_back(features)  # (B, T, X)
        return Reading(
            features if columns is None else features[:, columns],
            cache,
            hidden_states,
            memory_embeds=memory_embeds,
            memory_mask=memory_mask,
        )

    def _read_one_window(self, text: Text, cache: MemoryCache | None, **options: Any) -> Reading:
        """Read a text of one window: the plain decoder, exactly."""
        reading = self._read_clear(
            text, None if cache is None else cache.decoder_cache(), cache is not None, **options
        )
        if cache is not None:
            mask = text.mask()
            packed, _ = pack_present(text.input_ids[..., None], mask)
            memory_embeds, memory_mask = self._no_memories(text.batch_size)
            cache.start(
                reading.cache,
                column_mask=mask,
                window_input_ids=packed[..., 0],
                window_fill=mask.sum(1),
                memory_embeds=memory_embeds,
                memory_mask=memory_mask,
                asked=torch.zeros_like(mask[:, 0], dtype=torch.bool),
                num_pinned=torch.zeros_like(mask[:, 0]),
                num_clear=torch.zeros_like(mask[:, 0]),
            )
            cache.num_columns = text.length
        reading.cache = cache
        return reading

    def _check_room(self, memory_mask: torch.Tensor, num_clear: torch.Tensor) -> int | None:
        """Return for how many memories there is room if `(B, M)` are more, and the oldest may go; `None` if not.

        Raises:
            ValueError: If they are more and none may go.
        """
        capacity, number = self.config.memory_capacity, memory_mask.shape[1]
        if capacity is None or number <= capacity:
            return None
        if not is_compiling():
            number = int((memory_mask.sum(1) - num_clear).max())
        if self.config.memory_policy == "error" or number <= capacity:
            check_capacity(self.config, number)
            return None
        return capacity

    def _fold(self, windows: Windows) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn all windows of each row but its last into memories `(B, M, D)` and their mask `(B, M)`."""
        batch_size, chunk_length = len(windows.counts), self.config.chunk_length
        per_window = self.config.memories_per_window
        if windows.num_windows == 1:
            return self._no_memories(batch_size)
        if windows.dense:
            folded = windows.input_ids.view(batch_size, windows.num_windows, -1)[:, :-1]  # (B, N-1, W)
            memory_embeds = self._encode(folded.reshape(-1, chunk_length), None)
            memory_embeds = memory_embeds.reshape(batch_size, (windows.num_windows - 1) * per_window, -1)
            return memory_embeds, torch.ones_like(memory_embeds[..., 0], dtype=torch.long)
        full = windows.index < windows.counts[windows.row] - 1
        memory_embeds = self._encode(windows.input_ids[full].reshape(-1, chunk_length), None)
        memory_embeds = memory_embeds.reshape(int(full.sum()), per_window, self.config.decoder.hidden_size)
        numbers = torch.arange(windows.num_windows - 1, device=full.device)
        present = numbers < windows.counts[:, None] - 1  # (B, N-1)
        return scatter_present(memory_embeds, present).flatten(1, 2), present.long().repeat_interleave(
            per_window, dim=1
        )

    def _decode_windows(
        self,
        windows: Windows,
        memory_embeds: torch.Tensor,
        visible: torch.Tensor,
        first_marker: torch.Tensor,
        shared: bool = True,
        **options: Any,
    ) -> tuple[torch.Tensor, ModelOutput, torch.Tensor]:
        """Decode windows `(P, W)`, each behind the memories of its row that are visible to it.

        The memories of a row do not depend on the window behind them, so they run through the decoder once and their
        keys and values are shared by the row's windows. Where that cannot be (not `shared`: the oldest make room;
        constant fillers differ by window; activation checkpointing switches the cache off) each window gets a row of
        its own, memories included.
        `first_marker` `(B,)` is the rank of each text's first COPY or BLANK.

        Returns:
            Features `(P, W, X)`, the decoder's output, and the mask over the columns of its cache `(P, columns)`.
        """
        window_length = windows.input_ids.shape[1]
        offsets = torch.arange(window_length, device=visible.device)
        fixed = self.config.memory_positions == "fixed"
        start = torch.full_like(windows.row, self.config.max_memories) if fixed else visible.sum(1)
        positions = start[:, None] + offsets  # (P, W)
        rank = (windows.index * window_length)[:, None] + offsets
        places = self._places(offsets, visible, rank >= first_marker[windows.row][:, None])
        options.setdefault("use_cache", True)
        if shared and self.config.absent_memories == "mask" and not _is_checkpointing(self.decoder):
            column_mask = torch.cat([visible, windows.attention_mask], 1)  # (P, M + W)
            prefix_cache = DynamicCache()
            if memory_embeds.shape[1]:
                memory_positions = torch.arange(memory_embeds.shape[1], device=visible.device)
                memory_positions = memory_positions.expand(memory_embeds.shape[:2])
                prefix = {"inputs_embeds": memory_embeds, "position_ids": memory_positions}
                if not self._takes_position_ids:
                    prefix.pop("position_ids")
                prefix_cache = self.decoder.base_model(
                    **prefix, past_key_values=prefix_cache, use_cache=True
                ).past_key_values
                prefix_cache.batch_select_indices(windows.row)
            features, outputs = self._decode(
                **self._token_inputs(windows.input_ids, places),
                attention_mask=column_mask,
                position_ids=positions,
                past_key_values=prefix_cache,
                **options,
            )
            return features, outputs, column_mask
        seen, visible = (
            (memory_embeds[windows.row], visible) if shared else pack_present(memory_embeds[windows.row], visible)
        )
        block = self._memory_block(seen, visible)
        features, outputs, column_mask = self._decode_behind(
            block,
            self._embed(windows.input_ids, places),
            windows.attention_mask,
            positions,
            None,
            **options,
        )
        return features[:, -window_length:], outputs, column_mask

    def _read_behind(
        self,
        text: Text,
        memory_embeds: torch.Tensor,
        memory_mask: torch.Tensor,
        cache: Cache | None,
        use_cache: bool,
        columns: torch.Tensor | None = None,
        **options: Any,
    ) -> Reading:
        """Read a text behind memories in columns of their own: for embeddings without slots, and fixed positions."""
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"Memories that stand before a text were given with a cache of {cache.get_seq_length()} columns. Pass "
                "them with "
                "the first tokens and `past_key_values=None`."
            )
        mask, embeds = text.mask(), text.inputs_embeds
        slots = asked = torch.zeros_like(mask, dtype=torch.bool)
        if text.input_ids is not None:
            slots = text.input_ids == self.config.memory_token_id if self._has_slots else slots
            mask = mask * ~slots
            asked = self._markers(text.input_ids, mask).cumsum(1) > 0
            embeds = self._embed(text.input_ids, self._places(mask.cumsum(1) - 1, memory_mask, asked), slots)
            if (slots & (mask.cumsum(1) > 0)).any():
                raise ValueError(
                    "With `memory_positions='fixed'` all memories stand before the text, but a slot stands behind a "
                    "token. Put "
                    "the slots in front or use `memory_positions='contiguous'`."
                )
        block = self._memory_block(memory_embeds, memory_mask)
        fixed = self.config.memory_positions == "fixed"
        start = torch.full_like(mask[:, 0], self.config.max_memories) if fixed else memory_mask.sum(1)
        positions = start[:, None] + (mask.cumsum(1) - 1).clamp(min=0)
        decoder_cache = None if not use_cache else DynamicCache()
        features, outputs, column_mask = self._decode_behind(
            block, embeds, mask, positions, decoder_cache, use_cache=use_cache, **options
        )
        room = column_mask.shape[1] - text.length
        column = torch.where(
            slots, slots.cumsum(1) - 1, room + torch.arange(text.length, device=mask.device)
        )  # (B, T)
        row = torch.arange(text.batch_size, device=mask.device)[:, None]
        features = features[row, column if columns is None else column[:, columns]]
        filled = None
        if use_cache:
            filled = cache if isinstance(cache, MemoryCache) else MemoryCache()
            filled.rolling = False
            filled.start(
                outputs.past_key_values,
                column_mask=column_mask,
                window_input_ids=mask.new_zeros(text.batch_size, 0),
                window_fill=mask.sum(1),
                memory_embeds=memory_embeds,
                memory_mask=memory_mask,
                asked=asked[:, -1],
                num_pinned=memory_mask.sum(1),
                num_clear=torch.zeros_like(mask[:, 0]),
            )
            filled.num_columns = text.length
        hidden_states = outputs.hidden_states
        if hidden_states is not None:
            hidden_states = tuple(states[row, column] for states in hidden_states)
        return Reading(features, filled, hidden_states)

    def _memory_block(
        self, memory_embeds: torch.Tensor, visible: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Lay memories `(P, M, D)` out in columns before a text; absent ones are masked or constant fillers.

        Returns:
            Embeds `(P, R, D)`, mask `(P, R)` and positions `(P, R)`.
        """
        rank = (visible.cumsum(1) - 1).clamp(min=0)
        if self.config.absent_memories == "mask":
            return memory_embeds, visible, rank
        rows, room = len(visible), self.config.max_memories
        filler = float(self.config.absent_memories == "ones")
        block = memory_embeds.new_full((rows, room, memory_embeds.shape[2]), filler)
        row, column = visible.nonzero(as_tuple=True)
        block = block.index_put((row, rank[row, column]), memory_embeds[row, column])
        positions = torch.arange(room, device=visible.device).expand(rows, room)
        return block, torch.ones_like(positions), positions

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

    def _read_on(self, text: Text, cache: MemoryCache, columns: torch.Tensor | None = None, **options: Any) -> Reading:
        """Read the next tokens of texts that a memory cache began; full windows fold, each row's at its moment."""
        if text.input_ids is None:
            raise ValueError(
                "A memory cache continues with token ids, but `inputs_embeds` were given. Pass `input_ids`."
            )
        mask = text.mask()
        overflows = (cache.window_fill + mask.sum(1) > self.config.window_length) & cache.rolling  # (B,)
        rows = overflows.nonzero()[:, 0]
        num_columns = cache.num_columns + text.length
        if len(rows) == 0:
            reading = self._extend(text, mask, cache, columns, **options)
        elif len(rows) == text.batch_size:
            reading = self._reopen(rows, text, mask, cache, columns, **options)
            cache.start(reading.cache, **reading.cache.row_state())
        else:
            reopened = self._reopen(rows, text, mask, cache, columns, **options)
            reading = self._extend(text, mask, cache, columns, **options)
            cache.replace_rows(rows, reopened.cache)
            reading.features = reading.features.index_copy(0, rows, reopened.features)
            if reading.hidden_states is not None:
                pairs = zip(reading.hidden_states, reopened.hidden_states, strict=True)
                reading.hidden_states = tuple(old.index_copy(0, rows, new) for old, new in pairs)
        cache.num_columns = num_columns
        reading.cache = cache
        reading.memory_embeds, reading.memory_mask = cache.memory_embeds, cache.memory_mask
        return reading

    def _extend(
        self, text: Text, mask: torch.Tensor, cache: MemoryCache, columns: torch.Tensor | None, **options: Any
    ) -> Reading:
        """Read tokens behind those of the open windows."""
        fixed = self.config.memory_positions == "fixed"
        start = torch.full_like(cache.window_fill, self.config.max_memories) if fixed else cache.memory_mask.sum(1)
        offsets = cache.window_fill[:, None] + mask.cumsum(1) - 1  # (B, Q)
        positions = start[:, None] + offsets
        columns_of_window = torch.arange(cache.window_input_ids.shape[1], device=mask.device)
        filled = columns_of_window < cache.window_fill[:, None]
        seen = cache.asked | self._markers(cache.window_input_ids, filled).any(1)
        asked = seen[:, None] | (self._markers(text.input_ids, mask).cumsum(1) > 0)
        features, outputs = self._decode(
            columns=columns,
            **self._token_inputs(text.input_ids, self._places(offsets, cache.memory_mask, asked)),
            attention_mask=torch.cat([cache.column_mask, mask.to(cache.column_mask)], 1),
            position_ids=positions.clamp(min=0),
            past_key_values=cache.decoder_cache(),
            use_cache=True,
            **options,
        )
        cache.append(text.input_ids, mask)
        return Reading(features, cache, outputs.hidden_states, outputs.attentions)

    def _reopen(
        self,
        rows: torch.Tensor,
        text: Text,
        mask: torch.Tensor,
        cache: MemoryCache,
        columns: torch.Tensor | None,
        **options: Any,
    ) -> Reading:
        """Read the open windows of some rows again together with their next tokens, folding what is full."""
        length = cache.window_input_ids.shape[1]
        offsets = torch.arange(length, device=rows.device)
        window_mask = (offsets < cache.window_fill[rows][:, None]).to(mask)
        opened = Text(
            torch.cat([cache.window_input_ids[rows], text.input_ids[rows]], 1),
            torch.cat([window_mask, mask[rows]], 1),
        )
        wanted = torch.arange(text.length, device=rows.device)
        wanted = wanted if columns is None else wanted[columns]
        names = ("memory_embeds", "memory_mask", "asked", "num_pinned", "num_clear")
        prior = tuple(getattr(cache, name)[rows] for name in names)
        reading = self._read_windows(opened, MemoryCache(), prior, columns=length + wanted, **options)
        if reading.hidden_states is not None:
            reading.hidden_states = tuple(states[:, length:] for states in reading.hidden_states)
        return reading

    def _no_memories(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return memories `(B, 0, D)` and their mask `(B, 0)`."""
        weight: Any = self.get_input_embeddings().weight
        memory_embeds = weight.new_zeros(batch_size, 0, self.config.decoder.hidden_size)
        return memory_embeds, torch.zeros(batch_size, 0, dtype=torch.long, device=weight.device)

    def _first_marker(self, windows: Windows) -> torch.Tensor:
        """Return the rank of each text's first marker `(B,)`; a rank behind all tokens where there is none."""
        window_length = windows.input_ids.shape[1]
        rank = (windows.index * window_length)[:, None] + torch.arange(window_length, device=windows.row.device)
        none = torch.full_like(windows.counts, windows.num_windows * window_length)
        marked = self._markers(windows.input_ids, windows.attention_mask)
        rank = torch.where(marked, rank, none.max()).amin(1)  # (P,)
        return none.scatter_reduce(0, windows.row, rank, "amin")

    def _markers(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Whether a token, not padding, asks for what the memories hold: COPY or BLANK."""
        markers = [self.config.copy_token_id, self.config.blank_token_id]
        marked = sum((input_ids == marker for marker in markers if marker is not None), torch.zeros_like(input_ids))
        return (marked > 0) & mask.bool()

    def _places(self, rank: torch.Tensor, visible: torch.Tensor, asked: torch.Tensor) -> torch.Tensor | None:
        """Return places in the window `(B, T)` from ranks, -1 where a token is not told its place.

        It is told in rows that see some of the memories `(B, M)`, from the text's first marker on (`asked`, `(B, T)`).
        """
        if self.window_positions is None:
            return None
        told = visible.bool().any(1, keepdim=True) & asked
        return torch.where(told, rank.clamp(min=0) % self.config.window_length, -1)

    def _tell_places(self, embeds: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
        """Add to embeddings `(B, T, D)` what tells tokens their places in the window."""
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


def _is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether the library switches the model's cache off to recompute activations."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _check_empty(cache: Cache | None) -> None:
    """Refuse a cache that holds a text: where activations are recomputed the library keeps none."""
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"A cache of {cache.get_seq_length()} columns was given, but activation checkpointing keeps none. Call "
            "`model.eval()` or `model.gradient_checkpointing_disable()` first."
        )


def _mark_clear(cache: Cache | None) -> None:
    """Note on a cache that what it holds is read in clear, so that its next tokens are not taken for self-memory."""
    if cache is not None:
        cache.reads_in_clear = True


def scatter_present(values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Lay rows of `values` `(n, ...)` where `present` `(B, C)` is true, zeros elsewhere. Returns `(B, C, ...)`."""
    return values.new_zeros(*present.shape, *values.shape[1:]).index_put((present,), values)


def pack_present(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the present values `(B, M, X)` of each row to the front and drop columns that no row needs."""
    width = int(mask.sum(1).max()) if mask.shape[1] else 0
    order = torch.argsort(mask, dim=1, descending=True, stable=True)[:, :width]
    row = torch.arange(len(mask), device=mask.device)[:, None]
    return values[row, order], mask[row, order]
