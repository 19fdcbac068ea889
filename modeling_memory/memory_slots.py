"""Prompts and chunks as rows of ids: slots where contexts stand, padding, and the options of a call.

B prompts, C chunks of the prompt that has most, L ids per chunk, T ids of the longest row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .memory_chunking import encode_prompt, encode_text, special_frame


@dataclass(frozen=True)
class Row:
    """Ids of a prompt, and, of a chat whose answers were asked for, 1 at the tokens of an answer."""

    ids: list[int]
    answers: list[int] | None = None

    def lay(self, slot: int, token: str, counts: list[int] | None, number: int) -> "Row":
        """Put slots where the memory token stands, so many for each of them, or all in front.

        Args:
            slot (`int`): The memory token's id.
            token (`str`): Its name, for errors.
            counts (`list` of `int`, *optional*): Slots of each context; none for plain text.
            number (`int`): Which row it is, for errors.
        """
        marks = [i for i, one in enumerate(self.ids) if one == slot]
        if counts is None and marks:
            raise ValueError(
                f"A text contains {token!r} (row {number}), but there is nothing to remember. Give `context`, or "
                "`num_memories` for memories that are ready, or take the token out. In text that somebody else wrote "
                "it is text: `split_special_tokens=True`."
            )
        # A row that was given no context: its marks stand for nothing, and leave the text.
        counts = counts or [0] * len(marks)
        if marks and len(marks) != len(counts):
            raise ValueError(
                f"A text contains {token!r} {len(marks)} times (row {number}), but has {len(counts)} contexts or "
                "numbers of memories; expected it once for each, in their order, or not at all, for slots in front. "
                "Several contexts of one text are a list in the list: `context=[[first, second]]`."
            )
        # A text without a mark has its memories in front: whoever wrote no place for them wants them before all else.
        fronts = list(zip(marks, counts, strict=True)) if marks else []

        def spread(values: list[int], fill: int) -> list[int]:
            if not fronts:
                return [fill] * sum(counts) + values
            laid, last = [], 0
            for mark, count in fronts:
                laid += values[last:mark] + [fill] * count
                last = mark + 1
            return laid + values[last:]

        row = Row(spread(self.ids, slot), None if self.answers is None else spread(self.answers, 0))
        if not row.ids:
            raise ValueError(f"A text has no tokens and no memories (row {number}); expected at least one of either.")
        return row


def check_call(rows: Any, documents: Any, num_memories: Any, context_num_memories: Any) -> None:
    """Refuse arguments of a call that do not go together."""
    if rows is None and documents is None:
        raise ValueError("Neither `text` nor `context` was given; give at least one of them.")
    if documents is not None and num_memories is not None:
        raise ValueError(
            "`context` and `num_memories` were both given; give a context to be encoded (with "
            "`context_num_memories` for fewer memories of each chunk), or the number of memories that are ready."
        )
    if documents is None and context_num_memories is not None:
        raise ValueError("`context_num_memories` is about chunks, but no `context` was given. Give the context.")
    if rows is not None and documents is not None and len(rows) != len(documents):
        raise ValueError(
            f"{len(rows)} texts and {len(documents)} contexts were given; expected one context for each text, "
            "or a list of them (`context=[[first, second]]` for one text). Repeat a context that several texts "
            "share, or encode it once and pass `memory_embeds`."
        )


def row_of(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[str | int],
    control: frozenset[int],
    options: Mapping[str, Any],
) -> Row:
    """Tokenise one prompt: a string, which is data only on request, or parts, which are data by default."""
    split, add_special_tokens = options["split_special_tokens"], options["add_special_tokens"]
    # A string is what the application wrote, markers included; parts come from elsewhere and hold none.
    if isinstance(prompt, str) and not split:
        return Row(encode_prompt(tokenizer, prompt, add_special_tokens).ids)
    # The tokenizer would frame every part by itself; a prompt has one bos, however many parts.
    before, after = special_frame(tokenizer) if add_special_tokens else ([], [])
    ids = list(before)
    for part in [prompt] if isinstance(prompt, str) else prompt:
        if isinstance(part, int):
            ids.append(part)
        elif split is False:
            ids += encode_prompt(tokenizer, part, add_special_tokens=False).ids
        else:
            ids += encode_text(tokenizer, part, control).ids
    return Row([*ids, *after])


def prompts_of(text: Any, memory_token: str) -> list[str | list[str | int]] | None:
    """A text or a batch of them as a list of strings and lists of parts; `None` stays `None`."""
    if text is None:
        return None
    batch = [text] if isinstance(text, str) else text
    if not isinstance(batch, (list, tuple)):
        raise ValueError(f"`text` is a {type(text).__name__}; expected a string or a list of strings.")
    if not batch:
        raise ValueError("`text` is an empty list; expected at least one string.")
    prompts: list[str | list[str | int]] = []
    for i, one in enumerate(batch):
        if not isinstance(one, (str, list, tuple)):
            raise ValueError(
                f"`text[{i}]` is a {type(one).__name__}; expected a string, or a list of strings and ids for a prompt "
                "made of parts."
            )
        if not one:
            raise ValueError(
                f"`text[{i}]` is empty; expected at least one character. For a prompt of memories only, give the "
                f"memory token {memory_token!r} as the text."
            )
        for j, part in enumerate([] if isinstance(one, str) else one):
            if isinstance(part, bool) or not isinstance(part, (str, int)) or (isinstance(part, int) and part < 0):
                raise ValueError(f"`text[{i}][{j}]` is {part!r}; expected a string (data) or the id of a token.")
        # An empty part says nothing.
        prompts.append(one if isinstance(one, str) else [part for part in one if part != ""])
    return prompts


def documents_of(context: Any) -> list[list[str]] | None:
    """A context or a batch of them as the documents of each row; `None` stays `None`."""
    if context is None:
        return None
    batch = [context] if isinstance(context, str) else context
    if not isinstance(batch, (list, tuple)):
        raise ValueError(f"`context` is a {type(context).__name__}; expected a string or a list of strings.")
    if not batch:
        raise ValueError("`context` is an empty list; expected at least one string.")
    rows = [[one] if isinstance(one, str) else list(one) if isinstance(one, (list, tuple)) else one for one in batch]
    for i, row in enumerate(rows):
        for j, one in enumerate([] if row is None else row if isinstance(row, list) else [row]):
            name = f"`context[{i}][{j}]`" if isinstance(batch[i], (list, tuple)) else f"`context[{i}]`"
            if not isinstance(one, str):
                raise ValueError(f"{name} is a {type(one).__name__}; expected a string.")
            if not one:
                raise ValueError(
                    f"{name} is empty; expected at least one character. Give `None` for a row without a context."
                )
    return [row or [] for row in rows]


def chunk_budgets(sizes: list[list[int]], per_chunk: int, given: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Say how many memories each chunk gets `(B, C)`, and how many slots each document of each row.

    Args:
        sizes (`list` of `list` of `int`): Chunks of each document of each row.
        per_chunk (`int`): Memories per chunk that the model makes (K).
        given (`int` or `(B, C)` lists of `int`, *optional*): Fewer of them.
    """
    width = max(map(sum, sizes))
    budgets: list[list[int]] = []
    for i, row in enumerate(sizes):
        number = sum(row)
        if given is None or isinstance(given, int):
            own = [per_chunk if given is None else given] * number
        else:
            own = list(given[i]) if i < len(given) else []
            # Zeros after a row's own chunks fill the rectangle, as in a budget that was made for a batch.
            own = own[:number] if not any(own[number:]) else own  # absent chunks have none
        if len(own) != number:
            raise ValueError(
                f"`context_num_memories` has {len(own)} numbers for row {i}, whose contexts have {number} chunks; "
                "expected one for each chunk, or one number for all."
            )
        for count in own:
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= per_chunk:
                raise ValueError(
                    f"`context_num_memories` is {count!r} for a chunk of row {i}; expected 1 to {per_chunk}, the "
                    "`memories_per_chunk` of the processor."
                )
        budgets.append(own + [0] * (width - number))
    ends = [[0, *accumulate(row)] for row in sizes]
    counts = [
        [sum(own[start:end]) for start, end in zip(places, places[1:], strict=False)]
        for own, places in zip(budgets, ends, strict=True)
    ]
    return budgets, counts


def ready_counts(num_memories: Any, num_texts: int | None) -> list[list[int]]:
    """Slots of each memory token of each row, for memories that are ready."""
    if num_texts is None:
        raise ValueError("`num_memories` lays slots into texts, but no `text` was given. Give the prompts.")
    given = [num_memories] * num_texts if isinstance(num_memories, int) else list(num_memories)
    if len(given) != num_texts:
        raise ValueError(
            f"{num_texts} texts and {len(given)} numbers of memories were given; expected one number for each text, "
            "or a list of them for a text with several memory tokens."
        )
    counts = [list(one) if isinstance(one, (list, tuple)) else [one] for one in given]
    for i, row in enumerate(counts):
        for count in row:
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"`num_memories[{i}]` is {count!r}; expected an integer of 0 or more.")
    return counts


def pad_chunks(rows: list[list[list[int]]], tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, list]:
    """Chunks of all rows as `(B, C, L)` ids and mask, padded at the end of a chunk and of a row."""
    pad = pad_value(tokenizer)
    num_chunks = max(len(row) for row in rows)
    # Chunks are read from position 0, so padding at their end is the cheap side: nothing has to be moved.
    filled = [row + [[]] * (num_chunks - len(row)) for row in rows]
    ids = [[chunk + [pad] * (length - len(chunk)) for chunk in row] for row in filled]
    mask = [[[1] * len(chunk) + [0] * (length - len(chunk)) for chunk in row] for row in filled]
    return {"context_input_ids": ids, "context_attention_mask": mask}


def pad_rows(rows: list[Row], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> dict[str, list]:
    """Rows as `(B, T)` ids and mask, and which tokens are answers if the rows say so."""
    side = options["padding_side"] or tokenizer.padding_side
    padding, max_length = options["padding"], options["max_length"]
    longest = max(len(row.ids) for row in rows)
    length = longest if padding in (True, "longest") else 0
    if padding == "max_length":
        if max_length is None or max_length < longest:
            raise ValueError(
                f"`padding='max_length'` with `max_length={max_length}`, but the longest row has {longest} tokens, "
                "slots included; nothing is cut off. Raise `max_length`, or shorten the text or its context."
            )
        length = max_length
    # After the choice of a length, since `max_length` need not be a multiple itself.
    multiple = options["pad_to_multiple_of"] or 1
    length = -(-length // multiple) * multiple

    def pad(values: list[int], fill: int) -> list[int]:
        more = [fill] * (length - len(values))
        return more + values if side == "left" else values + more

    # A padded column is masked, and its id only has to be a row of the table.
    data = {"input_ids": [pad(row.ids, pad_value(tokenizer)) for row in rows]}
    if options["return_attention_mask"] is not False:
        data["attention_mask"] = [pad([1] * len(row.ids), 0) for row in rows]
    # A mask for some rows only would call the others' prompts answers of no tokens.
    if all(row.answers is not None for row in rows):
        data["assistant_masks"] = [pad(row.answers or [], 0) for row in rows]
    return data


def without_slots(token_ids: Any, slot: int) -> list:
    """Nested lists of ids without slots, and without ids that are no token (-100 in labels)."""
    rows = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
    rows = [rows] if isinstance(rows, int) else rows
    if isinstance(rows, (list, tuple)):
        rows = [one.tolist() if hasattr(one, "tolist") else one for one in rows]
        if all(isinstance(one, int) for one in rows):
            # A slot is no text, and its id may be one that the tokenizer does not know.
            return [token_id for token_id in rows if token_id >= 0 and token_id != slot]
        if all(isinstance(row, (list, tuple)) for row in rows):
            return [without_slots(row, slot) for row in rows]
    raise ValueError(f"The ids to decode are {token_ids!r:.80}; expected integers, lists of them or a tensor.")


def pad_value(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id for padding. Padding is always masked, so a tokenizer without a pad token serves as well."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


DEFAULTS: dict[str, Any] = {
    "add_special_tokens": True,
    "split_special_tokens": None,
    "padding": True,
    "padding_side": None,
    "max_length": None,
    "pad_to_multiple_of": None,
    "return_tensors": None,
    "return_attention_mask": True,
    "verbose": True,
}
_CUT = "nothing is cut off, since a slot that is cut is a memory lost; shorten the text or its context"
_ONE = "a prompt is one string, or one list of parts"
_ONLY = "a call returns what the model takes, and slots would shift it"
_TEXT = "the model reads text alone"
REFUSED = {
    **dict.fromkeys(("truncation", "stride", "return_overflowing_tokens"), _CUT),
    **dict.fromkeys(("is_split_into_words", "text_pair", "text_target", "text_pair_target"), _ONE),
    **dict.fromkeys(("return_offsets_mapping", "return_special_tokens_mask", "return_token_type_ids"), _ONLY),
    **dict.fromkeys(("return_length", "return_mm_token_type_ids", "return_text_replacement_offsets"), _ONLY),
    **dict.fromkeys(("images", "videos", "audio", "images_kwargs", "videos_kwargs", "audio_kwargs"), _TEXT),
    "sanitize_control_tokens": "the option is called `split_special_tokens=True` here, and chats need none",
}
CALL_OPTIONS = frozenset([*DEFAULTS, *REFUSED, "text_kwargs", "common_kwargs"])


def resolve_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the options of a call, given as they are or in the library's groups, together with the defaults.

    Raises:
        ValueError: If one is unknown, given twice, of a wrong value, or cannot be had, with the reason.
    """
    options = {**DEFAULTS, **(kwargs.get("common_kwargs") or {})}
    flat = {name: value for name, value in kwargs.items() if name not in ("text_kwargs", "common_kwargs")}
    grouped = dict(kwargs.get("text_kwargs") or {})
    twice = sorted(flat.keys() & grouped.keys())
    if twice:
        raise ValueError(f"`{twice[0]}` was given twice, in `text_kwargs` and beside it; give it once.")
    options.update({**flat, **grouped})
    for name, value in options.items():
        if name in REFUSED and value and value != "do_not_truncate":
            raise ValueError(f"`{name}={value!r}` cannot be had: {REFUSED[name]}.")
        if name not in CALL_OPTIONS:
            raise ValueError(f"Unexpected keyword argument `{name}`; expected one of {sorted(DEFAULTS)}.")
    if options["padding"] not in (True, False, "longest", "max_length", "do_not_pad"):
        raise ValueError(f"`padding` is {options['padding']!r}; expected True, 'longest', 'max_length' or False.")
    if options["padding_side"] not in (None, "left", "right"):
        raise ValueError(f"`padding_side` is {options['padding_side']!r}; expected 'left' or 'right'.")
    for name in ("max_length", "pad_to_multiple_of"):
        value = options[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` is {value!r}; expected a positive integer.")
    return options
