"""The server as its users see it: OpenAI's own client on loopback, several requests at once, and what is refused."""

import base64
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch
import uvicorn
from transformers import AutoModelForCausalLM

from modeling_memory import MemoryProcessor, MemoryQuestionAnswering, MemoryStore, embeds_to_base64, prompt_embeds
from modeling_memory.serving import Engine, Limits, RefusedError
from modeling_memory.serving.api import build_app
from tests.conftest import build_tiny_tokenizer
from tests.memory_models import CHUNK, WINDOW, build_model
from training.places import REPOSITORY
from training.remember import load_memory_model

INN = "The sign was newly painted; the windows had neat red curtains; the floor was cleanly sanded."
SEA = "He lived in a small white house by the sea, and every evening he walked along the shore."


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model, processor = load_memory_model("starter-tiny")
    store = MemoryStore.open(tmp_path_factory.mktemp("s") / "store", model, processor, create=True, keep_text=True)
    store.append({"inn": INN, "sea": SEA})
    return Engine(model, processor, store, Limits(body_bytes=20_000, context_tokens=1000, new_tokens=300))


@contextmanager
def serving(app):
    """Where an application is served on loopback."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def address(engine):
    with serving(build_app(engine, "tiny", "secret")) as local:
        yield f"{local}/v1"


@pytest.fixture
def client(address):
    return openai.OpenAI(base_url=address, api_key="secret", max_retries=0)


def quoted(engine, text, prompt="<copy>", **given):
    """What the model itself writes, without a server."""
    inputs = engine.processor(text=[prompt], context=None if text is None else [text], return_tensors="pt", **given)
    output = engine.model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return engine.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def ask(client, context=None, prompt="<copy>", **options):
    own = {name: options.pop(name) for name in ("store_ids", "search", "nearest") if name in options}
    body = {**own, **({} if context is None else {"context": context})}
    return client.completions.create(model="tiny", prompt=prompt, **{"max_tokens": 40, **options}, extra_body=body)


def test_a_context_is_quoted_whole_and_streamed(engine, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    whole = ask(client, INN)
    expected = quoted(engine, INN)
    assert whole.choices[0].text == expected
    assert whole.usage.prompt_tokens_details.memories == len(engine.processor.split_context(INN))
    events = list(ask(client, INN, stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].text for event in events if event.choices) == expected
    assert sum(bool(event.choices and event.choices[0].text) for event in events) > 1
    reason = events[-2].choices[0].finish_reason
    assert reason == whole.choices[0].finish_reason and events[-1].usage == whole.usage
    short = ask(client, INN, max_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)


def test_several_contexts_and_texts_of_the_store_stand_in_their_order(engine, client):
    assert ask(client, [INN, SEA[:30]]).choices[0].text == quoted(engine, [INN, SEA[:30]])
    assert ask(client, store_ids="sea").choices[0].text == ask(client, SEA).choices[0].text
    found = ask(client, search="who lived by the shore", store_ids=["inn", "sea"], nearest=2)
    assert found.usage.prompt_tokens_details.memories == 2
    engine.store.append({"later": "A letter came."})
    assert ask(client, store_ids=["later"]).choices[0].text == quoted(engine, "A letter came.")


def test_prompts_and_contexts_are_cut_side_by_side(engine):
    """A tokenizer is told whether control tokens are text: a context must not tell it so for another's prompt."""
    alone = engine.prompt("<copy>", engine.memories([INN]))["input_ids"].tolist()

    def read(number):
        if number % 2:
            return engine.prompt("<copy>", engine.memories([INN]))["input_ids"].tolist()
        return engine.memories([f"{INN} <copy> {number}"]) and alone

    with ThreadPoolExecutor(8) as pool:
        assert all(ids == alone for ids in pool.map(read, range(200)))


def test_requests_at_once_get_their_own_contexts(engine, client):
    texts = [f"{name} carried the cup home." for name in ("Ann", "Tom", "The man", "A dog", "My father", "The king")]
    expected = [quoted(engine, text) for text in texts]
    assert len(set(expected)) == len(texts)

    def streamed(text):
        return "".join(event.choices[0].text for event in ask(client, text, stream=True))

    with ThreadPoolExecutor(len(texts)) as pool:
        assert list(pool.map(streamed, texts)) == expected
        mixed = [pool.submit(ask, client, text) for text in texts] + [pool.submit(ask, client, prompt="The sign")]
        assert [one.result().choices[0].text for one in mixed[:-1]] == expected
        assert mixed[-1].result().choices[0].text == quoted(engine, None, "The sign")


def test_a_context_is_encoded_once_and_few_are_kept(engine):
    encoded, bounded = [], Engine(engine.model, engine.processor, limits=Limits(cache_bytes=2500))
    plain = engine.model.encode_memories
    engine.model.encode_memories = lambda *args, **kwargs: encoded.append(1) or plain(*args, **kwargs)
    try:
        first = bounded.remember(INN)  # 12 memories of 128 numbers in two bytes
        assert bounded.remember(INN) is first and len(encoded) == 1
        for text in (SEA, "A dog.", INN + "!"):
            bounded.remember(text)
            assert bounded._kept_bytes == sum(one.memory_embeds.nbytes for one in bounded._kept.values()) <= 2500
    finally:
        del engine.model.encode_memories


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("completions", {"prompt": "x", "context": "long " * 5000}, 413, "request_too_large"),
        ("completions", {"prompt": "x", "context": "a b c d e f g h " * 200}, 413, "context_length_exceeded"),
        ("completions", {"prompt": "x", "context": INN * 5}, 400, "invalid_value"),  # more than its 16 memories
        ("completions", {"prompt": "x", "max_tokens": 301}, 400, "invalid_value"),
        ("completions", {"prompt": "x", "max_tokens": 0}, 400, "invalid_value"),
        ("completions", {"prompt": "x", "temperature": "hot"}, 400, "invalid_value"),
        ("completions", {"prompt": "x", "n": 2}, 400, "invalid_value"),
        ("completions", {"prompt": "x", "logprobs": 3}, 400, "invalid_value"),
        ("completions", {"prompt": ["x", "y"]}, 400, "invalid_value"),
        ("completions", {"prompt": ""}, 400, "invalid_value"),
        ("completions", {"prompt": "<memory>"}, 400, "invalid_value"),
        ("completions", {"prompt": "x", "context": ""}, 400, "invalid_value"),
        ("completions", {"prompt": "x", "context": 5}, 400, "invalid_value"),
        ("completions", {"prompt": "x", "store_ids": "nowhere"}, 400, "invalid_value"),
        ("completions", {"prompt": "x", "search": "<copy>", "nearest": 1}, 400, "invalid_value"),
        ("completions", {"prompt": "x", "model": "other"}, 404, "model_not_found"),
        ("completions", b"{", 400, "invalid_value"),
        ("chat/completions", {"messages": []}, 400, "invalid_value"),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, 400, "invalid_value"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_value"),
        ("nothing", {}, 404, "not_found"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_told_in_the_form_of_openai(address, path, body, status, code, stream):
    sent = body if isinstance(body, bytes) else None
    asked = None if sent else {**body, "stream": stream}
    got = httpx.post(f"{address}/{path}", content=sent, json=asked, headers={"authorization": "Bearer secret"})
    told = got.json()["error"]
    assert (got.status_code, told["code"]) == (status, code) and told["message"] and told["type"], told


def test_a_wrong_key_and_too_many_requests_are_refused_and_places_come_back(engine, address, client):
    with pytest.raises(openai.AuthenticationError):
        ask(openai.OpenAI(base_url=address, api_key="wrong", max_retries=0))
    for _ in range(engine.limits.requests):
        engine.enter()
    try:
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client, INN)
        assert refused.value.response.headers["retry-after"] == "1"
    finally:
        for _ in range(engine.limits.requests):
            engine.leave()
    assert ask(client, INN).choices[0].text
    for _ in range(engine.limits.requests):  # all places are free again, after whatever was refused above
        engine.enter()
    with pytest.raises(RefusedError):
        engine.enter()
    for _ in range(engine.limits.requests):
        engine.leave()


def test_a_reader_that_leaves_ends_the_writing(engine, client):
    stream = ask(client, prompt="The sign", max_tokens=300, stream=True)
    next(iter(stream))
    stream.close()
    started = time.monotonic()
    assert ask(client, prompt="The sign", max_tokens=1).usage.completion_tokens == 1
    whole = time.monotonic()
    ask(client, prompt="The sign", max_tokens=300)
    assert whole - started < time.monotonic() - whole


def test_stops_and_seeds(engine, client):
    text = ask(client, INN).choices[0].text
    stop = text[10:14]
    for stream in (False, True):
        got = ask(client, INN, stop=[stop, "never there"], stream=stream)
        events = list(got) if stream else [got]
        assert "".join(event.choices[0].text for event in events) == text[: text.index(stop)]
        assert events[-1].choices[0].finish_reason == "stop"
    drawn = [ask(client, prompt="The", temperature=2.0, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_chat_without_a_template_is_read_line_by_line(engine, client):
    def chat(*messages, **options):
        body = {"context": INN}
        return client.chat.completions.create(
            model="tiny", messages=list(messages), max_tokens=40, extra_body=body, **options
        )

    command = {"role": "system", "content": "<copy>"}  # the application's own words steer the model
    assert chat(command).choices[0].message.content == quoted(engine, INN)
    pieces = list(chat(command, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content for piece in pieces) == quoted(engine, INN)
    typed = {"role": "user", "content": "<copy>"}  # what a user types is text
    assert (
        chat(typed).choices[0].message.content == quoted(engine, INN, split_special_tokens=True) != quoted(engine, INN)
    )


def test_with_a_template_memories_stand_in_the_users_turn(engine):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    lengths = {"chunk_length": CHUNK, "window_length": WINDOW}
    model, processor = build_model(), MemoryProcessor(build_tiny_tokenizer(), **lengths, chat_template=template)
    chat, contexts = [{"role": "user", "content": "who came"}], ["the sea", "over the hills"]

    def written(own):
        own.enter()
        return "".join(own.write(chat, own.memories(contexts), max_new_tokens=8)).strip()

    pipeline = MemoryQuestionAnswering(model=model, processor=processor)
    asked = pipeline(context=contexts, question="who came", max_new_tokens=8)
    assert written(Engine(model, processor)) == asked["answer"]
    front = MemoryProcessor(engine.processor.tokenizer, chunk_length=8, window_length=64, chat_template=template)
    assert written(Engine(engine.model, front))  # whose memories stand in front of all


def test_prompt_embeds_are_what_vllm_documents_and_the_decoder_alone_goes_on_as_the_model_does():
    model = build_model()
    processor = MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK, window_length=WINDOW)
    texts, contexts = ["the cat sat", "over the hills and"], ["the sea", "in the end"]
    inputs = processor(text=texts, context=contexts, return_tensors="pt", padding_side="left")
    rows = model.prompt_embeds(**inputs)
    logits = model(**inputs).logits[:, -1]
    for row, expected, mask in zip(rows, logits, inputs["attention_mask"], strict=True):
        # As vLLM reads it: base64, torch.load of weights only, a dense tensor (T, D) of a float dtype.
        got = torch.load(io.BytesIO(base64.b64decode(embeds_to_base64(row), validate=True)), weights_only=True)
        assert torch.equal(got, row) and got.shape == (mask.sum(), model.config.decoder.hidden_size)
        torch.testing.assert_close(model.decoder(inputs_embeds=got[None]).logits[0, -1], expected)
        assert len(embeds_to_base64(row)) < 2 * 4 * row.numel() + 4000  # of the row alone
    with pytest.raises(ValueError, match="no memories"):
        prompt_embeds(model, input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="expected one prompt"):
        embeds_to_base64(torch.zeros(1, 2, 3))
    spread = AutoModelForCausalLM.from_pretrained(REPOSITORY / "model_cards" / "starter-tiny")
    with pytest.raises(ValueError, match="'spread'"):
        prompt_embeds(spread, input_ids=inputs["input_ids"], memory_embeds=torch.zeros(2, 1, 128))
