"""Cross entropy by chunks: the loss, the gradients and the counts of the whole, and never the whole logits."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.memory_models import assert_same_gradients, gradients_of
from tests.test_launch import CASES, build_trainer
from training.data.objectives import IGNORED
from training.train.chunked_loss import check_head, chunked_cross_entropy, without_head
from training.train.trainer import run_objective, run_objective_chunked


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_loss_gradients_and_counts_are_those_of_the_whole(chunk: int):
    torch.manual_seed(0)
    head = nn.Linear(6, 50, bias=False)
    states = torch.randn(3, 9, 6, requires_grad=True)
    targets = torch.randint(0, 50, (3, 9)).masked_fill(torch.rand(3, 9) < 0.3, IGNORED)
    logits = head(states)
    plain = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    wanted = torch.autograd.grad(plain, [states, head.weight])
    loss, correct = chunked_cross_entropy(head, states, targets, chunk)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert correct == ((logits.argmax(-1) == targets) & (targets != IGNORED)).sum()
    for one, two in zip(wanted, torch.autograd.grad(loss, [states, head.weight]), strict=True):
        assert torch.allclose(one, two, atol=1e-5)  # measured 1e-6


def test_no_more_than_a_chunk_of_logits_exists_at_once():
    class Watched(nn.Linear):
        rows: list[int] = []

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            self.rows.append(states.shape[0])
            return super().forward(states)

    head, states = Watched(6, 50), torch.randn(40, 6, requires_grad=True)
    loss, _ = chunked_cross_entropy(head, states, torch.randint(0, 50, (40,)), 16)
    loss.backward()
    assert max(head.rows) == 16 and sum(head.rows) == 80  # each token forward and, for the gradient, once more


def test_batch_without_a_target_is_zero_with_a_gradient():
    head, states = nn.Linear(6, 50), torch.randn(4, 6, requires_grad=True)
    loss, correct = chunked_cross_entropy(head, states, torch.full((4,), IGNORED), 2)
    loss.backward()
    assert loss == 0 and correct == 0 and states.grad.abs().sum() == 0


@pytest.mark.parametrize("case", CASES)
def test_objectives_are_equal_with_and_without(case: str, tmp_path: Any):
    trainer = build_trainer(case, tmp_path, batch_size=8)
    batches = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    model = trainer.model.train()
    for name in CASES[case]["objectives"]:
        loss, correct, count = run_objective_chunked(model, batches[name], 16)
        found = gradients_of(model, loss)
        whole, logits, targets = run_objective(model, batches[name])
        assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
        assert int(correct) == int(((logits.argmax(-1) == targets) & (targets != IGNORED)).sum())
        assert int(count) == int((targets != IGNORED).sum())
        assert_same_gradients(found, gradients_of(model, whole))
    with torch.no_grad():
        assert run_objective(model.eval(), batches[name])[1].shape[-1] == model.get_output_embeddings().out_features


def test_a_head_that_is_switched_off_comes_back():
    model = Gemma2ForCausalLM(tiny_gemma())
    with pytest.raises(KeyError), without_head(model) as head, without_head(model):
        assert head(torch.ones(2, 3)).shape == (2, 3)
        raise KeyError
    assert "forward" not in vars(model.lm_head)


def tiny_gemma() -> Gemma2Config:
    return Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.1,
    )


def test_a_decoder_that_caps_its_logits_is_refused():
    with pytest.raises(ValueError, match="loss_chunk is set, but Gemma2ForCausalLM does more to its logits"):
        check_head(Gemma2ForCausalLM(tiny_gemma()), {"input_ids": torch.tensor([[5, 6, 7]])})
