"""From a stage of a recipe to a model: new from a configuration, joined from two stages, or continued."""

import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_memory import (
    MaskedMixerConfig,
    MemoryAutoencoder,
    MemoryAutoencoderConfig,
    MemoryEncoderDecoderConfig,
    MemoryEncoderDecoderForCausalLM,
)
from modeling_memory.memory_adapters import is_adapter

from ..data.objectives import SpecialTokens
from ..recipes.recipe import PretrainedRecipe, StageRecipe
from ..recipes.strict_yaml import nearest
from .warm_start import copy_tables

Loader = Callable[[str], Any]

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
        vocab_size (`int`): Rows of the token tables; the memory slot's id lies just after them.
        load (`Callable`): Gives the trained model of an earlier stage. Of a pretrained part what the recipe says of
            it, or the model, of an encoder then also what it says about pooling, as [`load_encoder`] does.

    Returns:
        The model, in float32, with what is frozen marked so.

    Raises:
        ValueError: If the description has an unknown key or parts do not fit.
    """
    path = f"stages.{stage.name}"
    if "model" in stage.from_:
        model = _continue(load(stage.from_["model"]), stage)
        return _with_adapters(model, stage)
    tokens = {
        "vocab_size": vocab_size,
        "pad_token_id": special_tokens.pad,
        "bos_token_id": special_tokens.bos,
        "eos_token_id": special_tokens.eos,
    }
    if stage.kind == "autoencoder":
        config = autoencoder_config(stage.model, tokens, f"{path}.model")
        model = build_within_memory(lambda: MemoryAutoencoder(config), f"{path}.model")
    elif stage.kind == "causal_lm":
        config = child_config(stage.model, tokens, f"{path}.model")
        model = build_within_memory(lambda: AutoModelForCausalLM.from_config(config), f"{path}.model")
    else:
        model = _join(stage, special_tokens, load)
    model = _with_adapters(model, stage)
    if stage.warm_start.tables_from is not None:
        copy_tables(load(stage.warm_start.tables_from), model, f"{path}.warm_start.tables_from")
    return model


def build_within_memory(build: Callable[[], PreTrainedModel], path: str) -> PreTrainedModel:
    """Build a new model after counting its weights, so that one that cannot fit is refused before it is tried.

    Args:
        build (`Callable`): Builds it.
        path (`str`): Dotted path of its description, for the message.

    Raises:
        ValueError: If its sizes are none that a model can have, or its weights alone exceed the machine's memory.
    """
    try:
        with torch.device("meta"):
            needed = 4 * sum(parameter.numel() for parameter in build().parameters())
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} describes no model that can be built ({' '.join(str(error).split())})") from error
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"{path} describes a model whose weights alone take {needed / 2**30:,.0f} GiB, but this machine has "
            f"{there / 2**30:,.0f} GiB of memory; make it narrower or shallower"
        )
    return build()


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
    fields: dict[str, Any] = {"memory_token_id": special_tokens.memory}
    parts = {name: load(stage.from_[name]) for name in ("encoder", "decoder")}
    encoder, decoder = parts["encoder"], parts["decoder"]
    if isinstance(decoder, PretrainedRecipe):
        rows = AutoConfig.from_pretrained(decoder.source, **decoder.options).vocab_size
    else:
        rows = decoder.get_input_embeddings().weight.shape[0]
    for name in ("copy", "blank"):  # markers are rows of the table; one that has none was not made for them
        index = getattr(special_tokens, name)
        fields[f"{name}_token_id"] = index if index is not None and index < rows else None
    if isinstance(encoder, tuple):  # a sentence model says how its vectors are made
        encoder, own = encoder
        fields |= own
    fields |= stage.model
    # Named rather than given, a base is known to the model, which can then be saved by reference to it.
    for name, part in parts.items():
        if isinstance(part, PretrainedRecipe):
            fields[f"{name}_kwargs"] = {"dtype": torch.float32, **part.options}
    encoder, decoder = (part.base if isinstance(part, PretrainedRecipe) else part for part in (encoder, decoder))
    try:
        model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(encoder, decoder, **fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for name, part in parts.items():
        if isinstance(part, PretrainedRecipe):
            check_described(part, getattr(model, name).config, stage.from_[name])
    return model


def check_described(source: PretrainedRecipe, config: PreTrainedConfig, name: str) -> None:
    """Check that a pretrained model is the one that a recipe describes.

    Args:
        source (`PretrainedRecipe`): What the recipe says.
        config (`PreTrainedConfig`): What the model says.
        name (`str`): What the recipe calls it.

    Raises:
        ValueError: Naming the field that differs.
    """
    for field, value in source.config.items():
        own = getattr(config, field, None)
        if own != value:
            raise ValueError(
                f"pretrained.{name}.config.{field} is {value!r}, but {source.path} has {own!r}; correct the recipe, "
                "or give the model that it describes"
            )


def _with_adapters(model: PreTrainedModel, stage: StageRecipe) -> PreTrainedModel:
    """Put a stage's adapters into its model."""
    if stage.adapters:
        try:
            model.add_adapters(**stage.adapters)
        except (TypeError, ValueError) as error:
            raise ValueError(f"stages.{stage.name}.adapters: {error}") from error
    return model


def _continue(model: PreTrainedModel, stage: StageRecipe) -> PreTrainedModel:
    """Take over an earlier stage's model; a memory model may freeze or thaw its parts, and cut chunks otherwise."""
    per_chunk = stage.model.get("memories_per_chunk")
    if per_chunk is not None and per_chunk != model.config.memories_per_chunk:
        if model.config.pooling in ("queries", "pooled_queries"):
            raise ValueError(
                f"stages.{stage.name}.model.memories_per_chunk is {per_chunk}, but the pooling "
                f"{model.config.pooling!r} has learnt {model.config.memories_per_chunk}; leave it out"
            )
        model.pooling.memories_per_chunk = per_chunk
    for name, value in stage.model.items():
        setattr(model.config, name, value)
    if stage.model:
        model.requires_grad_(True)
        model.apply_freezing()
    return model


def parameter_report(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Count total, trainable and frozen parameters by part; tied ones count once, where they stand first.

    Adapters are a part of their own, whichever part they stand in.

    Args:
        model (`torch.nn.Module`): Any; its parts are its children.

    >>> frozen, trained = torch.nn.Linear(3, 2).requires_grad_(False), torch.nn.Linear(2, 1)
    >>> report = parameter_report(torch.nn.Sequential(frozen, trained))
    >>> report["0"], report["all"]
    ({'total': 8, 'trainable': 0, 'frozen': 8}, {'total': 11, 'trainable': 3, 'frozen': 8})
    """
    report: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        part = f"{name.partition('.')[0]} adapters" if is_adapter(name) else name.partition(".")[0]
        for key in (part, "all"):
            counts = report.setdefault(key, {"total": 0, "trainable": 0, "frozen": 0})
            counts["total"] += parameter.numel()
            counts["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
    return {**{part: counts for part, counts in report.items() if part != "all"}, "all": report["all"]}


def report_lines(report: dict[str, dict[str, int]]) -> list[str]:
    r"""Lay a parameter report out as text.

    >>> print("\n".join(report_lines({"all": {"total": 11, "trainable": 3, "frozen": 8}})))
    parameters                     total       trainable          frozen
      all                             11               3               8
    """
    lines = [f"{'parameters':<20}{'total':>16}{'trainable':>16}{'frozen':>16}"]
    for part, counts in report.items():
        lines.append(f"  {part:<18}" + "".join(f"{counts[key]:>16,}" for key in ("total", "trainable", "frozen")))
    return lines


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
