"""Loss on long held-out documents by position: rolling memory, no memory, a sliding window, full context.

T tokens of a document, W window length, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_memory import MemoryEncoderDecoderForCausalLM
from training.data.texts import load_texts
from training.places import REPOSITORY
from training.records.record import read_json

ROWS = 512


@dataclass(frozen=True)
class Quality:
    """Documents of so many tokens, spread evenly over a text; the run whose models read them.

    `trained_tokens` is how long the texts were that these models learnt from.
    """

    run: str = "runs/quickstart"
    text: str = "training/corpora/books/test.parquet"
    documents: int = 2
    tokens: int = 4096
    trained_tokens: int = 128


def token_losses(logits: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Nats for every token but the first `(T - 1,)`, from the logits `(T, V)` of the columns of a text `(T,)`."""
    return F.cross_entropy(logits[: len(text) - 1].float(), text[1:], reduction="none")


def read_rolling(model: MemoryEncoderDecoderForCausalLM, text: torch.Tensor) -> torch.Tensor:
    """Read a text `(T,)` window by window after the memories of all windows before it; logits `(T, V)`."""
    return model(text[None], use_cache=False).logits[0]


def read_newest(model: MemoryEncoderDecoderForCausalLM, text: torch.Tensor, memories: int) -> torch.Tensor:
    """As [`read_rolling`], but with the newest memories only."""
    config = model.config
    before = config.max_memories, config.memory_policy
    config.max_memories, config.memory_policy = memories, "drop_oldest"
    try:
        return read_rolling(model, text)
    finally:
        config.max_memories, config.memory_policy = before


def read_rows(model: PreTrainedModel, text: torch.Tensor, width: int) -> torch.Tensor:
    """Read a text `(T,)` in rows of `width` that do not see each other; logits `(T, V)`."""
    rows = text.view(-1, width).split(ROWS)
    return torch.cat([model(part, use_cache=False).logits for part in rows]).flatten(0, 1)


def read_sliding(model: PreTrainedModel, text: torch.Tensor, width: int) -> torch.Tensor:
    """Read a text `(T,)` so that each token is predicted from the `width` tokens before it; logits `(T, V)`."""
    first = model(text[None, : width - 1], use_cache=False).logits[0]
    rows = text.unfold(0, width, 1).split(ROWS)
    return torch.cat([first, *(model(part, use_cache=False, logits_to_keep=1).logits[:, 0] for part in rows)])


def readers(
    memory: MemoryEncoderDecoderForCausalLM, no_memory: PreTrainedModel, full_context: PreTrainedModel, trained: int
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The ways of reading by name; each returns logits `(at most T, V)`, full context as far as its positions go."""
    width = memory.config.window_length
    newest = (trained // width - 1) * memory.config.memories_per_window
    positions = full_context.config.max_position_embeddings
    return {
        "rolling": lambda text: read_rolling(memory, text),
        "rolling_newest": lambda text: read_newest(memory, text, newest),
        "no_memory": lambda text: read_rows(no_memory, text, width),
        "no_memory_sliding": lambda text: read_sliding(no_memory, text, width),
        "full_context": lambda text: full_context(text[None, :positions], use_cache=False).logits[0],
        "full_context_rows": lambda text: read_rows(full_context, text, trained),
    }


def by_position(losses: torch.Tensor, edges: list[int]) -> list[float | None]:
    """Mean of the losses of the tokens 1, 2, ... `(at most T - 1,)` from edge to edge; None where not all are there.

    >>> by_position(torch.tensor([1.0, 1.0, 3.0, 5.0]), [0, 3, 5, 9])
    [1.0, 4.0, None]
    """
    parts = [losses[max(start - 1, 0) : end - 1] for start, end in zip(edges, edges[1:], strict=False)]
    lengths = [end - max(start, 1) for start, end in zip(edges, edges[1:], strict=False)]
    return [part.mean().item() if len(part) == length else None for part, length in zip(parts, lengths, strict=True)]


@torch.no_grad()
def losses_by_position(
    paths: dict[str, Callable[[torch.Tensor], torch.Tensor]], documents: torch.Tensor, first_edge: int
) -> dict[str, Any]:
    """Loss of each way of reading documents `(N, T)`, by position: edges are 0 and `first_edge` times 1, 2, 4, ..."""
    tokens = documents.shape[1]
    edges = [0]
    while edges[-1] < tokens:
        edges.append(min(first_edge if edges[-1] == 0 else 2 * edges[-1], tokens))
    by_document: dict[str, list[list[float | None]]] = {}
    for name, read in paths.items():
        by_document[name] = []
        for text in documents:
            logits = read(text)
            by_document[name].append(by_position(token_losses(logits, text[: len(logits) + 1]), edges))
    losses = {
        name: [None if None in column else sum(column) / len(column) for column in zip(*rows, strict=True)]
        for name, rows in by_document.items()
    }
    return {"edges": edges, "losses": losses, "losses_by_document": by_document}


def cut_documents(tokenizer: PreTrainedTokenizerBase, text: str, num_documents: int, num_tokens: int) -> torch.Tensor:
    """Cut stretches `(num_documents, num_tokens)` out of a text file of the repository, spread evenly over it."""
    joined = "\n\n".join(load_texts([REPOSITORY / text]))
    ids = torch.tensor(tokenizer(joined, add_special_tokens=False)["input_ids"])
    last = len(ids) - num_tokens
    starts = [last * i // max(num_documents - 1, 1) for i in range(num_documents)]
    return torch.stack([ids[start : start + num_tokens] for start in starts])


def measure_quality(cell: Quality) -> dict[str, Any]:
    """Load the run's models, cut the documents and read them in every way."""
    run = REPOSITORY / cell.run
    memory = MemoryEncoderDecoderForCausalLM.from_pretrained(run / "hub").eval()
    no_memory, full_context = (
        AutoModelForCausalLM.from_pretrained(run / "stages" / name / "model").eval()
        for name in ("no_memory", "full_context")
    )
    tokenizer = AutoTokenizer.from_pretrained(run / "hub")
    documents = cut_documents(tokenizer, cell.text, cell.documents, cell.tokens)
    paths = readers(memory, no_memory, full_context, cell.trained_tokens)
    result = losses_by_position(paths, documents, cell.trained_tokens)
    newest = (cell.trained_tokens // memory.config.window_length - 1) * memory.config.memories_per_window
    return {
        **result,
        "window_length": memory.config.window_length,
        "newest_memories": newest,
        "run_commit": read_json(run / "record.json")["code"]["commit"],
    }
