"""Chats as prompts: a template's control tokens steer the decoder, and what people typed in the turns is text.

A template is rendered as one string, in which the template's `<|im_end|>` and one that somebody typed look alike. So a
mark, a character that occurs nowhere in the chat, goes into every control token of the turns before rendering, and out
again before tokenising.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .memory_chunking import Pieces, Spans, control_ids, control_tokens, encode_prompt, encode_text, join_pieces
from .memory_slots import Row

TRUSTED_ROLES = ("system", "developer")
PROBE = "probe"


@dataclass(frozen=True)
class RenderedChat:
    """A rendered conversation, the marks in it, and the characters of its answers, counted without marks."""

    marked: str
    mark: str
    answers: Spans

    @property
    def text(self) -> str:
        """The conversation as one string."""
        return self.marked.replace(self.mark, "")


def as_batch(conversation: Any) -> tuple[list[Any], bool]:
    """Return one conversation or several as a list, and whether they were several."""
    # By the first entry: a message is a dictionary, a conversation is a list of them.
    first = conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
    batched = isinstance(first, (list, tuple)) or hasattr(first, "messages")
    return (list(conversation), True) if batched else ([conversation], False)


def choose_template(own: str | dict[str, str] | None, given: str | None, has_tools: bool) -> str:
    """Find the template: the given one, or one of the processor's, by name if it has several.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(own, dict):
        name = given or ("tool_use" if has_tools and "tool_use" in own else "default")
        if name in own:
            return own[name]
        if given is None:
            raise ValueError(f"The chat templates are {sorted(own)}; pass `chat_template=` with one of these names.")
    template = given if given is not None else own
    if not isinstance(template, str):
        raise ValueError(
            "The processor has no chat template, and neither has its tokenizer; a decoder that learnt no chats has "
            "none. Set `processor.chat_template` to the Jinja template that the decoder was trained with (it is saved "
            "with the processor), pass `chat_template=`, or call the processor with `text=`."
        )
    return template


def chat_control_tokens(tokenizer: PreTrainedTokenizerBase, memory_token: str, template: str) -> dict[str, int]:
    """Return what counts as a control token in a chat: token -> id.

    Added tokens that a tokenizer does not call special (`<tool_call>`, say) count if the template writes them.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    written = [name for name in added if name in template and not name.isspace()]
    return control_tokens(tokenizer, [memory_token, *written])


def render_chats(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    chats: list[Any],
    memory_token: str,
    control: Mapping[str, int],
    split_special_tokens: bool | None,
    return_assistant_tokens_mask: bool = False,
    **kwargs: Any,
) -> list[RenderedChat]:
    """Render conversations, with a mark in each control token that stands in a turn which is data.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The decoder's tokenizer, whose special tokens a template may name.
        template (`str`): The template.
        chats (`list`): Conversations.
        memory_token (`str`): What `{"type": "memory"}` in a content becomes.
        control (`Mapping[str, int]`): The control tokens.
        split_special_tokens (`bool`, *optional*): Whether turns are data. Default: all but those of the application
            (`TRUSTED_ROLES`).
        return_assistant_tokens_mask (`bool`): Whether to find the answers.
        kwargs: `tools`, `documents`, `add_generation_prompt`, `continue_final_message` and the template's own.

    Raises:
        ValueError: If a conversation is empty or no list of messages, or a content has parts other than text and
            memory.
    """
    if kwargs.get("continue_final_message") and (kwargs.get("add_generation_prompt") or return_assistant_tokens_mask):
        raise ValueError(
            "`continue_final_message` leaves the last turn open, so it goes neither with `add_generation_prompt`, "
            "which begins another one, nor with `return_assistant_tokens_mask`. Give one of them."
        )
    turns = [_messages(chat, row) for row, chat in enumerate(chats)]
    # A character that nobody wrote: what is found beside it after rendering was put there by this function.
    mark = _free_character([template, *_strings([turns, kwargs])])
    mark_text = _marker(mark, control)

    def is_data(message: Mapping) -> bool:
        return message.get("role") not in TRUSTED_ROLES if split_special_tokens is None else split_special_tokens

    # The template is tried only where the answer matters: rendering takes time.
    has_parts = any(not isinstance(message.get("content", ""), str) for chat in turns for message in chat)
    in_parts = has_parts and _takes_parts(tokenizer, template)
    turns = [
        [_with_memories(mark_text(one) if is_data(one) else one, memory_token, in_parts) for one in chat]
        for chat in turns
    ]
    if split_special_tokens is not False:
        kwargs = {key: mark_text(one) if key in ("tools", "documents") else one for key, one in kwargs.items()}
    rendered, answers = render_jinja_template(
        conversations=turns,
        chat_template=template,
        return_assistant_tokens_mask=return_assistant_tokens_mask,
        **{**tokenizer.special_tokens_map, **kwargs},
    )
    found = answers if return_assistant_tokens_mask else [[]] * len(rendered)
    return [
        RenderedChat(text, mark, [(_unmarked(text, mark, start), _unmarked(text, mark, end)) for start, end in spans])
        for text, spans in zip(rendered, found, strict=True)
    ]


def tokenise_chat(tokenizer: PreTrainedTokenizerBase, chat: RenderedChat, control: Mapping[str, int]) -> Pieces:
    """Tokenise a rendered conversation, marked control tokens as text.

    Without any, this is what the tokenizer makes of the rendered string.
    """
    written = list(re.finditer(f"{_alternatives(control)}(?!{chat.mark})", chat.marked))
    ids = control_ids(tokenizer, control)
    whole = encode_prompt(tokenizer, chat.text, add_special_tokens=False)
    # More control tokens than were written come from text that a normaliser turned into one (full-width letters, say).
    most = sum(control[match[0]] in ids for match in written)
    if chat.mark not in chat.marked and sum(token in ids for token in whole.ids) <= most:
        return whole
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    parts: list[Pieces] = []
    starts: list[int] = []
    last, position, strip_start = 0, 0, False
    for match in [*written, None]:
        text = chat.marked[last : len(chat.marked) if match is None else match.start()].replace(chat.mark, "")
        token = added.get(match[0]) if match is not None else None
        # Some control tokens swallow the white space beside them.
        kept = text.lstrip() if strip_start else text
        start = position + len(text) - len(kept)
        kept = kept.rstrip() if token is not None and token.lstrip else kept
        if kept:
            parts.append(encode_text(tokenizer, kept, ids))
            starts.append(start)
        position += len(text)
        if match is not None:
            parts.append(Pieces([control[match[0]]], [(0, len(match[0]))]))
            starts.append(position)
            position += len(match[0])
            last, strip_start = match.end(), token is not None and token.rstrip
    return join_pieces(parts, starts)


def chat_row(
    tokenizer: PreTrainedTokenizerBase, chat: RenderedChat, control: Mapping[str, int], with_answers: bool
) -> Row:
    """Tokenise a rendered conversation; `with_answers`, with 1 for each token of which an answer holds a part."""
    pieces = tokenise_chat(tokenizer, chat, control)
    if not with_answers:
        return Row(pieces.ids)
    if pieces.spans is None:
        raise ValueError(
            "`return_assistant_tokens_mask` needs the characters that tokens stand for, which a slow tokenizer does "
            "not know. Use a fast one (`AutoTokenizer` loads one by default)."
        )
    return Row(pieces.ids, [int(any(s < end and start < e for start, end in chat.answers)) for s, e in pieces.spans])


def of_one_chat(value: Any, kind: type) -> Any:
    """Let a flat list belong to the one conversation, not to several."""
    flat = isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, kind) for one in value)
    return [list(value)] if flat else value


def _marker(mark: str, control: Iterable[str]) -> Callable[[Any], Any]:
    begin = re.compile(f"(?={_alternatives(control)})(.)", re.DOTALL)

    def mark_text(value: Any) -> Any:
        if isinstance(value, str):
            # After the first character of each token, so that none is whole, also where two of them overlap.
            return begin.sub(rf"\g<1>{mark}", value)
        if isinstance(value, Mapping):
            return {key: mark_text(one) for key, one in value.items()}
        return [mark_text(one) for one in value] if isinstance(value, (list, tuple)) else value

    return mark_text


def _messages(chat: Any, row: int) -> list[dict]:
    chat = getattr(chat, "messages", chat)  # the library's pipelines wrap conversations
    if not isinstance(chat, (list, tuple)) or not chat or not all(isinstance(message, Mapping) for message in chat):
        raise ValueError(
            f"Conversation {row} is {chat!r:.80}; expected a list of messages such as "
            "{'role': 'user', 'content': 'What does it say?'}."
        )
    # A key without a value breaks many templates; a missing one does not.
    return [{key: value for key, value in message.items() if value is not None} for message in chat]


def _with_memories(message: dict, memory_token: str, in_parts: bool) -> dict:
    """Write the memory token where a content holds `{"type": "memory"}`."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    texts = []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        if isinstance(part, Mapping) and part.get("type") == "memory":
            texts.append(memory_token)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise ValueError(
                f"A message holds the part {part!r:.80}; expected {{'type': 'text', 'text': ...}}, or "
                "{'type': 'memory'} where the memories of a context shall stand."
            )
    # Templates of models that read text alone expect one string.
    return {**message, "content": [{"type": "text", "text": text} for text in texts] if in_parts else "".join(texts)}


def _takes_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Try whether a template takes a content that is a list of parts."""
    chat = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
    try:
        texts, _ = render_jinja_template(conversations=[chat], chat_template=template, **tokenizer.special_tokens_map)
    except Exception:  # a template may fail in any way on what it was not written for
        return False
    # A template that wants a string may print the list as Python does.
    return PROBE in texts[0] and not re.search(rf"""['"]text['"]: ['"]{PROBE}""", texts[0])


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(_strings(one) for one in value.values())
    elif isinstance(value, (list, tuple)):
        yield from chain.from_iterable(_strings(one) for one in value)


def _free_character(texts: Iterable[str]) -> str:
    used: set[str] = set().union(*texts)
    # Characters that no text should hold come first, those that mean something nowhere after them.
    return next(char for char in map(chr, chain(range(0xFDD0, 0xFDF0), range(0xF0000, 0x110000))) if char not in used)


def _alternatives(names: Iterable[str]) -> str:
    # The longest first, as a tokenizer finds them.
    return "(?:" + "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) + ")"


def _unmarked(text: str, mark: str, place: int) -> int:
    return place - text.count(mark, 0, place)
