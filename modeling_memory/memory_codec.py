"""Numbers of a stored memory: full and half precision, int8 and float8 with one scale a vector, and what each costs.

n memories, D decoder width, B rows, T columns.
"""

from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

PLAIN = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCALED = {"int8": torch.int8}
for _name in ("float8_e4m3fn", "float8_e5m2"):
    if hasattr(torch, _name):
        SCALED[_name] = getattr(torch, _name)
DTYPES = {**PLAIN, **SCALED}
"""Names of the number formats that memories can be stored in."""


def check_dtype(name: str) -> None:
    """Refuse a number format that is not known here.

    Raises:
        ValueError: Naming those that are.
    """
    if name not in DTYPES:
        raise ValueError(f"`dtype` is {name!r}; expected one of {', '.join(map(repr, DTYPES))}.")


def encode_vectors(memories: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Turn memories into the numbers that are stored.

    Args:
        memories (`torch.FloatTensor` of shape `(..., D)`): The memories.
        dtype (`str`): A name in `DTYPES`. int8 and float8 get one scale a vector, its largest absolute value over
            the largest of the format.

    Returns:
        Codes `(..., D)` and scales `(...)` in float32, `None` for formats that need none.

    Raises:
        ValueError: If a memory is not finite, or beyond what the format holds.

    Example:
    ```python
    >>> codes, scales = encode_vectors(torch.tensor([[1.0, -2.0]]), "int8")
    >>> codes.tolist(), round(scales.item(), 4)
    ([[64, -127]], 0.0157)

    ```
    """
    check_dtype(dtype)
    if not torch.isfinite(memories).all():
        raise ValueError("A memory holds a number that is not finite. Check the model that encoded it.")
    memories = memories.float()
    if dtype in PLAIN:
        codes = memories.to(PLAIN[dtype])
        if not torch.isfinite(codes).all():
            raise ValueError(
                f"A memory reaches {memories.abs().max():.3g}, more than {dtype} holds. Store it as 'bfloat16', "
                "'float32' or 'int8'."
            )
        return codes, None
    kind = SCALED[dtype]
    most = 127.0 if kind == torch.int8 else torch.finfo(kind).max
    scales = memories.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / most
    scaled = (memories / scales[..., None]).clamp(-most, most)
    return (scaled.round() if kind == torch.int8 else scaled).to(kind), scales


def decode_vectors(codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Turn stored numbers back into memories `(..., D)` in float32.

    Args:
        codes (`torch.Tensor` of shape `(..., D)`): From [`encode_vectors`].
        scales (`torch.FloatTensor` of shape `(...)`, *optional*): From [`encode_vectors`].
    """
    memories = codes.float()
    return memories if scales is None else memories * scales[..., None].float()


@torch.no_grad()
def quantization_report(
    model: PreTrainedModel,
    memory_embeds: torch.Tensor,
    memory_mask: torch.Tensor | None = None,
    *,
    dtypes: tuple[str, ...] = tuple(DTYPES),
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
            codes, scales = encode_vectors(memory_embeds, dtype)
            memories = decode_vectors(codes, scales).to(memory_embeds.dtype)
            size = codes.shape[-1] * codes.element_size() + (0 if scales is None else scales.element_size())
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
