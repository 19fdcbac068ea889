"""Text as data: token ids in which no control token can stand, and their cut into chunks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Pieces:
    """Token ids of a text, and the characters `(first, one after the last)` that each stands for.

    `spans` is `None` from a tokenizer that does not know the characters.
    """

    ids: list[int]
    spans: Spans | None


@dataclass(frozen=True)
class CutText:
    """A text cut into chunks, in reading order.

    Attributes:
        chunks (`list` of `list` of `int`): Ids for the encoder, its special tokens included.
        num_tokens (`list` of `int`): Text tokens of each chunk, without those special tokens.
        spans (`list` of `(int, int)`, *optional*): First character and the one after the last of each chunk; together
            they are the whole text. `None` from a tokenizer that does not know characters.
        num_unknown (`int`): Text tokens that the tokenizer does not know.
    """

    chunks: list[list[int]]
    num_tokens: list[int]
    spans: Spans | None
    num_unknown: int


def control_tokens(tokenizer: PreTrainedTokenizerBase, extra: Iterable[str] = ()) -> dict[str, int]:
    """Return the tokens that steer a model, which text must never write: token -> id.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        extra (`Iterable[str]`): Tokens that count as such although the tokenizer does not call them special.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = dict.fromkeys([*added, *tokenizer.all_special_tokens, *extra])
    known = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
    return {name: i for name, i in known.items() if i is not None}


def control_ids(tokenizer: PreTrainedTokenizerBase, control: Mapping[str, int]) -> frozenset[int]:
    """Return the ids that no text may become; `control` are the tokens, those of [`control_tokens`]."""
    roles = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.sep_token_id]
    # The unknown token is what unreadable text becomes, so it steers nothing, unless it is the end token as well.
    harmless = {tokenizer.unk_token_id}.difference(roles)
    return frozenset(control.values()) - harmless


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, control: frozenset[int]) -> Pieces:
    """Tokenise a text as data: what it writes is text, also where it writes `<eos>` or `[SEP]`.

    The tokenizer's own truncation and padding settings are put aside, and no special tokens are put around.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Fast or slow.
        text (`str`): The text.
        control (`frozenset[int]`): Ids that must not come out, those of [`control_ids`].
    """
    encoded = _call(tokenizer, text, split_special_tokens=True, return_offsets_mapping=tokenizer.is_fast)
    pieces = Pieces(list(encoded["input_ids"]), list(encoded["offset_mapping"]) if tokenizer.is_fast else None)
    # Tokenizers split only the tokens that they call special, and unigram models find these in their vocabulary again.
    return pieces if control.isdisjoint(pieces.ids) else _spell(tokenizer, text, pieces, control)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> Pieces:
    """Tokenise a text that the application wrote: control tokens in it are control tokens."""
    encoded = _call(
        tokenizer,
        text,
        split_special_tokens=False,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=tokenizer.is_fast,
    )
    return Pieces(list(encoded["input_ids"]), list(encoded["offset_mapping"]) if tokenizer.is_fast else None)


def special_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and after a text, `[CLS]` and `[SEP]` say.

    Raises:
        ValueError: If it does more to a text than to put tokens around it.
    """
    probe = list(_call(tokenizer, "a")["input_ids"])
    framed = list(_call(tokenizer, "a", add_special_tokens=True)["input_ids"])
    starts = [i for i in range(len(framed)) if probe and framed[i : i + len(probe)] == probe]
    if len(framed) > len(probe) and not starts:
        raise ValueError(
            f"The tokenizer turns 'a' into {probe}, and into {framed} with special tokens; expected the same ids with "
            "special tokens before and after them. Give a tokenizer that frames its text."
        )
    return (framed[: starts[0]], framed[starts[0] + len(probe) :]) if starts else ([], [])


def cut_pieces(
    text: str,
    pieces: Pieces,
    chunk_length: int,
    frame: tuple[list[int], list[int]],
    unknown: int | None,
    lengths: Sequence[int] | None = None,
) -> CutText:
    """Cut a tokenised text into chunks of `chunk_length` tokens; the last one may be shorter.

    White space between two chunks counts with the later one, as decoders' tokenizers put it in front of words. A
    character of several tokens counts where its first token stands.

    Args:
        text (`str`): The text.
        pieces ([`Pieces`]): Its tokens, at least one.
        chunk_length (`int`): Tokens per chunk.
        frame (tuple): Special tokens before and after each chunk.
        unknown (`int`, *optional*): Id of the unknown token.
        lengths (`Sequence[int]`, *optional*): Tokens of each chunk, where they are not all equal; together all.
    """
    before, after = frame
    if lengths is None:
        lengths = [min(chunk_length, len(pieces.ids) - i) for i in range(0, len(pieces.ids), chunk_length)]
    ends = list(accumulate(lengths))
    parts = [pieces.ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    spans = None
    if pieces.spans is not None:
        # Tokens of one character overlap, so the end of a chunk is the furthest character so far.
        furthest = list(accumulate((end for _, end in pieces.spans), max))
        borders = [0, *(furthest[end - 1] for end in ends[:-1]), len(text)]
        spans = list(zip(borders, borders[1:], strict=False))
    return CutText(
        [[*before, *part, *after] for part in parts],
        [len(part) for part in parts],
        spans,
        0 if unknown is None else pieces.ids.count(unknown),
    )


def join_pieces(parts: Sequence[Pieces], starts: Sequence[int]) -> Pieces:
    """Put tokenised parts of a text side by side, each of which starts at a character of its own."""
    ids = [token for part in parts for token in part.ids]
    if any(part.spans is None for part in parts):
        return Pieces(ids, None)
    return Pieces(
        ids,
        [(s + start, e + start) for part, start in zip(parts, starts, strict=True) for s, e in part.spans or ()],
    )


def _call(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False, **options: bool) -> dict:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # no tokenizer reads it, and none says so
        raise ValueError(
            f"Character {error.start} of a text is {ascii(text[error.start])}, half of a character, as broken JSON "
            "escapes leave it. Mend the source, or replace it: `text.encode('utf-8', 'replace').decode()`."
        ) from None
    # A tokenizer keeps truncation and padding from the call before, or from its file; nothing of a text may go.
    return tokenizer(
        text, add_special_tokens=add_special_tokens, truncation=False, padding=False, verbose=False, **options
    )


def _spell(tokenizer: PreTrainedTokenizerBase, text: str, pieces: Pieces, control: frozenset[int]) -> Pieces:
    """Write each control token out as the tokens of its characters."""
    ids: list[int] = []
    spans: Spans = []
    for i, token in enumerate(pieces.ids):
        start, end = pieces.spans[i] if pieces.spans is not None else (0, 0)
        if token not in control:
            ids.append(token)
            spans.append((start, end))
            continue
        # What the text wrote may differ from the token's name where the tokenizer normalises.
        written = text[start:end] or tokenizer.convert_ids_to_tokens(token)
        for k, character in enumerate(written):
            letters = _character_ids(tokenizer, character, control)
            ids += letters
            spans += [(min(start + k, end), min(start + k + 1, end))] * len(letters)
    return Pieces(ids, None if pieces.spans is None else spans)


def _character_ids(tokenizer: PreTrainedTokenizerBase, character: str, control: frozenset[int]) -> list[int]:
    # Looked up, an ASCII character gets no word mark in front, as a text of its own gets from some tokenizers. In
    # byte-level vocabularies other characters stand for other bytes.
    if character.isascii() and not character.isspace():
        token = tokenizer.convert_tokens_to_ids(character)
        if token is not None and token != tokenizer.unk_token_id and token not in control:
            return [token]
    ids = _call(tokenizer, character, split_special_tokens=True)["input_ids"]
    return [token for token in ids if token not in control]  # a control token of one character has no other spelling
