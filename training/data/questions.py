"""Questions about texts: read from files, written in the decoder's chat template, asked of the memories of the text.

A file has rows with the fields `context`, `question` and `answer`. A context becomes whole chunks in the encoder's
tokens; its slots stand in the user's turn, an empty line before the question, as the package's pipeline asks. The loss
is on the answer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from modeling_memory import MemoryProcessor
from modeling_memory.pipeline_memory import BETWEEN

from .objectives import BatchSpec, ReadyContext, Turns, build_batch, keep_columns, without_targets

FIELDS = ("context", "question", "answer")


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
        context (`str`): The text.
        question (`str`): What is asked.
        answer (`str`): What shall be answered.
    """

    context: str
    question: str
    answer: str


def read_questions(files: Sequence[Path]) -> list[Question]:
    """Read questions from `.jsonl` and `.parquet` files.

    Raises:
        ValueError: If a file is missing or of another kind, or a row lacks a field or has none but blank text in it.
    """
    found: list[Question] = []
    for file in files:
        for number, row in enumerate(_rows(file), start=1):
            values = [row.get(name) if isinstance(row, Mapping) else None for name in FIELDS]
            for name, value in zip(FIELDS, values, strict=True):
                if not isinstance(value, str) or not value.strip():
                    raise ValueError(
                        f"{file}, row {number}: {name!r} is {value!r}, expected text. Give each row the fields "
                        f"{', '.join(FIELDS)}, or remove it."
                    )
            found.append(Question(*map(str, values)))
    if not found:
        raise ValueError("there is no question in the files; give rows with the fields context, question and answer")
    return found


def _rows(file: Path) -> list[Any]:
    try:
        if file.suffix == ".parquet":
            return pyarrow.parquet.read_table(file).to_pylist()
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}. Replace the file.") from error
    raise ValueError(f"{file} has no known ending for questions; known: .jsonl, .parquet. Convert it to one of these.")


def chat_turns(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, before: str = ""
) -> tuple[list[int], list[int]]:
    """Write a question and its answer in a tokenizer's chat template, and find the answer in it.

    A template with a `{% generation %}` block says itself which tokens are the assistant's. For one without, what
    stands there before the answer is found by leaving the answer out.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a chat template.
        question (`str`): The user's turn.
        answer (`str`): The assistant's turn.
        before (`str`): What the application writes before the question, the memory token say.

    Returns:
        Ids, and a mask of the same length: 1 for the answer and the end of its turn.

    Raises:
        ValueError: If there is no template, a turn holds a control token, or the answer cannot be parted from what
            stands before it.
    """
    if tokenizer.chat_template is None:
        raise ValueError("the decoder's tokenizer has no chat template; qa needs one: set tokenizer.chat_template")
    used = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    control = set(tokenizer.all_special_ids) - (
        {tokenizer.unk_token_id} - used
    )  # unknown letters are no control token
    for turn in (question, answer):
        # In a rendered chat nobody can tell what was typed from what the template wrote.
        typed = set(tokenizer(turn, add_special_tokens=False)["input_ids"]) & control
        if typed:
            names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(typed)))
            raise ValueError(
                f"the turn {turn!r} holds the control token {names}; write it otherwise, or remove the row"
            )
    asked = [{"role": "user", "content": before + question}]
    whole = [*asked, {"role": "assistant", "content": answer}]
    if "generation %}" in tokenizer.chat_template.replace("-%}", " %}"):
        found = tokenizer.apply_chat_template(
            whole, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = list(found["input_ids"]), list(found["assistant_masks"])
    else:
        ids = _ids(tokenizer, whole)
        opened = _ids(tokenizer, asked, add_generation_prompt=True)
        if len(opened) >= len(ids) or ids[: len(opened)] != opened:
            raise ValueError(
                "the chat template writes something else before an answer that is there than before one that is to "
                "be written; give the template a {% generation %} block around the assistant's content"
            )
        mask = [0] * len(opened) + [1] * (len(ids) - len(opened))
        mask = _until_end(ids, mask, tokenizer.eos_token_id)
    if not any(mask):
        raise ValueError(f"the chat template shows no token of the answer {answer!r}; give a longer answer")
    return ids, mask


def _ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def _until_end(ids: list[int], mask: list[int], end: int | None) -> list[int]:
    """Leave out what a template writes after the end of a turn, a line feed say: nobody generates it.

    >>> _until_end([7, 8, 2, 9], [0, 1, 1, 1], 2)
    [0, 1, 1, 0]
    """
    ends = [place for place, (index, kept) in enumerate(zip(ids, mask, strict=True)) if kept and index == end]
    return [kept * (not ends or place <= ends[-1]) for place, kept in enumerate(mask)]


class Questions:
    """Questions as ids, each built into a batch by its number.

    Args:
        questions (`Sequence[Question]`): What is asked.
        processor (`MemoryProcessor`): Cuts contexts for the encoder and holds the decoder's tokenizer.
        max_memories (`int`, *optional*): Memories that the model takes at most.

    Raises:
        ValueError: If a context needs more memories than there may be, or the template has no place for an answer.
    """

    def __init__(
        self, questions: Sequence[Question], processor: MemoryProcessor, max_memories: int | None = None
    ) -> None:
        tokenizer = processor.tokenizer
        self.chunks = [processor.split_context(question.context) for question in questions]
        self.turns, self.places = [], []
        for question in questions:
            ids, mask = chat_turns(tokenizer, question.question, question.answer, processor.memory_token + BETWEEN)
            place = ids.index(processor.memory_token_id)
            self.turns.append((ids[:place] + ids[place + 1 :], mask[:place] + mask[place + 1 :]))
            self.places.append(place)
        self.texts = [
            tokenizer(question.context, add_special_tokens=False, split_special_tokens=True, verbose=False)[
                "input_ids"
            ]
            for question in questions
        ]
        longest = max(range(len(questions)), key=lambda number: len(self.chunks[number]))
        needed = len(self.chunks[longest]) * processor.memories_per_chunk
        if max_memories is not None and needed > max_memories:
            raise ValueError(
                f"question {longest + 1} has a context of {needed} memories, but the model takes max_memories "
                f"{max_memories}; leave it out or shorten its context"
            )

    def __len__(self) -> int:
        return len(self.turns)

    def batch(self, objective: str, spec: BatchSpec, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Build the batch of the questions with the given numbers, as `build_batch` does."""
        pad = spec.special_tokens.pad
        ids, mask = _padded([self.turns[number][0] for number in numbers], pad)
        answers, _ = _padded([self.turns[number][1] for number in numbers], 0)
        chunks, chunks_mask = self._chunks([self.chunks[number] for number in numbers], pad)
        full = (
            _padded([self.texts[number] for number in numbers], pad) if objective == "distillation" else (None, None)
        )
        return build_batch(
            objective,
            ids,  # the context is ready; of the text only the number of rows is asked
            replace(spec, layout="slots", chunk_length=1, window_length=1),
            attention_mask=mask,
            context=ReadyContext(chunks, chunks_mask, *full),
            turns=Turns(ids, mask, answers, torch.tensor([self.places[number] for number in numbers])),
        )

    @staticmethod
    def _chunks(rows: list[list[list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad the chunks of rows to `(B, C, L)`."""
        most = max(map(len, rows))
        flat = [chunk for row in rows for chunk in [*row, *[[]] * (most - len(row))]]
        ids, mask = _padded(flat, pad)
        return ids.view(len(rows), most, -1), mask.view(len(rows), most, -1)


def _padded(rows: Sequence[Sequence[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows on the right; return them with their mask, both `(B, T)`."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)
    return pad_sequence(tensors, batch_first=True, padding_value=value), mask


class QuestionNumber(int):
    """The number of a question, as the last part of an item."""


class RowsWithQuestions(Dataset):
    """Rows of text, and with each the number of a question, in an order of its own.

    Args:
        rows: A dataset of rows.
        first (`int`): Number of the first question.
        count (`int`): How many questions there are.
        seed (`int`, *optional*): Seed of their order, another one in each pass; `None` asks them in turn.
    """

    def __init__(self, rows: Any, first: int, count: int, seed: int | None = None) -> None:
        self.rows = rows
        self.first = first
        self.count = count
        self.asked_seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getattr__(self, name: str) -> Any:
        if name == "rows":  # while it is being unpickled there are none
            raise AttributeError(name)
        return getattr(self.rows, name)

    def padded_to(self, multiple: int) -> "RowsWithQuestions":
        """Return the same rows with items that count for nothing after them, up to a multiple of `multiple`."""
        return RowsWithQuestions(self.rows.padded_to(multiple), self.first, self.count, self.asked_seed)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        passed, place = divmod(index, self.count)
        if self.asked_seed is not None:
            generator = torch.Generator().manual_seed(self.asked_seed * 1_000_003 + passed)
            place = int(torch.randperm(self.count, generator=generator)[place])
        return *self.rows[index], QuestionNumber(self.first + place)


def split_questions(items: list[tuple[Any, ...]]) -> tuple[list[tuple[Any, ...]], list[int]]:
    """Take the numbers of questions off the items of a batch."""
    if not isinstance(items[0][-1], QuestionNumber):
        return items, []
    return [item[:-1] for item in items], [item[-1] for item in items]


def ask(
    questions: Questions | None,
    objective: str,
    spec: BatchSpec,
    numbers: Sequence[int],
    rows: torch.Tensor,
    budget: int | None,
) -> dict[str, torch.Tensor]:
    """Build a batch of questions for a collator.

    Args:
        questions (`Questions`, *optional*): What there is to ask.
        objective (`str`): `"qa"`, or `"distillation"` of it.
        spec (`BatchSpec`): How batches are made.
        numbers (`Sequence[int]`): Numbers of the questions.
        rows (`torch.LongTensor` of shape `(B,)`): Numbers of the rows; negative ones get no target.
        budget (`int`, *optional*): Memories of each chunk.

    Raises:
        ValueError: If there are no questions.
    """
    if questions is None or not numbers:
        raise ValueError("the objective qa has no questions to ask; name files in data.questions")
    spec = spec if budget is None else replace(spec, memories_per_chunk=budget)
    batch = questions.batch(objective, spec, numbers)
    if budget is not None:
        batch["context_num_memories"] = budget * batch["context_attention_mask"].any(2).long()
    return keep_columns(without_targets(batch, rows < 0))
