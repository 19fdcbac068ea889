"""Retrieval by one vector a text: training by contrast, and how often a piece of a text finds its text.

```bash
python -m training.retrieval causal=runs/quickstart/stages/decoder/model \
    autoencoder=runs/quickstart/stages/autoencoder/model --query ngram --length 16
```

A query is a piece of a text: n tokens in a row (`ngram`), or n tokens drawn from it (`bag`). Texts and queries are
read by the same encoder without special tokens, each at its last *real* token, and compared by cosine. In training
every other text of the batch is a negative (InfoNCE). The encoder starts from a causal LM, from an autoencoder, or
from anything else.

Q queries, N texts, T tokens of a text, n tokens of a query, E width.

Source: Badger 2026, arXiv 2602.13466, n-gram InfoNCE and retrieval accuracy. There a query is padded and read at a
padding slot, one query is trained a batch, and "top-1" is counted in the batch; here all rows are queries, padding is
masked, and all test texts are searched.
"""

import argparse
import copy
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_memory.memory_encoder import LastPooling, encode_chunks
from training.command_line import Parser, check_place, positive_number, run_command, whole_number
from training.data.texts import file_checksums
from training.measure.frozen import FrozenEncoder, cut_rows, load_encoder
from training.measure.metrics import wilson_interval
from training.places import portable_path
from training.probe import in_random_order, named_models, read_texts, tokens_checksum, weights_checksum
from training.records.record import (
    Measurement,
    data_digest,
    read_json,
    write_json,
    write_record,
)
from training.train.fit import Budget, Order, fit

QUERIES = ("ngram", "bag")


@dataclass(frozen=True)
class QueryRule:
    """How queries are made of texts.

    Attributes:
        kind (`str`): `"ngram"`: tokens in a row; `"bag"`: tokens drawn without repetition, in random order.
        size (`int`): Tokens of a query (n).
    """

    kind: Literal["ngram", "bag"] = "ngram"
    size: int = 7

    def __post_init__(self) -> None:
        if self.kind not in QUERIES or self.size < 1:
            raise ValueError(f"a query of {self.size} tokens of kind {self.kind!r}; known: {', '.join(QUERIES)}, 1 up")

    def make(self, texts: torch.Tensor, seed: int) -> torch.Tensor:
        """Make a query `(N, n)` of each text `(N, T)`.

        Raises:
            ValueError: If texts are shorter than queries.
        """
        num_texts, length = texts.shape
        if length < self.size:
            raise ValueError(f"a query takes {self.size} tokens, but texts have {length}; make queries shorter")
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "ngram":
            start = torch.randint(length - self.size + 1, (num_texts, 1), generator=generator)
            places = start + torch.arange(self.size)
        else:
            places = torch.rand(num_texts, length, generator=generator).argsort(1)[:, : self.size]
        return texts.gather(1, places.to(texts.device))


class RetrievalEncoder(nn.Module):
    """A body whose state at the last real token is a text's vector.

    Args:
        body (`PreTrainedModel`): Of a causal LM, an autoencoder's encoder, or any other.
    """

    def __init__(self, body: PreTrainedModel) -> None:
        super().__init__()
        self.body = body
        self.pooling = LastPooling(1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Map texts `(N, T)`, padded anywhere, to vectors `(N, E)` of length 1."""
        vectors = encode_chunks(self.body, self.pooling, input_ids, attention_mask)[:, 0]
        return nn.functional.normalize(vectors.float(), dim=-1)


def info_nce(queries: torch.Tensor, texts: torch.Tensor, temperature: float = 0.02) -> torch.Tensor:
    """Contrast each query with its own text against all texts of the batch.

    Args:
        queries (`torch.Tensor` of shape `(N, E)`): Unit vectors; query i belongs to text i.
        texts (`torch.Tensor` of shape `(N, E)`): Unit vectors.
        temperature (`float`): Of the cosines.

    Returns:
        The mean of -log(e^{q·p/τ} / Σ_j e^{q·t_j/τ}), a scalar.

    Raises:
        ValueError: If shapes differ or there is no negative.

    >>> info_nce(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor(0.3133)
    """
    if queries.dim() != 2 or queries.shape != texts.shape or len(queries) < 2:
        raise ValueError(
            f"queries have shape {tuple(queries.shape)} and texts {tuple(texts.shape)}; expected the same (N, E), N "
            "of 2 or more, so that there is a negative"
        )
    return nn.functional.cross_entropy(
        queries @ texts.T / temperature, torch.arange(len(queries), device=texts.device)
    )


def train_retrieval(
    body: PreTrainedModel,
    texts: torch.Tensor,
    rule: QueryRule,
    budget: Budget,
    *,
    temperature: float = 0.02,
    checkpoint: Path | None = None,
    label: str = "",
) -> RetrievalEncoder:
    """Train a copy of a body to find texts by pieces of them.

    Args:
        body (`PreTrainedModel`): Where to start; not changed.
        texts (`torch.LongTensor` of shape `(N, T)`): Training texts.
        rule (`QueryRule`): How queries are made, anew in every step.
        budget (`Budget`): `batch_tokens` counts tokens of texts; `batch_tokens / T` texts are contrasted.
        temperature (`float`): Of the cosines.
        checkpoint (`Path`, *optional*): Where the state is kept.
        label (`str`): For the progress bar.

    Raises:
        ValueError: If a batch would hold fewer than two texts.
    """
    order = Order(len(texts), budget.batch_tokens // texts.shape[1], budget.seed)
    if min(order.batch_size, order.num_rows) < 2:
        raise ValueError(
            f"a step holds {min(order.batch_size, order.num_rows)} texts of {texts.shape[1]} tokens, which leaves no "
            "negative; give more batch tokens, more text or shorter texts"
        )
    model = RetrievalEncoder(copy.deepcopy(body).requires_grad_(True))

    def loss_of_step(step: int) -> torch.Tensor:
        own = texts[order.rows(step)].to(body.device)
        return info_nce(model(rule.make(own, seed=budget.seed * 1_000_003 + step)), model(own), temperature)

    fit(model, loss_of_step, budget, checkpoint=checkpoint, label=label)
    return model


def rank_of_own(queries: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return how many texts are nearer to each query than its own, ties counted half and rounded up.

    Args:
        queries (`torch.Tensor` of shape `(N, E)`): Unit vectors; query i belongs to text i.
        texts (`torch.Tensor` of shape `(N, E)`): Unit vectors.

    Returns:
        `torch.LongTensor` of shape `(N,)`: 0 for a text that is found first.

    >>> texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> rank_of_own(texts, texts).tolist(), rank_of_own(texts.flip(0), texts).tolist()
    ([0, 0], [1, 1])
    """
    cosines = queries @ texts.T
    own = cosines.diagonal()[:, None]
    other = ~torch.eye(len(queries), dtype=torch.bool, device=queries.device)
    nearer, tied = ((cosines > own) & other).sum(1), ((cosines == own) & other).sum(1)
    return nearer + (tied + 1) // 2  # a model that gives every text one vector finds nothing


@torch.no_grad()
def evaluate_retrieval(
    model: RetrievalEncoder,
    texts: torch.Tensor,
    rules: Sequence[QueryRule],
    *,
    ks: Sequence[int] = (1, 10),
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Store the vectors of texts, search them by a piece of each, and count.

    Args:
        model (`RetrievalEncoder`): The encoder.
        texts (`torch.LongTensor` of shape `(N, T)`): The store; each is searched for once a rule.
        rules (`Sequence[QueryRule]`): How queries are made.
        ks (`Sequence[int]`): Recall at these.
        batch_size (`int`): Texts a call.
        seed (`int`): Of the queries.

    Returns:
        `dict`: `<kind>_<size>` -> `top_1`, `recall_at_k` with intervals, `mean_reciprocal_rank`, `chance`, counts.

    Raises:
        ValueError: If two texts are the same: neither could be found for certain.
    """
    unique = texts.unique(dim=0)
    if len(unique) < len(texts):
        raise ValueError(
            f"{len(texts) - len(unique)} of {len(texts)} texts repeat another; take them out of the store"
        )
    model.eval()
    stored = torch.cat([model(part) for part in texts.split(batch_size)])
    results: dict[str, Any] = {}
    for rule in rules:
        queries = torch.cat([model(part) for part in rule.make(texts, seed).split(batch_size)])
        ranks = rank_of_own(queries, stored)
        found: dict[str, Any] = {
            "num_texts": len(texts),
            "chance": 1 / len(texts),
            "mean_reciprocal_rank": (1.0 / (ranks + 1)).double().mean().item(),
        }
        for k in ks:
            hits = int((ranks < k).sum())
            name = "top_1" if k == 1 else f"recall_at_{k}"
            found[name] = hits / len(texts)
            found[f"{name}_interval"] = list(wilson_interval(hits, len(texts)))
        results[f"{rule.kind}_{rule.size}"] = found
    return results


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(
        prog="python -m training.retrieval",
        description="Train an encoder to find texts by pieces of them, and measure it before and after.",
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folder or Hub id to start from: a causal LM, an autoencoder, any "
        "encoder; NAME=MODEL names it in the table, untrained:MODEL has fresh weights")  # fmt: skip
    add("--text", action="append", default=[], metavar="FILE", help="training text (default: the books here)")
    add("--test", action="append", default=[], metavar="FILE", help="text to search (default: a tenth of the text)")
    add("--query", choices=QUERIES, default="ngram", help="what is trained on; both are measured")
    add("--query-tokens", type=whole_number(), default=7, metavar="N", help="tokens of a query (7)")
    add("--length", type=whole_number(), default=64, metavar="N", help="tokens of a text (64)")
    add("--steps", type=whole_number(0), default=400, metavar="N", help="training steps (400); 0 only measures")
    add("--batch-tokens", type=whole_number(), default=2048, metavar="N", help="tokens of a step (2048)")
    add("--learning-rate", type=positive_number, default=1e-4, metavar="X", help="peak of AdamW (1e-4)")
    add("--texts", type=whole_number(2), default=512, metavar="N", help="test texts (512)")
    add("--seed", type=int, default=0, metavar="N", help="of orders and queries")
    add("--threads", type=whole_number(), metavar="N", help="processor threads")
    add("--to", default="runs/retrieval", metavar="FOLDER", help="where encoder and record go (runs/retrieval)")
    return parser


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Train and measure as the command line says; return the record."""
    measurement, folder = Measurement(command), check_place(options.to)
    documents, held_out, files = read_texts(options.text, options.test)
    models = named_models(options.models)
    encoders = {name: load_encoder(place, seed=options.seed) for name, place in models.items()}
    for encoder in encoders.values():
        encoder.num_vectors(options.length)  # says if texts are too long
        if encoder.chunk_length is not None and options.length > encoder.chunk_length:
            raise ValueError(f"{encoder.name} reads {encoder.chunk_length} tokens at a time; give --length up to that")
        QueryRule(options.query, options.query_tokens).make(torch.zeros(1, options.length, dtype=torch.long), seed=0)
    results = []
    for name, encoder in encoders.items():
        place = folder / re.sub(r"[^\w.-]+", "_", name)
        results.append({"name": name, "model": portable_path(models[name]),
                        **_measure(name, encoder, documents, held_out, options, place)})  # fmt: skip
    names = ("query", "query_tokens", "length", "texts", "steps", "batch_tokens", "learning_rate")
    record = measurement.record(
        torch.device("cpu"),
        inputs={"files": file_checksums(files)},
        recipe={name: getattr(options, name) for name in names},
        seeds={"retrieval": options.seed},
        metrics={"models": results},
        seconds=round(sum(result["seconds"] for result in results), 1),
    )
    write_record(folder / "record.json", record)
    for result in results:
        for when in ("before", "after"):
            for kind, found in result.get(when, {}).items():
                low, high = found["top_1_interval"]
                print(f"{result['name']}, {when:<8}{kind:<10} top-1 {found['top_1']:.1%} ({low:.1%} to {high:.1%}), "
                      f"recall at 10 {found['recall_at_10']:.1%}, chance {found['chance']:.1%}")  # fmt: skip
    print(f"record: {folder / 'record.json'}")
    return record


def _measure(
    name: str,
    encoder: FrozenEncoder,
    documents: Sequence[str],
    held_out: Sequence[str],
    options: argparse.Namespace,
    folder: Path,
) -> dict[str, Any]:
    """Measure an encoder, train it, measure it again, and keep the result."""
    started = time.perf_counter()
    order = in_random_order(documents, options.seed)
    wanted = max(2, options.steps * options.batch_tokens // options.length)  # each text once, as far as the text goes
    train = cut_rows(encoder.tokenizer, order, options.length, wanted).tokens
    test = cut_rows(encoder.tokenizer, held_out, options.length).tokens.unique(dim=0)
    test = test[torch.linspace(0, len(test) - 1, min(options.texts, len(test))).round().long()]
    rules = [QueryRule(kind, options.query_tokens) for kind in QUERIES]  # type: ignore[arg-type]
    rule = QueryRule(options.query, options.query_tokens)
    budget = options.steps and Budget(
        steps=options.steps,
        batch_tokens=options.batch_tokens,
        optimizer="adamw",
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    weights = weights_checksum(encoder.body)
    texts = [tokens_checksum(tokens) for tokens in (train, test)]
    asked = {"weights": weights, "texts": texts, "query": asdict(rule), "budget": budget and asdict(budget)}
    file = folder / f"result-{data_digest(asked)}.json"
    known = read_json(file)
    if known is not None:
        return known
    result: dict[str, Any] = {
        "weights": weights,
        "before": evaluate_retrieval(RetrievalEncoder(encoder.body), test, rules),
    }
    if budget:
        checkpoint = file.with_suffix(".checkpoint")
        model = train_retrieval(encoder.body, train, rule, budget, checkpoint=checkpoint, label=name)
        result["after"] = evaluate_retrieval(model, test, rules)
        model.body.save_pretrained(folder / "model")
        encoder.tokenizer.save_pretrained(folder / "model")
        checkpoint.unlink(missing_ok=True)
    result["seconds"] = round(time.perf_counter() - started, 1)
    write_json(file, result)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
