"""Prompts as embeddings, for servers that run the decoder alone.

vLLM takes them as `prompt_embeds` of `/v1/completions` (`--enable-prompt-embeds`): base64 of what `torch.save` writes
of a tensor `(T, D)` (https://docs.vllm.ai, "Prompt Embedding Inputs"). vLLM itself was not run here.

T positions of a prompt, D decoder width.
"""

import base64
import io
from typing import Any

import torch


class _Read(Exception):
    """Ends a call as soon as the decoder's input is known."""


@torch.no_grad()
def prompt_embeds(model: Any, **inputs: Any) -> list[torch.Tensor]:
    """Return what the decoder reads of prompts with memories: memories where slots stand, embedded tokens elsewhere.

    A server that reads it needs the decoder alone; `model.decoder.save_pretrained(folder)` writes it.

    Args:
        model ([`MemoryEncoderDecoderForCausalLM`]): The model.
        inputs: What `forward` takes: `input_ids`, `attention_mask`, and contexts or memories.

    Returns:
        `list` of `torch.FloatTensor` of shape `(T, D)`: one a row, without padding.

    Raises:
        ValueError: If there are no memories, or the model does more than to read embeddings at the positions 0, 1, 2
            and so on, so that another server would write something else.
    """
    config = model.config
    if inputs.get("context_input_ids") is None and inputs.get("memory_embeds") is None:
        raise ValueError("There are no memories in the prompt; a server reads plain text by itself. Give a context.")
    if config.memory_positions != "contiguous":
        raise ValueError(
            f"`memory_positions` is {config.memory_positions!r}: text does not stand right after its memories, but a "
            "server that is given embeddings counts positions one by one. Use a model with 'contiguous'."
        )
    if any("decoder" in adapter["parts"] for adapter in config.adapters.values()):
        raise ValueError("Adapters act inside the decoder, which embeddings do not carry. Merge them first.")
    seen: dict[str, Any] = {}

    def look(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise _Read

    # The decoder's own input, whatever the layout: nothing is computed twice, so nothing can differ.
    watch = model.decoder.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _Read:
        pass
    finally:
        watch.remove()
    embeds, mask = seen["inputs_embeds"], inputs.get("attention_mask")
    if mask is None or mask.shape != embeds.shape[:2]:
        mask = torch.ones_like(embeds[..., 0])
    return [row[kept.bool()].cpu() for row, kept in zip(embeds, mask, strict=True)]


def embeds_to_base64(embeds: torch.Tensor) -> str:
    """Write a prompt `(T, D)` as vLLM's field `prompt_embeds` takes it.

    >>> text = embeds_to_base64(torch.zeros(2, 3))
    >>> torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True).shape
    torch.Size([2, 3])
    """
    if embeds.dim() != 2 or not embeds.is_floating_point():
        raise ValueError(
            f"`embeds` has the shape {tuple(embeds.shape)} and {embeds.dtype}; expected one prompt, `(T, D)` floats."
        )
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu().contiguous().clone(), buffer)  # a clone: a view would carry its whole storage
    return base64.b64encode(buffer.getvalue()).decode("ascii")
