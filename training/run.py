"""Run a recipe: tokenizer, stages, evaluation with controls, Hub folder, record. Killed anywhere, it resumes.

```bash
python -m training.run debug_cpu
python -m training.run configuration/recipes/quickstart.yaml seed=1 stages.decoder.training.max_steps=100
accelerate launch -m training.run configuration/recipes/quickstart.yaml
```
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from .command_line import Parser, run_command
from .data.pairs import evaluate_pairs
from .measure.suites import Evaluation, default_length, evaluate_suite, results_table, spread_rows
from .places import program
from .publish import verify_hub_folder, write_hub_folder
from .recipes.recipe import Recipe, StageRecipe, load_recipe
from .records.figures import write_figures
from .records.record import (
    data_digest,
    describe_code,
    describe_hardware,
    peak_memory_bytes,
    read_json,
    write_json,
    write_record,
)
from .records.sample import regenerate, sample_lines
from .records.summary import write_summary
from .train.inputs import Inputs, prepare_inputs
from .train.stages import StageRunner, chunk_counts, processor_for
from .train.stopping import stop_at_once

PAIR_SUITES = {"clm": "causal", "copy": "copy"}


class Run:
    """One recipe and the folder it is run in.

    Args:
        recipe (`Recipe`): What to do.
        command (`str`): The command line, for the record.
    """

    def __init__(self, recipe: Recipe, command: str) -> None:
        self.recipe = recipe
        self.command = command
        self.folder = Path(recipe.output_dir or f"runs/{recipe.name}")
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self.state = PartialState(cpu=recipe.use_cpu)
        self.is_main = self.state.is_main_process
        self.device = self.state.device
        self.started_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.code = describe_code()  # now: the tree may change while the run goes on

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; return the record."""
        identity = {"recipe": self.recipe.to_mapping(), "processes": self.state.num_processes}
        finished = read_json(self.folder / "record.json")
        if finished is not None and finished.get("identity") == data_digest(identity):
            self.say(f"all done: {self.folder / 'record.json'} (delete {self.folder} to run again)")
            self.report(finished)
            return finished
        with self.phase("tokenizer and text"):
            inputs = prepare_inputs(self.recipe, self.folder / "inputs", self.state)
        runner = StageRunner(self.recipe, self.folder / "stages", inputs)
        stages: dict[str, Any] = {}
        for stage in self.recipe.stages:
            done = runner.finished(stage)
            if done is None:
                with self.phase(f"stage {stage.name}"):
                    done = runner.run(stage)
            stages[stage.name] = done
        record: dict[str, Any] = {}
        if self.is_main:
            record = self.finish(runner, inputs, stages, data_digest(identity))
        self.state.wait_for_everyone()
        return record

    def finish(self, runner: StageRunner, inputs: Inputs, stages: dict[str, Any], identity: str) -> dict[str, Any]:
        """Evaluate, record, draw and publish what the stages trained; on one process."""
        with self.phase("evaluation"):
            metrics = self.measure(runner, inputs, stages)
        published = self.recipe.published_stage
        sample = None
        paired = self.recipe.encoder_of(self.recipe.stage(published)) is not None
        if self.recipe.stage(published).kind == "memory" and not paired:
            sample = regenerate(runner.load(published), inputs.tokenizer, inputs.tokens["test"], inputs.special_tokens)
        record = self.assemble(inputs, stages, metrics, sample)
        with self.phase("figures"):
            record["figures"] = write_figures(record, self.folder / "figures")
        if self.recipe.stage(published).kind in ("memory", "autoencoder"):
            record["hub"] = self.publish(runner, inputs, published, record)
        record["identity"] = identity
        record["times"] = self.times()
        record["peak_memory_bytes"] = peak_memory_bytes()
        record["run"].update(status="success", finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"))
        write_summary(record, self.folder)
        write_record(self.folder / "record.json", record)
        self.report(record)
        return record

    def measure(self, runner: StageRunner, inputs: Inputs, stages: dict[str, Any]) -> dict[str, Any]:
        """Run the recipe's suites on the test split; kept in a file of their own, so that a resumed run has them."""
        path = self.folder / "evaluation.json"
        asked = {
            "evaluation": self.recipe.to_mapping()["evaluation"],
            "stages": {name: data_digest(runner.identity(self.recipe.stage(name))) for name in stages},
        }
        before = read_json(path)
        if before is not None and before["asked"] == asked:
            return before["metrics"]
        metrics = self.measure_stages(runner, inputs)
        write_json(path, {"asked": asked, "metrics": metrics})
        return metrics

    def measure_stages(self, runner: StageRunner, inputs: Inputs) -> dict[str, Any]:
        """Run the recipe's suites on the test split."""
        settings, metrics = self.recipe.evaluation, dict[str, Any]()
        published = self.recipe.stage(self.recipe.published_stage)
        model = runner.load(published.name).to(self.device)
        autoencoder = settings.autoencoder or (published.name if published.kind == "autoencoder" else None)
        if "retention" in settings.suites and autoencoder is not None:
            reader = model if autoencoder == published.name else runner.load(autoencoder).to(self.device)
            length = reader.config.chunk_length
            rows = spread_rows(inputs.tokens["test"], row_length=length, limit=settings.num_rows * 4)
            evaluation = self.evaluation(reader, inputs)
            metrics["autoencoder"] = evaluate_suite(evaluation, "retention", rows)
        if self.recipe.encoder_of(published) is not None:
            metrics |= self.measure_pairs(runner, published, model)
        elif published.kind == "memory":
            evaluation = self.evaluation(model, inputs)
            baselines = {
                name: runner.load(stage).to(self.device)
                for name, stage in (("no_memory", settings.no_memory), ("full_context", settings.full_context))
                if stage is not None
            }
            for suite in settings.suites:
                length = settings.row_length if suite == "clm" else settings.source_length
                length = length or default_length(evaluation, suite)
                rows = spread_rows(inputs.tokens["test"], row_length=length, limit=settings.num_rows)
                metrics[suite] = evaluate_suite(evaluation, suite, rows, baselines if suite == "clm" else None)
        return metrics

    def measure_pairs(self, runner: StageRunner, stage: StageRecipe, model: Any) -> dict[str, Any]:
        """Run the suites `clm` and `copy` on a model whose encoder has a tokenizer of its own, at each budget."""
        settings = self.recipe.evaluation
        collator = runner.pair_collator(stage, model, ["causal", "copy"])
        text = runner.paired_text(stage, model, "test")
        metrics = {}
        for suite in settings.suites:
            if suite not in PAIR_SUITES:
                raise ValueError(
                    f"evaluation.suites: {suite} reads text that encoder and decoder share; where they have a "
                    f"tokenizer each there are {', '.join(PAIR_SUITES)}"
                )
            budgets: list[int | None] = [*stage.data.num_memories] or [None]
            found = evaluate_pairs(
                model,
                collator,
                text,
                objective=PAIR_SUITES[suite],
                chunks_per_row=chunk_counts(stage, text.chunk_length)[1],
                num_rows=settings.num_rows,
                batch_size=settings.batch_size,
                budgets=budgets,
            )
            for budget, result in zip(budgets, found, strict=True):
                metrics[suite if budget is None else f"{suite}, {budget} memories a chunk"] = result
        return metrics

    def evaluation(self, model: Any, inputs: Inputs) -> Evaluation:
        """Describe how a model of this run is fed."""
        config, settings = model.config, self.recipe.evaluation
        return Evaluation(
            model,
            inputs.special_tokens,
            chunk_length=config.chunk_length,
            window_length=getattr(config, "window_length", config.chunk_length),
            byte_lengths=inputs.byte_lengths,
            batch_size=settings.batch_size,
            num_generated_rows=settings.num_generated_rows,
        )

    def publish(self, runner: StageRunner, inputs: Inputs, stage: str, record: dict[str, Any]) -> dict[str, Any]:
        """Write the Hub folder and load it back in a clean process."""
        settings, folder = self.recipe.publish, self.folder / "hub"
        model = runner.load(stage, **({} if settings.dtype == "auto" else {"dtype": getattr(torch, settings.dtype)}))
        is_memory = self.recipe.stage(stage).kind == "memory"
        with self.phase("hub folder"):
            own = runner.encoder_tokenizer(self.recipe.stage(stage))
            processor = processor_for(model, inputs.tokenizer, own) if is_memory else inputs.tokenizer
            slim = {**record, "times": self.times(), "stages": _without_series(record["stages"])}
            said = {"description": self.recipe.description}
            write_hub_folder(model, processor, folder, slim, said, by_reference=settings.by_reference)
        if not settings.verify:
            return {"verified": False}
        with self.phase("verification"):
            return {"verified": True, **verify_hub_folder(folder, model)}

    def assemble(self, inputs: Inputs, stages: dict[str, Any], metrics: dict[str, Any], sample: Any) -> dict[str, Any]:
        """Assemble the record, all but what the last steps add."""
        return {
            "run": {
                "recipe_name": self.recipe.name,
                "description": self.recipe.description,
                "command": self.command,
                "created_at": self.started_at,
                "status": "running",
            },
            "code": self.code,
            "hardware": describe_hardware(self.device, self.state.num_processes),
            "inputs": inputs.description,
            "recipe": self.recipe.to_mapping(),
            "seeds": {"run": self.recipe.seed, **{name: stage["seed"] for name, stage in stages.items()}},
            "published_stage": self.recipe.published_stage,
            "parameters": stages[self.recipe.published_stage]["parameters"],
            "stages": stages,
            "metrics": metrics,
            "sample": sample,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the run and say what it is; times add up over resumed calls, failed ones included."""
        self.say(f"== {name}")
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.is_main:
                times = self.times()
                times[name] = round(times.get(name, 0.0) + time.perf_counter() - started, 2)
                write_json(self.folder / "times.json", times)

    def times(self) -> dict[str, float]:
        """Seconds by part, so far."""
        return dict(read_json(self.folder / "times.json") or {})

    def say(self, text: str) -> None:
        """Print a line, once."""
        if self.is_main:
            print(text, flush=True)

    def report(self, record: dict[str, Any]) -> None:
        """Print the tables and the sample of a finished run."""
        if not self.is_main:
            return
        times = record["times"]
        print("\nseconds by part")
        for name, seconds in times.items():
            print(f"  {name:<28}{seconds:>10.1f}")
        print(f"  {'all':<28}{sum(times.values()):>10.1f}")
        peak = record["peak_memory_bytes"]
        print(f"  peak memory of the process {peak['process'] / 2**30:.2f} GiB, of its largest child "
              f"{peak['largest_child'] / 2**30:.2f} GiB\n")  # fmt: skip
        print(results_table(record["metrics"]))
        if record["sample"] is not None:
            print("\n" + "\n".join(sample_lines(record["sample"], colour=sys.stdout.isatty())))
        print(f"\nrecord: {self.folder / 'record.json'}\nsummary: {self.folder / 'summary.html'}")
        print(f"figures: {self.folder / 'figures'}")
        if (self.folder / "hub").is_dir():
            verified = record.get("hub", {}).get("verified")
            print(f"Hub folder: {self.folder / 'hub'}" + (" (loads in a clean process)" if verified else ""))


def _without_series(stages: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: value for key, value in stage.items() if key != "series"} for name, stage in stages.items()}


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(
        prog=program("run"),
        description="Run a recipe from text to a verified Hub folder. A second call resumes or says that all is done.",
        epilog="example: %(prog)s quickstart seed=1 stages.autoencoder.training.max_steps=200",
    )
    parser.add_argument("recipe", help="YAML file, or the name of one in configuration/recipes")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="replace a value of the recipe: dotted key, stages by name, value as YAML; e.g. output_dir=runs/mine",
    )
    return parser


def run(options: argparse.Namespace, command: str) -> tuple[int, dict[str, Any]]:
    """Run a recipe; returns its status and record."""
    before = signal.signal(signal.SIGTERM, stop_at_once)
    try:
        return 0, Run(load_recipe(options.recipe, options.overrides), command).run()
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
