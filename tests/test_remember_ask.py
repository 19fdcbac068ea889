"""`training.remember` and `training.ask`: from files to a store and from a store to an answer."""

import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch

import modeling_memory
from modeling_memory import MemoryProcessor, MemoryStore
from tests.conftest import build_tiny_tokenizer
from tests.memory_models import BLANK, CHUNK, WINDOW, build_model
from training import ask, cli, remember
from training.places import INSTALLED, REPOSITORY

LETTERS = {"a.txt": "the cat sat on the mat.", "deep/b.txt": "over the hills and over the sea.", "c.rst": "no text"}
ROWS = ["in the end", "another ring here", "here and there"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(folder)
    MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK, window_length=WINDOW).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """A folder of letters beside two files of rows, in the current folder, so that ids are short."""
    for name, text in LETTERS.items():
        (tmp_path / "letters" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "letters" / name).write_text(text)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    table = pyarrow.table({"body": ["the ring of the hills"]})
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


EXPECTED = {
    "letters/a.txt": LETTERS["a.txt"],
    "letters/deep/b.txt": LETTERS["deep/b.txt"],
    **{f"rows.jsonl#{row}": text for row, text in enumerate(ROWS)},
}


def test_files_folders_and_rows_are_remembered_under_their_names(saved, letters, capsys):
    assert remember.main([saved, "letters", "rows.jsonl", "letters/a.txt", "--to", "store", "--keep-text"]) == 0
    output = capsys.readouterr().out
    assert "5 texts remembered (0 of them anew), 0 were there" in output and "per token), int8" in output
    assert remember.main([saved, "table.parquet", "--to", "store", "--text-column", "body"]) == 0
    store = MemoryStore("store", *remember.load_memory_model(saved))
    assert {text_id: store.text(text_id) for text_id in store.text_ids} == {
        **EXPECTED,
        "table.parquet#0": "the ring of the hills",
    }
    for text_id, text in EXPECTED.items():
        inputs = store.processor(context=text, return_tensors="pt")
        alone, _ = store.model.encode_memories(inputs["context_input_ids"], inputs["context_attention_mask"])
        step = alone.abs().max().item() / 127
        torch.testing.assert_close(store.load(text_id)["memory_embeds"], alone.detach(), rtol=0, atol=step)


def test_the_same_command_goes_on_with_what_is_missing_or_has_changed(saved, letters, capsys, monkeypatch):
    command = [saved, "letters", "rows.jsonl", "--to", "store", "--keep-text", "--dtype", "int8"]
    model, processor = remember.load_memory_model(saved)
    store = MemoryStore.open("store", model, processor, create=True, dtype="int8", keep_text=True)
    texts = remember.named_texts(remember.find_sources(["letters", "rows.jsonl"]))

    def stop_after(texts, number):
        for place, text in enumerate(texts):
            if place == number:
                raise KeyboardInterrupt
            yield text

    with pytest.raises(KeyboardInterrupt):
        remember.remember(store, stop_after(texts, 3), commit_characters=1)
    assert len(MemoryStore("store")) == 3
    encoded = []
    original = MemoryStore.append
    monkeypatch.setattr(
        MemoryStore, "append", lambda self, texts, **rest: encoded.extend(texts) or original(self, texts, **rest)
    )
    assert remember.main(command) == 0
    assert encoded == ["rows.jsonl#1", "rows.jsonl#2"]
    assert "2 texts remembered (0 of them anew), 3 were there" in capsys.readouterr().out
    (letters / "letters" / "a.txt").write_text("the dog sat on the mat.")
    assert remember.main(command) == 0
    assert "1 texts remembered (1 of them anew), 4 were there" in capsys.readouterr().out
    assert MemoryStore("store").text("letters/a.txt") == "the dog sat on the mat." and len(MemoryStore("store")) == 5


def test_a_row_that_no_tokenizer_reads_is_named_and_the_others_are_stored(saved, letters, capsys):
    rows = [{"text": "in the end"}, {"text": "a\ud800b"}, {"text": 5}, {"text": "here and there"}]
    (letters / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert remember.main([saved, "rows.jsonl", "--to", "store", "--keep-text"]) == 2
    output, told = capsys.readouterr()
    assert "2 texts remembered" in output
    told = [line for line in told.splitlines() if line.startswith("error: ")]
    assert ["rows.jsonl, line 2" in told[0], "rows.jsonl, line 3" in told[1], len(told)] == [True, True, 2]
    store = MemoryStore("store")
    assert {one: store.text(one) for one in store.text_ids} == {
        "rows.jsonl#0": "in the end",
        "rows.jsonl#3": "here and there",
    }


def test_how_much_there_is_and_how_much_is_done_is_shown(saved, letters, capsys, monkeypatch):
    monkeypatch.setattr(remember, "COMMIT_CHARACTERS", 1)
    assert remember.main([saved, "letters", "rows.jsonl", "--to", "store"]) == 0
    total = sum(map(len, EXPECTED.values()))
    told = capsys.readouterr().err
    assert "remember: 100%" in told and f"{total}/{total}".replace(str(total), f"{total:.0f}.0") in told, told


def test_two_processes_fill_one_store(saved, letters):
    config = REPOSITORY / "configuration" / "accelerate" / "cpu_two_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["-m", "training.remember", saved, "letters", "rows.jsonl", "--to", "store", "--keep-text"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("5 texts remembered") == 1 and run.stdout.count("store:") == 1  # both together, once
    store = MemoryStore("store")
    assert {text_id: store.text(text_id) for text_id in store.text_ids} == EXPECTED and store.verify() == []
    assert store.generation == 3  # begun, and one change of each process


@pytest.fixture
def filled(saved, letters):
    remember.main([saved, "letters", "rows.jsonl", "--to", "store", "--keep-text", "--dtype", "float32"])
    return MemoryStore("store", *remember.load_memory_model(saved))


def test_an_answer_is_that_of_the_model_with_the_text_as_context(saved, filled, capsys):
    prompt = "<memory>the sea"
    options = ["--texts", "letters/a.txt", "--max-new-tokens", "4"]
    assert ask.main([saved, "store", prompt, *options]) == 0
    printed = capsys.readouterr().out
    inputs = filled.processor(text=prompt, context=LETTERS["a.txt"], return_tensors="pt")
    output = filled.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    assert printed.endswith(filled.processor.decode(new, skip_special_tokens=True) + "\n")


def test_used_memories_are_shown_with_what_the_model_makes_of_each(saved, filled, capsys):
    options = ["--texts", "letters/a.txt", "--show", "--regenerate", "--max-new-tokens", "2", "--nearest", "3"]
    assert ask.main([saved, "store", "the cat", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:6:2]] == ["memory 0", "memory 1", "memory 2"]
    assert lines[0].startswith("memory 0: letters/a.txt, chunk 0, characters 0 to 6, BM25 ")
    assert all(line.startswith("  regenerated: '") for line in lines[1:6:2])


def test_regeneration_is_the_blank_copy_of_each_window(filled):
    chunks = filled.chunks(["letters/a.txt", "rows.jsonl#0"])
    written = filled.regenerate(chunks)
    per_window = WINDOW // CHUNK
    expected = []
    for text_id in ("letters/a.txt", "rows.jsonl#0"):
        own = filled.chunks(text_id)
        for first in range(0, len(own), per_window):  # the plain loop
            window = own[first : first + per_window]
            row = [filled.processor.memory_token_id] * len(window) + [BLANK] * (CHUNK * len(window))
            memories = filled.memories(window).flatten(0, 1)[None]
            with torch.no_grad():
                logits = filled.model(input_ids=torch.tensor([row]), memory_embeds=memories).logits[0, len(window) :]
            for chunk, tokens in zip(window, logits.argmax(-1).split(CHUNK), strict=True):
                expected.append(filled.processor.tokenizer.decode(tokens[: chunk.num_tokens]))
    assert written == expected


def test_without_room_the_nearest_are_taken_in_reading_order(filled):
    filled.model.config.max_memories = 3
    used = ask.choose(filled, "over the sea")
    order = filled.chunks()
    places = [order.index(one.chunk) for one in used]
    assert len(places) == 3 and places == sorted(places)
    assert {one.by for one in used} == {"BM25"} and {one.chunk.text_id for one in used} == {"letters/deep/b.txt"}
    used = ask.choose(filled, "xyz", nearest=2)  # a word that no text holds: by memories
    assert len(used) == 2 and {one.by for one in used} == {"cosine"}
    with pytest.raises(ValueError, match="no words to find memories by"):
        ask.choose(filled, "<copy>")
    filled.model.config.max_memories = None
    assert [one.chunk for one in ask.choose(filled, "<copy>")] == order


def test_the_nearest_chunks_can_stand_as_text(saved, filled, capsys):
    used = ask.choose(filled, "over the sea", ["letters/deep/b.txt"], expand=1)
    (shown,) = [one for one in used if one.in_clear]
    assert shown.score == max(one.score for one in used if one.score is not None)
    arguments = [saved, "store", "over the sea", "--texts", "letters/deep/b.txt", "--expand", "1", "--show"]
    assert ask.main([*arguments, "--max-new-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("full text") == 1
    assert "answered from letters/deep/b.txt (" in captured.err and "1 as text" in captured.err


def test_prompts_are_asked_for_one_after_the_other(saved, filled, capsys):
    prompts = iter(["the mat", "<memory> <memory>", "<copy>", ""])
    options = ask.build_parser().parse_args([saved, "store", "--texts", "letters/a.txt", "--max-new-tokens", "2"])
    ask.run(options, "", ask=lambda _: next(prompts))
    printed = capsys.readouterr().out  # an answer may hold line feeds of its own
    assert printed.startswith("5 texts, ") and printed.count("\nerror: A text contains '<memory>' 2 times") == 1
    assert next(prompts, None) is None


def test_sampling_is_repeatable(saved, filled, capsys):
    written = []
    for seed in ("1", "1", "2"):
        arguments = ["the mat", "--texts", "letters/a.txt", "--temperature", "2", "--seed", seed]
        assert ask.main([saved, "store", *arguments]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] != written[2]


def test_with_json_standard_output_is_one_object(saved, letters, capsys):
    def told(status, *words):
        assert cli.main([*words, "--json"]) == status
        return json.loads(capsys.readouterr().out)

    kept = told(0, "remember", saved, "letters", "--to", "store", "--keep-text")
    assert (kept["remembered"]["stored"], kept["store"]["texts"], kept["refused"]) == (2, 2, [])
    answered = told(0, "ask", saved, "store", "the sea", "--nearest", "2", "--regenerate", "--max-new-tokens", "2")
    assert [one["chunk"]["text_id"] for one in answered["used"]] == ["letters/deep/b.txt"] * 2
    assert answered["answer"] and all(one["regenerated"] for one in answered["used"])
    assert told(2, "ask", saved, "nowhere", "x")["status"] == 2
    assert "give the prompt" in told(2, "ask", saved, "store")["error"]
    (letters / "bad.jsonl").write_text('{"text": 5}\n{"text": "in the end"}\n')
    assert "line 1" in told(2, "remember", saved, "bad.jsonl", "--to", "store")["refused"][0]


def test_the_command_names_its_verbs_and_its_version(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in INSTALLED)
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.strip() == modeling_memory.__version__
    assert cli.main(["asks"]) == 2 and cli.main(["ask", "--nope"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_user_mistakes_end_with_one_line(saved, filled, letters, capsys):
    (letters / "empty").mkdir()
    mistakes = {
        "missing.txt is no file, no folder": [saved, "missing.txt", "--to", "store"],
        "holds no file that ends in": [saved, "empty", "--to", "store"],
        "names no revision": [saved, "hub:allenai/c4", "--to", "store"],
        "was begun with the format float32": [saved, "letters", "--to", "store", "--dtype", "int8"],
        "is no folder and no Hub repository": ["nowhere/nothing", "letters", "--to", "store"],
        "no 'body'": [saved, "rows.jsonl", "--to", "store", "--text-column", "body"],
        "argument --threads: '-1'": [saved, "letters", "--to", "store", "--threads", "-1"],
    }
    for message, arguments in mistakes.items():
        assert remember.main(arguments) == 2, message
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error
    for message, arguments in {
        "is no memory store": [saved, "empty", "x"],
        "has no text 'z'": [saved, "store", "x", "--texts", "z"],
        "argument --nearest: '0': expected a whole number of 1": [saved, "store", "x", "--nearest", "0"],
        "'nope' is no device of this machine": [saved, "store", "x", "--device", "nope"],
    }.items():
        assert ask.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert len(MemoryStore("store")) == 5
