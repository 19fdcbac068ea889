"""The per-text ceiling: how much could a frozen decoder write back, if its memories were made for one text alone?

```bash
python -m training.ceiling runs/quickstart/hub --texts 8 --steps 300
python -m training.ceiling some/causal-lm --lengths 16,32,64,128 --vectors 1 --text notes.txt
```

The decoder stays as it is; K vectors in its input are optimised for each text until it regenerates the text. Of a
memory model the encoder's own memories are measured on the same texts: what share of the ceiling does one pass reach,
and how fast do a few optimiser steps from there close the gap?

B texts, T tokens of a text, K vectors, D width of the decoder, V vocabulary.

All T tokens must come back for a text to fit. The gain counts tokens 2 to T, for which the decoder without memories
has a prediction too. If every token is the likeliest after its forerunners, greedy generation writes the text.

Source of the question: Kuratov et al. 2025, arXiv 2502.13063 (one vector, up to 1,568 tokens).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from training.command_line import Parser, check_place, positive_number, run_command, whole_number
from training.data.objectives import BatchSpec, SpecialTokens, build_batch
from training.data.texts import file_checksums
from training.data.tokenizer import special_tokens_of
from training.evaluate import load_model, model_config
from training.measure.frozen import cut_rows, special_tokens_around
from training.measure.metrics import bootstrap_interval, token_results, wilson_interval
from training.places import portable_path
from training.probe import numbers, read_texts
from training.records.figures import write_ceiling_figure
from training.records.record import Measurement, data_digest, read_json, write_json
from training.records.record import write_record as save_record

LOG_STEPS = 10  # between two points of a curve

Regenerate = Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]
"""Memories `(B, K, D)` or `None`, and tokens `(B, T)` -> logits `(B, T, V)`; row t predicts token t."""


def regenerate_after(decoder: PreTrainedModel, prefix: Sequence[int] = ()) -> Regenerate:
    """Let a causal LM write a text after vectors: special tokens of its own, the vectors, the text.

    Args:
        decoder (`PreTrainedModel`): A causal LM.
        prefix (`Sequence[int]`): Special tokens that its texts begin with.

    Without memories and without a prefix nothing predicts the first token; its row is zeros then.
    """

    def logits_of(memories: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
        table = decoder.get_input_embeddings()
        front = torch.tensor(list(prefix), dtype=torch.long, device=tokens.device).expand(len(tokens), -1)
        parts = [table(front), *([] if memories is None else [memories]), table(tokens[:, :-1])]
        inputs_embeds = torch.cat(parts, 1)
        mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=tokens.device)
        logits = decoder(inputs_embeds=inputs_embeds, attention_mask=mask, use_cache=False).logits
        logits = logits[:, -tokens.shape[1] :]
        missing = tokens.shape[1] - logits.shape[1]
        return torch.nn.functional.pad(logits, (0, 0, missing, 0))

    return logits_of


def regenerate_copy(model: PreTrainedModel, special_tokens: SpecialTokens, objective: str = "copy") -> Regenerate:
    """Let a memory model write a text from memories in its slots, as its copy objective asks.

    Args:
        model (`PreTrainedModel`): A memory encoder-decoder.
        special_tokens (`SpecialTokens`): Ids of its special tokens.
        objective (`str`): `"copy"` (the text so far is visible) or `"blank_copy"` (nothing is).
    """
    config = model.config
    spec = BatchSpec(
        special_tokens,
        chunk_length=config.chunk_length,
        window_length=config.window_length,
        memories_per_chunk=config.memories_per_chunk,
        layout="slots",
    )

    def logits_of(memories: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
        batch = build_batch(objective, tokens, spec)
        text = {name: batch[name][:, -tokens.shape[1] :] for name in ("input_ids", "attention_mask")}
        if memories is None:
            return model(**text, use_cache=False).logits
        slots = torch.full(memories.shape[:2], model.config.memory_token_id, device=tokens.device)
        inputs = {
            "input_ids": torch.cat([slots, text["input_ids"]], 1),
            "attention_mask": torch.cat([torch.ones_like(slots), text["attention_mask"]], 1),
        }
        logits = model(**inputs, memory_embeds=memories, use_cache=False).logits
        return logits[:, -tokens.shape[1] :]

    return logits_of


@dataclass(frozen=True)
class Written:
    """What a decoder writes of texts.

    Attributes:
        memories (`torch.Tensor` of shape `(B, K, D)`, *optional*): From what.
        losses (`torch.Tensor` of shape `(B, T)`): Nats of each token.
        correct (`torch.BoolTensor` of shape `(B, T)`): Whether it is the likeliest.
        steps (`torch.LongTensor` of shape `(B,)`): Optimiser steps after which the text was written without an error
            for the first time; -1 for never.
        curve (`list`): At some steps: step, mean loss, token accuracy, share of texts without an error.
    """

    memories: torch.Tensor | None
    losses: torch.Tensor
    correct: torch.Tensor
    steps: torch.Tensor
    curve: list[dict[str, float]]


@torch.no_grad()
def write(logits_of: Regenerate, memories: torch.Tensor | None, tokens: torch.Tensor) -> Written:
    """Let a decoder write texts `(B, T)` from given memories, or from none."""
    correct, losses = token_results(logits_of(memories, tokens), tokens)
    exact = correct.all(1)
    return Written(memories, losses, correct, torch.where(exact, 0, -1), [_point(0, losses, correct)])


def optimise_memories(
    logits_of: Regenerate,
    tokens: torch.Tensor,
    start: torch.Tensor,
    *,
    steps: int,
    learning_rate: float,
    until_exact: bool = True,
) -> Written:
    """Optimise each text's vectors for the text alone; the decoder is not changed.

    Texts share a batch and nothing else: the loss is a sum over texts of means over tokens, and Adam moves every
    number by its own gradients, so each text goes the way it would go alone.

    Args:
        logits_of (`Callable`): The frozen decoder.
        tokens (`torch.LongTensor` of shape `(B, T)`): The texts.
        start (`torch.Tensor` of shape `(B, K, D)`): Where the vectors start; not changed.
        steps (`int`): Most steps.
        learning_rate (`float`): Of Adam, in units of the root mean square of `start`. It falls linearly to a tenth.
        until_exact (`bool`): Stop as soon as every text has been written without an error.

    Returns:
        [`Written`]: Of each text the state with the lowest loss, one without an error before all with errors.

    Raises:
        ValueError: If there is no step or the start is zero everywhere.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected 1 or more")
    scale = start.detach().square().mean((1, 2), keepdim=True).sqrt()  # of each text
    if not bool((scale > 0).all()):
        raise ValueError("the vectors start at zero, which gives the step no size; start from random ones")
    units = (start.detach() / scale).clone().requires_grad_()
    optimizer = torch.optim.Adam([units], lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    best, curve = None, []
    for step in range(steps + 1):
        logits = logits_of(units * scale, tokens)
        correct, losses = token_results(logits, tokens)
        with torch.no_grad():
            written_at = torch.where(correct.all(1), step, -1)
            now = Written((units * scale).detach().clone(), losses.detach().clone(), correct, written_at, [])
            best = now if best is None else _better(best, now)
        done = until_exact and bool((best.steps >= 0).all())
        if step % LOG_STEPS == 0 or step == steps or done:
            curve.append(_point(step, best.losses, best.correct))
        if step == steps or done:
            break
        (gradient,) = torch.autograd.grad(losses.mean(1).sum(), units)
        units.grad = gradient
        optimizer.step()
        schedule.step()
    assert best is not None
    return Written(best.memories, best.losses, best.correct, best.steps, curve)


def _better(old: Written, new: Written) -> Written:
    """Keep of each text the better of two states: without an error before with errors, then the lower loss."""
    assert old.memories is not None and new.memories is not None
    more = new.correct.all(1).long() - old.correct.all(1).long()
    takes = (more > 0) | ((more == 0) & (new.losses.sum(1) < old.losses.sum(1)))
    return Written(
        torch.where(takes[:, None, None], new.memories, old.memories),
        torch.where(takes[:, None], new.losses, old.losses),
        torch.where(takes[:, None], new.correct, old.correct),
        torch.where(old.steps >= 0, old.steps, new.steps),
        [],
    )


def _point(step: int, losses: torch.Tensor, correct: torch.Tensor) -> dict[str, float]:
    return {
        "step": step,
        "loss": losses.double().mean().item(),
        "token_accuracy": correct.double().mean().item(),
        "exact": correct.all(1).double().mean().item(),
    }


def summarise_written(written: Written, without: Written) -> dict[str, Any]:
    """Turn what was written into metrics with counts and intervals.

    Args:
        written (`Written`): With memories.
        without (`Written`): The same texts by the decoder alone.

    Returns:
        `dict`: Token accuracy, exact texts, loss, and the gain over no memory a text: in nats, and in tokens.
    """
    correct, total = int(written.correct.sum()), written.correct.numel()
    exact, texts = int(written.correct.all(1).sum()), len(written.correct)
    gain = (without.losses - written.losses)[:, 1:].double().sum(1)
    tokens = (written.correct.long() - without.correct.long())[:, 1:].double().sum(1)
    reached = written.steps[written.steps >= 0]
    return {
        "token_accuracy": correct / total,
        "token_accuracy_interval": list(wilson_interval(correct, total)),
        "exact_match": exact / texts,
        "exact_match_interval": list(wilson_interval(exact, texts)),
        "loss": written.losses.double().mean().item(),
        "gain_nats": gain.mean().item(),
        "gain_nats_interval": list(bootstrap_interval(gain)),
        "gain_tokens": tokens.mean().item(),
        "num_texts": texts,
        "num_tokens": total,
        "num_correct": correct,
        "median_steps_to_exact": reached.double().median().item() if len(reached) else None,
        "curve": written.curve,
    }


def percent_of_ceiling(one_pass: Written, ceiling: Written, without: Written) -> dict[str, Any]:
    """Return what share of the gain of optimised memories those of one pass have, texts weighed by gain.

    Args:
        one_pass (`Written`): From the encoder's memories.
        ceiling (`Written`): From optimised ones.
        without (`Written`): By the decoder alone.

    Raises:
        ValueError: If optimised memories gain nothing on a text.
    """
    top = (without.losses - one_pass.losses)[:, 1:].double().sum(1)
    bottom = (without.losses - ceiling.losses)[:, 1:].double().sum(1)
    if not bool((bottom > 0).all()):
        raise ValueError("optimised memories gain nothing on some text; give more steps or a higher learning rate")
    return {
        "percent_of_nats": 100 * (top.sum() / bottom.sum()).item(),
        "percent_of_nats_interval": [100 * bound for bound in bootstrap_interval(top, bottom)],
        "percent_of_tokens": 100 * (one_pass.correct.sum() / ceiling.correct.sum()).item(),
    }


def random_start(decoder: PreTrainedModel, num_texts: int, num_vectors: int, seed: int = 0) -> torch.Tensor:
    """Random vectors `(B, K, D)` of the scale of a decoder's token vectors."""
    table = decoder.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(num_texts, num_vectors, table.shape[1], generator=generator)
    return (draws * float(table.float().std())).to(table)


def capacity(
    decoder: PreTrainedModel,
    tokens: torch.Tensor,
    lengths: Sequence[int],
    *,
    num_vectors: int = 1,
    prefix: Sequence[int] = (),
    steps: int = 500,
    learning_rate: float = 0.3,
    seed: int = 0,
    keep: Callable[[int, Callable[[], dict[str, Any]]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Find how many tokens of a text fit into K vectors, by lengths of beginnings of the same texts.

    Args:
        decoder (`PreTrainedModel`): A causal LM; it is frozen.
        tokens (`torch.LongTensor` of shape `(B, T)`): Texts as long as the largest length.
        lengths (`Sequence[int]`): Lengths to try.
        num_vectors (`int`): Vectors of a text (K).
        prefix (`Sequence[int]`): Special tokens that its texts begin with.
        steps (`int`): Most optimiser steps.
        learning_rate (`float`): See [`optimise_memories`].
        seed (`int`): Of the starts.
        keep (`Callable`, *optional*): Takes a length and what measures it; returns the measurement, e.g. from a file.

    Returns:
        `dict`: `by_length`: length -> metrics.
    """
    decoder.eval().requires_grad_(False)
    logits_of = regenerate_after(decoder, prefix)
    keep = keep or (lambda _, measure: measure())

    def measure(length: int) -> dict[str, Any]:
        texts = tokens[:, :length]
        start = random_start(decoder, len(texts), num_vectors, seed)
        written = optimise_memories(logits_of, texts, start, steps=steps, learning_rate=learning_rate)
        return summarise_written(written, write(logits_of, None, texts))

    by_length = {str(length): keep(length, partial(measure, length)) for length in lengths}
    fitting = [int(length) for length, result in by_length.items() if result["exact_match"] >= 0.5]
    return {"num_vectors": num_vectors, "by_length": by_length, "half_of_texts_fit": max(fitting, default=0)}


def against_ceiling(
    model: PreTrainedModel,
    special_tokens: SpecialTokens,
    tokens: torch.Tensor,
    *,
    objective: str = "copy",
    steps: int = 500,
    learning_rate: float = 0.3,
    refine_learning_rate: float = 0.02,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a memory model's encoder against memories optimised for its own frozen decoder, on the same texts.

    Args:
        model (`PreTrainedModel`): A memory encoder-decoder.
        special_tokens (`SpecialTokens`): Ids of its special tokens.
        tokens (`torch.LongTensor` of shape `(B, W)`): Texts of one window.
        objective (`str`): `"copy"` or `"blank_copy"`.
        steps (`int`): Optimiser steps, of the ceiling and of the refinement alike.
        learning_rate (`float`): From random starts.
        refine_learning_rate (`float`): From the encoder's memories.
        seed (`int`): Of the random starts.

    Returns:
        `dict`: `one_pass`, `refined`, `optimised` and `ceiling` metrics, with curves; percent of the ceiling, which is
        the better of refined and optimised from random, text by text.

    Raises:
        ValueError: If the texts are not one window long.
    """
    config = model.config
    if tokens.shape[1] != config.window_length:
        raise ValueError(f"texts have {tokens.shape[1]} tokens; give one window, {config.window_length}")
    model.eval().requires_grad_(False)
    logits_of = regenerate_copy(model, special_tokens, objective)
    with torch.no_grad():
        memories, _ = model.encode_memories(tokens.reshape(len(tokens), -1, config.chunk_length))
    without, one_pass = write(logits_of, None, tokens), write(logits_of, memories, tokens)
    start = random_start(model.decoder, len(tokens), memories.shape[1], seed)
    start = start * (memories.square().mean().sqrt() / start.square().mean().sqrt())
    random, refined = (
        optimise_memories(logits_of, tokens, begin, steps=steps, learning_rate=rate, until_exact=False)
        for begin, rate in ((start, learning_rate), (memories, refine_learning_rate))
    )
    ceiling = _better(random, refined)
    return {
        "objective": objective,
        "num_vectors": memories.shape[1],
        "without": _point(0, without.losses, without.correct),
        "one_pass": summarise_written(one_pass, without),
        "optimised": summarise_written(random, without),
        "refined": summarise_written(refined, without),
        "ceiling": summarise_written(ceiling, without),
        **percent_of_ceiling(one_pass, ceiling, without),
    }


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(
        prog="python -m training.ceiling",
        description="How many tokens fit into vectors made for one text alone, and what share does an encoder reach?",
    )
    add = parser.add_argument
    add("model", help="folder or Hub id of a memory model, or of any causal LM")
    add("--text", action="append", default=[], metavar="FILE", help="text (default: the test split of the books here)")
    add("--texts", type=whole_number(), default=8, metavar="N", help="texts, spread over the file (8)")
    add("--lengths", type=numbers, default=(8, 16, 32, 64), metavar="N,N", help="causal LM: tokens (8,16,32,64)")
    add("--vectors", type=whole_number(), default=1, metavar="K", help="causal LM: vectors of a text (1)")
    add("--objective", choices=("copy", "blank_copy"), default="copy", help="memory model: how it writes")
    add("--steps", type=whole_number(), default=500, metavar="N", help="most optimiser steps (500)")
    add(
        "--learning-rate",
        type=positive_number,
        default=0.3,
        metavar="X",
        help="of Adam, in units of the start's scale (0.3)",
    )
    add(
        "--refine-learning-rate",
        type=positive_number,
        default=0.02,
        metavar="X",
        help="from an encoder's memories (0.02)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the random starts")
    add("--threads", type=whole_number(), metavar="N", help="processor threads")
    add("--to", default="runs/ceiling", metavar="FOLDER", help="where record and figure go (runs/ceiling)")
    return parser


def _measure_memory_model(
    options: argparse.Namespace, documents: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compare a memory model with its ceiling; return settings and metrics."""
    model, tokenizer, _ = load_model(options.model)
    settings = {name: getattr(options, name) for name in ("objective", "refine_learning_rate")}
    spent = {name: getattr(options, name) for name in ("steps", "learning_rate", "seed")}
    tokens = _spread(tokenizer, documents, model.config.window_length, options.texts)
    found = against_ceiling(model, special_tokens_of(tokenizer), tokens, **settings, **spent)
    return settings, {"against_ceiling": found}


def _measure_causal_lm(
    options: argparse.Namespace, documents: Sequence[str], folder: Path, asked: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure what fits into vectors of a causal LM, a file for each length; return settings and metrics."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    settings = {"lengths": list(options.lengths), "vectors": options.vectors}
    tokens = _spread(tokenizer, documents, max(options.lengths), options.texts)
    asked = asked | settings | {"model": portable_path(options.model), "tokens": tokens.tolist()}

    def keep(length: int, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        file = folder / "cells" / f"{data_digest({**asked, 'length': length})}.json"
        result = read_json(file)
        if result is None:
            result = measure()
            write_json(file, result)
        print(f"{length} tokens: {result['exact_match']:.0%} of texts without an error, "
              f"{result['token_accuracy']:.1%} of tokens", flush=True)  # fmt: skip
        return result

    found = capacity(
        model,
        tokens,
        options.lengths,
        num_vectors=options.vectors,
        prefix=special_tokens_around(tokenizer)[0],
        steps=options.steps,
        learning_rate=options.learning_rate,
        seed=options.seed,
        keep=keep,
    )
    return settings, {"capacity": found}


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure as the command line says; return the record."""
    measurement, folder = Measurement(command), check_place(options.to)
    documents, held_out, files = read_texts(options.text or ["training/corpora/books/test.parquet"], [])
    documents = documents + held_out
    settings = {name: getattr(options, name) for name in ("texts", "steps", "learning_rate", "seed")}
    model_type = model_config(options.model).model_type
    if model_type == "memory_autoencoder":
        raise ValueError(f"{options.model} is an autoencoder; give a memory model or a causal LM")
    if model_type == "memory_encoder_decoder":
        own, metrics = _measure_memory_model(options, documents)
    else:
        own, metrics = _measure_causal_lm(options, documents, folder, settings)
    settings |= own
    record = measurement.record(
        torch.device("cpu"),
        inputs={"files": file_checksums(files), "model": portable_path(options.model)},
        recipe=settings,
        metrics=metrics,
    )
    save_record(folder / "record.json", record)
    figure = write_ceiling_figure(record, folder)
    if "against_ceiling" in metrics:
        print("\n".join(ceiling_lines(metrics["against_ceiling"])))
    else:
        print(f"half of the texts fit up to {metrics['capacity']['half_of_texts_fit']} tokens")
    print(f"record: {folder / 'record.json'}\nfigure: {folder / figure}")
    return record


def ceiling_lines(result: dict[str, Any]) -> list[str]:
    """Lay the comparison of one pass and ceiling out as lines."""
    lines = [f"{'memories':<12}{'tokens':>9}{'exact':>8}{'gain, nats a text':>20}"]
    for name in ("one_pass", "refined", "optimised", "ceiling"):
        part = result[name]
        lines.append(f"{name.replace('_', ' '):<12}{part['token_accuracy']:>9.1%}{part['exact_match']:>8.0%}"
                     f"{part['gain_nats']:>20.1f}")  # fmt: skip
    low, high = result["percent_of_nats_interval"]
    return [*lines, f"one pass reaches {result['percent_of_nats']:.1f} % of the ceiling ({low:.1f} to {high:.1f})"]


def _spread(tokenizer: Any, documents: Sequence[str], length: int, num_texts: int) -> torch.Tensor:
    rows = cut_rows(tokenizer, documents, length).tokens
    return rows[torch.linspace(0, len(rows) - 1, min(num_texts, len(rows))).round().long()]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
