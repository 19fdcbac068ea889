"""Objectives as data: which tokens a batch shows and which token each position must output.

Every objective is a pure function of token ids. It makes the *text* that the model reads as full text; before it
stands the *source*, what shall be remembered:

| objective | source | text | target of text position j |
|---|---|---|---|
| causal | none (slots layout: the first windows) | x | x[j+1] |
| copy | x | COPY, x[0..H-2] | x[j] |
| blank copy | x | BLANK x H | x[j] |
| copy, `marker="none"` | x | x | x[j+1] |
| blank copy, `marker="none"` | x | BLANK x H | x[j+1] |
| recall | x | a few tokens x[s..s+p-1] from anywhere in it, then what follows | x[s+j+1] from j = p-1 on |
| qa | x | a question and its answer in the decoder's chat template | the answer |
| distillation | as one of the others | the same | the same, and what the decoder says of the full text |
| reconstruction | the chunk | none | x[j], one pass of an autoencoder |

In the layout `"self"` the source is plain text that the model folds into memories by itself; in `"slots"` it is
`context_input_ids`, and slot tokens stand for its memories. `build_batch` makes both. `shift_labels[b, t]` is what
position t must output, -100 where nothing is learnt.

>>> ids = SpecialTokens(pad=0, bos=1, eos=2, memory=99, copy=3, blank=4)
>>> x = torch.tensor([[5, 6, 7, 8, 9]])
>>> def show(objective, **options):
...     batch = build_batch(objective, x, BatchSpec(ids, chunk_length=5, window_length=5, **options))
...     for name in ("context_input_ids", "input_ids", "shift_labels"):
...         if name in batch:
...             print(name, batch[name].tolist())
>>> show("copy")
input_ids [[5, 6, 7, 8, 9, 3, 5, 6, 7, 8]]
shift_labels [[-100, -100, -100, -100, -100, 5, 6, 7, 8, 9]]
>>> show("blank_copy")
input_ids [[5, 6, 7, 8, 9, 4, 4, 4, 4, 4]]
shift_labels [[-100, -100, -100, -100, -100, 5, 6, 7, 8, 9]]
>>> show("copy", marker="none")
input_ids [[5, 6, 7, 8, 9, 5, 6, 7, 8, 9]]
shift_labels [[-100, -100, -100, -100, 5, 6, 7, 8, 9, -100]]
>>> show("blank_copy", marker="none", mixed_with_causal=True)
input_ids [[5, 6, 7, 8, 9, 4, 4, 4, 4, 4]]
shift_labels [[-100, -100, -100, -100, -100, 6, 7, 8, 9, -100]]
>>> show("copy", layout="slots", memories_per_chunk=2)
context_input_ids [[[5, 6, 7, 8, 9]]]
input_ids [[99, 99, 3, 5, 6, 7, 8]]
shift_labels [[-100, -100, 5, 6, 7, 8, 9]]

The last token of a window predicts the first of the next. In the slots layout the last *slot* stands there; it
predicts nothing, so the first token of the text (here 9) is shown and not asked for:

>>> x = torch.tensor([[5, 6, 7, 8, 9, 10]])
>>> batch = build_batch("causal", x, BatchSpec(ids, chunk_length=2, window_length=4, layout="slots"))
>>> batch["context_input_ids"].tolist(), batch["input_ids"].tolist(), batch["shift_labels"].tolist()
([[[5, 6], [7, 8]]], [[99, 99, 9, 10]], [[-100, -100, 10, -100]])

Distillation has the same inputs, and beside them the whole text for the teacher:

>>> x = torch.tensor([[5, 6, 7, 8, 9]])
>>> spec = BatchSpec(ids, chunk_length=2, window_length=2, layout="slots", source_length=2)
>>> batch = build_batch("distillation", x, spec)
>>> batch["input_ids"].tolist(), batch["shift_labels"].tolist()
([[99, 7, 8, 9]], [[-100, 8, 9, -100]])
>>> batch["teacher_input_ids"].tolist(), batch["teacher_labels"].tolist()
([[5, 6, 7, 8, 9]], [[-100, -100, 8, 9, -100]])

B batch, n tokens of a row, H tokens of a source, T columns of a batch, C chunks, L chunk length, K memories per chunk.

Source: Badger 2026, arXiv 2602.13466, copy and blank copy objectives and curriculum. There the copy has no marker
(or three overwritten tokens), so its first token looks like a continuation, and its loss is halved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

IGNORED = -100
OBJECTIVES = ("causal", "copy", "blank_copy", "recall", "qa", "reconstruction", "distillation")
TAUGHT = ("causal", "copy", "recall", "qa")
LAYOUTS = ("self", "slots")
MARKERS = ("token", "none")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that the objectives put between tokens of the text.

    Attributes:
        pad (`int`): Fills columns that the attention mask hides.
        bos (`int`, *optional*): Begins a document. No objective adds one.
        eos (`int`, *optional*): Ends a document. Copies of sources that may end anywhere ask for it after them.
        memory (`int`, *optional*): Slot that a memory takes; for the slots layout.
        copy (`int`, *optional*): Marker that asks for the source; for the copy objective.
        blank (`int`, *optional*): Token that shows nothing; for the blank copy objective.

    Raises:
        ValueError: If an id is negative, or copy, blank or memory is equal to another special token: `generate` takes
            pad ids for padding and stops at eos, and the decoder could not tell the objectives apart.

    >>> SpecialTokens(pad=0, eos=2, copy=2)
    Traceback (most recent call last):
    ValueError: copy has the id 2, which is eos; ... Give copy an id of its own.
    """

    pad: int
    bos: int | None = None
    eos: int | None = None
    memory: int | None = None
    copy: int | None = None
    blank: int | None = None

    def __post_init__(self) -> None:
        ids = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in ids.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}; expected a token id, an integer of 0 or more.")
        for name in ("copy", "blank", "memory"):
            for other, value in ids.items():
                if other != name and value == ids.get(name):
                    raise ValueError(
                        f"{name} has the id {value}, which is {other}; padding, ends, slots and markers must differ. "
                        f"Give {name} an id of its own."
                    )

    def require(self, name: str, purpose: str) -> int:
        """Return the id called `name`, or say what it would be needed for.

        Args:
            name (`str`): Field of this class.
            purpose (`str`): What needs it, for the message.

        Raises:
            ValueError: If the id is not set.
        """
        value: int | None = getattr(self, name)
        if value is None:
            raise ValueError(f"{purpose} needs a {name} token, but its id is None; set SpecialTokens({name}=...).")
        return value


class Columns(NamedTuple):
    """Columns of a batch, each tensor of shape `(B, T)`.

    Attributes:
        input_ids (`torch.LongTensor`): What stands there.
        targets (`torch.LongTensor`): What must be output there; -100 for nothing.
        attention_mask (`torch.LongTensor`): 1 for tokens and slots, 0 for padding.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    attention_mask: torch.Tensor


def causal(tokens: torch.Tensor, attention_mask: torch.Tensor) -> Columns:
    """Ask each token of rows `(B, n)`, padded on the right, for the next one: also the paper's copy without a marker.

    >>> causal(torch.tensor([[5, 6, 7, 8, 0]]), torch.tensor([[1, 1, 1, 1, 0]])).targets.tolist()
    [[6, 7, 8, -100, -100]]
    """
    return Columns(tokens, next_tokens(tokens, attention_mask), attention_mask)


def copy(tokens: torch.Tensor, attention_mask: torch.Tensor, copy_token_id: int) -> Columns:
    """Ask for sources `(B, H)`, padded on the right, after a marker: each token with the ones before it in sight.

    >>> columns = copy(torch.tensor([[5, 6, 7, 8, 9]]), torch.ones(1, 5).long(), copy_token_id=3)
    >>> columns.input_ids.tolist(), columns.targets.tolist()
    ([[3, 5, 6, 7, 8]], [[5, 6, 7, 8, 9]])
    """
    marker = torch.full_like(tokens[:, :1], copy_token_id)
    shown = torch.cat([marker, tokens[:, :-1]], 1)
    return Columns(shown, present_tokens(tokens, attention_mask), attention_mask)


def blank_copy(tokens: torch.Tensor, attention_mask: torch.Tensor, blank_token_id: int) -> Columns:
    """Ask for sources `(B, H)`, padded on the right, with no text in sight: what is right was remembered.

    >>> columns = blank_copy(torch.tensor([[5, 6, 7, 8, 9]]), torch.ones(1, 5).long(), blank_token_id=4)
    >>> columns.input_ids.tolist(), columns.targets.tolist()
    ([[4, 4, 4, 4, 4]], [[5, 6, 7, 8, 9]])
    """
    return Columns(torch.full_like(tokens, blank_token_id), present_tokens(tokens, attention_mask), attention_mask)


def markerless_blank_copy(tokens: torch.Tensor, attention_mask: torch.Tensor, blank_token_id: int) -> Columns:
    """Show blanks in the place of the source's second appearance, each asked for the *next* token, as the paper does.

    >>> columns = markerless_blank_copy(torch.tensor([[5, 6, 7, 8, 9]]), torch.ones(1, 5).long(), blank_token_id=4)
    >>> columns.input_ids.tolist(), columns.targets.tolist()
    ([[4, 4, 4, 4, 4]], [[6, 7, 8, 9, -100]])
    """
    return causal(tokens, attention_mask)._replace(input_ids=torch.full_like(tokens, blank_token_id))


def recall(
    tokens: torch.Tensor, attention_mask: torch.Tensor, starts: torch.Tensor, *, prompt_length: int, recall_length: int
) -> Columns:
    """Show a few tokens from anywhere in the source and ask for what follows them there.

    Args:
        tokens (`torch.LongTensor` of shape `(B, H)`): Sources, padded on the right.
        attention_mask (`torch.LongTensor` of shape `(B, H)`): 1 for tokens, 0 for padding.
        starts (`torch.LongTensor` of shape `(B,)`): Where in its source each prompt begins.
        prompt_length (`int`): Tokens of a prompt (p).
        recall_length (`int`): Most tokens that are asked for; a source that ends earlier asks for fewer.

    Returns:
        Columns `(B, p + recall_length - 1)`: the prompt predicts nothing but its last token.

    >>> x, present = torch.tensor([[5, 6, 7, 8, 9]]), torch.ones(1, 5).long()
    >>> columns = recall(x, present, torch.tensor([1]), prompt_length=2, recall_length=2)
    >>> columns.input_ids.tolist(), columns.targets.tolist()
    ([[6, 7, 8]], [[-100, 8, 9]])
    """
    following = next_tokens(tokens, attention_mask)
    offsets = torch.arange(prompt_length + recall_length - 1, device=tokens.device)
    places = starts[:, None] + offsets  # (B, p + n - 1)
    inside = places < tokens.shape[1]
    places = places.clamp(max=tokens.shape[1] - 1)
    targets = following.gather(1, places).masked_fill((offsets < prompt_length - 1) | ~inside, IGNORED)
    # A token that asks for nothing after the prompt, the source's last, need not be read.
    mask = attention_mask.gather(1, places) * inside * ((targets != IGNORED) | (offsets < prompt_length - 1))
    return Columns(tokens.gather(1, places), targets, mask)


def qa(tokens: torch.Tensor, attention_mask: torch.Tensor, answer_mask: torch.Tensor) -> Columns:
    """Show a conversation and ask for its answer alone.

    Args:
        tokens (`torch.LongTensor` of shape `(B, T)`): A question and its answer in a chat template, padded on the
            right.
        attention_mask (`torch.LongTensor` of shape `(B, T)`): 1 for tokens, 0 for padding.
        answer_mask (`torch.LongTensor` of shape `(B, T)`): 1 for tokens of the answer, its end of turn included.

    >>> chat, present = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4).long()
    >>> qa(chat, present, torch.tensor([[0, 0, 1, 1]])).targets.tolist()
    [[-100, 7, 8, -100]]
    """
    return causal(tokens, attention_mask)._replace(targets=next_tokens(tokens, attention_mask * answer_mask))


def reconstruction(
    tokens: torch.Tensor, attention_mask: torch.Tensor, *, chunk_length: int, pad_token_id: int
) -> dict[str, torch.Tensor]:
    """Cut rows into chunks, each of which an autoencoder has to give back in one pass; targets are not shifted.

    Args:
        tokens (`torch.LongTensor` of shape `(B, n)`): Rows, padded on the right; n a whole number of chunks.
        attention_mask (`torch.LongTensor` of shape `(B, n)`): 1 for tokens, 0 for padding.
        chunk_length (`int`): Tokens per chunk (L).
        pad_token_id (`int`): Fills padded columns.

    Returns:
        `input_ids`, `attention_mask` and unshifted `labels`, each `(chunks, L)`, in row order. Chunks of padding only
        are left out.

    Raises:
        ValueError: If n is not a whole number of chunks.

    >>> batch = reconstruction(
    ...     torch.tensor([[5, 6, 7, 8, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]]), chunk_length=3, pad_token_id=0
    ... )
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[5, 6, 7], [8, 0, 0]], [[5, 6, 7], [8, -100, -100]])
    """
    if tokens.shape[1] % chunk_length:
        raise ValueError(
            f"rows have {tokens.shape[1]} columns, but reconstruction takes a whole number of chunks of "
            f"{chunk_length}. Cut rows to a multiple of {chunk_length}, or pad them and give an attention_mask."
        )
    chunks, mask = tokens.reshape(-1, chunk_length), attention_mask.reshape(-1, chunk_length)
    present = mask.any(1)
    chunks, mask = chunks[present], mask[present]
    return {
        "input_ids": chunks.masked_fill(mask == 0, pad_token_id),
        "attention_mask": mask,
        "labels": present_tokens(chunks, mask),
    }


@dataclass(frozen=True)
class BatchSpec:
    """How rows of text become batches: all that stays the same from batch to batch.

    Attributes:
        special_tokens (`SpecialTokens`): Ids of padding, slots and markers.
        chunk_length (`int`): Tokens per chunk (L).
        window_length (`int`): Tokens per window (W), a multiple of `chunk_length`.
        memories_per_chunk (`int`): Memories, and so slots, of a chunk (K).
        layout (`str`): `"self"`: plain text. `"slots"`: the source is a context, slots stand for its memories.
        marker (`str`): `"token"`, or `"none"` for the paper's layouts x ++ x and x ++ BLANK * H, in which the last
            source token is asked for x[0]. Slots predict nothing: in the slots layout x[0] then has no predictor and
            is no target.
        mixed_with_causal (`bool`): Whether the model also learns `causal`. With `marker="none"` the predictor of x[0]
            then has exactly a causal input with another target, so it is no target. No effect with a marker.
        source_length (`int`, *optional*): Tokens of a row that are its source (H), a whole number of windows. Default
            for copies: the row. For `causal` in the slots layout: all windows but the row's last; shorter rows have
            a shorter source, so that each row keeps at least one token of text. Elsewhere it has no meaning and no
            effect.
        vary_source (`bool`): Whether the copies' rows have sources of 1, 2, ... windows in turn, up to
            `source_length`, so that a model learns to give back few memories as well as many.
        shortened (`float`): Share of the chunks of the reconstruction, and in the slots layout of the rows of the
            copies, that are cut to a random length, their last chunk being short; after a cut copy the end token is
            asked for. Which are cut, and where, follows from their numbers alone.
        random_tokens (`float`): Share of the same rows in which tokens, from one to all, become random ones.
        vocab_size (`int`): Ids that random tokens are drawn from, special ones left out.
        documents (`bool`): Whether rows have different lengths. They are padded to whole windows, a batch also has
            `"num_tokens"`, its tokens without padding, and the copies take the whole windows of a row as its source.
        split_windows (`bool`): Whether the model reads each window by itself. Targets stay those of the whole row:
            the last token of a window is asked for the first of the next, as a memory model is.
        every (`Mapping[str, int]`): Objective -> n, for which it takes every n-th row of a batch only.
        num_memories (`Sequence[int]`): Memories per chunk, of which each batch draws one number; slots layout only.
            Default: always `memories_per_chunk`.
        num_memories_weights (`Sequence[float]`): How often each of them is drawn, in any unit. Default: equally.
        begin (`bool`): Whether a begin token stands before the slots: a pretrained decoder rests its attention on what
            stands first, and should not have to rest it on a memory. A conversation begins by itself. Slots only.
        recall_prompt (`int`): Tokens that recall shows.
        recall_length (`int`): Most tokens that recall asks for.
        taught (`str`): What distillation's student is asked: `"causal"`, `"copy"`, `"recall"` or `"qa"`.
    """

    special_tokens: SpecialTokens
    chunk_length: int
    window_length: int
    memories_per_chunk: int = 1
    layout: str = "self"
    marker: str = "token"
    mixed_with_causal: bool = False
    source_length: int | None = None
    vary_source: bool = False
    shortened: float = 0.0
    random_tokens: float = 0.0
    vocab_size: int = 0
    documents: bool = False
    split_windows: bool = False
    every: Mapping[str, int] = field(default_factory=dict)
    num_memories: Sequence[int] = ()
    num_memories_weights: Sequence[float] = ()
    begin: bool = False
    recall_prompt: int = 8
    recall_length: int = 32
    taught: str = "causal"

    def asked(self, objective: str) -> str:
        """What the text of an objective asks: of distillation what is taught, of the others themselves."""
        return self.taught if objective == "distillation" else objective


@dataclass(frozen=True)
class Turns:
    """Questions and their answers in the decoder's chat template.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(B, T)`): Ids, padded on the right.
        attention_mask (`torch.LongTensor` of shape `(B, T)`): 1 for tokens, 0 for padding.
        answer_mask (`torch.LongTensor` of shape `(B, T)`): 1 for tokens of the answer.
        places (`torch.LongTensor` of shape `(B,)`, *optional*): The column before which the memories stand, in the
            user's turn say. Default: before the conversation.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer_mask: torch.Tensor
    places: torch.Tensor | None = None


@dataclass(frozen=True)
class ReadyContext:
    """A source that is chunks already, in an encoder's own tokens; slots layout only.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(B, C, L')`): The chunks.
        attention_mask (`torch.LongTensor` of shape `(B, C, L')`, *optional*): 1 for tokens, 0 for padding; a chunk of
            zeros only takes no slots.
        tokens (`torch.LongTensor` of shape `(B, n')`, *optional*): The same text in decoder tokens, as distillation's
            teacher reads it.
        tokens_mask (`torch.LongTensor` of shape `(B, n')`, *optional*): 1 for tokens, 0 for padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    tokens_mask: torch.Tensor | None = None


def build_batch(
    objective: str,
    tokens: torch.Tensor,
    spec: BatchSpec,
    *,
    attention_mask: torch.Tensor | None = None,
    context: ReadyContext | None = None,
    starts: torch.Tensor | None = None,
    turns: Turns | None = None,
    end: bool = False,
) -> dict[str, torch.Tensor]:
    """Build the inputs and targets of one objective from rows of tokens.

    Rows may be padded on either side; the batch is padded on the right and as wide as its longest row needs. Sources
    are whole windows in every row, so that copy window m+i outputs exactly the tokens of source window i; with `end`
    they may end anywhere.

    Args:
        objective (`str`): One of `OBJECTIVES`.
        tokens (`torch.LongTensor` of shape `(B, n)`): Text in decoder tokens (reconstruction: encoder tokens). With a
            ready context the whole text to copy or continue, of any length.
        spec (`BatchSpec`): Lengths, layout, special tokens.
        attention_mask (`torch.LongTensor` of shape `(B, n)`, *optional*): 1 for tokens, 0 for padding. Default: all 1.
        context (`ReadyContext`, *optional*): The source, for an encoder with its own tokenizer.
        starts (`torch.LongTensor` of shape `(B,)`, *optional*): For recall: where in its source each prompt begins.
        turns (`Turns`, *optional*): For qa: the conversations.
        end (`bool`): For copies in slots: sources may end anywhere, and their end is asked for where a row has room.

    Returns:
        `dict`: `input_ids`, `attention_mask` and `shift_labels`, each `(B, T)`; in the slots layout also
        `context_input_ids` and `context_attention_mask`, each `(B, C, L)`. For distillation also
        `teacher_input_ids`, `teacher_attention_mask` and `teacher_labels`, each `(B, T')`, with the targets of
        `shift_labels` in the same order. For reconstruction `input_ids`, `attention_mask` and `labels`, each
        `(chunks, L)`. All but the teacher's are arguments of the models' `forward`.

    Raises:
        ValueError: If a name is unknown, a shape does not fit, a row is empty, a source is not a whole number of
            windows, or an id that is needed is not set.
    """
    _check_options(objective, spec)
    _check_context(objective, spec, context, end)
    _check_given(spec.asked(objective), len(tokens), starts, turns)
    mask = _check_rows(objective, tokens, attention_mask)
    tokens, mask = _pack_left(mask, tokens, mask)
    if objective == "reconstruction":
        return reconstruction(tokens, mask, chunk_length=spec.chunk_length, pad_token_id=spec.special_tokens.pad)
    source, text = _source_and_text(spec.asked(objective), tokens, mask, spec, context is None, end)
    before: list[Columns] = []
    if turns is not None:
        text = qa(turns.input_ids, turns.attention_mask, turns.answer_mask)
        before, text = _split_turns(text, turns.places)
    elif starts is not None:
        lengths = {"prompt_length": spec.recall_prompt, "recall_length": spec.recall_length}
        text = recall(text.input_ids, text.attention_mask, starts, **lengths)
    pad = spec.special_tokens.pad
    if spec.layout == "self":
        return _batch([*before, source, text], pad)
    chunks, chunks_mask = _chunks_of(source, spec) if context is None else _ready_chunks(context, len(tokens))
    slot = spec.special_tokens.require("memory", "the slots layout")
    if spec.begin and not before:
        begin = torch.full_like(tokens[:, :1], spec.special_tokens.require("bos", "`begin`"))
        before = [Columns(begin, torch.full_like(begin, IGNORED), torch.ones_like(begin))]
    slots = _slot_columns(chunks_mask, spec.memories_per_chunk, slot)
    batch = {
        **_batch([*before, slots, text], pad), "context_input_ids": chunks, "context_attention_mask": chunks_mask
    }  # fmt: skip
    return {**batch, **_for_teacher(source, before, text, context, pad)} if objective == "distillation" else batch


def _split_turns(text: Columns, places: torch.Tensor | None) -> tuple[list[Columns], Columns]:
    """Part conversations `(B, T)` where their memories stand; nothing stands before them without `places`."""
    if places is None:
        return [], text
    is_before = (torch.arange(text.input_ids.shape[1], device=places.device) < places[:, None]).to(text.attention_mask)
    before = text._replace(attention_mask=text.attention_mask * is_before)
    return [before], text._replace(attention_mask=text.attention_mask * (1 - is_before))


def _for_teacher(
    source: Columns, before: list[Columns], text: Columns, context: ReadyContext | None, pad: int
) -> dict[str, torch.Tensor]:
    """Return what distillation's teacher reads: the full source in the place of the memories."""
    if context is not None and context.tokens is not None:
        mask = _check_rows("the source", context.tokens, context.tokens_mask)
        own, mask = _pack_left(mask, context.tokens, mask)
        source = Columns(own, torch.full_like(own, IGNORED), mask)
    return {
        f"teacher_{name.removeprefix('shift_')}": part for name, part in _batch([*before, source, text], pad).items()
    }


def _source_and_text(
    objective: str, tokens: torch.Tensor, mask: torch.Tensor, spec: BatchSpec, own_source: bool, end: bool
) -> tuple[Columns, Columns]:
    """Return what shall be remembered and what is read in full; without `own_source` the context is given."""
    if objective == "causal":
        return _split_causal(tokens, mask, spec, split=spec.layout == "slots" and own_source)
    if own_source:
        # In plain text a source that ends inside a window would share it with the text after it.
        unit = 1 if end or (objective == "qa" and spec.layout == "slots") else spec.window_length
        tokens, mask = _whole_windows(objective, tokens, mask, unit, spec.source_length)
    if objective in ("recall", "qa"):
        source = Columns(tokens, torch.full_like(tokens, IGNORED), mask)
        return source, source
    source, text = _copy_parts(objective, tokens, mask, spec)
    if end:
        tokens, mask = _with_end(tokens, mask, spec.special_tokens.require("eos", "end=True"))
        _, text = _copy_parts(objective, tokens, mask, spec)
    return source, text


def _chunks_of(source: Columns, spec: BatchSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a source `(B, H)` into chunks `(B, C, L)`, the last one padded; return them with their mask."""
    source = _whole_chunks(source, spec.chunk_length, spec.special_tokens.pad)
    shape = source.input_ids.shape[0], -1, spec.chunk_length
    mask = source.attention_mask.reshape(shape)
    return source.input_ids.reshape(shape).masked_fill(mask == 0, spec.special_tokens.pad), mask


def targets_of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return what each position of a batch from [`build_batch`] must output; -100 where nothing is asked.

    >>> targets_of({"labels": torch.tensor([[5, -100]])}).tolist()
    [[5, -100]]
    """
    return batch["shift_labels"] if "shift_labels" in batch else batch["labels"]


def keep_columns(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name the columns `(n,)` that have a target in some row, if they are few enough to be worth it.

    Half of the output head, and whole source windows, would be computed for nothing in a copy.
    """
    if "shift_labels" not in batch:
        return batch
    wanted = (batch["shift_labels"] != IGNORED).any(0)
    if wanted.any() and wanted.sum() <= 0.75 * wanted.numel():
        return {**batch, "columns": wanted.nonzero()[:, 0]}
    return batch


def without_targets(batch: dict[str, torch.Tensor], absent: torch.Tensor) -> dict[str, torch.Tensor]:
    """Take the targets of some rows `(B,)` out of a batch: rows that only fill it up."""
    if not absent.any():
        return batch
    changed: dict[str, torch.Tensor] = {}
    for name in ("labels", "shift_labels", "teacher_labels"):
        if name in batch:
            wide = absent.repeat_interleave(len(batch[name]) // len(absent))  # a row may be several chunks
            changed[name] = batch[name].masked_fill(wide[:, None], IGNORED)
    return {**batch, **changed}


def combine_losses(
    loss_sums: Mapping[str, torch.Tensor],
    num_targets: Mapping[str, int | torch.Tensor],
    weights: Mapping[str, float],
) -> torch.Tensor:
    """Add objectives up: each its own mean over its own targets, times its weight.

    With sums and numbers of the global batch, accumulation and several processes give the loss of one large batch.
    An objective without a target adds 0.

    Args:
        loss_sums (`Mapping[str, torch.Tensor]`): Objective -> sum of its token losses in nats, a scalar.
        num_targets (`Mapping[str, int or torch.Tensor]`): Objective -> number of its targets.
        weights (`Mapping[str, float]`): Objective -> weight. (The paper's code amounts to causal 1 and copy 1/2.)

    Raises:
        ValueError: If the three do not name the same objectives.

    >>> sums = {"causal": torch.tensor(8.0), "copy": torch.tensor(6.0)}
    >>> combine_losses(sums, {"causal": 4, "copy": 2}, {"causal": 1.0, "copy": 0.5})
    tensor(3.5000)
    """
    if not loss_sums or not (set(loss_sums) == set(num_targets) == set(weights)):
        raise ValueError(
            f"loss sums are of {sorted(loss_sums)}, numbers of targets of {sorted(num_targets)}, weights of "
            f"{sorted(weights)}; give all three for the same objectives, at least one."
        )
    counts = {name: torch.as_tensor(count).clamp(min=1) for name, count in num_targets.items()}
    terms = [weights[name] * loss / counts[name].to(loss.device) for name, loss in loss_sums.items()]
    return torch.stack(terms).sum()


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Sum the divergence of a student from its teacher, KL(teacher || student), over targets.

    Both are softened by the temperature, and the sum is multiplied by its square, so that gradients keep their size.

    Args:
        student (`torch.Tensor` of shape `(N, V)`): Logits of the decoder that reads memories.
        teacher (`torch.Tensor` of shape `(N, V)`): Logits of the decoder that reads the text, without gradient.
        temperature (`float`): Above 0; 1 compares the distributions as they are.

    Returns:
        `torch.Tensor` of shape `()`: Nats, in float32.

    Source: Hinton et al. 2015, arXiv 1503.02531.

    >>> even, sure = torch.zeros(1, 2), torch.tensor([[0.0, 3.0]]).log()
    >>> round(distillation_loss(even, even).item(), 4)
    0.0
    >>> round(distillation_loss(even, sure.clamp(min=-50)).item(), 4)  # log 2 nats, for a teacher that is sure
    0.6931
    """
    log_student = torch.log_softmax(student.float() / temperature, -1)
    log_teacher = torch.log_softmax(teacher.detach().float() / temperature, -1)
    divergence = torch.nn.functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return divergence * temperature**2


def states_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum the squared distance of a student's states from its teacher's, in units of the teacher's squared length.

    Args:
        student (`torch.Tensor` of shape `(N, D)`): States of one layer of the decoder that reads memories.
        teacher (`torch.Tensor` of shape `(N, D)`): The same of the decoder that reads the text, without gradient.

    Returns:
        `torch.Tensor` of shape `()`: In float32; 0 for equal states, N for states of zeros.

    >>> states = torch.tensor([[3.0, 4.0]])
    >>> states_loss(states, states).item(), states_loss(0 * states, states).item()
    (0.0, 1.0)
    """
    teacher = teacher.detach().float()
    return ((student.float() - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)).sum()


def next_tokens(tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return for each column of rows `(B, n)`, padded on the right, the token of the next; -100 where there is none.

    >>> next_tokens(torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]])).tolist()
    [[6, -100, -100]]
    """
    following = present_tokens(tokens, attention_mask)[:, 1:]
    return torch.cat([following, torch.full_like(tokens[:, :1], IGNORED)], 1)


def present_tokens(tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the tokens of rows `(B, n)`, -100 where the mask says padding.

    >>> present_tokens(torch.tensor([[5, 0]]), torch.tensor([[1, 0]])).tolist()
    [[5, -100]]
    """
    return tokens.masked_fill(attention_mask == 0, IGNORED)


def _copy_parts(objective: str, tokens: torch.Tensor, mask: torch.Tensor, spec: BatchSpec) -> tuple[Columns, Columns]:
    """Return source and text of a copy objective."""
    ids, marker = spec.special_tokens, spec.marker
    nothing = torch.full_like(tokens, IGNORED)
    source = Columns(tokens, nothing, mask)
    blank = ids.require("blank", "blank_copy") if objective == "blank_copy" else None
    if marker == "token":
        if blank is not None:
            return source, blank_copy(tokens, mask, blank)
        return source, copy(tokens, mask, ids.require("copy", "copy"))
    if not spec.mixed_with_causal:
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        last = columns == mask.sum(1, keepdim=True) - 1  # (B, H)
        source = source._replace(targets=torch.where(last, tokens[:, :1], nothing))
    text = causal(tokens, mask) if blank is None else markerless_blank_copy(tokens, mask, blank)
    return source, text


def _split_causal(
    tokens: torch.Tensor, mask: torch.Tensor, spec: BatchSpec, *, split: bool
) -> tuple[Columns, Columns]:
    """Return the windows that become a context, none without `split`, and the text after them."""
    window_length, source_length = spec.window_length, spec.source_length
    if not split:
        nothing = tokens[:, :0]
        return Columns(nothing, nothing, mask[:, :0]), causal(tokens, mask)
    longest = (tokens.shape[1] - 1) // window_length * window_length
    if longest == 0:
        raise ValueError(
            f"rows have {tokens.shape[1]} tokens, but causal in the slots layout takes more than one window of "
            f"{window_length}: the first windows are the context. Give longer rows or use layout='self'."
        )
    limit = longest if source_length is None else source_length
    if not 0 < limit <= longest or limit % window_length:
        raise ValueError(
            f"source_length is {source_length}, but rows of {tokens.shape[1]} tokens take a source of whole windows "
            f"of {window_length}, {window_length} to {longest} tokens. Give such a length or leave it out."
        )
    counts = ((mask.sum(1) - 1) // window_length * window_length).clamp(max=limit)  # (B,)
    is_source = (torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]).to(mask)
    source = Columns(tokens[:, :limit], torch.full_like(tokens[:, :limit], IGNORED), is_source[:, :limit])
    rest = mask * (1 - is_source)
    text, text_mask = _pack_left(rest, tokens, rest)
    return source, causal(text, text_mask)


def _whole_windows(
    objective: str, tokens: torch.Tensor, mask: torch.Tensor, window_length: int, source_length: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut rows to their source and check that it is whole windows in every row."""
    length = tokens.shape[1] if source_length is None else source_length
    if not 0 < length <= tokens.shape[1]:
        raise ValueError(
            f"source_length is {source_length}, but rows have {tokens.shape[1]} tokens. Give 1 to {tokens.shape[1]}, "
            f"a multiple of {window_length}."
        )
    tokens, mask = tokens[:, :length], mask[:, :length]
    counts = mask.sum(1)
    wrong = counts % window_length != 0
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"row {row} has a source of {int(counts[row])} tokens, but {objective} takes a whole number of windows of "
            f"{window_length}. Cut rows to a multiple of {window_length}, or give such a source_length."
        )
    length -= length % window_length  # what is cut off is padding in every row
    return tokens[:, :length], mask[:, :length]


def _with_end(tokens: torch.Tensor, mask: torch.Tensor, eos_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the end token after rows `(B, H)` that have room for it."""
    is_end = torch.arange(tokens.shape[1], device=tokens.device) == mask.sum(1, keepdim=True)  # (B, H)
    return tokens.masked_fill(is_end, eos_token_id), mask | is_end


def _whole_chunks(source: Columns, chunk_length: int, pad_token_id: int) -> Columns:
    """Pad sources `(B, H)` on the right to whole chunks."""
    missing = -source.input_ids.shape[1] % chunk_length
    fillers = (pad_token_id, IGNORED, 0)
    padded = (
        torch.nn.functional.pad(part, (0, missing), value=one) for part, one in zip(source, fillers, strict=True)
    )
    return Columns(*padded)


def _slot_columns(context_mask: torch.Tensor, memories_per_chunk: int, memory_token_id: int) -> Columns:
    """Return K slots for each present chunk of `(B, C, L)`."""
    present = context_mask.any(2).long().repeat_interleave(memories_per_chunk, 1)  # (B, C * K)
    return Columns(torch.full_like(present, memory_token_id), torch.full_like(present, IGNORED), present)


def _batch(parts: list[Columns], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Join parts side by side, move padding to the right and drop columns that no row needs."""
    joined = Columns(*(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)))
    packed = _pack_left(joined.attention_mask, *joined)
    width = int(joined.attention_mask.sum(1).max())
    joined = Columns(*(tensor[:, :width] for tensor in packed))
    padding = joined.attention_mask == 0
    return {
        "input_ids": joined.input_ids.masked_fill(padding, pad_token_id),
        "attention_mask": joined.attention_mask,
        "shift_labels": joined.targets.masked_fill(padding, IGNORED),
    }


def _pack_left(mask: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Move what the mask `(B, T)` keeps to the front of each row, in order; the rest follows."""
    if bool(mask.all()):
        return tensors
    order = torch.argsort(mask, dim=1, descending=True, stable=True)
    return tuple(tensor.gather(1, order) for tensor in tensors)


def _check_options(objective: str, spec: BatchSpec) -> None:
    choices = {
        "objective": (objective, OBJECTIVES),
        "taught": (spec.taught, TAUGHT),
        "layout": (spec.layout, LAYOUTS),
        "marker": (spec.marker, MARKERS),
    }
    for name, (given, known) in choices.items():
        if given not in known:
            raise ValueError(f"{name} {given!r} is unknown; known: {', '.join(known)}.")
    window_length, chunk_length, memories_per_chunk = spec.window_length, spec.chunk_length, spec.memories_per_chunk
    if min(spec.recall_prompt, spec.recall_length) < 1:
        raise ValueError(
            f"recall_prompt is {spec.recall_prompt} and recall_length {spec.recall_length}; both are counts of 1 or "
            "more."
        )
    if min(window_length, chunk_length, memories_per_chunk) < 1:
        raise ValueError(
            f"window_length is {window_length}, chunk_length {chunk_length}, memories_per_chunk {memories_per_chunk}; "
            "all are counts of 1 or more."
        )
    if window_length % chunk_length:
        raise ValueError(
            f"window_length {window_length} is no multiple of chunk_length {chunk_length}. Choose a window of whole "
            "chunks."
        )


def _check_context(objective: str, spec: BatchSpec, context: ReadyContext | None, end: bool) -> None:
    """Refuse what does not go together."""
    if objective == "distillation" and spec.layout != "slots":
        raise ValueError("distillation compares memories with the full text; it needs layout='slots'.")
    has_tokens = context is not None and context.tokens is not None
    if has_tokens != (objective == "distillation" and context is not None):
        raise ValueError(
            "ReadyContext.tokens are the ready context as distillation's teacher reads it; give them for "
            "distillation, and not otherwise."
        )
    if context is not None and (spec.layout != "slots" or objective == "reconstruction"):
        raise ValueError(
            f"a ready context was given for {objective} in the layout {spec.layout!r}; only the slots layout of "
            "causal and the copies has a context. Leave it out, or use layout='slots'."
        )
    if end and (spec.layout != "slots" or objective not in ("copy", "blank_copy") or spec.marker == "none"):
        raise ValueError(
            f"end=True was given for {objective} in the layout {spec.layout!r} with marker {spec.marker!r}; only "
            "copies with a marker in the slots layout may end anywhere."
        )


def _check_given(asked: str, num_rows: int, starts: torch.Tensor | None, turns: Turns | None) -> None:
    """Refuse what an objective does not take, and its absence where it does."""
    for name, given, owner in (("starts", starts, "recall"), ("turns", turns, "qa")):
        if (given is not None) != (asked == owner):
            raise ValueError(
                f"{name} {'were given' if given is not None else 'are missing'} for {asked}; give {name} for "
                f"{owner}, and not otherwise."
            )
    if starts is not None and (starts.shape != (num_rows,) or bool((starts < 0).any())):
        raise ValueError(
            f"starts are {starts.tolist()}; expected {num_rows} places in the rows' sources, each 0 or more."
        )
    if turns is not None and not (
        turns.input_ids.shape == turns.attention_mask.shape == turns.answer_mask.shape
        and len(turns.input_ids) == num_rows
    ):
        shapes = [tuple(part.shape) for part in (turns.input_ids, turns.attention_mask, turns.answer_mask)]
        raise ValueError(f"turns have the shapes {shapes}; expected three equal ones with {num_rows} rows.")


def _check_rows(objective: str, tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Check rows and return their mask as integers."""
    if tokens.dim() != 2 or 0 in tokens.shape or tokens.dtype != torch.long:
        raise ValueError(
            f"tokens is {tokens.dtype} of shape {tuple(tokens.shape)}; expected torch.int64 of shape (rows, tokens), "
            "neither of them 0."
        )
    if attention_mask is None:
        return torch.ones_like(tokens)
    if attention_mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but tokens has {tuple(tokens.shape)}. Give one "
            "mask value for each token."
        )
    mask = attention_mask.bool()
    if not mask.any(1).all():
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"row {row} is padding only, so {objective} has nothing to learn from. Drop the row.")
    return mask.long()


def _ready_chunks(context: ReadyContext, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Check a ready context and return it with its mask as integers."""
    ids, mask = context.input_ids, context.attention_mask
    if ids.dim() != 3 or 0 in ids.shape or len(ids) != num_rows:
        raise ValueError(
            f"context.input_ids has shape {tuple(ids.shape)}; expected ({num_rows}, chunks, tokens), one row for each "
            "row of text."
        )
    if mask is None:
        return ids, torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ValueError(
            f"context.attention_mask has shape {tuple(mask.shape)}, but context.input_ids has {tuple(ids.shape)}. "
            "Give one mask value for each token."
        )
    return ids, mask.bool().long()
