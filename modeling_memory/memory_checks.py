"""All checks of a call, and the one reading of its data.

Shapes and types are looked at first; then all that has to be known of the data is computed on the device and read in
one go, so that a call stalls an accelerator once at most. What is wrong is looked up again, slowly, only to name it.

B texts, T columns, C chunks, L chunk length, M memories, D decoder width.
"""

import difflib
import inspect
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .configuration_memory import allot_memories, encoder_limit, smallest_attention_window
from .memory_cache import MemoryCache
from .memory_layout import Text, tokens_of_memories


@dataclass
class Call:
    """The arguments of one `forward`; see there. [`check_call`] settles what they leave open.

    Attributes:
        options: What the decoder is asked to return, by the names that the library has for it.
        has_memories: Whether memories or a context are given.
        continues: Whether the text goes on from a memory cache that holds a part of it.
        recomputes: Whether activations are checkpointed, so that no keys and values are kept.
        columns (`slice` or `torch.LongTensor`): Columns whose features are wanted.
    """

    text: Text
    context_input_ids: Any = None
    context_attention_mask: Any = None
    context_num_memories: Any = None
    memory_embeds: Any = None
    memory_mask: Any = None
    memory_num_tokens: Any = None
    cache: Any = None
    labels: Any = None
    shift_labels: Any = None
    logits_to_keep: Any = None  # all
    rolling_memory: bool | None = None
    use_cache: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    has_memories: bool = False
    continues: bool = False
    recomputes: bool = False
    columns: Any = None


@dataclass
class Facts:
    """What was read of the data of a call, on the host; lists have a number for each text.

    Attributes:
        num_tokens: Tokens and slots.
        is_full: Whether no text has padding.
        has_holes: Whether padding stands between two tokens of some text.
        num_memories: Memories that are present.
        sees_memories: Whether all texts have memories, or none; `None` where they differ.
        num_ahead: Tokens and slots up to the last slot.
        num_after: Tokens after it.
        lowest: Rank among these of the lowest column whose logits are wanted, -1 for one before them; `None`: of all.
        end: Bound of the positions of a text with memories, if these take as many as they stand for tokens.
        first_slot: First column with a slot in any text, where the decoder is short-sighted.
        present: 1 for each chunk of the contexts that holds a token.
        num_budget: Most memories that a text is asked for, under a budget.
    """

    num_tokens: list[int]
    is_full: bool = True
    has_holes: bool = False
    num_memories: Any = None
    sees_memories: bool | None = None
    num_ahead: Any = None
    num_after: Any = None
    lowest: Any = None
    end: int = 0
    first_slot: int | None = None
    present: Any = None
    num_budget: int | None = None


def is_compiling() -> bool:
    """Whether the code is being traced, where checks that read the data are left out."""
    return torch.compiler.is_compiling()


def read_once(**tensors: torch.Tensor) -> dict[str, list[int]]:
    """Read numbers from the device in one go.

    Args:
        tensors: Of any shape, whole numbers or truth values.

    Returns:
        For each name a flat list.
    """
    # One tensor for all answers: each list read from the device would wait for it anew.
    parts = [tensor.reshape(-1).long() for tensor in tensors.values()]
    numbers = torch.cat([part.to(parts[0].device) for part in parts]).tolist()
    found, start = {}, 0
    for name, part in zip(tensors, parts, strict=True):
        found[name] = numbers[start : start + len(part)]
        start += len(part)
    return found


def check_call(model: Any, call: Call, unknown: dict[str, Any]) -> tuple[Call, Facts | None]:
    """Refuse a call that cannot be read, and settle what it leaves open.

    Args:
        model ([`MemoryEncoderDecoderModel`]): The model.
        call ([`Call`]): The arguments.
        unknown (`dict`): Keywords that are none of them.

    Returns:
        The call as it is read, and [`Facts`], or `None` where the data was not looked at: in a cached step, and while
        compiling.

    Raises:
        ValueError: Saying what was given, what was expected and what to do.
    """
    if unknown and not torch.compiler.is_compiling():
        check_spelling(unknown, [*inspect.signature(model.forward).parameters, *LOSS_KEYWORDS])
    text, cache, use_cache, config = call.text, call.cache, call.use_cache, model.config
    layers = model.decoder.modules() if model.decoder.training else ()
    recomputes = any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
    if recomputes:  # the library switches the model's cache off
        check_empty(cache)
        cache, use_cache = None, False
    elif use_cache is None:
        use_cache = cache is not None or (not model.training and getattr(config.decoder, "use_cache", True))
    options = {name: getattr(config, name, None) if given is None else given for name, given in call.options.items()}
    keep = None if type(call.logits_to_keep) is int and call.logits_to_keep == 0 else call.logits_to_keep
    continues = not call.has_memories and isinstance(cache, MemoryCache) and cache.num_columns > 0
    call = replace(
        call, cache=cache, use_cache=use_cache or continues, continues=continues, recomputes=recomputes,
        # An explicit None would hide the decoder's own setting.
        options={name: given for name, given in options.items() if given}, logits_to_keep=keep, columns=slice(None),
    )  # fmt: skip
    if (text.input_ids is None) == (text.inputs_embeds is None):
        given = "neither" if text.input_ids is None else "both"
        raise ValueError(f"Expected `input_ids` or `inputs_embeds`, but {given} were given. Pass exactly one of them.")
    tokens = text.tokens
    usual = isinstance(tokens, torch.Tensor) and tokens.dtype == torch.long and tokens.dim() == 2 and tokens.numel()
    if not usual or text.attention_mask is not None or cache is not None or text.input_ids is None:
        check_text(text, cache)
    others = (call.context_attention_mask, call.context_num_memories, call.memory_mask, call.memory_num_tokens)
    if any(other is not None for other in others):
        check_owners(call)
    if call.has_memories:
        check_memories(config, call)
    if call.labels is not None or call.shift_labels is not None or call.logits_to_keep is not None:
        _check_labels(call)
        # Only after it was checked: a wrong number would fail inside torch.
        call.columns = _columns_of(call.logits_to_keep, tokens)
    past = 0 if cache is None else cache.get_seq_length()
    is_step = tokens.shape[1] == 1 and not call.has_memories and cache is not None
    if torch.compiler.is_compiling() or tokens.is_meta or (is_step and int(past) > 0):
        return call, None
    facts = _read(config, call)
    if call.options.get("output_hidden_states"):
        facts.lowest = None  # of all layers the states of all columns are returned
    return call, facts


def _columns_of(keep: Any, tokens: torch.Tensor) -> slice | torch.Tensor:
    """Return the columns whose features are wanted, of the last ones their numbers."""
    if isinstance(keep, torch.Tensor):
        return keep
    length = tokens.shape[1]
    if keep is None or keep >= length:
        return slice(None)
    return torch.arange(length - keep, length, device=tokens.device)


def _check_kind(name: str, value: Any, ranks: tuple[int, ...], layout: str, kind: str) -> None:
    """Refuse what is no tensor of a kind (ids, numbers or mask) and rank."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"`{name}` is a {type(value).__name__}; expected a torch tensor, {layout}. Use `torch.as_tensor`, or "
            "`return_tensors='pt'` when tokenising."
        )
    if value.dim() not in ranks or (kind != "mask" and 0 in value.shape):
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)}; expected {ranks[0]} dimensions {layout}"
            + (", none of them 0. Give at least one row and one token." if kind != "mask" else ".")
        )
    floating = value.is_floating_point()
    if kind == "ids" and value.dtype not in (torch.long, torch.int32):
        where = " Embeddings go to `inputs_embeds`." if floating else " Convert them: `.long()`."
        raise ValueError(f"`{name}` has type {value.dtype}; expected integers, int64 or int32.{where}")
    if kind == "numbers" and not floating:
        raise ValueError(f"`{name}` has type {value.dtype}; expected floating point vectors. Ids go to `input_ids`.")


def check_text(text: Text, cache: Cache | None) -> None:
    """Refuse a text, its mask or its cache by type and shape."""
    if text.input_ids is None:
        name = "inputs_embeds"
        _check_kind(name, text.inputs_embeds, (3,), "(batch, tokens, width)", "numbers")
    else:
        name = "input_ids"
        _check_kind(name, text.input_ids, (2,), "(batch, tokens)", "ids")
    batch_size, length = text.tokens.shape[:2]
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"`past_key_values` is a {type(cache).__name__}; expected a `Cache` of an earlier call, or None."
        )
    mask = text.attention_mask
    if mask is not None:
        past = 0 if cache is None else int(cache.get_seq_length())  # a tensor in a static cache
        if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
            given = (
                f"has shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"is a {type(mask).__name__}"
            )
            raise ValueError(
                f"`attention_mask` {given}; expected a torch tensor of {(batch_size, length + past)}, 1 for tokens "
                "and 0 for padding. Use `return_tensors='pt'` when tokenising."
            )
        if mask.dim() == 2:
            # Only a cache of ours remembers which of its columns are padding; of another's the mask has to tell.
            shortest = length if isinstance(cache, MemoryCache) else length + past
            if mask.shape[0] != batch_size or mask.shape[1] not in (shortest, length + past):
                raise ValueError(
                    f"`attention_mask` has shape {tuple(mask.shape)}, but `{name}` has {batch_size} rows and "
                    f"{length} columns and the cache {past}. Expected ({batch_size}, {length + past})."
                )
    # A wrong batch would otherwise be found by a product deep in the decoder, if its shape does not happen to fit.
    rows = None if cache is None else _rows_of(cache)
    if rows is not None and rows != batch_size:
        raise ValueError(
            f"`past_key_values` holds {rows} texts, but `{name}` has {batch_size} rows. Continue the batch that "
            "filled the cache, select or repeat its rows (`batch_select_indices`, `batch_repeat_interleave`), or pass "
            "None."
        )


def _rows_of(cache: Cache) -> int | None:
    """Return the rows of a cache; `None` for an empty one."""
    if isinstance(cache, MemoryCache):
        return None if cache.window_fill is None else len(cache.window_fill)
    for layer in getattr(cache, "layers", None) or []:
        keys = getattr(layer, "keys", None)
        if isinstance(keys, torch.Tensor) and keys.dim() == 4:
            return keys.shape[0]
    return None


def check_flat_mask(text: Text) -> None:
    """Refuse a mask of four dimensions where windows are cut, which needs to know tokens from padding."""
    mask = text.attention_mask
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"`attention_mask` has shape {tuple(mask.shape)}, but a text that is cut into windows takes one of "
            "(batch, tokens): 1 for tokens, 0 for padding."
        )


def check_owners(call: Call) -> None:
    """Refuse what belongs to an argument that was not given: it would silently do nothing."""
    for name, owner in (
        ("context_attention_mask", "context_input_ids"),
        ("context_num_memories", "context_input_ids"),
        ("memory_mask", "memory_embeds"),
        ("memory_num_tokens", "memory_embeds"),
    ):
        if getattr(call, name) is not None and getattr(call, owner) is None:
            raise ValueError(f"`{name}` was given without `{owner}`. Give both or neither.")


def check_memories(config: PreTrainedConfig, call: Call) -> None:
    """Refuse memories, or contexts to make them of, by type and shape, and beside the text."""
    batch_size = call.text.tokens.shape[0]
    if call.context_input_ids is not None:
        if call.memory_embeds is not None:
            raise ValueError(
                "Both `context_input_ids` and `memory_embeds` were given, but a prompt has one context. Give the "
                "context or its ready memories."
            )
        check_context(config, call.context_input_ids, call.context_attention_mask, call.context_num_memories)
        name, rows, width = "context_input_ids", len(call.context_input_ids), 0
    else:
        embeds = call.memory_embeds
        if not isinstance(embeds, torch.Tensor) or not embeds.is_floating_point():
            given = f"is a {type(embeds).__name__}"
            given = f"has type {embeds.dtype}" if isinstance(embeds, torch.Tensor) else given
            raise ValueError(f"`memory_embeds` {given}; expected a tensor of vectors. `encode_memories` makes it.")
        if embeds.dim() != 3 or embeds.shape[2] != config.decoder.hidden_size:
            raise ValueError(
                f"`memory_embeds` has shape {tuple(embeds.shape)}; expected (batch, memories, "
                f"{config.decoder.hidden_size}), the decoder's width. `encode_memories` makes it."
            )
        for other in ("memory_mask", "memory_num_tokens"):
            given = getattr(call, other)
            if given is not None and (not isinstance(given, torch.Tensor) or given.shape != embeds.shape[:2]):
                shape = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
                raise ValueError(
                    f"`{other}` has shape {shape}, but `memory_embeds` has {tuple(embeds.shape)}. Expected "
                    f"{tuple(embeds.shape[:2])}: one {'mask value' if other == 'memory_mask' else 'number'} for each "
                    "memory, (batch, memories)."
                )
        name, rows, width = "memory_embeds", len(embeds), embeds.shape[1]
    if rows not in (1, batch_size):
        raise ValueError(
            f"`{name}` has {rows} rows and the text {batch_size}. Give one row for each text, or a single row to "
            "repeat it for all."
        )
    check_capacity(config, width)
    if call.text.input_ids is not None and config.memory_token_id is None:
        raise ValueError(
            "Memories were given, but `config.memory_token_id` is not set, so no slot can be recognised in "
            "`input_ids`. Set it to an id that the text does not use."
        )


def check_context(config: PreTrainedConfig, ids: Any, mask: Any, num_memories: Any) -> None:
    """Refuse contexts whose shapes cannot be encoded."""
    if not isinstance(ids, torch.Tensor) or ids.dim() != 3 or 0 in ids.shape:
        given = f"has shape {tuple(ids.shape)}" if hasattr(ids, "shape") else f"is a {type(ids).__name__}"
        raise ValueError(
            f"`context_input_ids` {given}; expected (batch, chunks, chunk tokens), none of them 0. "
            "`MemoryProcessor` builds it."
        )
    _check_kind("context_input_ids", ids, (3,), "(batch, chunks, chunk tokens)", "ids")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"`context_attention_mask` has shape {shape} and `context_input_ids` {tuple(ids.shape)}. Give them the "
            "same shape."
        )
    limit = encoder_limit(config.encoder, config.encoder_bos_token_id)
    if limit is not None and ids.shape[2] > limit:
        raise ValueError(
            f"A chunk of the context has {ids.shape[2]} tokens, but the encoder takes {limit}. Cut the context into "
            f"chunks of `chunk_length` ({config.chunk_length}) tokens."
        )
    if isinstance(num_memories, torch.Tensor) and num_memories.shape != ids.shape[:2]:
        raise ValueError(
            f"`num_memories` has shape {tuple(num_memories.shape)} and the context {tuple(ids.shape[:2])} texts and "
            "chunks. Give a number for each chunk, or one number for each text."
        )


def _check_labels(call: Call) -> None:
    keep, length = call.logits_to_keep, call.text.tokens.shape[1]
    if isinstance(keep, torch.Tensor):
        if keep.dim() != 1 or keep.is_floating_point() or keep.dtype == torch.bool:
            raise ValueError(
                f"`logits_to_keep` has shape {tuple(keep.shape)} and type {keep.dtype}; expected numbers of columns, "
                "(columns,), or one number of last columns."
            )
    elif keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 0):
        raise ValueError(
            f"`logits_to_keep` is {keep!r}; expected a number of last columns, 0 for all {length}, or a tensor of "
            "columns."
        )
    for name in ("labels", "shift_labels"):
        given = getattr(call, name)
        if given is None:
            continue
        if not isinstance(given, torch.Tensor) or given.shape != call.text.tokens.shape[:2]:
            shape = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
            raise ValueError(
                f"`{name}` has shape {shape}, but the text has {tuple(call.text.tokens.shape[:2])}. Give one label "
                "for each column, -100 where nothing is to be learnt."
            )
        _check_kind(name, given, (2,), "(batch, tokens)", "ids")
        if keep is not None:
            raise ValueError(
                "A loss needs the logits of all columns, but `logits_to_keep` was given. Leave one of them out."
            )


LOSS_KEYWORDS = ("num_items_in_batch", "shift_labels")
"""Keywords of the library's losses."""
LIMITS = ("max_position_embeddings", "sliding_window", "attention_chunk_size")
"""Fields of a decoder's config that may bound what it sees."""
FLAGS = {
    "wrong_mask", "empty", "wrong_ids", "not_finite", "wrong_memory_mask", "wrong_num_tokens", "wrong_labels",
    "wrong_shift_labels", "wrong_columns", "labelled_slots", "wrong_context", "wrong_context_mask", "wrong_budget",
}  # fmt: skip
"""Names of truth values that say that something cannot be read."""


def _read(config: PreTrainedConfig, call: Call) -> Facts:
    """Read what has to be known of the data, all at once, and refuse what cannot be read."""
    text, ids, given_mask = call.text, call.text.input_ids, call.text.attention_mask
    mask = torch.ones_like(text.tokens[..., 0] if ids is None else ids, dtype=torch.long)
    ask: dict[str, torch.Tensor] = {}
    own_mask = False
    if given_mask is not None and given_mask.dim() == 2:
        mask = given_mask[:, -mask.shape[1] :].long()
        _ask_mask(given_mask, mask, ask)
        own_mask = given_mask.shape[1] == mask.shape[1]
    ask["num_tokens"] = mask.sum(1)
    slots = None
    if ids is not None and config.memory_token_id is not None:
        # Padding included: a slot in it takes no memory, and so is one too many.
        slots = ids == config.memory_token_id  # (B, T)
        ask["num_slots"] = slots.sum(1)
    if ids is not None:
        outside = (ids < 0) | (ids >= config.decoder.vocab_size)
        ask["wrong_ids"] = (outside if slots is None else outside & ~slots).any()
    after = mask
    if slots is not None and call.has_memories:
        # Counted from the end, so that one pass finds what stands after the last slot of every row.
        after = mask * (slots.flip(1).cumsum(1).flip(1) == 0)
        ask["num_after"] = after.sum(1)
        # Asked only where a layer may not reach back to it.
        if smallest_attention_window(config.decoder) is not None:
            ask["first_slot"] = slots.any(0).long().argmax()
    if isinstance(call.logits_to_keep, torch.Tensor) and len(call.logits_to_keep):
        last = mask.shape[1] - 1
        ask["wrong_columns"] = ((call.logits_to_keep < -last - 1) | (call.logits_to_keep > last)).any()
        ask["lowest"] = (after.cumsum(1) - 1)[:, call.logits_to_keep.clamp(-last - 1, last)].amin(1)
    if call.has_memories:
        _ask_memories(config, call, ask)
    if call.labels is not None or call.shift_labels is not None:
        _ask_labels(config, call, slots, ask)
    found = read_once(**ask)
    for name, numbers in found.items():
        if name in FLAGS and numbers[0]:
            _refuse(config, call, found, slots)
    if slots is not None and (call.has_memories or any(found["num_slots"])):
        _refuse_slots(config, call, found)
    num_tokens = found["num_tokens"]
    facts = Facts(num_tokens, (own_mask or given_mask is None) and min(num_tokens) == mask.shape[1])
    facts.has_holes = "holes" in found and found["holes"][0] > 0
    facts.num_after = found.get("num_after", num_tokens)
    facts.num_ahead = [whole - rest for whole, rest in zip(num_tokens, facts.num_after, strict=True)]
    keep = call.logits_to_keep
    if "lowest" in found:
        facts.lowest = found["lowest"]
    elif keep is not None and not isinstance(keep, torch.Tensor):
        facts.lowest = [max(-1, count - keep) for count in facts.num_after]
    if call.has_memories:
        _add_memories(config, call, found, facts)
    return facts


def _ask_mask(given: torch.Tensor, mask: torch.Tensor, ask: dict[str, torch.Tensor]) -> None:
    """Add what has to be known of a mask: the given one, and its part over the text's own columns `(B, T)`."""
    ask["wrong_mask"] = ((given != 0) & (given != 1)).any()
    ask["empty"] = (given == 0).all(1).any()
    starts = (mask[:, 1:] > 0) & (mask[:, :-1] == 0)
    # Padding before the first token is no hole: no column of this call predicts that token.
    ask["holes"] = (starts & (mask.cumsum(1)[:, :-1] > 0)).any()


def _ask_labels(
    config: PreTrainedConfig, call: Call, slots: torch.Tensor | None, ask: dict[str, torch.Tensor]
) -> None:
    """Add what has to be known of labels and shifted labels."""
    for name in ("labels", "shift_labels"):
        given = getattr(call, name)
        if given is None:
            continue
        ask[f"wrong_{name}"] = _outside(given, config.decoder.vocab_size, given == -100).any()
        if name == "labels" and slots is not None:
            ask["labelled_slots"] = (slots & (given != -100)).any()


def _ask_memories(config: PreTrainedConfig, call: Call, ask: dict[str, torch.Tensor]) -> None:
    """Add what has to be known of memories or of the contexts that they are made of."""
    if call.memory_embeds is not None:
        mask = call.memory_mask
        present = call.memory_embeds.new_ones(call.memory_embeds.shape[:2]) if mask is None else mask
        ask["num_memories"] = (present != 0).sum(1)
        # Absent ones are never read, whatever they hold.
        # One NaN among the memories makes every logit of its row one, far from where it came from.
        ask["not_finite"] = (~torch.isfinite(call.memory_embeds).all(2) & (present != 0)).any()
        if mask is not None:
            ask["wrong_memory_mask"] = ((mask != 0) & (mask != 1)).any()
        num_tokens = call.memory_num_tokens
        if num_tokens is None and config.memory_positions == "source":
            num_tokens = tokens_of_memories(config, present.shape[1], present.device)
        if num_tokens is not None:
            ask["num_positions"] = (num_tokens * (present != 0)).sum(1)
        if call.memory_num_tokens is not None:
            ask["wrong_num_tokens"] = ((call.memory_num_tokens < 0) & (present != 0)).any()
    if call.context_input_ids is not None:
        ask_context(config, call.context_input_ids, call.context_attention_mask, call.context_num_memories, ask)


def ask_context(
    config: PreTrainedConfig, ids: torch.Tensor, mask: Any, num_memories: Any, ask: dict[str, torch.Tensor]
) -> None:
    """Add what has to be known of contexts `(B, C, L)`."""
    ask["wrong_context"] = _outside(ids, getattr(config.encoder, "vocab_size", None), None).any()
    if mask is not None:
        ask["present"] = (mask != 0).any(2)
        ask["wrong_context_mask"] = ((mask != 0) & (mask != 1)).any()
        ask["context_positions"] = (mask != 0).sum((1, 2))
    if isinstance(num_memories, torch.Tensor):
        present = torch.ones_like(num_memories, dtype=torch.bool) if mask is None else (mask != 0).any(2)
        wrong = torch.where(
            present, (num_memories < 1) | (num_memories > config.memories_per_chunk), num_memories != 0
        )
        ask["wrong_budget"] = wrong.any()
        ask["budget"] = num_memories.sum(1)


def check_context_data(config: PreTrainedConfig, ids: torch.Tensor, mask: Any, num_memories: Any) -> Facts | None:
    """Read what has to be known of contexts by themselves; `None` while compiling."""
    check_context(config, ids, mask, num_memories)
    if is_compiling() or ids.is_meta:
        return None
    ask: dict[str, torch.Tensor] = {}
    ask_context(config, ids, mask, num_memories, ask)
    found = read_once(**ask)
    _refuse_context(config, ids, mask, num_memories, found)
    return Facts([], present=found.get("present"), num_budget=max(found.get("budget", [0])) or None)


def budget_of(
    config: PreTrainedConfig, ids: torch.Tensor, num_memories: int, facts: Facts | None, mask: Any
) -> torch.Tensor:
    """Spread a budget over the chunks of each text; returns memories of each chunk `(B, C)`."""
    batch_size, num_chunks = ids.shape[:2]
    present = [1] * (batch_size * num_chunks)
    if facts is not None and facts.present is not None:
        present = facts.present
    elif mask is not None:
        present = (mask != 0).any(2).flatten().tolist()
    counts: list[int] = []
    for row in range(batch_size):
        own = present[row * num_chunks : (row + 1) * num_chunks]
        # For each text by itself: the same budget is spread over as many chunks as that text has.
        shares = iter(allot_memories(num_memories, sum(map(bool, own)), config.memories_per_chunk))
        counts += [next(shares) if held else 0 for held in own]
    return torch.tensor(counts, device=ids.device).view(batch_size, num_chunks)


def _outside(ids: torch.Tensor, vocab_size: int | None, allowed: torch.Tensor | None) -> torch.Tensor:
    if vocab_size is None:
        return torch.zeros(1, dtype=torch.bool, device=ids.device)
    wrong = (ids < 0) | (ids >= vocab_size)
    return wrong if allowed is None else wrong & ~allowed


def _add_memories(config: PreTrainedConfig, call: Call, found: dict[str, list[int]], facts: Facts) -> None:
    """Add what was read of memories; a single context counts for every text."""
    batch_size = len(facts.num_tokens)
    if call.memory_embeds is not None:
        facts.num_memories = found["num_memories"]
        positions = found.get("num_positions", facts.num_memories)
    else:
        rows, num_chunks, chunk_length = call.context_input_ids.shape
        facts.present = found.get("present")
        facts.num_memories = found.get("num_slots", [1] * rows)
        positions = found.get("context_positions", [num_chunks * chunk_length] * rows)
        facts.num_budget = max(found.get("budget", [0])) or None
        if call.text.input_ids is None:
            facts.num_memories = _memories_of_context(config, call, found)
    facts.num_memories = facts.num_memories * (batch_size // len(facts.num_memories))
    positions = positions * (batch_size // len(positions))
    for count, number, taken in zip(facts.num_tokens, facts.num_memories, positions, strict=True):
        slots = 0 if call.text.input_ids is None else number  # embeddings have no columns for memories
        facts.end = max(facts.end, count - slots + taken)
    sees = [number > 0 for number in facts.num_memories]
    facts.sees_memories = sees[0] if all(sees) or not any(sees) else None
    facts.first_slot = found.get("first_slot", [None])[0]


def _memories_of_context(config: PreTrainedConfig, call: Call, found: dict[str, list[int]]) -> list[int]:
    """Return how many memories the chunks of each context will have."""
    rows, num_chunks = call.context_input_ids.shape[:2]
    if isinstance(call.context_num_memories, torch.Tensor):
        return found["budget"]
    if call.context_num_memories is not None:
        return [call.context_num_memories] * rows
    present = found.get("present", [1] * rows * num_chunks)
    return [sum(present[row * num_chunks : (row + 1) * num_chunks]) * config.memories_per_chunk for row in range(rows)]


def _refuse(config: PreTrainedConfig, call: Call, found: dict[str, list[int]], slots: torch.Tensor | None) -> None:
    """Name what was found wrong."""
    text, given = call.text, call.text.attention_mask

    def wrong(name: str) -> bool:
        return bool(found.get(name, [0])[0])

    if wrong("wrong_mask"):
        value = given[(given != 0) & (given != 1)][0].item()
        raise ValueError(f"`attention_mask` holds {value}; expected 1 for tokens and 0 for padding, nothing else.")
    if wrong("empty"):
        row = int((given == 0).all(1).nonzero()[0])
        raise ValueError(
            f"Row {row} of `attention_mask` is 0 everywhere, but a text has at least one token. Drop the row."
        )
    if wrong("wrong_ids"):
        _refuse_ids("The decoder", "input_ids", text.input_ids, config.decoder.vocab_size, slots)
    if call.context_input_ids is not None:
        _refuse_context(config, call.context_input_ids, call.context_attention_mask, call.context_num_memories, found)
    if wrong("not_finite"):
        absent = torch.zeros_like(call.memory_embeds[..., 0], dtype=torch.bool)
        absent = absent if call.memory_mask is None else call.memory_mask == 0
        row, place = (~torch.isfinite(call.memory_embeds).all(2) & ~absent).nonzero()[0].tolist()
        raise ValueError(
            f"Memory {place} of row {row} of `memory_embeds` holds values that are not finite. Encode the context "
            "again, in float32 or bfloat16 if this was float16; mask a memory that is not to be read."
        )
    if wrong("wrong_memory_mask"):
        raise ValueError("`memory_mask` holds other values than 1 for present and 0 for absent memories.")
    if wrong("wrong_num_tokens"):
        raise ValueError(
            "`memory_num_tokens` holds negative numbers; expected how many tokens each memory stands for."
        )
    for name in ("labels", "shift_labels"):
        if wrong(f"wrong_{name}"):
            ids = getattr(call, name)
            _refuse_ids("The decoder", name, ids, config.decoder.vocab_size, ids == -100)
    if wrong("wrong_columns"):
        raise ValueError(
            f"`logits_to_keep` asks for the columns {call.logits_to_keep.tolist()}, but the text has "
            f"{text.tokens.shape[1]}. Give columns of it."
        )
    if wrong("labelled_slots") and call.shift_labels is None:
        assert slots is not None
        row, column = (slots & (call.labels != -100)).nonzero()[0].tolist()
        raise ValueError(
            f"Row {row}, column {column} is a memory slot, but its label is {int(call.labels[row, column])}. A slot "
            "holds no token to learn: set its label to -100."
        )


def _refuse_slots(config: PreTrainedConfig, call: Call, found: dict[str, list[int]]) -> None:
    """Refuse slots and memories that differ in number in some text."""
    slots = found["num_slots"]
    if not call.has_memories:
        for row, number in enumerate(slots):
            if number:
                raise ValueError(
                    f"Row {row} of `input_ids` has {number} memory slots (id {config.memory_token_id}), but 0 "
                    "memories were given. Pass `context_input_ids` or `memory_embeds`."
                )
        return
    memories = _memories_of_context(config, call, found) if call.memory_embeds is None else found["num_memories"]
    memories = memories * (len(slots) // len(memories))
    # In each row, not in all together: memories would silently go to the slots of another text.
    for row, (number, present) in enumerate(zip(slots, memories, strict=True)):
        if number != present:
            raise ValueError(
                f"Row {row} of `input_ids` has {number} memory slots (id {config.memory_token_id}), but {present} "
                "memories are present. Insert one slot for each memory; `MemoryProcessor` does."
            )
    if config.memory_positions in ("fixed", "spread"):
        for whole, rest, number in zip(found["num_tokens"], found["num_after"], slots, strict=True):
            if number and whole - rest != number:
                raise ValueError(
                    f"With `memory_positions={config.memory_positions!r}` all memories stand before the text, but a "
                    "slot stands after a token. Put the slots in front or use `memory_positions='contiguous'`."
                )


def _refuse_context(
    config: PreTrainedConfig, ids: torch.Tensor, mask: Any, num_memories: Any, found: dict[str, list[int]]
) -> None:
    if found["wrong_context"][0]:
        _refuse_ids("The encoder", "context_input_ids", ids, config.encoder.vocab_size, None)
    if found.get("wrong_context_mask", [0])[0]:
        value = mask[(mask != 0) & (mask != 1)][0].item()
        raise ValueError(
            f"`context_attention_mask` holds {value}; expected 1 for tokens and 0 for padding, nothing else."
        )
    if found.get("wrong_budget", [0])[0]:
        per_chunk = config.memories_per_chunk
        present = torch.ones_like(num_memories, dtype=torch.bool) if mask is None else (mask != 0).any(2)
        wrong = torch.where(present, (num_memories < 1) | (num_memories > per_chunk), num_memories != 0)
        row, chunk = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"`num_memories` is {int(num_memories[row, chunk])} for chunk {chunk} of row {row}; expected 1 to "
            f"{per_chunk}, what the model was made for, and 0 for an absent chunk."
        )


def _refuse_ids(who: str, name: str, ids: torch.Tensor, vocab_size: int, allowed: torch.Tensor | None) -> None:
    wrong = _outside(ids, vocab_size, allowed)
    raise ValueError(
        f"{who} knows ids 0 to {vocab_size - 1}, but `{name}` holds {int(ids[wrong][0])}. Tokenise with the model's "
        "own tokenizer, or resize the token table."
    )


def check_capacity(config: PreTrainedConfig, num_memories: int) -> None:
    """Refuse more memories than the decoder has room for."""
    capacity = config.memory_capacity
    if capacity is not None and num_memories > capacity:
        raise ValueError(
            f"The text needs {num_memories} memories, but the model takes {capacity} (`max_memories` "
            f"{config.max_memories}, positions of the decoder and a window of {config.window_length}). Shorten the "
            "text, use longer chunks, or a decoder with more positions."
        )


def check_room(config: PreTrainedConfig, counts: list[int], before: list[int], embedded: list[int]) -> int | None:
    """Return for how many memories there is room if texts become more, and the oldest are to go; `None` if not.

    Args:
        config ([`MemoryEncoderDecoderConfig`]): The model's.
        counts (`list` of `int`): Tokens of each text, to be cut into windows.
        before (`list` of `int`): Entries that stand before each.
        embedded (`list` of `int`): How many of these are tokens, which count as columns but not as memories.

    Raises:
        ValueError: If they are more and none may go.
    """
    per_window = config.window_length // config.chunk_length * config.memories_per_chunk
    sizes = []
    for count, number, tokens in zip(counts, before, embedded, strict=True):
        sizes.append(number - tokens + max(0, -(-count // config.window_length) - 1) * per_window)
    limits = [getattr(config.decoder, name, None) for name in LIMITS]
    nearest = min([limit for limit in limits if limit is not None], default=None)
    longest = max(sizes) + max(embedded) + config.window_length
    if config.max_memories is None and (nearest is None or longest <= nearest):
        return None  # whatever layers slide
    capacity, most, columns = config.memory_capacity, max(sizes), 0
    for memories, tokens in zip(sizes, embedded, strict=True):
        # Embedded tokens of a context stay in front, and so take columns beside the memories.
        columns = max(columns, tokens + (memories if capacity is None else min(memories, capacity)))
    if any(embedded):
        check_view(config, columns + config.window_length)
    if capacity is None or most <= capacity:
        return None
    if config.memory_policy == "error":
        check_capacity(config, most)
    return capacity


def check_view(config: PreTrainedConfig, num_columns: int) -> None:
    """Refuse a text whose last tokens would no longer see its first memory, `num_columns` columns back."""
    view = smallest_attention_window(config.decoder)
    if view is not None and num_columns > view:
        raise ValueError(
            f"The text is {num_columns} columns long from its first memory on, but the decoder has layers that see "
            f"{view} (sliding window): its last tokens would not see the memories. Shorten the text or write fewer "
            "tokens, put the memories nearer to the end, or choose a decoder that sees further."
        )


def position_table(decoder: PreTrainedModel) -> int | None:
    """Return how many positions a decoder has rows for; `None` where positions are computed, as rotary ones are."""
    limit = getattr(decoder.config, "max_position_embeddings", None)
    if limit is None:
        return None
    if decoder.config.model_type == "masked_mixer":  # its maps over positions are as long
        return limit
    tokens = decoder.get_input_embeddings()
    for module in decoder.modules():
        tables = [module.weight] if isinstance(module, torch.nn.Embedding) and module is not tokens else []
        tables += [buffer for buffer in module.buffers(recurse=False) if buffer.dim() == 2]
        # Some families keep a few rows more, for positions counted from a padding id.
        if any(limit <= len(table) <= limit + 8 for table in tables):
            return limit
    return None


def check_positions(decoder: PreTrainedModel, end: int) -> None:
    """Refuse positions that a decoder's table does not have; `end` is the last one's successor."""
    limit = getattr(decoder.config, "max_position_embeddings", None)
    if limit is None or end <= limit:  # looked up only where it may matter: it walks through all modules
        return
    table = position_table(decoder)
    if table is not None and end > table:
        raise ValueError(
            f"The text needs {end} positions, memories among them, but the decoder's table of positions has {table}. "
            "Shorten the text, write fewer tokens, or choose a decoder with more positions."
        )


def check_in_full(config: PreTrainedConfig, text: Text, cache: Cache | None, past: int) -> None:
    """Refuse to read as it stands what should become memories: it would silently be another computation."""
    length = text.tokens.shape[1]
    if not config.self_memory or length + past <= config.window_length:
        return
    if text.inputs_embeds is not None:
        raise ValueError(
            f"`inputs_embeds` has {length} columns, but a window is {config.window_length} tokens, and embeddings "
            "cannot be compressed into memories. Pass `input_ids`, or give memories with the embeddings."
        )
    raise ValueError(
        f"A {type(cache).__name__} was given for a text of {length + past} columns, more than a window of "
        f"{config.window_length}: it cannot hold what compressing needs. Pass `past_key_values=None`, or an empty "
        "`MemoryCache`."
    )


def check_empty(cache: Cache | None) -> None:
    """Refuse a cache that holds a text: where activations are recomputed the library keeps none."""
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"A cache of {cache.get_seq_length()} columns was given, but activation checkpointing keeps none. Call "
            "`model.eval()` or `model.gradient_checkpointing_disable()` first."
        )


def check_no_past(past: int) -> None:
    """Refuse to put memories before a text that has begun."""
    if past > 0:
        raise ValueError(
            f"Memories that stand before a text were given with a cache of {past} columns. Pass them with the first "
            "tokens and `past_key_values=None`."
        )


def check_own_cache(cache: Cache | None, needs_own: bool) -> None:
    """Refuse a cache that cannot hold what later steps need to know, or that would have to be empty and is not."""
    own = isinstance(cache, MemoryCache)
    if cache is None or (own and cache.get_seq_length() == 0) or not (own or needs_own):
        return
    raise ValueError(
        f"A {type(cache).__name__} of {int(cache.get_seq_length())} columns was given with memories, but here the "
        "cache must know which columns are memories. Pass `past_key_values=None`, or an empty `MemoryCache`."
    )


def check_windows(text: Text, counts: list[int], window_length: int, output_attentions: Any) -> None:
    """Refuse what has no meaning for a text of several windows."""
    number = -(-max(counts) // window_length)
    windows = "1 window" if number == 1 else f"{number} windows"
    if text.position_ids is not None:
        raise ValueError(
            f"`position_ids` were given for a text of {windows}, but a window's positions follow from its "
            "memories. Leave them out."
        )
    if output_attentions:
        raise ValueError(
            f"`output_attentions` was asked of a text of {windows}, whose attentions have no layout over "
            f"the text. Ask for a text of at most {window_length} tokens."
        )


def check_rolling(config: PreTrainedConfig, has_ids: bool) -> None:
    """Refuse to compress what the encoder cannot read."""
    if not (has_ids and config.self_memory):
        reason = "`config.self_memory` is False" if has_ids else "embeddings were given"
        raise ValueError(
            f"`rolling_memory=True` compresses text of the encoder's own tokenizer, but {reason}. Leave it out."
        )


def check_spelling(given: Iterable[str], known: Collection[str]) -> None:
    """Refuse a keyword that is a known one misspelt; others are the library's, and pass as they do in its models.

    >>> check_spelling(["num_items_in_batch"], ["input_ids", "memory_embeds"])
    >>> check_spelling(["memory_embed"], ["input_ids", "memory_embeds"])
    Traceback (most recent call last):
    ValueError: Unexpected keyword argument `memory_embed`. Did you mean `memory_embeds`?
    """
    for name in given:
        meant = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if meant:
            raise ValueError(f"Unexpected keyword argument `{name}`. Did you mean `{meant[0]}`?")
