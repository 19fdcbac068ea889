"""A text, its few memories, and what the decoder regenerates from them alone: the first thing to look at."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.objectives import BatchSpec, SpecialTokens, build_batch

SHOWN_NUMBERS = 4
RED, PLAIN = "\x1b[31m", "\x1b[0m"


@torch.no_grad()
def regenerate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: torch.Tensor,
    special_tokens: SpecialTokens,
    num_windows: int = 1,
) -> dict[str, Any] | None:
    """Encode the start of a text and read it back from its memories, with no text in sight.

    Args:
        model (`PreTrainedModel`): A memory encoder-decoder.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        tokens (`torch.Tensor` of shape `(num_tokens,)`): A text, longer than its first document's end if possible.
        special_tokens (`SpecialTokens`): Ids of the special tokens.
        num_windows (`int`): Windows to show; more than a recipe trained to copy at once come out as guesses.

    Returns:
        `dict`: `text`, `memories` (count, width, and for each its norm and first numbers), and `tokens`, a list of
        regenerated pieces with whether each is right. `None` if the text is too short.
    """
    config = model.config
    length = num_windows * config.window_length
    if tokens.numel() < length:
        return None
    source = tokens[:length].long()[None].to(model.device)
    model.eval()
    memories, _ = model.encode_memories(source.reshape(1, -1, config.chunk_length))
    batch = build_batch(
        "blank_copy",
        source,
        BatchSpec(
            special_tokens,
            chunk_length=config.chunk_length,
            window_length=config.window_length,
            memories_per_chunk=config.memories_per_chunk,
            layout="self" if config.self_memory else "slots",
        ),
    )
    targets = batch.pop("shift_labels")[:, -length:]
    predicted = model(**batch, use_cache=False).logits[:, -length:].argmax(-1)
    right = (predicted == targets)[0].tolist()
    pieces = [tokenizer.decode([token]) for token in predicted[0].tolist()]
    vectors = memories[0].float()
    return {
        "text": tokenizer.decode(source[0].tolist()),
        "num_tokens": length,
        "num_memories": vectors.shape[0],
        "memory_width": vectors.shape[1],
        "memories": [
            {"norm": round(vector.norm().item(), 3), "first": [round(x, 3) for x in vector[:SHOWN_NUMBERS].tolist()]}
            for vector in vectors
        ],
        "tokens": [[piece, ok] for piece, ok in zip(pieces, right, strict=True)],
        "num_right": sum(right),
    }


def sample_lines(sample: dict[str, Any], *, colour: bool = False) -> list[str]:
    r"""Write a sample as lines of text; wrong tokens in [brackets], or red on a terminal.

    >>> sample = {"text": "the cat", "num_tokens": 2, "num_memories": 1, "memory_width": 8, "num_right": 1}
    >>> sample |= {"memories": [{"norm": 1.5, "first": [0.1, -0.2]}], "tokens": [["the", True], [" dog", False]]}
    >>> print("\n".join(sample_lines(sample)))
    a text of 2 tokens
      the cat
    its 1 memories of 8 numbers
      |m0| = 1.5: 0.1 -0.2 ...
    regenerated from the memories alone: 1 of 2 tokens right, wrong ones in [brackets]
      the[ dog]
    """
    opening, closing = (RED, PLAIN) if colour else ("[", "]")
    written = "".join(piece if ok else f"{opening}{piece}{closing}" for piece, ok in sample["tokens"])
    lines = [f"a text of {sample['num_tokens']} tokens", _indent(sample["text"])]
    lines.append(f"its {sample['num_memories']} memories of {sample['memory_width']} numbers")
    for index, memory in enumerate(sample["memories"]):
        lines.append(f"  |m{index}| = {memory['norm']}: {' '.join(map(str, memory['first']))} ...")
    marked = "red" if colour else "in [brackets]"
    right, total = sample["num_right"], sample["num_tokens"]
    lines.append(f"regenerated from the memories alone: {right} of {total} tokens right, wrong ones {marked}")
    return [*lines, _indent(written)]


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
