"""Generated calls of everything public: 960 as `slow`, 50 always. A failure names its call, and repeats."""

import contextlib
import io
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_memory import (
    MemoryAutoencoder,
    MemoryAutoencoderConfig,
    MemoryEncoderDecoderForCausalLM,
    MemoryProcessor,
    MemoryStore,
)
from tests.conftest import VOCAB_SIZE, build_tiny_tokenizer, tiny_encoder_config
from tests.fuzzing import Area, Arguments, Change, changes, one_cell, to
from tests.memory_models import CHUNK, SLOT, WINDOW, build_model
from training import ask, evaluate, probe, publish, remember, run

NAN, INF = float("nan"), float("inf")
WIDTH = 32
NUM_CALLS = {
    "forward": 200,
    "options": 60,
    "generate": 160,
    "encode": 160,
    "processor": 160,
    "store": 140,
    "commands": 80,
}
NUM_FAST = {"forward": 12, "options": 4, "generate": 8, "encode": 8, "processor": 10, "store": 6, "commands": 2}
SHARE = 40  # calls of one test


def ids(chance: random.Random, *shape: int) -> torch.Tensor:
    return torch.randint(5, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(chance.randrange(2**31)))


def _ids(name: str) -> list[Change]:
    """What may happen to token ids."""
    return [
        Change(name, one_cell(-1)),
        Change(name, one_cell(VOCAB_SIZE + 7)),
        Change(name, lambda was, chance: was.float()),
        Change(name, lambda was, chance: was > 9),
        Change(name, lambda was, chance: was[:, :0]),
        Change(name, lambda was, chance: was[:0]),
        Change(name, lambda was, chance: was[0, 0]),
        Change(name, lambda was, chance: was[None, None]),
        Change(name, lambda was, chance: was.tolist()),
        Change(name, lambda was, chance: was.numpy()),
        Change(name, to("the cat")),
        Change(name, lambda was, chance: was.int(), is_senseless=False),
        Change(name, lambda was, chance: was.short(), is_senseless=False),
        Change(name, lambda was, chance: was.to(torch.uint8), is_senseless=False),
    ]


def _mask(name: str) -> list[Change]:
    """What may happen to a mask."""
    return [
        Change(name, one_cell(2)),
        Change(name, one_cell(-1)),
        Change(name, lambda was, chance: one_cell(NAN)(was.float(), chance)),
        Change(name, lambda was, chance: one_cell(0.5)(was.float(), chance)),
        Change(name, lambda was, chance: torch.cat([was, was], -1)),
        Change(name, lambda was, chance: torch.cat([was, was], 0)),
        Change(name, lambda was, chance: was[0, 0]),
        Change(name, lambda was, chance: was.tolist()),
        Change(name, to("left")),
        Change(name, lambda was, chance: was.bool(), is_senseless=False),
        Change(name, lambda was, chance: was.float(), is_senseless=False),
        Change(name, lambda was, chance: was.to(torch.int8), is_senseless=False),
        Change(name, one_cell(0), is_senseless=False),
        Change(name, lambda was, chance: torch.zeros_like(was), is_senseless=False),
    ]


def _vectors(name: str) -> list[Change]:
    """What may happen to memories and embeddings."""
    return [
        Change(name, one_cell(NAN)),
        Change(name, one_cell(-INF)),
        Change(name, lambda was, chance: was.long()),
        Change(name, lambda was, chance: was[..., :-1]),
        Change(name, lambda was, chance: was[0]),
        Change(name, lambda was, chance: torch.cat([was, was]), is_senseless=name == "memory_embeds"),
        Change(name, lambda was, chance: was.tolist()),
        Change(name, to("memories")),
        Change(name, lambda was, chance: was.bfloat16(), is_senseless=False),
        Change(name, lambda was, chance: was.double(), is_senseless=False),
        Change(name, lambda was, chance: was * 1e4, is_senseless=False),
    ]


@cache
def model() -> MemoryEncoderDecoderForCausalLM:
    return build_model()


@cache
def autoencoder() -> MemoryAutoencoder:
    parts = {part: tiny_encoder_config("masked_mixer") for part in ("encoder", "decoder")}
    return MemoryAutoencoder(MemoryAutoencoderConfig(**parts, chunk_length=CHUNK)).eval()


@cache
def processor() -> MemoryProcessor:
    return MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK, window_length=WINDOW)


def _text(chance: random.Random) -> Arguments:
    input_ids = ids(chance, 2, chance.choice([5, WINDOW, 2 * WINDOW + 3]))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _slots(chance: random.Random, num_slots: int) -> Arguments:
    arguments = _text(chance)
    arguments["input_ids"][:, 1 : 1 + num_slots] = SLOT
    return arguments


def _context(chance: random.Random) -> Arguments:
    num_chunks = chance.choice([1, 2])
    context = ids(chance, 2, num_chunks, CHUNK)
    given = {"context_input_ids": context, "context_attention_mask": torch.ones_like(context)}
    return {**_slots(chance, num_chunks), **given}


def _memories(chance: random.Random) -> Arguments:
    return {
        **_slots(chance, 2),
        "memory_embeds": torch.randn(2, 2, WIDTH),
        "memory_mask": torch.ones(2, 2, dtype=torch.long),
    }


def _labels(arguments: Arguments) -> Arguments:
    labels = arguments["input_ids"].masked_fill(arguments["input_ids"] == SLOT, -100)
    return {**arguments, "labels": labels}


def one_more_slot(was: torch.Tensor, chance: random.Random) -> torch.Tensor:
    changed = was.clone()
    changed[chance.randrange(2), -1] = SLOT
    return changed


INPUTS = [
    *_ids("input_ids"),
    Change("input_ids", one_more_slot),
    *_mask("attention_mask"),
    *_ids("context_input_ids"),
    *_mask("context_attention_mask"),
    *_vectors("memory_embeds"),
    *_mask("memory_mask"),
]


def _chunk(chance: random.Random) -> Arguments:
    chunk = ids(chance, 2, CHUNK)
    return {"input_ids": chunk, "attention_mask": torch.ones_like(chunk)}


def forward_area(tmp_path: Path) -> Area:
    return Area(
        {
            "text": lambda chance: (model(), _labels(_text(chance))),
            "context": lambda chance: (model(), _labels(_context(chance))),
            "memories": lambda chance: (model(), _memories(chance)),
            "mixer": lambda chance: (model().encoder, _chunk(chance)),
            "autoencoder": lambda chance: (autoencoder(), {**_chunk(chance), "labels": ids(chance, 2, CHUNK)}),
        },
        [
            *INPUTS,
            Change("labels", one_cell(-5)),
            Change("labels", one_cell(VOCAB_SIZE)),
            Change("labels", lambda was, chance: was.float()),
            Change("labels", lambda was, chance: was[:, :-1]),
            Change("labels", lambda was, chance: was.tolist()),
            Change("labels", lambda was, chance: torch.full_like(was, -100), is_senseless=False),
            Change("labels", lambda was, chance: was.int(), is_senseless=False),
        ],
    )


def forward_options_area(tmp_path: Path) -> Area:
    """Arguments that only the memory model takes."""
    return Area(
        {
            "text": lambda chance: (model(), _text(chance)),
            "context": lambda chance: (model(), _context(chance)),
        },
        [
            Change("logits_to_keep", to(-1), adds=True),
            Change("logits_to_keep", to(1.5), adds=True),
            Change("logits_to_keep", to("all"), adds=True),
            Change("logits_to_keep", to(1000), is_senseless=False, adds=True),
            Change("logits_to_keep", to(torch.tensor([0, 2])), is_senseless=False, adds=True),
            Change("logits_to_keep", to(torch.tensor([0, 500])), adds=True),
            Change("past_key_values", to("cache"), adds=True),
            Change("past_key_values", to(3), adds=True),
            Change("output_hidden_states", to([0, 1]), is_senseless=False, adds=True),
            Change("memory_embeds", lambda was, chance: torch.randn(2, 1, WIDTH), adds=True),
            Change("memory_mask", lambda was, chance: torch.ones(2, 1), adds=True),
        ],
    )


def _generate(**arguments: Any) -> Any:
    return model().generate(**{"max_new_tokens": 3, "do_sample": False, **arguments})


def generate_area(tmp_path: Path) -> Area:
    def pad_right(was: torch.Tensor, chance: random.Random) -> torch.Tensor:
        mask = was.clone()
        mask[1, -2:] = 0
        return mask

    def pad_left(was: torch.Tensor, chance: random.Random) -> torch.Tensor:
        mask = was.clone()
        mask[1, :1] = 0
        return mask

    return Area(
        {
            "text": lambda chance: (_generate, _text(chance)),
            "context": lambda chance: (_generate, _context(chance)),
            "memories": lambda chance: (_generate, _memories(chance)),
        },
        [
            *INPUTS,
            Change("attention_mask", pad_right),
            Change("attention_mask", pad_left, is_senseless=False),
            Change("max_new_tokens", to(-1), adds=True),
            Change("max_new_tokens", to(0), adds=True),
            Change("rolling_memory", to("yes"), adds=True),
            Change("rolling_memory", to(2), adds=True),
            Change("rolling_memory", to(False), is_senseless=False, adds=True),
            Change("num_beams", to(2), is_senseless=False, adds=True),
            Change("past_key_values", to("cache"), adds=True),
            Change("use_cache", to(False), is_senseless=False, adds=True),
        ],
    )


def encode_area(tmp_path: Path) -> Area:
    def context(chance: random.Random) -> Arguments:
        return {name: value for name, value in _context(chance).items() if name.startswith("context")}

    return Area(
        {
            "encode_memories": lambda chance: (model().encode_memories, context(chance)),
            "encode": lambda chance: (autoencoder().encode, _chunk(chance)),
            "reconstruct": lambda chance: (autoencoder().reconstruct, _chunk(chance)),
            "decode": lambda chance: (autoencoder().reconstruct, {"memories": torch.randn(2, 1, WIDTH)}),
        },
        [*INPUTS, *_vectors("memories")],
    )


TEXT = "the cat sat on the mat"


def processor_area(tmp_path: Path) -> Area:
    padded = {"padding": "max_length", "max_length": 64}
    return Area(
        {
            "text": lambda chance: (processor(), {"text": TEXT}),
            "texts": lambda chance: (processor(), {"text": [TEXT, "a dog"], "context": [TEXT, None], **padded}),
            "context": lambda chance: (processor(), {"context": [TEXT, "a dog"], "return_tensors": "pt"}),
            "ready": lambda chance: (processor(), {"text": [TEXT, "a dog"], "num_memories": [1, 2]}),
            "split_context": lambda chance: (processor().split_context, {"context": TEXT}),
            "decode": lambda chance: (processor().decode, {"token_ids": [5, 6, 7, SLOT]}),
            "batch_decode": lambda chance: (processor().batch_decode, {"sequences": ids(chance, 2, 5)}),
        },
        [
            *changes("text", 3, 2.5, b"text", [], [3], [None], [b"a", b"b"], {"a": "b"}),
            Change("text", to("a <eos> b"), is_senseless=False),
            Change("text", to("\ud800 lone"), is_senseless=False),
            *changes("context", 3, b"text", "", [], [3], [""], {"a": "b"}),
            Change("context", to(["a"] * 9), is_senseless=False),
            Change("context", to("a <memory> b"), is_senseless=False),
            *changes("num_memories", -1, 1.5, "2", [1, -1], [1], [1, 1.5], [1, 2, 3]),
            *changes("padding", "longestt", 7, 2.5, adds=False),
            *changes("max_length", -5, 0, 1, "8", 2.5),
            *changes("return_tensors", "pts", 7),
            *changes("token_ids", "a", None, 2.5, ["a"], [5, 2.5], {"a": 1}),
            Change("token_ids", to([-1]), is_senseless=False),  # as labels have it where nothing is to be learnt
            Change("token_ids", to([SLOT, SLOT]), is_senseless=False),
            *changes("sequences", "a", None, 2.5, [["a"]]),
            Change("sequences", lambda was, chance: was.float()),
        ],
    )


def store_area(tmp_path: Path) -> Area:
    store = MemoryStore.open(tmp_path / "store", model(), processor(), create=True, keep_text=True)
    other = MemoryStore.open(tmp_path / "other", model(), processor(), create=True)
    other.append({"b": "a dog"})

    def with_a(method: str, **arguments: Any) -> Callable:
        def call(chance: random.Random) -> tuple[Callable, Arguments]:
            if "a" not in store:
                store.append({"a": TEXT})
            return getattr(store, method), {name: copy_of(value) for name, value in arguments.items()}

        return call

    def copy_of(value: Any) -> Any:
        return value() if callable(value) else value

    def batches(**arguments: Any) -> list:
        return [memories for _, memories in store.iterate(**arguments)]

    return Area(
        {
            "append": with_a("append", texts=lambda: {"c": TEXT}, batch_size=4, on_duplicate="replace"),
            "delete": with_a("delete", text_ids="a"),
            "merge": with_a("merge", other=other, on_duplicate="skip"),
            "nearest": with_a("nearest", queries=lambda: torch.randn(1, WIDTH), k=2, block_size=8),
            "memories": with_a("memories", chunks=lambda: store.chunks("a")),
            "expand": with_a("expand", chunks=lambda: store.chunks("a")),
            "text": with_a("text", text_id="a"),
            "prepare": with_a("prepare", text="and then", wanted="a"),
            "iterate": lambda chance: (batches, {"text_ids": None, "batch_size": 2}),
            "open": lambda chance: (
                MemoryStore.open,
                {"folder": tmp_path / "store", "model": model(), "processor": processor(), "lock_seconds": 1.0},
            ),
            "create": lambda chance: (
                MemoryStore.open,
                {
                    "folder": tmp_path / f"new{chance.random()}",
                    "model": model(),
                    "processor": processor(),
                    "create": True,
                    "dtype": "float16",
                },
            ),
        },
        [*changes_of_writing(), *changes_of_reading()],
    )


def changes_of_writing() -> list[Change]:
    """What may be wrong in texts and queries, and in how they are read."""
    positive = (0, -1, 1.5, "2", None)
    return [
        *changes("texts", [], "text", None, 3, {"d": ""}, {"d": 3}, {3: "d"}, {"d": None}),
        Change("texts", to({}), is_senseless=False),
        Change("texts", to({"d": "a <memory> b"}), is_senseless=False),
        Change("texts", to({"": "no name"}), is_senseless=False),
        *changes("on_duplicate", "keep", 3, None),
        *changes("batch_size", *positive),
        *changes("block_size", *positive),
        *changes("k", *positive),
        Change("k", to(10_000), is_senseless=False),
        Change("queries", one_cell(NAN)),
        Change("queries", one_cell(INF)),
        Change("queries", lambda was, chance: was[:, :-1]),
        Change("queries", lambda was, chance: was[None]),
        Change("queries", to("the cat")),
        Change("queries", to(None)),
        Change("queries", lambda was, chance: was.long(), is_senseless=False),
        Change("queries", lambda was, chance: torch.zeros_like(was), is_senseless=False),
    ]


def changes_of_reading() -> list[Change]:
    """What may be wrong in what names texts and chunks, and in how a store is opened."""
    wrong_ids = ("nope", 3, 2.5, None, ["a", 3], [None])
    return [
        *(Change("text_ids", to(value)) for value in wrong_ids if value is not None),
        *changes("text_id", *wrong_ids),
        *(Change("wanted", to(value)) for value in wrong_ids if value is not None),
        *changes("chunks", 3, [3], [None]),
        *changes("chunks", "a", ["a"], None, is_senseless=False),
        Change("chunks", to([]), is_senseless=False),
        *changes("other", "path", None, 3, []),
        *changes("folder", 3, None, ""),
        *changes("dtype", "float12", 3, None),
        *changes("lock_seconds", -1, NAN, "1", None),
        *changes("text", 3, None, ["a"]),
    ]


class CommandError(Exception):
    """A command that ended with status 2, and what it said."""


def _command(main: Callable[[list[str]], int], words: list[str]) -> Callable[..., Any]:
    """A command as a function of its options."""

    def call(**options: str) -> None:
        line = [*(options.pop(word[1:]) if word.startswith("$") else word for word in words)]
        for name, value in options.items():
            line += [f"--{name.replace('_', '-')}", value]
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                status = main(line)
            except SystemExit as stop:
                status = stop.code
        if status == 2:
            raise CommandError(errors.getvalue().strip().splitlines()[-1])
        if status not in (0, None):
            raise AssertionError(f"status {status}: {errors.getvalue()}")

    return call


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    model().save_pretrained(folder / "model")
    processor().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the cat sat on the mat and there it stayed. " * 40)
    (folder / "rows.jsonl").write_text(json.dumps({"text": TEXT}) + "\n" + json.dumps({"text": "a\ud800b"}) + "\n")
    (folder / "broken.jsonl").write_text('{"text": "a"\n')
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (folder / "empty").mkdir()
    (folder / "brackets.yaml").write_text("[" * 5000)
    (folder / "nan.yaml").write_text("name: nan\nlearning_rate: .nan\n")
    MemoryStore.open(folder / "store", model(), processor(), create=True, keep_text=True).append({"a": TEXT})
    return folder


def commands_area(folder: Path) -> Area:
    model_folder, text, store, nowhere = (str(folder / name) for name in ("model", "text.txt", "store", "nowhere"))

    def fixed(main: Callable, words: list[str], **options: str) -> Callable:
        return lambda chance: (_command(main, words), dict(options))

    asked = {"nearest": "2", "max_new_tokens": "2", "temperature": "0.5", "top_p": "0.9", "device": "cpu"}
    return Area(
        {
            "ask": fixed(
                ask.main, ["$model", "$store", "the cat"], model=model_folder, store=store, threads="1", **asked
            ),
            "remember": fixed(
                remember.main,
                ["$model", "$text", "--to", "$to"],
                model=model_folder,
                text=text,
                to=str(folder / "more"),
                batch_size="8",
                threads="1",
            ),
            "evaluate": fixed(evaluate.main, ["$model", "--suite", "$suite"], model=nowhere, suite="copy", limit="4"),
            "probe": fixed(probe.main, ["$model", "--text", "$text"], model=nowhere, text=text, lengths="4"),
            "publish": fixed(publish.main, ["$checkpoint", "--to", "$to"], checkpoint=nowhere, to=nowhere),
            "run": fixed(run.main, ["$recipe"], recipe=str(folder / "nan.yaml")),
        },
        changes_of_options(folder),
        senseless_calls=frozenset({"evaluate", "probe", "publish", "run"}),
        refused_with=(CommandError,),
    )


def changes_of_options(folder: Path) -> list[Change]:
    """What may be wrong in the options of a command."""
    text, nowhere = str(folder / "text.txt"), str(folder / "nowhere")
    counts = ("0", "-1", "x", "1.5", "nan")
    return [
        *changes("model", nowhere, "", text),
        *changes("store", nowhere, "", text),
        *(Change("text", to(str(folder / name))) for name in ("bytes.txt", "empty", "nowhere.txt")),
        *(Change("text", to(str(folder / name)), is_senseless=False) for name in ("rows.jsonl", "broken.jsonl")),
        Change("to", to(text)),
        *changes("nearest", *counts),
        *changes("max_new_tokens", *counts),
        *changes("limit", *counts),
        *changes("threads", *counts),
        *changes("batch_size", *counts),
        *changes("temperature", "-1", "nan", "x", "0"),
        *changes("top_p", "-1", "nan", "x", "7"),
        *changes("device", "nope", "", "cuda:99"),
        *changes("suite", "nope", ""),
        *changes("lengths", "0", "x", "-4", ""),
        *changes("checkpoint", "", text),
        *(Change("recipe", to(str(folder / name))) for name in ("brackets.yaml", "nowhere.yaml", "text.txt")),
    ]


AREAS = {
    "forward": forward_area,
    "options": forward_options_area,
    "generate": generate_area,
    "encode": encode_area,
    "processor": processor_area,
    "store": store_area,
    "commands": commands_area,
}


def _problems(name: str, numbers: range, saved: Path, tmp_path: Path) -> list[str]:
    return AREAS[name](saved if name == "commands" else tmp_path).run(name, numbers)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "first"), [(name, i) for name, n in NUM_CALLS.items() for i in range(0, n, SHARE)])
def test_generated_calls(name: str, first: int, saved: Path, tmp_path: Path) -> None:
    numbers = range(first, min(first + SHARE, NUM_CALLS[name]))
    problems = _problems(name, numbers, saved, tmp_path)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", AREAS)
def test_a_few_generated_calls(name: str, saved: Path, tmp_path: Path) -> None:
    problems = _problems(name, range(1000, 1000 + NUM_FAST[name]), saved, tmp_path)
    assert not problems, "\n".join(problems)


def test_what_is_wrong_is_found() -> None:
    def call(x: int) -> float:
        if x == 1:
            raise ValueError("too short")
        if x == 2:
            raise ValueError("The size of tensor a (3) must match the size of tensor b (4) at dimension 1")
        return [0.0, NAN, NAN, {"a": [torch.tensor(NAN)]}, 0.0, 0.0][x] if x < 5 else {}[x]

    for x, word in ((1, "does not teach"), (2, "does not teach"), (3, "no number"), (4, "accepted"), (5, "KeyError")):
        area = Area({"call": lambda chance: (call, {"x": 0})}, [Change("x", to(x), is_senseless=x == 4)])
        problems = area.run("test", range(10))
        assert problems and all(word in problem for problem in problems), problems
    assert sum(NUM_CALLS.values()) >= 700 and sum(NUM_FAST.values()) == 50
