"""A frozen encoder reads a corpus once: its states on disk.

The file's name is made of the encoder's weights, the tokens and the sizes, so that states of another encoder or text
are never taken.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from modeling_memory import MemoryEncoderDecoderForCausalLM

from ..records.record import data_digest

CHUNKS_AT_ONCE = 512


@torch.no_grad()
def keep_states(
    model: MemoryEncoderDecoderForCausalLM,
    chunks: torch.Tensor,
    read: Callable[[int, int], torch.Tensor],
    place: Path,
    shape: tuple[int, ...],
    about: dict[str, Any],
    bf16: bool,
) -> np.ndarray:
    """Read the states of chunks into a file whose name says of what they are, or find it.

    Args:
        model (`MemoryEncoderDecoderForCausalLM`): Its encoder, whose weights go into the name.
        chunks (`torch.Tensor` of shape `(N, L)`): What is encoded.
        read (`Callable`): From the first chunk and the one after the last, to their states on any device.
        place (`Path`): The file without the end of its name.
        shape (`tuple[int, ...]`): Shape of all states, the first size being N.
        about (`dict`): What else decides the states.
        bf16 (`bool`): Whether to read under autocast.

    Returns:
        `np.ndarray` of that shape: States in float32, memory-mapped.
    """
    file = place.with_name(f"{place.name}-{_key(model, chunks, {**about, 'bf16': bf16})}.npy")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        states = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        device = next(model.encoder.parameters()).device
        starts = range(0, len(chunks), CHUNKS_AT_ONCE)
        for start in tqdm(starts, desc="encoding the text once", disable=None, leave=False):
            stop = min(start + CHUNKS_AT_ONCE, len(chunks))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                states[start:stop] = read(start, stop).float().cpu().numpy()
        states.flush()
        del states
        os.replace(part, file)
    found: np.ndarray = np.load(file, mmap_mode="r")
    return found


def _key(model: Any, chunks: torch.Tensor, about: dict[str, Any]) -> str:
    about = {"encoder": model.config.encoder.to_dict(), **about, "chunks": list(chunks.shape)}
    digest = hashlib.sha256(data_digest(about).encode())
    for name, tensor in model.encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    for block in chunks.split(1 << 20):
        digest.update(block.long().contiguous().numpy())
    return digest.hexdigest()[:32]
