"""Configuration of the memory autoencoder."""

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
    is_number,
    one_of,
)

EXPANSIONS = ("unroll", "repeat")


class MemoryAutoencoderConfig(PreTrainedConfig):
    r"""Architecture of a memory autoencoder: encoder, K vectors a chunk, expansion, decoder of the whole chunk.

    Args:
        encoder (`PreTrainedConfig` or `dict`, *optional*):
            Config of the encoder body, any model type. Defaults to a masked mixer.
        decoder (`PreTrainedConfig` or `dict`, *optional*):
            Config of the decoder body: a masked mixer (the default), or any body that reads `inputs_embeds`, such as a
            Llama. Its token table is left out, since it reads vectors. A mixer decoder is causal as in the paper,
            unless its own `causal` is False.
        chunk_length (`int`): Tokens of a chunk, which is what the decoder writes in one pass (L).
        memories_per_chunk (`int`): Vectors per chunk (K); vector j is expanded over the positions i with
            floor(i * K / L) = j.
        pooling (`str`): How the encoder's states become K vectors, as in [`MemoryEncoderDecoderConfig`]; `"concat"` is
            none of them here, since it would leave nothing to compress.
        expansion (`str`): `"unroll"`: the decoder reads at each position another window of half the vector, projected
            to its width. `"repeat"`: it reads the vector itself everywhere.
        unroll_stride (`int`): Elements from one position's window to the next. 1 as in the paper; the width times K
            over L spreads the positions over the whole vector, so that many tokens need not share few of its elements.
        bottleneck_size (`int`, *optional*): Width to which the vector is narrowed and from which it is widened again.
            `None` leaves it as it is.
        bottleneck_noise (`float`): Half-width q of the uniform noise in [-q, q] added to the narrowed vector in
            training.
        short_chunks (`str`): How the encoder reads a chunk that is not full: `"pad"`: as it is; `"repeat"`: its tokens
            again and again until it is full, for encoders that give back whole chunks best; `"end"`: with end tokens
            after it, which a model must have been trained on.
        vocab_size (`int`, *optional*): Ids that the decoder writes (V). Defaults to the encoder's vocabulary.
        freeze_encoder (`bool`): Encoder in `eval()` without gradients, always: the information probe.
        initializer_range (`float`): Standard deviation of the fresh linear maps between encoder and decoder and of the
            head.

    Raises:
        ValueError: If fields do not fit each other; the message names both values and the remedy.

    Source: Badger 2026, arXiv 2602.13466, information-retention autoencoder, compression and noise. The paper's text
    draws symmetric noise, its code one-sided noise, also in evaluation; here it is symmetric, and in training only.
    """

    model_type = "memory_autoencoder"
    sub_configs = {"encoder": AutoConfig, "decoder": AutoConfig}
    keys_to_ignore_at_inference = ["memories"]

    def __init__(
        self,
        encoder: PreTrainedConfig | dict[str, Any] | None = None,
        decoder: PreTrainedConfig | dict[str, Any] | None = None,
        chunk_length: int = 16,
        memories_per_chunk: int = 1,
        pooling: str = "last",
        expansion: str = "unroll",
        unroll_stride: int = 1,
        bottleneck_size: int | None = None,
        bottleneck_noise: float = 0.0,
        short_chunks: str = "pad",
        vocab_size: int | None = None,
        freeze_encoder: bool = False,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.encoder = build_child_config(encoder, "masked_mixer")
        self.decoder = build_child_config(decoder, "masked_mixer")
        self.chunk_length = chunk_length
        self.memories_per_chunk = memories_per_chunk
        self.pooling = pooling
        self.expansion = expansion
        self.unroll_stride = unroll_stride
        self.bottleneck_size = bottleneck_size
        self.bottleneck_noise = bottleneck_noise
        self.short_chunks = short_chunks
        self.vocab_size = getattr(self.encoder, "vocab_size", None) if vocab_size is None else vocab_size
        self.freeze_encoder = freeze_encoder
        self.initializer_range = initializer_range
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.encoder, name, None)
        kwargs["tie_word_embeddings"] = False
        check_dtype(kwargs)
        super().__init__(**kwargs)
        self._validate()

    @property
    def hidden_size(self) -> int:
        """Width of a memory (E)."""
        return self.encoder.hidden_size

    def _validate(self) -> None:
        check_fields(self, FIELDS)
        check_children(self, (("encoder", "hidden_size"), ("decoder", "hidden_size")))
        check_rules(self, RULES)
        for name in ("encoder", "decoder"):
            limit = encoder_limit(getattr(self, name))
            if limit is not None and self.chunk_length > limit:
                raise ValueError(
                    f"`chunk_length` is {self.chunk_length}, but the {name} takes {limit} tokens "
                    "(`max_position_embeddings`). Shorten the chunk or give the body more positions."
                )

    @staticmethod
    def _published_files() -> None:
        """Name every file that a folder of this model runs; see [`MemoryEncoderDecoderConfig`]. Never called."""
        from .configuration_masked_mixer import MaskedMixerConfig  # noqa: F401
        from .modeling_memory_autoencoder import MemoryAutoencoder  # noqa: F401


FIELDS: Fields = (
    ("chunk_length memories_per_chunk vocab_size unroll_stride", at_least(1), "a positive integer"),
    ("bottleneck_size", at_least(1, or_none=True), "a positive integer or None"),
    ("bottleneck_noise", lambda value: is_number(value) and value >= 0, "a number, 0 or a positive half-width"),
    ("initializer_range", lambda value: is_number(value) and value >= 0, "a number of 0 or more"),
    ("pooling", *one_of(POOLINGS)),
    ("expansion", *one_of(EXPANSIONS)),
    ("short_chunks", *one_of(SHORT_CHUNKS)),
    ("freeze_encoder", is_bool, "True or False"),
)
RULES: Rules = (
    (
        lambda c: c.short_chunks != "end" or c.eos_token_id is not None,
        "`short_chunks='end'` fills chunks with the end token, but `eos_token_id` is not set. Set it or use 'repeat'.",
    ),
    (
        lambda c: c.memories_per_chunk <= c.chunk_length,
        "`memories_per_chunk` is {c.memories_per_chunk}, more than the {c.chunk_length} tokens of a chunk. Lower it "
        "or lengthen the chunk.",
    ),
    (
        lambda c: c.expansion != "unroll" or c.decoder.hidden_size > 1,
        "`expansion='unroll'` reads halves of the vector, but the decoder's `hidden_size` is 1. Widen the decoder or "
        "use `expansion='repeat'`.",
    ),
    (
        lambda c: c.unroll_stride == 1 or c.expansion == "unroll",
        "`unroll_stride` is {c.unroll_stride}, but `expansion={c.expansion!r}` has no windows to move. Leave it out, "
        "or use `expansion='unroll'`.",
    ),
    (
        lambda c: not c.bottleneck_noise or c.bottleneck_size is not None,
        "`bottleneck_noise` is {c.bottleneck_noise}, but there is no bottleneck to add it to. Set `bottleneck_size`, "
        "or the noise to 0.",
    ),
)
