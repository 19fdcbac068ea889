"""What a memory depends on, as checksums: encoder, projector, tokenizer and how text is cut into chunks."""

import hashlib
import json
import os
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .memory_files import MemoryStoreError
from .memory_saving import state_hash

EXPLANATIONS = {
    "encoder": "the encoder is another, or its weights were loaded in another dtype",
    "projector": "the projector is another, or its weights were loaded in another dtype",
    "tokenizer": "the tokenizer that cuts the text is another",
    "cut": "text is cut into chunks, or read out of them, in another way",
}
FUNCTION_FIELDS = (
    "num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rope_theta",
    "causal",
)
"""Fields of an encoder's config that change what it computes without changing the shape of a weight."""


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
        state.pop("padding"), state.pop("truncation")
    return _digest(state)


def fingerprint(model: PreTrainedModel, processor: Any) -> dict[str, Any]:
    """Describe what the memories of a model depend on.

    Args:
        model ([`MemoryEncoderDecoderModel`]): The model.
        processor ([`MemoryProcessor`]): Its processor.

    Returns:
        `dict`: Part -> `sha256` beside what names it: `encoder` (its pooling included), `projector`, `tokenizer`, and
        `cut`, how text becomes chunks and memories. `model` and all names and revisions are for the reader; only the
        checksums are compared.

    Raises:
        MemoryStoreError: If the processor cuts text otherwise than the model's config says.
    """
    config = model.config
    for name in ("chunk_length", "memories_per_chunk"):
        if getattr(processor, name) != getattr(config, name):
            raise MemoryStoreError(
                f"The processor's `{name}` is {getattr(processor, name)} and the model's {getattr(config, name)}. "
                "Give the processor that belongs to the model."
            )
    encoder, pooling, projector = (
        {f"{part}.{name}": tensor for name, tensor in getattr(model, part).state_dict().items()}
        for part in ("encoder", "pooling", "projector")
    )
    fields = {name: str(getattr(config.encoder, name)) for name in FUNCTION_FIELDS if hasattr(config.encoder, name)}
    projection = {"kind": config.projector_type, "norm": config.projector_norm}
    cut = {
        "chunk_length": config.chunk_length,
        "memories_per_chunk": config.memories_per_chunk,
        "pooling": config.pooling,
        "hidden_size": config.decoder.hidden_size,
    }
    return {
        "model": _describe_source(config),
        "encoder": {
            **_describe_source(config.encoder),
            "dtype": str(next(model.encoder.parameters()).dtype).removeprefix("torch."),
            "sha256": _digest([fields, state_hash(encoder | pooling)]),
        },
        "projector": {**projection, "sha256": _digest([projection, state_hash(projector)])},
        "tokenizer": {"sha256": tokenizer_checksum(processor.encoder_tokenizer or processor.tokenizer)},
        "cut": {**cut, "sha256": _digest(cut)},
    }


def check_same_fingerprint(stored: dict[str, Any], given: dict[str, Any], whose: str) -> None:
    """Refuse memories of another model.

    Args:
        stored (`dict`): Fingerprint of a store.
        given (`dict`): Fingerprint of a model, or of another store.
        whose (`str`): What `given` belongs to.

    Raises:
        MemoryStoreError: Naming each part that differs, both sides, and the remedy.
    """
    reasons = []
    for part, explanation in EXPLANATIONS.items():
        one, other = stored[part], given[part]
        if one["sha256"] != other["sha256"]:
            sides = (
                ", ".join(f"{key} {str(value)[:12]}" for key, value in side.items() if value is not None)
                for side in (one, other)
            )
            reasons.append(f"{explanation} ({' against '.join(sides)})")
    if reasons:
        raise MemoryStoreError(
            f"The store's memories are not those of {whose}: {'; '.join(reasons)}. Load the model that wrote the "
            "store, in the same dtype, or remember the texts again in a new store."
        )


def _describe_source(config: Any) -> dict[str, Any]:
    """Name and revision of a pretrained part; of a local folder only its own name."""
    name = getattr(config, "_name_or_path", "") or None
    if name is not None and (os.path.isabs(name) or os.path.exists(name)):
        name = os.path.basename(os.path.normpath(name))
    return {"name": name, "model_type": config.model_type, "revision": getattr(config, "_commit_hash", None)}


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
