"""Configuration of the memory autoencoder."""

from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

# Unused names: transformers before 5.8 copies from a local folder only the files that this one imports itself.
from .configuration_masked_mixer import MaskedMixerConfig  # noqa: F401
from .configuration_memory import POOLINGS, build_child_config

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
        pooling (`str`): How the encoder's states become K vectors, as in [`MemoryEncoderDecoderConfig`].
        expansion (`str`): `"unroll"`: the decoder reads at each position another window of half the vector, projected
            to its width. `"repeat"`: it reads the vector itself everywhere.
        unroll_stride (`int`): Elements from one position's window to the next. 1 as in the paper; the width times K
            over L spreads the positions over the whole vector, so that many tokens need not share few of its elements.
        bottleneck_size (`int`, *optional*): Width to which the vector is narrowed and from which it is widened again.
            `None` leaves it as it is.
        bottleneck_noise (`float`): Half-width q of the uniform noise in [-q, q] added to the narrowed vector in
            training.
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
        self.vocab_size = getattr(self.encoder, "vocab_size", None) if vocab_size is None else vocab_size
        self.freeze_encoder = freeze_encoder
        self.initializer_range = initializer_range
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.encoder, name, None)
        kwargs["tie_word_embeddings"] = False
        self._validate()
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of a memory (E)."""
        return self.encoder.hidden_size

    def _validate(self) -> None:
        for name in ("chunk_length", "memories_per_chunk", "vocab_size", "unroll_stride", "bottleneck_size"):
            value = getattr(self, name)
            if name == "bottleneck_size" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; expected a positive integer.")
        if self.memories_per_chunk > self.chunk_length:
            raise ValueError(
                f"`memories_per_chunk` is {self.memories_per_chunk}, more than the {self.chunk_length} tokens of a "
                "chunk. Lower it or lengthen the chunk."
            )
        for name, known in (("pooling", POOLINGS), ("expansion", EXPANSIONS)):
            if getattr(self, name) not in known:
                expected = ", ".join(map(repr, known))
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; expected one of {expected}.")
        for name in ("encoder", "decoder"):
            child = getattr(self, name)
            if getattr(child, "hidden_size", None) is None:
                raise ValueError(
                    f"The {name} config of type {child.model_type!r} has no `hidden_size`; give the config of a text "
                    "model."
                )
            limit = getattr(child, "max_position_embeddings", None)
            if limit is not None and self.chunk_length > limit:
                raise ValueError(
                    f"`chunk_length` is {self.chunk_length}, but the {name} takes {limit} tokens "
                    "(`max_position_embeddings`). Shorten the chunk or give the body more positions."
                )
        if self.expansion == "unroll" and self.decoder.hidden_size < 2:
            raise ValueError(
                "`expansion='unroll'` reads halves of the vector, but the decoder's `hidden_size` is 1. Widen the "
                "decoder or use `expansion='repeat'`."
            )
        if self.unroll_stride != 1 and self.expansion != "unroll":
            raise ValueError(
                f"`unroll_stride` is {self.unroll_stride}, but `expansion={self.expansion!r}` has no windows to move. "
                "Leave it out, or use `expansion='unroll'`."
            )
        if self.bottleneck_noise < 0:
            raise ValueError(f"`bottleneck_noise` is {self.bottleneck_noise}; expected 0 or a positive half-width.")
        if self.bottleneck_noise and self.bottleneck_size is None:
            raise ValueError(
                f"`bottleneck_noise` is {self.bottleneck_noise}, but there is no bottleneck to add it to. Set "
                "`bottleneck_size`, or the noise to 0."
            )
