"""Configuration of the masked mixer."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from .configuration_checks import Fields, Rules, at_least, check_fields, check_rules, is_bool


class MaskedMixerConfig(PreTrainedConfig):
    r"""Architecture of a masked mixer: a transformer whose attention is a learned, masked matrix over token positions.

    Args:
        vocab_size (`int`): Rows of the token table (V).
        hidden_size (`int`): Width of a token's state.
        num_hidden_layers (`int`): Number of layers.
        num_heads (`int`): Heads of the token mixing; each mixes its own projection of width `hidden_size / num_heads`
            by its own weights. 0 is the flat mixer: one mixing of the whole state, without projections.
        kernel_size (`int`): Neighbouring elements of the hidden index that a mixing weight covers. 1 mixes tokens
            only.
        max_position_embeddings (`int`): Most positions; the mixing weights of a head have one row and one column for
            each. Shorter texts use their upper left corner.
        causal (`bool`): Whether a token reads itself and earlier tokens only. `False` lets it read all.
        intermediate_size (`int`, *optional*): Inner width of the feed-forward part. Defaults to `4 * hidden_size`.
        layer_norm_eps (`float`): Added to the variance in layer normalisation.
        initializer_range (`float`): Standard deviation of fresh linear maps and token vectors.
        use_cache (`bool`): Whether a causal mixer outside training returns the cache that generation continues from.
        pad_token_id (`int`, *optional*): Id of padding.
        bos_token_id (`int`, *optional*): Id that begins a text.
        eos_token_id (`int` or `list[int]`, *optional*): Id that ends a text.
        tie_word_embeddings (`bool`): Whether the language modelling head is the token table.

    Raises:
        ValueError: If a size is not positive or the sizes do not fit each other.

    Source: Badger 2026, arXiv 2602.13466, masked mixer. The paper trains one length; here any length up to the maximum
    works.
    """

    model_type = "masked_mixer"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 8192,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_heads: int = 4,
        kernel_size: int = 1,
        max_position_embeddings: int = 512,
        causal: bool = True,
        intermediate_size: int | None = None,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.max_position_embeddings = max_position_embeddings
        self.causal = causal
        # The paper's width, and that of most transformers.
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        # Before the library's own part, which would fail on a nonsensical field with a message of its own.
        self._validate()
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _validate(self) -> None:
        check_fields(self, FIELDS)
        check_rules(self, RULES)

    @staticmethod
    def _published_files() -> None:
        """Name every file that a folder of this model runs; see [`MemoryEncoderDecoderConfig`]. Never called."""
        from .modeling_masked_mixer import MaskedMixerForCausalLM  # noqa: F401


FIELDS: Fields = (
    ("num_hidden_layers num_heads", at_least(0), "an integer of 0 or more"),
    (
        "vocab_size hidden_size kernel_size max_position_embeddings intermediate_size",
        at_least(1),
        "an integer of 1 or more",
    ),
    ("causal", is_bool, "True or False"),
)
RULES: Rules = (
    (
        lambda c: not c.num_heads or c.hidden_size % c.num_heads == 0,
        "`hidden_size` is {c.hidden_size} and `num_heads` is {c.num_heads}; heads share the width equally. Choose a "
        "number of heads that divides it, or 0 for the flat mixer.",
    ),
)
