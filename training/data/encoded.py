"""A frozen encoder reads a corpus once: its states on disk, and training from them.

What is kept is what the encoder and its pooling give, before the projector, which is trained. Chunks stand on a fixed
grid over the token stream; rows begin on it. The file's name is made of the encoder's weights, the tokens and the
sizes, so that states of another encoder or text are never taken.
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
from modeling_memory.memory_encoder import encode_chunks

from ..records.record import data_digest

CHUNKS_AT_ONCE = 512


class EncodedChunks:
    """Encoder states of every chunk of a token stream, on disk, memory-mapped.

    Args:
        states (`np.ndarray` of shape `(chunks, K, E)`): The states, in float32.
        chunk_length (`int`): Tokens of a chunk.
    """

    def __init__(self, states: np.ndarray, chunk_length: int) -> None:
        self.states = states
        self.chunk_length = chunk_length

    def of(self, first_token: int, num_tokens: int) -> torch.Tensor:
        """Return the states of the whole chunks of a row, `(chunks, K, E)`; the row begins with a chunk."""
        first = first_token // self.chunk_length
        return torch.from_numpy(self.states[first : first + num_tokens // self.chunk_length].copy())


@torch.no_grad()
def encode_once(
    model: MemoryEncoderDecoderForCausalLM, tokens: torch.Tensor, folder: Path, *, bf16: bool, device: torch.device
) -> EncodedChunks:
    """Encode a token stream, or find it encoded.

    Args:
        model (`MemoryEncoderDecoderForCausalLM`): Its encoder must be frozen.
        tokens (`torch.Tensor` of shape `(num_tokens,)`): The stream; what fills no chunk at its end is left out.
        folder (`Path`): Where the states are kept.
        bf16 (`bool`): Whether training autocasts to bfloat16: the encoder then does here, too.
        device (`torch.device`): Where to encode.

    Raises:
        ValueError: If the encoder is trained, so that its states would be old after one step.
    """
    config = model.config
    if any(parameter.requires_grad for part in (model.encoder, model.pooling) for parameter in part.parameters()):
        raise ValueError(
            "data.encode_once needs a frozen encoder and a pooling that does not learn; set model.freeze_encoder: "
            "true without adapters and encoder_trained_from, and pooling to last, mean or first, or leave it out"
        )
    length = config.chunk_length
    chunks = tokens[: tokens.numel() // length * length].view(-1, length)
    about = {
        "pooling": config.pooling,
        "bos": config.encoder_bos_token_id,
        "memories_per_chunk": config.memories_per_chunk,
    }
    encoder = model.encoder.to(device).eval()

    def read(start: int, stop: int) -> torch.Tensor:
        ids = chunks[start:stop].long().to(device)
        return encode_chunks(encoder, model.pooling, ids, config=config)

    shape = len(chunks), config.memories_per_chunk, config.encoder.hidden_size
    return EncodedChunks(keep_states(model, chunks, read, folder / "states", shape, about, bf16), length)


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
