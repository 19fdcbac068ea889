"""The parts that a memory model joins: the body of a pretrained encoder, and a decoder that can read memories."""

import copy
import inspect
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForTextEncoding
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "trust_remote_code")
SENTENCE_POOLINGS = {"mean": "mean", "cls": "first", "lasttoken": "last"}
"""What the poolings of a sentence-transformers folder are called here."""


def load_whole(load: Callable[..., Any], *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
    """Load a model by the library's `from_pretrained`, and refuse one of which weights are missing.

    The library would draw them at random and only warn.

    Args:
        load (`Callable`): `from_pretrained` of the library, bound to a class.
        args: As in the library.
        output_loading_info (`bool`): Whether the caller asks for the names of missing weights; then none is refused.
        kwargs: As in the library.

    Raises:
        ValueError: If a weight is missing that is tied to no other.
    """
    model, report = load(*args, output_loading_info=True, **kwargs)
    if output_loading_info:
        return model, report
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"{args[0] if args else 'The checkpoint'} has no weights for {', '.join(missing[:5])}{more}. Load a "
            "complete checkpoint of this model; `output_loading_info=True` loads what there is and names the rest."
        )
    return model


def load_encoder(source: str | os.PathLike | PreTrainedModel, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Give the encoder body of a pretrained model, and what it says about pooling.

    - Of T5, and of other models with an encoder and a decoder that the library can load as text encoders, the encoder
      is taken; of a causal or masked LM its body, without head and pooling layer.
    - A sentence-transformers folder sets `pooling` and, where it normalises its vectors, `projector_norm`.

    Args:
        source (`str`, `os.PathLike` or `PreTrainedModel`): Hub id, folder or model. A model is not changed.
        kwargs: Passed to `from_pretrained`: `revision`, `dtype`, `device_map`, `attn_implementation` and so on.

    Returns:
        The body and a dictionary of fields for [`MemoryEncoderDecoderConfig`].

    Raises:
        ValueError: If the model has no single body, or its sentence pooling is not known here.
        OSError: What the library raises for an id or folder that it cannot load.
    """
    if isinstance(source, PreTrainedModel):
        return _body(source), {}
    source = os.fspath(source)
    sentence = _sentence_modules(source, kwargs)
    fields: dict[str, Any] = {}
    if sentence is not None:
        subfolder, fields = sentence
        if subfolder:
            kwargs = {**kwargs, "subfolder": subfolder}
    hub = {name: kwargs[name] for name in (*HUB_OPTIONS, "subfolder") if name in kwargs}
    config = AutoConfig.from_pretrained(source, **hub)
    if config.is_encoder_decoder:
        check_text_encoder(config)
        return AutoModelForTextEncoding.from_pretrained(source, **kwargs), fields
    return _body(AutoModel.from_pretrained(source, **kwargs)), fields


def check_text_encoder(config: PreTrainedConfig) -> None:
    """Refuse a model with encoder and decoder whose encoder the library cannot load by itself.

    Raises:
        ValueError: Naming the model type.
    """
    if type(config) not in AutoModelForTextEncoding._model_mapping:
        raise ValueError(
            f"A {config.model_type!r} model has an encoder and a decoder of its own, and the library cannot load its "
            "encoder alone. Give a single body, such as a BERT, a Llama, a masked mixer or a T5."
        )


def _body(model: PreTrainedModel) -> PreTrainedModel:
    """Take the body of a model, sharing its weights and leaving the model as it is."""
    config = model.config
    if config.model_type == "memory_autoencoder":
        return model
    if config.is_encoder_decoder:
        check_text_encoder(config)
        encoder_class = AutoModelForTextEncoding._model_mapping[type(config)]
        if isinstance(model, encoder_class):
            return model
        with torch.device("meta"):
            body = encoder_class._from_config(copy.deepcopy(config))
        body.set_input_embeddings(model.get_input_embeddings())
        for name, child in body.named_children():
            if name == "encoder":
                setattr(body, name, model.get_encoder())
            elif isinstance(child, torch.nn.Embedding):
                setattr(body, name, model.get_input_embeddings())
        return body.train(model.training)
    body = model.base_model if model.base_model is not model else model
    if getattr(body, "pooler", None) is None:
        return body
    body = copy.copy(body)  # the same weights in another shell, so that the caller keeps the pooling layer
    body._modules = dict(body._modules)
    body.pooler = None
    return body


def _sentence_modules(source: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Read the folder of the transformer and the pooling of a sentence-transformers model; `None` for other models."""
    hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs and name != "trust_remote_code"}

    def read(name: str) -> Any:
        try:
            with open(cached_file(source, name, **hub), encoding="utf-8") as file:
                return json.load(file)
        except (OSError, TypeError):
            return None

    modules = None if kwargs.get("subfolder") else read("modules.json")
    if modules is None:
        return None
    folder = ""
    fields: dict[str, Any] = {}
    for module in modules:
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Transformer":
            folder = module["path"]
        elif kind == "Pooling":
            settings = read(f"{module['path']}/config.json") or {}
            modes = [name for name in SENTENCE_POOLINGS if _is_pooled(settings, name)]
            if len(modes) != 1:
                raise ValueError(
                    f"The sentence pooling of {source!r} is {settings}; expected one of mean, cls and lasttoken. Give "
                    "the folder of its transformer and choose a `pooling`."
                )
            fields["pooling"] = SENTENCE_POOLINGS[modes[0]]
        elif kind == "Normalize":
            fields["projector_norm"] = True  # an RMSNorm is the same direction at another length
        else:
            raise ValueError(
                f"The sentence model {source!r} has a module {kind!r} behind its transformer, which a memory would "
                "skip. Give the folder of its transformer alone."
            )
    return folder, fields


def _is_pooled(settings: dict[str, Any], name: str) -> bool:
    old_name = f"pooling_mode_{name}_tokens" if name == "mean" else f"pooling_mode_{name}"
    old_name = "pooling_mode_cls_token" if name == "cls" else old_name
    return settings.get("pooling_mode") == name or bool(settings.get(old_name))


def load_decoder(source: str | os.PathLike | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """Give a pretrained causal LM that can read memories.

    Args:
        source (`str`, `os.PathLike` or `PreTrainedModel`): Hub id, folder or causal LM.
        kwargs: Passed to `from_pretrained`.

    Raises:
        ValueError: If it is no causal LM with an attention cache and `inputs_embeds`.
        OSError: What the library raises for an id or folder that it cannot load.
    """
    if not isinstance(source, PreTrainedModel):
        hub = {name: kwargs[name] for name in (*HUB_OPTIONS, "subfolder") if name in kwargs}
        check_decoder_config(AutoConfig.from_pretrained(os.fspath(source), **hub))
        source = AutoModelForCausalLM.from_pretrained(os.fspath(source), **kwargs)
    check_decoder_config(source.config)
    if source.get_output_embeddings() is None:
        raise ValueError(
            f"The decoder is a {type(source).__name__} without a language modelling head; give a causal LM, for "
            "example from `AutoModelForCausalLM.from_pretrained`."
        )
    return source


def check_decoder_config(config: PreTrainedConfig) -> None:
    """Refuse a decoder that has an encoder of its own, reads ahead, or has layers that keep a running state.

    Raises:
        ValueError: Naming the model type.
    """
    if config.is_encoder_decoder:
        raise ValueError(
            f"A {config.model_type!r} model has an encoder of its own and cannot be the decoder. Give a causal LM, "
            "such as a Llama; a T5 may be the encoder."
        )
    if not getattr(config, "is_causal", True):
        raise ValueError(
            "The decoder's config says `is_causal=False`, so it would read the tokens that it has to predict. Only an "
            "encoder may read both ways; leave the field out of the decoder's config."
        )
    layer_types = getattr(config, "layer_types", None) or []
    other = sorted({name for name in layer_types if not name.endswith("attention") or name.startswith("linear")})
    if other:
        raise ValueError(
            f"The decoder, a {config.model_type!r}, has layers of type {', '.join(other)}, whose running state cannot "
            "be repeated for many windows as keys and values can. Choose a decoder with attention in every layer."
        )


def check_decoder(decoder: PreTrainedModel) -> None:
    """Refuse a decoder that takes no embeddings or keeps no attention cache.

    Raises:
        ValueError: Naming what is missing.
    """
    arguments = inspect.signature(decoder.forward).parameters
    for name, purpose in (("past_key_values", "keeps no attention cache"), ("inputs_embeds", "takes no embeddings")):
        if name not in arguments:
            raise ValueError(
                f"A decoder of type {decoder.config.model_type!r} {purpose} (`{name}`), so it cannot read memories. "
                "Choose a decoder with attention, such as a Llama."
            )
    if getattr(decoder, "_is_stateful", False):
        raise ValueError(
            f"A decoder of type {decoder.config.model_type!r} keeps a running state, which cannot be repeated for "
            "many windows as keys and values can. Choose a decoder with attention in every layer."
        )


def layers_from(body: torch.nn.Module, first: int) -> list[torch.nn.Module]:
    """Return the layers of a body from one on, and what stands behind its stack of layers, such as the last norm.

    Args:
        body (`torch.nn.Module`): Of any family; the first list of modules in it is its stack.
        first (`int`): Index of the first layer; the number of layers gives what stands behind them alone.

    Raises:
        ValueError: If the body has no stack of layers, or not so many.
    """
    for name, module in body.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            if not 0 <= first <= len(module):
                raise ValueError(
                    f"`encoder_trained_from` is {first}, but the {type(body).__name__} has {len(module)} layers; "
                    f"expected 0 to {len(module)}."
                )
            parent, _, own = name.rpartition(".")
            siblings = list(body.get_submodule(parent).named_children())
            behind = siblings[[child for child, _ in siblings].index(own) + 1 :]
            tables = torch.nn.Embedding
            return [*module[first:], *(child for _, child in behind if not isinstance(child, tables))]
    raise ValueError(f"The encoder, a {type(body).__name__}, has no stack of layers to train a part of.")


@torch.no_grad()
def embedding_scale(decoder: PreTrainedModel) -> float:
    """Root mean square of what a decoder's layers see of its tokens; some families scale the table's rows first."""
    table: Any = decoder.get_input_embeddings()
    if table.weight.is_meta:  # shapes without values
        return 1.0
    ids = torch.arange(min(4096, table.weight.shape[0]), device=table.weight.device)
    return table(ids).float().std().item()
