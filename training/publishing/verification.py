"""Load a Hub folder in processes that have nothing but transformers, and compare it bit for bit with its writer."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from modeling_memory.processing_memory import MemoryProcessor

from . import clean_process
from .bases import Base, places_of
from .hub_folder import (
    REPOSITORY,
    PublishError,
    auto_map_of,
    check_complete,
    check_files,
    is_causal_lm,
    load_checkpoint,
    load_processor,
)

SAMPLE_TEXT = "the rest of it:"
TIMEOUT = 1800  # seconds for each process
SAMPLE_CONTEXT = "a man in the sand and the sea"


def verify_hub_folder(
    folder: str | os.PathLike,
    model: PreTrainedModel | None = None,
    bases: Mapping[str, Base] | None = None,
) -> dict[str, Any]:
    """Load a Hub folder in clean processes and compare it bit for bit with its writer.

    The processes cannot import this repository, have an empty cache and no network. One loads the folder by
    its path, one as a repository of the Hub cache: the library imports the code in different ways.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        model (`PreTrainedModel`, *optional*): The model that was written. By default it is read back from the
            folder here, which checks the loading but not the writing.
        bases (`dict`, *optional*): Of a folder by reference, what encoder and decoder come from. One process is given
            their folders, the other finds them in the Hub's cache, by the ids and commits that the folder names.

    Returns:
        `dict`: For `"folder"` and `"hub"`, the module the model came from, the Auto classes and the cases
        compared.

    Raises:
        ValueError: If the folder is incomplete.
        PublishError: If something does not load or differs.
    """
    folder = Path(folder).expanduser().resolve()
    check_complete(folder)
    check_files(folder)
    if model is None:
        model, _ = load_checkpoint(folder, bases)
    with tempfile.TemporaryDirectory(prefix="verify-") as name:
        work = Path(name)
        _write_reference(folder, model, work / "reference.safetensors", bases)
        cache = work / "home" / "hub"
        _write_cache_entry(folder, cache / "models--me--memory-model")
        for base in (base for base in (bases or {}).values() if not base.is_package):
            _write_cache_entry(base.folder, cache / f"models--{base.id.replace('/', '--')}", base.revision)
        return {
            "folder": _run_clean(str(folder), work, places_of(bases)),
            "hub": _run_clean("me/memory-model", work, {}),
        }


def _write_reference(folder: Path, model: PreTrainedModel, path: Path, bases: Mapping[str, Base] | None) -> None:
    """Compute what the clean processes have to find again."""
    was_training = model.training
    device = next(model.parameters()).device
    if device.type != "cpu":  # another device computes other last bits
        places: dict[str, Any] = places_of(bases)
        implementation = model.config._attn_implementation
        model = model.__class__.from_pretrained(folder, attn_implementation=implementation, **places)
    processor = load_processor(folder)
    tokenizer = processor.tokenizer if isinstance(processor, MemoryProcessor) else processor
    request = _processor_request(model.config) if isinstance(processor, MemoryProcessor) else None
    cases = {"plain": _plain_inputs(model.config)}
    tensors = {}
    if request is not None:
        cases["processor"] = dict(processor(**request, return_tensors="pt"))
    if tokenizer is not None:
        tensors["tokenizer/input_ids"] = tokenizer(SAMPLE_TEXT, return_tensors="pt")["input_ids"]
    model.eval()
    for case, inputs in cases.items():
        tensors.update({f"inputs/{case}/{name}": tensor for name, tensor in inputs.items()})
        outputs = clean_process.compute(model, inputs)
        tensors.update({f"outputs/{case}/{name}": tensor for name, tensor in outputs.items()})
    model.train(was_training)
    settings = {
        "threads": torch.get_num_threads(),
        "attn_implementation": model.config._attn_implementation,
        "causal_lm": is_causal_lm(model.config.model_type),
        "remote_code": bool(auto_map_of(model.config.model_type)),
        "processor": request,
        "text": None if tokenizer is None else SAMPLE_TEXT,
    }
    save_file(tensors, path, metadata={"settings": json.dumps(settings)})


def _plain_inputs(config: Any) -> dict[str, torch.Tensor]:
    """Two rows of ids, the second one left-padded; for a memory model long enough to fold and to roll over."""
    if config.model_type == "memory_encoder_decoder":
        num_tokens = 3 * config.window_length - 2 if config.self_memory else config.window_length - 2
    elif config.model_type == "memory_autoencoder":
        num_tokens = config.chunk_length
    else:
        num_tokens = 24
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and config.model_type != "memory_autoencoder":
        num_tokens = min(num_tokens, limit - clean_process.NEW_TOKENS)
    num_tokens = max(num_tokens, 2)
    special = {"pad_token_id", "bos_token_id", "eos_token_id", "memory_token_id", "copy_token_id", "blank_token_id"}
    taken = {getattr(config, name, None) for name in special}
    vocabulary = getattr(config, "vocab_size", None) or config.encoder.vocab_size
    ids = torch.tensor([token_id for token_id in range(vocabulary) if token_id not in taken])
    generator = torch.Generator().manual_seed(0)
    input_ids = ids[torch.randint(len(ids), (2, num_tokens), generator=generator)]  # (2, T)
    attention_mask = torch.ones_like(input_ids)
    if config.model_type != "memory_autoencoder":
        attention_mask[1, 0] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _processor_request(config: Any) -> dict[str, Any] | None:
    """Arguments of a processor call that the model can take; `None` if it has no slots."""
    if getattr(config, "memory_token_id", None) is None:
        return None
    capacity = config.memory_capacity
    num_chunks = 3 if capacity is None else min(3, capacity // config.memories_per_chunk)
    if num_chunks < 1:
        return None
    context = SAMPLE_CONTEXT[: num_chunks * config.chunk_length]  # a token has at least one of these characters
    return {"text": [SAMPLE_TEXT[:3], SAMPLE_TEXT[:2]], "context": [context, context[:1]], "padding_side": "left"}


def _write_cache_entry(folder: Path, entry: Path, commit: str = "0123456789abcdef0123456789abcdef01234567") -> None:
    """Lay a folder out as a downloaded repository."""
    (entry / "refs").mkdir(parents=True, exist_ok=True)
    (entry / "refs" / "main").write_text(commit, encoding="utf-8")
    for path in folder.rglob("*"):
        if path.is_file():
            place = entry / "snapshots" / commit / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists():  # one repository may be the base of both parts
                continue
            try:
                place.symlink_to(path.resolve())
            except OSError:  # a file system without links
                shutil.copyfile(path, place)


def _run_clean(source: str, work: Path, bases: Mapping[str, str]) -> dict[str, Any]:
    """Run `clean_process.py` on a source and the places of its bases; return its report."""
    elsewhere = work / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TRANSFORMERS"))
    }
    environment = {
        **kept,
        "HF_HOME": str(work / "home"),
        "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="modules-", dir=work),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    script = str(Path(clean_process.__file__).resolve())
    command = [
        sys.executable,
        "-I",
        script,
        source,
        str(work / "reference.safetensors"),
        str(REPOSITORY),
        json.dumps(bases),
    ]
    try:
        result = subprocess.run(
            command,
            cwd=elsewhere,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise PublishError(f"loading {source} in a clean process took more than {TIMEOUT} seconds") from error
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise PublishError(f"{source} does not load as it was written: {lines[-1] if lines else 'no message'}")
    return json.loads(result.stdout.splitlines()[-1])
