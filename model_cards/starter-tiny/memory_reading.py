"""The ways of reading: in slots, behind a context or a block, by windows, continuing a cache, and in clear.

B rows, T columns, K memories per chunk, M memories of a row, N windows of a row, W window length, P windows of all
rows, R room for memories in front, D decoder width, X features.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from .configuration_memory import smallest_attention_window
from .memory_cache import MemoryCache
from .memory_decoding import Reading, is_checkpointing
from .memory_rolling import MemoryRollingMixin
from .memory_text import (
    Text,
    check_clear,
    check_flat_mask,
    check_memories,
    check_no_slots,
    check_text,
    check_view,
    is_compiling,
)
from .memory_windows import pack_present


class MemoryReadingMixin(MemoryRollingMixin):
    """The ways in which a memory model puts memories and text before its decoder."""

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
        if is_checkpointing(self.decoder):
            _check_empty(cache)
            cache, use_cache = None, False
        fixed = self.config.text_start is not None
        if memory_embeds is not None:
            memory_embeds, memory_mask = check_memories(self.config, text, memory_embeds, memory_mask)
            if self._rolls_behind(text, cache, rolling_memory):
                check_flat_mask(text)
                reading = self._read_context(text, memory_embeds, memory_mask, cache, use_cache, **options)
            elif fixed or text.input_ids is None:
                reading = self._read_behind(text, memory_embeds, memory_mask, cache, use_cache, **options)
            else:
                reading = self._read_slots(text, memory_embeds, memory_mask, cache, use_cache, **options)
            reading.memory_embeds, reading.memory_mask = memory_embeds, memory_mask
            return reading
        check_no_slots(self.config, text)
        if isinstance(cache, MemoryCache) and cache.num_columns > 0:
            check_flat_mask(text)
            return self._read_on(text, cache, **options)
        if (
            self.config.self_memory
            and text.input_ids is not None
            and (cache is None or isinstance(cache, MemoryCache))
        ):
            check_flat_mask(text)
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
        fixed = self.config.text_start is not None
        if fixed and num_clear.any():
            raise ValueError(self._slots_behind_tokens())
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
        nothing = torch.zeros_like(mask[:, :0])
        prior = {
            "memory_embeds": before,
            "memory_mask": before_mask,
            "asked": asked,
            "num_pinned": before_mask.sum(1),
            "num_clear": num_clear,
            "folded_input_ids": nothing,
            "segment_sizes": nothing,
        }
        inner = Text(text.input_ids.masked_fill(slots, 0), behind, None, text.position_ids)
        wanted = ahead if columns is None else ahead[:, columns]
        if not wanted.any():
            return self._read_windows(inner, cache, prior, columns=columns, **options)
        reading = self._read_windows(inner, cache, prior, **options)
        places = self.config.memory_span * (before_mask.cumsum(1) - 1).clamp(min=0)
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

    def _slots_behind_tokens(self) -> str:
        """Say why slots behind tokens are refused."""
        return (
            f"With `memory_positions={self.config.memory_positions!r}` all memories stand before the text, but a slot "
            "stands behind a token. Put the slots in front or use `memory_positions='contiguous'`."
        )

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
                "them with the first tokens and `past_key_values=None`."
            )
        mask, embeds = text.mask(), text.inputs_embeds
        slots = asked = torch.zeros_like(mask, dtype=torch.bool)
        if text.input_ids is not None:
            slots = text.input_ids == self.config.memory_token_id if self._has_slots else slots
            mask = mask * ~slots
            asked = self._markers(text.input_ids, mask).cumsum(1) > 0
            embeds = self._embed(text.input_ids, self._places(mask.cumsum(1) - 1, memory_mask, asked), slots)
            if (slots & (mask.cumsum(1) > 0)).any():
                raise ValueError(self._slots_behind_tokens())
        block = self._memory_block(memory_embeds, memory_mask)
        positions = self._text_start(memory_mask.sum(1))[:, None] + (mask.cumsum(1) - 1).clamp(min=0)
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
