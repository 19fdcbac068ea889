"""Processor of the memory encoder-decoder: chunks for its encoder, slots and tokens for its decoder.

B prompts, C chunks of the prompt that has most, L ids per chunk, T ids of the longest row.
"""

import os
import warnings
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .memory_chat import as_batch, chat_control_tokens, chat_row, choose_template, of_one_chat, render_chats
from .memory_chunking import (
    CutText,
    control_ids,
    control_tokens,
    cut_pieces,
    encode_prompt,
    encode_text,
    special_frame,
)
from .memory_slots import (
    CALL_OPTIONS,
    Row,
    check_call,
    chunk_budgets,
    documents_of,
    pad_chunks,
    pad_rows,
    prompts_of,
    ready_counts,
    resolve_options,
    row_of,
    without_slots,
)

ENCODER_TOKENIZER_FOLDER = "encoder_tokenizer"
SETTINGS = ("chunk_length", "window_length", "memories_per_chunk", "memory_token")


class MemoryTextKwargs(TextKwargs, total=False):  # type: ignore[call-arg]
    """Options for the text of a call: those of the library's tokenizers, and whether the text is data."""

    split_special_tokens: bool | None


class MemoryProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Options of a call in the library's groups; only texts have any."""

    text_kwargs: MemoryTextKwargs


class MemoryProcessor(ProcessorMixin):
    r"""Turns texts and their contexts into the inputs of a memory encoder-decoder.

    1. A context is tokenised once, by the encoder's tokenizer, and its ids are cut into chunks of
       `chunk_length`; nothing is lost and nothing stands in two chunks. An encoder tokenizer that puts
       special tokens around a text puts them around every chunk, beside the `chunk_length` tokens.
    2. A text is tokenised by the decoder's tokenizer. Where the memory token stands in it, the slots are
       laid, `memories_per_chunk` for each chunk; a text without it gets its slots in front. Several
       contexts have a memory token each, in their order.
    3. Rows are padded to a rectangle. A row with fewer chunks than the others gets absent chunks, all zeros
       in the mask, at the end.

    Without a context it is the decoder's tokenizer with padding: plain text needs no slots.

    **A document is data.** `<eos>`, `[SEP]` or `<memory>` written in a context, or typed in a turn of a chat, is text.
    A plain `text` is the application's, so control tokens in it are control tokens; text that somebody else wrote goes
    with `split_special_tokens=True`, or in a list of parts, whose strings are data and whose integers are ids:
    `text=[["They ask: ", question, copy_token_id]]`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The decoder's tokenizer. It must know `memory_token`; the id need not be a row of the decoder's
            tables.
        encoder_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The encoder's tokenizer. Leave it out when encoder and decoder share one; then a chunk is exactly
            `chunk_length` ids, without special tokens.
        chunk_length (`int`): Text tokens per chunk, as in the model's config.
        window_length (`int`, *optional*): Tokens that the decoder reads as full text, as in the model's config; a
            multiple of `chunk_length` and by default equal to it.
        memories_per_chunk (`int`): Slots per chunk, as in the model's config.
        memory_token (`str`): The token that marks slots.
        chat_template (`str` or `dict`, *optional*): Chat template, or several by name; the decoder tokenizer's by
            default.

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

    valid_processor_kwargs = MemoryProcessorKwargs

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        encoder_tokenizer: PreTrainedTokenizerBase | None = None,
        chunk_length: int = 16,
        window_length: int | None = None,
        memories_per_chunk: int = 1,
        memory_token: str = "<memory>",
        chat_template: str | dict[str, str] | None = None,
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
        self._control_ids: dict[bool, tuple[Any, int, frozenset[int]]] = {}
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
        ids = encode_prompt(self.tokenizer, self.memory_token, add_special_tokens=False).ids
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
        # With one tokenizer a chunk is a piece of a text of the decoder, which has no frame inside.
        self._frame = ([], []) if encoder_tokenizer is None else special_frame(encoder_tokenizer)

    @property
    def _reader(self) -> PreTrainedTokenizerBase:
        return self.encoder_tokenizer or self.tokenizer

    def _control(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        own = tokenizer is self.tokenizer
        known, size, control = self._control_ids.get(own, (None, 0, frozenset()))
        if known is not tokenizer or size != len(tokenizer):
            # Some vocabularies have thousands of added tokens, too many to look through for each text.
            control = control_ids(tokenizer, control_tokens(tokenizer, [self.memory_token] if own else []))
            self._control_ids[own] = tokenizer, len(tokenizer), control
        return control

    def cut_context(self, context: str, lengths: Sequence[int] | None = None) -> CutText:
        """Cut a context into chunks; the text is data, whatever it writes.

        Args:
            context (`str`): The text to be remembered.
            lengths (`Sequence[int]`, *optional*): Tokens of each chunk, together all. Default: full chunks and a rest.

        Returns:
            [`CutText`]: Ids, number of text tokens and characters of each chunk, and how many tokens are unknown.

        Raises:
            ValueError: If the context is no string or empty, or the lengths are not those of its chunks.
        """
        if not isinstance(context, str):
            raise ValueError(
                f"A context is a {type(context).__name__}; expected a string, which holds one document. Cut the "
                "documents of a list one by one."
            )
        tokenizer = self._reader
        pieces = encode_text(tokenizer, context, self._control(tokenizer))
        if not pieces.ids:
            raise ValueError(
                "A context is empty; expected text of one token or more. Give `None` for a row without a context."
            )
        if lengths is not None and (
            sum(lengths) != len(pieces.ids) or not all(1 <= n <= self.chunk_length for n in lengths)
        ):
            raise ValueError(
                f"`lengths` are {len(lengths)} numbers, {sum(lengths)} tokens together; expected 1 to "
                f"{self.chunk_length} for each chunk, and together the {len(pieces.ids)} tokens of the context."
            )
        return cut_pieces(context, pieces, self.chunk_length, self._frame, tokenizer.unk_token_id, lengths)

    def split_context(self, context: str) -> list[list[int]]:
        """Cut a context into chunks of token ids, special tokens of the encoder tokenizer included.

        Args:
            context (`str`): The text to be remembered.

        Returns:
            `list` of `list` of `int`: Chunks in reading order, each of `chunk_length` text tokens but for the
            last one, which may be shorter.
        """
        return self.cut_context(context).chunks

    def chunk_spans(self, context: str) -> list[tuple[int, int]]:
        """Say which characters of a context each of its chunks stands for.

        White space between two chunks counts with the later one. A character of several tokens counts where its first
        token stands.

        Args:
            context (`str`): The text to be remembered.

        Returns:
            `list` of `(int, int)`: First character and the one after the last, of each chunk of [`split_context`];
            together they are the whole context, each character once.

        Raises:
            ValueError: As [`cut_context`], and if the tokenizer is not a fast one, which knows no characters.
        """
        spans = self.cut_context(context).spans
        if spans is None:
            raise ValueError(
                f"A {type(self._reader).__name__} does not say which characters its tokens stand for; use a fast "
                "tokenizer (`AutoTokenizer` loads one by default)."
            )
        return spans

    def unknown_share(self, text: str) -> float:
        """Return the share of a context's tokens that the encoder's tokenizer does not know: what is not remembered.

        Args:
            text (`str`): The context.
        """
        cut = self.cut_context(text)
        return cut.num_unknown / sum(cut.num_tokens)

    def text_ids(self, text: str) -> list[int]:
        """Tokenise a text for the decoder as data: nothing that it writes is a control token.

        Args:
            text (`str`): The text.
        """
        return encode_text(self.tokenizer, text, self._control(self.tokenizer)).ids

    def __call__(
        self,
        text: str | Sequence[str | Sequence[str | int]] | None = None,
        context: str | Sequence[str | Sequence[str] | None] | None = None,
        num_memories: int | Sequence[int | Sequence[int]] | None = None,
        context_num_memories: int | Sequence[Sequence[int]] | None = None,
        **kwargs: Unpack[MemoryProcessorKwargs],
    ) -> BatchFeature:
        r"""Prepare one text or a batch, with the contexts they shall remember.

        Args:
            text (`str`, list of `str`, or list of lists of parts, *optional*):
                Prompts for the decoder. The memory token stands in each once for each of its contexts, where their
                slots shall be, or not at all, for slots in front. A list of parts is one prompt: strings that are
                data, and ids (`processor.memory_token_id`, say). Without a text, only the context is prepared, as
                `encode_memories` takes it.
            context (`str`, list of `str`, or list of lists of `str`, *optional*):
                One context for each text, or a list of them; `None` in the list for a row without one.
            num_memories (`int`, list of `int`, or list of lists of `int`, *optional*):
                Instead of a context: how many slots each row gets, or each memory token of each row, for memories
                that are ready (`memory_embeds`).
            context_num_memories (`int` or `(B, C)` lists of `int`, *optional*):
                Memories of each chunk, if fewer than `memories_per_chunk`; slots follow, and the model gets it.
            kwargs: Options, as they are or in `text_kwargs=`:

                - `add_special_tokens` (`bool`, default `True`): Whether the decoder's tokenizer adds its own (a
                  bos, say) to the text.
                - `split_special_tokens` (`bool`): Whether strings are data, in which no control token can stand.
                  Default: those in lists of parts are, other texts are the application's own.
                - `padding` (`bool` or `str`, default `True`): `True` or `"longest"`: to the longest row.
                  `"max_length"`: to `max_length`. `False`: not at all.
                - `padding_side` (`str`): `"left"` or `"right"`; the decoder tokenizer's side by default. Generation
                  needs `"left"`.
                - `max_length` (`int`): Columns for `padding="max_length"`. Nothing is ever cut off.
                - `pad_to_multiple_of` (`int`): Pads rows on, to a multiple of it.
                - `return_tensors` (`str`): `"pt"` for torch tensors; lists otherwise.

        Returns:
            [`BatchFeature`] with, as far as they were asked for,

            - `input_ids`, `attention_mask` of shape `(B, T)`: slots and tokens of the text, for the decoder;
            - `context_input_ids`, `context_attention_mask` of shape `(B, C, L)`: chunks for the encoder, all chunks
              of all contexts of a row in order, padded on the right, `L` being `chunk_length` and the encoder's
              special tokens. A chunk of zeros only in the mask is absent;
            - `context_num_memories` of shape `(B, C)` if it was given.

        Raises:
            ValueError: If a text or a batch is empty, texts and contexts (or contexts and memory tokens of a row)
                differ in number, there is nothing to remember, or an option is unknown or cannot be had.
        """
        options = resolve_options(kwargs)
        prompts = prompts_of(text, self.memory_token)
        control = self._control(self.tokenizer)
        rows = None if prompts is None else [row_of(self.tokenizer, one, control, options) for one in prompts]
        return self._prepare(rows, context, num_memories, context_num_memories, options)

    def _prepare(
        self,
        rows: list[Row] | None,
        context: Any,
        num_memories: Any,
        context_num_memories: Any,
        options: dict[str, Any],
    ) -> BatchFeature:
        """Lay the slots of the contexts into tokenised prompts, and pad both."""
        # Contexts first: how many slots a prompt gets is only known once they are cut.
        documents = documents_of(context)
        check_call(rows, documents, num_memories, context_num_memories)
        data: dict[str, list] = {}
        counts: list[list[int]] | None = None
        if documents is not None:
            cuts = self._cut_all(documents)
            sizes = [[len(cut.chunks) for cut in row] for row in cuts]
            budgets, counts = chunk_budgets(sizes, self.memories_per_chunk, context_num_memories)
            if any(map(sum, sizes)):
                # Several contexts of a row follow each other as one; which slots are whose is a matter of the prompt
                # alone.
                chunks = [[chunk for cut in row for chunk in cut.chunks] for row in cuts]
                data = pad_chunks(chunks, self._reader, sum(map(len, self._frame)) + self.chunk_length)
                if context_num_memories is not None:
                    data["context_num_memories"] = budgets
            elif rows is None:
                raise ValueError("Every context is `None` and no text was given; nothing is left to prepare.")
        elif num_memories is not None:
            counts = ready_counts(num_memories, None if rows is None else len(rows))
        if rows is not None:
            slot, token = self.memory_token_id, self.memory_token
            laid = [row.lay(slot, token, None if counts is None else counts[i], i) for i, row in enumerate(rows)]
            data = {**pad_rows(laid, self.tokenizer, options), **data}
        return BatchFeature(data, tensor_type=options["return_tensors"])

    def _cut_all(self, documents: list[list[str]]) -> list[list[CutText]]:
        """Cut the contexts of all rows, and say so if some of their text cannot be read."""
        cuts: list[list[CutText]] = []
        for i, row in enumerate(documents):
            cuts.append([])
            for j, document in enumerate(row):
                try:
                    # Each document by itself: a chunk that held the end of one and the start of another would be a
                    # memory of neither.
                    cuts[i].append(self.cut_context(document))
                except ValueError as error:
                    raise ValueError(f"`context[{i}]`, document {j}: {error}") from error
        unknown = sum(cut.num_unknown for row in cuts for cut in row)
        if unknown:
            total = sum(sum(cut.num_tokens) for row in cuts for cut in row)
            # No error: a few signs that an encoder lacks are common, and what they lose is a share, not the whole.
            warnings.warn(
                f"{unknown} of {total} tokens of the context ({unknown / total:.0%}) are unknown to the encoder's "
                f"tokenizer: what they say is not remembered. `processor.unknown_share(text)` tells the share of a "
                "text; use an encoder that reads its script.",
                stacklevel=4,
            )
        return cuts

    def apply_chat_template(
        self,
        conversation: list,
        chat_template: str | None = None,
        context: str | Sequence[str | Sequence[str] | None] | None = None,
        num_memories: int | Sequence[int | Sequence[int]] | None = None,
        context_num_memories: int | Sequence[Sequence[int]] | None = None,
        tokenize: bool = False,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation; with `tokenize=True`, lay the slots of its context as a call does.

        What stands in a turn is data: a `<memory>` or `<|im_end|>` that somebody typed is text. The application places
        memories by a part `{"type": "memory"}` in a turn's content, one for each context, in the template, or in its
        own turns (`system`, `developer`), whose control tokens are control tokens; otherwise they stand in front. In
        a rendered string (`tokenize=False`) nobody can tell what was typed from what the template wrote.

        Args:
            conversation (list of `dict`, or list of such lists): Messages with `role` and `content`; a content is a
                string or a list of `{"type": "text", "text": ...}` and `{"type": "memory"}`.
            chat_template (`str`, *optional*): Another template than the processor's own, or the name of one.
            context (`str`, list of `str` or list of lists, *optional*): As in a call; for a single conversation, a
                list of strings is its contexts.
            num_memories (`int`, list of `int` or list of lists, *optional*): As in a call.
            context_num_memories (`int` or lists of `int`, *optional*): As in a call.
            tokenize (`bool`): Whether to return model inputs instead of the rendered text.
            return_dict (`bool`): With `tokenize=True`, whether to return all inputs or `input_ids` alone.
            return_assistant_tokens_mask (`bool`): Whether to add `assistant_masks` `(B, T)`, 1 at tokens that the
                template has between `{% generation %}` and `{% endgeneration %}`; slots are 0.
            processor_kwargs (`dict`, *optional*): Options of a call; they may also stand among `kwargs`.
            kwargs: Options of a call (with `split_special_tokens=True` every turn is data, with `False` none),
                `tools`, `documents`, `add_generation_prompt`, `continue_final_message`, the template's variables.

        Raises:
            ValueError: If there is no chat template, or as a call.
        """
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError("`return_assistant_tokens_mask=True` needs `tokenize=True` and `return_dict=True`.")
        # What is left belongs to the template, whose variables nobody can list.
        named = {name: kwargs.pop(name) for name in list(kwargs) if name in CALL_OPTIONS}
        options = resolve_options({**(processor_kwargs or {}), **named})
        tokenizer, split = self.tokenizer, options["split_special_tokens"]
        own = self.chat_template or getattr(tokenizer, "chat_template", None)
        template = choose_template(own, chat_template, bool(kwargs.get("tools")))
        # A template may write control tokens that the tokenizer does not list as such.
        control = chat_control_tokens(tokenizer, self.memory_token, template)
        chats, batched = as_batch(conversation)
        rendered = render_chats(
            tokenizer, template, chats, self.memory_token, control, split, return_assistant_tokens_mask, **kwargs
        )
        if not tokenize:
            # A rendered string has lost who wrote what, so slots are laid only where ids are made.
            return [chat.text for chat in rendered] if batched else rendered[0].text
        rows = [chat_row(tokenizer, chat, control, return_assistant_tokens_mask) for chat in rendered]
        # One conversation may be given one context or a list of them; a batch is always lists.
        if not batched:
            context, num_memories = of_one_chat(context, str), of_one_chat(num_memories, int)
        inputs = self._prepare(rows, context, num_memories, context_num_memories, options)
        return inputs if return_dict else inputs["input_ids"]

    def decode(self, token_ids: Any, **kwargs: Any) -> str | list[str]:
        """Text of a row of ids, slots left out; of a batch, a list of texts.

        Args:
            token_ids (`torch.Tensor`, or list of `int`, or list of such): Ids of the decoder, generated ones
                or labels.
            kwargs: Arguments of the tokenizer's `decode`, `skip_special_tokens` for example.
        """
        # Before the tokenizer, which fails on ids that it has no token for.
        kept = without_slots(token_ids, self.memory_token_id)
        if kept and isinstance(kept[0], list):
            return [self.tokenizer.decode(row, **kwargs) for row in kept]
        return self.tokenizer.decode(kept, **kwargs)

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Texts of a batch of rows of ids, slots left out.

        Args:
            sequences (`torch.Tensor` or list of rows): Ids of the decoder, generated ones or labels.
            kwargs: Arguments of the tokenizer's `decode`, `skip_special_tokens` for example.
        """
        if isinstance(sequences, str) or not hasattr(sequences, "__iter__"):
            raise ValueError(f"`sequences` is {sequences!r:.80}; expected rows of ids: a tensor, or a list of lists.")
        return [self.tokenizer.decode(without_slots(row, self.memory_token_id), **kwargs) for row in sequences]

    def to_dict(self) -> dict:
        """The settings as they are saved; tokenizers and the chat template have files of their own."""
        # Tokenizers are no settings: their own files hold them, and a copy here could disagree.
        output = {name: getattr(self, name) for name in SETTINGS}
        output["has_encoder_tokenizer"] = self.encoder_tokenizer is not None
        output["processor_class"] = type(self).__name__
        if self._auto_class is not None:
            # Saving writes the entry in any case; written here, a processor equals itself before and after.
            output["auto_map"] = {
                self._auto_class: f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
            }
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
        # Not passed on: the library would upload before the encoder's tokenizer is in the folder.
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
        # Taken out first: what is left goes to the library, which knows nothing of them.
        overrides = {name: kwargs.pop(name) for name in (*SETTINGS, "chat_template") if name in kwargs}
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
