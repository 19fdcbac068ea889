"""Processor of the memory encoder-decoder: chunks for its encoder, slots and tokens for its decoder."""

import os
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

ENCODER_TOKENIZER_FOLDER = "encoder_tokenizer"
SETTINGS = ("chunk_length", "window_length", "memories_per_chunk", "memory_token")


def _pad_value(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id for padding. Padding is always masked, so a tokenizer without a pad token serves as well."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


class MemoryProcessor(ProcessorMixin):
    r"""Turns texts and their contexts into the inputs of a memory encoder-decoder.

    1. A context is tokenised once, by the encoder's tokenizer, and its ids are cut into chunks of
       `chunk_length`; nothing is lost and nothing stands in two chunks. An encoder tokenizer that puts
       special tokens around a text puts them around every chunk, beside the `chunk_length` tokens.
    2. A text is tokenised by the decoder's tokenizer. Where the memory token stands in it, the slots are
       laid, `memories_per_chunk` for each chunk; a text without it gets its slots in front.
    3. Rows are padded to a rectangle. A row with fewer chunks than the others gets absent chunks, all zeros
       in the mask, at the end.

    Without a context it is the decoder's tokenizer with padding: plain text needs no slots.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The decoder's tokenizer. It must know `memory_token`; the id need not be a row of the decoder's
            tables.
        encoder_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The encoder's tokenizer. Leave it out when encoder and decoder share one; then a chunk is exactly
            `chunk_length` ids, without special tokens.
        chunk_length (`int`): Text tokens per chunk, as in the model's config.
        window_length (`int`, *optional*): Tokens that the decoder reads in clear, as in the model's config; a
            multiple of `chunk_length` and by default equal to it.
        memories_per_chunk (`int`): Slots per chunk, as in the model's config.
        memory_token (`str`): The token that marks slots.
        chat_template (`str`, *optional*): Chat template; the decoder tokenizer's by default.

    Raises:
        ValueError: If a length is no positive integer, the window is no multiple of the chunk, or the
            tokenizer does not know the memory token.

    Example:
    ```python
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text="In short:", context=long_text, return_tensors="pt", padding_side="left")
    print(processor.batch_decode(model.generate(**inputs)))
    ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        encoder_tokenizer: PreTrainedTokenizerBase | None = None,
        chunk_length: int = 16,
        window_length: int | None = None,
        memories_per_chunk: int = 1,
        memory_token: str = "<memory>",
        chat_template: str | None = None,
    ) -> None:
        if tokenizer is None:
            raise ValueError("`tokenizer` is missing; give the decoder's tokenizer.")
        if chat_template is None:
            chat_template = getattr(tokenizer, "chat_template", None)
        super().__init__(tokenizer, chat_template=chat_template)
        self.chunk_length = chunk_length
        self.window_length = chunk_length if window_length is None else window_length
        self.memories_per_chunk = memories_per_chunk
        self.memory_token = memory_token
        self._validate_settings()
        self._set_encoder_tokenizer(encoder_tokenizer)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Sub-processors that every instance has; the encoder tokenizer is optional and handled here."""
        return ["tokenizer"]

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call can return."""
        return ["input_ids", "attention_mask", "context_input_ids", "context_attention_mask"]

    @property
    def memory_token_id(self) -> int:
        """Id of a slot in `input_ids`."""
        return self.tokenizer.convert_tokens_to_ids(self.memory_token)

    def _validate_settings(self) -> None:
        for name in ("chunk_length", "window_length", "memories_per_chunk"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; expected a positive integer, the one of the model's config.")
        if self.window_length % self.chunk_length:
            raise ValueError(
                f"`window_length` is {self.window_length} and `chunk_length` is {self.chunk_length}; a window must "
                "hold whole chunks. Use the values of the model's config."
            )
        ids = self._tokenize(self.tokenizer, self.memory_token)
        if ids != [self.memory_token_id] or ids == [self.tokenizer.unk_token_id]:
            raise ValueError(
                f"The tokenizer does not know the memory token {self.memory_token!r} (it reads it as the ids {ids}; "
                "expected one id of its own). Add it first: "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{self.memory_token!r}]}})."
            )

    def _set_encoder_tokenizer(self, encoder_tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Keep the encoder's tokenizer and the special tokens that it puts before and after a text."""
        if encoder_tokenizer is self.tokenizer:
            encoder_tokenizer = None
        if encoder_tokenizer is not None and not isinstance(encoder_tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"`encoder_tokenizer` is a {type(encoder_tokenizer).__name__}; expected a tokenizer of transformers, "
                "or nothing when encoder and decoder share one."
            )
        self.encoder_tokenizer = encoder_tokenizer
        self._chunk_prefix: list[int] = []
        self._chunk_suffix: list[int] = []
        if encoder_tokenizer is None:
            return
        probe = self._tokenize(encoder_tokenizer, "a")
        framed = self._tokenize(encoder_tokenizer, "a", add_special_tokens=True)
        starts = [i for i in range(len(framed)) if probe and framed[i : i + len(probe)] == probe]
        if len(framed) > len(probe) and not starts:
            raise ValueError(
                f"The encoder tokenizer turns 'a' into {probe}, and into {framed} with special tokens; expected the "
                "same ids with special tokens before and after them. Give a tokenizer that frames its text."
            )
        if starts:
            self._chunk_prefix = framed[: starts[0]]
            self._chunk_suffix = framed[starts[0] + len(probe) :]

    @staticmethod
    def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of one whole text: the tokenizer's own truncation and padding settings are put aside."""
        encoded = tokenizer(
            text, add_special_tokens=add_special_tokens, truncation=False, padding=False, verbose=False
        )
        return list(encoded["input_ids"])

    def split_context(self, context: str) -> list[list[int]]:
        """Cut a context into chunks of token ids, special tokens of the encoder tokenizer included.

        Args:
            context (`str`): The text to be remembered.

        Returns:
            `list` of `list` of `int`: Chunks in reading order, each of `chunk_length` text tokens but for the
            last one, which may be shorter.

        Raises:
            ValueError: If the context is empty or, with one tokenizer, contains the memory token.
        """
        if not isinstance(context, str):
            raise ValueError(f"A context is a {type(context).__name__}; expected a string.")
        tokenizer = self.encoder_tokenizer or self.tokenizer
        ids = self._tokenize(tokenizer, context)
        if not ids:
            raise ValueError(
                "A context is empty; expected text of one token or more. Give `None` for a row without a context."
            )
        if self.encoder_tokenizer is None and self.memory_token_id in ids:
            raise ValueError(
                f"A context contains {self.memory_token!r}, which marks the memory slots of a prompt and is no text. "
                "Remove it from the context."
            )
        pieces = [ids[i : i + self.chunk_length] for i in range(0, len(ids), self.chunk_length)]
        return [self._chunk_prefix + piece + self._chunk_suffix for piece in pieces]

    def chunk_spans(self, context: str) -> list[tuple[int, int]]:
        """Say which characters of a context each of its chunks stands for.

        White space between two chunks counts with the later one, as decoders' tokenizers put it in front of words. A
        character of several tokens counts where its first token stands.

        Args:
            context (`str`): The text to be remembered.

        Returns:
            `list` of `(int, int)`: First character and the one behind the last, of each chunk of [`split_context`];
            together they are the whole context, each character once.

        Raises:
            ValueError: As [`split_context`], and if the tokenizer is not a fast one, which knows no characters.
        """
        num_chunks = len(self.split_context(context))
        tokenizer = self.encoder_tokenizer or self.tokenizer
        if not tokenizer.is_fast:
            raise ValueError(
                f"A {type(tokenizer).__name__} does not say which characters its tokens stand for; use a fast "
                f"tokenizer (`AutoTokenizer` loads one by default)."
            )
        offsets = tokenizer(
            context,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            verbose=False,
            return_offsets_mapping=True,
        )["offset_mapping"]
        borders, furthest = [0], 0
        for i, (_, end) in enumerate(offsets, start=1):
            furthest = max(furthest, end)
            if i % self.chunk_length == 0 and len(borders) < num_chunks:
                borders.append(furthest)
        return list(zip(borders, [*borders[1:], len(context)], strict=True))

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        context: str | Sequence[str | None] | None = None,
        num_memories: int | Sequence[int] | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        r"""Prepare one text or a batch, with the contexts they shall remember.

        Args:
            text (`str` or list of `str`, *optional*):
                Prompts for the decoder. The memory token may stand once in each, where its slots shall be;
                otherwise they are put in front. Without a text, only the context is prepared, as
                `encode_memories` takes it.
            context (`str` or list of `str`, *optional*):
                One context for each text; `None` in the list for a row without one.
            num_memories (`int` or list of `int`, *optional*):
                Instead of a context: how many slots each row gets, for memories that are ready
                (`memory_embeds`).
            add_special_tokens (`bool`): Whether the decoder's tokenizer adds its own (a bos, say) to the
                text.
            padding (`bool` or `str`): `True` or `"longest"`: to the longest row. `"max_length"`: to
                `max_length`. `False`: not at all.
            padding_side (`str`, *optional*): `"left"` or `"right"`; the decoder tokenizer's side by default.
                Generation needs `"left"`.
            max_length (`int`, *optional*): Columns for `padding="max_length"`. Nothing is ever cut off.
            return_tensors (`str`, *optional*): `"pt"` for torch tensors; lists otherwise.

        Returns:
            [`BatchFeature`] with, as far as they were asked for,

            - `input_ids`, `attention_mask` of shape `(B, T)`: slots and tokens of the text, for the decoder;
            - `context_input_ids`, `context_attention_mask` of shape `(B, C, L)`: chunks for the encoder,
              padded on the right, `L` being `chunk_length` and the encoder's special tokens. A chunk of zeros
              only in the mask is absent.

        Raises:
            ValueError: If a text or a batch is empty, texts and contexts differ in number, the memory token
                stands twice in a text, or stands there without anything to remember.
        """
        texts = self._as_batch(text, "text")
        contexts = self._as_batch(context, "context", optional=True)
        if texts is None and contexts is None:
            raise ValueError("Neither `text` nor `context` was given; give at least one of them.")
        if context is not None and num_memories is not None:
            raise ValueError(
                "`context` and `num_memories` were both given; give a context to be encoded, or the number of "
                "memories that are ready."
            )
        if texts is not None and contexts is not None and len(texts) != len(contexts):
            raise ValueError(
                f"{len(texts)} texts and {len(contexts)} contexts were given; expected one context for each text. "
                "Repeat a context that several texts share, or encode it once and pass `memory_embeds`."
            )
        data: dict[str, list] = {}
        counts: list[int] | None = None
        if contexts is not None:
            chunks = [[] if one is None else self.split_context(one) for one in contexts]
            counts = [len(row) * self.memories_per_chunk for row in chunks]
            if any(chunks):
                data["context_input_ids"], data["context_attention_mask"] = self._pad_chunks(chunks)
            elif texts is None:
                raise ValueError("Every context is `None` and no text was given; nothing is left to prepare.")
        elif num_memories is not None:
            counts = self._memory_counts(num_memories, texts)
        if texts is not None:
            rows = [
                self._lay_slots(one, None if counts is None else counts[i], add_special_tokens)
                for i, one in enumerate(texts)
            ]
            data = {**self._pad_rows(rows, padding, padding_side, max_length), **data}
        return BatchFeature(data, tensor_type=return_tensors)

    def _as_batch(self, value: Any, name: str, optional: bool = False) -> list | None:
        """A string or a list of strings as a list; `None` stays `None`."""
        if value is None:
            return None
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"`{name}` is a {type(value).__name__}; expected a string or a list of strings.")
        if not value:
            raise ValueError(f"`{name}` is an empty list; expected at least one string.")
        for i, one in enumerate(value):
            if one is None and optional:
                continue
            if not isinstance(one, str):
                raise ValueError(f"`{name}[{i}]` is a {type(one).__name__}; expected a string.")
            if not one:
                remedy = (
                    "Give `None` for a row without a context."
                    if optional
                    else f"For a prompt of memories only, give the memory token {self.memory_token!r} as the text."
                )
                raise ValueError(f"`{name}[{i}]` is empty; expected at least one character. {remedy}")
        return list(value)

    def _memory_counts(self, num_memories: int | Sequence[int], texts: list[str] | None) -> list[int]:
        if texts is None:
            raise ValueError("`num_memories` lays slots into texts, but no `text` was given. Give the prompts.")
        counts = [num_memories] * len(texts) if isinstance(num_memories, int) else list(num_memories)
        if len(counts) != len(texts):
            raise ValueError(
                f"{len(texts)} texts and {len(counts)} numbers of memories were given; expected one number for each "
                "text."
            )
        for i, count in enumerate(counts):
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"`num_memories[{i}]` is {count!r}; expected an integer of 0 or more.")
        return counts

    def _lay_slots(self, text: str, count: int | None, add_special_tokens: bool) -> list[int]:
        """Ids of a text with `count` slots where its memory token stands, or in front; `None`: plain text."""
        slot = self.memory_token_id
        ids = self._tokenize(self.tokenizer, text, add_special_tokens=add_special_tokens)
        marks = [i for i, token_id in enumerate(ids) if token_id == slot]
        if len(marks) > 1:
            raise ValueError(
                f"A text contains {self.memory_token!r} {len(marks)} times; expected it once, where all slots of the "
                "row shall stand, or not at all."
            )
        if count is None:
            if marks:
                raise ValueError(
                    f"A text contains {self.memory_token!r}, but there is nothing to remember. Give `context`, or "
                    "`num_memories` for memories that are ready, or take the token out."
                )
            row = ids
        else:
            start, stop = (marks[0], marks[0] + 1) if marks else (0, 0)
            row = ids[:start] + [slot] * count + ids[stop:]
        if not row:
            raise ValueError(f"The text {text!r} has no tokens and no memories; expected at least one of either.")
        return row

    def _pad_chunks(self, rows: list[list[list[int]]]) -> tuple[list, list]:
        """Chunks of all rows as (B, C, L) ids and mask, padded at the end of a chunk and of a row."""
        pad = _pad_value(self.encoder_tokenizer or self.tokenizer)
        length = len(self._chunk_prefix) + self.chunk_length + len(self._chunk_suffix)
        num_chunks = max(len(row) for row in rows)
        filled = [row + [[]] * (num_chunks - len(row)) for row in rows]
        ids = [[chunk + [pad] * (length - len(chunk)) for chunk in row] for row in filled]
        mask = [[[1] * len(chunk) + [0] * (length - len(chunk)) for chunk in row] for row in filled]
        return ids, mask

    def _pad_rows(
        self, rows: list[list[int]], padding: bool | str, padding_side: str | None, max_length: int | None
    ) -> dict[str, list]:
        """Rows of ids as (B, T) ids and mask."""
        side = self.tokenizer.padding_side if padding_side is None else padding_side
        if side not in ("left", "right"):
            raise ValueError(f"`padding_side` is {side!r}; expected 'left' or 'right'.")
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise ValueError(f"`padding` is {padding!r}; expected True, 'longest', 'max_length' or False.")
        longest = max(len(row) for row in rows)
        length = longest if padding in (True, "longest") else 0
        if padding == "max_length":
            if max_length is None or max_length < longest:
                raise ValueError(
                    f"`padding='max_length'` with `max_length={max_length}`, but the longest row has {longest} "
                    "tokens, slots included; nothing is cut off. Raise `max_length`, or shorten the text or its "
                    "context."
                )
            length = max_length
        pad = _pad_value(self.tokenizer)
        ids, masks = [], []
        for row in rows:
            fill = max(0, length - len(row))
            ones = [1] * len(row)
            ids.append([pad] * fill + row if side == "left" else row + [pad] * fill)
            masks.append([0] * fill + ones if side == "left" else ones + [0] * fill)
        return {"input_ids": ids, "attention_mask": masks}

    def apply_chat_template(
        self,
        conversation: list,
        chat_template: str | None = None,
        context: str | Sequence[str | None] | None = None,
        num_memories: int | Sequence[int] | None = None,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = None,
        padding: bool | str = True,
        padding_side: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation; with `tokenize=True`, lay the slots of its context as a call does.

        The memory token may stand in one message of a conversation; it is kept by the template, and the slots
        are laid there.

        Args:
            conversation (list of `dict`, or list of such lists): Messages with `role` and `content`.
            chat_template (`str`, *optional*): Another template than the processor's own.
            context (`str` or list of `str`, *optional*): One context for each conversation.
            num_memories (`int` or list of `int`, *optional*): Slots of each conversation, for memories that
                are ready.
            tokenize (`bool`): Whether to return model inputs instead of the rendered text.
            return_dict (`bool`): With `tokenize=True`, whether to return all inputs or `input_ids` alone.
            return_tensors (`str`, *optional*): As in a call.
            padding (`bool` or `str`): As in a call.
            padding_side (`str`, *optional*): As in a call.
            kwargs: Further arguments of the template, `add_generation_prompt` for example.
        """
        rendered = self.tokenizer.apply_chat_template(
            conversation, chat_template=chat_template or self.chat_template, tokenize=False, **kwargs
        )
        if not tokenize:
            return rendered
        inputs = self(
            text=rendered,
            context=context,
            num_memories=num_memories,
            add_special_tokens=False,  # the template writes them out
            padding=padding,
            padding_side=padding_side,
            return_tensors=return_tensors,
        )
        return inputs if return_dict else inputs["input_ids"]

    def _without_slots(self, token_ids: Any) -> list:
        """Nested lists of ids without slots, and without ids that are no token (-100 in labels)."""
        if hasattr(token_ids, "tolist"):
            token_ids = token_ids.tolist()
        if isinstance(token_ids, int):
            token_ids = [token_ids]
        if token_ids and not isinstance(token_ids[0], int):
            return [self._without_slots(row) for row in token_ids]
        slot = self.memory_token_id
        return [token_id for token_id in token_ids if token_id >= 0 and token_id != slot]

    def decode(self, token_ids: Any, **kwargs: Any) -> str | list[str]:
        """Text of a row of ids, slots left out; of a batch, a list of texts.

        Args:
            token_ids (`torch.Tensor`, or list of `int`, or list of such): Ids of the decoder, generated ones
                or labels.
            kwargs: Arguments of the tokenizer's `decode`, `skip_special_tokens` for example.
        """
        kept = self._without_slots(token_ids)
        if kept and isinstance(kept[0], list):
            return [self.tokenizer.decode(row, **kwargs) for row in kept]
        return self.tokenizer.decode(kept, **kwargs)

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Texts of a batch of rows of ids, slots left out.

        Args:
            sequences (`torch.Tensor` or list of rows): Ids of the decoder, generated ones or labels.
            kwargs: Arguments of the tokenizer's `decode`, `skip_special_tokens` for example.
        """
        return [self.tokenizer.decode(self._without_slots(row), **kwargs) for row in sequences]

    def to_dict(self) -> dict:
        """The settings as they are saved; tokenizers and the chat template have files of their own."""
        output = {name: getattr(self, name) for name in SETTINGS}
        output["has_encoder_tokenizer"] = self.encoder_tokenizer is not None
        output["processor_class"] = type(self).__name__
        if getattr(self, "auto_map", None):
            output["auto_map"] = dict(self.auto_map)
        return output

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save settings, tokenizer and, in a folder `encoder_tokenizer`, the encoder's if it is another one.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; it is made if it does not exist.
            push_to_hub (`bool`): Whether to upload the processor afterwards.
            kwargs: Arguments of `push_to_hub`; `repo_id` is the name of the folder by default.
        """
        files = super().save_pretrained(save_directory)
        if self.encoder_tokenizer is not None:
            folder = os.path.join(save_directory, ENCODER_TOKENIZER_FOLDER)
            files = [*files, *self.encoder_tokenizer.save_pretrained(folder)]
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, **kwargs)
        return list(files)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "MemoryProcessor":
        """Load a processor from a folder or the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or repository.
            kwargs: Settings to override (`chunk_length` and so on), and the library's own, such as
                `revision`.
        """
        overrides = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        settings, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        settings = {**settings, **overrides}
        hub = {name: value for name, value in kwargs.items() if not name.startswith("_")}
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **hub)
        encoder_tokenizer = None
        if settings.get("has_encoder_tokenizer"):
            inner = os.path.join(hub.pop("subfolder", "") or "", ENCODER_TOKENIZER_FOLDER)
            # The blank config keeps the library from looking for one in that folder, which fails without network.
            encoder_tokenizer = AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, subfolder=inner, config=PreTrainedConfig(), **hub
            )
        own = {name: settings[name] for name in (*SETTINGS, "chat_template") if name in settings}
        return cls(tokenizer, encoder_tokenizer, **own)
