"""The adapter for lm-evaluation-harness and its tasks: against the model itself, and on two rows a task."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from benchmarks.score_tables import language_kept, published, retention, scores
from modeling_memory import MemoryEncoderDecoderConfig, MemoryEncoderDecoderForCausalLM, MemoryProcessor
from modeling_memory.harness import readers
from modeling_memory.harness.__main__ import TASKS, main
from modeling_memory.harness.adapter import MemoryLM, NoMemoryReadError
from tests.conftest import (
    VOCAB_SIZE,
    build_tiny_encoder_tokenizer,
    build_tiny_tokenizer,
    tiny_decoder_config,
    tiny_encoder_config,
)
from training.evaluate import main as evaluate
from training.measure.benchmarks import MODES, benchmark_lines, chosen_tasks, compare_modes
from training.records.record import check_record

CHUNK, WINDOW = 4, 8
TEXT = "once there was a small fox that lived in the red house near the river and sang."
PAIRS = [("abc", " def"), (TEXT, " the end"), (TEXT[:31], " x"), ("", "so it is"), (TEXT * 2, " 12")]


def build(**fields: Any) -> MemoryEncoderDecoderForCausalLM:
    torch.manual_seed(0)
    config = MemoryEncoderDecoderConfig(
        encoder=tiny_encoder_config(),
        decoder=tiny_decoder_config(max_position_embeddings=4096),
        chunk_length=CHUNK,
        window_length=WINDOW,
        memory_token_id=VOCAB_SIZE,
        initializer_range=0.3,  # memories that visibly matter
        **fields,
    )
    return MemoryEncoderDecoderForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> MemoryEncoderDecoderForCausalLM:
    return build()


def adapter(model: Any, **options: Any) -> MemoryLM:
    return MemoryLM(model, tokenizer=build_tiny_tokenizer(), device="cpu", **options)


def requests(kind: str, arguments: list[tuple], task: str = "some") -> list[Instance]:
    return [Instance(kind, {}, given, i, metadata=(task, i, 1)) for i, given in enumerate(arguments)]


class Calls:
    """Counts the chunks that an encoder reads."""

    def __init__(self, model: Any) -> None:
        self.chunks = 0
        self.hook = model.encoder.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, positional: tuple, named: dict) -> None:
        given = positional[0] if positional else named["input_ids"]
        self.chunks += len(given)


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits[0].double().log_softmax(-1)


@torch.no_grad()
def test_loglikelihood_of_memories_equals_the_models(model):
    lm = adapter(model, mode="memory", clear=8)
    context, continuation = PAIRS[1]
    ids, targets = lm.tok_encode(context), lm.tok_encode(continuation)
    place = len(ids) - 8
    chunks = torch.tensor(ids[:place]).view(1, -1, CHUNK)
    number = chunks.shape[1]
    shown = [VOCAB_SIZE] * number + ids[place:] + targets
    logits = model(torch.tensor([shown]), context_input_ids=chunks).logits
    scores = log_softmax(logits)[-len(targets) - 1 : -1]
    calls = Calls(model)
    ((found, _),) = lm.loglikelihood(requests("loglikelihood", [(context, continuation)]), disable_tqdm=True)
    assert found == pytest.approx(float(scores.gather(1, torch.tensor(targets)[:, None]).sum()), abs=1e-5)
    assert calls.chunks == number > 5
    assert lm.counts["some"]["memory_tokens"] == place
    assert lm.counts["some"]["memories"] == number


@torch.no_grad()
@pytest.mark.parametrize("mode", ["full", "truncated", "none"])
def test_the_other_modes_are_the_plain_decoder(model, mode):
    lm, calls = adapter(model, mode=mode, clear=8), Calls(model)
    context, continuation = PAIRS[1]
    ids, targets = lm.tok_encode(context), lm.tok_encode(continuation)
    place = len(ids) - 8
    before = {"full": ids[:place], "truncated": ids[place - -(-place // CHUNK) : place], "none": []}[mode]
    scores = log_softmax(model.decoder(torch.tensor([before + ids[place:] + targets])).logits)
    scores = scores[-len(targets) - 1 : -1]
    ((found, _),) = lm.loglikelihood(requests("loglikelihood", [(context, continuation)]), disable_tqdm=True)
    assert found == pytest.approx(float(scores.gather(1, torch.tensor(targets)[:, None]).sum()), abs=1e-5)
    assert calls.chunks == 0


@pytest.mark.parametrize("length", [1, 7, 8, 9, 50, 300])
@torch.no_grad()
def test_rolling_equals_the_models_own_windows(model, length):
    """With pieces of one window: the logits of one call on the whole text."""
    lm = adapter(model, mode="memory", min_memory_chunks=0)
    text = (TEXT * 5)[:length]
    ids = [lm.prefix_token_id, *lm.tok_encode(text, add_special_tokens=False)]
    scores = log_softmax(model(torch.tensor([ids])).logits)[:-1]
    lm._count_rows = lambda *_: None  # a text of one window is refused as a memory score; here the number is wanted
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    assert found == pytest.approx(float(scores.gather(1, torch.tensor(ids[1:])[:, None]).sum()), abs=1e-4)


@torch.no_grad()
def test_rolling_in_full_is_one_causal_call():
    model = build()
    model.config.decoder.max_position_embeddings = 40
    lm = adapter(model, mode="full")
    ids = [lm.prefix_token_id, *lm.tok_encode(TEXT * 2)]
    total = 0.0
    for i in range(1, len(ids)):  # pieces of 20, each after as much as there is room for
        start = (i - 1) // 20 * 20
        scores = log_softmax(model.decoder(torch.tensor([ids[max(0, start - 20) : i]])).logits)
        total += float(scores[-1, ids[i]])
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT * 2,)]), disable_tqdm=True)
    assert found == pytest.approx(total, abs=1e-3)


@torch.no_grad()
def test_memories_of_a_short_chunk_and_a_begin_token():
    """As many tokens a memory as in a full chunk; the begin token stands before slots, or where they would be."""
    model = build(memories_per_chunk=2)
    tokenizer = build_tiny_tokenizer()
    lm, calls = adapter(model, mode="memory", clear=8, begin=True), Calls(model)
    # A last chunk of one token: half of a full one's two memories, rounded up.
    context = next(text for text in (TEXT[:end] for end in range(20, 60)) if len(lm.tok_encode(text)) % CHUNK == 1)
    continuation = " x"
    ids, targets = lm.tok_encode(context), lm.tok_encode(continuation)
    place, begin = len(ids) - 8, tokenizer.bos_token_id
    number = place // CHUNK + 1
    chunks = torch.tensor([*ids[:place], 0, 0, 0]).view(1, number, CHUNK)
    mask = torch.tensor([1] * place + [0] * 3).view(1, number, CHUNK)
    slots = 2 * number - 1
    shown = [begin, *[VOCAB_SIZE] * slots, *ids[place:], *targets]
    budget = torch.tensor([[2] * (number - 1) + [1]])
    given = {"context_input_ids": chunks, "context_attention_mask": mask, "context_num_memories": budget}
    for mode, logits in {
        "memory": model(torch.tensor([shown]), **given).logits,
        "truncated": model.decoder(torch.tensor([[begin, *ids[place - slots :], *targets]])).logits,
        "none": model.decoder(torch.tensor([[begin, *ids[place:], *targets]])).logits,
        "full": model.decoder(torch.tensor([[*ids, *targets]])).logits,
    }.items():
        scores = log_softmax(logits)[-len(targets) - 1 : -1].gather(1, torch.tensor(targets)[:, None])
        lm = adapter(model, mode=mode, clear=8, begin=True)
        ((found, _),) = lm.loglikelihood(requests("loglikelihood", [(context, continuation)]), disable_tqdm=True)
        assert found == pytest.approx(float(scores.sum()), abs=1e-5)
    assert calls.chunks == 2 * number > 2


@torch.no_grad()
def test_an_unrelated_memory_stands_before_the_whole_context(model):
    lm, calls = adapter(model, mode="unrelated"), Calls(model)
    pairs = [(TEXT, " the end"), (TEXT, " x"), ("the other one", " y")]
    found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), other, (total, _) in zip(pairs, ("the other one",) * 2 + (TEXT,), found, strict=True):
        ids, targets = lm.tok_encode(context), lm.tok_encode(continuation)
        chunk = torch.tensor([[lm.tok_encode(other)[:CHUNK]]])
        logits = model(torch.tensor([[VOCAB_SIZE, *ids, *targets]]), context_input_ids=chunk).logits
        scores = log_softmax(logits)[-len(targets) - 1 : -1].gather(1, torch.tensor(targets)[:, None])
        assert total == pytest.approx(float(scores.sum()), abs=1e-5)
    assert lm.counts["some"]["memory_requests"] == 3 == calls.chunks - 3
    with pytest.raises(ValueError, match="all 2 requests have one context"):
        lm.loglikelihood(requests("loglikelihood", pairs[:2]), disable_tqdm=True)
    with pytest.raises(ValueError, match="a rolling text has none"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT,)]), disable_tqdm=True)


@torch.no_grad()
def test_language_is_kept_bit_for_bit():
    """With the adapters of memories loaded and no memory, scores are those of the decoder alone, and the harness's."""
    model = build()
    plain = AutoModelForCausalLM.from_config(model.config.decoder).eval()
    plain.load_state_dict(model.decoder.state_dict())
    model.add_adapters(parts=["decoder"], r=2)
    for name, value in model.decoder.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value)
    asked = requests("loglikelihood", PAIRS)
    ours = adapter(model, mode="full").loglikelihood(asked, disable_tqdm=True)
    assert ours == adapter(plain, mode="full").loglikelihood(asked, disable_tqdm=True)
    theirs = HFLM(plain, tokenizer=build_tiny_tokenizer(), device="cpu").loglikelihood(asked, disable_tqdm=True)
    for (own, greedy), (other, other_greedy) in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, abs=1e-4) and greedy == other_greedy


@pytest.mark.parametrize("mode", MODES)
def test_batches_equal_singles(model, mode):
    options = {"mode": mode, "clear": 8, "min_memory_chunks": 1}
    one, many = adapter(model, **options), adapter(model, **options, batch_size=4)
    for kind, arguments in (
        ("loglikelihood", PAIRS),
        ("loglikelihood_rolling", [(TEXT,), (TEXT[:40],), (TEXT * 3,)]),
        ("generate_until", [(text, {"until": ["q"], "max_gen_toks": 9}) for text, _ in PAIRS]),
    ):
        alone = [getattr(one, kind)([r], disable_tqdm=True)[0] for r in requests(kind, arguments[1:3])]
        together = getattr(many, kind)(requests(kind, arguments), disable_tqdm=True)[1:3]
        for left, right in zip(alone, together, strict=True):
            assert left == right if isinstance(left, str) else left == pytest.approx(right, abs=1e-5)


def test_generation_reads_memories_and_stops(model):
    lm, calls = adapter(model, mode="memory", clear=8), Calls(model)
    given = {"until": [], "max_gen_toks": 12}
    (text,) = lm.generate_until(requests("generate_until", [(TEXT, given)]), disable_tqdm=True)
    assert calls.chunks == lm.counts["some"]["memories"] > 5
    stop = next(letter for letter in text[3:] if letter.strip())
    (cut,) = lm.generate_until(requests("generate_until", [(TEXT, {**given, "until": [stop]})]), disable_tqdm=True)
    assert cut == text.split(stop)[0]
    (other,) = adapter(model, mode="none", clear=8).generate_until(requests("generate_until", [(TEXT, given)]))
    assert other != text


def test_a_score_without_memories_is_refused_before_anything_is_computed(model):
    lm, calls = adapter(model, mode="memory", clear=64), Calls(model)
    short = requests("loglikelihood", PAIRS[:1], task="hellaswag")
    with pytest.raises(NoMemoryReadError, match="hellaswag: none of 1 requests .*min_memory_chunks=1"):
        lm.loglikelihood(short, disable_tqdm=True)
    assert calls.chunks == 0
    lm = adapter(model, mode="memory", clear=64, min_memory_chunks=2)
    lm.loglikelihood(short, disable_tqdm=True)
    assert calls.chunks == 1  # three tokens: two of them make a short chunk
    assert lm.counts["hellaswag"] == {
        "requests": 1, "memory_requests": 1, "context_tokens": 3, "memory_tokens": 2, "memories": 1, "cut_tokens": 0
    }  # fmt: skip


def test_what_finds_no_room_is_counted():
    model = build(max_memories=3)
    lm = adapter(model, mode="memory", clear=8)
    calls = Calls(model)
    lm.loglikelihood(requests("loglikelihood", PAIRS[1:2]), disable_tqdm=True)
    count = lm.counts["some"]
    assert calls.chunks == count["memories"] == 3
    assert count["memory_tokens"] == 12 and count["cut_tokens"] > 12


def test_an_encoder_with_its_own_tokenizer_reads_the_same_text():
    model = build(self_memory=False)
    processor = MemoryProcessor(build_tiny_tokenizer(), build_tiny_encoder_tokenizer(), chunk_length=CHUNK)
    lm, calls = MemoryLM(model, tokenizer=processor, mode="memory", clear=8, device="cpu"), Calls(model)
    lm.loglikelihood(requests("loglikelihood", PAIRS[1:2]), disable_tqdm=True)
    ids = lm.tok_encode(TEXT)
    before = lm.tokenizer.decode(ids[:-8])
    assert calls.chunks == len(processor.split_context(before))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "`mode` is 'fast'; expected one of full"),
        ({"clear": 0}, "`clear` is 0; expected a whole number of 1"),
        ({"min_memory_chunks": "x"}, "`min_memory_chunks` is 'x'"),
    ],
)
def test_wrong_options_are_told(model, options, message):
    with pytest.raises(ValueError, match=message):
        adapter(model, **options)


def test_a_plain_model_is_read_in_full_only(model):
    with pytest.raises(ValueError, match="Take mode=full"):
        adapter(model.decoder, mode="memory")
    assert adapter(model.decoder, mode="full").loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) == (
        adapter(model, mode="full").loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    )


# ---- tasks

CHOICE = {"query": "the fox ran to the", "choices": ["river.", "house.", "tree.", "sea."], "gold": 1}
LONG = {"input": "who sang?", "context": TEXT, "answers": ["the fox"], "length": 17, "language": "en", "_id": "a"}
ROWS: dict[str, list[dict]] = {
    "hellaswag_validation": [CHOICE] * 2,
    "arc_easy_test": [CHOICE] * 2,
    "arc_challenge_test": [CHOICE] * 2,
    "openbookqa_test": [CHOICE] * 2,
    "mmlu_test": [{**CHOICE, "subject": "high_school_art"}, {**CHOICE, "subject": "law"}],
    "mmlu_dev": [{**CHOICE, "subject": "law"}] * 6,
    "boolq_validation": [{"query": f"Passage: {TEXT}\nQuestion: is it red?", "choices": ["no", "yes"], "gold": 1}] * 2,
    "winogrande_validation": [{"context_options": [TEXT, TEXT[:-5]], "continuation": "the end.", "gold": 1}] * 2,
    "lambada_openai_test": [{"context": TEXT, "continuation": "fox"}] * 2,
    "gsm8k_test": [{"question": f"what is {i} and 1?", "answer": f"it is {i + 1}\n#### {i + 1}"} for i in range(7)],
    "ifeval": [
        {"key": 1, "prompt": "no commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs_json": "[{}]"}
    ] * 2,
    "xquad_en": [{"title": "The fox", "context": TEXT, "question": "who sang?", "answers": {"text": ["fox"]}}] * 2,
    "qmsum_test": [{"turns": ["a: hello", "b: good day"], "queries": [{"query": "who met?", "answer": "a, b"}] * 2}],
    "haystack_essays": [{"text": TEXT * 20}],
    "swde": [{"text": f" {TEXT} title: ", "value": " fox "}] * 2,
    **{name: [LONG] * 2 for name in ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique")},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if name == "xquad_en":
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.jsonl").write_text(text)
    (folder / "wikitext2_raw_test.txt").write_text(
        f" \n = One = \n \n {TEXT} \n = = Part = = \n x \n = Two = \n {TEXT} \n"
    )
    build_tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def names() -> list[str]:
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


@pytest.fixture(scope="module")
def results(model, data) -> dict[str, Any]:
    lm = adapter(model, mode="memory", clear=8, min_memory_chunks=1, batch_size=4, max_gen_toks=4)
    metadata = {
        "data": str(data),
        "tokenizer": str(data / "tokenizer"),
        "sizes": [1024, 2048],
        "per_size": 1,
        "words": 12,
    }
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    calls = Calls(model)
    found = simple_evaluate(
        lm,
        tasks=names(),
        limit=2,
        task_manager=manager,
        bootstrap_iters=0,
        gen_kwargs="max_gen_toks=4",
        random_seed=None,
    )
    assert found is not None
    return {**found, "counts": lm.counts, "chunks": calls.chunks}


@pytest.mark.parametrize("task", names())
def test_every_task_reads_two_rows_through_memories(results, task):
    assert results["n-samples"][task]["effective"] == 2
    count = results["counts"][task]
    assert count["memory_requests"] == count["requests"] >= 2
    metrics = {name: value for name, value in results["results"][task].items() if isinstance(value, float)}
    assert metrics and all(value == value for value in metrics.values())


def test_the_counts_are_what_the_encoder_was_given(results):
    # Rolling texts are read in pieces, and requests that differ in their last token alone are read once.
    written = [task for task, config in results["configs"].items() if config["output_type"] == "generate_until"]
    counted = sum(results["counts"][task]["memories"] for task in written)
    assert results["chunks"] > counted > 1000


def test_requests_that_differ_in_their_last_token_are_read_once(model):
    asked = requests("loglikelihood", [(TEXT, " a"), (TEXT, " b")])
    lm, calls = adapter(model, mode="memory", clear=8), Calls(model)
    found = lm.loglikelihood(asked, disable_tqdm=True)
    assert 2 * calls.chunks == lm.counts["some"]["memories"] > 10
    alone = [lm.loglikelihood([one], disable_tqdm=True)[0] for one in asked]
    assert found[0] != found[1]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in alone], abs=1e-5)


def test_prompts_are_the_harnesss_own(results):
    def prompt(task: str) -> tuple:
        return results["samples"][task][0]["arguments"][0]

    assert prompt("arc_easy") == ("Question: the fox ran to the\nAnswer:", " river.")
    assert prompt("boolq") == (f"{TEXT}\nQuestion: is it red?\nAnswer:", " no")
    assert prompt("xquad")[0] == f"Title: The fox\n\nBackground: {TEXT}\n\nQuestion: who sang?\n\nAnswer:"
    assert prompt("winogrande") == (TEXT, " the end.")
    assert prompt("lambada_openai") == (TEXT, " fox")
    assert prompt("gsm8k")[0].count("Question: ") == 6
    head = "The following are multiple choice questions (with answers) about law.\n\n"
    shots = results["samples"]["mmlu"][1]["arguments"][0][0]
    assert shots.startswith(head + "the fox ran to the\nA. river.\nB. house.\nC. tree.\nD. sea.\nAnswer: B\n\n")
    assert shots.count("Answer: B\n\n") == 5 and shots.endswith("D. sea.\nAnswer:")


@pytest.mark.parametrize("kind", ["single", "keys", "values", "tracking", "common"])
def test_needles_are_made_from_a_seed_and_fit(data, kind):
    options = {"data": str(data), "tokenizer": str(data / "tokenizer"), "sizes": [1024, 2048], "per_size": 2}
    rows = list(readers.needles(kind, **options)["test"])
    assert rows == list(readers.needles(kind, **options)["test"])
    assert rows != list(readers.needles(kind, **options, seed=1)["test"])
    assert [row["size"] for row in rows] == [1024, 2048] * 2
    for row in rows:
        length = len(build_tiny_tokenizer()(row["input"])["input_ids"])
        assert row["size"] * 0.8 < length <= row["size"]
        assert all(answer in row["input"] for answer in row["outputs"])
        assert readers.score_needle(row, [" ".join(row["outputs"])])["score"] == 1
        assert readers.score_needle(row, ["nothing"])[str(row["size"])] == 0


def test_a_file_that_is_missing_is_told(tmp_path):
    with pytest.raises(ValueError, match="--metadata data=FOLDER"):
        readers.rows("x.jsonl")
    with pytest.raises(ValueError, match="neither x.jsonl nor x.jsonl.gz"):
        readers.rows("x.jsonl", data=str(tmp_path))


def test_the_command_of_the_harness_finds_the_model(model, data, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = ["--model", "modeling-memory", "--model_args", f"pretrained={tmp_path / 'model'},mode=memory,clear=8"]
    words += ["--tasks", "xquad", "--metadata", f"data={data}", "--limit", "1", "--output_path", str(tmp_path / "out")]
    assert main(words) == 0
    assert "|xquad|" in capsys.readouterr().out
    (written,) = (tmp_path / "out").rglob("results_*.json")
    told = json.loads(written.read_text())["config"]
    assert told["mode"] == "memory" and told["memory_counts"]["xquad"]["memory_requests"] == 1


def test_the_suite_measures_all_modes_on_the_same_rows(model, data, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model"), "--suite", "benchmarks", "--data", str(data), "--tasks", "boolq,wikitext"]
    words += ["--limit", "2", "--clear", "8", "--record", str(tmp_path / "record.json")]
    words += ["--keep", str(tmp_path / "items.json")]
    assert evaluate([*words, "--modes", "full,none"]) == 0
    kept = json.loads((tmp_path / "items.json").read_text())["cells"]
    assert sorted(key.rsplit(" ", 1)[0] for key in kept) == [
        "boolq full", "boolq none", "wikitext full", "wikitext none"
    ]  # fmt: skip
    assert evaluate(words) == 0
    again = json.loads((tmp_path / "items.json").read_text())["cells"]
    assert len(again) == 8 and all(again[key] == kept[key] for key in kept), "what was there is not measured again"
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "record.json").read_text())
    check_record(record)
    assert record["run"]["status"] == "success" and record["recipe"]["tasks"] == {"boolq": 2, "wikitext": 2}
    for task, metric in (("boolq", "acc"), ("wikitext", "word_perplexity")):
        check_modes(record["metrics"][task], metric)
        assert f"{task:20} {metric:18} memory" in printed
    table = scores(record)
    assert table.cell("boolq", "memory").endswith("%") or "(" in table.cell("boolq", "memory")
    assert table.cell("boolq", "through memories") == "100%"


def check_modes(found, metric):
    """Two items in every mode, a difference within its interval, and memories where there should be some."""
    modes = found["modes"]
    assert found["headline"] == metric and list(modes) == list(MODES)
    assert {values["scores"][metric]["num_items"] for values in modes.values()} == {2}
    gap = modes["memory"]["minus"]["full"][metric]
    assert gap["interval"][0] <= gap["value"] <= gap["interval"][1]
    assert modes["memory"]["counts"]["memory_requests"] >= 2
    assert modes["none"]["counts"]["memory_requests"] == 0


def mode_of(values: list[float], metric: str = "acc", **others: Any) -> dict[str, Any]:
    mean = sum(values) / len(values)
    spread = [mean - 0.1, mean + 0.1]
    return {
        "scores": {metric: {"value": mean, "num_items": len(values), "interval": spread}},
        "counts": {"requests": 4, "memory_requests": 0},
        "items": {metric: values},
        **others,
    }


def test_the_suite_names_a_refusal():
    reason = "boolq: none of 4 requests is long enough"
    measured = {"boolq": compare_modes("boolq", {"full": mode_of([1.0, 0.0]), "memory": {"refused": reason}})}
    assert any(f"refused: {reason}" in line for line in benchmark_lines(measured))
    record = {"metrics": measured, "recipe": {"clear": 8}, "code": {"commit": None}}
    assert scores(record).cell("boolq", "memory") == "refused: no memory is read"


def test_retention_is_told_of_tasks_that_the_decoder_solves():
    modes = {"full": [1, 1, 1, 0], "memory": [1, 0, 1, 0], "truncated": [1, 0, 0, 0], "unrelated": [1, 1, 0, 0]}
    found = {mode: mode_of([float(value) for value in values], "f1") for mode, values in modes.items()}
    solved = compare_modes("xquad", found)
    assert solved["solved"] and solved["modes"]["memory"]["of_full"]["value"] == pytest.approx(2 / 3)
    assert solved["modes"]["memory"]["items"] == {"f1": "1 0 1 0"}
    assert solved["modes"]["memory"]["minus"]["truncated"]["f1"]["value"] == 0.25
    chance = compare_modes("boolq", {mode: {**values} for mode, values in found.items()})
    assert chance["solved"], "0.65 at least, where yes alone gets 0.62"
    low = compare_modes("winogrande", {mode: mode_of([1.0, 0.0]) for mode in modes})
    assert not low["solved"] and "of_full" not in low["modes"]["memory"]
    record = {"metrics": {"xquad": solved, "winogrande": low}, "recipe": {"clear": 8}, "code": {"commit": None}}
    table = retention(record)
    assert len(table.rows) == 2 and table.cell("xquad", "memory / full text").startswith("67% (")
    assert table.cell("xquad", "memory minus truncated, points").startswith("+25.0 (")
    assert language_kept(record).cell("xquad", "difference, points").startswith("-25.0 (")
    others = published(record)
    assert others.cell("winogrande", "here, full text").startswith("50.0% (")
    assert others.cell("hellaswag", "here, full text") == "" and others.cell("gsm8k", "its card") == "1.4"


def test_tasks_have_numbers_of_their_own():
    assert chosen_tasks("boolq,mmlu=57", 200) == {"boolq": 200, "mmlu": 57}
    with pytest.raises(ValueError, match="asks for '0' items of boolq"):
        chosen_tasks("boolq=0", 200)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "clm"], "measure the other suites apart"),
        ([], "--data is None; expected the folder"),
        (["--data", ".", "--tasks", "boolq,bool"], "--tasks names 'bool'; expected some of arc_challenge"),
        (["--data", ".", "--modes", "full,fast"], "--modes is full,fast; expected full and some of memory"),
    ],
)
def test_wrong_command_lines_are_told_before_a_model_is_loaded(words, message, capsys):
    assert evaluate(["nowhere", "--suite", "benchmarks", *words]) == 2
    assert re.search(message, capsys.readouterr().err)
