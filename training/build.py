"""From a stage of a recipe to a model: new from a configuration, joined from two stages, or continued."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_memory import (
    MaskedMixerConfig,
    MemoryAutoencoder,
    MemoryAutoencoderConfig,
    MemoryEncoderDecoderConfig,
    MemoryEncoderDecoderForCausalLM,
)
from training.objectives import SpecialTokens
from training.recipe import StageRecipe
from training.strict_yaml import nearest
from training.warm_start import copy_tables

Loader = Callable[[str], PreTrainedModel]

# Fields that every configuration takes, whether its constructor names them or not. `is_causal: false` lets the body of
# a causal LM read both ways: the library's masks ask for it.
COMMON_FIELDS = {"pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "dtype", "is_causal"}


def build_stage_model(
    stage: StageRecipe, *, special_tokens: SpecialTokens, vocab_size: int, load: Loader
) -> PreTrainedModel:
    """Build the model that a stage trains.

    Args:
        stage (`StageRecipe`): The stage.
        special_tokens (`SpecialTokens`): Ids of the run's special tokens.
        vocab_size (`int`): Rows of the token tables; the memory slot's id lies just behind them.
        load (`Callable`): Gives the trained model of an earlier stage.

    Returns:
        The model, in float32, with what is frozen marked so.

    Raises:
        ValueError: If the description has an unknown key or parts do not fit.
    """
    path = f"stages.{stage.name}"
    if "model" in stage.from_:
        return _continue(load(stage.from_["model"]), stage)
    tokens = {
        "vocab_size": vocab_size,
        "pad_token_id": special_tokens.pad,
        "bos_token_id": special_tokens.bos,
        "eos_token_id": special_tokens.eos,
    }
    if stage.kind == "autoencoder":
        model = MemoryAutoencoder(autoencoder_config(stage.model, tokens, f"{path}.model"))
    elif stage.kind == "causal_lm":
        model = AutoModelForCausalLM.from_config(child_config(stage.model, tokens, f"{path}.model"))
    else:
        model = _join(stage, special_tokens, load)
    if stage.warm_start.tables_from is not None:
        copy_tables(load(stage.warm_start.tables_from), model, f"{path}.warm_start.tables_from")
    return model


def autoencoder_config(fields: dict[str, Any], tokens: dict[str, Any], path: str) -> MemoryAutoencoderConfig:
    """Build the configuration of an autoencoder; encoder and decoder get the run's token ids and length."""
    check_fields(MemoryAutoencoderConfig, fields, path)
    chunk_length = fields.get(
        "chunk_length", inspect.signature(MemoryAutoencoderConfig).parameters["chunk_length"].default
    )
    children = {}
    for name in ("encoder", "decoder"):
        child = fields.get(name)
        if not isinstance(child, dict):
            raise ValueError(f"{path}.{name} is {child!r}; expected a mapping with model_type and sizes")
        defaults: dict[str, Any] = dict(tokens)
        if child.get("model_type") == MaskedMixerConfig.model_type:
            defaults["max_position_embeddings"] = chunk_length
        children[name] = child_config(child, defaults, f"{path}.{name}")
    special = {name: value for name, value in tokens.items() if name != "vocab_size"}
    return MemoryAutoencoderConfig(**{**special, **fields, **children})


def child_config(fields: dict[str, Any], defaults: dict[str, Any], path: str) -> PreTrainedConfig:
    """Build a model configuration from plain fields with their `model_type`; the fields go before `defaults`."""
    model_type = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        close = nearest(str(model_type), list(CONFIG_MAPPING))
        raise ValueError(f"{path}.model_type is {model_type!r}{close}; expected a model type of transformers")
    own = {name: value for name, value in fields.items() if name != "model_type"}
    check_fields(CONFIG_MAPPING[model_type], own, path)
    return AutoConfig.for_model(model_type, **{**defaults, **own})


def check_fields(config_class: type[PreTrainedConfig], fields: dict[str, Any], path: str) -> None:
    """Refuse fields that a configuration class does not name: it would keep them without any effect.

    Raises:
        ValueError: Naming the dotted path and the nearest known field.
    """
    known = {
        name
        for name, parameter in inspect.signature(config_class).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    known |= COMMON_FIELDS | set(config_class.attribute_map)  # a GPT-2 may say hidden_size for n_embd
    for name in fields:
        if name not in known:
            raise ValueError(
                f"unknown key {path}.{name}{nearest(name, sorted(known))}; {config_class.__name__} has no such field"
            )


def _join(stage: StageRecipe, special_tokens: SpecialTokens, load: Loader) -> MemoryEncoderDecoderForCausalLM:
    path = f"stages.{stage.name}"
    check_fields(MemoryEncoderDecoderConfig, stage.model, f"{path}.model")
    fields = {
        "memory_token_id": special_tokens.memory,
        "copy_token_id": special_tokens.copy,
        "blank_token_id": special_tokens.blank,
        **stage.model,
    }
    try:
        model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
            load(stage.from_["encoder"]), load(stage.from_["decoder"]), **fields
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model


def _continue(model: PreTrainedModel, stage: StageRecipe) -> PreTrainedModel:
    """Take over an earlier stage's model; a memory model may freeze or thaw its parts."""
    for name, value in stage.model.items():
        setattr(model.config, name, value)
    if stage.model:
        model.requires_grad_(True)
        model.apply_freezing()
    return model


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Count trainable and all parameters; tied ones count once.

    >>> count_parameters(torch.nn.Linear(3, 2).requires_grad_(False))
    {'trainable': 0, 'total': 8}
    """
    parameters = list(model.parameters())
    return {
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "total": sum(p.numel() for p in parameters),
    }
