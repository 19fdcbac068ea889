"""The pipeline answers as `generate` does after the same chat, from contexts that are encoded once."""

from pathlib import Path

import pytest
import torch
from transformers import pipeline

from modeling_memory import MemoryProcessor, MemoryStore
from tests.conftest import build_tiny_tokenizer
from tests.memory_models import CHUNK, WINDOW, build_model
from tests.test_recall_qa import MARKED
from training import ask

TASK = "memory-question-answering"
WRITE = {"max_new_tokens": 5, "min_new_tokens": 5}
CONTEXTS = ["the cat sat on the mat and the dog", "another house on the river"]
QUESTIONS = ["who sat", "where is the other one", "when"]


@pytest.fixture
def parts():
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = MARKED
    model = build_model(
        "llama", pooling="concat", max_group=CHUNK, memories_per_chunk=2, memory_positions="source", max_memories=24
    )
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if ".layers." in name and parameter.dim() == 2:
                parameter.mul_(4)  # so that what it writes depends on what it reads
    return model, MemoryProcessor(tokenizer, chunk_length=CHUNK, window_length=WINDOW, memories_per_chunk=2)


@pytest.fixture
def answer(parts):
    return pipeline(TASK, model=parts[0], processor=parts[1], device="cpu")


def plain(parts, contexts: list[str], question: str, **options) -> str:
    """One question by the processor and `generate` alone."""
    model, processor = parts
    content = [
        *[{"type": "memory"}, {"type": "text", "text": "\n\n"}] * len(contexts),
        {"type": "text", "text": question},
    ]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]], context=[contexts], tokenize=True, add_generation_prompt=True,
        return_tensors="pt", **options,
    )  # fmt: skip
    written = model.generate(**inputs, **WRITE, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize("contexts", [CONTEXTS[:1], CONTEXTS], ids=["one context", "two contexts"])
def test_many_questions_are_answered_as_each_alone_from_contexts_encoded_once(parts, answer, contexts, monkeypatch):
    expected = [plain(parts, contexts, question) for question in QUESTIONS]
    encoded, own = [], parts[0].encode_memories
    monkeypatch.setattr(parts[0], "encode_memories", lambda *args, **kwargs: encoded.append(1) or own(*args, **kwargs))
    found = answer(context=contexts, question=QUESTIONS, batch_size=2, **WRITE)
    assert [one["answer"] for one in found] == expected and [one["question"] for one in found] == QUESTIONS
    assert len(encoded) == 1
    remembered = answer.remember(contexts)
    assert answer(context=remembered, question=QUESTIONS[1], **WRITE)["answer"] == expected[1]
    assert answer({"context": remembered, "question": QUESTIONS[2]}, **WRITE)["answer"] == expected[2]
    assert len(encoded) == 2
    assert len(set(expected)) > 1, "or any answer would do"


def test_fewer_memories_of_a_chunk_can_be_asked_for(parts, answer):
    chunks = len(parts[1].split_context(CONTEXTS[0]))
    remembered = answer.remember(CONTEXTS[0], memories_per_chunk=1)
    assert remembered.num_memories == [chunks]
    expected = plain(parts, CONTEXTS[:1], QUESTIONS[0], context_num_memories=[[1] * chunks])
    assert answer(context=CONTEXTS[0], question=QUESTIONS[0], memories_per_chunk=1, **WRITE)["answer"] == expected
    with pytest.raises(ValueError, match="give it to `remember`"):
        answer(context=remembered, question="who", memories_per_chunk=2)


def test_an_answer_comes_piece_by_piece_and_a_failure_reaches_the_reader(answer):
    whole = answer(context=CONTEXTS[0], question=QUESTIONS[0], **WRITE)["answer"]
    assert "".join(answer.stream(CONTEXTS[0], QUESTIONS[0], **WRITE)).strip() == whole
    with pytest.raises(ValueError, match="`context` is ''"):
        list(answer.stream("", QUESTIONS[0]))


@pytest.mark.parametrize(
    ("given", "message"),
    [({"context": "a"}, "`question` is None"), ({"context": "a", "question": [" "]}, "`question` is"),
     ({"question": "a"}, "`context` is None"), ({"inputs": "who"}, "expected context=... and question=")],
)  # fmt: skip
def test_what_is_missing_is_said(answer, given, message):
    with pytest.raises(ValueError, match=message):
        answer(**given)


def test_a_saved_folder_brings_its_pipeline(parts, answer, tmp_path: Path):
    parts[0].save_pretrained(tmp_path)
    parts[1].save_pretrained(tmp_path)
    assert (tmp_path / "pipeline_memory.py").is_file()
    loaded = pipeline(TASK, model=str(tmp_path), trust_remote_code=True, device="cpu")
    with torch.no_grad():
        found = loaded(context=CONTEXTS[0], question=QUESTIONS, **WRITE)
    assert found == answer(context=CONTEXTS[0], question=QUESTIONS, **WRITE)
    loaded.model.save_pretrained(tmp_path / "again")  # `pipeline` has put classes into the config
    assert (tmp_path / "again" / "config.json").is_file()


def test_a_store_is_asked_as_its_texts_are(parts, answer, tmp_path: Path):
    words = CONTEXTS[0].split()
    cuts = (" ".join(words[:number]) for number in range(7, 0, -1))
    text = next(cut for cut in cuts if len(parts[1].split_context(cut)[-1]) == CHUNK)  # a store counts full chunks
    store = MemoryStore.open(tmp_path / "store", *parts, create=True, dtype="float32")
    store.append({"first": text})
    found = ask.answer(store, QUESTIONS[0], ask.choose(store, QUESTIONS[0]), is_question=True, **WRITE)
    assert found == answer(context=text, question=QUESTIONS[0], **WRITE)["answer"]
    shown = [ask.Used(chunk, in_clear=True) for chunk in store.chunks()]
    with pytest.raises(ValueError, match="leave --expand out"):
        ask.answer(store, QUESTIONS[0], shown, is_question=True)
