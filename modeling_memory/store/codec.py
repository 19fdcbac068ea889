"""Numbers of a stored memory: full and half precision, int8 and int4 with scales, and what each costs.

n chunks, K memories per chunk, D decoder width, B rows, T columns.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

PLAIN = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES = (*PLAIN, "int8", "int4")
"""Names of the number formats that memories can be stored in."""
DEFAULT_DTYPE = "int8"
"""Of a store for which none is named: half the bytes of float16, and no chunk lost by it where that was measured."""
ROUGH = 0.02
"""[`rounding_error`] that goes unsaid: 0.8 % in int8 for 128 normal numbers, far more where a few are far larger."""
GROUP = 32
"""Numbers of an int4 memory that share a scale."""


def check_dtype(name: str) -> None:
    """Refuse a number format that is not known here.

    Raises:
        ValueError: Naming those that are.
    """
    if name not in DTYPES:
        raise ValueError(f"`dtype` is {name!r}; expected one of {', '.join(map(repr, DTYPES))}.")


def code_sizes(dtype: str, memories_per_chunk: int, width: int) -> tuple[int, int]:
    """Return how many bytes the codes of a chunk take, and how many its scales."""
    if dtype in PLAIN:
        return memories_per_chunk * width * PLAIN[dtype].itemsize, 0
    if dtype == "int8":
        return memories_per_chunk * width, memories_per_chunk * 4
    groups = -(-width // GROUP)
    return memories_per_chunk * groups * GROUP // 2, memories_per_chunk * groups * 4


def encode_vectors(memories: torch.Tensor, dtype: str) -> list[bytes]:
    """Turn memories into the bytes that are stored: codes of a chunk, then its scales in float32.

    Args:
        memories (`torch.FloatTensor` of shape `(n, K, D)`): The memories.
        dtype (`str`): A name in `DTYPES`. int8 has a scale for each vector, its largest absolute value over 127; int4
            one for each 32 numbers, over 7.

    Raises:
        ValueError: If a memory is not finite, or beyond what the format holds.
    """
    check_dtype(dtype)
    memories = memories.detach().float().cpu()
    if not torch.isfinite(memories).all():
        raise ValueError("A memory holds a number that is not finite. Check the model that encoded it.")
    if dtype in PLAIN:
        codes = memories.to(PLAIN[dtype])
        # float16 ends at 65,504, which a norm without bound can pass.
        if not torch.isfinite(codes).all():
            raise ValueError(
                f"A memory reaches {memories.abs().max():.3g}, more than {dtype} holds. Store it as 'bfloat16', "
                "'float32' or 'int8'."
            )
        parts = [codes]
    else:
        most = 127.0 if dtype == "int8" else 7.0
        grouped = memories.unsqueeze(-2)  # (n, K, groups, numbers of a group)
        if dtype == "int4":
            grouped = nn.functional.pad(memories, (0, -memories.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
        # Never zero: a group of zeros would be divided by it.
        scales = grouped.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / most
        codes = (grouped / scales[..., None]).round().clamp(-most, most).to(torch.int8)
        if dtype == "int4":
            # Two codes share a byte, so they must not be negative.
            halves = (codes + 8).view(torch.uint8)
            codes = halves[..., ::2] | (halves[..., 1::2] << 4)
        parts = [codes, scales]
    rows = torch.cat([part.flatten(1).contiguous().view(torch.uint8) for part in parts], 1)  # (n, bytes of a chunk)
    content, size = rows.numpy().tobytes(), rows.shape[1]
    return [content[place : place + size] for place in range(0, len(content), size)]


def decode_vectors(rows: list[bytes], dtype: str, memories_per_chunk: int, width: int) -> torch.Tensor:
    """Turn stored bytes back into memories `(n, K, D)` in float32, in storage of their own.

    Args:
        rows (`list` of `bytes`): From [`encode_vectors`].
        dtype (`str`): Their format.
        memories_per_chunk (`int`): K.
        width (`int`): D.
    """
    shape = (len(rows), memories_per_chunk, width)
    if not rows:
        return torch.empty(shape)
    # A copy that may be written to: tensors over bytes of Python's own are read-only.
    content = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1)
    codes, scales = content.split(code_sizes(dtype, memories_per_chunk, width), 1)
    if dtype in PLAIN:
        return codes.contiguous().view(PLAIN[dtype]).view(shape).float()
    scales = scales.contiguous().view(torch.float32).view(*shape[:2], -1, 1)
    if dtype == "int4":
        codes = torch.stack([codes & 15, codes >> 4], -1).view(torch.int8) - 8
    memories = codes.contiguous().view(torch.int8).view(*scales.shape[:3], -1).float() * scales
    return memories.flatten(2)[..., :width].contiguous()


def rounding_error(memories: torch.Tensor, rows: list[bytes], dtype: str) -> float:
    """Return by how much stored memories miss those `(n, K, D)` that were encoded, as a share of a usual number."""
    memories = memories.detach().float().cpu()
    missed = (decode_vectors(rows, dtype, *memories.shape[1:]) - memories).square().mean().sqrt()
    # Not of their length, which a single large number makes, whatever becomes of all others.
    return (missed / memories.abs().mean().clamp(min=torch.finfo(torch.float32).tiny)).item()


@torch.no_grad()
def quantization_report(
    model: PreTrainedModel,
    memory_embeds: torch.Tensor,
    memory_mask: torch.Tensor | None = None,
    *,
    dtypes: tuple[str, ...] = DTYPES,
    **inputs: Any,
) -> dict[str, dict[str, float]]:
    """Measure what storing memories in a number format costs: loss and token accuracy before and after.

    Args:
        model ([`MemoryEncoderDecoderForCausalLM`]): Reads the memories.
        memory_embeds (`torch.FloatTensor` of shape `(B, M, D)`): Memories as encoded.
        memory_mask (`torch.LongTensor` of shape `(B, M)`, *optional*): 1 for present memories.
        dtypes (`tuple` of `str`): Formats to measure beside the memories as they are (`"encoded"`).
        inputs: `input_ids` `(B, T)` with slots, `attention_mask`, and `labels` or `shift_labels` of shape `(B, T)`.

    Returns:
        `dict`: Format -> `loss` (nats per target), `token_accuracy`, `num_tokens`, `bytes_per_memory`, and
        `loss_increase`, relative to `"encoded"`.

    Raises:
        ValueError: If no target is given.

    Source: Badger 2026, arXiv 2602.13466, and its sibling study of quantised memories (cast after training).
    """
    targets = inputs.pop("shift_labels", None)
    labels = inputs.pop("labels", None)
    if targets is None and labels is not None:
        targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    wanted = None if targets is None else targets != -100
    if wanted is None or not wanted.any():
        raise ValueError("No target was given, so there is no loss to compare. Give `labels` or `shift_labels`.")
    report = {}
    for dtype in ("encoded", *dtypes):
        memories, size = memory_embeds, memory_embeds.shape[-1] * memory_embeds.element_size()
        if dtype != "encoded":
            rows = encode_vectors(memory_embeds, dtype)
            memories = decode_vectors(rows, dtype, *memory_embeds.shape[1:]).to(memory_embeds)
            size = sum(code_sizes(dtype, 1, memory_embeds.shape[-1]))
        # Through the model that reads them: equal errors in two directions of a vector need not cost the same.
        logits = model(memory_embeds=memories, memory_mask=memory_mask, use_cache=False, **inputs).logits
        logits = logits[wanted].float()
        report[dtype] = {
            "loss": torch.nn.functional.cross_entropy(logits, targets[wanted]).item(),
            "token_accuracy": (logits.argmax(-1) == targets[wanted]).double().mean().item(),
            "num_tokens": int(wanted.sum()),
            "bytes_per_memory": size,
        }
        report[dtype]["loss_increase"] = report[dtype]["loss"] / report["encoded"]["loss"] - 1
    return report
