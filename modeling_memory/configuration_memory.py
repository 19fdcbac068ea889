"""Configuration of the memory encoder-decoder."""

import copy
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_masked_mixer import MaskedMixerConfig

POOLINGS = ("last", "mean", "first", "queries", "pooled_queries")
PROJECTOR_TYPES = ("identity", "linear", "mlp", "bottleneck")
MEMORY_POSITIONS = ("contiguous", "fixed", "spread", "source")
ABSENT_MEMORIES = ("mask", "ones", "zeros")
MEMORY_POLICIES = ("error", "drop_oldest")
FORMAT_VERSION = 1
COUNTING_FROM_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "longformer",
    "data2vec-text",
)
AUTO_MAP = {
    "AutoConfig": "configuration_memory.MemoryEncoderDecoderConfig",
    "AutoModel": "modeling_memory.MemoryEncoderDecoderModel",
    "AutoModelForCausalLM": "modeling_memory.MemoryEncoderDecoderForCausalLM",
    "AutoProcessor": "processing_memory.MemoryProcessor",
}
"""Where the Auto classes find what a saved folder holds."""


def build_child_config(child: Any, default_model_type: str = "llama") -> PreTrainedConfig:
    """Turn a sub-config given as a config, a dictionary or `None` into a config object.

    The package's own model types are looked up by name, not through the Auto registry: in a folder loaded with
    `trust_remote_code` the registry holds another copy of the class.

    Args:
        child (`PreTrainedConfig`, `dict` or `None`): The sub-config; a dictionary names its `model_type`.
        default_model_type (`str`): Model type of a dictionary without one, and of `None`.
    """
    if isinstance(child, PreTrainedConfig):
        return copy.deepcopy(child)  # the composite sets fields of its children, which may belong to a live model
    fields = dict(child or {})
    model_type = fields.pop("model_type", default_model_type)
    if model_type == MaskedMixerConfig.model_type:
        return MaskedMixerConfig(**fields)
    return AutoConfig.for_model(model_type, **fields)


def smallest_attention_window(config: PreTrainedConfig) -> int | None:
    """Return how many positions back the shortest-sighted layer of a decoder sees; `None` if all see everything."""
    windows = []
    layer_types = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None)
    slides = layer_types is None or any("sliding" in name for name in layer_types)
    if sliding is not None and slides and getattr(config, "use_sliding_window", True):
        windows.append(sliding)
    chunked = getattr(config, "attention_chunk_size", None)
    if chunked is not None and layer_types is not None and any("chunked" in name for name in layer_types):
        windows.append(chunked)
    return min(windows) if windows else None


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
    borders = [i * num_memories // num_chunks for i in range(num_chunks + 1)]
    return [end - start for start, end in zip(borders, borders[1:], strict=False)]


def encoder_limit(config: PreTrainedConfig) -> int | None:
    """Return how many tokens an encoder takes; RoBERTa and its kin begin to count behind their padding id."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and config.model_type in COUNTING_FROM_PADDING:
        return limit - (config.pad_token_id or 0) - 1
    return limit


class MemoryEncoderDecoderConfig(PreTrainedConfig):
    r"""Architecture of a memory encoder-decoder: an encoder, a projector, a decoder, and how text becomes memories.

    A *chunk* of `chunk_length` tokens becomes `memories_per_chunk` vectors; a *window* of `window_length` tokens is
    what the decoder reads in clear. A full window folds into `window_length / chunk_length` chunks.

    Args:
        encoder (`PreTrainedConfig` or `dict`, *optional*):
            Config of the encoder body, any model type. Defaults to a Llama body.
        decoder (`PreTrainedConfig` or `dict`, *optional*):
            Config of the decoder, any causal LM with an attention cache. Defaults to Llama.
        chunk_length (`int`): Text tokens per chunk. An encoder's own special tokens are added beside them.
        window_length (`int`, *optional*): Tokens the decoder reads in clear; a multiple of `chunk_length` and by
            default equal to it.
        memories_per_chunk (`int`): Vectors per chunk (K).
        pooling (`str`): How the encoder's states become K vectors: `"last"`, `"mean"` or `"first"` of each of K
            groups, `"queries"` (K learned queries) or `"pooled_queries"` (the groups' means ask all tokens).
        projector_type (`str`): `"identity"`, `"linear"` (the paper's), `"mlp"` (RMSNorm, linear, GELU, linear) or
            `"bottleneck"` (down, noise, up, linear).
        projector_hidden_size (`int`, *optional*): Inner width of `"mlp"` (default: decoder width) and
            `"bottleneck"` (default: a quarter of the encoder width).
        projector_norm (`bool`, *optional*): RMSNorm in front of the projector. Default: only for `"mlp"`.
        projector_noise (`float`): Half-width of the uniform noise added inside a `"bottleneck"` while training.
        memory_token_id (`int`, *optional*): Id of a memory slot in `input_ids`. It need not be a row of the token
            tables.
        copy_token_id (`int`, *optional*): Id of the marker that asks for a copy; a real row of both token tables.
        blank_token_id (`int`, *optional*): Id of the blank of the blank-copy objective; a real row likewise.
        window_positions (`bool`): Whether tokens behind memories are told, from the text's first COPY or BLANK on,
            their place in the window, with spread memories in its chunk, by a learned vector added to their embedding.
            With rotary positions alone a decoder takes several times longer to learn which part of a memory to write
            where. Other text is as the decoder knows it.
        memory_positions (`str`): `"contiguous"`: text follows its memories directly. `"fixed"`: text starts after
            room for `max_memories`, the paper's layout. `"spread"`: likewise, and each memory takes as many positions
            as it stands for tokens, L / K. In a copy of a context in slots, the memory that holds a token is then
            always as far back, however many memories there are. Memories are counted, so budgets, merged memories and
            windows that fold meanwhile do not keep that distance.
        absent_memories (`str`): `"mask"`, or with fixed or spread positions `"ones"` or `"zeros"`, the paper's
            constant fillers.
        max_memories (`int`, *optional*): Most memory vectors a text may need. Default: what the decoder's positions
            and attention windows leave beside one window; required by fixed and spread positions.
        memory_policy (`str`): What happens when a text folds into more memories than `max_memories` or the decoder's
            positions allow: `"error"`; `"drop_oldest"`: the oldest make room; `"keep_nearest"`: each window sees the
            memories of the window before it and those most like them (cosine), and all are kept, since the next may
            see others; `"merge"`: the text of old neighbours is read again, into half as many memories. Those of a
            context in slots always stay.
        self_memory (`bool`): Whether plain text longer than a window folds its full windows into memories. Needs one
            tokenizer for encoder and decoder.
        freeze_encoder (`bool`): Encoder in `eval()` without gradients, always.
        encoder_trained_from (`int`, *optional*): First layer of a frozen encoder that trains all the same, with all
            behind it; token table and the layers before stay frozen.
        freeze_decoder (`bool`): Decoder in `eval()`, its parameters without gradients.
        initializer_range (`float`): Root mean square of a fresh projector's outputs for inputs of unit scale.
        adapters (`dict`, *optional*): Low-rank adapters by name: `parts` and fields of peft's `LoraConfig`. See
            [`MemoryEncoderDecoderModel.add_adapters`].
        references (`dict`, *optional*): Of a folder saved by reference: where encoder and decoder are found, and their
            hashes.
        format_version (`int`): Version of the saved layout.

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
        adapters: dict[str, dict[str, Any]] | None = None,
        references: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ):
        self.encoder = build_child_config(encoder)
        self.decoder = build_child_config(decoder)
        self.chunk_length = chunk_length
        self.window_length = chunk_length if window_length is None else window_length
        self.memories_per_chunk = memories_per_chunk
        self.pooling = pooling
        self.projector_type = projector_type
        self.projector_hidden_size = projector_hidden_size
        self.projector_norm = projector_type == "mlp" if projector_norm is None else projector_norm
        self.projector_noise = projector_noise
        self.memory_token_id = memory_token_id
        self.copy_token_id = copy_token_id
        self.blank_token_id = blank_token_id
        self.window_positions = window_positions
        self.memory_positions = memory_positions
        self.absent_memories = absent_memories
        self.max_memories = max_memories
        self.memory_policy = memory_policy
        self.self_memory = self_memory
        self.freeze_encoder = freeze_encoder
        self.freeze_decoder = freeze_decoder
        self.encoder_trained_from = encoder_trained_from
        self.initializer_range = initializer_range
        self.adapters = adapters or {}
        self.references = references or {}
        self.format_version = format_version
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.decoder, name, None)
        # Tied tables, if any, are tied inside the decoder, which declares them itself.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)
        self._validate()

    @property
    def memories_per_window(self) -> int:
        """Memory vectors that a full window folds into."""
        return self.window_length // self.chunk_length * self.memories_per_chunk

    @property
    def memory_span(self) -> int:
        """Positions from one memory to the next."""
        return self.chunk_length // self.memories_per_chunk if self.memory_positions == "spread" else 1

    @property
    def num_places(self) -> int:
        """Places that `window_positions` tells apart: of a window, or of a chunk where positions tell the chunk."""
        return self.chunk_length if self.memory_positions == "spread" else self.window_length

    @property
    def text_start(self) -> int | None:
        """Position at which text starts, whatever stands before it; `None`: right behind its memories."""
        if self.memory_positions in ("contiguous", "source") or self.max_memories is None:
            return None
        return self.max_memories * self.memory_span

    @property
    def memory_capacity(self) -> int | None:
        """Most memory vectors a text may have: `max_memories`, else what the decoder sees beside one window."""
        if self.max_memories is not None:
            return self.max_memories
        room = self._decoder_room()
        return None if room is None else room - self.window_length

    @property
    def mergeable_chunks(self) -> int | None:
        """Most chunks that the memories of one can stand for under `"merge"`, a power of two; `None`: any number."""
        limit = encoder_limit(self.encoder)
        if limit is None:
            return None
        return 2 ** (self.memories_per_chunk * max(1, limit // self.chunk_length)).bit_length() // 2

    def fits(self, num_memories: int, num_tokens: int) -> bool:
        """Whether the decoder sees so many memories and tokens in clear behind them, none of which folds.

        Args:
            num_memories (`int`): Vectors in front.
            num_tokens (`int`): Tokens behind them.
        """
        if self.max_memories is not None and num_memories > self.max_memories:
            return False
        table = getattr(self.decoder, "max_position_embeddings", None)
        view = smallest_attention_window(self.decoder)
        start = num_memories if self.text_start is None else self.text_start
        return (table is None or start + num_tokens <= table) and (view is None or num_memories + num_tokens <= view)

    def memories_within(self, num_bytes: int, bytes_per_value: int = 2) -> int:
        """Return how many memories fit into so many bytes, as stored: D values each.

        Args:
            num_bytes (`int`): Bytes of the budget.
            bytes_per_value (`int`): 2 for bfloat16, 4 for float32, 1 for int8.

        Raises:
            ValueError: If not even one memory fits.
        """
        size = self.decoder.hidden_size * bytes_per_value
        if num_bytes < size:
            raise ValueError(
                f"A budget of {num_bytes} bytes was asked for, but one memory takes {size} (width "
                f"{self.decoder.hidden_size}, {bytes_per_value} bytes a value). Raise it."
            )
        return num_bytes // size

    def memories_at_ratio(self, num_tokens: int, ratio: float) -> int:
        """Return how many memories stand for so many tokens of a context at a ratio of tokens to one memory.

        Args:
            num_tokens (`int`): Text tokens of the context.
            ratio (`float`): Tokens to a memory, at least; 16 of 100 tokens asks for 6 memories.

        Raises:
            ValueError: If the ratio is not positive, or asks for less than one memory.
        """
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio > 0:
            raise ValueError(f"`ratio` is {ratio!r}; expected a number of tokens to one memory, above 0.")
        if num_tokens < ratio:
            raise ValueError(
                f"A ratio of {ratio} tokens to a memory leaves {num_tokens} tokens without a memory. Lower it to "
                f"{num_tokens} or less."
            )
        return int(num_tokens // ratio)

    @property
    def vocab_size(self) -> int | None:
        """Rows of the decoder's token table (V)."""
        return getattr(self.decoder, "vocab_size", None)

    @property
    def hidden_size(self) -> int | None:
        """Width of the decoder (D)."""
        return getattr(self.decoder, "hidden_size", None)

    @property
    def max_position_embeddings(self) -> int | None:
        """Text tokens that the model surely reads: full windows that fit as memories, one in clear; `None`: any."""
        capacity = self.memory_capacity
        if not self.self_memory:
            return self._decoder_room()
        per_memory = {"error": 1, "merge": self.mergeable_chunks}.get(self.memory_policy)
        if capacity is None or per_memory is None:
            return None
        per_window, places = self.window_length // self.chunk_length, capacity // self.memories_per_chunk
        if self.memory_policy == "merge" and places > 1 and per_window.bit_count() > 1:
            places -= 1  # neighbours of unequal size may leave a place partly used
        return self.window_length * (1 + places * per_memory // per_window)

    def _decoder_room(self) -> int | None:
        """Positions that every layer of the decoder can see."""
        limits = (
            getattr(self.decoder, "max_position_embeddings", None),
            smallest_attention_window(self.decoder),
        )
        known = [limit for limit in limits if limit is not None]
        return min(known) if known else None

    def _validate(self) -> None:
        for name in ("chunk_length", "window_length", "memories_per_chunk"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; expected a positive integer.")
        if self.window_length % self.chunk_length:
            raise ValueError(
                f"`window_length` is {self.window_length} and `chunk_length` is {self.chunk_length}; a window must "
                "hold whole chunks. Choose a window length that is a multiple of the chunk length."
            )
        if self.memories_per_chunk > self.chunk_length:
            raise ValueError(
                f"`memories_per_chunk` is {self.memories_per_chunk}, more than the {self.chunk_length} tokens of a "
                "chunk. Lower it or lengthen the chunk."
            )
        self._validate_types()
        for name, known in (
            ("pooling", POOLINGS),
            ("projector_type", PROJECTOR_TYPES),
            ("memory_positions", MEMORY_POSITIONS),
            ("absent_memories", ABSENT_MEMORIES),
            ("memory_policy", MEMORY_POLICIES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}; expected one of {', '.join(map(repr, known))}."
                )
        for name, field in (("encoder", "hidden_size"), ("decoder", "hidden_size"), ("decoder", "vocab_size")):
            child = getattr(self, name)
            if getattr(child, field, None) is None:
                raise ValueError(
                    f"The {name} config of type {child.model_type!r} has no `{field}`. Give the config of a text "
                    "model."
                )
        if self.projector_type == "identity" and self.encoder.hidden_size != self.decoder.hidden_size:
            raise ValueError(
                f"An identity projector needs equal widths, but the encoder has {self.encoder.hidden_size} and the "
                f"decoder {self.decoder.hidden_size}. Use `projector_type='linear'`."
            )
        if self.projector_noise < 0:
            raise ValueError(f"`projector_noise` is {self.projector_noise}; expected 0 or a positive half-width.")
        if self.projector_noise and self.projector_type != "bottleneck":
            raise ValueError(
                f"`projector_noise` is {self.projector_noise}, but a {self.projector_type!r} projector adds none. "
                "Use `projector_type='bottleneck'` or set it to 0."
            )
        self._validate_layout()
        self._validate_tokens()

    def _validate_types(self) -> None:
        for name in ("projector_norm", "window_positions", "self_memory", "freeze_encoder", "freeze_decoder"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; expected True or False.")
        for name in (
            "max_memories",
            "memory_token_id",
            "copy_token_id",
            "blank_token_id",
            "projector_hidden_size",
            "encoder_trained_from",
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"`{name}` is {value!r}; expected an integer or None.")
        for name in ("projector_noise", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"`{name}` is {value!r}; expected a number.")
        if self.projector_hidden_size is not None and self.projector_hidden_size < 1:
            raise ValueError(f"`projector_hidden_size` is {self.projector_hidden_size}; expected 1 or more.")
        if self.encoder_trained_from is not None and not self.freeze_encoder:
            raise ValueError(
                f"`encoder_trained_from` is {self.encoder_trained_from}, but with `freeze_encoder=False` the whole "
                "encoder trains. Leave one of them out."
            )
        if self.initializer_range < 0:
            raise ValueError(f"`initializer_range` is {self.initializer_range}; expected 0 or more.")

    def _validate_layout(self) -> None:
        if self.absent_memories != "mask" and self.memory_positions in ("contiguous", "source"):
            raise ValueError(
                f"`absent_memories={self.absent_memories!r}` fills the room that fixed positions reserve, but "
                f"`memory_positions` is {self.memory_positions!r}. Set `memory_positions='fixed'` or "
                "`absent_memories='mask'`."
            )
        if self.memory_positions == "spread" and self.chunk_length % self.memories_per_chunk:
            raise ValueError(
                f"`memory_positions='spread'` gives each of the {self.memories_per_chunk} memories of a chunk as many "
                f"positions as it stands for tokens, but `chunk_length` {self.chunk_length} is no multiple. Choose "
                "`memories_per_chunk` to divide it, or other positions."
            )
        if self.memory_positions in ("fixed", "spread") and self.max_memories is None:
            raise ValueError(
                f"`memory_positions={self.memory_positions!r}` reserves room for `max_memories`, which is not set. "
                "Set it."
            )
        if self.max_memories is not None and self.max_memories < 0:
            raise ValueError(f"`max_memories` is {self.max_memories}; expected 0 or more vectors.")
        if self.max_memories == 0 and self.memory_policy == "keep_nearest":
            raise ValueError(
                "`memory_policy='keep_nearest'` has no memory to keep: `max_memories` is 0. Set it to 1 or more."
            )
        if self.memory_policy == "merge":
            self._validate_merging()
        table = getattr(self.decoder, "max_position_embeddings", None)
        view = smallest_attention_window(self.decoder)  # of columns, whatever their positions
        columns = (self.max_memories or 0) + self.window_length
        positions = (self.max_memories or 0) * self.memory_span + self.window_length
        if (table is not None and positions > table) or (view is not None and columns > view):
            raise ValueError(
                f"`max_memories` ({self.max_memories or 0}, of {self.memory_span} positions each) and `window_length` "
                f"({self.window_length}) need {positions} positions, but the decoder's layers see "
                f"{self._decoder_room()} (max_position_embeddings {table}, attention window {view}). Lower them or "
                "choose a decoder that sees further."
            )
        limit = encoder_limit(self.encoder)
        if limit is not None and self.chunk_length > limit:
            raise ValueError(
                f"`chunk_length` is {self.chunk_length}, but the encoder takes {limit} tokens. Shorten the chunk."
            )

    def _validate_merging(self) -> None:
        if self.max_memories is not None and self.max_memories < self.memories_per_chunk:
            raise ValueError(
                f"`max_memories` is {self.max_memories}, but `memory_policy='merge'` leaves old text the memories of "
                f"one chunk at the least, and that has {self.memories_per_chunk}. Raise it."
            )
        if self.mergeable_chunks == 1:
            raise ValueError(
                f"`memory_policy='merge'` reads two chunks of {self.chunk_length} tokens again as one, but the "
                f"encoder takes {encoder_limit(self.encoder)} tokens, and of a chunk with one memory no fewer can be "
                "asked. Choose an encoder that takes longer chunks, more `memories_per_chunk`, or another policy, "
                "such as 'drop_oldest'."
            )

    def _validate_tokens(self) -> None:
        encoder_vocabulary = getattr(self.encoder, "vocab_size", None)
        if self.self_memory and encoder_vocabulary is not None and encoder_vocabulary < self.vocab_size:
            raise ValueError(
                f"`self_memory` feeds the decoder's ids to the encoder, but the encoder knows {encoder_vocabulary} "
                f"ids and the decoder {self.vocab_size}. Use one tokenizer, or set `self_memory=False` and give the "
                "context through `context_input_ids`."
            )
        if self.window_positions and self.copy_token_id is None and self.blank_token_id is None:
            raise ValueError(
                "`window_positions` tells tokens their places from the first marker on, but neither `copy_token_id` "
                "nor `blank_token_id` is set. Set one of them."
            )
        special = {}
        for name in ("copy_token_id", "blank_token_id", "memory_token_id"):
            token_id = getattr(self, name)
            if token_id is None:
                continue
            if token_id < 0:
                raise ValueError(f"`{name}` is {token_id}; expected an id of 0 or more.")
            if name != "memory_token_id" and token_id >= self.vocab_size:
                raise ValueError(
                    f"`{name}` is {token_id}, but the decoder's token table has {self.vocab_size} rows. The marker "
                    "must be a real row: add the token to the tokenizer and resize the tables."
                )
            special[name] = token_id
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        taken = {"pad_token_id": [self.pad_token_id], "eos_token_id": eos}
        for name, token_id in special.items():
            rivals = [other for other, ids in taken.items() if token_id in ids]
            rivals += [other for other, other_id in special.items() if other != name and other_id == token_id]
            if rivals:
                raise ValueError(f"`{name}` and `{rivals[0]}` are both {token_id}; each needs an id of its own.")
