"""One loss, whatever the split into batches and processes; exact sums for every number; nothing lost on a stop.

Run as a module by `torchrun`, this file is its own two-process program: it trains one step and saves the gradients.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, TrainerCallback

from tests.conftest import VOCAB_SIZE, tiny_decoder_config
from tests.processes import be_one_of_two, run_two
from training.data.objectives import IGNORED, BatchSpec, SpecialTokens
from training.data.rows import ObjectiveCollator, TokenRows, draw_lengths
from training.recipes.recipe import TrainingRecipe
from training.train.checkpoints import last_complete_checkpoint
from training.train.trainer import MemoryTrainer, NonFiniteLossError, run_objective, training_arguments

SPECIAL = SpecialTokens(pad=0, bos=1, eos=2, copy=3, blank=4, memory=VOCAB_SIZE)
OBJECTIVES = {"causal": 1.0, "copy": 0.5}
ROW, SOURCE = 16, 8


def tokens(num_tokens: int = 1000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(5, VOCAB_SIZE, (num_tokens,), generator=generator, dtype=torch.int32)


def model() -> PreTrainedModel:
    torch.manual_seed(3)
    return LlamaForCausalLM(tiny_decoder_config())


def collator(**options: Any) -> ObjectiveCollator:
    kind = options.pop("kind", ObjectiveCollator)
    spec = BatchSpec(SPECIAL, chunk_length=4, window_length=4, source_length=SOURCE, **options)
    return kind(list(OBJECTIVES), spec)


class UnevenCollator(ObjectiveCollator):
    """Takes another number of targets from each row."""

    def collate(
        self, objective: str, tokens: torch.Tensor, rows: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        batch = super().collate(objective, tokens, rows)
        assert rows is not None
        dropped = torch.arange(batch["shift_labels"].shape[1]) < 2 * (rows % 7)[:, None]
        if objective == "copy":
            dropped = dropped.flip(1)
        return {**batch, "shift_labels": batch["shift_labels"].masked_fill(dropped, IGNORED)}


class KeepGradients(TrainerCallback):
    """Keeps the gradients that the first optimizer step sees."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.gradients:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class KillAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer(folder: Path, *, network: PreTrainedModel | None = None, **settings: Any) -> MemoryTrainer:
    collate = settings.pop("collate", None) or collator()
    report_to = settings.pop("report_to", None)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    training = TrainingRecipe(
        **{"max_steps": 4, "batch_size": 8, "bf16": False, "max_grad_norm": 0.0, "logging_steps": 2, **settings}
    )
    items = training.max_steps * training.batch_size * training.gradient_accumulation_steps * processes
    return MemoryTrainer(
        network or model(),
        training_arguments(training, folder, seed=0, use_cpu=True, report_to=report_to),
        objectives=OBJECTIVES,
        training=training,
        train_dataset=TokenRows(tokens(), row_length=ROW, num_items=items, seed=1),
        eval_dataset=TokenRows(tokens(170), row_length=ROW, num_items=12),
        data_collator=collate,
        label="test",
    )


def first_gradients(folder: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    keep = KeepGradients()
    run = trainer(folder, collate=collator(kind=UnevenCollator), max_steps=1, max_grad_norm=1.0, **settings)
    run.add_callback(keep)
    run.train()
    return keep.gradients, run.state.log_history[0]


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys() and left
    for name in left:
        scale = left[name].abs().max().clamp(min=1e-6)
        assert (left[name] - right[name]).abs().max() / scale < tolerance, name


def hand_loss(network: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, int, int]:
    """Token losses summed, right tokens and targets, with a plain loop over positions."""
    with torch.no_grad():
        logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total, correct, count = 0.0, 0, 0
    for row in range(logits.shape[0]):
        for column in range(logits.shape[1]):
            target = int(batch["shift_labels"][row, column])
            if target != IGNORED:
                total -= torch.log_softmax(logits[row, column].double(), -1)[target].item()
                correct += int(logits[row, column].argmax() == target)
                count += 1
    return total, correct, count


def test_every_gives_an_objective_only_its_rows_of_the_stream():
    rows = TokenRows(tokens(), row_length=ROW, num_items=16, seed=1)
    items = [rows[i] for i in range(16)]
    whole, thinned = collator(), collator(every={"copy": 4})
    batch, thin = whole(items), thinned(items)
    assert torch.equal(thin["causal"]["input_ids"], batch["causal"]["input_ids"])
    assert torch.equal(thin["rows"], batch["rows"])
    for name in ("input_ids", "shift_labels"):
        assert torch.equal(thin["copy"][name], batch["copy"][name][::4])
        halves = [thinned(items[start : start + 8])["copy"][name] for start in (0, 8)]  # two processes
        assert torch.equal(torch.cat(halves), thin["copy"][name])


def test_varied_sources_are_one_window_two_windows_in_turn():
    items = [TokenRows(tokens(), row_length=ROW, num_items=4, seed=1)[i] for i in range(4)]
    varied, by_length = collator(vary_source=True)(items), {}
    for length in (4, 8):
        build = ObjectiveCollator(
            list(OBJECTIVES), BatchSpec(SPECIAL, chunk_length=4, window_length=4, source_length=length)
        )
        by_length[length] = build(items)
    for name in ("input_ids", "attention_mask", "shift_labels"):
        assert torch.equal(varied["causal"][name], by_length[8]["causal"][name])
        filler = {"input_ids": SPECIAL.pad, "attention_mask": 0, "shift_labels": IGNORED}[name]
        for row, length in enumerate((4, 8, 4, 8)):
            alone = by_length[length]["copy"][name][row]
            got = varied["copy"][name][row]
            assert torch.equal(got[: len(alone)], alone)
            assert (got[len(alone) :] == filler).all()


def shortening(objective: str, **options: Any) -> tuple[ObjectiveCollator, list[Any]]:
    """What cuts 60% of the sources short, and 24 rows."""
    options = {"layout": "self" if objective == "reconstruction" else "slots", "shortened": 0.6, **options}
    source = TokenRows(tokens(), row_length=ROW, num_items=24, seed=1)
    spec = BatchSpec(SPECIAL, chunk_length=4, window_length=4, **options)
    return ObjectiveCollator([objective], spec), [source[i] for i in range(24)]


@pytest.mark.parametrize("objective", ["reconstruction", "copy", "blank_copy"])
def test_shortened_rows_are_the_drawn_beginnings(objective: str):
    collate, items = shortening(objective)
    batch = collate(items)[objective]
    chunked = objective == "reconstruction"
    pieces = ROW // 4 if chunked else 1
    numbers = torch.tensor([number * pieces + piece for number, _ in items for piece in range(pieces)])
    lengths = draw_lengths(numbers, ROW // pieces, 0.6).tolist()
    assert len(set(lengths)) > 2
    for row, length in enumerate(lengths):
        text = items[row // pieces][1].view(pieces, -1)[row % pieces, :length].tolist()
        labels = batch["labels" if chunked else "shift_labels"][row]
        end = [SPECIAL.eos] if not chunked and length < ROW else []
        assert labels[labels != IGNORED].tolist() == text + end
        read = "" if chunked else "context_"
        mask = batch[f"{read}attention_mask"][row].bool()
        assert batch[f"{read}input_ids"][row][mask].tolist() == text


@pytest.mark.parametrize("objective", ["reconstruction", "copy", "blank_copy"])
def test_rows_are_shortened_alike_in_any_batch_and_not_in_evaluation(objective: str):
    collate, items = shortening(objective)
    batch = collate(items)[objective]
    alone = [collate(items[start : start + 3])[objective] for start in range(0, 24, 3)]
    name = "labels" if objective == "reconstruction" else "shift_labels"
    assert torch.cat([part[name][part[name] != IGNORED] for part in alone]).equal(batch[name][batch[name] != IGNORED])
    whole = shortening(objective, shortened=0.0)[0](items)[objective]
    for key, tensor in collate.for_evaluation()(items)[objective].items():
        assert torch.equal(tensor, whole[key])


def test_sources_that_may_end_anywhere_need_not_be_whole_windows_in_validation():
    items = [TokenRows(tokens(), row_length=ROW, num_items=4, seed=1)[i] for i in range(4)]
    options: dict[str, Any] = {"layout": "slots", "window_length": 2 * ROW, "chunk_length": 4, "shortened": 0.5}
    batch = ObjectiveCollator(["copy"], BatchSpec(SPECIAL, **options)).for_evaluation()(items)["copy"]
    assert ((batch["shift_labels"] != IGNORED).sum(1) == ROW).all()


def test_drawn_lengths_are_uniform_and_only_a_share():
    lengths = draw_lengths(torch.arange(200_000), 5, 0.4)
    counts = torch.bincount(lengths, minlength=6).double() / 200_000
    assert counts[0] == 0 and counts[5].item() == pytest.approx(0.6, abs=0.01)
    assert counts[1:5].tolist() == pytest.approx([0.1] * 4, abs=0.005)
    assert (draw_lengths(torch.arange(50), 1, 1.0) == 1).all()


def test_validation_reads_rows_whole(tmp_path: Path):
    collate = ObjectiveCollator(
        list(OBJECTIVES), BatchSpec(SPECIAL, chunk_length=4, window_length=4, shortened=1.0, layout="slots")
    )
    run = trainer(tmp_path, collate=collate)
    batch = next(iter(run.get_eval_dataloader()))
    whole = (batch["copy"]["shift_labels"] != IGNORED).sum(1)
    assert (whole == ROW).all()
    shortened = (next(iter(run.get_train_dataloader()))["copy"]["context_attention_mask"] != 0).sum((1, 2))
    assert (shortened < ROW).all()


def test_loss_and_accuracy_are_the_hand_computed_weighted_sums(tmp_path: Path):
    network = model()
    run = trainer(tmp_path, network=network, learning_rate=0.0, muon_learning_rate=0.0, max_steps=2, logging_steps=2)
    run.train()
    log = next(log for log in run.state.log_history if log["step"] == 2)

    collate, data = collator(), run.train_dataset
    batch = collate([data[i] for i in range(8, 16)])  # the second step's rows
    sums = {name: hand_loss(network, batch[name]) for name in OBJECTIVES}
    assert {name: count for name, (_, _, count) in sums.items()} == {"causal": 8 * (ROW - 1), "copy": 8 * SOURCE}
    for name, (loss, correct, count) in sums.items():
        assert log[f"{name}_loss"] == pytest.approx(loss / count, abs=1e-5)
        assert log[f"{name}_token_accuracy"] == correct / count
    expected = sum(weight * sums[name][0] / sums[name][2] for name, weight in OBJECTIVES.items())
    assert log["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("batch_size", "steps"), [(4, 2), (2, 4)])
def test_accumulation_equals_one_batch_with_unequal_targets(tmp_path: Path, batch_size: int, steps: int):
    whole, log = first_gradients(tmp_path / "whole", batch_size=8)
    parts, other = first_gradients(tmp_path / "parts", batch_size=batch_size, gradient_accumulation_steps=steps)
    assert_close(whole, parts, 1e-5)  # measured 6e-7
    for key in ("loss", "causal_loss", "copy_loss", "causal_token_accuracy", "copy_token_accuracy"):
        assert log[key] == pytest.approx(other[key], abs=1e-6), key


def test_two_processes_equal_one_with_unequal_targets(tmp_path: Path):
    whole, log = first_gradients(tmp_path / "whole", batch_size=8)
    run_two("tests.test_trainer", tmp_path)
    saved = torch.load(tmp_path / "two.pt", weights_only=True)
    assert saved["world_size"] == 2
    assert_close(whole, saved["gradients"], 1e-5)
    for key in ("loss", "causal_loss", "copy_loss", "causal_token_accuracy", "copy_token_accuracy"):
        assert log[key] == pytest.approx(saved["log"][key], abs=1e-6), key


@pytest.mark.parametrize("batch_size", [3, 8])
def test_evaluation_is_exact_whatever_the_batch_size(tmp_path: Path, batch_size: int):
    network = model()
    run = trainer(tmp_path, network=network, batch_size=batch_size)
    metrics = run.evaluate()
    data, collate = run.eval_dataset, collator()
    batch = collate([data[i] for i in range(10)])  # 170 tokens are ten rows; two more items count for nothing
    assert data[10][0] == data[11][0] == -1
    for name in OBJECTIVES:
        loss, correct, count = hand_loss(network, batch[name])
        assert metrics[f"eval_{name}_loss"] == pytest.approx(loss / count, abs=1e-5)
        assert metrics[f"eval_{name}_token_accuracy"] == correct / count
    assert metrics["eval_loss"] == pytest.approx(
        sum(weight * metrics[f"eval_{name}_loss"] for name, weight in OBJECTIVES.items())
    )


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_killed_and_resumed_run_is_bit_equal_to_a_straight_one(tmp_path: Path, optimizer: str):
    settings = {"max_steps": 6, "save_steps": 2, "optimizer": optimizer, "bf16": True}
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    killed = trainer(tmp_path / "killed", **settings)
    killed.add_callback(KillAfter(5))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    checkpoint = last_complete_checkpoint(tmp_path / "killed")
    assert checkpoint is not None and checkpoint.name == "checkpoint-4"
    resumed = trainer(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    for (name, one), two in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two), name
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (straight, resumed)]
    assert losses[0] == losses[1]


def test_nonfinite_loss_names_step_and_rows_and_keeps_the_last_checkpoint(tmp_path: Path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                with torch.no_grad():
                    model.lm_head.weight[0, 0] = float("nan")

    run = trainer(tmp_path, max_steps=6, save_steps=2, batch_size=2)
    run.add_callback(Spoil())
    rows = [run.train_dataset[i][0] for i in (6, 7)]
    with pytest.raises(NonFiniteLossError, match=rf"loss is nan at step 4 \(batch of rows {rows[0]}, {rows[1]}\)"):
        run.train()
    kept = last_complete_checkpoint(tmp_path)
    assert kept is not None and kept.name == "checkpoint-2"
    weights = LlamaForCausalLM.from_pretrained(kept).state_dict()
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 4:
                with torch.no_grad():
                    model.lm_head.weight[0, 0] = float("inf")

    run = trainer(tmp_path, save_steps=2)
    run.add_callback(Spoil())
    with pytest.raises(NonFiniteLossError, match="lm_head.weight is not finite after step 4"):
        run.train()
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-2"


def test_training_learns(tmp_path: Path):
    run = trainer(tmp_path, max_steps=30, learning_rate=1e-2, muon_learning_rate=2e-2, max_grad_norm=1.0)
    run.train_dataset.tokens = tokens(ROW * 3)  # three rows, over and over
    run.train()
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert losses[-1] < 0.5 * losses[0]


def test_bf16_computes_in_bf16_and_keeps_float32_weights(tmp_path: Path):
    dtypes = set()
    network = model()
    network.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer(tmp_path, network=network, max_steps=1, bf16=True).train()
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_columns_without_targets_change_neither_loss_nor_gradient():
    network, data = model(), TokenRows(tokens(), row_length=ROW, num_items=4, seed=1)
    batch = collator()([data[i] for i in range(4)])["copy"]
    assert batch["columns"].tolist() == list(range(SOURCE, 2 * SOURCE))
    results = []
    for kept in (batch, {name: tensor for name, tensor in batch.items() if name != "columns"}):
        network.zero_grad()
        loss, logits, targets = run_objective(network, kept)
        loss.backward()
        assert logits.shape[:2] == targets.shape
        results.append((loss.item(), {name: p.grad.clone() for name, p in network.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert_close(results[0][1], results[1][1], 1e-5)


def test_rows_depend_on_seed_and_index_alone():
    data = TokenRows(tokens(), row_length=ROW, num_items=200, seed=1)
    again = TokenRows(tokens(), row_length=ROW, num_items=200, seed=1)
    order = [data[i] for i in range(200)]
    for i in (150, 3, 61, 199):
        number, row = again[i]
        assert number == order[i][0] and torch.equal(row, order[i][1])
    assert [number for number, _ in order[:61]] != list(range(61))
    assert sorted(number for number, _ in order[:61]) == list(range(61))  # 62 rows, one held for later offsets
    assert sorted(number for number, _ in order[61:122]) == list(range(61))
    assert not torch.equal(order[0][1], TokenRows(tokens(), row_length=ROW, num_items=2, seed=2)[0][1])


def test_evaluation_rows_are_read_in_order():
    data = TokenRows(tokens(70), row_length=ROW, num_items=6)
    assert torch.equal(torch.cat([data[i][1] for i in range(4)]), tokens(70)[:64].long())
    assert [data[i][0] for i in range(6)] == [0, 1, 2, 3, -1, -1]


def test_text_shorter_than_a_row_is_refused():
    with pytest.raises(ValueError, match="10 tokens, fewer than one row of 16"):
        TokenRows(tokens(10), row_length=ROW, num_items=1)


def test_split_windows_keep_every_target_of_the_whole_row():
    data = TokenRows(tokens(), row_length=ROW, num_items=3, seed=1)
    items = [data[i] for i in range(3)]
    whole = collator()(items)["causal"]
    split = collator(split_windows=True)(items)["causal"]
    assert split["input_ids"].shape == (12, 4)
    assert torch.equal(split["shift_labels"].reshape(3, ROW), whole["shift_labels"])
    assert torch.equal(split["input_ids"].reshape(3, ROW), whole["input_ids"])


def main(folder: Path) -> None:
    """Train one step as one of two processes; the first saves what the step saw."""
    gradients, log = first_gradients(folder / "two", batch_size=4)
    world_size = torch.distributed.get_world_size()
    if torch.distributed.get_rank() == 0:
        gradients = {name.removeprefix("module."): gradient for name, gradient in gradients.items()}
        torch.save({"world_size": world_size, "gradients": gradients, "log": log}, folder / "two.pt")


if __name__ == "__main__":
    be_one_of_two(main)
