"""Checkpoints that are whole or not there: written beside their place, listed, flushed, renamed.

`checkpoints/` of a stage holds `checkpoint-<step>/`, each a folder that `from_pretrained` loads, with the optimizer's
state and `complete.json`, the sizes of all its files. What is being written stands in `checkpoints/.part/`. Frozen
weights are written once, to `checkpoints/frozen.safetensors`, and linked into every checkpoint.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

logger = logging.get_logger(__name__)

MANIFEST = "complete.json"
PART = ".part"
FROZEN = "frozen.safetensors"
SHARDS = {"trained": "model-00001-of-00002.safetensors", "frozen": "model-00002-of-00002.safetensors"}
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)
"""What a full disk raises: the system's error, that of safetensors, that of torch's archive writer."""


def commit(part: Path, final: Path, step: int) -> None:
    """List the files of a written checkpoint, flush them to the disk and put the folder in its place.

    Args:
        part (`Path`): The folder as written.
        final (`Path`): Its place, on the same file system; replaced if it is there.
        step (`int`): Optimizer steps that the checkpoint holds.
    """
    files = sorted(file for file in part.rglob("*") if file.is_file())
    sizes = {file.relative_to(part).as_posix(): file.stat().st_size for file in files}
    (part / MANIFEST).write_text(json.dumps({"step": step, "files": sizes}, indent=1) + "\n", encoding="utf-8")
    for path in [*files, part / MANIFEST, part]:
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    if part.parent.name == PART:
        part.parent.rmdir()
    _flush(final.parent)


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints; called only when a new one is in its place."""
    for checkpoint in _by_step(folder)[: -max(keep, 1)]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def last_complete_checkpoint(folder: Path, say: Callable[[str], None] = logger.warning) -> Path | None:
    """Return the newest checkpoint of a folder that is whole, or `None`.

    Args:
        folder (`Path`): A stage's `checkpoints/`.
        say (`Callable`): Called for every newer one that is passed over, and why.
    """
    for checkpoint in reversed(_by_step(folder)):
        fault = what_is_torn(checkpoint)
        if fault is None:
            return checkpoint
        say(f"{checkpoint.name} of {folder.parent.name} is passed over: {fault}")
    return None


def what_is_torn(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint, or return `None` if it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): int(size) for name, size in manifest["files"].items()}
    except FileNotFoundError:
        return f"it was not written to its end ({MANIFEST} is missing)"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, size in files.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        found = (checkpoint / name).stat().st_size
        if found != size:
            return f"{name} has {found} of {size} bytes"
    return None


def frozen_names(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that are not trained; a tied one counts under its first name."""
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def save_split(model: PreTrainedModel, folder: Path, store: Path) -> None:
    """Save a model of which a part is frozen: trained weights as one shard, the frozen ones linked as the other.

    Args:
        model (`PreTrainedModel`): The model.
        folder (`Path`): The checkpoint that is being written.
        store (`Path`): Holds `frozen.safetensors`; written if it is missing or holds other weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    frozen = frozen_names(model)
    state: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size, int]] = set()
    for name, tensor in model.state_dict().items():
        same = (tensor.data_ptr(), tensor.shape, tensor.storage_offset())
        if tensor.numel() and same in seen:  # tied: the model ties it again
            continue
        seen.add(same)
        state[name] = tensor.detach().contiguous()
    parts = {
        "trained": {name: tensor for name, tensor in state.items() if name not in frozen},
        "frozen": {name: tensor for name, tensor in state.items() if name in frozen},
    }
    if not _holds(store / FROZEN, parts["frozen"]):
        beside = store / f"{FROZEN}.part"
        save_file(parts["frozen"], beside, metadata={"format": "pt"})
        os.replace(beside, store / FROZEN)
    save_file(parts["trained"], folder / SHARDS["trained"], metadata={"format": "pt"})
    try:
        os.link(store / FROZEN, folder / SHARDS["frozen"])
    except OSError:  # a file system without links
        shutil.copyfile(store / FROZEN, folder / SHARDS["frozen"])
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
        "weight_map": {name: SHARDS[part] for part, tensors in parts.items() for name in tensors},
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
    model.config.save_pretrained(folder)


def _holds(file: Path, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a file holds exactly these tensors, bit by bit."""
    try:
        with safe_open(file, framework="pt") as stored:
            return set(stored.keys()) == set(tensors) and all(
                torch.equal(stored.get_tensor(name), tensor.cpu()) for name, tensor in tensors.items()
            )
    except (OSError, SafetensorError):
        return False


def _by_step(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _flush(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a fresh folder, then put it in the place of `folder`."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def check_same(before: Any, now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on in a folder that something else was trained in.

    Raises:
        ValueError: Naming the first difference and the remedy.
    """
    if before is None or before == now:
        return
    path, old, new = next(differences(before, now))
    raise ValueError(
        f"{folder.name} was begun with {path} = {old!r}, and now it is {new!r}; delete the folder {folder} to train "
        "it again, or give the run another output_dir"
    )


def differences(before: Any, now: Any, path: str = "") -> Any:
    """Yield dotted path, old and new value of everything that differs.

    >>> list(differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}))
    [('a.b', 1, 3)]
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            inner = f"{path}.{key}" if path else str(key)
            yield from differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield path, before, now
