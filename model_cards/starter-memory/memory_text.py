"""The decoder's side of a call, and the checks that a text and its memories fit a model.

B rows, T columns, M memories, D decoder width.
"""

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from .configuration_memory import smallest_attention_window


@dataclass
class Text:
    """Token ids `(B, T)` or embeddings `(B, T, D)`, with mask and positions.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Tokens, slots among them.
        attention_mask (`torch.LongTensor` of shape `(B, T)` or `(B, past + T)`, *optional*): 1 for tokens, 0 for
        padding.
        inputs_embeds (`torch.FloatTensor` of shape `(B, T, D)`, *optional*): Embeddings instead of tokens.
        position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Positions, if not those of the mask.
    """

    input_ids: Any
    attention_mask: Any = None
    inputs_embeds: Any = None
    position_ids: torch.Tensor | None = None

    @property
    def tokens(self) -> Any:
        """Token ids or embeddings."""
        return self.inputs_embeds if self.input_ids is None else self.input_ids

    @property
    def batch_size(self) -> int:
        """Rows (B)."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Columns (T)."""
        return self.tokens.shape[1]

    @property
    def has_own_mask(self) -> bool:
        """Whether the mask covers these columns and no earlier ones."""
        mask = self.attention_mask
        return mask is not None and mask.dim() == 2 and mask.shape[1] == self.length

    def mask(self) -> torch.Tensor:
        """Return 1 for tokens and 0 for padding, of shape `(B, T)`."""
        if self.attention_mask is None:
            return torch.ones(self.tokens.shape[:2], dtype=torch.long, device=self.tokens.device)
        return self.attention_mask[:, -self.length :].long()

    def positions(self) -> torch.Tensor | None:
        """Return position ids that skip padding; `None` where there is no mask to derive them from."""
        mask = self.attention_mask
        if self.position_ids is not None or mask is None or mask.dim() != 2:
            return self.position_ids
        return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -self.length :]


def is_compiling() -> bool:
    """Whether the code is being traced by `torch.compile`, where checks that read the data are left out."""
    return torch.compiler.is_compiling()


def check_text(config: PreTrainedConfig, text: Text, cache: Cache | None) -> None:
    """Refuse tokens and masks that cannot be read."""
    if (text.input_ids is None) == (text.inputs_embeds is None):
        given = "neither" if text.input_ids is None else "both"
        raise ValueError(f"Expected `input_ids` or `inputs_embeds`, but {given} were given. Pass exactly one of them.")
    name, tensor = ("inputs_embeds" if text.input_ids is None else "input_ids"), text.tokens
    rank = 3 if text.input_ids is None else 2
    if tensor.dim() != rank or 0 in tensor.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(tensor.shape)}; expected {rank} dimensions (batch, "
            f"tokens{', width' * (rank - 2)}), none of them 0. Give at least one row and one token."
        )
    if text.input_ids is not None and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise ValueError(f"`input_ids` has type {tensor.dtype}; expected integers. Embeddings go to `inputs_embeds`.")
    past = 0 if cache is None else int(cache.get_seq_length())  # a tensor in a static cache
    mask = text.attention_mask
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4)):
        given = f"has shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"is a {type(mask).__name__}"
        raise ValueError(f"`attention_mask` {given}; expected (batch, tokens): 1 for tokens, 0 for padding.")
    if mask is not None and mask.dim() == 2:
        widths = {text.length, text.length + past}
        if mask.shape[0] != text.batch_size or mask.shape[1] not in widths:
            raise ValueError(
                f"`attention_mask` has shape {tuple(mask.shape)}, but `{name}` has {text.batch_size} rows and "
                f"{text.length} columns and the cache {past}. Expected ({text.batch_size}, {max(widths)})."
            )
    if is_compiling():
        return
    if mask is not None and mask.dim() == 2 and not mask.any(1).all():
        row = int((~mask.bool().any(1)).nonzero()[0])
        raise ValueError(
            f"Row {row} of `attention_mask` is 0 everywhere, but a text has at least one token. Drop the row."
        )
    if text.input_ids is not None:
        slot = config.memory_token_id
        allowed = None if slot is None else text.input_ids == slot
        check_ids("The decoder", "input_ids", text.input_ids, config.decoder.vocab_size, allowed)


def check_flat_mask(text: Text) -> None:
    """Refuse a mask of four dimensions where windows are cut, which needs to know tokens from padding."""
    mask = text.attention_mask
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"`attention_mask` has shape {tuple(mask.shape)}, but a text that folds into memories takes one of "
            "(batch, tokens): 1 for tokens, 0 for padding."
        )


def check_memories(
    config: PreTrainedConfig, text: Text, memory_embeds: torch.Tensor, memory_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Refuse memories that do not fit the text; one context is repeated for many prompts."""
    if memory_embeds.dim() != 3 or memory_embeds.shape[2] != config.decoder.hidden_size:
        raise ValueError(
            f"`memory_embeds` has shape {tuple(memory_embeds.shape)}; expected (batch, memories, "
            f"{config.decoder.hidden_size}), the decoder's width. `encode_memories` makes it."
        )
    if memory_mask is None:
        memory_mask = torch.ones_like(memory_embeds[..., 0], dtype=torch.long)
    if memory_mask.shape != memory_embeds.shape[:2]:
        raise ValueError(
            f"`memory_mask` has shape {tuple(memory_mask.shape)}, but `memory_embeds` has "
            f"{tuple(memory_embeds.shape)}. Expected one mask value for each memory, (batch, memories)."
        )
    if len(memory_embeds) != text.batch_size:
        if len(memory_embeds) != 1:
            raise ValueError(
                f"`memory_embeds` has {len(memory_embeds)} rows and the text {text.batch_size}. Give one row for each "
                "text, or a single row to repeat it for all."
            )
        memory_embeds = memory_embeds.expand(text.batch_size, -1, -1)
        memory_mask = memory_mask.expand(text.batch_size, -1)
    check_capacity(config, memory_embeds.shape[1])
    if text.input_ids is not None and not is_compiling():
        if config.memory_token_id is None:
            raise ValueError(
                "Memories were given, but `config.memory_token_id` is not set, so no slot can be recognised in "
                "`input_ids`. Set it to an id that the text does not use."
            )
        slots = (text.input_ids == config.memory_token_id).sum(1)
        memories = memory_mask.bool().sum(1)
        if (slots != memories).any():
            row = int((slots != memories).nonzero()[0])
            raise ValueError(
                f"Row {row} of `input_ids` has {int(slots[row])} memory slots (id {config.memory_token_id}), but "
                f"{int(memories[row])} memories are present. Insert one slot for each memory; `MemoryProcessor` does."
            )
    return memory_embeds, memory_mask


def check_capacity(config: PreTrainedConfig, num_memories: int) -> None:
    """Refuse more memories than the decoder has room for."""
    capacity = config.memory_capacity
    if capacity is not None and num_memories > capacity:
        raise ValueError(
            f"The text needs {num_memories} memories, but the model takes {capacity} (`max_memories` "
            f"{config.max_memories}, positions of the decoder and a window of {config.window_length}). Shorten the "
            "text, use longer chunks, or a decoder with more positions."
        )


def check_view(config: PreTrainedConfig, num_columns: int) -> None:
    """Refuse a text whose last tokens would no longer see its first memory, `num_columns` columns back."""
    view = smallest_attention_window(config.decoder)
    if view is not None and num_columns > view:
        raise ValueError(
            f"The text is {num_columns} columns long from its first memory on, but the decoder has layers that see "
            f"{view} (sliding window): its last tokens would not see the memories. Shorten the text or write fewer "
            "tokens, put the memories nearer to the end, or choose a decoder that sees further."
        )


def check_no_slots(config: PreTrainedConfig, text: Text) -> None:
    """Refuse slots without memories."""
    if text.input_ids is None or config.memory_token_id is None or is_compiling():
        return
    slots = (text.input_ids == config.memory_token_id).sum(1)
    if slots.any():
        row = int(slots.nonzero()[0])
        raise ValueError(
            f"Row {row} of `input_ids` has {int(slots[row])} memory slots (id {config.memory_token_id}), but 0 "
            "memories were given. Pass `context_input_ids` or `memory_embeds`."
        )


def check_clear(config: PreTrainedConfig, text: Text, cache: Cache | None) -> None:
    """Refuse to read in clear what should fold: it would silently be another computation."""
    if not config.self_memory or getattr(cache, "reads_in_clear", False):
        return
    length = text.length + (0 if cache is None else cache.get_seq_length())
    if length <= config.window_length:
        return
    if text.inputs_embeds is not None:
        raise ValueError(
            f"`inputs_embeds` has {text.length} columns, but a window is {config.window_length} tokens, and "
            "embeddings cannot be folded into memories. Pass `input_ids`, or give memories with the embeddings."
        )
    raise ValueError(
        f"A {type(cache).__name__} was given for a text of {length} columns, more than a window of "
        f"{config.window_length}: it cannot hold what folding needs. Pass `past_key_values=None`, or an empty "
        "`MemoryCache`."
    )


def check_has_owner(name: str, mask: torch.Tensor | None, owner_name: str, owner: torch.Tensor | None) -> None:
    """Refuse a mask without what it masks: it would silently do nothing."""
    if mask is not None and owner is None:
        raise ValueError(f"`{name}` was given without `{owner_name}`. Give both or neither.")


def check_spelling(given: Iterable[str], known: Collection[str]) -> None:
    """Refuse a keyword that is a known one misspelt; others are the library's, and pass as they do in its models.

    >>> check_spelling(["num_items_in_batch"], ["input_ids", "memory_embeds"])
    >>> check_spelling(["memory_embed"], ["input_ids", "memory_embeds"])
    Traceback (most recent call last):
    ValueError: `memory_embed` is no argument. Did you mean `memory_embeds`?
    """
    for name in given:
        meant = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if meant:
            raise ValueError(f"`{name}` is no argument. Did you mean `{meant[0]}`?")


def check_same_shape(name: str, tensor: torch.Tensor | None, other_name: str, other: torch.Tensor) -> None:
    """Refuse a tensor whose shape is not that of another."""
    if tensor is not None and tensor.shape != other.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(tensor.shape)} and `{other_name}` {tuple(other.shape)}. Give them the same "
            "shape."
        )


def check_ids(
    who: str, name: str, ids: torch.Tensor, vocab_size: int | None, allowed: torch.Tensor | None = None
) -> None:
    """Refuse ids outside a token table, but for those at `allowed` places."""
    if vocab_size is None or is_compiling():
        return
    wrong = (ids < 0) | (ids >= vocab_size)
    if allowed is not None:
        wrong &= ~allowed
    if wrong.any():
        raise ValueError(
            f"{who} knows ids 0 to {vocab_size - 1}, but `{name}` holds {int(ids[wrong][0])}. Tokenise with the "
            "model's own tokenizer, or resize the token table."
        )
