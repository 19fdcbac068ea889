"""What a memory depends on: encoder, adapters, projector, tokenizer and how text is cut into chunks."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..memory_adapters import adapted_modules
from ..memory_saving import state_hash
from .database import MemoryStoreError

EXPLANATIONS = {
    "encoder": "the encoder is another, or its weights were loaded in another dtype",
    "projector": "the projector is another, or its weights were loaded in another dtype",
    "tokenizer": "the tokenizer that cuts the text is another",
    "cut": "text is cut into chunks, or read out of them, in another way",
}
NOT_COMPUTED = {
    *("_name_or_path", "_commit_hash", "name_or_path", "transformers_version", "architectures", "auto_map"),
    *("dtype", "torch_dtype", "use_cache", "return_dict", "output_hidden_states", "output_attentions"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "bos_token_id", "eos_token_id"),
}
"""Fields of an encoder's config that name it, or change what it hands out and not what it computes."""
NAMES = ("name", "revision", "model_type", "sha256")


def tokenizer_checksum(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of what decides how text becomes ids.

    Padding and truncation are left out: the library stores the last call's choice in the same object.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Any tokenizer; of one without a backend the vocabulary counts.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: dict[str, Any] = {"kind": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        state = json.loads(backend.to_str())
        # What the library last padded to says nothing about which ids a text has.
        state.pop("padding"), state.pop("truncation")
    return _digest(state)


def fingerprint(model: PreTrainedModel, processor: Any) -> dict[str, Any]:
    """Describe what the memories of a model depend on.

    Args:
        model ([`MemoryEncoderDecoderModel`]): The model.
        processor ([`MemoryProcessor`]): Its processor.

    Returns:
        `dict`: Part -> `sha256` beside what it is made of: `encoder` (its weights, pooling, config and adapters
        included), `projector`, `tokenizer`, and `cut`, how text becomes chunks and memories. `model` and all names and
        revisions are for the reader.

    Raises:
        MemoryStoreError: If model and processor are none, or the processor cuts text otherwise than the config says.
    """
    return _describe(model, processor, state_hash, tokenizer_checksum)


def quick_fingerprint(model: PreTrainedModel, processor: Any) -> dict[str, Any]:
    """The same by sums instead of SHA-256, cheap enough for every call: only to notice that a model has changed."""
    return _describe(model, processor, _sum, lambda tokenizer: f"{id(tokenizer)} {len(tokenizer)}")


def _describe(model: Any, processor: Any, hashed: Callable[[dict], str], told: Callable[[Any], str]) -> dict[str, Any]:
    if not hasattr(model, "encode_memories") or not hasattr(processor, "memories_per_chunk"):
        raise MemoryStoreError(
            f"`model` is a {type(model).__name__} and `processor` a {type(processor).__name__}; expected a memory "
            "encoder-decoder and its MemoryProcessor."
        )
    config = model.config
    # Before any weight is hashed: a processor of another cut is the usual mistake, and is found at once.
    for name in ("chunk_length", "memories_per_chunk"):
        if getattr(processor, name) != getattr(config, name):
            raise MemoryStoreError(
                f"The processor's `{name}` is {getattr(processor, name)} and the model's {getattr(config, name)}. "
                "Give the processor that belongs to the model."
            )
    encoder, projector = {}, {}
    for name, tensor in model.state_dict().items():
        # The decoder is left out: whatever answers from the memories, they are what they were.
        if name.startswith(("encoder.", "pooling.")):
            encoder[name] = tensor
        elif name.startswith("projector."):
            projector[name] = tensor
    parts: dict[str, dict[str, Any]] = {
        "encoder": {
            "dtype": str(next(iter(encoder.values())).dtype).removeprefix("torch."),
            # What differs from the defaults: a later release of the library may add a field.
            "config": _plain(config.encoder.to_diff_dict()),
            "adapters": _adapters(model),
            "weights": hashed(encoder),
        },
        "projector": {
            "kind": config.projector_type,
            "norm": config.projector_norm,
            "weights": hashed(projector),
        },
        "tokenizer": {"rules": told(processor.encoder_tokenizer or processor.tokenizer)},
        "cut": {
            "chunk_length": config.chunk_length,
            "memories_per_chunk": config.memories_per_chunk,
            "pooling": config.pooling,
            "short_chunks": config.short_chunks,
            # Only where there is one, so that stores of other models keep their fingerprint.
            **({} if config.encoder_bos_token_id is None else {"encoder_bos_token_id": config.encoder_bos_token_id}),
            "hidden_size": config.decoder.hidden_size,
            # So that memories of a cut that took markers in a document for markers are not taken for those of this
            # one.
            "markers_in_text": "are text",
        },
    }
    described = {part: {**fields, "sha256": _digest(fields)} for part, fields in parts.items()}
    # After hashing: the same weights under another name are the same encoder.
    described["encoder"] |= _describe_source(config.encoder)
    return {"model": _describe_source(config), **described}


def _plain(fields: Any) -> Any:
    """Fields that matter, as JSON writes them."""
    if isinstance(fields, dict):
        return {str(name): _plain(value) for name, value in sorted(fields.items()) if name not in NOT_COMPUTED}
    if isinstance(fields, (list, tuple)):
        return [_plain(value) for value in fields]
    return fields if isinstance(fields, (bool, int, float, type(None))) else str(fields)


def _adapters(model: Any) -> list[dict[str, Any]]:
    """How the encoder's adapters act: usually alike in all its layers."""
    # A set, since all layers usually agree, and a list of a hundred equal entries would hide the one that does not.
    found = {
        json.dumps(
            {
                "active": list(module.active_adapters),
                "on": not module.disable_adapters,
                "merged": bool(module.merged),
                "scaling": {name: float(value) for name, value in module.scaling.items()},
            },
            sort_keys=True,
        )
        for _, module in adapted_modules(model.encoder)
    }
    return [json.loads(one) for one in sorted(found)]


def check_fingerprint(given: Any) -> None:
    """Refuse what is no fingerprint, such as that of a forged file.

    Raises:
        MemoryStoreError: Naming the part.
    """
    for part in EXPLANATIONS:
        fields = given.get(part) if isinstance(given, dict) else None
        if not isinstance(fields, dict) or not isinstance(fields.get("sha256"), str):
            raise MemoryStoreError(f"A fingerprint has no part {part!r} with a `sha256`. Take one from `fingerprint`.")
    for name in ("memories_per_chunk", "hidden_size"):
        size = given["cut"].get(name)
        # Bounded, since a forged size would otherwise be asked of the machine as memory.
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < 2**24:
            raise MemoryStoreError(f"A fingerprint's `{name}` is {size!r}; expected a size, 1 or more.")


def check_same_fingerprint(stored: dict[str, Any], given: dict[str, Any], whose: str) -> None:
    """Refuse memories of another model.

    Args:
        stored (`dict`): Fingerprint of a store.
        given (`dict`): Fingerprint of a model, or of another store.
        whose (`str`): What `given` belongs to.

    Raises:
        MemoryStoreError: Naming each field that differs, both sides, and the remedy.
    """
    reasons, fields = [], []
    for part, explanation in EXPLANATIONS.items():
        if stored[part]["sha256"] != given[part]["sha256"]:
            # Digests may differ where all fields agree that this release knows.
            found = list(differences(part, stored[part], given[part])) or [(f"{part}.sha256", "other", "other")]
            fields += [field for field, _, _ in found]
            sides = "; ".join(
                f"{field}: {_short(one)} in the store, {_short(other)} here" for field, one, other in found
            )
            reasons.append(f"{explanation} ({sides})")
    if reasons:
        remedy = "Load the model that wrote the store, in the same dtype, or remember the texts again in a new store."
        if any("adapters" in field for field in fields):
            remedy = (
                "Put the encoder's adapters back as they were (`unmerge_adapters()`, or on again), or remember the "
                f"texts again in a new store: merged adapters compute the same but for rounding. {remedy}"
            )
        raise MemoryStoreError(f"The store's memories are not those of {whose}: {'; '.join(reasons)}. {remedy}")


def differences(name: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield each field that differs, with its full name and both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            if key not in NAMES:
                yield from differences(f"{name}.{key}", one.get(key), other.get(key))
    elif one != other:
        yield name, one, other


def _short(value: Any) -> str:
    shown = str(value)
    return shown[:12] if len(shown) == 64 else shown if len(shown) <= 100 else f"{shown[:97]}..."


def _describe_source(config: Any) -> dict[str, Any]:
    """Name and revision of a pretrained part; of a local folder only its own name."""
    name = getattr(config, "_name_or_path", "") or None
    # A store is passed on, and the path of a home folder must not be in it.
    if name is not None and (os.path.isabs(name) or os.path.exists(name)):
        name = os.path.basename(os.path.normpath(name))
    return {"name": name, "model_type": config.model_type, "revision": getattr(config, "_commit_hash", None)}


def _sum(state: dict[str, torch.Tensor]) -> str:
    """Sums of all tensors' bits, at the speed of memory and wherever they lie."""
    # As whole numbers: sums of floats depend on the order, and a NaN would equal nothing, itself included.
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [tensor.detach().view(kinds[tensor.element_size()]).sum() for tensor in state.values() if tensor.dim()]
    return _digest([list(state), torch.stack([one.cpu() for one in sums]).tolist()])


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
