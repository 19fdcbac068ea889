"""What the configurations share: sub-configs, the limits of a model, and checks that are tables.

A table of fields has rows `(names, accepts, expected)`; a table of rules has rows `(holds, message)`, where the
message is a template that may name any attribute of the configuration `c`.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

Fields = Sequence[tuple[str, Callable[[Any], bool], str]]
Rules = Sequence[tuple[Callable[[Any], bool], str]]

SHORT_CHUNKS = ("pad", "repeat", "end")
POOLINGS = ("last", "mean", "first", "queries", "pooled_queries")
COUNTING_FROM_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "longformer",
    "data2vec-text",
)


def is_int(value: Any) -> bool:
    """Whether a value is an integer and no bool, which Python counts as one."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a floating-point number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_bool(value: Any) -> bool:
    """Whether a value is True or False."""
    return isinstance(value, bool)


def at_least(least: int, or_none: bool = False) -> Callable[[Any], bool]:
    """Make a check for integers from `least` on, and for `None` if that is allowed."""
    return lambda value: (or_none and value is None) or (is_int(value) and value >= least)


def one_of(names: Sequence[str]) -> tuple[Callable[[Any], bool], str]:
    """Make a check for a few names, and what to say of others."""
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(map(repr, names))}"


def check_fields(config: Any, fields: Fields) -> None:
    """Refuse the first value that its row of the table does not accept.

    Args:
        config (`PreTrainedConfig`): The configuration.
        fields: Rows of names, separated by spaces; a check of one value; and what is expected.

    Raises:
        ValueError: Naming field, value and what was expected.
    """
    for names, accepts, expected in fields:
        for name in names.split():
            if not accepts(getattr(config, name)):
                raise ValueError(f"`{name}` is {getattr(config, name)!r}; expected {expected}.")


def check_rules(config: Any, rules: Rules) -> None:
    """Refuse a configuration whose fields do not fit each other.

    Args:
        config (`PreTrainedConfig`): The configuration.
        rules: Rows of a check of the configuration, and the message where it does not hold.

    Raises:
        ValueError: With the message of the first rule that does not hold.
    """
    for holds, message in rules:
        if not holds(config):
            raise ValueError(message.format(c=config))


def check_children(config: Any, fields: Sequence[tuple[str, str]]) -> None:
    """Refuse sub-configs that lack a size, such as those of an image model.

    Raises:
        ValueError: Naming the part and the field.
    """
    for part, field in fields:
        child = getattr(config, part)
        if getattr(child, field, None) is None:
            raise ValueError(
                f"The {part} config of type {child.model_type!r} has no `{field}`. Give the config of a text model."
            )


def check_dtype(fields: dict[str, Any]) -> None:
    """Refuse a `dtype` that is none, before the library looks it up in torch.

    Raises:
        ValueError: With the value.
    """
    for name in ("dtype", "torch_dtype"):
        value = fields.get(name)
        found = getattr(torch, value, None) if isinstance(value, str) else value
        if value not in (None, "auto") and not isinstance(found, torch.dtype):
            raise ValueError(f"`{name}` is {value!r}; expected the name of a type of numbers, such as 'bfloat16'.")


def build_child_config(child: Any, default_model_type: str = "llama") -> PreTrainedConfig:
    """Turn a sub-config given as a config, a dictionary or `None` into a config object.

    The package's own model types are looked up by name, not through the Auto registry: in a folder loaded with
    `trust_remote_code` the registry holds another copy of the class.

    Args:
        child (`PreTrainedConfig`, `dict` or `None`): The sub-config; a dictionary names its `model_type`.
        default_model_type (`str`): Model type of a dictionary without one, and of `None`.

    Raises:
        ValueError: If it is something else, or the library refuses a field.
    """
    if isinstance(child, PreTrainedConfig):
        return copy.deepcopy(child)  # the composite sets fields of its children, which may belong to a live model
    if child is not None and not isinstance(child, dict):
        raise ValueError(
            f"A sub-config is a {type(child).__name__}; expected a config or a dictionary that names its `model_type`."
        )
    from .configuration_masked_mixer import MaskedMixerConfig  # here, since that file imports this one

    fields = dict(child or {})
    model_type = fields.pop("model_type", default_model_type)
    if model_type == MaskedMixerConfig.model_type:
        return MaskedMixerConfig(**fields)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # what the library's checks raise is another class in each release
        raise ValueError(
            f"The library makes no config of type {model_type!r} of what a sub-config says: "
            f"{' '.join(str(error).split())}. Give the fields as the part's own config.json has them."
        ) from error


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


def encoder_limit(config: PreTrainedConfig, bos_token_id: int | None = None) -> int | None:
    """Return how many tokens of a chunk an encoder takes, after `bos_token_id` if it stands before each chunk.

    RoBERTa and its kin begin to count after their padding id.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    if config.model_type in COUNTING_FROM_PADDING:
        limit -= (config.pad_token_id or 0) + 1
    return limit - (bos_token_id is not None)
