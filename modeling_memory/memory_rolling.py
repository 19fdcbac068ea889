"""Reading by windows: each in clear behind the memories of all before it, in one call or token by token.

B rows, T columns, K memories per chunk, M memories of a row, N windows of a row, W window length, P windows of all
rows, R room for memories in front, D decoder width, X features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from .memory_cache import MemoryCache, join_rows, share_columns
from .memory_decoding import Reading, is_checkpointing, row_groups
from .memory_merging import MemoryMergingMixin
from .memory_text import Text, check_capacity, is_compiling
from .memory_windows import Windows, pack_present, scatter_present, split_windows


class MemoryRollingMixin(MemoryMergingMixin):
    """How a text that outgrows its window folds into memories."""

    def _read_windows(
        self,
        text: Text,
        cache: MemoryCache | None,
        prior: dict[str, torch.Tensor] | None = None,
        columns: torch.Tensor | None = None,
        **options: Any,
    ) -> Reading:
        """Read a text by windows: each in clear, behind the memories of all windows before it.

        Args:
            text (`Text`): Token ids of shape `(B, T)`.
            cache ([`MemoryCache`], *optional*): An empty cache to fill with each row's last window.
            prior (`dict`, *optional*): What stands before the whole text: of the row state of a [`MemoryCache`] all
                that is not about the open window.
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
                "follow from its memories. Leave them out."
            )
        if options.pop("output_attentions", None):
            raise ValueError(
                f"`output_attentions` was asked of a text of {windows.num_windows} windows, whose attentions have no "
                f"layout over the text. Ask for a text of at most {self.config.window_length} tokens."
            )

        memory_embeds, memory_mask = self._fold(windows)  # (B, M, D), (B, M)
        num_prior = num_pinned = num_clear = torch.zeros_like(windows.counts)
        if prior is not None:
            num_prior, num_pinned, num_clear = prior["memory_mask"].sum(1), prior["num_pinned"], prior["num_clear"]
            memory_embeds, memory_mask = pack_present(
                torch.cat([prior["memory_embeds"].to(memory_embeds), memory_embeds], 1),
                torch.cat([prior["memory_mask"].to(memory_mask), memory_mask], 1),
            )
        policy = self.config.memory_policy
        merging = self._folded_text(windows, prior) if policy == "merge" else {}
        room = self._check_room(memory_mask, num_clear)
        first_marker = self._first_marker(windows)  # (B,)
        if prior is not None:
            first_marker = first_marker.masked_fill(prior["asked"], -1)
        if columns is not None and not options.get("output_hidden_states") and not is_compiling():
            windows, columns = windows.keep(columns), None

        num_visible = num_prior[windows.row] + windows.index * self.config.memories_per_window  # (P,)
        number = torch.arange(memory_mask.shape[1], device=num_visible.device)
        visible = number < num_visible[:, None]  # (P, M)
        if room is not None and policy == "merge":
            memory_embeds, born, died, merging["segment_sizes"] = self._merge(
                memory_embeds, prior, room, windows.counts, merging["folded_input_ids"]
            )
            visible = (born[windows.row] <= windows.index[:, None]) & (windows.index[:, None] < died[windows.row])
        elif room is not None:  # those of the context stay
            pinned = num_pinned[windows.row, None]  # (P, 1)
            num_kept = room - pinned + num_clear[windows.row, None]
            if policy == "drop_oldest":
                visible &= (number < pinned) | (number >= num_visible[:, None] - num_kept)
            else:
                nearest = [
                    self._nearest(
                        memory_embeds[windows.row[part]], visible[part], number < pinned[part], num_kept[part]
                    )
                    for part in row_groups(len(visible), visible.shape[1], visible.device)
                ]
                visible = torch.cat(nearest)
        features, hidden_states, opened = self._decode_windows(
            windows, memory_embeds, visible.long(), first_marker, room is None, cache is not None, **options
        )
        if room is not None and policy != "keep_nearest":
            memory_embeds, memory_mask = pack_present(memory_embeds, visible[windows.last].long())
        if cache is not None:
            last = windows.last
            decoder_cache, column_mask = opened
            cache.start(
                decoder_cache,
                column_mask=column_mask,
                window_input_ids=windows.input_ids[last],
                window_fill=windows.attention_mask[last].sum(1),
                memory_embeds=memory_embeds.detach(),
                memory_mask=memory_mask,
                asked=first_marker < (windows.counts - 1) * self.config.window_length,
                num_pinned=num_pinned,
                num_clear=num_clear,
                **merging,
            )
            cache.num_columns = text.length
        if hidden_states is not None:
            hidden_states = tuple(windows.lay_back(states) for states in hidden_states)
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
        """Return for how many memories there is room if `(B, M)` are more, and a policy chooses; `None` if not.

        Raises:
            ValueError: If they are more and none is set.
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

    def _nearest(
        self, memory_embeds: torch.Tensor, visible: torch.Tensor, pinned: torch.Tensor, num_kept: torch.Tensor
    ) -> torch.Tensor:
        """Choose what windows see: pinned memories, what the window before folded into, and those nearest to that.

        Args:
            memory_embeds (`torch.FloatTensor` of shape `(P, M, D)`): All memories of each window's row.
            visible (`torch.BoolTensor` of shape `(P, M)`): Those before the window; the last of them are the newest.
            pinned (`torch.BoolTensor` of shape `(P, M)`): Those that stay.
            num_kept (`torch.LongTensor` of shape `(P, 1)`): How many others there is room for.

        Returns:
            `torch.BoolTensor` of shape `(P, M)`. It depends on nothing but what is before the window, so that every
            call chooses alike.
        """
        number = torch.arange(visible.shape[1], device=visible.device)
        newest = visible & (number >= visible.sum(1, keepdim=True) - self.config.memories_per_window)
        unit = torch.nn.functional.normalize(memory_embeds.detach().float(), dim=-1)
        query = (unit * newest[..., None]).sum(1, keepdim=True)  # (P, 1, D)
        likeness = torch.where(newest, number + unit.shape[2], (unit * query).sum(-1))  # the newest come first
        likeness = likeness.masked_fill(~visible | pinned, -torch.inf)
        order = likeness.argsort(dim=1, descending=True, stable=True)
        rank = torch.zeros_like(order).scatter(1, order, number.expand_as(order))
        return visible & (pinned | (rank < num_kept))

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
        shared: bool,
        keep_cache: bool,
        **options: Any,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, Any]:
        """Decode windows `(P, W)`, each behind the memories of its row that are visible to it.

        The memories of a row do not depend on the window behind them, so they run through the decoder once and their
        keys and values are shared by the row's windows. Where that cannot be (not `shared`: a policy chose;
        constant fillers differ by window; activation checkpointing switches the cache off) each window gets a row of
        its own, memories included.
        Without gradients windows are decoded in groups, so that memory does not grow with the text.
        `first_marker` `(B,)` is the rank of each text's first COPY or BLANK.

        Returns:
            Features `(P, W, X)`, hidden states `(P, W, D)` of all layers if asked for, and if `keep_cache` the cache
            of each row's last window with the mask over its columns `(B, columns)`.
        """
        window_length = windows.input_ids.shape[1]
        offsets = torch.arange(window_length, device=visible.device)
        positions = self._text_start(visible.sum(1))[:, None] + offsets  # (P, W)
        rank = (windows.index * window_length)[:, None] + offsets
        places = self._places(offsets, visible, rank >= first_marker[windows.row][:, None])
        options.setdefault("use_cache", True)
        prefix_cache = None
        if shared and self.config.absent_memories == "mask" and not is_checkpointing(self.decoder):
            prefix_cache = self._decode_prefix(memory_embeds)
        is_last = windows.index == windows.counts[windows.row] - 1
        features, hidden_states, opened = [], [], []
        num_seen = memory_embeds.shape[1] if shared else int(visible.sum(1).max())
        groups = row_groups(len(visible), window_length + num_seen, visible.device)
        for part in groups:
            row, seen, mask = windows.row[part], visible[part], windows.attention_mask[part]
            told = None if places is None else places[part]
            if prefix_cache is not None:
                decoder_cache = prefix_cache
                if len(groups) == 1:
                    if memory_embeds.shape[1]:
                        decoder_cache.batch_select_indices(row)
                else:
                    seen = seen[:, : int(seen.sum(1).max())]
                    decoder_cache = share_columns(prefix_cache, seen.shape[1], row)
                column_mask = torch.cat([seen, mask], 1)  # (rows, M + W)
                window_features, outputs = self._decode(
                    **self._token_inputs(windows.input_ids[part], told),
                    attention_mask=column_mask,
                    position_ids=positions[part],
                    past_key_values=decoder_cache,
                    **options,
                )
            else:
                if shared:
                    embeds = memory_embeds[row]
                else:
                    embeds, seen = pack_present(memory_embeds, seen, row)
                window_features, outputs, column_mask = self._decode_behind(
                    self._memory_block(embeds, seen),
                    self._embed(windows.input_ids[part], told),
                    mask,
                    positions[part],
                    None,
                    **options,
                )
            features.append(window_features[:, -window_length:])
            if outputs.hidden_states is not None:
                hidden_states.append([states[:, -window_length:] for states in outputs.hidden_states])
            if keep_cache and (len(groups) == 1 or is_last[part].any()):
                last = is_last[part].nonzero()[:, 0]
                outputs.past_key_values.batch_select_indices(last)
                opened.append((outputs.past_key_values, column_mask[last]))
        return (
            _join(features),
            tuple(map(_join, zip(*hidden_states, strict=True))) if hidden_states else None,
            join_rows(opened) if keep_cache else None,
        )

    def _decode_prefix(self, memory_embeds: torch.Tensor) -> DynamicCache:
        """Run memories `(B, M, D)` through the decoder; returns their keys and values."""
        cache = DynamicCache()
        if memory_embeds.shape[1] == 0:
            return cache
        prefix = {"inputs_embeds": memory_embeds}
        if self._takes_position_ids:
            positions = self.config.memory_span * torch.arange(memory_embeds.shape[1], device=memory_embeds.device)
            prefix["position_ids"] = positions.expand(memory_embeds.shape[:2])
            prefix["attention_mask"] = torch.ones_like(prefix["position_ids"])  # jumps are no packed texts
        return self.decoder.base_model(**prefix, past_key_values=cache, use_cache=True).past_key_values

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
        in_front = cache.column_mask.sum(1) - cache.window_fill  # not all memories of the cache, if a policy chose
        offsets = cache.window_fill[:, None] + mask.cumsum(1) - 1  # (B, Q)
        positions = self._text_start(in_front)[:, None] + offsets
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
        prior = {name: state[rows] for name, state in cache.row_state().items()}
        reading = self._read_windows(opened, MemoryCache(), prior, columns=length + wanted, **options)
        if reading.hidden_states is not None:
            reading.hidden_states = tuple(states[:, length:] for states in reading.hidden_states)
        return reading

    def _first_marker(self, windows: Windows) -> torch.Tensor:
        """Return the rank of each text's first marker `(B,)`; a rank behind all tokens where there is none."""
        window_length = windows.input_ids.shape[1]
        rank = (windows.index * window_length)[:, None] + torch.arange(window_length, device=windows.row.device)
        none = torch.full_like(windows.counts, windows.num_windows * window_length)
        marked = self._markers(windows.input_ids, windows.attention_mask)
        rank = torch.where(marked, rank, none.max()).amin(1)  # (P,)
        return none.scatter_reduce(0, windows.row, rank, "amin")


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
