"""The text that all models of the claims are scored on, and what is kept of their scores.

Each domain gives the same rows to every model, so that two models can be compared row by row:

| domain | text |
|---|---|
| `books` | the run's own test split |
| `news` | `training/corpora/wikinews/test.parquet` |
| `random` | uniformly random ordinary ids, of the shape of the rows of `books` |

R rows, S targets of a row, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from training.data.objectives import SpecialTokens
from training.data.texts import file_checksums, load_texts, tokenise_documents
from training.data.tokenizer import special_tokens_of, tokenizer_checksum
from training.fidelity import random_rows
from training.measure.metrics import bootstrap_interval
from training.measure.suites import Evaluation, Scores, score, spread_rows, summarise_scores
from training.places import REPOSITORY
from training.train.inputs import byte_lengths_of

SCORED_TOKENS = 20_480
TEXTS = {"books": "training/corpora/books/test.parquet", "news": "training/corpora/wikinews/test.parquet"}
DOMAINS = (*TEXTS, "random")


@dataclass(frozen=True)
class ClaimsText:
    """Tokenizer of a run and the test text in its tokens.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`): Of the run.
        tokens (`dict[str, torch.Tensor]`): Domain -> its tokens, one stream.
        description (`dict`): Checksums of files and tokenizer, for what is asked of a measurement.
    """

    tokenizer: PreTrainedTokenizerBase
    tokens: dict[str, torch.Tensor]
    description: dict[str, Any]

    @property
    def special_tokens(self) -> SpecialTokens:
        """Ids of the special tokens."""
        return special_tokens_of(self.tokenizer)

    def rows(self, domain: str, length: int, num_tokens: int = SCORED_TOKENS) -> torch.Tensor:
        """Return rows of a domain, spread evenly over its text.

        Args:
            domain (`str`): One of `DOMAINS`.
            length (`int`): Tokens of a row.
            num_tokens (`int`): Tokens of all rows, at most.

        Returns:
            `torch.LongTensor` of shape `(R, length)`.
        """
        if domain not in DOMAINS:
            raise ValueError(f"domain {domain!r} is unknown; known: {', '.join(DOMAINS)}")
        text = self.tokens["books" if domain == "random" else domain]
        rows = spread_rows(text, row_length=length, limit=num_tokens // length)
        if domain == "random":
            rows = random_rows(rows, len(self.tokenizer), self.tokenizer.all_special_ids)
        return rows

    def evaluation(self, model: PreTrainedModel, *, marker: str = "token", window_length: int = 0) -> Evaluation:
        """Describe how a model of the run is fed; a causal LM needs `window_length`, what it sees at a time."""
        config = model.config
        chunk_length = getattr(config, "chunk_length", window_length)
        return Evaluation(
            model,
            self.special_tokens,
            chunk_length=chunk_length,
            window_length=getattr(config, "window_length", chunk_length),
            byte_lengths=byte_lengths_of(self.tokenizer),
            batch_size=32,
            num_generated_rows=0,
            marker=marker,
        )


def load_text(run: Path) -> ClaimsText:
    """Read the test text in the tokens of a run's tokenizer.

    Args:
        run (`Path`): Folder of `python -m training.run`.

    Raises:
        ValueError: If the run has no tokenizer yet.
    """
    folder = run / "inputs" / "tokenizer"
    if not folder.is_dir():
        raise ValueError(f"{run} has no inputs/tokenizer; give the folder of python -m training.run claims")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = {domain: REPOSITORY / name for domain, name in TEXTS.items()}
    tokens = {domain: tokenise_documents(tokenizer, load_texts([file])).tokens for domain, file in files.items()}
    checksums = {domain: next(iter(file_checksums([file]).values())) for domain, file in files.items()}
    return ClaimsText(tokenizer, tokens, {"files": checksums, "tokenizer": tokenizer_checksum(tokenizer)})


def score_rows(evaluation: Evaluation, objective: str, rows: torch.Tensor) -> Scores:
    """Score a model as it is meant to be used, without controls.

    Args:
        evaluation (`Evaluation`): The model and how to feed it. The `causal` of a model without memories is cut into
            pieces of its window, each read by itself.
        objective (`str`): `"reconstruction"`, `"copy"`, `"blank_copy"` or `"causal"`.
        rows (`torch.LongTensor` of shape `(R, n)`): Text.
    """
    has_memories = hasattr(evaluation.model.config, "chunk_length")
    evaluation.model.eval()
    parts = []
    for own in rows.split(evaluation.batch_size):
        batch = evaluation.build(objective, own)
        if objective == "causal" and not has_memories:
            batch = {name: tensor.reshape(-1, evaluation.window_length) for name, tensor in batch.items()}
        parts.append(score(evaluation.model, batch, len(own)))
    return Scores.join(parts)


def summarise(scores: Scores, vocab_size: int, period: int) -> dict[str, Any]:
    """Turn scores into metrics, with what comparing two models row by row takes.

    Args:
        scores (`Scores`): What was scored.
        vocab_size (`int`): Rows of the token table (V).
        period (`int`): Length that positions repeat at.

    Returns:
        `dict`: As [`training.measure.suites.summarise_scores`], with `token_accuracy_rows_interval` (texts drawn
        again, not tokens), `loss_by_position`, and `row_losses`, the mean loss of each row.
    """
    losses = scores.losses.double()
    positions = range(min(period, losses.shape[1]))
    return summarise_scores(scores, vocab_size, period) | {
        "token_accuracy_rows_interval": list(bootstrap_interval(scores.correct.double().mean(1))),
        "loss_by_position": [losses[:, i::period].mean().item() for i in positions],
        "row_losses": losses.mean(1).tolist(),
    }


def paired_difference(one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """How much larger the rows of one model are than the same rows of another, with its 95 % interval.

    >>> paired_difference([2.0, 3.0, 4.0], [1.5, 2.5, 3.5])
    {'mean': 0.5, 'interval': [0.5, 0.5]}
    """
    if len(one) != len(other):
        raise ValueError(f"there are {len(one)} rows and {len(other)}; compare models on the same rows")
    difference = torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    return {"mean": difference.mean().item(), "interval": list(bootstrap_interval(difference))}


def paired_share(start: Sequence[float], here: Sequence[float], end: Sequence[float]) -> dict[str, Any]:
    """Share of the way from the rows of one model to those of another that a third has come, with its 95 % interval.

    >>> paired_share([3.0, 4.0], [2.5, 3.5], [1.0, 2.0])
    {'mean': 0.25, 'interval': [0.25, 0.25]}
    """
    first, third, last = (torch.tensor(rows, dtype=torch.float64) for rows in (start, here, end))
    won, whole = first - third, first - last
    # A row may have no gap, or one the other way, so the ratio is of sums over rows that are drawn again together.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(won), (1000, len(won)), generator=generator)
    shares = won[drawn].sum(1) / whole[drawn].sum(1)
    interval = torch.quantile(shares, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": (won.sum() / whole.sum()).item(), "interval": interval}


def without_rows(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what holds a number for each row."""
    return {name: value for name, value in metrics.items() if not name.startswith("row_")}
