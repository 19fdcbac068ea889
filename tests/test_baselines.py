"""Baselines that are settings, not modules, equal their plain loops, gradients too."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_memory import MemoryEncoderDecoderConfig, MemoryEncoderDecoderForCausalLM
from tests.conftest import VOCAB_SIZE, tiny_decoder_config
from tests.memory_models import random_ids
from tests.reference import memory_loop
from tests.reference.llama_loop import llama_loop
from training.data.objectives import IGNORED, BatchSpec, SpecialTokens
from training.data.rows import ObjectiveCollator
from training.train.build import child_config


@pytest.mark.parametrize("split", [True, False])
def test_no_memory_and_full_context_equal_the_plain_loop_with_gradients(split: bool):
    """Both baselines are asked for the same tokens: of no memory a window sees itself only."""
    model, rows, window = AutoModelForCausalLM.from_config(tiny_decoder_config()).eval(), random_ids(2, 12), 4
    special = SpecialTokens(pad=0, bos=1, eos=2, copy=3, blank=4, memory=99)
    collate = ObjectiveCollator(
        ["causal"], BatchSpec(special, chunk_length=4, window_length=window, split_windows=split)
    )
    batch = collate.collate("causal", rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["shift_labels"]
    assert int((targets != IGNORED).sum()) == 2 * 11
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    table, nats = model.get_input_embeddings().weight, []
    for row in rows:
        for place in range(11):
            first = place // window * window if split else 0
            alone = model(inputs_embeds=table[row[first : place + 1]][None], use_cache=False).logits[0, -1]
            nats.append(-alone.log_softmax(-1)[row[place + 1]])
    slow = torch.stack(nats).mean()
    torch.testing.assert_close(loss, slow, atol=1e-5, rtol=1e-5)
    parameters = list(model.parameters())
    for (name, _), one, other in zip(
        model.named_parameters(), *(torch.autograd.grad(x, parameters) for x in (loss, slow)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3, msg=name)


def test_a_memory_model_whose_llama_encoder_reads_both_ways_equals_the_plain_loop():
    fields = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"num_key_value_heads": 2, "intermediate_size": 64, "initializer_range": 0.1}
    encoder = child_config({**fields, **sizes, "is_causal": False}, {"vocab_size": VOCAB_SIZE}, "encoder")
    config = MemoryEncoderDecoderConfig(
        encoder=encoder, decoder=tiny_decoder_config(), chunk_length=4, pooling="mean", initializer_range=0.3
    )
    model, tokens = MemoryEncoderDecoderForCausalLM(config).eval(), random_ids(2, 11)
    model.encoder.requires_grad_(True)
    model.config.freeze_encoder = False
    slow = memory_loop.causal_loss(model, tokens)
    states = torch.stack(llama_loop(model.encoder, tokens[:, :4].tolist())).mean(1)
    torch.testing.assert_close(model.encode_memories(tokens[:, None, :4])[0][:, 0], model.projector(states))
    loss = model(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, slow, atol=1e-5, rtol=1e-4)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for one, other in zip(*(torch.autograd.grad(x, parameters) for x in (loss, slow)), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)
