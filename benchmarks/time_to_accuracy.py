"""Time to 90 % of the tokens: the shipped recipe of the autoencoder against research code on the same data.

```bash
python -m benchmarks.time_to_accuracy --threads 2
python -m benchmarks.time_to_accuracy --threads 2 stages.autoencoder.training.max_steps=400
```

Both train the same autoencoder, from the same weights, on the same rows in the same order, in the same batches, on the
same number of threads, one after the other in one process.

* The *recipe* is the recipe's own autoencoder stage, run by the trainer that `python -m training.run` uses: optimizer,
  schedule, precision and batched model as shipped. Only the chunk is set to `--chunk-length` tokens, with as many
  tokens a step as before.
* The *baseline* is a plain training loop: float32, AdamW at a constant 5e-4, gradients clipped to 1, over
  `tests/reference/plain_autoencoder.py`, which loops over layers, heads and unroll positions.

Every few steps both are evaluated by the same function on the same validation rows; evaluation is on neither clock,
nor are saving, tokenising and building. The recipe runs until it has the accuracy, then the baseline until it has it
too or has used `--max-ratio` times the recipe's time; then the ratio is known from below only.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from benchmarks.measure import assert_equal, benchmark_parser, describe_run, load_average, run_benchmark
from modeling_memory import MemoryAutoencoder
from tests.reference.plain_autoencoder import plain_autoencoder
from training.data.objectives import BatchSpec
from training.data.rows import ObjectiveCollator, TokenRows
from training.measure.suites import spread_rows
from training.recipes.recipe import Recipe, StageRecipe, load_recipe
from training.records.record import peak_memory_bytes
from training.train.build import build_stage_model, count_parameters
from training.train.inputs import Inputs, prepare_inputs
from training.train.trainer import MemoryTrainer, training_arguments

BASELINE_LEARNING_RATE = 5e-4
BASELINE_CLIP = 1.0
# float32 sums in another order: 1e-6 of the largest value measured, gradients included.
TOLERANCE = 1e-4


class Clock:
    """Seconds of wall time and of CPU time (all threads), while it is not paused."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._started: tuple[float, float] | None = None

    def start(self) -> None:
        """Go on."""
        self._started = time.perf_counter(), time.process_time()

    def pause(self) -> None:
        """Stop counting."""
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started[0]
            self.cpu_seconds += time.process_time() - self._started[1]
            self._started = None


@dataclass
class Side:
    """One of the two competitors: its clock and its curve of accuracies."""

    name: str
    target: float
    clock: Clock = field(default_factory=Clock)
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        """Whether the last evaluation had the accuracy asked for."""
        return bool(self.curve) and self.curve[-1]["token_accuracy"] >= self.target

    def note(self, step: int, accuracy: float) -> None:
        """Add an evaluation and print it."""
        seconds, cpu_seconds = self.clock.seconds, self.clock.cpu_seconds
        self.curve.append({"step": step, "seconds": seconds, "cpu_seconds": cpu_seconds, "token_accuracy": accuracy})
        print(f"{self.name:<9} step {step:>6} {seconds:>9.1f} s   token accuracy {accuracy:.2%}", flush=True)

    def describe(self) -> dict[str, Any]:
        """Return the result for the record."""
        last = self.curve[-1]
        return {
            "reached": self.reached,
            "steps": last["step"],
            "seconds": last["seconds"],
            "cpu_seconds": last["cpu_seconds"],
            "token_accuracy": last["token_accuracy"],
            "curve": self.curve,
        }


@dataclass(frozen=True)
class Task:
    """What both sides are given.

    Attributes:
        stage (`StageRecipe`): The recipe's autoencoder stage.
        seed (`int`): Seed of the weights and of the order of rows.
        model (`MemoryAutoencoder`): The weights both begin with.
        collator (`ObjectiveCollator`): Turns rows into batches.
        train_tokens (`torch.Tensor`): Stream of the train split.
        validation_rows (`torch.Tensor` of shape `(R, n)`): What both are evaluated on.
        eval_steps (`int`): Steps between two evaluations.
    """

    stage: StageRecipe
    seed: int
    model: MemoryAutoencoder
    collator: ObjectiveCollator
    train_tokens: torch.Tensor
    validation_rows: torch.Tensor
    eval_steps: int

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.stage.training.batch_size * self.stage.training.gradient_accumulation_steps

    def rows(self, num_steps: int) -> TokenRows:
        """Return the training rows of so many steps; row i does not depend on how many there are."""
        data = self.stage.data
        seed = self.seed if data.seed is None else data.seed
        return TokenRows(
            self.train_tokens, row_length=data.row_length, num_items=num_steps * self.rows_per_step, seed=seed
        )

    @torch.no_grad()
    def accuracy(self, model: MemoryAutoencoder) -> float:
        """Token accuracy on the validation rows, in float32, by the batched model for both sides."""
        training = model.training
        model.eval()
        correct = total = 0
        for rows in self.validation_rows.split(self.stage.training.batch_size):
            chunks = self.collator.collate("reconstruction", rows)["input_ids"]
            correct += int((model.reconstruct(chunks) == chunks).sum())
            total += chunks.numel()
        model.train(training)
        return correct / total


def prepare(recipe: Recipe, stage_name: str | None, folder: Path, *, eval_steps: int, eval_rows: int) -> Task:
    """Read the text and build the model as `python -m training.run` does.

    Raises:
        ValueError: If the recipe has no such autoencoder stage or its stage starts from another one.
    """
    stage = find_stage(recipe, stage_name)
    seed = recipe.seed + [other.name for other in recipe.stages].index(stage.name)
    inputs: Inputs = prepare_inputs(recipe, folder, PartialState(cpu=True))
    vocab_size = len(inputs.tokenizer) if inputs.special_tokens.memory is None else inputs.special_tokens.memory
    set_seed(seed)
    model = build_stage_model(stage, special_tokens=inputs.special_tokens, vocab_size=vocab_size, load=_no_stage)
    collator = ObjectiveCollator(
        ["reconstruction"],
        BatchSpec(
            inputs.special_tokens,
            chunk_length=model.config.chunk_length,
            window_length=model.config.chunk_length,
            memories_per_chunk=model.config.memories_per_chunk,
        ),
    )
    rows = spread_rows(inputs.tokens["validation"], row_length=stage.data.row_length, limit=eval_rows)
    return Task(stage, seed, model, collator, inputs.tokens["train"], rows, eval_steps)


def with_chunk_length(recipe: Recipe, stage_name: str | None, chunk_length: int) -> list[str]:
    """Return overrides for chunks of so many tokens, one a row, and steps of as many tokens as before."""
    stage = find_stage(recipe, stage_name)
    batch_size = max(1, stage.training.batch_size * stage.data.row_length // chunk_length)
    path = f"stages.{stage.name}"
    return [
        f"{path}.model.chunk_length={chunk_length}",
        f"{path}.data.row_length={chunk_length}",
        f"{path}.training.batch_size={batch_size}",
    ]


def find_stage(recipe: Recipe, name: str | None) -> StageRecipe:
    """Return the autoencoder stage of that name, or the first one."""
    stages = [stage for stage in recipe.stages if stage.kind == "autoencoder" and not stage.from_]
    found = [stage for stage in stages if name in (None, stage.name)]
    if not found:
        asked = "" if name is None else f" called {name!r}"
        names = ", ".join(stage.name for stage in stages) or "none"
        raise ValueError(
            f"recipe {recipe.name} has no autoencoder stage{asked} that starts from nothing; it has {names}"
        )
    return found[0]


def _no_stage(name: str) -> Any:
    raise ValueError(f"the stage takes weights from {name}; this benchmark starts both sides from nothing")


class StopAtAccuracy(TrainerCallback):
    """Evaluates every few steps off the clock, and stops the trainer at the accuracy asked for."""

    def __init__(self, side: Side, evaluate: Callable[[], float], eval_steps: int) -> None:
        self.side = side
        self.evaluate = evaluate
        self.eval_steps = eval_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.side.clock.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.eval_steps == 0 or state.global_step == state.max_steps:
            self.side.clock.pause()
            self.side.note(state.global_step, self.evaluate())
            control.should_training_stop = control.should_training_stop or self.side.reached
            self.side.clock.start()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.side.clock.pause()


def train_recipe(task: Task, side: Side, folder: Path) -> None:
    """Train as the recipe says, until the accuracy is reached or the recipe ends."""
    training = replace(task.stage.training, eval_steps=None, save_steps=None)
    model = copy.deepcopy(task.model)
    trainer = MemoryTrainer(
        model,
        training_arguments(training, folder, seed=task.seed, use_cpu=True),
        objectives={"reconstruction": 1.0},
        training=training,
        train_dataset=task.rows(training.max_steps),
        data_collator=task.collator,
        label=side.name,
    )
    trainer.add_callback(StopAtAccuracy(side, lambda: task.accuracy(model), task.eval_steps))
    trainer.train()


def plain_loss(model: MemoryAutoencoder, chunks: torch.Tensor) -> torch.Tensor:
    """Mean loss of full chunks `(B, L)` by the plain autoencoder."""
    return F.cross_entropy(plain_autoencoder(model, chunks).flatten(0, 1), chunks.flatten())


def train_baseline(task: Task, side: Side, max_seconds: float) -> None:
    """Train by the plain loop, until the accuracy is reached or the time is used up."""
    model = copy.deepcopy(task.model).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=BASELINE_LEARNING_RATE, weight_decay=0.0)
    rows, count = task.rows(sys.maxsize // task.rows_per_step), task.rows_per_step
    step = 0
    while not side.reached and side.clock.seconds < max_seconds:
        side.clock.start()
        for _ in range(task.eval_steps):
            items = [rows[step * count + i] for i in range(count)]
            chunks = task.collator(items)["reconstruction"]["input_ids"]
            optimizer.zero_grad()
            plain_loss(model, chunks).backward()
            torch.nn.utils.clip_grad_norm_(parameters, BASELINE_CLIP)
            optimizer.step()
            step += 1
        side.clock.pause()
        side.note(step, task.accuracy(model))


def check_paths(task: Task) -> dict[str, float]:
    """Check that the plain loop and the batched model agree in loss and gradients on the first batch.

    Raises:
        UnequalPathsError: If they differ.
    """
    rows = task.rows(1)
    chunks = task.collator([rows[i] for i in range(len(rows))])["reconstruction"]["input_ids"]
    results = []
    for loss in (lambda m: m(chunks, labels=chunks).loss, lambda m: plain_loss(m, chunks)):
        model = copy.deepcopy(task.model).eval()
        value = loss(model)
        value.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": value.detach(), **gradients})
    return assert_equal(*results, tolerance=TOLERANCE)


def compare_times(recipe: Side, baseline: Side) -> dict[str, Any]:
    """Return how many times longer the baseline takes, or has taken so far if it did not get there."""
    if not recipe.reached:
        return {"ratio": None, "is_lower_bound": None, "cpu_ratio": None}
    one, other = recipe.curve[-1], baseline.curve[-1]
    return {
        "ratio": other["seconds"] / max(one["seconds"], 1e-9),
        "is_lower_bound": not baseline.reached,
        "cpu_ratio": other["cpu_seconds"] / max(one["cpu_seconds"], 1e-9),
    }


def run(task: Task, *, target: float, max_ratio: float, folder: Path) -> dict[str, Any]:
    """Run both sides; returns the measured part of the record."""
    equality = check_paths(task)
    recipe, baseline = Side("recipe", target), Side("baseline", target)
    train_recipe(task, recipe, folder)
    if recipe.reached:
        train_baseline(task, baseline, max_ratio * recipe.curve[-1]["seconds"])
    else:
        print(f"the recipe ended at {recipe.curve[-1]['token_accuracy']:.2%}, below {target:.0%}: nothing to compare")
    sides = {side.name: side.describe() for side in (recipe, baseline) if side.curve}
    return {"equality": equality, **sides, **compare_times(recipe, baseline)}


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that cannot be meant.

    Raises:
        ValueError: Naming the option.
    """
    if not 0 < options.target <= 1:
        raise ValueError(f"--target is {options.target}, expected a share above 0 and at most 1")
    if options.max_ratio <= 0:
        raise ValueError(f"--max-ratio is {options.max_ratio}, expected a number above 0")


def measure(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Train both sides and return the record."""
    check_options(options)
    recipe = load_recipe(options.recipe, options.overrides)
    lengths = with_chunk_length(recipe, options.stage, options.chunk_length)
    recipe = load_recipe(options.recipe, [*options.overrides, *lengths])
    if options.threads is None and recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs"
        task = prepare(recipe, options.stage, inputs, eval_steps=options.eval_steps, eval_rows=options.eval_rows)
        record = describe_run("time_to_accuracy", command, {"weights_and_order": task.seed})
        record["hardware"]["load_before"] = load_average()
        metrics = run(task, target=options.target, max_ratio=options.max_ratio, folder=Path(folder) / "trainer")
    config, mapping = task.model.config, recipe.to_mapping()
    if not metrics["recipe"]["reached"]:
        record["run"]["status"] = "the recipe did not reach the accuracy"
    record.update(
        target=options.target,
        max_ratio=options.max_ratio,
        given={
            "recipe": recipe.name,
            "stage": next(stage for stage in mapping["stages"] if stage["name"] == task.stage.name),
            "data": mapping["data"],
            "tokens_per_memory": config.chunk_length / config.memories_per_chunk,
            "rows_per_step": task.rows_per_step,
            "row_length": task.stage.data.row_length,
            "parameters": count_parameters(task.model),
            "eval_steps": task.eval_steps,
            "eval_tokens": task.validation_rows.numel(),
            "baseline": {"optimizer": "adamw", "learning_rate": BASELINE_LEARNING_RATE, "clip": BASELINE_CLIP},
        },
        metrics=metrics,
        peak_memory_bytes=peak_memory_bytes(),
    )
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 1 if there is nothing to compare."""
    parser = benchmark_parser(
        "time_to_accuracy",
        "Train the autoencoder as the recipe says and as research code does; compare the times.",
        quick=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace a value of the recipe")
    parser.add_argument("--recipe", default="quickstart", help="recipe with an autoencoder stage")
    parser.add_argument("--stage", help="name of that stage (default: the recipe's first)")
    parser.add_argument("--chunk-length", type=int, default=32, help="tokens of a chunk (default: 32)")
    parser.add_argument("--target", type=float, default=0.9, help="token accuracy to reach (default: 0.9)")
    parser.add_argument("--max-ratio", type=float, default=10.5, help="most times the recipe's time (default: 10.5)")
    parser.add_argument("--eval-steps", type=int, default=25, help="steps between two evaluations (default: 25)")
    parser.add_argument("--eval-rows", type=int, default=512, help="validation rows of one evaluation (default: 512)")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
