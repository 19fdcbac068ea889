"""One result however it is launched: 1 process x 8 rows, 2 x 4, and 1 x 4 with 2 accumulation steps.

Run as a module by `accelerate launch`, this file is its own two-process program.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from modeling_memory import MemoryAutoencoder, MemoryAutoencoderConfig
from tests.conftest import VOCAB_SIZE, tiny_decoder_config, tiny_encoder_config
from tests.memory_models import BLANK, CHUNK, COPY, SLOT, WINDOW, build_model
from tests.processes import be_one_of_two
from training.data.documents import DocumentRows
from training.data.objectives import IGNORED, BatchSpec, SpecialTokens
from training.data.rows import ObjectiveCollator, TokenRows
from training.places import REPOSITORY
from training.recipes.recipe import TrainingRecipe
from training.train.trainer import MemoryTrainer, run_objective, training_arguments

SPECIAL = SpecialTokens(pad=0, bos=1, eos=2, copy=COPY, blank=BLANK, memory=SLOT)
ROW, SOURCE, ROWS, STEPS = 24, 16, 8, 3
ALL = {"causal": 1.0, "copy": 0.5, "blank_copy": 0.25}
CASES: dict[str, dict[str, Any]] = {
    "all objectives": {"objectives": ALL, "options": {"every": {"causal": 2}}},
    "slots": {"objectives": ALL, "options": {"layout": "slots", "every": {"blank_copy": 4}}},
    "logits in chunks": {"objectives": ALL, "training": {"loss_chunk": 8}},
    "documents": {"objectives": ALL, "documents": True, "options": {"documents": True}},
    "causal": {"objectives": {"causal": 1.0}, "kind": "decoder"},
    "copy": {"objectives": {"copy": 1.0}, "options": {"marker": "none"}},
    "blank copy": {"objectives": {"blank_copy": 1.0}},
    "reconstruction": {"objectives": {"reconstruction": 1.0}, "kind": "autoencoder"},
}


class Uneven(ObjectiveCollator):
    """Takes another number of targets from each row, from some rows all of them."""

    def collate(
        self, objective: str, tokens: torch.Tensor, rows: torch.Tensor | None = None, **masked: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        batch = super().collate(objective, tokens, rows, **masked)
        assert rows is not None
        key = "labels" if "labels" in batch else "shift_labels"
        targets = batch[key]
        share = (rows % 5).repeat_interleave(targets.shape[0] // rows.shape[0])[:, None] / 4
        dropped = torch.arange(targets.shape[1]) >= share * targets.shape[1]
        dropped = dropped.flip(1) if objective == "copy" else dropped
        return {**batch, key: targets.masked_fill(dropped, IGNORED)}


def network(kind: str) -> PreTrainedModel:
    torch.manual_seed(3)
    if kind == "decoder":
        return LlamaForCausalLM(tiny_decoder_config(tie_word_embeddings=True))
    if kind == "autoencoder":
        parts = {name: tiny_encoder_config("masked_mixer") for name in ("encoder", "decoder")}
        return MemoryAutoencoder(MemoryAutoencoderConfig(**parts, chunk_length=CHUNK))
    return build_model(freeze_encoder=True)


def stream(num_tokens: int) -> torch.Tensor:
    return torch.randint(5, VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(5))


def train_rows(*, documents: bool) -> TokenRows | DocumentRows:
    if not documents:
        return TokenRows(stream(1000), row_length=ROW, num_items=STEPS * ROWS, seed=1)
    options: dict[str, Any] = {"row_length": ROW, "shortest": WINDOW + 1, "num_items": STEPS * ROWS}
    tokens = stream(2000)
    tokens[::23] = tokens[::41] = SPECIAL.eos
    return DocumentRows(tokens, eos_token_id=SPECIAL.eos, step_rows=ROWS, seed=1, group_by_length=True, **options)


def build_trainer(case: str, folder: Path, *, batch_size: int, accumulation: int = 1) -> MemoryTrainer:
    """A trainer of three steps, with 11 rows of validation, which fill no whole batch."""
    objectives = CASES[case]["objectives"]
    settings: dict[str, Any] = {
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup": 0.0,
        "bf16": False,
        **CASES[case].get("training", {}),
    }
    training = TrainingRecipe(
        max_steps=STEPS, batch_size=batch_size, gradient_accumulation_steps=accumulation, logging_steps=1, **settings
    )
    spec = BatchSpec(
        SPECIAL,
        chunk_length=CHUNK,
        window_length=CHUNK if "reconstruction" in objectives else WINDOW,
        source_length=SOURCE,
        **CASES[case].get("options", {}),
    )
    collator = Uneven(list(objectives), spec)
    return MemoryTrainer(
        network(CASES[case].get("kind", "memory")),
        training_arguments(training, folder, seed=0, use_cpu=True),
        objectives=objectives,
        training=training,
        train_dataset=train_rows(documents=CASES[case].get("documents", False)),
        eval_dataset=TokenRows(stream(11 * ROW), row_length=ROW, num_items=11),
        data_collator=collator,
    )


def train(case: str, folder: Path, **batches: int) -> dict[str, Any]:
    """Train and evaluate; return all losses and accuracies that were logged, and the weights."""
    trainer = build_trainer(case, folder, **batches)
    trainer.train()
    trainer.evaluate()
    logs = [
        {key: value for key, value in log.items() if key.endswith(("loss", "_accuracy"))}
        for log in trainer.state.log_history
        if "train_loss" not in log
    ]
    own = trainer.accelerator.unwrap_model(trainer.model)
    return {"logs": logs, "weights": {name: p.detach().clone() for name, p in own.named_parameters()}}


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Logs differ by at most 1e-5 (measured 5e-7), weights by 1e-4 of their size: Adam's first steps divide by |g|."""
    assert len(left["logs"]) == len(right["logs"]) == STEPS + 1
    for step, (one, two) in enumerate(zip(left["logs"], right["logs"], strict=True)):
        assert one.keys() == two.keys() and any(key.endswith("_token_accuracy") for key in one)
        for key in one:
            assert one[key] == pytest.approx(two[key], abs=1e-5), (step, key)
    for name, weight in left["weights"].items():
        scale = weight.abs().max().clamp(min=1e-6)
        assert (weight - right["weights"][name]).abs().max() / scale < 1e-4, name


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two")
    config = REPOSITORY / "configuration" / "accelerate" / "cpu_two_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [*command, "-m", "tests.test_launch", str(folder)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(folder / "two.pt", weights_only=True)


def test_launch_really_starts_two_processes(two_processes: dict[str, Any]):
    assert two_processes["world_size"] == 2


@pytest.mark.parametrize("case", CASES)
def test_trajectories_and_evaluation_are_equal_however_launched(
    case: str, two_processes: dict[str, Any], tmp_path: Path
):
    whole = train(case, tmp_path / "whole", batch_size=ROWS)
    assert_same(whole, train(case, tmp_path / "parts", batch_size=ROWS // 2, accumulation=2))
    assert_same(whole, two_processes[case])


@pytest.mark.parametrize("case", CASES)
def test_evaluation_counts_each_row_once(case: str, tmp_path: Path):
    """In ragged batches as in one batch of all rows, by hand."""
    trainer = build_trainer(case, tmp_path, batch_size=4)
    trainer.data_collator.spec = replace(trainer.data_collator.spec, every={})
    metrics = trainer.evaluate()
    rows = TokenRows(stream(11 * ROW), row_length=ROW, num_items=11)
    batch = trainer.data_collator([rows[i] for i in range(11)])
    for name in CASES[case]["objectives"]:
        with torch.no_grad():
            loss, logits, targets = run_objective(trainer.model, batch[name])
        present = targets != IGNORED
        assert metrics[f"eval_{name}_loss"] == pytest.approx(loss.item() / present.sum().item(), abs=1e-5)
        correct = (logits.argmax(-1) == targets)[present].float().mean().item()
        assert metrics[f"eval_{name}_token_accuracy"] == pytest.approx(correct, abs=1e-7)


def main(folder: Path) -> None:
    """Train every case as one of two processes; the first saves what came out."""
    results: dict[str, Any] = {case: train(case, folder / case, batch_size=ROWS // 2) for case in CASES}
    if torch.distributed.get_rank() == 0:
        results["world_size"] = torch.distributed.get_world_size()
        torch.save(results, folder / "two.pt")


if __name__ == "__main__":
    be_one_of_two(main)
