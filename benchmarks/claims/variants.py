r"""What the recipe cannot express: recurrent and oracle memories, masked targets, noise, half depth, random text.

```bash
python -m benchmarks.claims.variants runs/claims --to runs/claims_cells --threads 1
```

| cell | holds |
|---|---|
| `parallel_S`, `recurrent_S` | memory of each window beside the others, or handed on; data seed S |
| `no_border_S` | as `parallel_S`, but no later window's first token is a target |
| `oracle_KIND`, `oracle_full_context` | one vector of the whole text of 64 tokens, and all tokens before instead |
| `oracle_token_16`, `oracle_full_context_16` | the same with texts of 16 tokens |
| `noise_Q` | an autoencoder's bottleneck, trained with noise in [-Q, Q], narrow vectors then kept in eight bits |
| `half_depth` | the transformer autoencoder's encoder under as many fresh layers: what becomes of its vectors |
| `half_depth_copy`, `whole_copy` | blank copy through the lifted encoder, frozen, and through the encoder as it is |
| `random_tokens` | the autoencoder, trained on random ids |
| `half_precision_STAGE` | an autoencoder's largest activation, and what float16 and bfloat16 make of it |

Metrics of `parallel`, `recurrent` and `no_border` stand under `all` targets, those at the `border` (first
token of a later window) and those `inside`; of `oracle` under `own` and `wrong` (another text's vector); of `noise`
under `own` and each way of storing. Each model is trained with the steps, rows and rates of a stage of the recipe,
so that tokens are equal; the cell's `asked` says which.

B texts, T tokens of a text, W tokens of a window, V vocabulary.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.claims.cells import Cell, cell_path, measure_cell
from benchmarks.claims.scoring import summarise
from benchmarks.claims.source import Source, open_run
from modeling_memory.memory_encoder import encode_chunks
from training.command_line import run_command
from training.data.objectives import IGNORED, BatchSpec, build_batch
from training.measure.baselines import (
    QUANTISATIONS,
    OracleMemory,
    RecurrentMemory,
    cut_layers,
    lift_into_deeper,
    next_token_loss,
    quantised,
    score_next_tokens,
)
from training.measure.metrics import token_results
from training.measure.suites import Evaluation, Scores, evaluate_suite, score
from training.records.record import data_digest
from training.train.build import build_stage_model, count_parameters
from training.train.checkpoints import replace_folder
from training.train.fit import Budget, fit

SEEDS = (100, 101)
ORACLE_LENGTH = 64
NARROW = 64
NOISES = {"none": 0.0, "1_16": 2.0**-4, "1_4": 2.0**-2}
FOLLOWED = ("as_stage", "tokens_as", "decoder_of")
HALF_PRECISION_STAGES = ("ae", "mixer_unroll", "mixer_heads_16", "mixer_flat", "transformer_unroll")


@dataclass(frozen=True)
class Variant:
    """One measurement.

    Attributes:
        name (`str`): Of its cell.
        measure (`Callable`): Source, folder of the study, file for a checkpoint -> what [`measure_cell`] takes.
        needs (`tuple[str, ...]`): Stages of the run that it reads.
        asked (`dict`): What else decides its result.
    """

    name: str
    measure: Callable[[Source, Path, Path], dict[str, Any]]
    needs: tuple[str, ...] = ()
    asked: dict[str, Any] = field(default_factory=dict)


class Reader(nn.Module):
    """A causal LM or memory model as a map from texts `(B, T)` to logits `(B, T, V)`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def border_targets(length: int, window_length: int) -> torch.Tensor:
    """Return which of the targets 1, 2, ... `(length - 1,)` are the first token of a later window.

    >>> border_targets(7, 3).tolist()
    [False, False, True, False, False, True]
    """
    return torch.arange(1, length) % window_length == 0


def loss_without(logits: torch.Tensor, input_ids: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next tokens that are not left out `(T - 1,)`, from logits `(B, T, V)`."""
    targets = input_ids[:, 1:].masked_fill(left_out, IGNORED)
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def next_token_metrics(scores: Scores, vocab_size: int, window_length: int) -> dict[str, Any]:
    """Metrics of all targets, of those at borders of windows, and of the others."""
    border = border_targets(scores.targets.shape[1] + 1, window_length)
    parts = {"all": torch.ones_like(border), "border": border, "inside": ~border}
    return {
        name: summarise(Scores(scores.losses[:, kept], scores.correct[:, kept], scores.targets[:, kept]), vocab_size,
                        period=int(kept.sum()))
        for name, kept in parts.items()
    }  # fmt: skip


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw fresh weights from a seed, and leave the generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def train(
    model: nn.Module,
    source: Source,
    checkpoint: Path,
    budget: Budget,
    length: int,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    """Train a model on rows of the run's text, with a checkpoint; return steps, tokens and the last loss."""
    batch_rows = budget.batch_tokens // length
    rows = source.train_rows(length, batch_rows, budget.steps, budget.seed)

    def loss_of_step(step: int) -> torch.Tensor:
        torch.manual_seed(budget.seed * 1_000_003 + step)  # noise of a step does not depend on where it resumed
        numbers = range(step * batch_rows, (step + 1) * batch_rows)
        return loss_of(torch.stack([rows[i][1] for i in numbers]))

    with torch.random.fork_rng(devices=[]):
        losses = fit(model, loss_of_step, budget, checkpoint=checkpoint, label=checkpoint.stem)
    return {"steps": budget.steps, "text_tokens": budget.steps * batch_rows * length, "losses": losses}


def trained(spent: Mapping[str, Any], metrics: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Put what was measured and what it took together, as a cell holds them."""
    last = spent["losses"][-20:]
    sizes = {"final_train_loss": sum(last) / len(last), "parameters": count_parameters(model)}
    return {"metrics": metrics | sizes, "steps": spent["steps"], "text_tokens": spent["text_tokens"]}


def next_token_variant(kind: str, seed: int) -> Variant:
    """A model that reads rows in windows, as the stage `memory` does: `parallel`, `no_border` or `recurrent`."""
    name = f"{kind}_{seed}"

    def measure(source: Source, folder: Path, checkpoint: Path) -> dict[str, Any]:
        stage = source.stage("memory")
        window, length = stage.model["window_length"], stage.data.row_length
        with seeded(seed):
            if kind == "recurrent":
                model: nn.Module = RecurrentMemory(source.load("decoder"), window)
            else:
                model = Reader(build_model(source, "memory"))
        left_out = border_targets(length, window) & (kind == "no_border")
        budget = source.budget("memory", seed)
        spent = train(
            model, source, checkpoint, budget, length, lambda rows: loss_without(model(rows), rows, left_out)
        )
        scores = score_next_tokens(model, source.test_rows(length))
        return trained(spent, next_token_metrics(scores, source.vocab_size, window), model)

    needs = ("decoder",) if kind == "recurrent" else ("untrained", "decoder")
    return Variant(name, measure, needs, {"kind": kind, "as_stage": "memory", "seed": seed})


def build_model(source: Source, name: str, given: Mapping[str, Any] | None = None, **fields: Any) -> Any:
    """Build the model that a stage begins with, with other fields; `given` stands in for stages it is joined from."""
    stage = source.stage(name)
    return build_stage_model(
        replace(stage, model={**stage.model, **fields}),
        special_tokens=source.inputs.special_tokens,
        vocab_size=source.vocab_size,
        load=lambda other: (given or {}).get(other) or source.load(other),
    )


def build_oracle(source: Source, kind: Any, length: int, seed: int) -> OracleMemory:
    """Put a fresh mixer encoder of whole texts before the stage `decoder`; all of it is trained."""
    with seeded(seed):
        encoder = build_model(source, "ae", chunk_length=length).encoder
    return OracleMemory(encoder, source.load("decoder"), kind)


@torch.no_grad()
def score_behind(model: OracleMemory, rows: torch.Tensor, shift: int, batch_size: int = 64) -> Scores:
    """Score the next tokens of texts `(R, T)`, each behind the vector of the text `shift` rows away."""
    model.eval()
    parts = []
    for own, other in zip(rows.split(batch_size), rows.roll(shift, 0).split(batch_size), strict=True):
        correct, losses = token_results(model(own, model.encode(other))[:, :-1], own[:, 1:])
        parts.append(Scores(losses, correct, own[:, 1:]))
    return Scores.join(parts)


def oracle_variant(name: str, kind: str, length: int, seed: int = 0) -> Variant:
    """An oracle, trained as `copy_trainable` is, on as many tokens as `memory`."""

    def measure(source: Source, folder: Path, checkpoint: Path) -> dict[str, Any]:
        model = build_oracle(source, kind, length, seed)
        budget, rows = oracle_budget(source, seed), source.test_rows(length)
        spent = train(model, source, checkpoint, budget, length, lambda own: next_token_loss(model(own), own))
        metrics = {
            condition: summarise(score_behind(model, rows, shift), source.vocab_size, length - 1)
            for condition, shift in (("own", 0), ("wrong", len(rows) // 2))
        }
        keep_encoder(model.encoder, source, folder, name)
        return trained(spent, metrics, model)

    asked = {"kind": kind, "length": length, "as_stage": "copy_trainable", "tokens_as": "memory", "seed": seed}
    return Variant(name, measure, ("decoder",), asked)


def oracle_budget(source: Source, seed: int) -> Budget:
    """The rates of a trainable encoder from fresh weights, the tokens of the models that predict."""
    return replace(source.budget("copy_trainable", seed), batch_tokens=source.budget("memory", seed).batch_tokens)


def keep_encoder(body: Any, source: Source, folder: Path, name: str) -> None:
    """Keep an encoder with its tokenizer under `models/`, as [`training.measure.frozen.load_encoder`] reads it."""

    def write(part: Path) -> None:
        body.save_pretrained(part)
        source.inputs.tokenizer.save_pretrained(part)

    replace_folder(encoder_folder(folder, name), write)


def encoder_folder(folder: Path, name: str) -> Path:
    return folder / "models" / name


def oracle_full_context_variant(name: str, length: int) -> Variant:
    """The stage `full_context` on the targets of an oracle of texts of `length` tokens."""

    def measure(source: Source, folder: Path, checkpoint: Path) -> dict[str, Any]:
        scores = score_next_tokens(Reader(source.load("full_context")), source.test_rows(length))
        return {"metrics": summarise(scores, source.vocab_size, length - 1)}

    return Variant(name, measure, ("full_context",), {"length": length})


def noise_variant(name: str, noise: float, seed: int = 0) -> Variant:
    """An autoencoder with a bottleneck: a transformer, whose last norm keeps its vectors at one scale."""

    def measure(source: Source, folder: Path, checkpoint: Path) -> dict[str, Any]:
        encoder = source.stage("transformer_unroll").model["encoder"]
        with seeded(seed):
            model = build_model(source, "ae", encoder=encoder, bottleneck_size=NARROW, bottleneck_noise=noise)
        length = model.config.chunk_length
        budget, rows = source.budget("transformer_unroll", seed), source.test_rows(length)
        spent = train(model, source, checkpoint, budget, length, lambda own: model(input_ids=own, labels=own).loss)
        metrics = {"own": summarise(score_chunks(source, model, rows), source.vocab_size, length)}
        for stored in QUANTISATIONS:
            with quantised(model.bottleneck, stored):
                metrics[stored] = summarise(score_chunks(source, model, rows), source.vocab_size, length)
            metrics[stored]["loss_increase_percent"] = 100 * (metrics[stored]["loss"] / metrics["own"]["loss"] - 1)
        with torch.no_grad():
            narrow = model.bottleneck.narrow(encode_chunks(model.encoder, model.pooling, rows)[:, 0])
        scale = {"root_mean_square": narrow.square().mean().sqrt().item(), "largest": narrow.abs().max().item()}
        return trained(spent, {**metrics, "narrow": scale}, model)

    asked = {"noise": noise, "bottleneck": NARROW, "as_stage": "transformer_unroll", "decoder_of": "ae", "seed": seed}
    return Variant(name, measure, (), asked)


def lifted_autoencoder(source: Source) -> tuple[Any, Any]:
    """Load the transformer autoencoder, and again with its encoder under as many fresh layers, without its norm."""
    whole, lifted = source.load("ae_transformer"), source.load("ae_transformer")
    depth = whole.encoder.config.num_hidden_layers
    lifted.encoder = lift_into_deeper(whole.encoder, 2 * depth)
    lifted.config.encoder = lifted.encoder.config
    return whole, lifted


@torch.no_grad()
def measure_half_depth(source: Source, folder: Path, checkpoint: Path) -> dict[str, Any]:
    """How far the vectors of the lifted encoder are from its own, and what the autoencoder still writes from them."""
    whole, lifted = lifted_autoencoder(source)
    rows = source.test_rows(whole.config.chunk_length)
    trained_part = cut_layers(whole.encoder, whole.encoder.config.num_hidden_layers)
    vectors = {
        "lifted": torch.cat([lifted.encode(part)[:, 0] for part in rows.split(256)]),
        "whole": torch.cat([whole.encode(part)[:, 0] for part in rows.split(256)]),
        "without_norm": torch.cat([trained_part(part).last_hidden_state[:, -1] for part in rows.split(256)]),
    }
    cosines = {name: torch.cosine_similarity(vectors["lifted"], vectors[name]) for name in ("whole", "without_norm")}
    metrics: dict[str, Any] = {
        f"cosine_{name}": {"mean": found.mean().item(), "smallest": found.min().item()}
        for name, found in cosines.items()
    }
    for name, model in (("whole", whole), ("lifted", lifted)):
        length = model.config.chunk_length
        evaluation = Evaluation(model, source.inputs.special_tokens, chunk_length=length, window_length=length)
        metrics[f"retention_{name}"] = evaluate_suite(evaluation, "retention", rows)["memory"]
    return {"metrics": metrics}


def half_depth_copy_variant(name: str, lifted: bool, seed: int = 0) -> Variant:
    """Blank copy as the stage `blank_transformer` learns it, through the encoder as it is or lifted."""

    def measure(source: Source, folder: Path, checkpoint: Path) -> dict[str, Any]:
        stage = source.stage("blank_transformer")
        with seeded(seed):
            model = build_model(source, stage.name, {"ae_transformer": lifted_autoencoder(source)[lifted]})
        config, length = model.config, stage.data.row_length
        evaluation = Evaluation(
            model, source.inputs.special_tokens, chunk_length=config.chunk_length, window_length=config.window_length
        )
        budget = source.budget(stage.name, seed)
        spent = train(
            model, source, checkpoint, budget, length,
            lambda rows: model(**evaluation.build("blank_copy", rows), use_cache=False).loss,
        )  # fmt: skip
        return trained(spent, evaluate_suite(evaluation, "blank_copy", source.test_rows(length)), model)

    asked = {"kind": "half_depth_copy", "lifted": lifted, "as_stage": "blank_transformer", "seed": seed}
    return Variant(name, measure, ("ae_transformer", "decoder"), asked)


def random_ids(source: Source, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Uniformly random ids of the whole table, `shape`."""
    return torch.randint(source.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def measure_random_tokens(source: Source, folder: Path, checkpoint: Path) -> dict[str, Any]:
    """The autoencoder `ae`, trained on random ids with the same steps, on other random ids and on text."""
    with seeded(0):
        model = build_model(source, "ae")
    length, budget = model.config.chunk_length, source.budget("ae", 0)
    chunks = budget.batch_tokens // length
    test = source.test_rows(length)
    unseen = random_ids(source, tuple(test.shape), seed=-1)

    def loss_of_step(step: int) -> torch.Tensor:
        own = random_ids(source, (chunks, length), seed=step)
        return model(input_ids=own, labels=own).loss

    losses = fit(model, loss_of_step, budget, checkpoint=checkpoint, label=checkpoint.stem)
    series = losses[:: max(1, budget.steps // 40)]
    metrics: dict[str, Any] = {"uniform_loss": math.log(source.vocab_size), "train_losses": series}
    for name, rows in (("random", unseen), ("text", test)):
        metrics[name] = summarise(score_chunks(source, model, rows), source.vocab_size, length)
    spent = {"steps": budget.steps, "text_tokens": budget.steps * chunks * length, "losses": losses}
    return trained(spent, metrics, model)


def score_chunks(source: Source, model: Any, rows: torch.Tensor) -> Scores:
    """Score what an autoencoder writes back of chunks `(R, L)`."""
    ids, length = source.inputs.special_tokens, rows.shape[1]
    batches = [
        build_batch("reconstruction", part, BatchSpec(ids, window_length=length, chunk_length=length))
        for part in rows.split(256)
    ]
    return Scores.join([score(model, batch, len(batch["labels"])) for batch in batches])


def half_precision_variant(stage: str) -> Variant:
    """A trained autoencoder's largest activation in float32, and what it writes in float16 and bfloat16."""

    @torch.no_grad()
    def measure(source: Source, folder: Path, checkpoint: Path) -> dict[str, Any]:
        model = source.load(stage)
        rows = source.test_rows(model.config.chunk_length)
        metrics: dict[str, Any] = {"largest_activation": largest_activation(model, rows[:256])}
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            rounded = copy.deepcopy(model).to(dtype)
            logits = torch.cat([rounded(input_ids=part).logits for part in rows.split(256)])
            found = {"non_finite_share": 1 - logits.isfinite().double().mean().item()}
            correct, losses = token_results(logits, rows)
            if found["non_finite_share"]:  # a loss of what is no number is none
                found |= {"token_accuracy": correct.double().mean().item(), "loss": None}
            else:
                found |= summarise(Scores(losses, correct, rows), source.vocab_size, rows.shape[1])
            metrics[str(dtype).removeprefix("torch.")] = found
        return {"metrics": metrics}

    return Variant(f"half_precision_{stage}", measure, (stage,), {"kind": "half_precision", "stage": stage})


@torch.no_grad()
def largest_activation(model: nn.Module, rows: torch.Tensor) -> float:
    """The largest absolute value that any module of a model gives for rows `(R, T)`."""
    largest = [0.0]

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                largest.append(tensor.abs().max().item())

    handles = [module.register_forward_hook(look) for module in model.modules()]
    try:
        model(input_ids=rows)
    finally:
        for handle in handles:
            handle.remove()
    return max(largest)


def variants() -> dict[str, Variant]:
    """All measurements by name, in the order of their worth; second seeds come last."""
    first, second = SEEDS
    found = [
        next_token_variant("recurrent", first),
        next_token_variant("parallel", first),
        next_token_variant("no_border", first),
        oracle_variant("oracle_token", "token", ORACLE_LENGTH),
        *(noise_variant(f"noise_{name}", noise) for name, noise in NOISES.items()),
        Variant("half_depth", measure_half_depth, ("ae_transformer",), {"kind": "half_depth"}),
        half_depth_copy_variant("half_depth_copy", lifted=True),
        Variant("random_tokens", measure_random_tokens, (), {"kind": "random_tokens", "as_stage": "ae"}),
        *(half_precision_variant(stage) for stage in HALF_PRECISION_STAGES),
        oracle_full_context_variant("oracle_full_context", ORACLE_LENGTH),
        oracle_variant("oracle_token_16", "token", 16),
        oracle_full_context_variant("oracle_full_context_16", 16),
        *(next_token_variant(kind, second) for kind in ("recurrent", "parallel", "no_border")),
        oracle_variant("oracle_projection", "projection", ORACLE_LENGTH),
        half_depth_copy_variant("whole_copy", lifted=False),
    ]
    return {variant.name: variant for variant in found}


def describe(source: Source, variant: Variant) -> dict[str, Any]:
    """All that decides the result of a variant: the stages that it follows, and how those were made that it reads."""
    return {
        **variant.asked,
        "as_stages": {name: source.describe(variant.asked[name]) for name in FOLLOWED if name in variant.asked},
        "stages": source.trained_as(variant.needs),
        "text": source.inputs.fingerprint,
    }


def measure_variant(source: Source, folder: Path, variant: Variant) -> Cell:
    """Measure one variant, or find it measured."""
    asked = describe(source, variant)
    checkpoint = folder / "checkpoints" / f"{variant.name}-{data_digest(asked)}.pt"
    cell = measure_cell(folder, variant.name, asked, lambda: variant.measure(source, folder, checkpoint))
    checkpoint.unlink(missing_ok=True)
    return cell


def measure_variants(run_folder: Path, cells: Path, only: Sequence[str] = (), recipe: Any = None) -> None:
    """Measure what is missing.

    Args:
        run_folder (`Path`): Folder of the run of `configuration/recipes/claims.yaml`; read only.
        cells (`Path`): Folder of the study: results under `cells/`, encoders under `models/`.
        only (`Sequence[str]`): Names of measurements. Default: all.
        recipe (`Recipe`, *optional*): What the run ran, if it is another recipe.

    Raises:
        ValueError: If a name is unknown, or, after all others were measured, if some wait for stages of the run.
    """
    known = variants()
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such measurement; known: {', '.join(known)}")
    source = open_run(run_folder, recipe)
    waiting: dict[str, list[str]] = {}
    for variant in [known[name] for name in only] or list(known.values()):
        lacks = source.lacks(variant.needs)
        if lacks:
            waiting[variant.name] = lacks
            continue
        cell = measure_variant(source, cells, variant)
        print(f"{variant.name}: {cell['seconds']:.0f} s, {cell_path(cells, variant.name).name}", flush=True)
    if waiting:
        wait = "; ".join(f"{name} for {', '.join(stages)}" for name, stages in waiting.items())
        raise ValueError(f"these wait for stages of the run: {wait}. Call again when they are trained")


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Build the command line, which all measurements of the claims share."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("run", metavar="RUN", help="folder of the run of configuration/recipes/claims.yaml")
    parser.add_argument("--to", default="runs/claims_cells", metavar="FOLDER", help="where results go")
    parser.add_argument("--only", default="", metavar="NAMES", help="names with commas between (default: all)")
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""

    def run(options: argparse.Namespace, command: str) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        measure_variants(Path(options.run), Path(options.to), [name for name in options.only.split(",") if name])

    parser = build_parser("python -m benchmarks.claims.variants", "Measure what the claims' recipe cannot express.")
    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
