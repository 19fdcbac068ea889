"""Learning from the decoder that reads everything, and training one model for many budgets."""

from typing import Any

import pytest
import torch

from tests.memory_models import (
    BLANK,
    CHUNK,
    COPY,
    SLOT,
    WINDOW,
    assert_same_gradients,
    build_model,
    gradients_of,
    random_ids,
)
from training.data.objectives import IGNORED, BatchSpec, ReadyContext, SpecialTokens, build_batch, distillation_loss
from training.data.rows import ObjectiveCollator, draw_budget
from training.train.trainer import Teaching, run_objective, teacher_says

IDS = SpecialTokens(pad=0, bos=1, eos=2, memory=SLOT, copy=COPY, blank=BLANK)


def batch_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    tokens = random_ids(len(lengths), max(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    spec = BatchSpec(IDS, window_length=WINDOW, chunk_length=CHUNK, layout="slots")
    return build_batch("distillation", tokens, spec, attention_mask=mask)


def plain(model: Any, lengths: list[int], temperature: float) -> torch.Tensor:
    """Token by token, row by row: the student after its memories, the teacher after the text."""
    tokens, total = random_ids(len(lengths), max(lengths)), torch.zeros(())
    for row, length in zip(tokens, lengths, strict=True):
        cut = (length - 1) // WINDOW * WINDOW
        source, text = row[:cut], row[cut:length]
        slots = torch.full((cut // CHUNK,), SLOT)
        student = model(torch.cat([slots, text])[None], context_input_ids=source.reshape(1, -1, CHUNK)).logits[0]
        with torch.no_grad():
            teacher = model.decoder(row[None, :length]).logits[0]
        for place in range(len(text) - 1):
            p = (teacher[cut + place] / temperature).softmax(-1)
            q = (student[len(slots) + place] / temperature).softmax(-1)
            total = total + temperature**2 * (p * (p.log() - q.log())).sum()
    return total


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("lengths", [[20, 20], [20, 13, 9]])
def test_the_loss_and_its_gradients_equal_a_plain_computation(temperature: float, lengths: list[int]):
    model = build_model("llama", "llama", freeze_decoder=False)
    loss, logits, targets = run_objective(model, batch_of(lengths), teaching=Teaching(temperature))
    assert logits.shape[:2] == targets.shape
    expected = plain(model, lengths, temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and loss.item() > 0.01
    assert_same_gradients(gradients_of(model, loss), gradients_of(model, expected), tolerance=1e-3)


def test_targets_of_student_and_teacher_are_the_same_tokens():
    batch = batch_of([20, 13, 10])
    for mine, theirs in zip(batch["shift_labels"], batch["teacher_labels"], strict=True):
        assert mine[mine != IGNORED].tolist() == theirs[theirs != IGNORED].tolist() != []


def test_the_teacher_of_a_lora_student_is_the_decoder_without_adapters():
    model = build_model("llama", "llama", freeze_decoder=True).train()
    batch = batch_of([20, 20])
    with torch.no_grad():
        before = model.decoder(batch["teacher_input_ids"]).logits[batch["teacher_labels"] != IGNORED]
    model.add_adapters(r=2, lora_dropout=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    trains = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    said, _ = teacher_says(model, batch, Teaching())
    torch.testing.assert_close(said, before)
    assert not said.requires_grad
    loss, _, _ = run_objective(model, batch)
    loss.backward()
    assert trains == [parameter.requires_grad for parameter in model.parameters()]
    assert modes == [module.training for module in model.modules()]
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert moved == parameter.requires_grad, name


def test_a_student_that_reads_all_has_nothing_to_learn():
    logits = torch.randn(5, 7)
    assert distillation_loss(logits, logits, 2.0).item() == pytest.approx(0.0, abs=1e-6)
    student = logits.clone().requires_grad_()
    distillation_loss(student, logits).backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("objective", "layout", "context", "message"),
    [("distillation", "self", None, "needs layout='slots'"),
     ("causal", "slots", ReadyContext(torch.ones(1, 1, 4).long(), tokens=torch.ones(1, 4).long()), "give them for"),
     ("distillation", "slots", ReadyContext(torch.ones(1, 1, 4).long()), "give them for distillation")],
)  # fmt: skip
def test_what_cannot_be_distilled_is_refused(objective: str, layout: str, context: Any, message: str):
    with pytest.raises(ValueError, match=message):
        spec = BatchSpec(IDS, window_length=8, chunk_length=4, layout=layout)
        build_batch(objective, random_ids(1, 20), spec, context=context)


@pytest.mark.parametrize("pooling", ["last", "mean", "queries"])
def test_a_batch_draws_one_budget_and_reads_exactly_so_many_memories(pooling: str):
    model = build_model("llama", "llama", memories_per_chunk=4, pooling=pooling)
    spec = BatchSpec(
        IDS,
        chunk_length=CHUNK,
        window_length=WINDOW,
        layout="slots",
        source_length=WINDOW,
        memories_per_chunk=4,
        num_memories=(1, 2, 4),
    )
    collator = ObjectiveCollator(["causal", "copy"], spec)
    seen = set()
    for first in range(0, 24, 2):
        items = [(first + i, random_ids(1, 16, seed=first + i)[0]) for i in range(2)]
        batches = collator(items)
        assert all(torch.equal(batches[key], collator(items)[key]) for key in ("rows",)), "drawn by row, not by chance"
        budget = draw_budget((1, 2, 4), batches["rows"])
        for name in ("causal", "copy"):
            batch = batches[name]
            assert (batch["input_ids"] == SLOT).sum(1).tolist() == [budget * WINDOW // CHUNK] * 2
            loss, _, _ = run_objective(model, batch)
            memories, mask = model.encode_memories(
                batch["context_input_ids"], batch["context_attention_mask"], budget * WINDOW // CHUNK
            )
            ready = {key: batch[key] for key in ("input_ids", "attention_mask", "shift_labels")}
            expected, _, _ = run_objective(model, {**ready, "memory_embeds": memories, "memory_mask": mask})
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        seen.add(budget)
    assert seen == {1, 2, 4}
