"""Measure what a trained model holds in its memories, always beside the controls that give the number its meaning.

| suite | asks | controls |
|---|---|---|
| retention | how much of a chunk comes back from its memory alone | memories of another text, none |
| blank_copy | the same for several windows, through the decoder, with no text in sight | likewise |
| copy | teacher-forced, and free-running: exact match of what `generate` writes after COPY | likewise |
| clm | loss of the next token with memory | likewise, and baselines without memory and with full context |

All conditions of a suite are scored on exactly the same targets. In `clm` each position of a row is asked for the next
token, the last token of a window for the first of the next window: a model with memory reads its window and the
memories before it, one without memory its window only, one with full context the whole row.

R rows of text, n tokens of a row, S targets of a row, H tokens of a source.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.objectives import IGNORED, BatchSpec, SpecialTokens, build_batch, targets_of
from .metrics import (
    accuracy_interval,
    bits_per_byte,
    bootstrap_interval,
    exact_match,
    information_ratio,
    token_results,
    wilson_interval,
)

SUITES = ("retention", "blank_copy", "copy", "clm")
FIDELITY = "fidelity"

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Scores:
    """Every scored token of a condition, in text order.

    Attributes:
        losses (`torch.Tensor` of shape `(R, S)`): Nats of each target; R rows of S targets.
        correct (`torch.BoolTensor` of shape `(R, S)`): Whether the most likely token was the target.
        targets (`torch.LongTensor` of shape `(R, S)`): The targets.
    """

    losses: torch.Tensor
    correct: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def join(cls, parts: list["Scores"], dim: int = 0) -> "Scores":
        """Join scores of several batches (dim 0) or stretches of text (dim 1)."""
        return cls(*(torch.cat([getattr(p, name) for p in parts], dim) for name in ("losses", "correct", "targets")))


@dataclass(frozen=True)
class Evaluation:
    """A model and how to feed it.

    Attributes:
        model (`PreTrainedModel`): A memory autoencoder, a memory encoder-decoder or a causal LM.
        special_tokens (`SpecialTokens`): Ids of its special tokens.
        chunk_length (`int`): Tokens per chunk.
        window_length (`int`): Tokens per window.
        byte_lengths (`torch.LongTensor`, *optional*): Bytes of text that each token id stands for; without it no bits
            per byte are reported.
        batch_size (`int`): Rows per forward call.
        num_generated_rows (`int`): Rows of the copy suite that are also written free-running.
        marker (`str`): `"none"` for a model that was trained on copies without a marker in front.
    """

    model: PreTrainedModel
    special_tokens: SpecialTokens
    chunk_length: int
    window_length: int
    byte_lengths: torch.Tensor | None = None
    batch_size: int = 32
    num_generated_rows: int = 32
    marker: str = "token"

    @property
    def layout(self) -> str:
        """Layout of the model's inputs: plain text if it folds windows by itself, else slots."""
        return "self" if getattr(self.model.config, "self_memory", True) else "slots"

    @property
    def copies_layout(self) -> str:
        """Layout of copies: that of the other inputs, but slots where memories are spread, the layout that keeps them
        apart: in plain text a copy's own windows would become memories among them.
        """
        spread = getattr(self.model.config, "memory_positions", None) == "spread"
        return "slots" if spread and self.model.config.memory_token_id is not None else self.layout

    @property
    def vocab_size(self) -> int:
        """Rows of the token table."""
        return int(self.model.config.vocab_size)

    @property
    def bits_per_memory(self) -> int:
        """Bits of one memory vector as the encoder gives it, in the model's number format."""
        config = self.model.config
        width = config.hidden_size if config.model_type == "memory_autoencoder" else config.encoder.hidden_size
        return width * torch.finfo(self.model.dtype).bits

    def build(self, objective: str, tokens: torch.Tensor) -> Batch:
        """Build the batch of an objective in the model's layout."""
        layout = {"reconstruction": "self", "causal": self.layout}.get(objective, self.copies_layout)
        return build_batch(objective, tokens, self.spec(layout))

    def spec(self, layout: str) -> BatchSpec:
        """How batches of this model are made in a layout."""
        return BatchSpec(
            self.special_tokens,
            chunk_length=self.chunk_length,
            window_length=self.window_length,
            memories_per_chunk=getattr(self.model.config, "memories_per_chunk", 1),
            layout=layout,
            marker=self.marker,
        )


@torch.no_grad()
def score(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], num_rows: int) -> Scores:
    """Score every target of a batch.

    Args:
        model (`PreTrainedModel`): The model.
        batch (`Mapping[str, torch.Tensor]`): Inputs and targets, each row with equally many targets.
        num_rows (`int`): Rows to fold the targets into, in order.
    """
    targets = targets_of(batch).to(model.device)
    inputs = {
        name: tensor.to(model.device) for name, tensor in batch.items() if name not in ("labels", "shift_labels")
    }
    if "labels" in batch:
        logits = model(**inputs).logits
    else:
        columns = (targets != IGNORED).any(0).nonzero()[:, 0]
        logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits
        targets = targets[:, columns]
    present = targets != IGNORED
    correct, losses = token_results(logits, targets)
    return Scores(*(tensor[present].reshape(num_rows, -1).cpu() for tensor in (losses, correct, targets)))


def check_suite(evaluation: Evaluation, suite: str) -> None:
    """Check that there is such a suite and that the model can take it.

    Raises:
        ValueError: If not.
    """
    if suite not in (*SUITES, FIDELITY):
        raise ValueError(f"suite {suite!r} is unknown; known: {', '.join((*SUITES, FIDELITY))}")
    if evaluation.model.config.model_type == "memory_autoencoder" and suite not in ("retention", FIDELITY):
        raise ValueError(f"the model is an autoencoder, which has the suite retention; {suite} needs a memory model")


def score_suite(
    evaluation: Evaluation, suite: str, rows: torch.Tensor, baselines: Mapping[str, PreTrainedModel] | None = None
) -> dict[str, Scores]:
    """Score every target of a suite under all its conditions; arguments and errors as of [`evaluate_suite`]."""
    check_suite(evaluation, suite)
    if len(rows) < 2:
        raise ValueError(
            f"there are {len(rows)} rows of {rows.shape[1]} tokens, but the control with another text's memories "
            "needs two; give a longer text or a higher limit"
        )
    is_autoencoder = evaluation.model.config.model_type == "memory_autoencoder"
    evaluation.model.eval()
    if suite == "clm":
        return _clm(evaluation, rows, baselines or {})
    if is_autoencoder:
        return _over_batches(evaluation, rows, _reconstruction_conditions)
    source = rows[:, : evaluation.window_length] if suite == "retention" else rows
    objective = "copy" if suite == "copy" else "blank_copy"
    return _over_batches(evaluation, source, lambda e, own, other: _copy_conditions(e, objective, own, other))


def evaluate_suite(
    evaluation: Evaluation,
    suite: str,
    rows: torch.Tensor,
    baselines: Mapping[str, PreTrainedModel] | None = None,
    period: int | None = None,
) -> dict[str, Any]:
    """Run one suite.

    Args:
        evaluation (`Evaluation`): The model and how to feed it.
        suite (`str`): One of `SUITES`.
        rows (`torch.LongTensor` of shape `(R, n)`): Text, two rows or more; n a whole number of windows (retention of
            an autoencoder: chunks).
        baselines (`Mapping[str, PreTrainedModel]`, *optional*): For `clm`: the decoders trained without memory
            (`"no_memory"`) and with full context (`"full_context"`).
        period (`int`, *optional*): Length that accuracies by position repeat at. Default: the chunk, for `clm` the
            window.

    Returns:
        `dict`: Condition -> metrics with counts and intervals; `"memory"` is the model as it is meant to be used.

    Raises:
        ValueError: If the suite is unknown, the model cannot take it, or the text is too short.
    """
    scores = score_suite(evaluation, suite, rows, baselines)
    if period is None:
        period = evaluation.window_length if suite == "clm" else evaluation.chunk_length
    remembered = scores["memory"].targets.shape[1] if suite != "clm" else rows.shape[1] - evaluation.window_length
    num_memories = remembered // evaluation.chunk_length * getattr(evaluation.model.config, "memories_per_chunk", 1)
    with_memory = ("memory", "wrong_memory")
    result: dict[str, Any] = {
        name: summarise(evaluation, part, period, num_memories if name in with_memory else 0)
        for name, part in scores.items()
    }
    if suite == "copy":
        result["memory"].update(free_running_copy(evaluation, rows))
        result["memory"]["short_sources"] = copies_of_short_sources(evaluation, rows)
    if suite == "retention" and evaluation.model.config.model_type == "memory_autoencoder":
        result["memory"]["short_chunks"] = retention_of_short_chunks(evaluation, rows)
    if suite == "clm" and {"no_memory_model", "full_context_model"} <= set(result):
        result["share_of_gap_recovered"] = share_of_gap(
            result["memory"]["loss"], result["no_memory_model"]["loss"], result["full_context_model"]["loss"]
        )
    return result


def summarise(evaluation: Evaluation, scores: Scores, period: int, num_memories: int = 0) -> dict[str, Any]:
    """Turn scored tokens into metrics with counts and 95 % intervals.

    Args:
        evaluation (`Evaluation`): Gives vocabulary, bytes of tokens and size of a memory.
        scores (`Scores`): What was scored.
        period (`int`): Length that positions repeat at: chunk or window.
        num_memories (`int`): Memory vectors of a row, whose own bits are reported beside the text's.
    """
    result = summarise_scores(scores, evaluation.vocab_size, period)
    loss, total = result["loss"], result["num_tokens"]
    if evaluation.byte_lengths is not None:
        num_bytes = int(evaluation.byte_lengths[scores.targets].sum())
        result["num_bytes"] = num_bytes
        result["bits_per_byte"] = bits_per_byte(loss, total, num_bytes)
        if num_memories:
            bits = num_memories * scores.correct.shape[0] * evaluation.bits_per_memory
            result["bits_per_byte_with_memory"] = bits_per_byte(loss, total, num_bytes, memory_bits=bits)
    return result


def summarise_scores(scores: Scores, vocab_size: int, period: int) -> dict[str, Any]:
    """Turn scored tokens of any model into metrics with counts and 95 % intervals.

    Args:
        scores (`Scores`): What was scored.
        vocab_size (`int`): Rows of the token table (V).
        period (`int`): Length that positions repeat at.
    """
    correct, total = int(scores.correct.sum()), scores.correct.numel()
    loss = scores.losses.double().mean().item()
    positions = range(min(period, scores.correct.shape[1]))
    return {
        "token_accuracy": correct / total,
        "token_accuracy_interval": list(accuracy_interval(scores.correct)),
        "loss": loss,
        "loss_interval": list(bootstrap_interval(scores.losses.double().mean(1))),
        "information_ratio": information_ratio(loss, vocab_size, convention="uniform"),
        "information_ratio_paper": information_ratio(loss, vocab_size, convention="paper"),
        "num_rows": scores.correct.shape[0],
        "num_tokens": total,
        "num_correct": correct,
        "token_accuracy_by_position": [scores.correct[:, i::period].double().mean().item() for i in positions],
    }


def share_of_gap(memory: float, no_memory: float, full_context: float) -> float | None:
    """Share of the loss between no memory and full context that memory wins back; 1 is as good as full context.

    `None` where there is no gap to speak of: under a hundredth of a nat, the share would be noise.

    >>> share_of_gap(3.2, no_memory=3.5, full_context=3.0)
    0.6
    >>> share_of_gap(3.2, no_memory=3.0, full_context=3.0) is None
    True
    """
    gap = no_memory - full_context
    return None if gap < 0.01 else round((no_memory - memory) / gap, 6)


def _over_batches(evaluation: Evaluation, rows: torch.Tensor, conditions: Any) -> dict[str, Scores]:
    """Score every condition on every row; "another text" is the row half of the text away."""
    others = rows.roll(len(rows) // 2, 0)
    parts: dict[str, list[Scores]] = {}
    for own, other in _batches(evaluation.batch_size, rows, others):
        for name, batch in conditions(evaluation, own, other).items():
            parts.setdefault(name, []).append(score(evaluation.model, batch, len(own)))
    return {name: Scores.join(scores) for name, scores in parts.items()}


def _batches(batch_size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    parts = [tensor.split(batch_size) for tensor in tensors]
    yield from tqdm(zip(*parts, strict=True), desc="batches", total=len(parts[0]), disable=None, leave=False)


@torch.no_grad()
def _reconstruction_conditions(evaluation: Evaluation, own: torch.Tensor, other: torch.Tensor) -> dict[str, Batch]:
    """Chunks from their own memories, from another chunk's, and from zeros."""
    batch = evaluation.build("reconstruction", own)
    labels = batch["labels"]
    wrong = evaluation.model.encode(evaluation.build("reconstruction", other)["input_ids"].to(evaluation.model.device))
    return {
        "memory": batch,
        "wrong_memory": {"memories": wrong, "labels": labels},
        "no_memory": {"memories": torch.zeros_like(wrong), "labels": labels},
    }


def _copy_conditions(
    evaluation: Evaluation, objective: str, own: torch.Tensor, other: torch.Tensor
) -> dict[str, Batch]:
    """The source's own memories; those of another source; the output windows each by itself, without any memory."""
    batch = evaluation.build(objective, own)
    text_length = own.shape[1]
    text = {name: batch[name][:, -text_length:] for name in ("input_ids", "attention_mask", "shift_labels")}
    split = {name: tensor.reshape(-1, evaluation.window_length) for name, tensor in text.items()}
    if evaluation.copies_layout == "slots":
        return {
            "memory": batch,
            "wrong_memory": {**batch, "context_input_ids": evaluation.build(objective, other)["context_input_ids"]},
            "no_memory": split if evaluation.layout == "self" else text,
        }
    # Output windows see the source only through its memories, so another source in front is another text's memories.
    wrong = torch.cat([other, text["input_ids"]], 1)
    return {"memory": batch, "wrong_memory": {**batch, "input_ids": wrong}, "no_memory": split}


def _clm(evaluation: Evaluation, rows: torch.Tensor, baselines: Mapping[str, PreTrainedModel]) -> dict[str, Scores]:
    """Score the next token under every condition, and with the baselines."""
    if evaluation.layout != "self":
        raise ValueError("the suite clm reads plain text, but the model has self_memory=False; leave it out")
    others = rows.roll(len(rows) // 2, 0)
    parts: dict[str, list[Scores]] = {}
    for own, other in _batches(evaluation.batch_size, rows, others):
        batch = evaluation.build("causal", own)
        split = {name: tensor.reshape(-1, evaluation.window_length) for name, tensor in batch.items()}
        runs = {
            "memory": (evaluation.model, batch),
            "no_memory": (evaluation.model, split),
            "no_memory_model": (baselines.get("no_memory"), split),
            "full_context_model": (baselines.get("full_context"), batch),
        }
        for name, (model, inputs) in runs.items():
            if model is not None:
                parts.setdefault(name, []).append(score(model.eval(), inputs, len(own)))
        parts.setdefault("wrong_memory", []).append(_clm_after_another_text(evaluation, batch, other))
    return {name: Scores.join(scores) for name, scores in parts.items()}


def _clm_after_another_text(evaluation: Evaluation, batch: Batch, other: torch.Tensor) -> Scores:
    """Each window after another text's windows: same targets, another text's memories."""
    width = evaluation.window_length
    stretches = []
    for start in range(0, other.shape[1], width):
        shown = torch.cat([other[:, :start], batch["input_ids"][:, start : start + width]], 1)
        targets = batch["shift_labels"][:, : start + width].clone()
        targets[:, :start] = IGNORED
        inputs = {"input_ids": shown, "attention_mask": torch.ones_like(shown), "shift_labels": targets}
        stretches.append(score(evaluation.model, inputs, len(other)))
    return Scores.join(stretches, dim=1)


@torch.no_grad()
def write_freely(evaluation: Evaluation, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Let a model write texts back by itself: an autoencoder in one pass, a memory model after COPY by `generate`.

    Args:
        evaluation (`Evaluation`): The model and how to feed it.
        rows (`torch.LongTensor` of shape `(R, H)`): Texts. Those with an end-of-text token are passed over, since
            `generate` would stop there; at most `num_generated_rows` are written.

    Returns:
        The texts that were taken and what was written of them, both `(r, H)`; -100 after an early end.
    """
    eos = evaluation.special_tokens.eos
    usable = rows if eos is None else rows[(rows != eos).all(1)]
    usable = usable[: evaluation.num_generated_rows]
    text_length = rows.shape[1]
    outputs = [usable[:0]]
    for (own,) in _batches(evaluation.batch_size, usable) if len(usable) else ():
        if evaluation.model.config.model_type == "memory_autoencoder":
            chunks = own.reshape(-1, evaluation.chunk_length).to(evaluation.model.device)
            outputs.append(evaluation.model.reconstruct(chunks).reshape(own.shape).cpu())
            continue
        written = _write_after_copy(evaluation, evaluation.build("copy", own), text_length, text_length)
        outputs.append(torch.nn.functional.pad(written, (0, text_length - written.shape[1]), value=IGNORED))
    return usable, torch.cat(outputs)


def _write_after_copy(evaluation: Evaluation, batch: Batch, text_length: int, max_new_tokens: int) -> torch.Tensor:
    """Let `generate` go on after the source, or its slots, and COPY of a batch; returns the new tokens `(B, t)`."""
    prompt = {name: tensor.to(evaluation.model.device) for name, tensor in batch.items() if name != "shift_labels"}
    for name in ("input_ids", "attention_mask"):
        prompt[name] = prompt[name][:, : prompt[name].shape[1] - text_length + 1]
    written = evaluation.model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
    return written[:, prompt["input_ids"].shape[1] :].cpu()


@torch.no_grad()
def free_running_copy(evaluation: Evaluation, rows: torch.Tensor) -> dict[str, Any]:
    """Let the model write the source after COPY by itself and compare.

    Rows with an end-of-text token are passed over: `generate` would stop there.

    Args:
        evaluation (`Evaluation`): The model and how to feed it.
        rows (`torch.LongTensor` of shape `(R, H)`): Sources.

    Returns:
        `dict`: `exact_match` (share of rows regenerated without an error) with interval and count, and
        `generated_token_accuracy`. Empty if every row has an end inside.
    """
    usable, predicted = write_freely(evaluation, rows)
    if len(usable) == 0:
        return {}
    exact = int(exact_match(predicted, usable).sum())
    return {
        "exact_match": exact / len(usable),
        "exact_match_interval": list(wilson_interval(exact, len(usable))),
        "num_generated_rows": len(usable),
        "generated_token_accuracy": (predicted == usable).double().mean().item(),
    }


@torch.no_grad()
def retention_of_short_chunks(evaluation: Evaluation, rows: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Score an autoencoder on the beginnings of chunks: what the last chunk of a text is.

    Args:
        evaluation (`Evaluation`): The autoencoder and how to feed it.
        rows (`torch.LongTensor` of shape `(R, n)`): Text, whole chunks.

    Returns:
        `dict`: Tokens of the short chunks, a quarter, half and three quarters of a whole one -> token accuracy with
        interval and count.
    """
    length = evaluation.chunk_length
    chunks = rows.reshape(-1, length)
    results = {}
    for short in sorted({max(1, length * quarters // 4) for quarters in (1, 2, 3)}):
        parts = [
            score(evaluation.model, {"input_ids": own, "labels": own}, len(own)).correct
            for (own,) in _batches(evaluation.batch_size, chunks[:, :short])
        ]
        correct = torch.cat(parts)
        results[str(short)] = {
            "token_accuracy": correct.double().mean().item(),
            "token_accuracy_interval": list(accuracy_interval(correct)),
            "num_tokens": correct.numel(),
        }
    return results


@torch.no_grad()
def copies_of_short_sources(evaluation: Evaluation, rows: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Let a model write sources that end inside a chunk, in slots, until it ends by itself.

    Lengths that do not fit beside their memories are left out: in slots nothing folds.

    Args:
        evaluation (`Evaluation`): The model and how to feed it.
        rows (`torch.LongTensor` of shape `(R, H)`): Sources; their beginnings are taken.

    Returns:
        `dict`: Tokens of the sources -> `exact_match` (share of rows without an error, the end included) with
        interval and count. Empty for a model that has no slots, no COPY or no end token.
    """
    ids, length, config = evaluation.special_tokens, evaluation.chunk_length, evaluation.model.config
    if evaluation.marker != "token" or None in (config.memory_token_id, config.copy_token_id, ids.eos):
        return {}
    usable = rows[(rows != ids.eos).all(1)][: evaluation.num_generated_rows]
    half = max(1, length // 2)
    lengths = {half, length + half, rows.shape[1] - half} if len(usable) else set()
    results = {}
    for short in sorted(number for number in lengths if number < rows.shape[1]):
        slots = -(-short // length) * config.memories_per_chunk
        if not config.fits(slots, short + 1):
            continue
        exact = 0
        for (own,) in _batches(evaluation.batch_size, usable[:, :short]):
            batch = build_batch("copy", own, evaluation.spec("slots"), end=True)
            written = _write_after_copy(evaluation, batch, short, short + 1)
            wanted = torch.nn.functional.pad(own, (0, 1), value=ids.eos)
            if written.shape == wanted.shape:
                exact += int((written == wanted).all(1).sum())
        results[str(short)] = {
            "exact_match": exact / len(usable),
            "exact_match_interval": list(wilson_interval(exact, len(usable))),
            "num_generated_rows": len(usable),
        }
    return results


def default_length(evaluation: Evaluation, suite: str) -> int:
    """Tokens of a row where nothing is said: a chunk or window for retention, two windows to copy, four for clm."""
    windows = {"retention": 1, "blank_copy": 2, "copy": 2, "clm": 4}
    return windows.get(suite, 1) * evaluation.window_length


def spread_rows(tokens: torch.Tensor, *, row_length: int, limit: int) -> torch.Tensor:
    """Cut a token stream into rows and take at most `limit` of them, evenly spread over the text.

    Args:
        tokens (`torch.Tensor` of shape `(num_tokens,)`): The stream.
        row_length (`int`): Tokens per row.
        limit (`int`): Most rows.

    Returns:
        `torch.LongTensor` of shape `(R, row_length)`.

    Raises:
        ValueError: If the text has no whole row.

    >>> spread_rows(torch.arange(10), row_length=2, limit=3).tolist()
    [[0, 1], [4, 5], [8, 9]]
    """
    num_rows = tokens.numel() // row_length
    if num_rows == 0:
        raise ValueError(
            f"the text has {tokens.numel()} tokens, fewer than one row of {row_length}; give a longer text"
        )
    chosen = torch.linspace(0, num_rows - 1, min(limit, num_rows)).round().long()
    return tokens[: num_rows * row_length].reshape(num_rows, row_length)[chosen].long()


def results_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay metrics out as a table: one line for each suite and condition."""
    lines = [
        f"{'suite':<12}{'condition':<20}{'accuracy':>10}{'95 % interval':>18}{'loss':>9}{'bits/byte':>11}{'exact':>8}"
    ]
    for suite, conditions in metrics.items():
        for condition, values in conditions.items():
            if not isinstance(values, Mapping):
                continue
            low, high = values["token_accuracy_interval"]
            bits, exact = values.get("bits_per_byte"), values.get("exact_match")
            lines.append(
                f"{suite:<12}{condition:<20}{values['token_accuracy']:>10.2%}{f'{low:.2%} - {high:.2%}':>18}"
                f"{values['loss']:>9.4f}{'' if bits is None else f'{bits:.4f}':>11}"
                f"{'' if exact is None else f'{exact:.1%}':>8}".rstrip()
            )
        share = conditions.get("share_of_gap_recovered")
        if share is not None:
            lines.append(f"{suite:<12}share of the gap between no memory and full context recovered: {share:.1%}")
    return "\n".join(lines)
