"""What a store promises to quote it quotes: every chunk is written back when it is stored, and what fails is kept."""

import pytest
import torch

from modeling_memory import MemoryProcessor, MemoryStore, MemoryStoreError
from modeling_memory.store import memory_store, remembering
from modeling_memory.store.quoting import as_texts, come_back, write_back
from tests.conftest import build_tiny_encoder_tokenizer, build_tiny_tokenizer
from tests.memory_models import BLANK, CHUNK, SLOT, WINDOW, build_model
from training.places import REPOSITORY
from training.remember import load_memory_model, main

TEXTS = {
    "inn": "The sign was newly painted; the windows had neat red curtains, and the floor was cleanly sanded.",
    "short": "He asked for a room.",
    "odd": 'Total: $3,907,113.47 (see "Annex 4" & <eos>) 🙂 naïve',
}


@pytest.fixture(scope="module")
def starter():
    return load_memory_model(REPOSITORY / "model_cards" / "starter-tiny")


@pytest.fixture
def forgetful(monkeypatch):
    """The writer gets chunks of more than two tokens wrong whose memory begins above 0, and all if above 0.2."""

    def write(model, memories, groups):
        written = write_back(model, memories, groups)
        written[memories[:, 0, 0] > 0, 2:] = 5
        written[memories[:, 0, 0] > 0.2] = 5
        return written

    monkeypatch.setattr(remembering, "write_back", write)
    monkeypatch.setattr(memory_store, "write_back", write)


def test_windows_are_written_as_one_by_one_in_a_plain_loop():
    model = build_model(memories_per_chunk=2)
    memories = torch.randn(7, 2, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    groups = [2, 2, 1, 2]
    expected, first = [], 0
    for size in groups:
        ids = torch.tensor([[SLOT] * (2 * size) + [BLANK] * (CHUNK * size)])
        with torch.no_grad():
            logits = model(ids, memory_embeds=memories[first : first + size].flatten(0, 1)[None]).logits
        expected += logits[0, 2 * size :].argmax(-1).view(size, CHUNK).tolist()
        first += size
    assert write_back(model, memories, groups).tolist() == expected


@pytest.mark.parametrize("dtype", ["float16", "int4"])
@pytest.mark.parametrize("on_loss", ["keep_text", "split"])
def test_what_does_not_come_back_is_kept_and_all_is_quoted(starter, forgetful, tmp_path, on_loss, dtype):
    store = MemoryStore.open(tmp_path / "store", *starter, create=True, dtype=dtype)
    store.append(TEXTS, on_loss=on_loss)
    plain = sum(len(starter[1].split_context(text)) for text in TEXTS.values())
    assert 0 < store.num_lost < store.num_checked == store.num_chunks
    assert store.num_chunks > plain if on_loss == "split" else store.num_chunks == plain
    for text_id, text in TEXTS.items():
        chunks = store.chunks(text_id)
        assert "".join(store.quote(text_id)) == text
        assert chunks[0].start == 0 and chunks[-1].end == len(text)
        for chunk in chunks:
            if not chunk.comes_back:
                assert store.expand(chunk) == [text[chunk.start : chunk.end]]
    copies = [MemoryStore.open(tmp_path / name, *starter, create=True, dtype=dtype) for name in ("arrow", "merged")]
    copies[0].merge(store.to_arrow())
    copies[1].merge(store)
    for copy in copies:
        assert copy.chunks() == store.chunks() and copy.quote(copy.chunks()) == store.quote(store.chunks())
        assert (copy.num_checked, copy.num_lost, copy.verify()) == (store.num_checked, store.num_lost, [])
    store.delete(list(TEXTS))
    assert (store.num_checked, store.num_lost) == (0, 0)


def test_with_a_warning_only_nothing_wrong_is_quoted(starter, forgetful, tmp_path, caplog):
    store = MemoryStore.open(tmp_path, *starter, create=True)
    store.append(TEXTS, on_loss="warn")
    assert f"{store.num_lost} of {store.num_chunks} chunks do not come back" in caplog.text
    for chunk in store.chunks():
        text = TEXTS[chunk.text_id][chunk.start : chunk.end]
        if chunk.comes_back:
            assert store.quote(chunk) == store.regenerate(chunk) == [text]
        else:
            with pytest.raises(MemoryStoreError, match="does not come back from its memories, and its text was not"):
                store.quote(chunk)


def test_a_character_that_spans_chunks_is_quoted_with_each_of_them_alone(starter, tmp_path):
    """Every place at which a border can fall inside a character, and chunks of one token after splitting."""
    texts = {f"{pad} {sign}": "a" * pad + sign * 9 for pad in range(4) for sign in ("ü", "日", "😀")}
    processor, store = starter[1], MemoryStore.open(tmp_path, *starter, create=True)
    cuts = [processor.cut_context(text) for text in texts.values()]
    alone = [processor.tokenizer.decode(row) for cut in cuts for row in cut.chunks]
    assert sum(text.endswith("\ufffd") for text in alone) > 10, "no border falls inside a character"
    store.append(texts, on_loss="warn")
    assert store.num_lost == 0
    for chunk in store.chunks():
        assert store.quote(chunk) == [texts[chunk.text_id][chunk.start : chunk.end]]
    rows = [[token] for row in cuts[-1].chunks for token in row]
    sizes = [end - start for start, end in processor.cut_context(texts["3 😀"], [1] * len(rows)).spans]
    assert "".join(as_texts(processor.tokenizer, rows, sizes)) == texts["3 😀"]
    assert as_texts(processor.tokenizer, rows[3:5], [None, None]) == ["\ufffd", "\ufffd"]


def test_a_wrong_neighbour_takes_the_characters_it_shares(starter):
    processor = starter[1]
    text = next(pad + "日" * 9 for pad in ("", "a", "aa") if processor.tokenizer.decode(
        processor.cut_context(pad + "日" * 9).chunks[0]).endswith("\ufffd"))  # fmt: skip
    cut = processor.cut_context(text)
    written = torch.tensor([row + [0] * (8 - len(row)) for row in cut.chunks])
    assert come_back(processor.tokenizer, written, cut, text) == [True] * len(cut.chunks)
    written[1, 0] = processor.tokenizer("a").input_ids[-1]
    assert come_back(processor.tokenizer, written, cut, text)[:2] == [False, False]


def test_what_was_not_tried_is_not_promised(starter, tmp_path):
    store = MemoryStore.open(tmp_path / "plain", *starter, create=True)
    store.append(TEXTS)
    assert (store.num_checked, store.num_lost) == (0, 0) and {chunk.comes_back for chunk in store.chunks()} == {None}
    with pytest.raises(MemoryStoreError, match="It was not tried whether chunk 0 of 'inn' comes back"):
        store.quote("inn")
    kept = MemoryStore.open(tmp_path / "kept", *starter, create=True, keep_text=True)
    kept.append(TEXTS)
    assert "".join(kept.quote("odd")) == TEXTS["odd"]
    coarse = MemoryStore.open(tmp_path / "coarse", *starter, create=True, dtype="int4")
    store.append(TEXTS, on_loss="keep_text", on_duplicate="replace")
    coarse.merge(store)
    assert {chunk.comes_back for chunk in coarse.chunks()} == {None}  # other numbers: not tried


def test_models_that_cannot_be_asked_say_why(tmp_path):
    lengths = {"chunk_length": CHUNK, "window_length": WINDOW}
    own = build_tiny_encoder_tokenizer()
    cases = [
        (build_model(blank_token_id=None), MemoryProcessor(build_tiny_tokenizer(), **lengths), "knows no BLANK token"),
        (build_model("bert"), MemoryProcessor(build_tiny_tokenizer(), own, **lengths), "cut text differently"),
    ]
    for place, (model, processor, why) in enumerate(cases):
        store = MemoryStore.open(tmp_path / str(place), model, processor, create=True)
        with pytest.raises(ValueError, match=why):
            store.append({"a": "the cat sat"}, on_loss="warn")
        assert len(store) == 0
    with pytest.raises(ValueError, match="expected one of 'warn', 'keep_text', 'split', or None"):
        MemoryStore.open(tmp_path / "0", *cases[0][:2]).append({"a": "the cat"}, on_loss="shout")


def test_remember_says_how_many_come_back(starter, forgetful, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXTS["inn"])
    model = str(REPOSITORY / "model_cards" / "starter-tiny")
    assert main([model, "a.txt", "--to", "store", "--on-loss", "keep_text"]) == 0
    store = MemoryStore("store", *starter)
    told = (
        f"{store.num_chunks - store.num_lost} of {store.num_chunks} chunks come back word for word, {store.num_lost}"
    )
    assert f"{told} do not; their text is kept" in capsys.readouterr().out
    assert "".join(store.quote("a.txt")) == TEXTS["inn"]
