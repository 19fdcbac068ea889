"""The run of `configuration/recipes/claims.yaml` as the measurements read it: its stages, its text, its tokenizer."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from benchmarks.claims.scoring import SCORED_TOKENS
from training.data.rows import TokenRows
from training.measure.suites import spread_rows
from training.recipes.recipe import Recipe, StageRecipe, load_recipe
from training.records.record import data_digest, read_json
from training.train.fit import Budget
from training.train.inputs import Inputs, prepare_inputs
from training.train.stages import StageRunner


@dataclass(frozen=True)
class Source:
    """A run, finished or not, that is only read.

    Attributes:
        folder (`Path`): Of the run.
        recipe (`Recipe`): What it runs.
        inputs (`Inputs`): Its tokenizer and its text.
        runner (`StageRunner`): Loads its models.
    """

    folder: Path
    recipe: Recipe
    inputs: Inputs
    runner: StageRunner

    @property
    def vocab_size(self) -> int:
        return self.runner.vocab_size

    def stage(self, name: str) -> StageRecipe:
        return self.recipe.stage(name)

    def model_folder(self, name: str) -> Path:
        return self.folder / "stages" / name / "model"

    def lacks(self, names: Iterable[str]) -> list[str]:
        """Which of these stages are not trained yet."""
        return [name for name in names if not self.model_folder(name).is_dir()]

    def trained_as(self, names: Iterable[str]) -> dict[str, str]:
        """A digest for each stage of all that decided its weights."""
        return {name: data_digest(read_json(self.folder / "stages" / name / "started.json")) for name in names}

    def describe(self, name: str) -> dict[str, Any]:
        """What the recipe says of a stage."""
        return next(stage for stage in self.recipe.to_mapping()["stages"] if stage["name"] == name)

    def load(self, name: str) -> Any:
        return self.runner.load(name).eval()

    def train_rows(self, length: int, batch_rows: int, steps: int, seed: int) -> TokenRows:
        """Training rows of `length` tokens, `batch_rows` a step, in the order in which a stage reads them."""
        return TokenRows(self.inputs.tokens["train"], row_length=length, num_items=steps * batch_rows, seed=seed)

    def test_rows(self, length: int) -> torch.Tensor:
        """Test rows `(R, length)`, the books of [`benchmarks.claims.scoring`]."""
        return spread_rows(self.inputs.tokens["test"], row_length=length, limit=max(2, SCORED_TOKENS // length))

    def budget(self, name: str, seed: int) -> Budget:
        """What the training of a stage spends."""
        stage = self.stage(name)
        training = stage.training
        return Budget(
            steps=training.max_steps,
            batch_tokens=training.batch_size * stage.data.row_length,
            optimizer=training.optimizer,
            learning_rate=training.learning_rate,
            muon_learning_rate=training.muon_learning_rate,
            warmup=training.warmup,
            decay=training.decay,
            max_grad_norm=training.max_grad_norm,
            bf16=training.bf16,
            seed=seed,
        )


def open_run(folder: Path, recipe: Recipe | None = None) -> Source:
    """Read a run's tokenizer and text, and say where its models are.

    Args:
        folder (`Path`): Of the run.
        recipe (`Recipe`, *optional*): Default: `configuration/recipes/claims.yaml`.

    Raises:
        ValueError: If there is no run.
    """
    if not (folder / "inputs" / "tokenizer").is_dir():
        raise ValueError(f"{folder} holds no run; make it first: python -m training.run claims output_dir={folder}")
    recipe = recipe or load_recipe("claims")
    inputs = prepare_inputs(recipe, folder / "inputs", PartialState(cpu=recipe.use_cpu))
    runner = StageRunner(recipe, folder / "stages", inputs)
    return Source(folder, recipe, inputs, runner)
