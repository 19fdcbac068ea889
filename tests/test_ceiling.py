"""Optimised memories equal a plain loop, leave the decoder alone, and the shares are what they say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from modeling_memory import MemoryProcessor
from tests.conftest import build_tiny_tokenizer, tiny_decoder_config
from tests.memory_models import BLANK, CHUNK, COPY, SLOT, WINDOW, build_model, random_ids
from tests.reference.ceiling_loop import loss_after, optimise
from training.ceiling import (
    Written,
    against_ceiling,
    capacity,
    main,
    optimise_memories,
    percent_of_ceiling,
    random_start,
    regenerate_after,
    regenerate_copy,
    summarise_written,
    write,
)
from training.data.objectives import SpecialTokens

SPECIAL = SpecialTokens(pad=0, bos=1, eos=2, copy=COPY, blank=BLANK, memory=SLOT)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_decoder_config()).eval().requires_grad_(False)


def test_batched_optimisation_equals_one_text_at_a_time():
    decoder, tokens = llama(), random_ids(3, 5)
    start = random_start(decoder, 3, 2) * torch.tensor([1.0, 3.0, 0.5])[:, None, None]  # texts of unequal scale
    before = start.clone()
    for steps in (1, 4):
        found = optimise_memories(
            regenerate_after(decoder), tokens, start, steps=steps, learning_rate=0.1, until_exact=False
        )
        for number in range(3):
            slow = optimise(decoder, start[number], tokens[number], steps, 0.1)
            loss = loss_after(decoder, slow, tokens[number])
            if float(loss) <= found.losses[number].mean() + 1e-5:  # the last state is the best one
                torch.testing.assert_close(found.losses[number].mean(), loss, atol=1e-4, rtol=1e-4)
    assert torch.equal(start, before)
    logits_of = regenerate_after(decoder)
    one, three = (
        optimise_memories(logits_of, tokens[:n], start[:n], steps=4, learning_rate=0.1).memories[0] for n in (1, 3)
    )
    torch.testing.assert_close(one, three, atol=1e-4, rtol=1e-3)


def test_gradient_reaches_the_vectors_and_nothing_else():
    decoder, tokens = llama(), random_ids(2, 5)
    vectors = random_start(decoder, 2, 1).requires_grad_()
    logits = regenerate_after(decoder, prefix=(1,))(vectors, tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    loss.backward()
    front = decoder.get_input_embeddings()(torch.tensor([1]))
    slow = torch.stack([loss_after(decoder, torch.cat([front, vectors[n]]), tokens[n]) for n in range(2)]).mean()
    (gradient,) = torch.autograd.grad(slow, vectors)
    torch.testing.assert_close(loss, slow, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vectors.grad, gradient, atol=1e-5, rtol=1e-4)
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_a_text_is_found_and_the_decoder_then_writes_it_by_itself():
    decoder, tokens = llama(), random_ids(2, 3)
    found = optimise_memories(
        regenerate_after(decoder), tokens, random_start(decoder, 2, 2), steps=300, learning_rate=0.1
    )
    assert found.correct.all() and (found.steps > 0).all() and found.curve[-1]["exact"] == 1.0
    written = torch.zeros(2, 0, dtype=torch.long)
    for _ in range(3):  # greedy, from the vectors alone
        embeds = torch.cat([found.memories, decoder.get_input_embeddings()(written)], 1)
        written = torch.cat([written, decoder(inputs_embeds=embeds).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, tokens)
    result = summarise_written(found, write(regenerate_after(decoder), None, tokens))
    assert result["exact_match"] == 1.0 and result["gain_nats"] > 0


@torch.no_grad()
@pytest.mark.parametrize("objective", ["copy", "blank_copy"])
def test_a_memory_model_writes_as_its_own_copy_does(objective: str):
    model, tokens = build_model(), random_ids(3, WINDOW)
    memories, _ = model.encode_memories(tokens.reshape(3, -1, CHUNK))
    shown = torch.cat([torch.full((3, 1), COPY), tokens[:, :-1]], 1) if objective == "copy" else None
    shown = torch.full_like(tokens, BLANK) if shown is None else shown
    own = model(torch.cat([tokens, shown], 1)).logits[:, WINDOW:]
    logits_of = regenerate_copy(model, SPECIAL, objective)
    torch.testing.assert_close(logits_of(memories, tokens), own, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits_of(None, tokens), model.decoder(shown).logits, atol=1e-5, rtol=1e-4)


def test_share_of_the_ceiling_and_refinement():
    model, tokens = build_model(), random_ids(3, WINDOW)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = against_ceiling(model, SPECIAL, tokens[:1], steps=30)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    curve = result["refined"]["curve"]
    assert curve[0]["loss"] == pytest.approx(result["one_pass"]["loss"]) and curve[-1]["loss"] < curve[0]["loss"]
    assert result["ceiling"]["gain_nats"] == max(result[name]["gain_nats"] for name in ("refined", "optimised"))
    assert result["percent_of_nats"] < 100
    with pytest.raises(ValueError, match="give one window"):
        against_ceiling(model, SPECIAL, tokens[:, :-1])

    def written(loss: float) -> Written:
        losses = torch.full((2, 4), loss)
        return Written(None, losses, losses < 2, torch.full((2,), -1), [])

    share = percent_of_ceiling(written(1.5), written(1.0), written(3.0))
    assert share["percent_of_nats"] == pytest.approx(75.0) and share["percent_of_tokens"] == 100.0
    with pytest.raises(ValueError, match="gain nothing"):
        percent_of_ceiling(written(1.0), written(3.0), written(3.0))


def test_capacity_counts_texts_that_fit():
    result = capacity(llama(), random_ids(2, 24), (2, 24), num_vectors=2, steps=120)
    assert result["half_of_texts_fit"] == 2
    assert result["by_length"]["2"]["exact_match"] == 1.0 > result["by_length"]["24"]["exact_match"]


def test_command_for_both_kinds_of_model(tmp_path: Path, capsys: Any):
    text, tokenizer = tmp_path / "text.txt", build_tiny_tokenizer()
    text.write_text("the cat sat on the mat and the dog ran to the inn; \n" * 6, encoding="utf-8")
    llama().save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    model = build_model()
    model.save_pretrained(tmp_path / "memory")
    MemoryProcessor(tokenizer, chunk_length=CHUNK).save_pretrained(tmp_path / "memory")
    common = ["--text", str(text), "--texts", "2", "--steps", "40", "--to"]
    assert main([str(tmp_path / "llama"), *common, str(tmp_path / "a"), "--lengths", "2,4"]) == 0
    assert main([str(tmp_path / "memory"), *common, str(tmp_path / "b")]) == 0
    assert "of the ceiling" in capsys.readouterr().out
    for folder in ("a", "b"):
        assert (tmp_path / folder / "record.json").is_file() and (tmp_path / folder / "curve.png").is_file()
    assert main([str(tmp_path / "nothing"), *common, str(tmp_path / "c")]) == 2
    assert "no folder or Hub id" in capsys.readouterr().err
