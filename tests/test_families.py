"""Every family of encoder and decoder that is supported runs through the same tests, on tiny random models."""

import copy
import json
import re
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    BertForMaskedLM,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaForMaskedLM,
    T5ForConditionalGeneration,
)

from modeling_memory import MemoryEncoderDecoderForCausalLM
from modeling_memory.configuration_memory import allot_memories
from modeling_memory.memory_encoder import build_pooling
from modeling_memory.memory_parts import check_decoder_config
from tests.conftest import VOCAB_SIZE, tiny_encoder_config
from tests.memory_models import BLANK, COPY, SLOT, ragged_batch, random_ids

ATTENTION: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
GROUPED = {**ATTENTION, "num_key_value_heads": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8, "tie_word_embeddings": True},
    "gemma": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GROUPED, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
    "phi3": {**GROUPED, "original_max_position_embeddings": 128},
    "olmo2": GROUPED,
    "smollm3": GROUPED,
    "gpt_neox": ATTENTION,
    "bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": ATTENTION,
    "roberta": {**ATTENTION, "pad_token_id": 1, "bos_token_id": 0},
    "modernbert": {**ATTENTION, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    "t5": {"vocab_size": VOCAB_SIZE, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "llama": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "masked_mixer": tiny_encoder_config("masked_mixer").to_dict(),
}


def child_config(model_type: str, fields: dict[str, Any]) -> PreTrainedConfig:
    own = {name: value for name, value in fields.items() if name not in ("model_type", "transformers_version")}
    return AutoConfig.for_model(model_type, **own)


def tiny_decoder(family: str, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(child_config(family, {**DECODERS[family], **fields})).eval()


def tiny_encoder(family: str) -> PreTrainedModel:
    torch.manual_seed(2)
    auto_class = AutoModelForTextEncoding if family == "t5" else AutoModel
    return auto_class.from_config(child_config(family, ENCODERS[family])).eval()


def join(encoder: str = "bert", decoder: str = "llama", **fields: Any) -> MemoryEncoderDecoderForCausalLM:
    fields = {"chunk_length": 4, "window_length": 8, "memories_per_chunk": 2, **fields}
    fields = {"memory_token_id": SLOT, "copy_token_id": COPY, "blank_token_id": BLANK, **fields}
    return MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
        tiny_encoder(encoder), tiny_decoder(decoder), **fields
    )


def slot_inputs(num_memories: int = 4) -> dict[str, torch.Tensor]:
    """Two prompts after the memories of two chunks; the second is padded on the left."""
    input_ids = torch.cat([torch.full((2, num_memories), SLOT), random_ids(2, 6)], 1)
    input_ids = torch.cat([torch.zeros(2, 2, dtype=torch.long), input_ids], 1)
    input_ids[0] = torch.cat([input_ids[0, 2:], random_ids(1, 2, seed=5)[0]])
    mask = torch.ones_like(input_ids)
    mask[1, :2] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "context_input_ids": random_ids(2, 2, 4, seed=3)}


def check_pair(model: MemoryEncoderDecoderForCausalLM, tmp_path) -> None:
    """The whole matrix for one pair: memories matter, padding does not, cached is uncached, saved is loaded."""
    inputs = slot_inputs()
    with torch.no_grad():
        logits = model(**inputs).logits
        other = model(**{**inputs, "context_input_ids": random_ids(2, 2, 4, seed=9)}).logits
        alone = model(inputs["input_ids"][1:, 2:], context_input_ids=inputs["context_input_ids"][1:]).logits
    assert logits.shape == (2, 12, model.config.decoder.vocab_size)
    assert (logits - other)[:, -1].abs().max() > 1e-4, "memories have no effect"
    torch.testing.assert_close(logits[1:, 2:], alone, atol=2e-4, rtol=1e-4)

    # The memories stand on the scale of the tokens beside them, as the decoder's layers see both.
    memories, _ = model.encode_memories(inputs["context_input_ids"])
    tokens = model.get_input_embeddings()(torch.arange(5, VOCAB_SIZE))
    assert 0.2 < memories.float().std() / tokens.float().std() < 5

    check_writing(model, inputs)
    check_backward(model, inputs)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    buffers = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, logits)


def check_writing(model: MemoryEncoderDecoderForCausalLM, inputs: dict[str, torch.Tensor]) -> None:
    """Free writing equals one uncached forward a token."""
    written = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        for _ in range(5):
            scores = model(ids, mask, context_input_ids=inputs["context_input_ids"], use_cache=False).logits[:, -1]
            scores[:, 2] = -torch.inf
            ids, mask = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1), torch.cat([mask, mask[:, :1] | 1], 1)
    assert torch.equal(written, ids)


def check_backward(model: MemoryEncoderDecoderForCausalLM, inputs: dict[str, torch.Tensor]) -> None:
    """Backward reaches projector and decoder, never the frozen encoder."""
    model.train()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == SLOT, -100)
    model(**inputs, labels=labels).loss.backward()
    assert model.projector.out.weight.grad.abs().sum() > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.decoder.parameters())
    assert all(p.grad is None for p in model.encoder.parameters())
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize("decoder", DECODERS)
def test_decoder_family(decoder, tmp_path):
    model = join("bert", decoder)
    check_pair(model, tmp_path)
    # Plain text of several windows: padding of all kinds changes nothing.
    input_ids, mask = ragged_batch()
    with torch.no_grad():
        batch = model(input_ids, mask).logits
        for row in range(len(input_ids)):
            present = mask[row].bool()
            alone = model(input_ids[row, present][None]).logits[0]
            torch.testing.assert_close(batch[row, present], alone, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoder_family(encoder, tmp_path):
    model = join(encoder, "llama")
    # Padding after or before a chunk changes no memory, and a chunk alone gives the memory it gives in a batch.
    chunk = random_ids(1, 1, 3, seed=4)
    padded = torch.nn.functional.pad(chunk, (0, 2))
    mask = torch.tensor([[[1, 1, 1, 0, 0]]])
    with torch.no_grad():
        expected, _ = model.encode_memories(chunk)
        torch.testing.assert_close(model.encode_memories(padded, mask)[0], expected, atol=1e-5, rtol=1e-4)
        flipped = padded.roll(2, -1), mask.roll(2, -1)
        torch.testing.assert_close(model.encode_memories(*flipped)[0], expected, atol=1e-5, rtol=1e-4)
    check_pair(model, tmp_path)


@pytest.mark.parametrize(
    ("head_class", "family"),
    [(BertForMaskedLM, "bert"), (RobertaForMaskedLM, "roberta"), (T5ForConditionalGeneration, "t5"),
     (LlamaForCausalLM, "llama")],
)  # fmt: skip
def test_of_a_model_with_a_head_the_body_is_taken(head_class, family, tmp_path):
    torch.manual_seed(0)
    whole = head_class(child_config(family, ENCODERS[family])).eval()
    before = copy.deepcopy(whole.state_dict())
    whole.save_pretrained(tmp_path / "encoder")
    models = [
        MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
            encoder, tiny_decoder("llama"), chunk_length=4, memory_token_id=SLOT
        )
        for encoder in (whole, str(tmp_path / "encoder"))
    ]
    states = [model.encoder.state_dict() for model in models]
    assert set(states[0]) == set(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert {name: value.shape for name, value in whole.state_dict().items()} == {
        name: value.shape for name, value in before.items()
    }, "the model that was given has changed"
    check = models[0]
    check.save_pretrained(tmp_path / "joined")
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "joined", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3_text", "phi3"])
def test_a_text_that_outgrows_the_sliding_window_is_refused(family):
    sliding = {"sliding_window": 16}
    if family == "qwen2":
        sliding |= {"use_sliding_window": True, "max_window_layers": 0}
    if family.startswith("gemma3"):
        sliding["layer_types"] = ["sliding_attention", "full_attention"]
    model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
        tiny_encoder("bert"), tiny_decoder(family, **sliding), chunk_length=4, memory_token_id=SLOT
    )
    context = random_ids(1, 2, 4)
    slots = torch.full((1, 2), SLOT)
    fits = torch.cat([random_ids(1, 5), slots, random_ids(1, 14)], 1)  # what stands before the memories is no matter
    model(fits, context_input_ids=context)
    with pytest.raises(ValueError, match="columns.*see 16"):
        model(torch.cat([slots, random_ids(1, 15)], 1), context_input_ids=context)
    with pytest.raises(ValueError, match="columns.*see 16"):
        model.generate(fits, context_input_ids=context, max_new_tokens=4, min_new_tokens=4)
    with pytest.raises(ValueError, match="see 16"):
        MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
            tiny_encoder("bert"), tiny_decoder(family, **sliding), chunk_length=4, max_memories=13
        )


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (("t5", ENCODERS["t5"]), "'t5' model has an encoder of its own.*may be the encoder"),
        (("bert", ENCODERS["bert"]), "language modelling head"),
        (("llama", {**ATTENTION, "is_causal": False}), "Only an encoder may read both ways"),
    ],
)
def test_what_cannot_be_a_decoder_is_refused(decoder, message):
    auto_class = AutoModel
    with pytest.raises(ValueError, match=message):
        MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
            tiny_encoder("bert"), auto_class.from_config(child_config(*decoder)), chunk_length=4
        )


def test_running_states_and_missing_caches_are_refused():
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(ValueError, match="'mamba'.*Choose a decoder with attention"):
        MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(tiny_encoder("bert"), mamba, chunk_length=4)
    config = tiny_decoder("llama").config
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="type linear_attention.*Choose a decoder"):
        check_decoder_config(config)


def test_an_encoder_that_cannot_be_parted_is_refused():
    bart = AutoModel.from_config(
        AutoConfig.for_model(
            "bart", vocab_size=VOCAB_SIZE, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
            decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="'bart' model has an encoder and a decoder of its own"):
        MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(bart, tiny_decoder("llama"), chunk_length=4)


def test_an_id_that_cannot_be_reached_gives_the_librarys_error():
    for parts in (("nobody/nothing", tiny_decoder("llama")), (tiny_encoder("bert"), "nobody/nothing")):
        with pytest.raises(OSError, match="nobody/nothing|offline"):
            MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(*parts, chunk_length=4)


def test_loading_options_reach_both_parts(tmp_path):
    tiny_encoder("bert").save_pretrained(tmp_path / "encoder")
    tiny_decoder("llama").save_pretrained(tmp_path / "decoder")
    model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
        tmp_path / "encoder",
        tmp_path / "decoder",
        encoder_kwargs={"attn_implementation": "eager", "device_map": "cpu"},
        decoder_kwargs={"attn_implementation": "eager", "dtype": torch.bfloat16, "device_map": "cpu"},
        chunk_length=4,
        memory_token_id=SLOT,
    )
    assert model.encoder.config._attn_implementation == model.decoder.config._attn_implementation == "eager"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(OSError):  # a folder has no revisions, so it is the Hub client that answers
        MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
            "nobody/nothing", tmp_path / "decoder", encoder_kwargs={"revision": "abc"}, chunk_length=4
        )


def test_roberta_takes_fewer_tokens_than_its_positions():
    config = child_config("roberta", {**ENCODERS["roberta"], "max_position_embeddings": 10})
    encoder = AutoModel.from_config(config)
    with pytest.raises(ValueError, match="takes 8 tokens"):
        MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(encoder, tiny_decoder("llama"), chunk_length=9)


@pytest.mark.parametrize(("folder", "kind"), [("", "mean"), ("0_Transformer", "cls")])
def test_a_sentence_transformers_folder_brings_its_pooling(folder, kind, tmp_path):
    encoder = tiny_encoder("bert")
    encoder.save_pretrained(tmp_path / folder)
    modules = [{"path": folder, "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    modules += [{"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    name = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}[kind]
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({name: True}))
    model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
        str(tmp_path), tiny_decoder("llama"), chunk_length=4
    )
    assert model.config.pooling == {"mean": "mean", "cls": "first"}[kind] and model.config.projector_norm
    chunk = random_ids(1, 4)
    states = encoder(chunk).last_hidden_state
    expected = states.mean(1) if kind == "mean" else states[:, 0]
    with torch.no_grad():
        memory, _ = model.encode_memories(chunk[None])
        torch.testing.assert_close(memory[:, 0], model.projector(expected))
    modules.insert(2, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="module 'Dense'.*transformer alone"):
        MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(str(tmp_path), tiny_decoder("llama"))


@pytest.mark.parametrize("pooling", ["last", "mean", "first", "queries", "pooled_queries"])
def test_exact_budgets(pooling, tmp_path):
    model = join("bert", "llama", pooling=pooling, memories_per_chunk=4)
    context = random_ids(2, 3, 4, seed=3)
    mask = torch.ones_like(context)
    mask[1, 2] = 0  # the second row has two chunks
    for budget in (3, 5, 8):
        embeds, present = model.encode_memories(context, mask, num_memories=budget)
        assert embeds.shape[:2] == (2, budget) and present.sum(1).tolist() == [budget, budget]
        counts = torch.tensor([allot_memories(budget, 3, 4), [*allot_memories(budget, 2, 4), 0]])
        again, _ = model.encode_memories(context, mask, num_memories=counts)
        assert torch.equal(embeds, again)
    # One memory a chunk is what a model of one memory a chunk gives; with learned queries, the first of them.
    embeds, _ = model.encode_memories(context, num_memories=3)
    if pooling in ("last", "mean", "first"):
        single = copy.deepcopy(model)
        single.pooling = build_pooling(pooling, 1)
        single.config.memories_per_chunk = 1
        torch.testing.assert_close(embeds, single.encode_memories(context)[0])
    if pooling == "queries":
        torch.testing.assert_close(embeds, model.encode_memories(context)[0][:, ::4])
    for budget, message in ((0, "3 to 12"), (2, "3 to 12"), (13, "3 to 12"), (2.5, "whole number")):
        with pytest.raises(ValueError, match=message):
            model.encode_memories(context, num_memories=budget)
    with pytest.raises(ValueError, match="is 5 for chunk 1 of row 0; expected 1 to 4"):
        model.encode_memories(context, num_memories=torch.tensor([[1, 5, 1], [1, 1, 1]]))


@pytest.mark.parametrize("pooling", ["last", "mean", "first", "queries", "pooled_queries"])
def test_a_text_reads_as_many_memories_as_it_has_slots_and_training_reaches_the_pooling(pooling, tmp_path):
    model = join("bert", "llama", pooling=pooling, memories_per_chunk=4).train()
    context = random_ids(2, 3, 4, seed=3)
    counts = torch.tensor([[1, 2, 2], [3, 1, 1]])
    input_ids = torch.cat([torch.full((2, 5), SLOT), random_ids(2, 4)], 1)
    labels = input_ids.masked_fill(input_ids == SLOT, -100)
    model(input_ids, context_input_ids=context, context_num_memories=counts, labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.pooling.parameters())
    model.eval()
    written = model.generate(input_ids, context_input_ids=context, context_num_memories=counts, max_new_tokens=2)
    assert written.shape[1] <= 11
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded.encode_memories(context)[0], model.encode_memories(context)[0])


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_an_encoder_trains_from_a_layer_on(encoder, first, tmp_path):
    model = join(encoder, "llama", encoder_trained_from=first, freeze_decoder=True).train()
    assert not model.encoder.training, "dropout of the frozen part stays off"
    trains = {name for name, parameter in model.encoder.named_parameters() if parameter.requires_grad}
    layers = re.compile(r"(?:^|\.)(?:layers?|block)\.(\d+)\.")
    for name, _ in model.encoder.named_parameters():
        found = layers.search(name)
        after = "norm" in name and "embeddings" not in name
        expected = int(found[1]) >= first if found else after
        assert (name in trains) == expected, name
    inputs = slot_inputs()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == SLOT, -100)
    model(**inputs, labels=labels).loss.backward()
    moved = {name for name, p in model.encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved <= trains and len(moved) >= len(trains) / 2
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name for name, parameter in loaded.encoder.named_parameters() if parameter.requires_grad} == trains
    with pytest.raises(ValueError, match="`encoder_trained_from` is 3, but the .* has 2 layers"):
        join(encoder, "llama", encoder_trained_from=3)
    with pytest.raises(ValueError, match="Leave one of them out"):
        join(encoder, "llama", encoder_trained_from=1, freeze_encoder=False)
