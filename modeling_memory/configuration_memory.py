"""Configuration of the memory encoder-decoder."""

import math
import re
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_checks import (
    POOLINGS,
    SHORT_CHUNKS,
    Fields,
    Rules,
    at_least,
    build_child_config,
    check_children,
    check_dtype,
    check_fields,
    check_rules,
    encoder_limit,
    is_bool,
    is_int,
    is_number,
    one_of,
    smallest_attention_window,
)

PARTS = ("encoder", "decoder")
PROJECTOR_TYPES = ("identity", "linear", "mlp", "bottleneck")
PROJECTOR_STARTS = ("random", "identity_on_last")
MEMORY_POSITIONS = ("contiguous", "fixed", "spread", "source")
ABSENT_MEMORIES = ("mask", "ones", "zeros")
MEMORY_POLICIES = ("error", "drop_oldest")
FORMAT_VERSION = 1
AUTO_MAP = {
    "AutoConfig": "configuration_memory.MemoryEncoderDecoderConfig",
    "AutoModel": "modeling_memory.MemoryEncoderDecoderModel",
    "AutoModelForCausalLM": "modeling_memory.MemoryEncoderDecoderForCausalLM",
    "AutoProcessor": "processing_memory.MemoryProcessor",
}
"""Where the Auto classes find what a saved folder holds."""
BASE_ID = re.compile(r"(package:\w+|[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)")
"""Where a base may come from by what a config says: a Hub id or an installed package, no place of a machine."""


def allot_memories(num_memories: int, num_chunks: int, memories_per_chunk: int) -> list[int]:
    """Spread a budget over the chunks of a context, as evenly as whole vectors go.

    Args:
        num_memories (`int`): Vectors in all (N).
        num_chunks (`int`): Chunks (C).
        memories_per_chunk (`int`): Most vectors of a chunk (K), what the model was trained for.

    Returns:
        `list` of `int`: Vectors of each chunk; they add up to N.

    Raises:
        ValueError: If N is less than one for each chunk or more than K for each.

    >>> allot_memories(7, 3, 4)
    [2, 2, 3]
    """
    if isinstance(num_memories, bool) or not isinstance(num_memories, int):
        raise ValueError(f"`num_memories` is {num_memories!r}; expected a whole number of memories.")
    if not num_chunks <= num_memories <= num_chunks * memories_per_chunk:
        raise ValueError(
            f"A budget of {num_memories} memories was asked for a context of {num_chunks} chunks; expected "
            f"{num_chunks} to {num_chunks * memories_per_chunk}: one for each chunk at least, and at most the "
            f"{memories_per_chunk} that the model was made for. Change the budget, shorten the context, or use a "
            "model with longer chunks or more memories per chunk."
        )
    # Evenly along the text, rather than to the first chunks: nobody knows where it says what.
    borders = [i * num_memories // num_chunks for i in range(num_chunks + 1)]
    return [end - start for start, end in zip(borders, borders[1:], strict=False)]


class MemoryEncoderDecoderConfig(PreTrainedConfig):
    r"""Architecture of a memory encoder-decoder: an encoder, a projector, a decoder, and how text becomes memories.

    A *chunk* of `chunk_length` tokens becomes `memories_per_chunk` vectors; a *window* of `window_length` tokens is
    what the decoder reads as text. A full window is compressed into `window_length / chunk_length` chunks.

    Args:
        encoder (`PreTrainedConfig` or `dict`, *optional*):
            Config of the encoder body, any model type. Defaults to a Llama body.
        decoder (`PreTrainedConfig` or `dict`, *optional*):
            Config of the decoder, any causal LM with an attention cache. Defaults to Llama.
        chunk_length (`int`): Text tokens per chunk. An encoder's own special tokens are added beside them.
        window_length (`int`, *optional*): Tokens the decoder reads as text; a multiple of `chunk_length` and by
            default equal to it.
        memories_per_chunk (`int`): Vectors per chunk (K).
        pooling (`str`): How the encoder's states become K vectors: `"last"`, `"mean"` or `"first"` of each of K
            groups, `"queries"` (K learned queries), `"pooled_queries"` (the groups' means ask all tokens), or
            `"concat"` (the states of a group side by side, all of which the projector reads).
        max_group (`int`, *optional*): Tokens of the largest group that `"concat"` has places for. Default: those of a
            full chunk, chunk_length / K. More where budgets are to be asked for: with chunks of 16 and K = 4, 16
            places serve budgets of 4, 2 and 1 through one projector. Special tokens of the encoder count.
        lookback (`int`): Tokens of the chunk before a group whose states `"concat"` lays before its own. With 1 a
            memory also tells what came before its first token.
        encoder_bos_token_id (`int`, *optional*): Token that stands before every chunk while the encoder reads it, and
            has no part in a memory but through `lookback`. A pretrained Llama writes the same huge state at whatever
            it reads first, an attention sink, so that without this token each chunk loses its first one.
        encoder_layers (`int`, *optional*): How many of its first layers the encoder was cut to when it was joined; 0
            leaves its token table. Default: all.
        projector_type (`str`): `"identity"`, `"linear"` (the paper's), `"mlp"` (RMSNorm, linear, GELU, linear) or
            `"bottleneck"` (down, noise, up, linear).
        projector_hidden_size (`int`, *optional*): Inner width of `"mlp"` (default: decoder width) and
            `"bottleneck"` (default: a quarter of the encoder width).
        projector_norm (`bool`, *optional*): RMSNorm before the projector. Default: only for `"mlp"`.
        projector_start (`str`): What a fresh `"linear"` projector is: `"random"`, or `"identity_on_last"`: the
            identity on the state of a group's last token, and small random rotations of the others. Needs equal
            widths.
        projector_noise (`float`): Half-width of the uniform noise added inside a `"bottleneck"` while training.
        memory_token_id (`int`, *optional*): Id of a memory slot in `input_ids`. It need not be a row of the token
            tables.
        copy_token_id (`int`, *optional*): Id of the marker that asks for a copy; a real row of both token tables.
        blank_token_id (`int`, *optional*): Id of the blank of the blank-copy objective; a real row likewise.
        window_positions (`bool`): Whether tokens after memories are given, from the text's first COPY or BLANK on,
            their place in the window, with spread memories in its chunk, by a learned vector added to their embedding.
            With rotary positions alone a decoder takes several times longer to learn which part of a memory to write
            where. Other text is as the decoder knows it.
        memory_positions (`str`): `"contiguous"`: text follows its memories directly. `"fixed"`: text starts after
            room for `max_memories`, the paper's layout. `"spread"`: likewise, and each memory takes as many positions
            as it stands for tokens, L / K. In a copy of a context in slots, the memory that holds a token is then
            always as far back, however many memories there are. Memories are counted, so budgets, and windows that are
            compressed meanwhile, do not keep that distance. `"source"`: a memory stands where the last token of its
            group stood and takes as many positions as the group has tokens, special tokens of the encoder among them,
            so that text counts as in the full text. A decoder that knows its positions reads memories best there.
        absent_memories (`str`): `"mask"`, or with fixed or spread positions `"ones"` or `"zeros"`, the paper's
            constant fillers.
        max_memories (`int`, *optional*): Most memory vectors a text may need. Default: what the decoder's positions
            and attention windows leave beside one window; required by fixed and spread positions.
        memory_policy (`str`): What happens when a text needs more memories than `max_memories` or the decoder's
            positions allow: `"error"`, or `"drop_oldest"`: the oldest make room. Those of a context in slots stay.
        self_memory (`bool`): Whether the full windows of plain text longer than a window become memories. Needs one
            tokenizer for encoder and decoder.
        freeze_encoder (`bool`): Encoder in `eval()` without gradients, always.
        encoder_trained_from (`int`, *optional*): First layer of a frozen encoder that trains all the same, with all
            after it; token table and the layers before stay frozen.
        freeze_decoder (`bool`): Decoder in `eval()`, its parameters without gradients.
        initializer_range (`float`): Root mean square of a fresh projector's outputs for inputs of unit scale.
        adapters (`dict`, *optional*): Low-rank adapters by name: `parts` and fields of peft's `LoraConfig`. See
            [`MemoryEncoderDecoderModel.add_adapters`].
        short_chunks (`str`): How the encoder reads a chunk that is not full: `"pad"`: as it is; `"repeat"`: its tokens
            again and again until it is full, for encoders that give back whole chunks best; `"end"`: with end tokens
            after it, which a model must have been trained on.
        references (`dict`, *optional*): Of a folder saved by reference: where encoder and decoder are found, and their
            hashes.
        format_version (`int`): Version of the saved layout.
        max_position_embeddings (`int`, *optional*): Tokens that tools take for the longest text; at most what the
            model surely reads, which is the default. `None`: a text may have any length, so a tool that needs a
            number, as evaluation harnesses do, must be given one.

    Raises:
        ValueError: If fields do not fit each other; the message names both values and the remedy.

    Source: Badger 2026, arXiv 2602.13466, chunked memory model (fixed and variable positions, constant fillers).
    """

    model_type = "memory_encoder_decoder"
    sub_configs = {"encoder": AutoConfig, "decoder": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "memory_embeds", "memory_mask"]

    def __init__(
        self,
        encoder: Any = None,
        decoder: Any = None,
        chunk_length: int = 16,
        window_length: int | None = None,
        memories_per_chunk: int = 1,
        pooling: str = "last",
        projector_type: str = "linear",
        projector_hidden_size: int | None = None,
        projector_norm: bool | None = None,
        projector_noise: float = 0.0,
        projector_start: str = "random",
        max_group: int | None = None,
        lookback: int = 0,
        encoder_bos_token_id: int | None = None,
        encoder_layers: int | None = None,
        memory_token_id: int | None = None,
        copy_token_id: int | None = None,
        blank_token_id: int | None = None,
        window_positions: bool = False,
        memory_positions: str = "contiguous",
        absent_memories: str = "mask",
        max_memories: int | None = None,
        memory_policy: str = "error",
        self_memory: bool = True,
        freeze_encoder: bool = True,
        freeze_decoder: bool = False,
        encoder_trained_from: int | None = None,
        initializer_range: float = 0.02,
        short_chunks: str = "pad",
        adapters: dict[str, dict[str, Any]] | None = None,
        references: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        max_position_embeddings: int | None = None,
        **kwargs: Any,
    ):
        self.encoder, self.decoder = build_child_config(encoder), build_child_config(decoder)
        self.chunk_length, self.memories_per_chunk = chunk_length, memories_per_chunk
        self.window_length = chunk_length if window_length is None else window_length
        self.pooling = pooling
        self.projector_type, self.projector_hidden_size = projector_type, projector_hidden_size
        # States of inner layers have no scale of their own, and a GELU works at one scale only.
        self.projector_norm = projector_type == "mlp" if projector_norm is None else projector_norm
        self.projector_noise, self.projector_start = projector_noise, projector_start
        if max_group is None and pooling == "concat" and at_least(1)(chunk_length) and at_least(1)(memories_per_chunk):
            max_group = -(-chunk_length // memories_per_chunk)
        self.max_group, self.lookback, self.encoder_layers = max_group, lookback, encoder_layers
        self.encoder_bos_token_id = encoder_bos_token_id
        self.memory_token_id, self.copy_token_id, self.blank_token_id = memory_token_id, copy_token_id, blank_token_id
        self.memory_positions, self.absent_memories = memory_positions, absent_memories
        self.max_memories, self.memory_policy = max_memories, memory_policy
        self.self_memory, self.window_positions = self_memory, window_positions
        self.freeze_encoder, self.freeze_decoder = freeze_encoder, freeze_decoder
        self.encoder_trained_from, self.initializer_range = encoder_trained_from, initializer_range
        self.short_chunks = short_chunks
        self.adapters = {} if adapters is None else adapters
        self.references = {} if references is None else references
        self.format_version = format_version
        # `generate` looks for them on the model's own config.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.decoder, name, None)
        # Tied tables, if any, are tied inside the decoder, which declares them itself.
        kwargs["tie_word_embeddings"] = False
        check_dtype(kwargs)
        super().__init__(**kwargs)
        # Also on loading: a config that was edited by hand is as wrong as one that was given.
        self._validate()
        self.max_position_embeddings = max_position_embeddings

    @property
    def memories_per_window(self) -> int:
        """Memory vectors that a full window becomes."""
        return self.window_length // self.chunk_length * self.memories_per_chunk

    @property
    def memory_span(self) -> int:
        """Positions from one memory to the next; of `"source"` those of a full group, rounded up."""
        # Elsewhere a memory takes the place of one token, whatever it stands for.
        sized = self.memory_positions in ("spread", "source")
        return -(-self.chunk_length // self.memories_per_chunk) if sized else 1

    @property
    def num_places(self) -> int:
        """Places that `window_positions` tells apart: of a window, or of a chunk where positions tell the chunk."""
        return self.chunk_length if self.memory_positions in ("spread", "source") else self.window_length

    @property
    def text_start(self) -> int | None:
        """Position at which text starts, whatever stands before it; `None`: after its memories, however many."""
        if self.memory_positions in ("contiguous", "source") or self.max_memories is None:
            return None
        return self.max_memories * self.memory_span

    @property
    def least_memories(self) -> int:
        """Fewest memories that a full chunk may be asked for: with `"concat"` a group must have its places."""
        return 1 if self.max_group is None else -(-self.chunk_length // self.max_group)

    @property
    def memory_capacity(self) -> int | None:
        """Most memory vectors a text may have: `max_memories`, else what the decoder sees beside one window."""
        if self.max_memories is not None:
            return self.max_memories
        view, table = smallest_attention_window(self.decoder), getattr(self.decoder, "max_position_embeddings", None)
        limits = [] if view is None else [view - self.window_length]
        if table is not None and self.memory_positions == "source":  # whole chunks, by the positions of their tokens
            limits.append((table - self.window_length) // self.chunk_length * self.memories_per_chunk)
        elif table is not None:
            limits.append(table - self.window_length)
        return min(limits) if limits else None

    def positions_of(self, num_memories: int) -> int:
        """Return how many positions memories take at most, by the layout of `memory_positions`."""
        if self.memory_positions == "source":
            return -(-num_memories // self.memories_per_chunk) * self.chunk_length
        return num_memories * self.memory_span

    def fits(self, num_memories: int, num_tokens: int) -> bool:
        """Whether the decoder sees so many memories and tokens after them, none of which is compressed.

        Args:
            num_memories (`int`): Vectors before the text.
            num_tokens (`int`): Tokens after them.
        """
        if self.max_memories is not None and num_memories > self.max_memories:
            return False
        table = getattr(self.decoder, "max_position_embeddings", None)
        view = smallest_attention_window(self.decoder)
        start = self.positions_of(num_memories) if self.text_start is None else self.text_start
        return (table is None or start + num_tokens <= table) and (view is None or num_memories + num_tokens <= view)

    @property
    def vocab_size(self) -> int | None:
        """Rows of the decoder's token table (V)."""
        return getattr(self.decoder, "vocab_size", None)

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        if not is_int(value) or value < 1:
            raise ValueError(f"`vocab_size` is {value!r}; expected a positive integer: the rows of the token table.")
        # An encoder that reads the decoder's ids keeps pace, as its table does in `resize_token_embeddings`.
        # Resizing the model's tables sets this field, and nothing else tells the encoder's config.
        if self.self_memory and getattr(self.encoder, "vocab_size", None) == self.decoder.vocab_size:
            self.encoder.vocab_size = value
        self.decoder.vocab_size = value

    @property
    def hidden_size(self) -> int | None:
        """Width of the decoder (D)."""
        return getattr(self.decoder, "hidden_size", None)

    @property
    def max_position_embeddings(self) -> int | None:
        """Text tokens that the model surely reads, or the smaller number that was set; `None`: any number.

        Plain text is bounded by the decoder's own limit without `self_memory`; with it by the windows whose memories
        fit, and one more; and by nothing where the oldest memories make room.
        """
        told, limit = vars(self).get("max_position_embeddings"), self._text_limit()
        return limit if told is None or (limit is not None and limit < told) else told

    @max_position_embeddings.setter
    def max_position_embeddings(self, value: int | None) -> None:
        limit = self._text_limit()
        if value is not None and not (is_int(value) and 0 < value <= (value if limit is None else limit)):
            raise ValueError(
                f"`max_position_embeddings` is {value!r}; expected a positive number of tokens"
                f"{'' if limit is None else f', at most the {limit} that the model surely reads'}, or None."
            )
        self.__dict__["max_position_embeddings"] = value  # where `to_dict` looks

    def _text_limit(self) -> int | None:
        capacity = self.memory_capacity
        if not self.self_memory:
            return self._decoder_room()
        # Where the oldest make room, no text is too long.
        if capacity is None or self.memory_policy != "error":
            return None
        return self.window_length * (1 + capacity // self.memories_per_window)

    def _decoder_room(self) -> int | None:
        """Positions that every layer of the decoder can see."""
        limits = (getattr(self.decoder, "max_position_embeddings", None), smallest_attention_window(self.decoder))
        known = [limit for limit in limits if limit is not None]
        return min(known) if known else None

    def _validate(self) -> None:
        check_fields(self, FIELDS)
        check_children(self, (("encoder", "hidden_size"), ("decoder", "hidden_size"), ("decoder", "vocab_size")))
        check_rules(self, RULES)
        self._check_room()
        self._check_tokens()
        for name, adapter in self.adapters.items():
            parts = adapter.get("parts") if isinstance(adapter, dict) else None
            if not isinstance(parts, (list, tuple)) or not parts or set(parts) - set(PARTS):
                raise ValueError(
                    f"The adapter {name!r} is {adapter!r}; expected a dictionary with `parts`, some of {list(PARTS)}, "
                    "and fields of peft's LoraConfig. `add_adapters` makes it."
                )
        for part, reference in self.references.items():
            _check_reference(part, reference)

    def _check_room(self) -> None:
        table = getattr(self.decoder, "max_position_embeddings", None)
        view = smallest_attention_window(self.decoder)  # of columns, whatever their positions
        columns = (self.max_memories or 0) + self.window_length
        positions = self.positions_of(self.max_memories or 0) + self.window_length
        if (table is not None and positions > table) or (view is not None and columns > view):
            raise ValueError(
                f"`max_memories` ({self.max_memories or 0}, of {self.memory_span} positions each) and `window_length` "
                f"({self.window_length}) need {positions} positions, but the decoder's layers see "
                f"{self._decoder_room()} (max_position_embeddings {table}, attention window {view}). Lower them or "
                "choose a decoder that sees further."
            )
        limit = encoder_limit(self.encoder, self.encoder_bos_token_id)
        if limit is not None and self.chunk_length > limit:
            raise ValueError(
                f"`chunk_length` is {self.chunk_length}, but the encoder takes {limit} tokens. Shorten the chunk."
            )

    def _check_tokens(self) -> None:
        names = ("copy_token_id", "blank_token_id", "memory_token_id")
        special = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        for name, token_id in special.items():
            if name != "memory_token_id" and token_id >= self.vocab_size:
                raise ValueError(
                    f"`{name}` is {token_id}, but the decoder's token table has {self.vocab_size} rows. The marker "
                    "must be a real row: add the token to the tokenizer and resize the tables."
                )
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        taken = {"pad_token_id": [self.pad_token_id], "eos_token_id": eos}
        for name, token_id in special.items():
            rivals = [other for other, ids in taken.items() if token_id in ids]
            # An id with two meanings would be read as the first that is looked for.
            rivals += [other for other, other_id in special.items() if other != name and other_id == token_id]
            if rivals:
                raise ValueError(f"`{name}` and `{rivals[0]}` are both {token_id}; each needs an id of its own.")

    @staticmethod
    def _published_files() -> None:
        """Name every file that a folder of this model runs.

        The library tells versions of published code apart by this file and by those that it finds named here, however
        deep they stand. A file that no import reached would be that of the folder loaded first. Never called, since
        imports run the other way.
        """
        from .configuration_masked_mixer import MaskedMixerConfig  # noqa: F401
        from .modeling_memory import MemoryEncoderDecoderForCausalLM  # noqa: F401
        from .processing_memory import MemoryProcessor  # noqa: F401


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w][\w .+-]*", value) is not None


def _is_inside(value: Any) -> bool:
    """Whether a subfolder stays inside of what it is a subfolder of."""
    return isinstance(value, str) and all(_is_file_name(name) for name in value.split("/"))


def _check_reference(part: str, reference: Any) -> None:
    """Refuse a reference that leads anywhere but to the Hub or an installed package: who loads it did not write it.

    Raises:
        ValueError: Naming the entry.
    """
    if part not in PARTS or not isinstance(reference, dict):
        raise ValueError(
            f"`references` has {part!r}: {reference!r}; expected dictionaries for some of {list(PARTS)}, as saving by "
            "reference writes them."
        )
    optional = (str, type(None))
    checks = {
        "id": lambda value: (
            value is None or (isinstance(value, str) and BASE_ID.fullmatch(value) and ".." not in value)
        ),
        "revision": lambda value: isinstance(value, optional),
        "subfolder": lambda value: value is None or _is_inside(value),
        "dtype": lambda value: value in ("float32", "float16", "bfloat16", "float64"),
        "sha256": lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value),
        "gguf_file": lambda value: value is None or _is_file_name(value),
        "distribution": lambda value: value is None or _is_file_name(value),
        "quantization": lambda value: value is None or isinstance(value, dict),
    }
    required = {"id", "dtype", "sha256"}
    for name, accepts in checks.items():
        if (name in required and name not in reference) or not accepts(reference.get(name)):
            raise ValueError(
                f"The reference to the {part} has `{name}` {reference.get(name)!r}; expected what saving by reference "
                "writes: Hub id or `package:NAME`, a subfolder or file inside of it, dtype and SHA-256. Give the base "
                f"itself by `{part}_base=` to load it from elsewhere."
            )


FIELDS: Fields = (
    ("chunk_length window_length memories_per_chunk", at_least(1), "a positive integer"),
    ("format_version", lambda value: is_int(value) and 1 <= value <= FORMAT_VERSION,
     f"1 to {FORMAT_VERSION}, the layouts that this release reads; a newer one needs a newer release"),
    ("pooling", *one_of((*POOLINGS, "concat"))),
    ("projector_type", *one_of(PROJECTOR_TYPES)),
    ("projector_start", *one_of(PROJECTOR_STARTS)),
    ("memory_positions", *one_of(MEMORY_POSITIONS)),
    ("absent_memories", *one_of(ABSENT_MEMORIES)),
    ("memory_policy", *one_of(MEMORY_POLICIES)),
    ("short_chunks", *one_of(SHORT_CHUNKS)),
    ("projector_norm window_positions self_memory freeze_encoder freeze_decoder", is_bool, "True or False"),
    ("max_memories encoder_layers encoder_trained_from", at_least(0, or_none=True), "an integer from 0 on, or None"),
    ("projector_hidden_size max_group", at_least(1, or_none=True), "an integer from 1 on, or None"),
    ("memory_token_id copy_token_id blank_token_id encoder_bos_token_id", at_least(0, or_none=True),
     "an integer of 0 or more, or None"),
    ("lookback", at_least(0), "an integer from 0 on"),
    ("initializer_range", lambda value: is_number(value) and value >= 0, "a number of 0 or more"),
    ("projector_noise", lambda value: is_number(value) and value >= 0, "a number, 0 or a positive half-width"),
    ("adapters references", lambda value: isinstance(value, dict), "a dictionary"),
)  # fmt: skip


def _reads_the_same_ids(c: Any) -> bool:
    rows = getattr(c.encoder, "vocab_size", None)
    return not c.self_memory or rows is None or rows >= c.vocab_size


RULES: Rules = (
    (
        lambda c: c.window_length % c.chunk_length == 0,
        "`window_length` is {c.window_length} and `chunk_length` is {c.chunk_length}; a window must hold whole "
        "chunks. Choose a window length that is a multiple of the chunk length.",
    ),
    (
        lambda c: c.memories_per_chunk <= c.chunk_length,
        "`memories_per_chunk` is {c.memories_per_chunk}, more than the {c.chunk_length} tokens of a chunk. Lower it "
        "or lengthen the chunk.",
    ),
    (
        lambda c: c.projector_type != "identity" or c.encoder.hidden_size == c.decoder.hidden_size,
        "An identity projector needs equal widths, but the encoder has {c.encoder.hidden_size} and the decoder "
        "{c.decoder.hidden_size}. Use `projector_type='linear'`.",
    ),
    (
        lambda c: c.projector_type != "identity" or c.max_group in (None, 1),
        "An identity projector takes one state, but `pooling='concat'` gives up to {c.max_group} side by side. Use "
        "`projector_type='linear'`.",
    ),
    (
        lambda c: not c.projector_noise or c.projector_type == "bottleneck",
        "`projector_noise` is {c.projector_noise}, but a {c.projector_type!r} projector adds none. Use "
        "`projector_type='bottleneck'` or set it to 0.",
    ),
    (
        lambda c: c.projector_start == "random" or c.projector_type == "linear",
        "`projector_start={c.projector_start!r}` is for `projector_type='linear'`, but the projector is "
        "{c.projector_type!r}. Change one of them.",
    ),
    (
        lambda c: c.projector_start == "random" or c.encoder.hidden_size == c.decoder.hidden_size,
        "`projector_start={c.projector_start!r}` needs equal widths, but the encoder has {c.encoder.hidden_size} and "
        "the decoder {c.decoder.hidden_size}. Use 'random'.",
    ),
    (
        lambda c: c.max_group is None or c.pooling == "concat",
        "`max_group` is {c.max_group}, but only `pooling='concat'` has places for a group, and the pooling is "
        "{c.pooling!r}. Leave it out.",
    ),
    (
        lambda c: c.max_group is None or c.max_group * c.memories_per_chunk >= c.chunk_length,
        "`max_group` is {c.max_group}, but a chunk of {c.chunk_length} tokens in {c.memories_per_chunk} memories has "
        "larger groups. Raise it, to `chunk_length` for budgets down to one memory.",
    ),
    (
        lambda c: not c.lookback or c.pooling == "concat",
        "`lookback` is {c.lookback}, but only `pooling='concat'` has places for earlier tokens, and the pooling is "
        "{c.pooling!r}. Leave it out.",
    ),
    (
        lambda c: (
            c.encoder_bos_token_id is None or c.encoder_bos_token_id < getattr(c.encoder, "vocab_size", math.inf)
        ),
        "`encoder_bos_token_id` is {c.encoder_bos_token_id}, but the encoder's token table has {c.encoder.vocab_size} "
        "rows. Give the id of a token that it knows.",
    ),
    (
        lambda c: c.encoder_trained_from is None or c.freeze_encoder,
        "`encoder_trained_from` is {c.encoder_trained_from}, but with `freeze_encoder=False` the whole encoder "
        "trains. Leave one of them out.",
    ),
    (
        lambda c: c.encoder_layers is None or c.encoder_layers == getattr(c.encoder, "num_hidden_layers", None),
        "`encoder_layers` is {c.encoder_layers}, but the encoder's config says otherwise. Let "
        "`from_encoder_decoder_pretrained` set it.",
    ),
    (
        lambda c: c.absent_memories == "mask" or c.memory_positions in ("fixed", "spread"),
        "`absent_memories={c.absent_memories!r}` fills the room that fixed positions reserve, but `memory_positions` "
        "is {c.memory_positions!r}. Set `memory_positions='fixed'` or `absent_memories='mask'`.",
    ),
    (
        lambda c: c.memory_positions != "spread" or c.chunk_length % c.memories_per_chunk == 0,
        "`memory_positions='spread'` gives each of the {c.memories_per_chunk} memories of a chunk as many positions "
        "as it stands for tokens, but `chunk_length` {c.chunk_length} is no multiple. Choose `memories_per_chunk` to "
        "divide it, or other positions.",
    ),
    (
        lambda c: c.memory_positions not in ("fixed", "spread") or c.max_memories is not None,
        "`memory_positions={c.memory_positions!r}` reserves room for `max_memories`, which is not set. Set it.",
    ),
    (
        lambda c: c.short_chunks != "end" or c.eos_token_id is not None,
        "`short_chunks='end'` fills chunks with the end token, but `eos_token_id` is not set. Set it or use 'repeat'.",
    ),
    (
        _reads_the_same_ids,
        "`self_memory` feeds the decoder's ids to the encoder, but the encoder knows {c.encoder.vocab_size} ids and "
        "the decoder {c.vocab_size}. Use one tokenizer, or set `self_memory=False` and give the context through "
        "`context_input_ids`.",
    ),
    (
        lambda c: not c.window_positions or c.copy_token_id is not None or c.blank_token_id is not None,
        "`window_positions` tells tokens their places from the first marker on, but neither `copy_token_id` nor "
        "`blank_token_id` is set. Set one of them.",
    ),
)
"""What fields must be to each other."""


__all__ = [
    "ABSENT_MEMORIES",
    "AUTO_MAP",
    "MEMORY_POSITIONS",
    "POOLINGS",
    "MemoryEncoderDecoderConfig",
    "allot_memories",
    "build_child_config",
    "encoder_limit",
    "smallest_attention_window",
]
